// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The scheduler: threads run in gusts, and now and then one is becalmed.
//!
//! A race needs one thread to stand still in a window of a few steps, while others do something that
//! takes many. Where the next thread is chosen at each step that hardly ever happens, and where few
//! changes of priority are spread over a whole run (shuttle's PCT) they hardly ever meet the window. So a
//! thread runs on for a while, and where it stops it may stay for as long as others need for whole
//! operations. How long is different in each schedule. In half of them only one thread is becalmed, and
//! wherever it stops: a window of one step is met by one thread that stands still, while the others do
//! not.

use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Mean steps of a gust.
const GUSTS: [u64; 6] = [1, 8, 24, 64, 160, 400];
/// One in so many stops is a calm.
const CALMS: [u64; 3] = [1, 4, 16];
/// Mean steps between two calms, where one thread alone is becalmed.
const BETWEEN: [u64; 4] = [4, 16, 64, 256];
/// Calms of that thread in one schedule: others may work until it comes to its end.
const MOST: u64 = 100;
/// The threads of which that is one: as many as most storms have.
const THREADS: u64 = 4;
/// Mean steps of a calm.
const LENGTHS: [u64; 3] = [1, 300, 1500];

/// Schedules by their seeds, one after the other.
#[derive(Debug)]
pub(crate) struct Gusts<F> {
    /// Whether there is to be a schedule of that seed.
    goes_on: F,
    /// The seed of the present schedule.
    seed: Arc<AtomicU64>,
    next: u64,
    random: Random,
    gust: u64,
    calm: u64,
    length: u64,
    /// The thread that alone is becalmed, if only one is, and the steps between its calms.
    alone: Option<(TaskId, u64)>,
    /// Calms so far.
    calms: u64,
    step: u64,
    /// Threads that are becalmed, and until which step.
    becalmed: BTreeMap<TaskId, u64>,
}

impl<F: FnMut(u64) -> bool> Gusts<F> {
    /// From seed `first` on, for as long as `goes_on` says; `seed` is the present one.
    pub(crate) fn new(first: u64, seed: Arc<AtomicU64>, goes_on: F) -> Self {
        Self {
            goes_on,
            seed,
            next: first,
            random: Random(0),
            gust: 1,
            calm: 1,
            length: 1,
            alone: None,
            calms: 0,
            step: 0,
            becalmed: BTreeMap::new(),
        }
    }
}

impl<F: FnMut(u64) -> bool> Scheduler for Gusts<F> {
    fn new_execution(&mut self) -> Option<Schedule> {
        let seed = self.next;
        if !(self.goes_on)(seed) {
            return None;
        }
        self.seed.store(seed, Ordering::Relaxed);
        self.next += 1;
        self.random = Random(seed);
        self.gust = self.random.one_of(&GUSTS);
        self.calm = self.random.one_of(&CALMS);
        self.length = self.random.one_of(&LENGTHS);
        self.alone = (self.random.below(2) == 0).then(|| {
            // The first task is the one that waits for all.
            let thread = TaskId::from(1 + self.random.below(THREADS) as usize);
            self.length = self.length.max(LENGTHS[1]);
            (thread, self.random.one_of(&BETWEEN))
        });
        (self.step, self.calms) = (0, 0);
        self.becalmed.clear();
        Some(Schedule::new(seed))
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        is_yielding: bool,
    ) -> Option<TaskId> {
        if let [only] = runnable {
            return Some(only.id());
        }
        self.step += 1;
        let current = current.filter(|current| runnable.iter().any(|task| task.id() == *current));
        if let Some(current) = current {
            let (gust, calm) = match self.alone {
                None => (self.gust, self.calm),
                Some((thread, between)) if thread == current && self.calms < MOST => (between, 1),
                Some(_) => (self.gust, u64::MAX),
            };
            if !is_yielding && self.random.below(gust) != 0 {
                return Some(current);
            }
            if self.random.below(calm) == 0 {
                self.calms += 1;
                let steps = self.random.below(2 * self.length);
                self.becalmed.insert(current, self.step + steps);
            }
        }
        self.becalmed.retain(|_, until| *until > self.step);
        // Who waits for others lets them go on, becalmed or not.
        let mut ids: Vec<_> = runnable.iter().map(|task| task.id()).collect();
        if is_yielding {
            ids.retain(|id| Some(*id) != current);
        }
        let awake: Vec<_> =
            ids.iter().copied().filter(|id| !self.becalmed.contains_key(id)).collect();
        let ids = if awake.is_empty() { ids } else { awake };
        Some(self.random.one_of(&ids))
    }

    fn next_u64(&mut self) -> u64 {
        self.random.next()
    }
}

/// SplitMix64.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}
