// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the CPU keeps besides general registers: flags, segments, their bases, protection keys, and what is the kernel's.

use core::arch::naked_asm;
use core::arch::x86_64::__cpuid_count;

use super::attempt::{Catcher, Outcome, Piece, Regs, SIGSEGV, SIGTRAP, pieces, syscall};
use super::bystander::pid;
use super::rt::PAGE;
use super::rt::out::outln;
use super::rt::random::Rng;
use super::rt::sys::{self, PROT_RW};
use super::{Verdict, broken};

const GETPID: usize = 39;

#[unsafe(naked)]
extern "C" fn popf() {
    naked_asm!("push rdi", "popfq", "pushfq", "pop rax", "push 0x202", "popfq", "ret")
}

#[unsafe(naked)]
extern "C" fn popf_and_call() {
    naked_asm!("push rdi", "popfq", "syscall", "pushfq", "pop rax", "push 0x202", "popfq", "ret")
}

/// `flags`: every bit by `popf`, and across a system call.
pub fn flags(catcher: &Catcher) -> Verdict {
    /// IOPL, VM, VIF and VIP: none of a program's.
    const FORBIDDEN: usize = 3 << 12 | 1 << 17 | 1 << 19 | 1 << 20;
    let mut traps = 0;
    for value in (0..64).map(|bit| 1 << bit).chain([0, usize::MAX, 0x202, 0x5_4fd5]) {
        for target in [popf as *const () as usize, popf_and_call as *const () as usize] {
            match catcher.run(target, &Regs { rax: GETPID, rdi: value, ..Regs::default() }) {
                Outcome::Returned(flags) if flags & FORBIDDEN == 0 => {}
                outcome if outcome.is_signal(SIGTRAP) && value & 0x100 != 0 => traps += 1,
                outcome if outcome.is_refused() => {}
                outcome => return broken(format_args!("flags {value:#x}: {outcome}")),
            }
        }
    }
    outln!(
        "flags: none that is not the program's, {}",
        if traps > 0 { "and steps arrive" } else { "and no steps" }
    );
    Ok(())
}

const SEGMENTS: &[Piece] = pieces! {
    "ds": "mov ds, edi";
    "es": "mov es, edi";
    "fs": "mov fs, edi";
    "gs": "mov gs, edi";
    "ss": "mov ss, edi";
    "ss, and a call": "mov ss, edi", "syscall";
    "all of them": "mov ds, edi", "mov es, edi", "mov fs, edi", "mov gs, edi", "syscall";
};

/// `segments`: every register with every kind of selector; then the program goes on.
pub fn segments(catcher: &Catcher) -> Verdict {
    let selectors = [
        0, 1, 2, 3, 0x8, 0x10, 0x18, 0x20, 0x23, 0x28, 0x29, 0x2a, 0x2b, 0x30, 0x33, 0x40, 0x53, 0x63, 0x73,
        0x7b, 0x87, 0xffff,
    ];
    let (mut loaded, mut refused) = (0, 0);
    let me = pid();
    for (name, piece) in SEGMENTS {
        for selector in selectors {
            let regs = Regs { rax: GETPID, rdi: selector, ..Regs::default() };
            match catcher.run(*piece as *const () as usize, &regs) {
                Outcome::Returned(_) => loaded += 1,
                outcome if outcome.is_refused() => refused += 1,
                outcome => return broken(format_args!("{name} with {selector:#x}: {outcome}")),
            }
            let after = catcher.run(syscall as *const () as usize, &Regs { rax: GETPID, ..Regs::default() });
            if !matches!(after, Outcome::Returned(value) if value == me) {
                return broken(format_args!("a call after {name} with {selector:#x}: {after}"));
            }
        }
    }
    if loaded == 0 || refused == 0 {
        return broken(format_args!("{loaded} selectors loaded, {refused} refused"));
    }
    outln!("segments: some selectors load, some do not, and calls work after each");
    Ok(())
}

