// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty rings: the pages a vCPU has dirtied, as a queue instead of a bitmap to be searched.
//!
//! The idea is KVM's (`KVM_CAP_DIRTY_LOG_RING`): each vCPU has a ring, so that a consumer pays for
//! the pages that were written and not for the size of the guest, and so that a vCPU that dirties
//! faster than its consumer copies can be held back, alone.
//!
//! # Protocol
//!
//! * The slot's log comes first. The vCPU's thread marks the page there, and if that set the bit it
//!   pushes the page (`push`).
//! * A consumer collects pages, *then* clears their bits, protects them and flushes, and then
//!   copies them. A write in between is covered by the copy; one after it sets the bit again and is
//!   pushed again. If bits are cleared in this way only, a page is in one ring at a time, once.
//! * [`DirtyRing::is_soft_full`] asks the vCPU not to enter the guest before somebody has
//!   collected. The reserve above the soft limit is for what one exit can still dirty.
//! * A push into a full ring fails and says so through [`DirtyRing::take_lost`]; the page's bit
//!   stays, so a consumer that finds something lost reads the bitmaps.
//!
//! # Guarantees
//!
//! One thread pushes, and waits for nobody. Any number of threads collect; they wait for each other
//! only. Pages come out in the order in which they went in, none twice. Whoever gets a page, or
//! learns that one was lost, sees the bit and the entry that the push was for.
//!
//! Everything is an atomic, so a second producer at the same time, which is a bug, could lose and
//! repeat pages, but no more.

use super::SlotId;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering, lock};

/// A page of a memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirtyPage {
    /// The memslot.
    pub slot: SlotId,
    /// Index of the 4 KiB page in the slot.
    pub page: u64,
}

/// Why a ring cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The number of entries is out of range or no power of two.
    #[error(
        "a dirty ring cannot have {given} entries: only a power of two from {} to {}",
        DirtyRing::MIN_CAPACITY,
        DirtyRing::MAX_CAPACITY
    )]
    Capacity {
        /// Entries asked for.
        given: u32,
    },
}

/// Fewest entries between the soft limit and the end.
const MIN_RESERVE: u64 = if cfg!(loom) { 1 } else { 16 };

#[derive(Debug, Default)]
struct Entry {
    page: AtomicU64,
    slot: AtomicU32,
}

/// In a cache line of its own: what one side writes at each step and the other only reads.
#[derive(Debug)]
#[repr(align(64))]
struct Line<T>(T);

/// A queue of dirty pages: one vCPU's thread fills it, any thread empties it.
///
/// A page enters the ring when its bit in its slot's dirty log is set. Whoever collects pages must
/// then clear their bits through the engine, which also makes the pages log their next write, and
/// copy them after that. A write that comes in between is in the copy.
///
/// When the ring is soft-full its vCPU should stay out of the guest until pages have been
/// collected. A page that finds the ring full nevertheless is in its slot's log alone:
/// [`DirtyRing::take_lost`] says so.
#[derive(Debug)]
pub struct DirtyRing {
    /// Position `p` is in entry `p % capacity`.
    entries: Box<[Entry]>,
    soft_limit: u64,
    /// Position of the next push. Stored by the producer only.
    pushed: Line<AtomicU64>,
    /// Position of the next page to collect; at most `pushed`, and at most the capacity behind
    /// it. Stored under `consumers` only.
    collected: Line<AtomicU64>,
    lost: AtomicBool,
    consumers: Mutex<()>,
}

impl DirtyRing {
    /// Fewest entries of a ring.
    pub const MIN_CAPACITY: u32 = if cfg!(loom) { 2 } else { 64 };
    /// Most entries of a ring.
    pub const MAX_CAPACITY: u32 = 65_536;

    /// An empty ring of `capacity` entries of 16 bytes.
    ///
    /// # Errors
    ///
    /// [`RingError::Capacity`], unless it is a power of two from [`DirtyRing::MIN_CAPACITY`] to
    /// [`DirtyRing::MAX_CAPACITY`].
    ///
    /// # Example
    ///
    /// ```
    /// use mmu_core::memory::{DirtyRing, RingError};
    ///
    /// let ring = DirtyRing::new(1024)?;
    /// assert!(ring.is_empty() && !ring.is_soft_full());
    /// assert_eq!(DirtyRing::new(1000).unwrap_err(), RingError::Capacity { given: 1000 });
    /// # Ok::<(), RingError>(())
    /// ```
    pub fn new(capacity: u32) -> Result<Self, RingError> {
        if !capacity.is_power_of_two()
            || !(Self::MIN_CAPACITY..=Self::MAX_CAPACITY).contains(&capacity)
        {
            return Err(RingError::Capacity { given: capacity });
        }
        let capacity = u64::from(capacity);
        Ok(Self {
            entries: (0..capacity).map(|_| Entry::default()).collect(),
            soft_limit: capacity - (capacity / 8).max(MIN_RESERVE),
            pushed: Line(AtomicU64::new(0)),
            collected: Line(AtomicU64::new(0)),
            lost: AtomicBool::new(false),
            consumers: Mutex::new(()),
        })
    }

