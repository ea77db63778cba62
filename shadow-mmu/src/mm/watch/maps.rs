// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `/proc/self/maps` knows of a range: the only place where the kernel tells a process what its mappings are.

use std::io;
use std::ops::Range;

/// One mapping of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostMapping {
    pub(super) range: Range<u64>,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Whether writes are for all to see (`MAP_SHARED`).
    pub(super) shared: bool,
}

fn parse(line: &str) -> Option<HostMapping> {
    // 7f0e4b200000-7f0e4b221000 rw-p 00000000 00:00 0    [name]
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let flags = rest.as_bytes().get(..4)?;
    Some(HostMapping {
        range: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        readable: flags[0] == b'r',
        writable: flags[1] == b'w',
        shared: flags[3] == b's',
    })
}

/// The mappings that have a part in `range`, ascending.
///
/// # Errors
/// There is no `/proc`.
pub(super) fn mappings_of(range: &Range<u64>) -> io::Result<Vec<HostMapping>> {
    let maps = std::fs::read("/proc/self/maps")?;
    // A name may be anything but a newline; what comes before it is ASCII.
    let lines = maps.split(|&byte| byte == b'\n').map(String::from_utf8_lossy);
    let mappings = lines.filter_map(|line| parse(&line));
    Ok(mappings.filter(|one| one.range.start < range.end && range.start < one.range.end).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind_are_understood() {
        let line = "7f0e4b200000-7f0e4b221000 rw-s 00001000 00:05 77    /memfd:a b (deleted)";
        let mapping = parse(line).unwrap();
        assert_eq!(mapping.range, 0x7f0e_4b20_0000..0x7f0e_4b22_1000);
        assert!(mapping.readable && mapping.writable && mapping.shared);
        let text = parse("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]").unwrap();
        assert!(!text.readable && !text.writable && !text.shared);
        assert!(parse("").is_none() && parse("nonsense").is_none() && parse("1-2 r").is_none());
    }

    #[test]
    fn our_own_code_is_one_private_mapping() {
        let at = mappings_of as *const () as u64;
        let found = mappings_of(&(at..at + 1)).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].readable && !found[0].shared && found[0].range.contains(&at));
    }
}
