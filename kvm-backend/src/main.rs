// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `shadowmmu` command.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
