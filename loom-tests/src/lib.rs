// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the models in `tests/` share: how a model is explored, and a guest of the size a model can
//! bear. Empty without `--cfg loom`.
#![cfg(loom)]

mod explore;
mod guest;

pub use explore::{explore, explore_to, mutant, spawn, then};
pub use guest::{Guest, PAGE, entry, fault, hi, lo, to};
