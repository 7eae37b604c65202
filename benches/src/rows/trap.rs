// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults of a guest that a processor runs: what the engine's cost beside the kernel's own, with the
//! way through the kernel and without it.

use super::fault::{Faulter, LINE, PAGES};
use super::lanes::after;
use super::rivals;
use crate::figure::{Failure, Figure, Found, Goal, Outcome, Row, check_eq};
use crate::guest::xorshift;
use crate::measure::{Effort, Samples, Variant, interleave, per_operation};
use crate::native::{Leaves, Plain, Served, Shape, unavailable};
use crate::regime::Regime;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::time::Duration;

/// Pages a line apart, so that neither the engine nor the kernel maps two in one fault.
const SPARSE: Shape = Shape { pages: 512, distance: LINE };
/// Pages next to each other that are touched in turn, and those of which one in 64 is touched.
const SEQUENTIAL: u64 = 2048;
const SCATTERED: u64 = 64 * 256;

/// First stores until a sample is full; nanoseconds for each.
fn sample(
    effort: &Effort,
    pages: &[u64],
    mut first_stores: impl FnMut(&[u64]) -> Result<Duration, Failure>,
) -> Result<f64, Failure> {
    let (mut elapsed, mut stores) = (Duration::ZERO, 0);
    while elapsed < effort.sample {
        elapsed += first_stores(pages)?;
        stores += pages.len() as u64;
    }
    Ok(per_operation(elapsed, stores))
}

/// The row's figures, none of which can be had here.
fn skipped(row: &dyn Row, reason: &str) -> Found {
    let skip = |id: &&'static str| Outcome::Skipped { id, reason: reason.to_owned() };
    Found { outcomes: row.figures().iter().map(skip).collect(), plots: Vec::new() }
}

/// Faults of a served guest whose pages are a line apart.
fn served_faults(served: &RefCell<Served>, pages: &[u64]) -> Result<Duration, Failure> {
    let (elapsed, work) = served.borrow_mut().first_stores(pages)?;
    let each = pages.len() as u64;
    check_eq("faults and entries", (work.faults, work.entries), (each, each))?;
    Ok(elapsed)
}

/// F5.
#[derive(Debug)]
pub struct OwnFault;

impl Row for OwnFault {
    fn id(&self) -> &'static str {
        "F5"
    }

    fn figures(&self) -> &'static [&'static str] {
        const FIGURES: [&str; 23] = {
            let [[a, b, c], [d, e, f], [g, h, i]] = rivals::SCALE;
            after(&["F5", "F5.trap", a, b, c, d, e, f, g, h, i], &[rivals::IDS])
        };
        &FIGURES
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        if let Some(reason) = unavailable(true) {
            return Ok(skipped(self, &reason));
        }
        let engine = Faulter::new(PAGES, 1, Regime::Rcu)?;
        let kernel = RefCell::new(Plain::new(SPARSE, Leaves::Stay)?);
        let served = RefCell::new(Served::new(SPARSE)?);
        let all: Vec<_> = (0..SPARSE.pages).collect();
        let kernels = |pages: &[u64]| kernel.borrow_mut().first_stores(pages);
        let variants: Vec<Variant<'_>> = vec![
            ("engine", Box::new(|_| engine.sample(effort))),
            ("kernel", Box::new(|_| sample(effort, &all, kernels))),
            ("trap", Box::new(|_| sample(effort, &all, |pages| served_faults(&served, pages)))),
        ];
        let samples = interleave(effort, variants)?;
        engine.verify()?;
        kernel.borrow().verify(SPARSE.pages)?;
        served.borrow().verify(SPARSE.pages)?;
        let mut found = Found::default();
        let what = "the engine's fault, speed over the kernel's own";
        found.figure(
            Figure::throughput("F5", what, &samples, ["engine", "kernel"])?
                .goal(Goal::AtLeast(4.0))
                .detail("pages", json!(SPARSE.pages)),
        );
        let what = "a real guest's fault by the engine, over the kernel's";
        found.figure(Figure::cost("F5.trap", what, &samples, ["trap", "kernel"])?);
        found.plots.push(("F5: the engine's fault and the kernel's", "ns", samples));
        found.append(rivals::run(effort)?);
        Ok(found)
    }
}

/// F6.
#[derive(Debug)]
pub struct RoundTrip;

impl Row for RoundTrip {
    fn id(&self) -> &'static str {
        "F6"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["F6"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        if let Some(reason) = unavailable(false) {
            return Ok(skipped(self, &reason));
        }
        let store = RefCell::new(Plain::new(SPARSE, Leaves::Stored)?);
        let served = RefCell::new(Served::new(SPARSE)?);
        let all: Vec<_> = (0..SPARSE.pages).collect();
        let stored = |pages: &[u64]| store.borrow_mut().first_stores(pages);
        let variants: Vec<Variant<'_>> = vec![
            ("engine", Box::new(|_| sample(effort, &all, |pages| served_faults(&served, pages)))),
            ("store", Box::new(|_| sample(effort, &all, stored))),
        ];
        let samples = interleave(effort, variants)?;
        store.borrow().verify(SPARSE.pages)?;
        served.borrow().verify(SPARSE.pages)?;
        let mut found = Found::default();
        let what = "a real guest's fault, over one answered by a store";
        found.figure(
            Figure::cost("F6", what, &samples, ["engine", "store"])?
                .goal(Goal::AtMost(1.1))
                .detail("pages", json!(SPARSE.pages)),
        );
        found.plots.push(("F6: a real guest's fault", "ns", samples));
        Ok(found)
    }
}

