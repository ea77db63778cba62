// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `struct rt_sigframe` on the guest's stack (`arch/x86/kernel/signal_64.c`), byte for byte.
//!
//! From the stack pointer of the handler upward: return address (the restorer), `ucontext`, `siginfo`; above them, at a
//! multiple of 64, the FPU state. The 128 bytes below the interrupted stack pointer are the red zone and stay as they are.

use super::super::errno::Errno;
use super::super::uaccess::{Record, UserMemory};
use super::{Action, SigInfo, SigSet, Signal, fpstate};
use crate::engine::Regs;

/// Bytes of the frame without the FPU state.
pub(super) const FRAME: usize = 8 + UCONTEXT + 128;
const UCONTEXT: usize = 304;
const RED_ZONE: u64 = 128;
/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`.
const UC_FLAGS: u64 = 7;
const UC_STRICT_RESTORE_SS: u64 = 4;
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

/// Offsets in the frame.
mod at {
    pub(super) const UC: usize = 8;
    pub(super) const UC_STACK: usize = UC + 16;
    pub(super) const MCONTEXT: usize = UC + 40;
    pub(super) const CS: usize = MCONTEXT + 144;
    pub(super) const SS: usize = CS + 6;
    pub(super) const ERR: usize = MCONTEXT + 152;
    pub(super) const FPSTATE: usize = MCONTEXT + 184;
    pub(super) const SIGMASK: usize = UC + 296;
    pub(super) const INFO: usize = UC + super::UCONTEXT;
}

/// rflags that a frame may set: AC, OF, DF, TF, SF, ZF, AF, PF, CF, RF.
const FIX_FLAGS: u64 = 0x5_0dd5;
const CLEARED_FOR_HANDLER: u64 = DF | RF | TF;
const TF: u64 = 1 << 8;
const DF: u64 = 1 << 10;
const RF: u64 = 1 << 16;

pub(super) const SS_ONSTACK: u32 = 1;
pub(super) const SS_DISABLE: u32 = 2;
pub(super) const SS_AUTODISARM: u32 = 1 << 31;

/// The alternate signal stack of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::guest) struct AltStack {
    pub(super) base: u64,
    pub(super) flags: u32,
    pub(super) size: u64,
}

impl Default for AltStack {
    fn default() -> Self {
        Self { base: 0, flags: SS_DISABLE, size: 0 }
    }
}

impl AltStack {
    fn holds(&self, sp: u64) -> bool {
        sp > self.base && sp - self.base <= self.size
    }
    /// Whether `sp` is on it, as far as that forbids something (`on_sig_stack`).
    pub(super) fn is_in_use(&self, sp: u64) -> bool {
        self.flags & SS_AUTODISARM == 0 && self.holds(sp)
    }
    /// `ss_flags` as `sigaltstack` reports them.
    pub(super) fn reported_flags(&self, sp: u64) -> u32 {
        let state = match () {
            () if self.size == 0 => SS_DISABLE,
            () if self.is_in_use(sp) => SS_ONSTACK,
            () => 0,
        };
        state | self.flags & SS_AUTODISARM
    }
    /// `stack_t`: sp, flags, size.
    pub(super) fn to_record(self, flags: u32) -> Record<24> {
        let mut record = Record::zeroed();
        record.put_u64(0, self.base).put_u32(8, flags).put_u64(16, self.size);
        record
    }
    pub(super) fn from_record(record: &Record<24>) -> Self {
        Self { base: record.u64(0), flags: record.u32(8), size: record.u64(16) }
    }
    /// Makes `new` the alternate stack of a thread whose stack pointer is `sp` (`do_sigaltstack`).
    ///
    /// # Errors
    /// `EPERM`: it is in use. `EINVAL`: unknown flags. `ENOMEM`: too small.
    pub(super) fn replace(&mut self, new: Self, sp: u64) -> Result<(), Errno> {
        const MINSIGSTKSZ: u64 = 2048;
        if self.is_in_use(sp) {
            return Err(Errno::EPERM);
        }
        *self = match new.flags & !SS_AUTODISARM {
            SS_DISABLE => Self { base: 0, size: 0, ..new },
            0 | SS_ONSTACK if new.size < MINSIGSTKSZ => return Err(Errno::ENOMEM),
            0 | SS_ONSTACK => new,
            _ => return Err(Errno::EINVAL),
        };
        Ok(())
    }
}

/// The last exception of a thread, for the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::guest) struct Trap {
    pub(in crate::guest) vector: u64,
    pub(in crate::guest) error_code: u64,
    pub(in crate::guest) cr2: u64,
}

/// What a frame is made from.
#[derive(Debug)]
pub(super) struct Delivery<'a> {
    pub(super) signal: Signal,
    pub(super) info: &'a SigInfo,
    pub(super) action: &'a Action,
    /// The mask that the handler's return brings back.
    pub(super) mask: SigSet,
    pub(super) alt_stack: &'a AltStack,
    pub(super) trap: &'a Trap,
}

/// The general registers in the order of `struct sigcontext`.
fn general(regs: &mut Regs) -> [&mut u64; 18] {
    let Regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
        ..
    } = regs;
    [r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, rflags]
}

/// Writes the frame and returns the registers that the handler starts with (`x64_setup_rt_frame`).
///
/// # Errors
/// `EFAULT`: the stack cannot take it, or the action has no restorer.
pub(super) fn push(user: &UserMemory, regs: &Regs, xsave: &[u8], with: &Delivery<'_>) -> Result<Regs, Errno> {
    const SA_RESTORER: i32 = 0x0400_0000;
    let alt = with.alt_stack;
    let mut sp = regs.rsp.wrapping_sub(RED_ZONE);
    let was_on_alt = alt.is_in_use(sp);
    let goes_to_alt = with.action.has(libc::SA_ONSTACK) && alt.reported_flags(sp) & !SS_AUTODISARM == 0;
    if goes_to_alt {
        sp = alt.base.wrapping_add(alt.size);
    }
    let image = fpstate::to_frame(xsave);
    let fpstate = sp.wrapping_sub(image.len() as u64) & !63;
    let sp = (fpstate.wrapping_sub(FRAME as u64) & !15).wrapping_sub(8);
    if (was_on_alt || goes_to_alt) && !alt.holds(sp) || !with.action.has(SA_RESTORER) {
        return Err(Errno::EFAULT);
    }

    let mut frame = Record::<FRAME>::zeroed();
    frame.put_u64(0, with.action.restorer).put_u64(at::UC, UC_FLAGS);
    let stack = alt.to_record(alt.flags);
    frame.0[at::UC_STACK..at::UC_STACK + 24].copy_from_slice(&stack.0);
    for (index, register) in general(&mut regs.clone()).into_iter().enumerate() {
        frame.put_u64(at::MCONTEXT + 8 * index, *register);
    }
    frame.put_u16(at::CS, USER_CS).put_u16(at::SS, USER_SS);
    let Trap { vector, error_code, cr2 } = *with.trap;
    for (index, value) in [error_code, vector, with.mask.0, cr2, fpstate].into_iter().enumerate() {
        frame.put_u64(at::ERR + 8 * index, value);
    }
    frame.put_u64(at::SIGMASK, with.mask.0);
    frame.0[at::INFO..].copy_from_slice(&with.info.0.0);
    UserMemory::check_range(sp, RED_ZONE)?;
    user.write(fpstate, &image)?;
    user.write(sp, &frame.0)?;

    Ok(Regs {
        rdi: with.signal.number() as u64,
        rsi: sp + at::INFO as u64,
        rdx: sp + at::UC as u64,
        rax: 0,
        rsp: sp,
        rip: with.action.handler,
        rflags: regs.rflags & !CLEARED_FOR_HANDLER,
        ..*regs
    })
}

/// What a frame brings back.
#[derive(Debug)]
pub(super) struct Restored {
    pub(super) regs: Regs,
    pub(super) mask: SigSet,
    pub(super) alt_stack: AltStack,
    /// Address of the FPU state, 0 for none.
    pub(super) fpstate: u64,
}

/// Reads the frame that `rt_sigreturn` refers to by the stack pointer.
///
/// # Errors
/// `EFAULT`: it cannot be read, or names segments that ring 3 does not have.
pub(super) fn pop(user: &UserMemory, regs: &Regs) -> Result<Restored, Errno> {
    // The handler's `ret` took the restorer's address off the stack.
    let frame: Record<FRAME> = user.record(regs.rsp.wrapping_sub(8))?;
    let strict = frame.u64(at::UC) & UC_STRICT_RESTORE_SS != 0;
    if frame.u16(at::CS) | 3 != USER_CS || strict && frame.u16(at::SS) | 3 != USER_SS {
        return Err(Errno::EFAULT);
    }
    let mut restored = *regs;
    for (index, register) in general(&mut restored).into_iter().enumerate() {
        *register = frame.u64(at::MCONTEXT + 8 * index);
    }
    restored.rflags = regs.rflags & !FIX_FLAGS | restored.rflags & FIX_FLAGS;
    let mut stack = Record::zeroed();
    stack.0.copy_from_slice(&frame.0[at::UC_STACK..at::UC_STACK + 24]);
    Ok(Restored {
        regs: restored,
        mask: SigSet::mask(frame.u64(at::SIGMASK)),
        alt_stack: AltStack::from_record(&stack),
        fpstate: frame.u64(at::FPSTATE),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    fn delivery<'a>(info: &'a SigInfo, action: &'a Action, alt: &'a AltStack) -> Delivery<'a> {
        let trap = &Trap { vector: 14, error_code: 6, cr2: 0xdead };
        Delivery { signal: Signal::SEGV, info, action, mask: SigSet(0x55), alt_stack: alt, trap }
    }
    fn action(flags: i32) -> Action {
        Action {
            handler: 0x40_1000,
            restorer: 0x40_2000,
            flags: (flags | 0x0400_0000) as u64,
            mask: SigSet::EMPTY,
        }
    }

    #[test]
    fn the_layout_is_that_of_the_c_structures() {
        // Against libc's `ucontext_t`, whose tail is larger than the kernel's.
        assert_eq!(std::mem::offset_of!(libc::ucontext_t, uc_mcontext), at::MCONTEXT - at::UC);
        assert_eq!(std::mem::offset_of!(libc::ucontext_t, uc_sigmask), at::SIGMASK - at::UC);
        assert_eq!(std::mem::offset_of!(libc::mcontext_t, fpregs), at::FPSTATE - at::MCONTEXT);
        assert_eq!(8 * libc::REG_CSGSFS as usize, at::CS - at::MCONTEXT);
        assert_eq!(8 * libc::REG_ERR as usize, at::ERR - at::MCONTEXT);
        let mut regs = Regs { rip: 1, rsp: 2, rax: 3, rflags: 4, ..Regs::default() };
        let order = general(&mut regs).map(|register| *register);
        for (register, value) in
            [(libc::REG_RIP, 1), (libc::REG_RSP, 2), (libc::REG_RAX, 3), (libc::REG_EFL, 4)]
        {
            assert_eq!(order[register as usize], value);
        }
    }

    #[test]
    fn a_frame_starts_the_handler_as_a_call_would() {
        let fixture = Fixture::new();
        let (user, page) = (fixture.user(), fixture.map_pages(4));
        let regs =
            Regs { rsp: page + 0x4000 - 123, rip: 0x1234, rflags: 0x246 | DF, rbx: 9, ..Regs::default() };
        let info = SigInfo::fault(Signal::SEGV, 1, 0xdead);
        let (action, alt) = (action(0), AltStack::default());
        let handler = push(user, &regs, &[0; 1024], &delivery(&info, &action, &alt)).unwrap();
        assert_eq!((handler.rip, handler.rdi, handler.rax, handler.rbx), (0x40_1000, 11, 0, 9));
        assert_eq!(handler.rsp % 16, 8, "as behind a call");
        assert_eq!(handler.rflags & DF, 0);
        assert!(handler.rsp + FRAME as u64 <= regs.rsp - RED_ZONE);
        assert_eq!(user.read_u64(handler.rsp).unwrap(), 0x40_2000);
        assert_eq!(user.read_u64(handler.rsi + 16).unwrap(), 0xdead);
        assert_eq!(user.read_u64(handler.rdx + 40 + 8 * libc::REG_CR2 as u64).unwrap(), 0xdead);
        let back = pop(user, &Regs { rsp: handler.rsp + 8, rflags: 0x202, ..Regs::default() }).unwrap();
        assert_eq!(back.regs, regs);
        assert_eq!(back.mask, SigSet(0x55));
        assert_eq!(back.fpstate % 64, 0);
    }

    #[test]
    fn the_alternate_stack_is_used_once_and_not_overrun() {
        let fixture = Fixture::new();
        let (user, page) = (fixture.user(), fixture.map_pages(4));
        let mut alt = AltStack::default();
        let big = AltStack { base: page, flags: 0, size: 0x3000 };
        assert_eq!(alt.replace(AltStack { size: 2047, ..big }, 0), Err(Errno::ENOMEM));
        assert_eq!(alt.replace(AltStack { flags: 4, ..big }, 0), Err(Errno::EINVAL));
        alt.replace(big, 0).unwrap();
        let info = SigInfo::fault(Signal::SEGV, 1, 0);
        let action = action(libc::SA_ONSTACK);
        let xsave = [0; 1024];
        let mut regs = Regs { rsp: 8, ..Regs::default() };
        let mut depth = 0;
        while let Ok(next) = push(user, &regs, &xsave, &delivery(&info, &action, &alt)) {
            assert!(alt.holds(next.rsp));
            assert_eq!(alt.replace(big, next.rsp), Err(Errno::EPERM));
            regs = next;
            depth += 1;
        }
        assert!((2..20).contains(&depth), "{depth}");
    }

    #[test]
    fn bad_stacks_and_bad_frames_are_errors() {
        let fixture = Fixture::new();
        let (user, page) = (fixture.user(), fixture.map_pages(1));
        let info = SigInfo::fault(Signal::SEGV, 1, 0);
        let (with, without, alt) = (action(0), Action { flags: 0, ..action(0) }, AltStack::default());
        for rsp in [0, 100, page, u64::MAX, 1 << 63, 0x7fff_ffff_f000] {
            let regs = Regs { rsp, ..Regs::default() };
            assert!(push(user, &regs, &[0; 1024], &delivery(&info, &with, &alt)).is_err(), "{rsp:#x}");
        }
        let regs = Regs { rsp: page + 4096, ..Regs::default() };
        assert!(push(user, &regs, &[0; 1024], &delivery(&info, &without, &alt)).is_err(), "no restorer");
        let good = push(user, &regs, &[0; 1024], &delivery(&info, &with, &alt)).unwrap();
        let at_return = Regs { rsp: good.rsp + 8, ..Regs::default() };
        user.write(good.rsp + at::CS as u64, &[0x23, 0]).unwrap();
        assert!(pop(user, &at_return).is_err(), "a 32-bit code segment");
    }
}
