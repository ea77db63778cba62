// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Values on the command line: sizes, durations, fault-around, environment, what to trace.

use super::Format;
use super::dirty::{LogArg, RING_ENTRIES, RateArg};
use super::trace::Traced;
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::shadow::{FaultAroundPolicy, RING_LEAST, RING_MOST};
use std::time::Duration;

/// `256M`, `4G`, `65536`, `64K`: bytes, with binary suffixes.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let bad =
        || format!("`{text}` is no size: write a number of bytes, or one with K, M, G or T, as in 256M");
    let text = text.strip_suffix("iB").or(text.strip_suffix('B')).unwrap_or(text);
    let (number, shift) = match text.chars().last().ok_or_else(bad)?.to_ascii_uppercase() {
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is more than 64 bits can count"))
}

/// The largest pool, bytes.
pub(super) const MOST_MEMORY: u64 = 1 << 44;

/// Memory for a guest: a size that makes a pool.
pub(super) fn memory(text: &str) -> Result<u64, String> {
    /// Root tables, monitor, zero frame, a program's own first pages.
    const LEAST: u64 = 1 << 20;
    let bytes = size(text)?;
    if bytes < LEAST {
        return Err(format!("{text} is too little to run anything: give at least 1M"));
    }
    if bytes > MOST_MEMORY {
        return Err(format!("{text} is more than the 16T that umbra can address"));
    }
    Ok(bytes)
}

/// `off`, `adaptive`, or a size that is a power of two of pages.
pub(super) fn fault_around(text: &str) -> Result<FaultAroundPolicy, String> {
    match text {
        "off" => Ok(FaultAroundPolicy::Off),
        "adaptive" => Ok(FaultAroundPolicy::Adaptive),
        _ => {
            let bytes =
                size(text).map_err(|_| format!("`{text}` is neither `off`, `adaptive` nor a size"))?;
            if bytes < PAGE_SIZE || !bytes.is_power_of_two() {
                return Err(format!("{text} is not a power of two of at least one page (4K)"));
            }
            Ok(FaultAroundPolicy::Fixed(bytes / PAGE_SIZE))
        }
    }
}

/// `10`, `10s`, `500ms`, `50us`, `2m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is no duration: write seconds, or a number with us, ms, s or m");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "" | "s" => 1.0,
        "us" => 1e-6,
        "ms" => 1e-3,
        "m" => 60.0,
        _ => return Err(bad()),
    };
    let seconds = number.parse::<f64>().map_err(|_| bad())? * scale;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| bad())?;
    if duration.is_zero() { Err(format!("{text} is no time at all")) } else { Ok(duration) }
}

/// How often something is to be done: a [`duration`] from a millisecond to a year.
pub(super) fn interval(text: &str) -> Result<Duration, String> {
    /// More often than this umbra would do nothing else.
    const LEAST: Duration = Duration::from_millis(1);
    /// Clocks can count this far.
    const MOST: Duration = Duration::from_secs(365 * 24 * 60 * 60);
    match duration(text)? {
        short if short < LEAST => Err(format!("{text} is too short: give at least 1ms")),
        long if long > MOST => Err(format!("{text} is too long: give at most a year, 525600m")),
        interval => Ok(interval),
    }
}

/// `NAME=VALUE`, or `NAME` to pass on umbra's own.
pub(super) fn environment(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some(("", _)) => Err(format!("`{text}` has no name before the =")),
        Some(_) => Ok(text.to_owned()),
        None => match std::env::var(text) {
            Ok(value) => Ok(format!("{text}={value}")),
            Err(_) => Err(format!("{text} is not set here: write {text}=VALUE")),
        },
    }
}

/// `notifier` or `notifier=json`, and with commas whatever else can be traced one day.
pub(super) fn traced(text: &str) -> Result<Traced, String> {
    let mut traced = Traced::default();
    for word in text.split(',') {
        let format = match word {
            "notifier" | "notifier=text" => Format::Text,
            "notifier=json" => Format::Json,
            _ => {
                return Err(format!(
                    "`{word}` cannot be traced; what can: notifier, notifier=json (one object a line)"
                ));
            }
        };
        if traced.notifier.replace(format).is_some() {
            return Err("`notifier` is named twice".into());
        }
    }
    Ok(traced)
}

/// An interval, `json`, or both with a comma.
pub(super) fn dirty_rate(text: &str) -> Result<RateArg, String> {
    let (mut every, mut format) = (None, None);
    for word in text.split(',') {
        let twice = match word {
            "json" => format.replace(Format::Json).is_some(),
            "text" => format.replace(Format::Text).is_some(),
            _ => {
                let bad = |why| format!("`{word}` is neither `json` nor an interval, as 1s or 100ms: {why}");
                every.replace(interval(word).map_err(bad)?).is_some()
            }
        };
        if twice {
            return Err(format!("`{text}` says the same twice"));
        }
    }
    let every = every.unwrap_or(Duration::from_secs(1));
    Ok(RateArg { every, format: format.unwrap_or(Format::Text) })
}

