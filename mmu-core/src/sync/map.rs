// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A concurrent map of small owned values. It hands out copies, never guards, so no caller can
//! hold a shard lock across another step.

#[cfg(not(loom))]
use super::steps::{Hashing, Held, What, point};
use core::hash::Hash;

/// Concurrent map; each operation is atomic.
#[derive(Debug)]
pub(crate) struct ConcurrentMap<K: Eq + Hash + Ord, V> {
    #[cfg(not(loom))]
    inner: dashmap::DashMap<K, V, Hashing>,
    // dashmap's own locks are invisible to the checker, so a model uses one mutex of the checker's.
    #[cfg(loom)]
    inner: super::Mutex<std::collections::BTreeMap<K, V>>,
}

#[cfg(not(loom))]
impl<K: Eq + Hash + Ord + Copy, V: Copy + PartialEq> ConcurrentMap<K, V> {
    pub(crate) fn new() -> Self {
        Self { inner: dashmap::DashMap::default() }
    }

    pub(crate) fn get(&self, key: &K) -> Option<V> {
        #[cfg(test)]
        self.wait(|| self.inner.try_get(key).is_locked());
        let found = self.inner.get(key)?;
        let _held = Held::new(What::Shard);
        point();
        Some(*found)
    }

    /// Inserts unless the key is there; then returns the value that is.
    pub(crate) fn insert_if_absent(&self, key: K, value: V) -> Result<(), V> {
        #[cfg(test)]
        self.wait(|| self.inner.try_get_mut(&key).is_locked());
        let entry = self.inner.entry(key);
        let _held = Held::new(What::Shard);
        point();
        match entry {
            dashmap::Entry::Occupied(e) => Err(*e.get()),
            dashmap::Entry::Vacant(e) => {
                e.insert(value);
                Ok(())
            }
        }
    }

    /// Removes the key if it still has this value.
    pub(crate) fn remove_if_equal(&self, key: &K, value: V) -> bool {
        let equal = |_: &K, v: &V| {
            let _held = Held::new(What::Shard);
            point();
            *v == value
        };
        #[cfg(test)]
        self.wait(|| self.inner.try_get_mut(key).is_locked());
        self.inner.remove_if(key, equal).is_some()
    }

    /// Waits for a shard as the facade does, so that a test sees it.
    #[cfg(test)]
    fn wait(&self, is_locked: impl Fn() -> bool) {
        let mut backoff = super::Backoff::default();
        while is_locked() {
            backoff.wait();
        }
    }

    /// Every entry. Consistent only while nobody writes.
    pub(crate) fn entries(&self) -> Vec<(K, V)> {
        self.inner.iter().map(|e| (*e.key(), *e.value())).collect()
    }
}

#[cfg(loom)]
impl<K: Eq + Hash + Ord + Copy, V: Copy + PartialEq> ConcurrentMap<K, V> {
    pub(crate) fn new() -> Self {
        Self { inner: super::Mutex::new(std::collections::BTreeMap::new()) }
    }

    pub(crate) fn get(&self, key: &K) -> Option<V> {
        super::lock(&self.inner).get(key).copied()
    }

    pub(crate) fn insert_if_absent(&self, key: K, value: V) -> Result<(), V> {
        let mut map = super::lock(&self.inner);
        if !super::rule!(R06) {
            map.insert(key, value);
            return Ok(());
        }
        match map.entry(key) {
            std::collections::btree_map::Entry::Occupied(e) => Err(*e.get()),
            std::collections::btree_map::Entry::Vacant(e) => {
                e.insert(value);
                Ok(())
            }
        }
    }

    pub(crate) fn remove_if_equal(&self, key: &K, value: V) -> bool {
        let mut map = super::lock(&self.inner);
        let equal = map.get(key) == Some(&value);
        if equal {
            map.remove(key);
        }
        equal
    }

    pub(crate) fn entries(&self) -> Vec<(K, V)> {
        super::lock(&self.inner).iter().map(|(k, v)| (*k, *v)).collect()
    }
}
