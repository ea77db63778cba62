// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The report on umbra's own failures: a vCPU that was lost, or an audit that found what must not be.
//!
//! One text, to be attached to a bug report: what failed, what ran and where, the vCPU, what the CPU and the primary have at
//! the places that matter, what happened last, and what everybody was doing. It is made at the moment of the failure, by the
//! thread that met it, with no lock held and the guest's memory still there; it is written later ([`tell`]), when umbra may
//! wait for a disk.
//!
//! No memory of the guest is in it but the 16 bytes at rip. Its registers are, its addresses, and umbra's command line. So
//! the file is its owner's alone.
//!
//! The death of a *guest* is [`report`](crate::report)'s business, from which this borrows.

mod file;
mod threads;

pub use file::{report_path, write};

use crate::engine::{EngineError, Facts, VcpuSnapshot};
use crate::report::{vma_line, write_events, write_host, write_mapping, write_registers, write_walk};
use crate::vm::Machine;
use shadow_mmu::addr::{Gpa, PAGE_SIZE, Pfn};
use shadow_mmu::shadow::Spte;
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::Ordering;

/// Mappings and violations that are printed: a guest decides how many there are.
const MOST_LINES: usize = 2000;
/// Bytes of the guest's code that are printed.
const CODE_BYTES: usize = 16;

/// The report on the vCPU of guest thread `tid`, which the engine just lost.
pub fn vcpu_lost(tid: i32, error: &EngineError, machine: &Machine) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_lost(&mut out, tid, error, machine);
    out
}

/// The report on an audit that found `violations`. `machines`: the guests that ran, by number.
pub fn audit_failed(violations: &[String], machines: &[(usize, &Machine)]) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_audit(&mut out, violations, machines);
    out
}

/// Writes `report`, if there is one, and returns the lines that tell the operator of the failure `what` and where the report
/// is. Where no file can be had the report itself is in them.
pub fn tell(what: &str, report: Option<&str>, folder: Option<&Path>) -> String {
    let Some(report) = report else { return format!("umbra: {what}\n") };
    match write(folder, report) {
        Ok(path) => {
            format!("umbra: {what}; for a bug report, with the guest's registers: {}\n", path.display())
        }
        Err(error) => {
            format!("umbra: {what}; its report could not be written ({error}) and follows\n{report}")
        }
    }
}

fn write_lost(out: &mut String, tid: i32, error: &EngineError, machine: &Machine) -> std::fmt::Result {
    write_head(out, "vcpu", &format!("the vCPU of thread {tid} was lost: {error}"), machine)?;
    match &error.snapshot {
        Some(snapshot) => write_vcpu(out, snapshot, machine)?,
        None => writeln!(out, "vcpu: its registers cannot be read")?,
    }
    write_scene(out, machine)?;
    let audit = machine.audit_all();
    writeln!(
        out,
        "audit: {} ptes and {} leaves looked at, {} violations",
        audit.ptes,
        audit.leaves,
        audit.violations.len()
    )?;
    write_lines(out, &audit.violations)?;
    threads::write(out)
}

fn write_audit(out: &mut String, violations: &[String], machines: &[(usize, &Machine)]) -> std::fmt::Result {
    let Some((_, first)) = machines.first() else { return writeln!(out, "umbra report: audit, no guest") };
    write_head(out, "audit", &format!("an audit found {} violations", violations.len()), first)?;
    writeln!(out, "violations")?;
    write_lines(out, violations)?;
    for (number, machine) in machines {
        if machines.len() > 1 {
            writeln!(out, "guest {number}")?;
        }
        write_scene(out, machine)?;
    }
    threads::write(out)
}

/// What failed, and what ran where.
fn write_head(out: &mut String, kind: &str, what: &str, machine: &Machine) -> std::fmt::Result {
    writeln!(out, "umbra report: {kind}")?;
    writeln!(out, "{what}")?;
    writeln!(
        out,
        "In here: registers and addresses of the guest, umbra's command line. Not in here: the guest's memory, but for \
         {CODE_BYTES} bytes at rip."
    )?;
    writeln!(out, "umbra     {}, pid {}", env!("CARGO_PKG_VERSION"), std::process::id())?;
    writeln!(out, "command   {}", command_line(std::env::args_os()))?;
    let engine = machine.engine();
    writeln!(out, "engine    {}", engine.kind())?;
    write_host(out, &engine.facts())?;
    for line in engine.describe() {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "accessed and dirty bits: {:?}", machine.ad_bits())
}

