// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bundled `memstress`, as a guest in this process or as a process of its own, told what to touch and when.
//!
//! Commands go through a pipe to its stdin, answers come back through one from its stdout; between the two all its threads
//! sleep. So whoever holds a [`Memstress`] knows exactly which pages were touched between two of its own actions, and
//! disturbs nothing while it looks.
//!
//! One thread drives. It never waits for ever: an answer, the program's end and a limit all wake it. The limit grows with the
//! memory; who asks for what takes longer than touching it says so by [`Memstress::expect`]. Dropping a [`Memstress`] ends
//! the program, whatever it is doing; [`Memstress::finish`] lets it end by itself and looks at how.

#[cfg(test)]
mod tests;
mod work;

pub use work::Work;

use super::NativeImage;
use crate::guest::{Arguments, ExitStatus, Files};
use crate::vm::{Machine, Program, Vm, VmConfig};
use anyhow::{Context, Result, bail};
use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// How much longer than expected an answer may take, before the program is given up.
const GRACE: Duration = Duration::from_secs(600);

/// What the program says of one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// From the first thread's start to the last one's end, by the program's own clock.
    pub time: Duration,
    /// Accesses of all threads.
    pub accesses: u64,
}

/// Where it runs.
#[derive(Debug)]
enum Place {
    Guest { vm: Box<Vm>, exited: EventFd },
    Native { child: Child, _image: NativeImage },
}

/// A running `memstress`.
#[derive(Debug)]
pub struct Memstress {
    place: Place,
    /// `None` once it has been told to end.
    stdin: Option<PipeWriter>,
    stdout: PipeReader,
    /// What came of the next answer so far.
    partial: Vec<u8>,
    is_over: bool,
    /// How long an answer may take.
    limit: Duration,
}

impl Memstress {
    /// Starts it as a guest.
    ///
    /// # Errors
    /// What keeps umbra from running a guest.
    pub fn guest(config: VmConfig, work: &Work) -> Result<Self> {
        let (guest_stdin, stdin) = io::pipe().context("cannot make a pipe")?;
        let (stdout, guest_stdout) = io::pipe().context("cannot make a pipe")?;
        let image = guest_images::find("memstress").context("the guest `memstress` is not bundled")?;
        let arguments = Arguments {
            exe: b"/memstress".to_vec(),
            args: work.words().into_iter().map(String::into_bytes).collect(),
            env: Vec::new(),
            random: None,
        };
        let stderr = io::stderr().as_fd().try_clone_to_owned().ok();
        let files = Files::new([Some(guest_stdin.into()), Some(guest_stdout.into()), stderr]);
        let (vm, entry) = Vm::with_files(config, Program { elf: image.elf.into(), arguments }, files)?;
        let exited = vm.exited()?;
        // From here on a guest that did not start is ended by the drop.
        let memstress = Self {
            place: Place::Guest { vm: Box::new(vm), exited },
            stdin: Some(stdin),
            stdout,
            partial: Vec::new(),
            is_over: false,
            limit: work.pass_at_most().saturating_add(GRACE),
        };
        if let Place::Guest { vm, .. } = &memstress.place {
            vm.start(entry)?;
        }
        memstress.ready()
    }

    /// Starts it as a process.
    ///
    /// # Errors
    /// The host's.
    pub fn native(work: &Work) -> Result<Self> {
        let (child_stdin, stdin) = io::pipe().context("cannot make a pipe")?;
        let (stdout, child_stdout) = io::pipe().context("cannot make a pipe")?;
        let image = NativeImage::new("memstress")?;
        let mut command = image.command();
        command.args(&work.words()[1..]).stdin(child_stdin).stdout(child_stdout).stderr(Stdio::inherit());
        let child = command.spawn().context("cannot run memstress natively")?;
        // The child's ends of the pipes go with it, so that its end is seen.
        drop(command);
        let place = Place::Native { child, _image: image };
        let limit = work.pass_at_most().saturating_add(GRACE);
        let memstress =
            Self { place, stdin: Some(stdin), stdout, partial: Vec::new(), is_over: false, limit };
        memstress.ready()
    }

    /// Once it answers, its threads are there and its first page has been touched.
    fn ready(mut self) -> Result<Self> {
        self.region()?;
        Ok(self)
    }

    /// From now on commands may take this much longer than touching all memory once.
    pub fn expect(&mut self, longer: Duration) {
        self.limit = self.limit.saturating_add(longer);
    }

    /// The machine, if it is a guest.
    pub fn machine(&self) -> Option<&Machine> {
        match &self.place {
            Place::Guest { vm, .. } => Some(vm.machine()),
            Place::Native { .. } => None,
        }
    }

    /// The machine of one that was started as a guest.
    ///
    /// # Errors
    /// It was not.
    pub fn expect_machine(&self) -> Result<&Machine> {
        self.machine().context("this memstress is no guest")
    }

    /// The process, if it is one.
    pub fn pid(&self) -> Option<u32> {
        match &self.place {
            Place::Guest { .. } => None,
            Place::Native { child, .. } => Some(child.id()),
        }
    }

    /// Sends `command` and waits for the answer: what follows `verb: `.
    ///
    /// # Errors
    /// The program ended, or took much longer than [expected](Self::expect).
    pub fn command(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.answer(command)
    }

    /// Sends `command`; the caller asks for the [`answer`](Self::answer) later.
    ///
    /// # Errors
    /// The program ended.
    pub fn send(&mut self, command: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("memstress has been told to end")?;
        // A pipe takes so little without waiting, and while it is alive memstress reads.
        stdin
            .write_all(format!("{command}\n").as_bytes())
            .with_context(|| format!("memstress does not take the command `{command}`"))
    }

