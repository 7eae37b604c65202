// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One vCPU's shadow faults: leaf entries are missing, the tables above them are there.
//!
//! Between rounds, outside the timed part, the guest's tables are cleared, which drops the leaf entries
//! made from them, and written again.
//!
//! A fault also maps the neighbours of its page that the guest has used before, those whose entries
//! are in one cache line with its own. So the guest's pages are a line apart, and a fault makes one
//! entry; or there are neighbours, and it makes eight.

use super::lanes::{after, fault};
use super::shares;
use crate::cpu::thread_time;
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples, Variant, interleave, per_operation};
use crate::regime::{Brief, Regime, Vm};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::shadow::Outcome;
use mmu_core::vcpu::{SoftVcpu, Vcpu};
use serde_json::json;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// First mapped address.
const FIRST: u64 = 0x7f00_0000_0000;
/// Pages that are touched.
pub(super) const PAGES: u64 = 2048;
/// Entries of a cache line.
pub(super) const LINE: u64 = 8;

/// Address of a page that is touched.
fn gva(page: u64) -> u64 {
    FIRST + page * LINE * PAGE
}

/// A guest that maps `pages` pages to be touched, and its engine.
pub(super) struct Guest {
    memory: Memory,
    pub(super) vm: Vm,
    root: u64,
    pages: u64,
    /// Pages mapped in each line.
    dense: u64,
    tables: Vec<u64>,
}

impl Guest {
    pub(super) fn new(pages: u64, dense: u64, regime: Regime) -> Result<Self, Failure> {
        let data = pages * dense * PAGE;
        let count = pages * LINE / 512;
        let mut memory = Memory::new(data + count * PAGE + 2 * MIB, data);
        let root = memory.table();
        let tables = (0..count).map(|n| memory.leaf_table(root, FIRST + n * 2 * MIB)).collect();
        for page in 0..pages {
            for neighbour in 0..dense {
                let gpa = (neighbour * pages + page) * PAGE;
                memory.map(root, gva(page) + neighbour * PAGE, gpa);
            }
        }
        // Enough for 32 vCPUs too.
        let vm = Vm::new(memory.engine(count + 320)?, regime);
        Ok(Self { memory, vm, root, pages, dense, tables })
    }

    /// Makes the shadow drop the leaf entries of these pages, of which no table is shared with others.
    pub(super) fn forget(&self, pages: &Range<u64>) -> Result<(), Failure> {
        let [first, end] = [pages.start, pages.end].map(|page| (page * LINE / 512) as usize);
        for table in &self.tables[first..end] {
            let mut bytes = [0; PAGE as usize];
            for (n, chunk) in bytes.chunks_exact_mut(8).enumerate() {
                let word = self.memory.word(table + n as u64 * 8).load(Ordering::Relaxed);
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            for bytes in [[0; PAGE as usize], bytes] {
                let written = self.vm.mmu().write_phys(Gpa(*table), &bytes);
                check_eq("bytes of a table", written, bytes.len())?;
            }
        }
        Ok(())
    }

    /// A clean audit that counts every page, and as many faults as were made.
    pub(super) fn verify(&self, faults: u64) -> Result<(), Failure> {
        let audit = self.vm.mmu().audit().map_err(Failure::in_step("audit"))?;
        check_eq("shadow entries", audit.sptes, self.pages * self.dense)?;
        let stats = self.vm.mmu().stats();
        check_eq("neighbours", stats.pte_prefetched, faults * (self.dense - 1))?;
        check_eq("faults", stats.pf_fixed, faults)
    }
}

/// A vCPU and the pages that it faults on.
pub(super) struct Lane {
    vcpu: Vcpu,
    pub(super) pages: Range<u64>,
    /// So far.
    pub(super) faults: u64,
}

impl Lane {
    pub(super) fn new(guest: &Guest, pages: Range<u64>) -> Result<Self, Failure> {
        let vcpu = guest.vm.mmu().create_vcpu(Arc::new(Brief), regs(guest.root));
        Ok(Self { vcpu: vcpu.map_err(Failure::in_step("vCPU"))?, pages, faults: 0 })
    }

    /// Faults on every page.
    pub(super) fn pass(&mut self, vm: &Vm) -> Result<(), Failure> {
        for page in self.pages.clone() {
            check_eq("fault", fault(vm, &mut self.vcpu, gva(page))?, Outcome::Fixed)?;
        }
        self.faults += self.pages.end - self.pages.start;
        Ok(())
    }
}

/// Faults one by one, as a consumer with a processor of its own has them served.
pub(super) struct Faulter {
    guest: Guest,
    lane: RefCell<Lane>,
}

impl Faulter {
    pub(super) fn new(pages: u64, dense: u64, regime: Regime) -> Result<Self, Failure> {
        let guest = Guest::new(pages, dense, regime)?;
        let lane = RefCell::new(Lane::new(&guest, 0..pages)?);
        let faulter = Self { guest, lane };
        faulter.all()?;
        Ok(faulter)
    }

    /// Faults on every page; how long that took.
    fn all(&self) -> Result<Duration, Failure> {
        let lane = &mut *self.lane.borrow_mut();
        self.guest.forget(&lane.pages)?;
        let start = thread_time();
        lane.pass(&self.guest.vm)?;
        Ok(thread_time().saturating_sub(start))
    }

    /// One sample: the faults of as many rounds as fill it.
    pub(super) fn sample(&self, effort: &Effort) -> Result<f64, Failure> {
        sample(effort, self.guest.pages, || self.all())
    }

