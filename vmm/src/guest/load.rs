// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Brings a program into an address space: segments, break, stack. After `fs/binfmt_elf.c`.
//!
//! Segments are private mappings of the file, so that a page costs a frame when it is touched; each has exactly the rights
//! that the file asks for. The stack is never executable, whatever `PT_GNU_STACK` says. Nothing is random: a program finds
//! itself at the same addresses in every run.

use super::elf::{self, ElfError, Placement, Program, Segment};
use super::errno::Errno;
use super::info::STACK_LIMIT;
use super::stack::{self, Arguments, ArgumentsError};
use super::uaccess::UserMemory;
use crate::engine::Regs;
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE, TASK_SIZE};
use shadow_mmu::iommu;
use shadow_mmu::mm::vma::MMAP_MIN_ADDR;
use shadow_mmu::mm::{Backing, FileSource, MapFlags, Mm, MmError, Object};
use std::io;
use std::sync::Arc;

/// Where a static-pie goes: two thirds up the address space, as on Linux.
const LOAD_BASE: u64 = 0x5555_5555_4000;
/// Lowest address of the stack. The stack is mapped as large as it may get.
const STACK_BOTTOM: u64 = TASK_SIZE - STACK_LIMIT;

/// Why a program could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is no program that can run here.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The arguments do not fit.
    #[error(transparent)]
    Arguments(#[from] ArgumentsError),
    /// The program is larger than the guest's memory.
    #[error(
        "the program needs {needed:#x} bytes of memory and the guest has {limit:#x}: give it more with --memory"
    )]
    TooLarge {
        /// Bytes of its segments, in whole pages.
        needed: u64,
        /// Bytes of the frame pool.
        limit: u64,
    },
    /// The address space refused a mapping.
    #[error("cannot map {what} at {addr:#x}: {source}")]
    Map {
        /// What was to be mapped.
        what: &'static str,
        /// Where.
        addr: u64,
        /// Why not.
        source: MmError,
    },
    /// What belongs into memory at the start could not be written.
    #[error("cannot write {what} at {addr:#x}: the guest is out of memory; give it more with --memory")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Where.
        addr: u64,
    },
}

/// A program's file, held in memory.
#[derive(Debug)]
struct Image {
    bytes: Arc<[u8]>,
    name: String,
}

impl FileSource for Image {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let rest =
            usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..)).unwrap_or_default();
        let len = rest.len().min(into.len());
        into[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
    fn name(&self) -> &str {
        &self.name
    }
}

/// Loads `image` into the empty address space `mm` and returns the registers that its first thread starts with.
///
/// # Errors
/// [`LoadError`]. The address space is of no use then.
pub fn load(mm: &Arc<Mm>, image: Arc<[u8]>, arguments: &Arguments) -> Result<Regs, LoadError> {
    let program = elf::parse(&image)?;
    let bias = place(&program)?;
    let limit = mm.pool().stats().frames as u64 * PAGE_SIZE;
    let pages = |segment: &Segment| segment.page_end() - segment.page_start();
    let needed = program.segments.iter().map(pages).sum::<u64>();
    if needed > limit {
        return Err(LoadError::TooLarge { needed, limit });
    }
    let name = String::from_utf8_lossy(&arguments.exe).into_owned();
    let object = Object::file(mm.pool(), Arc::new(Image { bytes: image, name }));
    let user = UserMemory::new(iommu::view(mm));
    for segment in &program.segments {
        let moved = Segment { addr: segment.addr.wrapping_add(bias), ..*segment };
        map_segment(mm, &user, &object, &moved)?;
    }
    let end = program.segments.iter().map(Segment::page_end).max().unwrap_or(0);
    mm.set_brk_start(Hva(end.wrapping_add(bias)));

    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE | MapFlags::GROWSDOWN | MapFlags::NORESERVE;
    let rights = Access::READ | Access::WRITE;
    map(mm, "the stack", (STACK_BOTTOM, STACK_LIMIT), rights, flags, Backing::Anonymous)?;
    let entry = program.entry.wrapping_add(bias);
    let headers = stack::ProgramHeaders {
        addr: if program.headers_at == 0 { 0 } else { program.headers_at.wrapping_add(bias) },
        count: program.header_count,
    };
    let (rsp, block) = stack::build(TASK_SIZE, arguments, entry, headers)?;
    write(&user, "the arguments", rsp, &block)?;
    Ok(Regs { rip: entry, rsp, rflags: 0x202, ..Regs::default() })
}

/// How far the program moves: what is to be added to its addresses, modulo 2^64.
fn place(program: &Program) -> Result<u64, ElfError> {
    let first = program.segments.first().map_or(0, |segment| segment.page_start());
    let bias = match program.placement {
        Placement::Fixed => 0,
        Placement::Anywhere { align } => {
            let base = LOAD_BASE.checked_next_multiple_of(align).unwrap_or(!(align - 1));
            base.wrapping_sub(first & !(align - 1))
        }
    };
    for (index, segment) in program.segments.iter().enumerate() {
        let addr = segment.page_start().wrapping_add(bias);
        let end = addr.checked_add(segment.page_end() - segment.page_start());
        if addr < MMAP_MIN_ADDR || end.is_none_or(|end| end > STACK_BOTTOM) {
            return Err(ElfError::Address { index, addr });
        }
    }
    Ok(bias)
}

fn map_segment(
    mm: &Arc<Mm>,
    user: &UserMemory,
    object: &Arc<Object>,
    segment: &Segment,
) -> Result<(), LoadError> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    let (start, end) = (segment.page_start(), segment.page_end());
    let file_end = if segment.file_size == 0 { start } else { segment.file_page_end() };
    if file_end > start {
        let backing =
            Backing::Object { object: Arc::clone(object), offset: segment.offset & !(PAGE_SIZE - 1) };
        // The last page goes on with whatever the file has there; where memory goes on, that has to be zeros.
        let tail = segment.addr + segment.file_size;
        let zeros = if segment.memory_size > segment.file_size { file_end - tail } else { 0 };
        let rights = if zeros > 0 { segment.rights | Access::WRITE } else { segment.rights };
        map(mm, "a segment", (start, file_end - start), rights, flags, backing)?;
        write(user, "a segment's zeros", tail, &vec![0; zeros as usize])?;
        if rights != segment.rights {
            mm.mprotect(Hva(start), file_end - start, segment.rights).map_err(|source| LoadError::Map {
                what: "a segment",
                addr: start,
                source,
            })?;
        }
    }
    if end > file_end {
        map(mm, "a segment's zeros", (file_end, end - file_end), segment.rights, flags, Backing::Anonymous)?;
    }
    Ok(())
}

fn map(
    mm: &Mm,
    what: &'static str,
    (addr, len): (u64, u64),
    rights: Access,
    flags: MapFlags,
    backing: Backing,
) -> Result<(), LoadError> {
    mm.mmap(Hva(addr), len, rights, flags, backing).map(drop).map_err(|source| LoadError::Map {
        what,
        addr,
        source,
    })
}

fn write(user: &UserMemory, what: &'static str, addr: u64, bytes: &[u8]) -> Result<(), LoadError> {
    user.write(addr, bytes).map_err(|_: Errno| LoadError::Write { what, addr })
}
