// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a memslot's bytes are.
//!
//! Guest memory is shared with running vCPUs, so this crate sees it only as atomic 8-byte words,
//! never as plain memory: `unsafe` is needed here to say that of memory from elsewhere.

use super::DirtyLog;
use crate::addr::{ENTRIES, Machine, PAGE_SIZE};
use crate::sync::AtomicU64;
use core::fmt;

/// The words of a page that the engine can reach: 512, or a table's worth in a model.
pub(crate) const PAGE_WORDS: usize = ENTRIES;

/// Memory behind a memslot.
///
/// # Safety
///
/// `words` must return the same slice each time, readable and writable for as long as the value
/// lives, and `machine` the same page-aligned address. No reference to the memory other than
/// shared references to atomics (or raw pointers) may exist.
pub unsafe trait Backing: Send + Sync + fmt::Debug {
    /// The memory, as little-endian words in address order.
    fn words(&self) -> &[AtomicU64];

    /// What the consumer's processor calls the first byte. The address of the memory in this
    /// process unless told otherwise.
    fn machine(&self) -> Machine {
        Machine(self.words().as_ptr() as u64)
    }

    /// The log that writes to the memory that pass by the engine are recorded in, if there is one:
    /// bit `n` is the memory's page `n`, and the same log is returned each time. A slot that logs
    /// uses it as its own.
    fn dirty_log(&self) -> Option<&DirtyLog> {
        None
    }

    /// Size in bytes.
    fn size(&self) -> u64 {
        self.words().len() as u64 / PAGE_WORDS as u64 * PAGE_SIZE
    }
}

/// Zeroed memory from the process's allocator. Large blocks are committed page by page on first
/// use.
pub struct AllocatedMemory {
    words: Box<[AtomicU64]>,
    /// Index of the first page-aligned word.
    first: usize,
    len: usize,
    machine: Option<Machine>,
}

impl AllocatedMemory {
    /// `size` bytes (rounded up to pages), with the address in this process as machine address.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self::build(size, None)
    }

    /// `size` bytes that the consumer's processor sees at `machine`.
    #[must_use]
    pub fn at(size: u64, machine: Machine) -> Self {
        Self::build(size, Some(machine))
    }

    /// As [`AllocatedMemory::at`], but reports memory that cannot be had.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`] names the size.
    pub fn try_at(size: u64, machine: Machine) -> Result<Self, OutOfMemory> {
        Self::try_build(size, Some(machine)).ok_or(OutOfMemory { size })
    }

    fn build(size: u64, machine: Option<Machine>) -> Self {
        Self::try_build(size, machine).unwrap_or_else(|| {
            // What the standard library's collections do without memory.
            std::alloc::handle_alloc_error(std::alloc::Layout::new::<[u8; PAGE_SIZE as usize]>())
        })
    }

    #[cfg(not(loom))]
    fn try_build(size: u64, machine: Option<Machine>) -> Option<Self> {
        let len = usize::try_from(size.div_ceil(PAGE_SIZE)).ok()?.checked_mul(PAGE_WORDS)?;
        // A page more than needed, to align by hand: an aligned zeroed allocation would be
        // cleared eagerly by the standard allocator.
        let layout = std::alloc::Layout::array::<AtomicU64>(len.checked_add(PAGE_WORDS)?).ok()?;
        // SAFETY: the layout is not empty.
        let words = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<AtomicU64>();
        if words.is_null() {
            return None;
        }
        let words = core::ptr::slice_from_raw_parts_mut(words, len + PAGE_WORDS);
        // SAFETY: allocated with the layout of this slice; zero is a valid `AtomicU64`.
        let words = unsafe { Box::from_raw(words) };
        let first = words.as_ptr().cast::<u8>().align_offset(PAGE_SIZE as usize) / 8;
        Some(Self { words, first, len, machine })
    }

    #[cfg(loom)]
    fn try_build(size: u64, machine: Option<Machine>) -> Option<Self> {
        let len = size.div_ceil(PAGE_SIZE) as usize * PAGE_WORDS;
        Some(Self { words: (0..len).map(|_| AtomicU64::new(0)).collect(), first: 0, len, machine })
    }
}

/// Memory could not be allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{size} bytes of memory cannot be allocated")]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub size: u64,
}

// SAFETY: the slice is owned and never replaced; it is only lent as shared atomics.
unsafe impl Backing for AllocatedMemory {
    fn words(&self) -> &[AtomicU64] {
        &self.words[self.first..self.first + self.len]
    }

    fn machine(&self) -> Machine {
        self.machine.unwrap_or(Machine(self.words().as_ptr() as u64))
    }
}

impl fmt::Debug for AllocatedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AllocatedMemory")
            .field("size", &self.size())
            .field("machine", &self.machine())
            .finish()
    }
}
