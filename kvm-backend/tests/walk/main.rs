// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `shadowmmu walk`: formats, answers, faults, lists, messages.

mod images;
mod input;
mod lists;

use images::{File, Memory, fault, four_levels, lines, mapped};
use serde_json::Value;
use std::slice::from_ref;

#[test]
fn answers_in_the_order_of_the_questions() {
    let output = four_levels().raw().walk("--cr3 4096 --json 0x1fff 4096 0x0 0x9999000 0x200001");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        text,
        "{\"gva\":\"0x1fff\",\"gpa\":\"0x123456fff\",\"page_size\":4096,\"writable\":false,\
         \"user\":false,\"executable\":true,\"global\":true,\"accessed\":false,\"dirty\":false}\n\
         {\"gva\":\"0x1000\",\"gpa\":\"0x123456000\",\"page_size\":4096,\"writable\":false,\
         \"user\":false,\"executable\":true,\"global\":true,\"accessed\":false,\"dirty\":false}\n\
         {\"gva\":\"0x0\",\"gpa\":\"0x7000\",\"page_size\":4096,\"writable\":true,\"user\":true,\
         \"executable\":true,\"global\":false,\"accessed\":true,\"dirty\":true}\n\
         {\"gva\":\"0x9999000\",\"fault\":{\"vector\":14,\"error_code\":0,\"level\":2,\
         \"reason\":\"not_present\"}}\n\
         {\"gva\":\"0x200001\",\"gpa\":\"0x40000001\",\"page_size\":2097152,\"writable\":true,\
         \"user\":true,\"executable\":true,\"global\":false,\"accessed\":true,\"dirty\":true}\n"
    );
    assert!(output.status.success() && output.stderr.is_empty());
}

#[test]
fn every_format_holds_the_same_memory() {
    let memory = four_levels();
    let args =
        "--cr3 0x1000 --json 0x0 0x1000 0x2fff 0x212345 0x40001234 0x400000 0xffff800000001000";
    let expected = lines(&memory.raw().walk(args).stdout);
    assert_eq!(expected.len(), 7);
    // In one piece; in pieces that begin and end anywhere, entries cut through; out of order.
    let all = from_ref(&(0..0x8000)).to_vec();
    let pieces = [(0x1000..0x1001), (0x1001..0x2003), (0x2003..0x3ffe), (0x3ffe..0x4025)].to_vec();
    let mixed = [(0x3333..0x8000), (0..0x3333)].to_vec();
    for ranges in [all, pieces, mixed] {
        let files = [
            ("lime", memory.lime(&ranges)),
            ("elf", memory.elf(true, false, &ranges)),
            ("elf", memory.elf(true, true, &ranges)),
            ("elf", memory.elf(false, false, &ranges)),
            ("elf", memory.elf(false, true, &ranges)),
        ];
        for (i, (format, file)) in files.iter().enumerate() {
            for args in [args.to_owned(), format!("--format {format} {args}")] {
                assert_eq!(lines(&file.walk(&args).stdout), expected, "{i} {ranges:?}");
            }
        }
    }
}

#[test]
fn an_entry_is_outside_if_any_byte_is() {
    let memory = four_levels();
    // 0x4008 is the entry of 0x1000; its last byte is at 0x400f.
    for (end, inside) in [(0x4010, true), (0x400f, false), (0x4009, false)] {
        let lime = memory.lime(&[(0x1000..end), (0x4011..0x4030)]);
        let answer = lime.one("--cr3 0x1000 0x1000");
        let outside = fault("0x1000", 14, 0, 2, "table_outside_image");
        let whole = mapped("0x1000", "0x123456000", 4096, "xg");
        assert_eq!(answer, if inside { whole } else { outside });
        // The neighbour that the second range cuts into, and one that is whole.
        assert_eq!(lime.one("--cr3 0x1000 0x2000")["fault"]["level"], 2);
        assert_eq!(lime.one("--cr3 0x1000 0x4000")["gpa"], "0x9000");
    }
    // The raw file ends within an entry.
    for (len, inside) in [(0x4010, true), (0x400c, false)] {
        let file = File::new(&memory.0[..len]);
        assert_eq!(file.one("--cr3 0x1000 0x1000")["gpa"].is_string(), inside);
    }
    // The zeros at the end of an ELF segment are inside, what follows is not.
    let elf = memory.elf(true, false, from_ref(&(0x1000..0x4050)));
    let args = "--cr3 0x1000";
    assert_eq!(elf.one(&format!("{args} 0x9000")), fault("0x9000", 14, 0, 1, "not_present"));
    assert_eq!(elf.one(&format!("{args} 0xa000"))["fault"]["reason"], "table_outside_image");
    // Levels: of the entry read last; 0 for the top table.
    assert_eq!(
        elf.one("--cr3 0x1000 --access wu 0x400000"),
        fault("0x400000", 14, 6, 2, "table_outside_image")
    );
    assert_eq!(
        elf.one("--cr3 0x55000 --access x 0"),
        fault("0x0", 14, 16, 0, "table_outside_image")
    );
    assert_eq!(elf.one("--cr3 0x1000 0xffffff8000000000")["fault"]["level"], 4);
}

