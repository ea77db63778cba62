// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings of the host shown to a guest on KVM, and changed under it: the demo as a user runs it, and the gap between the
//! kernel's change and umbra's, with a guest that never stops reading.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, cc, code, finish, folder, guests, kvm, run, stderr, umbra};
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
use shadow_mmu::frame::FreedFrames;
use shadow_mmu::mm::watch::Watch;
use shadow_mmu::shadow::FaultAroundPolicy;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};
use vmm::guest::{Arguments, ExitStatus};
use vmm::vm::{Program, Vm, VmConfig};

const LIMIT: Duration = Duration::from_secs(60);
const PAGES: u64 = 8;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// What page n holds, less n: the guest knows it.
const TAG: u64 = 0xada0;
/// Where the guest finds the board and the pages.
const BOARD: Hva = Hva(0x1000_0000_0000);
const PLACE: Hva = Hva(0x1100_0000_0000);

#[test]
fn the_demo_shows_what_it_promises() {
    if !kvm() {
        return;
    }
    let output = finish(umbra().args(["run", "--adopt-demo", "--check"]), b"", LIMIT);
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let sights: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("guest  sees ")).collect();
    let expected = [
        "ada0 ada1 ada2 ada3 ada4 ada5 ada6 ada7",
        "ada0 ada1 ada2 2e35 ada4 ada5 ada6 ada7",
        "ada0 0 0 2e35 ada4 ada5 ada6 ada7",
        "ada0 0 0 2e35 ada4 ada5 ada6 ada7",
        "ada0 0 0 2e35 gone gone ada6 ada7",
        "ada0 0 0 2e35 gone gone ada6 ada7",
        "gone gone gone gone gone gone gone gone",
        "ada0 ada1 ada2 ada3 ada4 ada5 ada6 ada7",
        "ada0 ada1 ada2 2e35 ada4 ada5 ada6 ada7",
        "ada0 ada1 ada2 2e35 ada4 ada5 ada6 ada7",
        "ada0 ada1 ada2 2e35 ada4 ada5 ada6 ada7",
        "ada0 ada1 ada2 2e35 gone gone ada6 ada7",
        "ada0 ada1 ada2 2e35 gone gone ada6 ada7",
        "gone gone gone gone gone gone gone gone",
    ];
    assert_eq!(sights, expected, "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("host ")).count(), 16, "{text}");
    assert!(text.lines().last().unwrap().starts_with("as promised: 14 looks"), "{text}");
}

#[test]
fn the_time_limit_of_the_demo_is_no_broken_promise() {
    if !kvm() {
        return;
    }
    let output = finish(umbra().args(["run", "--adopt-demo", "--timeout", "0.000001"]), b"", LIMIT);
    assert_eq!(stderr(&output), "umbra: the demo was ended by the time limit\n");
    assert_eq!(code(output.status), 128 + libc::SIGKILL);
}

/// Whether a process has a thread that runs a vCPU.
fn runs_a_vcpu(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.flatten().any(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.starts_with("vcpu"))
    })
}

