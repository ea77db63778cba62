// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What umbra says about a guest: how it died, and what it cost.

use crate::aging::AgingCost;
use crate::engine::{EngineKind, HostFacts, Regs};
use crate::guest::{Death, ExitStatus};
use crate::stalls::StallSummary;
use crate::vm::{Frames, Machine};
use serde::Serialize;
use shadow_mmu::addr::{Gpa, Hva, PAGE_SIZE};
use shadow_mmu::frame::PoolStats;
use shadow_mmu::mm::{Backing, Trap, Vma};
use shadow_mmu::shadow::Spte;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Numbers of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// What ran it.
    pub engine: EngineKind,
    /// What KVM runs on: `pvm`, `npt`, `ept` or `shadow`; `none` where it did not run it.
    pub kvm_backend: String,
    /// Seconds from start to end, loading included.
    pub wall_s: f64,
    /// Page faults that reached umbra.
    pub pf_taken: u64,
    /// Of those, faults that installed or upgraded a leaf.
    pub pf_fixed: u64,
    /// Faults that found the leaf good already.
    pub pf_spurious: u64,
    /// Times a fault began again because of an invalidation.
    pub pf_retried: u64,
    /// Leaves installed for neighbours of a fault.
    pub around_installed: u64,
    /// Leaves present at the end.
    pub pages_4k: u64,
    /// Leaves removed.
    pub zapped: u64,
    /// Flushes of cached translations.
    pub flushes: u64,
    /// Shadow page tables at the end, and reclaimed so far.
    pub tables: u64,
    /// Shadow page tables reclaimed.
    pub tables_reclaimed: u64,
    /// Pages brought in because they were touched.
    pub demand_pages: u64,
    /// Pages brought in ahead.
    pub ahead_pages: u64,
    /// Pages copied on a write.
    pub copied_pages: u64,
    /// Ptes of the zero page made.
    pub zero_pages: u64,
    /// Frames of the pool.
    pub frames: u64,
    /// Most frames in use at once.
    pub frames_peak: u64,
    /// Frames given back to the host while running.
    pub frames_punched: u64,
    /// Time that vCPUs spent in faults, by cause.
    #[serde(flatten)]
    pub stalls: StallSummary,
    /// What aging cost, where the guest was aged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aging: Option<AgingCost>,
}

impl Stats {
    /// The numbers of `machine` now; `aging` is that of who aged it.
    pub fn of(machine: &Machine, wall: Duration, aging: Option<AgingCost>) -> Self {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (shadow, mm, pool) = (machine.shadow().stats(), machine.mm().stats(), machine.pool().stats());
        Self {
            engine: machine.engine().kind(),
            kvm_backend: machine.engine().facts().kvm_backend(),
            wall_s: wall.as_secs_f64(),
            pf_taken: get(&shadow.pf_taken),
            pf_fixed: get(&shadow.pf_fixed),
            pf_spurious: get(&shadow.pf_spurious),
            pf_retried: get(&shadow.pf_retried),
            around_installed: get(&shadow.around_installed),
            pages_4k: get(&shadow.pages_4k),
            zapped: get(&shadow.zapped),
            flushes: get(&shadow.flushes),
            tables: machine.shadow().table_count() as u64,
            tables_reclaimed: get(&shadow.tables_reclaimed),
            demand_pages: get(&mm.demand_pages),
            ahead_pages: get(&mm.ahead_pages),
            copied_pages: get(&mm.copied_pages),
            zero_pages: get(&mm.zero_pages),
            frames: pool.frames as u64,
            frames_peak: pool.peak as u64,
            frames_punched: pool.punched,
            stalls: machine.stalls(),
            aging,
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mib = |pages: u64| pages as f64 * PAGE_SIZE as f64 / f64::from(1 << 20);
        format!(
            "umbra: ran {:.3} s {}\n\
             faults    {} ({} fixed, {} spurious, {} retried), {} neighbours installed\n\
             primary   {} pages on demand, {} ahead, {} zero, {} copied\n\
             shadow    {} leaves present, {} zapped in {} flushes, {} tables ({} reclaimed)\n\
             frames    {} ({:.1} MiB) at most of {} ({:.0} MiB), {} given back to the host{}{}",
            self.wall_s,
            self.engine.place(&self.kvm_backend),
            self.pf_taken,
            self.pf_fixed,
            self.pf_spurious,
            self.pf_retried,
            self.around_installed,
            self.demand_pages,
            self.ahead_pages,
            self.zero_pages,
            self.copied_pages,
            self.pages_4k,
            self.zapped,
            self.flushes,
            self.tables,
            self.tables_reclaimed,
            self.frames_peak,
            mib(self.frames_peak),
            self.frames,
            mib(self.frames),
            self.frames_punched,
            self.aging.map_or_else(String::new, |aging| format!("\n{}", aging.text())),
            self.stalls.text(),
        )
    }
}

/// The name of a signal, as `SIGSEGV`.
pub fn signal_name(signal: i32) -> String {
    const NAMES: [(i32, &str); 14] = [
        (libc::SIGHUP, "SIGHUP"),
        (libc::SIGINT, "SIGINT"),
        (libc::SIGQUIT, "SIGQUIT"),
        (libc::SIGILL, "SIGILL"),
        (libc::SIGTRAP, "SIGTRAP"),
        (libc::SIGABRT, "SIGABRT"),
        (libc::SIGBUS, "SIGBUS"),
        (libc::SIGFPE, "SIGFPE"),
        (libc::SIGKILL, "SIGKILL"),
        (libc::SIGUSR1, "SIGUSR1"),
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGUSR2, "SIGUSR2"),
        (libc::SIGPIPE, "SIGPIPE"),
        (libc::SIGTERM, "SIGTERM"),
    ];
    let known = NAMES.iter().find(|(number, _)| *number == signal);
    known.map_or_else(|| format!("signal {signal}"), |(_, name)| (*name).to_owned())
}

