// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of the memory map beside the kernel's, each while a reader of it walks.

use super::kvm::{Guest, open};
use super::size;
use super::threads::needs_two;
use super::walk::{ADDRESSES, SMALL, Tables, chained};
use crate::cpu::{tick_ns, ticks, together};
use crate::figure::{Failure, Figure, Found, Goal, Outcome, Row, check_eq};
use crate::guest::PAGE;
use crate::measure::{Effort, Samples, Variant, interleave, per_operation, undisturbed};
use crate::regime::{Regime, Vm, Walker};
use crate::stats::Histogram;
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, DirtyMode, SlotConfig, SlotFlags, SlotId};
use serde_json::json;
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Where the slots lie that nobody changes, two pages apart.
const OTHERS: u64 = 1 << 34;
/// Numbers of slots, that of the walker's tables included and that which changes left out.
const COUNTS: [u32; 3] = [64, 509, 10_000];
const ENGINE: [&str; 3] = ["64", "509", "10000"];
const KERNEL: [&str; 3] = ["64, KVM", "509, KVM", "10000, KVM"];
const IDS: [&str; 3] = ["S1.n64", "S1.n509", "S1.n10000"];
/// Single kinds of changes, among [`COUNTS`]`[1]` slots.
const SINGLE: [(&str, &str, [&str; 2], Change); 2] = [
    ("S1.move", "a move among 509 slots over KVM's", ["move", "move, KVM"], Change::Move),
    ("S1.flags", "dirty log on or off, over KVM's", ["flags", "flags, KVM"], Change::Flags),
];
const TAIL: &str = "S1.p999";
const FIGURES: [&str; 10] = {
    let ([few, more, many], [a, b, c, d]) = (IDS, size::IDS);
    [few, more, many, TAIL, SINGLE[0].0, SINGLE[1].0, a, b, c, d]
};

/// What is done again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// A slot is created, moved, deleted.
    All,
    /// The last of the slots that stay is moved, there and back.
    Move,
    /// Its dirty log is switched on and off.
    Flags,
}

impl Change {
    /// How many changes it is.
    fn count(self) -> u64 {
        match self {
            Self::All => 3,
            Self::Move | Self::Flags => 2,
        }
    }
}

/// An engine and a virtual machine of the kernel's with the same slots.
struct Both<'m> {
    slots: u32,
    vm: Vm,
    walker: RefCell<Walker>,
    guest: Option<Guest<'m>>,
    gvas: Vec<Gva>,
    page: Arc<AllocatedMemory>,
    backings: &'m Backings,
}

/// What backs the slots of both.
struct Backings {
    tables: Tables,
    others: AllocatedMemory,
}

impl Backings {
    fn new() -> Self {
        let others = AllocatedMemory::new(u64::from(COUNTS[2] + 1) * PAGE);
        Self { tables: Tables::new(SMALL), others }
    }

    /// The kernel's memory of a slot.
    fn words(&self, slot: u32) -> &[AtomicU64] {
        &self.others.words()[slot as usize * 512..(slot as usize + 1) * 512]
    }
}

/// Address of one of the slots that stay; beyond them is where the other comes, moves and goes.
fn place(slot: u32) -> u64 {
    OTHERS + u64::from(slot) * 2 * PAGE
}

impl<'m> Both<'m> {
    fn new(slots: u32, backings: &'m Backings, kernel: bool) -> Result<Self, Failure> {
        let tables = &backings.tables;
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
                guest.set_slot(slot, place(slot), backings.words(slot))?;
            }
        }
        let vm = Vm::new(mmu, Regime::Rcu);
        let walker = RefCell::new(Walker::new(&vm, tables.root)?);
        let gvas = tables.addresses(ADDRESSES, 1);
        let own = Arc::new(AllocatedMemory::new(PAGE));
        Ok(Self { slots, vm, walker, guest, gvas, page: own, backings })
    }

    /// The engine's: nanoseconds a change, and the walker's latencies.
    fn engine(&self, effort: &Effort, change: Change) -> Result<(f64, bool, Histogram), Failure> {
        let mut walker = self.walker.borrow_mut();
        let (walker, vm, gvas) = (&mut *walker, &self.vm, &self.gvas[..]);
        let (mmu, slots, page) = (vm.mmu(), self.slots, &self.page);
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
        let (new, last) = (SlotId(slots), SlotId(slots - 1));
        let moved = |slot, at| mmu.move_slot(slot, Gpa(at)).map_err(Failure::in_step("move"));
        let log = |dirty| {
            let flags = SlotFlags { dirty, ..SlotFlags::default() };
            mmu.set_slot_flags(last, flags).map_err(Failure::in_step("flags"))
        };
        let away = place(slots + 8);
        let cycle = || match change {
            Change::All => {
                let config = SlotConfig::new(new.0, Gpa(place(slots)), page.clone());
                mmu.create_slot(config).map_err(Failure::in_step("create"))?;
                moved(new, away)?;
                mmu.delete_slot(new).map(drop).map_err(Failure::in_step("delete"))
            }
            Change::Move => moved(last, away).and_then(|()| moved(last, place(last.0))),
            Change::Flags => log(DirtyMode::WriteProtect).and_then(|()| log(DirtyMode::Off)),
        };
        let (ns, disturbed) = beside(effort, walk, change, cycle)?;
        let map = mmu.memory();
        check_eq("slots", map.slots().len(), slots as usize)?;
        let last = map.by_id(last).map(|slot| (slot.base().gpa().0, slot.logs_dirty()));
        check_eq("the last slot", last, Some((place(slots - 1), false)))?;
        Ok((ns, disturbed, latencies))
    }

    /// The kernel's.
    fn kernel(
        &self,
        effort: &Effort,
        guest: &Guest<'m>,
        change: Change,
    ) -> Result<(f64, bool), Failure> {
        let (gvas, new, last) = (&self.gvas[..], self.slots, self.slots - 1);
        let walk = move |stop: &AtomicBool| until(stop, gvas, |gva| guest.walk(gva));
        let (to_new, to_last) = (self.backings.words(new), self.backings.words(last));
        let away = place(new + 8);
        let cycle = || match change {
            Change::All => {
                guest.set_slot(new, place(new), to_new)?;
                guest.set_slot(new, away, to_new)?;
                guest.set_slot(new, away, &to_new[..0])
            }
            Change::Move => {
                guest.set_slot(last, away, to_last)?;
                guest.set_slot(last, place(last), to_last)
            }
            Change::Flags => {
                guest.set_slot_with(last, place(last), to_last, KVM_MEM_LOG_DIRTY_PAGES)?;
                guest.set_slot(last, place(last), to_last)
            }
        };
        beside(effort, walk, change, cycle)
    }
}

