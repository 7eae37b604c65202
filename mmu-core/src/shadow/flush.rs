// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Remote flushes: how every processor comes to forget an entry that was taken away.
//!
//! Processors walk shadow tables without a pin and remember what they saw. So an entry that is
//! cleared or narrowed is recorded in one log that every vCPU reads with a cursor of its own:
//!
//! * *Narrowing* ([`Flush::narrow`]): count `in_flight` up, change entries, append a record for
//!   each, count the generation up, count `in_flight` down. Nobody is interrupted.
//! * *Draining* ([`Cursor::drain`]): read the generation, hand out the records since the last
//!   drain, acknowledge that generation. A vCPU drains before it enters the guest.
//! * *Relying* ([`Flush::settled`]): whoever needs that nobody can use what was taken away, even
//!   if it was somebody else who took it, obtains a generation to wait for and polls
//!   [`Flush::acknowledged`], which asks vCPUs that are inside the guest to come out.
//!
//! One log for all vCPUs, where the design notes have a queue for each: one append for each
//! record however many vCPUs there are, and a stopped writer or reader stops nobody. A record
//! that a reader cannot get (overwritten, or its writer has not finished it) becomes
//! [`Downgrade::Everything`].

use super::location::{FrameId, Location};
use super::stats::Stats;
use crate::addr::Gva;
use crate::sync::{AtomicU32, AtomicU64, Door, Mutex, Ordering, fence, lock, rule};
use core::fmt;
use std::sync::Arc;

/// Records the log holds; a vCPU that falls further behind flushes everything.
const RECORDS: usize = if cfg!(loom) { 4 } else { 4096 };

/// A flush generation: counts narrowings of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub(crate) u64);

impl Generation {
    /// Its number: later generations have larger ones, and none is 0.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// Something that every processor must forget before it runs guest code again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Downgrade {
    /// An entry was cleared or narrowed.
    Entry {
        /// The entry.
        entry: Location,
        /// The only address it translated, page-aligned; `None` if there may be several: then all
        /// translations and paging-structure caches must go.
        gva: Option<Gva>,
    },
    /// A table was torn down. All translations must go, and all that is remembered of its frame.
    Frame(FrameId),
    /// All translations, and all that is remembered of any table.
    Everything,
}

/// The consumer's side of one vCPU.
pub trait Processor: Send + Sync {
    /// Makes the vCPU leave the guest soon. Called from any thread, at any time, also when the
    /// vCPU is outside; a kick just before it enters must not be lost. Must not block.
    fn kick(&self);

    /// Whether the processor remembers nothing of tables while it is outside the guest. A real
    /// processor's paging-structure caches outlive an exit, so the default is `false`.
    fn forgets_outside(&self) -> bool {
        false
    }
}

/// Where a vCPU is.
mod mode {
    pub(super) const OUTSIDE: u32 = 0;
    pub(super) const INSIDE: u32 = 1;
}

/// What a vCPU is asked to do when it leaves the guest.
pub(crate) mod request {
    /// Drain the log.
    pub(crate) const FLUSH: u32 = 1 << 0;
    /// The owner wants the vCPU's thread back.
    pub(crate) const EXIT: u32 = 1 << 1;
}

/// What other threads see of a vCPU.
pub(crate) struct VcpuState {
    mode: AtomicU32,
    requests: AtomicU32,
    /// Generation the vCPU has drained or is bound to drain before it runs guest code.
    seen: AtomicU64,
    /// Generation that was drained inside the guest: nothing older is remembered of any table.
    drained: AtomicU64,
    processor: Arc<dyn Processor>,
    pub(crate) stats: Stats,
}

impl VcpuState {
    /// Asks the vCPU to handle `requests` when it comes out, and with `kick` to come out. Returns
    /// whether it is outside, so that it will see the request before it runs guest code again
    /// (R22).
    fn request(&self, requests: u32, kick: bool) -> bool {
        self.requests.fetch_or(requests, Ordering::AcqRel);
        // R22: request store, fence, read mode. Pairs with the fence in `Cursor::enter`.
        fence(Ordering::SeqCst);
        // Acquire pairs with the Release in `leave`: what the guest stored is seen.
        let outside = self.mode.load(Ordering::Acquire) == mode::OUTSIDE;
        if !outside && kick {
            self.stats.remote_tlb_flush_kicks.bump_shared();
            self.processor.kick();
        }
        outside
    }

    /// Asks the vCPU's thread to return to its caller.
    pub(crate) fn request_exit(&self) {
        self.request(request::EXIT, true);
    }
}

impl fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuState").finish_non_exhaustive()
    }
}

