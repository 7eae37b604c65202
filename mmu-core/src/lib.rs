// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A concurrent x86 shadow MMU.

pub mod addr;
pub mod memory;
pub mod mmio;
mod mmu;
pub mod paging;
pub mod shadow;
pub mod sync;
pub mod vcpu;

pub use mmu::{Config, ConfigError, DirtyLogError, MIN_TABLE_FRAMES, Mmu};
