// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that KVM still says of a vCPU that is being given up.
//!
//! System calls that fail now are no second failure: what they would have told is noted as unread, and where the page
//! shared with KVM has the same, that is taken.

use super::monitor::{Arrival, Monitor};
use super::raw_vcpu::RawVcpu;
use super::vcpu::from_kvm;
use crate::engine::{Facts, Regs, VcpuSnapshot};
use kvm_bindings::*;

/// Names of the exits that umbra has ever been told of, and of those that explain a failure.
const EXITS: [(u32, &str); 14] = [
    (KVM_EXIT_UNKNOWN, "KVM_EXIT_UNKNOWN"),
    (KVM_EXIT_EXCEPTION, "KVM_EXIT_EXCEPTION"),
    (KVM_EXIT_IO, "KVM_EXIT_IO"),
    (KVM_EXIT_HYPERCALL, "KVM_EXIT_HYPERCALL"),
    (KVM_EXIT_DEBUG, "KVM_EXIT_DEBUG"),
    (KVM_EXIT_HLT, "KVM_EXIT_HLT"),
    (KVM_EXIT_MMIO, "KVM_EXIT_MMIO"),
    (KVM_EXIT_IRQ_WINDOW_OPEN, "KVM_EXIT_IRQ_WINDOW_OPEN"),
    (KVM_EXIT_SHUTDOWN, "KVM_EXIT_SHUTDOWN"),
    (KVM_EXIT_FAIL_ENTRY, "KVM_EXIT_FAIL_ENTRY"),
    (KVM_EXIT_INTR, "KVM_EXIT_INTR"),
    (KVM_EXIT_INTERNAL_ERROR, "KVM_EXIT_INTERNAL_ERROR"),
    (KVM_EXIT_SYSTEM_EVENT, "KVM_EXIT_SYSTEM_EVENT"),
    (KVM_EXIT_MEMORY_FAULT, "KVM_EXIT_MEMORY_FAULT"),
];

/// Reads the vCPU a last time. `stored`: the guest's registers as they were last taken over.
pub(super) fn snapshot(raw: &mut RawVcpu, monitor: &Monitor, stored: Regs) -> VcpuSnapshot {
    let mut facts = vec![exit(raw), shared_page(raw)];
    let mut unread = Vec::new();
    let mut failed = |what: &str, error: kvm_ioctls::Error| unread.push(format!("{what}: {error}"));
    let regs = raw.fd.get_regs().unwrap_or_else(|error| {
        failed("KVM_GET_REGS (the registers are those of the last exit)", error);
        raw.fd.sync_regs_mut().regs
    });
    let sregs = raw.fd.get_sregs().unwrap_or_else(|error| {
        failed("KVM_GET_SREGS (the system registers are those of the last exit)", error);
        raw.fd.sync_regs_mut().sregs
    });
    facts.push(control(&sregs));
    facts.extend(segments(&sregs));
    match raw.fd.get_vcpu_events() {
        Ok(events) => facts.push(pending(&events)),
        Err(error) => failed("KVM_GET_VCPU_EVENTS", error),
    }
    match raw.fd.get_xcrs() {
        Ok(xcrs) => facts.push(Facts::new("extended control", vec![("xcr0", xcrs.xcrs[0].value)])),
        Err(error) => failed("KVM_GET_XCRS", error),
    }
    match raw.fd.get_debug_regs() {
        Ok(debug) => {
            facts.push(Facts::new("debug registers", vec![("dr6", debug.dr6), ("dr7", debug.dr7)]));
        }
        Err(error) => failed("KVM_GET_DEBUGREGS", error),
    }
    let cpu = from_kvm(&regs, sregs.fs.base, sregs.gs.base);
    let mut guest = if sregs.cs.dpl == 3 { cpu } else { stored };
    if let Some((vector, frame)) = frame(raw, monitor, sregs.cs.dpl) {
        (guest.rip, guest.rsp, guest.rflags) = (frame.rip, frame.rsp, frame.rflags);
        facts.push(Facts::new(
            "frame of the exception, on the monitor's stack page",
            vec![
                ("vector", vector.into()),
                ("error code", frame.error_code.into()),
                ("rip", frame.rip),
                ("cs", frame.cs),
                ("rflags", frame.rflags),
                ("rsp", frame.rsp),
            ],
        ));
    }
    VcpuSnapshot { guest, cpu, cr2: sregs.cr2, facts, unread }
}

/// The frame of the exception by which the guest arrived in the monitor, if it did.
fn frame(raw: &mut RawVcpu, monitor: &Monitor, ring: u8) -> Option<(u8, super::monitor::ExceptionFrame)> {
    if ring == 3 {
        return None;
    }
    // After `out` rip may be behind the instruction or at it; both are in the stub.
    match Arrival::by_rip(raw.fd.sync_regs_mut().regs.rip)? {
        Arrival::Exception(vector) => Some((vector, monitor.exception_frame(raw.pages, vector))),
        Arrival::Syscall => None,
    }
}

