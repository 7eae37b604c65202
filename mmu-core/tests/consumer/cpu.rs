// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A processor in software that forgets nothing unasked.

use super::watch::{Spot, Stamp, Use};
use super::world::{CODE, CODE_AT, World};
use mmu_core::addr::{Gva, LEVELS, Machine};
use mmu_core::paging::{Access, bits};
use mmu_core::shadow::{Downgrade, Outcome, Processor, Stall};
use mmu_core::vcpu::{Entry, Vcpu};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How a consumer keeps its side of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// As it should.
    Honest,
    /// Ignores [`Downgrade::Entry`].
    IgnoresEntries,
    /// Forgets translations only, and keeps the tables it has met: as if it had no
    /// paging-structure caches.
    KeepsTables,
    /// Forgets what it is handed when it next comes out of the guest, not before it goes in.
    ForgetsLate,
    /// Says while it waits that it has drained, and has forgotten nothing.
    OnlySaysDrained,
    /// Keeps its translations on another root.
    IgnoresRoots,
    /// Keeps its translation of an address that the guest invalidates.
    KeepsAddresses,
    /// Does not tell the engine of an address that the guest invalidates.
    TellsNothing,
}

/// How the engine reaches the processor.
#[derive(Default)]
struct Line(AtomicBool);

impl Processor for Line {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

#[derive(Clone, Copy)]
struct Translation {
    target: Option<(usize, usize)>,
    /// Writable, and the entry's dirty bit is set.
    write: bool,
    /// Of the entry it was made from.
    level: u8,
    stamp: Stamp,
}

/// A table that the processor has met on its way: it goes there at once the next time.
#[derive(Clone, Copy)]
struct Remembered {
    table: Machine,
    /// The table whose entry named it.
    from: Machine,
}

/// What the processor remembers.
#[derive(Default)]
struct Memory {
    translations: HashMap<u64, Translation>,
    /// By the level of the table and what it translates.
    tables: HashMap<(u8, u64), Remembered>,
    /// Handed out and not forgotten yet.
    late: Vec<Downgrade>,
}

const fn shift(level: u8) -> u32 {
    12 + 9 * (level as u32 - 1)
}

impl Memory {
    fn clear(&mut self) {
        self.translations.clear();
        self.tables.clear();
    }

    /// One address: what INVLPG and a page fault do (SDM vol. 3, 5.10.4.1). A processor may forget
    /// more.
    fn forget_address(&mut self, gva: Gva) {
        self.translations.retain(|at, t| at >> shift(t.level) != gva.0 >> shift(t.level));
        for level in 1..LEVELS {
            self.tables.remove(&(level, gva.0 >> shift(level + 1)));
        }
    }

    /// No more than the engine asks for.
    fn forget(&mut self, world: &World, downgrade: Downgrade, habit: Habit) {
        match downgrade {
            Downgrade::Entry { .. } if habit == Habit::IgnoresEntries => {}
            Downgrade::Entry { gva: Some(gva), .. } => {
                self.translations.retain(|at, t| at >> shift(t.level) != gva.0 >> shift(t.level))
            }
            _ if habit == Habit::KeepsTables => self.translations.clear(),
            Downgrade::Entry { gva: None, .. } | Downgrade::Everything => self.clear(),
            Downgrade::Frame(frame) => {
                self.translations.clear();
                let is = |at: Machine| world.frame_of(at) == Some(frame.index());
                self.tables.retain(|_, known| !is(known.table) && !is(known.from));
            }
        }
    }
}

/// See the module.
pub struct Cpu<'w> {
    world: &'w World,
    vcpu: Vcpu,
    line: Arc<Line>,
    habit: Habit,
    memory: Memory,
    root: Option<Machine>,
    inside: bool,
    user: bool,
    /// The last complete zap when it went inside.
    zapped: u64,
    /// Accesses through a translation or a table that was remembered.
    pub hits: u64,
    pub table_hits: u64,
}

impl<'w> Cpu<'w> {
    pub fn new(world: &'w World, habit: Habit) -> Self {
        let line = Arc::new(Line::default());
        let vcpu = world.mmu.create_vcpu(Arc::clone(&line) as _, World::regs()).unwrap();
        Self {
            world,
            vcpu,
            line,
            habit,
            memory: Memory::default(),
            root: None,
            inside: false,
            user: true,
            zapped: 0,
            hits: 0,
            table_hits: 0,
        }
    }

    /// Reads a word; `None` if nothing is there. `meanwhile` runs while the processor waits.
    pub fn load(&mut self, spot: Spot, word: usize, meanwhile: &mut dyn FnMut()) -> Option<u64> {
        match self.access(spot, false, meanwhile) {
            Found::Page(page) => Some(self.world.word(page, word).load(Ordering::Acquire)),
            Found::Emulate => {
                let mut bytes = [0; 8];
                let gva = Gva(World::gva(spot).0 + word as u64 * 8);
                let access = Access { user: self.user, ..Access::read() };
                self.vcpu.read(gva, &mut bytes, access).ok().map(|()| u64::from_le_bytes(bytes))
            }
            Found::Nothing => None,
        }
    }

