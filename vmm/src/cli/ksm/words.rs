// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of `--ksm` and `--ksm-report`: lists with commas.
//!
//! `--ksm` may stand alone, and its list may follow behind `=` or as a word of its own. The latter is for those who know the
//! option as `--ksm all`; clap has no such thing, for it would take the program's name for the list. So [`join`] puts the two
//! together before clap sees them, where the word is a good list or can only be meant as one, so that a slip in it is told and
//! not taken for a program; a program of such a name can still be run as `./all`.
//!
//! `--ksm-report` has its list behind `=` only. What follows it is the program, and is refused where it is a good list
//! ([`ReportArg::refusal`]).

use super::super::parse;
use crate::ksm::Pace;
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::ksm::advisor::AdvisorSettings;
use shadow_mmu::ksm::{CandidateAccess, KsmSettings, SmartScan, ZeroPages};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

/// The most pages at a time: what asks the scanner something waits that long.
const MOST_PAGES: u64 = 1_000_000;
const WORDS: &str = "madvise, all, scan=PAGES/INTERVAL, advisor[=TIME], cpu=PERCENT, max-page-sharing=N, no-zero-pages, \
                     no-smart-scan, copy-on-access, reserve=SIZE";

/// Which memory is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::cli) enum Merge {
    /// What a guest advises itself, with `madvise(MADV_MERGEABLE)` or `prctl(PR_SET_MEMORY_MERGE)`.
    #[default]
    Advised,
    /// All that can be.
    All,
}

/// `--ksm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) struct SharingArg {
    pub(super) merge: Merge,
    pub(super) pace: Pace,
    /// But for the reserve.
    pub(super) settings: KsmSettings,
    /// Frames that are kept for pages that stop being shared; a part of the pool where it is not given.
    pub(super) reserve: Option<usize>,
}

/// Words of a list so far, each at most once.
#[derive(Debug, Default)]
struct Words {
    merge: Option<Merge>,
    scan: Option<(u64, Duration)>,
    target: Option<Duration>,
    cpu: Option<u32>,
    max_page_sharing: Option<u32>,
    zero_pages: Option<ZeroPages>,
    smart_scan: Option<SmartScan>,
    access: Option<CandidateAccess>,
    reserve: Option<usize>,
}

fn once<T>(place: &mut Option<T>, value: T, word: &str) -> Result<(), String> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("`{word}` says what was said before it")),
    }
}

fn number(text: &str, word: &str, least: u64, most: u64) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("`{word}` needs a number from {least} to {most}"))
}

impl Words {
    fn word(&mut self, word: &str) -> Result<(), String> {
        let unknown = || format!("`{word}` is no word of --ksm; these are: {WORDS}");
        match word.split_once('=') {
            None => match word {
                "madvise" => once(&mut self.merge, Merge::Advised, word),
                "all" => once(&mut self.merge, Merge::All, word),
                "advisor" => once(&mut self.target, AdvisorSettings::default().target_scan_time, word),
                "no-zero-pages" => once(&mut self.zero_pages, ZeroPages::Keep, word),
                "no-smart-scan" => once(&mut self.smart_scan, SmartScan::Off, word),
                "copy-on-access" => once(&mut self.access, CandidateAccess::CopyOnAccess, word),
                _ => Err(unknown()),
            },
            Some(("scan", pace)) => {
                let bad = || format!("`{word}` is no pace: write pages and how often, as in scan=1000/20ms");
                let (pages, interval) = pace.split_once('/').ok_or_else(bad)?;
                let interval = parse::interval(interval).map_err(|why| format!("`{word}`: {why}"))?;
                once(&mut self.scan, (number(pages, word, 1, MOST_PAGES)?, interval), word)
            }
            Some(("advisor", target)) => {
                let target = parse::duration(target).map_err(|why| format!("`{word}`: {why}"))?;
                if target < Duration::from_secs(1) {
                    return Err(format!("`{word}`: a pass takes the advisor at least 1s"));
                }
                once(&mut self.target, target, word)
            }
            Some(("cpu", percent)) => once(&mut self.cpu, number(percent, word, 1, 100)? as u32, word),
            Some(("max-page-sharing", most)) => {
                once(&mut self.max_page_sharing, number(most, word, 2, u32::MAX.into())? as u32, word)
            }
            Some(("reserve", size)) => {
                let bytes = parse::size(size).map_err(|why| format!("`{word}`: {why}"))?;
                let frames = usize::try_from(bytes.div_ceil(PAGE_SIZE));
                once(&mut self.reserve, frames.map_err(|_| format!("`{word}` is too much"))?, word)
            }
            Some(_) => Err(unknown()),
        }
    }