/// Log slot. `sequence` is `2 * (position + 1)` when the record of that position is complete, one
/// less while it is being written.
#[derive(Debug, Default)]
struct Record {
    sequence: AtomicU64,
    entry: AtomicU64,
    gva: AtomicU64,
}

const FRAME_RECORD: u64 = 1 << 63;
const ALL: u64 = 1;

/// The engine's flush state.
#[derive(Debug)]
pub(crate) struct Flush {
    generation: AtomicU64,
    in_flight: AtomicU64,
    tail: AtomicU64,
    log: Box<[Record]>,
    vcpus: Door<Vec<Arc<VcpuState>>>,
    /// Serialises changes of `vcpus`.
    membership: Mutex<()>,
}

impl Flush {
    pub(crate) fn new() -> Self {
        Self {
            generation: AtomicU64::new(1),
            in_flight: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            log: (0..RECORDS).map(|_| Record::default()).collect(),
            vcpus: Door::new(Arc::new(Vec::new())),
            membership: Mutex::new(()),
        }
    }

    /// Begins a narrowing. Entries may be changed while it lives; each is recorded by
    /// [`Narrowing::push`] before anything that led to it (rmap, parents) is unlinked.
    pub(crate) fn narrow(&self) -> Narrowing<'_> {
        // Relaxed: the change of the entry, a release operation, publishes it.
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Narrowing { flush: self, pushed: false }
    }

    fn append(&self, entry: u64, gva: u64) {
        // AcqRel: a drain that sees this position sees the change of the entry before it.
        let position = self.tail.fetch_add(1, Ordering::AcqRel);
        let record = &self.log[position as usize % self.log.len()];
        let complete = 2 * (position + 1);
        let old = record.sequence.load(Ordering::Relaxed);
        let mine = old % 2 == 0
            && old < complete
            && record
                .sequence
                // Acquire: the stores below come after the previous record was complete.
                .compare_exchange(old, complete - 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        if mine {
            // Release pairs with the Acquire loads in `record`: whoever sees one of these sees
            // that the record is being written.
            record.entry.store(entry, Ordering::Release);
            record.gva.store(gva, Ordering::Release);
            // Release publishes the record.
            record.sequence.store(complete, Ordering::Release);
        }
        // Otherwise a writer that is a whole log behind or ahead has the slot, and readers of this
        // position find another sequence there: they flush everything.
    }

    fn record(&self, position: u64) -> Option<Downgrade> {
        let record = &self.log[position as usize % self.log.len()];
        let complete = 2 * (position + 1);
        if record.sequence.load(Ordering::Acquire) != complete {
            return None;
        }
        // Acquire: if either word is a later record's, the sequence read next is later too.
        let entry = record.entry.load(Ordering::Acquire);
        let gva = record.gva.load(Ordering::Acquire);
        if record.sequence.load(Ordering::Relaxed) != complete {
            return None;
        }
        Some(if entry & FRAME_RECORD != 0 {
            Downgrade::Frame(FrameId(entry as u32))
        } else {
            let gva = (gva & ALL == 0).then_some(Gva(gva));
            Downgrade::Entry { entry: Location::from_word(entry), gva }
        })
    }

    /// After a scan that relies on entries having been narrowed by whomever: the generation to
    /// wait for. If narrowings are in flight, whose records may not be in the log yet, `again` is
    /// called to record everything the scan met (*"nothing to do" is not "flushed"*).
    pub(crate) fn settled(&self, again: impl FnOnce(&mut Narrowing<'_>)) -> Generation {
        // Pairs with the same fence of other scanners and with `narrow`: what the scan saw changed
        // has its narrowing counted, or its generation.
        fence(Ordering::SeqCst);
        // Acquire pairs with the Release in the destructor of `Narrowing`.
        if self.in_flight.load(Ordering::Acquire) != 0 {
            let mut narrowing = self.narrow();
            again(&mut narrowing);
            narrowing.pushed = true;
            narrowing.finish()
        } else {
            self.now()
        }
    }

    /// The present generation.
    pub(crate) fn now(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    /// Whether no vCPU can run guest code on what was narrowed up to `generation`. With `kick` those
    /// that still can are kicked out of the guest: not to be used within a read section.
    pub(crate) fn acknowledged(&self, generation: Generation, kick: bool) -> bool {
        self.poll(generation, kick, |v| &v.seen, |_| true)
    }

    /// Whether no processor remembers anything of a table torn down up to `generation`. `kick` as in
    /// [`Flush::acknowledged`].
    pub(crate) fn drained(&self, generation: Generation, kick: bool) -> bool {
        self.poll(generation, kick, |v| &v.drained, |v| v.processor.forgets_outside())
    }

    fn poll(
        &self,
        generation: Generation,
        kick: bool,
        word: impl Fn(&VcpuState) -> &AtomicU64,
        outside_counts: impl Fn(&VcpuState) -> bool,
    ) -> bool {
        let mut all = true;
        for vcpu in self.vcpus.load().iter() {
            // Acquire pairs with the Release in `drain` and `drained_inside`.
            if word(vcpu).load(Ordering::Acquire) < generation.0 {
                vcpu.stats.remote_tlb_flush_requests.bump_shared();
                all &= vcpu.request(request::FLUSH, kick) && outside_counts(vcpu);
            }
        }
        all
    }

    /// Adds a vCPU to those that are waited for.
    pub(crate) fn join(&self, processor: Arc<dyn Processor>) -> (Arc<VcpuState>, Cursor) {
        let state = Arc::new(VcpuState {
            mode: AtomicU32::new(mode::OUTSIDE),
            requests: AtomicU32::new(0),
            seen: AtomicU64::new(0),
            drained: AtomicU64::new(0),
            processor,
            stats: Stats::default(),
        });
        {
            let _membership = lock(&self.membership);
            let mut vcpus = self.vcpus.load().to_vec();
            vcpus.push(Arc::clone(&state));
            self.vcpus.store(Arc::new(vcpus));
        }
        // Pairs with the fence in `request`: who misses this vCPU in the list changed his entries
        // before this vCPU can read any.
        fence(Ordering::SeqCst);
        // A new vCPU remembers nothing.
        let now = self.now();
        state.seen.store(now.0, Ordering::Release);
        state.drained.store(now.0, Ordering::Release);
        let position = self.tail.load(Ordering::Acquire);
        (Arc::clone(&state), Cursor { state, position })
    }

    /// Removes a vCPU: nobody waits for it any more. It must be outside and stay there.
    pub(crate) fn leave(&self, state: &Arc<VcpuState>) {
        let _membership = lock(&self.membership);
        let vcpus = self.vcpus.load().iter().filter(|v| !Arc::ptr_eq(v, state)).cloned().collect();
        self.vcpus.store(Arc::new(vcpus));
    }

    /// The vCPUs in the set.
    pub(crate) fn vcpus(&self) -> Arc<Vec<Arc<VcpuState>>> {
        self.vcpus.load()
    }

    /// Narrowings begun and not ended.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Acquire)
    }
}

/// A narrowing in progress.
#[derive(Debug)]
pub(crate) struct Narrowing<'f> {
    flush: &'f Flush,
    pushed: bool,
}

