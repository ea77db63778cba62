// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls by the front door: what only the host could do must fail, and what umbra answers must be umbra's answer.

use super::attempt::{Catcher, Outcome};
use super::bystander::pid;
use super::rt::out::outln;
use super::rt::sys::{self, Errno};
use super::rt::thread::Thread;
use super::{Verdict, broken};

const GETPID: usize = 39;
const GETPPID: usize = 110;
const GETTID: usize = 186;
const KILL: usize = 62;
const PTRACE: usize = 101;
const MMAP: usize = 9;
const WRITE: usize = 1;
const ENOSYS: usize = 38;
const ESRCH: usize = 3;
const SIGKILL: usize = 9;

/// Below 2^47, where the engine may have something of its own.
pub const TOP: usize = (1 << 47) - 0x1_0000;
pub const END: usize = 1 << 47;

fn call(number: usize, args: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: the calls of this file name no memory of this program but to read it, or are refused.
    unsafe { sys::syscall(number, args) }
}

const NAME: &core::ffi::CStr = c"/etc/passwd";
const PROGRAM: &core::ffi::CStr = c"/bin/true";

/// Calls that have no answer but an error: name, number, arguments.
fn hostile(parent: usize) -> [(&'static str, usize, [usize; 6]); 62] {
    const MINUS_1: usize = usize::MAX;
    let (file, program) = (NAME.as_ptr() as usize, PROGRAM.as_ptr() as usize);
    let word = [0_usize; 2];
    // Nobody writes through it: no call comes so far.
    let word = word.as_ptr() as usize;
    [
        ("open", 2, [file, 0, 0, 0, 0, 0]),
        ("openat", 257, [MINUS_1 - 99, file, 0, 0, 0, 0]),
        ("openat2", 437, [MINUS_1 - 99, file, word, 24, 0, 0]),
        ("creat", 85, [file, 0, 0, 0, 0, 0]),
        ("ptrace TRACEME", PTRACE, [0; 6]),
        ("ptrace ATTACH", PTRACE, [16, parent, 0, 0, 0, 0]),
        ("ptrace SEIZE", PTRACE, [0x4206, parent, 0, 0, 0, 0]),
        ("ptrace ATTACH 1", PTRACE, [16, 1, 0, 0, 0, 0]),
        ("ptrace SEIZE 1", PTRACE, [0x4206, 1, 0, 0, 0, 0]),
        ("kill the parent", KILL, [parent, SIGKILL, 0, 0, 0, 0]),
        ("kill 1", KILL, [1, SIGKILL, 0, 0, 0, 0]),
        // With signal 0: an engine that lets it through must not take the machine along.
        ("kill everybody", KILL, [MINUS_1, 0, 0, 0, 0, 0]),
        ("tkill the parent", 200, [parent, SIGKILL, 0, 0, 0, 0]),
        ("tgkill the parent", 234, [parent, parent, SIGKILL, 0, 0, 0]),
        ("rt_sigqueueinfo", 129, [parent, SIGKILL, word, 0, 0, 0]),
        ("process_vm_readv the parent", 310, [parent, word, 0, word, 0, 0]),
        ("process_vm_readv itself", 310, [pid(), word, 0, word, 0, 0]),
        ("process_vm_writev", 311, [parent, word, 0, word, 0, 0]),
        ("process_madvise", 440, [0, word, 0, 4, 0, 0]),
        ("prctl PDEATHSIG", 157, [1, 0, 0, 0, 0, 0]),
        ("prctl PTRACER", 157, [0x5961_6d61, MINUS_1, 0, 0, 0, 0]),
        ("prctl SECCOMP", 157, [22, 1, 0, 0, 0, 0]),
        ("seccomp", 317, [0, 0, 0, 0, 0, 0]),
        ("setsid", 112, [0; 6]),
        ("fork", 57, [0; 6]),
        ("vfork", 58, [0; 6]),
        ("clone", 56, [17, 0, 0, 0, 0, 0]),
        ("clone with CLONE_VM", 56, [0x111, 0, 0, 0, 0, 0]),
        ("clone with CLONE_VFORK", 56, [0x4111, 0, 0, 0, 0, 0]),
        ("clone with CLONE_NEWUSER", 56, [0x1000_0011, 0, 0, 0, 0, 0]),
        ("execve", 59, [program, 0, 0, 0, 0, 0]),
        ("execveat", 322, [0, program, 0, 0, 0x1000, 0]),
        ("personality", 135, [0xffff_ffff, 0, 0, 0, 0, 0]),
        ("arch_prctl CET", 158, [0x5001, 1, 0, 0, 0, 0]),
        ("arch_prctl CPUID", 158, [0x1012, 0, 0, 0, 0, 0]),
        ("arch_prctl of a kernel address", 158, [0x1002, 0xffff_8000_0000_0000, 0, 0, 0, 0]),
        ("modify_ldt", 154, [1, word, 16, 0, 0, 0]),
        ("set_thread_area", 205, [word, 0, 0, 0, 0, 0]),
        ("iopl", 172, [3, 0, 0, 0, 0, 0]),
        ("ioperm", 173, [0, 1, 1, 0, 0, 0]),
        ("memfd_create", 319, [file, 0, 0, 0, 0, 0]),
        ("socket", 41, [1, 1, 0, 0, 0, 0]),
        ("pipe", 22, [0; 6]),
        ("eventfd", 290, [0; 6]),
        ("userfaultfd", 323, [1, 0, 0, 0, 0, 0]),
        ("io_uring_setup", 425, [8, word, 0, 0, 0, 0]),
        ("bpf", 321, [0, 0, 0, 0, 0, 0]),
        ("perf_event_open", 298, [word, 0, MINUS_1, MINUS_1, 0, 0]),
        ("pidfd_open", 434, [parent, 0, 0, 0, 0, 0]),
        ("pidfd_getfd", 438, [3, 0, 0, 0, 0, 0]),
        ("pidfd_send_signal", 424, [3, 0, 0, 0, 0, 0]),
        ("unshare", 272, [0x1000_0000, 0, 0, 0, 0, 0]),
        ("setns", 308, [3, 0, 0, 0, 0, 0]),
        ("shmget", 29, [0, 4096, 0o1600, 0, 0, 0]),
        ("remap_file_pages", 216, [TOP, 4096, 0, 0, 0, 0]),
        ("alarm", 37, [0; 6]),
        ("wait4", 61, [MINUS_1, 0, 1, 0, 0, 0]),
        ("restart_syscall", 219, [0; 6]),
        ("rseq", 334, [word, 32, 0, 0, 0, 0]),
        ("chroot", 161, [file, 0, 0, 0, 0, 0]),
        ("sched_setscheduler", 144, [parent, 0, word, 0, 0, 0]),
        ("prlimit of the parent", 302, [parent, 7, 0, word, 0, 0]),
    ]
}

/// `calls`: each call that asks the host for something fails.
pub fn calls(_: &Catcher) -> Verdict {
    let me = pid();
    let parent = call(GETPPID, [0; 6]).unwrap_or(0);
    if me == 0 || call(GETTID, [0; 6]) != Ok(me) || parent == me {
        return broken(format_args!("process {me} of {parent} is not its own first thread"));
    }
    if parent > 1 && call(KILL, [parent, 0, 0, 0, 0, 0]) != Err(Errno(ESRCH as i32)) {
        return broken(format_args!("process {parent} is within reach"));
    }
    let mut missing = 0;
    let calls = hostile(parent);
    for (name, number, args) in calls {
        match call(number, args) {
            Ok(value) => return broken(format_args!("{name} answers {value:#x}")),
            Err(Errno(errno)) => missing += usize::from(errno == ENOSYS as i32),
        }
    }
    let text = b"broken: written to somebody else's descriptor\n";
    for fd in 3..256 {
        if call(WRITE, [fd, text.as_ptr() as usize, text.len(), 0, 0, 0]) != Err(sys::EBADF) {
            return broken(format_args!("descriptor {fd} is there"));
        }
        let [private, shared] = [2, 1].map(|flags| call(MMAP, [0, 4096, 1, flags, fd, 0]));
        if private.is_ok() || shared.is_ok() {
            return broken(format_args!("descriptor {fd} can be mapped"));
        }
    }
    for flags in [1, 2, 3] {
        if call(MMAP, [0, 4096, 3, flags, 0, 0]).is_ok() {
            return broken(format_args!("descriptor 0 can be mapped"));
        }
    }
    outln!("calls: {} calls refused, {missing} of them unknown", calls.len());
    Ok(())
}

/// `numbers`: numbers that are none, of 32-bit programs, of x32, and such of which only half is looked at.
pub fn numbers(_: &Catcher) -> Verdict {
    let me = pid();
    let ranges = [470..1100, 0x4000_0000..0x4000_0240, 0x7fff_fff0..0x8000_0010, 0xffff_ff00..0x1_0000_0000];
    let mut tried = 0;
    for number in ranges.into_iter().flatten() {
        tried += 1;
        match call(number, [0; 6]) {
            Err(Errno(38)) => {}
            Err(error) => return broken(format_args!("call {number:#x} says {error}")),
            Ok(value) => return broken(format_args!("call {number:#x} answers {value:#x}")),
        }
    }
    for high in [1 << 32, 1 << 62, 1 << 63, !0 << 32] {
        if call(high | GETPID, [0; 6]) != Ok(me) {
            return broken(format_args!("getpid with more in rax is not getpid"));
        }
    }
    outln!("numbers: {tried} are none, and the upper half of rax is not looked at");
    Ok(())
}

/// `top-calls`: memory calls over the top of the address space. They may be refused or work; what works must be memory.
pub fn top(catcher: &Catcher) -> Verdict {
    const PAGE: usize = 4096;
    let (mut works, mut refused) = (0, 0);
    let Ok(own) = sys::map_anywhere(64 * PAGE, sys::PROT_RW) else {
        return broken(format_args!("no memory"));
    };
    let ranges = (TOP..END + PAGE).step_by(PAGE).map(|at| (at, PAGE));
    for (at, len) in ranges.chain([(TOP, END - TOP), (TOP, END - TOP - PAGE), (END - 2 * PAGE, 4 * PAGE)]) {
        let calls: [(usize, [usize; 6]); 12] = [
            (11, [at, len, 0, 0, 0, 0]),
            (10, [at, len, 0, 0, 0, 0]),
            (10, [at, len, 7, 0, 0, 0]),
            (28, [at, len, 4, 0, 0, 0]),
            (25, [at, len, len + PAGE, 1, 0, 0]),
            (25, [at, len, len, 3, own + 16 * PAGE, 0]),
            (25, [at, 0, len, 3, own + 32 * PAGE, 0]),
            (25, [own, PAGE, PAGE, 3, at, 0]),
            (9, [at, len, 3, 0x32, usize::MAX, 0]),
            (9, [at, len, 3, 0x10_0022, usize::MAX, 0]),
            (9, [at, len, 5, 0x11, 0, 0]),
            (11, [at, len, 0, 0, 0, 0]),
        ];
        for (number, args) in calls {
            match catcher.call(number, args) {
                Outcome::Returned(value) if (value as isize) < 0 => refused += 1,
                Outcome::Returned(value) => {
                    works += 1;
                    let mapped = number == MMAP || (number == 25 && value != own);
                    let holds = || {
                        let stored = catcher.store(value, at);
                        matches!((stored, catcher.load(value)), (Outcome::Returned(_), Outcome::Returned(it)) if it == at)
                    };
                    if mapped && args[2] != 5 && !holds() {
                        return broken(format_args!("call {number} gave {value:#x}, which is no memory"));
                    }
                }
                other => return broken(format_args!("call {number} of {at:#x}: {other}")),
            }
        }
    }
    outln!("top-calls: {works} work, {refused} refused");
    Ok(())
}

extern "C" fn leave(_: usize) {
    sys::exit_group(7)
}

/// `exit-thread`: another thread ends all, with status 7.
pub fn exit_thread(_: &Catcher) -> Verdict {
    match Thread::spawn(leave, 0) {
        Ok(thread) => {
            let _ = thread.join();
            broken(format_args!("exit_group ended one thread only"))
        }
        Err(error) => broken(format_args!("no thread: {error}")),
    }
}
