// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a pool hands out, takes back, and gives back to the host.

use super::*;

fn pool(pages: u64) -> FramePool {
    FramePool::new(pages * PAGE_SIZE, FreedFrames::Poison).unwrap()
}

#[test]
fn a_reused_frame_reads_zeros() {
    let pool = pool(1);
    let pfn = pool.alloc(Fill::Zeros).unwrap();
    pool.write(pfn, 100, b"secret");
    pool.put(pfn);
    assert_eq!(pool.alloc(Fill::Zeros).unwrap(), pfn);
    assert!(pool.words(pfn).iter().all(|word| word.load(Ordering::Relaxed) == 0));
}

#[test]
fn running_out_is_an_error_value_and_passes() {
    let pool = pool(3);
    let frames: Vec<_> = (0..3).map(|_| pool.alloc(Fill::Zeros).unwrap()).collect();
    assert_eq!(pool.alloc(Fill::Zeros), Err(OutOfFrames));
    pool.put_all(&frames);
    assert_eq!(pool.free_frames(), 3);
    assert!(pool.alloc(Fill::Overwritten).is_ok());
}

#[test]
fn a_frame_is_freed_with_its_last_reference_only() {
    let pool = pool(1);
    let pfn = pool.alloc(Fill::Zeros).unwrap();
    pool.get(pfn);
    pool.put(pfn);
    assert_eq!(pool.free_frames(), 0);
    pool.put(pfn);
    assert_eq!(pool.free_frames(), 1);
}

#[test]
fn a_write_after_free_is_found() {
    let pool = pool(2);
    let pfn = pool.alloc(Fill::Zeros).unwrap();
    pool.put(pfn);
    assert_eq!(pool.check_poison(), 0);
    pool.write(pfn, 8, b"late");
    assert_eq!(pool.check_poison(), 1);
}

#[test]
fn used_frames_go_back_to_the_host_in_batches() {
    let pool = pool(16 * KEEP_LEAST as u64);
    let mut frames = Vec::new();
    pool.alloc_up_to(6 * KEEP_LEAST, Fill::Zeros, &mut frames);
    frames.iter().for_each(|&pfn| pool.write(pfn, 0, b"x"));
    frames.iter().for_each(|&pfn| pool.put(pfn));
    let stats = pool.stats();
    assert!(stats.punched >= PUNCH_BATCH as u64, "{stats:?}");
    assert_eq!(stats.free, stats.frames);
    // What was punched reads zeros through the direct map, and is not checked for poison.
    assert_eq!(pool.check_poison(), 0);
}

#[test]
fn sizes_out_of_range_are_refused() {
    assert!(matches!(FramePool::new(0, FreedFrames::Keep), Err(PoolError::Size(0))));
    assert!(matches!(FramePool::new(u64::MAX, FreedFrames::Keep), Err(PoolError::Size(_))));
}

#[test]
fn the_window_shows_the_same_bytes() {
    let pool = pool(2);
    let window = pool.map_window().unwrap();
    let pfn = pool.alloc(Fill::Zeros).unwrap();
    pool.write(pfn, 0, b"same");
    let mut seen = [0; 4];
    let view = vm_memory::GuestRegionMmap::<()>::new(window, GuestAddress(0)).unwrap();
    view.read_slice(&mut seen, vm_memory::MemoryRegionAddress(pfn.offset())).unwrap();
    assert_eq!(&seen, b"same");
}
