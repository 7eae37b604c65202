// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Walks among many memslots.
//!
//! What differs between the variants is the map and nothing else: all of them walk the same tables,
//! at the same place in the same memory, for the same addresses. That memory is one slot in the
//! base; it is one slot among others in the maps of [`Layout::One`], and cut into slots of unequal
//! size, at places that have nothing to do with the tables, in those of [`Layout::Random`]. So the
//! misses of the entries themselves are the same in all, and few: the entries that are read fit
//! in the second cache, most of them in the first.

use super::walk::chained;
use crate::backing::Part;
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{Memory, PAGE, regs, xorshift};
use crate::measure::{Effort, Samples, Variant, calibrate, interleave, timed};
use crate::regime::Walker;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{Hint, MemoryMap, SlotConfig};
use mmu_core::paging::PagingMode;
use serde_json::json;
use std::ops::Range;

/// A map of one slot.
const ONE: (&str, u64) = ("1 slot", 1);
/// Slots of the maps that are compared with it.
const COUNTS: [(&str, u64); 4] = [("8", 8), ("64", 64), ("512", 512), ("10000", 10_000)];
/// Tables of the lowest level that the addresses of the goals belong to.
const TABLES: u64 = 64;
/// Pages below and above what the tables lie in; other slots are there.
const SIDE: u64 = 20_000;
/// Pages that the tables and what they map lie in: four for each of the most slots.
const MIDDLE: Range<u64> = SIDE..SIDE + 40_000;
/// First mapped address.
const FIRST: u64 = 0x1280_4000_0000;
/// Addresses of a pass.
const ADDRESSES: usize = 512;

/// Where the slots are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// All tables and pages in one of them.
    One,
    /// Each table and page in any of them; they are of unequal size.
    Random,
    /// The same, of one size.
    Even,
}

/// A guest whose tables lie anywhere in [`MIDDLE`], as the pages that they map.
struct Guest {
    memory: Memory,
    root: u64,
}

impl Guest {
    fn new(tables: u64) -> Self {
        let mut x = 0x9e37_79b9;
        let mut places: Vec<u64> = MIDDLE.map(|page| page * PAGE).collect();
        // The last of a shuffle are as good as any.
        let upper = 3 + tables / 512;
        for last in (places.len() - (tables + upper) as usize..places.len()).rev() {
            x = xorshift(x);
            places.swap(last, (x % (last as u64 + 1)) as usize);
        }
        let mut memory = Memory::scattered((MIDDLE.end + SIDE) * PAGE, places);
        let root = memory.table();
        for page in 0..tables * 512 {
            let gva = FIRST + page * PAGE;
            memory.map(root, gva, Self::gpa(gva));
        }
        Self { memory, root }
    }

    /// What an address must translate to: something in a page anywhere in [`MIDDLE`].
    fn gpa(gva: u64) -> u64 {
        let page = xorshift(gva >> 12) % (MIDDLE.end - MIDDLE.start);
        (MIDDLE.start + page) * PAGE + (gva & 0xfff)
    }

    /// Mapped addresses, anywhere in what the first `tables` tables map.
    fn addresses(tables: u64) -> Vec<Gva> {
        let mut x = 1;
        let mut address = || {
            x = xorshift(x);
            Gva(FIRST + ((x >> 20) % (tables * 512)) * PAGE + (x >> 8 & 0xff8))
        };
        (0..ADDRESSES).map(|_| address()).collect()
    }

    fn slot(&self, id: u64, pages: Range<u64>) -> SlotConfig {
        let at = Gpa(pages.start * PAGE);
        SlotConfig::new(id as u32, at, Part::new(self.memory.backing(), pages))
    }

    /// A map of `slots` slots.
    fn map(&self, layout: Layout, slots: u64) -> Result<MemoryMap, Failure> {
        let cuts = match layout {
            Layout::One => {
                let below = cut(0..MIDDLE.start, (slots - 1).div_ceil(2), false);
                let above = cut(MIDDLE.end..MIDDLE.end + SIDE, (slots - 1) / 2, false);
                below.into_iter().chain([MIDDLE]).chain(above).collect()
            }
            Layout::Random => cut(MIDDLE, slots, false),
            Layout::Even => cut(MIDDLE, slots, true),
        };
        let map = MemoryMap::build((0..).zip(cuts).map(|(id, pages)| self.slot(id, pages)))
            .map_err(Failure::in_step("map"))?;
        check_eq("slots", map.slots().len() as u64, slots)?;
        Ok(map)
    }
}

/// Cuts pages into so many parts: at the end of each one's share of the whole if `even`, else
/// anywhere in the share.
fn cut(pages: Range<u64>, parts: u64, even: bool) -> Vec<Range<u64>> {
    let mut x = 0x5_a5a5;
    let mut start = pages.start;
    let mut cut = |part: u64| {
        let share = (pages.end - pages.start) / parts;
        x = xorshift(x);
        let place = if even { share } else { 1 + x % share };
        let last = part + 1 == parts;
        let end = if last { pages.end } else { pages.start + part * share + place };
        let range = start..end;
        start = end;
        range
    };
    (0..parts).map(&mut cut).collect()
}

/// Walks through one map.
struct Bench {
    name: &'static str,
    slots: u64,
    map: MemoryMap,
    hint: Hint,
}

