// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A multiset of nonzero words whose common cases, none and one, fit in one word.
//!
//! It holds where a page is mapped (rmap), where a shadow page is linked (parents), which shadow
//! pages shadow a guest frame, and which children of a shadow page may be out of date (below). Bit 0 of the word is a lock that serialises updates and scans (R15).
//! It is held for the update or scan alone: never across guest memory, an allocation, a callback
//! or a flush. [`LocationSet::is_empty`] and [`LocationSet::only`] take no lock.
//!
//! A guest chooses how many entries map a page, and in which order they go. So a few values are a list,
//! and when there are many a table stands before it, which sends each new value to one of its own small
//! sets, by a hash of the value's *group*: entries of one table are a group and stay together. An update
//! looks at some hundred values at most, however many there are.

use super::steps::{Held, What};
use super::{AtomicU64, Backoff, Ordering, UnsafeCell, rule};
use crate::addr::INDEX_BITS;
use core::fmt;
use core::ptr;

const LOCKED: u64 = 1;
/// The rest of the word points to a list, or with [`TABLE`] to a table. Else it is a value, shifted, or
/// 0.
const POINTER: u64 = 2;
const TABLE: u64 = 4;
const FLAGS: u64 = LOCKED | POINTER | TABLE;
/// Largest storable value: the word keeps it shifted past the flags that it needs.
pub(crate) const MAX_LOCATION: u64 = u64::MAX >> 2;

/// Values of a block: with the link and the counts, two cache lines.
const BLOCK: usize = if cfg!(loom) { 2 } else { 14 };
/// Most blocks of a list, unless tables are as deep as they get.
const BLOCKS: u32 = if cfg!(loom) { u32::MAX } else { 8 };
/// log2 of a table's buckets.
const BITS: u32 = 6;
/// Tables on the way to a value: enough for all groups that there can be.
const DEPTH: u32 = 4;

struct Block {
    next: *mut Cell<Block>,
    used: u32,
    /// Blocks that follow.
    behind: u32,
    values: [u64; BLOCK],
}

struct Table {
    /// A set each.
    buckets: [u64; 1 << BITS],
    /// The list that was there before the table, or 0.
    rest: u64,
    /// Values in buckets.
    len: usize,
    /// Of tables that have become empty and are to be freed.
    next: *mut Cell<Table>,
}

/// Aligned so that the flag bits of a pointer to it are free.
#[repr(align(8))]
struct Cell<T>(UnsafeCell<T>);

impl<T> Cell<T> {
    fn boxed(value: T) -> Box<Self> {
        Box::new(Self(UnsafeCell::new(value)))
    }

    fn pointer(word: u64) -> *mut Self {
        (word & !FLAGS) as *mut Self
    }

    /// # Safety
    ///
    /// `at` is a cell of a set whose lock this thread holds, and is not in use further up.
    unsafe fn with<R>(at: *mut Self, f: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: cells of a set live while its lock is held.
        let cell = unsafe { &*at };
        // SAFETY: as the caller says.
        cell.0.with_mut(|value| f(unsafe { &mut *value }))
    }
}

/// What an insertion is short of.
enum Wanted {
    Block,
    Table,
}

/// What was allocated before the lock was taken.
#[derive(Default)]
struct Spare {
    block: Option<Box<Cell<Block>>>,
    table: Option<Box<Cell<Table>>>,
}

impl Spare {
    fn provide(&mut self, wanted: Wanted) {
        match wanted {
            Wanted::Block => {
                let (next, values) = (ptr::null_mut(), [0; BLOCK]);
                self.block = Some(Cell::boxed(Block { next, used: 0, behind: 0, values }));
            }
            Wanted::Table => {
                let (buckets, next) = ([0; 1 << BITS], ptr::null_mut());
                self.table = Some(Cell::boxed(Table { buckets, rest: 0, len: 0, next }));
            }
        }
    }
}

