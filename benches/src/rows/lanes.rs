// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! 1, 2, 8 and 32 vCPUs of one engine under each regime, beside the same vCPUs on an engine each.

use super::threads::needs_two;
use crate::figure::{Failure, Figure, Found, Goal};
use crate::measure::{Effort, Samples, Variant, interleave, undisturbed};
use crate::regime::{Regime, Vm};
use mmu_core::addr::Gva;
use mmu_core::paging::Access;
use mmu_core::shadow::{Outcome, Stall};
use mmu_core::vcpu::{Entry, Vcpu};
use serde_json::json;
use std::time::Duration;

/// Figures of a row: by number of vCPUs, then by regime.
pub type Ids = [[&'static str; 3]; 4];
/// What figures say, by number of vCPUs.
pub type Whats = [&'static str; 4];
/// The numbers.
pub const LANES: [usize; 4] = [1, 2, 8, 32];
/// The number whose figures have goals, and the most that can have a processor each.
const PAIR: usize = 2;

/// The ids that begin with a name.
macro_rules! ids {
    ($id:literal) => {{
        const IDS: $crate::rows::lanes::Ids = [
            [concat!($id, ".v1"), concat!($id, ".v1.rwlock"), concat!($id, ".v1.mutex")],
            [concat!($id, ".v2"), concat!($id, ".v2.rwlock"), concat!($id, ".v2.mutex")],
            [concat!($id, ".v8"), concat!($id, ".v8.rwlock"), concat!($id, ".v8.mutex")],
            [concat!($id, ".v32"), concat!($id, ".v32.rwlock"), concat!($id, ".v32.mutex")],
        ];
        &IDS
    }};
    ($id:literal, judged) => {{
        const IDS: $crate::rows::lanes::Ids = [
            [concat!($id, ".v1"), concat!($id, ".v1.rwlock"), concat!($id, ".v1.mutex")],
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
        [
            concat!("1 vCPU: ", $what),
            concat!("2 vCPUs: ", $what),
            concat!("8 vCPUs: ", $what),
            concat!("32 vCPUs: ", $what),
        ]
    };
}
pub(super) use {each, ids};

/// The ids of a row's other figures, then those by number of vCPUs.
pub const fn after<const N: usize>(others: &[&'static str], lanes: &[&Ids]) -> [&'static str; N] {
    let (mut all, mut n) = ([""; N], 0);
    while n < others.len() {
        all[n] = others[n];
        n += 1;
    }
    let mut m = 0;
    while n < N {
        all[n] = lanes[m / 12][m / 3 % 4][m % 3];
        (n, m) = (n + 1, m + 1);
    }
    assert!(m == 12 * lanes.len());
    all
}

/// vCPUs that do something at the same time.
pub trait Sampled {
    /// How much one vCPU does in a sample's time.
    fn calibrate(&self, effort: &Effort) -> Result<u64, Failure>;

    /// Every vCPU on a thread of its own does so much. Nanoseconds of each thing done, all together,
    /// and whether the sample was disturbed.
    fn sample(&self, much: u64) -> Result<(f64, bool), Failure>;

    /// Whether everything is as it should be afterwards.
    fn verify(&self) -> Result<(), Failure>;
}

/// vCPUs of engines.
pub trait Crowd: Sampled + Sized {
    /// What they do.
    type Work: Copy;

    /// `lanes` vCPUs on one engine.
    fn one(work: Self::Work, regime: Regime, lanes: usize) -> Result<Self, Failure>;

    /// `lanes` engines with one vCPU each.
    fn private(work: Self::Work, lanes: usize) -> Result<Self, Failure>;
}

/// One of those that are compared.
pub struct Side<'c> {
    name: &'static str,
    crowd: &'c dyn Sampled,
    lanes: usize,
    much: u64,
}

impl<'c> Side<'c> {
    /// With as much to do as takes a sample's time. The total is the same however many vCPUs share it.
    pub fn new(
        effort: &Effort,
        name: &'static str,
        crowd: &'c dyn Sampled,
        lanes: usize,
    ) -> Result<Self, Failure> {
        let effort = &if lanes <= PAIR { effort.short() } else { *effort };
        let much = (PAIR as u64 * crowd.calibrate(effort)? / lanes as u64).max(1);
        Ok(Self { name, crowd, lanes, much })
    }

    fn sample(&self) -> Result<f64, Failure> {
        match self.lanes {
            ..=PAIR => undisturbed(|| self.crowd.sample(self.much)),
            // More threads than processors disturb each other.
            _ => Ok(self.crowd.sample(self.much)?.0),
        }
    }
}

/// Samples of each, and whether everything is as it should be afterwards.
pub fn side_by_side(effort: &Effort, sides: &[Side<'_>]) -> Result<Samples, Failure> {
    let variants =
        sides.iter().map(|side| -> Variant<'_> { (side.name, Box::new(|_| side.sample())) });
    let samples = interleave(effort, variants.collect())?;
    for side in sides {
        side.crowd.verify().map_err(Failure::in_step(side.name))?;
    }
    Ok(samples)
}

/// Measures, and adds a figure for each number of vCPUs and each regime; `goal` is for two under `rcu`.
pub fn measure<C: Crowd>(
    effort: &Effort,
    work: C::Work,
    ids: &'static Ids,
    what: Whats,
    goal: Option<Goal>,
) -> Result<Found, Failure> {
    let mut found = Found::default();
    for ((ids, what), lanes) in ids.iter().zip(what).zip(LANES) {
        if let Some(outcomes) = needs_two(ids).filter(|_| lanes > 1) {
            found.outcomes.extend(outcomes);
            continue;
        }
        let (samples, much) = compare::<C>(effort, work, lanes)?;
        for (id, regime) in ids.iter().zip(Regime::ALL) {
            let figure =
                Figure::throughput(id, said(what, regime), &samples, [regime.name(), "private"])?
                    .detail("threads", json!(lanes))
                    .detail("much", json!(much));
            let goal = goal.filter(|_| lanes == PAIR && regime == Regime::Rcu);
            found.figure(goal.map_or(figure.clone(), |goal| figure.goal(goal)));
        }
        if lanes == PAIR {
            found.plots.push((what, "ns, both together", samples));
        }
    }
    Ok(found)
}

/// What a figure says under a regime.
pub fn said(what: &'static str, regime: Regime) -> &'static str {
    match regime {
        Regime::Rcu => what,
        Regime::Rwlock => "the same under rwlock",
        Regime::Mutex => "the same under mutex",
    }
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

/// How many rounds fit into a sample's time, by one that says how long its timed part took; the one
/// before it does not count.
pub fn rounds(
    effort: &Effort,
    mut round: impl FnMut() -> Result<Duration, Failure>,
) -> Result<u64, Failure> {
    round()?;
    let one = round()?.max(Duration::from_nanos(1));
    Ok((effort.sample.as_nanos() / one.as_nanos()).max(1) as u64)
}

fn compare<C: Crowd>(
    effort: &Effort,
    work: C::Work,
    lanes: usize,
) -> Result<(Samples, u64), Failure> {
    let private = C::private(work, lanes)?;
    let base = Side::new(effort, "private", &private, lanes)?;
    let much = base.much;
    let crowds = Regime::ALL.map(|regime| C::one(work, regime, lanes));
    let crowds = crowds.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut sides = vec![base];
    for (crowd, regime) in crowds.iter().zip(Regime::ALL) {
        sides.push(Side { name: regime.name(), crowd, lanes, much });
    }
    Ok((side_by_side(effort, &sides)?, much))
}
