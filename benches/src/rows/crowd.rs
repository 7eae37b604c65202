// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! More walkers than processors, beside a writer who changes the memory map.

use super::threads::needs_two;
use super::walk::Tables;
use crate::chase;
use crate::cpu::{Work, thread_time, together};
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::measure::{Effort, Samples, Variant, interleave};
use crate::regime::{Regime, Session, Vm, Walker};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig, SlotId};
use serde_json::json;
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Where the slot comes and goes.
const BASE: Gpa = Gpa(1 << 40);
/// How long the writer rests after each change. A writer without pause would have a share of the
/// processors that depends on how many walkers there are, and that share would be in the figure.
const PAUSE: Duration = Duration::from_micros(100);
/// A sample is so many of others: each of the threads must have its turn more than once.
const TIMES: u32 = 10;
const COUNTS: [usize; 3] = [2, 8, 32];

/// What a walker did, or the writer.
#[derive(Clone, Copy, Debug)]
enum Did {
    Walks { start: Instant, end: Instant, cpu: Duration, walks: u64 },
    Changes(u64),
    Nothing,
}

/// What one sample found.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Nanoseconds a walk, all walkers together.
    wall: f64,
    /// The same in time that walkers ran.
    cpu: f64,
    changes_per_second: f64,
}

/// Walkers of one engine.
struct Crowd {
    vm: Vm,
    walkers: RefCell<Vec<Walker>>,
    gvas: Vec<Gva>,
}

impl Crowd {
    fn new(regime: Regime) -> Result<Self, Failure> {
        let tables = Tables::new(4);
        let vm = Vm::new(tables.memory.engine(1024)?, regime);
        let walkers = (0..32).map(|_| Walker::new(&vm, tables.root)).collect::<Result<_, _>>()?;
        Ok(Self { vm, walkers: RefCell::new(walkers), gvas: tables.addresses(512, 1) })
    }

    fn sample(&self, walkers: usize, length: Duration) -> Result<Sample, Failure> {
        let (stop, vm, gvas) = (&AtomicBool::new(false), &self.vm, &self.gvas[..]);
        let mut crowd = self.walkers.borrow_mut();
        let mut work: Vec<Work<'_, Did>> = Vec::new();
        for walker in crowd.iter_mut().take(walkers) {
            work.push(Box::new(move || walk(walker.session(vm), gvas, stop)));
        }
        work.push(Box::new(move || write(vm, stop)));
        work.push(Box::new(move || {
            std::thread::sleep(length);
            stop.store(true, Ordering::Relaxed);
            Ok(Did::Nothing)
        }));
        let did = together(work)?.values;
        let (mut span, mut cpu, mut walks, mut changes) = (None, Duration::ZERO, 0, 0);
        for did in did {
            match did {
                Did::Walks { start, end, cpu: own, walks: made } => {
                    let (first, last) = span.unwrap_or((start, end));
                    span = Some((first.min(start), last.max(end)));
                    cpu += own;
                    walks += made;
                }
                Did::Changes(made) => changes += made,
                Did::Nothing => {}
            }
        }
        let (first, last) = span.ok_or_else(|| Failure::new("nobody walked"))?;
        let wall = last - first;
        Ok(Sample {
            wall: wall.as_nanos() as f64 / walks as f64,
            cpu: cpu.as_nanos() as f64 / walks as f64,
            changes_per_second: changes as f64 / wall.as_secs_f64(),
        })
    }
}

/// Walks until told to stop, at least once.
fn walk(mut session: Session<'_>, gvas: &[Gva], stop: &AtomicBool) -> Result<Did, Failure> {
    let (start, before) = (Instant::now(), thread_time());
    let (mut walks, mut last) = (0u64, 0);
    let mut stopped = false;
    while !stopped {
        let (mut sum, mut done) = (0u64, 0);
        for gva in gvas {
            let walk = session.walk(chase::chained(gva.0, last));
            last = walk.map_err(|fault| Failure::new(format!("{gva}: {fault}")))?.gpa.0;
            sum = sum.wrapping_add(last);
            done += 1;
            // Under a lock, the rest of a pass could take long.
            stopped = stop.load(Ordering::Relaxed);
            if stopped {
                break;
            }
        }
        check_eq("sum of the translations", sum, Tables::sum(&gvas[..done]))?;
        walks += done as u64;
    }
    Ok(Did::Walks { start, end: Instant::now(), cpu: thread_time() - before, walks })
}

