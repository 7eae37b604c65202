// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Creating and deleting memslots.

use super::location::Location;
use super::{Engine, FrameId, Spte};
use crate::memory::{SlotConfig, SlotError, SlotId};
use crate::sync::{lock, rule};

impl Engine {
    /// Publishes a map with one slot more. Waits for other writers of the map, and for nobody else.
    pub(crate) fn create_slot(&self, config: SlotConfig) -> Result<(), SlotError> {
        let _writer = lock(&self.writer);
        if let Some(tables) = self.frames.overlap(config.backing.machine(), config.size) {
            return Err(SlotError::OverlapsTables {
                id: config.id,
                machine: config.backing.machine(),
                tables,
            });
        }
        let map = self.memory.snapshot().with(config)?;
        self.memory.publish(map, &self.collector.register());
        self.memory.reclaim();
        Ok(())
    }

    /// Deletes a slot. When this returns no reader, shadow entry or vCPU uses its memory; the
    /// backing is released with the last holder of a snapshot ([`crate::Mmu::memory`]).
    ///
    /// R8: publish without the slot, grace period, zap, flush, release.
    pub(crate) fn delete_slot(&self, id: SlotId) -> Result<(), SlotError> {
        let _writer = lock(&self.writer);
        let (hidden, slot) = self.memory.snapshot().hiding(id)?;
        let mut handle = self.collector.register();
        self.memory.publish(hidden, &handle);
        // Faults that began on the old map have ended after this, with all their links in place.
        if rule!(R08) {
            handle.synchronize();
        }
        {
            let mut guard = handle.pin();
            for (_, shadows) in slot.state().shadows.iter() {
                for frame in shadows.to_vec() {
                    self.zap(&guard, FrameId((frame - 1) as u32));
                }
                guard.repin();
            }
            for (index, rmap) in slot.state().rmap.iter() {
                let machine = slot.machine_of(index);
                let other = |now: Spte| now.is_present() && now.machine() != machine;
                for word in rmap.to_vec() {
                    let mut narrowing = self.flush.narrow();
                    self.drop_entry(&guard, &mut narrowing, Location::from_word(word), other);
                }
                guard.repin();
            }
        }
        // Whoever swapped an entry of the slot out did so in a read section: after this it has been
        // recorded and unlinked, so that the wait covers it, and a new slot over the same machine
        // memory starts clean.
        handle.synchronize();
        self.wait_acknowledged(self.flush.now());
        let map = self.memory.snapshot().forgetting(&slot);
        drop(slot);
        self.memory.publish(map, &handle);
        self.memory.reclaim_all(&mut handle);
        Ok(())
    }
}
