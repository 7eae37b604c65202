// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Leaf tables that the guest writes without telling.
//!
//! A write to a shadowed guest table costs an emulated instruction. So where all shadows of a table are
//! leaf tables they may be *unsync* instead: the guest writes natively, and what was derived from the
//! table is compared with it again when the guest flushes, which it must do anyway before it may expect
//! its changes to be seen (SDM vol. 3, 5.10.4). No flush waits for anything or excludes anybody.
//!
//! *Marking*, before the write: each shadow's state becomes [`MARKING`], then each table above, on every
//! path up to the roots, gets its child into its set `below`, and only then does the state become
//! [`UNSYNC`], with which the table may be mapped writable (R3). Who finds another at it does it all
//! himself (R33). Whoever links a table that is unsync, or has something in `below`, does the same for
//! the path above (R34): link, fence, look; against mark, fence, walk the links.
//!
//! *Flushing* one address compares one entry; flushing all goes down the sets from the root and
//! compares every entry of the unsync tables there. An empty set at the root says that nothing is
//! unsync: such a flush costs one load. A child leaves a set under the set's lock, if it is in sync at
//! that moment: who marks it meanwhile adds it again, before the write (R16, R33).
//!
//! *Settling*: a table that has not changed since the last flush is protected again. The flush that
//! notices begins it ([`PROTECTING`], protect, [`READY`]), and a later one that finds every processor
//! past the protection compares the entries once more and ends it (R23). While it lasts the table is
//! compared as before; a write in between makes it unsync again, and the end then fails: generations
//! are never the same twice.

use super::flush::Generation;
use super::frames::PROTECTED;
use super::location::{FrameId, Location};
use super::stats::Stats;
use super::{Context, Engine, index};
use crate::addr::{ENTRIES, Gva};
use crate::memory::{MemoryMap, Page};
use crate::sync::epoch::Guard;
use crate::sync::{Ordering, fence, rule};
use std::collections::BTreeSet;

/// Entries agree with the guest table, which no processor can write.
const SYNC: u64 = 0;
/// The guest table may be writable.
const UNSYNC: u64 = 1;
/// It is being protected; with a generation that nothing else has.
const PROTECTING: u64 = 2;
/// It is protected when that generation is acknowledged.
const READY: u64 = 3;
/// The tables above are being told; with a generation that nothing else has.
const MARKING: u64 = 4;
const STATE: u64 = 7;
const SHIFT: u32 = 3;

/// Links that marking follows upwards. With more paths to a table than that, writes are emulated.
const LINKS: u32 = 256;
/// Shadows of one guest table.
const SHADOWS: usize = 8;

/// What became of the tables above and below a link.
pub(super) enum Link {
    /// They know, and are up to date.
    Good,
    /// There are too many above to tell them all.
    Crowded,
    /// Entries below were dropped, which processors may remember until this generation.
    Stale(Generation),
}

/// What one flush has done.
#[derive(Default)]
struct Visit {
    /// Tables that need no other look, however many paths lead to them.
    done: BTreeSet<FrameId>,
    /// Generations that every vCPU has acknowledged, and that one has not.
    passed: Option<Generation>,
    awaited: Option<Generation>,
}

impl Visit {
    /// Whether the generation is `acknowledged`; asked once for each answer that is not implied by others.
    fn has_passed(
        &mut self,
        generation: Generation,
        acknowledged: impl FnOnce(Generation) -> bool,
    ) -> bool {
        if self.passed.is_some_and(|passed| generation <= passed) {
            return true;
        }
        if self.awaited.is_some_and(|awaited| generation >= awaited) {
            return false;
        }
        let passed = acknowledged(generation);
        *if passed { &mut self.passed } else { &mut self.awaited } = Some(generation);
        passed
    }
}

impl Engine {
    /// Whether the page is a guest table that must not be written natively: one of its shadows is not
    /// unsync. The caller has fenced since it linked the entry that would write.
    pub(super) fn is_guarded(&self, page: Page<'_>) -> bool {
        // Acquire: with the state comes what was marked before it (R3).
        let guarded = |frame| self.shadow(frame).unsync.load(Ordering::Acquire) != UNSYNC;
        page.region().shadows.get(page.index).is_some_and(|shadows| shadows.any(guarded))
    }

