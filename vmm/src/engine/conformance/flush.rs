// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What holds once a flush has returned, with vCPUs that write through entries while these are changed.

use super::guest::{DATA, Guest, RW, SYSCALL, start};
use super::guests;
use crate::engine::{Engine, Exit, Vcpu};
use shadow_mmu::addr::{Access, Gfn, PAGE_SIZE, Pfn};
use shadow_mmu::frame::Fill;
use shadow_mmu::shadow::{Spte, Zapped};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// inc qword ptr [rdi]; jmp to it.
pub(in crate::engine) const COUNT: [u8; 5] = [0x48, 0xff, 0x07, 0xeb, 0xfb];

fn counting(guest: &Guest) -> Box<dyn Vcpu> {
    let mut vcpu = guest.vcpu();
    vcpu.regs_mut().rdi = DATA;
    vcpu
}

/// Waits until the word changes.
pub(in crate::engine) fn wait_for_change<E: Engine + ?Sized>(guest: &Guest<E>, frame: Pfn) {
    let before = guest.word(frame, 0);
    while guest.word(frame, 0) == before {
        std::thread::yield_now();
    }
}

pub(in crate::engine) fn zapped(address: u64, old: u64) -> Zapped {
    Zapped { gfn: Gfn(address / PAGE_SIZE), level: 1, old: Spte(old) }
}

/// The promise itself: once `flush` has returned, the frame is ours alone.
#[test]
fn a_flushed_frame_is_not_written_any_more() {
    for guest in guests(&COUNT) {
        let tlb = guest.tlb();
        let mut vcpu = counting(&guest);
        let kicker = vcpu.kicker();
        std::thread::scope(|scope| {
            let guest = &guest;
            let runner = scope.spawn(move || {
                let mut faults = 0;
                loop {
                    match vcpu.run().unwrap() {
                        Exit::PageFault { .. } => {
                            faults += 1;
                            guest.map(DATA, guest.pool.alloc(Fill::Zeros).unwrap(), RW);
                        }
                        Exit::Kicked => return faults,
                        other => panic!("{other:?}"),
                    }
                }
            });
            for round in 0..300 {
                while guest.spte(DATA).load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
                let frame = Spte(guest.spte(DATA).load(Ordering::SeqCst)).pfn();
                wait_for_change(guest, frame);
                let old = guest.spte(DATA).swap(0, Ordering::SeqCst);
                match round % 3 {
                    0 => tlb.flush_all(),
                    1 => tlb.flush(&[zapped(DATA, old)]),
                    // With others in the batch: the same frame, and ones that no guest ever saw.
                    _ => tlb.flush(&[0, 4, 8, 12, 16, 20, 24, 28].map(|n| zapped(DATA, old + n * PAGE_SIZE))),
                }
                guest.pool.words(frame)[0].store(0x5555, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(50));
                assert_eq!(guest.word(frame, 0), 0x5555, "round {round}");
                guest.pool.put(frame);
            }
            kicker.kick();
            assert!(runner.join().unwrap() >= 300);
        });
    }
}

#[test]
fn odd_batches_are_flushed_like_others() {
    for guest in guests(&SYSCALL) {
        let tlb = guest.tlb();
        let frame = guest.pool.alloc(Fill::Zeros).unwrap();
        let leaf = Spte::leaf(frame, Access::READ);
        tlb.flush(&[]);
        tlb.flush(&[zapped(DATA, leaf.0); 1000]);
        tlb.flush(&[Zapped { gfn: Gfn(0), level: 3, old: Spte::leaf(Pfn(0), RW) }]);
        tlb.flush(&[zapped(DATA, Spte::leaf(Pfn(u32::MAX), RW).0), zapped(DATA, 0)]);
        tlb.prefault(&[Pfn(u32::MAX), frame, frame]);
        tlb.prefault(&[]);
        // The VM has not been stopped by any of this.
        assert_eq!(guest.vcpu().run().unwrap(), Exit::Syscall);
    }
}

