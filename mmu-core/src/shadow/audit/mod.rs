// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The audit: compares the whole shadow with the guest's tables and with itself.

mod report;
#[cfg(all(test, not(loom)))]
mod tests;

use super::frames::{PROTECTED, state};
use super::location::{FrameId, Location};
use super::names::table_of;
use super::role::Key;
use super::spte::Spte;
use super::{Engine, Role, shift};
use crate::addr::{ENTRIES, Gfn, INDEX_BITS, PAGE_SHIFT};
use crate::memory::{DirtyMode, Hint, MemoryMap, Page, Slot};
use crate::paging::{Entry, bits};
use crate::sync::epoch::Guard;
use crate::sync::{LocationSet, Ordering};
use core::ops::Range;
pub use report::{AuditReport, Disagreement};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Which list, whose, which entry.
type Link = (&'static str, u64, Location);

const APIC: &str = "maps the page of a local APIC";
const MEMORY: &str = "is MMIO, but there is memory: R09";
const WRITABLE_MMIO: &str = "is writable MMIO, the guest's entries are not";

struct Audit<'a> {
    engine: &'a Engine,
    map: &'a MemoryMap,
    hint: Hint,
    /// Links that the tables say there should be.
    expected: BTreeMap<Link, usize>,
    /// What the roots of PAE paging stand for, by their numbers.
    registers: BTreeMap<Gfn, [u64; 4]>,
    report: AuditReport,
}

impl Engine {
    /// Checks every entry, link and count. The engine must be quiescent: no operation in flight on
    /// any thread, every vCPU outside the guest.
    pub(crate) fn audit(&self, guard: &Guard<'_>) -> Result<AuditReport, Disagreement> {
        let in_flight = self.flush.in_flight();
        if in_flight != 0 {
            return Err(Disagreement::NotQuiescent(in_flight));
        }
        let mut audit = Audit {
            engine: self,
            map: self.memory.load(guard),
            hint: Hint::default(),
            expected: BTreeMap::new(),
            registers: BTreeMap::new(),
            report: AuditReport::default(),
        };
        for (name, frame) in self.pages.entries() {
            let page = self.frames.page(frame);
            let key = page.key();
            if !page.is_live() || self.name_of(frame, key) != name {
                return Err(Disagreement::Hash { frame: frame.0, gfn: key.gfn() });
            }
            if let Some(pdptrs) = name.pdptrs() {
                audit.registers.insert(key.gfn(), pdptrs);
            }
        }
        let mut used = 0;
        let roots = self.flush.roots();
        for (frame, page) in self.frames.used() {
            let state = page.state.load(Ordering::Acquire);
            let counted = page.roots.load(Ordering::Relaxed);
            let held = roots.iter().filter(|root| **root == frame).count() as u32;
            if counted != held {
                return Err(Disagreement::Roots { frame: frame.0, counted, held });
            }
            used += u64::from(state != state::FREE);
            match state {
                state::LIVE if self.is_obsolete(page) => audit.obsolete(frame, page.key())?,
                state::LIVE => audit.live(frame, page.key())?,
                state::RETIRED | state::ZAPPING => audit.dead(frame)?,
                _ => {}
            }
        }
        let (counted, retired) = self.frames.used_and_retired();
        let counts = (u64::from(counted), u64::from(retired));
        if counts != (used, audit.report.retired) {
            return Err(Disagreement::Quota { counted: counts.0, used });
        }
        audit.links()?;
        Ok(audit.report)
    }
}

