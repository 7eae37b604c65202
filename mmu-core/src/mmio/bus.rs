// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The writers' side of a bus.
//!
//! Unsafe code: the published table is a bare pointer, which initiators follow within a
//! [`Look`](super::presence::Look).

use super::presence::{Look, Presence};
use super::registration::Holder;
use super::table::{Span, Table};
use super::{BusError, CoalescedRing, Device, Doorbell, Initiator, Removal, Space, Trigger};
use crate::sync::{AtomicPtr, Mutex, Ordering, fence, lock, rule, unique};
use core::fmt;
use std::sync::Arc;

/// A device bus. Clones are handles to the same.
///
/// The [module](super) says what an access finds, and who waits for whom.
#[derive(Clone)]
pub struct Bus(Arc<Shared>);

/// What a bus and its initiators share.
pub(super) struct Shared {
    pub(super) space: Space,
    /// The engine whose threads [`Removal::wait`] refuses.
    pub(super) owner: u64,
    pub(super) ring: Arc<CoalescedRing>,
    /// From `Box::into_raw`. Its pointers stand for one hold each.
    table: AtomicPtr<Table>,
    writer: Mutex<Vec<Arc<Presence>>>,
}

impl Shared {
    /// The table of this moment.
    #[inline]
    pub(super) fn table<'l>(&self, _look: &'l Look<'_>) -> &'l Table {
        // SAFETY: the table stays while the look does: R30, see `publish`. Acquire pairs with the
        // Release there.
        unsafe { &*self.table.load(Ordering::Acquire) }
    }

    /// The table that the writers' lock, which is held, keeps.
    fn last<'w>(&self, _writer: &'w [Arc<Presence>]) -> &'w Table {
        // SAFETY: only a holder of the lock frees a table. Relaxed: and only a holder stores one.
        unsafe { &*self.table.load(Ordering::Relaxed) }
    }

    /// Publishes a table. When this returns nobody looks at the old one, and accesses that are inside
    /// `removed`, which is not in the new one, hold it themselves.
    fn publish<T: ?Sized>(
        &self,
        presences: &mut Vec<Arc<Presence>>,
        table: Table,
        removed: Option<&Holder<T>>,
    ) {
        // Release: the table's contents.
        let old = self.table.swap(Box::into_raw(Box::new(table)), Ordering::Release);
        // R30: the table, fence, the words. Pairs with the fence in `Presence::look`.
        fence(Ordering::SeqCst);
        if rule!(R30) {
            presences.retain(|presence| presence.settle(removed));
        }
        #[cfg(loom)]
        if !rule!(R30) {
            // The twin frees too early; the memory stays, so that the use is reported.
            // SAFETY: as below, but for the missing wait: the memory is never freed.
            return unsafe { &*old }.end();
        }
        // SAFETY: the pointer came from a box, and only the lock's holder takes it out. An initiator
        // that looks at it was waited for; one that begins to look sees the new one.
        drop(unsafe { Box::from_raw(old) });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // No initiator is left: each holds this.
        // SAFETY: the pointer came from a box, and `&mut self` makes it ours. Relaxed for this reason.
        let table = unsafe { Box::from_raw(self.table.load(Ordering::Relaxed)) };
        let (devices, doorbells) = table.pointers();
        // SAFETY: the table's pointers stand for a hold each, left by `into_raw` when they got in.
        devices.for_each(|pointer| drop(unsafe { Holder::from_raw(pointer) }));
        // SAFETY: as above.
        doorbells.for_each(|pointer| drop(unsafe { Holder::from_raw(pointer) }));
    }
}

impl Bus {
    /// A bus without devices. Buses of one VM share a ring for coalesced writes, so that the order of
    /// a vCPU's writes to both is kept.
    #[must_use]
    pub fn new(space: Space, ring: Arc<CoalescedRing>) -> Self {
        Self::of_engine(space, ring, unique())
    }

    /// A bus of the engine with this number.
    pub(crate) fn of_engine(space: Space, ring: Arc<CoalescedRing>, owner: u64) -> Self {
        let table = AtomicPtr::new(Box::into_raw(Box::default()));
        Self(Arc::new(Shared { space, owner, ring, table, writer: Mutex::new(Vec::new()) }))
    }

    /// Its addresses.
    #[must_use]
    pub fn space(&self) -> Space {
        self.0.space
    }

    /// The ring for writes to coalesced ranges.
    #[must_use]
    pub fn coalesced(&self) -> &Arc<CoalescedRing> {
        &self.0.ring
    }

    /// A thread's way to make accesses. Make it once: it costs a lock here and two cache lines.
    ///
    /// Waits for changes of this bus.
    #[must_use]
    pub fn initiator(&self) -> Initiator {
        let presence = Arc::new(Presence::default());
        let mut presences = lock(&self.0.writer);
        // Whoever publishes later sees it, and it sees what was published before.
        presences.retain(|presence| !presence.is_gone());
        presences.push(Arc::clone(&presence));
        Initiator::new(Arc::clone(&self.0), presence)
    }

    /// Adds a device for `size` bytes from `base` on (`kvm_io_bus_register_dev`). Accesses that begin
    /// after this find it. The same device may be registered at several places.
    ///
    /// Waits for other changes of this bus, and for look-ups that are under way; takes time in
    /// proportion to the devices on the bus, about a nanosecond each.
    ///
    /// # Errors
    ///
    /// [`BusError::ZeroSize`], [`BusError::WrapsAround`], [`BusError::Overlap`].
    pub fn register(&self, base: u64, size: u64, device: Arc<dyn Device>) -> Result<(), BusError> {
        let space = self.0.space;
        // Before the lock, so that on an error the device is dropped after it.
        let holder = Holder::new(device);
        let span = Span::new(space, base, size, holder.pointer())?;
        let mut presences = lock(&self.0.writer);
        let table = self.0.last(&presences).with_device(space, span)?;
        // The table's.
        holder.into_raw();
        self.0.publish::<dyn Device>(&mut presences, table, None);
        Ok(())
    }

