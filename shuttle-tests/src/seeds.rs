// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Seeds, and the time that is spent on them. Each seed is one schedule of a storm.

use crate::gusts::Gusts;
use crate::settings::Settings;
use crate::storm::{Storm, Tally};
use mmu_core::sync::rules;
use shuttle::rand::{Rng, thread_rng};
use shuttle::{Config, FailurePersistence, Runner};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Bytes of a thread's stack.
const STACK: usize = 0x4_0000;
/// Schedules in which a storm must fail without a rule.
const PATIENCE: u64 = 20_000;
/// Schedules after which each of a storm's events must have happened.
const MANY: u64 = 300;
/// A random number below `n`; part of the schedule.
pub(crate) fn below(n: u64) -> u64 {
    thread_rng().gen_range(0..n)
}

/// True once in `n` times.
pub(crate) fn one_in(n: u64) -> bool {
    below(n) == 0
}

/// Runs the storm for as many seconds as `SHUTTLE_SECONDS` says, from seed `SHUTTLE_FIRST` on, or that of
/// `SHUTTLE_SEED` alone; without the rule that `SHUTTLE_RULE` names.
///
/// # Panics
///
/// If it fails under any schedule; how to repeat that is printed. If it was not much of a storm. If one of
/// these says what it cannot.
pub fn storm(storm: Storm) {
    let Settings { time, first, only, without } = Settings::of_environment();
    let first = only.unwrap_or(first);
    let begun = Instant::now();
    let run = || {
        let run = Run::of(storm, first, move |seed| match only {
            Some(only) => seed == only,
            None => seed == first || begun.elapsed() < time,
        });
        let Run { schedules, last, ref tally, .. } = run;
        println!("{schedules} schedules in {:.1?}, up to seed {last}", begun.elapsed());
        println!("{tally:?}");
        if let Some(panic) = run.panic {
            let rule = without.map_or(String::new(), |rule| format!("SHUTTLE_RULE={rule} "));
            println!("again: {rule}{}", storm.again(last));
            resume_unwind(panic);
        }
        // A storm in which these do not happen shows little.
        let never = |event: &&str| tally.get(event).is_none_or(|times| *times == 0);
        let missing: Vec<_> = storm.events.iter().copied().filter(never).collect();
        assert!(schedules < MANY || missing.is_empty(), "never in {schedules}: {missing:?}");
    };
    match without {
        Some(rule) => rules::without(rule, run),
        None => run(),
    }
}

/// Runs a storm with a rule switched off (for instance `"R05"`), from seed `SHUTTLE_FIRST` on. It must
/// fail; and not, under the same seed, with the rule in force.
///
/// # Panics
///
/// If it is otherwise.
pub fn mutant(rule: &'static str, storm: Storm) {
    let Settings { first, .. } = Settings::of_environment();
    let mut run = None;
    rules::without(rule, || {
        run = Some(Run::of(storm, first, move |seed| seed - first < PATIENCE));
    });
    let Run { schedules, last, panic, .. } = run.unwrap();
    let panic =
        panic.unwrap_or_else(|| panic!("no failure without {rule} in {schedules} schedules"));
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or_default();
    println!("schedule {schedules} fails without {rule}: {text}");
    println!("again: SHUTTLE_RULE={rule} {}", storm.again(last));
    if let Some(panic) = Run::of(storm, last, move |seed| seed == last).panic {
        resume_unwind(panic);
    }
}

/// Schedules of a storm, one after the other, until one fails.
struct Run {
    schedules: u64,
    /// The last seed.
    last: u64,
    /// What happened.
    tally: Tally,
    panic: Option<Box<dyn Any + Send>>,
}

impl Run {
    /// From seed `first` on, for as long as `goes_on` says.
    fn of(storm: Storm, first: u64, goes_on: impl Fn(u64) -> bool + 'static) -> Self {
        let mut config = Config::new();
        config.stack_size = STACK;
        // The seed says the same, in less room.
        config.failure_persistence = FailurePersistence::None;
        // Orders that are weaker than sequential consistency are loom's to find.
        config.silence_warnings = true;
        let last = Arc::new(AtomicU64::new(first));
        let gusts = Gusts::new(first, Arc::clone(&last), goes_on);
        let runner = Runner::new(gusts, config);
        let tally = Arc::new(Mutex::new(Tally::new()));
        let body = {
            let tally = Arc::clone(&tally);
            move || count(&tally, storm.rage())
        };
        let done = catch_unwind(AssertUnwindSafe(|| runner.run(body)));
        let last = last.load(Ordering::Relaxed);
        let tally = tally.lock().unwrap().clone();
        Self { schedules: last - first + 1, last, tally, panic: done.err() }
    }
}

fn count(tally: &Mutex<Tally>, happened: Tally) {
    let mut tally = tally.lock().unwrap();
    for (name, events) in happened {
        *tally.entry(name).or_default() += events;
    }
}
