// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pool: file, direct map, metadata, and the only ways to get and to lose a frame.

use super::alloc::FreeFrames;
use super::hook::WriteHook;
use super::meta::{Frame, FrameFlags};
use crate::addr::{PAGE_SIZE, Pfn};
use crate::inject::{FRAME_ALLOC, Faults, POOL_GROW, PUNCH};
use crate::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use vm_memory::bitmap::{NewBitmap, RefSlice};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion, VolatileSlice,
};

/// Used free frames that a pool keeps before it gives some back to the host, as a share of the pool: 1/8 …
const KEEP_SHARE: usize = 8;
/// … but at least this many, 8 MiB.
const KEEP_LEAST: usize = 2048;
/// Frames punched in one go.
const PUNCH_BATCH: usize = 1024;
/// What [`FreedFrames::Poison`] writes into every word of a freed frame: no canonical address, no likely content.
const POISON: u64 = 0xdead_f4a3_e0ff_1ce5;

/// Why a pool could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The host refused the file or a mapping of it.
    #[error("cannot make a frame pool of {bytes:#x} bytes ({what}): {source}; ask for less with --memory")]
    Host {
        /// Bytes asked for.
        bytes: u64,
        /// The step that failed.
        what: &'static str,
        /// The host's word.
        source: std::io::Error,
    },
    /// More frames than a [`Pfn`] can name, or none.
    #[error("a frame pool of {0:#x} bytes is out of range: from one page to 16 TiB")]
    Size(u64),
}

/// No frame is free. The caller undoes what it began and tells whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("out of memory: every frame of the pool is in use; give it more with --memory")]
pub struct OutOfFrames;

/// What a frame holds when it is handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Zeros.
    Zeros,
    /// Anything: the caller overwrites all of it before anyone else can see it.
    Overwritten,
}

/// What happens to the bytes of a frame that is freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FreedFrames {
    /// They stay until the frame is handed out again or punched out.
    #[default]
    Keep,
    /// They are overwritten with a pattern, which is checked when the frame goes out again and by
    /// [`FramePool::check_poison`]: a frame written after it was freed is found.
    Poison,
}

/// How full a pool is, and what happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStats {
    /// Frames in all.
    pub frames: usize,
    /// Frames nobody holds.
    pub free: usize,
    /// Of those, frames that still cost the host a page.
    pub free_used: usize,
    /// Frames given back to the host so far.
    pub punched: u64,
    /// The most frames that were ever in use at once.
    pub peak: usize,
    /// Free frames that are kept for pages that stop being shared.
    pub reserve: usize,
    /// Frames that were handed out of the reserve so far, for such pages.
    pub reserve_taken: u64,
}

/// Who wants a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Anybody: the reserve is not touched.
    New,
    /// A page that is shared is about to be one's own again, which its owner was promised when it was merged.
    Unshare,
    /// A page table of a secondary, without which such a page could not be mapped: up to an eighth of the reserve.
    Table,
}

/// A pool of page frames: a sparse memfd, our direct map of it, and per-frame metadata.
///
/// Reference counts are explicit ([`get`](Self::get), [`put`](Self::put)), because most references live as bits in page
/// tables, where no destructor runs.
#[derive(Debug)]
pub struct FramePool {
    /// The direct map: one region from address 0, so that a pfn's offset is its address.
    memory: FrameMemory,
    /// Host address of the direct map; derived from `memory`, kept because every table walk needs it.
    base: usize,
    file: Arc<File>,
    pub(super) frames: Box<[Frame]>,
    pub(super) free: Mutex<FreeFrames>,
    freed: FreedFrames,
    punched: AtomicU64,
    /// Marks of accesses that frames got from sptes that were lost, so far.
    accesses_lost: AtomicU64,
    /// The same of writes.
    writes_lost: AtomicU64,
    /// Frames with [`FrameFlags::KSM`].
    ksm_frames: AtomicUsize,
    /// Pages of KSM that were copied because somebody wrote them.
    ksm_copies: AtomicU64,
    /// Free frames for [`Purpose::Unshare`] only.
    reserve: AtomicUsize,
    reserve_taken: AtomicU64,
    peak: AtomicU32,
    poison_broken: AtomicU64,
    faults: Faults,
}

/// The direct map as vm-memory has it.
pub type FrameMemory = GuestMemoryMmap<WriteHook>;

