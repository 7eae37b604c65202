// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Walks of 4-level tables beside the bare loads of the same walks.
//!
//! Each walk waits for the one before (its address depends on that one's result), as walks do whose
//! results are used. The `.stream` figures let them overlap: there the processor hides latency,
//! and what is compared is the number of instructions.

use crate::chase;
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{LEAF, MIB, Memory, PAGE, regs, xorshift};
use crate::measure::{Effort, Samples, Variant, calibrate, interleave, timed};
use crate::regime::{Regime, Vm, Walker};
use mmu_core::addr::Gva;
use mmu_core::memory::{Hint, MemoryMap};
use mmu_core::paging::PagingMode;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// First mapped address: in the upper tables not at index 0.
const FIRST: u64 = 0x1280_4000_0000;
/// Turns the page number of an address into its guest frame.
const SCRAMBLE: u64 = 0x5_a5a5;

/// A guest whose tables map a range, and where every page of it is.
pub struct Tables {
    pub memory: Memory,
    pub root: u64,
    /// Pages of the range; a power of two.
    pages: u64,
}

impl Tables {
    /// Maps `tables * 512` pages.
    pub fn new(tables: u64) -> Self {
        let upper = 2 + tables.div_ceil(512) + 1;
        let mut memory = Memory::new((tables + upper + 1) * PAGE + MIB, PAGE);
        let root = memory.table();
        for table in 0..tables {
            let gva = FIRST + table * 512 * PAGE;
            let at = memory.leaf_table(root, gva);
            for index in 0..512 {
                let gpa = Self::gpa(gva + index * PAGE);
                memory.word(at + index * 8).store(gpa | LEAF, Ordering::Relaxed);
            }
        }
        Self { memory, root, pages: tables * 512 }
    }

    /// Bytes of all tables.
    pub fn bytes(&self) -> u64 {
        self.memory.tables_end() - PAGE
    }

    /// What an address must translate to. The pages need not exist for that;
    /// those of a few tables have addresses that every processor can have.
    fn gpa(gva: u64) -> u64 {
        ((gva - FIRST) >> 12 ^ SCRAMBLE) << 12 | gva & 0xfff
    }

    /// Mapped addresses, anywhere in the range.
    pub fn addresses(&self, count: usize, seed: u64) -> Vec<Gva> {
        let mut x = seed | 1;
        (0..count)
            .map(|_| {
                x = xorshift(x);
                Gva(FIRST + ((x >> 20) % self.pages) * PAGE + (x >> 8 & 0xff8))
            })
            .collect()
    }

    /// The sum of what addresses must translate to.
    pub fn sum(gvas: &[Gva]) -> u64 {
        gvas.iter().fold(0, |sum, gva| sum.wrapping_add(Self::gpa(gva.0)))
    }
}

/// Adds up what `walk` makes of each address, one after the other.
#[inline(always)]
pub fn chained(gvas: &[Gva], mut walk: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
    let (mut sum, mut last) = (0u64, 0);
    for gva in gvas {
        last = walk(chase::chained(gva.0, last))?;
        sum = sum.wrapping_add(last);
    }
    Some(sum)
}

/// The same, overlapping.
#[inline(always)]
fn streamed(gvas: &[Gva], mut walk: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
    let mut sum = 0u64;
    for gva in gvas {
        sum = sum.wrapping_add(walk(gva.0)?);
    }
    Some(sum)
}

/// Who walks.
pub struct Bench {
    pub tables: Tables,
    map: Arc<MemoryMap>,
    mode: PagingMode,
    vm: Vm,
    walker: Walker,
    hint: Hint,
}

/// The ways to walk; each returns the sum of the results.
pub type Pass = fn(&Bench, &[Gva]) -> Option<u64>;

impl Bench {
    pub fn new(tables: u64) -> Result<Self, Failure> {
        let tables = Tables::new(tables);
        let vm = Vm::new(tables.memory.engine(64)?, Regime::Rcu);
        let walker = Walker::new(&vm, tables.root)?;
        let mode = PagingMode::new(&regs(tables.root)).map_err(Failure::in_step("registers"))?;
        Ok(Self { map: vm.mmu().memory(), tables, mode, vm, walker, hint: Hint::default() })
    }

