// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a static x86-64 ELF file asks for, checked: nothing in here maps or runs anything.
//!
//! A file is a claim like everything else of the guest: every number is checked before it is used, and a program that
//! passes has segments in ascending order, on pages of their own, in user addresses and backed by bytes of the file.
//! Addresses are those of the file; a position-independent program is moved by its load bias later.

use object::LittleEndian as LE;
use object::elf::{
    EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PF_R, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_PHDR,
    ProgramHeader64,
};
use object::pod;
use shadow_mmu::addr::{Access, PAGE_SIZE, TASK_SIZE};

const HEADER: usize = size_of::<FileHeader64<LE>>();
const PROGRAM_HEADER: usize = size_of::<ProgramHeader64<LE>>();
/// The kernel's bound for the program headers, bytes.
const MOST_HEADER_BYTES: usize = 64 << 10;

/// Why a file is not a program that can run here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// No ELF magic.
    #[error("not an ELF file: a static x86-64 ELF program is needed")]
    NotElf,
    /// 32-bit.
    #[error("not a 64-bit program: build it for x86_64")]
    Class,
    /// Big-endian.
    #[error("not a little-endian program: build it for x86_64")]
    Endianness,
    /// Another architecture's.
    #[error("a program for another machine (e_machine {0:#x}): build it for x86_64")]
    Machine(u16),
    /// An object file or a core dump.
    #[error("not a program (e_type {0:#x}): give a linked executable")]
    Type(u16),
    /// It wants an interpreter.
    #[error(
        "a dynamic program (interpreter {0}): a static x86-64 ELF program is needed: gcc -static, or -C target-feature=+crt-static for Rust"
    )]
    Dynamic(String),
    /// It wants libraries.
    #[error(
        "it needs shared libraries: a static x86-64 ELF program is needed: gcc -static, or -C target-feature=+crt-static for Rust"
    )]
    NeedsLibraries,
    /// Headers that the file does not hold, or that make no sense.
    #[error("the ELF headers are truncated or malformed ({0})")]
    Headers(&'static str),
    /// There is nothing to load.
    #[error("no loadable segment")]
    NoSegments,
    /// A segment's bytes are not in the file.
    #[error("segment {0} is truncated: the file ends before its data")]
    Truncated(usize),
    /// A segment's numbers contradict each other.
    #[error("segment {index} is malformed ({what})")]
    Segment {
        /// Its place among the program headers.
        index: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Segments share a page, or do not ascend.
    #[error("segment {0} overlaps the one before it, or comes before it")]
    Order(usize),
    /// A segment wants to be written and executed.
    #[error("segment {0} is writable and executable; no page may be both: link without -N/--omagic")]
    WriteExec(usize),
    /// A segment is not where user programs are.
    #[error("segment {index} at {addr:#x} lies outside of user addresses")]
    Address {
        /// Its place among the program headers.
        index: usize,
        /// Its address.
        addr: u64,
    },
    /// The program would start at no instruction of its own.
    #[error("the entry point {0:#x} lies in no executable segment")]
    Entry(u64),
}

/// Where a program goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// Where it says (`ET_EXEC`).
    Fixed,
    /// Anywhere at a multiple of this (static-pie).
    Anywhere {
        /// A power of two, at least a page.
        align: u64,
    },
}

/// A part of the program in memory. Not empty; all ends are checked against overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// First byte in memory.
    pub(super) addr: u64,
    /// Bytes in memory.
    pub(super) memory_size: u64,
    /// First byte in the file; at the same place in its page as `addr`.
    pub(super) offset: u64,
    /// Bytes in the file, at most `memory_size`; zeros follow.
    pub(super) file_size: u64,
    /// What the program may do with it.
    pub(super) rights: Access,
}