#[test]
fn every_fault_has_its_code_level_and_reason() {
    let file = four_levels().raw();
    let smep = "--cr4 0x100020";
    let smap = "--cr4 0x200020";
    for (args, gva, vector, code, level, reason) in [
        ("", "0x9000", 14, 0, 1, "not_present"),
        ("--access wu", "0x8000000000", 14, 6, 4, "not_present"),
        ("--access x", "0x9000", 14, 16, 1, "not_present"),
        ("--access x --efer 0x500", "0x9000", 14, 0, 1, "not_present"),
        ("--access w", "0x1000", 14, 3, 1, "write"),
        ("--access ru", "0x1000", 14, 5, 1, "user"),
        ("--access wu", "0x1000", 14, 7, 1, "user"),
        ("--access x", "0x2000", 14, 17, 1, "fetch"),
        ("--access xu", "0x2000", 14, 21, 1, "fetch"),
        ("--efer 0x500", "0x2000", 14, 9, 1, "reserved"),
        ("--maxphyaddr 51", "0x3000", 14, 9, 1, "reserved"),
        ("--maxphyaddr 51 --access wu", "0x3000", 14, 15, 1, "reserved"),
        ("", "0x80000000", 14, 9, 3, "reserved"),
        (&format!("{smep} --access x"), "0x0", 14, 17, 1, "smep"),
        (smap, "0x0", 14, 1, 1, "smap"),
        (&format!("{smap} --access w"), "0x200000", 14, 3, 2, "smap"),
        ("--cr4 0x400020 --pkru 0x400 --access ru", "0x4000", 14, 37, 1, "pkey"),
        ("--cr4 0x400020 --pkru 0x800 --access w", "0x4000", 14, 35, 1, "pkey"),
        ("--cr4 0x600020 --pkru 0x400", "0x4000", 14, 33, 1, "smap"),
        ("--cr4 0x1000020 --pkrs 1", "0x1000", 14, 33, 1, "pkey"),
        ("", "0x800000000000", 13, 0, 0, "non_canonical"),
        ("--access wu", "0xffff7fffffffffff", 13, 0, 0, "non_canonical"),
        ("", "0x400000", 14, 0, 2, "table_outside_image"),
    ] {
        let answer = file.one(&format!("--cr3 0x1000 {args} {gva}"));
        assert_eq!(answer, fault(gva, vector, code, level, reason), "{args}");
    }
    // And what lifts them.
    for args in [
        "--access w --cr0 0x80000001 0x1000",
        "--access x --cr4 0x100020 0x1000",
        "--cr4 0x200020 --rflags 0x40002 0x0",
        "--cr4 0x400020 --pkru 0x800 --access ru 0x4000",
        "--cr4 0x400020 --pkru 0xc00 --access xu 0x4000",
        "--maxphyaddr 52 0x3000",
    ] {
        assert!(file.one(&format!("--cr3 0x1000 {args}"))["gpa"].is_string(), "{args}");
    }
}

#[test]
fn other_bits_of_cr3_are_ignored() {
    let file = four_levels().raw();
    assert_eq!(file.one("--cr3 0x1fff 0")["gpa"], "0x7000");
    assert_eq!(file.one("--cr4 0x20020 --cr3 0x1123 0")["gpa"], "0x7000");
}

#[test]
fn tags_are_printed_as_given() {
    let file = four_levels().raw();
    let tagged = "0x7abc000000001008";
    assert_eq!(file.one(&format!("--cr3 0x1000 {tagged}"))["fault"]["reason"], "non_canonical");
    let lam48 = "--cr3 0x4000000000001000";
    let answer = file.one(&format!("{lam48} {tagged}"));
    assert_eq!(answer, mapped(tagged, "0x123456008", 4096, "xg"));
    let answer = file.one(&format!("{lam48} --access wu {tagged}"));
    assert_eq!(answer, fault(tagged, 14, 7, 1, "user"));
    // Tags of fetches stay; of kernel pointers LAM_SUP strips them.
    assert_eq!(file.one(&format!("{lam48} --access x {tagged}"))["fault"]["vector"], 13);
    let kernel = "0x8abc800000001000";
    assert_eq!(file.one(&format!("{lam48} {kernel}"))["fault"]["vector"], 13);
    assert_eq!(
        file.one(&format!("--cr3 0x1000 --cr4 0x10000020 {kernel}")),
        mapped(kernel, "0x123456000", 4096, "xg")
    );
}

