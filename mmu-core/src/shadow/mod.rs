// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The shadow: tables that map guest-virtual addresses straight to machine pages, made from the
//! guest's tables on faults and kept consistent while guests edit them.
//!
//! There is no lock around a fault. What threads agree on, they agree on through single words:
//!
//! * an entry goes *empty → pending → present*; the fault that made it pending re-checks everything
//!   that could have changed before it publishes, and whoever takes something away changes the
//!   state first and then swaps out pending entries as well as present ones (`fault`);
//! * what was taken away is recorded for every vCPU before anything else is done about it
//!   (`flush`), and whoever relies on it waits for the vCPUs, outside any read section;
//! * the reverse map of a page is found from the machine address in the entry itself, so the key
//!   used at removal cannot differ from the one used at install (R14).
//!
//! The numbered rules are those of `docs/protocols.md`.

mod age;
mod apic;
mod around;
mod audit;
mod derive;
mod dirty;
mod edit;
mod fault;
mod flush;
mod frames;
mod host;
mod location;
mod make;
mod mmio;
mod names;
mod protect;
mod reclaim;
mod repair;
mod role;
mod slots;
mod spte;
mod stats;
mod unsync;
mod zap;

pub use audit::{AuditReport, Disagreement};
pub use fault::{Outcome, Stall};
pub use flush::{Downgrade, Generation, Processor};
pub use host::{Invalidation, PageRange, RangeError};
pub use location::{FrameId, Location};
pub use reclaim::QuotaError;
pub use slots::Release;
pub use stats::StatsSnapshot;

pub(crate) use fault::{FaultInfo, withheld};
pub(crate) use flush::{Cursor, VcpuState, request};
pub(crate) use names::Name;
pub(crate) use reclaim::MIN_FRAMES;
pub(crate) use role::Regime;
pub(crate) use spte::Spte;
pub(crate) use stats::Stats;

use crate::addr::{ENTRIES, Gfn, Gva, INDEX_BITS, Machine, PAGE_SHIFT};
use crate::memory::{Backing, Hint, Memory};
use crate::sync::epoch::{Collector, Guard, Handle, Pool};
use crate::sync::{
    AtomicU64, CachePadded, Mutex, Ordering, Sequence, fence, hint, lock, rule, unique,
};
use around::Windows;
use core::cell::Cell;
use flush::{Flush, Narrowing};
use frames::Frames;
use names::Pages;
use reclaim::{FRAMES_PER_VCPU, Quota};
use role::Role;
use std::sync::Arc;

/// Everything VM-wide.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) memory: Memory,
    pub(crate) collector: Collector,
    /// For calls that belong to no vCPU.
    pub(crate) handles: CachePadded<Pool>,
    pub(crate) flush: Flush,
    frames: Arc<Frames>,
    /// Live shadow pages by (gfn, role), or by PDPTE registers.
    pages: Pages,
    shape: Shape,
    /// Serialises the writers of the memory map.
    writer: CachePadded<Mutex<()>>,
    /// Where the local APICs of vCPUs answer, a frame for each vCPU that has said so. Locked after
    /// `writer`.
    apics: Mutex<Vec<Gfn>>,
    /// Where recycling looks next.
    hand: CachePadded<hint::AtomicU32>,
    /// Counts the times that everything was zapped: pages made before are obsolete.
    shadow_generation: AtomicU64,
    /// The round of obsolete pages: next frame in the low half, end in the high half.
    sweep: CachePadded<AtomicU64>,
    /// vCPUs that exist, by the number of their [`Context`].
    seats: Mutex<Vec<bool>>,
    /// Locked after `seats`.
    quota: Mutex<Quota>,
    /// Host invalidations that have begun and not ended, and how many have ended.
    invalidating: AtomicU64,
    invalidated: AtomicU64,
    /// Patches of guest code (R38).
    pub(crate) patches: Sequence,
    /// Nothing else in this process has it.
    id: u64,
    /// Counts of what no vCPU did.
    pub(crate) stats: CachePadded<Stats>,
    /// Counts of vCPUs that are gone.
    pub(crate) past: Mutex<StatsSnapshot>,
}

/// The tables that the consumer's processor walks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Levels.
    pub(crate) levels: u8,
    /// Highest level at which an entry may map memory.
    pub(crate) largest: u8,
    /// Whether guests may write leaf tables natively.
    pub(crate) unsync: bool,
    /// Entry of every root that belongs to the consumer: (index, value).
    pub(crate) reserved: Option<(usize, u64)>,
}

