// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where an initiator is, for those who take something off the bus.
//!
//! An epoch cannot protect a device: no section may stay open while a device is called. A count in
//! the device could, but all vCPUs that use the device would write it. So each initiator says in a
//! word of its own what it is about to use, and who changes the bus looks at all of these words:
//!
//! * *Looking*: it reads the published table, which must stay. This takes a few loads, in which it
//!   meets no lock, no guest memory and nobody else's code, so a change waits for it.
//! * *Inside* a registration: that must stay, the table need not. For how long is the device's
//!   business, so nobody waits. Who removes the registration turns the word into *owed*, and gives the
//!   access a hold of its own.
//! * An access that ends and finds that it is owed gives its hold back. The last hold frees the
//!   registration, so it is freed exactly when the removal and the last access are over, on whichever
//!   thread that is.
//!
//! R30: *change the table, fence, look at the words; write the word, fence, look at the table.* A
//! change that finds an initiator neither looking nor inside knows that it will see the new table.
//! Words that say *looking* carry a number, so that a change waits for one look only, however busy
//! the initiator is.
//!
//! An initiator writes no line but its own, and takes a bounded number of steps whatever others do.

use super::registration::{Holder, Registration};
use crate::sync::steps::{Held, What};
use crate::sync::{AtomicU64, Backoff, Mark, Ordering, WouldDeadlock, fence};
use core::ptr::NonNull;

const IDLE: u64 = 0;
/// The low two bits of any other word; above them the number of the look, or of the registration.
const LOOKING: u64 = 1;
const INSIDE: u64 = 2;
const OWED: u64 = 3;
const KIND: u64 = 3;
/// The initiator was dropped.
const GONE: u64 = 4;

/// See the module. In a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct Presence(AtomicU64);

impl Presence {
    /// Begins to look. `number` must differ from that of the last look.
    #[inline]
    pub(super) fn look(&self, number: u64) -> Look<'_> {
        Held::new(What::Look).keep();
        // Release: the last look is over. Who waits for that may miss the words between.
        self.0.store(number << 2 | LOOKING, Ordering::Release);
        // R30: the word, fence, the table. Pairs with the fence in `Bus::publish`.
        fence(Ordering::SeqCst);
        Look(self)
    }

    /// Waits until a look that may have begun before the caller's fence is over; then, if the
    /// initiator is inside `removed`, gives it a hold. Whether the initiator is still there.
    pub(super) fn settle<T: ?Sized>(&self, removed: Option<&Holder<T>>) -> bool {
        // Acquire here and below pairs with the Release of every word: what the initiator used before
        // it, it has used.
        let first = self.0.load(Ordering::Acquire);
        let mut word = first;
        let mut backoff = Backoff::default();
        while word & KIND == LOOKING && word == first {
            backoff.wait();
            word = self.0.load(Ordering::Acquire);
        }
        if let Some(removed) = removed.filter(|removed| word == removed.id() << 2 | INSIDE) {
            let hold = removed.share();
            let owed = removed.id() << 2 | OWED;
            // Release: who ends the access sees the hold counted. If the access has just ended, the
            // hold is dropped here.
            if self.0.compare_exchange(word, owed, Ordering::Release, Ordering::Acquire).is_ok() {
                hold.into_raw();
            }
        }
        word != GONE
    }

    /// The initiator will make no more accesses.
    pub(super) fn go(&self) {
        // Release: there is no last look any more.
        self.0.store(GONE, Ordering::Release);
    }

    /// Whether nobody need look at this any more.
    pub(super) fn is_gone(&self) -> bool {
        // Acquire: as in `settle`.
        self.0.load(Ordering::Acquire) == GONE
    }
}

/// The published table stays while this lives.
pub(super) struct Look<'p>(&'p Presence);

impl<'p> Look<'p> {
    /// Goes on to use a registration alone.
    ///
    /// # Safety
    ///
    /// The registration is in the table that was published last when it was read within this look.
    #[inline]
    pub(super) unsafe fn enter<T: ?Sized>(
        self,
        registration: NonNull<Registration<T>>,
    ) -> Inside<'p, T> {
        let inside = Inside { presence: self.0, registration };
        core::mem::forget(self);
        Held::new(What::Device).keep();
        // Release: this was the last use of the table.
        inside.presence.0.store(inside.registration().id() << 2 | INSIDE, Ordering::Release);
        Held::end(What::Look);
        inside
    }
}

impl Drop for Look<'_> {
    fn drop(&mut self) {
        // Release: this was the last use of the table.
        self.0.0.store(IDLE, Ordering::Release);
        Held::end(What::Look);
    }
}

/// The registration stays while this lives.
pub(super) struct Inside<'p, T: ?Sized> {
    presence: &'p Presence,
    registration: NonNull<Registration<T>>,
}

impl<T: ?Sized> Inside<'_, T> {
    /// Calls what is registered, of the engine `owner`.
    #[inline]
    pub(super) fn call<R>(&self, owner: u64, f: impl FnOnce(&T) -> R) -> R {
        let registration = self.registration();
        // Whoever waits for this access must not be in it.
        let _mark = Mark::new(owner, WouldDeadlock::InDevice);
        let result = f(registration.target());
        registration.check();
        result
    }

    fn registration(&self) -> &Registration<T> {
        // SAFETY: `enter` was promised that the registration was in the published table during the
        // look. Who takes it out of there publishes another table, fences, and then finds in the
        // presence the look, and waits until it is not there any more, or this access, and gives it a
        // hold, which is kept until `drop` has read the word: R30. The word of another access proves
        // that this one is over.
        unsafe { self.registration.as_ref() }
    }
}

impl<T: ?Sized> Drop for Inside<'_, T> {
    fn drop(&mut self) {
        // Release: this was the last use of the registration. Acquire pairs with the Release in
        // `settle`: the hold is counted.
        if self.presence.0.swap(IDLE, Ordering::AcqRel) & KIND == OWED {
            // SAFETY: the word is this access's: `settle` has left a hold of the registration to it.
            drop(unsafe { Holder::from_raw(self.registration) });
        }
        Held::end(What::Device);
    }
}
