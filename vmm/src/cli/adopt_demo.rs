// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --adopt-demo`: memory of umbra's own, shown to a guest and changed behind its back by plain system calls.
//!
//! The guest is the bundled `watcher`. It reads the memory all the time, also in the middle of a change, and answers requests
//! on a page that is shown to it as well, the board (see `guest-images/src/guests/watcher.rs` for its words). After each
//! system call the host asks, and compares the answer with what it must be. Nothing is left to time: a request is made when
//! the call has returned, and answered by a look that comes after the request. A signal to umbra or the time limit ends the
//! guest, and the demo when it asks next: that is no broken promise, and is told apart by [`Ended`].

use crate::causes::{answer, say, tell};
use crate::engine::{EngineChoice, choice};
use crate::guest::{Arguments, ExitStatus};
use crate::reactor::{Event, Reactor, Sources, unblock_signals};
use crate::report::{death_report, exit_code, signal_name};
use crate::vm::{Program, Vm, VmConfig};
use anyhow::{Context, Result, bail, ensure};
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGES: u64 = 8;
/// What page n holds at first, less n, and what is written to page 3 later: the watcher knows both.
const TAG: u64 = 0xada0;
const NEWS: u64 = 0x2e35;
/// Where the guest finds the board.
const BOARD: u64 = 0x1000_0000_0000;

/// What a page must read as: a value, or nothing is mapped there.
type Seen = Option<u64>;

/// Words of the board.
const REQUEST: u64 = 0;
const ANSWER: u64 = 1;
const ADDRESS: u64 = 2;
const WORDS_READ: u64 = 3;
const WORDS_WRONG: u64 = 4;
const GONE: u64 = 5;
const VALUES: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    PrivateAnonymous,
    SharedMemfd,
}

/// Pages of this process and where each is now; `None` once it is unmapped. They are never touched but by volatile access.
#[derive(Debug)]
struct Memory {
    pages: Vec<Option<u64>>,
}

