// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two that answer a call: the kernel that this test runs on, and an `Mm`.

use super::common::{Machine, TestFile, pages};
use Answer::*;
use Call::*;
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
use shadow_mmu::mm::{Advice, Backing, MapFlags, MmError, Object, RemapFlags};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

pub(super) const ARENA: u64 = 0x1000_0000_0000;
pub(super) const ARENA_PAGES: u64 = 48;
pub(super) const FILE_PAGES: u64 = 6;
/// No address.
pub(super) const NULL: u64 = 1 << 62;

/// A call. Addresses are byte offsets from [`ARENA`]; those past 2^40 are taken as they are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    /// Address, length, rights, flags.
    Map(u64, u64, Access, i32),
    /// Address, length, rights, flags, offset in the file.
    MapFile(u64, u64, Access, i32, u64),
    Unmap(u64, u64),
    Protect(u64, u64, Access),
    /// Address, old length, new length, flags, new address.
    Remap(u64, u64, u64, i32, u64),
    Advise(u64, u64, i32),
    Resident(u64, u64),
    Sync(u64, u64, i32),
    /// Writes a word, where that is allowed.
    Write(u64, u64),
    /// Reads a word.
    Read(u64),
}

pub(super) fn address(offset: u64) -> u64 {
    match offset {
        NULL => 0,
        0..0x100_0000_0000 => ARENA + offset,
        _ => offset,
    }
}

/// What a call came to: an errno, or what is worth comparing of its result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    /// An address in the arena.
    At(u64),
    /// An address of its own choice.
    Elsewhere,
    Pages(Vec<u8>),
    Word(u64),
    Errno(i32),
}

pub(super) fn placed(at: u64) -> Answer {
    if (ARENA..ARENA + pages(ARENA_PAGES)).contains(&at) { At(at - ARENA) } else { Elsewhere }
}

/// What is mapped in the arena: page, rights, shared.
pub(super) type Shape = Vec<(u64, Access, bool)>;

/// The address space of this process.
pub(super) struct Kernel {
    memory: File,
    file: File,
    elsewhere: Vec<(u64, u64)>,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

pub(super) fn syscall(number: libc::c_long, args: [u64; 6]) -> Result<u64, i32> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: only the calls of `Kernel` come here. They map, unmap and change nothing outside the arena (which belongs to
    // whoever holds `ALONE`) but for mappings that the kernel places in free space, and no Rust object lives in either.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Ok(result as u64)
    }
}

impl Kernel {
    pub(super) fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: the name is a C string; the call touches no memory of ours.
        let fd = unsafe { libc::memfd_create(c"linux-errors".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
        let mut file = unsafe { File::from_raw_fd(fd) };
        for page in 0..FILE_PAGES {
            let mut bytes = vec![page as u8; PAGE_SIZE as usize];
            bytes[..8].copy_from_slice(&TestFile::tag(page).to_le_bytes());
            file.write_all(&bytes).unwrap();
        }
        let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
        let kernel = Self { memory, file, elsewhere: Vec::new(), _alone: alone };
        assert_eq!(kernel.shape(), [], "the arena is not free");
        kernel
    }

    pub(super) fn call(&mut self, call: Call) -> Answer {
        let done = |_| Done;
        let result = match call {
            Map(at, len, prot, flags) => {
                let args =
                    [address(at), len, prot_bits(prot), (flags | libc::MAP_ANONYMOUS) as u64, u64::MAX, 0];
                self.note(syscall(libc::SYS_mmap, args), len)
            }
            MapFile(at, len, prot, flags, offset) => {
                let fd = self.file.as_raw_fd() as u64;
                self.note(
                    syscall(libc::SYS_mmap, [address(at), len, prot_bits(prot), flags as u64, fd, offset]),
                    len,
                )
            }
            Unmap(at, len) => syscall(libc::SYS_munmap, [address(at), len, 0, 0, 0, 0]).map(done),
            Protect(at, len, prot) => {
                syscall(libc::SYS_mprotect, [address(at), len, prot_bits(prot), 0, 0, 0]).map(done)
            }
            Remap(at, old_len, new_len, flags, to) => {
                let args = [address(at), old_len, new_len, flags as u64, address(to), 0];
                self.note(syscall(libc::SYS_mremap, args), new_len)
            }
            Advise(at, len, advice) => {
                syscall(libc::SYS_madvise, [address(at), len, advice as u64, 0, 0, 0]).map(done)
            }
            Resident(at, len) => {
                let mut vector = vec![0u8; len.div_ceil(PAGE_SIZE).min(4096) as usize + 1];
                let result =
                    syscall(libc::SYS_mincore, [address(at), len, vector.as_mut_ptr() as u64, 0, 0, 0]);
                vector.truncate(len.div_ceil(PAGE_SIZE).min(4096) as usize);
                result.map(|_| Pages(vector.iter().map(|byte| byte & 1).collect()))
            }
            Sync(at, len, flags) => {
                syscall(libc::SYS_msync, [address(at), len, flags as u64, 0, 0, 0]).map(done)
            }
            Write(at, value) => {
                // `/proc/self/mem` writes where the program could not; that is not what is asked here.
                let allowed = self
                    .shape()
                    .iter()
                    .any(|(page, prot, _)| *page == at / PAGE_SIZE && prot.contains(Access::WRITE));
                let bytes = value.to_le_bytes();
                if allowed && self.memory.write_at(&bytes, address(at)).is_ok() {
                    Ok(Done)
                } else {
                    Err(libc::EFAULT)
                }
            }
            Read(at) => self.word(at).map(Word).ok_or(libc::EFAULT),
        };
        result.unwrap_or_else(Errno)
    }

    fn word(&self, at: u64) -> Option<u64> {
        let readable = self.shape().iter().any(|(page, prot, _)| *page == at / PAGE_SIZE && !prot.is_empty());
        let mut bytes = [0; 8];
        (readable && self.memory.read_at(&mut bytes, address(at)).is_ok()).then(|| u64::from_le_bytes(bytes))
    }

    /// Keeps in mind what must be unmapped in the end.
    fn note(&mut self, result: Result<u64, i32>, len: u64) -> Result<Answer, i32> {
        result.map(|at| {
            if placed(at) == Elsewhere {
                self.elsewhere.push((at, len));
            }
            placed(at)
        })
    }

    pub(super) fn shape(&self) -> Shape {
        let mut maps = String::new();
        File::open("/proc/self/maps").unwrap().read_to_string(&mut maps).unwrap();
        let mut shape = Vec::new();
        for line in maps.lines() {
            let (range, rest) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
            let mut prot = Access::empty();
            for (letter, flag) in [('r', Access::READ), ('w', Access::WRITE), ('x', Access::EXEC)] {
                prot.set(flag, rest[..3].contains(letter));
            }
            let pages = (start / PAGE_SIZE..end / PAGE_SIZE)
                .filter(|page| (ARENA / PAGE_SIZE..ARENA / PAGE_SIZE + ARENA_PAGES).contains(page));
            shape.extend(pages.map(|page| (page - ARENA / PAGE_SIZE, prot, rest.as_bytes()[3] == b's')));
        }
        shape
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.elsewhere.push((ARENA, pages(ARENA_PAGES)));
        for (at, len) in self.elsewhere.drain(..) {
            let _ = syscall(libc::SYS_munmap, [at, len, 0, 0, 0, 0]);
        }
    }
}

pub(super) fn prot_bits(prot: Access) -> u64 {
    let bit = |flag, bit: i32| if prot.contains(flag) { bit } else { 0 };
    let bits = bit(Access::READ, libc::PROT_READ) | bit(Access::WRITE, libc::PROT_WRITE);
    (bits | bit(Access::EXEC, libc::PROT_EXEC)) as u64
}

/// The address space under test.
pub(super) struct Ours {
    pub(super) machine: Machine,
    pub(super) file: Arc<Object>,
}

impl Ours {
    pub(super) fn new() -> Self {
        let machine = Machine::new(512);
        let file = Object::file(&machine.pool, TestFile::new(pages(FILE_PAGES)));
        Self { machine, file }
    }

