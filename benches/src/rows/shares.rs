// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several vCPUs that share the pages of F1 out, each with tables of its own in one address space.
//!
//! What is timed are faults and nothing else. Leaf entries are dropped before, by all vCPUs' threads
//! at a time, and nobody begins to fault before the last of them is gone.

use super::fault::{Guest, Lane};
use super::lanes::{Crowd, Ids, Sampled, each, ids, measure, rounds};
use crate::cpu::thread_time;
use crate::figure::{Failure, Found};
use crate::measure::{Effort, per_operation};
use crate::regime::Regime;
use crate::steps::{Spent, steps};
use std::cell::RefCell;

/// Pages of all vCPUs: four tables for each of 32.
const PAGES: u64 = 8192;

/// Engines, and vCPUs on them.
pub(super) struct Shares {
    guests: Vec<Guest>,
    lanes: RefCell<Vec<Lane>>,
}

impl Shares {
    fn new(guests: Vec<Guest>, lanes: usize) -> Result<Self, Failure> {
        let share = PAGES / lanes as u64;
        let of_guest = lanes / guests.len();
        let lanes = (0..lanes).map(|n| {
            let first = (n % of_guest) as u64 * share;
            Lane::new(&guests[n / of_guest], first..first + share)
        });
        let lanes = RefCell::new(lanes.collect::<Result<_, _>>()?);
        Ok(Self { guests, lanes })
    }
}

impl Sampled for Shares {
    fn calibrate(&self, effort: &Effort) -> Result<u64, Failure> {
        let lane = &mut self.lanes.borrow_mut()[0];
        rounds(effort, || {
            self.guests[0].forget(&lane.pages)?;
            let start = thread_time();
            lane.pass(&self.guests[0].vm)?;
            Ok(thread_time() - start)
        })
    }

    /// For each fault.
    fn sample(&self, rounds: u64) -> Result<(f64, bool), Failure> {
        let (lanes, guests) = (&mut self.lanes.borrow_mut()[..], &self.guests[..]);
        let of_guest = lanes.len() / guests.len();
        let [_, faults]: [Spent; 2] = steps(lanes, rounds, |n, lane, step| {
            let guest = &guests[n / of_guest];
            match step {
                0 => guest.forget(&lane.pages),
                _ => lane.pass(&guest.vm),
            }
        })?;
        Ok((per_operation(faults.elapsed, rounds * PAGES), faults.disturbed))
    }

    fn verify(&self) -> Result<(), Failure> {
        let lanes = self.lanes.borrow();
        let of_guest = lanes.len() / self.guests.len();
        for (guest, lanes) in self.guests.iter().zip(lanes.chunks(of_guest)) {
            guest.verify(lanes.iter().map(|lane| lane.faults).sum())?;
        }
        Ok(())
    }
}

impl Crowd for Shares {
    type Work = ();

    fn one((): (), regime: Regime, lanes: usize) -> Result<Self, Failure> {
        Self::new(vec![Guest::new(PAGES, 1, regime)?], lanes)
    }

    fn private((): (), lanes: usize) -> Result<Self, Failure> {
        let guest = |_| Guest::new(PAGES / lanes as u64, 1, Regime::Rcu);
        Self::new((0..lanes).map(guest).collect::<Result<_, _>>()?, lanes)
    }
}

/// The figures of these vCPUs.
pub const IDS: &Ids = ids!("F1");

/// Measures them.
pub fn run(effort: &Effort) -> Result<Found, Failure> {
    measure::<Shares>(effort, (), IDS, each!("shadow faults, own ranges"), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_is_counted_and_every_page_there_again() {
        for regime in Regime::ALL {
            for lanes in [2, 32] {
                let crowd = Shares::one((), regime, lanes).unwrap();
                assert!(crowd.calibrate(&Effort::QUICK).unwrap() > 0);
                crowd.sample(2).unwrap();
                crowd.verify().unwrap();
                let faults = crowd.lanes.borrow().iter().map(|lane| lane.faults).sum::<u64>();
                assert!(faults > 2 * PAGES && faults % (PAGES / lanes as u64) == 0, "{faults}");
            }
        }
        let crowd = Shares::private((), 8).unwrap();
        crowd.sample(2).unwrap();
        crowd.verify().unwrap();
    }
}
