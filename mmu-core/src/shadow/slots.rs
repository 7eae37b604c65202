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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::Gpa;
    use crate::memory::AllocatedMemory;
    use crate::shadow::Processor;
    use crate::sync::epoch::Collector;
    use crate::sync::{AtomicBool, Ordering};
    use std::sync::Arc;
    use std::thread::{scope, sleep, yield_now};
    use std::time::Duration;

    struct Polled;
    impl Processor for Polled {
        fn kick(&self) {}
    }

    const SHORT: Duration = Duration::from_millis(50);

    fn until(flag: &AtomicBool) {
        while !flag.load(Ordering::Acquire) {
            yield_now();
        }
    }

    /// R8: a deletion meets an entry that another thread has taken away and not recorded yet. The
    /// vCPU must have drained that record, too, when the deletion returns.
    #[test]
    fn a_deletion_waits_for_narrowings_in_flight() {
        let tables = Arc::new(AllocatedMemory::new(1 << 20));
        let engine = Engine::new(tables, None, Collector::new());
        let memory = Arc::new(AllocatedMemory::new(1 << 12));
        engine.create_slot(SlotConfig::new(0, Gpa(0), memory)).unwrap();
        let slot = Arc::clone(engine.memory.snapshot().by_id(SlotId(0)).unwrap());
        let at = Location::new(FrameId(0), 0);
        let rmap = slot.state().rmap.get_or_alloc(0);
        rmap.add(at.word());
        let [held, narrowing, release, done]: [AtomicBool; 4] = Default::default();
        let (_, mut vcpu) = engine.flush.join(Arc::new(Polled));
        let mut seen = vcpu.drain(&engine.flush, |_| ());
        assert!(vcpu.enter());
        scope(|s| {
            // Stops the deletion at its scan.
            s.spawn(|| {
                rmap.for_each(|_| {
                    held.store(true, Ordering::Release);
                    until(&release);
                });
            });
            until(&held);
            let deletion = s.spawn(|| {
                engine.delete_slot(SlotId(0)).unwrap();
                let covers = engine.flush.now();
                done.store(true, Ordering::Release);
                covers
            });
            sleep(SHORT);
            s.spawn(|| {
                let handle = engine.collector.register();
                let _guard = handle.pin();
                let mut mine = engine.flush.narrow();
                narrowing.store(true, Ordering::Release);
                sleep(SHORT);
                mine.entry(at, None);
            });
            until(&narrowing);
            release.store(true, Ordering::Release);
            while !done.load(Ordering::Acquire) {
                if vcpu.has_requests() {
                    vcpu.leave();
                    loop {
                        vcpu.take_requests();
                        seen = vcpu.drain(&engine.flush, |_| ());
                        if vcpu.enter() {
                            break;
                        }
                    }
                }
            }
            assert!(seen >= deletion.join().unwrap(), "R08: deleted under a stale translation");
        });
    }
}
