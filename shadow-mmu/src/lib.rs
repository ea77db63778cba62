// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A shadow MMU and the notifier layer that keeps it true.
//!
//! ```text
//!  guest program, ring 3                 gva = gpa (no paging of its own)
//!      │  every access
//!      ▼
//!  shadow map  (shadow::ShadowMmu)       gfn ──► spte ──► pfn      the CPU walks it
//!      ▲  zap / rebuild / age / protect            │
//!      │                                           ▼
//!  notifier layer (notifier)                   frame pool (frame): one memfd
//!      ▲  before and after every change            ▲
//!      │                                           │
//!  host address space (mm::Mm)           hva ──► pte ──► pfn      VMAs, demand paging, copy-on-write
//! ```
//!
//! Nothing here knows KVM. Whoever runs the guest implements [`shadow::Tlb`], puts [`ShadowMmu::root`](shadow::ShadowMmu::root)
//! into CR3, and turns page faults into [`ShadowMmu::fault`](shadow::ShadowMmu::fault).
//!
//! # Rules
//! 1. *The pair.* A start returns only when no spte, no cached translation and no fault in flight can reach the range; none
//!    appears until the matching end. A pair is a guard value: dropping it is the end.
//! 2. *Sequence and retry.* The fault path takes its snapshot before it looks at slots or at `Mm`, and checks it again under
//!    `mmu_lock` before it installs.
//! 3. *Never read-modify-write an spte with a plain store.* The CPU sets A and D behind us: exchange or compare-exchange, and
//!    hand what is lost to the frame.
//! 4. *Flush before free, and before the lock goes.*
//! 5. *Less, never more.* The shadow map may lag with fewer rights than the primary, never with more.
//! 6. *Lock order*, below.
//! 7. *A claim from the guest is a claim.* Addresses, lengths and counts are checked before use.
//!
//! # Lock order
//! ```text
//! ksm: the scanner
//! mm: an aging pass
//! mm: family
//!  └─ mm: mmap_lock
//!      ├─ mm: Object::pages
//!      ├─ ksm: newcomers and hints, then who shares a space's pages
//!      ├─ mm: watch state, and the engine's memslots below it
//!      ├─ notifier: table of shared listeners, then writers of the list, then queue of callbacks
//!      └─ mm: page-table lock
//!          └─ notifier callbacks, which are read sections (those that may sleep come right below mmap_lock)
//!              ├─ notifier: state of the intervals (never held over a callback)
//!              ├─ iommu: translations
//!              └─ shadow: active pairs
//!                  └─ shadow: mmu_lock (above it, alone: the list of rings)
//!                      ├─ Tlb::flush, the engine's own
//!                      ├─ shadow: slots (a leaf: nothing is waited for with it held)
//!                      ├─ shadow: bitmap of a dirty log
//!                      └─ frame: free list
//! ```
//! The fault path never calls into `Mm` with `mmu_lock` held. Who is in a read section (an op, a pair) waits for no
//! mmap_lock, for `Mm::release` holds that while it waits for sections to end. Every lock comes from [`sync`].
//!
//! # Example
//! See [`shadow::ShadowMmu`] for a map that loses a page because its address space did.

pub mod addr;
pub mod frame;
pub mod inject;
#[cfg(feature = "mmu-notifier")]
pub mod iommu;
pub mod ksm;
pub mod mm;
pub mod notifier;
#[cfg(feature = "mmu-notifier")]
pub mod shadow;
pub mod sync;
pub mod table;