fn memfd() -> Result<File> {
    // SAFETY: the name is a C string; the call touches no memory of ours.
    let fd = unsafe { libc::memfd_create(c"adopt-demo".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("memfd_create");
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

impl Memory {
    fn new(kind: Kind, count: u64) -> Result<Self> {
        let file = (kind == Kind::SharedMemfd).then(memfd).transpose()?;
        let flags = match &file {
            Some(file) => {
                file.set_len(count * PAGE_SIZE).context("ftruncate")?;
                libc::MAP_SHARED
            }
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        let fd = file.as_ref().map_or(-1, |file| file.as_raw_fd());
        let (len, prot) = ((count * PAGE_SIZE) as usize, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping where the kernel likes; nothing that exists is touched.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mmap");
        }
        Ok(Self { pages: (0..count).map(|n| Some(at as u64 + n * PAGE_SIZE)).collect() })
    }

    fn address(&self, page: u64) -> Result<u64> {
        self.pages.get(page as usize).copied().flatten().with_context(|| format!("page {page} is unmapped"))
    }

    fn range(&self) -> Result<Range<u64>> {
        let start = self.address(0)?;
        Ok(start..start + self.pages.len() as u64 * PAGE_SIZE)
    }

    fn write(&self, page: u64, value: u64) -> Result<()> {
        let at = self.address(page)? as *mut u64;
        // SAFETY: a mapped page of ours that no reference points into.
        unsafe { at.write_volatile(value) };
        Ok(())
    }

    fn discard(&self, pages: Range<u64>) -> Result<()> {
        let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
        let at = self.address(pages.start)? as *mut libc::c_void;
        // SAFETY: pages of ours that no reference points into.
        let result = unsafe { libc::madvise(at, len, libc::MADV_DONTNEED) };
        ensure!(result == 0, "madvise: {}", io::Error::last_os_error());
        Ok(())
    }

    fn unmap(&mut self, pages: Range<u64>) -> Result<()> {
        let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
        let at = self.address(pages.start)? as *mut libc::c_void;
        // SAFETY: pages of ours that no reference points into.
        let result = unsafe { libc::munmap(at, len) };
        ensure!(result == 0, "munmap: {}", io::Error::last_os_error());
        self.pages[pages.start as usize..pages.end as usize].fill(None);
        Ok(())
    }

    /// Moves `pages` to addresses where nothing is.
    fn move_away(&mut self, pages: Range<u64>) -> Result<()> {
        let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
        // A place of that size that is free: one that is reserved first.
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes.
        let place = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, reserve, -1, 0) };
        ensure!(place != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        let at = self.address(pages.start)? as *mut libc::c_void;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: from pages of ours that no reference points into, over pages that we just reserved.
        let new = unsafe { libc::mremap(at, len, len, flags, place) };
        ensure!(new != libc::MAP_FAILED, "mremap: {}", io::Error::last_os_error());
        for (n, page) in (0..).zip(pages) {
            self.pages[page as usize] = Some(new as u64 + n * PAGE_SIZE);
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for page in 0..self.pages.len() as u64 {
            if self.pages[page as usize].is_some()
                && let Err(error) = self.unmap(page..page + 1)
            {
                log::warn!("memory of the demo stays mapped: {error}");
            }
        }
    }
}

/// A step: what is printed, what is done, and what becomes of what the guest must see.
struct Step {
    what: &'static str,
    call: fn(&mut Memory) -> Result<()>,
    effect: fn(Kind, &mut [Seen]),
}

const STEPS: [Step; 7] = [
    Step { what: "does nothing", call: |_| Ok(()), effect: |_, _| {} },
    Step { what: "writes to page 3", call: |m| m.write(3, NEWS), effect: |_, seen| seen[3] = Some(NEWS) },
    Step {
        what: "madvise(pages 1-2, MADV_DONTNEED)",
        call: |m| m.discard(1..3),
        // Of shared memory the pages go, not the content.
        effect: |kind, seen| {
            if kind == Kind::PrivateAnonymous {
                seen[1..3].fill(Some(0));
            }
        },
    },
    Step { what: "mremap(pages 0-7) to new addresses", call: |m| m.move_away(0..8), effect: |_, _| {} },
    Step { what: "munmap(pages 4-5)", call: |m| m.unmap(4..6), effect: |_, seen| seen[4..6].fill(None) },
    Step { what: "mremap(pages 6-7) to new addresses", call: |m| m.move_away(6..8), effect: |_, _| {} },
    Step {
        what: "munmap(pages 0-3 and 6-7)",
        call: |m| m.unmap(0..4).and_then(|()| m.unmap(6..8)),
        effect: |_, seen| seen.fill(None),
    },
];

/// The guest is no more, and was asked something.
#[derive(Debug, thiserror::Error)]
#[error("not as promised: the guest ended without an answer")]
struct Ended;

/// The host's end of the board.
#[derive(Debug)]
struct Board {
    memory: Memory,
    requests: u64,
    /// Set when the guest is no more, and will not answer.
    over: Arc<AtomicBool>,
}

impl Board {
    fn word(&self, index: u64) -> Result<&AtomicU64> {
        let at = (self.memory.address(0)? + 8 * index) as *const AtomicU64;
        // SAFETY: the page stays mapped while `self` lives, and both sides access its words atomically.
        Ok(unsafe { &*at })
    }

    fn ask(&mut self, address: u64) -> Result<()> {
        self.requests += 1;
        self.word(ADDRESS)?.store(address, Ordering::Relaxed);
        self.word(REQUEST)?.store(self.requests, Ordering::Release);
        Ok(())
    }

    /// Asks the guest what it sees at `address`.
    fn look(&mut self, address: Hva) -> Result<Vec<Seen>> {
        self.ask(address.0)?;
        while self.word(ANSWER)?.load(Ordering::Acquire) != self.requests {
            ensure!(!self.over.load(Ordering::Acquire), Ended);
            std::thread::sleep(Duration::from_micros(50));
        }
        let gone = self.word(GONE)?.load(Ordering::Relaxed);
        (0..PAGES)
            .map(|page| {
                let value = self.word(VALUES + page)?.load(Ordering::Relaxed);
                Ok((gone >> page & 1 == 0).then_some(value))
            })
            .collect()
    }
}

fn print(line: &str) -> Result<()> {
    match answer(format_args!("{line}\n")) {
        // To whom nobody listens the exit status says it.
        Err(error) if super::is_broken_pipe(&error) => Ok(()),
        printed => printed,
    }
}

/// All steps with memory of one kind.
fn play(vm: &Vm, board: &mut Board, kind: Kind) -> Result<()> {
    let watch = vm.machine().watch()?;
    let mut memory = Memory::new(kind, PAGES)?;
    (0..PAGES).try_for_each(|page| memory.write(page, TAG + page))?;
    let (range, access) = (memory.range()?, Access::READ);
    let name = match kind {
        Kind::PrivateAnonymous => "private anonymous memory",
        Kind::SharedMemfd => "a shared memfd",
    };
    // SAFETY: pages with numbers, nothing secret, which only volatile access reaches. What else of umbra's could be mapped
    // where they were before their unmapping is handled, the guest could read for that moment; it is our own, and would
    // tell it to nobody but us.
    let at = unsafe { vm.machine().mm().adopt(&watch, range.clone(), access, None) }?;
    print(&format!(
        "host   shows {PAGES} pages of {name}, [{:#x}, {:#x}), to the guest at {at}",
        range.start, range.end
    ))?;
    let mut expected: Vec<Seen> = (0..PAGES).map(|page| Some(TAG + page)).collect();
    for step in &STEPS {
        let began = Instant::now();
        (step.call)(&mut memory).with_context(|| format!("the step `{}` failed", step.what))?;
        print(&format!("host   {} in {} µs", step.what, began.elapsed().as_micros()))?;
        (step.effect)(kind, &mut expected);
        let seen = board.look(at)?;
        if seen != expected {
            bail!(
                "not as promised: after `{}` on {name} the guest must see {expected:x?}, and sees {seen:x?}",
                step.what
            );
        }
    }
    Ok(())
}

fn demo(vm: &Vm, board: &mut Board) -> Result<String> {
    for kind in [Kind::PrivateAnonymous, Kind::SharedMemfd] {
        play(vm, board, kind)?;
    }
    let (words, wrong) = (board.word(WORDS_READ)?, board.word(WORDS_WRONG)?);
    let (words, wrong) = (words.load(Ordering::Relaxed), wrong.load(Ordering::Relaxed));
    ensure!(
        wrong == 0,
        "not as promised: {wrong} of {words} words that the guest read were never in the memory"
    );
    board.ask(0)?;
    let events = vm.machine().watch()?.events();
    Ok(format!(
        "as promised: {} looks after {events} events of the kernel's, and {words} words read meanwhile, none wrong",
        2 * STEPS.len()
    ))
}

/// Runs it, for at most `limit`. Ended by a signal or the limit, it has the exit status that a program has.
pub(super) fn run(mut config: VmConfig, limit: Option<Duration>) -> Result<u8> {
    if config.engine.choice == EngineChoice::Auto {
        // No other engine would do.
        config.engine.choice = EngineChoice::Kvm;
        choice::kind(&config.engine).context("adoption needs KVM")?;
    }
    let image = guest_images::find("watcher").context("the guest of the demo is not bundled")?;
    let arguments = Arguments {
        exe: b"/watcher".to_vec(),
        args: ["watcher", "--board", &format!("{BOARD:x}")].map(|word| word.as_bytes().to_vec()).into(),
        env: Vec::new(),
        random: None,
    };
    let (vm, entry) = Vm::new(config, Program { elf: image.elf.into(), arguments })?;
    let watch = vm.machine().watch()?;
    let over = Arc::new(AtomicBool::new(false));
    let memory = Memory::new(Kind::SharedMemfd, 1)?;
    let (range, access) = (memory.range()?, Access::READ | Access::WRITE);
    let mut board = Board { memory, requests: 0, over: Arc::clone(&over) };
    // SAFETY: a page of atomic words, for which any value is valid, that is unmapped when the guest has ended.
    unsafe { vm.machine().mm().adopt(&watch, range, access, Some(Hva(BOARD))) }?;
    let mut reactor = Reactor::new(Sources::new([vm.exited()?])?.with_limit(limit)?)?;
    let mut interrupted = None;
    let (verdict, status) = std::thread::scope(|scope| -> Result<(Result<String>, ExitStatus)> {
        vm.start(entry)?;
        let host = scope.spawn(|| {
            let verdict = demo(&vm, &mut board);
            if verdict.is_err() {
                vm.kill(libc::SIGKILL);
            }
            verdict
        });
        let ended = reactor.run(|event| {
            let signal = match event {
                Event::Signal(signal) => signal,
                Event::TimeLimit => libc::SIGKILL,
                // The demo asks for no ticks and no rings.
                Event::Exited(_)
                | Event::Age
                | Event::CollectDirty
                | Event::LookAtSharing
                | Event::RingFull => {
                    return;
                }
            };
            // The first ends the guest.
            interrupted.get_or_insert((event, signal));
            vm.kill(signal);
        });
        over.store(true, Ordering::Release);
        // The demo, and we after it, may wait for who reads what it says.
        unblock_signals()?;
        let verdict = host.join().unwrap_or_else(|_| bail!("the demo panicked: this is a bug of umbra's"));
        ended?;
        Ok((verdict, vm.wait()?))
    })?;
    if let Some((event, signal)) = interrupted
        && status == ExitStatus::Signaled(signal)
        && verdict.as_ref().err().is_none_or(|error| error.is::<Ended>())
    {
        match event {
            Event::TimeLimit => say(format_args!("the demo was ended by the time limit")),
            _ => say(format_args!("the demo was ended by {}", signal_name(signal))),
        }
        return Ok(exit_code(status));
    }
    if let Some(death) = vm.machine().death().filter(|death| death.signal != libc::SIGKILL) {
        tell(death_report(&death, "the guest", vm.machine()));
        // It shares stdout with umbra.
        ensure!(death.signal != libc::SIGPIPE, "cannot write to stdout: its reader is gone");
    }
    let verdict = verdict?;
    ensure!(status == ExitStatus::Exited(0), "the guest ended with {status:?}");
    let (report, broken) = vm.machine().check();
    ensure!(
        report.violations.is_empty() && broken == 0,
        "the shadow map is wrong: this is a bug of umbra's: {:?}",
        report.violations
    );
    print(&verdict)?;
    Ok(0)
}
