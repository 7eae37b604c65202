// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An array that allocates its elements in chunks when they are first written.
//!
//! Two levels of pointers lead to an element: the root, allocated with the array, points to
//! directories, and these to chunks. So an array over all pages of a guest costs 8 bytes for each
//! 262,144 of them (1 GiB of memory) until some are used. Directories and chunks are published
//! once, by compare-and-swap from null; a loser frees its own and uses the winner's. They stay
//! until the array is dropped, so a reference to an element is good for as long as one to the
//! array, and a look-up is two loads that nobody can make wait.

use super::{AtomicPtr, Ordering};
use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;
use std::sync::OnceLock;

/// Elements of a chunk: with 8-byte elements a chunk is one page.
const CHUNK: usize = if cfg!(loom) { 2 } else { 512 };
/// Chunks of a directory, which is one page.
const DIRECTORY: usize = if cfg!(loom) { 2 } else { 512 };
/// Elements below one pointer of the root.
const SPAN: usize = CHUNK * DIRECTORY;

type Chunk<T> = [T; CHUNK];
type Directory<T> = [Lazy<Chunk<T>>; DIRECTORY];

/// A `U` on the heap, allocated on first use. It never moves and is freed with this.
struct Lazy<U> {
    /// Null, or from `Box::into_raw`. Changes once, from null, until it is dropped.
    pointer: AtomicPtr<U>,
    /// Shared and sent if this could be: any thread may make the value, and any may drop it.
    owns: PhantomData<OnceLock<U>>,
}

impl<U> Lazy<U> {
    fn new() -> Self {
        Self { pointer: AtomicPtr::new(core::ptr::null_mut()), owns: PhantomData }
    }

    #[inline]
    fn get(&self) -> Option<&U> {
        // Acquire pairs with the Release of the exchange in `get_or_make`: the value is seen as
        // it was filled.
        let pointer = self.pointer.load(Ordering::Acquire);
        // SAFETY: a pointer that is not null comes from `Box::into_raw` in `get_or_make`, was
        // published with Release after the value was filled, and is freed only in `drop`, which
        // has `&mut self`. Nothing else makes a `&mut U`.
        unsafe { pointer.as_ref() }
    }

    fn get_or_make(&self, make: impl FnOnce() -> U) -> &U {
        if let Some(value) = self.get() {
            return value;
        }
        let new = Box::into_raw(Box::new(make()));
        let null = core::ptr::null_mut();
        // Release publishes the filled value to `get`; Acquire on failure pairs with the winner's.
        let pointer =
            match self.pointer.compare_exchange(null, new, Ordering::Release, Ordering::Acquire) {
                Ok(_) => new,
                Err(winner) => {
                    // SAFETY: `new` came from `Box::into_raw` above and was not published.
                    drop(unsafe { Box::from_raw(new) });
                    winner
                }
            };
        // SAFETY: as in `get`; `new` is this thread's own work, `winner` was read with Acquire.
        unsafe { &*pointer }
    }
}

impl<U> Drop for Lazy<U> {
    fn drop(&mut self) {
        // Relaxed: `&mut self` means that every other user's accesses happened before.
        let pointer = self.pointer.load(Ordering::Relaxed);
        if !pointer.is_null() {
            // SAFETY: the pointer came from `Box::into_raw` and nobody else can reach it.
            drop(unsafe { Box::from_raw(pointer) });
        }
    }
}

/// A fixed-length array of `T`, lazily allocated by chunk. Elements never move and are freed with
/// the array. Reads of a chunk that was never written see `None`.
pub(crate) struct LazyArray<T> {
    root: Box<[Lazy<Directory<T>>]>,
    len: usize,
}

impl<T: Default> LazyArray<T> {
    pub(crate) fn new(len: usize) -> Self {
        Self { root: (0..len.div_ceil(SPAN)).map(|_| Lazy::new()).collect(), len }
    }

