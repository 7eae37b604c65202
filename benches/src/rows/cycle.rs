// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several vCPUs that allocate 1 MiB, touch it and free it, again and again.
//!
//! Guests edit their own tables. As the engine comes, the first store to a leaf table faults, and those
//! that follow are native: what the guest then does, and the engine with it, is INVLPG. With
//! `Config::unsync` off (P1) each store faults and is emulated. What a vCPU does between faults is to
//! enter the guest, which makes it drain what it was asked to. The regime's lock is held for each fault,
//! each emulated store and each INVLPG, and for nothing else.

use super::lanes::{Crowd, Ids, Sampled, Whats, each, fault, ids, measure, resume};
use crate::cpu::{Work, together};
use crate::figure::{Failure, Found, Goal, Row, check_eq};
use crate::guest::{LEAF, MIB, Memory, PAGE, regs};
use crate::measure::{Effort, calibrate, per_operation};
use crate::regime::{Brief, Regime, Vm};
use mmu_core::Config;
use mmu_core::addr::Gva;
use mmu_core::memory::AllocatedMemory;
use mmu_core::paging::Access;
use mmu_core::shadow::Outcome;
use mmu_core::vcpu::Vcpu;
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Pages of a MiB.
const PAGES: u64 = MIB / PAGE;
/// Where the ranges begin.
const RANGES: u64 = 0x4000_0000;
/// Where a guest sees its own tables.
const WINDOWS: u64 = 0x10_0000_0000;

/// Who shares what with whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Page tables of its own for each vCPU.
    OwnTables,
    /// One address space, a range of its own for each.
    OwnRange,
    /// One range of one address space.
    OneRange,
}

/// How guests' stores to their leaf tables are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// By the processor, but for the first.
    Native,
    /// By the engine.
    Emulated,
}

/// One vCPU with its range.
struct Lane {
    vcpu: Vcpu,
    memory: Memory,
    range: u64,
    window: u64,
    data: u64,
    cycles: u64,
    layout: Layout,
    /// The guest-physical address of the leaf table.
    table: u64,
    /// Whether the table may be written natively now.
    native: bool,
    kind: Kind,
}

impl Lane {
    /// The guest stores to an entry of its own table.
    fn store_entry(&mut self, vm: &Vm, page: u64, entry: u64) -> Result<(), Failure> {
        let gva = self.window + page * 8;
        if !self.native {
            match (fault(vm, &mut self.vcpu, gva)?, self.kind) {
                (Outcome::Emulate { .. }, Kind::Emulated) => {}
                (Outcome::Fixed, Kind::Native) => self.native = true,
                (other, _) => return Err(Failure::new(format!("store to a table: {other:?}"))),
            }
        }
        if self.native {
            self.memory.word(self.table + page * 8).store(entry, Ordering::Release);
            if entry == 0 {
                let gva = Gva(self.range + page * PAGE);
                vm.exclusive(|| self.vcpu.invlpg(gva));
            }
            return resume(&mut self.vcpu);
        }
        let bytes = entry.to_le_bytes();
        let written = vm.exclusive(|| self.vcpu.write(Gva(gva), &bytes, Access::write().user()));
        written.map_err(Failure::in_step("emulated store"))?;
        resume(&mut self.vcpu)
    }

    /// The guest stores to a page that it has just mapped.
    fn touch(&mut self, vm: &Vm, page: u64) -> Result<(), Failure> {
        match fault(vm, &mut self.vcpu, self.range + page * PAGE)? {
            Outcome::Fixed => {
                let word = self.memory.word(self.data + page * PAGE);
                word.store(self.cycles + page, Ordering::Relaxed);
                resume(&mut self.vcpu)
            }
            // Somebody else has freed it meanwhile.
            Outcome::Guest(_) if self.layout == Layout::OneRange => Ok(()),
            other => Err(Failure::new(format!("touch of page {page}: {other:?}"))),
        }
    }