fn map<B: NewBitmap>(file: &Arc<File>, bytes: u64, what: &'static str) -> Result<MmapRegion<B>, PoolError> {
    let host = |source| PoolError::Host { bytes, what, source };
    MmapRegion::build(
        Some(FileOffset::from_arc(Arc::clone(file), 0)),
        bytes as usize,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_NORESERVE,
    )
    .map_err(|error| host(std::io::Error::other(error)))
}

impl FramePool {
    /// A pool of `bytes` bytes, rounded up to whole pages. Nothing is populated.
    ///
    /// # Errors
    /// [`PoolError`], where the size is out of range or the host refuses.
    pub fn new(bytes: u64, freed: FreedFrames) -> Result<Self, PoolError> {
        Self::with_faults(bytes, freed, Faults::default())
    }

    /// The same, with fault points that `faults` decides over.
    ///
    /// # Errors
    /// As those of [`new`](Self::new).
    pub fn with_faults(bytes: u64, freed: FreedFrames, faults: Faults) -> Result<Self, PoolError> {
        let count = bytes.div_ceil(PAGE_SIZE);
        if count == 0 || count > u64::from(u32::MAX) {
            return Err(PoolError::Size(bytes));
        }
        let bytes = count * PAGE_SIZE;
        let host = |what| move |source| PoolError::Host { bytes, what, source };
        // SAFETY: the name is a C string; the call touches no memory of ours.
        let fd = unsafe { libc::memfd_create(c"umbra-frames".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(host("memfd_create")(std::io::Error::last_os_error()));
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
        let file = unsafe { File::from_raw_fd(fd) };
        match faults.fail(&POOL_GROW) {
            Some(errno) => Err(std::io::Error::from_raw_os_error(errno)),
            None => file.set_len(bytes),
        }
        .map_err(host("ftruncate"))?;
        let file = Arc::new(file);
        let region = map::<WriteHook>(&file, bytes, "direct map")?;
        let region =
            vm_memory::GuestRegionMmap::new(region, GuestAddress(0)).ok_or(PoolError::Size(bytes))?;
        let base = region.as_ptr() as usize;
        let memory = FrameMemory::from_regions(vec![region])
            .map_err(|error| host("region")(std::io::Error::other(error)))?;
        // Zeroed by the host page by page as it is touched: a pool of terabytes costs nothing until it is used.
        let frames = Box::<[Frame]>::new_zeroed_slice(count as usize);
        // SAFETY: `Frame` is three `AtomicU32`, for which all-zeros is a valid value.
        let frames = unsafe { frames.assume_init() };
        Ok(Self {
            memory,
            base,
            file,
            frames,
            free: Mutex::new(FreeFrames::new(count as usize)),
            freed,
            punched: AtomicU64::new(0),
            accesses_lost: AtomicU64::new(0),
            writes_lost: AtomicU64::new(0),
            ksm_frames: AtomicUsize::new(0),
            ksm_copies: AtomicU64::new(0),
            reserve: AtomicUsize::new(0),
            reserve_taken: AtomicU64::new(0),
            peak: AtomicU32::new(0),
            poison_broken: AtomicU64::new(0),
            faults,
        })
    }

    /// Maps the file a second time, for a VM to hand to KVM as its RAM.
    ///
    /// # Errors
    /// [`PoolError::Host`].
    pub fn map_window(&self) -> Result<MmapRegion, PoolError> {
        map(&self.file, self.bytes(), "window")
    }

    /// Size of the pool's file.
    pub fn bytes(&self) -> u64 {
        self.frames.len() as u64 * PAGE_SIZE
    }

    /// The direct map as rust-vmm sees it; address 0 is the first byte of frame 0.
    pub fn memory(&self) -> &FrameMemory {
        &self.memory
    }

    /// The file that holds the frames.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What may be made to go wrong with it.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Whether `pfn` is a frame of this pool. Those beyond belong to [adopted mappings](crate::mm::watch).
    pub fn contains(&self, pfn: Pfn) -> bool {
        pfn.index() < self.frames.len()
    }

    /// Metadata of `pfn`.
    ///
    /// # Panics
    /// If `pfn` is not a frame of this pool.
    pub fn frame(&self, pfn: Pfn) -> &Frame {
        &self.frames[pfn.index()]
    }

    /// Notes at the frame what a secondary's entry knew that is lost.
    ///
    /// # Panics
    /// If `pfn` is not a frame of this pool.
    pub fn hand_over_marks(&self, pfn: Pfn, marks: FrameFlags) {
        self.frame(pfn).set_flags(marks);
        if marks.contains(FrameFlags::ACCESSED) {
            // Release, behind the flag: who sees the count sees the flag.
            self.accesses_lost.fetch_add(1, Ordering::Release);
        }
        if marks.contains(FrameFlags::WRITTEN) {
            self.writes_lost.fetch_add(1, Ordering::Release);
        }
    }

    /// How often a frame was told of an access: while this stays, no frame has a mark that it had not before.
    pub fn accesses_lost(&self) -> u64 {
        self.accesses_lost.load(Ordering::Acquire)
    }

    /// How often a frame was told of a write: while this stays, no frame has [`FrameFlags::WRITTEN`] that had not before.
    pub fn writes_lost(&self) -> u64 {
        self.writes_lost.load(Ordering::Acquire)
    }

    /// How full the pool is.
    pub fn stats(&self) -> PoolStats {
        let free = self.free.lock();
        PoolStats {
            frames: self.frames.len(),
            free: free.free_count(),
            free_used: free.used_count(),
            punched: self.punched.load(Ordering::Relaxed),
            peak: self.peak.load(Ordering::Relaxed) as usize,
            reserve: self.reserve.load(Ordering::Relaxed),
            reserve_taken: self.reserve_taken.load(Ordering::Relaxed),
        }
    }

    /// One frame with one reference.
    ///
    /// # Errors
    /// [`OutOfFrames`].
    pub fn alloc(&self, fill: Fill) -> Result<Pfn, OutOfFrames> {
        self.alloc_for(Purpose::New, fill)
    }

    /// The same for `purpose`.
    ///
    /// # Errors
    /// [`OutOfFrames`].
    pub fn alloc_for(&self, purpose: Purpose, fill: Fill) -> Result<Pfn, OutOfFrames> {
        let mut out = Vec::with_capacity(1);
        self.take(1, purpose, fill, &mut out);
        out.pop().ok_or(OutOfFrames)
    }

    /// From now on so many free frames are kept for pages that stop being shared.
    pub fn set_reserve(&self, frames: usize) {
        self.reserve.store(frames, Ordering::Relaxed);
    }

    /// Frames that are pages of [`ksm`](crate::ksm).
    pub fn ksm_frames(&self) -> usize {
        self.ksm_frames.load(Ordering::Relaxed)
    }

    /// Pages of KSM of which a copy was made because somebody wrote them, so far (`cow_ksm`).
    pub fn ksm_copies(&self) -> u64 {
        self.ksm_copies.load(Ordering::Relaxed)
    }

    pub(crate) fn count_ksm_copy(&self) {
        self.ksm_copies.fetch_add(1, Ordering::Relaxed);
    }

    /// Makes `pfn`, which the caller holds, a page of [`ksm`](crate::ksm). No pte maps it; or one, whose lock the caller has, and
    /// from which W was taken.
    pub(crate) fn make_ksm(&self, pfn: Pfn) {
        self.frame(pfn).set_flags(FrameFlags::KSM);
        self.ksm_frames.fetch_add(1, Ordering::Relaxed);
    }

    /// Makes it an ordinary page again, that one pte maps, whose lock the caller has.
    pub(crate) fn unmake_ksm(&self, pfn: Pfn) {
        if !self.frame(pfn).take_flags(FrameFlags::KSM).is_empty() {
            self.ksm_frames.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// A reference to `pfn` if it is a page of [`ksm`](crate::ksm) now (`ksm_get_folio`). Whoever remembers such a page holds none,
    /// so it may have been freed and handed out again meanwhile: looked at before, and again with the reference held (R26).
    pub(crate) fn get_ksm(&self, pfn: Pfn) -> bool {
        let frame = self.frame(pfn);
        if !frame.flags().contains(FrameFlags::KSM) || !frame.try_add_ref() {
            return false;
        }
        if frame.flags().contains(FrameFlags::KSM) {
            return true;
        }
        self.put(pfn);
        false
    }

    /// Up to `want` frames, each with one reference, appended to `out` in ascending order as far as possible.
    /// Returns how many there were.
    pub fn alloc_up_to(&self, want: usize, fill: Fill, out: &mut Vec<Pfn>) -> usize {
        self.take(want, Purpose::New, fill, out)
    }

    fn take(&self, want: usize, purpose: Purpose, fill: Fill, out: &mut Vec<Pfn>) -> usize {
        if self.faults.fail(&FRAME_ALLOC).is_some() {
            return 0;
        }
        let mut taken = Vec::with_capacity(want);
        {
            let mut free = self.free.lock();
            let reserve = self.reserve.load(Ordering::Relaxed);
            let spare = free.free_count().saturating_sub(reserve);
            let most = match purpose {
                Purpose::New => want.min(spare),
                Purpose::Table => want.min(free.free_count().saturating_sub(reserve - reserve / 8)),
                Purpose::Unshare => want,
            };
            free.take(most, &mut taken);
            if taken.len() > spare && purpose == Purpose::Unshare {
                self.reserve_taken.fetch_add((taken.len() - spare) as u64, Ordering::Relaxed);
            }
            let in_use = (self.frames.len() - free.free_count()) as u32;
            self.peak.fetch_max(in_use, Ordering::Relaxed);
        }
        for &(pfn, used) in &taken {
            if used && self.freed == FreedFrames::Poison {
                self.verify_poison(pfn);
            }
            if used && fill == Fill::Zeros {
                self.zero(pfn);
            }
            self.frame(pfn).handed_out();
            out.push(pfn);
        }
        taken.len()
    }

    /// Frames in all.
    pub fn frame_count(&self) -> usize {
        self.frames.len()
    }

    /// Frames that [`alloc`](Self::alloc) could still hand out.
    pub fn free_frames(&self) -> usize {
        self.free.lock().free_count().saturating_sub(self.reserve.load(Ordering::Relaxed))
    }

    /// One more reference to a frame that the caller knows to be held.
    pub fn get(&self, pfn: Pfn) {
        self.frame(pfn).add_ref();
    }

    /// One reference less; the last one frees the frame.
    ///
    /// Rule 4: the caller has flushed every translation that could still reach the frame (I21, I22).
    pub fn put(&self, pfn: Pfn) {
        self.put_all(&[pfn]);
    }

    /// [`put`](Self::put) of many frames under one lock. Returns how many of them became free.
    pub fn put_all(&self, frames: &[Pfn]) -> usize {
        let freed: Vec<Pfn> = frames.iter().filter(|pfn| self.frame(**pfn).remove_ref()).copied().collect();
        let count = freed.len();
        if count == 0 {
            return 0;
        }
        let ksm = freed.iter().filter(|pfn| self.frame(**pfn).flags().contains(FrameFlags::KSM)).count();
        if ksm > 0 {
            // The flag stays until the frame is handed out: without references it says nothing.
            self.ksm_frames.fetch_sub(ksm, Ordering::Relaxed);
        }
        for &pfn in &freed {
            debug_assert_eq!(self.frame(pfn).map_count(), 0, "frame {pfn:?} freed while mapped");
            if self.freed == FreedFrames::Poison {
                self.words(pfn).iter().for_each(|word| word.store(POISON, Ordering::Relaxed));
            }
        }
        let punch = {
            let mut free = self.free.lock();
            freed.into_iter().for_each(|pfn| free.put_used(pfn));
            let keep = (self.frames.len() / KEEP_SHARE).max(KEEP_LEAST);
            if free.used_count() > keep + PUNCH_BATCH { free.take_used_runs(PUNCH_BATCH) } else { Vec::new() }
        };
        if !punch.is_empty() {
            self.punch(punch);
        }
        count
    }

    /// Gives the pages of `runs` back to the host. Nobody else can see these frames: they are neither held nor free.
    fn punch(&self, runs: Vec<Range<u32>>) {
        for run in runs {
            if self.freed == FreedFrames::Poison {
                run.clone().for_each(|frame| self.verify_poison(Pfn(frame)));
            }
            let (offset, len) = (Pfn(run.start).offset(), (run.end - run.start) as u64 * PAGE_SIZE);
            match self.punch_hole(offset, len) {
                Ok(()) => {
                    self.punched.fetch_add(u64::from(run.end - run.start), Ordering::Relaxed);
                    self.free.lock().put_clean(run);
                }
                Err(error) => {
                    // The frames stay usable, the host only keeps their pages.
                    log::debug!("cannot punch frames {run:?}: {error}");
                    self.free.lock().put_unpunched(run);
                }
            }
        }
    }

    fn punch_hole(&self, offset: u64, len: u64) -> std::io::Result<()> {
        if let Some(errno) = self.faults.fail(&PUNCH) {
            return Err(std::io::Error::from_raw_os_error(errno));
        }
        // SAFETY: acts on our file only; both mappings of it stay valid and read zeros there afterwards.
        let result = unsafe {
            libc::fallocate(
                self.file.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset as libc::off_t,
                len as libc::off_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    /// The bytes of `pfn`, for reading and writing beside a running guest.
    ///
    /// # Panics
    /// If `pfn` is not a frame of this pool.
    pub fn slice(&self, pfn: Pfn) -> VolatileSlice<'_, RefSlice<'_, WriteHook>> {
        self.memory
            .get_slice(GuestAddress(pfn.offset()), PAGE_SIZE as usize)
            .unwrap_or_else(|error| panic!("{pfn:?} is not a frame of this pool: {error}"))
    }

    /// The bytes of `pfn` as 512 words, the form of a page table.
    ///
    /// # Panics
    /// If `pfn` is not a frame of this pool.
    pub fn words(&self, pfn: Pfn) -> &[AtomicU64; 512] {
        assert!(pfn.index() < self.frames.len(), "{pfn:?} is not a frame of this pool");
        let at = (self.base + pfn.offset() as usize) as *const [AtomicU64; 512];
        // SAFETY: the direct map covers the whole pool, is page aligned and lives as long as `self`. Everyone who
        // shares these bytes with us, the CPU included, is seen through atomics.
        unsafe { &*at }
    }

    /// Has the host map the frames that are about to be read, where they are neighbours: one call for many, where each would be a
    /// fault. Only a matter of time; a host that does not know how is not asked again and again by much.
    pub(crate) fn populate(&self, frames: impl Iterator<Item = Pfn>) {
        let mut run = 0..0;
        let populate = |run: &Range<u32>| {
            if run.len() > 1 {
                let at = (self.base + Pfn(run.start).offset() as usize) as *mut libc::c_void;
                // SAFETY: lies in our own mapping of the file, and changes nothing but which pages of it are mapped.
                let _ = unsafe { libc::madvise(at, run.len() << 12, libc::MADV_POPULATE_READ) };
            }
        };
        for Pfn(frame) in frames {
            if frame != run.end {
                populate(&run);
                run.start = frame;
            }
            run.end = frame + 1;
        }
        populate(&run);
    }

    /// Fills `pfn` with zeros.
    pub fn zero(&self, pfn: Pfn) {
        // A frame fresh from the free list or about to be a table: no guest can reach it, so plain stores of whole
        // words are enough, and the compiler turns them into the fastest there are.
        let zeros = [0u8; PAGE_SIZE as usize];
        self.slice(pfn).copy_from(&zeros);
    }

    /// Copies all of `from` to `to`.
    pub fn copy(&self, from: Pfn, to: Pfn) {
        self.slice(from).copy_to_volatile_slice(self.slice(to));
    }

    /// Whether the bytes of two frames are equal, as far as nobody writes them.
    pub fn is_same(&self, one: Pfn, other: Pfn) -> bool {
        let (one, other) = (self.words(one), self.words(other));
        one.iter().zip(other).all(|(one, other)| one.load(Ordering::Relaxed) == other.load(Ordering::Relaxed))
    }

    /// Whether a frame holds zeros only, as far as nobody writes it.
    pub fn is_zero(&self, pfn: Pfn) -> bool {
        self.words(pfn).iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// The bytes of `pfn` as they are now, while others may write them.
    pub fn read(&self, pfn: Pfn, bytes: &mut [u8; PAGE_SIZE as usize]) {
        self.slice(pfn).copy_to(&mut bytes[..]);
    }

    /// Copies `bytes` to `offset` of `pfn`; what does not fit is not written.
    pub fn write(&self, pfn: Pfn, offset: usize, bytes: &[u8]) {
        let room = (PAGE_SIZE as usize).saturating_sub(offset).min(bytes.len());
        // Within one frame this cannot fail: `room` keeps it inside.
        let _ = self.memory.write_slice(&bytes[..room], GuestAddress(pfn.offset() + offset as u64));
    }

    /// Whether a frame was found changed although it was free ([`FreedFrames::Poison`]), so far: the number of frames.
    pub fn poison_broken(&self) -> u64 {
        self.poison_broken.load(Ordering::Relaxed)
    }

    /// Checks every free frame now and returns [`poison_broken`](Self::poison_broken).
    ///
    /// Nothing is checked unless the pool was made with [`FreedFrames::Poison`].
    pub fn check_poison(&self) -> u64 {
        if self.freed == FreedFrames::Poison {
            let free = self.free.lock();
            free.used_frames().for_each(|pfn| self.verify_poison(pfn));
        }
        self.poison_broken()
    }

    fn verify_poison(&self, pfn: Pfn) {
        let words = self.words(pfn);
        if let Some(at) = words.iter().position(|word| word.load(Ordering::Relaxed) != POISON) {
            self.poison_broken.fetch_add(1, Ordering::Relaxed);
            log::error!(
                "frame {:#x} was written after it was freed: byte {:#x} holds {:#018x}",
                pfn.0,
                at * 8,
                words[at].load(Ordering::Relaxed)
            );
        }
    }
}

#[cfg(test)]
mod tests;