/// One order of touching pages, by a guest with the engine and by one without.
struct Order {
    engine: RefCell<Served>,
    kernel: RefCell<Plain>,
    /// Entries made in vain for each page touched, pass by pass.
    unused: RefCell<Vec<f64>>,
}

impl Order {
    fn new(pages: u64) -> Result<Self, Failure> {
        let shape = Shape { pages, distance: 1 };
        let engine = RefCell::new(Served::new(shape)?);
        let kernel = RefCell::new(Plain::new(shape, Leaves::Stay)?);
        Ok(Self { engine, kernel, unused: RefCell::default() })
    }

    fn by_engine(&self, pages: &[u64]) -> Result<Duration, Failure> {
        let (elapsed, work) = self.engine.borrow_mut().first_stores(pages)?;
        let touched = pages.len() as u64;
        // A page that was touched has an entry now, and had none before.
        let unused = work
            .entries
            .checked_sub(touched)
            .ok_or_else(|| Failure::new(format!("{} entries for {touched} pages", work.entries)))?;
        self.unused.borrow_mut().push(unused as f64 / touched as f64);
        Ok(elapsed)
    }

    fn by_kernel(&self, pages: &[u64]) -> Result<Duration, Failure> {
        self.kernel.borrow_mut().first_stores(pages)
    }

    fn verify(&self, touched: u64) -> Result<(), Failure> {
        self.engine.borrow().verify(touched)?;
        self.kernel.borrow().verify(touched)
    }

    fn unused(&self, id: &'static str) -> Result<Figure, Failure> {
        let unused = Samples::from([("unused", self.unused.take())]);
        let what = "pages mapped and not used, for each used";
        Ok(Figure::plain(id, what, &unused, "unused", "ratio")?.goal(Goal::AtMost(8.0)))
    }
}

/// One page of 64, in no order and none twice; others each time.
fn scattered(pages: u64, seed: &Cell<u64>) -> Vec<u64> {
    let mut left: Vec<_> = (0..pages).collect();
    let pick = |_| {
        seed.set(xorshift(seed.get()));
        left.swap_remove((seed.get() % left.len() as u64) as usize)
    };
    (0..pages / 64).map(pick).collect()
}

/// F7.
#[derive(Debug)]
pub struct MapAround;

impl Row for MapAround {
    fn id(&self) -> &'static str {
        "F7"
    }

    fn figures(&self) -> &'static [&'static str] {
        &[
            "F7.sequential",
            "F7.sequential.fault",
            "F7.sequential.unused",
            "F7.random",
            "F7.random.fault",
            "F7.random.unused",
        ]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        if let Some(reason) = unavailable(true) {
            return Ok(skipped(self, &reason));
        }
        let (run, random) = (Order::new(SEQUENTIAL)?, Order::new(SCATTERED)?);
        let fault = RefCell::new(Plain::new(SPARSE, Leaves::Stay)?);
        let all: Vec<_> = (0..SEQUENTIAL).collect();
        let sparse: Vec<_> = (0..SPARSE.pages).collect();
        // Both guests touch the same pages.
        let seeds = [Cell::new(1), Cell::new(1)];
        let some = |which: usize| scattered(SCATTERED, &seeds[which]);
        let of_fault = |pages: &[u64]| fault.borrow_mut().first_stores(pages);
        let variants: Vec<Variant<'_>> = vec![
            ("run", Box::new(|_| sample(effort, &all, |pages| run.by_engine(pages)))),
            ("run.kernel", Box::new(|_| sample(effort, &all, |pages| run.by_kernel(pages)))),
            ("random", Box::new(|_| sample(effort, &some(0), |pages| random.by_engine(pages)))),
            (
                "random.kernel",
                Box::new(|_| sample(effort, &some(1), |pages| random.by_kernel(pages))),
            ),
            ("fault", Box::new(|_| sample(effort, &sparse, of_fault))),
        ];
        let samples = interleave(effort, variants)?;
        run.verify(SEQUENTIAL)?;
        random.verify(SCATTERED / 64)?;
        fault.borrow().verify(SPARSE.pages)?;
        let mut found = Found::default();
        let what = "page after page, over the same without an engine";
        found.figure(
            Figure::cost("F7.sequential", what, &samples, ["run", "run.kernel"])?
                .goal(Goal::AtMost(1.0))
                .detail("pages", json!(SEQUENTIAL)),
        );
        let what = "the same, over a fault of the kernel's for one page";
        found.figure(Figure::cost("F7.sequential.fault", what, &samples, ["run", "fault"])?);
        found.figure(run.unused("F7.sequential.unused")?);
        let what = "one page of 64 at random, over the same without";
        found.figure(
            Figure::cost("F7.random", what, &samples, ["random", "random.kernel"])?
                .goal(Goal::AtMost(10.0))
                .detail("pages", json!(SCATTERED)),
        );
        let what = "the same, over a fault of the kernel's for one page";
        found.figure(Figure::cost("F7.random.fault", what, &samples, ["random", "fault"])?);
        found.figure(random.unused("F7.random.unused")?);
        found.plots.push(("F7: a page touched, with map-around", "ns", samples));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn scattered_pages_are_distinct_and_change() {
        let seed = Cell::new(1);
        let lists = [scattered(SCATTERED, &seed), scattered(SCATTERED, &seed)];
        assert_ne!(lists[0], lists[1]);
        for list in lists {
            assert_eq!(list.len() as u64, SCATTERED / 64);
            let distinct: BTreeSet<_> = list.iter().collect();
            assert_eq!(distinct.len(), list.len());
            assert!(list.iter().all(|page| *page < SCATTERED));
        }
    }
}
