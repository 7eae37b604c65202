// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--all`, and what hostile or large images cost.

use super::images::{File, Memory, command, four_levels, mapped};
use serde_json::json;
use std::io::{Read, Seek, SeekFrom, Write};
use std::process::Stdio;

#[test]
fn the_list_has_what_single_walks_find() {
    let file = four_levels().raw();
    let all = file.json("--cr3 0x1000 --all --access wu", 0);
    let sign = "0xffff8000";
    let mut expected = Vec::new();
    for (prefix, keep) in [("0x", "wuxgad"), (sign, "xgad")] {
        for (low, gpa, size, flags) in [
            ("00000000", "0x7000", 4096, "wuxad"),
            ("00001000", "0x123456000", 4096, "xg"),
            ("00002000", "0x8000", 4096, "wu"),
            ("00003000", "0x8000000000000", 4096, "wux"),
            ("00004000", "0x9000", 4096, "wux"),
            ("00200000", "0x40000000", 2 << 20, "wuxad"),
            ("40000000", "0x80000000", 1 << 30, "wux"),
        ] {
            let low = if prefix == "0x" { low.trim_start_matches('0') } else { low };
            let gva = format!("{prefix}{}", if low.is_empty() { "0" } else { low });
            let flags: String = flags.chars().filter(|flag| keep.contains(*flag)).collect();
            expected.push(mapped(&gva, gpa, size, &flags));
        }
    }
    assert_eq!(all, expected);
    // One by one.
    let gvas: Vec<_> = all.iter().map(|line| line["gva"].as_str().unwrap()).collect();
    assert_eq!(file.json(&format!("--cr3 0x1000 {}", gvas.join(" ")), 0), all);
    // The reserved bit counts as one.
    assert_eq!(file.json("--cr3 0x1000 --all --maxphyaddr 51", 0).len(), 12);
    // A table in pieces.
    let lime = four_levels().lime(&[(0x1000..0x400c), (0x4010..0x401f)]);
    assert_eq!(lime.json("--cr3 0x1000 --all", 0).len(), 8);
    // Nothing at all.
    assert!(file.json("--cr3 0x99000 --all", 0).is_empty());
}

#[test]
fn a_list_that_is_cut_short_says_so() {
    let file = four_levels().raw();
    let args = "--cr3 0x1000 --all --limit";
    let all = file.json("--cr3 0x1000 --all", 0);
    for limit in [0, 1, 6, 13] {
        let cut = file.json(&format!("{args} {limit}"), 1);
        assert_eq!(cut[..limit], all[..limit]);
        assert_eq!(cut[limit..], [json!({"truncated": true, "next": all[limit]["gva"]})]);
    }
    for limit in ["14", "0xe", "15"] {
        assert_eq!(file.json(&format!("{args} {limit}"), 0), all);
    }
    let text = String::from_utf8(file.walk(&format!("{args} 1")).stdout).unwrap();
    assert_eq!(text.lines().last(), Some("truncated: the next mapping is that of 0x1000"));
}

#[test]
fn tables_that_refer_to_themselves_end_at_the_limit() {
    let looped: Vec<_> = (0..512).map(|i| (0x1000 + i * 8, 0x1067)).collect();
    let file = Memory::new(2).with(&looped).raw();
    let lines = file.json("--cr3 0x1000 --all --limit 100000", 1);
    assert_eq!(lines.len(), 100_001);
    assert_eq!(lines[99_999], mapped(&format!("{:#x}", 99_999 << 12), "0x1000", 4096, "wuxad"));
    assert_eq!(lines[100_000], json!({"truncated": true, "next": format!("{:#x}", 100_000 << 12)}));
    // One self-reference, as recursive paging has it.
    let file = four_levels().with(&[(0x1ff8, 0x1067)]).raw();
    let lines = file.json("--cr3 0x1000 --all", 0);
    assert_eq!(lines.last().unwrap()["gva"], "0xfffffffffffff000");
    let table = lines.iter().find(|line| line["gva"] == "0xffffff8000000000").unwrap();
    assert_eq!((&table["gpa"], &table["page_size"]), (&json!("0x4000"), &json!(4096)));
}

#[test]
fn tables_without_mappings_end_soon() {
    // 2^36 ways to a page without entries: outside, in the file, half in it.
    for (len, last) in [(0x6000, 0x9_9000), (0x6000, 0x5000), (0x5804, 0x5000)] {
        let mut memory = Memory::new(6);
        for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, last)]
        {
            let entries: Vec<_> = (0..512).map(|i| (table + i * 8, next | 7)).collect();
            memory = memory.with(&entries);
        }
        let file = File::new(&memory.0[..len]);
        assert!(file.json("--cr3 0x1000 --cr4 0x1020 --all", 0).is_empty());
        // With a level less the entries map pages.
        assert_eq!(file.json("--cr3 0x1000 --all --limit 5", 1).len(), 6);
    }
}

#[test]
fn an_image_is_never_changed() {
    let file = four_levels().raw();
    let mut permissions = std::fs::metadata(file.path()).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(file.path(), permissions).unwrap();
    let modified = || std::fs::metadata(file.path()).unwrap().modified().unwrap();
    let (before, time) = (file.bytes(), modified());
    file.one("--cr3 0x1000 --access wu 0x4000");
    file.json("--cr3 0x1000 --all", 0);
    assert!(file.bytes() == before && modified() == time);
}

#[test]
fn a_sparse_image_takes_no_time() {
    let file = File::new(&four_levels().0);
    let mut sparse = std::fs::File::options().write(true).open(file.path()).unwrap();
    sparse.set_len(64 << 30).unwrap();
    sparse.seek(SeekFrom::Start(0x99000)).unwrap();
    sparse.write_all(&0x10_0000_0067u64.to_le_bytes()).unwrap();
    let start = std::time::Instant::now();
    assert_eq!(file.one("--cr3 0x1000 0x400123")["gpa"], "0x1000000123");
    assert_eq!(file.json("--cr3 0x1000 --all", 0).len(), 16);
    // A top table in a hole maps nothing.
    assert_eq!(file.one("--cr3 0x800000000 0")["fault"]["reason"], "not_present");
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let looped: Vec<_> = (0..512).map(|i| (0x1000 + i * 8, 0x1067)).collect();
    let file = Memory::new(2).with(&looped).raw();
    let mut child = command(file.path(), "--cr3 0x1000 --all")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut some = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]));
    // A full disk is no closed pipe.
    if let Ok(full) = std::fs::File::options().write(true).open("/dev/full") {
        let mut command = command(file.path(), "--cr3 0x1000 --all --limit 9999");
        let output = command.stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("standard output"));
    }
}
