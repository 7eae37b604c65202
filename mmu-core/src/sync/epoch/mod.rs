// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Epoch-based reclamation: one [`Collector`] for each engine, one [`Handle`] for each thread that
//! reads, a [`Guard`] while it reads.
//!
//! A pinned thread never blocks another; it only delays the freeing of what was retired while it
//! was pinned. So no guard may be held across a system call, a wait or a callback: the API ties
//! each guard to a borrow of its handle, and what waits ([`Handle::synchronize`]) takes the handle
//! exclusively.

#[cfg(loom)]
mod checked;
mod crossbeam;
#[cfg(loom)]
mod model;

#[cfg(not(loom))]
pub use crossbeam::{Collector, Guard, Handle};
#[cfg(loom)]
pub use model::{Collector, Guard, Handle};

use super::steps::{Held, What, point};
use core::fmt;
use core::ops::{Deref, DerefMut};
use std::sync::TryLockError;

/// Registered readers for threads that come now and then. A reader registered for each call would
/// leave some kilobytes behind for as long as another stands still in its section.
pub(crate) struct Pool {
    collector: Collector,
    // Whoever gets a handle has it alone; the pool is no part of any protocol, and no model's.
    free: std::sync::Mutex<Vec<Handle>>,
}

impl Pool {
    pub(crate) fn new(collector: Collector) -> Self {
        Self { collector, free: std::sync::Mutex::new(Vec::new()) }
    }

    /// A handle for one call. Another thread in the pool just now is not waited for: it might have
    /// been stopped there.
    pub(crate) fn get(&self) -> Pooled<'_> {
        let free = self.try_with_free(Vec::pop).flatten();
        let handle = free.unwrap_or_else(|| self.collector.register());
        Pooled { handle: Some(handle), pool: self }
    }

    fn try_with_free<R>(&self, change: impl FnOnce(&mut Vec<Handle>) -> R) -> Option<R> {
        let mut free = match self.free.try_lock() {
            Ok(free) => free,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let _held = Held::new(What::Pool);
        point();
        Some(change(&mut free))
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

/// A handle that goes back to its pool.
#[derive(Debug)]
pub(crate) struct Pooled<'p> {
    /// `Some` until it is dropped.
    handle: Option<Handle>,
    pool: &'p Pool,
}

impl Deref for Pooled<'_> {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        self.handle.as_ref().expect("there until it is dropped")
    }
}

impl DerefMut for Pooled<'_> {
    fn deref_mut(&mut self) -> &mut Handle {
        self.handle.as_mut().expect("there until it is dropped")
    }
}

impl Drop for Pooled<'_> {
    fn drop(&mut self) {
        let Some(handle) = self.handle.take() else { return };
        // Two threads of a model would use one handle without a modelled step between them.
        if !cfg!(loom) {
            // What waits in its bag must not wait for its next use.
            handle.pin().flush();
            // Else it is dropped.
            let _ = self.pool.try_with_free(|free| free.push(handle));
        }
    }
}
