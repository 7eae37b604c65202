// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads that do one step after the other, each of which all begin together: so that what is
//! timed of one is not done beside what is not timed of another.

use crate::cpu::{Work, allowed, preemptions, thread_time, together};
use crate::figure::Failure;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What a step took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// From the first start to the last end, in all rounds.
    pub elapsed: Duration,
    /// How long the processor that had most to do ran its threads.
    pub busy: Duration,
    /// Whether something else took a processor away from a thread meanwhile.
    pub disturbed: bool,
}

/// What one thread knows of one step.
struct Did {
    start: Instant,
    end: Instant,
    ran: Duration,
    preempted: bool,
}

/// Where threads wait for each other.
struct Meeting {
    threads: usize,
    asleep: Barrier,
    awake: AtomicUsize,
}

impl Meeting {
    fn new(threads: usize) -> Self {
        Self { threads, asleep: Barrier::new(threads), awake: AtomicUsize::new(0) }
    }

    fn wait(&self) {
        // Who is done sleeps, and leaves the processor to who is not.
        self.asleep.wait();
        // Who is woken first waits for the last.
        let all = (self.awake.fetch_add(1, Ordering::AcqRel) / self.threads + 1) * self.threads;
        while self.awake.load(Ordering::Acquire) < all {
            std::thread::yield_now();
        }
    }
}

/// Runs `N` steps, for so many rounds, on a thread for each lane.
///
/// # Errors
///
/// The first failure of a thread.
pub fn steps<L: Send, const N: usize>(
    lanes: &mut [L],
    rounds: u64,
    step: impl Fn(usize, &mut L, usize) -> Result<(), Failure> + Sync,
) -> Result<[Spent; N], Failure> {
    let (meeting, step) = (&Meeting::new(lanes.len()), &step);
    let work = lanes.iter_mut().enumerate().map(|(n, lane)| {
        let run = move || {
            let (mut result, mut did) = (Ok(()), Vec::new());
            for at in (0..rounds).flat_map(|_| 0..N) {
                meeting.wait();
                let (before, ran, start) = (preemptions(), thread_time(), Instant::now());
                // Who has failed still comes to the meetings: the others wait for it.
                result = result.and_then(|()| step(n, lane, at));
                let end = Instant::now();
                let ran = thread_time().saturating_sub(ran);
                did.push(Did { start, end, ran, preempted: preemptions() != before });
            }
            result.map(|()| did)
        };
        Box::new(run) as Work<'_, Vec<Did>>
    });
    let all = together(work.collect())?.values;
    let (mut spent, processors) = ([Spent::default(); N], allowed().len().max(1));
    for at in 0..rounds as usize * N {
        let did = || all.iter().map(|lane| &lane[at]);
        let (start, end) = (did().map(|d| d.start).min(), did().map(|d| d.end).max());
        let spent = &mut spent[at % N];
        spent.elapsed += start.zip(end).map_or(Duration::ZERO, |(start, end)| end - start);
        let of = |cpu| did().skip(cpu).step_by(processors).map(|d| d.ran).sum::<Duration>();
        spent.busy += (0..processors).map(of).max().unwrap_or_default();
        spent.disturbed |= did().any(|d| d.preempted);
    }
    Ok(spent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn nobody_begins_a_step_before_all_have_ended_the_last() {
        let (done, mut lanes) = (AtomicU64::new(0), [0u64; 5]);
        let spent: [Spent; 3] = steps(&mut lanes, 4, |n, own, at| {
            let before = done.load(Ordering::Acquire);
            if n == 2 && at == 1 {
                std::thread::sleep(Duration::from_millis(2));
            }
            done.fetch_add(1, Ordering::AcqRel);
            // Five of each step before this one, and nobody of the next.
            let step = *own;
            *own += 1;
            if !(5 * step..5 * (step + 1)).contains(&before) || step as usize % 3 != at {
                return Err(Failure::new(format!("{before} done before step {step}")));
            }
            Ok(())
        })
        .unwrap();
        assert_eq!((lanes, done.into_inner()), ([12; 5], 60));
        assert!(spent[1].elapsed >= Duration::from_millis(8), "{spent:?}");
        // Who sleeps does not run.
        assert!(spent[1].busy > Duration::ZERO && spent[1].busy < spent[1].elapsed, "{spent:?}");
    }

    #[test]
    fn a_failure_ends_in_an_error_and_keeps_nobody_waiting() {
        let step = |n: usize, _: &mut u64, at| match (n, at) {
            (1, 0) => Err(Failure::new("it broke")),
            _ => Ok(()),
        };
        let failure = steps::<_, 2>(&mut [0u64; 3], 3, step).unwrap_err();
        assert_eq!(failure.to_string(), "it broke");
    }
}
