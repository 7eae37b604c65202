// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two walkers of one engine beside the same two on an engine each.

use super::walk::{Tables, chained};
use crate::cpu::{Work, allowed, together};
use crate::figure::{Failure, Figure, Found, Goal, Outcome, Row, check_eq};
use crate::measure::{Effort, Variant, calibrate, interleave, per_operation, undisturbed};
use crate::regime::{Regime, Session, Vm, Walker};
use mmu_core::addr::Gva;
use std::cell::RefCell;

/// If this process may use one processor only: what the figures of a row for two are then.
pub fn needs_two(figures: &[&'static str]) -> Option<Vec<Outcome>> {
    let skip = |id: &&'static str| Outcome::Skipped {
        id,
        reason: "two threads at a time need two processors".into(),
    };
    (allowed().len() == 1).then(|| figures.iter().map(skip).collect())
}

/// Two walkers, on one VM or on two.
struct Walkers {
    vms: Vec<Vm>,
    walkers: RefCell<Vec<Walker>>,
    gvas: Vec<Gva>,
    sum: u64,
    passes: u64,
}

impl Walkers {
    fn new(effort: &Effort, regime: Regime, vms: usize) -> Result<Self, Failure> {
        let tables = Tables::new(4);
        let vms = (0..vms)
            .map(|n| {
                // Memory of its own for each engine.
                let memory = if n == 0 {
                    tables.memory.engine(64)
                } else {
                    Tables::new(4).memory.engine(64)
                };
                Ok(Vm::new(memory?, regime))
            })
            .collect::<Result<Vec<_>, Failure>>()?;
        let walkers =
            (0..2).map(|n| Walker::new(&vms[n % vms.len()], tables.root)).collect::<Result<_, _>>();
        let gvas = tables.addresses(512, 1);
        let sum = Tables::sum(&gvas);
        let walkers: Vec<Walker> = walkers?;
        let passes = {
            let mut session = walkers[0].session(&vms[0]);
            calibrate(effort, || pass(&mut session, &gvas, sum))?
        };
        Ok(Self { walkers: RefCell::new(walkers), vms, gvas, sum, passes })
    }

    fn sample(&self) -> Result<(f64, bool), Failure> {
        let mut walkers = self.walkers.borrow_mut();
        let (gvas, sum, passes) = (&self.gvas, self.sum, self.passes);
        let work = walkers.iter_mut().enumerate().map(|(n, walker)| {
            let vm = &self.vms[n % self.vms.len()];
            let run = move || {
                let mut session = walker.session(vm);
                (0..passes).try_for_each(|_| pass(&mut session, gvas, sum))
            };
            Box::new(run) as Work<'_, ()>
        });
        let both = together(work.collect())?;
        let walks = passes * (gvas.len() * both.values.len()) as u64;
        Ok((per_operation(both.elapsed, walks), both.disturbed))
    }
}

fn pass(session: &mut Session<'_>, gvas: &[Gva], sum: u64) -> Result<(), Failure> {
    let found = chained(gvas, |gva| session.walk(gva).ok().map(|walk| walk.gpa.0));
    check_eq("sum of the translations", found, Some(sum))
}

/// W7.
#[derive(Debug)]
pub struct TwoWalkers;

impl Row for TwoWalkers {
    fn id(&self) -> &'static str {
        "W7"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W7", "W7.rwlock", "W7.mutex"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        if let Some(outcomes) = needs_two(self.figures()) {
            return Ok(Found { outcomes, ..Found::default() });
        }
        let (mut found, effort) = (Found::default(), &effort.short());
        let mut setups = vec![("private", Walkers::new(effort, Regime::Rcu, 2)?)];
        for regime in Regime::ALL {
            setups.push((regime.name(), Walkers::new(effort, regime, 1)?));
        }
        let variants = setups.iter().map(|(name, walkers)| -> Variant<'_> {
            (*name, Box::new(|_| undisturbed(|| walkers.sample())))
        });
        let samples = interleave(effort, variants.collect())?;
        let what = "two walkers of one engine";
        found.figure(
            Figure::throughput("W7", what, &samples, ["rcu", "private"])?.goal(Goal::AtLeast(0.97)),
        );
        let what = "the same under rwlock";
        found.figure(Figure::throughput("W7.rwlock", what, &samples, ["rwlock", "private"])?);
        let what = "the same under mutex";
        found.figure(Figure::throughput("W7.mutex", what, &samples, ["mutex", "private"])?);
        found.plots.push(("W7: a walk of one of two walkers", "ns, both together", samples));
        Ok(found)
    }
}
