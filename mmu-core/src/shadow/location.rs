// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Names of table frames and of their entries.

use crate::addr::{ENTRIES, INDEX_BITS, PAGE_SIZE};
use core::fmt;

/// A frame of table memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameId(pub(crate) u32);

impl FrameId {
    /// Index of the frame in the table memory, in units of 4 KiB.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.0
    }
}

/// One entry of one table frame.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location(u64);

impl Location {
    pub(crate) const fn new(frame: FrameId, index: usize) -> Self {
        Self((frame.0 as u64) << INDEX_BITS | index as u64)
    }

    /// The table frame.
    #[must_use]
    pub const fn frame(self) -> FrameId {
        FrameId((self.0 >> INDEX_BITS) as u32)
    }

    /// Index of the entry in its table.
    #[must_use]
    pub const fn index(self) -> usize {
        (self.0 & (ENTRIES as u64 - 1)) as usize
    }

    /// Offset of the entry in the table memory, in bytes.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.frame().0 as u64 * PAGE_SIZE + self.index() as u64 * 8
    }

    /// Index of the entry among all entries of the table memory.
    pub(crate) const fn position(self) -> usize {
        self.0 as usize
    }

    /// As a member of a [`LocationSet`], which stores no zero.
    pub(crate) const fn word(self) -> u64 {
        self.0 + 1
    }

    pub(crate) const fn from_word(word: u64) -> Self {
        Self(word - 1)
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame {} entry {}", self.frame().0, self.index())
    }
}
