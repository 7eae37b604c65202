// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Remote flushes: how every processor comes to forget an entry that was taken away.
//!
//! Processors walk shadow tables without a pin and remember what they saw. So an entry that is
//! cleared or narrowed is recorded in a log that every vCPU reads with a cursor of its own. There are
//! several logs, and a thread always writes to the same one, so that guests that edit their tables
//! at the same time do not write the same lines:
//!
//! * *Narrowing* ([`Flush::narrow`]): count `in_flight` of the thread's log up, change entries, append a
//!   record for each, count `in_flight` down. Nobody is interrupted, and nothing VM-wide is written.
//! * *Relying* ([`Flush::settled`]): whoever needs that nobody can use what was taken away, even
//!   if it was somebody else who took it, scans, fences, records what it met if narrowings are in
//!   flight, and, unless every vCPU has read all logs to their ends, counts the *generation* up and
//!   polls [`Flush::acknowledged`], which asks vCPUs that are inside the guest to come out.
//! * *Draining* ([`Cursor::drain`]): read the generation, fence, hand out the records of all logs since
//!   the last drain, acknowledge that generation. A vCPU that was asked drains before it enters the
//!   guest; others need not: what a guest's own edits take away a processor may use until it is told
//!   to invalidate it (SDM vol. 3, 5.10.4).
//!
//! The two fences say: who reads a generation that was counted up after an append reads that record.
//!
//! A few logs for all vCPUs, where the design notes have a queue for each: one append for each
//! record however many vCPUs there are, and a stopped writer or reader stops nobody. A record
//! that a reader cannot get (overwritten, or its writer has not finished it) becomes
//! [`Downgrade::Everything`].

use super::location::{FrameId, Location};
use super::stats::Stats;
use crate::addr::Gva;
use crate::sync::steps::{Held, What};
use crate::sync::{
    AtomicU32, AtomicU64, CachePadded, Door, Mutex, Ordering, fence, hint, lock, rule,
    thread_number,
};
use core::fmt;
use std::sync::Arc;

/// Records a log holds; a vCPU that falls further behind flushes everything.
const RECORDS: usize = if cfg!(loom) { 4 } else { 1024 };
/// Logs.
const LOGS: usize = if cfg!(loom) { 2 } else { 16 };
/// Roots that a vCPU is counted for: one in use for each privilege, and the one it runs on.
const ROOTS: usize = 3;

/// A flush generation: counts the times that somebody relied on narrowings.
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

/// What other threads see of a vCPU; in cache lines of its own.
#[repr(align(128))]
pub(crate) struct VcpuState {
    mode: AtomicU32,
    requests: AtomicU32,
    /// Generation the vCPU has drained or is bound to drain before it runs guest code.
    seen: AtomicU64,
    /// Generation that was drained inside the guest: nothing older is remembered of any table.
    drained: AtomicU64,
    /// How far it has read each log.
    read: [AtomicU64; LOGS],
    /// The roots that it is counted for (R19), one more than each frame's number: for the audit.
    roots: [hint::AtomicU32; ROOTS],
    processor: Arc<dyn Processor>,
    pub(crate) stats: CachePadded<Stats>,
}

impl VcpuState {
    /// Says which roots the vCPU is counted for.
    pub(crate) fn show_roots(&self, roots: [Option<FrameId>; ROOTS]) {
        for (shown, root) in self.roots.iter().zip(roots) {
            // Relaxed: looked at while nothing is in flight.
            shown.store(root.map_or(0, |frame| frame.0 + 1), Ordering::Relaxed);
        }
    }

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

/// Where one thread in [`LOGS`] records.
#[derive(Debug)]
#[repr(align(128))]
struct Log {
    in_flight: AtomicU64,
    tail: AtomicU64,
    records: Box<[Record]>,
}

/// The engine's flush state.
#[derive(Debug)]
pub(crate) struct Flush {
    generation: AtomicU64,
    logs: [Log; LOGS],
    vcpus: Door<Vec<Arc<VcpuState>>>,
    /// Serialises changes of `vcpus`.
    membership: Mutex<()>,
}

impl Log {
    fn new() -> Self {
        Self {
            in_flight: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            records: (0..RECORDS).map(|_| Record::default()).collect(),
        }
    }

