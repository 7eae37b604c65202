// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The package's only test in a build without models: runs them with `cargo loom`.
//!
//! So `cargo test --workspace` runs the models too, and `cargo loom` does even if a `RUSTFLAGS` in
//! the environment took the place of the alias's flags.
#![cfg(not(loom))]

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// Set for the child: a build without models there means that the flags were lost.
const CHILD: &str = "LOOM_TESTS_CHILD";
/// Flags of the model build, as in `.cargo/config.toml`.
const FLAGS: [&str; 4] = ["--cfg", "loom", "--cfg", "crossbeam_loom"];

/// The flags of this build's environment, which the models keep: for instance a sanitizer's.
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
fn cargo_loom_runs_the_models() {
    assert!(
        env::var_os(CHILD).is_none(),
        "`cargo loom` was run with the model's flags and built the package without them"
    );
    let mut flags = inherited_flags();
    flags.extend(FLAGS.map(String::from));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // The encoded flags go before every other source of flags.
    let output = Command::new(cargo)
        .arg("loom")
        .current_dir(root)
        .env(CHILD, "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .output()
        .expect("cargo can be run");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    assert!(output.status.success(), "cargo loom: {}\n{err}", output.status);
    let ran = |line: &str| line.starts_with("test r") && line.ends_with("ok");
    assert!(out.lines().any(ran), "cargo loom ran no model\n{err}");
    for file in fs::read_dir(root.join("loom-tests/tests")).expect("the models") {
        let name = file.expect("a file").file_name();
        let name = format!("tests/{}", name.to_string_lossy());
        assert!(err.contains(&name), "the alias `loom` leaves {name} out\n{err}");
    }
}
