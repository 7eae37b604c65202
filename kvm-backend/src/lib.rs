// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real vCPUs for `mmu-core`.

pub mod cpu;
pub mod emu;
pub mod guest;
pub mod image;
pub mod kvm;
pub mod memory;
pub mod regs;
pub mod session;
pub mod vm;
pub mod workload;