/// What is the kernel's: each must be refused.
const PRIVILEGED: &[Piece] = pieces! {
    "hlt": "hlt";
    "cli": "cli";
    "sti": "sti";
    "in al": "in al, 0x40";
    "in dx": "in eax, dx";
    "out al": "out 0x80, al";
    "out dx": "out dx, eax";
    "rep outsb": "rep outsb";
    "rep insb": "rep insb";
    "lldt": "lldt di";
    "ltr": "ltr di";
    "lgdt": "lgdt [rsp]";
    "lidt": "lidt [rsp]";
    "lmsw": "lmsw di";
    "clts": "clts";
    "mov from cr0": "mov rax, cr0";
    "mov from cr2": "mov rax, cr2";
    "mov to cr3": "mov cr3, rdi";
    "mov from cr4": "mov rax, cr4";
    "mov to cr8": "mov cr8, rdi";
    "mov from dr0": "mov rax, dr0";
    "mov to dr7": "mov dr7, rdi";
    "invd": "invd";
    "wbinvd": "wbinvd";
    "invlpg": "invlpg [rsp]";
    "invpcid": "invpcid rax, [rsp - 64]";
    "rdmsr": "mov ecx, 0xc0000080", "rdmsr";
    "wrmsr": "mov ecx, 0xc0000082", "wrmsr";
    "rdpmc": "mov ecx, 0x40000000", "rdpmc";
    "xsetbv": "xor ecx, ecx", "mov eax, 7", "xor edx, edx", "xsetbv";
    "vmmcall or vmcall": "vmcall";
    "vmmcall": "vmmcall";
    "vmlaunch": "vmlaunch";
    "vmxoff": "vmxoff";
    "vmrun": ".byte 0x0f, 0x01, 0xd8";
    "vmload": ".byte 0x0f, 0x01, 0xda";
    "stgi": ".byte 0x0f, 0x01, 0xdc";
    "clac": "clac";
    "stac": "stac";
    "swapgs": "swapgs";
    "sysretq": "sysretq";
    "sysexit": ".byte 0x0f, 0x35";
    "monitor": "xor ecx, ecx", "xor edx, edx", "lea rax, [rsp]", "monitor";
    "mwait": "xor ecx, ecx", "xor eax, eax", "mwait";
    "rsm": ".byte 0x0f, 0xaa";
    "int1": ".byte 0xcd, 1";
    "ud2": "ud2";
    "iretq to cs 8": "mov r11, rsp", "push 0", "push r11", "push 0x202", "push 8", "push 0x1000", "iretq";
    "iretq to cs 0x10": "mov r11, rsp", "push 0x18", "push r11", "push 0x3202", "push 0x10", "push 0x1000", "iretq";
    "iretq without a stack": "mov rsp, 0x100", "iretq";
    "lretq to cs 0x10": "push 0x10", "push 0x1000", ".byte 0x48, 0xcb";
    "sldt, str, sgdt: may be": "sldt rax", "str rcx", "sgdt [rsp - 64]", "smsw rcx", "ud2";
    "xsaves": "xor eax, eax", "xor edx, edx", "xsaves64 [rsp - 64]", "ud2";
    "in 32-bit prefixes": ".byte 0x66, 0x67, 0xf0, 0x0f, 0x01, 0xf8";
    "16 prefixes": ".fill 16, 1, 0x66", "nop";
};

/// `privileged`: each instruction of the kernel's is refused; and `int3` and `int1` are traps.
pub fn privileged(catcher: &Catcher) -> Verdict {
    for (name, piece) in PRIVILEGED {
        for value in [0, 0x2b, 0x40, !0] {
            let regs = Regs { rax: value, rdi: value, rdx: 0x3f8, ..Regs::default() };
            let outcome = catcher.run(*piece as *const () as usize, &regs);
            // A hypercall has a number, and may have an answer that says no.
            let is_answered = name.starts_with("vm")
                && matches!(outcome, Outcome::Returned(it) if it == value || (it as isize) < 0);
            if !outcome.is_refused() && !is_answered {
                return broken(format_args!("{name} with {value:#x}: {outcome}"));
            }
        }
    }
    for (name, piece) in TRAPS {
        let outcome = catcher.run(*piece as *const () as usize, &Regs::default());
        if !outcome.is_signal(SIGTRAP) {
            return broken(format_args!("{name}: {outcome}"));
        }
    }
    outln!("privileged: {} instructions refused", PRIVILEGED.len());
    Ok(())
}

