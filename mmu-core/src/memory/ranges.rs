// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An immutable map from disjoint ranges of keys to values, which shares most of itself with the
//! map that it was made from.
//!
//! Ranges lie sorted in *chunks* of at most 128, and chunks in a *directory* as soon as there are
//! two. A look-up does not search, it guesses, and sees whether the range that it comes to has the
//! key:
//!
//! * The directory's span is cut into equal buckets, two to four for each chunk. A bucket names the
//!   chunk that most of its keys are in. Chunks are split at round keys, where buckets begin, so
//!   that this is nearly always the right one.
//! * A chunk's span is cut into 128 to 256 buckets. A bucket names the last ranges that begin at or
//!   before its first and its last key. If these are the same or neighbours, one comparison without
//!   a branch tells which it is.
//!
//! Only if the guess fails are directory and chunk searched by halving: for keys that are in no
//! range, and where ranges are so unlike that equal buckets do not tell them apart, as when
//! thousands lie near 0 and one lies at 2^40.
//!
//! | | among n ranges |
//! | --- | --- |
//! | a look-up | 3 dependent loads up to 128 ranges, 5 beyond; log n steps if the guess fails |
//! | one range more or less | one chunk and the directory anew: up to 128 + n / 64 items |
//! | a copy of the map | one or two references |
//!
//! A map of up to 128 ranges touches three places of memory besides itself, which are those of the
//! chunk; a change leaves all chunks but one or two as and where they were, in caches too.
//!
//! A chunk takes in a neighbour when it is less than a quarter full and both fit into a half.

use core::fmt;
use core::ops::Range;
use core::slice;
use std::sync::Arc;

/// Most ranges of a chunk. Their positions fit into a byte. A look-up in one chunk is faster than in
/// two; a change of one takes time in proportion.
const MOST: usize = 128;
/// Buckets of a chunk.
const BUCKETS: usize = 256;
/// Most buckets of the directory for each chunk.
const SPREAD: usize = 4;

/// See the module.
pub(super) struct Ranges<T> {
    shape: Shape<T>,
    len: usize,
}

enum Shape<T> {
    Empty,
    One(Chunk<T>),
    Many(Directory<T>),
}

/// The chunks, of which there are two at least.
struct Directory<T> {
    /// log2 of a bucket's keys.
    shift: u32,
    /// Number of the first bucket, which begins at a multiple of its size as all do.
    first: u64,
    /// For each bucket the position of the chunk that most of its keys are in.
    buckets: Arc<[u32]>,
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

/// A range. Of the size of half a cache line if its value is of two words, and then never in two.
#[derive(Clone)]
#[repr(align(32))]
struct Entry<T> {
    start: u64,
    len: u64,
    value: T,
}

/// log2 of the keys of a bucket if fewer buckets than so many are to span so many keys.
fn shift(span: u64, buckets: usize) -> u32 {
    (span / buckets as u64).checked_ilog2().map_or(0, |log| log + 1)
}

impl<T> Directory<T> {
    fn new(chunks: Arc<[Chunk<T>]>) -> Self {
        let start = chunks.first().map_or(0, |chunk| chunk.start);
        let end = chunks.last().map_or(0, |chunk| chunk.start);
        let shift = shift(end - start, chunks.len() * SPREAD);
        let first = start >> shift;
        let mut at = 0;
        let mut buckets = Vec::with_capacity(chunks.len() * SPREAD + 1);
        buckets.extend((first..=end >> shift).map(|bucket| {
            let middle = (bucket << shift) + (1 << shift) / 2;
            while chunks.get(at + 1).is_some_and(|next| next.start <= middle) {
                at += 1;
            }
            at as u32
        }));
        Self { shift, first, buckets: buckets.into(), chunks }
    }

    /// The chunk that the key's range is likely to be in.
    #[inline]
    fn guess(&self, key: u64) -> Option<&Chunk<T>> {
        // A key before the first bucket wraps and is looked for in the last chunk, in vain.
        let bucket = (key >> self.shift).wrapping_sub(self.first) as usize;
        match self.buckets.get(bucket) {
            Some(&at) => self.chunks.get(at as usize),
            None => self.chunks.last(),
        }
    }
}

impl<T> Chunk<T> {
    fn new(entries: Box<[Entry<T>]>) -> Self {
        debug_assert!(!entries.is_empty() && entries.len() <= MOST);
        let mut buckets = [[0; 2]; BUCKETS];
        let start = entries.first().map_or(0, |entry| entry.start);
        let end = entries.last().map_or(0, |entry| entry.start);
        let shift = shift(end - start, BUCKETS);
        let mut done = 0;
        for (at, entry) in entries.iter().enumerate() {
            let offset = entry.start - start;
            let bucket = (offset >> shift) as usize;
            let at = at as u8;
            if bucket >= done {
                let before = at.saturating_sub(1);
                buckets[done..bucket].fill([before; 2]);
                let exact = offset & ((1 << shift) - 1) == 0;
                buckets[bucket] = [if exact { at } else { before }, at];
                done = bucket + 1;
            } else {
                buckets[bucket][1] = at;
            }
        }
        buckets[done..].fill([(entries.len() - 1) as u8; 2]);
        Self { start, shift, body: Arc::new(Body { buckets, entries }) }
    }

