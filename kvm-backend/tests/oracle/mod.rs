// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests that take KVM as an oracle share: random numbers, settings, counts.
#![allow(dead_code)]

pub mod lab;
pub mod tables;

use kvm_backend::kvm::{KvmError, probe};
use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// Takes the place of the fixed seed.
const SEED: &str = "SHADOWMMU_ORACLE_SEED";
/// Takes the place of the usual number of random cases.
const CASES: &str = "SHADOWMMU_ORACLE_CASES";

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    /// The fixed seed, or the one asked for; printed.
    pub fn seeded(test: &str) -> Random {
        let seed = setting(SEED).unwrap_or(0x5eed_0001).max(1);
        println!("{test}: {SEED}={seed}");
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// `bit` with this chance.
    pub fn bit(&mut self, bit: u64, percent: u64) -> u64 {
        if self.percent(percent) { bit } else { 0 }
    }
}

/// Whether there is KVM; a message where there is none.
pub fn has_kvm(test: &str) -> bool {
    match probe() {
        Ok(_) => true,
        Err(error @ KvmError::Unavailable { .. }) => {
            println!("{test}: SKIPPED: {error}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// How many random cases to try.
pub fn cases(usual: u64) -> u64 {
    setting(CASES).unwrap_or(usual)
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

/// Cases by outcome.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<String, u64>);

impl Tally {
    pub fn add(&mut self, outcome: impl Display) {
        *self.0.entry(outcome.to_string()).or_default() += 1;
    }

    /// Cases of the outcomes whose names begin like this.
    pub fn count(&self, prefix: &str) -> u64 {
        self.0
            .range(prefix.to_string()..)
            .take_while(|(k, _)| k.starts_with(prefix))
            .map(|e| e.1)
            .sum()
    }

    /// Fails where an outcome came up too rarely to say anything.
    pub fn expect(&self, prefix: &str, at_least: u64) {
        let count = self.count(prefix);
        assert!(count >= at_least, "only {count} cases of {prefix:?}, not {at_least}:\n{self}");
    }
}

impl Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(outcome, n)| writeln!(f, "{n:>8}  {outcome}"))
    }
}

/// What KVM and the walker did not agree on.
#[derive(Debug, Default)]
pub struct Disagreements {
    first: Vec<String>,
    all: u64,
}

impl Disagreements {
    pub fn add(&mut self, text: String) {
        self.all += 1;
        if self.first.len() < 10 {
            self.first.push(text);
        }
    }

    pub fn many(&self) -> bool {
        self.all >= 100
    }

    pub fn expect_none(&self) {
        assert!(self.all == 0, "{} disagreements, first:\n{}", self.all, self.first.join("\n"));
    }
}
