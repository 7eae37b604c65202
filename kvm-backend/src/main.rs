// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `shadowmmu` command.
fn main() {}
