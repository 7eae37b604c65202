// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty logs: which pages were written since somebody last asked.
//!
//! A log has one bit for each 4 KiB page. Three kinds of writers set bits: faults that let the
//! guest write a page, the engine's own stores for the guest, and the VMM's stores through
//! vm-memory. A harvest clears bits, takes the right to write those pages away, and reports them.
//!
//! # Protocol (R13)
//!
//! * *Mark* ([`DirtyLog::mark`]): the entry is made writable, or the bytes are stored, *before*
//!   the bit is set; a guest enters after it. Setting the bit is always a read-modify-write, even
//!   if it is set already: the harvest that clears it then reads from this mark and so sees the
//!   entry. A plain load that finds the bit set gives the harvest nothing to read from; the
//!   harvest could then clear the bit, not find the entry writable, and leave the page writable
//!   with a clear bit.
//! * *Mark, unpinned* ([`DirtyLog::mark_unpinned`]) stores bytes, fences, and then may trust a
//!   plain load: if it found the bit set, its fence comes before the one in the harvest, after
//!   which the bytes are seen.
//! * *Harvest* ([`DirtyLog::clear`]): clear the bit, fence, then protect the
//!   entries, flush, and only then let anybody copy the page.
//! * *Enable* ([`DirtyLog::set_enabled`]): reset the log, set the flag, wait for a grace period,
//!   then protect every entry. Marks of a read section that did not see the flag are of entries
//!   that the protection sees, since the section has ended; unpinned ones are ordered by the
//!   fences.
//!
//! # Guarantees
//!
//! A write whose mark happened before a harvest began is in that harvest or in one that began
//! earlier, which may still be under way. No operation waits for another.

use crate::addr::PAGE_SIZE;
use crate::sync::{AtomicBool, AtomicU64, LazyArray, Ordering, fence};
use core::iter::FusedIterator;
use core::ops::Range;
use std::sync::Arc;

/// The dirty log of a stretch of memory: one bit for each 4 KiB page. A clone is another handle on
/// the same log.
///
/// The log records while a memslot whose log it is logs, and ignores marks otherwise. Its memory is
/// allocated where pages are marked, 4 KiB for each 128 MiB.
///
/// It is a bitmap for vm-memory (feature `vm-memory`): then the VMM's own writes to guest memory
/// are in the log that the engine uses for the guest's.
///
#[cfg_attr(feature = "vm-memory", doc = "```")]
#[cfg_attr(not(feature = "vm-memory"), doc = "```ignore")]
/// use mmu_core::memory::{AllocatedMemory, DirtyLog, SlotConfig, SlotId, VmMemoryRegion, runs};
/// use mmu_core::{Config, Mmu};
/// use std::sync::Arc;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let ranges = [(GuestAddress(0), 1 << 20)];
/// let memory = Arc::new(GuestMemoryMmap::<DirtyLog>::from_ranges(&ranges)?);
/// let region = VmMemoryRegion::with_dirty_log(Arc::clone(&memory), GuestAddress(0))?;
/// let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
/// mmu.create_slot(SlotConfig::new(0, region.base(), Arc::new(region)).log_dirty())?;
///
/// memory.write_slice(&[1; 0x2000], GuestAddress(0x5000))?;
/// let mut bitmap = [0; 4];
/// mmu.dirty_log(SlotId(0), &mut bitmap)?;
/// assert_eq!(runs(&bitmap).collect::<Vec<_>>(), [5..7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct DirtyLog(Arc<Log>);

#[derive(Debug)]
struct Log {
    /// Bit `n % 64` of word `n / 64` is page `n`. No bit from `pages` on is ever set.
    words: LazyArray<AtomicU64>,
    pages: usize,
    enabled: AtomicBool,
}

impl Default for Log {
    fn default() -> Self {
        Self { words: LazyArray::new(0), pages: 0, enabled: AtomicBool::new(false) }
    }
}

