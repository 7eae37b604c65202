// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left to do for a device that was taken off the bus.

use super::registration::Holder;
use crate::sync::{Backoff, Mark, WouldDeadlock};
use core::fmt;

/// A device or doorbell that was taken off the bus. No access that begins now finds it, but some that
/// began before may still be inside.
///
/// The bus's reference to the device is dropped with this, or with the last access inside, on that
/// thread, whichever is later. Keep this until [`Removal::accesses`] is 0 to have it dropped here.
pub struct Removal<T: ?Sized> {
    holder: Holder<T>,
    /// The engine whose threads are refused.
    owner: u64,
}

impl<T: ?Sized> Removal<T> {
    pub(super) fn new(holder: Holder<T>, owner: u64) -> Self {
        Self { holder, owner }
    }

    /// How many accesses are inside. The number only falls; what an access that has left did is seen.
    /// Waits for nobody.
    #[must_use]
    pub fn accesses(&self) -> u64 {
        self.holder.others()
    }

    /// What was removed.
    #[must_use]
    pub fn target(&self) -> &T {
        self.holder.target()
    }

    /// Waits until no access is inside any more.
    ///
    /// # Errors
    ///
    /// [`WouldDeadlock`], and it has not waited:
    ///
    /// * [`WouldDeadlock::InDevice`] inside a device or doorbell of the same engine. An access does
    ///   not end before its device returns; and two devices that waited for each other's accesses
    ///   would wait for ever. Drop this there, or wait on another thread.
    /// * [`WouldDeadlock::Resolver`] and [`WouldDeadlock::Invalidating`]: a device may touch guest
    ///   memory that this thread has to bring, or change the memory map.
    pub fn wait(&self) -> Result<(), WouldDeadlock> {
        use WouldDeadlock::{InDevice, Invalidating, Resolver};
        let refused = [InDevice, Resolver, Invalidating];
        if let Some(why) = refused.into_iter().find(|why| Mark::is_set(self.owner, *why)) {
            return Err(why);
        }
        let mut backoff = Backoff::default();
        while self.accesses() > 0 {
            backoff.wait();
        }
        Ok(())
    }
}

impl<T: ?Sized> fmt::Debug for Removal<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Removal").field("accesses", &self.accesses()).finish_non_exhaustive()
    }
}
