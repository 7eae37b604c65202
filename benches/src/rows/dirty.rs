// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Harvests of a dirty log.

use crate::cpu::thread_time;
use crate::figure::{Failure, Figure, Found, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples, Variant, calibrate, interleave, timed};
use crate::regime::Brief;
use mmu_core::Mmu;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig, SlotId};
use mmu_core::paging::Access;
use mmu_core::shadow::Outcome;
use mmu_core::vcpu::Vcpu;
use serde_json::json;
use std::cell::RefCell;
use std::sync::Arc;

/// Pages of the slot.
const PAGES: u64 = 1 << 18;
/// Where the slot is, in both kinds of addresses.
const BASE: u64 = 1 << 32;
/// Of the slot with the log.
const SLOT: SlotId = SlotId(1);
/// A page of so many is dirty.
const SHARES: [(&str, u64); 3] = [("1 %", 100), ("10 %", 10), ("100 %", 1)];

/// A guest that writes, and its log.
struct Guest {
    mmu: Mmu,
    vcpu: Vcpu,
    bitmap: Vec<u64>,
}

impl Guest {
    fn new(pages: u64) -> Result<Self, Failure> {
        let mut memory = Memory::new((pages / 512 + 8) * PAGE + MIB, PAGE);
        let root = memory.table();
        for page in 0..pages {
            memory.map(root, BASE + page * PAGE, BASE + page * PAGE);
        }
        let mmu = memory.engine(pages / 512 + 64)?;
        // Never touched: faults look at tables only.
        let data = Arc::new(AllocatedMemory::new(pages * PAGE));
        let slot = SlotConfig::new(SLOT.0, Gpa(BASE), data).log_dirty();
        mmu.create_slot(slot).map_err(Failure::in_step("slot"))?;
        let vcpu = mmu.create_vcpu(Arc::new(Brief), regs(root));
        let vcpu = vcpu.map_err(Failure::in_step("vCPU"))?;
        Ok(Self { mmu, vcpu, bitmap: vec![0; (pages / 64) as usize] })
    }

    fn pages(&self) -> u64 {
        self.bitmap.len() as u64 * 64
    }

    /// Writes to every page of the slot whose number leaves this rest; returns how many.
    fn write(&mut self, divisor: u64, rest: u64) -> Result<u64, Failure> {
        let mut count = 0;
        for page in (rest % divisor..self.pages()).step_by(divisor as usize) {
            loop {
                match self.vcpu.fault(Gva(BASE + page * PAGE), Access::write().user()) {
                    Ok(Outcome::Fixed) => break,
                    Ok(other) => return Err(Failure::new(format!("page {page}: {other:?}"))),
                    Err(stall) => while self.vcpu.must_wait(stall) {},
                }
            }
            count += 1;
        }
        Ok(count)
    }

    fn harvest(&mut self) -> Result<u64, Failure> {
        self.mmu.dirty_log(SLOT, &mut self.bitmap).map_err(Failure::in_step("harvest"))
    }

    /// The log's pages must be those that were written.
    fn verify(&self, found: u64, divisor: u64, rest: u64, written: u64) -> Result<(), Failure> {
        check_eq("dirty pages", found, written)?;
        let bit = |page: u64| self.bitmap[(page / 64) as usize] >> (page % 64) & 1;
        let set = (0..self.pages()).filter(|page| bit(*page) == 1);
        check_eq("pages of the log", set.clone().count() as u64, written)?;
        match set.into_iter().find(|page| page % divisor != rest % divisor) {
            None => Ok(()),
            Some(page) => Err(Failure::new(format!("page {page} is not dirty"))),
        }
    }
}

/// D1.
#[derive(Debug)]
pub struct Harvest;

impl Row for Harvest {
    fn id(&self) -> &'static str {
        "D1"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["D1.d0", "D1.d1", "D1.d10", "D1.d100"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let guest = RefCell::new(Guest::new(PAGES)?);
        // Maps everything, so that all harvests meet a shadow of one size.
        guest.borrow_mut().write(1, 0)?;
        let all = guest.borrow_mut().harvest()?;
        check_eq("dirty pages", all, PAGES)?;
        let (from, to) = (vec![0x5555u64; (PAGES / 64) as usize], RefCell::new(vec![0u64; 4096]));
        let copy = || {
            to.borrow_mut().copy_from_slice(core::hint::black_box(&from));
            core::hint::black_box(&to);
            Ok(())
        };
        let nothing = || check_eq("dirty pages", guest.borrow_mut().harvest()?, 0);
        let copies = calibrate(effort, copy)?;
        let harvests = calibrate(effort, nothing)?;
        let mut variants: Vec<Variant<'_>> = vec![
            ("copy", Box::new(|_| timed(copies, 1, copy))),
            ("0 %", Box::new(|_| timed(harvests, 1, nothing))),
        ];
        for (name, divisor) in SHARES {
            let guest = &guest;
            let run = move |round: usize| {
                let mut guest = guest.borrow_mut();
                let written = guest.write(divisor, round as u64)?;
                let start = thread_time();
                let found = guest.harvest()?;
                let elapsed = thread_time().saturating_sub(start);
                guest.verify(found, divisor, round as u64, written)?;
                Ok(elapsed.as_nanos() as f64)
            };
            variants.push((name, Box::new(run)));
        }
        let samples = interleave(effort, variants)?;
        let what = "harvest of 1 GiB, nothing dirty, over a bitmap's copy";
        found.figure(Figure::cost("D1.d0", what, &samples, ["0 %", "copy"])?);
        for ((id, what), (name, divisor)) in [
            ("D1.d1", "a dirty page's harvest, 1 % dirty"),
            ("D1.d10", "the same, 10 % dirty"),
            ("D1.d100", "the same, all dirty"),
        ]
        .into_iter()
        .zip(SHARES)
        {
            let dirty = PAGES as f64 / divisor as f64;
            let each = samples.of(name)?.iter().map(|ns| ns / dirty).collect();
            let each = Samples::from([(name, each)]);
            let over = crate::stats::median(&samples.ratios(name, "copy")?);
            let figure = Figure::plain(id, what, &each, name, "ns")?;
            found.figure(figure.detail("over_copy", json!(over)));
        }
        guest.borrow().mmu.audit().map_err(Failure::in_step("audit"))?;
        found.plots.push(("D1: a harvest of a dirty log", "ns", samples));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_what_was_written() {
        let mut guest = Guest::new(1024).unwrap();
        for (divisor, rest) in [(1, 0), (10, 3), (100, 7), (10, 13)] {
            let written = guest.write(divisor, rest).unwrap();
            let found = guest.harvest().unwrap();
            guest.verify(found, divisor, rest, written).unwrap();
            assert!(guest.verify(found, divisor, rest, written + 1).is_err());
        }
        assert_eq!(guest.harvest().unwrap(), 0);
    }
}