impl DirtyLog {
    /// A clean log for memory of this many bytes; a page that is there in part counts.
    ///
    /// # Example
    ///
    /// ```
    /// use mmu_core::memory::DirtyLog;
    ///
    /// assert_eq!(DirtyLog::new(0x3000).pages(), 3);
    /// assert_eq!(DirtyLog::new(0x3001).pages(), 4);
    /// ```
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        let pages = size_bytes.div_ceil(PAGE_SIZE) as usize;
        let words = LazyArray::new(pages.div_ceil(64));
        Self(Arc::new(Log { words, pages, enabled: AtomicBool::new(false) }))
    }

    /// Pages that the log covers.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.pages as u64
    }

    /// Whether marks are recorded.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        // Relaxed: see `mark` and `mark_unpinned` for those who depend on the order.
        self.0.enabled.load(Ordering::Relaxed)
    }

    /// Records marks from now on, or ignores them. What to do before and after enabling is in the
    /// module's documentation.
    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.0.enabled.store(enabled, Ordering::Relaxed);
        // Pairs with the fence in `mark_unpinned`: that mark sees the flag, or whoever copies
        // pages after this sees the bytes that it was for.
        fence(Ordering::SeqCst);
    }

    /// Empties the log and records marks from now on, unless it does so for somebody else already;
    /// whether it does now. What to do after it is in the module's documentation.
    pub(crate) fn claim(&self) -> bool {
        if self.is_enabled() {
            return false;
        }
        self.reset();
        let (off, on, relaxed) = (false, true, Ordering::Relaxed);
        let claimed = self.0.enabled.compare_exchange(off, on, relaxed, relaxed).is_ok();
        // As in `set_enabled`.
        fence(Ordering::SeqCst);
        claimed
    }

    /// Sets the page's bit, unless marks are ignored; whether it was clear. Pages beyond the end
    /// are ignored.
    ///
    /// The caller is in a read section that includes what the mark is for: a grace period after
    /// [`DirtyLog::set_enabled`] orders the two.
    #[inline]
    pub(crate) fn mark(&self, page: usize) -> bool {
        if page >= self.0.pages || !self.is_enabled() {
            return false;
        }
        let bit = 1 << (page % 64);
        // Release pairs with the Acquire in `clear`: whoever takes the bit sees the
        // entry that was made writable, or the bytes that were stored, before it (R13).
        self.0.words.get_or_alloc(page / 64).fetch_or(bit, Ordering::Release) & bit == 0
    }

    /// Sets the bits of the pages, unless marks are ignored, for bytes that the caller has stored
    /// outside any read section. Pages beyond the end are ignored.
    pub(crate) fn mark_unpinned(&self, pages: Range<usize>) {
        // Pairs with the fences in `set_enabled` and after the bits are cleared: if one of the
        // loads below misses what was done before such a fence, then this fence comes first, and
        // whoever reads the bytes after that one sees them.
        fence(Ordering::SeqCst);
        if !self.is_enabled() {
            return;
        }
        let end = pages.end.min(self.0.pages);
        let mut page = pages.start;
        while page < end {
            let bits = (64 - page % 64).min(end - page);
            let mask = u64::MAX >> (64 - bits) << (page % 64);
            let word = self.0.words.get_or_alloc(page / 64);
            // A device writes the same few pages again and again.
            if word.load(Ordering::Relaxed) & mask != mask {
                // Release as in `mark`.
                word.fetch_or(mask, Ordering::Release);
            }
            page += bits;
        }
    }

    /// The words below `end` that have bits set, by a Relaxed look.
    pub(crate) fn set_words(&self, end: usize) -> impl Iterator<Item = usize> {
        let words = self.0.words.iter_range(0..end);
        words.filter(|(_, bits)| bits.load(Ordering::Relaxed) != 0).map(|(word, _)| word)
    }

    /// 64 pages' bits, left as they are.
    pub(crate) fn peek(&self, word: usize) -> u64 {
        // Acquire pairs with the Release of the marks: what they are for is seen.
        self.0.words.get(word).map_or(0, |bits| bits.load(Ordering::Acquire))
    }

    /// Clears the bits of a word that are in the mask; those of them that were set.
    pub(crate) fn clear(&self, word: usize, mask: u64) -> u64 {
        let Some(bits) = self.0.words.get(word) else { return 0 };
        // Relaxed: a bit that is missed stays for the next harvest, and one whose write happened
        // before this call is not missed.
        if bits.load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        let taken = clear_bits(bits, mask);
        // Pairs with the fence in `mark_unpinned`.
        fence(Ordering::SeqCst);
        taken
    }

    /// Whether the page's bit is set.
    pub(crate) fn is_dirty(&self, page: usize) -> bool {
        self.peek(page / 64) >> (page % 64) & 1 != 0
    }

    /// Clears all bits.
    pub(crate) fn reset(&self) {
        for (_, bits) in self.0.words.iter() {
            clear_bits(bits, u64::MAX);
        }
        // As in `clear`, once for all.
        fence(Ordering::SeqCst);
    }
}

