// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of the memory map: memslots and aliases.
//!
//! Each change publishes one map, after which new operations see it; waits for the readers of the
//! old one; takes away what was derived from it; and waits until no processor uses that. Creating a
//! slot takes nothing away.

use super::flush::Narrowing;
use super::location::Location;
use super::spte::{MMIO_GENERATION_BITS, Spte};
use super::{Engine, FrameId};
use crate::addr::Gpa;
use crate::memory::{
    Alias, AliasError, DirtyMode, MemoryMap, Page, Slot, SlotConfig, SlotError, SlotFlags, SlotId,
};
use crate::sync::epoch::{Guard, Handle};
use crate::sync::{Mark, WouldDeadlock, lock, rule};
use core::ops::Range;
use std::sync::Arc;

/// Who still holds the memory of a slot that was deleted. No reader, shadow entry or vCPU does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Release {
    /// Snapshots ([`crate::Mmu::memory`]) of maps with the slot.
    pub snapshots: usize,
    /// Pages of it that are pinned ([`crate::memory::PinnedPage`]).
    pub pinned_pages: u64,
    /// Whether anybody does, were it only a thread that is dropping its snapshot just now.
    pub held: bool,
}

impl Release {
    /// Whether the engine's hold on the memory was the last one: the backing has been dropped by the
    /// engine.
    #[must_use]
    pub fn is_complete(self) -> bool {
        !self.held
    }
}

impl Engine {
    /// Refuses threads that must not change the map, then runs `change` as the only writer.
    pub(super) fn change<R>(
        &self,
        refused: impl FnOnce(WouldDeadlock) -> R,
        change: impl FnOnce(&mut Handle) -> R,
    ) -> R {
        if let Err(why) = self.may_wait() {
            return refused(why);
        }
        if Mark::is_set(self.id, WouldDeadlock::Invalidating) {
            return refused(WouldDeadlock::Invalidating);
        }
        let _writer = lock(&self.writer);
        self.wait_for_invalidations();
        change(&mut self.handles.get())
    }

    /// Publishes a map. When the MMIO entries' generations begin anew, every such entry goes (R9):
    /// after the readers of older maps, which might make more of them.
    pub(super) fn publish(&self, mut map: MemoryMap, handle: &mut Handle) {
        if !map.apics().is_empty() {
            // Some of their vCPUs may be gone.
            map.set_apics(self.apic_frames());
        }
        let wraps = map.generation() % (1 << MMIO_GENERATION_BITS) == 0;
        if wraps {
            // Entries of the last map with the same number mean something again as soon as this one
            // is published: they go before. Its readers ended long ago, so no more come.
            self.zap_all();
        }
        self.memory.publish(map, handle);
        if wraps {
            self.wait_for_readers(handle);
            self.zap_all();
        }
    }

    /// Publishes a map with one slot more. Waits for other writers of the map; for readers only if
    /// too many old maps wait for them.
    pub(crate) fn create_slot(&self, config: SlotConfig) -> Result<(), SlotError> {
        let id = config.id;
        self.change(refused(id), |handle| {
            if let Some(tables) = self.frames.overlap(config.backing.machine(), config.size) {
                let machine = config.backing.machine();
                return Err(SlotError::OverlapsTables { id, machine, tables });
            }
            let map = self.memory.snapshot().with(config)?;
            self.memory_changed(&map);
            self.publish(map, handle);
            Ok(())
        })
    }

    /// Deletes a slot. When this returns no reader, shadow entry or vCPU uses its memory.
    ///
    /// R8: publish without the slot, grace period, zap, flush, release.
    pub(crate) fn delete_slot(&self, id: SlotId) -> Result<Release, SlotError> {
        self.change(refused(id), |handle| {
            let (hidden, slot) = self.memory.snapshot().hiding(id)?;
            self.memory_changed(&hidden);
            // R27: what the slot's memory is found by from its entries stays until these are gone.
            let hidden = if rule!(R27) { hidden } else { hidden.forgetting(&slot) };
            self.publish(hidden, handle);
            // Faults that began on the old map have ended after this, with all their links in place.
            if rule!(R08) {
                self.wait_for_readers(handle);
            }
            self.evict(&slot, handle);
            // In a model: nothing names its memory any more.
            #[cfg(loom)]
            assert!(
                slot.region().is_unlinked() || !rule!(R08),
                "R27: a link to a slot outlives it"
            );
            if rule!(R27) {
                let map = self.memory.snapshot().forgetting(&slot);
                self.publish(map, handle);
            }
            slot.region().stop_log();
            self.memory.reclaim_all(handle);
            // The quota may follow the memory's size.
            self.shrink();
            Ok(Release {
                snapshots: self.memory.holders(slot.region()),
                pinned_pages: slot.region().pinned_pages(),
                // Maps share the slot, and slots that were changed share the region.
                held: Arc::strong_count(&slot) > 1 || Arc::strong_count(slot.region()) > 1,
            })
        })
    }