/// One of them, at random; whether it was refused.
pub fn any_privileged(catcher: &Catcher, random: &mut Rng) -> bool {
    let (name, piece) = random.pick(PRIVILEGED);
    let outcome = catcher.run(piece as *const () as usize, &Regs::default());
    outcome.is_refused() || name.starts_with("vm")
}

const TRAPS: &[Piece] = pieces! {
    "int3": "int3";
    "icebp": ".byte 0xf1";
};

const BASES: &[Piece] = pieces! {
    "wrfsbase": "wrfsbase rdi";
    "wrgsbase": "wrgsbase rdi";
    "wrfsbase, and a call": "wrfsbase rdi", "syscall", "rdfsbase rax";
    "wrgsbase, and a call": "wrgsbase rdi", "syscall", "rdgsbase rax";
    "wrfsbase, and a load": "wrfsbase rdi", "mov rax, fs:[0]";
    "wrgsbase, and a load": "wrgsbase rdi", "mov rax, gs:[0]";
    "wrgsbase, and a store": "wrgsbase rdi", "mov gs:[0], rdi";
    "wrgsbase, and a trap": "wrgsbase rdi", "ud2";
};

/// `bases`: of fs and gs, with every kind of address.
pub fn bases(catcher: &Catcher) -> Verdict {
    const ARCH_PRCTL: usize = 158;
    let me = pid();
    let page = sys::map_anywhere(PAGE, PROT_RW).unwrap_or(0);
    let wild = [
        0,
        page,
        (1 << 47) - 8,
        (1 << 47) - PAGE,
        1 << 47,
        1 << 63,
        0xffff_8000_0000_0000,
        0xffff_ffff_ff60_0000,
        !7,
    ];
    let (mut went, mut refused) = (0, 0);
    for (name, piece) in BASES {
        for base in wild {
            let regs = Regs { rax: GETPID, rdi: base, ..Regs::default() };
            match catcher.run(*piece as *const () as usize, &regs) {
                Outcome::Returned(_) => went += 1,
                outcome if outcome.is_refused() => refused += 1,
                outcome => return broken(format_args!("{name} with {base:#x}: {outcome}")),
            }
            if pid() != me {
                return broken(format_args!("no call works after {name} with {base:#x}"));
            }
            for option in [0x1001, 0x1002] {
                // SAFETY: this program uses neither base.
                let _ = unsafe { sys::syscall(ARCH_PRCTL, [option, 0, 0, 0, 0, 0]) };
            }
        }
    }
    outln!("bases: {went} went on, {refused} refused");
    Ok(())
}

#[unsafe(naked)]
extern "C" fn deny() {
    naked_asm!("xor ecx, ecx", "xor edx, edx", "mov eax, -1", "wrpkru", "mov rax, [rdi]", "ret")
}

/// `protection-keys`: denies everything where the CPU has keys, and touches memory. The handler's frame may not fit any more:
/// dying of SIGSEGV is right, too.
pub fn protection_keys(catcher: &Catcher) -> Verdict {
    let leaf = __cpuid_count(7, 0);
    let page = sys::map_anywhere(PAGE, PROT_RW).unwrap_or(0);
    let has_keys = leaf.ecx & 1 << 4 != 0;
    let outcome = catcher.run(deny as *const () as usize, &Regs { rdi: page, ..Regs::default() });
    if has_keys && !outcome.is_signal(SIGSEGV) || !outcome.is_refused() {
        return broken(format_args!("a load with every key denied: {outcome}"));
    }
    outln!("protection-keys: refused");
    Ok(())
}