    #[inline(always)]
    fn walk(&self, gva: u64) -> Option<u64> {
        let walk = self.mode.walk(&self.map, &self.hint, Gva(gva), Walker::ACCESS);
        walk.ok().map(|walk| walk.gpa.0)
    }

    #[inline(always)]
    fn chase(&self, gva: u64) -> Option<u64> {
        // SAFETY: the addresses are those of `Tables::addresses`, and the engine's walk has been
        // made for the same range before: `new` writes every entry of it.
        Some(unsafe { chase::walk(self.tables.memory.words(), self.tables.root, gva) })
    }

    pub const WALK: Pass = |bench, gvas| chained(gvas, |gva| bench.walk(gva));
    const CHASE: Pass = |bench, gvas| chained(gvas, |gva| bench.chase(gva));
    const WALK_STREAM: Pass = |bench, gvas| streamed(gvas, |gva| bench.walk(gva));
    const CHASE_STREAM: Pass = |bench, gvas| streamed(gvas, |gva| bench.chase(gva));
    const PINNED: Pass = |bench, gvas| {
        chained(gvas, |gva| bench.walker.walk(&bench.vm, gva).ok().map(|walk| walk.gpa.0))
    };
    const SESSION: Pass = |bench, gvas| {
        let mut session = bench.walker.session(&bench.vm);
        chained(gvas, |gva| session.walk(gva).ok().map(|walk| walk.gpa.0))
    };
    const BATCH: Pass =
        |bench, gvas| {
            let (mut sum, mut faults) = (0u64, 0);
            bench.mode.walk_batch(&bench.map, &bench.hint, gvas, Walker::ACCESS, |_, walk| {
                match walk {
                    Ok(walk) => sum = sum.wrapping_add(walk.gpa.0),
                    Err(_) => faults += 1,
                }
            });
            (faults == 0).then_some(sum)
        };

    /// Measures the ways side by side, `count` addresses a pass; fresh ones each time if `fresh`.
    fn measure<const N: usize>(
        &self,
        effort: &Effort,
        ways: [(&'static str, Pass); N],
        count: usize,
        fresh: bool,
    ) -> Result<Samples, Failure> {
        let pass = |way: Pass, gvas: &[Gva], sum: u64| {
            check_eq("sum of the translations", way(self, gvas), Some(sum))
        };
        let gvas = self.tables.addresses(count, 1);
        let sum = Tables::sum(&gvas);
        let variants = ways.iter().enumerate().map(|(n, (name, way))| -> Result<Variant<'_>, _> {
            let passes = if fresh { 1 } else { calibrate(effort, || pass(*way, &gvas, sum))? };
            let gvas = &gvas;
            let run = move |round: usize| {
                if !fresh {
                    return timed(passes, count, || pass(*way, gvas, sum));
                }
                let gvas = self.tables.addresses(count, (round * N + n + 1) as u64 * 0x9e37_79b9);
                let sum = Tables::sum(&gvas);
                timed(1, count, || pass(*way, &gvas, sum))
            };
            Ok((*name, Box::new(run)))
        });
        interleave(effort, variants.collect::<Result<_, Failure>>()?)
    }
}

/// Tables of the small rows: four of the lowest level, 28 KiB with those above.
pub const SMALL: u64 = 4;
/// Addresses of the small rows, which lie in the first cache beside the tables.
pub const ADDRESSES: usize = 512;

/// W1.
#[derive(Debug)]
pub struct Cached;

impl Row for Cached {
    fn id(&self) -> &'static str {
        "W1"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W1", "W1.stream", "W1.x4", "W1.x16"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let ways = [("walk", Bench::WALK), ("chase", Bench::CHASE)];
        let streams = [("walk", Bench::WALK_STREAM), ("chase", Bench::CHASE_STREAM)];
        let bench = Bench::new(SMALL)?;
        let samples = bench.measure(effort, ways, ADDRESSES, false)?;
        found.figure(
            Figure::cost("W1", "walk, tables in L1/L2, one map held", &samples, ["walk", "chase"])?
                .goal(Goal::AtMost(2.0))
                .detail("table_bytes", json!(bench.tables.bytes())),
        );
        found.plots.push(("W1: a walk, tables in L1/L2", "ns", samples));
        let samples = bench.measure(effort, streams, ADDRESSES, false)?;
        let what = "the same, walks overlapping";
        found.figure(Figure::cost("W1.stream", what, &samples, ["walk", "chase"])?);
        for (id, what, times) in [
            ("W1.x4", "the same, 4 times the tables and addresses", 4),
            ("W1.x16", "the same, 16 times", 16),
        ] {
            let bench = Bench::new(SMALL * times)?;
            let samples = bench.measure(effort, ways, ADDRESSES * times as usize, false)?;
            found.figure(
                Figure::cost(id, what, &samples, ["walk", "chase"])?
                    .detail("table_bytes", json!(bench.tables.bytes())),
            );
        }
        Ok(found)
    }
}