/// The exit status that says how a guest ended: its own, or 128 + signal.
pub fn exit_code(status: ExitStatus) -> u8 {
    match status {
        ExitStatus::Exited(code) => code as u8,
        ExitStatus::Signaled(signal) => 128u8.wrapping_add(signal as u8),
    }
}

/// Everything that helps to see why a guest died of an exception: what it did, where, what was mapped there, what the CPU
/// found on its walk, and what the notifier said last. One line for SIGPIPE. `who` names the guest: `the guest`, or `guest 3`.
pub fn death_report(death: &Death, who: &str, machine: &Machine) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_report(&mut out, death, who, machine);
    out
}

fn write_report(out: &mut String, death: &Death, who: &str, machine: &Machine) -> std::fmt::Result {
    let vmas = machine.mm().vmas();
    let trap = death.address.and_then(|address| machine.mm().trapped(Hva(address.0)));
    writeln!(
        out,
        "umbra: {who} died of {}{}",
        signal_name(death.signal),
        reason(death, trap, &vmas, machine.frames(), machine.pool().stats())
    )?;
    if let Some(trap) = trap {
        writeln!(out, "  the plan did that: {}", trap_text(trap))?;
    }
    // Nobody reads its output: that is no fault of its, and where it was then tells nothing.
    if death.signal == libc::SIGPIPE {
        return Ok(());
    }
    let pressed = machine.pressed_frames();
    if (death.signal, death.code) == (libc::SIGKILL, 0x80) && pressed > 0 {
        writeln!(out, "  the plan did that: {pressed} frames are taken (memory = \"pressure\")")?;
    }
    let regs = &death.regs;
    let vector = death.vector.map_or_else(String::new, |vector| format!(" (exception {vector})"));
    match (death.address, death.access) {
        (Some(address), Some(access)) => {
            writeln!(
                out,
                "  thread {} wanted {access} of {address} at rip {:#x}{vector}",
                death.tid, death.rip
            )?;
        }
        _ => writeln!(out, "  thread {} was at rip {:#x}{vector}", death.tid, death.rip)?,
    }
    if let Some(address) = death.address {
        write_mapping(out, address, &vmas)?;
        write_walk(out, address, machine)?;
    }
    write_registers(out, regs)?;
    write_events(out, machine)
}

