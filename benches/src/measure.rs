// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How figures are measured: in rounds, each of which runs every variant once.
//!
//! The machine's speed wanders: other work comes and goes, clocks change. Variants that run one
//! right after the other meet the same machine, so what is compared is always the two samples of
//! one round, and the figure is the median of those ratios. The order turns from round to round,
//! so that none profits from coming after another.

use crate::cpu::thread_time;
use crate::figure::Failure;
use std::time::Duration;

/// How much work to spend.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds that count.
    pub pairs: usize,
    /// About how long one sample takes.
    pub sample: Duration,
}

impl Effort {
    /// For figures that are worth keeping.
    pub const FULL: Self = Self { pairs: 61, sample: Duration::from_millis(10) };
    /// For samples of several threads: short, so that other processes seldom fall into one.
    pub fn short(self) -> Self {
        Self { sample: self.sample / 4, ..self }
    }

    /// For a look, and for tests of the benches.
    pub const QUICK: Self = Self { pairs: 21, sample: Duration::from_millis(4) };
}

/// One thing to measure: a name, and what runs one sample and returns its nanoseconds an operation.
/// The argument is the number of the round.
pub type Variant<'a> = (&'static str, Box<dyn FnMut(usize) -> Result<f64, Failure> + 'a>);

/// The samples of each variant; the same place in each belongs to the same round.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<(&'static str, Vec<f64>)>);

impl Samples {
    /// The samples of one variant.
    pub fn of(&self, name: &str) -> Result<&[f64], Failure> {
        let found = self.0.iter().find(|(n, _)| *n == name);
        found.map(|(_, of)| &of[..]).ok_or_else(|| Failure::new(format!("no variant {name}")))
    }

    /// `over / under`, round by round.
    pub fn ratios(&self, over: &str, under: &str) -> Result<Vec<f64>, Failure> {
        Ok(self.of(over)?.iter().zip(self.of(under)?).map(|(a, b)| a / b).collect())
    }

    /// These variants, as far as there are any.
    pub fn only(&self, names: &[&str]) -> Self {
        Self(self.0.iter().filter(|(name, _)| names.contains(name)).cloned().collect())
    }

    /// Each variant.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &[f64])> {
        self.0.iter().map(|(name, of)| (*name, &of[..]))
    }
}

impl<const N: usize> From<[(&'static str, Vec<f64>); N]> for Samples {
    fn from(samples: [(&'static str, Vec<f64>); N]) -> Self {
        Self(samples.into())
    }
}

/// Runs every variant once a round, after a round that does not count.
pub fn interleave(effort: &Effort, mut variants: Vec<Variant<'_>>) -> Result<Samples, Failure> {
    let n = variants.len();
    let mut samples: Vec<_> =
        variants.iter().map(|(name, _)| (*name, Vec::with_capacity(effort.pairs))).collect();
    for round in 0..=effort.pairs {
        for place in 0..n {
            // Backwards every other round.
            let turn = if round % 2 == 0 { place } else { n - 1 - place };
            let which = (turn + round / 2) % n;
            let (name, run) = &mut variants[which];
            let ns = run(round).map_err(Failure::in_step(name))?;
            if round > 0 {
                samples[which].1.push(ns);
            }
        }
    }
    Ok(Samples(samples))
}

/// How many times `pass` fits into a sample; at least once.
pub fn calibrate(
    effort: &Effort,
    mut pass: impl FnMut() -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let mut passes = 1;
    loop {
        let start = thread_time();
        for _ in 0..passes {
            pass()?;
        }
        let elapsed = thread_time().saturating_sub(start);
        if elapsed * 4 >= effort.sample {
            let one = (elapsed / passes).max(Duration::from_nanos(1));
            return Ok((effort.sample.as_nanos() / one.as_nanos()).max(1) as u64);
        }
        passes *= 2;
    }
}

/// Runs `pass` that many times on this thread; nanoseconds of its own time for each of the
/// `operations` of a pass.
pub fn timed(
    passes: u64,
    operations: usize,
    mut pass: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    let start = thread_time();
    for _ in 0..passes {
        pass()?;
    }
    let elapsed = thread_time().saturating_sub(start);
    Ok(per_operation(elapsed, passes * operations as u64))
}

/// Takes a sample of several threads again if something else took a processor from one of them
/// meanwhile, a few times at most: on a busy machine the last is as good as any.
pub fn undisturbed(
    mut sample: impl FnMut() -> Result<(f64, bool), Failure>,
) -> Result<f64, Failure> {
    const TRIES: u32 = 8;
    let mut tries = 1;
    loop {
        match sample()? {
            (_, true) if tries < TRIES => tries += 1,
            (ns, _) => return Ok(ns),
        }
    }
}

/// Nanoseconds an operation.
pub fn per_operation(elapsed: Duration, operations: u64) -> f64 {
    elapsed.as_nanos() as f64 / operations.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn every_round_runs_every_variant_in_turning_order() {
        let order = RefCell::new(Vec::new());
        let variant = |name: &'static str| -> Variant<'_> {
            let order = &order;
            let run = move |round: usize| {
                order.borrow_mut().push(name);
                Ok(round as f64)
            };
            (name, Box::new(run))
        };
        let effort = Effort { pairs: 3, sample: Duration::ZERO };
        let samples = interleave(&effort, vec![variant("a"), variant("b")]).unwrap();
        assert_eq!(samples.of("a").unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(samples.ratios("a", "b").unwrap(), [1.0; 3]);
        assert_eq!(order.borrow()[..], ["a", "b", "b", "a", "b", "a", "a", "b"]);
        assert!(samples.of("c").is_err());
        let only = samples.only(&["b", "c"]);
        assert_eq!(only.of("b").unwrap(), samples.of("b").unwrap());
        assert!(only.of("a").is_err());
    }

    #[test]
    fn failures_name_the_variant() {
        let run = |_| Err(Failure::new("it broke"));
        let variants: Vec<Variant<'_>> = vec![("a", Box::new(run))];
        let failure = interleave(&Effort::QUICK, variants).unwrap_err();
        assert_eq!(failure.to_string(), "a: it broke");
    }
}