/// W2.
#[derive(Debug)]
pub struct Large;

impl Row for Large {
    fn id(&self) -> &'static str {
        "W2"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W2", "W2.stream"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let bench = Bench::new(256 * MIB / PAGE)?;
        let count = fresh_addresses(effort);
        let ways = [("walk", Bench::WALK), ("chase", Bench::CHASE)];
        let samples = bench.measure(effort, ways, count, true)?;
        found.figure(
            Figure::cost("W2", "walk, 256 MiB of tables, random", &samples, ["walk", "chase"])?
                .goal(Goal::AtMost(1.3))
                .detail("table_bytes", json!(bench.tables.bytes())),
        );
        found.plots.push(("W2: a walk, 256 MiB of tables", "ns", samples));
        let ways = [("walk", Bench::WALK_STREAM), ("chase", Bench::CHASE_STREAM)];
        let samples = bench.measure(effort, ways, count, true)?;
        let what = "the same, walks overlapping";
        found.figure(Figure::cost("W2.stream", what, &samples, ["walk", "chase"])?);
        Ok(found)
    }
}

/// Addresses of a sample of the large rows, each used once: 100 ns is about what a memory access
/// takes.
fn fresh_addresses(effort: &Effort) -> usize {
    (effort.sample.as_nanos() / 100) as usize
}

/// W4.
#[derive(Debug)]
pub struct Batch;

impl Row for Batch {
    fn id(&self) -> &'static str {
        "W4"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W4"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let bench = Bench::new(256 * MIB / PAGE)?;
        let ways =
            [("batch", Bench::BATCH), ("walk", Bench::WALK_STREAM), ("chase", Bench::CHASE_STREAM)];
        let samples = bench.measure(effort, ways, fresh_addresses(effort), true)?;
        let what = "W2 by walk_batch, speed over independent walks";
        found.figure(
            Figure::throughput("W4", what, &samples, ["batch", "walk"])?
                .goal(Goal::AtLeast(2.5))
                .detail("table_bytes", json!(bench.tables.bytes())),
        );
        found.plots.push(("W4: a walk of a batch, 256 MiB of tables", "ns", samples));
        Ok(found)
    }
}

/// W3.
#[derive(Debug)]
pub struct Pinned;

impl Row for Pinned {
    fn id(&self) -> &'static str {
        "W3"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W3", "W3.session"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let ways = [
            ("pin+walk", Bench::PINNED),
            ("session", Bench::SESSION),
            ("chase", Bench::CHASE),
            ("walk", Bench::WALK),
        ];
        let samples = Bench::new(SMALL)?.measure(effort, ways, ADDRESSES, false)?;
        let what = "W1 with a pin for each walk (Vcpu::translate)";
        found.figure(
            Figure::cost("W3", what, &samples, ["pin+walk", "chase"])?.goal(Goal::AtMost(4.0)),
        );
        let what = "the same in a session (Vcpu::walker)";
        found.figure(Figure::cost("W3.session", what, &samples, ["session", "chase"])?);
        found.plots.push(("W3: a walk with a pin of its own", "ns", samples));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_walk_agrees() {
        let bench = Bench::new(2).unwrap();
        let gvas = bench.tables.addresses(100, 7);
        let sum = Tables::sum(&gvas);
        for way in [
            Bench::WALK,
            Bench::CHASE,
            Bench::WALK_STREAM,
            Bench::CHASE_STREAM,
            Bench::PINNED,
            Bench::SESSION,
            Bench::BATCH,
        ] {
            assert_eq!(way(&bench, &gvas), Some(sum));
        }
        for way in [Bench::WALK, Bench::BATCH, Bench::SESSION] {
            assert_eq!(way(&bench, &[Gva(FIRST + 2 * 512 * PAGE)]), None);
        }
    }
}
