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
use shadow_mmu::mm::vma::MMAP_MIN_ADDR;
use shadow_mmu::mm::{Backing, FileSource, MapFlags, Mm, MmError, Object};
use shadow_mmu::notifier::Misuse;
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
    /// The address space has ended.
    #[error(transparent)]
    Gone(#[from] Misuse),
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
    let user = UserMemory::new(mm)?;
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

#[cfg(test)]
mod tests {
    use super::super::elf::tests::{DATA, Header, TEXT, image};
    use super::*;
    use shadow_mmu::frame::{FramePool, FreedFrames};
    use shadow_mmu::iommu;
    use vm_memory::{Bytes, GuestAddress};

    fn space(pages: u64) -> Arc<Mm> {
        Mm::new(Arc::new(FramePool::new(pages * PAGE_SIZE, FreedFrames::Poison).unwrap())).unwrap()
    }

    fn arguments() -> Arguments {
        Arguments { args: vec![b"prog".to_vec()], env: vec![], exe: b"/prog".to_vec(), random: Some([7; 16]) }
    }

    #[test]
    fn segments_have_their_bytes_their_zeros_and_their_rights() {
        let mm = space(64);
        let file = image(2, 0x40_0010, &[TEXT, DATA]);
        let regs = load(&mm, file.clone().into(), &arguments()).unwrap();
        assert_eq!((regs.rip, regs.rsp % 16, regs.rdx), (0x40_0010, 0, 0));
        let view = iommu::view(&mm).unwrap();
        let mut data = vec![1; 0x3000];
        view.read_slice(&mut data, GuestAddress(0x40_1200)).unwrap();
        assert_eq!(data[..0x100], file[0x200..0x300]);
        assert!(
            data[0x100..].iter().all(|&byte| byte == 0),
            "what the file has behind the segment is not seen"
        );
        assert_eq!(mm.vma(Hva(0x40_0000)).unwrap().prot, Access::READ | Access::EXEC);
        assert_eq!(mm.vma(Hva(0x40_1000)).unwrap().prot, Access::READ | Access::WRITE);
        assert_eq!(mm.vma(Hva(regs.rsp)).unwrap().prot, Access::READ | Access::WRITE, "no executable stack");
        assert_eq!(mm.brk(Hva(0)), Hva(0x40_5000));
    }

    #[test]
    fn a_read_only_segment_keeps_its_rights_over_its_zeros() {
        let mm = space(64);
        let constants = Header { flags: 4, ..DATA };
        load(&mm, image(2, 0x40_0010, &[TEXT, constants]).into(), &arguments()).unwrap();
        assert_eq!(mm.vma(Hva(0x40_1000)).unwrap().prot, Access::READ);
        assert_eq!(iommu::view(&mm).unwrap().read_obj::<u64>(GuestAddress(0x40_1300)).unwrap(), 0);
    }

    #[test]
    fn a_static_pie_is_moved_as_a_whole() {
        let mm = space(64);
        let headers = [Header { addr: 0, ..TEXT }, Header { addr: 0x1200, ..DATA }];
        let regs = load(&mm, image(3, 0x10, &headers).into(), &arguments()).unwrap();
        assert_eq!(regs.rip, LOAD_BASE + 0x10);
        assert_eq!(mm.brk(Hva(0)), Hva(LOAD_BASE + 0x5000));
        let mut magic = [0; 4];
        iommu::view(&mm).unwrap().read_slice(&mut magic, GuestAddress(LOAD_BASE)).unwrap();
        assert_eq!(&magic, b"\x7fELF");
    }

    #[test]
    fn programs_that_do_not_fit_are_refused() {
        let low = Header { addr: 0x1000, ..TEXT };
        let error = load(&space(64), image(2, 0x1010, &[low]).into(), &arguments()).unwrap_err();
        assert!(matches!(error, LoadError::Elf(ElfError::Address { index: 0, addr: 0x1000 })), "{error}");
        let high = Header { addr: STACK_BOTTOM, ..TEXT };
        let error =
            load(&space(64), image(2, STACK_BOTTOM + 0x10, &[high]).into(), &arguments()).unwrap_err();
        assert!(matches!(error, LoadError::Elf(ElfError::Address { .. })), "{error}");
        let large = Header { memory_size: 65 * PAGE_SIZE, ..DATA };
        let error = load(&space(64), image(2, 0x40_0010, &[TEXT, large]).into(), &arguments()).unwrap_err();
        assert!(matches!(error, LoadError::TooLarge { .. }), "{error}");
        let align = 1 << 62;
        let program = Program {
            placement: Placement::Anywhere { align },
            ..elf::parse(&image(3, 0x40_0010, &[TEXT])).unwrap()
        };
        assert!(matches!(place(&program), Err(ElfError::Address { .. })));
    }
}
