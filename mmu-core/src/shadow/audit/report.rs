// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an audit says.

use crate::addr::Gfn;
use crate::shadow::Location;

/// What a clean audit counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditReport {
    /// Present leaf entries.
    pub sptes: u64,
    /// Live shadow pages.
    pub pages: u64,
    /// Pages from before everything was zapped that are not torn down yet.
    pub obsolete: u64,
    /// Retired pages whose frames are not free yet.
    pub retired: u64,
}

/// The first disagreement that an audit found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Disagreement {
    /// Operations are in flight: the audit needs a quiescent engine.
    #[error("{0} narrowings are in flight: the engine is not quiescent")]
    NotQuiescent(u64),
    /// A live page is not found by its key, or by the PDPTE registers that it stands for, or the hash finds
    /// one that is not live.
    #[error("the hash and the page in frame {frame} (guest frame {gfn}) disagree")]
    Hash {
        /// The page's frame.
        frame: u32,
        /// What it shadows; of a root of PAE paging its number.
        gfn: Gfn,
    },
    /// An entry is pending or frozen although nothing is in flight.
    #[error("{at:?} of a page at level {level} holds {value:#x}, left by an unfinished operation")]
    Unfinished {
        /// The entry.
        at: Location,
        /// The page's level.
        level: u8,
        /// The entry's value.
        value: u64,
    },
    /// An entry maps what the guest's tables or the memory map do not grant.
    #[error("{at:?} of a page at level {level} holds {value:#x}: {why}")]
    Entry {
        /// The entry.
        at: Location,
        /// The page's level.
        level: u8,
        /// The entry's value.
        value: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A reverse map, a list of parents or of shadows does not match the entries.
    #[error("{list} of {owner:#x} holds {listed} links to {location:?}, the tables {present}")]
    Links {
        /// Which list.
        list: &'static str,
        /// Guest frame or table frame that the list belongs to.
        owner: u64,
        /// The entry that the list names.
        location: Location,
        /// How often the list names it.
        listed: usize,
        /// How often it should.
        present: usize,
    },
    /// A table is, or points at, one that the guest writes natively, and a table above does not know.
    #[error("frame {frame} is not in sync, and frame {above} above does not know: R33")]
    Unmarked {
        /// Frame of the table.
        frame: u32,
        /// Frame of the table above.
        above: u32,
    },
    /// The count of guest tables in a block is wrong.
    #[error(
        "the block at {machine:#x}, for a leaf at level {level}, counts {counted} shadowed guest tables"
    )]
    Count {
        /// Level of the leaf that would map the block.
        level: u8,
        /// Machine address of the block.
        machine: u64,
        /// What it counts.
        counted: u64,
    },
    /// The quota counts other frames than are used.
    #[error("{used} table frames are used, the quota counts {counted}")]
    Quota {
        /// Frames that the quota counts.
        counted: u64,
        /// Frames that hold a page, or held one that processors may still remember.
        used: u64,
    },
    /// A page is counted as the root of more or fewer vCPUs than have it.
    #[error("frame {frame} is counted as root {counted} times, vCPUs have it {held} times: R19")]
    Roots {
        /// The page's frame.
        frame: u32,
        /// What it counts.
        counted: u32,
        /// Uses by vCPUs.
        held: u32,
    },
    /// A page that was torn down still has something in it or pointing at it.
    #[error("frame {frame} was torn down, but {why}")]
    Dead {
        /// The frame.
        frame: u32,
        /// What is left.
        why: &'static str,
    },
}
