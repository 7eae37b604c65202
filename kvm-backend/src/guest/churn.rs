// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of `churn`: what the host writes into memory that it adds to a running guest, what the
//! guest writes there, and what may be there at any moment.
//!
//! A page of such a memory begins with its [`identity`]. From [`LANES`] on each vCPU has a word of
//! its own, zero at first, for [`Lane`]s; all other words hold [`filler`]. A vCPU cannot know which
//! memory its store meets, for the host may change that between any two instructions; so a lane says
//! only who wrote it, through which page of the window, and as its how-manieth: all three can be
//! checked wherever it is found. Where nothing changed around a store, the vCPU does know, and enters
//! identity and number in its [`Ledger`]: the lane of that page must never be older again.
//!
//! Memory that was taken from the guest is filled with [`poison`], which is none of these words.

use super::layout::{CHURN_PAGES, DENSE_PAGES, Layout, MAX_VCPUS, SPARSE_PAGES, TAIL_PAGES};
use super::paging::PAGE;
use super::programs::mix;
use thiserror::Error;

/// What a device answers where the window has no memory.
pub const HOLE: u64 = u64::MAX;
/// Offset of the identity in a page.
pub const IDENTITY: u64 = 0;
/// Offset of the vCPUs' counts in a page that stays.
pub const COUNTS: u64 = 0x200;
/// Offset of the vCPUs' words in a page of the window.
pub const LANES: u64 = 0x800;
/// Offset in a ledger of the number of the vCPU's next or last store.
pub const NEXT: u64 = CHURN_PAGES * LEDGER_ENTRY;
/// Bytes of an entry of a ledger: number, identity.
const LEDGER_ENTRY: u64 = 16;
/// Bytes of a state: version (odd while it is written), two identities, rights.
pub const STATE: u64 = 32;
/// State: stores go to memory.
pub const WRITABLE: u64 = 1;
/// State: stores go to the device.
pub const READ_ONLY: u64 = 2;
/// Number of the memory that is there from start to end: the pages that the vCPUs count in.
pub const STABLE: u64 = 1;
/// Its pages.
pub const STABLE_PAGES: u64 = DENSE_PAGES + SPARSE_PAGES;

/// Bits of a store's number in a lane.
pub(super) const NUMBER_BITS: u32 = 50;
/// Bits of the page of the window in a lane.
pub(super) const PLACE_BITS: u32 = CHURN_PAGES.ilog2();
/// Factor of the check in an identity.
pub(super) const CHECK: u64 = 0x9e37_79b9_7f4a_7c15;
/// Top byte of a count.
pub(super) const COUNT_TAG: u64 = 0xa5;

/// The first word of page `page` of memory `memory` (below 2^40). Sixteen bits check the others.
#[must_use]
pub fn identity(memory: u64, page: u64) -> u64 {
    let name = (memory << 8 | page) & (u64::MAX >> 16);
    name << 16 | !name.wrapping_mul(CHECK) >> 48
}

/// Memory and page of an identity, if it is one.
#[must_use]
pub fn identified(word: u64) -> Option<(u64, u64)> {
    let name = word >> 16;
    (identity(name >> 8, name & 0xff) == word).then_some((name >> 8, name & 0xff))
}

/// A word of a page that nobody writes.
#[must_use]
pub fn filler(identity: u64, offset: u64) -> u64 {
    mix(offset, identity)
}

/// A word of memory number `memory` after it was taken from the guest.
#[must_use]
pub fn poison(memory: u64, offset: u64) -> u64 {
    // No vCPU has a number as high as the top bits say.
    let word = 0xdead << 48 | (memory & 0xff_ffff) << 24 | (offset & 0xff_ffff);
    if identified(word).is_some() { word ^ 1 } else { word }
}

/// What vCPU `id` has in its word of page `page` of the pages that stay, after `passes` passes.
#[must_use]
pub fn count(page: u64, id: u64, passes: u64) -> u64 {
    COUNT_TAG << 56 | page << 48 | id << 40 | passes
}

/// Guest-physical address of a page that stays.
#[must_use]
pub fn stable_gpa(layout: &Layout, page: u64) -> u64 {
    match page.checked_sub(DENSE_PAGES) {
        None => layout.data_gpa() + page * PAGE,
        Some(page) => layout.overlap_gpa() + page * PAGE,
    }
}

/// A vCPU's word in a page of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// The vCPU.
    pub vcpu: u64,
    /// Page of the window through which it was written.
    pub place: u64,
    /// Number of the store among the vCPU's, from 1.
    pub number: u64,
}

impl Lane {
    /// As a word.
    #[must_use]
    pub fn word(self) -> u64 {
        (self.vcpu << PLACE_BITS | self.place) << NUMBER_BITS | self.number
    }

    /// From a word.
    #[must_use]
    pub fn of(word: u64) -> Self {
        let place = word >> NUMBER_BITS & (CHURN_PAGES - 1);
        let number = word & (u64::MAX >> (64 - NUMBER_BITS));
        Self { vcpu: word >> (NUMBER_BITS + PLACE_BITS), place, number }
    }
}

/// Guest-physical memory, one word at a time, while vCPUs write it.
pub type Word<'a> = &'a dyn Fn(u64) -> u64;