impl Narrowing<'_> {
    /// Records that an entry was cleared or narrowed.
    pub(crate) fn entry(&mut self, entry: Location, gva: Option<Gva>) {
        self.flush.append(entry.word(), gva.map_or(ALL, |gva| gva.page().0));
        self.pushed = true;
    }

    /// Counts a change that no record can name: whoever acknowledges it looks at its root again.
    pub(crate) fn all(&mut self) {
        self.pushed = true;
    }

    /// Records that a whole table was torn down.
    pub(crate) fn frame(&mut self, frame: FrameId) {
        self.flush.append(FRAME_RECORD | frame.0 as u64, ALL);
        self.pushed = true;
    }

    /// Ends the narrowing; the generation that covers it.
    pub(crate) fn finish(self) -> Generation {
        let flush = self.flush;
        drop(self);
        flush.now()
    }
}

impl Drop for Narrowing<'_> {
    fn drop(&mut self) {
        if self.pushed {
            // Release publishes the records to whoever drains this generation. Pairs with `drain`.
            self.flush.generation.fetch_add(1, Ordering::AcqRel);
        }
        // Release: who reads zero afterwards reads this generation. Pairs with `settled`.
        self.flush.in_flight.fetch_sub(1, Ordering::Release);
    }
}

/// The vCPU's own side; belongs to its thread.
#[derive(Debug)]
pub(crate) struct Cursor {
    state: Arc<VcpuState>,
    position: u64,
}

impl Cursor {
    /// Takes the requests made so far, to be handled before [`Cursor::enter`].
    pub(crate) fn take_requests(&self) -> u32 {
        // AcqRel: what the requester did before it asked is seen.
        self.state.requests.swap(0, Ordering::AcqRel)
    }

    /// Whether somebody has asked for something.
    #[inline]
    pub(crate) fn has_requests(&self) -> bool {
        self.state.requests.load(Ordering::Relaxed) != 0
    }