    /// Lets the guest write the page, a shadowed guest table, natively; whether it may.
    pub(super) fn desync(&self, page: Page<'_>, stats: &Stats) -> bool {
        let Some(shadows) = page.region().shadows.get(page.index) else { return true };
        let shadows = shadows.to_vec();
        let suits = |frame: &u64| {
            let shadow = self.shadow(*frame);
            let role = shadow.key().role();
            let protected = shadow.protected.load(Ordering::Acquire) == PROTECTED.0;
            role.is_indirect() && role.level() == 1 && shadow.is_live() && protected
        };
        if !self.shape.unsync || shadows.len() > SHADOWS || !shadows.iter().all(suits) {
            return false;
        }
        let mut links = LINKS;
        shadows.into_iter().all(|frame| self.mark(FrameId((frame - 1) as u32), &mut links, stats))
    }

    /// Makes a leaf table unsync; whether it is.
    fn mark(&self, table: FrameId, links: &mut u32, stats: &Stats) -> bool {
        let page = self.frames.page(table);
        // Acquire, here and below: with the state comes what was marked before it.
        let before = page.unsync.load(Ordering::Acquire);
        if before == UNSYNC {
            return true;
        }
        // R33: not at once.
        let marking = if rule!(R33) { self.flush.advance().0 << SHIFT | MARKING } else { UNSYNC };
        // An end of settling that was under way fails. R33: so does who is marking, and all is done
        // again: not all of it need have been done.
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        if page.unsync.compare_exchange(before, marking, success, failure).is_err() {
            return page.unsync.load(Ordering::Acquire) == UNSYNC;
        }
        let after = match !rule!(R03) || self.mark_above(table, links) {
            true => UNSYNC,
            // Nobody has written on account of this.
            false => before,
        };
        // Release: who finds it unsync finds the tables above told.
        let marked = page.unsync.compare_exchange(marking, after, success, failure);
        let unsync = marked.map_or_else(|now| now, |_| after) == UNSYNC;
        if unsync && before == SYNC {
            stats.mmu_unsync.bump_shared();
        }
        unsync
    }

    fn shadow(&self, word: u64) -> &super::frames::ShadowPage {
        self.frames.page(FrameId((word - 1) as u32))
    }

    /// Tells every table above that something below it is unsync; false if there are too many.
    fn mark_above(&self, child: FrameId, links: &mut u32) -> bool {
        // R34: mark, fence, walk the links. Pairs with the fence of who links the child.
        fence(Ordering::SeqCst);
        let Some(parents) = self.frames.page(child).parents.to_vec_of(LINKS as usize) else {
            return false;
        };
        parents.into_iter().all(|word| {
            let parent = Location::from_word(word).frame();
            *links = links.saturating_sub(1);
            self.frames.page(parent).below.add_once(u64::from(child.0) + 1);
            *links > 0 && self.mark_above(parent, links)
        })
    }

    /// R34: for who has linked `child` below `parent`, and fenced, before the link is published: tells the
    /// tables above if something in it is unsync, and then brings it up to date: flushes before this had
    /// no way to it.
    pub(super) fn mark_link(
        &self,
        guard: &Guard<'_>,
        map: &MemoryMap,
        stats: &Stats,
        (parent, child): (FrameId, FrameId),
    ) -> Link {
        if self.is_in_sync(child) || !rule!(R34) {
            return Link::Good;
        }
        self.frames.page(parent).below.add_once(u64::from(child.0) + 1);
        if !self.mark_above(parent, &mut { LINKS }) {
            return Link::Crowded;
        }
        // A flush that has not found the child there stored before this. Pairs with the fences of
        // `sync_root` and `sync_address`.
        fence(Ordering::SeqCst);
        let changed = if self.frames.page(child).key().role().level() == 1 {
            self.compare(guard, map, stats, child, 0..ENTRIES)
        } else {
            self.sync_below(guard, map, stats, child, &mut Visit::default())
        };
        // A processor that remembers entries of tables that are linked nowhere must hear of these first.
        if changed { Link::Stale(self.flush.advance()) } else { Link::Good }
    }

