// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-physical memory: memslots and the map of them that readers see.
//!
//! A [`MemoryMap`] is immutable. Writers build the next one and publish it through an
//! epoch-protected pointer; a reader pins, loads the pointer once, and uses that one map for the
//! whole operation (R31). Holders that outlive a pin take the same map as an `Arc`
//! ([`crate::Mmu::memory`]). What successive maps share of a slot, its dirty bitmap and its reverse
//! maps, lives in the slot itself.

mod backing;
mod error;
mod index;
mod map;
mod slot;
#[cfg(all(feature = "vm-memory", not(loom)))]
mod vm_memory;

pub(crate) use backing::PAGE_WORDS;
pub use backing::{AllocatedMemory, Backing, OutOfMemory};
pub use error::SlotError;
pub(crate) use index::View;
pub use map::{Hint, MemoryMap};
pub(crate) use map::{exchange_masked, store_masked};
pub use slot::{Slot, SlotConfig, SlotId};
#[cfg(all(feature = "vm-memory", not(loom)))]
pub use vm_memory::{RegionError, VmMemoryRegion};

use crate::sync::epoch::{Guard, Handle};
use crate::sync::{Backoff, Door, Limbo, Published};
use std::sync::Arc;

/// The published map and its writer's side.
///
/// Calls that publish must be serialised by the caller; readers need nothing.
#[derive(Debug)]
pub(crate) struct Memory {
    published: Published<MemoryMap>,
    door: Door<MemoryMap>,
    old: Limbo<Arc<MemoryMap>>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        let empty = Arc::new(MemoryMap::empty());
        Self {
            published: Published::new(Arc::clone(&empty)),
            door: Door::new(empty),
            old: Limbo::new(),
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

    pub(crate) fn publish(&self, map: MemoryMap, handle: &Handle) {
        let map = Arc::new(map);
        self.door.store(Arc::clone(&map));
        self.published.replace(map, &self.old, &handle.pin());
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
            if self.old.is_empty() {
                return;
            }
            backoff.wait();
        }
    }
}
