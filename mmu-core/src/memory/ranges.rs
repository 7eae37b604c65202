// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An immutable map from disjoint ranges of keys to values, which shares most of itself with the
//! map that it was made from.
//!
//! Ranges lie sorted in *chunks* of at most [`MOST`]; a *directory* of chunks is there as soon as
//! there is more than one. Both are searched alike: the span of the first keys is cut into equal
//! buckets, a few for each item, and a bucket names the items of which one is the last that begins
//! at or before a key in it. Where items are of like size these are two at most; where they are
//! not, as when thousands lie near 0 and one lies at 2^40, what is left is a binary search of one
//! chunk and one of the directory.
//!
//! | | among n ranges |
//! | --- | --- |
//! | a look-up | 2 dependent loads in one chunk, 4 in more of them; no more than log n |
//! | one range more or less | a copy of one chunk and of the directory: 128 + n / 64 items |
//! | a copy of the map | counts a reference or two |
//!
//! A chunk splits into halves when it is full, or, as keys mostly come in ascending order, into
//! itself and the new one; it takes in a neighbour when it is a quarter full.

use core::fmt;
use core::ops::Range;
use core::slice;
use std::sync::Arc;

/// Most ranges of a chunk. Their positions fit into a byte.
const MOST: usize = 128;
/// Buckets of a chunk.
const BUCKETS: usize = 256;
/// Buckets of the directory for each chunk.
const SPREAD: usize = 4;

/// See the module.
pub(super) struct Ranges<T> {
    shape: Shape<T>,
    len: usize,
}

#[derive(Clone)]
enum Shape<T> {
    Empty,
    One(Chunk<T>),
    Many(Directory<T>),
}

/// The chunks, of which there are two at least.
struct Directory<T> {
    start: u64,
    /// log2 of a bucket's keys.
    shift: u32,
    /// Positions in `chunks`.
    buckets: Arc<[[u32; 2]]>,
    chunks: Arc<[Chunk<T>]>,
}

/// At least one range. What a look-up needs first lies with the other chunks' in the directory.
struct Chunk<T> {
    /// First key of the first range.
    start: u64,
    /// log2 of a bucket's keys.
    shift: u32,
    body: Arc<Body<T>>,
}

struct Body<T> {
    /// Positions in `entries`.
    buckets: [[u8; 2]; BUCKETS],
    entries: Box<[Entry<T>]>,
}

/// A range; alone in its half of a cache line if its value is two words.
#[derive(Clone)]
#[repr(align(32))]
struct Entry<T> {
    start: u64,
    len: u64,
    value: T,
}

/// What a sorted array is searched by.
trait Begin {
    fn start(&self) -> u64;
}

impl<T> Begin for Chunk<T> {
    #[inline]
    fn start(&self) -> u64 {
        self.start
    }
}

impl<T> Begin for Entry<T> {
    #[inline]
    fn start(&self) -> u64 {
        self.start
    }
}

/// The last of the items between `low` and `high` that begins at or before the key; `low` if there
/// is none.
#[inline]
fn last<E: Begin>(items: &[E], low: usize, high: usize, key: u64) -> Option<&E> {
    let at = if high - low <= 1 {
        // No branch: which of two it is cannot be predicted.
        low + usize::from(items.get(high)?.start() <= key) * (high - low)
    } else {
        low + items.get(low + 1..=high)?.partition_point(|item| item.start() <= key)
    };
    items.get(at)
}

/// log2 of the keys of a bucket if so many buckets are to span the items' first keys.
fn shift<E: Begin>(items: &[E], buckets: usize) -> u32 {
    let [first, .., last] = items else { return 0 };
    let span = last.start() - first.start();
    // A bucket too few, and then half of that: never more than asked for.
    (span / buckets as u64).checked_ilog2().map_or(0, |log| log + 1)
}

