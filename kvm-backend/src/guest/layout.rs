// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where everything lies in a guest.
//!
//! Guest-physical memory starts at 0 and is contiguous; [`Layout::split`] cuts it for callers that back it
//! by several memslots. In ascending order:
//!
//! | guest-physical | size | what |
//! | --- | --- | --- |
//! | 0 | 4 KiB | never mapped |
//! | [`CONTROL_GPA`] | 4 KiB | control page: words shared by the vCPUs and the VMM |
//! | [`CODE_GPA`] | [`CODE_PAGES`] | all programs |
//! | [`STATES_GPA`] | 4 KiB | what `churn` must find in its window, page by page |
//! | [`STACKS_GPA`] | 4 KiB per vCPU | stacks |
//! | [`Layout::tails_gpa`] | [`TAIL_PAGES`] per vCPU | private tails of `precopy` |
//! | [`Layout::windows_gpa`] | 2 × [`WINDOW_PAGES`] | frames of sets A and B of `remap` |
//! | [`Layout::tables`] | as needed | page tables |
//! | [`Layout::data_gpa`] | the rest | two data ranges of the same size, and at most one page left over |
//!
//! Far above it, at [`CHURN_GPA`], is the window of `churn`: memory that comes and goes, and a device that
//! answers where there is none. The data ranges are also what the address spaces of `switch` are made
//! of, see [`Spaces`](super::switch::Spaces).
//!
//! | guest-virtual | rights | what |
//! | --- | --- | --- |
//! | [`CODE_GVA`] | r-x | code |
//! | [`CONTROL_GVA`] | rw- | control page |
//! | [`STATES_GVA`] | r-- | what `churn` must find |
//! | [`STACKS_GVA`] + vCPU × [`STACK_STRIDE`] | rw- | stack page; the rest of the stride is unmapped |
//! | [`TAILS_GVA`] + vCPU × [`TAIL_PAGES`] pages | rw- | private tail; its first page is the ledger of `churn` |
//! | [`WINDOW_GVA`] | rw- | the window that `remap` remaps; has page tables of its own |
//! | [`TABLES_GVA`] | rw- | the window's page tables A and B, then the page directory above them |
//! | [`SPARSE_GVA`] + n × [`SPARSE_STRIDE`] | rw- | the first [`SPARSE_PAGES`] pages of the second data range, each with a page table of its own |
//! | [`CHURN_GVA`], and [`CHURN_SECOND`] after it | rw- | the window of `churn`, twice |
//! | [`DATA_GVA`] | rw- | first data range (shares) |
//! | [`OVERLAP_GVA`] | rw- | second data range (lanes) |
//! | [`MIRROR_GVA`], [`MIRROR_LARGE_GVA`] | rw- | only in the spaces of `switch`: the memory that they are made of, by 4K and by 2M pages |
//! | [`SPACE_GVA`] | | only there: what differs between them |
//! | [`UNMAPPED_GVA`] | | never mapped |
//!
//! All are user pages; everything but code is no-execute.

use super::paging::{PAGE, tables_for};
use std::ops::Range;
use thiserror::Error;

/// Guest-physical address of the control page.
pub const CONTROL_GPA: u64 = 0x1000;
/// Guest-physical address of the code.
pub const CODE_GPA: u64 = 0x2000;
/// Pages of code.
pub const CODE_PAGES: u64 = 2;
/// Guest-physical address of the states of the window of `churn`.
pub const STATES_GPA: u64 = 0x8000;
/// Guest-physical address of the stacks.
pub const STACKS_GPA: u64 = 0x1_0000;
/// Pages of each vCPU's private tail.
pub const TAIL_PAGES: u64 = 4;
/// Pages of the window of `remap`.
pub const WINDOW_PAGES: u64 = 16;
/// Guest-physical address of the window of `churn`: above all memory.
pub const CHURN_GPA: u64 = 1 << 41;
/// Pages of the window of `churn`.
pub const CHURN_PAGES: u64 = 128;
/// Pages at the start of the first data range that `churn` counts in.
pub const DENSE_PAGES: u64 = 64;
/// Pages at the start of the second data range that `churn` counts in.
pub const SPARSE_PAGES: u64 = 96;