    fn arg(self) -> Result<SharingArg, String> {
        let pace = match (self.scan, self.target, self.cpu) {
            (Some(_), Some(_), _) => {
                return Err(
                    "`scan` says how many pages and `advisor` finds that out: give one of them".into()
                );
            }
            (_, None, Some(_)) => return Err("`cpu` is a limit of the advisor's: add `advisor`".into()),
            (Some((pages, interval)), None, None) => Pace::Fixed { pages, interval },
            (None, None, None) => Pace::default(),
            (None, Some(target_scan_time), cpu) => {
                let settings = AdvisorSettings::default();
                let max_cpu = cpu.unwrap_or(settings.max_cpu);
                Pace::Advisor {
                    settings: AdvisorSettings { target_scan_time, max_cpu, ..settings },
                    interval: Pace::PAUSE,
                }
            }
        };
        let settings = KsmSettings::default();
        Ok(SharingArg {
            merge: self.merge.unwrap_or_default(),
            pace,
            settings: KsmSettings {
                max_page_sharing: self.max_page_sharing.unwrap_or(settings.max_page_sharing),
                zero_pages: self.zero_pages.unwrap_or(settings.zero_pages),
                smart_scan: self.smart_scan.unwrap_or(settings.smart_scan),
                access: self.access.unwrap_or(settings.access),
                ..settings
            },
            reserve: self.reserve,
        })
    }
}

/// The list of `--ksm`.
pub(super) fn sharing(text: &str) -> Result<SharingArg, String> {
    let mut words = Words::default();
    text.split(',').try_for_each(|word| words.word(word))?;
    words.arg()
}

/// How `--ksm-report` reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) struct ReportArg {
    pub(super) format: super::Format,
    pub(super) picture: Option<PathBuf>,
}

impl ReportArg {
    /// Why `program`, which umbra is to run, cannot be meant as that, if so.
    pub(super) fn refusal(&self, program: &OsStr) -> Option<String> {
        let is_bare = self.picture.is_none() && self.format == super::Format::Text;
        let list = program.to_str().filter(|word| is_bare && report(word).is_ok())?;
        Some(format!(
            "{list} stands where the program is named; if it is how to report, write --ksm-report={list}"
        ))
    }
}

/// Whether the word behind `--ksm` is meant as its list: it is one, or has what a list has and no name, `,` or `=`, in front of
/// which there is no folder.
fn is_meant_as_list(word: &str) -> bool {
    match word.find([',', '=']) {
        Some(end) => !word.starts_with('-') && !word[..end].contains('/'),
        None => sharing(word).is_ok(),
    }
}

/// The list of `--ksm-report`: `json`, the path of a picture, or both.
pub(super) fn report(text: &str) -> Result<ReportArg, String> {
    let (mut format, mut picture) = (None, None);
    for word in text.split(',') {
        match word {
            "json" => once(&mut format, super::Format::Json, word)?,
            "text" => once(&mut format, super::Format::Text, word)?,
            path if path.ends_with(".svg") => once(&mut picture, PathBuf::from(path), word)?,
            _ => {
                return Err(format!(
                    "`{word}` is neither `json` nor the path of a picture, which ends in .svg"
                ));
            }
        }
    }
    Ok(ReportArg { format: format.unwrap_or(super::Format::Text), picture })
}