/// Writes the buckets that so many keys apart begin: for each the last items that begin at or
/// before its first and its last key. `place` makes a bucket's half of a position.
fn fill<E: Begin, P: Copy>(items: &[E], shift: u32, place: fn(usize) -> P, buckets: &mut [[P; 2]]) {
    let Some(first) = items.first() else { return };
    let mut done = 0;
    for (at, item) in items.iter().enumerate() {
        let offset = item.start() - first.start();
        let bucket = (offset >> shift) as usize;
        if bucket >= done {
            let before = place(at.saturating_sub(1));
            buckets[done..bucket].fill([before; 2]);
            let exact = offset & ((1 << shift) - 1) == 0;
            buckets[bucket] = [if exact { place(at) } else { before }, place(at)];
            done = bucket + 1;
        } else {
            buckets[bucket][1] = place(at);
        }
    }
    buckets[done..].fill([place(items.len() - 1); 2]);
}

impl<T> Directory<T> {
    fn new(chunks: Arc<[Chunk<T>]>) -> Self {
        let most = chunks.len() * SPREAD;
        let shift = shift(&chunks, most);
        let mut buckets = vec![[0; 2]; most];
        fill(&chunks, shift, |at| at as u32, &mut buckets);
        let start = chunks.first().map_or(0, |chunk| chunk.start);
        Self { start, shift, buckets: buckets.into(), chunks }
    }

    /// The chunk that the key's range is in, if there is one.
    #[inline]
    fn find(&self, key: u64) -> Option<&Chunk<T>> {
        // A key below the first wraps and is looked for in the last chunk, in vain.
        let bucket = (key.wrapping_sub(self.start) >> self.shift) as usize;
        match self.buckets.get(bucket) {
            Some(&[low, high]) => last(&self.chunks, low as usize, high as usize, key),
            None => self.chunks.last(),
        }
    }
}

impl<T> Chunk<T> {
    fn new(entries: Box<[Entry<T>]>) -> Self {
        debug_assert!(!entries.is_empty() && entries.len() <= MOST);
        let mut buckets = [[0; 2]; BUCKETS];
        let shift = shift(&entries, BUCKETS);
        fill(&entries, shift, |at| at as u8, &mut buckets);
        let start = entries.first().map_or(0, |entry| entry.start);
        Self { start, shift, body: Arc::new(Body { buckets, entries }) }
    }

    #[inline]
    fn find(&self, key: u64) -> Option<&Entry<T>> {
        let Body { buckets, entries } = &*self.body;
        // As for the directory.
        let bucket = (key.wrapping_sub(self.start) >> self.shift) as usize;
        let entry = match buckets.get(bucket) {
            Some(&[low, high]) => last(entries, low as usize, high as usize, key),
            None => entries.last(),
        };
        entry.filter(|entry| key.wrapping_sub(entry.start) < entry.len)
    }
}

impl<T> Entry<T> {
    fn end(&self) -> u64 {
        self.start + self.len
    }

    fn pair(&self) -> (Range<u64>, &T) {
        (self.start..self.end(), &self.value)
    }
}

impl<T> Ranges<T> {
    /// Number of ranges.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The value of the key's range, and how far from its first key this one is.
    #[inline]
    pub(super) fn get(&self, key: u64) -> Option<(&T, u64)> {
        let entry = self.find(key)?;
        Some((&entry.value, key - entry.start))
    }

    /// The key's range and its value.
    #[inline]
    pub(super) fn range_of(&self, key: u64) -> Option<(Range<u64>, &T)> {
        self.find(key).map(Entry::pair)
    }

    #[inline]
    fn find(&self, key: u64) -> Option<&Entry<T>> {
        match &self.shape {
            Shape::Empty => None,
            Shape::One(chunk) => chunk.find(key),
            Shape::Many(directory) => directory.find(key)?.find(key),
        }
    }

