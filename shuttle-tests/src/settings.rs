// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the environment asks for. A word that means nothing is an error, never ignored.

use mmu_core::sync::rules;
use std::env::{self, VarError};
use std::time::Duration;

/// Seconds for each storm, unless `SHUTTLE_SECONDS` says otherwise.
const SECONDS: u64 = 4;

/// The settings of this run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// `SHUTTLE_SECONDS`: for each storm.
    pub(crate) time: Duration,
    /// `SHUTTLE_FIRST`: the first seed.
    pub(crate) first: u64,
    /// `SHUTTLE_SEED`: the only one.
    pub(crate) only: Option<u64>,
    /// `SHUTTLE_RULE`: what the storms are without.
    pub(crate) without: Option<&'static str>,
}

impl Settings {
    /// As the environment has them.
    ///
    /// # Panics
    ///
    /// If one of them says something that it cannot.
    pub(crate) fn of_environment() -> Self {
        let without = word("SHUTTLE_RULE").map(|given| {
            let known = rules::ALL.into_iter().find(|rule| *rule == given);
            known.unwrap_or_else(|| {
                panic!("SHUTTLE_RULE={given}: no rule with a switch, which are {:?}", rules::ALL)
            })
        });
        Self {
            time: Duration::from_secs(number("SHUTTLE_SECONDS").unwrap_or(SECONDS)),
            first: number("SHUTTLE_FIRST").unwrap_or(0),
            only: number("SHUTTLE_SEED"),
            without,
        }
    }
}

fn word(name: &str) -> Option<String> {
    match env::var(name) {
        Ok(value) => Some(value),
        Err(VarError::NotPresent) => None,
        Err(VarError::NotUnicode(value)) => panic!("{name}={value:?}: not text"),
    }
}

fn number(name: &str) -> Option<u64> {
    let value = word(name)?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={value}: not a number from 0 to {}", u64::MAX)))
}
