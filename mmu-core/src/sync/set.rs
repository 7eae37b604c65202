// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A multiset of nonzero words whose common cases, none and one, fit in one word.
//!
//! It holds where a page is mapped (rmap), where a shadow page is linked (parents), which shadow
//! pages shadow a guest frame, and which children of a shadow page may be out of date (below). Bit 0 of the word is a lock that serialises updates and scans (R15).
//! It is held for the update or scan alone: never across guest memory, an allocation, a callback
//! or a flush. [`LocationSet::is_empty`] and [`LocationSet::only`] take no lock.

use super::steps::{Held, What};
use super::{AtomicU64, Backoff, Ordering, UnsafeCell, rule};
use core::fmt;

const LOCKED: u64 = 1;
const LIST: u64 = 2;
const FLAGS: u64 = LOCKED | LIST;
/// Largest storable value: the word keeps it shifted past the flags.
pub(crate) const MAX_LOCATION: u64 = u64::MAX >> 2;

/// Values of a block: with the link and the count, two cache lines.
const BLOCK: usize = if cfg!(loom) { 2 } else { 14 };

struct Block {
    next: *mut Cell,
    used: usize,
    values: [u64; BLOCK],
}

/// Aligned so that the two flag bits of a pointer to it are free.
#[repr(align(8))]
struct Cell(UnsafeCell<Block>);

impl Cell {
    fn boxed() -> Box<Self> {
        Box::new(Self(UnsafeCell::new(Block {
            next: core::ptr::null_mut(),
            used: 0,
            values: [0; BLOCK],
        })))
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct LocationSet(AtomicU64);

impl LocationSet {
    /// Whether nothing is in the set. The caller orders it against what it stored before (R2, R20 by
    /// fences).
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // R12: Acquire pairs with the Release of `unlock`: who misses an entry in a reverse map finds the
        // record of its end in the log.
        self.0.load(Ordering::Acquire) & !LOCKED == 0
    }

    /// The value, if exactly one is in the set.
    pub(crate) fn only(&self) -> Option<u64> {
        let word = self.0.load(Ordering::Acquire);
        (word & LIST == 0 && word & !FLAGS != 0).then_some(word >> 2)
    }

    /// Adds one copy of `value`, which must be neither 0 nor above [`MAX_LOCATION`].
    pub(crate) fn add(&self, value: u64) {
        self.insert(value, false);
    }

    /// The same unless there is one already; whether it was added.
    pub(crate) fn add_once(&self, value: u64) -> bool {
        self.insert(value, true)
    }

    fn insert(&self, value: u64, once: bool) -> bool {
        debug_assert!(value != 0 && value <= MAX_LOCATION);
        let mut spare = None;
        loop {
            let word = self.lock();
            if word == 0 {
                self.unlock(value << 2);
                return true;
            }
            if once && Self::find(word, |other| other == value) {
                self.unlock(word);
                return false;
            }
            if word & LIST != 0 {
                // SAFETY: LIST says that the rest is a pointer from `Box::into_raw` below, and the
                // lock makes this thread the only user of the list.
                let cell = unsafe { &*Self::list(word) };
                let stored = cell.0.with_mut(|block| {
                    // SAFETY: the lock is held.
                    let block = unsafe { &mut *block };
                    let room = block.used < BLOCK;
                    if room {
                        block.values[block.used] = value;
                        block.used += 1;
                    }
                    room
                });
                if stored {
                    self.unlock(word);
                    return true;
                }
            }
            let Some(cell) = spare.take() else {
                // Never allocate under the lock.
                self.unlock(word);
                spare = Some(Cell::boxed());
                continue;
            };
            let cell: Box<Cell> = cell;
            cell.0.with_mut(|block| {
                // SAFETY: the cell is not published yet.
                let block = unsafe { &mut *block };
                if word & LIST != 0 {
                    block.next = Self::list(word);
                } else {
                    block.values[0] = word >> 2;
                    block.used = 1;
                }
                block.values[block.used] = value;
                block.used += 1;
            });
            self.unlock(Box::into_raw(cell) as u64 | LIST);
            return true;
        }
    }

    /// Removes one copy of `value`; whether there was one.
    pub(crate) fn remove(&self, value: u64) -> bool {
        self.remove_if(value, || true)
    }

    /// The same if `unneeded` says so under the lock: who adds the value before it was asked has made
    /// it see what for, who adds it after it adds it again. `unneeded` is as short as the callback of
    /// [`LocationSet::for_each`].
    pub(crate) fn remove_if(&self, value: u64, unneeded: impl FnOnce() -> bool) -> bool {
        let word = self.lock();
        if !unneeded() {
            self.unlock(word);
            return false;
        }
        if word & LIST == 0 {
            let found = word == value << 2 && word != 0;
            self.unlock(if found { 0 } else { word });
            return found;
        }
        let head = Self::list(word);
        let mut at = head;
        let mut found = false;
        while !at.is_null() && !found {
            // SAFETY: every cell of the list is alive while the lock is held.
            at = unsafe { &*at }.0.with_mut(|block| {
                // SAFETY: the lock is held.
                let block = unsafe { &mut *block };
                // From the newest: what was mapped last is most often unmapped first.
                match block.values[..block.used].iter().rposition(|v| *v == value) {
                    Some(i) => {
                        found = true;
                        block.values[i] = Self::take_last(head, at, block);
                        at
                    }
                    None => block.next,
                }
            });
        }
        self.finish(word);
        found
    }

    /// A copy of the contents.
    pub(crate) fn to_vec(&self) -> Vec<u64> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut room = 4;
        loop {
            let mut copy = Vec::with_capacity(room);
            let mut len = 0;
            self.for_each(|value| {
                // Never allocate under the lock.
                if len < room {
                    copy.push(value);
                }
                len += 1;
            });
            if len <= room {
                return copy;
            }
            room = len * 2;
        }
    }

