// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that costs a run only what the run has touched: all guests have the same.

use mmu_core::addr::Machine;
use mmu_core::memory::Backing;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};

/// Bytes: a gigabyte for the large slot, and the others.
const SIZE: usize = (1 << 30) + (32 << 20);

/// Mapped, not allocated: a search for leaks does not go through it.
static MEMORY: LazyLock<&'static [AtomicU64]> = LazyLock::new(|| {
    const PROT_READ_WRITE: i32 = 3;
    const MAP_PRIVATE_ANONYMOUS_NORESERVE: i32 = 0x4022;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let memory =
        unsafe { mmap(null_mut(), SIZE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0) };
    assert_ne!(memory as isize, -1, "there is address space");
    // SAFETY: so many zeroed bytes, which are never unmapped, and used as these words alone.
    unsafe { core::slice::from_raw_parts(memory.cast(), SIZE / 8) }
});

unsafe extern "C" {
    fn mmap(at: *mut u8, len: usize, rights: i32, flags: i32, file: i32, offset: i64) -> *mut u8;
    fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
}

/// A part of it.
#[derive(Debug)]
struct Piece {
    words: Range<usize>,
    machine: Machine,
}

/// Zeroed pieces, of which the last guest has none any more.
pub struct Pieces {
    used: usize,
}

impl Pieces {
    pub fn new() -> Self {
        const MADV_DONTNEED: i32 = 4;
        let start = MEMORY.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: all of a private anonymous mapping: each word is 0 afterwards, a value that an atomic
        // may have.
        let done = unsafe { madvise(start, SIZE, MADV_DONTNEED) };
        assert_eq!(done, 0, "the pages are mapped");
        Self { used: 0 }
    }

    /// The next `size` bytes, which the processor sees at `machine`.
    pub fn take(&mut self, size: u64, machine: u64) -> Arc<dyn Backing> {
        let words = self.used..self.used + size as usize / 8;
        assert!(words.end <= MEMORY.len());
        self.used = words.end;
        Arc::new(Piece { words, machine: Machine(machine) })
    }
}

// SAFETY: the memory is never dropped nor its slice replaced, and it is lent as shared atomics only.
unsafe impl Backing for Piece {
    fn words(&self) -> &[AtomicU64] {
        &MEMORY[self.words.clone()]
    }

    fn machine(&self) -> Machine {
        self.machine
    }
}