/// What a removal has left over, to be freed without the lock.
struct Leftover {
    block: *mut Cell<Block>,
    tables: *mut Cell<Table>,
}

impl Leftover {
    fn none() -> Self {
        Self { block: ptr::null_mut(), tables: ptr::null_mut() }
    }

    fn free(self) {
        // R15: its twin leaves it to whoever came without the lock, and is told of him.
        if !self.block.is_null() && rule!(R15) {
            // SAFETY: the block came from `Box::into_raw`; it was unlinked under the lock, and nobody
            // looks at a list without the lock.
            drop(unsafe { Box::from_raw(self.block) });
        }
        let mut at = self.tables;
        while !at.is_null() {
            // SAFETY: as above.
            at = unsafe { Box::from_raw(at) }.0.into_inner().next;
        }
    }
}

/// Values of one group are found together.
fn group(value: u64) -> u64 {
    (value - 1) >> INDEX_BITS
}

fn bucket(value: u64, depth: u32) -> usize {
    // The golden ratio, as in Fibonacci hashing: the upper bits depend on all of the group's.
    let hash = group(value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash << (depth * BITS) >> (64 - BITS)) as usize
}

/// Puts a value into the set that a word stands for; the new word. If something is wanted for that
/// nothing has changed.
///
/// # Safety
///
/// Here and in all that takes a word: it is of a set whose lock this thread holds.
unsafe fn put(word: u64, value: u64, depth: u32, spare: &mut Spare) -> Result<u64, Wanted> {
    if word == 0 {
        return Ok(value << 2);
    }
    if word & POINTER == 0 {
        let block = spare.block.take().ok_or(Wanted::Block)?;
        let at = Box::into_raw(block);
        // SAFETY: nobody else knows the block yet.
        unsafe {
            Cell::with(at, |block| {
                block.values[..2].copy_from_slice(&[word >> 2, value]);
                block.used = 2;
            });
        }
        return Ok(at as u64 | POINTER);
    }
    if word & TABLE != 0 {
        let put = |table: &mut Table| {
            let bucket = &mut table.buckets[bucket(value, depth)];
            // SAFETY: as the caller says.
            *bucket = unsafe { put(*bucket, value, depth + 1, spare) }?;
            table.len += 1;
            Ok(word)
        };
        // SAFETY: as the caller says; what is below is not this table.
        return unsafe { Cell::with(Cell::pointer(word), put) };
    }
    let head = Cell::<Block>::pointer(word);
    let add = |block: &mut Block| {
        let room = (block.used as usize) < BLOCK;
        if room {
            block.values[block.used as usize] = value;
            block.used += 1;
        }
        (room, block.behind)
    };
    // SAFETY: as the caller says.
    let (added, behind) = unsafe { Cell::with(head, add) };
    if added {
        return Ok(word);
    }
    if behind + 1 >= BLOCKS && depth < DEPTH {
        let at = Box::into_raw(spare.table.take().ok_or(Wanted::Table)?);
        // SAFETY: nobody else knows the table yet.
        unsafe {
            Cell::with(at, |table| {
                table.buckets[bucket(value, depth)] = value << 2;
                (table.rest, table.len) = (word, 1);
            });
        }
        return Ok(at as u64 | POINTER | TABLE);
    }
    let at = Box::into_raw(spare.block.take().ok_or(Wanted::Block)?);
    // SAFETY: nobody else knows the block yet.
    unsafe {
        Cell::with(at, |block| {
            block.values[0] = value;
            (block.next, block.used, block.behind) = (head, 1, behind + 1);
        });
    }
    Ok(at as u64 | POINTER)
}

