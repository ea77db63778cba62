// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the headers of every image: what the library promises about the files, umbra's loader relies on.

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_GNU_STACK: u32 = 0x6474_e551;
const X: u32 = 1;
const W: u32 = 2;

/// The number of `N` bytes at `offset`.
fn number<const N: usize>(file: &[u8], offset: usize) -> [u8; N] {
    file[offset..offset + N].try_into().expect("N bytes are an array of N")
}

fn half(file: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(number(file, offset))
}

fn word(file: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(number(file, offset))
}

fn long(file: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(number(file, offset))
}

struct Segment {
    kind: u32,
    flags: u32,
    address: u64,
    size: u64,
}

/// The program headers, by the offsets of `Elf64_Ehdr` and `Elf64_Phdr`.
fn segments(file: &[u8]) -> Vec<Segment> {
    let table = usize::try_from(long(file, 32)).expect("the file fits into memory");
    let (size, count) = (usize::from(half(file, 54)), usize::from(half(file, 56)));
    (0..count)
        .map(|index| table + index * size)
        .map(|at| Segment {
            kind: word(file, at),
            flags: word(file, at + 4),
            address: long(file, at + 16),
            size: long(file, at + 40),
        })
        .collect()
}

#[test]
fn images_are_static_programs_for_x86_64() {
    for image in guest_images::all() {
        let (name, file) = (image.name, image.elf);
        // 64-bit, little-endian, version 1.
        assert!(file.starts_with(b"\x7fELF\x02\x01\x01"), "{name}");
        assert_eq!(half(file, 18), EM_X86_64, "{name}");
        assert_eq!(half(file, 16), if name == "hello-pie" { ET_DYN } else { ET_EXEC }, "{name}");
        assert_eq!(file.as_ptr().addr() % 16, 0, "{name} can be read in place");
        assert!(segments(file).iter().all(|segment| segment.kind != PT_INTERP), "{name}");
    }
}

#[test]
fn no_page_is_writable_and_executable() {
    for image in guest_images::all() {
        let name = image.name;
        let segments = segments(image.elf);
        let stack = segments.iter().find(|segment| segment.kind == PT_GNU_STACK).expect(name);
        assert_eq!(stack.flags & X, 0, "{name}");
        let loads: Vec<_> = segments.iter().filter(|segment| segment.kind == PT_LOAD).collect();
        for load in &loads {
            assert_ne!(load.flags & (W | X), W | X, "{name}: {:#x}", load.address);
        }
        for pair in loads.windows(2) {
            let end = (pair[0].address + pair[0].size).next_multiple_of(4096);
            assert!(pair[1].address >= end, "{name}: two segments share the page before {end:#x}");
        }
        let entry = long(image.elf, 24);
        let code =
            loads.iter().find(|load| (load.address..load.address + load.size).contains(&entry)).expect(name);
        assert_eq!(code.flags & (W | X), X, "{name}: the entry point");
    }
}

/// Otherwise two builds of the same source would differ, and an image would tell who built it.
#[test]
fn images_do_not_contain_build_paths() {
    for image in guest_images::all() {
        for path in [env!("CARGO_MANIFEST_DIR"), env!("CARGO_TARGET_TMPDIR")] {
            let found = image.elf.windows(path.len()).any(|bytes| bytes == path.as_bytes());
            assert!(!found, "{} contains {path}", image.name);
        }
    }
}

#[test]
fn names_are_unique_and_can_be_found() {
    for image in guest_images::all() {
        let found = guest_images::find(image.name).expect(image.name);
        assert!(std::ptr::eq(found, image), "{}", image.name);
        assert!(format!("{image:?}").contains(" bytes"), "an image is not printed byte by byte");
    }
    assert!(guest_images::find("nothing").is_none());
}
