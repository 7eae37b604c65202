// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tearing down a whole shadow, and what comes after.
//!
//! The guest has as many page tables as the shadow has pages, and has touched one page of each. The
//! shadow is torn down twice a round: once the guest goes on and faults, as it does after a change
//! of the memory map, and once nobody does, so that maintenance alone gets rid of the old pages.
//! There are frames for a quarter more pages than the guest needs: faults must use those of the old
//! ones again.

use super::anew;
use super::lanes::after;
use crate::cpu::{thread_time, tick_ns, ticks};
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples, Variant, interleave};
use crate::regime::Brief;
use crate::stats::{Histogram, median};
use mmu_core::Mmu;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig};
use mmu_core::paging::Access;
use mmu_core::shadow::Outcome;
use mmu_core::vcpu::Vcpu;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// First mapped address.
const FIRST: u64 = 0x4000_0000;
/// Where the pages are that the guest touches.
const DATA: u64 = 1 << 40;
/// Shadow pages of the lowest level: of the base, of the figures, and of these in a hurry.
const FEW: (&str, u64) = ("1 k", 1000);
const MANY: (&str, u64) = ("100 k", 100_000);
const QUICK: (&str, u64) = ("10 k", 10_000);
/// Rounds are long, and these are enough.
const ROUNDS: usize = 21;
/// Calls of [`Mmu::maintain`] after which everything must have been reclaimed.
const PATIENCE: u32 = 100_000;
/// Pages that a vCPU may have retired last and keeps until it retires more: its bag of deferred
/// calls.
const BAG: u64 = 64;
/// Calls of [`Mmu::zap_all`] that are timed together: one takes 10 ns, or 300 if what it touches is
/// not in the caches. All but the first find that everything is obsolete already.
const CALLS: u32 = 64;
/// Nanoseconds from which a fault may have been interrupted.
const LONG: f64 = 10_000.0;

/// The time that others take from this thread.
struct Taken {
    tick: f64,
    clock: u64,
    ran: Duration,
}

impl Taken {
    fn new(tick: f64) -> Self {
        Self { tick, clock: ticks(), ran: thread_time() }
    }

    /// Nanoseconds since this was last asked.
    fn since(&mut self) -> f64 {
        let new = Self::new(self.tick);
        let passed = new.clock.wrapping_sub(self.clock) as f64 * self.tick;
        let ran = new.ran.saturating_sub(self.ran).as_nanos() as f64;
        *self = new;
        (passed - ran).max(0.0)
    }
}

/// A guest with one touched page in each of its tables.
struct Guest {
    mmu: Mmu,
    vcpu: Vcpu,
    tables: u64,
    /// Tables above those.
    upper: u64,
}

/// What one round found.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Nanoseconds of a call.
    latency: f64,
    /// What half of the faults did not exceed until everything was there again, 999 of 1000 of
    /// them, and the worst.
    p50: f64,
    p999: f64,
    worst: f64,
    /// Processor time of the call and of all maintenance, for each page.
    cpu: f64,
}

impl Guest {
    fn new(tables: u64) -> Result<Self, Failure> {
        let upper = tables / 512 + tables / 512 / 512 + 4;
        let mut memory = Memory::new((tables + upper) * PAGE + MIB, PAGE);
        let root = memory.table();
        for table in 0..tables {
            memory.map(root, Self::gva(table), DATA + table * PAGE);
        }
        // Old and new pages at a time.
        let mmu = memory.engine(tables / 4 * 5 + upper + 64)?;
        // Never touched: faults look at tables only.
        let data = Arc::new(AllocatedMemory::new(tables * PAGE));
        let slot = SlotConfig::new(1, Gpa(DATA), data);
        mmu.create_slot(slot).map_err(Failure::in_step("slot"))?;
        let vcpu = mmu.create_vcpu(Arc::new(Brief), regs(root));
        let vcpu = vcpu.map_err(Failure::in_step("vCPU"))?;
        let mut guest = Self { mmu, vcpu, tables, upper };
        (0..tables).try_for_each(|table| guest.touch(table))?;
        Ok(guest)
    }

    fn gva(table: u64) -> u64 {
        FIRST + table * 2 * MIB + table % 512 * PAGE
    }

    fn touch(&mut self, table: u64) -> Result<(), Failure> {
        loop {
            match self.vcpu.fault(Gva(Self::gva(table)), Access::write().user()) {
                Ok(Outcome::Fixed) => return Ok(()),
                Ok(other) => return Err(Failure::new(format!("table {table}: {other:?}"))),
                Err(stall) => while self.vcpu.must_wait(stall) {},
            }
        }
    }

    fn torn_down(&self) -> u64 {
        self.mmu.stats().mmu_shadow_zapped
    }

    fn round(&mut self, tick: f64) -> Result<Round, Failure> {
        let (latency, faults) = self.beside_faults(tick)?;
        let [p50, p999, worst] = [0.5, 0.999, 1.0].map(|share| faults.quantile(share) as f64);
        Ok(Round { latency, p50, p999, worst, cpu: self.by_maintenance()? })
    }

