// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Lines of `shadowmmu walk`. There may be hundreds of millions, so they are put together from
//! pieces made beforehand.

use super::Failure;
use kvm_backend::image::Mapped;
use mmu_core::paging::{Fault, Rights, Walk};
use std::io::Write;

/// Bytes that are written at once.
const BLOCK: usize = 1 << 18;

/// Room that the longest line needs.
const LINE: usize = 512;

/// A translation as it is printed.
pub(super) struct Answer {
    gva: u64,
    gpa: u64,
    page_size: u64,
    /// Bit i for [`FLAGS`]`[i]`.
    flags: usize,
}

/// Name and letter, in the order of printing.
const FLAGS: [(&str, char); 6] = [
    ("writable", 'w'),
    ("user", 'u'),
    ("executable", 'x'),
    ("global", 'g'),
    ("accessed", 'a'),
    ("dirty", 'd'),
];

fn flags(rights: Rights, global: bool, accessed: bool, dirty: bool) -> usize {
    let bits = [rights.write, rights.user, rights.execute, global, accessed, dirty];
    bits.iter().enumerate().fold(0, |flags, (i, bit)| flags | usize::from(*bit) << i)
}

impl Answer {
    /// `gva` is the address as given, the tag included.
    pub(super) fn of_walk(gva: u64, walk: &Walk) -> Self {
        let Walk { gpa, page_size, rights, global, accessed, dirty, .. } = *walk;
        Self { gva, gpa: gpa.0, page_size, flags: flags(rights, global, accessed, dirty) }
    }

    pub(super) fn of_mapping(mapped: &Mapped) -> Self {
        let Mapped { gva, gpa, page_size, rights, global, accessed, dirty } = *mapped;
        Self { gva: gva.0, gpa: gpa.0, page_size, flags: flags(rights, global, accessed, dirty) }
    }
}

/// Prints lines, in blocks.
pub(super) struct Printer<W: Write> {
    out: W,
    json: bool,
    /// Whether the table's heading is yet to come.
    heading: bool,
    block: Vec<u8>,
    /// What follows the gpa: by log2 of the page's size and by flags, made when first needed.
    tails: Vec<String>,
}

/// Columns of the table: the widest address.
const WIDTH: usize = 18;

impl<W: Write> Printer<W> {
    pub(super) fn new(out: W, json: bool) -> Self {
        let tails = vec![String::new(); 64 << FLAGS.len()];
        Self { out, json, heading: !json, block: Vec::with_capacity(BLOCK + LINE), tails }
    }

    /// Writes what has been printed so far.
    pub(super) fn flush(&mut self) -> Result<(), Failure> {
        let written = self.out.write_all(&self.block).and_then(|()| self.out.flush());
        self.block.clear();
        Ok(written?)
    }

    fn end_line(&mut self) -> Result<(), Failure> {
        if self.block.len() >= BLOCK { self.flush() } else { Ok(()) }
    }

    fn begin_line(&mut self, gva: u64) {
        if self.json {
            self.block.extend_from_slice(b"{\"gva\":\"");
            hex(&mut self.block, gva, 0);
        } else {
            if std::mem::take(&mut self.heading) {
                let heading = format!("{:<WIDTH$}  {:<WIDTH$}  size  rights\n", "gva", "gpa");
                self.block.extend_from_slice(heading.as_bytes());
            }
            hex(&mut self.block, gva, WIDTH);
        }
    }

    /// A line for an address that is mapped.
    #[inline]
    pub(super) fn mapped(&mut self, answer: &Answer) -> Result<(), Failure> {
        let Answer { gva, gpa, page_size, flags } = *answer;
        self.begin_line(gva);
        let (separator, width) = if self.json { ("\",\"gpa\":\"", 0) } else { ("  ", WIDTH) };
        self.block.extend_from_slice(separator.as_bytes());
        hex(&mut self.block, gpa, width);
        let shift = page_size.trailing_zeros() as usize % 64;
        let tail = &mut self.tails[shift << FLAGS.len() | flags];
        if tail.is_empty() {
            *tail = if self.json { json_tail(shift, flags) } else { text_tail(shift, flags) };
        }
        self.block.extend_from_slice(tail.as_bytes());
        self.end_line()
    }

    /// A line for an address that is not.
    pub(super) fn fault(&mut self, gva: u64, fault: &Fault) -> Result<(), Failure> {
        self.begin_line(gva);
        let Fault { vector, error_code, level, reason, .. } = fault;
        let reason = reason.name();
        let text = if self.json {
            format!(
                "\",\"fault\":{{\"vector\":{vector},\"error_code\":{error_code},\"level\":{level},\
                 \"reason\":\"{reason}\"}}}}\n"
            )
        } else {
            format!("  fault: {reason} at level {level}, vector {vector}, code {error_code:#x}\n")
        };
        self.block.extend_from_slice(text.as_bytes());
        self.end_line()
    }

    /// The last line of a list that was cut short.
    pub(super) fn truncated(&mut self, next: u64) -> Result<(), Failure> {
        let text = if self.json {
            format!("{{\"truncated\":true,\"next\":\"{next:#x}\"}}\n")
        } else {
            format!("truncated: the next mapping is that of {next:#x}\n")
        };
        self.block.extend_from_slice(text.as_bytes());
        self.end_line()
    }
}

fn json_tail(shift: usize, flags: usize) -> String {
    let mut tail = format!("\",\"page_size\":{}", 1u64 << shift);
    for (i, (name, _)) in FLAGS.iter().enumerate() {
        tail += &format!(",\"{name}\":{}", flags >> i & 1 != 0);
    }
    tail + "}\n"
}

fn text_tail(shift: usize, flags: usize) -> String {
    let unit = ["", "K", "M", "G", "T"].get(shift / 10).unwrap_or(&"?");
    let size = format!("{}{unit}", 1u64 << (shift % 10));
    let letter = |i: usize, letter| if flags >> i & 1 != 0 { letter } else { '-' };
    let letters: String = FLAGS.iter().enumerate().map(|(i, flag)| letter(i, flag.1)).collect();
    format!("  {size:>4}  {letters}\n")
}

/// Appends 0x and the digits, and blanks up to `width`.
#[inline]
fn hex(to: &mut Vec<u8>, number: u64, width: usize) {
    let digits = (67 - (number | 1).leading_zeros() as usize) / 4;
    let mut text = [b' '; WIDTH];
    (text[0], text[1]) = (b'0', b'x');
    for (i, digit) in text[2..2 + digits].iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(number >> (4 * (digits - 1 - i))) as usize & 15];
    }
    to.extend_from_slice(&text[..width.max(2 + digits)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_printed_as_the_standard_library_prints_them() {
        let mut numbers: Vec<u64> = (0..64).flat_map(|i| [1 << i, (1 << i) - 1]).collect();
        numbers.extend([u64::MAX, 0x1234_5678_9abc_def0, 0xf0]);
        for number in numbers {
            for width in [0, WIDTH] {
                let mut text = Vec::new();
                hex(&mut text, number, width);
                let expected = format!("{:<width$}", format!("{number:#x}"));
                assert_eq!(String::from_utf8(text).unwrap(), expected);
            }
        }
    }

    #[test]
    fn sizes_are_printed_for_people() {
        assert_eq!(text_tail(12, 0), "    4K  ------\n");
        assert_eq!(text_tail(22, 0b11_1111), "    4M  wuxgad\n");
        assert_eq!(text_tail(30, 0b01_0001), "    1G  w---a-\n");
    }
}
