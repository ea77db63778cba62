// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What plans write for error numbers, KVM's exit reasons, addresses and shares of memory; and back, for plans that umbra writes.

use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE, TASK_SIZE};
use shadow_mmu::inject::{Effects, Point};
use std::time::Duration;

/// What plans call an effect.
const EFFECTS: [(Effects, &str); 6] = [
    (Effects::DELAY, "delay"),
    (Effects::STALL, "stall"),
    (Effects::CORRUPT, "corrupt"),
    (Effects::SPLIT, "split"),
    (Effects::EXIT, "exit"),
    (Effects::MEMORY, "memory"),
];

/// The names of what can be made to happen at `point`, errors aside.
pub(crate) fn effect_names(point: &Point) -> impl Iterator<Item = &'static str> {
    EFFECTS.iter().filter(|(effect, _)| point.effects.contains(*effect)).map(|(_, name)| *name)
}

/// The error numbers that some point has.
const ERRNOS: [(i32, &str); 17] = [
    (libc::EPERM, "EPERM"),
    (libc::EINTR, "EINTR"),
    (libc::EIO, "EIO"),
    (libc::EAGAIN, "EAGAIN"),
    (libc::ENOMEM, "ENOMEM"),
    (libc::EACCES, "EACCES"),
    (libc::EFAULT, "EFAULT"),
    (libc::EBUSY, "EBUSY"),
    (libc::EINVAL, "EINVAL"),
    (libc::EMFILE, "EMFILE"),
    (libc::EFBIG, "EFBIG"),
    (libc::ENOSPC, "ENOSPC"),
    (libc::EPIPE, "EPIPE"),
    (libc::ENOSYS, "ENOSYS"),
    (libc::EOPNOTSUPP, "EOPNOTSUPP"),
    (libc::ENFILE, "ENFILE"),
    (libc::ENODEV, "ENODEV"),
];

/// The name of an error number, as `ENOMEM`.
pub fn errno_name(errno: i32) -> String {
    let known = ERRNOS.iter().find(|(number, _)| *number == errno);
    known.map_or_else(|| format!("error {errno}"), |(_, name)| (*name).to_owned())
}

/// The error number of this name.
pub(super) fn errno(name: &str) -> Option<i32> {
    ERRNOS.iter().find(|(_, known)| *known == name).map(|(number, _)| *number)
}

/// Exit reasons of KVM's that no guest of umbra's can cause.
const EXITS: [(u32, &str); 5] = [
    (kvm_bindings::KVM_EXIT_UNKNOWN, "unknown"),
    (kvm_bindings::KVM_EXIT_HLT, "hlt"),
    (kvm_bindings::KVM_EXIT_SHUTDOWN, "shutdown"),
    (kvm_bindings::KVM_EXIT_FAIL_ENTRY, "fail-entry"),
    (kvm_bindings::KVM_EXIT_INTERNAL_ERROR, "internal-error"),
];

/// Their names.
pub(super) fn exit_names() -> impl Iterator<Item = &'static str> {
    EXITS.iter().map(|(_, name)| *name)
}

pub(super) fn exit(name: &str) -> Option<u32> {
    EXITS.iter().find(|(_, known)| *known == name).map(|(reason, _)| *reason)
}

pub(super) fn exit_name(reason: u32) -> &'static str {
    EXITS.iter().find(|(known, _)| *known == reason).map_or("unknown", |(_, name)| name)
}

/// `0x7f0000-0x800000` (the end is not part of it), or one address for the page that it is in.
pub(super) fn range(text: &str) -> Result<HvaRange, String> {
    let bad = || format!("`{text}` is no address: write 0x1000 for that page, or 0x1000-0x3000 for a range");
    let address = |text: &str| {
        let hex = text.trim().strip_prefix("0x").ok_or_else(bad)?;
        u64::from_str_radix(&hex.replace('_', ""), 16).map_err(|_| bad())
    };
    let (start, end) = match text.split_once('-') {
        Some((start, end)) => (address(start)?, address(end)?),
        None => {
            let page = address(text)? / PAGE_SIZE * PAGE_SIZE;
            (page, page.saturating_add(PAGE_SIZE))
        }
    };
    if start >= end || end > TASK_SIZE {
        return Err(format!("`{text}` is not within a guest's addresses, 0x0-{TASK_SIZE:#x}"));
    }
    Ok(HvaRange { start: Hva(start), end: Hva(end) })
}

/// The text of a range that [`range`] reads.
pub(super) fn range_text(range: HvaRange) -> String {
    format!("{:#x}-{:#x}", range.start.0, range.end.0)
}

/// The text of a duration that `parse::duration` reads.
pub(super) fn duration_text(duration: Duration) -> String {
    match duration.as_micros() {
        micros if micros % 1000 == 0 => format!("{}ms", micros / 1000),
        micros => format!("{micros}us"),
    }
}

/// `25%`, as thousandths.
pub(super) fn share(text: &str) -> Result<u32, String> {
    let bad = || format!("`{text}` is no share: write a percentage, as in 25%");
    let percent: f64 = text.strip_suffix('%').ok_or_else(bad)?.trim().parse().map_err(|_| bad())?;
    if !(0.0..=100.0).contains(&percent) {
        return Err(format!("`{text}` is not between 0% and 100%"));
    }
    Ok((percent * 10.0).round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_its_page_and_a_range_is_itself() {
        assert_eq!(range_text(range("0x1234").unwrap()), "0x1000-0x2000");
        assert_eq!(range_text(range("0x1_000-0x3000").unwrap()), "0x1000-0x3000");
        for bad in ["", "1000", "0x", "0x2000-0x1000", "0x0-0xffffffffffffffff", "0x1000-", "-0x1000"] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_error_that_a_point_has_has_a_name() {
        for point in super::super::points::all() {
            for (number, _) in point.errors {
                assert_eq!(errno(&errno_name(*number)), Some(*number), "{}", point.name);
            }
        }
    }

    #[test]
    fn shares_are_percentages() {
        assert_eq!(share("12.5%"), Ok(125));
        assert!(share("101%").is_err() && share("12").is_err() && share("x%").is_err());
    }
}