    /// Tears down, and touches everything again; nanoseconds of a call, and the faults'.
    fn beside_faults(&mut self, tick: f64) -> Result<(f64, Histogram), Failure> {
        let all = self.torn_down() + self.tables;
        let start = ticks();
        (0..CALLS).for_each(|_| self.mmu.zap_all());
        let latency = ticks().wrapping_sub(start) as f64 * tick / f64::from(CALLS);
        let (mut latencies, mut taken) = (Histogram::new(), Taken::new(tick));
        for table in 0..self.tables {
            let start = ticks();
            self.touch(table)?;
            let mut elapsed = ticks().wrapping_sub(start) as f64 * tick;
            if elapsed > LONG {
                elapsed = (elapsed - taken.since()).max(0.0);
            } else if table % 64 == 0 {
                taken.since();
            }
            latencies.add(elapsed as u64);
        }
        check_eq("old pages torn down", self.torn_down() >= all, true)?;
        self.maintain(self.tables + self.upper)?;
        Ok((latency, latencies))
    }

    /// Tears down, and lets maintenance get rid of everything; processor time a page.
    fn by_maintenance(&mut self) -> Result<f64, Failure> {
        let start = thread_time();
        self.mmu.zap_all();
        // The vCPU has a root until it faults.
        self.maintain(1)?;
        let cpu = thread_time().saturating_sub(start);
        (0..self.tables).try_for_each(|table| self.touch(table))?;
        Ok(cpu.as_nanos() as f64 / self.tables as f64)
    }

    /// Has old pages freed until there are so many pages.
    fn maintain(&self, pages: u64) -> Result<(), Failure> {
        let mut calls = 0;
        while self.mmu.nr_mmu_pages().1 > pages + BAG {
            self.mmu.maintain();
            calls += 1;
            if calls > PATIENCE {
                return Err(Failure::new("old pages are not reclaimed"));
            }
        }
        Ok(())
    }
}

/// Z1.
#[derive(Debug)]
pub struct ZapAll;

impl Row for ZapAll {
    fn id(&self) -> &'static str {
        "Z1"
    }

    fn figures(&self) -> &'static [&'static str] {
        const FIGURES: [&str; 15] = after(&["Z1.latency", "Z1.p999", "Z1.cpu"], &[anew::IDS]);
        &FIGURES
    }

    fn run(&self, full: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let quick = full.pairs <= Effort::QUICK.pairs;
        let many = if quick { QUICK } else { MANY };
        let effort = &Effort { pairs: full.pairs.min(ROUNDS), ..*full };
        let (tick, mut guests) = (tick_ns(), Vec::new());
        for (name, tables) in [FEW, many] {
            guests.push((name, Guest::new(tables)?, Vec::new()));
        }
        let variants = guests.iter_mut().map(|(name, guest, rounds)| -> Variant<'_> {
            let run = |_| {
                rounds.push(guest.round(tick)?);
                Ok(rounds[rounds.len() - 1].latency)
            };
            (name, Box::new(run))
        });
        let latency = interleave(effort, variants.collect())?;
        let [(few, small, fews), (many, large, manys)] = &guests[..] else {
            return Err(Failure::new("two guests"));
        };
        // Without the round that does not count.
        let side = |value: fn(&Round) -> f64| {
            let values = |rounds: &[Round]| rounds.iter().skip(1).map(value).collect();
            Samples::from([(*few, values(fews)), (*many, values(manys))])
        };
        let size =
            |figure: Figure| figure.detail("shadow_pages", json!([small.tables, large.tables]));
        let what = "zap_all of 100 k pages (quick: 10 k), over 1 k";
        let figure = Figure::cost("Z1.latency", what, &latency, [many, few])?;
        found.figure(size(figure.goal(Goal::AtMost(2.0))));
        let p999 = side(|round| round.p999);
        let what = "a fault's p99.9 from then on until all is there again";
        let figure = Figure::plain("Z1.p999", what, &p999, many, "ns")?;
        let [p50, worst] = [side(|round| round.p50), side(|round| round.worst)];
        let figure = figure
            .detail("p50", json!(median(p50.of(many)?)))
            .detail("worst", json!(median(worst.of(many)?)));
        found.figure(size(figure));
        let cpu = side(|round| round.cpu);
        let what = "processor time until they are freed, a page, over 1 k";
        let figure = Figure::cost("Z1.cpu", what, &cpu, [many, few])?;
        found.figure(size(figure.goal(Goal::AtMost(1.5))));
        found.plots.push(("Z1: zap_all", "ns", latency));
        for guest in [small, large] {
            let audit = guest.mmu.audit().map_err(Failure::in_step("audit"))?;
            check_eq("shadow entries", audit.sptes, guest.tables)?;
        }
        found.append(anew::run(full)?);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_tears_everything_down_and_ends_complete() {
        let mut guest = Guest::new(1100).unwrap();
        for _ in 0..2 {
            let round = guest.round(1.0).unwrap();
            assert!(round.latency > 0.0 && round.cpu > 0.0, "{round:?}");
            assert!(round.worst >= round.p999 && round.p999 > 0.0, "{round:?}");
            assert_eq!(guest.mmu.audit().unwrap().sptes, 1100);
        }
        assert!(guest.torn_down() >= 4 * 1100);
    }
}