/// The exit reason, and the part of `kvm_run` that belongs to it.
fn exit(raw: &mut RawVcpu) -> Facts {
    let run = raw.fd.get_kvm_run();
    let reason = run.exit_reason;
    let name =
        EXITS.iter().find(|(number, _)| *number == reason).map_or("unknown to umbra", |(_, name)| name);
    let mut values = vec![("exit_reason", reason.into())];
    macro_rules! of {
        ($field:ident) => {
            // SAFETY: the page is ours, and the fields of the union are plain integers, whatever is in them.
            unsafe { run.__bindgen_anon_1.$field }
        };
    }
    match reason {
        KVM_EXIT_UNKNOWN => {
            let hw = of!(hw);
            values.push(("hardware_exit_reason", hw.hardware_exit_reason));
        }
        KVM_EXIT_EXCEPTION => {
            let ex = of!(ex);
            values.extend([("exception", ex.exception.into()), ("error_code", ex.error_code.into())]);
        }
        KVM_EXIT_IO => {
            let io = of!(io);
            values.extend([
                ("direction", io.direction.into()),
                ("size", io.size.into()),
                ("port", io.port.into()),
                ("count", io.count.into()),
            ]);
        }
        KVM_EXIT_MMIO => {
            let mmio = of!(mmio);
            // Not the data: that is the guest's.
            values.extend([
                ("phys_addr", mmio.phys_addr),
                ("len", mmio.len.into()),
                ("is_write", mmio.is_write.into()),
            ]);
        }
        KVM_EXIT_FAIL_ENTRY => {
            let entry = of!(fail_entry);
            values.extend([
                ("hardware_entry_failure_reason", entry.hardware_entry_failure_reason),
                ("cpu", entry.cpu.into()),
            ]);
        }
        KVM_EXIT_INTERNAL_ERROR => {
            let internal = of!(internal);
            values.extend([("suberror", internal.suberror.into()), ("ndata", internal.ndata.into())]);
            let data = internal.data.iter().take(internal.ndata as usize);
            values.extend(data.map(|&word| ("data", word)));
        }
        KVM_EXIT_MEMORY_FAULT => {
            let fault = of!(memory_fault);
            values.extend([("flags", fault.flags), ("gpa", fault.gpa), ("size", fault.size)]);
        }
        KVM_EXIT_SYSTEM_EVENT => {
            let event = of!(system_event);
            values.push(("type", event.type_.into()));
        }
        _ => {}
    }
    Facts::new(format!("KVM's exit {reason} ({name})"), values)
}

/// What `kvm_run` holds for every exit.
fn shared_page(raw: &mut RawVcpu) -> Facts {
    let run = raw.fd.get_kvm_run();
    Facts::new(
        "kvm_run",
        vec![
            ("request_interrupt_window", run.request_interrupt_window.into()),
            ("immediate_exit", run.immediate_exit.into()),
            ("ready_for_interrupt_injection", run.ready_for_interrupt_injection.into()),
            ("if_flag", run.if_flag.into()),
            ("flags", run.flags.into()),
            ("cr8", run.cr8),
            ("apic_base", run.apic_base),
            ("kvm_valid_regs", run.kvm_valid_regs),
            ("kvm_dirty_regs", run.kvm_dirty_regs),
        ],
    )
}

fn control(sregs: &kvm_sregs) -> Facts {
    Facts::new(
        "control registers",
        vec![
            ("cr0", sregs.cr0),
            ("cr2", sregs.cr2),
            ("cr3", sregs.cr3),
            ("cr4", sregs.cr4),
            ("cr8", sregs.cr8),
            ("efer", sregs.efer),
            ("apic_base", sregs.apic_base),
        ],
    )
}

fn segments(sregs: &kvm_sregs) -> Vec<Facts> {
    let of = |name: &str, segment: &kvm_segment| {
        Facts::new(
            format!("segment {name}"),
            vec![
                ("selector", segment.selector.into()),
                ("base", segment.base),
                ("limit", segment.limit.into()),
                ("type", segment.type_.into()),
                ("present", segment.present.into()),
                ("dpl", segment.dpl.into()),
                ("s", segment.s.into()),
                ("l", segment.l.into()),
                ("db", segment.db.into()),
                ("g", segment.g.into()),
                ("unusable", segment.unusable.into()),
            ],
        )
    };
    let table = |name: &str, table: &kvm_dtable| {
        Facts::new(format!("table {name}"), vec![("base", table.base), ("limit", table.limit.into())])
    };
    vec![
        of("cs", &sregs.cs),
        of("ss", &sregs.ss),
        of("ds", &sregs.ds),
        of("es", &sregs.es),
        of("fs", &sregs.fs),
        of("gs", &sregs.gs),
        of("tr", &sregs.tr),
        of("ldt", &sregs.ldt),
        table("gdt", &sregs.gdt),
        table("idt", &sregs.idt),
    ]
}

fn pending(events: &kvm_vcpu_events) -> Facts {
    let (exception, nmi) = (&events.exception, &events.nmi);
    Facts::new(
        "events that KVM holds",
        vec![
            ("exception injected", exception.injected.into()),
            ("exception pending", exception.pending.into()),
            ("exception nr", exception.nr.into()),
            ("exception has_error_code", exception.has_error_code.into()),
            ("exception error_code", exception.error_code.into()),
            ("exception payload", events.exception_payload),
            ("interrupt injected", events.interrupt.injected.into()),
            ("interrupt nr", events.interrupt.nr.into()),
            ("interrupt shadow", events.interrupt.shadow.into()),
            ("nmi injected", nmi.injected.into()),
            ("nmi pending", nmi.pending.into()),
            ("nmi masked", nmi.masked.into()),
            ("smi smm", events.smi.smm.into()),
            ("flags", events.flags.into()),
        ],
    )
}
