// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files made by hand: what is accepted, and every way to be refused. The makers serve the loader's tests too.

use super::*;

/// A program header to be.
#[derive(Debug, Clone, Copy)]
pub(in crate::guest) struct Header {
    pub(in crate::guest) kind: u32,
    pub(in crate::guest) flags: u32,
    pub(in crate::guest) offset: u64,
    pub(in crate::guest) addr: u64,
    pub(in crate::guest) file_size: u64,
    pub(in crate::guest) memory_size: u64,
}

pub(in crate::guest) const TEXT: Header =
    Header { kind: 1, flags: 5, offset: 0, addr: 0x40_0000, file_size: 0x200, memory_size: 0x200 };
pub(in crate::guest) const DATA: Header =
    Header { kind: 1, flags: 6, offset: 0x200, addr: 0x40_1200, file_size: 0x100, memory_size: 0x3000 };

/// A file of 0x400 bytes, each the low byte of its offset where no header is. `e_type` 2 is ET_EXEC, 3 is ET_DYN.
pub(in crate::guest) fn image(e_type: u16, entry: u64, headers: &[Header]) -> Vec<u8> {
    let mut image: Vec<u8> = (0..0x400).map(|offset| offset as u8).collect();
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(16, &e_type.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &entry.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &(headers.len() as u16).to_le_bytes());
    for (index, header) in headers.iter().enumerate() {
        let at = 64 + 56 * index;
        put(at, &header.kind.to_le_bytes());
        put(at + 4, &header.flags.to_le_bytes());
        let words = [header.offset, header.addr, header.addr, header.file_size, header.memory_size, 0x1000];
        for (index, word) in words.iter().enumerate() {
            put(at + 8 + 8 * index, &word.to_le_bytes());
        }
    }
    image
}

fn parse_with(headers: &[Header]) -> Result<Program, ElfError> {
    parse(&image(2, 0x40_0010, headers))
}

#[test]
fn a_static_program_is_taken_apart() {
    let program = parse_with(&[TEXT, DATA]).unwrap();
    assert_eq!(program.placement, Placement::Fixed);
    assert_eq!(program.entry, 0x40_0010);
    assert_eq!((program.headers_at, program.header_count), (0x40_0040, 2));
    assert_eq!(program.segments[0].rights, Access::READ | Access::EXEC);
    assert_eq!(program.segments[1].page_start(), 0x40_1000);
    assert_eq!(program.segments[1].file_page_end(), 0x40_2000);
    assert_eq!(program.segments[1].page_end(), 0x40_5000);
}

#[test]
fn a_static_pie_may_go_anywhere_and_needs_no_alignment_in_our_memory() {
    let mut shifted = vec![0];
    shifted.extend(image(3, 0x10, &[Header { addr: 0, ..TEXT }]));
    let program = parse(&shifted[1..]).unwrap();
    assert_eq!(program.placement, Placement::Anywhere { align: PAGE_SIZE });
}

#[test]
fn files_for_somebody_else_are_named_as_such() {
    let good = image(2, 0x40_0010, &[TEXT]);
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        parse(&bytes).unwrap_err()
    };
    assert_eq!(parse(b"").unwrap_err(), ElfError::NotElf);
    assert_eq!(parse(b"#!/bin/sh\n").unwrap_err(), ElfError::NotElf);
    assert_eq!(with(4, 1), ElfError::Class);
    assert_eq!(with(5, 2), ElfError::Endianness);
    assert_eq!(with(18, 183), ElfError::Machine(183));
    assert_eq!(with(16, 1), ElfError::Type(1));
    let interpreter = Header { kind: 3, offset: 0x2f0, file_size: 0x20, ..TEXT };
    let mut dynamic = image(3, 0x40_0010, &[TEXT, interpreter]);
    dynamic[0x2f0..0x2f8].copy_from_slice(b"/lib/ld\0");
    assert_eq!(parse(&dynamic).unwrap_err(), ElfError::Dynamic("/lib/ld".into()));
    let section = Header { kind: 2, offset: 0x300, file_size: 0x20, ..TEXT };
    let mut library = image(3, 0x40_0010, &[TEXT, section]);
    library[0x310..0x320].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9]);
    assert_eq!(parse(&library).unwrap_err(), ElfError::NeedsLibraries);
}

#[test]
fn truncated_files_are_errors_at_every_length() {
    let good = image(2, 0x40_0010, &[TEXT, DATA]);
    for len in 0..0x300 {
        let error = parse(&good[..len]).unwrap_err();
        let expected = match len {
            0..6 => matches!(error, ElfError::NotElf),
            6..176 => matches!(error, ElfError::Headers(_)),
            176..0x200 => error == ElfError::Truncated(0),
            _ => error == ElfError::Truncated(1),
        };
        assert!(expected, "{len:#x}: {error}");
    }
    parse(&good[..0x300]).unwrap();
}

#[test]
fn header_numbers_are_not_trusted() {
    let good = image(2, 0x40_0010, &[TEXT]);
    for (at, len) in [(32, 8), (54, 2), (56, 2)] {
        let mut bytes = good.clone();
        bytes[at..at + len].fill(0xff);
        assert!(matches!(parse(&bytes).unwrap_err(), ElfError::Headers(_)), "offset {at}");
    }
    assert_eq!(parse_with(&[]).unwrap_err(), ElfError::NoSegments);
    assert_eq!(
        parse_with(&[Header { memory_size: 0, file_size: 0, ..TEXT }]).unwrap_err(),
        ElfError::NoSegments
    );
}

#[test]
fn segments_that_contradict_themselves_are_refused() {
    let malformed = |header| matches!(parse_with(&[header]).unwrap_err(), ElfError::Segment { index: 0, .. });
    assert!(malformed(Header { memory_size: 0x1ff, ..TEXT }));
    assert!(malformed(Header { memory_size: 0, ..TEXT }));
    assert!(malformed(Header { offset: 8, ..TEXT }));
    for (offset, file_size) in [(!0xfff, 0x1000), (0, u64::MAX), (0x1000, 1)] {
        let header = Header { offset, file_size, memory_size: u64::MAX, ..TEXT };
        assert_eq!(parse_with(&[header]).unwrap_err(), ElfError::Truncated(0), "{header:x?}");
    }
    for (addr, memory_size) in [(0, u64::MAX), (!0xfff, 0x1000), (TASK_SIZE - 0x1000, 0x2000)] {
        let header = Header { addr, memory_size, ..TEXT };
        assert_eq!(parse_with(&[header]).unwrap_err(), ElfError::Address { index: 0, addr });
    }
    assert_eq!(parse_with(&[Header { flags: 7, ..TEXT }]).unwrap_err(), ElfError::WriteExec(0));
}

#[test]
fn segments_ascend_and_share_no_page() {
    assert_eq!(parse_with(&[DATA, TEXT]).unwrap_err(), ElfError::Order(1));
    assert_eq!(parse_with(&[TEXT, TEXT]).unwrap_err(), ElfError::Order(1));
    let same_page = Header { addr: 0x40_0200, ..DATA };
    assert_eq!(parse_with(&[TEXT, same_page]).unwrap_err(), ElfError::Order(1));
}

#[test]
fn the_entry_lies_in_code() {
    for entry in [0, 0x40_0200, 0x40_1210, u64::MAX] {
        assert_eq!(parse(&image(2, entry, &[TEXT, DATA])).unwrap_err(), ElfError::Entry(entry));
    }
}
