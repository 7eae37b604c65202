// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The package's only test in a build without shuttle: runs the storms with `cargo shuttle`, a second
//! each unless `SHUTTLE_SECONDS` says otherwise.
//!
//! So `cargo test --workspace` runs them too, and `cargo shuttle` does even if a `RUSTFLAGS` in the
//! environment took the place of the alias's flags.
#![cfg(not(shuttle))]

use std::env;
use std::path::Path;
use std::process::Command;

/// Set for the child: a build without shuttle there means that the flags were lost.
const CHILD: &str = "SHUTTLE_TESTS_CHILD";
/// Flags of the build, as in `.cargo/config.toml`.
const FLAGS: [&str; 4] = ["--cfg", "loom", "--cfg", "shuttle"];

/// The flags of this build's environment, which the storms keep: for instance a sanitizer's.
fn inherited_flags() -> Vec<String> {
    let split = |flags: String, at: char| {
        flags.split(at).filter(|flag| !flag.is_empty()).map(String::from).collect()
    };
    match env::var("CARGO_ENCODED_RUSTFLAGS") {
        Ok(flags) => split(flags, '\u{1f}'),
        Err(_) => env::var("RUSTFLAGS").map_or(Vec::new(), |flags| split(flags, ' ')),
    }
}

#[test]
fn cargo_shuttle_runs_the_storms() {
    assert!(
        env::var_os(CHILD).is_none(),
        "`cargo shuttle` was run with its flags and built the package without them"
    );
    let mut flags = inherited_flags();
    flags.extend(FLAGS.map(String::from));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let seconds = env::var_os("SHUTTLE_SECONDS").unwrap_or_else(|| "1".into());
    // The encoded flags go before every other source of flags.
    let output = Command::new(cargo)
        .arg("shuttle")
        .current_dir(root)
        .env(CHILD, "1")
        .env("SHUTTLE_SECONDS", seconds)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .output()
        .expect("cargo can be run");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    assert!(output.status.success(), "cargo shuttle: {}\n{err}", output.status);
    let ran = |name: &str| out.lines().any(|line| line.starts_with(name) && line.ends_with("ok"));
    assert!(
        ran("test storms::everything_at_once ") && ran("test r06_mutant "),
        "no storm was run\n{err}"
    );
}
