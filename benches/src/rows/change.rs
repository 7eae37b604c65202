// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of the memory map beside the kernel's, each while a reader of it walks.

use super::kvm::{Guest, open};
use super::threads::needs_two;
use super::walk::{ADDRESSES, SMALL, Tables, chained};
use crate::cpu::{tick_ns, ticks, together};
use crate::figure::{Failure, Figure, Found, Goal, Outcome, Row, check_eq};
use crate::guest::PAGE;
use crate::measure::{Effort, Samples, Variant, interleave, per_operation, undisturbed};
use crate::regime::{Regime, Vm, Walker};
use crate::stats::Histogram;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, SlotConfig, SlotId};
use serde_json::json;
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Where the slots lie that nobody changes, two pages apart.
const OTHERS: u64 = 1 << 34;
/// Numbers of slots, that of the walker's tables included and that which changes left out.
const COUNTS: [u32; 3] = [64, 509, 10_000];
const ENGINE: [&str; 3] = ["64", "509", "10000"];
const KERNEL: [&str; 3] = ["64, KVM", "509, KVM", "10000, KVM"];
const IDS: [&str; 3] = ["S1.n64", "S1.n509", "S1.n10000"];
const TAIL: &str = "S1.p999";

/// An engine and a virtual machine of the kernel's with the same slots.
struct Both<'m> {
    slots: u32,
    vm: Vm,
    walker: RefCell<Walker>,
    guest: Option<Guest<'m>>,
    gvas: Vec<Gva>,
    page: Arc<AllocatedMemory>,
    page_words: &'m AllocatedMemory,
}

/// What backs the slots of both.
struct Backings {
    tables: Tables,
    others: AllocatedMemory,
    page: AllocatedMemory,
}

impl Backings {
    fn new() -> Self {
        let others = AllocatedMemory::new(u64::from(COUNTS[2]) * PAGE);
        Self { tables: Tables::new(SMALL), others, page: AllocatedMemory::new(PAGE) }
    }
}

/// Address of one of the slots that stay; beyond them is where the other comes, moves and goes.
fn place(slot: u32) -> u64 {
    OTHERS + u64::from(slot) * 2 * PAGE
}

impl<'m> Both<'m> {
    fn new(slots: u32, backings: &'m Backings, kernel: bool) -> Result<Self, Failure> {
        let Backings { tables, others, page } = backings;
        let mmu = tables.memory.engine(64)?;
        let guest = match kernel {
            true => Some(Guest::new(open().map_err(Failure::new)?, tables)?),
            false => None,
        };
        for slot in 1..slots {
            let memory = Arc::new(AllocatedMemory::new(PAGE));
            let config = SlotConfig::new(slot, Gpa(place(slot)), memory);
            mmu.create_slot(config).map_err(Failure::in_step("slot"))?;
            if let Some(guest) = &guest {
                let words = slot as usize * 512..(slot as usize + 1) * 512;
                guest.set_slot(slot, place(slot), &others.words()[words])?;
            }
        }
        let vm = Vm::new(mmu, Regime::Rcu);
        let walker = RefCell::new(Walker::new(&vm, tables.root)?);
        let gvas = tables.addresses(ADDRESSES, 1);
        let own = Arc::new(AllocatedMemory::new(PAGE));
        Ok(Self { slots, vm, walker, guest, gvas, page: own, page_words: page })
    }

    /// The engine's: nanoseconds a change, and the walker's latencies.
    fn engine(&self, effort: &Effort) -> Result<(f64, bool, Histogram), Failure> {
        let mut walker = self.walker.borrow_mut();
        let (walker, vm, gvas) = (&mut *walker, &self.vm, &self.gvas[..]);
        let (slots, page) = (self.slots, &self.page);
        let mut latencies = Histogram::new();
        let record = &mut latencies;
        let walk = move |stop: &AtomicBool| {
            let mut session = walker.session(vm);
            until(stop, gvas, |gva| {
                let start = ticks();
                let walk = session.walk(gva);
                record.add(ticks().wrapping_sub(start));
                walk.ok().map(|walk| walk.gpa.0)
            })
        };
        let create = |at| {
            let config = SlotConfig::new(slots, Gpa(at), page.clone());
            vm.mmu().create_slot(config).map_err(Failure::in_step("create"))
        };
        let delete = || vm.mmu().delete_slot(SlotId(slots)).map_err(Failure::in_step("delete"));
        let [from, to] = [place(slots), place(slots + 8)];
        let cycle = || {
            create(from)?;
            // A move is both, as long as guests see neither place meanwhile.
            delete()?;
            create(to)?;
            delete().map(drop)
        };
        let (ns, disturbed) = beside(effort, walk, cycle)?;
        let map = vm.mmu().memory();
        check_eq("slots", map.slots().len(), slots as usize)?;
        Ok((ns, disturbed, latencies))
    }