/// Creates and deletes a slot, with pauses, until told to stop; at least once.
fn write(vm: &Vm, stop: &AtomicBool) -> Result<Did, Failure> {
    let backing = Arc::new(AllocatedMemory::new(1 << 20));
    let mut changes = 0;
    while changes == 0 || !stop.load(Ordering::Relaxed) {
        let slot = SlotConfig::new(1, BASE, backing.clone());
        vm.change(|mmu| mmu.create_slot(slot)).map_err(Failure::in_step("create"))?;
        std::thread::sleep(PAUSE);
        vm.change(|mmu| mmu.delete_slot(SlotId(1))).map_err(Failure::in_step("delete"))?;
        std::thread::sleep(PAUSE);
        changes += 2;
    }
    Ok(Did::Changes(changes))
}

/// W9.
#[derive(Debug)]
pub struct Crowded;

const NAMES: [[&str; 3]; 3] = [
    ["rcu 2", "rcu 8", "rcu 32"],
    ["rwlock 2", "rwlock 8", "rwlock 32"],
    ["mutex 2", "mutex 8", "mutex 32"],
];

impl Row for Crowded {
    fn id(&self) -> &'static str {
        "W9"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W9", "W9.v8", "W9.rwlock", "W9.mutex", "W9.cpu"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        if let Some(outcomes) = needs_two(self.figures()) {
            return Ok(Found { outcomes, ..found });
        }
        let length = effort.sample * TIMES;
        let crowds = Regime::ALL.map(Crowd::new).into_iter().collect::<Result<Vec<_>, _>>()?;
        // By regime, number of walkers and round; the first round does not count.
        let all: RefCell<[[Vec<Sample>; 3]; 3]> = RefCell::default();
        let mut variants: Vec<Variant<'_>> = Vec::new();
        for (n, crowd) in crowds.iter().enumerate() {
            for (m, walkers) in COUNTS.into_iter().enumerate() {
                let all = &all;
                let run = move |_| {
                    let sample = crowd.sample(walkers, length)?;
                    all.borrow_mut()[n][m].push(sample);
                    Ok(sample.wall)
                };
                variants.push((NAMES[n][m], Box::new(run)));
            }
        }
        let samples = interleave(effort, variants)?;
        let all = all.into_inner();
        let of = |n: usize, m: usize, what: fn(&Sample) -> f64| -> Vec<f64> {
            all[n][m][1..].iter().map(what).collect()
        };
        let rate = |n, m| crate::stats::median(&of(n, m, |sample| sample.changes_per_second));
        for (id, what, n, m) in [
            ("W9", "32 walkers and a writer, throughput over 2", 0, 2),
            ("W9.v8", "8 walkers and a writer, over 2", 0, 1),
            ("W9.rwlock", "32 over 2 under rwlock", 1, 2),
            ("W9.mutex", "32 over 2 under mutex", 2, 2),
        ] {
            let figure = Figure::throughput(id, what, &samples, [NAMES[n][m], NAMES[n][0]])?
                .detail("changes_per_second", json!([rate(n, m), rate(n, 0)]));
            let goal = (id == "W9").then_some(Goal::AtLeast(0.9));
            found.figure(goal.map_or(figure.clone(), |goal| figure.goal(goal)));
        }
        let own = Samples::from([
            (NAMES[0][0], of(0, 0, |sample| sample.cpu)),
            (NAMES[0][2], of(0, 2, |sample| sample.cpu)),
        ]);
        let what = "32 over 2, by the time that walkers ran";
        found.figure(Figure::throughput("W9.cpu", what, &own, [NAMES[0][2], NAMES[0][0]])?);
        for (crowd, regime) in crowds.iter().zip(Regime::ALL) {
            let audit = crowd.vm.mmu().audit();
            audit.map_err(Failure::in_step(regime.name()))?;
        }
        found.plots.push(("W9: a walk of one of many walkers", "ns, all together", samples));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_gets_on() {
        for regime in Regime::ALL {
            let crowd = Crowd::new(regime).unwrap();
            for walkers in COUNTS {
                let sample = crowd.sample(walkers, Duration::from_millis(5)).unwrap();
                assert!(sample.wall > 0.0 && sample.cpu > 0.0, "{regime:?} {sample:?}");
                assert!(sample.changes_per_second > 0.0);
            }
            assert!(crowd.vm.mmu().memory().generation() > 6);
        }
    }
}