/// Takes one copy of a value out of the set that a word stands for; the new word if there was one.
///
/// # Safety
///
/// As [`put`].
unsafe fn take(word: u64, value: u64, depth: u32, left: &mut Leftover) -> Option<u64> {
    if word & POINTER == 0 {
        return (word == value << 2).then_some(0);
    }
    if word & TABLE == 0 {
        // SAFETY: as the caller says.
        return unsafe { take_listed(word, value, left) };
    }
    let at = Cell::<Table>::pointer(word);
    let take = |table: &mut Table| {
        let bucket = &mut table.buckets[bucket(value, depth)];
        // SAFETY: as the caller says.
        if let Some(new) = unsafe { take(*bucket, value, depth + 1, left) } {
            *bucket = new;
            table.len -= 1;
        } else {
            // SAFETY: as the caller says.
            table.rest = unsafe { take(table.rest, value, depth, left) }?;
        }
        if table.len > 0 {
            return Some(word);
        }
        table.next = left.tables;
        left.tables = at;
        Some(table.rest)
    };
    // SAFETY: as the caller says; what is below is not this table.
    unsafe { Cell::with(at, take) }
}

/// The same for a list.
///
/// # Safety
///
/// As [`put`].
unsafe fn take_listed(word: u64, value: u64, left: &mut Leftover) -> Option<u64> {
    let head = Cell::<Block>::pointer(word);
    let mut at = head;
    while !at.is_null() {
        let find = |block: &mut Block| {
            // From the newest: what was mapped last is most often unmapped first.
            let hole = block.values[..block.used as usize].iter().rposition(|v| *v == value);
            (hole, block.next)
        };
        // SAFETY: as the caller says.
        let (hole, next) = unsafe { Cell::with(at, find) };
        let Some(hole) = hole else {
            at = next;
            continue;
        };
        let take_last = |first: &mut Block| {
            first.used -= 1;
            (first.values[first.used as usize], first.used, first.next)
        };
        // SAFETY: as the caller says.
        let (last, used, next) = unsafe { Cell::with(head, take_last) };
        // SAFETY: as the caller says.
        unsafe { Cell::with(at, |block| block.values[hole] = last) };
        if used > 0 {
            return Some(word);
        }
        left.block = head;
        return Some(if next.is_null() { 0 } else { next as u64 | POINTER });
    }
    None
}

