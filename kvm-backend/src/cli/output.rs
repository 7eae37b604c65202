// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A progress line for terminals, and tables.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// A line on standard error that is rewritten in place; nothing where that is no terminal.
pub(super) struct Progress {
    next: Option<Instant>,
    shown: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { next: std::io::stderr().is_terminal().then(Instant::now), shown: false }
    }

    pub(super) fn show(&mut self, line: impl FnOnce() -> String) {
        let Some(next) = self.next.filter(|next| *next <= Instant::now()) else { return };
        self.next = Some(next.max(Instant::now()) + Duration::from_millis(200));
        self.shown = true;
        let mut err = std::io::stderr().lock();
        // A terminal that has gone away is no reason to stop.
        let _ = write!(err, "\r\x1b[K{}", line());
        let _ = err.flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}

/// Prints rows in columns; the first row is the heading. All but the first column are right-aligned.
pub(super) fn table(out: &mut impl Write, rows: &[Vec<String>]) -> std::io::Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (c, (cell, width)) in row.iter().zip(&widths).enumerate() {
            if c == 0 {
                line += &format!("{cell:<width$}");
            } else {
                line += &format!("  {cell:>width$}");
            }
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}