    /// Moves a slot: after one map with it at the old place comes one with it at the new place. When
    /// this returns nobody finds its memory at the old one.
    pub(crate) fn move_slot(&self, id: SlotId, base: Gpa) -> Result<(), SlotError> {
        self.change(refused(id), |handle| {
            let map = self.memory.snapshot();
            let moved = map.moving(id, base)?;
            let Some(slot) = map.by_id(id).filter(|slot| slot.base() != base.gfn()) else {
                return Ok(());
            };
            self.publish(moved, handle);
            // R08, as in `delete_slot`.
            if rule!(R08) {
                self.wait_for_readers(handle);
            }
            self.evict(slot, handle);
            Ok(())
        })
    }

    /// Changes a slot's flags. When this returns every processor obeys them.
    pub(crate) fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<(), SlotError> {
        self.change(refused(id), |handle| {
            let map = self.memory.snapshot();
            let old = map.by_id(id).ok_or(SlotError::NoSuchSlot(id))?;
            let before = old.flags();
            if before == flags {
                return Ok(());
            }
            if before.dirty == DirtyMode::Off && flags.dirty != before.dirty {
                old.region().start_log().then_some(()).ok_or(SlotError::LogInUse(id))?;
            }
            if flags.dirty == DirtyMode::DirtyBits {
                old.region().set_dirty_bits(true);
            }
            self.publish(map.flagged(id, flags)?, handle);
            // R13: faults that obeyed the old flags have ended after this.
            if rule!(R13) {
                self.wait_for_readers(handle);
            }
            if flags.dirty == DirtyMode::Off {
                old.region().stop_log();
            }
            if before.read_only && !flags.read_only {
                // R35: what was derived from its guest tables need not have A set there.
                self.zap_shadows(old, 0..old.pages() as usize, handle);
            }
            let logs = flags.dirty == DirtyMode::WriteProtect && flags.dirty != before.dirty;
            let settled =
                self.for_mapped(old, 0..old.pages() as usize, handle, |guard, page, n| {
                    if logs || flags.read_only && !before.read_only {
                        self.protect(guard, page, n, &self.stats);
                    } else if flags.dirty == DirtyMode::DirtyBits && before.dirty == DirtyMode::Off
                    {
                        self.clean(page, n);
                    }
                });
            self.wait_acknowledged(settled);
            if flags.dirty == DirtyMode::Off && before.dirty != DirtyMode::Off {
                self.collapse(old, handle);
            }
            if before.dirty == DirtyMode::DirtyBits && flags.dirty != before.dirty {
                // R11: whoever took such an entry away has recorded it after this.
                self.wait_for_readers(handle);
                old.region().set_dirty_bits(false);
            }
            Ok(())
        })
    }

    /// Tears down the tables whose pages may be mapped whole again, now that the slot's log is off.
    fn collapse(&self, slot: &Arc<Slot>, handle: &Handle) {
        let mut guard = handle.pin();
        for (_, rmap) in slot.region().rmap.iter() {
            let mut direct = None;
            rmap.for_each(|word| {
                let frame = Location::from_word(word).frame();
                let role = self.frames.page(frame).key().role();
                if role.is_direct() && role.level() == 1 {
                    direct = Some(frame);
                }
            });
            if let Some(frame) = direct.filter(|_| self.shape.largest > 1) {
                self.tear_down(&guard, frame);
            }
            guard.repin();
        }
        guard.flush();
    }

