// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Standard input, and input that is wrong.

use super::images::{File, command, four_levels, lines};
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::slice::from_ref;

#[test]
fn addresses_from_standard_input() {
    let file = four_levels().raw();
    let args = "--cr3 0x1000 --json -";
    let output = file.fed(args, b"0x1000\n\n  \n 0x200000\t\r\n4096");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let expected = file.json("--cr3 0x1000 0x1000 0x200000 0x1000", 0);
    assert_eq!(lines(&output.stdout), expected);
    assert!(file.fed(args, b"").stdout.is_empty());
    // A bad line ends it, after the answers before.
    let long = [b"0x0\n".to_vec(), vec![b'1'; 5000]].concat();
    let long = &long[..];
    for (input, said) in [
        (&b"0x0\n0x1zz\n0x1000\n"[..], "line 2: `0x1zz` is not a number"),
        (b"0x0\n\n\xff\xfe\n", "line 3:"),
        (b"0x0\n\x1b[2J\n", "line 2: `\\u{1b}[2J`"),
        (b"0\n0x10000000000000000\n", "line 2:"),
        (long, "line 2: longer than"),
    ] {
        let output = file.fed(args, input);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(said) && message.contains("standard input"), "{message}");
        assert_eq!(lines(&output.stdout).len(), 1);
    }
    let narrow = file.fed("--cr3 0x1000 --efer 0 --cr4 0 --json -", b"1\n0x100000000\n2\n");
    assert_eq!((narrow.status.code(), lines(&narrow.stdout).len()), (Some(2), 1));
}

#[test]
fn an_answer_comes_before_the_next_question() {
    let file = four_levels().raw();
    let mut child = command(file.path(), "--cr3 0x1000 --json -")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut questions = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap());
    for gva in ["0x0", "0x1000", "0x99999000"] {
        writeln!(questions, "{gva}").unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        assert_eq!(lines(line.as_bytes())[0]["gva"], gva);
    }
    drop(questions);
    assert!(child.wait().unwrap().success());
}

#[test]
fn bad_input_is_named() {
    let file = four_levels().raw();
    let empty = File::new(&[]);
    let lime = File::new(&four_levels().lime(from_ref(&(0..0x8000))).bytes()[..0x4000]);
    let elf = File::new(&four_levels().elf(true, false, from_ref(&(0..0x8000))).bytes()[..0x3000]);
    let magic = File::new(b"EMiL but no more than that");
    for (file, args, said) in [
        (&file, "0", "--cr3"),
        (&file, "--cr3 0x1000", "GVA"),
        (&file, "--cr3 0x1000 0x1g", "0x1g"),
        (&file, "--cr3 0x1000 -5", "-5"),
        (&file, "--cr3 0x1000 - 5", "`-`"),
        (&file, "--cr3 0x1000 --all 5", "--all"),
        (&file, "--cr3 0x1000 --limit 5 5", "--all"),
        (&file, "--cr3 0x1000 --format vmcore 5", "vmcore"),
        (&file, "--cr3 0x1000 --access rw 5", "rw"),
        (&file, "--cr3 x 5", "`x`"),
        (&file, "--cr3 0x10000000000000 5", "cr3 0x10000000000000 does not fit into 52"),
        (&file, "--cr3 0x10000000000 --maxphyaddr 40 5", "cr3 0x10000000000 does not fit into 40"),
        (&file, "--cr3 0x1000 --maxphyaddr 31 5", "maxphyaddr 31"),
        (&file, "--cr3 0x1000 --maxphyaddr 53 5", "maxphyaddr 53"),
        (&file, "--cr3 0x1000 --maxphyaddr 308 5", "maxphyaddr 308"),
        (&file, "--cr3 0x1000 --pkru 0x100000000 5", "--pkru 0x100000000"),
        (&file, "--cr3 0x1000 --pkrs 0x100000000 5", "--pkrs 0x100000000"),
        (&file, "--cr3 0x1000 --cr0 0x80000000 5", "PG without PE"),
        (&file, "--cr3 0x1000 --cr0 0x11 --efer 0xd00 5", "efer 0xd00 with cr0 0x11"),
        (&file, "--cr3 0x1000 --cr4 0 5", "cr4 0x0: PAE is clear"),
        (&file, "--cr3 0x1000 --cr4 0x8020 5", "cr4 0x8020"),
        (&file, "--cr3 0x1000 --efer 0x900 5", "efer 0x900"),
        (&file, "--cr3 0x1000 --efer 0 0x0 0x100000000", "gva 0x100000000"),
        (&file, "--cr3 0x1000 --cr0 0x11 --efer 0 0x100000000", "gva 0x100000000"),
        (&file, "--cr3 0x1000 --format elf 5", "no ELF header"),
        (&file, "--cr3 0x1000 --format lime 5", "no LiME header"),
        (&empty, "--cr3 0x1000 5", "is empty"),
        (
            &lime,
            "--cr3 0x1000 5",
            "segment 0 (guest-physical 0x0) is 32768 bytes at offset 0x20, but the file has only 16384",
        ),
        (&elf, "--cr3 0x1000 5", "segment 1 (guest-physical 0x0) is"),
        (
            &magic,
            "--cr3 0x1000 5",
            "a LiME header at offset 0x0 needs 32 bytes, but the file has only 26",
        ),
    ] {
        let output = file.walk(&format!("--json {args}"));
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args}: {message}");
        assert!(message.contains(said), "{args}: {message}");
        assert!(output.stdout.is_empty(), "{args}");
    }
    for (path, said) in [
        ("/nonexistent/image", "/nonexistent/image: No such file"),
        ("/", "/: is a directory"),
        ("/dev/zero", "/dev/zero: is not a regular file"),
    ] {
        let output = command(path.as_ref(), "--cr3 0x1000 5").output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(said), "{message}");
    }
}
