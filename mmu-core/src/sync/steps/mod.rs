// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Steps: where a unit test may stop a thread, and what the thread holds there.
//!
//! In unit tests the atomics of the facade are newtypes that call [`point`] at each operation, and
//! whatever makes others wait says so by a [`Held`]. So a test can stop a thread at any step of an
//! operation and see who still gets on (`crate::stopped`). In every other build the atomics are
//! `core`'s own, and what is here is empty.

#[cfg(all(test, not(loom)))]
mod atomics;
#[cfg(all(test, not(loom)))]
mod shard;
#[cfg(all(test, not(loom)))]
pub(crate) mod stop;

#[cfg(all(test, not(loom)))]
pub use atomics::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, fence};
#[cfg(all(test, not(loom)))]
pub(crate) use shard::Hashing;
#[cfg(all(test, not(loom)))]
pub(crate) use stop::{Held, lock, point, waits_in_vain};

/// What a thread may hold that others may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    /// An open read section.
    ReadSection,
    /// The lock bit of a list (`sync/set.rs`).
    List,
    /// A shard of the concurrent map.
    #[cfg(not(loom))]
    Shard,
    /// A mutex of the facade, around a value of this type.
    #[cfg(all(test, not(loom)))]
    Lock(&'static str),
    /// The pool of readers for calls that belong to no vCPU.
    Pool,
    /// A vCPU that is inside the guest.
    Inside,
    /// Pages that the host has taken away.
    Away,
    /// A look at a device bus.
    Look,
    /// An access inside a device.
    Device,
    /// A cell of the ring for coalesced writes that is being filled.
    Cell,
}

/// Says, while it lives, that this thread holds something.
#[cfg(not(all(test, not(loom))))]
#[derive(Debug)]
pub(crate) struct Held;

#[cfg(not(all(test, not(loom))))]
impl Held {
    #[inline(always)]
    pub(crate) fn new(_what: What) -> Self {
        Self
    }

    /// For what is not released where it was taken.
    #[inline(always)]
    pub(crate) fn keep(self) {}

    /// The end of what was kept.
    #[inline(always)]
    pub(crate) fn end(_what: What) {}
}

/// A step at which this thread may be stopped.
#[cfg(not(all(test, not(loom))))]
#[inline(always)]
pub(crate) fn point() {}

/// A step of a wait for another thread; whether nobody else runs just now.
#[cfg(all(not(test), not(loom)))]
#[inline(always)]
pub(crate) fn waits_in_vain() -> bool {
    false
}

/// Hashes for the concurrent map.
#[cfg(all(not(test), not(loom)))]
pub(crate) type Hashing = std::hash::RandomState;