    /// All ranges, in the order of their keys.
    pub(super) fn iter(&self) -> Iter<'_, T> {
        Iter { chunks: self.chunks().iter(), entries: [].iter(), left: self.len }
    }

    /// The ranges that have a key in this one, in the order of their keys.
    pub(super) fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, &T)> {
        let within = self.touching(&range);
        let chunks = self.chunks()[within].iter();
        let mut iter = Iter { chunks, entries: [].iter(), left: self.len };
        if let Some(chunk) = iter.chunks.next() {
            let entries = &chunk.body.entries;
            iter.entries = entries[entries.partition_point(|e| e.end() <= range.start)..].iter();
        }
        iter.take_while(move |(found, _)| found.start < range.end)
    }

    fn chunks(&self) -> &[Chunk<T>] {
        match &self.shape {
            Shape::Empty => &[],
            Shape::One(chunk) => slice::from_ref(chunk),
            Shape::Many(directory) => &directory.chunks,
        }
    }

    /// Positions of the chunks that have ranges with keys in this one, and of none or one before
    /// them.
    fn touching(&self, range: &Range<u64>) -> Range<usize> {
        let chunks = self.chunks();
        let end = chunks.partition_point(|chunk| chunk.start < range.end);
        let start = chunks[..end].partition_point(|chunk| chunk.start <= range.start);
        start.saturating_sub(1)..end
    }
}

impl<T: Clone> Ranges<T> {
    /// The same and one range more, which must not overlap any.
    #[must_use]
    pub(super) fn insert(&self, range: Range<u64>, value: T) -> Self {
        debug_assert!(!range.is_empty() && self.overlapping(range.clone()).next().is_none());
        let entry = Entry { start: range.start, len: range.end - range.start, value };
        let chunks = self.chunks();
        let near = chunks.partition_point(|chunk| chunk.start < range.start).saturating_sub(1);
        let Some(chunk) = chunks.get(near) else {
            return Self { shape: Shape::One(Chunk::new([entry].into())), len: 1 };
        };
        let old = &chunk.body.entries;
        let at = old.partition_point(|entry| entry.start < range.start);
        let mut entries = Vec::with_capacity(old.len() + 1);
        entries.extend_from_slice(&old[..at]);
        entries.push(entry);
        entries.extend_from_slice(&old[at..]);
        let most = if at == MOST { MOST } else { MOST / 2 + 1 };
        self.splice(near..near + 1, entries, most)
    }

    /// The same without the range that begins at `start`.
    #[must_use]
    pub(super) fn remove(&self, start: u64) -> Self {
        let near = self.touching(&(start..start + 1));
        let chunks = &self.chunks()[near.clone()];
        let entries = chunks.iter().flat_map(|chunk| &chunk.body.entries);
        let entries: Vec<_> = entries.filter(|entry| entry.start != start).cloned().collect();
        self.splice(near, entries, MOST)
    }

    /// The same without the keys in `range`. What is left of a range that had some of them has
    /// the value that `tail` makes of the old one and of how many keys after the old range's
    /// first the new one begins.
    #[must_use]
    pub(super) fn cut(&self, range: Range<u64>, tail: impl Fn(&T, u64) -> T) -> Self {
        let near = self.touching(&range);
        let mut entries = Vec::new();
        for entry in self.chunks()[near.clone()].iter().flat_map(|chunk| &chunk.body.entries) {
            let (start, end) = (entry.start, entry.end());
            if end <= range.start || start >= range.end {
                entries.push(entry.clone());
                continue;
            }
            if start < range.start {
                entries.push(Entry { len: range.start - start, ..entry.clone() });
            }
            if end > range.end {
                let value = tail(&entry.value, range.end - start);
                entries.push(Entry { start: range.end, len: end - range.end, value });
            }
        }
        self.splice(near, entries, MOST)
    }