    pub(super) fn verify(&self) -> Result<(), Failure> {
        self.guest.verify(self.lane.borrow().faults)
    }
}

fn sample(
    effort: &Effort,
    pages: u64,
    mut all: impl FnMut() -> Result<Duration, Failure>,
) -> Result<f64, Failure> {
    let (mut elapsed, mut faults) = (Duration::ZERO, 0);
    while elapsed < effort.sample {
        elapsed += all()?;
        faults += pages;
    }
    Ok(per_operation(elapsed, faults))
}

/// The software vCPU stores to each page: TLB miss, walk of the shadow, fault, entry, walk, store.
struct Toucher {
    guest: Guest,
    cpu: RefCell<SoftVcpu>,
    stores: RefCell<u64>,
}

impl Toucher {
    fn new() -> Result<Self, Failure> {
        let guest = Guest::new(PAGES, 1, Regime::Rcu)?;
        let cpu = guest.vm.mmu().create_soft_vcpu(regs(guest.root));
        let cpu = RefCell::new(cpu.map_err(Failure::in_step("vCPU"))?);
        let toucher = Self { guest, cpu, stores: RefCell::new(0) };
        toucher.all()?;
        Ok(toucher)
    }

    fn all(&self) -> Result<Duration, Failure> {
        self.guest.forget(&(0..self.guest.pages))?;
        let (cpu, stores) = (&mut *self.cpu.borrow_mut(), &mut *self.stores.borrow_mut());
        let mut session = cpu.session();
        let mut touch = |page: u64, value: u64| {
            let gva = Gva(gva(page) + page % 512 * 8);
            let stored = session.store(gva, &value.to_le_bytes(), true);
            stored.map_err(Failure::in_step("store"))
        };
        // Not timed: this vCPU learns that everything was dropped.
        touch(0, *stores)?;
        let start = thread_time();
        for page in 1..self.guest.pages {
            touch(page, *stores + page)?;
        }
        let elapsed = thread_time().saturating_sub(start);
        for page in 0..self.guest.pages {
            let word = self.guest.memory.word(page * PAGE + page % 512 * 8);
            check_eq("what was stored", word.load(Ordering::Relaxed), *stores + page)?;
        }
        *stores += self.guest.pages;
        Ok(elapsed)
    }

    fn sample(&self, effort: &Effort) -> Result<f64, Failure> {
        sample(effort, self.guest.pages - 1, || self.all())
    }

    fn verify(&self) -> Result<(), Failure> {
        self.guest.verify(*self.stores.borrow())
    }
}

/// F1.
#[derive(Debug)]
pub struct Single;

impl Row for Single {
    fn id(&self) -> &'static str {
        "F1"
    }

    fn figures(&self) -> &'static [&'static str] {
        const FIGURES: [&str; 18] =
            after(&["F1", "F1.ns", "F1.around", "F1.trip", "F1.x4", "F1.x16"], &[shares::IDS]);
        &FIGURES
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let faulters = [Regime::Rcu, Regime::Mutex].map(|regime| Faulter::new(PAGES, 1, regime));
        let [rcu, mutex] = faulters;
        let (rcu, mutex, soft) = (rcu?, mutex?, Toucher::new()?);
        let around = Faulter::new(PAGES, LINE, Regime::Rcu)?;
        let larger = [4, 16].map(|times| Faulter::new(times * PAGES, 1, Regime::Rcu));
        let larger = larger.into_iter().collect::<Result<Vec<_>, _>>()?;
        let variants: Vec<Variant<'_>> = vec![
            ("rcu", Box::new(|_| rcu.sample(effort))),
            ("mutex", Box::new(|_| mutex.sample(effort))),
            ("around", Box::new(|_| around.sample(effort))),
        ];
        let samples = interleave(effort, variants)?;
        let what = "shadow fault of one vCPU, 4K, tables present";
        found.figure(
            Figure::cost("F1", what, &samples, ["rcu", "mutex"])?
                .goal(Goal::AtMost(1.1))
                .detail("pages", json!(PAGES)),
        );
        found.figure(Figure::plain("F1.ns", "the same, absolute", &samples, "rcu", "ns")?);
        let what = "a fault that maps seven neighbours, over one without";
        found.figure(Figure::cost("F1.around", what, &samples, ["around", "rcu"])?);
        found.plots.push(("F1: a shadow fault", "ns", samples));
        let variants: Vec<Variant<'_>> = vec![("store", Box::new(|_| soft.sample(effort)))];
        let trips: Samples = interleave(effort, variants)?;
        let what = "a store of the software vCPU that faults, in all";
        found.figure(Figure::plain("F1.trip", what, &trips, "store", "ns")?);
        let variants: Vec<Variant<'_>> = vec![
            ("x1", Box::new(|_| rcu.sample(effort))),
            ("x4", Box::new(|_| larger[0].sample(effort))),
            ("x16", Box::new(|_| larger[1].sample(effort))),
        ];
        let growth = interleave(effort, variants)?;
        let what = "a fault with 4 times the pages over one with these";
        found.figure(Figure::cost("F1.x4", what, &growth, ["x4", "x1"])?);
        let what = "a fault with 16 times the pages";
        found.figure(Figure::cost("F1.x16", what, &growth, ["x16", "x1"])?);
        for faulter in [&rcu, &mutex, &around, &larger[0], &larger[1]] {
            faulter.verify()?;
        }
        soft.verify()?;
        found.append(shares::run(effort)?);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_faults_on_every_page() {
        let effort = Effort { pairs: 1, sample: Duration::from_micros(1) };
        for (regime, dense) in Regime::ALL.into_iter().zip([1, LINE, 1]) {
            let faulter = Faulter::new(1024, dense, regime).unwrap();
            faulter.sample(&effort).unwrap();
            assert_eq!(faulter.lane.borrow().faults, 2048);
            faulter.verify().unwrap();
        }
        let soft = Toucher::new().unwrap();
        soft.sample(&effort).unwrap();
        soft.verify().unwrap();
    }
}