    fn append(&self, entry: u64, gva: u64) {
        // AcqRel: a drain that sees this position sees the change of the entry before it.
        let position = self.tail.fetch_add(1, Ordering::AcqRel);
        let record = &self.records[position as usize % self.records.len()];
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
        let record = &self.records[position as usize % self.records.len()];
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
}

impl Flush {
    pub(crate) fn new() -> Self {
        Self {
            generation: AtomicU64::new(1),
            logs: core::array::from_fn(|_| Log::new()),
            vcpus: Door::new(Arc::new(Vec::new())),
            membership: Mutex::new(()),
        }
    }

    /// Begins a narrowing. Entries may be changed while it lives; each is recorded by
    /// [`Narrowing::entry`] before anything that led to it (rmap, parents) is unlinked.
    pub(crate) fn narrow(&self) -> Narrowing<'_> {
        let log = &self.logs[thread_number() % LOGS];
        // Relaxed: the change of the entry, a release operation, publishes it.
        log.in_flight.fetch_add(1, Ordering::Relaxed);
        Narrowing { flush: self, log }
    }

    /// After a scan that relies on entries having been narrowed by whomever: the generation to
    /// wait for. If narrowings are in flight, whose records may not be in the log yet, `again` is
    /// called to record everything the scan met (*"nothing to do" is not "flushed"*).
    pub(crate) fn settled(&self, again: impl FnOnce(&mut Narrowing<'_>)) -> Generation {
        self.met(again);
        self.cover()
    }

    /// The first half of [`Flush::settled`], for scans in several parts (R12).
    pub(crate) fn met(&self, again: impl FnOnce(&mut Narrowing<'_>)) {
        // Pairs with the same fence of other scanners: what the scan saw changed has its narrowing
        // counted, or its record.
        fence(Ordering::SeqCst);
        if self.in_flight() != 0 && rule!(R12) {
            again(&mut self.narrow());
        }
    }

    /// A generation that covers everything recorded so far. Generation 0, which everybody has
    /// acknowledged, if every vCPU has read it.
    pub(crate) fn cover(&self) -> Generation {
        let all_read = self.vcpus.load().iter().all(|vcpu| {
            // Acquire on both: the vCPU has applied what it has read.
            let read = |(log, read): (&Log, &AtomicU64)| {
                read.load(Ordering::Acquire) >= log.tail.load(Ordering::Acquire)
            };
            self.logs.iter().zip(&vcpu.read).all(read)
        });
        if all_read { Generation(0) } else { self.advance() }
    }

    /// A generation of its own.
    pub(crate) fn advance(&self) -> Generation {
        // Pairs with the fence in `drain`: who reads this generation reads what was recorded, and
        // sees what was changed, before this.
        fence(Ordering::SeqCst);
        Generation(self.generation.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// The next generation: whoever drains it has read everything recorded so far. Nobody need have
    /// counted it up yet; [`Flush::drained`] does.
    pub(crate) fn next(&self) -> Generation {
        // Pairs with the fence in `drain`: the load below misses that generation, so whoever reads
        // it fences later than this.
        fence(Ordering::SeqCst);
        Generation(self.generation.load(Ordering::Acquire) + 1)
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
        let Generation(wanted) = generation;
        // On failure somebody else has counted it up. AcqRel as in `advance`.
        let _ = self.generation.compare_exchange(
            wanted - 1,
            wanted,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
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
            read: Default::default(),
            roots: Default::default(),
            processor,
            stats: CachePadded::default(),
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
        let mut cursor = Cursor { state: Arc::clone(&state), position: [0; LOGS] };
        let now = self.now();
        for (log, (position, read)) in
            self.logs.iter().zip(cursor.position.iter_mut().zip(&state.read))
        {
            *position = log.tail.load(Ordering::Acquire);
            read.store(*position, Ordering::Release);
        }
        state.seen.store(now.0, Ordering::Release);
        state.drained.store(now.0, Ordering::Release);
        (state, cursor)
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

    /// Asks every vCPU to drain when it next comes out.
    pub(crate) fn nudge(&self) {
        for vcpu in self.vcpus.load().iter() {
            vcpu.request(request::FLUSH, false);
        }
    }

    /// The roots that all vCPUs are counted for.
    pub(crate) fn roots(&self) -> Vec<FrameId> {
        let vcpus = self.vcpus.load();
        let shown = vcpus.iter().flat_map(|vcpu| &vcpu.roots);
        let shown = shown.map(|root| root.load(Ordering::Relaxed));
        shown.filter_map(|root| root.checked_sub(1)).map(FrameId).collect()
    }

    /// Narrowings begun and not ended.
    pub(crate) fn in_flight(&self) -> u64 {
        // Acquire pairs with the Release in the destructor of `Narrowing`.
        self.logs.iter().map(|log| log.in_flight.load(Ordering::Acquire)).sum()
    }
}

/// A narrowing in progress.
#[derive(Debug)]
pub(crate) struct Narrowing<'f> {
    flush: &'f Flush,
    log: &'f Log,
}

impl Narrowing<'_> {
    /// Records that an entry was cleared or narrowed.
    pub(crate) fn entry(&mut self, entry: Location, gva: Option<Gva>) {
        self.log.append(entry.word(), gva.map_or(ALL, |gva| gva.page().0));
    }

    /// Records that a whole table was torn down.
    pub(crate) fn frame(&mut self, frame: FrameId) {
        self.log.append(FRAME_RECORD | frame.0 as u64, ALL);
    }

    /// Ends the narrowing; a generation that covers it when it is drained.
    pub(crate) fn finish(self) -> Generation {
        let flush = self.flush;
        drop(self);
        flush.next()
    }
}

impl Drop for Narrowing<'_> {
    fn drop(&mut self) {
        // Release: who reads zero afterwards reads the records. Pairs with `in_flight`.
        self.log.in_flight.fetch_sub(1, Ordering::Release);
    }
}

/// The vCPU's own side; belongs to its thread.
#[derive(Debug)]
pub(crate) struct Cursor {
    state: Arc<VcpuState>,
    position: [u64; LOGS],
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

    /// Whether the vCPU's thread is to return to its caller.
    pub(crate) fn must_exit(&self) -> bool {
        self.state.requests.load(Ordering::Relaxed) & request::EXIT != 0
    }

    /// Hands every record since the last drain to `apply`, which must see to it that the processor
    /// has forgotten them before it runs guest code. Returns the generation that this reaches.
    pub(crate) fn drain(&mut self, flush: &Flush, mut apply: impl FnMut(Downgrade)) -> Generation {
        // The generation first: records of a later one may be missed. Acquire pairs with the AcqRel
        // in `advance` and `drained`, the fence with those in `advance` and `next`.
        let generation = flush.now();
        // R29: a table that was torn down waits for a generation that others may count up.
        if rule!(R29) {
            fence(Ordering::SeqCst);
        }
        let mut whole = true;
        let mut some = false;
        for ((log, position), read) in
            flush.logs.iter().zip(&mut self.position).zip(&self.state.read)
        {
            let tail = log.tail.load(Ordering::Acquire);
            if tail == *position {
                continue;
            }
            some = true;
            whole = whole
                && tail - *position <= log.records.len() as u64
                && (*position..tail).all(|position| match log.record(position) {
                    Some(downgrade) => {
                        apply(downgrade);
                        true
                    }
                    None => false,
                });
            *position = tail;
            // Release pairs with the Acquire in `cover`. The vCPU is outside: it does not run guest
            // code before everything is applied.
            read.store(tail, Ordering::Release);
        }
        if !whole {
            self.state.stats.flush_overflow.bump();
            apply(Downgrade::Everything);
        }
        if some {
            self.state.stats.remote_tlb_flush.bump();
        }
        // Release pairs with the Acquire in `poll`.
        self.state.seen.store(generation.0, Ordering::Release);
        generation
    }

    /// The generation drained last.
    pub(crate) fn seen(&self) -> Generation {
        Generation(self.state.seen.load(Ordering::Relaxed))
    }

    /// Marks the vCPU as inside the guest, unless somebody has asked for something: then it stays
    /// outside, and the caller handles that and tries again.
    pub(crate) fn enter(&self) -> bool {
        Held::new(What::Inside).keep();
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
        Held::end(What::Inside);
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
        drop(narrowing);
        let generation = flush.settled(|_| panic!("nothing is in flight"));
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
    fn threads_record_in_logs_of_their_own_and_all_are_read() {
        let flush = Flush::new();
        let (_, mut a) = flush.join(Arc::new(Still));
        std::thread::scope(|s| {
            for thread in 0..2 * LOGS as u32 {
                let flush = &flush;
                s.spawn(move || flush.narrow().frame(FrameId(thread)));
            }
        });
        assert!(flush.logs.iter().filter(|log| log.tail.load(Ordering::Relaxed) > 0).count() > 1);
        let mut frames: Vec<_> = drain(&flush, &mut a)
            .into_iter()
            .map(|downgrade| match downgrade {
                Downgrade::Frame(frame) => frame.0,
                other => panic!("{other:?}"),
            })
            .collect();
        frames.sort_unstable();
        assert_eq!(frames, (0..2 * LOGS as u32).collect::<Vec<_>>());
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
        flush.logs[1].tail.fetch_add(1, Ordering::Relaxed);
        assert_eq!(drain(&flush, &mut a), [Downgrade::Everything]);
    }

    #[test]
    fn nothing_narrowed_means_nothing_to_wait_for() {
        let flush = Flush::new();
        let (_, mut a) = flush.join(Arc::new(Still));
        assert!(a.enter());
        let generation = flush.settled(|_| panic!("nothing is in flight"));
        assert!(flush.acknowledged(generation, false));
        let held = flush.narrow();
        let generation = flush.settled(|narrowing| narrowing.frame(FrameId(1)));
        assert!(!flush.acknowledged(generation, false));
        drop(held);
        a.leave();
        a.take_requests();
        drain(&flush, &mut a);
        assert!(a.enter());
        assert_eq!(flush.cover(), Generation(0));
        // A torn down frame waits for a generation that nobody has counted up yet.
        let mut narrowing = flush.narrow();
        narrowing.frame(FrameId(2));
        let generation = narrowing.finish();
        a.leave();
        a.take_requests();
        let early = a.drain(&flush, |_| ());
        a.drained_inside(early);
        assert!(early < generation && !flush.drained(generation, false));
        let now = a.drain(&flush, |_| ());
        a.drained_inside(now);
        assert!(flush.drained(generation, false));
    }
}

/// The fences of a generation that somebody else counts up: run by `cargo loom`.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::sync::rules;

    struct Still;
    impl Processor for Still {
        fn kick(&self) {}
    }

    fn a_torn_down_table_meets_a_drain() {
        let flush = Arc::new(Flush::new());
        let (_, mut cursor) = flush.join(Arc::new(Still));
        let (one, two) = (Arc::clone(&flush), Arc::clone(&flush));
        let tears_down = loom::thread::spawn(move || {
            let mut narrowing = one.narrow();
            narrowing.frame(FrameId(1));
            narrowing.finish()
        });
        let counts_up = loom::thread::spawn(move || two.advance());
        let mut told = false;
        let drained = cursor.drain(&flush, |_| told = true);
        let waits_for = tears_down.join().unwrap();
        counts_up.join().unwrap();
        assert!(told || drained < waits_for, "R29: drained, and not told");
    }

    fn explore() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(a_torn_down_table_meets_a_drain);
    }

    #[test]
    fn r29_torn_down_table_meets_a_drain() {
        explore();
    }

    #[test]
    #[should_panic(expected = "R29:")]
    fn r29_torn_down_table_meets_a_drain_mutant() {
        rules::without("R29", explore);
    }
}
