// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The second door to a published value: an `Arc` for holders that outlive an epoch pin.

use std::sync::Arc;

/// A replaceable `Arc`.
#[derive(Debug)]
pub(crate) struct Door<T> {
    #[cfg(not(loom))]
    inner: arc_swap::ArcSwap<T>,
    // arc-swap's debts are invisible to the model checker.
    #[cfg(loom)]
    inner: loom::sync::Mutex<Arc<T>>,
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
        Self { inner: loom::sync::Mutex::new(value) }
    }

    pub(crate) fn load(&self) -> Arc<T> {
        super::lock(&self.inner).clone()
    }

    pub(crate) fn store(&self, value: Arc<T>) {
        *super::lock(&self.inner) = value;
    }
}
