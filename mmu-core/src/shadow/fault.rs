// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault: from a guest-virtual address to a present entry.
//!
//! One read section, one memory map (R31), no lock around it. Each link and each leaf is made by
//! the same steps:
//!
//! 1. *reserve*: exchange the entry from empty to pending, with a tag of this fault;
//! 2. *link*: add the entry to the page's reverse map, or to the child's parents;
//! 3. *fence*;
//! 4. *re-check* what could have changed since the walk: the guest's entry, the child's
//!    lifecycle, whether the page became a guest table;
//! 5. *publish*: exchange pending for present. If anything interfered, that fails, and the fault
//!    takes its own link back and starts again.
//!
//! A fault never waits for another processor: it returns a [`Stall`] that the vCPU's loop waits
//! for, outside any read section.

use super::flush::Generation;
use super::location::{FrameId, Location};
use super::names::{Name, table_of};
use super::role::{Key, Regime};
use super::spte::Spte;
use super::stats::Stats;
use super::unsync::Link;
use super::{Context, Engine, index};
use crate::addr::{ENTRIES, Gfn, Gpa, Gva, INDEX_BITS};
use crate::memory::{DirtyMode, MemoryMap, Page};
use crate::paging::{Access, Allowed, Fault, Kind, PagingMode, Path, Step, Walk, bits};
use crate::sync::epoch::Guard;
use crate::sync::{Backoff, LocationSet, Ordering, fence, rule};

/// How often a fault starts again before it lets the vCPU try the access first.
const RESTARTS: u32 = 16;

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The entry is there now: let the vCPU repeat the access.
    Fixed,
    /// The guest's own tables forbid the access: deliver the fault to the guest.
    Guest(Fault),
    /// Emulate the instruction by the vCPU's accessors: a write to a page that the engine shadows as a
    /// guest page table; any access to the page of another vCPU's local APIC; a fetch of code that may
    /// not be read, which no entry can allow; a write whose entry has gone again each time, sixteen
    /// faults in a row, whatever page it is to.
    Emulate {
        /// Guest-physical address of the access.
        gpa: Gpa,
    },
    /// The address lies in the part of the address space that the consumer has reserved
    /// ([`crate::Config::reserved_root_entry`]): the guest cannot use it.
    Reserved,
    /// No memslot there, or a write to a read-only one, or the page of the vCPU's own local APIC
    /// ([`crate::vcpu::Vcpu::set_apic_page`]): the VMM's to emulate.
    Mmio {
        /// Guest-physical address of the access.
        gpa: Gpa,
    },
    /// A write to a page that the host has made read-only ([`crate::Mmu::set_host_writable`]): the
    /// VMM's to make writable again, after a copy perhaps. The page may be the guest's table, whose
    /// entry lacks an accessed or dirty bit that the access has to set.
    HostReadOnly {
        /// Guest-physical address of the access, or of the table's entry.
        gpa: Gpa,
    },
}

/// Something to wait for, outside any read section, before the operation is tried again:
/// [`crate::vcpu::Vcpu::must_wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Stall {
    /// Every vCPU must have stopped using what was narrowed up to this generation.
    Flush(Generation),
    /// Table frames ran out; some come back when every vCPU has drained this generation inside
    /// the guest, and read sections have ended.
    Frames(Generation),
    /// The host has taken the page away for a while; the number of invalidations that had ended.
    Invalidation(u64),
}

/// Why an attempt did not succeed.
pub(super) enum Retry {
    Again,
    Stall(Stall),
}

/// The vCPU's side of a fault.
pub(crate) struct FaultInfo<'v> {
    pub(crate) mode: &'v PagingMode,
    pub(crate) regime: Regime,
    pub(crate) root: FrameId,
    pub(crate) gva: Gva,
    pub(crate) access: Access,
    /// The same fault came again and again (R25): a write is to be emulated.
    pub(crate) emulate: bool,
    /// Where the vCPU's local APIC answers.
    pub(crate) apic: Option<Gfn>,
}