    pub(super) fn call(&self, call: Call) -> Answer {
        let mm = &self.machine.mm;
        let hva = |at| Hva(address(at));
        let done = |()| Done;
        let map_flags = |flags: i32| MapFlags::from_bits_truncate(flags as u32);
        let result = match call {
            Map(at, len, prot, flags) => {
                mm.mmap(hva(at), len, prot, map_flags(flags), Backing::Anonymous).map(|at| placed(at.0))
            }
            MapFile(at, len, prot, flags, offset) => {
                let backing = Backing::Object { object: Arc::clone(&self.file), offset };
                mm.mmap(hva(at), len, prot, map_flags(flags), backing).map(|at| placed(at.0))
            }
            Unmap(at, len) => mm.munmap(hva(at), len).map(done),
            Protect(at, len, prot) => mm.mprotect(hva(at), len, prot).map(done),
            Remap(at, old_len, new_len, flags, to) => {
                let flags = RemapFlags::from_bits(flags as u32).ok_or(MmError::Invalid);
                flags
                    .and_then(|flags| mm.mremap(hva(at), old_len, new_len, flags, hva(to)))
                    .map(|at| placed(at.0))
            }
            Advise(at, len, advice) => match Advice::from_raw(advice) {
                Some(advice) => mm.madvise(hva(at), len, advice).map(done),
                None => Err(MmError::Invalid),
            },
            Resident(at, len) => mm.mincore(hva(at), len).map(Pages),
            Sync(at, len, flags) => mm.msync(hva(at), len, flags).map(done),
            Write(at, value) => {
                let mut vcpu = self.machine.vcpu(0, Default::default());
                vcpu.write(hva(at), value).map(done).map_err(|_| MmError::Fault)
            }
            Read(at) => {
                let mut vcpu = self.machine.vcpu(0, Default::default());
                vcpu.read(hva(at)).map(Word).map_err(|_| MmError::Fault)
            }
        };
        result.unwrap_or_else(|error| Errno(error.errno()))
    }

    pub(super) fn shape(&self) -> Shape {
        let vmas = self.machine.mm.vmas();
        let pages_of = |vma: &shadow_mmu::mm::Vma| {
            let (prot, shared) = (vma.prot, vma.is_shared());
            let pages = vma
                .range
                .page_numbers()
                .filter(|page| (ARENA / PAGE_SIZE..ARENA / PAGE_SIZE + ARENA_PAGES).contains(page));
            pages.map(move |page| (page - ARENA / PAGE_SIZE, prot, shared)).collect::<Vec<_>>()
        };
        vmas.iter().flat_map(pages_of).collect()
    }
}
