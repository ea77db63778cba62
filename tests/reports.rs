// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The report on umbra's own failures: a running guest's vCPU is lost on purpose, and what umbra has to say of it is whole,
//! tells where, and gives away no memory of the guest.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, cc, code, engine, finish, folder, guests, kvm, stderr, umbra};
use shadow_mmu::addr::Gpa;
use shadow_mmu::shadow::{FaultAroundPolicy, Spte};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vmm::crash;
use vmm::engine::EngineKind;
use vmm::fleet::Fleet;
use vmm::guest::Arguments;
use vmm::vm::{Program, Vm, VmConfig};

/// Where the program has its page of secrets.
const SECRETS: u64 = 0x6000_0000_0000;
const SECRET: &str = "this is the guest's own and nobody else's";

/// A guest with two threads: one reads its page of secrets for ever, the other one sleeps.
fn start(test: &str) -> Fleet {
    let source = format!(
        r#"
        #include <pthread.h>
        #include <string.h>
        #include <sys/mman.h>
        #include <unistd.h>
        static void *sleeper(void *arg) {{ for (;;) pause(); }}
        int main(void) {{
            pthread_t thread;
            volatile char *p = mmap((void *){SECRETS:#x}, 4096, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            pthread_create(&thread, 0, sleeper, 0);
            memcpy((void *)p, "{SECRET}", {length});
            for (;;) (void)p[3];
        }}"#,
        length = SECRET.len()
    );
    let elf = std::fs::read(cc(&folder(test), "reader", &source, STATIC)).unwrap().into();
    let config =
        VmConfig { fault_around: FaultAroundPolicy::Off, ..VmConfig::new(vmm::cli::engine(), 32 << 20) };
    let arguments =
        Arguments { exe: b"/reader".to_vec(), args: vec![b"reader".to_vec()], env: Vec::new(), random: None };
    let fleet = Fleet::new(1, None, config, &Program { elf, arguments }).unwrap();
    fleet.start().unwrap();
    fleet
}

/// Waits until the guest has written its page, and breaks the root's entry above it: a large page, which no root may have.
fn break_root(vm: &Vm) {
    let machine = vm.machine();
    let walk = loop {
        let walk = machine.shadow().walk(Gpa(SECRETS).gfn());
        if let [.., (1, leaf)] = walk[..]
            && Spte(leaf).is_dirty()
            && machine.pool().words(Spte(leaf).pfn())[0].load(Ordering::Acquire) != 0
        {
            break walk;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(walk[0].0, 4);
    let root = machine.pool().words(machine.shadow().root());
    root[(SECRETS >> 39) as usize].fetch_or(1 << 7, Ordering::SeqCst);
    Arc::clone(machine.engine()).tlb().flush_all();
}

#[test]
fn a_lost_vcpu_leaves_a_report_with_everything_but_the_guests_memory() {
    if !kvm() {
        return;
    }
    let fleet = start("reports-lost");
    let vm = fleet.guest(0).unwrap();
    break_root(&vm);
    let error = format!("{:#}", vm.wait().unwrap_err());
    assert!(error.contains("the engine (kvm) lost a vCPU: an exception that no guest can cause"), "{error}");
    let report = vm.machine().crash().unwrap();
    println!("{report}");
    assert!(report.starts_with("umbra report: vcpu\nthe vCPU of thread "), "{report}");
    for part in [
        concat!("umbra     ", env!("CARGO_PKG_VERSION"), ", pid "),
        "command   ",
        "backend   ",
        "host      Linux ",
        "  KVM_CAP_SYNC_REGS ",
        "flush methods that work: ",
        "the guest's registers\n",
        "the CPU's own registers\n",
        "KVM's exit 2 (KVM_EXIT_IO)",
        "kvm_run\n",
        "control registers\n  cr0 ",
        "segment cs\n  selector 0x",
        "frame of the exception, on the monitor's stack page\n  vector 0xe",
        "at rip 0x",
        &format!("at cr2 {:#x}\n", SECRETS + 3),
        "  primary  anonymous ",
        "last notifier events",
        "frames    8192 in all, ",
        "shadow    root 0x",
        "primary   ",
        "mappings: ",
        &format!("  {:#x}-", SECRETS),
        // What the audit has to say of the root.
        "1 violations\n",
        "which none may be",
    ] {
        assert!(report.contains(part), "no `{part}` in: {report}");
    }
    // The vCPU that died is past KVM_RUN; the one that sleeps waits for its waker.
    assert!(report.matches("(vcpu ").count() == 2, "{report}");
    assert_eq!(report.lines().filter(|line| line.starts_with("bytes at rip: ")).count(), 1);
    let bytes = report.lines().find_map(|line| line.strip_prefix("bytes at rip: ")).unwrap();
    assert_eq!(bytes.split(' ').filter(|byte| byte.len() == 2).count(), 16, "{bytes}");
    assert!(!report.contains(&SECRET[..8]), "{report}");
    let hex: Vec<_> = SECRET.bytes().take(4).map(|byte| format!("{byte:02x}")).collect();
    assert!(!report.contains(&hex.concat()) && !report.contains(&hex.join(" ")), "{report}");

    let folder = folder("reports-file");
    let told = crash::tell("the guest is lost", Some(report), Some(&folder));
    let path = crash::report_path(&folder, std::process::id(), 1);
    assert_eq!(told.lines().count(), 1);
    assert!(told.contains(path.to_str().unwrap()), "{told}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), report);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

/// Whatever the engine: umbra fails in one line, which names a file that only its owner reads.
#[test]
fn a_vcpu_that_its_engine_gives_up_leaves_a_report_in_a_file() {
    if !guests() {
        return;
    }
    let folder = folder("reports-given-up");
    let plan = folder.join("plan.toml");
    std::fs::write(&plan, "[[fault]]\npoint = 'vcpu-run'\nnth = 9\nexit = 'shutdown'\n").unwrap();
    let mut command = umbra();
    command.arg("inject").arg(plan).args(["--", "run", "--report-dir"]).arg(&folder).arg("hello");
    let output = finish(&mut command, b"", Duration::from_secs(60));
    let said = stderr(&output);
    assert_eq!(code(output.status), 125, "{said}");
    let lost: Vec<_> = said.lines().filter(|line| line.contains(") lost a vCPU: ")).collect();
    let [lost] = lost[..] else { panic!("{said}") };
    assert!(lost.contains(&format!("the engine ({})", engine())), "{said}");
    let path = std::path::Path::new(lost.rsplit_once(": ").unwrap().1);
    assert_eq!(path.parent().unwrap(), folder, "{said}");
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    let report = std::fs::read_to_string(path).unwrap();
    for part in [
        "umbra report: vcpu\n",
        concat!("umbra     ", env!("CARGO_PKG_VERSION"), ", pid "),
        "the guest's registers\n",
        "bytes at rip: ",
        "last notifier events",
        "mappings: ",
        "0 violations\n",
    ] {
        assert!(report.contains(part), "no `{part}` in: {report}");
    }
    if engine() == EngineKind::Kvm {
        // The guest's are elsewhere: the CPU was in the monitor. By ptrace there is nothing but the guest's.
        assert!(report.contains("the CPU's own registers\n"), "{report}");
    }
    if engine() == EngineKind::Ptrace {
        for part in ["engine    ptrace\n", "the guest's process is ", "last signal\n"] {
            assert!(report.contains(part), "no `{part}` in: {report}");
        }
    }
}
