// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bounds, counting, and the frame around a mutant.

use mmu_core::sync::rules;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Preemptions explored unless told otherwise.
const PREEMPTIONS: usize = 3;
/// Steps of one execution: a model that runs longer spins.
const BRANCHES: usize = 4000;

/// Explores `model` with up to three preemptions, or as many as `LOOM_MAX_PREEMPTIONS` says. Never
/// unbounded.
///
/// # Panics
///
/// If the model fails, or if it has a single interleaving: then its threads share nothing that the
/// checker sees, and it shows nothing.
pub fn explore(name: &str, model: impl Fn() + Send + Sync + 'static) {
    let asked = std::env::var("LOOM_MAX_PREEMPTIONS")
        .ok()
        .map(|n| n.parse().unwrap_or_else(|_| panic!("LOOM_MAX_PREEMPTIONS={n}: not a number")));
    let bound = asked.unwrap_or(PREEMPTIONS);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    builder.max_branches = BRANCHES;
    let report = Report { name, bound, runs: Arc::default(), begun: Instant::now() };
    let runs = Arc::clone(&report.runs);
    builder.check(move || {
        runs.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let runs = report.runs.load(Ordering::Relaxed);
    assert!(runs > 1, "{name}: one interleaving only");
}

/// Runs a model with `rule` (for instance `"R05"`) switched off; it must fail.
pub fn mutant(rule: &'static str, model: impl FnOnce()) {
    rules::without(rule, model);
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
