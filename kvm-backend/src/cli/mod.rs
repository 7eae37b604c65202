// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command lines, and what they print. Exit status: 0 done and verified, 1 something failed a
//! check, 2 bad usage or input.

mod info;
mod output;
mod run;
mod walk;

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
    /// Walk page tables in a memory image.
    Walk(walk::Args),
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

/// Of standard output. Nobody reading is no failure; a disk that is full is one.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Usage(format!("standard output: {error}")),
        }
    }
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Run(args)) => run::main(&args),
        None => run::main(&cli.run),
        Some(Command::Walk(args)) => walk::main(&args),
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
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    // The standard library takes a sign.
    parsed
        .ok()
        .filter(|_| !text.contains('+'))
        .ok_or_else(|| format!("`{text}` is not a number (decimal or 0x-hex)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number("64"), Ok(64));
        assert_eq!(number("0x40"), Ok(64));
        for bad in ["", "0x", "-1", "+1", "0x+1", "1k", "18446744073709551616"] {
            assert!(number(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