/// A KVM that shadows guest tables goes on using the table that it knows under an entry of an upper level, until
/// everything is dropped.
#[test]
fn a_full_flush_covers_entries_of_upper_levels() {
    // mov rax, [rdi]; syscall
    for guest in guests(&[0x48, 0x8b, 0x07, 0x0f, 0x05]) {
        let tlb = guest.tlb();
        let (near, far) = (guest.map_new(DATA, RW), guest.map_new(DATA + (1 << 21), RW));
        guest.pool.write(near, 0, &1u64.to_le_bytes());
        guest.pool.write(far, 0, &2u64.to_le_bytes());
        let mut vcpu = guest.vcpu();
        let mut read = || {
            start(&mut *vcpu);
            vcpu.regs_mut().rdi = DATA;
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
            vcpu.regs().rax
        };
        // The two entries of level 2, one behind the other.
        let entries = guest.entry(DATA, 2);
        let swap = || {
            let table = guest.pool.words(entries.0);
            let first = table[entries.1].swap(table[entries.1 + 1].load(Ordering::SeqCst), Ordering::SeqCst);
            table[entries.1 + 1].store(first, Ordering::SeqCst);
            tlb.flush_all();
        };
        for _ in 0..20 {
            assert_eq!(read(), 1);
            swap();
            assert_eq!(read(), 2);
            swap();
        }
    }
}

/// A vCPU that counts in a page, and says what it could not do.
struct Counting<'g> {
    guest: &'g Guest,
    frame: Pfn,
    /// Faults so far.
    refused: AtomicU64,
}

impl Counting<'_> {
    /// Runs until it is kicked. What it faults on stays as it is until who changed it says otherwise.
    fn run(&self, mut vcpu: Box<dyn Vcpu>) {
        loop {
            match vcpu.run().unwrap() {
                Exit::PageFault { access: Access::WRITE, .. } => self.refused.fetch_add(1, Ordering::SeqCst),
                Exit::Kicked => return,
                other => panic!("{other:?}"),
            };
            std::thread::yield_now();
        }
    }

    fn leaf(&self) -> u64 {
        self.guest.spte(DATA).load(Ordering::SeqCst)
    }

    /// Has `leaf` take the right to write away, flushes, and checks that nothing is written from then on.
    fn takes_away(&self, leaf: u64) {
        let old = self.guest.spte(DATA).swap(leaf, Ordering::SeqCst);
        self.guest.tlb().flush(&[zapped(DATA, old)]);
        let (before, refused) = (self.guest.word(self.frame, 0), self.refused.load(Ordering::SeqCst));
        std::thread::sleep(Duration::from_micros(100));
        assert_eq!(self.guest.word(self.frame, 0), before, "leaf {leaf:#x}");
        // It is told so, again and again.
        while self.refused.load(Ordering::SeqCst) < refused + 2 {
            std::thread::yield_now();
        }
    }
}

#[test]
fn every_change_of_an_entry_holds_once_it_is_flushed() {
    const A: u64 = 1 << 5;
    const D: u64 = 1 << 6;
    for guest in guests(&COUNT) {
        let frame = guest.map_new(DATA, RW);
        let other = guest.map_new(DATA + (1 << 30), RW);
        let vcpu = counting(&guest);
        let kicker = vcpu.kicker();
        let counting = Counting { guest: &guest, frame, refused: AtomicU64::new(0) };
        let counting = &counting;
        std::thread::scope(|scope| {
            scope.spawn(move || counting.run(vcpu));
            let plain = Spte::leaf(frame, RW).0;
            for _ in 0..30 {
                wait_for_change(&guest, frame);
                counting.takes_away(0);
                guest.map(DATA, frame, RW);
                wait_for_change(&guest, frame);
                counting.takes_away(Spte::leaf(frame, Access::READ).0);
                guest.map(DATA, frame, RW);
                wait_for_change(&guest, frame);
                // Another frame: it counts there, and only there.
                let old = guest.spte(DATA).swap(Spte::leaf(other, RW).0, Ordering::SeqCst);
                guest.tlb().flush(&[zapped(DATA, old)]);
                wait_for_change(&guest, other);
                let before = guest.word(frame, 0);
                wait_for_change(&guest, other);
                assert_eq!(guest.word(frame, 0), before);
                let old = guest.spte(DATA).swap(plain, Ordering::SeqCst);
                guest.tlb().flush(&[zapped(DATA, old)]);
                // Marks come back with the next access behind the flush.
                for mark in [A, D, A | D] {
                    wait_for_change(&guest, frame);
                    let old = guest.spte(DATA).fetch_and(!mark, Ordering::SeqCst);
                    guest.tlb().flush(&[zapped(DATA, old)]);
                    while counting.leaf() & mark != mark {
                        std::thread::yield_now();
                    }
                }
            }
            kicker.kick();
        });
    }
}
