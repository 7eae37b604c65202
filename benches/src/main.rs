// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Measures the engine beside the same work under other regimes, and prints a table.
//!
//! See the README of this crate for what the rows are and how they are measured.

mod alloc;
mod backing;
mod chase;
mod cpu;
mod figure;
mod guest;
mod measure;
mod native;
mod plot;
mod processor;
mod regime;
mod report;
mod rows;
mod stats;
mod steps;

use clap::Parser;
use figure::{Found, Outcome, Row};
use measure::Effort;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: alloc::Counting = alloc::Counting;

/// Measures the engine beside the same work under other regimes. Exit status: 0 every bench ran and
/// its results were right, whatever the figures; 1 a bench failed; 2 bad usage.
#[derive(Debug, Parser)]
#[command(name = "benches")]
struct Args {
    /// Fewer and shorter repetitions: done within a minute.
    #[arg(long)]
    quick: bool,
    /// Write the figures here as JSON, and plots beside it (no plots with --quick).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only these rows or figures.
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    only: Option<Vec<String>>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let rows = match chosen(args.only.as_deref()) {
        Ok(rows) => rows,
        Err(message) => return usage(&message),
    };
    if let Some(Err(error)) = args.json.as_deref().map(probe) {
        let path = args.json.unwrap_or_default();
        return usage(&format!("--json {}: {error}", path.display()));
    }
    run(&args, &rows)
}

/// Bad usage, with what was wrong.
fn usage(message: &str) -> ExitCode {
    eprintln!("benches: {message}");
    ExitCode::from(2)
}

/// Whether a file can be written; leaves what is in it.
fn probe(path: &Path) -> std::io::Result<()> {
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).map(drop)
}

/// A row, and the figures of it that are wanted.
type Chosen = (Box<dyn Row>, Vec<&'static str>);

/// The rows that `only` asks for: by their ids, or those of their figures.
fn chosen(only: Option<&[String]>) -> Result<Vec<Chosen>, String> {
    let rows = rows::all();
    let known = |id: &str| rows.iter().any(|row| row.id() == id || row.figures().contains(&id));
    if let Some(id) = only.unwrap_or_default().iter().find(|id| !known(id)) {
        let ids: Vec<_> = rows.iter().map(|row| row.id()).collect();
        return Err(format!("--only {id}: no such row; there are {}", ids.join(" ")));
    }
    let wanted = |row: &dyn Row, id: &str| {
        // A row's id that is also one of its figures' stands for the row.
        only.is_none_or(|only| only.iter().any(|o| o == row.id() || o == id))
    };
    let pick = |row: Box<dyn Row>| {
        let figures = row.figures().iter().copied().filter(|id| wanted(&*row, id)).collect();
        (row, figures)
    };
    Ok(rows.into_iter().map(pick).filter(|(_, ids): &Chosen| !ids.is_empty()).collect())
}

fn run(args: &Args, rows: &[Chosen]) -> ExitCode {
    let effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    let (mut found, mut values, mut failed) = (Vec::new(), Vec::new(), false);
    print(&report::head());
    for (row, wanted) in rows {
        eprintln!("benches: {} …", row.id());
        let mut results = match row.run(&effort) {
            Ok(results) => results,
            Err(failure) => {
                eprintln!("benches: {} failed: {failure}", row.id());
                let failed_row = serde_json::json!({
                    "id": row.id(), "failed": failure.to_string()
                });
                values.push(failed_row);
                failed = true;
                continue;
            }
        };
        results.outcomes.retain(|outcome| wanted.contains(&outcome.id()));
        print(&report::text(&results.outcomes));
        values.extend(results.outcomes.iter().map(report::value));
        found.push((row.id(), results));
    }
    summary(&found);
    if let Some(path) = &args.json {
        if let Err(error) = save(path, values, (!args.quick).then_some(&found[..])) {
            eprintln!("benches: --json {}: {error}", path.display());
            return ExitCode::from(2);
        }
    }
    ExitCode::from(u8::from(failed))
}

fn save(
    path: &Path,
    values: Vec<serde_json::Value>,
    plots: Option<&[(&'static str, Found)]>,
) -> Result<(), plot::Error> {
    std::fs::write(path, format!("{:#}\n", serde_json::Value::Array(values)))?;
    for file in plots.map_or(Ok(Vec::new()), |found| plot::write(path, found))? {
        eprintln!("benches: wrote {}", file.display());
    }
    Ok(())
}

fn summary(found: &[(&'static str, Found)]) {
    let figures = || found.iter().flat_map(|(_, found)| &found.outcomes);
    let count = |wanted: Option<bool>| {
        let matches = |o: &&Outcome| match o {
            Outcome::Figure(figure) => figure.goal.is_some() && figure.met() == wanted,
            Outcome::Skipped { .. } => false,
        };
        figures().filter(matches).count()
    };
    let skipped = figures().filter(|o| matches!(o, Outcome::Skipped { .. })).count();
    print(&format!(
        "\n{} met, {} missed, {} undecided, {skipped} skipped\n",
        count(Some(true)),
        count(Some(false)),
        count(None),
    ));
}

/// Prints to standard output; a reader that has gone away ends the program quietly.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        eprintln!("benches: standard output: {error}");
        std::process::exit(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(only: &[&str]) -> Result<Vec<Vec<&'static str>>, String> {
        let only: Vec<_> = only.iter().map(ToString::to_string).collect();
        Ok(chosen(Some(&only))?.into_iter().map(|(_, ids)| ids).collect())
    }

    #[test]
    fn rows_are_chosen_by_row_or_figure() {
        assert_eq!(ids(&["W2"]).unwrap(), [["W2", "W2.stream"]]);
        assert_eq!(ids(&["W6.p999", "W7.mutex"]).unwrap(), [["W6.p999"], ["W7.mutex"]]);
        let message = ids(&["W1", "W99"]).unwrap_err();
        assert!(message.starts_with("--only W99: no such row") && message.contains("W1 W2"));
        assert!(ids(&[""]).is_err());
        assert_eq!(chosen(None).unwrap().len(), rows::all().len());
    }
}
