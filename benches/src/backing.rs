// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory for slots that the engine's own kind is not for: parts of a block, and address space that
//! nothing is committed for.
//!
//! `unsafe` is needed for the system calls, and to say that this is memory.

use crate::guest::PAGE;
use mmu_core::memory::{AllocatedMemory, Backing};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Part of a block of memory.
#[derive(Debug)]
pub struct Part {
    whole: Arc<AllocatedMemory>,
    words: Range<usize>,
}

impl Part {
    /// These pages of it.
    pub fn new(whole: Arc<AllocatedMemory>, pages: Range<u64>) -> Arc<Self> {
        let words = (pages.start * PAGE / 8) as usize..(pages.end * PAGE / 8) as usize;
        Arc::new(Self { whole, words })
    }
}

// SAFETY: the slice is part of one that keeps the promises, and begins with a page of it.
unsafe impl Backing for Part {
    fn words(&self) -> &[AtomicU64] {
        &self.whole.words()[self.words.clone()]
    }
}

/// Zeroed address space of any size: the system promises no memory for it, and gives some for the
/// pages that are touched.
#[derive(Debug)]
pub struct Reserved(NonNull<[AtomicU64]>);

impl Reserved {
    /// So many bytes; `None` if there is not so much of it.
    pub fn new(size: u64) -> Option<Self> {
        #[cfg(target_os = "linux")]
        {
            let len = usize::try_from(size).ok()?;
            // SAFETY: a new mapping, at an address that the system chooses.
            let base = unsafe {
                libc::mmap(
                    core::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if base == libc::MAP_FAILED {
                return None;
            }
            let words = NonNull::new(base.cast::<AtomicU64>())?;
            Some(Self(NonNull::slice_from_raw_parts(words, len / 8)))
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = size;
            None
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        // SAFETY: the mapping of `new`, which nobody borrows any more.
        unsafe {
            libc::munmap(self.0.as_ptr().cast(), self.0.len() * 8);
        }
    }
}

// SAFETY: the mapping belongs to the value, and any thread may use it as atomics.
unsafe impl Send for Reserved {}
// SAFETY: as above.
unsafe impl Sync for Reserved {}

// SAFETY: the mapping lives as long as the value, at its place; it is only lent as shared atomics,
// for which zero is a value.
unsafe impl Backing for Reserved {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: as above.
        unsafe { self.0.as_ref() }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn reserved_memory_is_zero_and_keeps_what_is_stored() {
        let Some(memory) = Reserved::new(1 << 34) else { return };
        assert_eq!((memory.size(), memory.words()[1 << 30].load(Ordering::Relaxed)), (1 << 34, 0));
        memory.words()[1 << 30].store(7, Ordering::Relaxed);
        assert_eq!(memory.words()[1 << 30].load(Ordering::Relaxed), 7);
        assert_eq!(memory.machine().0 % PAGE, 0);
    }
}