    /// Writes a word; false if that was not possible.
    pub fn store(
        &mut self,
        spot: Spot,
        word: usize,
        value: u64,
        meanwhile: &mut dyn FnMut(),
    ) -> bool {
        match self.access(spot, true, meanwhile) {
            Found::Page(page) => {
                self.world.word(page, word).store(value, Ordering::Release);
                true
            }
            Found::Emulate => {
                let gva = Gva(World::gva(spot).0 + word as u64 * 8);
                let access = Access { user: self.user, ..Access::write() };
                self.vcpu.write(gva, &value.to_le_bytes(), access).is_ok()
            }
            Found::Nothing => false,
        }
    }

    /// INVLPG.
    pub fn invlpg(&mut self, spot: Spot) {
        let gva = World::gva(spot);
        if self.habit != Habit::KeepsAddresses {
            self.memory.forget_address(gva);
        }
        if self.habit != Habit::TellsNothing {
            self.vcpu.invlpg(gva);
        }
    }

    /// MOV to CR3 of the same value, seen by the engine as a flush or as a load.
    pub fn load_cr3(&mut self, reload: bool) {
        self.leave();
        self.memory.clear();
        match reload {
            true => self.vcpu.set_cr3(World::regs().cr3).unwrap(),
            false => self.vcpu.flush(),
        }
    }

    /// Fetches the code that is patched, in two halves, between which it `stays` until it is kicked; `None`
    /// if it is not there.
    pub fn fetch(&mut self, meanwhile: &mut dyn FnMut(), stays: &dyn Fn() -> bool) -> Option<u64> {
        let Found::Page(page) = self.access(CODE, false, meanwhile) else { return None };
        let word = |index| self.world.word(page, index).load(Ordering::Acquire);
        let low = word(0);
        // However long it takes: it comes out only between two instructions.
        std::thread::yield_now();
        while stays() && !self.line.0.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        Some(low >> (8 * CODE_AT) | word(1) << (64 - 8 * CODE_AT))
    }

    /// The other privilege from now on.
    pub fn change_privilege(&mut self) {
        self.leave();
        self.user = !self.user;
    }

    /// Comes out of the guest.
    pub fn leave(&mut self) {
        if self.inside {
            self.inside = false;
            self.vcpu.leave();
            // `Habit::ForgetsLate`: now it does.
            for downgrade in std::mem::take(&mut self.memory.late) {
                self.memory.forget(self.world, downgrade, self.habit);
            }
        }
    }

    /// What a processor does between two instructions: comes out and goes in again if it was kicked.
    pub fn poll(&mut self, meanwhile: &mut dyn FnMut()) {
        if self.inside && self.line.0.load(Ordering::Acquire) {
            self.enter(meanwhile);
        }
    }

    /// Outside for a while: drains if somebody waits for it.
    pub fn idle(&mut self) {
        self.leave();
        if self.vcpu.is_wanted() {
            self.drain();
        }
    }

    /// Goes inside; false if the guest has no root any more.
    pub fn enter(&mut self, meanwhile: &mut dyn FnMut()) -> bool {
        self.leave();
        loop {
            self.line.0.store(false, Ordering::Release);
            let zapped = self.world.watch.last_zap();
            let Self { world, vcpu, memory, habit, .. } = self;
            let entered = vcpu.enter(self.user, |downgrade| match habit {
                Habit::ForgetsLate => memory.late.push(downgrade),
                _ => memory.forget(world, downgrade, *habit),
            });
            match entered {
                Ok(Entry::Run { root, generation }) => {
                    if self.root != Some(root) && self.habit != Habit::IgnoresRoots {
                        self.memory.clear();
                    }
                    (self.root, self.zapped, self.inside) = (Some(root), zapped, true);
                    self.vcpu.drained(generation);
                    return true;
                }
                Ok(Entry::RootOutside) => return false,
                Ok(other) => panic!("{other:?}"),
                Err(stall) => self.wait(stall, meanwhile),
            }
        }
    }

    fn wait(&mut self, stall: Stall, meanwhile: &mut dyn FnMut()) {
        while self.vcpu.must_wait(stall) {
            self.drain();
            meanwhile();
        }
        meanwhile();
    }

    /// What a processor that remembers tables outside the guest does while it waits: goes in for a
    /// moment, runs nothing, and forgets.
    pub fn drain(&mut self) {
        self.leave();
        let Self { world, vcpu, memory, habit, .. } = self;
        let generation = vcpu.drain(|downgrade| match habit {
            Habit::OnlySaysDrained => {}
            _ => memory.forget(world, downgrade, *habit),
        });
        self.vcpu.drained(generation);
    }