    /// The same with other entries in place of those of the chunks at `at`, in chunks of `most`
    /// if one is too little for them.
    fn splice(&self, mut at: Range<usize>, mut entries: Vec<Entry<T>>, most: usize) -> Self {
        let old = self.chunks();
        let count = |chunks: &[Chunk<T>]| chunks.iter().map(|chunk| chunk.body.entries.len()).sum();
        let gone: usize = count(&old[at.clone()]);
        let len = self.len + entries.len() - gone;
        if entries.len() < MOST / 4 {
            let fits = |chunk: &&Chunk<T>| chunk.body.entries.len() + entries.len() <= MOST / 2;
            if let Some(before) = at.start.checked_sub(1).and_then(|i| old.get(i)).filter(fits) {
                entries.splice(..0, before.body.entries.iter().cloned());
                at.start -= 1;
            } else if let Some(after) = old.get(at.end).filter(fits) {
                entries.extend_from_slice(&after.body.entries);
                at.end += 1;
            }
        }
        let most = if entries.len() <= MOST { MOST } else { most };
        let mut new = Vec::new();
        while !entries.is_empty() {
            let rest = entries.split_off(most.min(entries.len()));
            new.push(Chunk::new(entries.into()));
            entries = rest;
        }
        let (left, right) = (&old[..at.start], &old[at.end..]);
        let shape = match left.len() + new.len() + right.len() {
            0 => Shape::Empty,
            1 => match left.first().or(new.first()).or(right.first()) {
                Some(chunk) => Shape::One(chunk.clone()),
                None => Shape::Empty,
            },
            _ => {
                let (left, right) = (left.iter().cloned(), right.iter().cloned());
                Shape::Many(Directory::new(left.chain(new).chain(right).collect()))
            }
        };
        Self { shape, len }
    }
}

/// See [`Ranges::iter`].
pub(super) struct Iter<'r, T> {
    chunks: slice::Iter<'r, Chunk<T>>,
    entries: slice::Iter<'r, Entry<T>>,
    left: usize,
}

impl<'r, T> Iterator for Iter<'r, T> {
    type Item = (Range<u64>, &'r T);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.entries.next() {
                self.left -= 1;
                return Some(entry.pair());
            }
            self.entries = self.chunks.next()?.body.entries.iter();
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<T> ExactSizeIterator for Iter<'_, T> {}

impl<T> Clone for Directory<T> {
    fn clone(&self) -> Self {
        let Self { start, shift, ref buckets, ref chunks } = *self;
        Self { start, shift, buckets: Arc::clone(buckets), chunks: Arc::clone(chunks) }
    }
}

impl<T> Clone for Chunk<T> {
    fn clone(&self) -> Self {
        Self { start: self.start, shift: self.shift, body: Arc::clone(&self.body) }
    }
}

impl<T> Clone for Ranges<T> {
    fn clone(&self) -> Self {
        let shape = match &self.shape {
            Shape::Empty => Shape::Empty,
            Shape::One(chunk) => Shape::One(chunk.clone()),
            Shape::Many(directory) => Shape::Many(directory.clone()),
        };
        Self { shape, len: self.len }
    }
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self { shape: Shape::Empty, len: 0 }
    }
}