    /// The same if there are no more than `most`.
    pub(crate) fn to_vec_of(&self, most: usize) -> Option<Vec<u64>> {
        let mut room = most.min(4);
        loop {
            let mut copy = Vec::with_capacity(room);
            // Never allocate under the lock, nor read more than is wanted.
            let more = self.any(|value| {
                let full = copy.len() == room;
                if !full {
                    copy.push(value);
                }
                full
            });
            if !more {
                return Some(copy);
            }
            if room == most {
                return None;
            }
            room = (room * 8).min(most);
        }
    }

    /// Calls `f` for every copy under the lock: `f` must be short and must not touch guest memory,
    /// allocate, call back or lock (but for the locks of parents under those of `below`).
    pub(crate) fn for_each(&self, mut f: impl FnMut(u64)) {
        let word = self.lock();
        Self::find(word, |value| {
            f(value);
            false
        });
        self.unlock(word);
    }

    /// Whether one of the values is there.
    pub(crate) fn any(&self, is: impl FnMut(u64) -> bool) -> bool {
        !self.is_empty() && {
            let word = self.lock();
            let found = Self::find(word, is);
            self.unlock(word);
            found
        }
    }

    /// Whether a value of the set, whose lock is held, `is` what is looked for.
    fn find(word: u64, mut is: impl FnMut(u64) -> bool) -> bool {
        if word & LIST == 0 {
            return word != 0 && is(word >> 2);
        }
        let mut at = Self::list(word);
        let mut found = false;
        while !at.is_null() && !found {
            // SAFETY: as in `remove_if`.
            at = unsafe { &*at }.0.with_mut(|block| {
                // SAFETY: the lock is held.
                let block = unsafe { &*block };
                found = block.values[..block.used].iter().any(|value| is(*value));
                block.next
            });
        }
        found
    }

    /// Takes the last value of the list's first block out, to fill the hole that a removal in
    /// `block` (at `at`) leaves.
    fn take_last(head: *mut Cell, at: *mut Cell, block: &mut Block) -> u64 {
        if head == at {
            block.used -= 1;
            return block.values[block.used];
        }
        // SAFETY: `head` is alive while the lock is held, and is not `block`.
        unsafe { &*head }.0.with_mut(|first| {
            // SAFETY: the lock is held; `first` and `block` are different blocks.
            let first = unsafe { &mut *first };
            first.used -= 1;
            first.values[first.used]
        })
    }

    /// Unlocks a list whose first block may have become empty; frees that block.
    fn finish(&self, word: u64) {
        let head = Self::list(word);
        // SAFETY: as in `remove_if`.
        let (used, next) = unsafe { &*head }.0.with_mut(|block| {
            // SAFETY: the lock is held.
            let block = unsafe { &*block };
            (block.used, block.next)
        });
        if used > 0 {
            return self.unlock(word);
        }
        self.unlock(if next.is_null() { 0 } else { next as u64 | LIST });
        // SAFETY: the block came from `Box::into_raw`; it was unlinked under the lock, and nobody
        // looks at a list without the lock.
        drop(unsafe { Box::from_raw(head) });
    }