/// What the host is, and which capabilities it has.
pub(crate) fn write_host(out: &mut String, host: &HostFacts) -> std::fmt::Result {
    writeln!(out, "backend   {}", host.kvm_backend())?;
    writeln!(out, "host      Linux {}, {}, {} CPUs", host.kernel, host.cpu, host.cpus)?;
    if !host.capabilities().is_empty() {
        writeln!(out, "capabilities")?;
        for capability in host.capabilities() {
            writeln!(out, "  {:<32} {}", capability.name, capability.value)?;
        }
    }
    Ok(())
}

/// General registers, four a line.
pub(crate) fn write_registers(out: &mut String, regs: &Regs) -> std::fmt::Result {
    writeln!(out, "registers")?;
    for row in [
        [("rax", regs.rax), ("rbx", regs.rbx), ("rcx", regs.rcx), ("rdx", regs.rdx)],
        [("rsi", regs.rsi), ("rdi", regs.rdi), ("rbp", regs.rbp), ("rsp", regs.rsp)],
        [("r8", regs.r8), ("r9", regs.r9), ("r10", regs.r10), ("r11", regs.r11)],
        [("r12", regs.r12), ("r13", regs.r13), ("r14", regs.r14), ("r15", regs.r15)],
        [("rip", regs.rip), ("flags", regs.rflags), ("fs", regs.fs_base), ("gs", regs.gs_base)],
    ] {
        let row: Vec<_> = row.iter().map(|(name, value)| format!("{name:>5} {value:016x}")).collect();
        writeln!(out, " {}", row.join(" "))?;
    }
    Ok(())
}

/// What the recorder has.
pub(crate) fn write_events(out: &mut String, machine: &Machine) -> std::fmt::Result {
    let events = machine.recorder().events();
    writeln!(out, "last notifier events{}", if events.is_empty() { ": none" } else { "" })?;
    for event in events {
        writeln!(out, "  {event}")?;
    }
    Ok(())
}

/// Why, with a look at what is mapped now, and at which frames are left.
fn reason(death: &Death, trap: Option<Trap>, vmas: &[Vma], frames: Frames, pool: PoolStats) -> String {
    let why = match (death.signal, death.code) {
        (libc::SIGSEGV, 1) => ": nothing is mapped there (SEGV_MAPERR)",
        (libc::SIGSEGV, 2) => ": the mapping does not allow it (SEGV_ACCERR)",
        (libc::SIGBUS, 2) if trap == Some(Trap::Bus) => ": the page cannot be had (BUS_ADRERR)",
        (libc::SIGBUS, 2) => unreachable_page(death, vmas),
        (libc::SIGBUS, 4) => ": the page has failed, and its content is lost (BUS_MCEERR_AR)",
        // SI_KERNEL: umbra's own doing; a guest that kills itself has another code.
        (libc::SIGKILL, 0x80) => return out_of_memory(frames, pool),
        _ => "",
    };
    why.to_owned()
}

fn trap_text(trap: Trap) -> &'static str {
    match trap {
        Trap::Bus => "it made the page unreachable (memory = \"sigbus\")",
        Trap::Poison => "it poisoned the page (memory = \"poison\")",
        Trap::Revoke => "it revoked the page (memory = \"revoke\")",
    }
}

fn out_of_memory(frames: Frames, pool: PoolStats) -> String {
    let (which, more) = match frames {
        Frames::Own => ("every frame", "give it more with --memory"),
        Frames::Shared => ("every frame that the guests share", "give more with --memory or --pool"),
    };
    let but = match pool.free.min(pool.reserve) {
        0 => String::new(),
        left => format!(", but for {left} that are kept for pages that stop being shared,"),
    };
    format!(": out of memory, {which}{but} is in use ({more})")
}

fn unreachable_page(death: &Death, vmas: &[Vma]) -> &'static str {
    let Some(address) = death.address else {
        return ": the host cannot reach a page of adopted memory, and does not say which (BUS_ADRERR)";
    };
    match vmas.iter().find(|vma| vma.range.contains(Hva(address.0))).map(|vma| &vma.backing) {
        Some(Backing::Adopted { .. }) => {
            ": the host cannot reach this page of adopted memory: it was mprotected, or its file ends before (BUS_ADRERR)"
        }
        Some(_) => ": the mapping reaches beyond the end of its file (BUS_ADRERR)",
        None => ": the page could not be reached, and its mapping is gone by now (BUS_ADRERR)",
    }
}