    /// Waits for the answer to `command`, the oldest that has not been answered.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn answer(&mut self, command: &str) -> Result<String> {
        let line = self.line().with_context(|| format!("no answer to `{command}`"))?;
        let verb = command.split(' ').next().unwrap_or(command);
        match line.strip_prefix(verb).and_then(|rest| rest.strip_prefix(": ")) {
            Some(answer) => Ok(answer.to_owned()),
            None => bail!("memstress answered `{command}` with `{line}`"),
        }
    }

    /// `read`, `write` or `mix`, with what may follow (the guest's own documentation has it), or `stop`.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn pass(&mut self, command: &str) -> Result<Pass> {
        self.send(command)?;
        self.pass_answer(command)
    }

    /// Waits until `other` is readable, or there is an answer (or none will come, as asking for it tells). Whether `other` is.
    ///
    /// # Errors
    /// Nothing of that for as long.
    pub fn wait_beside(&self, other: BorrowedFd<'_>) -> Result<bool> {
        let fds = [self.stdout.as_raw_fd(), self.exited(), other.as_raw_fd()];
        let ready = wait(fds, self.deadline())?;
        if ready == [false; 3] {
            bail!("memstress said nothing for {} s", self.limit.as_secs());
        }
        Ok(ready[2])
    }

    /// When what is waited for now is given up; `None` is never.
    fn deadline(&self) -> Option<Instant> {
        Instant::now().checked_add(self.limit)
    }

    /// Readable at its end; -1 where the end is that of its stdout.
    fn exited(&self) -> RawFd {
        match &self.place {
            Place::Guest { exited, .. } => exited.as_raw_fd(),
            Place::Native { .. } => -1,
        }
    }

    /// The answer to such a command that was [sent](Self::send).
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn pass_answer(&mut self, command: &str) -> Result<Pass> {
        let answer = self.answer(command)?;
        parse_pass(&answer).with_context(|| format!("memstress answered `{command}` with `{answer}`"))
    }

    /// All the memory that is touched, in the program's own address space.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn region(&mut self) -> Result<HvaRange> {
        let answer = self.command("where")?;
        let parsed = answer.split_once(' ').and_then(|(start, pages)| {
            let start = u64::from_str_radix(start.strip_prefix("0x")?, 16).ok()?;
            let end = start.checked_add(pages.parse::<u64>().ok()?.checked_mul(PAGE_SIZE)?)?;
            Some(HvaRange { start: Hva(start), end: Hva(end) })
        });
        parsed.with_context(|| format!("memstress answered `where` with `{answer}`"))
    }

    /// Lets it end, and waits for it.
    ///
    /// # Errors
    /// It did not end with status 0.
    pub fn finish(mut self) -> Result<()> {
        self.stdin = None;
        // Nothing is left to be answered, so what is read is the end.
        match self.line() {
            Err(error) if self.is_over => drop(error),
            Err(error) => return Err(error),
            Ok(line) => bail!("memstress said `{line}` when it was to end"),
        }
        match &mut self.place {
            Place::Guest { vm, .. } => match vm.wait()? {
                ExitStatus::Exited(0) => Ok(()),
                status => bail!("memstress ended with {status:?}"),
            },
            Place::Native { child, .. } => match child.wait().context("cannot wait for memstress")? {
                status if status.success() => Ok(()),
                status => bail!("memstress ended with {status}"),
            },
        }
    }

    /// The next line of its stdout.
    fn line(&mut self) -> Result<String> {
        let deadline = self.deadline();
        loop {
            if let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let [readable, over] = wait([self.stdout.as_raw_fd(), self.exited()], deadline)?;
            // What it said before it ended is read first.
            if readable {
                let mut bytes = [0; 256];
                match self.stdout.read(&mut bytes) {
                    Ok(0) => self.is_over = true,
                    Ok(read) => self.partial.extend_from_slice(&bytes[..read]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error).context("cannot read what memstress says"),
                }
            } else if over {
                self.is_over = true;
            } else {
                bail!("memstress said nothing for {} s", self.limit.as_secs());
            }
            if self.is_over {
                match self.machine().and_then(Machine::death) {
                    Some(death) => bail!("memstress has died: {death:?}"),
                    None => bail!("memstress has ended"),
                }
            }
        }
    }
}

impl Drop for Memstress {
    fn drop(&mut self) {
        self.stdin = None;
        match &mut self.place {
            Place::Guest { vm, .. } => {
                // Both do nothing to a guest that has ended.
                vm.kill(libc::SIGKILL);
                let _ = vm.wait();
            }
            Place::Native { child, .. } => {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// Waits until one of `fds` can be read (negative ones are left out), or is closed at its other end, or until `deadline`, if
/// there is one.
fn wait<const N: usize>(fds: [RawFd; N], deadline: Option<Instant>) -> Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    loop {
        let left =
            deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()));
        let milliseconds = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: `polled` is a live array of so many.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, milliseconds) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error).context("poll");
            }
        } else if ready > 0 || left.is_zero() {
            return Ok(polled.map(|fd| fd.revents != 0));
        }
        // Else more is left than poll can count, or its clock is a little ahead.
    }
}

/// `T ns, A accesses`.
fn parse_pass(answer: &str) -> Option<Pass> {
    let (time, accesses) = answer.split_once(" ns, ")?;
    let accesses = accesses.strip_suffix(" accesses")?.parse().ok()?;
    Some(Pass { time: Duration::from_nanos(time.parse().ok()?), accesses })
}