/// One attempt at one fault.
pub(super) struct Attempt<'a> {
    pub(super) engine: &'a Engine,
    pub(super) context: &'a Context,
    pub(super) stats: &'a Stats,
    pub(super) guard: &'a Guard<'a>,
    pub(super) map: &'a MemoryMap,
    pub(super) info: &'a FaultInfo<'a>,
}

impl Engine {
    /// Serves a fault.
    pub(crate) fn fault(
        &self,
        context: &Context,
        stats: &Stats,
        info: &FaultInfo<'_>,
    ) -> Result<Outcome, Stall> {
        let mut guard = context.handle.pin();
        self.sweep_step(&guard);
        // An address that is not canonical for the tables names the entry of another.
        let canonical = self.extend(info.gva.0) == info.gva;
        let known = match canonical && self.is_current(info.root) && !info.access.implicit {
            true => self.leaf_at(info.root, info.gva),
            false => None,
        };
        let mut attempts = 0;
        while attempts < RESTARTS {
            let map = self.memory.load(&guard);
            let attempt = Attempt { engine: self, context, stats, guard: &guard, map, info };
            // The whole way, unless what is there already says what to do.
            let short = known.filter(|_| attempts == 0);
            if let Some(outcome) =
                short.and_then(|at| attempt.known_mmio(at).or_else(|| attempt.repair(at)))
            {
                return Ok(outcome);
            }
            attempts += 1;
            match attempt.run() {
                Ok(outcome) => return Ok(outcome),
                Err(Retry::Again) => stats.pf_restart.bump(),
                Err(Retry::Stall(stall)) => {
                    stats.pf_retry.bump();
                    return Err(stall);
                }
            }
            guard.repin();
        }
        // Others keep changing what this fault needs: whatever the access meets now, it meets in
        // some order with them.
        stats.pf_spurious.bump();
        Ok(Outcome::Fixed)
    }
}

/// What a leaf maps: the page of the access, at `level` with all of the block from `first` on.
#[derive(Clone, Copy)]
struct Target<'m> {
    page: Page<'m>,
    level: u8,
    first: Page<'m>,
}

/// Pages of 4 KiB that a leaf at `level` maps.
const fn pages(level: u8) -> u64 {
    1 << (INDEX_BITS * (level as u32 - 1))
}

/// What the guest's entries on the way down grant so far.
#[derive(Clone, Copy)]
struct Granted {
    write: bool,
    user: bool,
    execute: bool,
}

impl Granted {
    fn through(self, value: u64) -> Self {
        Self {
            write: self.write && value & bits::RW != 0,
            user: self.user && value & bits::US != 0,
            execute: self.execute && value & bits::NX == 0,
        }
    }
}

/// R35: the guest's entry that lacks its accessed bit, or for a write its dirty bit, because the host
/// had made the table read-only when it was walked, whatever it has done since. A guest whose page changes
/// behind a clear D loses the page. (In a read-only slot they stay clear for good: R24.)
pub(crate) fn withheld(map: &MemoryMap, path: &Path, write: bool) -> Option<Gpa> {
    let last = path.steps().len().saturating_sub(1);
    let lacking = |(i, step): (usize, &Step)| {
        let needed = bits::A | if write && i == last { bits::D } else { 0 };
        (step.value & needed != needed).then_some(step.entry)
    };
    path.steps()
        .iter()
        .enumerate()
        .filter_map(lacking)
        .find(|entry| map.page(entry.gfn()).is_some_and(|page| !page.slot.is_read_only()))
}

