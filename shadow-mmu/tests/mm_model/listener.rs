// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Listeners that write down what they hear and mirror what is mapped, and the rules for both.
//!
//! A mirror is a secondary in a few lines: outside pairs it looks ptes up and remembers them, at a start it forgets the
//! range. If at the end of a step it remembers what is no longer true, something changed without an invalidation.

use shadow_mmu::addr::{Access, Hva, HvaRange, PAGE_SIZE, Pfn};
use shadow_mmu::mm::{Mm, Pte};
use shadow_mmu::notifier::{Invalidation, MmuNotifier, Subscription, WouldBlock};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Heard {
    Start(Invalidation),
    End(Invalidation),
    ChangePte(Hva),
    Young(&'static str, HvaRange),
    Release,
}

/// Who heard what, of all listeners of one space.
type Log = Arc<Mutex<Vec<(usize, Heard)>>>;

#[derive(Debug)]
struct Listener {
    name: usize,
    log: Log,
    /// Starts whose end has not come.
    open: Mutex<Vec<Invalidation>>,
    mirror: Mutex<BTreeMap<u64, (Pfn, Access)>>,
}

impl Listener {
    fn note(&self, heard: Heard) {
        self.log.lock().unwrap().push((self.name, heard));
    }
    fn forget(&self, range: HvaRange) {
        self.mirror.lock().unwrap().retain(|page, _| !range.page_numbers().contains(page));
    }
    fn young(&self, op: &'static str, range: HvaRange) -> bool {
        self.note(Heard::Young(op, range));
        false
    }
    fn look(&self, mm: &Mm) {
        let mut mirror = self.mirror.lock().unwrap();
        for page in mm.vmas().iter().flat_map(|vma| vma.range.page_numbers()) {
            mirror.extend(translation(mm, page).map(|seen| (page, seen)));
        }
    }
    fn check(&self, mm: &Mm) {
        let name = self.name;
        let open = self.open.lock().unwrap();
        assert!(open.is_empty(), "listener {name} waits for the ends of {open:?} (I1)");
        for (&page, &(pfn, rights)) in self.mirror.lock().unwrap().iter() {
            let now = translation(mm, page);
            assert!(
                now.is_some_and(|(now, allowed)| now == pfn && allowed.contains(rights)),
                "page {page:#x}: listener {name} was not told that {pfn:?} {rights} is {now:?} now (I13, I14)"
            );
        }
    }
}

impl MmuNotifier for Listener {
    fn release(&self) {
        self.mirror.lock().unwrap().clear();
        self.note(Heard::Release);
    }
    fn clear_flush_young(&self, range: HvaRange) -> bool {
        self.young("clear_flush_young", range)
    }
    fn clear_young(&self, range: HvaRange) -> bool {
        self.young("clear_young", range)
    }
    fn test_young(&self, hva: Hva) -> bool {
        self.young("test_young", HvaRange::page(hva))
    }
    fn change_pte(&self, hva: Hva, _: Pte) {
        let covered = self.open.lock().unwrap().iter().any(|pair| pair.range.contains(hva));
        assert!(covered, "listener {}: change_pte of {hva} outside its pair", self.name);
        self.note(Heard::ChangePte(hva));
    }
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        self.open.lock().unwrap().push(*invalidation);
        self.forget(invalidation.range);
        self.note(Heard::Start(*invalidation));
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        let mut open = self.open.lock().unwrap();
        let started = open.iter().position(|pair| pair == invalidation);
        let at =
            started.unwrap_or_else(|| panic!("listener {}: {invalidation:?} never began (I9)", self.name));
        open.swap_remove(at);
        self.note(Heard::End(*invalidation));
    }
}

/// What a secondary may make of page `page`.
fn translation(mm: &Mm, page: u64) -> Option<(Pfn, Access)> {
    let (pte, vma) = mm.lookup(Hva(page * PAGE_SIZE))?;
    let mut rights = Access::empty();
    for access in [Access::READ, Access::WRITE, Access::EXEC] {
        rights.set(access, vma.allows(access));
    }
    rights.set(Access::WRITE, pte.is_writable() && rights.contains(Access::WRITE));
    pte.is_present().then_some((pte.pfn(), rights))
}

/// The listeners of one space, oldest first.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    log: Log,
    registered: Vec<(Arc<Listener>, Subscription)>,
    names: usize,
}

impl Listeners {
    pub(super) fn register(&mut self, mm: &Mm) {
        self.names += 1;
        let listener = Arc::new(Listener {
            name: self.names,
            log: Arc::clone(&self.log),
            open: Mutex::default(),
            mirror: Mutex::default(),
        });
        let subscription = mm.register(listener.clone()).unwrap();
        self.registered.push((listener, subscription));
    }

    /// Takes the `which`-th listener off, if there is one; it hears its release, and nothing afterwards (I7).
    pub(super) fn unregister(&mut self, mm: &Mm, which: usize) {
        let Some((listener, subscription)) = self.take(which) else { return };
        mm.unregister(&subscription).unwrap();
        assert_eq!(self.heard(), [(listener.name, Heard::Release)]);
        self.forget_it(&listener);
    }

    /// The same without a release and without waiting, but for the callback.
    pub(super) fn unregister_no_release(&mut self, mm: &Mm, which: usize) {
        let Some((listener, subscription)) = self.take(which) else { return };
        mm.notifiers().unregister_no_release(&subscription).unwrap();
        let freed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&freed);
        mm.notifiers().call_srcu(move || flag.store(true, Ordering::SeqCst));
        mm.notifiers().synchronize().unwrap();
        assert!(freed.load(Ordering::SeqCst), "the callback has run");
        assert_eq!(self.heard(), []);
        self.forget_it(&listener);
    }

    fn take(&mut self, which: usize) -> Option<(Arc<Listener>, Subscription)> {
        let count = self.registered.len();
        (count > 0).then(|| self.registered.remove(which % count))
    }

    /// A subscription goes once.
    fn forget_it(&self, gone: &Arc<Listener>) {
        assert!(self.registered.iter().all(|(listener, _)| listener.name != gone.name));
    }

    fn heard(&self) -> Vec<(usize, Heard)> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// The rules, after a step: every op reached every listener, newest first (I12), and nobody else (I7).
    pub(super) fn check_order(&self) {
        let heard = self.heard();
        let newest_first: Vec<usize> = self.registered.iter().rev().map(|(one, _)| one.name).collect();
        assert!(
            heard.is_empty() || !newest_first.is_empty(),
            "{heard:?} was heard by nobody that is registered"
        );
        for op in heard.chunks(newest_first.len().max(1)) {
            let names: Vec<usize> = op.iter().map(|(name, _)| *name).collect();
            assert!(
                names == newest_first && op.iter().all(|(_, heard)| *heard == op[0].1),
                "{op:?} should have been one op for {newest_first:?} (I12)"
            );
        }
    }

    /// The rest of the rules; then the mirrors look again.
    pub(super) fn check(&self, mm: &Mm) {
        self.check_order();
        for (listener, _) in &self.registered {
            listener.check(mm);
            listener.look(mm);
        }
    }
}
