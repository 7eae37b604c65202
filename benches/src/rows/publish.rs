// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A walker beside a writer who changes the memory map without pause.

use super::walk::{Tables, chained};
use crate::cpu::{tick_ns, ticks, together};
use crate::figure::{Failure, Figure, Found, Goal, Row};
use crate::measure::{Effort, Variant, interleave, per_operation, undisturbed};
use crate::regime::{Regime, Session, Vm, Walker};
use crate::stats::{Histogram, median};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig, SlotId};
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Where the slot comes and goes.
const BASE: Gpa = Gpa(1 << 40);

/// Two engines under one regime: the walker's, and one that changes elsewhere.
struct Pair {
    regime: Regime,
    /// Each walk pins by itself.
    pin: bool,
    own: Vm,
    other: Vm,
    walker: RefCell<Walker>,
    gvas: Vec<Gva>,
    /// Changes of the walker's engine while it walked, and the time of that.
    changes: Cell<u64>,
    seconds: Cell<f64>,
}

impl Pair {
    fn new(regime: Regime, pin: bool) -> Result<Self, Failure> {
        let tables = Tables::new(4);
        let own = Vm::new(tables.memory.engine(64)?, regime);
        let other = Vm::new(Tables::new(4).memory.engine(64)?, regime);
        let walker = RefCell::new(Walker::new(&own, tables.root)?);
        let gvas = tables.addresses(512, 1);
        let (changes, seconds) = (Cell::new(0), Cell::new(0.0));
        Ok(Self { regime, pin, own, other, walker, gvas, changes, seconds })
    }

    /// One sample with the writer on an engine: `each` is called for every walk and makes it.
    /// Returns nanoseconds a walk, and whether the sample was disturbed.
    fn sample(
        &self,
        effort: &Effort,
        written: &Vm,
        mut each: impl FnMut(&mut Session<'_>, u64) -> Option<u64> + Send,
    ) -> Result<(f64, bool), Failure> {
        let stop = &AtomicBool::new(false);
        let gvas = &self.gvas;
        let expected = Tables::sum(gvas);
        let mut walker = self.walker.borrow_mut();
        let (walker, own, pin) = (&mut *walker, &self.own, self.pin);
        let walk = move || {
            let session = &mut if pin { walker.single(own) } else { walker.session(own) };
            let start = Instant::now();
            let mut walks = 0;
            loop {
                let mut done = 0u64;
                let sum = chained(gvas, |gva| {
                    if stop.load(Ordering::Relaxed) && walks + done > 0 {
                        return None;
                    }
                    done += 1;
                    each(session, gva)
                });
                walks += done;
                match sum {
                    Some(sum) if sum == expected => {}
                    None if stop.load(Ordering::Relaxed) => break,
                    _ => return Err(Failure::new(format!("wrong translations: {sum:?}"))),
                }
            }
            Ok((per_operation(start.elapsed(), walks), 0))
        };
        let write = move || {
            let result = publish(effort, written);
            // Also if it failed, so that the walker ends.
            stop.store(true, Ordering::Relaxed);
            result.map(|changes| (0.0, changes))
        };
        let both = together(vec![Box::new(walk), Box::new(write)])?;
        if core::ptr::eq(own, written) {
            self.changes.set(self.changes.get() + both.values[1].1);
            self.seconds.set(self.seconds.get() + both.elapsed.as_secs_f64());
        }
        Ok((both.values[0].0, both.disturbed))
    }

    fn throughput(&self, effort: &Effort, written: &Vm) -> Result<f64, Failure> {
        let walk = |session: &mut Session<'_>, gva| session.walk(gva).ok().map(|w| w.gpa.0);
        undisturbed(|| self.sample(effort, written, walk))
    }

    /// Times every walk; the latency that 999 of 1000 do not exceed.
    fn latency(
        &self,
        effort: &Effort,
        written: &Vm,
        tick: f64,
        share: f64,
    ) -> Result<f64, Failure> {
        let mut latencies = Histogram::new();
        let record = &mut latencies;
        self.sample(effort, written, move |session, gva| {
            let start = ticks();
            let walk = session.walk(gva);
            record.add(ticks().wrapping_sub(start));
            walk.ok().map(|w| w.gpa.0)
        })?;
        Ok(latencies.quantile(share) as f64 * tick)
    }
}

/// Creates and deletes a slot until the sample's time is over; returns the number of changes.
fn publish(effort: &Effort, vm: &Vm) -> Result<u64, Failure> {
    let backing = Arc::new(AllocatedMemory::new(1 << 20));
    let start = Instant::now();
    let mut changes = 0;
    while start.elapsed() < effort.sample {
        let slot = SlotConfig::new(1, BASE, backing.clone());
        vm.change(|mmu| mmu.create_slot(slot)).map_err(Failure::in_step("create"))?;
        vm.change(|mmu| mmu.delete_slot(SlotId(1))).map_err(Failure::in_step("delete"))?;
        changes += 2;
    }
    Ok(changes)
}

/// W6.
#[derive(Debug)]
pub struct BesideWriter;

const SAME: [&str; 4] = ["rcu", "rwlock", "mutex", "pin"];
const OTHER: [&str; 4] = ["rcu, other", "rwlock, other", "mutex, other", "pin, other"];

impl Row for BesideWriter {
    fn id(&self) -> &'static str {
        "W6"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W6.engine", "W6.rwlock", "W6.mutex", "W6.pin", "W6.p999"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let (mut found, effort) = (Found::default(), &effort.short());
        if let Some(outcomes) = crate::rows::threads::needs_two(self.figures()) {
            return Ok(Found { outcomes, ..found });
        }
        let ways = Regime::ALL.map(|regime| (regime, false));
        let ways = ways.into_iter().chain([(Regime::Rcu, true)]);
        let pairs = ways.map(|(regime, pin)| Pair::new(regime, pin));
        let pairs = pairs.collect::<Result<Vec<_>, _>>()?;
        let mut variants: Vec<Variant<'_>> = Vec::new();
        for (n, pair) in pairs.iter().enumerate() {
            let on = |vm| move |_: usize| pair.throughput(effort, vm);
            variants.push((SAME[n], Box::new(on(&pair.own))));
            variants.push((OTHER[n], Box::new(on(&pair.other))));
        }
        let samples = interleave(effort, variants)?;
        for (n, (id, what, goal)) in [
            ("W6.engine", "walker while a writer publishes", Some(Goal::AtLeast(0.9))),
            ("W6.rwlock", "the same under rwlock", None),
            ("W6.mutex", "the same under mutex", None),
            ("W6.pin", "the same with a pin for each walk", None),
        ]
        .into_iter()
        .enumerate()
        {
            let figure = Figure::throughput(id, what, &samples, [SAME[n], OTHER[n]])?;
            let rate = pairs[n].changes.get() as f64 / pairs[n].seconds.get();
            let figure = figure.detail("changes_per_second", json!(rate));
            found.figure(goal.map_or(figure.clone(), |goal| figure.goal(goal)));
        }
        found.plots.push(("W6: a walk while a writer publishes", "ns", samples));
        self.tail(effort, &pairs[..3], &mut found)?;
        for pair in &pairs {
            let audit = pair.own.mmu().audit();
            audit.map_err(Failure::in_step(pair.regime.name()))?;
        }
        Ok(found)
    }
}

