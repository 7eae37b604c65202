// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bounds, counting, and the frame around a mutant.

use loom::thread::JoinHandle;
use mmu_core::sync::rules;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Instant;

/// Preemptions explored unless told otherwise.
const PREEMPTIONS: usize = 3;
/// Steps of one execution: a model that runs longer spins.
const BRANCHES: usize = 5000;

/// Explores `model` with up to three preemptions, or as many as `LOOM_MAX_PREEMPTIONS` says. Never
/// unbounded.
///
/// # Panics
///
/// If the model fails, or if it has a single interleaving: then its threads share nothing that the
/// checker sees, and it shows nothing.
pub fn explore(name: &str, model: impl Fn() + Send + Sync + 'static) {
    explore_to(PREEMPTIONS, name, model);
}

/// The same with another bound, for a model that is too large for three.
///
/// # Panics
///
/// As [`explore`].
pub fn explore_to(bound: usize, name: &str, model: impl Fn() + Send + Sync + 'static) {
    let asked = std::env::var("LOOM_MAX_PREEMPTIONS")
        .ok()
        .map(|n| n.parse().unwrap_or_else(|_| panic!("LOOM_MAX_PREEMPTIONS={n}: not a number")));
    let bound = asked.unwrap_or(bound);
    without_backtraces();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    builder.max_branches = BRANCHES;
    let report = Report { name, bound, runs: Arc::default(), begun: Instant::now() };
    let model = Arc::new(model);
    for first in [First::Main, First::Spawned] {
        let (runs, model) = (Arc::clone(&report.runs), Arc::clone(&model));
        FIRST.set(first);
        builder.check(move || {
            runs.fetch_add(1, Ordering::Relaxed);
            model();
        });
    }
    let runs = report.runs.load(Ordering::Relaxed);
    assert!(runs > 1, "{name}: one interleaving only");
}

/// Who begins when a model spawns a thread, in the execution from which the others are found.
#[derive(Clone, Copy)]
enum First {
    Main,
    Spawned,
}

std::thread_local! {
    // loom runs all threads of a model on the thread that called it.
    static FIRST: Cell<First> = const { Cell::new(First::Main) };
}

/// Spawns a thread of a model.
///
/// A model is explored twice, with either thread as the first, because loom forgets that one thread
/// loads a word which another loads, too, before it stores there: then it does not find the order in
/// which the store is first. From an execution in which it is first, it finds the other.
pub fn spawn<T: 'static>(f: impl FnOnce() -> T + 'static) -> JoinHandle<T> {
    let thread = loom::thread::spawn(f);
    if matches!(FIRST.get(), First::Spawned) {
        loom::thread::yield_now();
    }
    thread
}

/// A model's threads have small stacks, too small for a backtrace (RUST_BACKTRACE) where they panic.
fn without_backtraces() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))));
}

/// Runs a model with a rule switched off (for instance `"R05:"`, as its assertion begins); it must
/// fail.
pub fn mutant(rule: &'static str, model: impl FnOnce()) {
    rules::without(rule.trim_end_matches(':'), model);
}

/// Runs `part` of a model, and then `rest`, which lets the other threads end; a panic of `part` goes on
/// after that, so that no thread is left in the middle of something when it ends the model.
pub fn then<R>(part: impl FnOnce() -> R, rest: impl FnOnce()) -> R {
    let result = catch_unwind(AssertUnwindSafe(part));
    rest();
    result.unwrap_or_else(|panic| resume_unwind(panic))
}

/// The test of a model, and its twin: the same with the rule switched off, which must fail by the
/// rule's own assertion. A number is the preemptions explored, if they are not three.
#[macro_export]
macro_rules! model {
    ($model:ident, $twin:ident, $rule:literal, $body:expr) => {
        $crate::model!($model, $twin, $rule, 3, $body);
    };
    ($model:ident, $twin:ident, $rule:literal, $bound:literal, $body:expr) => {
        #[test]
        fn $model() {
            $crate::explore_to($bound, stringify!($model), $body);
        }

        #[test]
        #[should_panic(expected = $rule)]
        fn $twin() {
            $crate::mutant($rule, || $crate::explore_to($bound, stringify!($twin), $body));
        }
    };
}

/// Says what was explored, also when the model fails.
struct Report<'a> {
    name: &'a str,
    bound: usize,
    runs: Arc<AtomicU64>,
    begun: Instant,
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        let Self { name, bound, .. } = self;
        let (runs, time) = (self.runs.load(Ordering::Relaxed), self.begun.elapsed());
        println!("explored {name}: {runs} interleavings, {bound} preemptions, {time:.1?}");
    }
}