/// A mapping in one line.
pub(crate) fn vma_line(vma: &Vma) -> String {
    let kind = if vma.is_shared() { 's' } else { 'p' };
    format!("{}-{} {}{kind} {}", vma.range.start, vma.range.end, vma.prot, vma.name())
}

/// The mapping that holds `address`, or those beside it.
pub(crate) fn write_mapping(out: &mut String, address: Gpa, vmas: &[Vma]) -> std::fmt::Result {
    let after = vmas.partition_point(|vma| vma.range.start.0 <= address.0);
    let holds = after.checked_sub(1).map(|at| &vmas[at]).filter(|vma| vma.range.contains(Hva(address.0)));
    match holds {
        Some(vma) => writeln!(out, "mapping\n  {}", vma_line(vma)),
        None => {
            writeln!(out, "mapping: none; the nearest are")?;
            for vma in
                [after.checked_sub(1).and_then(|at| vmas.get(at)), vmas.get(after)].into_iter().flatten()
            {
                let (side, distance) = if vma.range.end.0 <= address.0 {
                    ("below", address.0 - vma.range.end.0)
                } else {
                    ("above", vma.range.start.0 - address.0)
                };
                writeln!(out, "  {} ({distance:#x} bytes {side})", vma_line(vma))?;
            }
            Ok(())
        }
    }
}

/// What the CPU finds on its walk to `address`, and the primary's pte.
pub(crate) fn write_walk(out: &mut String, address: Gpa, machine: &Machine) -> std::fmt::Result {
    if address.0 >> 47 != 0 {
        return writeln!(out, "walk: not an address of the user half");
    }
    writeln!(out, "walk of the shadow map")?;
    for (level, entry) in machine.shadow().walk(address.gfn()) {
        writeln!(out, "  level {level}  {entry:#018x}  {:?}", Spte(entry))?;
    }
    match machine.mm().lookup(Hva(address.0)) {
        Some((pte, _)) => writeln!(out, "  primary  {pte:?}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::{Access, HvaRange, Pfn};
    use shadow_mmu::mm::VmaFlags;

    const FULL: PoolStats = PoolStats {
        frames: 100,
        free: 0,
        free_used: 0,
        punched: 0,
        peak: 100,
        reserve: 10,
        reserve_taken: 10,
    };

    #[test]
    fn who_finds_no_frame_is_told_of_those_that_are_kept() {
        let said = |frames, free| out_of_memory(frames, PoolStats { free, ..FULL });
        assert_eq!(
            said(Frames::Own, 0),
            ": out of memory, every frame is in use (give it more with --memory)"
        );
        assert!(said(Frames::Shared, 0).contains("every frame that the guests share is in use"));
        assert!(said(Frames::Shared, 4).contains("but for 4 that are kept"), "{}", said(Frames::Shared, 4));
        // What is free beyond the reserve was given back since.
        assert!(said(Frames::Own, 40).contains("but for 10 that are kept"), "{}", said(Frames::Own, 40));
    }

    #[test]
    fn a_bus_error_says_whose_memory_it_was() {
        let vma = |page: u64, backing| Vma {
            range: HvaRange::page(Hva(page << 12)),
            prot: Access::READ,
            flags: VmaFlags::empty(),
            backing,
        };
        let vmas = [vma(1, Backing::Anonymous), vma(2, Backing::Adopted { first: Pfn(1 << 20) })];
        let said = |address: Option<u64>| {
            let death = Death {
                signal: libc::SIGBUS,
                code: 2,
                address: address.map(Gpa),
                access: None,
                rip: 0,
                regs: crate::engine::Regs::default(),
                tid: 1,
                vector: Some(14),
            };
            reason(&death, None, &vmas, Frames::Own, FULL)
        };
        assert!(said(Some(0x1008)).contains("beyond the end of its file"), "{}", said(Some(0x1008)));
        assert!(said(Some(0x2000)).contains("this page of adopted memory"), "{}", said(Some(0x2000)));
        assert!(said(Some(0x3000)).contains("is gone"), "{}", said(Some(0x3000)));
        assert!(said(None).contains("does not say which"), "{}", said(None));
    }
}
