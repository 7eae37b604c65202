// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! 2, 8 and 32 vCPUs of one engine under each regime, beside the same vCPUs on an engine each.

use super::threads::needs_two;
use crate::figure::{Failure, Figure, Found, Goal};
use crate::measure::{Effort, Samples, Variant, interleave, undisturbed};
use crate::regime::{Regime, Vm};
use mmu_core::addr::Gva;
use mmu_core::paging::Access;
use mmu_core::shadow::{Outcome, Stall};
use mmu_core::vcpu::{Entry, Vcpu};
use serde_json::json;

/// Figures of a row: by number of vCPUs, then by regime.
pub type Ids = [[&'static str; 3]; 3];
const LANES: [usize; 3] = [2, 8, 32];

/// The ids that begin with a name.
macro_rules! ids {
    ($id:literal) => {{
        const IDS: $crate::rows::lanes::Ids = [
            [concat!($id, ".v2"), concat!($id, ".v2.rwlock"), concat!($id, ".v2.mutex")],
            [concat!($id, ".v8"), concat!($id, ".v8.rwlock"), concat!($id, ".v8.mutex")],
            [concat!($id, ".v32"), concat!($id, ".v32.rwlock"), concat!($id, ".v32.mutex")],
        ];
        &IDS
    }};
    ($id:literal, judged) => {{
        const IDS: $crate::rows::lanes::Ids = [
            [$id, concat!($id, ".rwlock"), concat!($id, ".mutex")],
            [concat!($id, ".v8"), concat!($id, ".v8.rwlock"), concat!($id, ".v8.mutex")],
            [concat!($id, ".v32"), concat!($id, ".v32.rwlock"), concat!($id, ".v32.mutex")],
        ];
        &IDS
    }};
}
/// What the figures say, by number of vCPUs.
macro_rules! each {
    ($what:literal) => {
        [concat!("2 ", $what), concat!("8 ", $what), concat!("32 ", $what)]
    };
}
pub(super) use {each, ids};

/// Engines with vCPUs that do something.
pub trait Crowd: Sized {
    /// What they do.
    type Work: Copy;

    /// `lanes` vCPUs on one engine.
    fn one(work: Self::Work, regime: Regime, lanes: usize) -> Result<Self, Failure>;

    /// `lanes` engines with one vCPU each.
    fn private(work: Self::Work, lanes: usize) -> Result<Self, Failure>;

    /// How much one vCPU does in a sample's time.
    fn calibrate(&self, effort: &Effort) -> Result<u64, Failure>;

    /// Every vCPU on a thread of its own does so much. Nanoseconds of each thing done, all together,
    /// and whether the sample was disturbed.
    fn sample(&self, much: u64) -> Result<(f64, bool), Failure>;

    /// Whether everything is as it should be afterwards.
    fn verify(&self) -> Result<(), Failure>;
}

/// Measures, and adds a figure for each number of vCPUs and each regime; `goal` is for two under `rcu`.
pub fn measure<C: Crowd>(
    effort: &Effort,
    work: C::Work,
    ids: &'static Ids,
    what: [&'static str; 3],
    goal: Option<Goal>,
) -> Result<Found, Failure> {
    let mut found = Found::default();
    if let Some(outcomes) = needs_two(ids.as_flattened()) {
        return Ok(Found { outcomes, ..found });
    }
    for ((ids, what), lanes) in ids.iter().zip(what).zip(LANES) {
        let (samples, much) = compare::<C>(effort, work, lanes)?;
        for (id, regime) in ids.iter().zip(Regime::ALL) {
            let what = match regime {
                Regime::Rcu => what,
                Regime::Rwlock => "the same under rwlock",
                Regime::Mutex => "the same under mutex",
            };
            let figure = Figure::throughput(id, what, &samples, [regime.name(), "private"])?
                .detail("threads", json!(lanes))
                .detail("much", json!(much));
            let goal = goal.filter(|_| lanes == LANES[0] && regime == Regime::Rcu);
            found.figure(goal.map_or(figure.clone(), |goal| figure.goal(goal)));
        }
        if lanes == LANES[0] {
            found.plots.push((what, "ns, both together", samples));
        }
    }
    Ok(found)
}

/// A fault on a write of the guest's, under the regime's lock; waiting is done without.
pub fn fault(vm: &Vm, vcpu: &mut Vcpu, gva: u64) -> Result<Outcome, Failure> {
    loop {
        match vm.exclusive(|| vcpu.fault(Gva(gva), Access::write().user())) {
            Ok(outcome) => return Ok(outcome),
            Err(stall) => wait(vcpu, stall),
        }
    }
}

/// Lets the guest go on: the vCPU enters, learns what to forget, and comes out again.
pub fn resume(vcpu: &mut Vcpu) -> Result<(), Failure> {
    loop {
        match vcpu.enter(true, |_| ()) {
            Ok(Entry::Run { generation, .. }) => {
                vcpu.drained(generation);
                vcpu.leave();
                return Ok(());
            }
            Ok(other) => return Err(Failure::new(format!("entry: {other:?}"))),
            Err(stall) => wait(vcpu, stall),
        }
    }
}

#[cold]
fn wait(vcpu: &mut Vcpu, stall: Stall) {
    while vcpu.must_wait(stall) {
        std::thread::yield_now();
    }
}

fn compare<C: Crowd>(
    effort: &Effort,
    work: C::Work,
    lanes: usize,
) -> Result<(Samples, u64), Failure> {
    let effort = &if lanes == 2 { effort.short() } else { *effort };
    let private = C::private(work, lanes)?;
    // The total is the same however many vCPUs share it.
    let much = (2 * private.calibrate(effort)? / lanes as u64).max(1);
    let mut crowds = vec![("private", private)];
    for regime in Regime::ALL {
        crowds.push((regime.name(), C::one(work, regime, lanes)?));
    }
    let variants = crowds.iter().map(|(name, crowd)| -> Variant<'_> {
        let run = move |_| match lanes {
            2 => undisturbed(|| crowd.sample(much)),
            // More threads than processors disturb each other.
            _ => Ok(crowd.sample(much)?.0),
        };
        (*name, Box::new(run))
    });
    let samples = interleave(effort, variants.collect())?;
    for (name, crowd) in &crowds {
        crowd.verify().map_err(Failure::in_step(name))?;
    }
    Ok((samples, much))
}
