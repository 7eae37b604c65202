// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The second door to a published value: an `Arc` for holders that outlive an epoch pin.

use std::sync::Arc;

/// A replaceable `Arc`.
#[derive(Debug)]
pub(crate) struct Door<T> {
    #[cfg(not(loom))]
    inner: arc_swap::ArcSwap<T>,
    // arc-swap's debts are invisible to the model checker. A model sees a word that counts the values
    // so far; the value itself is kept outside the model.
    #[cfg(loom)]
    count: super::AtomicU64,
    #[cfg(loom)]
    inner: std::sync::Mutex<(u64, Arc<T>)>,
}

#[cfg(not(loom))]
impl<T> Door<T> {
    pub(crate) fn new(value: Arc<T>) -> Self {
        Self { inner: arc_swap::ArcSwap::new(value) }
    }

    pub(crate) fn load(&self) -> Arc<T> {
        self.inner.load_full()
    }

    pub(crate) fn store(&self, value: Arc<T>) {
        self.inner.store(value);
    }
}

#[cfg(loom)]
impl<T> Door<T> {
    pub(crate) fn new(value: Arc<T>) -> Self {
        let inner = std::sync::Mutex::new((0, value));
        Self { count: super::AtomicU64::new(0), inner }
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, (u64, Arc<T>)> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn load(&self) -> Arc<T> {
        // A load, so that loads do not multiply the orders to explore. One of an earlier count is
        // repeated by what cannot miss the last store: arc-swap loads with SeqCst.
        if self.count.load(super::Ordering::Acquire) != self.inner().0 {
            self.count.fetch_add(0, super::Ordering::Acquire);
        }
        Arc::clone(&self.inner().1)
    }

    pub(crate) fn store(&self, value: Arc<T>) {
        let count = self.count.fetch_add(1, super::Ordering::AcqRel) + 1;
        // Dropped outside the lock: it may use the model.
        let _old = core::mem::replace(&mut *self.inner(), (count, value));
    }
}
