// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One device or doorbell on a bus, and who still needs it.
//!
//! Unsafe code: tables and accesses name registrations by bare pointers, so that a new table of
//! thousands is a copy of memory, and an access writes no shared count.

use crate::sync::{AtomicU64, Life, Ordering, fence, unique};
use core::mem::ManuallyDrop;
use core::ops::Deref;
use core::ptr::NonNull;
use std::sync::Arc;

/// See the module.
pub(super) struct Registration<T: ?Sized> {
    /// Names it in the presences. Never used twice.
    id: u64,
    /// The bus, after it the [`Removal`](super::Removal), and each access that the removal met.
    holders: AtomicU64,
    target: Arc<T>,
    life: Life,
}

impl<T: ?Sized> Registration<T> {
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// What is called.
    pub(super) fn target(&self) -> &T {
        self.life.check();
        &self.target
    }

    /// In a model, notes that an access has not ended yet.
    pub(super) fn check(&self) {
        self.life.check();
    }
}

/// One of a registration's holders. The last one frees it, and with it the bus's hold on the device.
pub(super) struct Holder<T: ?Sized>(NonNull<Registration<T>>);

impl<T: ?Sized> Holder<T> {
    pub(super) fn new(target: Arc<T>) -> Self {
        let holders = AtomicU64::new(1);
        let registration =
            Box::new(Registration { id: unique(), holders, target, life: Life::default() });
        Self(NonNull::from(Box::leak(registration)))
    }

    /// Where the registration is, for tables.
    pub(super) fn pointer(&self) -> NonNull<Registration<T>> {
        self.0
    }

    /// Leaves this hold to whoever calls [`Holder::from_raw`].
    pub(super) fn into_raw(self) -> NonNull<Registration<T>> {
        ManuallyDrop::new(self).0
    }

    /// # Safety
    ///
    /// A hold of this registration was left by `into_raw`, and nobody else takes it.
    pub(super) unsafe fn from_raw(pointer: NonNull<Registration<T>>) -> Self {
        Self(pointer)
    }

    /// Another hold.
    pub(super) fn share(&self) -> Self {
        // Relaxed: who gets the new hold, gets it through the presence's word.
        self.holders.fetch_add(1, Ordering::Relaxed);
        Self(self.0)
    }

    /// How many others hold it.
    pub(super) fn others(&self) -> u64 {
        // Acquire pairs with the Release in `drop`: an access that has ended has happened.
        self.holders.load(Ordering::Acquire) - 1
    }
}

impl<T: ?Sized> Deref for Holder<T> {
    type Target = Registration<T>;

    fn deref(&self) -> &Registration<T> {
        // SAFETY: the pointer came from a box in `new`, which is freed with the last hold, and this
        // is one. Nothing makes a `&mut Registration`.
        unsafe { self.0.as_ref() }
    }
}

impl<T: ?Sized> Drop for Holder<T> {
    fn drop(&mut self) {
        // Release, for whoever frees, and for `others`.
        if self.holders.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        // Acquire pairs with the Release of every other holder.
        fence(Ordering::Acquire);
        #[cfg(loom)]
        if !crate::sync::rule!(R30) {
            // The twin frees too early; the memory stays, so that the use is reported.
            return self.life.end();
        }
        // SAFETY: the pointer came from a box in `new`, and nobody holds it any more.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

// SAFETY: a hold is to a `Registration` what an `Arc` is to its contents, and all of those can be used
// by any thread if the target can.
unsafe impl<T: ?Sized + Send + Sync> Send for Holder<T> {}
// SAFETY: as above.
unsafe impl<T: ?Sized + Send + Sync> Sync for Holder<T> {}