/// `bitmap`, `ring` or `ring:ENTRIES`.
pub(super) fn dirty_log(text: &str) -> Result<LogArg, String> {
    let entries = match text.split_once(':') {
        None if text == "bitmap" => return Ok(LogArg::Bitmap),
        None if text == "ring" => return Ok(LogArg::Ring(RING_ENTRIES)),
        Some(("ring", entries)) => entries,
        _ => return Err(format!("`{text}` is neither `bitmap`, `ring` nor `ring:ENTRIES`")),
    };
    match entries.parse::<u32>() {
        Ok(entries) if entries.is_power_of_two() && (RING_LEAST..=RING_MOST).contains(&entries) => {
            Ok(LogArg::Ring(entries))
        }
        _ => Err(format!(
            "a ring has a power of two of entries, from {RING_LEAST} to {RING_MOST}; not `{entries}`"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("256M"), Ok(256 << 20));
        assert_eq!(size("4KiB"), Ok(4096));
        assert_eq!(size("7"), Ok(7));
        for bad in ["", "M", "1.5G", "-1", "99999999999T", "1X"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert!(memory("4K").is_err() && memory("17T").is_err() && memory("1M").is_ok());
    }

    #[test]
    fn fault_around_is_a_word_or_a_power_of_two() {
        assert_eq!(fault_around("64K"), Ok(FaultAroundPolicy::Fixed(16)));
        assert_eq!(fault_around("off"), Ok(FaultAroundPolicy::Off));
        assert!(fault_around("65K").is_err() && fault_around("1K").is_err() && fault_around("on").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        for bad in ["", "0", "1h", "s", "1e999"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn intervals_are_neither_too_short_nor_too_long() {
        assert_eq!(interval("1ms"), Ok(Duration::from_millis(1)));
        assert_eq!(interval("0.001"), Ok(Duration::from_millis(1)));
        assert_eq!(interval("525600m"), Ok(Duration::from_secs(365 * 24 * 3600)));
        assert!(interval("0.9ms").is_err_and(|why| why.contains("at least 1ms")));
        assert!(interval("0.000000001").is_err_and(|why| why.contains("at least 1ms")));
        assert!(interval("99999999999").is_err_and(|why| why.contains("at most")));
        assert!(interval("0").is_err() && interval("often").is_err());
    }

    #[test]
    fn environment_wants_a_name() {
        assert_eq!(environment("A=b=c"), Ok("A=b=c".into()));
        assert!(environment("=x").is_err());
        assert!(environment("UMBRA_SURELY_NOT_SET").is_err());
    }

    #[test]
    fn what_to_trace_is_a_list() {
        assert_eq!(traced("notifier"), Ok(Traced { notifier: Some(Format::Text) }));
        assert_eq!(traced("notifier=json"), Ok(Traced { notifier: Some(Format::Json) }));
        for bad in ["", "nonsense", "notifier=xml", "notifier,", "json"] {
            assert!(traced(bad).is_err_and(|why| why.contains("notifier=json")), "{bad}");
        }
        assert!(traced("notifier,notifier=json").is_err());
    }

    #[test]
    fn how_dirty_rates_are_printed_is_a_list() {
        let arg = |every, format| Ok(RateArg { every: Duration::from_millis(every), format });
        assert_eq!(dirty_rate("1s"), arg(1000, Format::Text));
        assert_eq!(dirty_rate("json"), arg(1000, Format::Json));
        assert_eq!(dirty_rate("100ms,json"), arg(100, Format::Json));
        assert_eq!(dirty_rate("json,0.5"), arg(500, Format::Json));
        for bad in ["", "xml", "1s,2s", "json,text", "json,", "0", "json,0.1ms"] {
            assert!(dirty_rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_ring_has_a_size_that_rings_can_have() {
        assert_eq!(dirty_log("bitmap"), Ok(LogArg::Bitmap));
        assert_eq!(dirty_log("ring"), Ok(LogArg::Ring(RING_ENTRIES)));
        assert_eq!(dirty_log("ring:128"), Ok(LogArg::Ring(128)));
        for bad in ["rings", "ring:", "ring:127", "ring:64", "ring:131072", "bitmap:128", "ring:-1"] {
            assert!(dirty_log(bad).is_err(), "{bad}");
        }
    }
}