/// What one thread brings to each operation.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) handle: Handle,
    /// Where its last look-up ended, and its dirty ring.
    pub(crate) hint: Hint,
    /// Number of the context, and of its operations so far: no two reservations that are open at
    /// the same time have the same tag.
    id: u64,
    tags: Cell<u64>,
    /// A table that was linked before has been linked again: the processor may remember entries of it
    /// that have changed meanwhile, and must hear of that before it uses the link.
    pub(crate) relinked: Cell<bool>,
    /// The last fault found its entry and made it writable again.
    pub(crate) repaired: Cell<bool>,
    /// What its last faults have mapped.
    windows: Windows,
}

impl Context {
    fn tag(&self) -> u64 {
        const COUNT_BITS: u32 = spte::TAG_BITS - 20;
        let count = self.tags.get().wrapping_add(1);
        self.tags.set(count);
        self.id << COUNT_BITS | count & ((1 << COUNT_BITS) - 1)
    }
}

impl Engine {
    pub(crate) fn new(tables: Arc<dyn Backing>, shape: Shape, collector: Collector) -> Self {
        Self {
            memory: Memory::new(),
            handles: Pool::new(collector.clone()).into(),
            collector,
            flush: Flush::new(),
            frames: Arc::new(Frames::new(tables)),
            pages: Pages::new(),
            shape,
            writer: Mutex::new(()).into(),
            apics: Mutex::new(Vec::new()),
            hand: hint::AtomicU32::new(0).into(),
            shadow_generation: AtomicU64::new(0),
            sweep: AtomicU64::new(0).into(),
            quota: Mutex::new(Quota::default()),
            invalidating: AtomicU64::new(0),
            invalidated: AtomicU64::new(0),
            patches: Sequence::new(),
            id: unique(),
            seats: Mutex::new(Vec::new()),
            stats: CachePadded::default(),
            past: Mutex::new(StatsSnapshot::default()),
        }
    }

    /// A context for one more vCPU; `None` if there are too few table frames for it. Each may hold
    /// three roots and need a path of tables besides.
    pub(crate) fn seat(&self) -> Option<Context> {
        let mut seats = lock(&self.seats);
        let id = seats.iter().position(|taken| !taken).unwrap_or(seats.len());
        if id >= self.most_vcpus() {
            return None;
        }
        if id == seats.len() {
            seats.push(true);
        }
        seats[id] = true;
        self.apply_quota(&lock(&self.quota), &seats);
        let (handle, hint) = (self.collector.register(), Hint::default());
        let (tags, relinked, repaired) = (Cell::new(0), Cell::new(false), Cell::new(false));
        let windows = Windows::default();
        Some(Context { handle, hint, id: id as u64, tags, relinked, repaired, windows })
    }

    /// The vCPU with this context is gone.
    pub(crate) fn give_up(&self, context: &Context) {
        let mut seats = lock(&self.seats);
        seats[context.id as usize] = false;
        self.apply_quota(&lock(&self.quota), &seats);
    }

    /// vCPUs that the table frames are enough for.
    pub(crate) fn most_vcpus(&self) -> usize {
        (self.frames.count() / FRAMES_PER_VCPU).min(1 << 20) as usize
    }