    /// Allocate, touch, free.
    fn cycle(&mut self, vm: &Vm) -> Result<(), Failure> {
        self.cycles += 1;
        let data = self.data;
        let map = |page: u64| (data + page * PAGE) | LEAF;
        if self.kind == Kind::Emulated {
            // Between the stores the table is used, or it would be taken for data.
            for page in 0..PAGES {
                self.store_entry(vm, page, map(page))?;
                self.touch(vm, page)?;
            }
            for page in 0..PAGES {
                self.store_entry(vm, page, 0)?;
                fault(vm, &mut self.vcpu, self.range + 511 * PAGE)?;
            }
            return Ok(());
        }
        for page in 0..PAGES {
            self.store_entry(vm, page, map(page))?;
        }
        for page in 0..PAGES {
            self.touch(vm, page)?;
        }
        for page in 0..PAGES {
            self.store_entry(vm, page, 0)?;
        }
        Ok(())
    }
}

/// Engines and the vCPUs on them.
struct Setup {
    vms: Vec<Vm>,
    lanes: RefCell<Vec<Lane>>,
    layout: Layout,
}

impl Setup {
    fn vm(
        layout: Layout,
        kind: Kind,
        regime: Regime,
        lanes: u64,
    ) -> Result<(Vm, Vec<Lane>), Failure> {
        // Each lane's data with a page more, then the tables.
        let stride = MIB + PAGE;
        let mut memory = Memory::new(lanes * (stride + 16 * PAGE) + MIB, lanes * stride);
        let shared_root = memory.table();
        let mut plans = Vec::new();
        for lane in 0..lanes {
            let root = if layout == Layout::OwnTables { memory.table() } else { shared_root };
            let range = if layout == Layout::OwnRange { RANGES + lane * 2 * MIB } else { RANGES };
            let window = WINDOWS + lane * PAGE;
            let data = if layout == Layout::OneRange { 0 } else { lane * stride };
            let table = memory.leaf_table(root, range);
            memory.map(root, window, table);
            // A page that stays mapped, so that the table is shadowed from the beginning on.
            memory.map(root, range + 511 * PAGE, data + MIB);
            plans.push((root, range, window, data, table));
        }
        let tables = Arc::new(AllocatedMemory::new((64 + 16 * lanes) * PAGE));
        let config = Config::new(tables).unsync(kind == Kind::Native);
        let vm = Vm::new(memory.engine_of(config)?, regime);
        let mut made = Vec::new();
        for (root, range, window, data, table) in plans {
            let vcpu = vm.mmu().create_vcpu(Arc::new(Brief), regs(root));
            let vcpu = vcpu.map_err(Failure::in_step("vCPU"))?;
            let memory = memory.clone();
            let (cycles, native) = (0, false);
            let mut lane =
                Lane { vcpu, memory, range, window, data, cycles, layout, table, native, kind };
            let outcome = fault(&vm, &mut lane.vcpu, range + 511 * PAGE)?;
            check_eq("first fault", outcome, Outcome::Fixed)?;
            made.push(lane);
        }
        Ok((vm, made))
    }
}

impl Sampled for Setup {
    fn calibrate(&self, effort: &Effort) -> Result<u64, Failure> {
        let lane = &mut self.lanes.borrow_mut()[0];
        calibrate(effort, || lane.cycle(&self.vms[0]))
    }

    /// For each page allocated, touched and freed.
    fn sample(&self, cycles: u64) -> Result<(f64, bool), Failure> {
        let mut lanes = self.lanes.borrow_mut();
        let pages = lanes.len() as u64 * cycles * PAGES;
        let work = lanes.iter_mut().enumerate().map(|(n, lane)| {
            let vm = &self.vms[n % self.vms.len()];
            let run = move || (0..cycles).try_for_each(|_| lane.cycle(vm));
            Box::new(run) as Work<'_, ()>
        });
        let all = together(work.collect())?;
        Ok((per_operation(all.elapsed, pages), all.disturbed))
    }