    /// Hands every record since the last drain to `apply`, which must see to it that the processor
    /// has forgotten them before it runs guest code. Returns the generation that this reaches.
    pub(crate) fn drain(&mut self, flush: &Flush, mut apply: impl FnMut(Downgrade)) -> Generation {
        // The generation first: records of a later one may be missed. Acquire pairs with the
        // Release in the destructor of `Narrowing`.
        let generation = flush.now();
        let tail = flush.tail.load(Ordering::Acquire);
        let behind = tail - self.position;
        let whole = behind <= flush.log.len() as u64
            && (self.position..tail).all(|position| match flush.record(position) {
                Some(downgrade) => {
                    apply(downgrade);
                    true
                }
                None => false,
            });
        if !whole {
            self.state.stats.flush_overflow.bump();
            apply(Downgrade::Everything);
        }
        if behind > 0 {
            self.state.stats.remote_tlb_flush.bump();
        }
        self.position = tail;
        // Release pairs with the Acquire in `poll`.
        self.state.seen.store(generation.0, Ordering::Release);
        generation
    }

    /// Marks the vCPU as inside the guest, unless somebody has asked for something: then it stays
    /// outside, and the caller handles that and tries again.
    pub(crate) fn enter(&self) -> bool {
        self.state.mode.store(mode::INSIDE, Ordering::Relaxed);
        // R22: mode store, fence, read requests. Pairs with the fence in `VcpuState::request`.
        if rule!(R22) {
            fence(Ordering::SeqCst);
        }
        if self.has_requests() {
            self.leave();
            return false;
        }
        true
    }

    /// Marks the vCPU as outside.
    pub(crate) fn leave(&self) {
        // Release pairs with the Acquire in `VcpuState::request`.
        self.state.mode.store(mode::OUTSIDE, Ordering::Release);
    }

    /// Says that the processor has drained `generation` inside the guest.
    pub(crate) fn drained_inside(&self, generation: Generation) {
        // Release pairs with the Acquire in `poll`.
        self.state.drained.store(generation.0, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    struct Still;
    impl Processor for Still {
        fn kick(&self) {}
    }

    fn drain(flush: &Flush, cursor: &mut Cursor) -> Vec<Downgrade> {
        let mut all = Vec::new();
        cursor.drain(flush, |d| all.push(d));
        all
    }

    #[test]
    fn every_vcpu_sees_every_record() {
        let flush = Flush::new();
        let (_, mut a) = flush.join(Arc::new(Still));
        let (_, mut b) = flush.join(Arc::new(Still));
        let entry = Location::new(FrameId(3), 7);
        let mut narrowing = flush.narrow();
        narrowing.entry(entry, Some(Gva(0x1234)));
        narrowing.entry(entry, None);
        narrowing.frame(FrameId(9));
        let generation = narrowing.finish();
        let expected = [
            Downgrade::Entry { entry, gva: Some(Gva(0x1000)) },
            Downgrade::Entry { entry, gva: None },
            Downgrade::Frame(FrameId(9)),
        ];
        assert_eq!(drain(&flush, &mut a), expected);
        assert_eq!(drain(&flush, &mut a), []);
        assert!(a.enter());
        assert!(b.enter());
        assert!(!flush.acknowledged(generation, false), "b is inside and has not drained");
        b.leave();
        assert!(flush.acknowledged(generation, false), "outside with the request set");
        assert!(!b.enter(), "the request is still there");
        b.take_requests();
        assert_eq!(drain(&flush, &mut b), expected);
        assert!(b.enter());
        assert!(!flush.drained(generation, false), "nobody has said so");
        a.drained_inside(generation);
        b.drained_inside(generation);
        assert!(flush.drained(generation, false));
    }

    #[test]
    fn a_vcpu_that_falls_behind_flushes_everything() {
        let flush = Flush::new();
        let (_, mut a) = flush.join(Arc::new(Still));
        for frame in 0..=RECORDS as u32 {
            flush.narrow().frame(FrameId(frame));
        }
        assert_eq!(drain(&flush, &mut a), [Downgrade::Everything]);
        flush.narrow().frame(FrameId(1));
        assert_eq!(drain(&flush, &mut a), [Downgrade::Frame(FrameId(1))]);
    }

    #[test]
    fn a_record_in_the_making_is_not_missed() {
        let flush = Flush::new();
        let (_, mut a) = flush.join(Arc::new(Still));
        // A writer that has taken a position and stopped there.
        flush.tail.fetch_add(1, Ordering::Relaxed);
        assert_eq!(drain(&flush, &mut a), [Downgrade::Everything]);
    }

    #[test]
    fn nothing_narrowed_means_nothing_to_wait_for() {
        let flush = Flush::new();
        let (_, a) = flush.join(Arc::new(Still));
        assert!(a.enter());
        let generation = flush.settled(|_| panic!("nothing is in flight"));
        assert!(flush.acknowledged(generation, false));
        let held = flush.narrow();
        let mut called = false;
        let generation = flush.settled(|_| called = true);
        assert!(called && !flush.acknowledged(generation, false));
        drop(held);
        flush.leave(&a.state);
        assert!(flush.acknowledged(generation, false));
    }
}