    /// Walks ahead of the program, as a processor may at any time, outside the guest too, by the tables
    /// that it remembers: these are still what they were.
    pub fn speculate(&self, spot: Spot) {
        let gva = World::gva(spot);
        let Some((mut level, mut table)) = self.remembered(gva) else { return };
        loop {
            let entry = self.world.shadow_entry(table, (gva.0 >> shift(level)) as usize % 512);
            let value = entry.map_or(0, |entry| entry.load(Ordering::Acquire));
            if value & bits::P == 0 {
                return;
            }
            let machine = Machine(value & bits::ADDR);
            if level == 1 {
                return self.world.watch.speculated(spot, self.world.bank_of(machine));
            }
            (level, table) = (level - 1, machine);
        }
    }

    /// The lowest table that is remembered for the address.
    fn remembered(&self, gva: Gva) -> Option<(u8, Machine)> {
        (1..LEVELS).find_map(|level| {
            let known = self.memory.tables.get(&(level, gva.0 >> shift(level + 1)))?;
            Some((level, known.table))
        })
    }

    /// The page behind the spot, by what is remembered, by the tables, or after a fault.
    fn access(&mut self, spot: Spot, write: bool, meanwhile: &mut dyn FnMut()) -> Found {
        let gva = World::gva(spot);
        loop {
            let kicked = self.line.0.load(Ordering::Acquire);
            if (!self.inside || kicked) && !self.enter(meanwhile) {
                return Found::Nothing;
            }
            let known = self.memory.translations.get(&gva.0).copied().filter(|t| t.write || !write);
            self.hits += u64::from(known.is_some());
            if let Some(found) = known.or_else(|| self.walk(spot, write)) {
                let Translation { target, stamp, .. } = found;
                let at = Use { spot, write, target, stamp, zapped: self.zapped };
                if !self.world.watch.may_use(at) {
                    return Found::Nothing;
                }
                self.memory.translations.insert(gva.0, found);
                return target.map_or(Found::Nothing, Found::Page);
            }
            self.leave();
            self.memory.forget_address(gva);
            let access = if write { Access::write() } else { Access::read() };
            match self.vcpu.fault(gva, Access { user: self.user, ..access }) {
                Ok(Outcome::Fixed) => {}
                Ok(Outcome::Emulate { .. }) => return Found::Emulate,
                Ok(Outcome::Mmio { .. } | Outcome::HostReadOnly { .. }) => return Found::Nothing,
                Ok(other) => panic!("{spot:?}: {other:?}"),
                Err(stall) => self.wait(stall, meanwhile),
            }
        }
    }

    /// Walks the shadow tables from the lowest table that is remembered for the address.
    fn walk(&mut self, spot: Spot, write: bool) -> Option<Translation> {
        let gva = World::gva(spot);
        let before = self.world.watch.now();
        let known = self.remembered(gva);
        self.table_hits += u64::from(known.is_some());
        let (mut level, mut table) = known.or(self.root.map(|root| (LEVELS, root)))?;
        loop {
            // No table of the engine's: nothing present, to this processor.
            let entry = self.world.shadow_entry(table, (gva.0 >> shift(level)) as usize % 512)?;
            let leaf = level == 1 || entry.load(Ordering::Acquire) & bits::PS != 0;
            let value = use_entry(entry, leaf, write)?;
            let machine = Machine(value & bits::ADDR);
            if leaf {
                self.world.watch.derived(spot.region, before);
                let offset = gva.0 & ((1 << shift(level)) - 1) & !0xfff;
                let target = self.world.bank_of(machine.wrapping_add(offset));
                let write = value & bits::RW != 0 && value & bits::D != 0;
                let stamp = self.world.watch.stamp(spot);
                return Some(Translation { target, write, level, stamp });
            }
            let key = (level - 1, gva.0 >> shift(level));
            self.memory.tables.insert(key, Remembered { table: machine, from: table });
            (level, table) = (level - 1, machine);
        }
    }
}

impl Drop for Cpu<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Where an access goes.
enum Found {
    /// To this page of a bank.
    Page((usize, usize)),
    /// Through the guest's own tables.
    Emulate,
    /// Nowhere.
    Nothing,
}

/// Reads an entry, and sets its accessed and dirty bits (SDM vol. 3, 5.8); `None` is a page fault.
fn use_entry(entry: &AtomicU64, leaf: bool, write: bool) -> Option<u64> {
    let mut value = entry.load(Ordering::Acquire);
    loop {
        if value & bits::P == 0 || write && value & bits::RW == 0 {
            return None;
        }
        let used = value | bits::A | if leaf && write { bits::D } else { 0 };
        if used == value {
            return Some(value);
        }
        match entry.compare_exchange(value, used, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Some(used),
            Err(now) => value = now,
        }
    }
}
