// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A concurrent x86 shadow MMU.

pub mod addr;
pub mod memory;
pub mod sync;
