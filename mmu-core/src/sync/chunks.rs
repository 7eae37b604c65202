// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An array that allocates its elements in chunks when they are first written.

use super::{AtomicPtr, Ordering};
use core::fmt;
use core::marker::PhantomData;

/// Elements of a chunk: with 8-byte elements a chunk is one page.
const CHUNK: usize = if cfg!(loom) { 2 } else { 512 };

/// A fixed-length array of `T`, lazily allocated by chunk. Elements never move and are freed with
/// the array. Reads of a chunk that was never written see `None`.
pub(crate) struct LazyArray<T> {
    chunks: Box<[AtomicPtr<[T; CHUNK]>]>,
    len: usize,
    /// Shared and sent only if its elements can be.
    owns: PhantomData<T>,
}

impl<T: Default> LazyArray<T> {
    pub(crate) fn new(len: usize) -> Self {
        let chunks = (0..len.div_ceil(CHUNK)).map(|_| AtomicPtr::new(core::ptr::null_mut()));
        Self { chunks: chunks.collect(), len, owns: PhantomData }
    }

    /// The element, if its chunk exists; `None` also beyond the end.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        // Acquire pairs with the Release of the exchange in `get_or_alloc`.
        let chunk = self.chunks.get(index / CHUNK)?.load(Ordering::Acquire);
        // SAFETY: a non-null chunk pointer comes from `Box::into_raw` in `get_or_alloc`, was
        // published with Release after it was filled, and is freed only in `drop`.
        unsafe { chunk.as_ref() }.map(|chunk| &chunk[index % CHUNK])
    }

    /// The element; allocates its chunk if need be.
    ///
    /// `index` must be below the length the array was made with.
    #[inline]
    pub(crate) fn get_or_alloc(&self, index: usize) -> &T {
        debug_assert!(index < self.len);
        match self.get(index) {
            Some(element) => element,
            None => self.alloc(index),
        }
    }

    #[cold]
    fn alloc(&self, index: usize) -> &T {
        let new = Box::into_raw(Box::new(core::array::from_fn(|_| T::default())));
        let cell = &self.chunks[index / CHUNK];
        let null = core::ptr::null_mut();
        // Release publishes the filled chunk to `get`; Acquire on failure reads the winner's.
        let chunk = match cell.compare_exchange(null, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => new,
            Err(winner) => {
                // SAFETY: `new` came from `Box::into_raw` above and was not published.
                drop(unsafe { Box::from_raw(new) });
                winner
            }
        };
        // SAFETY: as in `get`.
        unsafe { &(*chunk)[index % CHUNK] }
    }

    /// Every allocated element with its index, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        (0..self.chunks.len()).flat_map(move |c| {
            let base = c * CHUNK;
            let here = if self.get(base).is_some() { CHUNK.min(self.len - base) } else { 0 };
            (base..base + here).filter_map(move |i| self.get(i).map(|e| (i, e)))
        })
    }
}

impl<T> Drop for LazyArray<T> {
    fn drop(&mut self) {
        for cell in &self.chunks {
            // Relaxed: `&mut self` means that every other user's accesses happened before.
            let chunk = cell.load(Ordering::Relaxed);
            if !chunk.is_null() {
                // SAFETY: the pointer came from `Box::into_raw` and nobody else can reach it.
                drop(unsafe { Box::from_raw(chunk) });
            }
        }
    }
}

impl<T> fmt::Debug for LazyArray<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyArray").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::AtomicU64;

    #[test]
    fn allocates_on_demand() {
        let array: LazyArray<AtomicU64> = LazyArray::new(1300);
        assert!(array.get(0).is_none() && array.get(5000).is_none());
        array.get_or_alloc(1299).store(7, Ordering::Relaxed);
        assert!(array.get(0).is_none());
        assert_eq!(array.get(1299).unwrap().load(Ordering::Relaxed), 7);
        assert_eq!(array.iter().count(), 1300 - 1024);
    }
}