impl Attempt<'_> {
    fn run(&self) -> Result<Outcome, Retry> {
        let FaultInfo { mode, root, gva, access, .. } = *self.info;
        let mut path = Path::default();
        let mut walk = match mode.walk_path(self.map, &self.context.hint, gva, access, &mut path) {
            Ok(walk) => walk,
            Err(fault) => {
                self.stats.pf_guest.bump();
                return Ok(Outcome::Guest(fault));
            }
        };
        self.engine.guest_walked(self.stats, self.guard, self.map, mode, &path);
        if !mode.is_paging() {
            // One page without end, as if it had been written.
            (walk.level, walk.dirty) = (self.engine.levels(), true);
        }
        let gfn = walk.gpa.gfn();
        let write = access.kind == Kind::Write;
        if let Some(gpa) = withheld(self.map, &path, write) {
            return Ok(Outcome::HostReadOnly { gpa });
        }
        // R31: the map that was walked.
        let map = if rule!(R31) { self.map } else { self.engine.memory.load(self.guard) };
        let found = map.page(gfn);
        let top = index(gva, self.engine.levels());
        let reserved = self.engine.reserved_at(self.engine.levels());
        let reserved = reserved.is_some_and(|(reserved, _)| reserved == top);
        let apic = self.info.apic == Some(gfn);
        let device = |page: &Page<'_>| apic || write && page.slot.is_read_only();
        let Some(page) = found.filter(|page| !device(page)) else {
            self.stats.pf_mmio.bump();
            if found.is_none() && !reserved {
                // For the next time. What hinders it hinders nothing else.
                let table = self.leaf_table(root, &walk, &path, 1);
                let _ = table.and_then(|(table, step)| self.note_mmio(table, &walk, step));
            }
            return Ok(Outcome::Mmio { gpa: walk.gpa });
        };
        if reserved {
            return Ok(Outcome::Reserved);
        }
        // Another vCPU's: memory for this one, which they must not both have mapped.
        if map.has_apic(gfn.0..gfn.0 + 1) {
            self.stats.pf_emulate.bump();
            return Ok(Outcome::Emulate { gpa: walk.gpa });
        }
        if page.region().invalid.covers(page.index) {
            return Err(self.invalidated(page));
        }
        // R25: a write that gets nowhere is emulated, which needs no entry, nor a root to have it below.
        if write && self.info.emulate {
            return Ok(self.refused(page, walk.gpa, write));
        }
        // A root that became obsolete is not built on: the vCPU loads another on its way back.
        if !self.engine.is_current(root) {
            self.stats.pf_spurious.bump();
            return Ok(Outcome::Fixed);
        }
        let (level, first) = self.block(map, page, &walk);
        let (table, last) = self.leaf_table(root, &walk, &path, level)?;
        self.install(table, Target { page, level, first }, &walk, last, write)
    }

    /// The level of the largest leaf that may map the page, and the first page that it maps.
    fn block<'m>(&self, map: &'m MemoryMap, page: Page<'m>, walk: &Walk) -> (u8, Page<'m>) {
        if page.slot.flags().dirty == DirtyMode::Off {
            for level in (2..=walk.level.min(self.engine.shape.largest)).rev() {
                let gfn = walk.gpa.gfn();
                let start = gfn.0 & !(pages(level) - 1);
                if map.has_apic(start..start + pages(level)) {
                    continue;
                }
                let first = map.block(gfn, pages(level));
                let allowed = |first: &Page<'_>| first.region().allows_block(level, first.index);
                if let Some(first) = first.filter(allowed) {
                    return (level, first);
                }
            }
        }
        (1, page)
    }

    /// An access that no entry is to let through.
    fn refused(&self, page: Page<'_>, gpa: Gpa, write: bool) -> Outcome {
        if write && page.region().is_host_read_only(page.index) {
            return Outcome::HostReadOnly { gpa };
        }
        self.stats.pf_emulate.bump();
        Outcome::Emulate { gpa }
    }

    /// The host has taken the page away: wait until it has given back something. The number is read
    /// before the page is looked at again, so that the wait cannot miss the end.
    fn invalidated(&self, page: Page<'_>) -> Retry {
        // Acquire pairs with the Release in `Invalidation::drop`.
        let ended = self.engine.invalidated.load(Ordering::Acquire);
        match page.region().invalid.covers(page.index) {
            true => Retry::Stall(Stall::Invalidation(ended)),
            false => Retry::Again,
        }
    }

    /// The table that has the leaf entry at `leaf`, made if need be, and the guest's entry behind it;
    /// `None` below a large guest page.
    fn leaf_table<'p>(
        &self,
        root: FrameId,
        walk: &Walk,
        path: &'p Path,
        leaf: u8,
    ) -> Result<(FrameId, Option<&'p Step>), Retry> {
        let mut granted = Granted { write: true, user: true, execute: true };
        let mut page = root;
        let step_at = |level| path.steps().iter().find(|step| step.level == level);
        for level in (leaf + 1..=self.engine.levels()).rev() {
            let step = step_at(level);
            if let Some(step) = step {
                granted = granted.through(step.value);
            }
            page = self.descend(page, level, walk, step, granted)?;
        }
        Ok((page, step_at(leaf)))
    }

    /// What the entry of `page` on the way to the address must lead to.
    fn key_below(
        &self,
        page: Key,
        level: u8,
        walk: &Walk,
        step: Option<&Step>,
        granted: Granted,
    ) -> Key {
        let FaultInfo { mode, gva, .. } = *self.info;
        let (role, index) = (page.role(), index(gva, level));
        if role.is_upper() {
            let pae = role.format().is_pae();
            let top = if pae { 2 } else { mode.levels() };
            let below = role.below_upper(top).behind(index);
            let gfn = match pae && !below.is_upper() {
                true => table_of(mode.pdptrs(), index),
                false => page.gfn(),
            };
            return Key::new(gfn, below);
        }
        match step.filter(|_| level > walk.level) {
            Some(step) => {
                let below = role.child(granted.write, granted.user, granted.execute);
                Key::new(Gpa(step.value & bits::ADDR).gfn(), below.behind(index))
            }
            None => {
                // R35: writable below only if the guest's entry has D.
                let write = self.allowed(walk).write && walk.dirty;
                let below = role.child(write, walk.rights.user, walk.rights.execute).direct();
                Key::new(Gfn(walk.gpa.gfn().0 & !(pages(level) - 1)), below)
            }
        }
    }

    /// The shadow table below `page` on the way to the address; makes and links it if need be.
    fn descend(
        &self,
        page: FrameId,
        level: u8,
        walk: &Walk,
        step: Option<&Step>,
        granted: Granted,
    ) -> Result<FrameId, Retry> {
        let engine = self.engine;
        engine.ensure_protected(self.stats, self.guard, self.map, page)?;
        let key = self.key_below(engine.frames.page(page).key(), level, walk, step, granted);
        let at = Location::new(page, index(self.info.gva, level));
        let mut backoff = Backoff::default();
        loop {
            let old = engine.entry(at);
            if old.is_present() {
                let child = engine.frames.frame_at(old.machine()).filter(|_| !old.is_large());
                if let Some(child) = child {
                    let below = engine.frames.page(child);
                    if below.key() == key && engine.is_current(child) {
                        below.touch();
                        return Ok(child);
                    }
                }
                // Made from an entry that the guest has changed since, or dying, or of a block that
                // may be mapped whole no longer.
                let mut narrowing = engine.flush.narrow();
                engine.drop_entry(self.guard, &mut narrowing, at, |now| now != old);
                continue;
            }
            if old == Spte::FROZEN {
                return Err(Retry::Again);
            }
            if old.is_pending() && !backoff.is_long() {
                backoff.wait();
                continue;
            }
            let child = engine.get_or_make(self.stats, self.guard, self.map, Name::Key(key))?;
            let below = engine.frames.page(child);
            let direct = key.role().is_direct();
            if direct && level == 2 && below.parents.is_empty() {
                self.split(child, walk);
            }
            let spte = Spte::table(engine.frames.machine(child));
            let mut link = Link::Good;
            let mut fresh = || {
                // R17: the child may have been marked since; who marks it walks its parents, this
                // entry included, after a fence.
                // R35: a direct page that may be written stands for D in the guest's large entry.
                let writable = direct && key.role().writes();
                // R19: nor may it be obsolete.
                let fresh =
                    (!rule!(R17) || engine.is_current(child)) && self.unchanged(step, writable);
                if fresh {
                    link = engine.mark_link(self.guard, self.map, self.stats, (page, child));
                }
                fresh && matches!(link, Link::Good)
            };
            if self.publish(at, old, Some(&below.parents), || fresh().then_some(spte)) {
                if below.link_again() {
                    self.context.relinked.set(true);
                }
                return Ok(child);
            }
            match link {
                Link::Good => {}
                // Another shadow of the same guest table begins in sync.
                Link::Crowded => {
                    engine.zap(self.guard, child);
                }
                Link::Stale(generation) => return Err(Retry::Stall(Stall::Flush(generation))),
            }
            return Err(Retry::Again);
        }
    }

    /// R21: fills a table that takes the place of a leaf which the log or a guest table inside it
    /// forbids, so that its pages need no faults of their own.
    fn split(&self, table: FrameId, walk: &Walk) {
        let block = self.map.block(walk.gpa.gfn(), pages(2));
        if self.engine.shape.largest > 1 && block.is_some() {
            self.map_around(table, walk, None, 0..ENTRIES, |_| true);
        }
    }

    /// Makes the leaf entry.
    fn install(
        &self,
        table: FrameId,
        target: Target<'_>,
        walk: &Walk,
        step: Option<&Step>,
        write: bool,
    ) -> Result<Outcome, Retry> {
        let engine = self.engine;
        engine.ensure_protected(self.stats, self.guard, self.map, table)?;
        let Target { page, level, first } = target;
        let (region, index, machine) = (page.region(), page.index, first.machine());
        let allowed = self.allowed(walk);
        let dirty = page.slot.flags().dirty;
        // R35: writable only if the guest's entry has D. Without a write there is no reason to mark
        // the page dirty.
        let may_write = allowed.write && walk.dirty && (write || dirty != DirtyMode::WriteProtect);
        // R07: at each look, except in the rule's twin.
        let host_allows = rule!(R07) || page.is_writable();
        let entry_for = || {
            let allowed_now = page.is_writable() || !rule!(R07);
            let tables = level == 1 && region.is_shadowed(index) && engine.is_guarded(page);
            let writable = may_write && host_allows && allowed_now && !tables;
            let dirty = write || dirty != DirtyMode::DirtyBits;
            // A write that cannot be let through is emulated instead.
            (writable || !write).then(|| {
                let entry = Spte::page(machine, writable, allowed.execute, dirty);
                let entry = entry.granting_write(allowed.write && walk.dirty);
                if level > 1 { entry.large() } else { entry }
            })
        };
        let refused = || Ok(self.refused(page, walk.gpa, write));
        // No entry lets code be fetched that may not be read: such instructions are emulated.
        if !allowed.read {
            return refused();
        }
        let at = Location::new(table, super::index(self.info.gva, level));
        let rmap = region.rmap_at(level, first.index);
        let mut backoff = Backoff::default();
        loop {
            let old = engine.entry(at);
            if old == Spte::FROZEN {
                return Err(Retry::Again);
            }
            let Some(wanted) = entry_for() else {
                let native = write && may_write && page.is_writable();
                if native && engine.desync(page, self.stats) {
                    return Err(Retry::Again);
                }
                return refused();
            };
            // R7: the host may have taken the page away, or the right to write it. R20: a guest table
            // may have got a shadow inside the block.
            let fresh = || {
                let taken = match level {
                    1 => region.invalid.covers(index) && rule!(R07),
                    _ => !region.allows_block(level, first.index) && rule!(R20),
                };
                let entry = entry_for().filter(|_| !taken)?;
                // R35: by what is published, which may have become writable since `wanted` was made.
                self.unchanged(step, entry.grants_write()).then_some(entry)
            };
            if old.includes(wanted) {
                if write {
                    self.mark_dirty(page);
                }
                self.stats.pf_spurious.bump();
                return Ok(Outcome::Fixed);
            }
            let done = if old.is_present() {
                if !wanted.includes(old) {
                    self.clear_for_leaf(at, old, level);
                    continue;
                }
                self.widen(at, old, (first, rmap), fresh)
            } else {
                if old.is_pending() && !backoff.is_long() {
                    backoff.wait();
                    continue;
                }
                if !rule!(R13) && write {
                    self.mark_dirty(page);
                }
                self.publish(at, old, Some(rmap), fresh)
            };
            if !done {
                return Err(Retry::Again);
            }
            // R13: W first, then the dirty bit, then the guest.
            if write && rule!(R13) {
                self.mark_dirty(page);
            }
            self.stats.pf_fixed.bump();
            if level == 1 {
                self.map_neighbours(table, walk, step);
            } else {
                self.stats.pf_large.bump();
            }
            return Ok(Outcome::Fixed);
        }
    }

    /// Takes away what stands where a leaf is to go: a leaf for something else, or a table whose
    /// pages can be mapped whole again.
    fn clear_for_leaf(&self, at: Location, old: Spte, level: u8) {
        let engine = self.engine;
        let child = engine.frames.frame_at(old.machine()).filter(|_| level > 1 && !old.is_large());
        if let Some(child) = child.filter(|c| engine.frames.page(*c).key().role().is_direct()) {
            engine.zap(self.guard, child);
        }
        // Also where somebody else tears it down, and may have been stopped.
        engine.drop_entry(self.guard, &mut engine.flush.narrow(), at, |now| now != old);
    }

    pub(super) fn mark_dirty(&self, page: Page<'_>) {
        page.mark_dirty(self.context.hint.ring());
    }

    /// What this privilege may do by the rights of the walk.
    pub(super) fn allowed(&self, walk: &Walk) -> Allowed {
        self.info.mode.allowed(walk.rights, self.info.regime.is_user())
    }

    /// Reserve, link, fence, re-check, publish. `old` is empty, an MMIO entry, or another fault's
    /// reservation that is taken over: that fault's publication then fails.
    pub(super) fn publish(
        &self,
        at: Location,
        old: Spte,
        links: Option<&LocationSet>,
        fresh: impl FnOnce() -> Option<Spte>,
    ) -> bool {
        let engine = self.engine;
        let pending = Spte::pending(self.context.tag());
        if engine.exchange(at, old, pending).is_err() {
            return false;
        }
        if let Some(links) = links {
            links.add(at.word());
        }
        // R2, R17: own store, fence, foreign load. Pairs with the fences of `drop_derived`,
        // `ensure_protected` and `tear_down`.
        if rule!(R02) {
            fence(Ordering::SeqCst);
        }
        if let Some(spte) = fresh() {
            if engine.exchange(at, pending, spte).is_ok() {
                return true;
            }
        }
        if let Some(links) = links {
            links.remove(at.word());
        }
        // Whoever swapped the reservation out has emptied or frozen the entry already.
        let _ = engine.exchange(at, pending, Spte::EMPTY);
        false
    }

    /// Replaces a present entry by one for the same page with more rights. Translations cached from
    /// the old one stay right, so nothing is flushed unless the publication fails.
    pub(super) fn widen(
        &self,
        at: Location,
        old: Spte,
        (page, rmap): (Page<'_>, &LocationSet),
        fresh: impl FnOnce() -> Option<Spte>,
    ) -> bool {
        let engine = self.engine;
        // In flight while the entry is neither: a scan that meets the reservation records it.
        let mut narrowing = engine.flush.narrow();
        let pending = Spte::pending(self.context.tag());
        if engine.exchange(at, old, pending).is_err() {
            return false;
        }
        // R2, as in `publish`. The entry is in the reverse map already.
        fence(Ordering::SeqCst);
        if let Some(spte) = fresh() {
            // R11: a write through the old entry is one through the new.
            let spte = if old.is_dirty() { spte.used(true) } else { spte };
            if spte.includes(old) && engine.exchange(at, pending, spte).is_ok() {
                return true;
            }
        }
        let _ = engine.exchange(at, pending, Spte::EMPTY);
        narrowing.entry(at, engine.gva_of(at));
        engine.took(page, old);
        rmap.remove(at.word());
        false
    }

    /// Whether the guest's entry still says what the walk saw. A and D that others have set since do
    /// no harm; a cleared A, or D where the shadow entry is `writable`, does (R35).
    pub(super) fn unchanged(&self, step: Option<&Step>, writable: bool) -> bool {
        let Some(step) = step else { return true };
        let Some(table) = self.map.page(step.entry.gfn()) else { return false };
        let Some(word) = table.word(step.entry.page_offset()) else { return false };
        // Acquire: pairs with the Release of the guest's emulated store.
        let now = self.info.mode.entry_of(word.load(Ordering::Acquire), step.entry);
        let flags = bits::A | bits::D;
        let needed = bits::A | if writable { bits::D } else { 0 };
        let kept = step.value & needed & !now == 0;
        (now | flags) == (step.value | flags) && (kept || !rule!(R35))
    }
}