    /// Entries of the ring.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.entries.len()
    }

    /// Appends a page whose bit in its slot's log was just set. `false` if the ring is full: then
    /// the page is in the slot's log only, and `lost` is set. For the vCPU's thread alone.
    pub(crate) fn push(&self, page: DirtyPage) -> bool {
        // Relaxed: only this thread stores it.
        let pushed = self.pushed.0.load(Ordering::Relaxed);
        // Acquire pairs with the Release in `collect`: the entry that is overwritten below has
        // been read.
        let collected = self.collected.0.load(Ordering::Acquire);
        if pushed - collected >= self.entries.len() as u64 {
            // Release pairs with the Acquire in `take_lost`: the page's bit is seen. A store would
            // do, but loom may put one before a swap that has not seen it.
            self.lost.swap(true, Ordering::Release);
            return false;
        }
        let entry = self.entry(pushed);
        entry.slot.store(page.slot.0, Ordering::Relaxed);
        entry.page.store(page.page, Ordering::Relaxed);
        // Release pairs with the Acquire in `collect`: the entry is complete, and the page's bit
        // and what it is for are seen (R13).
        self.pushed.0.store(pushed + 1, Ordering::Release);
        true
    }

    /// Moves the oldest pages, as many as there are and fit, to the start of `out`; how many these
    /// are. Waits for other consumers, never for the vCPU, nor the vCPU for it.
    pub fn collect(&self, out: &mut [DirtyPage]) -> usize {
        let _consumers = lock(&self.consumers);
        // Relaxed: stored under the lock only.
        let collected = self.collected.0.load(Ordering::Relaxed);
        // Acquire pairs with the Release in `push`.
        let pushed = self.pushed.0.load(Ordering::Acquire);
        let mut position = collected;
        for (page, at) in out.iter_mut().zip(collected..pushed) {
            let entry = self.entry(at);
            *page = DirtyPage {
                slot: SlotId(entry.slot.load(Ordering::Relaxed)),
                page: entry.page.load(Ordering::Relaxed),
            };
            position = at + 1;
        }
        // Release pairs with the Acquire in `push`: the entries may be overwritten.
        self.collected.0.store(position, Ordering::Release);
        (position - collected) as usize
    }

    /// Pages in the ring. With a push or a collection under way it may be what was true a moment
    /// ago.
    #[must_use]
    pub fn len(&self) -> usize {
        // In this order: Acquire pairs with the Release in `collect`, which has seen as many
        // pushes, so the second load does too.
        let collected = self.collected.0.load(Ordering::Acquire);
        let pushed = self.pushed.0.load(Ordering::Relaxed);
        // Between the two loads pages may have been collected and others pushed.
        ((pushed - collected) as usize).min(self.entries.len())
    }

    /// Whether no page is in the ring.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the vCPU should not enter the guest before pages have been collected.
    #[must_use]
    pub fn is_soft_full(&self) -> bool {
        self.len() as u64 >= self.soft_limit
    }

    /// Whether a page found the ring full since this was last asked. Its bit is in its slot's log.
    #[must_use]
    pub fn take_lost(&self) -> bool {
        // Acquire pairs with the Release in `push`.
        self.lost.swap(false, Ordering::Acquire)
    }

    fn entry(&self, position: u64) -> &Entry {
        &self.entries[position as usize & (self.entries.len() - 1)]
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const NONE: DirtyPage = DirtyPage { slot: SlotId(u32::MAX), page: u64::MAX };

    fn page(n: u64) -> DirtyPage {
        DirtyPage { slot: SlotId(n as u32 % 7), page: n }
    }

    fn collect(ring: &DirtyRing, most: usize) -> Vec<DirtyPage> {
        let mut out = vec![NONE; most];
        let n = ring.collect(&mut out);
        assert!(out[n..].iter().all(|p| *p == NONE));
        out.truncate(n);
        out
    }

    #[test]
    fn capacities_are_powers_of_two_in_range() {
        for given in [0, 1, 32, 63, 65, 96, 65_535, 1 << 17, u32::MAX] {
            assert_eq!(DirtyRing::new(given).unwrap_err(), RingError::Capacity { given });
        }
        for capacity in [64, 128, 65_536] {
            assert_eq!(DirtyRing::new(capacity).unwrap().capacity(), capacity as usize);
        }
        assert_eq!(
            RingError::Capacity { given: 96 }.to_string(),
            "a dirty ring cannot have 96 entries: only a power of two from 64 to 65536"
        );
    }

    #[test]
    fn pages_come_out_in_order_around_the_end() {
        let ring = DirtyRing::new(64).unwrap();
        let mut next = 0;
        let mut expected = 0;
        for round in 0..100 {
            for _ in 0..round % 64 {
                assert!(ring.push(page(next)));
                next += 1;
            }
            assert_eq!(ring.len() as u64, next - expected);
            while !ring.is_empty() {
                for got in collect(&ring, 5) {
                    assert_eq!(got, page(expected));
                    expected += 1;
                }
            }
        }
        assert_eq!((expected, collect(&ring, 5).len()), (next, 0));
    }

    #[test]
    fn a_full_ring_says_what_it_lost() {
        let ring = DirtyRing::new(64).unwrap();
        let full_at = (0..64).find(|n| ring.is_soft_full() || !ring.push(page(*n)));
        assert_eq!(full_at, Some(48));
        assert!((48..64).all(|n| ring.push(page(n))) && ring.len() == 64);
        assert!(!ring.take_lost());
        assert!(!ring.push(page(64)) && !ring.push(page(65)));
        assert_eq!(collect(&ring, 0), []);
        assert_eq!(collect(&ring, 1), [page(0)]);
        assert!(ring.push(page(66)));
        assert!(ring.take_lost() && !ring.take_lost());
        let rest = collect(&ring, 100);
        assert!(rest.iter().copied().eq((1..64).chain([66]).map(page)));
        assert!(!ring.is_soft_full() && ring.is_empty());
    }

    #[test]
    fn nothing_is_lost_or_repeated() {
        const PAGES: u64 = 40_000;
        let ring = DirtyRing::new(64).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                for n in 0..PAGES {
                    while !ring.push(page(n)) {
                        std::thread::yield_now();
                    }
                }
                done.store(true, Ordering::Release);
            });
            let mut expected = 0;
            let mut out = [NONE; 23];
            loop {
                let over = done.load(Ordering::Acquire);
                assert!(ring.len() <= ring.capacity());
                let n = ring.collect(&mut out);
                for got in &out[..n] {
                    assert_eq!(*got, page(expected));
                    expected += 1;
                }
                if n == 0 && over {
                    break;
                }
            }
            assert_eq!(expected, PAGES);
        });
    }

    #[test]
    fn consumers_share_the_pages() {
        const PAGES: u64 = 50_000;
        let ring = DirtyRing::new(128).unwrap();
        let done = AtomicBool::new(false);
        let mut all: Vec<u64> = std::thread::scope(|s| {
            let consume = || {
                let mut mine = Vec::new();
                loop {
                    let over = done.load(Ordering::Acquire);
                    let got = collect(&ring, 9);
                    mine.extend(got.iter().map(|p| p.page));
                    if got.is_empty() && over {
                        assert!(mine.is_sorted());
                        return mine;
                    }
                }
            };
            let consumers = [s.spawn(consume), s.spawn(consume)];
            for n in 0..PAGES {
                while !ring.push(page(n)) {
                    std::thread::yield_now();
                }
            }
            done.store(true, Ordering::Release);
            consumers.into_iter().flat_map(|c| c.join().unwrap()).collect()
        });
        all.sort_unstable();
        assert!(all.into_iter().eq(0..PAGES));
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn pushes_meet_collections() {
        loom::model(|| {
            let ring = Arc::new(DirtyRing::new(2).unwrap());
            let bits = Arc::new(AtomicU64::new(0));
            let producer = loom::thread::spawn({
                let (ring, bits) = (Arc::clone(&ring), Arc::clone(&bits));
                move || {
                    let push = |n: u64| {
                        bits.fetch_or(1 << n, Ordering::Relaxed);
                        ring.push(DirtyPage { slot: SlotId(n as u32), page: n })
                    };
                    (1..4).filter(|n| push(*n)).collect::<Vec<_>>()
                }
            });
            let mut out = [DirtyPage { slot: SlotId(0), page: 0 }; 4];
            let mut got = Vec::new();
            let mut collect = |ring: &DirtyRing| {
                assert!(ring.len() <= 2);
                let n = ring.collect(&mut out);
                for page in &out[..n] {
                    assert_eq!(u64::from(page.slot.0), page.page);
                    let seen = bits.load(Ordering::Relaxed);
                    assert!(seen >> page.page & 1 != 0, "collected before its bit");
                    got.push(page.page);
                }
            };
            collect(&ring);
            collect(&ring);
            let lost = ring.take_lost();
            if lost {
                assert!(bits.load(Ordering::Relaxed) >> 3 & 1 != 0, "lost before its bit");
            }
            let pushed = producer.join().unwrap();
            collect(&ring);
            assert_eq!(got, pushed);
            assert_eq!(lost || ring.take_lost(), pushed.len() < 3);
        });
    }

    #[test]
    fn length_meets_a_push_and_a_collection() {
        loom::model(|| {
            let ring = Arc::new(DirtyRing::new(2).unwrap());
            let page = DirtyPage { slot: SlotId(0), page: 1 };
            let (consumer, onlooker) = (Arc::clone(&ring), Arc::clone(&ring));
            let consumer = loom::thread::spawn(move || consumer.collect(&mut [page]));
            let onlooker = loom::thread::spawn(move || onlooker.len());
            assert!(ring.push(page));
            let collected = consumer.join().unwrap();
            assert!(onlooker.join().unwrap() <= 1, "one page has been pushed");
            assert_eq!(ring.len(), 1 - collected);
        });
    }
}