    /// Sets an alias. When this returns no processor uses what its range named before.
    pub(crate) fn set_alias(&self, alias: Alias) -> Result<(), AliasError> {
        self.change_aliases(alias.number, |map| map.with_alias(alias))
    }

    /// Removes an alias. When this returns no processor uses what it named.
    pub(crate) fn remove_alias(&self, number: u32) -> Result<(), AliasError> {
        self.change_aliases(number, |map| map.without_alias(number))
    }

    fn change_aliases(
        &self,
        number: u32,
        next: impl FnOnce(&MemoryMap) -> Result<MemoryMap, AliasError>,
    ) -> Result<(), AliasError> {
        let refused = |why| Err(AliasError::WouldDeadlock { number, why });
        self.change(refused, |handle| {
            let map = next(&self.memory.snapshot())?;
            self.publish(map, handle);
            self.wait_for_readers(handle);
            self.wait_acknowledged(self.zap_all());
            Ok(())
        })
    }

    /// Takes away everything that maps the slot's memory or was derived from guest tables in it, and
    /// waits until no vCPU uses it. No fault may be making more of it.
    fn evict(&self, slot: &Arc<Slot>, handle: &mut Handle) {
        self.zap_shadows(slot, 0..slot.pages() as usize, handle);
        self.for_mapped(slot, 0..slot.pages() as usize, handle, |guard, page, narrowing| {
            self.drop_mappings(guard, page, narrowing);
        });
        // Whoever swapped an entry of the slot out did so in a read section: after this it has been
        // recorded and unlinked, so that the wait covers it, and a new slot over the same machine
        // memory starts clean.
        self.wait_for_readers(handle);
        self.wait_acknowledged(self.flush.cover());
    }

    /// Tears down the shadows of guest tables in these pages.
    pub(super) fn zap_shadows(&self, slot: &Slot, pages: Range<usize>, handle: &Handle) {
        let mut guard = handle.pin();
        for (_, shadows) in slot.region().shadows.iter_range(pages) {
            for frame in shadows.to_vec() {
                self.tear_down(&guard, FrameId((frame - 1) as u32));
            }
            guard.repin();
        }
        guard.flush();
    }

    /// Empties every entry that maps the page.
    pub(super) fn drop_mappings(
        &self,
        guard: &Guard<'_>,
        page: Page<'_>,
        narrowing: &mut Narrowing<'_>,
    ) {
        let Some(rmap) = page.region().rmap.get(page.index) else { return };
        let machine = page.machine();
        let other = |now: Spte| now.is_present() && now.machine() != machine;
        for word in rmap.to_vec() {
            self.drop_entry(guard, narrowing, Location::from_word(word), other);
        }
    }
}

fn refused<R>(id: SlotId) -> impl FnOnce(WouldDeadlock) -> Result<R, SlotError> {
    move |why| Err(SlotError::WouldDeadlock { id, why })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::Gpa;
    use crate::addr::LEVELS;
    use crate::memory::AllocatedMemory;
    use crate::shadow::{Downgrade, Processor, Shape};
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
        let engine = Engine::new(
            tables,
            Shape { levels: LEVELS, largest: 1, unsync: true, reserved: None },
            Collector::new(),
        );
        let memory = Arc::new(AllocatedMemory::new(1 << 12));
        engine.create_slot(SlotConfig::new(0, Gpa(0), memory)).unwrap();
        let slot = Arc::clone(engine.memory.snapshot().by_id(SlotId(0)).unwrap());
        let at = Location::new(FrameId(0), 0);
        let rmap = slot.region().rmap.get_or_alloc(0);
        rmap.add(at.word());
        let [held, narrowing, release, done]: [AtomicBool; 4] = Default::default();
        let (_, mut vcpu) = engine.flush.join(Arc::new(Polled));
        let mut told = Vec::new();
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
            s.spawn(|| {
                engine.delete_slot(SlotId(0)).unwrap();
                done.store(true, Ordering::Release);
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
                        vcpu.drain(&engine.flush, |downgrade| told.push(downgrade));
                        if vcpu.enter() {
                            break;
                        }
                    }
                }
            }
            let record = Downgrade::Entry { entry: at, gva: None };
            assert!(told.contains(&record), "R08: deleted under a stale translation");
        });
    }
}