    fn list(word: u64) -> *mut Cell {
        (word & !FLAGS) as *mut Cell
    }

    /// Takes the lock; returns the word without it.
    fn lock(&self) -> u64 {
        let mut backoff = Backoff::default();
        loop {
            let word = self.0.load(Ordering::Relaxed) & !LOCKED;
            if !rule!(R15) {
                return self.0.load(Ordering::Acquire) & !LOCKED;
            }
            // Acquire pairs with the Release in `unlock`.
            let locked = self.0.compare_exchange_weak(
                word,
                word | LOCKED,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match locked {
                Ok(_) => {
                    Held::new(What::List).keep();
                    return word;
                }
                Err(_) => backoff.wait(),
            }
        }
    }

    fn unlock(&self, word: u64) {
        // Release publishes the blocks and the word to the next `lock`.
        self.0.store(word, Ordering::Release);
        Held::end(What::List);
    }
}

impl Drop for LocationSet {
    fn drop(&mut self) {
        let word = self.lock();
        let mut at = if word & LIST != 0 { Self::list(word) } else { core::ptr::null_mut() };
        while !at.is_null() {
            // SAFETY: the blocks came from `Box::into_raw`, and `&mut self` makes them ours.
            let cell = unsafe { Box::from_raw(at) };
            // SAFETY: as above.
            at = cell.0.with_mut(|block| unsafe { (*block).next });
        }
        Held::end(What::List);
    }
}

impl fmt::Debug for LocationSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocationSet")
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn contents(set: &LocationSet) -> BTreeMap<u64, usize> {
        let mut all = BTreeMap::new();
        set.for_each(|v| *all.entry(v).or_insert(0) += 1);
        all
    }

    #[test]
    fn behaves_as_a_multiset() {
        let set = LocationSet::default();
        let mut oracle: BTreeMap<u64, usize> = BTreeMap::new();
        let mut x = 1u64;
        for _ in 0..20_000 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let v = x % 97 + 1;
            if x & 0x1000 == 0 {
                set.add(v);
                *oracle.entry(v).or_insert(0) += 1;
            } else {
                let had = oracle.contains_key(&v);
                assert_eq!(set.remove(v), had);
                if had {
                    let n = oracle.get_mut(&v).unwrap();
                    *n -= 1;
                    if *n == 0 {
                        oracle.remove(&v);
                    }
                }
            }
            assert_eq!(set.is_empty(), oracle.is_empty());
        }
        assert_eq!(contents(&set), oracle);
        let copy = set.to_vec();
        assert_eq!(copy.len(), oracle.values().sum::<usize>());
        assert!(copy.into_iter().all(|value| set.remove(value)));
        assert!(set.is_empty() && set.to_vec().is_empty());
    }

    #[test]
    fn a_value_is_added_once_and_removed_if_unneeded() {
        let set = LocationSet::default();
        for value in 1..=40 {
            assert!(set.add_once(value) && !set.add_once(value) && !set.add_once(1));
        }
        assert!(!set.remove_if(7, || false) && set.any(|value| value == 7));
        assert!(set.remove_if(7, || true) && !set.any(|value| value == 7));
        assert_eq!(contents(&set).len(), 39);
        assert!(contents(&set).values().all(|copies| *copies == 1));
        assert!((1..=40).filter(|value| set.remove(*value)).count() == 39 && set.is_empty());
        assert!(!set.any(|_| true));
        assert_eq!(set.to_vec_of(0), Some(vec![]));
        (1..=100).for_each(|value| set.add(value));
        assert_eq!(set.to_vec_of(99), None);
        assert_eq!(set.to_vec_of(100).map(|all| all.len()), Some(100));
    }

    #[test]
    fn only_is_exact() {
        let set = LocationSet::default();
        assert_eq!(set.only(), None);
        set.add(MAX_LOCATION);
        assert_eq!(set.only(), Some(MAX_LOCATION));
        set.add(3);
        assert_eq!(set.only(), None);
    }

    #[test]
    fn concurrent_updates_lose_nothing() {
        let set = LocationSet::default();
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let set = &set;
                s.spawn(move || {
                    for round in 0..2_000u64 {
                        for i in 0..5 {
                            set.add(1 + t * 10 + i);
                        }
                        for i in 0..(5 - u64::from(round == 1_999)) {
                            assert!(set.remove(1 + t * 10 + i));
                        }
                    }
                });
            }
        });
        assert_eq!(contents(&set).keys().copied().collect::<Vec<_>>(), [5, 15, 25, 35]);
    }
}
