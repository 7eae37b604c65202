// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ELF cores, as QEMU's `dump-guest-memory` writes them (System V ABI, chapters 4 and 5).
//!
//! Every PT_LOAD says where its bytes are in guest-physical memory (`p_paddr`); what `p_memsz` has
//! more than `p_filesz` is zero. Virtual addresses and notes are not looked at.

use super::MAX_SEGMENTS;
use super::error::Problem;
use super::mapping::Bytes;
use super::segments::Part;

/// First bytes of an ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const ET_CORE: u64 = 4;
const PT_LOAD: u64 = 1;
/// `e_phnum` of a file whose number of program headers is in `sh_info` of the first section header.
const PN_XNUM: u64 = 0xffff;

/// Where a class of files has its fields.
struct Class {
    /// Bytes of a word: addresses, offsets and sizes.
    word: usize,
    header: u64,
    e_phoff: usize,
    e_shoff: usize,
    e_phentsize: usize,
    e_phnum: usize,
    program_header: u64,
    p_offset: usize,
    p_paddr: usize,
    p_filesz: usize,
    p_memsz: usize,
    sh_info: usize,
}

const ELF32: Class = Class {
    word: 4,
    header: 52,
    e_phoff: 28,
    e_shoff: 32,
    e_phentsize: 42,
    e_phnum: 44,
    program_header: 32,
    p_offset: 4,
    p_paddr: 12,
    p_filesz: 16,
    p_memsz: 20,
    sh_info: 28,
};

const ELF64: Class = Class {
    word: 8,
    header: 64,
    e_phoff: 32,
    e_shoff: 40,
    e_phentsize: 54,
    e_phnum: 56,
    program_header: 56,
    p_offset: 8,
    p_paddr: 24,
    p_filesz: 32,
    p_memsz: 40,
    sh_info: 44,
};

/// A little-endian number of `size` bytes.
fn field(bytes: &[u8], at: usize, size: usize) -> u64 {
    let bytes = bytes.get(at..).unwrap_or_default();
    bytes.iter().take(size).rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Copies a header of at most 64 bytes.
fn header<B: Bytes + ?Sized>(
    file: &B,
    what: &'static str,
    offset: u64,
    needed: u64,
) -> Result<[u8; 64], Problem> {
    let mut bytes = [0; 64];
    let to = bytes.get_mut(..needed as usize).unwrap_or_default();
    if file.read(offset, to) {
        Ok(bytes)
    } else {
        Err(Problem::TruncatedHeader { what, offset, needed, len: file.len() })
    }
}

/// The parts of memory that the file holds.
pub(super) fn parts<B: Bytes + ?Sized>(file: &B) -> Result<Vec<Part>, Problem> {
    if file.get(0) != Some(MAGIC) {
        return Err(Problem::NoHeader { format: "ELF", offset: 0 });
    }
    let ident = header(file, "the ELF identification", 0, 16)?;
    let class = match ident[4] {
        1 => ELF32,
        2 => ELF64,
        other => {
            return Err(unsupported("the ELF class", other.into(), "1 (32-bit) or 2 (64-bit)"));
        }
    };
    if ident[5] != 1 {
        return Err(unsupported("the ELF data encoding", ident[5].into(), "1 (little-endian)"));
    }
    let elf = header(file, "the ELF header", 0, class.header)?;
    let kind = field(&elf, 16, 2);
    if kind != ET_CORE {
        return Err(unsupported("the ELF type", kind, "4 (core)"));
    }
    let entry_size = field(&elf, class.e_phentsize, 2);
    let mut count = field(&elf, class.e_phnum, 2);
    if count == PN_XNUM {
        let at = field(&elf, class.e_shoff, class.word);
        let section = header(file, "the first ELF section header", at, class.sh_info as u64 + 4)?;
        count = field(&section, class.sh_info, 4);
    }
    if count == 0 {
        return Err(Problem::NoSegments);
    }
    if entry_size != class.program_header {
        let supported = if class.word == 4 { "32" } else { "56" };
        return Err(unsupported("the size of an ELF program header", entry_size, supported));
    }
    let table = field(&elf, class.e_phoff, class.word);
    // At most 2^32 headers of at most 56 bytes.
    let needed = count * entry_size;
    if table.checked_add(needed).is_none_or(|end| end > file.len()) {
        let what = "the ELF program header table";
        return Err(Problem::TruncatedHeader { what, offset: table, needed, len: file.len() });
    }
    let mut parts = Vec::new();
    for segment in 0..count {
        let at = table + segment * entry_size;
        let entry = header(file, "an ELF program header", at, entry_size)?;
        if field(&entry, 0, 4) != PT_LOAD {
            continue;
        }
        let word = |at| field(&entry, at, class.word);
        let (base, offset) = (word(class.p_paddr), word(class.p_offset));
        let (in_file, in_memory) = (word(class.p_filesz), word(class.p_memsz));
        if in_file > in_memory {
            return Err(Problem::SegmentSizes { segment, base, in_file, in_memory });
        }
        if base.checked_add(in_memory).is_none() {
            return Err(Problem::BadRange { segment, base });
        }
        let len = file.len();
        if in_file != 0 && offset.checked_add(in_file).is_none_or(|end| end > len) {
            let needed = in_file;
            return Err(Problem::TruncatedSegment { segment, base, offset, needed, len });
        }
        if in_file != 0 {
            parts.push(Part { base, len: in_file, offset: Some(offset) });
        }
        if in_memory != in_file {
            parts.push(Part { base: base + in_file, len: in_memory - in_file, offset: None });
        }
        if parts.len() > MAX_SEGMENTS {
            return Err(Problem::TooManySegments { limit: MAX_SEGMENTS as u64 });
        }
    }
    Ok(parts)
}

fn unsupported(what: &'static str, value: u64, supported: &'static str) -> Problem {
    Problem::Unsupported { what, value, supported }
}