/// The command line, so that a shell would read it back; no line break comes through.
fn command_line(words: impl Iterator<Item = std::ffi::OsString>) -> String {
    let quoted = |word: std::ffi::OsString| {
        let word = word.to_string_lossy();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
        if !word.is_empty() && word.chars().all(is_plain) {
            return word.into_owned();
        }
        if word.chars().any(char::is_control) {
            format!("{word:?}")
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    words.map(quoted).collect::<Vec<_>>().join(" ")
}

fn write_facts(out: &mut String, facts: &Facts) -> std::fmt::Result {
    writeln!(out, "{}", facts.title)?;
    for row in facts.values.chunks(4) {
        let row: Vec<_> = row.iter().map(|(name, value)| format!("{name} {value:#x}")).collect();
        writeln!(out, "  {}", row.join("  "))?;
    }
    Ok(())
}

fn write_vcpu(out: &mut String, snapshot: &VcpuSnapshot, machine: &Machine) -> std::fmt::Result {
    let VcpuSnapshot { guest, cpu, cr2, facts, unread } = snapshot;
    write!(out, "the guest's ")?;
    write_registers(out, guest)?;
    if cpu != guest {
        write!(out, "the CPU's own ")?;
        write_registers(out, cpu)?;
    }
    for facts in facts {
        write_facts(out, facts)?;
    }
    for line in unread {
        writeln!(out, "not to be read: {line}")?;
    }
    let vmas = machine.mm().vmas();
    for (name, address) in [("rip", guest.rip), ("cr2", *cr2)] {
        writeln!(out, "at {name} {address:#x}")?;
        write_walk(out, Gpa(address), machine)?;
        write_mapping(out, Gpa(address), &vmas)?;
    }
    match code(machine, guest.rip) {
        Some(bytes) => {
            let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(out, "bytes at rip: {}", bytes.join(" "))
        }
        None => writeln!(out, "bytes at rip: not mapped"),
    }
}

/// The bytes at `rip`, as far as its page goes: those of the frame that the CPU finds.
fn code(machine: &Machine, rip: u64) -> Option<Vec<u8>> {
    if rip >> 47 != 0 {
        return None;
    }
    let walk = machine.shadow().walk(Gpa(rip).gfn());
    let leaf = walk.iter().find(|(level, _)| *level == 1).map(|(_, entry)| Spte(*entry))?;
    if !leaf.is_present() || !machine.pool().contains(leaf.pfn()) {
        return None;
    }
    let mut page = [0; PAGE_SIZE as usize];
    machine.pool().read(leaf.pfn(), &mut page);
    let from = (rip % PAGE_SIZE) as usize;
    Some(page[from..page.len().min(from + CODE_BYTES)].to_vec())
}

/// The guest and its memory as they are now.
fn write_scene(out: &mut String, machine: &Machine) -> std::fmt::Result {
    write_events(out, machine)?;
    let pool = machine.pool().stats();
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (shadow, mm) = (machine.shadow().stats(), machine.mm().stats());
    writeln!(
        out,
        "frames    {} in all, {} free ({} used), {} punched, peak {}, reserve {} ({} taken), {} merged",
        pool.frames,
        pool.free,
        pool.free_used,
        pool.punched,
        pool.peak,
        pool.reserve,
        pool.reserve_taken,
        machine.pool().ksm_frames()
    )?;
    writeln!(
        out,
        "shadow    root {:#x}, {} tables, {} leaves; faults {} taken, {} fixed, {} fast, {} spurious, {} retried; {} zapped, \
         {} flushes, {} stale",
        machine.shadow().root().0,
        machine.shadow().table_count(),
        get(&shadow.pages_4k),
        get(&shadow.pf_taken),
        get(&shadow.pf_fixed),
        get(&shadow.pf_fast),
        get(&shadow.pf_spurious),
        get(&shadow.pf_retried),
        get(&shadow.zapped),
        get(&shadow.flushes),
        get(&shadow.stale_leaves)
    )?;
    let Pfn(zero) = machine.mm().zero_frame();
    writeln!(
        out,
        "primary   {} tables, zero frame {zero:#x}; pages {} on demand, {} ahead, {} zero, {} copied, {} zapped",
        machine.mm().table_count(),
        get(&mm.demand_pages),
        get(&mm.ahead_pages),
        get(&mm.zero_pages),
        get(&mm.copied_pages),
        get(&mm.zapped_pages)
    )?;
    let vmas = machine.mm().vmas();
    writeln!(out, "mappings: {}", vmas.len())?;
    write_lines(out, &vmas.iter().map(vma_line).collect::<Vec<_>>())
}

/// Indented, as many as there is room for.
fn write_lines(out: &mut String, lines: &[String]) -> std::fmt::Result {
    for line in lines.iter().take(MOST_LINES) {
        writeln!(out, "  {line}")?;
    }
    match lines.len().saturating_sub(MOST_LINES) {
        0 => Ok(()),
        more => writeln!(out, "  and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    #[test]
    fn a_command_line_is_one_line_that_a_shell_reads_back() {
        let said = |words: &[&str]| command_line(words.iter().map(OsString::from));
        assert_eq!(
            said(&["umbra", "run", "--memory=64M", "./a b", "", "it's"]),
            r"umbra run --memory=64M './a b' '' 'it'\''s'"
        );
        assert!(!said(&["umbra", "two\nlines"]).contains('\n'));
    }

    #[test]
    fn a_long_list_ends_with_what_was_left_out() {
        let mut out = String::new();
        write_lines(&mut out, &vec!["x".to_owned(); MOST_LINES + 3]).unwrap();
        assert_eq!(out.lines().count(), MOST_LINES + 1);
        assert!(out.ends_with("  and 3 more\n"), "{out}");
    }

    #[test]
    fn without_a_folder_to_write_to_the_report_is_told_instead() {
        let told = tell("it broke", Some("line 1\nline 2\n"), Some(Path::new("/nonexistent/folder")));
        assert!(told.starts_with("umbra: it broke; its report could not be written ("), "{told}");
        assert!(told.ends_with("follows\nline 1\nline 2\n"), "{told}");
        assert_eq!(tell("it broke", None, None), "umbra: it broke\n");
    }
}