impl BesideWriter {
    fn tail(&self, effort: &Effort, pairs: &[Pair], found: &mut Found) -> Result<(), Failure> {
        let tick = tick_ns();
        let mut variants: Vec<Variant<'_>> = vec![(
            OTHER[0],
            Box::new(move |_| pairs[0].latency(effort, &pairs[0].other, tick, 0.999)),
        )];
        for (n, pair) in pairs.iter().enumerate() {
            let run = move |_| pair.latency(effort, &pair.own, tick, 0.999);
            variants.push((SAME[n], Box::new(run)));
        }
        let samples = interleave(effort, variants)?;
        let what = "a walk's p99.9 while a writer publishes";
        let figure = Figure::plain("W6.p999", what, &samples, SAME[0], "ns")?;
        let halves = interleave(
            effort,
            vec![("p50", Box::new(move |_| pairs[0].latency(effort, &pairs[0].own, tick, 0.5)))],
        )?;
        found.figure(figure.detail("p50", json!(median(halves.of("p50")?))));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_map_changes_while_the_walker_walks() {
        let effort = Effort { pairs: 2, sample: Duration::from_millis(2) };
        for regime in Regime::ALL {
            let pair = Pair::new(regime, false).unwrap();
            let run = |_| pair.throughput(&effort, &pair.own);
            let samples = interleave(&effort, vec![("x", Box::new(run))]).unwrap();
            assert!(samples.of("x").unwrap().iter().all(|ns| *ns > 0.0));
            assert!(pair.changes.get() > 0 && pair.own.mmu().memory().generation() > 2);
            assert_eq!(pair.other.mmu().memory().generation(), 1);
        }
    }
}