impl Bench {
    fn pass(&self, mode: &PagingMode, gvas: &[Gva], sum: u64) -> Result<(), Failure> {
        let found = chained(gvas, |gva| {
            let walk = mode.walk(&self.map, &self.hint, Gva(gva), Walker::ACCESS);
            walk.ok().map(|walk| walk.gpa.0)
        });
        check_eq("sum of the translations", found, Some(sum))
    }
}

/// The maps of a layout, and that of one slot first.
fn benches(guest: &Guest, layout: Layout) -> Result<Vec<Bench>, Failure> {
    let bench = |layout, (name, slots)| {
        Ok(Bench { name, slots, map: guest.map(layout, slots)?, hint: Hint::default() })
    };
    let one = [bench(Layout::One, ONE)];
    one.into_iter().chain(COUNTS.map(|count| bench(layout, count))).collect()
}

/// Walks through each of the maps for addresses of so many tables; adds the figure for the number
/// of slots at which a walk costs most.
fn measure(
    effort: &Effort,
    guest: &Guest,
    benches: &[Bench],
    tables: u64,
    (id, what, goal): (&'static str, &'static str, Option<Goal>),
    found: &mut Found,
) -> Result<Samples, Failure> {
    let mode = &PagingMode::new(&regs(guest.root)).map_err(Failure::in_step("registers"))?;
    let gvas = &Guest::addresses(tables);
    let sum = gvas.iter().fold(0u64, |sum, gva| sum.wrapping_add(Guest::gpa(gva.0)));
    let variants = benches.iter().map(|bench| -> Result<Variant<'_>, Failure> {
        let passes = calibrate(effort, || bench.pass(mode, gvas, sum))?;
        let run = move |_| timed(passes, gvas.len(), || bench.pass(mode, gvas, sum));
        Ok((bench.name, Box::new(run)))
    });
    let samples = interleave(effort, variants.collect::<Result<_, _>>()?)?;
    let mut worst: Option<Figure> = None;
    for bench in &benches[1..] {
        let figure = Figure::cost(id, what, &samples, [bench.name, ONE.0])?
            .detail("slots", json!(bench.slots))
            .detail("tables", json!(tables));
        if worst.as_ref().is_none_or(|worst| worst.estimate.value < figure.estimate.value) {
            worst = Some(figure);
        }
    }
    let worst = worst.ok_or_else(|| Failure::new("no slots"))?;
    found.figure(goal.map_or(worst.clone(), |goal| worst.goal(goal)));
    Ok(samples)
}

/// W8.
#[derive(Debug)]
pub struct ManySlots;

impl Row for ManySlots {
    fn id(&self) -> &'static str {
        "W8"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W8.one", "W8.random", "W8.random.x4", "W8.random.x16", "W8.even"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let guest = Guest::new(TABLES * 16);
        let what = "walk, one slot of 8 to 10,000 used, over 1 slot";
        let figure = ("W8.one", what, Some(Goal::AtMost(1.1)));
        let one = benches(&guest, Layout::One)?;
        let samples = measure(effort, &guest, &one, TABLES, figure, &mut found)?;
        found.plots.push(("W8: a walk in one slot of many", "ns", samples));
        let random = benches(&guest, Layout::Random)?;
        let what = "the same, every table and page in a random slot";
        let figure = ("W8.random", what, Some(Goal::AtMost(3.0)));
        let samples = measure(effort, &guest, &random, TABLES, figure, &mut found)?;
        found.plots.push(("W8: a walk through random slots", "ns", samples));
        for (id, what, times) in [
            ("W8.random.x4", "the same through 4 times the tables", 4),
            ("W8.random.x16", "the same through 16 times", 16),
        ] {
            measure(effort, &guest, &random, TABLES * times, (id, what, None), &mut found)?;
        }
        let even = benches(&guest, Layout::Even)?;
        let figure = ("W8.even", "W8.random with slots of one size", None);
        measure(effort, &guest, &even, TABLES, figure, &mut found)?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_translates_alike() {
        let guest = Guest::new(8);
        let mode = PagingMode::new(&regs(guest.root)).unwrap();
        let gvas = Guest::addresses(8);
        for (layout, slots) in
            [(Layout::One, 1), (Layout::One, 64), (Layout::Random, 64), (Layout::Even, 64)]
        {
            let (map, hint) = (guest.map(layout, slots).unwrap(), Hint::default());
            for gva in &gvas {
                let walk = mode.walk(&map, &hint, *gva, Walker::ACCESS).unwrap();
                assert_eq!(walk.gpa.0, Guest::gpa(gva.0));
                // The page is there.
                assert!(map.word(walk.gpa, &hint).is_some());
            }
        }
    }

    #[test]
    fn parts_are_as_many_as_asked_for_and_leave_nothing_out() {
        for (parts, even) in [(1, true), (2, false), (63, true), (512, false), (10_000, false)] {
            let ranges = cut(MIDDLE, parts, even);
            assert_eq!(ranges.len() as u64, parts);
            assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (MIDDLE.start, MIDDLE.end));
            assert!(ranges.iter().all(|range| !range.is_empty()));
            assert!(ranges.windows(2).all(|two| two[0].end == two[1].start));
        }
        assert!(cut(MIDDLE, 0, false).is_empty());
    }
}