    fn is_in_sync(&self, frame: FrameId) -> bool {
        let page = self.frames.page(frame);
        // Acquire pairs with the Release that ended the settling.
        page.unsync.load(Ordering::Acquire) == SYNC && page.below.is_empty()
    }

    /// The guest has flushed everything of a root: what was derived from tables that it writes
    /// natively is what they say now. Waits for nobody.
    pub(crate) fn sync_root(&self, context: &Context, stats: &Stats, root: FrameId) {
        // Own store (the guest's), fence, foreign load. Pairs with the fence in `mark_above`, by which
        // the set was filled before the guest could store.
        fence(Ordering::SeqCst);
        if self.frames.page(root).below.is_empty() {
            return;
        }
        let guard = context.handle.pin();
        let map = self.memory.load(&guard);
        // Obsolete or not: the processor may still be running on it.
        self.sync_below(&guard, map, stats, root, &mut Visit::default());
    }

    /// Compares every unsync table below; whether something had changed.
    fn sync_below(
        &self,
        guard: &Guard<'_>,
        map: &MemoryMap,
        stats: &Stats,
        frame: FrameId,
        visit: &mut Visit,
    ) -> bool {
        let mut changed = false;
        let page = self.frames.page(frame);
        let level = page.key().role().level();
        for word in page.below.to_vec() {
            let child = FrameId((word - 1) as u32);
            let below = self.frames.page(child);
            // The frame may have another page by now, or the page may be linked elsewhere. One that is
            // being torn down counts for as long as it is linked: processors get there.
            let is_child = || {
                below.key().role().level() + 1 == level
                    && below.parents.any_near(Location::new(frame, 0).word())
            };
            // Once for all paths to it, of which a guest may make any number.
            if is_child() && visit.done.insert(child) {
                changed |= match level {
                    2 => self.sync_table(guard, map, stats, child, visit),
                    _ => self.sync_below(guard, map, stats, child, visit),
                };
            }
            if rule!(R16) {
                page.below.remove_if(word, || self.is_in_sync(child) || !is_child());
            } else if self.is_in_sync(child) || !is_child() {
                page.below.remove(word);
            }
        }
        changed
    }

    /// The guest has flushed one address of a root. Waits for nobody.
    pub(crate) fn sync_address(&self, context: &Context, stats: &Stats, root: FrameId, gva: Gva) {
        // As in `sync_root`.
        fence(Ordering::SeqCst);
        if self.frames.page(root).below.is_empty() {
            return;
        }
        let guard = context.handle.pin();
        let map = self.memory.load(&guard);
        let mut table = root;
        for level in (2..=self.levels()).rev() {
            let at = Location::new(table, index(gva, level));
            let mut entry = self.entry(at);
            if entry.is_pending() {
                // R34: what is to be linked here may be from before the flush. If it is linked by now,
                // it is compared; what is reserved by now is from after the flush.
                if self.drop_entry(&guard, &mut self.flush.narrow(), at, |now| !now.is_pending()) {
                    return;
                }
                entry = self.entry(at);
            }
            // Obsolete and dying tables count as well: processors may still be on them.
            if !entry.is_present() || entry.is_large() {
                return;
            }
            let Some(below) = self.table_at(entry.machine()) else { return };
            table = below;
        }
        // Acquire as in `is_in_sync`.
        if self.frames.page(table).unsync.load(Ordering::Acquire) != SYNC {
            self.compare(&guard, map, stats, table, index(gva, 1)..index(gva, 1) + 1);
        }
    }