    /// The element, if its chunk exists; no chunk exists that is wholly beyond the end.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        let directory = self.root.get(index / SPAN)?.get()?;
        let chunk = directory[index / CHUNK % DIRECTORY].get()?;
        Some(&chunk[index % CHUNK])
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
        let directory =
            self.root[index / SPAN].get_or_make(|| core::array::from_fn(|_| Lazy::new()));
        let chunk = directory[index / CHUNK % DIRECTORY]
            .get_or_make(|| core::array::from_fn(|_| T::default()));
        &chunk[index % CHUNK]
    }

    /// Every allocated element with its index, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.iter_range(0..self.len)
    }

    /// Every allocated element in the range with its index, in order. Costs a load for each
    /// missing directory and for each missing chunk of the others.
    pub(crate) fn iter_range(&self, range: Range<usize>) -> impl Iterator<Item = (usize, &T)> {
        let end = range.end.min(self.len);
        let start = range.start.min(end);
        (start / SPAN..end.div_ceil(SPAN))
            .filter_map(|d| Some((d * DIRECTORY, self.root[d].get()?)))
            .flat_map(move |(first, directory)| {
                let from = first.max(start / CHUNK);
                let to = (first + DIRECTORY).min(end.div_ceil(CHUNK));
                (from..to).filter_map(move |c| Some((c * CHUNK, directory[c - first].get()?)))
            })
            .flat_map(move |(first, chunk)| {
                let (from, to) = (first.max(start), (first + CHUNK).min(end));
                (from..to).map(move |i| (i, &chunk[i - first]))
            })
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
    use core::sync::atomic::AtomicUsize;
    use std::collections::BTreeSet;
    use std::sync::Barrier;

    fn indices<T: Default>(array: &LazyArray<T>, range: Range<usize>) -> Vec<usize> {
        array.iter_range(range).map(|(i, _)| i).collect()
    }

    #[test]
    fn allocates_on_demand() {
        let array: LazyArray<AtomicU64> = LazyArray::new(1300);
        assert!(array.get(0).is_none() && array.get(5000).is_none());
        array.get_or_alloc(1299).store(7, Ordering::Relaxed);
        assert!(array.get(0).is_none());
        assert_eq!(array.get(1299).unwrap().load(Ordering::Relaxed), 7);
        assert_eq!(array.iter().count(), 1300 - 1024);
        assert_eq!(array.get(SPAN).map(|_| ()), None);
    }

    #[test]
    fn a_terabyte_of_pages_costs_8_kib() {
        let array: LazyArray<AtomicU64> = LazyArray::new(1 << 28);
        assert_eq!(size_of_val(&*array.root), 8192);
        array.get_or_alloc((1 << 28) - 1).store(1, Ordering::Relaxed);
        assert_eq!(array.iter().filter(|(_, e)| e.load(Ordering::Relaxed) == 1).count(), 1);
        assert_eq!(array.iter().count(), CHUNK);
    }

    #[test]
    fn empty_arrays_have_nothing() {
        let array: LazyArray<AtomicU64> = LazyArray::new(0);
        assert!(array.get(0).is_none());
        assert_eq!(array.iter().count(), 0);
        assert_eq!(array.iter_range(0..usize::MAX).count(), 0);
    }

    #[test]
    fn ranges_are_exact() {
        let len = 2 * SPAN + CHUNK + 7;
        let array: LazyArray<AtomicU64> = LazyArray::new(len);
        let touched = [3, CHUNK * 5 + 1, SPAN - 1, SPAN, 2 * SPAN + 1, len - 1];
        let all: BTreeSet<usize> = touched
            .iter()
            .flat_map(|i| i / CHUNK * CHUNK..(i / CHUNK * CHUNK + CHUNK).min(len))
            .collect();
        for index in touched {
            array.get_or_alloc(index);
        }
        assert_eq!(indices(&array, 0..len), all.iter().copied().collect::<Vec<_>>());
        let edges = [0, 1, CHUNK - 1, CHUNK, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN, len - 1, len];
        for start in edges {
            for end in edges.into_iter().chain([len + 1, usize::MAX]) {
                let expected = all.iter().copied().filter(|i| (start..end).contains(i));
                assert_eq!(indices(&array, start..end), expected.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn iteration_and_look_up_agree() {
        let array: LazyArray<AtomicU64> = LazyArray::new(3 * CHUNK);
        for i in [0, CHUNK, 2 * CHUNK + 9] {
            array.get_or_alloc(i).store(i as u64 + 1, Ordering::Relaxed);
        }
        assert!(array.iter().all(|(i, e)| core::ptr::eq(e, array.get(i).unwrap())));
    }

    #[test]
    fn frees_what_was_allocated() {
        static ALIVE: AtomicUsize = AtomicUsize::new(0);
        struct Counted;
        impl Default for Counted {
            fn default() -> Self {
                ALIVE.fetch_add(1, Ordering::Relaxed);
                Self
            }
        }
        impl Drop for Counted {
            fn drop(&mut self) {
                ALIVE.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let array: LazyArray<Counted> = LazyArray::new(3 * SPAN);
        array.get_or_alloc(0);
        array.get_or_alloc(1);
        array.get_or_alloc(2 * SPAN + 5);
        assert_eq!(ALIVE.load(Ordering::Relaxed), 2 * CHUNK);
        drop(array);
        assert_eq!(ALIVE.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn threads_that_allocate_together_share_one_chunk() {
        const THREADS: u64 = 4;
        for round in 0..200 {
            let array: LazyArray<AtomicU64> = LazyArray::new(2 * SPAN);
            let barrier = Barrier::new(THREADS as usize);
            let at = [round, round + CHUNK, round + SPAN];
            std::thread::scope(|s| {
                for _ in 0..THREADS {
                    s.spawn(|| {
                        barrier.wait();
                        for i in at {
                            array.get_or_alloc(i).fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
            for (i, element) in array.iter() {
                let expected = if at.contains(&i) { THREADS } else { 0 };
                assert_eq!(element.load(Ordering::Relaxed), expected);
            }
        }
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::sync::AtomicU64;
    use std::sync::Arc;

    #[test]
    fn two_allocate_one_reads() {
        loom::model(|| {
            let array: Arc<LazyArray<AtomicU64>> = Arc::new(LazyArray::new(2 * SPAN));
            let add = |index: usize| {
                let array = Arc::clone(&array);
                move || array.get_or_alloc(index).fetch_add(1, Ordering::Relaxed)
            };
            let other = loom::thread::spawn(add(SPAN));
            let mine = add(SPAN)();
            assert!(array.iter().map(|(i, _)| i).eq(SPAN..SPAN + CHUNK));
            let theirs = other.join().unwrap();
            assert_eq!(mine + theirs, 1);
            assert_eq!(array.get(SPAN).unwrap().load(Ordering::Relaxed), 2);
        });
    }
}
