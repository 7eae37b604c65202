// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads that must not wait: refused instead of deadlocked.
//!
//! A reader may touch guest memory whose page the host has still to bring; whoever brings it must
//! not wait for readers, nor for a vCPU that sits in such an access (R32). And whoever has begun a
//! host invalidation must not wait for invalidations to end (R26), nor whoever is inside a device for
//! accesses to devices to end.

use core::cell::RefCell;
use core::marker::PhantomData;

/// Why a call that may wait was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WouldDeadlock {
    /// See [`crate::Mmu::resolver`].
    #[error(
        "this thread resolves faults of guest memory, and those it would wait for may wait for it"
    )]
    Resolver,
    /// See [`crate::Mmu::invalidate`].
    #[error("this thread has begun a host invalidation, which the call would wait for")]
    Invalidating,
    /// See [`crate::mmio::Removal::wait`].
    #[error("this thread is inside a device, and the call would wait for accesses to end")]
    InDevice,
}

/// What a thread is, and for which engine.
type Marks = RefCell<Vec<(u64, WouldDeadlock)>>;

#[cfg(not(loom))]
std::thread_local! {
    static NUMBER: usize = unique() as usize;
    static MARKS: Marks = const { RefCell::new(Vec::new()) };
}
#[cfg(loom)]
super::checker::lazy_static! {
    // Begins anew with each execution of a model; not part of it.
    static ref COUNT: core::sync::atomic::AtomicUsize = core::sync::atomic::AtomicUsize::new(0);
}
#[cfg(loom)]
super::checker::thread_local! {
    static NUMBER: usize = COUNT.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    static MARKS: Marks = RefCell::new(Vec::new());
}

/// Marks the thread it was made on, while it lives. It cannot leave that thread.
#[derive(Debug)]
pub(crate) struct Mark {
    engine: u64,
    what: WouldDeadlock,
    stays: PhantomData<*const ()>,
}

impl Mark {
    pub(crate) fn new(engine: u64, what: WouldDeadlock) -> Self {
        MARKS.with(|marks| marks.borrow_mut().push((engine, what)));
        Self { engine, what, stays: PhantomData }
    }

    /// Whether this thread has such a mark.
    pub(crate) fn is_set(engine: u64, what: WouldDeadlock) -> bool {
        MARKS.with(|marks| marks.borrow().contains(&(engine, what)))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        MARKS.with(|marks| {
            let mut marks = marks.borrow_mut();
            if let Some(at) = marks.iter().rposition(|mark| *mark == (self.engine, self.what)) {
                marks.swap_remove(at);
            }
        });
    }
}

/// A number that nothing else in this process has. Not part of any protocol, so not the checker's.
pub(crate) fn unique() -> u64 {
    use core::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A number for this thread: threads that are there at the same time mostly have different ones.
#[inline]
pub(crate) fn thread_number() -> usize {
    NUMBER.with(|number| *number)
}