    /// Compares all entries of a table, and settles it if it has not changed; whether it has.
    fn sync_table(
        &self,
        guard: &Guard<'_>,
        map: &MemoryMap,
        stats: &Stats,
        table: FrameId,
        visit: &mut Visit,
    ) -> bool {
        let page = self.frames.page(table);
        // Acquire: a generation that is ready was counted up after the protection.
        let state = page.unsync.load(Ordering::Acquire);
        let ready = state & STATE == READY && {
            let acknowledged = |generation| self.flush.acknowledged(generation, false);
            visit.has_passed(Generation(state >> SHIFT), acknowledged) || !rule!(R23)
        };
        let changed = self.compare(guard, map, stats, table, 0..ENTRIES);
        match state & STATE {
            // R23: nobody could write since before the entries were compared. Release: who finds it in
            // sync sees them as they were left. It fails if the table was marked again meanwhile.
            READY if ready => {
                let end =
                    page.unsync.compare_exchange(state, SYNC, Ordering::Release, Ordering::Relaxed);
                if end.is_ok() {
                    stats.mmu_synced.bump_shared();
                }
            }
            UNSYNC if !changed => {
                let protecting = self.flush.advance().0 << SHIFT | PROTECTING;
                // AcqRel: pairs with `is_guarded`.
                let begin = page.unsync.compare_exchange(
                    UNSYNC,
                    protecting,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if begin.is_ok() {
                    self.settle(guard, map, stats, table, protecting);
                }
            }
            // Whoever began it has not come to its end, or who was to mark the table was refused: then
            // nobody may write. A marker that is under way fails, and the write is emulated.
            PROTECTING | MARKING => self.settle(guard, map, stats, table, state),
            _ => {}
        }
        changed
    }

    /// Takes the right to write the guest table away.
    fn settle(
        &self,
        guard: &Guard<'_>,
        map: &MemoryMap,
        stats: &Stats,
        table: FrameId,
        protecting: u64,
    ) {
        let page = self.frames.page(table);
        let Some(home) = map.by_machine(page.home()) else { return };
        // R2: the state, fence, then entries, pending ones included. Pairs with the fence of the fault
        // that links a writable entry.
        fence(Ordering::SeqCst);
        let _ = self.protect_for(guard, home, stats);
        // A later generation than that, and of its own: the state is never the same twice.
        let ready = self.flush.advance().0 << SHIFT | READY;
        // Release publishes the protection to who waits for the generation.
        let _ =
            page.unsync.compare_exchange(protecting, ready, Ordering::Release, Ordering::Relaxed);
    }

    /// Drops the entries that the guest's do not grant any more, pending ones included; whether there
    /// were any.
    fn compare(
        &self,
        guard: &Guard<'_>,
        map: &MemoryMap,
        stats: &Stats,
        table: FrameId,
        entries: core::ops::Range<usize>,
    ) -> bool {
        let page = self.frames.page(table);
        let role = page.key().role();
        let Some(home) = map.by_machine(page.home()) else { return false };
        let mut narrowing = None;
        for index in entries {
            let at = Location::new(table, index);
            let spte = self.entry(at);
            if !(spte.is_present() || spte.is_pending() || spte.is_mmio()) {
                continue;
            }
            let offset = role.guest_offset(index);
            let Some(word) = home.word(offset) else { continue };
            // Acquire pairs with the guest's store: what it did before that is seen.
            let guest =
                role.format().entry_of(word.load(Ordering::Acquire), crate::addr::Gpa(offset));
            if self.derives(map, page.key(), guest, spte) {
                continue;
            }
            let narrowing = narrowing.get_or_insert_with(|| self.flush.narrow());
            let keep = |now| now != spte && self.derives(map, page.key(), guest, now);
            if self.drop_entry(guard, narrowing, at, keep) {
                stats.mmu_pte_zapped.bump_shared();
            }
        }
        narrowing.is_some()
    }

    /// Whether every table above knows of the unsync tables below it; else one that does not.
    pub(super) fn unmarked(&self, frame: FrameId) -> Option<FrameId> {
        if self.is_in_sync(frame) {
            return None;
        }
        let parents = self.frames.page(frame).parents.to_vec();
        parents.into_iter().map(|word| Location::from_word(word).frame()).find(|parent| {
            !self.frames.page(*parent).below.any(|child| child == u64::from(frame.0) + 1)
        })
    }

    /// Whether the leaf table's guest table may be mapped writable.
    pub(super) fn is_written_natively(&self, frame: FrameId) -> bool {
        self.frames.page(frame).unsync.load(Ordering::Acquire) == UNSYNC
    }

    /// Whether the leaf table's entries may differ from its guest table's.
    pub(super) fn is_unsync(&self, frame: FrameId) -> bool {
        self.frames.page(frame).unsync.load(Ordering::Acquire) != SYNC
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::frames::state;
    use super::super::{FaultInfo, Outcome, Regime, Shape, Spte};
    use super::*;
    use crate::addr::{Gpa, LEVELS, Machine};
    use crate::memory::{AllocatedMemory, SlotConfig};
    use crate::paging::{Access, PagingMode, Regs};
    use crate::sync::epoch::Collector;
    use crate::sync::{AtomicU64, Backoff};
    use std::sync::Arc;
    use std::thread::scope;

    /// A guest whose only leaf table, at 0x4000, is written natively through its own entry 2.
    struct Setup {
        engine: Engine,
        context: Context,
        mode: PagingMode,
        regime: Regime,
        root: FrameId,
        memory: Arc<AllocatedMemory>,
    }

    const DATA: Gva = Gva(0x1000);
    const WINDOW: Gva = Gva(0x2000);

    impl Setup {
        fn new() -> Self {
            let tables = Arc::new(AllocatedMemory::new(1 << 20));
            let shape = Shape { levels: LEVELS, largest: 1, unsync: true, reserved: None };
            let engine = Engine::new(tables, shape, Collector::new());
            let memory = Arc::new(AllocatedMemory::new(1 << 16));
            engine.create_slot(SlotConfig::new(0, Gpa(0), memory.clone())).unwrap();
            for (at, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)] {
                memory_word(&memory, at).store(value, Ordering::Relaxed);
            }
            memory_word(&memory, 0x4008).store(0x5067, Ordering::Relaxed);
            memory_word(&memory, 0x4010).store(0x4067, Ordering::Relaxed);
            let context = engine.seat().unwrap();
            let regs = Regs::long_mode(0x1000);
            let (mode, regime) = (PagingMode::new(&regs).unwrap(), Regime::of(&regs, true));
            let stats = Stats::default();
            let name = engine.name_of_root(&mode, regime);
            let root = engine.load_root(&context, &stats, name).unwrap().unwrap();
            let setup = Self { engine, context, mode, regime, root, memory };
            setup.fault(DATA, Access::read().user());
            setup.fault(WINDOW, Access::write().user());
            assert!(setup.engine.is_written_natively(setup.leaf().frame()));
            setup
        }

        fn fault(&self, gva: Gva, access: Access) {
            let (mode, regime, root) = (&self.mode, self.regime, self.root);
            let (emulate, apic) = (false, None);
            let info = FaultInfo { mode, regime, root, gva, access, emulate, apic };
            let outcome = self.engine.fault(&self.context, &Stats::default(), &info);
            assert_eq!(outcome, Ok(Outcome::Fixed));
        }

        fn leaf(&self) -> Location {
            self.engine.leaf_at(self.root, DATA).unwrap()
        }

        /// The entry that leads to the leaf table.
        fn link(&self) -> Location {
            let mut at = Location::new(self.root, 0);
            for _ in 2..LEVELS {
                at = Location::new(
                    self.engine.table_at(self.engine.entry(at).machine()).unwrap(),
                    0,
                );
            }
            at
        }

        /// The page that a processor would reach at `DATA`.
        fn reached(&self) -> Option<Machine> {
            let entry = self.engine.entry(self.engine.leaf_at(self.root, DATA)?);
            entry.is_present().then(|| entry.machine())
        }

        fn edit(&self, value: u64) {
            memory_word(&self.memory, 0x4008).store(value, Ordering::Relaxed);
        }

        fn page(&self, gpa: u64) -> Machine {
            use crate::memory::Backing;
            Machine(self.memory.machine().0 + gpa)
        }
    }

    fn memory_word(memory: &AllocatedMemory, at: usize) -> &crate::sync::AtomicU64 {
        use crate::memory::Backing;
        &memory.words()[at / 8]
    }

    /// A link is published while a flush looks at it: it is gone, or what is behind it was compared.
    #[test]
    fn a_flush_meets_a_link_that_is_being_published() {
        let setup = Setup::new();
        let engine = &setup.engine;
        let (rounds, mut missed) = (200_000u64, 0);
        let turn = AtomicU64::new(0);
        let wait = |wanted| {
            let mut backoff = Backoff::default();
            while turn.load(Ordering::SeqCst) < wanted {
                backoff.wait();
            }
        };
        let next = || turn.fetch_add(1, Ordering::SeqCst);
        let spin = |n: u64| (0..n).for_each(|_| core::hint::spin_loop());
        let (at, leaf) = (setup.link(), setup.leaf());
        let link = engine.entry(at);
        let good = Spte::page(setup.page(0x5000), true, true, true);
        scope(|s| {
            s.spawn(|| {
                for round in 0..rounds {
                    // Reserved; what is behind it has been compared with the guest's table.
                    engine.frames.entry(at).store(Spte::pending(1).0, Ordering::SeqCst);
                    next();
                    wait(4 * round + 2);
                    spin(round % 32);
                    let _ = engine.exchange(at, Spte::pending(1), link);
                    next();
                    wait(4 * round + 4);
                }
            });
            for round in 0..rounds {
                engine.frames.entry(leaf).store(good.0, Ordering::SeqCst);
                setup.edit(0x5067);
                wait(4 * round + 1);
                setup.edit(0x6067);
                next();
                spin(round / 32 % 16);
                engine.sync_address(&setup.context, &Stats::default(), setup.root, DATA);
                wait(4 * round + 3);
                missed += u32::from(engine.entry(at) == link && engine.entry(leaf).is_present());
                next();
            }
        });
        assert_eq!(missed, 0, "flushes of {rounds} left what they were to compare");
    }

    /// A thread that tears a table down is stopped after its mark: processors still get there.
    #[test]
    fn a_flush_goes_through_dying_tables() {
        for all in [false, true] {
            let setup = Setup::new();
            let engine = &setup.engine;
            setup.fault(DATA, Access::read().user());
            let dying = setup.link().frame();
            engine.frames.page(dying).state.store(state::ZAPPING, Ordering::SeqCst);
            setup.edit(0x6067);
            let (context, stats) = (&setup.context, Stats::default());
            match all {
                true => engine.sync_root(context, &stats, setup.root),
                false => engine.sync_address(context, &stats, setup.root, DATA),
            }
            assert_ne!(setup.reached(), Some(setup.page(0x5000)), "all: {all}");
        }
    }

    /// A thread that tears a table down, for the many writes to it, is stopped after its mark: processors
    /// still get there, so that the next write still drops what was derived from the entry.
    #[test]
    fn a_write_goes_through_dying_tables() {
        let setup = Setup::new();
        let (engine, context) = (&setup.engine, &setup.context);
        setup.fault(DATA, Access::read().user());
        assert_eq!(setup.reached(), Some(setup.page(0x5000)));
        let page = engine.frames.page(setup.leaf().frame());
        page.unsync.store(SYNC, Ordering::SeqCst);
        while page.count_write() < 64 {}
        page.state.store(state::ZAPPING, Ordering::SeqCst);
        setup.edit(0x6067);
        let guard = context.handle.pin();
        let map = engine.memory.load(&guard);
        engine.guest_wrote(&Stats::default(), &guard, map, Gpa(0x4008), 8);
        drop(guard);
        engine.sync_address(context, &Stats::default(), setup.root, DATA);
        assert_eq!(setup.reached(), None);
    }

    /// A marker that finds too many tables above gives a state back in which the table settles.
    #[test]
    fn a_refused_mark_of_two_settles() {
        let setup = Setup::new();
        let engine = &setup.engine;
        let table = setup.leaf().frame();
        let page = engine.frames.page(table);
        // Of another marker that was refused, too, and finds another generation.
        page.unsync.store(engine.flush.advance().0 << SHIFT | MARKING, Ordering::SeqCst);
        assert!(!engine.mark(table, &mut 1, &Stats::default()));
        for _ in 0..4 {
            engine.sync_root(&setup.context, &Stats::default(), setup.root);
        }
        assert!(!engine.is_unsync(table), "state {}", page.unsync.load(Ordering::SeqCst) & STATE);
    }
}