/// A vCPU's ledger: for each page of the window the last of its stores through it of which it is
/// sure which memory it went to.
#[derive(Clone, Copy, Debug)]
pub struct Ledger {
    gpa: u64,
}

impl Ledger {
    /// That of vCPU `id`: the first page of its tail.
    #[must_use]
    pub fn of(layout: &Layout, id: usize) -> Self {
        Self { gpa: layout.tails_gpa() + id as u64 * TAIL_PAGES * PAGE }
    }

    /// The entry of a page of the window: number and identity. `None` if there is none, or while it
    /// is written.
    #[must_use]
    pub fn entry(self, word: Word<'_>, place: u64) -> Option<(u64, u64)> {
        let at = self.gpa + place * LEDGER_ENTRY;
        // The vCPU clears the identity, stores the number, stores the identity; numbers grow. So an
        // identity found between two reads of one number belongs to it.
        let number = word(at);
        let identity = word(at + 8);
        (number == word(at) && identity != 0).then_some((number, identity))
    }

    /// The number of the vCPU's last store, or of one that it has not made yet.
    #[must_use]
    pub fn last(self, word: Word<'_>) -> u64 {
        word(self.gpa + NEXT)
    }
}

/// The first wrong word of a memory.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("memory {memory}: {what} at offset {offset:#x}: expected {expected:#x}, seen {seen:#x}")]
pub struct Wrong {
    /// What the word is.
    pub what: &'static str,
    /// The memory's number.
    pub memory: u64,
    /// Offset in the memory.
    pub offset: u64,
    /// What should be there, or a bound of it.
    pub expected: u64,
    /// What is there.
    pub seen: u64,
}

/// What a page's lanes may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lanes {
    /// Bit n: the guest may have seen the page as page n of the window.
    pub places: u128,
    /// For each vCPU the least number that its lane must have, from the ledgers.
    pub floors: Vec<u64>,
}

/// Checks the lanes of one page. `last` gives the number of a vCPU's last store, and is asked after
/// the lane was read; so vCPUs may run meanwhile.
///
/// # Errors
///
/// The first lane that no vCPU can have written there, or that is older than it must be.
pub fn check_lanes(
    memory: u64,
    page: u64,
    lanes: &Lanes,
    word: Word<'_>,
    last: &dyn Fn(usize) -> u64,
) -> Result<(), Wrong> {
    for vcpu in 0..MAX_VCPUS {
        let offset = page * PAGE + LANES + vcpu as u64 * 8;
        let seen = word(offset);
        let wrong = |what, expected| Err(Wrong { what, memory, offset, expected, seen });
        let floor = lanes.floors.get(vcpu).copied();
        if seen == 0 {
            match floor {
                Some(floor) if floor > 0 => return wrong("lost store", floor),
                _ => continue,
            }
        }
        let lane = Lane::of(seen);
        let Some(floor) = floor else { return wrong("lane of no vCPU", 0) };
        if lane.vcpu != vcpu as u64 {
            return wrong("lane of another vCPU", vcpu as u64);
        }
        if lanes.places >> lane.place & 1 == 0 {
            return wrong("store through a page that was elsewhere", lane.place);
        }
        if lane.number < floor {
            return wrong("lost store", floor);
        }
        let last = last(vcpu);
        if lane.number > last {
            return wrong("store that was never made", last);
        }
    }
    Ok(())
}

/// Whether the word of a page is a vCPU's.
pub(super) fn is_lane(offset: u64) -> bool {
    (LANES..LANES + MAX_VCPUS as u64 * 8).contains(&offset)
}

/// Writes a page of a memory that is new to the guest.
pub fn fill_page(memory: u64, page: u64, write: &mut dyn FnMut(u64, u64)) {
    for offset in (0..PAGE).step_by(8) {
        write(page * PAGE + offset, fresh(identity(memory, page), offset).unwrap_or(0));
    }
}

/// What nobody but the host writes: identity and filler; `None` for lanes.
fn fresh(identity: u64, offset: u64) -> Option<u64> {
    match offset {
        IDENTITY => Some(identity),
        _ if is_lane(offset) => None,
        _ => Some(filler(identity, offset)),
    }
}

/// Checks what nobody but the host writes in a page.
///
/// # Errors
///
/// The first wrong word.
pub fn check_filler(memory: u64, page: u64, word: Word<'_>) -> Result<(), Wrong> {
    let identity = identity(memory, page);
    for at in (0..PAGE).step_by(8) {
        let Some(expected) = fresh(identity, at) else { continue };
        let offset = page * PAGE + at;
        let seen = word(offset);
        if seen != expected {
            let what = if at == IDENTITY { "identity" } else { "filler" };
            return Err(Wrong { what, memory, offset, expected, seen });
        }
    }
    Ok(())
}

/// Checks that nobody has written a memory of `pages` pages since it was poisoned.
///
/// # Errors
///
/// The first word that somebody has written.
pub fn check_poison(memory: u64, pages: u64, word: Word<'_>) -> Result<(), Wrong> {
    for offset in (0..pages * PAGE).step_by(8) {
        let (expected, seen) = (poison(memory, offset), word(offset));
        if seen != expected {
            let what = "store to memory that was taken away";
            return Err(Wrong { what, memory, offset, expected, seen });
        }
    }
    Ok(())
}
