// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Headers, good and hostile.

use super::*;
use mmu_core::addr::Gva;
use mmu_core::paging::{PagingMode, Regs};

fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ x << 17
}

fn elf64(segments: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(64, 0);
    bytes[16] = 4;
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
    for [offset, base, in_file, in_memory] in segments {
        bytes.extend(1u64.to_le_bytes());
        for word in [*offset, 0, *base, *in_file, *in_memory, 0] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

fn lime(base: u64, last: u64) -> Vec<u8> {
    let words = [0x1_4c69_4d45, base, last, 0];
    words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect()
}

fn problem(bytes: &[u8], format: Format) -> String {
    parts(bytes, format).unwrap_err().to_string()
}

/// An image of these bytes in a file of its own.
fn image(name: &str, bytes: &[u8]) -> (std::path::PathBuf, Result<Image, ImageError>) {
    let path = std::env::temp_dir().join(format!("shadowmmu-{}-{name}", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    let image = Image::open(&path, Format::Auto);
    (path, image)
}

#[test]
fn parts_of_an_elf_core() {
    let mut bytes = elf64(&[[240, 0x1000, 8, 0x10], [0, 0x5000, 0, 0], [244, 0x9000, 4, 4]]);
    assert!(matches!(problem(&bytes, Format::Auto), text if text.contains("segment 0")));
    bytes.resize(300, 0);
    let part = |base, len, offset| Part { base, len, offset };
    let expected = [part(0x1000, 8, Some(240)), part(0x1008, 8, None), part(0x9000, 4, Some(244))];
    assert_eq!(parts(&bytes[..], Format::Auto).unwrap(), expected);
}

#[test]
fn wrong_elf_headers_are_named() {
    let good = {
        let mut bytes = elf64(&[[120, 0x1000, 8, 8]]);
        bytes.resize(200, 0);
        bytes
    };
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        problem(&bytes, Format::Elf)
    };
    assert!(parts(&good[..], Format::Elf).is_ok());
    for (at, value, said) in [
        (0, 0, "no ELF header at offset 0x0"),
        (4, 3, "ELF class is 3"),
        (5, 2, "data encoding is 2"),
        (16, 2, "ELF type is 2"),
        (54, 55, "program header is 55"),
        (39, 0xff, "program header table at offset 0xff00000000000040 needs 56 bytes"),
        (56, 200, "program header table at offset 0x40 needs 11200 bytes"),
        (56, 0, "no memory segments"),
        (64 + 15, 0x80, "segment 0 (guest-physical 0x1000) is 8 bytes at offset 0x80000000"),
        (64 + 33, 1, "file size 264 exceeds memory size 8"),
    ] {
        let text = with(at, value);
        assert!(text.contains(said), "{at}: {text}");
    }
    let mut high = good.clone();
    high[64 + 24..64 + 32].fill(0xff);
    assert!(problem(&high, Format::Elf).contains("segment 0 begins at guest-physical 0xffff"));
    for len in [4, 15, 16, 63, 64, 119] {
        let text = problem(&good[..len], Format::Auto);
        assert!(text.contains("the file has only"), "{text}");
    }
    assert!(problem(&good[..120], Format::Auto).contains("the file has only 120 bytes"));
}

#[test]
fn wrong_lime_headers_are_named() {
    let mut good = lime(0x1000, 0x1003);
    good.extend([1, 2, 3, 4]);
    good.extend(lime(0x8000, 0x8000));
    good.push(5);
    let part = |base, len, offset| Part { base, len, offset: Some(offset) };
    let expected = [part(0x1000, 4, 32), part(0x8000, 1, 68)];
    assert_eq!(parts(&good[..], Format::Auto).unwrap(), expected);
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        problem(&bytes, Format::Lime)
    };
    for (at, value, said) in [
        (0, 0, "no LiME header at offset 0x0"),
        (4, 2, "version of a LiME header is 2"),
        (17, 0, "segment 0 begins at guest-physical 0x1000 and ends before"),
        (16, 2, "no LiME header at offset 0x23"),
        (36, 0, "no LiME header at offset 0x24"),
        (40, 2, "version of a LiME header is 2"),
        (54, 1, "segment 1 (guest-physical 0x8000) is 65537 bytes at offset 0x44, but the file"),
    ] {
        let text = with(at, value);
        assert!(text.contains(said), "{at}: {text}");
    }
    assert!(problem(&good[..50], Format::Lime).contains("LiME header at offset 0x24 needs 32"));
    let whole = lime(0, u64::MAX);
    assert!(problem(&whole, Format::Lime).contains("segment 0 begins"));
}

#[test]
fn random_headers_neither_panic_nor_allocate_much() {
    let mut x = 0x0123_4567_89ab_cdef;
    let mut random = move || {
        x = xorshift(x);
        x
    };
    let mut good = 0;
    for round in 0..60_000u64 {
        let mut bytes = match round % 4 {
            0 => elf64(&[[300, random() % 64, 50, 60], [330, 0x20, 20, 20], [400, 0, 100, 100]]),
            1 => lime(random() % 64, 99),
            2 => [&lime(0x10, 0x2f)[..], &[7; 32], &lime(0x20, 0x2f)].concat(),
            _ => (0..random() % 200).map(|_| random() as u8).collect(),
        };
        if round % 8 == 0 {
            // The same as a 32-bit file: other fields, mostly nonsense.
            bytes[4] = 1;
            bytes[42] = 32;
            bytes[44] = random() as u8;
        }
        if round % 4 == 3 && bytes.len() > 64 {
            let magic = if round % 8 < 4 { elf::MAGIC } else { lime::MAGIC };
            bytes[..4].copy_from_slice(&magic);
        }
        bytes.resize(bytes.len() + (random() % 400) as usize, random() as u8);
        for _ in 0..random() % 6 {
            let at = random() as usize % bytes.len().clamp(1, 256);
            let value = [0, 1, 0x7f, 0x80, 0xff, random() as u8][random() as usize % 6];
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        for format in [Format::Auto, Format::Elf, Format::Lime] {
            let Ok(parts) = parts(&bytes[..], format) else { continue };
            good += 1;
            // No more than the file has headers for.
            assert!(parts.len() <= 2 + bytes.len() / 16);
            let segments = Segments::new(&parts);
            for gpa in (0..128).chain([u64::MAX, u64::MAX - 7, 1 << 52, random()]) {
                if let Some(Run { offset: Some(offset), len }) = segments.run(gpa) {
                    assert!(offset.checked_add(len).unwrap() <= bytes.len() as u64);
                }
                let _ = segments.touches(gpa, 4096);
            }
        }
    }
    assert!(good > 5_000, "{good}");
}

#[test]
fn entries_are_read_to_the_byte() {
    // Bytes 0x10..0x1c in two segments of the file, zeros to 0x20, and a lone byte.
    let mut bytes = elf64(&[[300, 0x10, 6, 6], [310, 0x16, 6, 0xa], [320, 0x30, 1, 1]]);
    bytes.resize(300, 0xee);
    bytes.extend([1, 2, 3, 4, 5, 6, 0xee, 0xee, 0xee, 0xee, 7, 8, 9, 10, 11, 12]);
    bytes.resize(330, 0xee);
    let (path, image) = image("entries", &bytes);
    let image = image.unwrap();
    std::fs::remove_file(path).unwrap();
    let entry = |gpa, size| image.entry(Gpa(gpa), size);
    assert_eq!((image.format(), image.bytes()), (Format::Elf, 0x11));
    assert_eq!(entry(0x10, 8), Some(0x0807_0605_0403_0201));
    assert_eq!(entry(0x10, 4), Some(0x0403_0201));
    assert_eq!(entry(0x14, 4), Some(0x0807_0605));
    assert_eq!(entry(0x18, 8), Some(0x0c0b_0a09));
    assert_eq!(entry(0x1c, 4), Some(0));
    assert_eq!((entry(0x19, 8), entry(0x1d, 4)), (None, None));
    assert_eq!((entry(0xf, 4), entry(0x30, 4), entry(u64::MAX - 3, 8)), (None, None, None));
    let mut buffer = [0xff; 32];
    assert_eq!(image.read(Gpa(0x14), &mut buffer), 12);
    assert_eq!(buffer[..12], [5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0]);
}

#[test]
fn what_is_no_image_is_refused() {
    let open = |path: &str| Image::open(Path::new(path), Format::Auto).unwrap_err().problem;
    assert!(matches!(open("/"), Problem::Directory));
    assert!(matches!(open("/dev/null"), Problem::NotRegular));
    assert!(matches!(open("/nonexistent/image"), Problem::Io(_)));
    let (path, image) = image("empty", &[]);
    assert!(matches!(image.unwrap_err().problem, Problem::Empty));
    std::fs::remove_file(path).unwrap();
}

/// Random tables over a few pages, in part outside: the list is what single walks say.
#[test]
fn the_list_agrees_with_walks() {
    const PAGES: u64 = 5;
    let mut x = 0xfeed_beef_1234_5678;
    let mut random = move || {
        x = xorshift(x);
        x
    };
    let mut listed = 0;
    for round in 0..60u64 {
        // Pages 1 to 5, with a hole of some bytes in one of them.
        let (hole, size) = (0x1000 + random() % (PAGES * 0x1000), random() % 40);
        let end = 0x1000 + PAGES * 0x1000;
        let after = (hole + size).min(end);
        let mut bytes = lime(0x1000, hole.max(0x1001) - 1);
        let word = |random: &mut dyn FnMut() -> u64| {
            let flags = random() & random() & 0x8000_0000_0000_0ffe;
            let at = (random() % (PAGES + 2)) << 12;
            // Few entries, so that the trees stay small.
            if random() % 64 == 0 { at | flags | 1 } else { flags & !1 }
        };
        let mut memory: Vec<u8> = Vec::new();
        while (memory.len() as u64) < PAGES * 0x1000 {
            let (low, high) = (word(&mut random), word(&mut random));
            let entry = if round % 4 == 0 { low & 0xffff_ffff | high << 32 } else { low };
            memory.extend(entry.to_le_bytes());
        }
        bytes.extend(&memory[..(hole.max(0x1001) - 0x1000) as usize]);
        if after < end {
            bytes.extend(lime(after, end - 1));
            bytes.extend(&memory[(after - 0x1000) as usize..]);
        }
        let long = Regs::long_mode(0x1000);
        let regs = match round % 4 {
            0 => Regs { cr4: 0x10, efer: 0, ..long },
            1 => Regs { cr4: 0x20, efer: 0x800, cr3: 0x1020, ..long },
            2 => long,
            _ => Regs { cr4: long.cr4 | 0x1000, ..long },
        };
        let mode = PagingMode::new(&regs).unwrap();
        let (path, image) = image(&format!("list-{round}"), &bytes);
        let image = image.unwrap();
        std::fs::remove_file(path).unwrap();
        let mut last = None;
        for mapped in Mappings::new(&image, &mode).take(5_000) {
            listed += 1;
            let at = mapped.gva.0 as u128;
            assert!(last.is_none_or(|last| last < at), "{mapped:?}");
            // Between two mappings there is none: the ends of the gap, and a place within.
            let begin = last.map_or(0, |last: u128| last);
            last = Some(at + u128::from(mapped.page_size) - 1);
            let gap = at.saturating_sub(begin + 1);
            for probe in
                [begin + 1, at.saturating_sub(1), begin + 1 + u128::from(random()) % gap.max(1)]
            {
                if gap > 0 && probe > begin && probe < at {
                    let found = mode.translate_in(&image, Gva(probe as u64), None);
                    assert!(found.is_err(), "{probe:#x} before {mapped:?}: {found:?}");
                }
            }
            let offset = random() % mapped.page_size;
            let gva = mapped.gva.wrapping_add(offset);
            let walk = mode.translate_in(&image, gva, None).unwrap();
            assert_eq!(walk.gpa, mapped.gpa.wrapping_add(offset));
            assert_eq!(
                (walk.page_size, walk.rights.write, walk.rights.user, walk.rights.execute),
                (mapped.page_size, mapped.rights.write, mapped.rights.user, mapped.rights.execute)
            );
            assert_eq!(
                (walk.global, walk.accessed, walk.dirty, walk.rights.key),
                (mapped.global, mapped.accessed, mapped.dirty, mapped.rights.key)
            );
        }
    }
    assert!(listed > 2_000, "{listed}");
}
