// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line: formats, exit status, messages.

use serde_json::Value;
use std::process::{Command, Output, Stdio};

fn shadowmmu(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shadowmmu")).args(args).output().unwrap()
}

#[test]
fn run_prints_one_json_document() {
    let args = ["run", "--backend", "soft", "--memory", "0x8", "--seconds", "1", "--json"];
    let output = shadowmmu(&args);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["backend"], "soft");
    assert_eq!(document["vcpus"], 2);
    assert_eq!(document["verified"], true);
    assert!(document["backend_reason"].is_string());
    let runs = document["runs"].as_array().unwrap();
    let names: Vec<_> = runs.iter().map(|run| run["workload"].as_str().unwrap()).collect();
    assert_eq!(names, ["touch", "remap", "precopy", "churn", "switch"]);
    for run in runs {
        assert_eq!(run["verified"], true);
        assert_eq!(run["audit"]["ok"], true);
        assert!(run["audit"]["sptes"].as_u64().unwrap() > 0);
        assert!(run["stats"]["pf_fixed"].as_u64().unwrap() > 0);
        assert!(run["seconds"].as_f64().unwrap() > 0.0);
        assert!(run["faults_per_second"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn without_a_subcommand_it_runs() {
    let args = ["--backend", "soft", "--memory", "8", "--seconds", "1", "--workload", "touch"];
    let output = shadowmmu(&args);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.starts_with("workload") && table.contains("touch"), "{table}");
}

#[test]
fn bad_usage_names_the_argument() {
    for (args, said) in [
        (&["run", "--workload", "nonsense"][..], "nonsense"),
        (&["run", "--backend", "xen"], "xen"),
        (&["run", "--vcpus", "0", "--backend", "soft"], "--vcpus 0"),
        (&["run", "--vcpus", "1000000", "--backend", "soft"], "--vcpus 1000000"),
        (&["run", "--vcpus", "two"], "two"),
        (&["run", "--memory", "1", "--backend", "soft"], "--memory 1"),
        (&["run", "--vcpus", "64", "--memory", "4", "--backend", "soft"], "switch"),
        (&["run", "--memory", "0xffffffffffff", "--backend", "soft"], "--memory 281474976710655"),
        (&["run", "--memory", "1048576", "--backend", "soft"], "--memory 1048576"),
        (&["run", "--seconds", "0"], "--seconds 0"),
        (&["run", "--colour"], "--colour"),
        (&["frobnicate"], "frobnicate"),
    ] {
        let output = shadowmmu(args);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert!(message.contains(said), "{args:?}: {message}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn a_backend_that_is_not_there_is_named() {
    if std::path::Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: /dev/kvm is there");
        return;
    }
    let output = shadowmmu(&["run", "--backend", "kvm"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/kvm"));
}

#[test]
fn info_says_what_is_here() {
    let output = shadowmmu(&["info", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in ["kvm", "userfaultfd"] {
        assert!(document[key].is_boolean(), "{document}");
    }
    assert!(matches!(document["backend"].as_str(), Some("kvm" | "soft")));
    assert_eq!(document["kvm"] == true, document["capabilities"]["sync_regs"].is_number());
    assert!(document["cpus"].as_u64().unwrap() > 0);
    let table = String::from_utf8(shadowmmu(&["info"]).stdout).unwrap();
    assert!(table.starts_with("backend: "), "{table}");
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_shadowmmu"))
        .args(["info"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
}