impl Audit<'_> {
    fn live(&mut self, frame: FrameId, key: Key) -> Result<(), Disagreement> {
        self.report.pages += 1;
        if self.engine.pages.get(&self.engine.name_of(frame, key)) != Some(frame) {
            return Err(Disagreement::Hash { frame: frame.0, gfn: key.gfn() });
        }
        let role = key.role();
        if role.has_home() {
            let Some(home) = self.map.page(key.gfn()) else {
                return Err(Disagreement::Dead { frame: frame.0, why: "shadows no memory" });
            };
            let owner = home.machine().0;
            self.expect("shadows", owner, Location::from_word(u64::from(frame.0) + 1));
        }
        if let Some(above) = self.engine.unmarked(frame) {
            return Err(Disagreement::Unmarked { frame: frame.0, above: above.0 });
        }
        for index in 0..ENTRIES {
            let at = Location::new(frame, index);
            let spte = self.engine.entry(at);
            if spte == Spte::EMPTY || self.engine.is_reserved(frame, index) {
                continue;
            }
            if spte.is_mmio() && role.level() == 1 {
                let wrong = match self.engine.is_unsync(frame) {
                    true => self.unsync_mmio(spte, key),
                    false => self.mmio(at, spte, key),
                };
                if let Some(why) = wrong {
                    return Err(Disagreement::Entry { at, level: 1, value: spte.0, why });
                }
                continue;
            }
            if !spte.is_present() {
                let level = role.level();
                return Err(Disagreement::Unfinished { at, level, value: spte.0 });
            }
            let page = self.engine.frames.page(frame);
            let protected = page.protected.load(Ordering::Relaxed) == PROTECTED.0;
            let wrong = if !protected {
                Some("its guest table is not write-protected yet")
            } else if self.engine.is_unsync(frame) {
                self.report.sptes += 1;
                self.unsync_leaf(at, spte, key)
            } else if role.level() > 1 && !spte.is_large() {
                self.table(at, spte, key)
            } else {
                self.report.sptes += 1;
                self.leaf(at, spte, key)
            };
            if let Some(why) = wrong {
                return Err(Disagreement::Entry { at, level: role.level(), value: spte.0, why });
            }
        }
        Ok(())
    }

    /// A page from before everything was zapped: what it holds means nothing any more, but its links
    /// count, and operations on it end as on any other: a fault that meets the zap takes its reservation
    /// back, and who freezes entries retires the page.
    fn obsolete(&mut self, frame: FrameId, key: Key) -> Result<(), Disagreement> {
        self.report.obsolete += 1;
        let shadows = self.engine.frames.page(frame).home();
        if key.role().has_home() && self.map.by_machine(shadows).is_some() {
            self.expect("shadows", shadows.0, Location::from_word(u64::from(frame.0) + 1));
        }
        for index in (0..ENTRIES).filter(|index| !self.engine.is_reserved(frame, *index)) {
            let at = Location::new(frame, index);
            let (spte, level) = (self.engine.entry(at), key.role().level());
            if spte == Spte::EMPTY || spte.is_mmio() && level == 1 {
                continue;
            }
            if !spte.is_present() {
                return Err(Disagreement::Unfinished { at, level, value: spte.0 });
            }
            if level == 1 || spte.is_large() {
                self.expect(rmap_of(level), spte.machine().0, at);
            } else if let Some(child) = self.engine.frames.frame_at(spte.machine()) {
                self.expect("parents", u64::from(child.0), at);
            }
        }
        Ok(())
    }

    /// The guest's entry behind an entry of an indirect page, if it can stand behind one.
    fn guest_entry(&self, key: Key, index: usize) -> Result<(u64, Entry), &'static str> {
        let (role, format) = (key.role(), key.role().format());
        let gpa = key.gfn().gpa().wrapping_add(role.guest_offset(index));
        let word = self.map.word(gpa, &self.hint).ok_or("its guest table lies in no slot")?;
        let entry = format.entry_of(word.load(Ordering::Acquire), gpa);
        // R35; in a read-only slot no A is ever written (R24).
        let read_only = self.map.page(key.gfn()).is_some_and(|page| !page.is_writable());
        let needed = if read_only { bits::P } else { bits::P | bits::A };
        if entry & needed != needed {
            return Err("the guest's entry is not present and accessed");
        }
        match format.decode(entry, role.level(), role.regime().has_nxe()) {
            Entry::Reserved | Entry::Absent => Err("the guest's entry has reserved bits set"),
            // Of 4 MiB, the half that this entry maps.
            Entry::Leaf(gpa) if role.level() > 1 => {
                let size = 1 << shift(role.level());
                let part = if format.is_wide() { 0 } else { index as u64 % 2 * size };
                Ok((entry, Entry::Leaf(gpa.wrapping_add(part))))
            }
            found => Ok((entry, found)),
        }
    }

    fn table(&mut self, at: Location, spte: Spte, key: Key) -> Option<&'static str> {
        let Some(child) = self.engine.frames.frame_at(spte.machine()) else {
            return Some("points outside the tables");
        };
        self.expect("parents", u64::from(child.0), at);
        let below = self.engine.frames.page(child);
        if !below.is_live() {
            return Some("points at a dead page");
        }
        let (role, below) = (key.role(), below.key());
        let covered = INDEX_BITS * (u32::from(role.level()) - 1);
        if role.is_upper() {
            let same = below.role() == role.below_upper(0)
                || below.role() == role.below_upper(role.level()).behind(at.index());
            let table = match role.stands_for_registers() && below.role().is_indirect() {
                // Of a root that is gone the values are in no memory.
                true => match self.registers.get(&key.gfn()) {
                    Some(pdptrs) => table_of(pdptrs, at.index()),
                    None => below.gfn(),
                },
                false => key.gfn(),
            };
            return (!same || below.gfn() != table).then_some("points at a page for another root");
        }
        if role.is_direct() {
            let gfn = Gfn(key.gfn().0 + ((at.index() as u64) << covered));
            let same = below.role() == role.child(role.writes(), role.user(), role.executes());
            return (below.gfn() != gfn || !same).then_some("points at another stretch");
        }
        let (guest, found) = match self.guest_entry(key, at.index()) {
            Ok(guest) => guest,
            Err(why) => return Some(why),
        };
        let rights = child_role(role, guest);
        let fits = match found {
            Entry::Leaf(gpa) => {
                let through = |write| role.child(write, rights.user(), rights.executes()).direct();
                let write = may_write(rights) && guest & bits::D != 0;
                // D may have been set since, through another tree or by the emulator.
                below == Key::new(gpa.gfn(), through(false))
                    || write && below == Key::new(gpa.gfn(), through(true))
            }
            Entry::Table(gpa) => below == Key::new(gpa.gfn(), rights.behind(at.index())),
            _ => false,
        };
        (!fits).then_some("points at a page for another table or role")
    }

    fn leaf(&mut self, at: Location, spte: Spte, key: Key) -> Option<&'static str> {
        let role = key.role();
        let (gfn, rights, granted, dirty) = if role.is_direct() {
            let gfn =
                Gfn(key.gfn().0 + ((at.index() as u64) << (shift(role.level()) - PAGE_SHIFT)));
            (gfn, role, role.writes(), true)
        } else {
            match self.guest_entry(key, at.index()) {
                Ok((guest, Entry::Leaf(gpa))) => {
                    let rights = leaf_rights(role, guest);
                    (gpa.gfn(), rights, may_write(rights), guest & bits::D != 0)
                }
                Ok(_) => return Some("maps memory, the guest's entry is a table"),
                Err(why) => return Some(why),
            }
        };
        let level = role.level();
        let Some(page) = self.map.block(gfn, 1 << (shift(level) - PAGE_SHIFT)) else {
            return Some("maps a frame without memory");
        };
        if page.machine() != spte.machine() {
            return Some("maps another page than the guest's entry");
        }
        if self.map.has_apic(gfn.0..gfn.0 + (1 << (shift(level) - PAGE_SHIFT))) {
            return Some(APIC);
        }
        self.expect(rmap_of(level), page.machine().0, at);
        let block = page.index..page.index + (1 << (shift(level) - PAGE_SHIFT));
        if level > 1 && !page.region().host_allows(block.clone()) {
            return Some("maps a block that the host has touched: R20");
        }
        let slot = page.slot;
        let mut shadowed = page.region().shadows.iter_range(block);
        if level > 1 && shadowed.any(|(index, _)| self.is_protected_table(Page { slot, index })) {
            return Some("maps a block with a guest table in it: R20");
        }
        self.access(page, spte, rights, granted && dirty)
    }

    /// The guest may have written its own entry natively, which counts from its next flush on: until then
    /// the shadow's grants what any entry there could have granted, and nothing that the memory map, the
    /// host or the log do not.
    fn unsync_leaf(&mut self, at: Location, spte: Spte, key: Key) -> Option<&'static str> {
        self.expect(rmap_of(1), spte.machine().0, at);
        let Some(page) = self.map.by_machine(spte.machine()) else {
            return Some("maps a frame without memory");
        };
        if !self.has_other_name(page) {
            return Some(APIC);
        }
        let role = key.role();
        self.access(page, spte, role, may_write(role))
    }

    /// Whether the page may be mapped: it has a name at which no local APIC answers. When one comes to
    /// answer at a name, what was mapped by any is taken away; when aliases change, everything is.
    fn has_other_name(&self, page: Page<'_>) -> bool {
        let named = |(start, slot, pages): (u64, &Arc<Slot>, Range<usize>)| {
            let here = slot.machine() == page.slot.machine() && pages.contains(&page.index);
            here.then(|| start + (page.index - pages.start) as u64)
        };
        let mut names = self.map.stretches_at(0..u64::MAX).filter_map(named);
        self.map.apics().is_empty() || names.any(|gfn| !self.map.has_apic(gfn..gfn + 1))
    }

    /// What an entry for the page grants that it must not, by these rights of the guest's.
    fn access(
        &self,
        page: Page<'_>,
        spte: Spte,
        rights: Role,
        granted: bool,
    ) -> Option<&'static str> {
        if page.region().invalid.covers(page.index) {
            return Some("maps a page that the host has taken away");
        }
        if rights.regime().is_user() && !rights.user() {
            return Some("lets the user reach a supervisor page");
        }
        if spte.is_executable() && !rights.executes() {
            return Some("is executable, the guest's entries are not");
        }
        if spte.grants_write() && !granted {
            return Some("says that the guest's entries grant writing, they do not");
        }
        if !spte.is_writable() {
            return None;
        }
        let log = page.slot.flags().dirty;
        let unlogged = log == DirtyMode::WriteProtect && !page.region().dirty.is_dirty(page.index);
        if !spte.grants_write() {
            Some("is writable, the guest's entries do not say so")
        } else if self.is_protected_table(page) {
            Some("is writable, but maps a shadowed guest table")
        } else if !page.is_writable() {
            Some("is writable, but the slot or the host forbids it")
        } else if unlogged || spte.is_large() && log != DirtyMode::Off {
            Some("is writable, but the page is not in the dirty log")
        } else {
            None
        }
    }

    /// Whether something may be derived from the page as a guest table. A shadow of it that was found
    /// by its root alone, and not filled yet, has not protected it yet (R1).
    fn is_protected_table(&self, page: Page<'_>) -> bool {
        let mut protected = false;
        if let Some(shadows) = page.region().shadows.get(page.index) {
            shadows.for_each(|frame| {
                let shadow = self.engine.frames.page(FrameId((frame - 1) as u32));
                let word = FrameId((frame - 1) as u32);
                protected |= shadow.key().role().is_indirect()
                    && !self.engine.is_written_natively(word)
                    && shadow.protected.load(Ordering::Relaxed) == PROTECTED.0;
            });
        }
        protected
    }

    /// An entry that says that there is no memory, if it is of this map.
    fn mmio(&mut self, at: Location, spte: Spte, key: Key) -> Option<&'static str> {
        let (gfn, write) = spte.mmio_frame(self.map.generation())?;
        let role = key.role();
        let (expected, rights, granted) = if role.is_direct() {
            (Gfn(key.gfn().0 + at.index() as u64), role, role.writes())
        } else {
            match self.guest_entry(key, at.index()) {
                Ok((guest, Entry::Leaf(gpa))) => {
                    let rights = leaf_rights(role, guest);
                    (gpa.gfn(), rights, may_write(rights) && guest & bits::D != 0)
                }
                Ok(_) => return Some("is MMIO, the guest's entry is a table"),
                Err(why) => return Some(why),
            }
        };
        if gfn != expected {
            Some("is MMIO at another frame than the guest's entry")
        } else if self.map.slot(gfn).is_some() {
            Some(MEMORY)
        } else if role.regime().is_user() && !rights.user() {
            Some("lets the user reach a supervisor page")
        } else if write && !granted {
            Some(WRITABLE_MMIO)
        } else {
            None
        }
    }

    /// The same where the guest may have written its own entry natively.
    fn unsync_mmio(&self, spte: Spte, key: Key) -> Option<&'static str> {
        let (gfn, write) = spte.mmio_frame(self.map.generation())?;
        if self.map.slot(gfn).is_some() {
            return Some(MEMORY);
        }
        (write && !may_write(key.role())).then_some(WRITABLE_MMIO)
    }

    fn dead(&mut self, frame: FrameId) -> Result<(), Disagreement> {
        self.report.retired += 1;
        let page = self.engine.frames.page(frame);
        let dead = |why| Err(Disagreement::Dead { frame: frame.0, why });
        if !page.parents.is_empty() {
            return dead("entries still point at it");
        }
        for index in (0..ENTRIES).filter(|index| !self.engine.is_reserved(frame, *index)) {
            if self.engine.entry(Location::new(frame, index)).is_present() {
                return dead("it maps something: R05");
            }
        }
        Ok(())
    }

    fn expect(&mut self, list: &'static str, owner: u64, location: Location) {
        *self.expected.entry((list, owner, location)).or_insert(0) += 1;
    }

    /// Compares the lists with what the entries say they should be, both ways.
    fn links(&mut self) -> Result<(), Disagreement> {
        let mut listed: BTreeMap<Link, usize> = BTreeMap::new();
        let mut count = |list: &'static str, owner: u64, set: &LocationSet| {
            set.for_each(|word| {
                *listed.entry((list, owner, Location::from_word(word))).or_insert(0) += 1;
            });
        };
        for slot in self.map.slots() {
            let region = slot.region();
            for (index, rmap) in region.rmap.iter() {
                count(rmap_of(1), region.machine_of(index).0, rmap);
            }
            for (level, block, rmap) in region.mapped_blocks(0..slot.pages() as usize) {
                count(rmap_of(level), region.machine_of(block.start).0, rmap);
            }
            for (index, shadows) in region.shadows.iter() {
                count("shadows", region.machine_of(index).0, shadows);
            }
        }
        for slot in self.map.slots() {
            if let Some((level, block, counted)) = slot.region().miscounted() {
                let machine = slot.region().machine_of(block).0;
                return Err(Disagreement::Count { level, machine, counted });
            }
        }
        for (frame, page) in self.engine.frames.used() {
            count("parents", u64::from(frame.0), &page.parents);
        }
        let differing = |link: &&Link| listed.get(*link) != self.expected.get(*link);
        match self.expected.keys().chain(listed.keys()).find(differing) {
            None => Ok(()),
            Some(link @ (list, owner, location)) => Err(Disagreement::Links {
                list,
                owner: *owner,
                location: *location,
                listed: listed.get(link).copied().unwrap_or(0),
                present: self.expected.get(link).copied().unwrap_or(0),
            }),
        }
    }
}

/// The name of the reverse map of entries at this level.
fn rmap_of(level: u8) -> &'static str {
    match level {
        1 => "rmap",
        2 => "rmap of 2 MiB blocks",
        _ => "rmap of 1 GiB blocks",
    }
}

/// The rights through a guest entry.
fn leaf_rights(role: Role, guest: u64) -> Role {
    let write = role.writes() && guest & bits::RW != 0;
    let user = role.user() && guest & bits::US != 0;
    // Without EFER.NXE bit 63 is reserved, and an entry that has it is never mapped.
    let execute = role.executes() && guest & bits::NX == 0;
    role.with_access(write, user, execute)
}

/// Whether this privilege may write with these rights.
fn may_write(rights: Role) -> bool {
    let regime = rights.regime();
    rights.writes() || (!regime.is_user() && !regime.write_protects())
}

/// The role of the table behind a guest entry.
fn child_role(role: Role, guest: u64) -> Role {
    let rights = leaf_rights(role, guest);
    role.child(rights.writes(), rights.user(), rights.executes())
}
