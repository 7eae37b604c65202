// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory images made by hand.

use serde_json::{Value, json};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Guest-physical memory from 0 on.
#[derive(Clone)]
pub struct Memory(pub Vec<u8>);

impl Memory {
    pub fn new(pages: usize) -> Self {
        Self(vec![0; pages * 0x1000])
    }

    /// Stores 8-byte entries.
    pub fn with(mut self, entries: &[(usize, u64)]) -> Self {
        for (at, entry) in entries {
            self.0[*at..*at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        self
    }

    /// Stores 4-byte entries.
    pub fn with_short(mut self, entries: &[(usize, u32)]) -> Self {
        for (at, entry) in entries {
            self.0[*at..*at + 4].copy_from_slice(&entry.to_le_bytes());
        }
        self
    }

    pub fn raw(&self) -> File {
        File::new(&self.0)
    }

    /// The ranges as LiME has them.
    pub fn lime(&self, ranges: &[Range<usize>]) -> File {
        let mut bytes = Vec::new();
        for range in ranges {
            bytes.extend(0x4c69_4d45u32.to_le_bytes());
            bytes.extend(1u32.to_le_bytes());
            for word in [range.start as u64, range.end as u64 - 1, 0] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend(&self.0[range.clone()]);
        }
        File::new(&bytes)
    }

    /// The ranges as a core of 32 or 64 bits has them: each without the zeros at its end, and with
    /// a note before the first. `extended` says how many segments there are in a section header.
    pub fn elf(&self, wide: bool, extended: bool, ranges: &[Range<usize>]) -> File {
        let word =
            |number: usize| (number as u64).to_le_bytes()[..if wide { 8 } else { 4 }].to_vec();
        let half = |number: usize| (number as u16).to_le_bytes().to_vec();
        let full = |number: usize| (number as u32).to_le_bytes().to_vec();
        let [header, program_header, section] = if wide { [64, 56, 64] } else { [52, 32, 40] };
        let count = ranges.len() + 1;
        let kind = if wide { 2 } else { 1 };
        let mut bytes = vec![0x7f, b'E', b'L', b'F', kind, 1, 1];
        bytes.resize(16, 0);
        bytes.extend([half(4), half(if wide { 62 } else { 3 }), full(1)].concat());
        let sections = header + count * program_header;
        bytes.extend([word(0), word(header), word(if extended { sections } else { 0 })].concat());
        let number = if extended { 0xffff } else { count };
        bytes.extend([full(0), half(header), half(program_header), half(number)].concat());
        bytes.extend([half(section), half(1), half(0)].concat());
        // An odd offset: segments are not aligned to anything.
        let data = sections + section + 13;
        let mut contents = vec![0xee; 13];
        let mut program = |kind, base, in_file, in_memory, at| {
            let fields = if wide {
                [full(kind), full(7), word(at), word(0), word(base), word(in_file), word(in_memory)]
                    .concat()
            } else {
                [full(kind), word(at), word(0), word(base), word(in_file), word(in_memory), full(7)]
                    .concat()
            };
            bytes.extend([fields, word(0)].concat());
        };
        program(4, 0, 4, 4, data - 4);
        for range in ranges {
            let part = &self.0[range.clone()];
            let used = part.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            program(1, range.start, used, part.len(), data - 13 + contents.len());
            contents.extend(&part[..used]);
        }
        assert_eq!(bytes.len(), sections);
        bytes.resize(sections + section, 0);
        if extended {
            let at = sections + if wide { 44 } else { 28 };
            bytes[at..at + 4].copy_from_slice(&full(count));
        }
        bytes.extend(contents);
        File::new(&bytes)
    }
}

/// A file that goes away with the value.
pub struct File(pub PathBuf);

impl File {
    pub fn new(bytes: &[u8]) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("shadowmmu-walk-{}-{n}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.0).unwrap()
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// `shadowmmu walk --image` of this file.
    pub fn walk(&self, args: &str) -> Output {
        command(&self.0, args).output().unwrap()
    }

    /// The same with `--json`, which must end with `status`.
    pub fn json(&self, args: &str, status: i32) -> Vec<Value> {
        let output = self.walk(&format!("--json {args}"));
        assert_eq!(output.status.code(), Some(status), "{args}: {output:?}");
        lines(&output.stdout)
    }

    /// The answer for one address.
    pub fn one(&self, args: &str) -> Value {
        let mut lines = self.json(args, 0);
        assert_eq!(lines.len(), 1, "{args}: {lines:?}");
        lines.remove(0)
    }

    /// The same with standard input.
    pub fn fed(&self, args: &str, input: &[u8]) -> Output {
        let mut child = command(&self.0, args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The command may end before it has read everything.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

pub fn command(image: &Path, args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shadowmmu"));
    command.arg("walk").arg("--image").arg(image).args(args.split_whitespace());
    command
}

pub fn lines(output: &[u8]) -> Vec<Value> {
    output
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect()
}

/// Tables of four levels at 0x1000:
///
/// | gva | |
/// | --- | --- |
/// | 0x0 | 0x7000 rwxu, accessed, dirty |
/// | 0x1000 | 0x123456000, supervisor, read-only, global |
/// | 0x2000 | 0x8000, user, NX |
/// | 0x3000 | a reserved bit if maxphyaddr is below 52 |
/// | 0x4000 | 0x9000, user, key 5 |
/// | 0x200000 | a page of 2 MiB at 0x40000000 |
/// | 0x400000 | a table at 0x99000 |
/// | 0x40000000 | a page of 1 GiB at 0x80000000 |
/// | 0x80000000 | a page of 1 GiB with a reserved bit |
/// | 0xffff800000000000 | the same tables again, supervisor only, read-only |
pub fn four_levels() -> Memory {
    Memory::new(8).with(&[
        (0x1000, 0x2007),
        (0x1800, 0x2001),
        (0x1ff8, 0x7777_0003),
        (0x2000, 0x3007),
        (0x2008, 0x8000_0087),
        (0x2010, 0x8000_2087),
        (0x3000, 0x4007),
        (0x3008, 0x4000_00e7),
        (0x3010, 0x9_9007),
        (0x4000, 0x7067),
        (0x4008, 0x1_2345_6101),
        (0x4010, 0x8000_0000_0000_8007),
        (0x4018, 1 << 51 | 7),
        (0x4020, 5 << 59 | 0x9007),
    ])
}

pub fn mapped(gva: &str, gpa: &str, page_size: u64, flags: &str) -> Value {
    let flag = |letter| flags.contains(letter);
    json!({
        "gva": gva, "gpa": gpa, "page_size": page_size, "writable": flag('w'), "user": flag('u'),
        "executable": flag('x'), "global": flag('g'), "accessed": flag('a'), "dirty": flag('d'),
    })
}

pub fn fault(gva: &str, vector: u64, error_code: u64, level: u64, reason: &str) -> Value {
    let fault =
        json!({"vector": vector, "error_code": error_code, "level": level, "reason": reason});
    json!({"gva": gva, "fault": fault})
}