impl<T: fmt::Debug> fmt::Debug for Ranges<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// What is checked against: values by first key and end.
    type Oracle = BTreeMap<u64, (u64, u64)>;

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    /// Where ranges come to lie.
    #[derive(Clone, Copy, Debug)]
    enum Layout {
        /// Without gaps or nearly.
        Dense,
        /// Anywhere, of any length.
        Scattered,
        /// Thousands near 0, and a few far away.
        Skewed,
        /// In ascending order.
        Ascending,
        Descending,
    }

    const LAYOUTS: [Layout; 5] =
        [Layout::Dense, Layout::Scattered, Layout::Skewed, Layout::Ascending, Layout::Descending];

    impl Layout {
        fn range(self, random: &mut Random, nth: u64) -> Range<u64> {
            let (start, len) = match self {
                Self::Dense => (random.below(6_000) * 4, 1 + random.below(4)),
                Self::Scattered => {
                    let most = 1 << random.below(30);
                    let len = 1 + random.below(most);
                    (random.below(1 << 51), len)
                }
                Self::Skewed if random.below(200) == 0 => {
                    (random.below(1 << 11) << 40, 1 << (20 + random.below(21)))
                }
                Self::Skewed => (random.below(20_000), 1 + random.below(3)),
                Self::Ascending => (nth * 5 + random.below(3), 1 + random.below(3)),
                Self::Descending => ((1 << 40) - nth * 5 - random.below(3), 1 + random.below(2)),
            };
            start..start + len
        }
    }

    /// The map holds what the oracle does, and is in order.
    fn check(map: &Ranges<u64>, oracle: &Oracle) {
        assert_eq!((map.len(), map.iter().len()), (oracle.len(), oracle.len()));
        let expected = oracle.iter().map(|(start, (end, value))| (*start..*end, value));
        assert!(map.iter().eq(expected));
        let chunks = map.chunks();
        for chunk in chunks {
            let entries = &chunk.body.entries;
            assert!(!entries.is_empty() && entries.len() <= MOST);
            assert_eq!(chunk.start, entries[0].start);
        }
        assert!(chunks.len() <= 2 + map.len() / (MOST / 16));
    }

    fn check_key(map: &Ranges<u64>, oracle: &Oracle, key: u64) {
        let found = oracle.range(..=key).next_back().filter(|(_, (end, _))| key < *end);
        assert_eq!(map.get(key), found.map(|(start, (_, value))| (value, key - start)));
        let range = found.map(|(start, (end, value))| (*start..*end, value));
        assert_eq!(map.range_of(key), range);
    }

    fn touching(oracle: &Oracle, range: &Range<u64>) -> Vec<(Range<u64>, u64)> {
        let end = oracle.range(..range.end);
        let touching = end.rev().take_while(|(_, (end, _))| *end > range.start);
        let mut found: Vec<_> =
            touching.map(|(start, (end, value))| (*start..*end, *value)).collect();
        found.reverse();
        found
    }

    fn insert(map: &mut Ranges<u64>, oracle: &mut Oracle, range: Range<u64>, value: u64) {
        *map = map.insert(range.clone(), value);
        oracle.insert(range.start, (range.end, value));
    }

    fn remove(map: &mut Ranges<u64>, oracle: &mut Oracle, start: u64) {
        *map = map.remove(start);
        oracle.remove(&start).unwrap();
    }

    fn cut(map: &mut Ranges<u64>, oracle: &mut Oracle, range: Range<u64>) {
        *map = map.cut(range.clone(), |value, n| value + n);
        for (old, value) in touching(oracle, &range) {
            oracle.remove(&old.start);
            if old.start < range.start {
                oracle.insert(old.start, (range.start, value));
            }
            if old.end > range.end {
                oracle.insert(range.end, (old.end, value + range.end - old.start));
            }
        }
    }

    #[test]
    fn is_what_a_sorted_map_is() {
        for (round, layout) in LAYOUTS.iter().cycle().take(10).enumerate() {
            let random = &mut Random(0x9e37_79b9_7f4a_7c15 + round as u64);
            let (mut map, mut oracle) = (Ranges::default(), Oracle::new());
            let mut kept = Vec::new();
            // Grows to thousands, then shrinks to none.
            for step in 0..14_000u64 {
                let range = layout.range(random, step);
                let expected = touching(&oracle, &range);
                let found = map.overlapping(range.clone());
                assert!(found.eq(expected.iter().map(|(range, value)| (range.clone(), value))));
                let grows = step < 6_000;
                if expected.is_empty() && (grows || random.below(4) == 0) {
                    insert(&mut map, &mut oracle, range.clone(), step);
                } else if random.below(if grows { 20 } else { 1 }) == 0 {
                    let other = oracle.range(range.start..).next().or(oracle.iter().next());
                    if let Some((&start, _)) = other {
                        remove(&mut map, &mut oracle, start);
                    }
                }
                if random.below(500) == 0 {
                    let wide = if random.below(16) == 0 { 30 } else { 8 };
                    let most = 1 << random.below(wide);
                    let len = random.below(most);
                    let start = range.start + random.below(range.end - range.start);
                    cut(&mut map, &mut oracle, start..start + len);
                }
                for key in [range.start.wrapping_sub(1), range.start, range.end - 1, range.end] {
                    check_key(&map, &oracle, key);
                }
                if step % 1_000 == 0 {
                    check(&map, &oracle);
                    let edges: Vec<_> = oracle.iter().map(|(s, (e, _))| [*s, *e]).collect();
                    for key in edges.as_flattened() {
                        (key.saturating_sub(1)..key + 2).for_each(|k| check_key(&map, &oracle, k));
                    }
                    for key in [0, u64::MAX, 1 << 52, random.below(1 << 52)] {
                        check_key(&map, &oracle, key);
                    }
                    kept.push((map.clone(), oracle.clone()));
                }
            }
            cut(&mut map, &mut oracle, 0..1 << 53);
            assert!(map.len() == 0 && map.chunks().is_empty() && map.get(0).is_none());
            // Old versions are as they were.
            kept.iter().for_each(|(map, oracle)| check(map, oracle));
            assert!(kept.iter().any(|(map, _)| map.chunks().len() > 20), "{layout:?}");
        }
    }

    fn numbered(count: u64) -> Ranges<u64> {
        (0..count).fold(Ranges::default(), |map, n| map.insert(n * 10..n * 10 + 5, n))
    }

    #[test]
    fn a_change_shares_all_chunks_but_one_or_two() {
        let map = numbered(10_000);
        assert_eq!(map.chunks().len(), 10_000usize.div_ceil(MOST));
        let shared = |a: &Ranges<u64>, b: &Ranges<u64>| {
            let same = |chunk: &Chunk<u64>| {
                b.chunks().iter().any(|other| Arc::ptr_eq(&chunk.body, &other.body))
            };
            a.chunks().iter().filter(|chunk| same(chunk)).count()
        };
        let more = map.insert(54_327..54_328, 0);
        let chunks = map.chunks().len();
        assert_eq!((more.chunks().len(), shared(&map, &more)), (chunks + 1, chunks - 1));
        assert_eq!((more.get(54_327), map.get(54_327)), (Some((&0, 0)), None));
        let less = more.remove(54_327);
        assert_eq!(shared(&more, &less), chunks);
        assert!(less.iter().eq(map.iter()));
    }

    #[test]
    fn chunks_split_when_full_and_merge_when_small() {
        let map = numbered(MOST as u64);
        assert_eq!(map.chunks().len(), 1);
        let sizes = |map: &Ranges<u64>| -> Vec<_> {
            map.chunks().iter().map(|chunk| chunk.body.entries.len()).collect()
        };
        let mut map = map.insert(7..8, 0);
        assert_eq!(sizes(&map), [MOST / 2 + 1, MOST / 2]);
        for n in (MOST as u64 / 4..MOST as u64).rev() {
            map = map.remove(n * 10);
        }
        assert_eq!(sizes(&map), [MOST / 4 + 1]);
        assert_eq!(sizes(&numbered(MOST as u64 + 1)), [MOST, 1]);
        let none = (0..MOST as u64 / 4).fold(map.remove(7), |map, n| map.remove(n * 10));
        assert_eq!((none.len(), none.iter().next(), sizes(&none)), (0, None, vec![]));
    }

    #[test]
    fn a_cut_leaves_what_lies_beside_it() {
        let whole = Ranges::default().insert(100..1 << 40, 1000);
        let cut = whole.cut(200..300, |value, n| value + n);
        assert!(cut.iter().eq([(100..200, &1000), (300..1 << 40, &1200)]));
        assert_eq!((cut.get(250), cut.get(301)), (None, Some((&1200, 1))));
        assert!(whole.cut(0..100, |_, _| 0).iter().eq(whole.iter()));
        assert_eq!(whole.cut(0..1 << 41, |_, _| 0).len(), 0);
    }
}
