// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-physical memory: memslots and the map of them that readers see.
//!
//! A [`MemoryMap`] is immutable. Writers build the next one and publish it through an
//! epoch-protected pointer; a reader pins, loads the pointer once, and uses that one map for the
//! whole operation (R31). Holders that outlive a pin take the same map as an `Arc`
//! ([`crate::Mmu::memory`]). What successive maps share of a slot, its dirty bitmap and its reverse
//! maps, lives in the slot itself.

mod alias;
mod backing;
mod dirty;
mod error;
mod invalid;
mod map;
mod pin;
mod ranges;
mod region;
mod ring;
mod slot;
#[cfg(all(feature = "vm-memory", not(loom)))]
mod vm_memory;
pub(crate) mod words;

pub use alias::{Alias, AliasError, MAX_ALIASES};
pub(crate) use backing::PAGE_WORDS;
pub use backing::{AllocatedMemory, Backing, OutOfMemory};
#[cfg(all(feature = "vm-memory", not(loom)))]
pub use dirty::DirtyLogSlice;
pub use dirty::{DirtyLog, Runs, runs};
pub use error::SlotError;
pub(crate) use invalid::Invalid;
pub(crate) use map::View;
pub use map::{Hint, MAX_SLOTS, MemoryMap};
pub use pin::{PinnedAccessError, PinnedPage};
pub(crate) use region::Region;
pub use ring::{DirtyPage, DirtyRing, RingError};
pub(crate) use slot::Page;
pub use slot::{DirtyMode, Slot, SlotConfig, SlotFlags, SlotId};
#[cfg(all(feature = "vm-memory", not(loom)))]
pub use vm_memory::{RegionError, VmMemoryRegion};

use crate::sync::epoch::{Guard, Handle};
use crate::sync::{Backoff, CachePadded, Door, Limbo, Mutex, Published, lock};
use std::sync::{Arc, Weak};

/// The published map and its writer's side.
///
/// Calls that publish must be serialised by the caller; readers need nothing.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Apart from what writers need besides.
    published: CachePadded<Published<MemoryMap>>,
    door: Door<MemoryMap>,
    old: Limbo<Arc<MemoryMap>>,
    /// Every map that somebody may still hold.
    history: Mutex<Vec<Weak<MemoryMap>>>,
}

/// Old maps that may wait for readers; a writer that would leave more of them waits itself. So a
/// reader that never ends its section stops writers, and garbage does not grow.
pub const MAX_OLD_MAPS: u64 = if cfg!(loom) { 2 } else { 64 };

impl Memory {
    pub(crate) fn new() -> Self {
        let empty = Arc::new(MemoryMap::empty());
        Self {
            published: Published::new(Arc::clone(&empty)).into(),
            door: Door::new(empty),
            old: Limbo::new(),
            history: Mutex::new(Vec::new()),
        }
    }

    /// The map of this read section.
    #[inline]
    pub(crate) fn load<'g>(&self, guard: &'g Guard<'_>) -> &'g MemoryMap {
        self.published.load(guard)
    }

    /// The map for a holder that outlives a pin.
    pub(crate) fn snapshot(&self) -> Arc<MemoryMap> {
        self.door.load()
    }

    /// Publishes a map. Waits for readers only if there are too many old maps.
    pub(crate) fn publish(&self, map: MemoryMap, handle: &mut Handle) {
        let map = Arc::new(map);
        {
            let mut history = lock(&self.history);
            history.retain(|map| map.strong_count() > 0);
            history.push(Arc::downgrade(&map));
        }
        self.door.store(Arc::clone(&map));
        self.published.replace(map, &self.old, &handle.pin());
        self.reclaim();
        if self.old.len() > MAX_OLD_MAPS {
            self.reclaim_all(handle);
        }
    }

    /// Snapshots that keep the region alive, of maps that are published no longer and have no
    /// readers.
    pub(crate) fn holders(&self, region: &Region) -> usize {
        let maps: Vec<_> = lock(&self.history).iter().filter_map(Weak::upgrade).collect();
        let holding = maps.iter().filter(|map| map.has(region));
        holding.map(|map| Arc::strong_count(map) - 1).sum()
    }

    /// Drops the maps whose last reader has gone, and with them the memory of deleted slots.
    pub(crate) fn reclaim(&self) {
        self.old.drain(drop);
    }

    /// Waits for the readers of all old maps, and drops these.
    pub(crate) fn reclaim_all(&self, handle: &mut Handle) {
        let mut backoff = Backoff::default();
        loop {
            handle.synchronize();
            self.reclaim();
            if self.old.len() == 0 {
                return;
            }
            backoff.wait();
        }
    }
}