fn clear_bits(bits: &AtomicU64, mask: u64) -> u64 {
    // Acquire pairs with the Release in `mark` and `mark_unpinned`. Words change by
    // read-modify-writes only, so a mark's Release reaches past the marks and harvests after it.
    bits.fetch_and(!mask, Ordering::Acquire) & mask
}

/// The maximal runs of set bits of a dirty bitmap, as page indices: bit `n` of word `w` is page
/// `64 w + n`. A pass takes time in proportion to the words and the runs, whatever the runs' length.
///
/// # Example
///
/// ```
/// use mmu_core::memory::runs;
///
/// // Pages 1 to 3, and a run that crosses from the first word into the second.
/// let bitmap = [0xf000_0000_0000_000e, 0x3];
/// assert_eq!(runs(&bitmap).collect::<Vec<_>>(), [1..4, 60..66]);
/// ```
pub fn runs(bitmap: &[u64]) -> Runs<'_> {
    match bitmap.split_first() {
        Some((first, rest)) => Runs { word: *first, base: 0, rest },
        None => Runs { word: 0, base: 0, rest: &[] },
    }
}

/// See [`runs`].
#[derive(Clone, Debug)]
#[must_use = "iterators do nothing unless consumed"]
pub struct Runs<'a> {
    /// Bits of the current word that have not been returned.
    word: u64,
    /// Page of the current word's bit 0.
    base: u64,
    /// The words after the current one.
    rest: &'a [u64],
}

impl Runs<'_> {
    /// Goes to the next word.
    fn advance(&mut self) -> Option<()> {
        let (first, rest) = self.rest.split_first()?;
        self.word = *first;
        self.base += 64;
        self.rest = rest;
        Some(())
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        while self.word == 0 {
            self.advance()?;
        }
        let first = self.word.trailing_zeros();
        let start = self.base + u64::from(first);
        // The run's end in the current word: everything below its first bit counts as set.
        let mut end = (self.word | !(u64::MAX << first)).trailing_ones();
        while end == 64 {
            if self.advance().is_none() {
                self.word = 0;
                return Some(start..self.base + 64);
            }
            end = self.word.trailing_ones();
        }
        self.word &= u64::MAX << end;
        Some(start..self.base + u64::from(end))
    }
}

impl FusedIterator for Runs<'_> {}

#[cfg(all(feature = "vm-memory", not(loom)))]
mod bitmap {
    //! The log as a bitmap of the vm-memory crate.

    use super::DirtyLog;
    use crate::addr::PAGE_SHIFT;
    use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

