// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The address spaces of `switch`, the words in them, and what they must hold after.
//!
//! Each vCPU has [`OWN`] address spaces of its own. It runs in these and in those of the vCPU before it
//! (its own again, if it is the only one): [`REACH`] in all, so that a space may be in use on two vCPUs.
//! A space has [`SLOTS`] *slots*, each of which is translated by one entry that one vCPU edits:
//!
//! | slots | entry | edited by | shows |
//! | --- | --- | --- | --- |
//! | 0 to 7 | of the page table | its owner | a private page of the space |
//! | 8 to 15 | of the page table | its owner | a page that all spaces share |
//! | 16 to 29 | of the page table | the vCPU after its owner | a page that all spaces share |
//! | 30, 31 | of the page directory | its owner; the vCPU after it | 2M of memory: as a page, or by a page table of its own |
//!
//! Nobody waits for anybody: a vCPU edits a table whether it is loaded nowhere, here, or on another vCPU.
//!
//! # What may be seen
//!
//! Every slot has a [record](RECORD) with the versions of its entry. Its editor writes the new entry
//! into the record, counts [`BEGUN`] up, stores the entry, and counts [`DONE`] up. Who flushes a slot
//! reads [`DONE`] before. From then on an access may meet any version from that one on to the one that
//! [`BEGUN`] says after the access, and no other: until its next flush a processor may use an old
//! translation, after it no older one (SDM vol. 3, 5.10.4; AMD APM vol. 2, 5.5).
//!
//! What an access met is known: every page begins with its own address ([`TAG`]), and a fault says
//! which rights the entry lacks. Where a store went is looked up in the mirror, which maps the pages
//! of all slots and tables by entries that never change.
//!
//! # What stays
//!
//! A store through a slot that its own vCPU edits, and has flushed since, goes where the vCPU's own
//! program says: into the vCPU's word at [`KEPT`] of that page. Any other store goes to its word at
//! [`RACING`], and is taken back when it has been found. So everything but the versions read at
//! flushes follows from the seed and the number of turns, and [`Model`] computes it.

mod model;
mod spaces;

pub use model::{Counts, Model};
pub use spaces::Spaces;

use super::paging::PAGE;

/// Address spaces of each vCPU.
pub const OWN: usize = 3;
/// Address spaces that a vCPU runs in, and edits: its own, then those of the vCPU before it.
pub const REACH: usize = 2 * OWN;
/// Slots of a space.
pub const SLOTS: usize = 32;
/// First slot that shows shared pages.
pub const SHARED_SLOT: usize = 8;
/// First slot that another vCPU than the owner edits.
pub const FOREIGN_SLOT: usize = 16;
/// First slot of 2M.
pub const LARGE_SLOT: usize = 30;

/// Private pages of a space.
pub const PRIVATE_PAGES: u64 = 4;
/// Pages that all spaces share.
pub const SHARED_PAGES: u64 = 16;
/// First page of 2M of memory that is a page of a slot of 2M: only these are looked at.
pub const PROBE: u64 = 508;
/// Their number.
pub const PROBES: u64 = 4;
/// Index of slot [`LARGE_SLOT`] in the page directory. The page table has index 0.
pub const LARGE_INDEX: u64 = 8;

/// What is at a page offset of a space's memory.
pub mod block {
    use super::{PAGE, PRIVATE_PAGES};

    /// The table that CR3 points at.
    pub const ROOT: u64 = 0;
    /// The table below it.
    pub const DIRECTORY_POINTERS: u64 = PAGE;
    /// The page directory.
    pub const DIRECTORY: u64 = 2 * PAGE;
    /// The page table of the slots of 4K.
    pub const TABLE: u64 = 3 * PAGE;
    /// For each slot of 2M the page table that it is split by.
    pub const SPLIT: u64 = 4 * PAGE;
    /// The slots' records.
    pub const RECORDS: u64 = 6 * PAGE;
    /// The private pages.
    pub const PRIVATE: u64 = 7 * PAGE;
    /// Pages in all.
    pub const PAGES: u64 = 7 + PRIVATE_PAGES;
}

/// Bytes of a record.
pub const RECORD: u64 = 128;
/// Record: the version that is stored next, or was stored last.
pub const BEGUN: u64 = 0;
/// Record: the version that was stored last.
pub const DONE: u64 = 8;
/// Record: version v of the entry is word v mod [`KNOWN`] from here on.
pub const HISTORY: u64 = 64;
/// Versions in a record.
pub const KNOWN: u64 = 8;

/// Top 16 bits of a page's first word; the others are its guest-physical address.
pub const TAG: u64 = 0xa5c3 << 48;
/// Offset in a page of the vCPUs' words that stay.
pub const KEPT: u64 = 0x400;
/// Offset in a page of the vCPUs' words that are taken back.
pub const RACING: u64 = 0x800;
/// Lowest of the bits of a page-directory entry that the processor ignores and the program says in how
/// the slot is split: which 2M of memory, and by how many pages the pages are rotated.
pub const CODE_SHIFT: u32 = 52;
/// Bits of the first.
pub const VIEW_BITS: u32 = 2;

/// Byte offsets in a vCPU's page of arguments and results.
pub mod desk {
    /// Generator when the program ended.
    pub const GENERATOR: u64 = 0x00;
    /// Stores that the program tried to make through slots.
    pub const STORES: u64 = 0x08;
    /// Number of the space it ran in last.
    pub const CURRENT: u64 = 0x10;
    /// Guest-physical address of the mirror.
    pub const BASE: u64 = 0x18;
    /// Offset in the mirror of the shared pages.
    pub const SHARED: u64 = 0x20;
    /// Number of the last 2M that slots of 2M show.
    pub const LAST_VIEW: u64 = 0x28;
    /// What was met and compared.
    pub const CHECKS: u64 = 0x30;
    /// Of these: not with all versions that it could be, because too many had been stored meanwhile.
    pub const LOOSE: u64 = 0x38;
    /// For each space in reach: which slots this vCPU edits.
    pub const MINE: u64 = 0x80;
    /// For each space in reach: offset in the mirror.
    pub const BLOCKS: u64 = 0xc0;
    /// For each slot of the current space the version that was stored when it was flushed last.
    pub const SEEN: u64 = 0x400;
}
