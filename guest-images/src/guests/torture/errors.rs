// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls that must fail, each with just the error that Linux gives, and those that look wrong but
//! succeed. None of them changes anything; that is seen when the model is compared the next time.

use crate::model::Backing;
use crate::rt::PAGE;
use crate::rt::sys::{self, EBADF, EEXIST, EFAULT, EINVAL, ENOMEM, Return};
use crate::rt::sys::{
    MADV_DONTNEED, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MREMAP_FIXED, MREMAP_MAYMOVE,
    PROT_READ, PROT_RW,
};
use crate::run::Run;

/// Neither a user address nor a length that fits, with four- and with five-level page tables.
const HUGE: usize = 1 << 62;
/// A length that overflows when it is rounded up to pages.
const OVERFLOW: usize = usize::MAX - 1;
/// A length that, added to any user address, wraps around.
const WRAP: usize = usize::MAX - PAGE + 1;

/// A call, in the order number and arguments of the system call, and its only right answer.
enum Call {
    Mmap([usize; 6]),
    Munmap(usize, usize),
    Mprotect(usize, usize, usize),
    Mremap([usize; 5]),
    Madvise(usize, usize, usize),
}

use Call::{Madvise, Mmap, Mprotect, Mremap, Munmap};

/// For mmap of anonymous memory: no descriptor.
const NO_FD: usize = usize::MAX;
const PRIVATE: usize = MAP_PRIVATE | MAP_ANONYMOUS;
const MOVE: usize = MREMAP_MAYMOVE | MREMAP_FIXED;

impl Run<'_> {
    /// One call of the list, on any page `at` of the arena, mapped or not.
    pub fn error(&mut self) {
        let page = self.rng.below(self.places.pages - 4);
        let at = self.address(page);
        // An offset into the page.
        let odd = self.rng.upto(PAGE - 1);
        // Something that is mapped for sure: of two mistakes at once, kernels before 6.17 report the other one.
        let stack = (&raw const page) as usize & !(PAGE - 1);
        let calls: [(&str, Call, Return); 25] = [
            ("mmap without length", Mmap([0, 0, PROT_RW, PRIVATE, NO_FD, 0]), Err(EINVAL)),
            (
                "mmap fixed, unaligned",
                Mmap([at + odd, PAGE, PROT_RW, PRIVATE | MAP_FIXED, NO_FD, 0]),
                Err(EINVAL),
            ),
            (
                "mmap neither private nor shared",
                Mmap([0, PAGE, PROT_RW, MAP_ANONYMOUS, NO_FD, 0]),
                Err(EINVAL),
            ),
            ("mmap of a huge length", Mmap([0, HUGE, PROT_RW, PRIVATE, NO_FD, 0]), Err(ENOMEM)),
            ("mmap of an overflowing length", Mmap([0, OVERFLOW, PROT_RW, PRIVATE, NO_FD, 0]), Err(ENOMEM)),
            (
                "mmap fixed, out of reach",
                Mmap([HUGE, PAGE, PROT_RW, PRIVATE | MAP_FIXED, NO_FD, 0]),
                Err(ENOMEM),
            ),
            ("mmap of no file", Mmap([0, PAGE, PROT_RW, MAP_PRIVATE, NO_FD, 0]), Err(EBADF)),
            ("mmap with an odd offset", Mmap([0, PAGE, PROT_RW, PRIVATE, NO_FD, odd]), Err(EINVAL)),
            ("munmap without length", Munmap(at, 0), Err(EINVAL)),
            ("munmap, unaligned", Munmap(at + odd, PAGE), Err(EINVAL)),
            ("munmap of a huge length", Munmap(at, HUGE), Err(EINVAL)),
            ("munmap out of reach", Munmap(HUGE, PAGE), Err(EINVAL)),
            ("mprotect, unaligned", Mprotect(at + odd, PAGE, PROT_READ), Err(EINVAL)),
            ("mprotect without length", Mprotect(at, 0, PROT_READ), Ok(0)),
            ("mprotect to unknown rights", Mprotect(at, PAGE, 0x10), Err(EINVAL)),
            ("mprotect, wrapping around", Mprotect(at, WRAP, PROT_READ), Err(ENOMEM)),
            ("mremap, unaligned", Mremap([at + odd, PAGE, PAGE, MREMAP_MAYMOVE, 0]), Err(EINVAL)),
            ("mremap to nothing", Mremap([at, PAGE, 0, MREMAP_MAYMOVE, 0]), Err(EINVAL)),
            ("mremap with unknown flags", Mremap([at, PAGE, PAGE, 0x40, 0]), Err(EINVAL)),
            (
                "mremap fixed but not to move",
                Mremap([at, PAGE, PAGE, MREMAP_FIXED, at + 2 * PAGE]),
                Err(EINVAL),
            ),
            ("mremap to an odd place", Mremap([stack, PAGE, PAGE, MOVE, at + 2 * PAGE + odd]), Err(EINVAL)),
            ("madvise, unaligned", Madvise(at + odd, PAGE, MADV_DONTNEED), Err(EINVAL)),
            ("madvise without length", Madvise(at, 0, MADV_DONTNEED), Ok(0)),
            ("madvise of no kind", Madvise(at, PAGE, 9999), Err(EINVAL)),
            self.error_by_page(page, at),
        ];
        let (what, call, expected) = &calls[self.rng.below(calls.len())];
        self.describe(format_args!("{what}, page {page}"));
        // SAFETY: in whichever way a call might wrongly succeed, it would change the arena, or what lies at
        // addresses that no program has; that is what must be found out.
        let got = unsafe { call.make() };
        self.expect(page, got, *expected);
    }

    /// The call whose error depends on what is at `page`.
    fn error_by_page(&self, page: usize, at: usize) -> (&'static str, Call, Return) {
        if matches!(self.model.pages[page].backing, Backing::Free) {
            ("mremap of nothing", Mremap([at, PAGE, 2 * PAGE, MREMAP_MAYMOVE, 0]), Err(EFAULT))
        } else {
            let flags = PRIVATE | MAP_FIXED_NOREPLACE;
            ("mmap, no replace, over something", Mmap([at, PAGE, PROT_RW, flags, NO_FD, 0]), Err(EEXIST))
        }
    }
}

impl Call {
    /// # Safety
    /// Nothing that Rust knows may lie where the call takes memory away.
    unsafe fn make(&self) -> Return {
        match *self {
            // SAFETY: the caller's promise, for each of the five.
            Mmap(args) => unsafe { sys::mmap_raw(args) },
            // SAFETY: as above.
            Munmap(addr, len) => unsafe { sys::munmap(addr, len) },
            // SAFETY: as above.
            Mprotect(addr, len, prot) => unsafe { sys::mprotect(addr, len, prot) },
            // SAFETY: as above.
            Mremap([addr, old, new, flags, to]) => unsafe { sys::mremap(addr, old, new, flags, to) },
            // SAFETY: as above.
            Madvise(addr, len, advice) => unsafe { sys::madvise(addr, len, advice) },
        }
    }
}