    /// The entry that the key is likely to be in. A key before the first wraps as above.
    #[inline]
    fn guess(&self, key: u64) -> Option<&Entry<T>> {
        let Body { buckets, entries } = &*self.body;
        let bucket = (key.wrapping_sub(self.start) >> self.shift) as usize;
        let Some(&[low, high]) = buckets.get(bucket) else { return entries.last() };
        if high - low > 1 {
            return None;
        }
        let (before, after) = (entries.get(usize::from(low))?, entries.get(usize::from(high))?);
        // No branch: which of two it is cannot be predicted.
        Some(if after.start <= key { after } else { before })
    }
}

/// Where to split too many entries: at the roundest key between two that are half a chunk apart.
/// `place` is where they grew: if at the end, as in ascending order, most stay on the left, if at
/// the beginning on the right.
fn split<T>(entries: &[Entry<T>], place: usize) -> usize {
    let low = place / 2;
    let [low, high] = [low, low + MOST / 2].map(|at| entries.get(at).map_or(0, |e| e.start));
    let bit = (low ^ high).checked_ilog2().unwrap_or(0);
    let round = high >> bit << bit;
    entries.partition_point(|entry| entry.start < round)
}

impl<T> Entry<T> {
    fn end(&self) -> u64 {
        self.start + self.len
    }

    #[inline]
    fn contains(&self, key: u64) -> bool {
        key.wrapping_sub(self.start) < self.len
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
        match self.guess(key) {
            // Being a call, this is a branch: what uses the value need not wait for the guess to
            // be confirmed.
            None => self.search(key),
            found => found,
        }
    }

    /// The key's range, most often if there is one.
    #[inline]
    fn guess(&self, key: u64) -> Option<&Entry<T>> {
        let chunk = match &self.shape {
            Shape::Empty => None,
            Shape::One(chunk) => Some(chunk),
            Shape::Many(directory) => directory.guess(key),
        };
        chunk?.guess(key).filter(|entry| entry.contains(key))
    }

    /// The key's range.
    #[cold]
    #[inline(never)]
    fn search(&self, key: u64) -> Option<&Entry<T>> {
        let chunks = self.chunks();
        let at = chunks.partition_point(|chunk| chunk.start <= key).checked_sub(1)?;
        let entries = &chunks.get(at)?.body.entries;
        let at = entries.partition_point(|entry| entry.start <= key).checked_sub(1)?;
        entries.get(at).filter(|entry| entry.contains(key))
    }

    /// All ranges, in the order of their keys.
    pub(super) fn iter(&self) -> Iter<'_, T> {
        Iter { chunks: self.chunks().iter(), entries: [].iter(), left: self.len }
    }

    /// The ranges that have keys in this one, which must not be empty, in the order of their keys.
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

    /// Positions of the chunks that have ranges with keys in this one, and of at most one before
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
        self.splice(near..near + 1, entries, at)
    }

    /// The same without the range that begins at `start`, which must be there.
    #[must_use]
    pub(super) fn remove(&self, start: u64) -> Self {
        let chunks = self.chunks();
        let near = chunks.partition_point(|chunk| chunk.start <= start).saturating_sub(1);
        let Some(chunk) = chunks.get(near) else { return self.clone() };
        let old = &chunk.body.entries;
        let at = old.partition_point(|entry| entry.start < start);
        let found = old.get(at).is_some_and(|entry| entry.start == start);
        debug_assert!(found);
        let mut entries = Vec::with_capacity(old.len());
        entries.extend_from_slice(&old[..at]);
        entries.extend_from_slice(&old[at + usize::from(found)..]);
        self.splice(near..near + 1, entries, at)
    }

    /// The same without the keys in `range`. What is left of a range that had some of them has
    /// the value that `tail` makes of the old one and of how many keys after the old range's
    /// first the new one begins.
    #[must_use]
    pub(super) fn cut(&self, range: Range<u64>, tail: impl Fn(&T, u64) -> T) -> Self {
        if range.is_empty() {
            return self.clone();
        }
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
        let middle = entries.len() / 2;
        self.splice(near, entries, middle)
    }

    /// The same with other entries in place of those of the chunks at `at`; they differ near
    /// `place`.
    fn splice(&self, mut at: Range<usize>, mut entries: Vec<Entry<T>>, place: usize) -> Self {
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
        let mut new = Vec::new();
        while entries.len() > MOST {
            let rest = entries.split_off(split(&entries, place.min(MOST)));
            new.push(Chunk::new(entries.into()));
            entries = rest;
        }
        if !entries.is_empty() {
            new.push(Chunk::new(entries.into()));
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
        let Self { shift, first, ref buckets, ref chunks } = *self;
        Self { shift, first, buckets: Arc::clone(buckets), chunks: Arc::clone(chunks) }
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
mod tests;