/// The demo cannot go on while nobody reads what it says, so the signal comes in its middle.
#[test]
fn a_signal_to_the_demo_is_no_broken_promise() {
    if !kvm() {
        return;
    }
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: a descriptor of ours.
    let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    writer.write_all(&vec![b'\n'; size as usize]).unwrap();
    let mut command = umbra();
    command.args(["run", "--adopt-demo"]).stdout(writer).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It holds the write end.
    drop(command);
    let began = Instant::now();
    let pid = child.id();
    let mut wait_until = |vcpu: bool| {
        while runs_a_vcpu(pid) != vcpu {
            assert!(began.elapsed() < LIMIT && child.try_wait().unwrap().is_none(), "a vCPU: {vcpu}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait_until(true);
    // SAFETY: our child, which was not waited for yet.
    unsafe { libc::kill(pid as i32, libc::SIGINT) };
    wait_until(false);
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stderr(&output), "umbra: the demo was ended by SIGINT\n");
    assert_eq!(code(output.status), 128 + libc::SIGINT);
}

#[test]
fn the_demo_takes_no_program() {
    let output = finish(umbra().args(["run", "--adopt-demo", "hello"]), b"", LIMIT);
    assert_eq!(code(output.status), 2, "{}", stderr(&output));
}

fn fresh(len: u64) -> u64 {
    // Never used twice: what is mapped in the place of a private mapping before the watch has settled a guest may see.
    static NEXT: AtomicU64 = AtomicU64::new(0x2000_0000_0000);
    NEXT.fetch_add(len + PAGE_SIZE, Ordering::SeqCst)
}

fn mmap(at: u64, pages: u64, flags: i32) -> u64 {
    let (at, len) = (at as *mut libc::c_void, (pages * PAGE_SIZE) as usize);
    // SAFETY: the test's own addresses.
    let new = unsafe { libc::mmap(at, len, RW, flags, -1, 0) };
    assert_ne!(new, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    new as u64
}

/// New pages with their numbers in them.
fn tagged() -> u64 {
    let at = mmap(fresh(PAGES * PAGE_SIZE), PAGES, ANONYMOUS | libc::MAP_FIXED_NOREPLACE);
    (0..PAGES).for_each(|page| poke(at, page, TAG + page));
    at
}

fn poke(at: u64, page: u64, value: u64) {
    // SAFETY: a mapped page of the test's own, without references into it.
    unsafe { ((at + page * PAGE_SIZE) as *mut u64).write_volatile(value) };
}

fn munmap(at: u64, pages: Range<u64>) {
    let (start, len) = (at + pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE);
    // SAFETY: pages of the test's own, without references into them.
    assert_eq!(unsafe { libc::munmap(start as *mut libc::c_void, len as usize) }, 0);
}

fn move_away(at: u64) -> u64 {
    let (len, flags) = ((PAGES * PAGE_SIZE) as usize, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    let to = fresh(PAGES * PAGE_SIZE);
    // SAFETY: from pages of the test's own to where nothing is.
    let new = unsafe { libc::mremap(at as *mut libc::c_void, len, len, flags, to as *mut libc::c_void) };
    assert_ne!(new, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    new as u64
}

fn mprotect(at: u64, prot: i32) {
    // SAFETY: pages of the test's own; nobody accesses them but the guest.
    let result = unsafe { libc::mprotect(at as *mut libc::c_void, (PAGES * PAGE_SIZE) as usize, prot) };
    assert_eq!(result, 0);
}

/// The `watcher` on a machine, and the board through which it is asked.
struct Watcher {
    vm: Vm,
    watch: Arc<Watch>,
    board: u64,
    requests: u64,
}

impl Watcher {
    /// `None` where the host has no KVM or no userfaultfd.
    fn start(fault_around: FaultAroundPolicy) -> Option<Self> {
        let board = format!("{:x}", BOARD.0);
        let elf = guest_images::find("watcher").unwrap().elf.into();
        let (vm, entry) = machine(elf, &["watcher", "--board", &board], fault_around)?;
        let watch = watch(&vm)?;
        let board = mmap(0, 1, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let this = Self { vm, watch, board, requests: 0 };
        this.adopt(board..board + PAGE_SIZE, BOARD, Access::READ | Access::WRITE);
        this.vm.start(entry).unwrap();
        Some(this)
    }

    fn adopt(&self, host: Range<u64>, at: Hva, access: Access) {
        let mm = self.vm.machine().mm();
        // SAFETY: the test's own pages, which hold numbers; only atomic and volatile access is made to them, and addresses
        // are never used twice.
        assert_eq!(unsafe { mm.adopt(&self.watch, host, access, Some(at)) }.unwrap(), at);
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        // SAFETY: the page stays mapped while the watcher lives, and both sides access it atomically.
        unsafe { &*((self.board + 8 * index) as *const AtomicU64) }
    }

    /// What the guest sees in each page: `None` for SIGSEGV with `SEGV_MAPERR`, `u64::MAX` for another fault.
    fn look(&mut self) -> Vec<Option<u64>> {
        self.requests += 1;
        self.word(2).store(PLACE.0, Ordering::SeqCst);
        self.word(0).store(self.requests, Ordering::SeqCst);
        let began = Instant::now();
        while self.word(1).load(Ordering::SeqCst) != self.requests {
            assert!(began.elapsed() < LIMIT, "the guest does not answer");
            std::thread::sleep(Duration::from_micros(50));
        }
        let gone = self.word(5).load(Ordering::SeqCst);
        let value = |page| self.word(8 + page).load(Ordering::SeqCst);
        (0..PAGES).map(|page| (gone >> page & 1 == 0).then(|| value(page))).collect()
    }

    /// Ends it. Returns how many words it read unasked, and how many of those were never in the memory.
    fn finish(mut self) -> (u64, u64) {
        self.requests += 1;
        self.word(2).store(0, Ordering::SeqCst);
        self.word(0).store(self.requests, Ordering::SeqCst);
        assert_eq!(self.vm.wait().unwrap(), ExitStatus::Exited(0));
        let (report, broken) = self.vm.machine().check();
        assert!(report.violations.is_empty() && broken == 0, "{:#?}", report.violations);
        (self.word(3).load(Ordering::SeqCst), self.word(4).load(Ordering::SeqCst))
    }
}

fn machine(
    elf: Arc<[u8]>,
    args: &[&str],
    fault_around: FaultAroundPolicy,
) -> Option<(Vm, vmm::engine::Regs)> {
    if !kvm() {
        return None;
    }
    let engine = vmm::cli::engine();
    let config = VmConfig { fault_around, freed: FreedFrames::Poison, ..VmConfig::new(engine, 16 << 20) };
    let args = args.iter().map(|arg| arg.as_bytes().to_vec()).collect();
    let arguments = Arguments { exe: b"/test".to_vec(), args, env: Vec::new(), random: None };
    Some(Vm::new(config, Program { elf, arguments }).unwrap())
}

fn watch(vm: &Vm) -> Option<Arc<Watch>> {
    match vm.machine().watch() {
        Ok(watch) => Some(watch),
        Err(error) => {
            assert!(std::env::var_os("UMBRA_REQUIRE_KVM").is_none(), "required here: {error:#}");
            println!("skipped: {error:#}");
            None
        }
    }
}

fn all_tags() -> Vec<Option<u64>> {
    (0..PAGES).map(|page| Some(TAG + page)).collect()
}

/// The host takes the memory away in every way there is, a thousand times, while the guest reads it. Every read in the gap is
/// retried or refused; none kills the vCPU, and none sees what the mapping never held.
#[test]
fn a_guest_that_never_stops_reading_survives_a_thousand_changes() {
    for fault_around in [FaultAroundPolicy::Adaptive, FaultAroundPolicy::Off] {
        let Some(mut guest) = Watcher::start(fault_around) else { return };
        let mut at = tagged();
        let whole = |at| at..at + PAGES * PAGE_SIZE;
        guest.adopt(whole(at), PLACE, Access::READ);
        assert_eq!(guest.look(), all_tags());
        for round in 0..1000u64 {
            let mut expected = all_tags();
            match round % 4 {
                0 => at = move_away(at),
                1 => {
                    munmap(at, 2..5);
                    expected[2..5].fill(None);
                }
                2 => {
                    // Zeros where page 3 was are as good as its number; where the guest looks nothing may be.
                    mmap(at + 3 * PAGE_SIZE, 1, ANONYMOUS | libc::MAP_FIXED);
                    expected[3] = None;
                }
                _ => {
                    // SAFETY: pages of the test's own that hold numbers.
                    let result =
                        unsafe { libc::madvise(at as *mut _, PAGE_SIZE as usize, libc::MADV_DONTNEED) };
                    assert_eq!(result, 0);
                    expected[0] = Some(0);
                }
            }
            // Most often the guest reads on unasked, so that the host's next change comes in the middle of that.
            if round % 16 < 4 {
                assert_eq!(guest.look(), expected, "round {round}");
            }
            if round % 4 != 0 {
                munmap(at, 0..PAGES);
                guest.watch.settle(Duration::from_secs(60)).unwrap();
                at = tagged();
                guest.adopt(whole(at), PLACE, Access::READ);
            }
        }
        assert_eq!(guest.look(), all_tags());
        let events = guest.watch.events();
        let (words, wrong) = guest.finish();
        assert_eq!(wrong, 0, "of {words} words");
        assert!(words > 1000 && events > 1000, "{words} words, {events} events");
    }
}

/// What has no event: the host takes the right to the memory. The guest gets SIGBUS, and reads on when it is given back.
#[test]
fn memory_that_the_host_itself_may_not_read_is_a_bus_error_to_the_guest() {
    listen_to_the_log();
    let Some(mut guest) = Watcher::start(FaultAroundPolicy::Adaptive) else { return };
    let at = tagged();
    guest.adopt(at..at + PAGES * PAGE_SIZE, PLACE, Access::READ);
    assert_eq!(guest.look(), all_tags());
    for _ in 0..3 {
        mprotect(at, libc::PROT_NONE);
        assert_eq!(guest.look(), vec![Some(u64::MAX); PAGES as usize]);
        mprotect(at, RW);
        assert_eq!(guest.look(), all_tags());
    }
    assert_eq!(guest.finish().1, 0);
    // Each machine has a thread of its own for its vCPU, and tells it once, with what was tried.
    let warnings = WARNINGS.lock().unwrap();
    let of = |thread| warnings.iter().filter(|(other, _)| *other == thread).count();
    assert!(!warnings.is_empty() && warnings.iter().all(|&(thread, _)| of(thread) == 1), "{warnings:?}");
    assert!(warnings.iter().all(|(_, line)| line.contains("64 tries")), "{warnings:?}");
}

/// Warnings of SIGBUS to a guest, and on which thread each was made.
static WARNINGS: Mutex<Vec<(ThreadId, String)>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Listener;

impl log::Log for Listener {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        let line = record.args().to_string();
        if record.level() == log::Level::Warn && line.contains("SIGBUS") {
            WARNINGS.lock().unwrap().push((std::thread::current().id(), line));
        }
    }
    fn flush(&self) {}
}

fn listen_to_the_log() {
    // An error says that it is done already.
    if log::set_logger(&Listener).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// A guest that does not expect it dies, and the report blames the host, not a file that the guest never mapped.
#[test]
fn the_report_on_a_guest_that_the_host_took_memory_from_says_so() {
    let source = r#"
        #include <stdlib.h>
        int main(int argc, char **argv) { return *(volatile char *)strtoull(argv[1], 0, 16); }"#;
    let program = cc(&folder("unreachable"), "unreachable", source, STATIC);
    let elf: Arc<[u8]> = std::fs::read(program).unwrap().into();
    let place = format!("{:x}", PLACE.0);
    let Some((vm, entry)) = machine(elf, &["unreachable", &place], FaultAroundPolicy::Adaptive) else {
        return;
    };
    let Some(watch) = watch(&vm) else { return };
    let at = tagged();
    // SAFETY: pages of the test's own that hold numbers.
    unsafe { vm.machine().mm().adopt(&watch, at..at + PAGES * PAGE_SIZE, Access::READ, Some(PLACE)) }
        .unwrap();
    mprotect(at, libc::PROT_NONE);
    vm.start(entry).unwrap();
    assert_eq!(vm.wait().unwrap(), ExitStatus::Signaled(libc::SIGBUS));
    let death = vm.machine().death().unwrap();
    let report = vmm::report::death_report(&death, "the guest", vm.machine());
    assert!(report.contains("page of adopted memory") && !report.contains("beyond the end"), "{report}");
    match death.address {
        // KVM of some hosts names the page, of others not.
        Some(address) => assert!(address.0 == PLACE.0 && report.contains("[adopted]"), "{report}"),
        None => {
            assert!(report.contains("does not say which") && !report.contains("mapping:"), "{report}")
        }
    }
}

/// System calls cannot reach adopted memory, in either direction; loads and stores can.
#[test]
fn a_system_call_with_adopted_memory_is_efault() {
    let source = r#"
        #include <errno.h>
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <sys/uio.h>
        #include <unistd.h>
        int main(int argc, char **argv) {
            volatile char *at = (char *)strtoull(argv[1], 0, 16);
            struct iovec part = { (char *)at, 1 };
            if (at[0] != 'a') return 1;
            at[1] = 'b';
            if (write(1, (char *)at, 2) != -1 || errno != EFAULT) return 2;
            if (writev(1, &part, 1) != -1 || errno != EFAULT) return 3;
            if (syscall(SYS_clock_gettime, 1, at) != -1 || errno != EFAULT) return 4;
            return at[0] == 'a' && at[1] == 'b' ? 0 : 5;
        }"#;
    let program = cc(&folder("efault"), "efault", source, STATIC);
    let elf: Arc<[u8]> = std::fs::read(program).unwrap().into();
    let place = format!("{:x}", PLACE.0);
    let Some((vm, entry)) = machine(elf, &["efault", &place], FaultAroundPolicy::Adaptive) else { return };
    let Some(watch) = watch(&vm) else { return };
    let at = mmap(fresh(PAGE_SIZE), 1, ANONYMOUS | libc::MAP_FIXED_NOREPLACE);
    poke(at, 0, u64::from(b'a'));
    let access = Access::READ | Access::WRITE;
    // SAFETY: a page of the test's own that holds a few letters.
    unsafe { vm.machine().mm().adopt(&watch, at..at + PAGE_SIZE, access, Some(PLACE)) }.unwrap();
    vm.start(entry).unwrap();
    assert_eq!(vm.wait().unwrap(), ExitStatus::Exited(0));
    // SAFETY: as in `poke`.
    let word = unsafe { (at as *const u64).read_volatile() };
    assert_eq!(word.to_le_bytes()[..2], *b"ab");
}

/// The bundled guest alone: what it sees of its own memory is what the demo promises of the host's.
#[test]
fn the_watcher_without_a_board_watches_itself() {
    if !guests() {
        return;
    }
    let output = finish(&mut run(&["--check"], &["watcher"]), b"", LIMIT);
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with("all unmapped: gone gone gone gone gone gone gone gone\n"), "{text}");
}