    /// A [`DirtyLog`] seen from a byte of its memory on; what vm-memory carries along with each
    /// slice of guest memory.
    #[derive(Clone, Copy, Debug)]
    pub struct DirtyLogSlice<'a> {
        log: &'a DirtyLog,
        /// Of the slice's first byte in the log's memory.
        offset: usize,
    }

    impl<'a> DirtyLogSlice<'a> {
        /// The whole log.
        #[must_use]
        pub fn log(&self) -> &'a DirtyLog {
            self.log
        }

        /// Where in the log's memory the slice begins, in bytes.
        #[must_use]
        pub fn offset(&self) -> usize {
            self.offset
        }
    }

    impl<'a> WithBitmapSlice<'a> for DirtyLog {
        type S = DirtyLogSlice<'a>;
    }

    impl Bitmap for DirtyLog {
        fn mark_dirty(&self, offset: usize, len: usize) {
            let Some(last) = len.checked_sub(1) else { return };
            let end = (offset.saturating_add(last) >> PAGE_SHIFT) + 1;
            self.mark_unpinned(offset >> PAGE_SHIFT..end);
        }

        fn dirty_at(&self, offset: usize) -> bool {
            self.is_dirty(offset >> PAGE_SHIFT)
        }

        fn slice_at(&self, offset: usize) -> DirtyLogSlice<'_> {
            DirtyLogSlice { log: self, offset }
        }
    }

    impl NewBitmap for DirtyLog {
        fn with_len(len: usize) -> Self {
            Self::new(len as u64)
        }
    }

    impl WithBitmapSlice<'_> for DirtyLogSlice<'_> {
        type S = Self;
    }

    impl BitmapSlice for DirtyLogSlice<'_> {}

    impl Bitmap for DirtyLogSlice<'_> {
        // Saturating: what lies beyond the address space lies beyond the log and is ignored.
        fn mark_dirty(&self, offset: usize, len: usize) {
            self.log.mark_dirty(self.offset.saturating_add(offset), len);
        }

        fn dirty_at(&self, offset: usize) -> bool {
            self.log.dirty_at(self.offset.saturating_add(offset))
        }

        fn slice_at(&self, offset: usize) -> Self {
            Self { offset: self.offset.saturating_add(offset), ..*self }
        }
    }
}
#[cfg(all(feature = "vm-memory", not(loom)))]
pub use bitmap::DirtyLogSlice;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn enabled(pages: u64) -> DirtyLog {
        let log = DirtyLog::new(pages * PAGE_SIZE);
        log.set_enabled(true);
        log
    }

    fn dirty(log: &DirtyLog) -> Vec<usize> {
        (0..log.pages() as usize + 64).filter(|page| log.is_dirty(*page)).collect()
    }

    #[test]
    fn marks_are_taken_once() {
        let log = enabled(130);
        assert!(log.mark(0) && log.mark(63) && log.mark(64) && log.mark(129));
        assert!(!log.mark(63), "set already");
        assert_eq!(dirty(&log), [0, 63, 64, 129]);
        assert_eq!(
            (log.peek(0), log.clear(0, u64::MAX), log.clear(0, u64::MAX)),
            (1 << 63 | 1, 1 << 63 | 1, 0)
        );
        assert_eq!((log.clear(1, 2), log.clear(1, 3), log.clear(1, 3)), (0, 1, 0));
        assert!(log.mark(0) && dirty(&log) == [0, 129]);
        log.reset();
        assert!(dirty(&log).is_empty());
        assert_eq!(
            (log.clear(2, u64::MAX), log.clear(3, u64::MAX), log.clear(usize::MAX, u64::MAX)),
            (0, 0, 0)
        );
    }

    #[test]
    fn pages_beyond_the_end_have_no_bit() {
        let log = enabled(70);
        assert!(!log.mark(70) && !log.mark(127) && !log.mark(usize::MAX));
        log.mark_unpinned(68..usize::MAX);
        log.mark_unpinned(80..90);
        assert_eq!(dirty(&log), [68, 69]);
        let none = DirtyLog::default();
        none.set_enabled(true);
        none.mark_unpinned(0..1);
        assert!(!none.mark(0) && none.pages() == 0 && dirty(&none).is_empty());
    }

    #[test]
    fn marks_are_ignored_while_disabled() {
        let log = DirtyLog::new(64 * PAGE_SIZE);
        assert!(!log.mark(1));
        log.mark_unpinned(2..5);
        assert_eq!(log.peek(0), 0);
        log.set_enabled(true);
        assert!(log.mark(1));
        log.set_enabled(false);
        assert!(!log.mark(3) && dirty(&log) == [1]);
    }

    #[test]
    fn clones_share_one_log() {
        let log = enabled(1);
        let other = log.clone();
        assert!(log.mark(0) && !other.mark(0));
        assert_eq!((other.clear(0, u64::MAX), log.clear(0, u64::MAX)), (1, 0));
    }

    proptest! {
        #[test]
        fn ranges_mark_each_page_in_them(
            ranges in prop::collection::vec((0usize..300, 0usize..200), 0..6),
        ) {
            let log = enabled(260);
            let mut oracle = std::collections::BTreeSet::new();
            for (start, len) in ranges {
                log.mark_unpinned(start..start + len);
                oracle.extend(start.min(260)..(start + len).min(260));
            }
            prop_assert_eq!(dirty(&log), oracle.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn runs_are_maximal_and_complete(
            words in prop::collection::vec(
                prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), any::<u64>().prop_map(|x| x & x << 7)],
                0..8,
            ),
        ) {
            let set = |page: u64| words.get((page / 64) as usize).is_some_and(|w| w >> (page % 64) & 1 != 0);
            let mut expected = Vec::new();
            for page in (0..words.len() as u64 * 64).filter(|page| set(*page)) {
                match expected.last_mut() {
                    Some(Range { end, .. }) if *end == page => *end += 1,
                    _ => expected.push(page..page + 1),
                }
            }
            let mut found = runs(&words);
            prop_assert_eq!(found.by_ref().collect::<Vec<_>>(), expected);
            prop_assert_eq!(found.next(), None);
        }
    }

    #[test]
    fn runs_at_the_edges() {
        let all = |bitmap: &[u64]| runs(bitmap).map(|run| (run.start, run.end)).collect::<Vec<_>>();
        assert_eq!(all(&[]), []);
        assert_eq!(all(&[0, 0]), []);
        assert_eq!(all(&[u64::MAX]), [(0, 64)]);
        assert_eq!(all(&[u64::MAX; 3]), [(0, 192)]);
        assert_eq!(all(&[1 << 63, u64::MAX, 1]), [(63, 129)]);
        assert_eq!(all(&[1 << 63, 0, 1]), [(63, 64), (128, 129)]);
        assert_eq!(all(&[1 << 63 | 1, 5]), [(0, 1), (63, 65), (66, 67)]);
    }

    #[test]
    fn every_mark_is_harvested_once() {
        const PAGES: usize = 100;
        const ROUNDS: u64 = 2_000;
        let log = enabled(PAGES as u64);
        let mut taken = vec![0u64; PAGES];
        let mut harvest = || {
            for word in 0..PAGES.div_ceil(64) {
                let bits = log.clear(word, u64::MAX);
                (0..64).filter(|n| bits >> n & 1 != 0).for_each(|n| taken[word * 64 + n] += 1);
            }
        };
        let marked = std::thread::scope(|s| {
            let markers: Vec<_> = (0..2)
                .map(|_| {
                    s.spawn(|| {
                        let mut set = [0u64; PAGES];
                        for _ in 0..ROUNDS {
                            (0..PAGES).for_each(|page| set[page] += u64::from(log.mark(page)));
                        }
                        set
                    })
                })
                .collect();
            while !markers.iter().all(|marker| marker.is_finished()) {
                harvest();
            }
            markers.into_iter().map(|marker| marker.join().unwrap()).collect::<Vec<_>>()
        });
        harvest();
        for page in 0..PAGES {
            assert_eq!(taken[page], marked.iter().map(|set| set[page]).sum::<u64>());
        }
    }
}

