// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command lines, and what they print. Exit status: 0 done and verified, 1 something failed a
//! check, 2 bad usage or input.

mod info;
mod output;
mod run;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A concurrent x86 shadow MMU at work.
#[derive(Debug, Parser)]
#[command(name = "shadowmmu", version, about, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: run::Args,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a guest whose page faults the engine serves; verify its memory and audit the shadow.
    Run(run::Args),
    /// What this machine offers.
    Info(info::Args),
}

/// How a command ended badly.
#[derive(Debug)]
enum Failure {
    /// Bad usage or input.
    Usage(String),
    /// Nobody reads the output any more.
    Closed,
}

impl From<std::io::Error> for Failure {
    fn from(_: std::io::Error) -> Self {
        Self::Closed
    }
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Run(args)) => run::main(&args),
        None => run::main(&cli.run),
        Some(Command::Info(args)) => info::main(&args),
    };
    match result {
        Ok(code) => code,
        Err(Failure::Closed) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

/// A number as the command line takes it: decimal, or hexadecimal with 0x.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16),
        _ => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is not a number (decimal or 0x-hex)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number("64"), Ok(64));
        assert_eq!(number("0x40"), Ok(64));
        for bad in ["", "0x", "-1", "0x+1", "1k", "18446744073709551616"] {
            assert!(number(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