#[test]
fn every_paging_mode() {
    let flat = Memory::new(1).raw();
    let none = "--cr0 0x11 --cr3 0";
    assert_eq!(
        flat.one(&format!("{none} 0xfffffabc")),
        mapped("0xfffffabc", "0xfffffabc", 4096, "wux")
    );
    assert_eq!(flat.json(&format!("{none} --all --limit 3"), 1).last().unwrap()["next"], "0x3000");

    // 32-bit: two entries in each word.
    let two = Memory::new(4)
        .with_short(&[
            (0x1000, 0x2007),
            (0x1004, 0x0040_20e5),
            (0x1008, 0x0020_0087),
            (0x1ffc, 0x2001),
            (0x2000, 0x3067),
            (0x2004, 0x0004_4103),
        ])
        .raw();
    let pse = "--cr4 0x10 --efer 0 --cr3 0x1000";
    for (gva, gpa, size, flags) in [
        ("0x123", "0x3123", 4096, "wuxad"),
        ("0x1fff", "0x44fff", 4096, "wxg"),
        // PSE-36: bit 13 is bit 32 of the address.
        ("0x7fffff", "0x1007fffff", 4 << 20, "uxad"),
        ("0xffc00123", "0x3123", 4096, "xad"),
    ] {
        assert_eq!(two.one(&format!("{pse} {gva}")), mapped(gva, gpa, size, flags));
    }
    assert_eq!(two.one(&format!("{pse} 0x800000")), fault("0x800000", 14, 9, 2, "reserved"));
    // Without CR4.PSE the bit is ignored.
    let plain = two.one("--cr4 0 --efer 0 --cr3 0x1000 0x800000");
    assert_eq!(plain["fault"]["reason"], "table_outside_image");
    let all = two.json(&format!("{pse} --all"), 0);
    let gvas: Vec<_> = all.iter().map(|line| line["gva"].as_str().unwrap()).collect();
    assert_eq!(gvas, ["0x0", "0x1000", "0x400000", "0xffc00000", "0xffc01000"]);

    // PAE: four entries at a multiple of 32.
    let pae = Memory::new(5)
        .with(&[
            (0x1020, 0x2001),
            (0x1028, 0x2003),
            (0x1038, 0x9_9001),
            (0x2000, 0x3067),
            (0x2008, 0x8000_0000_0020_00e7),
            (0x3008, 0x4_0000_4003),
        ])
        .raw();
    let args = "--cr4 0x20 --efer 0x800 --cr3 0x1020";
    assert_eq!(pae.one(&format!("{args} 0x1010")), mapped("0x1010", "0x400004010", 4096, "wx"));
    assert_eq!(
        pae.one(&format!("{args} 0x200000")),
        mapped("0x200000", "0x200000", 2 << 20, "wuad")
    );
    for (gva, code, level, reason) in [
        ("0x40000000", 9, 3, "reserved"),
        ("0x80000000", 0, 3, "not_present"),
        ("0xc0000000", 0, 3, "table_outside_image"),
        ("0x400000", 0, 2, "not_present"),
    ] {
        assert_eq!(pae.one(&format!("{args} {gva}")), fault(gva, 14, code, level, reason));
    }
    let beyond = pae.one("--cr4 0x20 --efer 0x800 --cr3 0x5000 0");
    assert_eq!(beyond, fault("0x0", 14, 0, 0, "table_outside_image"));
    assert_eq!(pae.json(&format!("{args} --all"), 0).len(), 2);

    // Five levels.
    let five = four_levels().with(&[(0x5000, 0x1007), (0x5ff8, 0x1007)]).raw();
    let args = "--cr4 0x1020 --cr3 0x5000";
    assert_eq!(five.one(&format!("{args} 0x212345"))["gpa"], "0x40012345");
    assert_eq!(five.one(&format!("{args} 0xff00000000001000"))["gpa"], Value::Null);
    assert_eq!(five.one(&format!("{args} 0xffff000000001000"))["gpa"], "0x123456000");
    let low = five.one(&format!("{args} 0x1000000000000"));
    assert_eq!(low, fault("0x1000000000000", 14, 0, 5, "not_present"));
    let all = five.json(&format!("{args} --all"), 0);
    assert_eq!((all.len(), all[14]["gva"].as_str()), (28, Some("0xffff000000000000")));
}

#[test]
fn the_table_for_people() {
    let output = four_levels().raw().walk("--cr3 0x1000 0x0 0x7fffffffffff 0x41234567");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "gva                 gpa                 size  rights\n\
         0x0                 0x7000                4K  wux-ad\n\
         0x7fffffffffff      fault: not_present at level 4, vector 14, code 0x0\n\
         0x41234567          0x81234567            1G  wux---\n"
    );
}