#[cfg(all(test, feature = "vm-memory", not(loom)))]
mod bitmap_tests {
    use super::*;
    use crate::memory::{Backing, RegionError, VmMemoryRegion};
    use vm_memory::bitmap::{Bitmap, NewBitmap};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
    use vm_memory::{GuestRegionMmap, MmapRegion};

    fn dirty(log: &DirtyLog) -> Vec<u64> {
        (0..log.pages()).filter(|page| log.dirty_at((page * PAGE_SIZE) as usize)).collect()
    }

    #[test]
    fn byte_ranges_become_pages() {
        let log = DirtyLog::with_len(0x8001);
        assert_eq!(log.pages(), 9);
        log.set_enabled(true);
        log.mark_dirty(0x1000, 0);
        assert!(dirty(&log).is_empty());
        log.mark_dirty(0xfff, 2);
        log.mark_dirty(0x3000, 0x1000);
        log.mark_dirty(0x8000, usize::MAX);
        log.mark_dirty(usize::MAX, usize::MAX);
        assert_eq!(dirty(&log), [0, 1, 3, 8]);
        assert!(log.dirty_at(0x1fff) && !log.dirty_at(0x2000) && !log.dirty_at(usize::MAX));
    }

    #[test]
    fn slices_count_from_their_start() {
        let log = DirtyLog::new(0x8000);
        log.set_enabled(true);
        let slice = log.slice_at(0x1800).slice_at(0x1000);
        assert_eq!((slice.offset(), slice.log().pages()), (0x2800, 8));
        slice.mark_dirty(0x7ff, 2);
        assert_eq!(dirty(&log), [2, 3]);
        assert!(slice.dirty_at(0) && slice.dirty_at(0x17ff) && !slice.dirty_at(0x1800));
        slice.mark_dirty(usize::MAX, 1);
        assert_eq!(dirty(&log), [2, 3]);
    }

