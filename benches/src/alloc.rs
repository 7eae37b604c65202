// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The system's allocator, with a count of each thread's bytes.
//!
//! The count is the thread's own, so that counting costs an addition and no shared line. `unsafe`
//! is what an allocator is made of.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what the system's allocator gives out.
#[derive(Debug)]
pub struct Counting;

thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

/// Bytes that this thread has allocated, less those that it has freed.
pub fn live() -> i64 {
    LIVE.get()
}

/// The most that [`live`] has been since [`reset_peak`].
pub fn peak() -> i64 {
    PEAK.get()
}

/// Forgets the peak.
pub fn reset_peak() {
    PEAK.set(LIVE.get());
}

fn count(bytes: i64) {
    // A thread that is ending may have no counters any more; nobody asks it then.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        PEAK.try_with(|peak| peak.set(peak.get().max(live.get())))
    });
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller's promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_this_threads_bytes() {
        let before = live();
        let mut bytes: Vec<u8> = Vec::with_capacity(1000);
        assert_eq!(live() - before, 1000);
        bytes.reserve_exact(2000);
        assert_eq!(live() - before, bytes.capacity() as i64);
        std::thread::spawn(|| drop(vec![0u8; 5000])).join().unwrap();
        let held = live();
        reset_peak();
        drop(vec![0u8; 5000]);
        assert_eq!((live(), peak()), (held, held + 5000));
        drop(bytes);
        assert!((live() - before).abs() < 1000);
    }
}