/// Whether a value of the set that a word stands for `is` what is looked for; only those that can be of
/// one group with `near`, if it is given.
///
/// # Safety
///
/// As [`put`].
unsafe fn find(word: u64, near: Option<u64>, depth: u32, is: &mut impl FnMut(u64) -> bool) -> bool {
    if word & POINTER == 0 {
        return word != 0 && is(word >> 2);
    }
    if word & TABLE != 0 {
        let find = |table: &mut Table| {
            let buckets = match near {
                Some(value) => core::slice::from_ref(&table.buckets[bucket(value, depth)]),
                None => &table.buckets,
            };
            let mut sets = buckets.iter().chain([&table.rest]);
            // SAFETY: as the caller says.
            sets.any(|set| unsafe { find(*set, near, depth + 1, is) })
        };
        // SAFETY: as the caller says; what is below is not this table.
        return unsafe { Cell::with(Cell::pointer(word), find) };
    }
    let mut at = Cell::<Block>::pointer(word);
    let mut found = false;
    while !at.is_null() && !found {
        let look = |block: &mut Block| {
            found = block.values[..block.used as usize].iter().any(|value| is(*value));
            block.next
        };
        // SAFETY: as the caller says.
        at = unsafe { Cell::with(at, look) };
    }
    found
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
        let word = self.0.load(Ordering::Acquire) & !LOCKED;
        (word & POINTER == 0 && word != 0).then_some(word >> 2)
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
        let mut spare = Spare::default();
        loop {
            let word = self.lock();
            // SAFETY: the lock is held.
            if once && unsafe { find(word, Some(value), 0, &mut |other| other == value) } {
                self.unlock(word);
                return false;
            }
            // SAFETY: the lock is held.
            match unsafe { put(word, value, 0, &mut spare) } {
                Ok(word) => {
                    self.unlock(word);
                    return true;
                }
                Err(wanted) => {
                    // Never allocate under the lock.
                    self.unlock(word);
                    spare.provide(wanted);
                }
            }
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
        let mut left = Leftover::none();
        // SAFETY: the lock is held.
        let taken = unsafe { take(word, value, 0, &mut left) };
        self.unlock(taken.unwrap_or(word));
        left.free();
        taken.is_some()
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
        let all = &mut |value| {
            f(value);
            false
        };
        // SAFETY: the lock is held.
        unsafe { find(word, None, 0, all) };
        self.unlock(word);
    }

    /// Whether one of the values is there.
    pub(crate) fn any(&self, mut is: impl FnMut(u64) -> bool) -> bool {
        !self.is_empty() && {
            let word = self.lock();
            // SAFETY: the lock is held.
            let found = unsafe { find(word, None, 0, &mut is) };
            self.unlock(word);
            found
        }
    }

    /// Whether a value of one group with this one is there.
    pub(crate) fn any_near(&self, value: u64) -> bool {
        !self.is_empty() && {
            let word = self.lock();
            let mut is = |other| group(other) == group(value);
            // SAFETY: the lock is held.
            let found = unsafe { find(word, Some(value), 0, &mut is) };
            self.unlock(word);
            found
        }
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

/// Frees the set that a word stands for.
///
/// # Safety
///
/// Nobody else uses it, nor will.
unsafe fn free(word: u64) {
    if word & POINTER == 0 {
        return;
    }
    if word & TABLE != 0 {
        // SAFETY: the table came from `Box::into_raw`, and is nobody else's.
        let table = unsafe { Box::from_raw(Cell::<Table>::pointer(word)) }.0.into_inner();
        for word in table.buckets.into_iter().chain([table.rest]) {
            // SAFETY: as the caller says.
            unsafe { free(word) };
        }
        return;
    }
    let mut at = Cell::<Block>::pointer(word);
    while !at.is_null() {
        // SAFETY: as for tables.
        at = unsafe { Box::from_raw(at) }.0.into_inner().next;
    }
}

impl Drop for LocationSet {
    fn drop(&mut self) {
        // SAFETY: `&mut self` makes it ours.
        unsafe { free(self.lock()) };
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
        behaves_up_to(97);
        behaves_up_to(9_973);
    }

    fn behaves_up_to(most: u64) {
        let set = LocationSet::default();
        let mut oracle: BTreeMap<u64, usize> = BTreeMap::new();
        let mut x = 1u64;
        for _ in 0..40_000 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let v = x % most * 31 + 1;
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

    /// What an update or a look near a value goes through.
    fn looked_at(set: &LocationSet, value: u64) -> usize {
        let word = set.lock();
        let mut count = 0;
        let mut look = |_| {
            count += 1;
            false
        };
        // SAFETY: the lock is held.
        unsafe { find(word, Some(value), 0, &mut look) };
        set.unlock(word);
        count
    }

    #[test]
    fn an_update_looks_at_few_of_many_values() {
        let set = LocationSet::default();
        // Whole groups, single values of groups, and copies.
        let groups = (0..200).flat_map(|group| (group << INDEX_BITS)..((group + 1) << INDEX_BITS));
        let singles = (1 << 20..1 << 24).step_by(1 << INDEX_BITS);
        let values = || groups.clone().chain(singles.clone()).map(|value| value + 1);
        values().chain([1; 20]).for_each(|value| set.add(value));
        let most = values().step_by(97).map(|value| looked_at(&set, value)).max();
        assert!(most.is_some_and(|most| most < 1_500), "{most:?}");
        assert!(set.any_near(1) && set.any_near(1 << 20 | 500) && !set.any_near(1 << 25));
        assert_eq!(contents(&set).values().sum::<usize>(), values().count() + 20);
        // From the oldest on, which are farthest from the newest.
        assert!(values().all(|value| set.remove(value)));
        assert_eq!(contents(&set), BTreeMap::from([(1, 20)]));
        assert!((0..20).all(|_| set.remove(1)) && !set.remove(1) && set.is_empty());
        values().for_each(|value| set.add(value));
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