    #[test]
    fn the_vmms_writes_are_in_the_backings_log() {
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x100000), 0x5000)];
        let memory = Arc::new(GuestMemoryMmap::<DirtyLog>::from_ranges(&ranges).unwrap());
        let backing = |address| {
            VmMemoryRegion::with_dirty_log(Arc::clone(&memory), GuestAddress(address)).unwrap()
        };
        let (low, high) = (backing(0x3000), backing(0x104fff));
        let (low, high) = (low.dirty_log().unwrap(), high.dirty_log().unwrap());
        assert_eq!((low.pages(), high.pages()), (0x10, 5));
        memory.write_slice(b"ignored", GuestAddress(0x100000)).unwrap();
        high.set_enabled(true);
        memory.write_slice(b"ignored", GuestAddress(0x2000)).unwrap();
        memory.write_slice(b"two pages", GuestAddress(0x101ffe)).unwrap();
        memory.store(7u32, GuestAddress(0x104ffc), Ordering::Relaxed).unwrap();
        let slice = memory.get_slice(GuestAddress(0x103000), 0x1000).unwrap();
        assert_eq!(dirty(high), [1, 2, 4]);
        slice.copy_from(&[1u8]);
        assert_eq!(high.clear(0, u64::MAX), 0b11110);
        assert!(dirty(low).is_empty());
        let plain = VmMemoryRegion::new(memory, GuestAddress(0)).unwrap();
        assert!(plain.dirty_log().is_none());
    }

    #[test]
    fn a_log_of_something_else_is_refused() {
        let mapping: MmapRegion<DirtyLog> =
            MmapRegionBuilder::new_with_bitmap(0x4000, DirtyLog::new(0x3000)).build().unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0x1000)).unwrap();
        assert_eq!(region.bitmap().log().pages(), 3);
        let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
        assert!(memory.find_region(GuestAddress(0x1000)).is_some());
        let error = VmMemoryRegion::with_dirty_log(memory, GuestAddress(0x1000)).unwrap_err();
        assert!(matches!(
            error,
            RegionError::WrongLog { base: 0x1000, offset: 0, needed: 4, given: 3 }
        ));
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;

    /// A log whose page 0 is dirty, or one that is disabled. Another thread changes a word and
    /// marks; `harvest` says whether it saw the change.
    fn model(enabled: bool, mark: fn(&DirtyLog), harvest: fn(&DirtyLog, &AtomicU64) -> bool) {
        loom::model(move || {
            let log = DirtyLog::new(PAGE_SIZE);
            if enabled {
                log.set_enabled(true);
                log.mark(0);
            }
            let state = Arc::new(AtomicU64::new(0));
            let writer = loom::thread::spawn({
                let (log, state) = (log.clone(), Arc::clone(&state));
                move || {
                    state.store(1, Ordering::Relaxed);
                    mark(&log);
                }
            });
            let seen = harvest(&log, &state);
            writer.join().unwrap();
            assert!(seen || log.is_dirty(0), "R13: neither seen by the harvest nor marked");
        });
    }

    fn harvest(log: &DirtyLog, state: &AtomicU64) -> bool {
        log.clear(0, u64::MAX);
        state.load(Ordering::Relaxed) == 1
    }

    #[test]
    fn r13_mark_of_a_dirty_page_meets_a_harvest() {
        model(true, |log| _ = log.mark(0), harvest);
    }

    #[test]
    fn r13_unpinned_mark_of_a_dirty_page_meets_a_harvest() {
        model(true, |log| log.mark_unpinned(0..1), harvest);
    }

    #[test]
    fn r13_unpinned_mark_meets_the_start_of_logging() {
        model(
            false,
            |log| log.mark_unpinned(0..1),
            |log, state| {
                log.reset();
                log.set_enabled(true);
                state.load(Ordering::Relaxed) == 1
            },
        );
    }
}
