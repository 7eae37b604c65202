// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How often the host of `churn` did what.

use std::fmt;

/// What the host does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Add,
    Delete,
    Move,
    Alias,
    Flag,
    Harvest,
    Copy,
    Resize,
    Zap,
    Invalidate,
    Inspect,
}

/// For people, in the order of [`Kind`].
const NAMES: [&str; 11] = [
    "memories added",
    "deleted",
    "moved",
    "alias changes",
    "flag changes",
    "harvests",
    "copies compared",
    "quota changes",
    "zaps",
    "invalidations",
    "inspections",
];

/// Counts of each [`Kind`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts([u64; NAMES.len()]);

impl Counts {
    pub(super) fn bump(&mut self, kind: Kind) {
        self.0[kind as usize] += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, count)| *sum += count);
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> =
            self.0.iter().zip(NAMES).map(|(count, name)| format!("{count} {name}")).collect();
        f.write_str(&counts.join(", "))
    }
}