impl Segment {
    /// The page it starts in.
    pub(super) fn page_start(&self) -> u64 {
        self.addr & !(PAGE_SIZE - 1)
    }
    /// The page boundary behind its bytes in the file.
    pub(super) fn file_page_end(&self) -> u64 {
        (self.addr + self.file_size).next_multiple_of(PAGE_SIZE)
    }
    /// The page boundary behind all of it.
    pub(super) fn page_end(&self) -> u64 {
        (self.addr + self.memory_size).next_multiple_of(PAGE_SIZE)
    }
    fn holds(&self, addr: u64) -> bool {
        addr.checked_sub(self.addr).is_some_and(|offset| offset < self.memory_size)
    }
}

/// A program, as its file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) placement: Placement,
    pub(super) entry: u64,
    /// Ascending, at least one.
    pub(super) segments: Vec<Segment>,
    /// Where its program headers are in memory; 0 if they are not.
    pub(super) headers_at: u64,
    /// How many program headers there are.
    pub(super) header_count: u64,
}

/// `bytes` in memory of the alignment that the ELF structures want; files embedded in umbra have none.
fn aligned(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    };
    bytes.chunks(8).map(word).collect()
}

/// Whether `image` is a program that can run here, as far as its file says.
///
/// # Errors
/// Why it is not.
pub fn check_elf(image: &[u8]) -> Result<(), ElfError> {
    parse(image).map(drop)
}

/// Reads and checks the headers of `image`.
///
/// # Errors
/// [`ElfError`]: one for each way to be no static x86-64 program.
pub(super) fn parse(image: &[u8]) -> Result<Program, ElfError> {
    const CLASS_64: u8 = 2;
    const DATA_LITTLE: u8 = 1;
    match image {
        [0x7f, b'E', b'L', b'F', class, data, ..] => {
            if *class != CLASS_64 {
                return Err(ElfError::Class);
            }
            if *data != DATA_LITTLE {
                return Err(ElfError::Endianness);
            }
        }
        _ => return Err(ElfError::NotElf),
    }
    let words = aligned(image.get(..HEADER).ok_or(ElfError::Headers("file header"))?);
    let (header, _) = pod::from_bytes::<FileHeader64<LE>>(pod::bytes_of_slice(&words))
        .map_err(|()| ElfError::Headers("file header"))?;
    let machine = header.e_machine.get(LE);
    if machine != EM_X86_64 {
        return Err(ElfError::Machine(machine.0));
    }
    let kind = header.e_type.get(LE);
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(ElfError::Type(kind.0));
    }
    if usize::from(header.e_phentsize.get(LE)) != PROGRAM_HEADER {
        return Err(ElfError::Headers("e_phentsize"));
    }
    let count = usize::from(header.e_phnum.get(LE));
    let (at, bytes) = (header.e_phoff.get(LE), count * PROGRAM_HEADER);
    if bytes > MOST_HEADER_BYTES {
        return Err(ElfError::Headers("e_phnum"));
    }
    let words = aligned(part(image, at, bytes as u64).ok_or(ElfError::Headers("program headers"))?);
    let (headers, _) = pod::slice_from_bytes::<ProgramHeader64<LE>>(pod::bytes_of_slice(&words), count)
        .map_err(|()| ElfError::Headers("program headers"))?;
    refuse_dynamic(image, headers)?;

    let mut segments: Vec<Segment> = Vec::new();
    let mut align = PAGE_SIZE;
    for (index, header) in headers.iter().enumerate().filter(|(_, header)| header.p_type.get(LE) == PT_LOAD) {
        if let Some(segment) = segment(image, index, header)? {
            if segments.last().is_some_and(|before| before.page_end() > segment.page_start()) {
                return Err(ElfError::Order(index));
            }
            segments.push(segment);
        }
        let wanted = header.p_align.get(LE);
        if wanted.is_power_of_two() {
            align = align.max(wanted);
        }
    }
    if segments.is_empty() {
        return Err(ElfError::NoSegments);
    }
    let entry = header.e_entry.get(LE);
    if !segments.iter().any(|segment| segment.rights.contains(Access::EXEC) && segment.holds(entry)) {
        return Err(ElfError::Entry(entry));
    }
    let placement = if kind == ET_EXEC { Placement::Fixed } else { Placement::Anywhere { align } };
    let headers_at = headers_in_memory(headers, &segments, at);
    Ok(Program { placement, entry, segments, headers_at, header_count: count as u64 })
}

