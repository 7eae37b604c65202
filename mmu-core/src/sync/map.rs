// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A concurrent map of small owned values. It hands out copies, never guards, so no caller can
//! hold a shard lock across another step.

use core::hash::Hash;

/// Concurrent map; each operation is atomic.
#[derive(Debug)]
pub(crate) struct ConcurrentMap<K: Eq + Hash + Ord, V> {
    #[cfg(not(loom))]
    inner: dashmap::DashMap<K, V>,
    // dashmap's own locks are invisible to the model checker, so a model uses one loom mutex.
    #[cfg(loom)]
    inner: loom::sync::Mutex<std::collections::BTreeMap<K, V>>,
}

#[cfg(not(loom))]
impl<K: Eq + Hash + Ord + Copy, V: Copy + PartialEq> ConcurrentMap<K, V> {
    pub(crate) fn new() -> Self {
        Self { inner: dashmap::DashMap::new() }
    }

    pub(crate) fn get(&self, key: &K) -> Option<V> {
        self.inner.get(key).map(|v| *v)
    }

    /// Inserts unless the key is there; then returns the value that is.
    pub(crate) fn insert_if_absent(&self, key: K, value: V) -> Result<(), V> {
        match self.inner.entry(key) {
            dashmap::Entry::Occupied(e) => Err(*e.get()),
            dashmap::Entry::Vacant(e) => {
                e.insert(value);
                Ok(())
            }
        }
    }

    /// Removes the key if it still has this value.
    pub(crate) fn remove_if_equal(&self, key: &K, value: V) -> bool {
        self.inner.remove_if(key, |_, v| *v == value).is_some()
    }

    /// Every entry. Consistent only while nobody writes.
    pub(crate) fn entries(&self) -> Vec<(K, V)> {
        self.inner.iter().map(|e| (*e.key(), *e.value())).collect()
    }
}

#[cfg(loom)]
impl<K: Eq + Hash + Ord + Copy, V: Copy + PartialEq> ConcurrentMap<K, V> {
    pub(crate) fn new() -> Self {
        Self { inner: loom::sync::Mutex::new(std::collections::BTreeMap::new()) }
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