    /// Nothing else in this process has it.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn stats(&self) -> StatsSnapshot {
        let mut sum = *lock(&self.past);
        sum.add(&self.stats);
        for vcpu in self.flush.vcpus().iter() {
            sum.add(&vcpu.stats);
        }
        sum
    }

    /// Machine address of a table frame, for a root register.
    pub(crate) fn table_machine(&self, frame: FrameId) -> Machine {
        self.frames.machine(frame)
    }

    /// The entry as a processor reads it.
    #[inline]
    pub(crate) fn entry(&self, at: Location) -> Spte {
        // Acquire: a processor that sees a link sees the table behind it.
        Spte(self.frames.entry(at).load(Ordering::Acquire))
    }

    /// The table that a present non-leaf entry points at.
    #[inline]
    pub(crate) fn table_at(&self, machine: Machine) -> Option<FrameId> {
        self.frames.frame_at(machine)
    }

    /// Exchanges an entry. AcqRel: release publishes what the new value stands for, acquire shows
    /// what the old one stood for.
    fn exchange(&self, at: Location, old: Spte, new: Spte) -> Result<(), Spte> {
        let cell = self.frames.entry(at);
        match cell.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(now) => Err(Spte(now)),
        }
    }

    /// The only address that the leaf entry translates, if the path to it is the only one. Read
    /// after the entry was changed: a path that is linked later leads to the changed entry.
    fn gva_of(&self, at: Location) -> Option<Gva> {
        // Pairs with the fence between link and publication in `fault`.
        fence(Ordering::SeqCst);
        let mut page = self.frames.page(at.frame());
        if page.key().role().level() != 1 {
            return None;
        }
        let mut gva = (at.index() as u64) << PAGE_SHIFT;
        for level in 2..=self.shape.levels {
            let parent = Location::from_word(page.parents.only()?);
            page = self.frames.page(parent.frame());
            gva |= (parent.index() as u64) << shift(level);
        }
        Some(self.extend(gva))
    }

    /// The canonical address with these low bits, for the processor that walks the tables.
    pub(crate) fn extend(&self, gva: u64) -> Gva {
        let unused = 64 - shift(self.shape.levels + 1);
        Gva(((gva << unused) as i64 >> unused) as u64)
    }

    /// Levels of the tables.
    pub(crate) fn levels(&self) -> u8 {
        self.shape.levels
    }

    /// Where in what the leaf entry maps an address lies, in whole pages.
    pub(crate) fn offset_in(&self, at: Location, gva: Gva) -> u64 {
        let level = self.frames.page(at.frame()).key().role().level();
        gva.0 & ((1 << shift(level)) - 1) & !((1 << PAGE_SHIFT) - 1)
    }

    /// Whether what the leaf entry maps may be part of a larger page of the guest's, or more than 4 KiB.
    pub(crate) fn maps_part(&self, at: Location) -> bool {
        let role = self.frames.page(at.frame()).key().role();
        role.is_direct() || role.level() > 1
    }

    /// The entry of a page at this level that belongs to the consumer.
    fn reserved_at(&self, level: u8) -> Option<(usize, u64)> {
        self.shape.reserved.filter(|_| level == self.shape.levels)
    }

    /// Forgets that the entry `at` held `old`, which was present: takes it out of the reverse map
    /// of the page, or of the parents of the table, that `old` itself names (R14).
    fn unlink(&self, guard: &Guard<'_>, at: Location, old: Spte) {
        let level = self.frames.page(at.frame()).key().role().level();
        if level > 1 && !old.is_large() {
            if let Some(child) = self.frames.frame_at(old.machine()) {
                self.frames.page(child).parents.remove(at.word());
            }
        // The map of this moment, not of the operation's beginning: it knows every slot that an
        // entry seen by now can map.
        } else if let Some(page) = self.memory.load(guard).by_machine(old.machine()) {
            self.took(page, old);
            if let Some(rmap) = page.region().rmap_if_any(level, page.index) {
                rmap.remove(at.word());
            }
        }
    }

    /// Empties the entry, unless it is frozen or `keep` says to leave it. A pending entry is
    /// emptied as well: its fault then takes its links back itself. Returns whether something was
    /// taken away.
    fn drop_entry(
        &self,
        guard: &Guard<'_>,
        narrowing: &mut Narrowing<'_>,
        at: Location,
        keep: impl Fn(Spte) -> bool,
    ) -> bool {
        let met = self.entry(at);
        let mut old = met;
        loop {
            if !(old.is_present() || old.is_pending() || old.is_mmio()) || keep(old) {
                return false;
            }
            match self.exchange(at, old, Spte::EMPTY) {
                Err(now) => old = now,
                // No processor remembers it.
                Ok(()) if old.is_mmio() => return true,
                Ok(()) => {
                    // A reservation may stand for an entry that is being widened, which processors
                    // still remember. R21: so they do of a block.
                    if !old.is_large() || rule!(R21) {
                        narrowing.entry(at, self.gva_of(at));
                    }
                    // R14: by what was swapped out, not by what was met first.
                    let removed = if rule!(R14) { old } else { met };
                    if old.is_present() {
                        self.unlink(guard, at, removed);
                    }
                    return true;
                }
            }
        }
    }
}

/// log2 of what an entry of a table at `level` translates, in bytes.
pub(crate) const fn shift(level: u8) -> u32 {
    PAGE_SHIFT + INDEX_BITS * (level as u32 - 1)
}

/// Index into the table at `level`.
pub(crate) const fn index(gva: Gva, level: u8) -> usize {
    (gva.0 >> shift(level)) as usize & ((1 << INDEX_BITS) - 1)
}