    /// The kernel's.
    fn kernel(&self, effort: &Effort, guest: &Guest<'m>) -> Result<(f64, bool), Failure> {
        let (slots, gvas, words) = (self.slots, &self.gvas[..], self.page_words.words());
        let walk = move |stop: &AtomicBool| until(stop, gvas, |gva| guest.walk(gva));
        let [from, to] = [place(slots), place(slots + 8)];
        let cycle = || {
            guest.set_slot(slots, from, words)?;
            guest.set_slot(slots, to, words)?;
            guest.set_slot(slots, to, &words[..0])
        };
        beside(effort, walk, cycle)
    }
}

/// Walks until told to stop.
fn until(
    stop: &AtomicBool,
    gvas: &[Gva],
    mut walk: impl FnMut(u64) -> Option<u64>,
) -> Result<(), Failure> {
    while !stop.load(Ordering::Relaxed) {
        let found = chained(gvas, &mut walk);
        check_eq("sum of the translations", found, Some(Tables::sum(gvas)))?;
    }
    Ok(())
}

/// Runs cycles of three changes for as long as a sample takes while another thread walks.
/// Nanoseconds a change, and whether the sample was disturbed.
fn beside(
    effort: &Effort,
    walk: impl FnOnce(&AtomicBool) -> Result<(), Failure> + Send,
    cycle: impl Fn() -> Result<(), Failure> + Send,
) -> Result<(f64, bool), Failure> {
    let stop = &AtomicBool::new(false);
    let write = move || {
        let (start, mut changes) = (Instant::now(), 0);
        let mut result = Ok(());
        while result.is_ok() && (changes == 0 || start.elapsed() < effort.sample) {
            result = cycle();
            changes += 3;
        }
        let elapsed = start.elapsed();
        // Also if it failed, so that the walker ends.
        stop.store(true, Ordering::Relaxed);
        result.map(|()| per_operation(elapsed, changes))
    };
    let both = together(vec![Box::new(move || walk(stop).map(|()| 0.0)), Box::new(write)])?;
    Ok((both.values[1], both.disturbed))
}

/// S1.
#[derive(Debug)]
pub struct Slots;

impl Row for Slots {
    fn id(&self) -> &'static str {
        "S1"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["S1.n64", "S1.n509", "S1.n10000", "S1.p999"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        if let Some(outcomes) = needs_two(self.figures()) {
            return Ok(Found { outcomes, ..found });
        }
        let missing = open().err();
        let backings = Backings::new();
        let both = COUNTS.map(|slots| Both::new(slots, &backings, missing.is_none()));
        let both = both.into_iter().collect::<Result<Vec<_>, _>>()?;
        let (tick, tails) = (tick_ns(), &RefCell::new([const { Vec::new() }; 3]));
        let mut variants: Vec<Variant<'_>> = Vec::new();
        for (n, both) in both.iter().enumerate() {
            let run = move |_| {
                let mut latencies = Histogram::new();
                let ns = undisturbed(|| {
                    let (ns, disturbed, sample) = both.engine(effort)?;
                    latencies = sample;
                    Ok((ns, disturbed))
                })?;
                tails.borrow_mut()[n].push(latencies.quantile(0.999) as f64 * tick);
                Ok(ns)
            };
            variants.push((ENGINE[n], Box::new(run)));
            if let Some(guest) = &both.guest {
                let run = move |_| undisturbed(|| both.kernel(effort, guest));
                variants.push((KERNEL[n], Box::new(run)));
            }
        }
        let samples = interleave(effort, variants)?;
        for (n, id) in IDS.into_iter().enumerate() {
            if let Some(reason) = &missing {
                found.outcomes.push(Outcome::Skipped { id, reason: reason.clone() });
                continue;
            }
            let what = [
                "a change among 64 slots over KVM's, beside a walker",
                "the same among 509",
                "the same among 10,000",
            ][n];
            let figure = Figure::cost(id, what, &samples, [ENGINE[n], KERNEL[n]])?;
            found.figure(figure.goal(Goal::AtMost(0.2)).detail("slots", json!(COUNTS[n])));
        }
        let [few, more, many] = tails.take().map(|mut tail: Vec<f64>| tail.split_off(1));
        let tails = Samples::from([(ENGINE[0], few), (ENGINE[1], more), (ENGINE[2], many)]);
        let what = "the walker's p99.9 while one of 509 changes";
        found.figure(Figure::plain(TAIL, what, &tails, ENGINE[1], "ns")?);
        found.plots.push(("S1: a change of the memory map", "ns", samples));
        for both in &both {
            both.vm.mmu().audit().map_err(Failure::in_step("audit"))?;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn both_change_and_are_as_before() {
        let effort = Effort { pairs: 1, sample: Duration::from_millis(1) };
        let backings = Backings::new();
        let both = Both::new(10, &backings, open().is_ok()).unwrap();
        for _ in 0..2 {
            let (ns, _, latencies) = both.engine(&effort).unwrap();
            assert!(ns > 0.0 && latencies.quantile(0.5) > 0);
            if let Some(guest) = &both.guest {
                assert!(both.kernel(&effort, guest).unwrap().0 > 0.0);
            }
        }
        assert!(both.vm.mmu().memory().generation() >= 10 + 8);
    }
}
