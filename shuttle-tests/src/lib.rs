// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the storms in `tests/` are made of: seeds and time, a guest, what its vCPUs do, and what happens
//! to them. Empty without `--cfg shuttle`.
#![cfg(shuttle)]

mod changes;
mod copied;
mod devices;
mod guest;
mod gusts;
mod rings;
mod seeds;
mod settings;
mod storm;
mod vcpu;

pub use changes::Change;
pub use seeds::{mutant, storm};
pub use storm::Storm;
pub use vcpu::Work;