/// `len` bytes of `image` from `at`, if it has them.
fn part(image: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(at).ok()?;
    image.get(start..start.checked_add(usize::try_from(len).ok()?)?)
}

/// A program that wants somebody else to link it: by its interpreter, or by the libraries it names.
fn refuse_dynamic(image: &[u8], headers: &[ProgramHeader64<LE>]) -> Result<(), ElfError> {
    const DT_NEEDED: [u8; 8] = 1u64.to_le_bytes();
    let data = |header: &ProgramHeader64<LE>| part(image, header.p_offset.get(LE), header.p_filesz.get(LE));
    for header in headers {
        let kind = header.p_type.get(LE);
        if kind == PT_INTERP {
            let name = data(header).unwrap_or_default().split(|&byte| byte == 0).next().unwrap_or_default();
            return Err(ElfError::Dynamic(name.escape_ascii().to_string()));
        }
        if kind == PT_DYNAMIC {
            let entries = data(header).ok_or(ElfError::Headers("dynamic section"))?;
            if entries.chunks_exact(16).any(|entry| entry.starts_with(&DT_NEEDED)) {
                return Err(ElfError::NeedsLibraries);
            }
        }
    }
    Ok(())
}

/// One loadable segment; `None` for an empty one.
fn segment(image: &[u8], index: usize, header: &ProgramHeader64<LE>) -> Result<Option<Segment>, ElfError> {
    let malformed = |what| ElfError::Segment { index, what };
    let (addr, offset) = (header.p_vaddr.get(LE), header.p_offset.get(LE));
    let (memory_size, file_size) = (header.p_memsz.get(LE), header.p_filesz.get(LE));
    if memory_size == 0 {
        return if file_size == 0 { Ok(None) } else { Err(malformed("p_filesz is larger than p_memsz")) };
    }
    if file_size > memory_size {
        return Err(malformed("p_filesz is larger than p_memsz"));
    }
    if file_size > 0 && addr % PAGE_SIZE != offset % PAGE_SIZE {
        return Err(malformed("p_offset and p_vaddr lie differently in their pages"));
    }
    part(image, offset, file_size).ok_or(ElfError::Truncated(index))?;
    match addr.checked_add(memory_size) {
        Some(end) if end <= TASK_SIZE => {}
        _ => return Err(ElfError::Address { index, addr }),
    }
    let flags = header.p_flags.get(LE);
    let mut rights = Access::empty();
    rights.set(Access::READ, flags.contains(PF_R));
    rights.set(Access::WRITE, flags.contains(PF_W));
    rights.set(Access::EXEC, flags.contains(PF_X));
    if rights.contains(Access::WRITE | Access::EXEC) {
        return Err(ElfError::WriteExec(index));
    }
    Ok(Some(Segment { addr, memory_size, offset, file_size, rights }))
}

/// Where the program headers are in memory: where `PT_PHDR` says, or in the segment that holds that part of the file.
fn headers_in_memory(headers: &[ProgramHeader64<LE>], segments: &[Segment], offset: u64) -> u64 {
    if let Some(header) = headers.iter().find(|header| header.p_type.get(LE) == PT_PHDR) {
        return header.p_vaddr.get(LE);
    }
    let held = segments.iter().find_map(|segment| {
        let into = offset.checked_sub(segment.offset).filter(|into| *into < segment.file_size)?;
        Some(segment.addr + into)
    });
    held.unwrap_or(0)
}

#[cfg(test)]
pub(super) mod tests;
