// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The top of the address space, where an engine may keep something of its own: jumps to every byte of it, and accesses.

use super::attempt::{Catcher, Outcome, Regs, SIGBUS, SIGSEGV, SIGTRAP};
use super::calls::{END, TOP};
use super::rt::PAGE;
use super::rt::out::outln;
use super::{Verdict, broken};

unsafe extern "C" {
    static __executable_start: u8;
    static etext: u8;
}

/// The program's own code, as a range that a call could take away.
fn text() -> (usize, usize) {
    let start = &raw const __executable_start as usize;
    (start, (&raw const etext as usize - start).next_multiple_of(PAGE))
}

/// Registers for calls that would be seen if somebody's `syscall` were reached: munmap, mmap, mprotect, mremap, exit,
/// exit_group.
pub fn wishes() -> [Regs; 6] {
    let (rdi, rsi) = text();
    let regs = |rax| Regs { rax, rdi, rsi, ..Regs::default() };
    [
        regs(11),
        Regs { rdx: 3, r10: 0x32, r8: usize::MAX, ..regs(9) },
        regs(10),
        Regs { rdx: 0, r10: 1, ..regs(25) },
        Regs { rax: 60, rdi: 94, ..Regs::default() },
        Regs { rax: 231, rdi: 94, ..Regs::default() },
    ]
}

/// Counts of how jumps ended.
#[derive(Default)]
struct Ends {
    segv: usize,
    others: usize,
    returned: usize,
}

impl Ends {
    fn add(&mut self, outcome: Outcome) -> bool {
        match outcome {
            Outcome::Returned(_) => self.returned += 1,
            _ if outcome.is_signal(SIGSEGV) => self.segv += 1,
            _ => self.others += 1,
        }
        matches!(outcome, Outcome::Returned(_)) || outcome.is_refused() || outcome.is_signal(SIGTRAP)
    }
}

/// `top-jumps`: to each byte of the 64 KiB below 2^47; with each wish where a jump does not simply find nothing.
pub fn jumps(catcher: &Catcher) -> Verdict {
    let mut ends = Ends::default();
    let wishes = wishes();
    for page in (TOP..END).step_by(PAGE) {
        let mut is_there = false;
        for target in page..page + PAGE {
            let outcome = catcher.run(target, &wishes[target % wishes.len()]);
            is_there |= !matches!(outcome, Outcome::Caught(caught) if caught.address == target && outcome.is_signal(SIGSEGV));
            if !ends.add(outcome) {
                return broken(format_args!("a jump to {target:#x}: {outcome}"));
            }
        }
        let again = if is_there { page..page + PAGE } else { page..page + 16 };
        for (target, regs) in again.flat_map(|target| wishes.iter().map(move |regs| (target, regs))) {
            let outcome = catcher.run(target, regs);
            if !ends.add(outcome) {
                return broken(format_args!("a jump to {target:#x} with rax {}: {outcome}", regs.rax));
            }
        }
    }
    let Ends { segv, others, returned } = ends;
    outln!("top-jumps: {segv} times SIGSEGV, {others} other signals, {returned} came back");
    Ok(())
}

/// `top-accesses`: loads and stores there. No store may work; a load may.
pub fn accesses(catcher: &Catcher) -> Verdict {
    let mut read = 0;
    for address in (TOP..END).step_by(8) {
        let stored = catcher.store(address, 0x5bad);
        if !(stored.is_signal(SIGSEGV) || stored.is_signal(SIGBUS)) {
            return broken(format_args!("a store to {address:#x}: {stored}"));
        }
        match catcher.load(address) {
            Outcome::Returned(_) => read += 1,
            loaded if loaded.is_refused() => {}
            loaded => return broken(format_args!("a load of {address:#x}: {loaded}")),
        }
    }
    outln!("top-accesses: no store works, {read} loads do");
    Ok(())
}

/// `edges`: jumps and accesses where addresses end, and in the kernel's half.
pub fn edges(catcher: &Catcher) -> Verdict {
    const EDGES: [usize; 12] = [
        0,
        PAGE,
        0x1_0000,
        END,
        END + PAGE,
        1 << 56,
        1 << 63,
        0xffff_8000_0000_0000,
        0xffff_c000_0000_0000,
        0xffff_ffff_8000_0000,
        0xffff_ffff_ff60_0000,
        usize::MAX - 15,
    ];
    let mut tried = 0;
    for edge in EDGES {
        for address in (0..32).map(|off| edge.wrapping_sub(16).wrapping_add(off)) {
            // A jump over the very end comes back to the beginning, which is nobody's either.
            for regs in &wishes() {
                let outcome = catcher.run(address, regs);
                if !outcome.is_refused() {
                    return broken(format_args!("a jump to {address:#x}: {outcome}"));
                }
            }
            let (loaded, stored) = (catcher.load(address), catcher.store(address, 1));
            if !stored.is_refused() {
                return broken(format_args!("a store to {address:#x}: {stored}"));
            }
            if !loaded.is_refused() && edge != 0xffff_ffff_ff60_0000 {
                return broken(format_args!("a load of {address:#x}: {loaded}"));
            }
            tried += 1;
        }
    }
    outln!("edges: {tried} addresses can neither be used nor reached");
    Ok(())
}
