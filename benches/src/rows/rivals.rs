// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults of several vCPUs at a time: the engine's beside the kernel's own.
//!
//! vCPUs of a guest without an engine run the same program, each on pages and a list of its own, in one
//! address space. As for one vCPU, a fault's cost is what first stores take longer than the same once
//! more: the first by the clock, from when the first thread begins to when the last ends, what is left
//! of the others (entering and leaving the guest, and nothing to wait for) by the processors' time.

use super::fault::LINE;
use super::lanes::{Crowd, Ids, LANES, Sampled, Side, Whats};
use super::lanes::{each, ids, rounds, said, side_by_side};
use super::shares::Shares;
use super::threads::needs_two;
use crate::figure::{Failure, Figure, Found};
use crate::measure::{Effort, per_operation};
use crate::native::{Leaves, Plain, Shape};
use crate::regime::Regime;
use crate::steps::{Spent, steps};
use serde_json::json;
use std::cell::RefCell;
use std::time::Instant;

/// Pages of all vCPUs at least, and of each, a line apart: so many that what enters and leaves the
/// guest does not hide their faults, and so few that other processes seldom get between.
const PAGES: u64 = 512;
const SHARE: u64 = 64;
/// Most rounds: what is not timed takes most of their time.
const ROUNDS: usize = 31;

/// vCPUs of guests without an engine.
struct Kernels {
    vcpus: RefCell<Vec<Plain>>,
    /// Of all of them.
    pages: u64,
}

impl Kernels {
    /// So many guests with so many vCPUs each.
    fn new(guests: usize, vcpus: usize) -> Result<Self, Failure> {
        let pages = PAGES.max(SHARE * (guests * vcpus) as u64);
        let shape = Shape { pages: pages / guests as u64, distance: LINE };
        let guests = (0..guests).map(|_| Plain::several(shape, Leaves::Stay, vcpus));
        let guests = guests.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { vcpus: RefCell::new(guests.into_iter().flatten().collect()), pages })
    }
}

impl Sampled for Kernels {
    fn calibrate(&self, effort: &Effort) -> Result<u64, Failure> {
        let vcpu = &mut self.vcpus.borrow_mut()[0];
        rounds(effort, || {
            vcpu.forget()?;
            let start = Instant::now();
            vcpu.stores()?;
            Ok(start.elapsed())
        })
    }

    /// For each page.
    fn sample(&self, rounds: u64) -> Result<(f64, bool), Failure> {
        let vcpus = &mut self.vcpus.borrow_mut()[..];
        let [_, first, again]: [Spent; 3] =
            steps(vcpus, rounds, |_, vcpu: &mut Plain, step| match step {
                0 => vcpu.forget(),
                _ => vcpu.stores(),
            })?;
        let faults = first.elapsed.saturating_sub(again.busy);
        Ok((per_operation(faults, rounds * self.pages), first.disturbed))
    }

    fn verify(&self) -> Result<(), Failure> {
        self.vcpus.borrow().iter().try_for_each(|vcpu| {
            let pages = vcpu.pages();
            vcpu.verify(pages.end - pages.start)
        })
    }
}

/// The engine's speed over the kernel's.
pub const IDS: &Ids = ids!("F5");
/// How 2, 8 and 32 scale: the engine's over one of its own, the kernel's over one of its own and over
/// as many guests with one each.
pub const SCALE: [[&str; 3]; 3] = [
    ["F5.v2.engine", "F5.v2.kernel", "F5.v2.vms"],
    ["F5.v8.engine", "F5.v8.kernel", "F5.v8.vms"],
    ["F5.v32.engine", "F5.v32.kernel", "F5.v32.vms"],
];
/// Who is measured, by number of vCPUs. The guests are as many, with one each.
const SIDES: [[&str; 5]; 4] = [
    ["rcu 1", "rwlock 1", "mutex 1", "kernel 1", "guests 1"],
    ["rcu 2", "rwlock 2", "mutex 2", "kernel 2", "guests 2"],
    ["rcu 8", "rwlock 8", "mutex 8", "kernel 8", "guests 8"],
    ["rcu 32", "rwlock 32", "mutex 32", "kernel 32", "guests 32"],
];

/// Measures them.
pub fn run(effort: &Effort) -> Result<Found, Failure> {
    let mut found = Found::default();
    let effort = &Effort { pairs: effort.pairs.min(ROUNDS), ..effort.short() };
    let counts = if needs_two(&[]).is_some() { 1 } else { LANES.len() };
    let mut crowds: Vec<(_, _, Box<dyn Sampled>)> = Vec::new();
    for (names, lanes) in SIDES.iter().zip(LANES).take(counts) {
        for (name, regime) in names.iter().zip(Regime::ALL) {
            crowds.push((*name, lanes, Box::new(Shares::one((), regime, lanes)?)));
        }
        crowds.push((names[3], lanes, Box::new(Kernels::new(1, lanes)?)));
        if lanes > 1 {
            crowds.push((names[4], lanes, Box::new(Kernels::new(lanes, 1)?)));
        }
    }
    let sides = crowds.iter().map(|(name, lanes, crowd)| Side::new(effort, name, &**crowd, *lanes));
    let samples = side_by_side(effort, &sides.collect::<Result<Vec<_>, _>>()?)?;
    let what: Whats = each!("the engine's faults over the kernel's");
    let [rcu_1, _, _, kernel_1, _] = SIDES[0];
    for (n, names @ [rcu, _, _, kernel, guests]) in SIDES.iter().enumerate().take(counts) {
        let samples = samples.only(&[&names[..], &[rcu_1, kernel_1]].concat());
        for ((id, name), regime) in IDS[n].iter().zip(names).zip(Regime::ALL) {
            let figure = Figure::throughput(id, said(what[n], regime), &samples, [name, kernel])?;
            found.figure(figure.detail("threads", json!(LANES[n])));
        }
        let Some(ids) = n.checked_sub(1).map(|n| SCALE[n]) else { continue };
        let scale = [
            ("the engine's, over one vCPU's", [*rcu, rcu_1]),
            ("the kernel's, over one vCPU's", [*kernel, kernel_1]),
            ("the kernel's, over as many guests'", [*kernel, *guests]),
        ];
        for (id, (what, ratio)) in ids.into_iter().zip(scale) {
            let figure = Figure::throughput(id, what, &samples, ratio)?;
            found.figure(figure.detail("threads", json!(LANES[n])));
        }
    }
    let skipped = IDS.as_flattened()[3 * counts..].iter().chain(SCALE.as_flattened());
    let skipped: Vec<_> = skipped.copied().collect();
    found.outcomes.extend(needs_two(&skipped).into_iter().flatten());
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::unavailable;

    #[test]
    fn every_vcpu_of_one_guest_or_of_many_stores_to_every_page_of_its_own() {
        if let Some(reason) = unavailable(false) {
            println!("skipped: {reason}");
            return;
        }
        for (guests, vcpus) in [(1, 4), (4, 1)] {
            let kernels = Kernels::new(guests, vcpus).unwrap();
            assert!(kernels.calibrate(&Effort::QUICK).unwrap() > 0);
            let (ns, _) = kernels.sample(2).unwrap();
            assert!(ns > 0.0);
            kernels.verify().unwrap();
            assert_eq!(kernels.vcpus.borrow().len(), 4);
        }
    }
}
