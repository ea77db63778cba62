// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A bundled program that is told what to do, as a guest in this process or as a process of its own.
//!
//! Commands go through a pipe to its stdin, answers come back through one from its stdout; between the two it sleeps. So
//! whoever holds a [`Told`] knows exactly what the program did between two of its own actions, and disturbs nothing while it
//! looks. An answer is one line: the command's first word, a colon, and what there is to say.
//!
//! One thread drives. It never waits for ever: an answer, the program's end and a limit all wake it. The limit is the
//! caller's; who asks for what takes longer says so by [`Told::expect`]. Dropping a [`Told`] ends the program, whatever it is
//! doing; [`Told::finish`] lets it end by itself and looks at how.

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
pub(super) const GRACE: Duration = Duration::from_secs(600);

/// Where it runs.
#[derive(Debug)]
enum Place {
    Guest { vm: Box<Vm>, exited: EventFd },
    Native { child: Child, _image: NativeImage },
}

/// A running program.
#[derive(Debug)]
pub(super) struct Told {
    name: &'static str,
    place: Place,
    /// `None` once it has been told to end.
    pub(super) stdin: Option<PipeWriter>,
    stdout: PipeReader,
    /// What came of the next answer so far.
    partial: Vec<u8>,
    is_over: bool,
    /// How long an answer may take.
    pub(super) limit: Duration,
}

impl Told {
    /// Starts the bundled program `name` as a guest with the command line `words`, the program's name not among them.
    /// `longest`: no command takes longer.
    ///
    /// # Errors
    /// What keeps umbra from running a guest.
    pub(super) fn guest(
        config: VmConfig,
        name: &'static str,
        words: &[String],
        longest: Duration,
    ) -> Result<Self> {
        let (guest_stdin, stdin) = io::pipe().context("cannot make a pipe")?;
        let (stdout, guest_stdout) = io::pipe().context("cannot make a pipe")?;
        let image = guest_images::find(name).with_context(|| format!("the guest `{name}` is not bundled"))?;
        let first = std::iter::once(name.as_bytes().to_vec());
        let arguments = Arguments {
            exe: format!("/{name}").into_bytes(),
            args: first.chain(words.iter().map(|word| word.clone().into_bytes())).collect(),
            env: Vec::new(),
            random: None,
        };
        let stderr = io::stderr().as_fd().try_clone_to_owned().ok();
        let files = Files::new([Some(guest_stdin.into()), Some(guest_stdout.into()), stderr]);
        let (vm, entry) = Vm::with_files(config, Program { elf: image.elf.into(), arguments }, files)?;
        let exited = vm.exited()?;
        // From here on a guest that did not start is ended by the drop.
        let told = Self {
            name,
            place: Place::Guest { vm: Box::new(vm), exited },
            stdin: Some(stdin),
            stdout,
            partial: Vec::new(),
            is_over: false,
            limit: longest.saturating_add(GRACE),
        };
        if let Place::Guest { vm, .. } = &told.place {
            vm.start(entry)?;
        }
        told.ready()
    }