/// Guest-virtual address of the code.
pub const CODE_GVA: u64 = 0x40_0000;
/// Guest-virtual address of the control page.
pub const CONTROL_GVA: u64 = 0x50_0000;
/// Guest-virtual address of the states of the window of `churn`.
pub const STATES_GVA: u64 = 0x51_0000;
/// Guest-virtual address of the first stack.
pub const STACKS_GVA: u64 = 0x60_0000;
/// Distance of the stacks.
pub const STACK_STRIDE: u64 = 0x4000;
/// Guest-virtual address of the first private tail.
pub const TAILS_GVA: u64 = 0x80_0000;
/// Guest-virtual address of the window.
pub const WINDOW_GVA: u64 = 0x4000_0000;
/// Guest-virtual address of the window's page tables: A, B, directory.
pub const TABLES_GVA: u64 = 0x8000_0000;
/// Guest-virtual address of the first sparse page of `churn`.
pub const SPARSE_GVA: u64 = 0xc000_0000;
/// Distance of the sparse pages.
pub const SPARSE_STRIDE: u64 = 2 << 20;
/// Guest-virtual address of the window of `churn`.
pub const CHURN_GVA: u64 = 0x1_0000_0000;
/// Distance of its second mapping.
pub const CHURN_SECOND: u64 = 2 << 20;
/// Guest-virtual address of the first data range.
pub const DATA_GVA: u64 = 1 << 40;
/// Guest-virtual address of the second data range.
pub const OVERLAP_GVA: u64 = 2 << 40;
/// Guest-virtual address of the memory of `switch`'s spaces, mapped by 4K pages.
pub const MIRROR_GVA: u64 = 4 << 40;
/// Guest-virtual address of the same by 2M pages.
pub const MIRROR_LARGE_GVA: u64 = MIRROR_GVA + (1 << 30);
/// Guest-virtual address of what differs between the spaces of `switch`.
pub const SPACE_GVA: u64 = 5 << 40;
/// A guest-virtual address that is never mapped.
pub const UNMAPPED_GVA: u64 = 0x7000_0000;

/// The least memory of a guest, in MiB.
pub const MIN_MEMORY_MIB: u64 = 4;
/// The most, in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// The most vCPUs of a guest.
pub const MAX_VCPUS: usize = 64;

/// Byte offsets of the control page's words, each in a cache line of its own.
pub mod control {
    /// `remap`: the round published last; all ones: stop.
    pub const ROUND: u64 = 0x00;
    /// `remap`: readers that have seen the round.
    pub const ACKS: u64 = 0x40;
    /// Set to nonzero by the VMM to end `precopy`, `churn`, `switch` and, at the next round, `remap`.
    pub const STOP: u64 = 0x80;
    /// `remap`: which page table is in use, 0 or 1.
    pub const LIVE: u64 = 0xc0;
    /// `remap`: the last round that all vCPUs have finished.
    pub const DONE: u64 = 0x100;
    /// `churn`: [`MOVE_RECORDS`] records of moves, [`MOVE_STRIDE`] bytes each: version, page of the
    /// window it moves from, page it moves to, identity.
    pub const MOVES: u64 = 0x140;
    /// Number of records.
    pub const MOVE_RECORDS: u64 = 2;
    /// Distance of the records.
    pub const MOVE_STRIDE: u64 = 0x40;
}