/// Walks until told to stop, at least one pass.
fn until(
    stop: &AtomicBool,
    gvas: &[Gva],
    mut walk: impl FnMut(u64) -> Option<u64>,
) -> Result<(), Failure> {
    loop {
        let found = chained(gvas, &mut walk);
        check_eq("sum of the translations", found, Some(Tables::sum(gvas)))?;
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
}

/// Runs cycles of changes for as long as a sample takes while another thread walks.
/// Nanoseconds a change, and whether the sample was disturbed.
fn beside(
    effort: &Effort,
    walk: impl FnOnce(&AtomicBool) -> Result<(), Failure> + Send,
    change: Change,
    cycle: impl Fn() -> Result<(), Failure> + Send,
) -> Result<(f64, bool), Failure> {
    let stop = &AtomicBool::new(false);
    let write = move || {
        let (start, mut changes) = (Instant::now(), 0);
        let mut result = Ok(());
        while result.is_ok() && (changes == 0 || start.elapsed() < effort.sample) {
            result = cycle();
            changes += change.count();
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
        &FIGURES
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
                    let (ns, disturbed, sample) = both.engine(effort, Change::All)?;
                    latencies = sample;
                    Ok((ns, disturbed))
                })?;
                tails.borrow_mut()[n].push(latencies.quantile(0.999) as f64 * tick);
                Ok(ns)
            };
            variants.push((ENGINE[n], Box::new(run)));
            if let Some(guest) = &both.guest {
                let run = move |_| undisturbed(|| both.kernel(effort, guest, Change::All));
                variants.push((KERNEL[n], Box::new(run)));
            }
        }
        let single = &both[1];
        for (.., [engine, kernel], change) in SINGLE {
            let run = move |_| {
                undisturbed(|| single.engine(effort, change).map(|(ns, taken, _)| (ns, taken)))
            };
            variants.push((engine, Box::new(run)));
            if let Some(guest) = &single.guest {
                // Taken once: on a busy machine a change takes the kernel milliseconds anyway.
                let run = move |_| Ok(single.kernel(effort, guest, change)?.0);
                variants.push((kernel, Box::new(run)));
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
        for (id, what, names, _) in SINGLE {
            found.outcomes.push(match &missing {
                Some(reason) => Outcome::Skipped { id, reason: reason.clone() },
                None => Outcome::Figure(Box::new(Figure::cost(id, what, &samples, names)?)),
            });
        }
        let [few, more, many] = tails.take().map(|mut tail: Vec<f64>| tail.split_off(1));
        let tails = Samples::from([(ENGINE[0], few), (ENGINE[1], more), (ENGINE[2], many)]);
        let what = "the walker's p99.9 while one of 509 changes";
        found.figure(Figure::plain(TAIL, what, &tails, ENGINE[1], "ns")?);
        found.plots.push(("S1: a change of the memory map", "ns", samples));
        size::measure(effort, &mut found)?;
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
        for change in [Change::All, Change::Move, Change::Flags] {
            let before = both.vm.mmu().memory().generation();
            let (ns, _, latencies) = both.engine(&effort, change).unwrap();
            assert!(ns > 0.0 && latencies.quantile(0.5) > 0);
            assert!(both.vm.mmu().memory().generation() >= before + change.count(), "{change:?}");
            if let Some(guest) = &both.guest {
                assert!(both.kernel(&effort, guest, change).unwrap().0 > 0.0);
            }
        }
    }
}
