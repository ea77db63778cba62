// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From an event to changes of VMAs, ptes and slots.
//!
//! Everything here runs with the mmap lock held for writing, `state` locked, and pairs open over everything adopted. Each
//! change opens a pair of its own inside those, so that listeners hear the range and the reason.
//!
//! Events name host addresses; pieces turn those into frame numbers; VMAs are found by frame number, wherever the guest may
//! have moved its view, and as often as it shows it.

use super::slots::{HostSlot, Piece, Slot, State};
use super::uffd::UffdEvent;
use super::{Anonymous, Watcher};
use crate::addr::{Access, HvaRange, PAGE_SIZE, Pfn};
use crate::mm::{Backing, Map, Vma};
use crate::notifier::Event;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

/// The parts of VMAs that show `pfns`, and the number of the first page of each.
fn showing(map: &Map, pfns: &Range<u32>) -> Vec<(HvaRange, u32)> {
    map.vmas
        .iter()
        .filter_map(|vma| {
            let Backing::Adopted { first } = vma.backing else { return None };
            let end = first.0 + vma.range.page_count() as u32;
            let (from, to) = (first.0.max(pfns.start), end.min(pfns.end));
            let at = |pfn: u32| crate::addr::Hva(vma.range.start.0 + u64::from(pfn - first.0) * PAGE_SIZE);
            (from < to).then(|| (HvaRange { start: at(from), end: at(to) }, from))
        })
        .collect()
}

impl Watcher {
    pub(super) fn apply(&self, map: &mut Map, state: &mut State, event: UffdEvent) {
        log::debug!("adopted memory: {event:x?}");
        match event {
            UffdEvent::Unmap(host) => self.gone(map, state, &host),
            UffdEvent::Remap { from, to, len } => self.moved(map, state, &(from..from + len), to),
            UffdEvent::Remove(host) => {
                let pieces = state.pieces.iter();
                let hit = pieces.filter_map(|piece| {
                    let part = piece.host.start.max(host.start)..piece.host.end.min(host.end);
                    (!part.is_empty()).then(|| piece.part(part).pfns())
                });
                for pfns in hit {
                    self.clear(map, &pfns, Event::Clear);
                }
            }
            // Closing the child's descriptor ends the watch over the child's memory, which is none of ours.
            UffdEvent::Fork(child) => {
                drop(child);
                for piece in &state.pieces {
                    self.clear(map, &piece.pfns(), Event::ProtectionPage);
                }
            }
            UffdEvent::PageFault(address) => {
                log::error!("a fault at {address:#x} was reported that nobody asked for");
            }
        }
    }

    /// What was at the addresses `host` is not there any more.
    fn gone(&self, map: &mut Map, state: &mut State, host: &Range<u64>) {
        for piece in state.take(host) {
            self.unmap_pfns(map, &piece.pfns());
        }
    }

    fn unmap_pfns(&self, map: &mut Map, pfns: &Range<u32>) {
        for (range, _) in showing(map, pfns) {
            self.mm.unmap(map, range, Event::Unmap);
        }
    }

    /// Takes the ptes of `pfns`; the next fault finds what is there then.
    fn clear(&self, map: &Map, pfns: &Range<u32>, event: Event) {
        for (range, _) in showing(map, pfns) {
            self.mm.zap(range, event);
            // Also where no pte was: the mapping's own bytes have gone.
            self.mm.written(range);
        }
    }

    /// What was at the addresses `from` is now at `to` and up.
    fn moved(&self, map: &mut Map, state: &mut State, from: &Range<u64>, to: u64) {
        // Nothing of what we knew there can be left; the event that says so is still on its way.
        self.gone(map, state, &(to..to + (from.end - from.start)));
        for piece in state.take(from) {
            let start = to + (piece.host.start - from.start);
            let host = start..start + (piece.host.end - piece.host.start);
            let pfns = piece.pfns();
            let Some(slot) = state.slot_of(piece.first) else { continue };
            if slot.alias.is_some() {
                // KVM goes on through the alias.
                self.clear(map, &pfns, Event::Clear);
                state.pieces.push(Piece { host, first: piece.first });
                continue;
            }
            let access = slot.access;
            // SAFETY: `Mm::adopt`'s caller promised for the mapping, which the kernel says is here now.
            match unsafe { self.add_slot(state, &host, None, access) } {
                Ok(first) => {
                    for (range, pfn) in showing(map, &pfns) {
                        self.mm.zap(range, Event::Clear);
                        for vma in map.vmas.remove(range) {
                            let first = Pfn(first + (pfn - piece.first));
                            map.vmas.insert(Vma { backing: Backing::Adopted { first }, ..vma });
                        }
                    }
                    state.pieces.push(Piece { host, first });
                }
                Err(error) => {
                    log::error!(
                        "the guest loses an adopted mapping that moved to [{:#x}, {:#x}): {error}",
                        host.start,
                        host.end
                    );
                    self.unmap_pfns(map, &pfns);
                }
            }
        }
    }

    /// Makes a slot for the memory at `host`, through `alias` if there is one. Returns its first frame number.
    ///
    /// # Safety
    /// As [`HostSlots::add`](super::HostSlots::add).
    pub(super) unsafe fn add_slot(
        &self,
        state: &mut State,
        host: &Range<u64>,
        alias: Option<Anonymous>,
        access: Access,
    ) -> io::Result<u32> {
        let no_room = || io::Error::other("no frame numbers are left for it");
        let pages = u32::try_from((host.end - host.start) / PAGE_SIZE).map_err(|_| no_room())?;
        let first = state.free_pfns(pages).ok_or_else(no_room)?;
        let target = alias.as_ref().map_or(host.start, |alias| alias.range().start);
        let slot = HostSlot { first: Pfn(first), pages: pages.into(), host: target, access };
        // SAFETY: the caller's promise; an alias is the same memory, and lives as long as the slot.
        unsafe { self.engine.add(&slot) }?;
        state.slots.insert(first, Slot { pages, access, alias });
        Ok(first)
    }

    /// Removes slots that no VMA shows. No spte leads there: what took the VMA took those, and flushed.
    pub(super) fn prune(&self, map: &Map, state: &mut State) {
        let mut used = BTreeSet::new();
        for vma in map.vmas.iter() {
            let Backing::Adopted { first } = vma.backing else { continue };
            let end = first.0 + vma.range.page_count() as u32;
            // One VMA may show neighbours by number.
            let shown =
                state.slots.range(..end).rev().take_while(|&(&start, slot)| start + slot.pages > first.0);
            used.extend(shown.map(|(&start, _)| start));
        }
        let unused: Vec<u32> = state.slots.keys().filter(|first| !used.contains(first)).copied().collect();
        for first in unused {
            if let Err(error) = self.engine.remove(Pfn(first)) {
                // It stays in the list: its numbers are not free, and the next look tries again.
                log::error!("the slot of adopted frames from {first:#x} on cannot be removed: {error}");
                continue;
            }
            let Some(slot) = state.slots.remove(&first) else { continue };
            let numbers = first..first + slot.pages;
            state.pieces.retain(|piece| {
                let stays = !numbers.contains(&piece.first);
                if !stays {
                    // Fails where it is unmapped already and the event is on its way, which nobody will miss.
                    let _ = self.uffd.unregister(&piece.host);
                }
                stays
            });
        }
    }
}
