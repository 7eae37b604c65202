// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The facade over crossbeam-epoch.

use crate::sync::steps::{Held, What};
use crate::sync::{AtomicBool, Backoff, Ordering};
use core::fmt;
use core::marker::PhantomData;
use std::sync::Arc;

/// The garbage of one engine. One VM's stalled reader cannot hold another's garbage.
#[derive(Clone, Default)]
pub struct Collector(crossbeam_epoch::Collector);

impl Collector {
    /// A new collector without readers.
    #[must_use]
    pub fn new() -> Self {
        Self(crossbeam_epoch::Collector::new())
    }

    /// Registers a reader.
    #[must_use]
    pub fn register(&self) -> Handle {
        Handle(self.0.register())
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Collector")
    }
}

/// A registered reader, used by one thread at a time.
pub struct Handle(crossbeam_epoch::LocalHandle);

// SAFETY: a `LocalHandle` is a counted pointer to thread-agnostic data (cells and a bag of `Send`
// closures). It is not `Send` upstream because a guard could stay behind on the old thread; here a
// guard borrows its handle, so a handle that can be moved has no guard.
unsafe impl Send for Handle {}

impl Handle {
    /// Begins a read section.
    #[inline]
    #[must_use]
    pub fn pin(&self) -> Guard<'_> {
        let held = Held::new(What::ReadSection);
        Guard { guard: self.0.pin(), _held: held, handle: PhantomData }
    }

    /// Waits until every read section that is open now has ended (a grace period).
    ///
    /// Waits for readers, and only for them.
    pub fn synchronize(&mut self) {
        let passed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&passed);
        // Release pairs with the Acquire below: what ran before the grace period is visible after.
        self.pin().defer(move || flag.store(true, Ordering::Release));
        let mut backoff = Backoff::default();
        while !passed.load(Ordering::Acquire) {
            self.pin().flush();
            backoff.wait();
        }
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handle")
    }
}

/// An open read section.
pub struct Guard<'h> {
    guard: crossbeam_epoch::Guard,
    _held: Held,
    handle: PhantomData<&'h Handle>,
}

impl Guard<'_> {
    /// Runs `f` once every read section open now has ended. It runs on any thread that happens to
    /// collect, a reader's included, so it must be short.
    pub fn defer(&self, f: impl FnOnce() + Send + 'static) {
        self.guard.defer(f);
    }

    /// Hands this thread's deferred calls to the collector and tries to run what is due.
    pub fn flush(&self) {
        self.guard.flush();
    }

    /// Ends this read section and begins another: what was loaded before is gone.
    #[inline]
    pub fn repin(&mut self) {
        self.guard.repin();
    }
}

impl fmt::Debug for Guard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}
