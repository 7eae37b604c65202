// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Publication of immutable snapshots, and the list of what waits to be dropped.
//!
//! crossbeam-epoch runs deferred calls on whichever thread collects, a walker's included. A
//! snapshot's destructor may unmap gigabytes, so a deferred call here only moves the item to a
//! lock-free list; whoever calls [`Limbo::drain`] (writers, maintenance) drops it.

use super::epoch::Guard;
use super::{AtomicPtr, AtomicU64, Ordering};
use core::fmt;
use core::ptr;
use std::sync::Arc;

struct Node<T> {
    item: T,
    next: *mut Node<T>,
}

struct Stack<T>(AtomicPtr<Node<T>>);

impl<T> Stack<T> {
    fn push(&self, node: *mut Node<T>) {
        let mut head = self.0.load(Ordering::Relaxed);
        loop {
            // SAFETY: the caller owns `node` until the exchange below succeeds.
            unsafe { (*node).next = head };
            // Release publishes the node to `take`.
            match self.0.compare_exchange(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    fn take(&self) -> Option<*mut Node<T>> {
        // Acquire pairs with the Release in `push`. The whole list is taken at once, so no node is
        // reachable from two threads and there is no ABA.
        let head = self.0.swap(ptr::null_mut(), Ordering::Acquire);
        (!head.is_null()).then_some(head)
    }
}

impl<T> Drop for Stack<T> {
    fn drop(&mut self) {
        let mut next = self.take();
        while let Some(node) = next {
            // SAFETY: nodes come from `Box::into_raw` in `retire`, and `take` made them ours.
            let node = unsafe { Box::from_raw(node) };
            next = (!node.next.is_null()).then_some(node.next);
        }
    }
}

struct Retired<T>(*mut Node<T>);
// SAFETY: the node is owned by exactly one `Retired` or list at a time, so sending it is sending
// the `T` in it.
unsafe impl<T: Send> Send for Retired<T> {}

impl<T> Retired<T> {
    fn into_node(self) -> *mut Node<T> {
        self.0
    }
}

/// Items whose grace period has passed, until somebody drains them.
pub(crate) struct Limbo<T> {
    stack: Arc<Stack<T>>,
    /// Items retired and not drained yet.
    waiting: AtomicU64,
}

impl<T: Send + 'static> Limbo<T> {
    pub(crate) fn new() -> Self {
        let stack = Arc::new(Stack(AtomicPtr::new(ptr::null_mut())));
        Self { stack, waiting: AtomicU64::new(0) }
    }

    /// Puts `item` on the list once every section that is open now has ended.
    pub(crate) fn retire(&self, item: T, guard: &Guard<'_>) {
        let node = Retired(Box::into_raw(Box::new(Node { item, next: ptr::null_mut() })));
        let stack = Arc::clone(&self.stack);
        // Relaxed: writers, who ask, are serialised by their lock.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        guard.defer(move || stack.push(node.into_node()));
    }

    /// Hands every item on the list to `f`.
    pub(crate) fn drain(&self, mut f: impl FnMut(T)) {
        let mut next = self.stack.take();
        while let Some(node) = next {
            // SAFETY: as in the destructor of the list.
            let node = *unsafe { Box::from_raw(node) };
            next = (!node.next.is_null()).then_some(node.next);
            f(node.item);
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Items retired and not drained yet.
    pub(crate) fn len(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }
}

// SAFETY: the list is shared only through atomics, and hands each `T` to one thread.
unsafe impl<T: Send> Send for Limbo<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Limbo<T> {}

impl<T> fmt::Debug for Limbo<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Limbo")
    }
}

/// Sits in each published snapshot. In a model it tracks every look at the snapshot, so that a
/// missing Release and a use after the last reader are seen; otherwise it is nothing.
#[derive(Debug, Default)]
pub(crate) struct Life {
    #[cfg(all(loom, not(shuttle)))]
    tracked: loom::cell::UnsafeCell<()>,
    // Not loom's: the books of the model, not part of it.
    #[cfg(loom)]
    over: core::sync::atomic::AtomicBool,
}

// SAFETY: nothing is in the cell; loom checks the accesses to it.
#[cfg(all(loom, not(shuttle)))]
unsafe impl Sync for Life {}

impl Life {
    /// Called by every method that looks into the snapshot.
    #[inline]
    pub(crate) fn check(&self) {
        #[cfg(loom)]
        {
            assert!(
                !self.over.load(Ordering::SeqCst),
                "R30: a snapshot was used after it was freed"
            );
            #[cfg(not(shuttle))]
            self.tracked.with(|_| ());
        }
    }

    /// For a twin that frees too early: from now on every look is reported.
    #[cfg(loom)]
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

#[cfg(all(loom, not(shuttle)))]
impl Drop for Life {
    fn drop(&mut self) {
        self.tracked.with_mut(|_| ());
    }
}

/// What can be published.
pub(crate) trait Snapshot: Send + Sync + 'static {
    fn life(&self) -> &Life;
}

/// An epoch-protected pointer to a snapshot.
pub(crate) struct Published<T>(AtomicPtr<T>);

impl<T: Snapshot> Published<T> {
    pub(crate) fn new(value: Arc<T>) -> Self {
        Self(AtomicPtr::new(Arc::into_raw(value).cast_mut()))
    }

    /// The snapshot published last. It stays valid while the guard does (R30).
    #[inline]
    pub(crate) fn load<'g>(&self, _guard: &'g Guard<'_>) -> &'g T {
        // Acquire pairs with the Release in `replace`.
        let current = self.0.load(Ordering::Acquire);
        // SAFETY: the pointer came from `Arc::into_raw`; `replace` gives the old snapshot's count
        // to `retire`, which drops it only after every section open at that time has ended.
        let snapshot = unsafe { &*current };
        snapshot.life().check();
        snapshot
    }

    /// Publishes `value`; the old snapshot waits in `limbo` for its last reader (R30).
    pub(crate) fn replace(&self, value: Arc<T>, limbo: &Limbo<Arc<T>>, guard: &Guard<'_>) {
        // Release publishes the new snapshot's contents; AcqRel, so that writers are ordered.
        let old = self.0.swap(Arc::into_raw(value).cast_mut(), Ordering::AcqRel);
        // SAFETY: `old` came from `Arc::into_raw`, and the swap made its count ours.
        let old = unsafe { Arc::from_raw(old) };
        #[cfg(loom)]
        if !super::rule!(R30) {
            // The twin frees at once; the memory itself stays, so that the use is reported.
            old.life().end();
        }
        limbo.retire(old, guard);
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        // Relaxed: `&mut self`.
        let current = self.0.load(Ordering::Relaxed);
        // SAFETY: the pointer came from `Arc::into_raw` and nobody else can reach it.
        drop(unsafe { Arc::from_raw(current) });
    }
}

impl<T> fmt::Debug for Published<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Published")
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::epoch::Collector;

    struct Witness(Arc<()>, Life);
    impl Snapshot for Witness {
        fn life(&self) -> &Life {
            &self.1
        }
    }

    #[test]
    fn a_snapshot_is_dropped_after_its_last_reader() {
        let collector = Collector::new();
        let (reader, mut writer) = (collector.register(), collector.register());
        let witness = Arc::new(());
        let published = Published::new(Arc::new(Witness(Arc::clone(&witness), Life::default())));
        let limbo = Limbo::new();
        let section = reader.pin();
        let seen = published.load(&section);
        let next = Arc::new(Witness(Arc::new(()), Life::default()));
        published.replace(next, &limbo, &writer.pin());
        writer.pin().flush();
        limbo.drain(drop);
        assert_eq!(Arc::strong_count(&seen.0), 2);
        drop(section);
        writer.synchronize();
        limbo.drain(drop);
        assert_eq!(Arc::strong_count(&witness), 1);
    }
}
