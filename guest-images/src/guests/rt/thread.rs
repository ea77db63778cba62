// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads: a stack, a raw `clone`, and a join on the word that the kernel clears when the thread is gone.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, Ordering};

use super::PAGE;
use super::sys::{self, Errno, PROT_NONE, PROT_RW};

/// Room for a few calls and a signal frame, which with AVX-512 and AMX state is 11 KiB.
const STACK: usize = 32 * PAGE;

const CLONE_VM: usize = 0x100;
const CLONE_FS: usize = 0x200;
const CLONE_FILES: usize = 0x400;
const CLONE_SIGHAND: usize = 0x800;
const CLONE_THREAD: usize = 0x1_0000;
const CLONE_SYSVSEM: usize = 0x4_0000;
const CLONE_PARENT_SETTID: usize = 0x10_0000;
const CLONE_CHILD_CLEARTID: usize = 0x20_0000;
const FLAGS: usize = CLONE_VM
    | CLONE_FS
    | CLONE_FILES
    | CLONE_SIGHAND
    | CLONE_THREAD
    | CLONE_SYSVSEM
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_CLEARTID;

// rt_clone(flags, stack, parent_tid, child_tid): returns to the parent only. The child starts on a stack that
// holds the function to call and its argument; it has no frame to return to, so it ends itself (exit, not
// exit_group).
global_asm!(
    ".pushsection .text.rt_clone, \"ax\", @progbits",
    ".globl rt_clone",
    ".hidden rt_clone",
    ".type rt_clone, @function",
    "rt_clone:",
    "mov r10, rcx",
    "xor r8d, r8d",
    "mov eax, 56",
    "syscall",
    "test rax, rax",
    "jz 2f",
    "ret",
    "2:",
    "xor ebp, ebp",
    "pop rax",
    "pop rdi",
    "call rax",
    "xor edi, edi",
    "mov eax, 60",
    "syscall",
    "ud2",
    ".popsection",
);

unsafe extern "C" {
    fn rt_clone(
        flags: usize,
        stack: *mut [usize; 2],
        parent: *const AtomicU32,
        child: *const AtomicU32,
    ) -> isize;
}

/// A running thread. It must be joined: its stack lives until then.
#[must_use]
pub struct Thread {
    /// The stack's mapping. Its lowest page is a guard; the thread's id is at the start of the next.
    mapping: usize,
}

impl Thread {
    /// Starts a thread that runs `function(argument)`.
    ///
    /// # Errors
    /// What mmap, mprotect or clone answers.
    pub fn spawn(function: extern "C" fn(usize), argument: usize) -> Result<Self, Errno> {
        let mapping = sys::map_anywhere(STACK, PROT_RW)?;
        // SAFETY: the mapping is new; its lowest page is in no use. Running over the stack's end faults
        // there.
        unsafe { sys::mprotect(mapping, PAGE, PROT_NONE) }?;
        let thread = Self { mapping };
        let top = (mapping + STACK - 16) as *mut [usize; 2];
        // SAFETY: these are the two highest words of the new stack, and the stack of nobody yet.
        unsafe { top.write([function as usize, argument]) };
        // SAFETY: the stack is the child's alone, and stays until `join` has seen the id cleared, after which
        // the child runs no more user code. `function` has the signature that rt_clone calls.
        let result = unsafe { rt_clone(FLAGS, top, thread.id(), thread.id()) };
        if result < 0 { Err(Errno(-result as i32)) } else { Ok(thread) }
    }

    /// The thread's id while it runs, zero when it is gone: set by CLONE_PARENT_SETTID before `clone`
    /// returns, cleared by CLONE_CHILD_CLEARTID at exit.
    fn id(&self) -> &AtomicU32 {
        // SAFETY: the page is mapped until `join` takes `self`, far below the stack in use, and only the
        // kernel and this function use the word.
        unsafe { &*((self.mapping + PAGE) as *const AtomicU32) }
    }

    /// Waits for the end of the thread and takes its stack away.
    ///
    /// # Errors
    /// What munmap answers.
    pub fn join(self) -> Result<(), Errno> {
        loop {
            let id = self.id().load(Ordering::Acquire);
            if id == 0 {
                break;
            }
            sys::futex_wait(self.id(), id);
        }
        // SAFETY: the thread is gone, and with `self` goes the last way to name its stack.
        unsafe { sys::munmap(self.mapping, STACK) }.map(drop)
    }
}
