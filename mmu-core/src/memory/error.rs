// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with a memory region.

use super::SlotId;
use crate::addr::{Gpa, Machine};
use crate::sync::WouldDeadlock;

/// Why a memslot could not be created, changed or deleted. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// A region must not be empty.
    #[error("{0}: the size is zero")]
    ZeroSize(SlotId),
    /// Sizes are in bytes and whole pages.
    #[error("{id}: size {size:#x} is not a multiple of 4096")]
    MisalignedSize {
        /// The slot asked for.
        id: SlotId,
        /// The size given, in bytes.
        size: u64,
    },
    /// Regions begin at a page boundary.
    #[error("{id}: guest-physical base {base} is not a multiple of 4096")]
    MisalignedBase {
        /// The slot asked for.
        id: SlotId,
        /// The base given.
        base: Gpa,
    },
    /// The region runs past the end of the 52-bit physical address space (SDM vol. 3, 5.1.4).
    #[error("{id}: {size:#x} bytes at {base} run past the 52-bit physical address space")]
    WrapsAround {
        /// The slot asked for.
        id: SlotId,
        /// The base given.
        base: Gpa,
        /// The size given, in bytes.
        size: u64,
    },
    /// Guest-physical memory of another slot is in the way.
    #[error("{id}: guest-physical range at {base} overlaps {other}")]
    Overlap {
        /// The slot asked for.
        id: SlotId,
        /// The base given.
        base: Gpa,
        /// The slot in the way.
        other: SlotId,
    },
    /// The same machine memory is in another slot: its pages could not be protected together.
    #[error("{id}: machine memory at {machine} belongs to {other} already")]
    SharedBacking {
        /// The slot asked for.
        id: SlotId,
        /// Machine address of the backing.
        machine: Machine,
        /// The slot that has it.
        other: SlotId,
    },
    /// The backing overlaps the memory of the shadow tables: the guest could write them.
    #[error("{id}: machine memory at {machine} overlaps the shadow tables at {tables}")]
    OverlapsTables {
        /// The slot asked for.
        id: SlotId,
        /// Machine address of the backing.
        machine: Machine,
        /// First machine address of the tables.
        tables: Machine,
    },
    /// The machine address of the backing is not a page, or lies outside the 52 bits that a page
    /// table entry can hold.
    #[error("{id}: the backing's machine address {machine} is misaligned or above 52 bits")]
    BadMachineAddress {
        /// The slot asked for.
        id: SlotId,
        /// Machine address of the backing.
        machine: Machine,
    },
    /// The backing is smaller than the region.
    #[error("{id}: size {size:#x} exceeds the backing's {backing:#x} bytes")]
    BackingTooSmall {
        /// The slot asked for.
        id: SlotId,
        /// The size given, in bytes.
        size: u64,
        /// The backing's size in bytes.
        backing: u64,
    },
    /// The backing's own dirty log is too short for the region.
    #[error("{id}: the backing's dirty log has {log} pages, the slot {pages}")]
    LogTooSmall {
        /// The slot asked for.
        id: SlotId,
        /// Pages of the slot.
        pages: u64,
        /// Pages of the log.
        log: u64,
    },
    /// The backing's own dirty log records for another slot, of this engine or another.
    #[error("{0}: the backing's dirty log is in use already")]
    LogInUse(SlotId),
    /// The calling thread must not wait.
    #[error("{id}: {why}")]
    WouldDeadlock {
        /// The slot asked for.
        id: SlotId,
        /// Why it must not.
        why: WouldDeadlock,
    },
    /// The slot number is in use.
    #[error("{0} exists already")]
    Exists(SlotId),
    /// The slot number is not in use.
    #[error("{0} does not exist")]
    NoSuchSlot(SlotId),
    /// The engine has as many slots as it supports.
    #[error("{id}: the limit of {limit} slots is reached")]
    TooMany {
        /// The slot asked for.
        id: SlotId,
        /// Largest number of slots.
        limit: usize,
    },
}