/// Joins `--ksm` and a list that follows it as a word of its own, in `args`, umbra's command line, up to the program's name.
/// `takes_value`: the options of the command that have their value in the next word.
pub(in crate::cli) fn join(args: Vec<OsString>, takes_value: impl Fn(&str) -> bool) -> Vec<OsString> {
    let mut joined = Vec::with_capacity(args.len());
    let mut args = args.into_iter().peekable();
    // umbra, and the command.
    joined.extend(args.by_ref().take(2));
    if joined.last().is_none_or(|command| command != "run") {
        joined.extend(args);
        return joined;
    }
    while let Some(arg) = args.next() {
        let option = arg.to_str().and_then(|arg| arg.strip_prefix("--")).map(str::to_owned);
        joined.push(arg);
        match option.as_deref() {
            // The program, or what is certainly followed by it.
            None | Some("") => break,
            Some("ksm") => {
                let is_list = |next: &OsString| next.to_str().is_some_and(is_meant_as_list);
                if let (Some(list), Some(option)) = (args.next_if(is_list), joined.last_mut()) {
                    option.push(OsStr::new("="));
                    option.push(list);
                }
            }
            Some(option) if takes_value(option) => joined.extend(args.next()),
            Some(_) => {}
        }
    }
    joined.extend(args);
    joined
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use crate::cli::Format;

    #[test]
    fn a_list_says_what_is_shared_and_how_fast() {
        let plain = sharing("madvise").unwrap();
        assert_eq!((plain.merge, plain.pace, plain.reserve), (Merge::Advised, Pace::default(), None));
        assert_eq!(plain.settings, KsmSettings::default());
        let fixed = sharing("all,scan=5/2ms").unwrap();
        let interval = Duration::from_millis(2);
        assert_eq!((fixed.merge, fixed.pace), (Merge::All, Pace::Fixed { pages: 5, interval }));
        let Pace::Advisor { settings, .. } = sharing("advisor=30s,cpu=5").unwrap().pace else { panic!() };
        assert_eq!((settings.target_scan_time, settings.max_cpu), (Duration::from_secs(30), 5));
        let Pace::Advisor { settings, .. } = sharing("advisor").unwrap().pace else { panic!() };
        assert_eq!(settings, AdvisorSettings::default());
        let all =
            sharing("max-page-sharing=2,no-zero-pages,no-smart-scan,copy-on-access,reserve=5K").unwrap();
        assert_eq!((all.settings.max_page_sharing, all.reserve), (2, Some(2)));
        assert_eq!(all.settings.zero_pages, ZeroPages::Keep);
        assert_eq!(all.settings.smart_scan, SmartScan::Off);
        assert_eq!(all.settings.access, CandidateAccess::CopyOnAccess);
        assert_eq!(sharing("reserve=0").unwrap().reserve, Some(0));
    }

    #[test]
    fn a_bad_word_is_named_and_so_are_the_good_ones() {
        for (bad, words) in [
            ("", &["madvise, all"][..]),
            ("some", &["`some`", "madvise, all", "copy-on-access"]),
            ("all,", &["``"]),
            ("all,madvise", &["`madvise`", "before"]),
            ("scan=5", &["scan=1000/20ms"]),
            ("scan=0/1s", &["from 1 to"]),
            ("scan=9999999/1s", &["to 1000000"]),
            ("scan=5/0", &["scan=5/0"]),
            ("scan=5/0.1ms", &["at least 1ms"]),
            ("advisor=soon", &["advisor=soon", "seconds"]),
            ("advisor=10ms", &["at least 1s"]),
            ("cpu=5", &["advisor"]),
            ("advisor,cpu=0", &["from 1 to 100"]),
            ("advisor,scan=1/1s", &["give one"]),
            ("max-page-sharing=1", &["from 2"]),
            ("reserve=much", &["256M"]),
            ("zero-pages", &["no-zero-pages"]),
        ] {
            let said = sharing(bad).unwrap_err();
            assert!(!said.contains('\n') && words.iter().all(|word| said.contains(word)), "{bad}: {said}");
        }
    }

    #[test]
    fn a_report_is_text_or_json_and_perhaps_a_picture() {
        let arg =
            |format, picture: Option<&str>| Ok(ReportArg { format, picture: picture.map(PathBuf::from) });
        assert_eq!(report("text"), arg(Format::Text, None));
        assert_eq!(report("json"), arg(Format::Json, None));
        assert_eq!(report("a/b.svg"), arg(Format::Text, Some("a/b.svg")));
        assert_eq!(report("x.svg,json"), arg(Format::Json, Some("x.svg")));
        for bad in ["", "xml", "x.png", "json,json", "x.svg,y.svg"] {
            assert!(report(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_way_to_report_is_no_program() {
        let refusal = |list: &str, program: &str| report(list).unwrap().refusal(OsStr::new(program));
        for program in ["x.svg", "a/b.svg", "json", "json,x.svg"] {
            let said = refusal("text", program).unwrap();
            assert!(said.contains(&format!("--ksm-report={program}")) && !said.contains('\n'), "{said}");
        }
        assert_eq!([refusal("text", "hello"), refusal("text", "./json")], [None, None]);
        // It was said how to report, so this is something else.
        assert_eq!([refusal("json", "json"), refusal("y.svg", "x.svg")], [None, None]);
    }

    #[test]
    fn a_list_may_follow_as_a_word_of_its_own_but_no_program_is_taken_for_one() {
        let takes_value = |option: &str| ["memory", "ksm-domain"].contains(&option);
        for (line, joined) in [
            ("umbra run --ksm all hello", "umbra run --ksm=all hello"),
            ("umbra run --ksm scan=5/1ms,all --check hello", "umbra run --ksm=scan=5/1ms,all --check hello"),
            ("umbra run --memory 64M --ksm all hello", "umbra run --memory 64M --ksm=all hello"),
            ("umbra run --ksm-domain --ksm all hello", "umbra run --ksm-domain --ksm all hello"),
            ("umbra run --ksm hello all", "umbra run --ksm hello all"),
            ("umbra run --ksm=all all", "umbra run --ksm=all all"),
            ("umbra run --ksm ./all", "umbra run --ksm ./all"),
            // Slips, for clap to complain of.
            ("umbra run --ksm all,scn=5/1ms hello", "umbra run --ksm=all,scn=5/1ms hello"),
            ("umbra run --ksm scn=5/1ms hello", "umbra run --ksm=scn=5/1ms hello"),
            ("umbra run --ksm al,scan=5/1ms hello", "umbra run --ksm=al,scan=5/1ms hello"),
            ("umbra run --ksm scan=5 hello", "umbra run --ksm=scan=5 hello"),
            ("umbra run --ksm --memory=64M hello", "umbra run --ksm --memory=64M hello"),
            ("umbra run --ksm ./all,x=1 all", "umbra run --ksm ./all,x=1 all"),
            ("umbra run --ksm al hello", "umbra run --ksm al hello"),
            ("umbra run hello --ksm all", "umbra run hello --ksm all"),
            ("umbra run -- hello --ksm all", "umbra run -- hello --ksm all"),
            ("umbra run --ksm", "umbra run --ksm"),
            ("umbra images --ksm all", "umbra images --ksm all"),
            ("umbra", "umbra"),
        ] {
            let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
            assert_eq!(join(words(line), takes_value), words(joined), "{line}");
        }
    }
}