    fn verify(&self) -> Result<(), Failure> {
        let lanes = self.lanes.borrow();
        for vm in &self.vms {
            let audit = vm.mmu().audit().map_err(Failure::in_step("audit"))?;
            let ranges = match self.layout {
                Layout::OneRange => 1,
                _ => (lanes.len() / self.vms.len()) as u64,
            };
            // All that is left are the pages that stay mapped, and the tables that are written natively.
            let windows = match (lanes[0].kind, self.layout) {
                (Kind::Emulated, _) => 0,
                (_, Layout::OneRange) => (lanes.len() / self.vms.len()) as u64,
                _ => ranges,
            };
            check_eq("shadow entries", audit.sptes, ranges + windows)?;
        }
        for lane in lanes.iter().filter(|_| self.layout != Layout::OneRange) {
            for page in 0..PAGES {
                let word = lane.memory.word(lane.data + page * PAGE).load(Ordering::Relaxed);
                check_eq("what was stored", word, lane.cycles + page)?;
            }
        }
        Ok(())
    }
}

impl Crowd for Setup {
    type Work = (Layout, Kind);

    fn one((layout, kind): Self::Work, regime: Regime, lanes: usize) -> Result<Self, Failure> {
        let (vm, lanes) = Self::vm(layout, kind, regime, lanes as u64)?;
        Ok(Self { vms: vec![vm], lanes: RefCell::new(lanes), layout })
    }

    fn private((layout, kind): Self::Work, lanes: usize) -> Result<Self, Failure> {
        let (mut vms, mut all) = (Vec::new(), Vec::new());
        for _ in 0..lanes {
            let (vm, lanes) = Self::vm(layout, kind, Regime::Rcu, 1)?;
            vms.push(vm);
            all.extend(lanes);
        }
        Ok(Self { vms, lanes: RefCell::new(all), layout })
    }
}

/// F2, F3, F4 or P1.
#[derive(Debug)]
pub struct Cycles {
    layout: Layout,
    kind: Kind,
    what: Whats,
    /// For two vCPUs.
    goal: Option<f64>,
    ids: &'static Ids,
}

impl Cycles {
    /// F2.
    pub fn own_tables() -> Self {
        let what = each!("allocate, touch, free, in own tables");
        Self {
            layout: Layout::OwnTables,
            kind: Kind::Native,
            what,
            goal: Some(0.95),
            ids: ids!("F2", judged),
        }
    }

    /// F3.
    pub fn own_ranges() -> Self {
        let what = each!("the same in one address space");
        Self {
            layout: Layout::OwnRange,
            what,
            goal: Some(0.9),
            ids: ids!("F3", judged),
            ..Self::own_tables()
        }
    }

    /// F4.
    pub fn one_range() -> Self {
        let what = each!("the same in one range");
        Self {
            layout: Layout::OneRange,
            what,
            goal: None,
            ids: ids!("F4", judged),
            ..Self::own_tables()
        }
    }

    /// P1.
    pub fn emulated() -> Self {
        let what = each!("emulated table writes, with touches");
        Self {
            kind: Kind::Emulated,
            what,
            goal: Some(0.9),
            ids: ids!("P1", judged),
            ..Self::own_tables()
        }
    }
}

impl Row for Cycles {
    fn id(&self) -> &'static str {
        // That of two.
        self.ids[1][0]
    }

    fn figures(&self) -> &'static [&'static str] {
        self.ids.as_flattened()
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let goal = self.goal.map(Goal::AtLeast);
        measure::<Setup>(effort, (self.layout, self.kind), self.ids, self.what, goal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_under_every_regime_ends_clean() {
        let layouts = [Layout::OwnTables, Layout::OwnRange, Layout::OneRange];
        let all = layouts.map(|layout| (layout, Kind::Native));
        for (layout, kind) in all.into_iter().chain([(Layout::OwnTables, Kind::Emulated)]) {
            for regime in Regime::ALL {
                let setup = Setup::one((layout, kind), regime, 2).unwrap();
                setup.sample(2).unwrap();
                setup.verify().unwrap();
                let stats = setup.vms[0].mmu().stats();
                let native = stats.mmu_unsync > 0 && stats.mmu_pte_write == 0;
                let emulated = stats.mmu_pte_write >= 4 * PAGES && stats.mmu_unsync == 0;
                let expected = if kind == Kind::Native { native } else { emulated };
                assert!(expected, "{layout:?} {regime:?} {stats:?}");
            }
            let setup = Setup::private((layout, kind), 2).unwrap();
            setup.sample(1).unwrap();
            setup.verify().unwrap();
        }
    }
}