/// Why a guest cannot be built.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageError {
    /// Too little memory.
    #[error("a guest needs at least {MIN_MEMORY_MIB} MiB of memory, not {0}")]
    MemoryTooSmall(u64),
    /// Too much memory.
    #[error("a guest can have at most {MAX_MEMORY_MIB} MiB of memory, not {0}")]
    MemoryTooLarge(u64),
    /// No vCPU, or too many.
    #[error("a guest has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(usize),
    /// The region for page tables is used up.
    #[error("no room for another page table below {end:#x}")]
    TablesFull {
        /// The end of the region.
        end: u64,
    },
    /// Too little memory for the address spaces of `switch`.
    #[error(
        "{memory_mib} MiB of memory are too little for the address spaces of {vcpus} vCPUs in `switch`"
    )]
    NoSpaces {
        /// Memory in MiB.
        memory_mib: u64,
        /// vCPUs.
        vcpus: usize,
    },
}

/// The sizes and addresses that depend on the memory's size and the number of vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    vcpus: usize,
    memory: u64,
    tails_gpa: u64,
    windows_gpa: u64,
    tables: Range<u64>,
    data_pages: u64,
}

impl Layout {
    /// The layout for `memory_mib` MiB of memory and `vcpus` vCPUs.
    pub fn new(memory_mib: u64, vcpus: usize) -> Result<Self, ImageError> {
        if memory_mib < MIN_MEMORY_MIB {
            return Err(ImageError::MemoryTooSmall(memory_mib));
        }
        if memory_mib > MAX_MEMORY_MIB {
            return Err(ImageError::MemoryTooLarge(memory_mib));
        }
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(ImageError::Vcpus(vcpus));
        }
        let memory = memory_mib << 20;
        let tails_gpa = STACKS_GPA + vcpus as u64 * PAGE;
        let windows_gpa = tails_gpa + vcpus as u64 * TAIL_PAGES * PAGE;
        let tables_gpa = windows_gpa + 2 * WINDOW_PAGES * PAGE;
        // Tables for data ranges as large as if there were no tables: a little too many.
        let most = (memory - tables_gpa) / PAGE / 2;
        let data = tables_for(DATA_GVA, most) + tables_for(OVERLAP_GVA, most);
        // The low mappings: root, PDPT, five PDs, page tables of code to tails, windows (2 each), tables.
        let low = 20 + SPARSE_PAGES;
        let tables = tables_gpa..tables_gpa + (data + low) * PAGE;
        let data_pages = (memory - tables.end) / PAGE / 2;
        Ok(Layout { vcpus, memory, tails_gpa, windows_gpa, tables, data_pages })
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.vcpus
    }

    /// Size of guest-physical memory in bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Guest-physical address of the private tails.
    #[must_use]
    pub fn tails_gpa(&self) -> u64 {
        self.tails_gpa
    }

    /// Guest-physical address of the window frames: set A, then set B.
    #[must_use]
    pub fn windows_gpa(&self) -> u64 {
        self.windows_gpa
    }

    /// Guest-physical address of frame `page` of set `set` (0 or 1).
    #[must_use]
    pub fn window_frame(&self, set: u64, page: u64) -> u64 {
        self.windows_gpa + ((set & 1) * WINDOW_PAGES + page) * PAGE
    }

    /// The guest-physical region of the page tables.
    #[must_use]
    pub fn tables(&self) -> Range<u64> {
        self.tables.clone()
    }

    /// Guest-physical address of the first data range.
    #[must_use]
    pub fn data_gpa(&self) -> u64 {
        self.tables.end
    }

    /// Guest-physical address of the second data range.
    #[must_use]
    pub fn overlap_gpa(&self) -> u64 {
        self.tables.end + self.data_pages * PAGE
    }

    /// Pages of each of the two data ranges.
    #[must_use]
    pub fn data_pages(&self) -> u64 {
        self.data_pages
    }

    /// Cuts guest-physical memory into at most `pieces` parts of (nearly) the same size: address and
    /// size in bytes, multiples of 4 KiB, in ascending order and without gaps.
    #[must_use]
    pub fn split(&self, pieces: usize) -> Vec<(u64, u64)> {
        let pages = self.memory / PAGE;
        let n = (pieces.max(1) as u64).min(pages);
        let at = |i: u64| pages * i / n * PAGE;
        (0..n).map(|i| (at(i), at(i + 1) - at(i))).collect()
    }
}