    /// Removes the device that begins at `base` (`kvm_io_bus_unregister_dev`). No access that begins
    /// after this finds it; the [`Removal`] says whether earlier ones are still inside, and can wait
    /// for them.
    ///
    /// Waits for other changes of this bus, and for look-ups that are under way, but for no device: it
    /// may be called inside any, also by the device for itself.
    ///
    /// # Errors
    ///
    /// [`BusError::NoDevice`].
    pub fn remove(&self, base: u64) -> Result<Removal<dyn Device>, BusError> {
        let mut presences = lock(&self.0.writer);
        let (table, pointer) = self.0.last(&presences).without_device(self.0.space, base)?;
        // SAFETY: the table's hold, which the next table does not have.
        let holder = unsafe { Holder::from_raw(pointer) };
        self.0.publish(&mut presences, table, Some(&holder));
        Ok(Removal::new(holder, self.0.owner))
    }

    /// Adds a doorbell (KVM_IOEVENTFD). A write that begins after this and matches rings it, and goes
    /// no further, whatever else is there. Several may wait for different values at one address.
    ///
    /// Waits for the same as [`Bus::register`].
    ///
    /// # Errors
    ///
    /// [`BusError::BadLength`], [`BusError::BadValue`], [`BusError::WrapsAround`],
    /// [`BusError::DoorbellExists`] if some write would ring two.
    pub fn register_doorbell(
        &self,
        trigger: Trigger,
        doorbell: Arc<dyn Doorbell>,
    ) -> Result<(), BusError> {
        let holder = Holder::new(doorbell);
        let Trigger { address, length, value } = trigger;
        let most = match length {
            // A write of any length has no value to compare.
            0 => None,
            1 | 2 | 4 => Some((1 << (8 * length)) - 1),
            8 => Some(u64::MAX),
            _ => return Err(BusError::BadLength { trigger }),
        };
        if value.is_some_and(|value| most.is_none_or(|most| value > most)) {
            return Err(BusError::BadValue { trigger });
        }
        Span::new(self.0.space, address, u64::from(length).max(1), ())?;
        let mut presences = lock(&self.0.writer);
        let table = self.0.last(&presences).with_doorbell(trigger, holder.pointer())?;
        holder.into_raw();
        self.0.publish::<dyn Doorbell>(&mut presences, table, None);
        Ok(())
    }

    /// Removes the doorbell with this trigger (KVM_IOEVENTFD_FLAG_DEASSIGN). No write that begins after
    /// this rings it.
    ///
    /// Waits for the same as [`Bus::remove`].
    ///
    /// # Errors
    ///
    /// [`BusError::NoDoorbell`].
    pub fn remove_doorbell(&self, trigger: Trigger) -> Result<Removal<dyn Doorbell>, BusError> {
        let mut presences = lock(&self.0.writer);
        let (table, pointer) = self.0.last(&presences).without_doorbell(trigger)?;
        // SAFETY: as in `remove`.
        let holder = unsafe { Holder::from_raw(pointer) };
        self.0.publish(&mut presences, table, Some(&holder));
        Ok(Removal::new(holder, self.0.owner))
    }

    /// Makes writes in a range wait in the [`CoalescedRing`] (KVM_REGISTER_COALESCED_MMIO), whether or
    /// not there is a device. Reads are never coalesced.
    ///
    /// Waits for the same as [`Bus::register`].
    ///
    /// # Errors
    ///
    /// [`BusError::ZeroSize`], [`BusError::WrapsAround`], [`BusError::CoalescedOverlap`].
    pub fn register_coalesced(&self, base: u64, size: u64) -> Result<(), BusError> {
        let span = Span::new(self.0.space, base, size, ())?;
        let mut presences = lock(&self.0.writer);
        let table = self.0.last(&presences).with_coalesced(self.0.space, span)?;
        self.0.publish::<dyn Device>(&mut presences, table, None);
        Ok(())
    }

    /// Ends the coalescing of the range that begins at `base` (KVM_UNREGISTER_COALESCED_MMIO). When
    /// this returns every write that was coalesced is in the ring, or has been drained.
    ///
    /// Waits for other changes of this bus, and for look-ups that are under way.
    ///
    /// # Errors
    ///
    /// [`BusError::NoCoalesced`].
    pub fn remove_coalesced(&self, base: u64) -> Result<(), BusError> {
        let mut presences = lock(&self.0.writer);
        let table = self.0.last(&presences).without_coalesced(self.0.space, base)?;
        self.0.publish::<dyn Device>(&mut presences, table, None);
        Ok(())
    }

    /// Removes all that is registered now, one after the other (`kvm_io_bus_destroy`), and waits for no
    /// access. For a VM that ends: a device that has a handle to its own bus, an initiator on it, or the
    /// [`Mmu`](crate::Mmu), keeps it and so itself.
    ///
    /// Waits for the same as [`Bus::remove`].
    pub fn clear(&self) {
        let (devices, coalesced, doorbells) = self.0.last(&lock(&self.0.writer)).names();
        // An error means that somebody else was faster.
        for base in devices {
            let _ = self.remove(base);
        }
        for base in coalesced {
            let _ = self.remove_coalesced(base);
        }
        for trigger in doorbells {
            let _ = self.remove_doorbell(trigger);
        }
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let presences = lock(&self.0.writer);
        let table = self.0.last(&presences);
        f.debug_struct("Bus").field("space", &self.0.space).field("table", table).finish()
    }
}
