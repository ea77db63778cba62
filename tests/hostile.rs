// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that mean harm, or have bugs: umbra lives, says one readable thing, and passes on the status that Linux would give.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, assert_same, cc, code, finish, folder, guests, run, stderr, wait};
use std::process::{Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// A program whose `main` is `body`, run as a guest; returns (status, what umbra said).
fn guest(test: &str, body: &str) -> (i32, String) {
    let source = format!(
        "#define _GNU_SOURCE\n#include <errno.h>\n#include <pthread.h>\n#include <signal.h>\n#include <stdio.h>\n\
         #include <stdlib.h>\n#include <string.h>\n#include <sys/mman.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n\
         #include <sched.h>\n#include <linux/futex.h>\n#include <time.h>\n{body}"
    );
    let program = cc(&folder(test), "program", &source, STATIC);
    let output = finish(&mut run(&["--check", "--timeout", "50s"], &[&program]), b"", LIMIT);
    let said = stderr(&output);
    assert!(!said.contains("panicked") && !said.contains("bug of umbra"), "{test}: {said}");
    (code(output.status), said)
}

const SEGV: i32 = 128 + libc::SIGSEGV;

#[test]
fn jumping_to_the_monitor() {
    if !guests() {
        return;
    }
    // The monitor's pages, what is around them, and the edges of what addresses there are.
    let addresses = [
        "0xffffffff80000000",
        "0xffffffff80007000",
        "0xffffffff80100000",
        "0xfffffffffffff000",
        "0xffff800000000000",
        "0xffffc00000000000",
        "0x00007ffffffff000",
        "0x0000800000000000",
        "0x8000000000000000",
    ];
    for (n, address) in addresses.iter().enumerate() {
        let read = format!("int main() {{ return *(volatile int *){address}ul; }}");
        let (status, said) = guest(&format!("monitor-read-{n}"), &read);
        assert_eq!(status, SEGV, "{said}");
        let write = format!("int main() {{ *(volatile int *){address}ul = 1; return 0; }}");
        let (status, said) = guest(&format!("monitor-write-{n}"), &write);
        assert_eq!(status, SEGV, "{said}");
        let jump = format!("int main() {{ ((void (*)(void)){address}ul)(); return 0; }}");
        let (status, said) = guest(&format!("monitor-jump-{n}"), &jump);
        assert_eq!(status, SEGV, "{said}");
    }
}

#[test]
fn every_page_of_the_monitor_may_be_jumped_to() {
    if !guests() {
        return;
    }
    // Including the system call's own entry, wherever it is: a jump there is a system call, or a fault, with junk.
    let body = r#"
        #include <setjmp.h>
        static sigjmp_buf back;
        static void caught(int s) { siglongjmp(back, 1); }
        int main() {
            for (int s = 1; s < 32; s++) signal(s, caught);
            int faults = 0;
            for (unsigned long page = 0; page < 64; page++)
                for (unsigned long offset = 0; offset < 4096; offset += 64) {
                    if (sigsetjmp(back, 1)) { faults++; continue; }
                    asm volatile("lea 1f(%%rip), %%rcx\n mov $0x202, %%r11d\n mov $-1, %%rax\n jmp *%0\n 1:"
                                 : : "r"(0xffffffff80000000ul + page * 4096 + offset) : "rax", "rcx", "r11", "memory");
                }
            return faults > 4000 ? 9 : 10;
        }"#;
    let (status, said) = guest("monitor-sweep", body);
    assert_eq!(status, 9, "{said}");
}

#[test]
fn privileged_instructions() {
    if !guests() {
        return;
    }
    let instructions = [
        ("hlt", SEGV),
        ("cli", SEGV),
        ("in $0x40, %al", SEGV),
        ("out %al, $0x4e", SEGV),
        ("mov %cr3, %rax", SEGV),
        ("mov %rax, %cr3", SEGV),
        ("wrmsr", SEGV),
        ("rdmsr", SEGV),
        ("lgdt (%rsp)", SEGV),
        ("ltr %ax", SEGV),
        ("invlpg (%rsp)", SEGV),
        ("wbinvd", SEGV),
        ("swapgs", SEGV),
        ("sysretq", SEGV),
        ("mov %ax, %ss", SEGV),
        ("int $0x21", SEGV),
        ("ud2", 128 + libc::SIGILL),
        ("int3", 128 + libc::SIGTRAP),
        ("xor %edx, %edx; xor %ecx, %ecx; div %ecx", 128 + libc::SIGFPE),
    ];
    for (n, (instruction, expected)) in instructions.iter().enumerate() {
        let body = format!(
            "int main() {{ asm volatile(\"mov $3, %%eax\\n{}\" ::: \"memory\", \"rax\", \"rcx\", \"rdx\"); return 0; }}",
            instruction.replace('%', "%%")
        );
        let (status, said) = guest(&format!("privileged-{n}"), &body);
        assert_eq!(status, *expected, "{instruction}: {said}");
        assert!(said.contains("registers"), "{instruction}: {said}");
    }
}

#[test]
fn bad_addresses_in_rip_and_rsp() {
    if !guests() {
        return;
    }
    for (n, body) in [
        "int main() { asm volatile(\"movabs $0x8000000000000000, %rax\\njmp *%rax\"); return 0; }",
        "int main() { asm volatile(\"movabs $0x800000000000, %rax\\njmp *%rax\"); return 0; }",
        "int main() { asm volatile(\"xor %esp, %esp\\npush %rax\"); return 0; }",
        "int main() { asm volatile(\"movabs $0x8000000000000000, %rsp\\npush %rax\"); return 0; }",
        "int main() { asm volatile(\"xor %eax, %eax\\njmp *%rax\"); return 0; }",
        "static char data[64] = {0x90}; int main() { ((void (*)(void))data)(); return 0; }",
        "int main() { *(volatile char *)main = 1; return 0; }",
    ]
    .iter()
    .enumerate()
    {
        let (status, said) = guest(&format!("bad-rip-{n}"), body);
        assert!(status == SEGV || status == 128 + libc::SIGBUS, "{body}: {status} {said}");
    }
}

#[test]
fn wild_pointers_to_every_system_call() {
    if !guests() {
        return;
    }
    let body = r#"
        int main() {
            // What blocks, ends the program, or takes its memory from under it is left out; everything else gets junk.
            static const int skip[] = { SYS_exit, SYS_exit_group, SYS_pause, SYS_rt_sigreturn, SYS_rt_sigsuspend, SYS_munmap,
                SYS_mmap, SYS_mremap, SYS_mprotect, SYS_brk, SYS_madvise, SYS_clone, SYS_clone3, SYS_fork, SYS_vfork, SYS_kill,
                SYS_tkill, SYS_tgkill, SYS_rt_sigqueueinfo, SYS_rt_tgsigqueueinfo, SYS_arch_prctl, SYS_close, SYS_close_range,
                SYS_rt_sigtimedwait, SYS_set_tid_address, SYS_set_robust_list, SYS_futex, SYS_dup2, SYS_dup3, SYS_rt_sigaction,
                SYS_rt_sigprocmask, SYS_sigaltstack, SYS_poll, SYS_ppoll, SYS_select, SYS_pselect6 };
            static const long wild[] = { 0, 1, -1, -4096, 0x7fffffffffff, 0x800000000000, 0x8000000000000000, 0xffffffff80000000,
                0xdead0000 };
            for (int number = 0; number < 470; number++) {
                int skipped = 0;
                for (unsigned i = 0; i < sizeof skip / sizeof *skip; i++) skipped |= skip[i] == number;
                if (skipped) continue;
                for (unsigned i = 0; i < sizeof wild / sizeof *wild; i++) {
                    long w = wild[i];
                    syscall(number, w, w, w, w, w, w);
                    syscall(number, 1, w, 4096, w, w, w);
                    syscall(number, 0, w, -1, w, w, w);
                }
            }
            long r = syscall(SYS_write, 1, 0xdead0000, 16);
            if (r != -1 || errno != EFAULT) return 3;
            r = syscall(SYS_futex, 0xdead0000, FUTEX_WAIT, 0, 0, 0, 0);
            if (r != -1 || errno != EFAULT) return 4;
            r = syscall(SYS_rt_sigaction, SIGUSR1, 0xdead0000, 0, 8);
            if (r != -1 || errno != EFAULT) return 5;
            r = syscall(SYS_clock_gettime, CLOCK_MONOTONIC, -8);
            if (r != -1 || errno != EFAULT) return 6;
            return 7;
        }"#;
    let (status, said) = guest("wild", body);
    assert_eq!(status, 7, "{said}");
}

#[test]
fn exhausting_mappings() {
    if !guests() {
        return;
    }
    let body = r#"
        int main() {
            char *base = mmap(0, 200000ul * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (base == MAP_FAILED) return 1;
            int made = 0;
            for (int i = 0; i < 100000; i++) {
                if (mprotect(base + i * 8192ul, 4096, PROT_READ)) { if (errno != ENOMEM) return 2; break; }
                made++;
            }
            munmap(base, 200000ul * 4096);
            return made > 30000 && made < 66000 ? 8 : 3;
        }"#;
    let (status, said) = guest("vmas", body);
    assert_eq!(status, 8, "{said}");
}

#[test]
fn page_tables_all_over_the_address_space() {
    if !guests() {
        return;
    }
    // One page every gibibyte, mapped, touched, and unmapped: tables come and go, and none are left over.
    let body = r#"
        int main() {
            for (int round = 0; round < 4; round++)
                for (unsigned long i = 0; i < 3000; i++) {
                    char *at = (char *)(0x100000000ul + (i << 30));
                    char *p = mmap(at, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
                    if (p != at) return 1;
                    if (*p != 0) return 2;
                    *p = round + 1;
                    munmap(p, 4096);
                }
            return 5;
        }"#;
    let (status, said) = guest("tables", body);
    assert_eq!(status, 5, "{said}");
}

#[test]
fn exhausting_threads() {
    if !guests() {
        return;
    }
    let body = r#"
        static volatile int stop;
        static void *sleeper(void *arg) { while (!stop) usleep(50000); return 0; }
        int main() {
            static pthread_t threads[6000];
            pthread_attr_t attr;
            pthread_attr_init(&attr);
            pthread_attr_setstacksize(&attr, 65536);
            int made = 0;
            for (; made < 6000; made++) if (pthread_create(&threads[made], &attr, sleeper, 0)) break;
            stop = 1;
            for (int i = 0; i < made; i++) pthread_join(threads[i], 0);
            // And when they are gone there is room again.
            pthread_t one;
            if (pthread_create(&one, 0, sleeper, 0)) return 2;
            pthread_join(one, 0);
            return made > 16 ? 6 : 3;
        }"#;
    let (status, said) = guest("threads", body);
    assert_eq!(status, 6, "{said}");
}

#[test]
fn control_c_ends_an_endless_loop_at_once() {
    if !guests() {
        return;
    }
    for (name, body) in [
        ("loop", "int main() { for (;;) asm volatile(\"\"); }"),
        ("sleep", "#include <unistd.h>\nint main() { for (;;) sleep(100); }"),
        ("read", "#include <unistd.h>\nint main() { char c; for (;;) read(0, &c, 1); }"),
        (
            "ignore",
            "#include <signal.h>\nint main() { signal(SIGINT, SIG_IGN); for (;;) asm volatile(\"\"); }",
        ),
    ] {
        let program = cc(&folder(&format!("control-c-{name}")), "program", body, STATIC);
        // If it does not end here, it ends itself.
        let mut command = run(&["--timeout", "50s"], &[program]);
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none(), "{name} ended by itself");
        // SAFETY: signals a child that we have not waited for, so the number is its own.
        unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
        // At once, where the host has time for it.
        let status = wait(&mut child, Duration::from_secs(20), name);
        assert_eq!(code(status), 128 + libc::SIGINT, "{name}");
    }
}

#[test]
fn a_death_is_explained() {
    if !guests() {
        return;
    }
    let body = r#"
        int main() {
            char *p = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            p[0] = 1;
            munmap(p, 4096);
            p[0] = 2;
            return 0;
        }"#;
    let (status, said) = guest("death", body);
    assert_eq!(status, SEGV);
    for word in [
        "SIGSEGV",
        "SEGV_MAPERR",
        "wanted -w-",
        "rip 0x",
        "mapping: none",
        "level 4",
        "rsp",
        "invalidate ",
        "Unmap",
    ] {
        assert!(said.contains(word), "no `{word}` in:\n{said}");
    }
}

#[test]
fn signals_sent_to_itself_end_it_as_on_linux() {
    if !guests() {
        return;
    }
    let folder = folder("raise");
    let source = "#include <signal.h>\n#include <stdlib.h>\nint main(int c, char **v) { raise(atoi(v[1])); return 3; }";
    let program = cc(&folder, "raise", source, STATIC);
    for signal in [libc::SIGTERM, libc::SIGKILL, libc::SIGUSR1, libc::SIGCHLD, libc::SIGABRT, libc::SIGSEGV] {
        let signal = signal.to_string();
        let native = finish(Command::new(&program).arg(&signal), b"", LIMIT);
        let guest = finish(run(&[], &[&program]).arg(&signal), b"", LIMIT);
        assert_same(&native, &guest, &format!("raise({signal})"));
    }
}

#[test]
fn a_closed_pipe_ends_it_as_on_linux() {
    if !guests() {
        return;
    }
    let program =
        cc(&folder("pipe"), "yes", "#include <stdio.h>\nint main() { for (;;) puts(\"y\"); }", STATIC);
    let mut child = run(&[], &[program]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(output.status), 128 + libc::SIGPIPE);
    assert_eq!(stderr(&output), "umbra: the guest died of SIGPIPE\n", "one line, for it is nobody's fault");
}
