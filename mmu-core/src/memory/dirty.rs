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

#[cfg(all(test, feature = "vm-memory", not(loom)))]
mod bitmap_tests;
#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
