// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What of a stopped thread others may have to wait for.

use super::operations::Operation;
use crate::sync::steps::What;
use crate::sync::steps::stop::{Place, Stopped};
use std::collections::BTreeSet;

/// What others may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// An open read section.
    Reads,
    /// An open read section, for who is out of table frames: they come back after a grace period.
    Frames,
    /// A vCPU that is inside the guest, and neither comes out nor drains.
    Inside,
    /// Pages that the host has taken away, or a patch.
    Away,
    /// The lock bit of a list: one page's reverse map or shadows, one table's parents or unsync children.
    List,
    /// The lock of a shard of the page hash.
    Shard,
    /// The lock of the memory map's writers.
    Map,
    /// The lock of the seats, or of the quota.
    Seats,
    /// The lock of the list of vCPUs.
    Vcpus,
    /// The lock of the sums of vCPUs that are gone.
    Sums,
    /// The lock of a region's pages that are pinned for writing.
    Pins,
    /// The lock of those who collect from a dirty ring.
    Ring,
    /// The exchange of a patch's words, a few stores.
    Patch,
    /// A look at a device bus, a few loads.
    Look,
    /// The lock of a device bus's writers.
    Bus,
    /// An access inside a device.
    Device,
    /// A cell of the ring for coalesced writes that is being filled.
    Cell,
    /// The lock of those who drain that ring.
    Drain,
}

impl Cause {
    pub const ALL: [Self; 18] = [
        Self::Reads,
        Self::Frames,
        Self::Inside,
        Self::Away,
        Self::List,
        Self::Shard,
        Self::Map,
        Self::Seats,
        Self::Vcpus,
        Self::Sums,
        Self::Pins,
        Self::Ring,
        Self::Patch,
        Self::Look,
        Self::Bus,
        Self::Device,
        Self::Cell,
        Self::Drain,
    ];

    /// As the table of the documents has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reads => "a read section",
            Self::Frames => "a read section, while table frames are short",
            Self::Inside => "a vCPU inside the guest",
            Self::Away => "pages that are taken away",
            Self::List => "a list's lock bit",
            Self::Shard => "a shard of the page hash",
            Self::Map => "the lock of the map's writers",
            Self::Seats => "the lock of seats and quota",
            Self::Vcpus => "the lock of the list of vCPUs",
            Self::Sums => "the lock of the sums of former vCPUs",
            Self::Pins => "the lock of a region's written pins",
            Self::Ring => "the lock of a dirty ring's consumers",
            Self::Patch => "a patch's exchange",
            Self::Look => "a look at a bus",
            Self::Bus => "the lock of a bus's writers",
            Self::Device => "an access inside a device",
            Self::Cell => "a coalesced write half put in",
            Self::Drain => "the lock of the coalesced ring's drainers",
        }
    }

    /// What others may have to wait for of the thread that was stopped in this operation.
    pub fn of(operation: &Operation, stopped: &Stopped) -> BTreeSet<Self> {
        Self::ALL.into_iter().filter(|cause| cause.is_of(operation, stopped)).collect()
    }

    fn is_of(self, operation: &Operation, stopped: &Stopped) -> bool {
        let held = |what: &What| stopped.holds.iter().any(|(held, _)| held == what);
        match self {
            Self::Reads => held(&What::ReadSection),
            Self::Frames => operation.short && held(&What::ReadSection),
            Self::Inside => held(&What::Inside),
            Self::Away => held(&What::Away),
            Self::List => held(&What::List),
            Self::Shard => held(&What::Shard),
            Self::Look => held(&What::Look),
            Self::Device => held(&What::Device),
            Self::Cell => held(&What::Cell),
            _ => stopped.holds.iter().any(|(held, place)| match held {
                What::Lock(of) => Self::of_lock(of, place) == self,
                _ => false,
            }),
        }
    }

    /// The mutex around a value of type `of` that was locked at `place`.
    fn of_lock(of: &str, place: Place) -> Self {
        let file = file(place);
        let named = [
            ("Vec<bool>", Self::Seats),
            ("Quota", Self::Seats),
            // The list of maps that are still held: for the writers of the map alone.
            ("Weak<", Self::Map),
            // Where APICs answer: the same, and vCPUs that go.
            ("Gfn>", Self::Map),
            ("StatsSnapshot", Self::Sums),
            ("BTreeMap<usize, u64>", Self::Pins),
            ("Presence", Self::Bus),
        ];
        let by_type = named.into_iter().find(|(part, _)| of.contains(part)).map(|(_, lock)| lock);
        by_type.unwrap_or_else(|| match (file, of) {
            ("shadow/slots.rs" | "shadow/host.rs", "()") => Self::Map,
            ("shadow/flush.rs", "()") => Self::Vcpus,
            ("memory/ring.rs", "()") => Self::Ring,
            ("sync/sequence.rs", "()") => Self::Patch,
            ("mmio/coalesced.rs", "u64") => Self::Drain,
            _ => panic!("{file}:{}: a lock of {of} that has no name here", place.line()),
        })
    }
}

/// The source file of a place, below `src`.
fn file(place: Place) -> &'static str {
    place.file().rsplit_once("src/").map_or(place.file(), |(_, file)| file)
}