    /// Starts it as a process.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn native(name: &'static str, words: &[String], longest: Duration) -> Result<Self> {
        let (child_stdin, stdin) = io::pipe().context("cannot make a pipe")?;
        let (stdout, child_stdout) = io::pipe().context("cannot make a pipe")?;
        let image = NativeImage::new(name)?;
        let mut command = image.command();
        command.args(words).stdin(child_stdin).stdout(child_stdout).stderr(Stdio::inherit());
        let child = command.spawn().with_context(|| format!("cannot run {name} natively"))?;
        // The child's ends of the pipes go with it, so that its end is seen.
        drop(command);
        let place = Place::Native { child, _image: image };
        let limit = longest.saturating_add(GRACE);
        let told =
            Self { name, place, stdin: Some(stdin), stdout, partial: Vec::new(), is_over: false, limit };
        told.ready()
    }

    /// Once it answers, it has come through its start.
    fn ready(mut self) -> Result<Self> {
        self.region()?;
        Ok(self)
    }

    /// From now on commands may take this much longer than it said when it was started.
    pub(super) fn expect(&mut self, longer: Duration) {
        self.limit = self.limit.saturating_add(longer);
    }

    /// The machine, if it is a guest.
    pub(super) fn machine(&self) -> Option<&Machine> {
        match &self.place {
            Place::Guest { vm, .. } => Some(vm.machine()),
            Place::Native { .. } => None,
        }
    }

    /// The machine of one that was started as a guest.
    ///
    /// # Errors
    /// It was not.
    pub(super) fn expect_machine(&self) -> Result<&Machine> {
        self.machine().with_context(|| format!("this {} is no guest", self.name))
    }

    /// The process, if it is one.
    pub(super) fn pid(&self) -> Option<u32> {
        match &self.place {
            Place::Guest { .. } => None,
            Place::Native { child, .. } => Some(child.id()),
        }
    }

    /// Sends `command` and waits for the answer: what follows `verb: `.
    ///
    /// # Errors
    /// The program ended, or took much longer than [expected](Self::expect).
    pub(super) fn command(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.answer(command)
    }

    /// Sends `command`; the caller asks for the [`answer`](Self::answer) later.
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn send(&mut self, command: &str) -> Result<()> {
        let name = self.name;
        let stdin = self.stdin.as_mut().with_context(|| format!("{name} has been told to end"))?;
        // A pipe takes so little without waiting, and while it is alive it reads.
        stdin
            .write_all(format!("{command}\n").as_bytes())
            .with_context(|| format!("{name} does not take the command `{command}`"))
    }

    /// Sends what a command that was [sent](Self::send) takes besides its line.
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let name = self.name;
        let stdin = self.stdin.as_mut().with_context(|| format!("{name} has been told to end"))?;
        // More than a pipe holds: the program reads it meanwhile, or its end of the pipe is closed with it.
        stdin.write_all(bytes).with_context(|| format!("{name} does not take {} bytes", bytes.len()))
    }

    /// Waits for the answer to `command`, the oldest that has not been answered.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub(super) fn answer(&mut self, command: &str) -> Result<String> {
        let line = self.line().with_context(|| format!("no answer to `{command}`"))?;
        let verb = command.split(' ').next().unwrap_or(command);
        match line.strip_prefix(verb).and_then(|rest| rest.strip_prefix(": ")) {
            Some(answer) => Ok(answer.to_owned()),
            None => bail!("{} answered `{command}` with `{line}`", self.name),
        }
    }

    /// Waits until `other` is readable, or there is an answer (or none will come, as asking for it tells). Whether `other` is.
    ///
    /// # Errors
    /// Nothing of that for as long.
    pub(super) fn wait_beside(&self, other: BorrowedFd<'_>) -> Result<bool> {
        let fds = [self.stdout.as_raw_fd(), self.exited(), other.as_raw_fd()];
        let ready = wait(fds, self.deadline())?;
        if ready == [false; 3] {
            bail!("{} said nothing for {} s", self.name, self.limit.as_secs());
        }
        Ok(ready[2])
    }

    /// When what is waited for now is given up; `None` is never.
    pub(super) fn deadline(&self) -> Option<Instant> {
        Instant::now().checked_add(self.limit)
    }

    /// Readable at its end; -1 where the end is that of its stdout.
    fn exited(&self) -> RawFd {
        match &self.place {
            Place::Guest { exited, .. } => exited.as_raw_fd(),
            Place::Native { .. } => -1,
        }
    }

    /// The memory that it works on, in the program's own address space: what `where` answers.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub(super) fn region(&mut self) -> Result<HvaRange> {
        let answer = self.command("where")?;
        let parsed = answer.split_once(' ').and_then(|(start, pages)| {
            let start = u64::from_str_radix(start.strip_prefix("0x")?, 16).ok()?;
            let end = start.checked_add(pages.parse::<u64>().ok()?.checked_mul(PAGE_SIZE)?)?;
            Some(HvaRange { start: Hva(start), end: Hva(end) })
        });
        parsed.with_context(|| format!("{} answered `where` with `{answer}`", self.name))
    }

    /// Lets it end, and waits for it.
    ///
    /// # Errors
    /// It did not end with status 0.
    pub(super) fn finish(mut self) -> Result<()> {
        self.stdin = None;
        // Nothing is left to be answered, so what is read is the end.
        match self.line() {
            Err(error) if self.is_over => drop(error),
            Err(error) => return Err(error),
            Ok(line) => bail!("{} said `{line}` when it was to end", self.name),
        }
        match &mut self.place {
            Place::Guest { vm, .. } => match vm.wait()? {
                ExitStatus::Exited(0) => Ok(()),
                status => bail!("{} ended with {status:?}", self.name),
            },
            Place::Native { child, .. } => {
                match child.wait().with_context(|| format!("cannot wait for {}", self.name))? {
                    status if status.success() => Ok(()),
                    status => bail!("{} ended with {status}", self.name),
                }
            }
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
                    Err(error) => {
                        return Err(error).with_context(|| format!("cannot read what {} says", self.name));
                    }
                }
            } else if over {
                self.is_over = true;
            } else {
                bail!("{} said nothing for {} s", self.name, self.limit.as_secs());
            }
            if self.is_over {
                match self.machine().and_then(Machine::death) {
                    Some(death) => bail!("{} has died: {death:?}", self.name),
                    None => bail!("{} has ended", self.name),
                }
            }
        }
    }
}

impl Drop for Told {
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
