// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every error and effect of every point, one run each: it fires, and comes to no more than the point says.

use super::guest::{Guest, images};
use super::*;
use shadow_mmu::inject::{Effects, Point, Scope};
use vmm::engine::EngineKind;
use vmm::inject::{errno_name, points};

/// Waits with a limit, reads its input, maps memory and gives it back again and again: what no bundled program does.
pub(super) const VARIED: &str = r#"
    #include <stdio.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <time.h>
    #include <unistd.h>
    int main(int argc, char **argv) {
        unsigned long sum = 0;
        struct timespec little = { 0, 1000000 };
        for (int n = 0; n < 4; n++) nanosleep(&little, 0);
        char text[50];
        for (long got; (got = read(0, text, sizeof text)) != 0;) {
            if (got < 0) return perror("varied: read"), 1;
            for (long i = 0; i < got; i++) sum = sum * 31 + (unsigned char)text[i];
        }
        for (int round = 0; round < 3; round++) {
            unsigned char *p = mmap(0, 24 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (p == MAP_FAILED) return perror("varied: mmap"), 1;
            for (long i = 0; i < 24 << 20; i += 4096) {
                if (*(long *)(p + i)) return puts("varied: not zero"), 1;
                *(long *)(p + i) = i + round;
            }
            for (long i = 0; i < 24 << 20; i += 4096) sum = sum * 31 + *(long *)(p + i);
            munmap(p, 24 << 20);
        }
        printf("varied: %lx\n", sum);
        return 0;
    }"#;

/// That program, in a pool so small that frames are handed out again, and that freed ones are more than are kept.
pub(super) fn varied(folder: &Path) -> Guest {
    Guest::c(folder, "varied", VARIED, &[]).with_options(&["--memory=40M"]).with_input(&[7; 200])
}

/// What a rule says to have this effect: one each of the errors and effects of `point`.
fn faults(point: &Point) -> Vec<(String, Outcome)> {
    let errors =
        point.errors.iter().map(|(errno, outcome)| (format!("error = '{}'", errno_name(*errno)), *outcome));
    let effects = [
        (Effects::DELAY, "delay = '1ms'"),
        (Effects::STALL, "stall = 'kick'\nat-most = '2ms'"),
        (Effects::CORRUPT, "corrupt = true"),
        (Effects::SPLIT, "split = true"),
        (Effects::EXIT, "exit = 'shutdown'"),
    ];
    let effects =
        effects.iter().filter(|(effect, _)| point.effects.contains(*effect)).map(|(effect, text)| {
            let is_waiting = Effects::WAIT.contains(*effect) || *effect == Effects::SPLIT;
            ((*text).to_owned(), if is_waiting { Outcome::Unseen } else { point.outcome })
        });
    errors.chain(effects).collect()
}

/// A guest that comes to `point`; `None` where that is memory's, whose faults have tests of their own.
fn guest_for(point: &Point, folder: &Path, images: &Path) -> Option<Guest> {
    Some(match point.name {
        "page" | "tick" => return None,
        "file-read" | "timer" | "punch" => varied(folder),
        "merge-protect" | "merge-compare" | "merge-replace" => Guest::mix(images),
        "uffd-event" => Guest::adopted(),
        _ => Guest::threads(images),
    })
}

/// The points of `scope` that are `here`, with all that they can do.
fn every_fault(test: &str, here: impl Fn(&Point) -> bool) {
    if !guests() {
        return;
    }
    let (folder, images) = (folder(test), images(test));
    for point in points::all().filter(|point| here(point)) {
        if point == &shadow_mmu::inject::UFFD_EVENT && engine() != EngineKind::Kvm {
            println!("without {}: only KVM has adopted memory", point.name);
            continue;
        }
        let Some(guest) = guest_for(point, &folder, &images) else { continue };
        let native = guest.native();
        for (what, outcome) in faults(point) {
            let when = if point == &points::SYSCALL { "call = 'mmap'" } else { "" };
            let times = match point.name {
                // What is rare: the first ones.
                "pool-grow" | "kick" | "merge-protect" | "merge-compare" | "merge-replace" => "times = 5",
                // Not the first, where that is before the guest runs; and some, for one may meet nothing.
                _ => "every = 2\ntimes = 5",
            };
            let plan = format!(
                "allow-corruption = true\n[[fault]]\npoint = '{}'\n{when}\n{times}\n{what}\n",
                point.name
            );
            let run = inject(&folder, &plan, &guest);
            if point == &shadow_mmu::inject::UFFD_EVENT && run.said.contains("userfaultfd") {
                assert!(std::env::var_os("UMBRA_REQUIRE_KVM").is_none(), "{}", run.said);
                println!("skipped: {}", run.said);
                break;
            }
            assert!(run.fired(0) > 0, "it never fired\n{plan}\n{}", run.said);
            // Corrupted data is what the plan allows.
            match what.as_str() {
                "corrupt = true" => run.assert_sound(),
                _ => run.assert_within(outcome, &guest, &native),
            }
        }
    }
}

#[test]
fn every_fault_of_the_pools_points_fires_and_comes_to_no_more_than_it_says() {
    every_fault("inject-pool", |point| point.scope == Scope::Pool);
}

#[test]
fn every_fault_of_the_engines_points_fires_and_comes_to_no_more_than_it_says() {
    let of_the_engine = ["vcpu-run", "sync-regs", "kick", "window-madvise", "flush"];
    every_fault("inject-engine", |point| of_the_engine.contains(&point.name));
}

#[test]
fn every_fault_of_the_other_points_fires_and_comes_to_no_more_than_it_says() {
    let of_the_engine = ["vcpu-run", "sync-regs", "kick", "window-madvise", "flush"];
    every_fault("inject-others", |point| point.scope == Scope::Vm && !of_the_engine.contains(&point.name));
}
