// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a stream of bytes makes of a guest: entries, registers, addresses.
//!
//! Bytes that are 0 are the ordinary choice, so that short inputs are guests that run.

use crate::input::Bytes;
use mmu_core::addr::Gva;
use mmu_core::memory::Backing;
use mmu_core::paging::{Regs, bits};
use std::ops::Range;
use std::sync::atomic::Ordering;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
/// Above 4 GiB, for the large pages of 32-bit guests.
pub const HIGH: u64 = 0x1_2340_0000;
/// No slot is there; a device is.
pub const DEVICE: u64 = 4 * MIB;
/// Frames of page tables: with 4-byte entries, with 8-byte entries, and the page of PDPTEs.
pub const NARROW: Range<u64> = 16..24;
pub const WIDE: Range<u64> = 24..44;
pub const PDPTES: u64 = 44;
/// All of them.
pub const TABLES: Range<u64> = 16..48;
/// Entries that walks pass through.
pub const NARROW_INDICES: [u64; 8] = [0, 1, 2, 255, 256, 511, 767, 1023];
pub const WIDE_INDICES: [u64; 4] = [0, 1, 2, 511];
/// With which a leaf table begins as a mapping of leaf tables, for the guest to write to.
pub const SELF: u64 = 2;
/// Where the slot that comes and goes may be.
pub const PASSING_AT: [u64; 3] = [64 * MIB, 8 * MIB, 65 * MIB];
/// Where large pages may lie: with tables in it, without, behind memory that is not congruent, above
/// 4 GiB, in a large slot, in the slot that comes and goes, in no memory.
const BLOCKS: [u64; 12] = [
    0,
    2 * MIB,
    16 * MIB,
    HIGH,
    GIB,
    0,
    2 * MIB,
    PASSING_AT[0],
    HIGH,
    GIB + 512 * MIB,
    PASSING_AT[0],
    DEVICE,
];
/// Offsets of the pages in them that are looked at.
const PAGES: [u64; 5] = [PAGE, 0, 5 * PAGE, 0x10_0000, 0x1f_f000];
/// Offsets in a page: of entries, and where an access crosses a word, a line, a page.
const OFFSETS: [u64; 16] =
    [0, 8, 16, 0xff8, 4, 0x3fc, 0x400, 0x7fc, 0xffc, 0xffd, 0xff4, 0x3c, 0x38, 1, 0x7f8, 0xfff];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Off,
    Narrow,
    Pae,
    Four,
    Five,
}

pub fn mode_of(regs: &Regs) -> Mode {
    match (regs.cr0 & bits::CR0_PG != 0, regs.is_long(), regs.is_pae()) {
        (false, ..) => Mode::Off,
        (_, false, false) => Mode::Narrow,
        (_, _, true) => Mode::Pae,
        _ if regs.cr4 & bits::CR4_LA57 != 0 => Mode::Five,
        _ => Mode::Four,
    }
}

pub fn unpaged() -> Regs {
    Regs { cr0: bits::CR0_PE, cr4: 0, efer: 0, ..Regs::long_mode(0) }
}

/// What the entries of a frame mean most of the time.
fn level_of(frame: u64) -> u64 {
    if NARROW.contains(&frame) { 1 + frame % 2 } else { 1 + frame % 5 }
}

/// Tables by a generator that a byte alone decides.
pub fn write_tables(memory: &dyn Backing, seed: u8) {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = [0; 2048];
    for byte in &mut noise {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Rare are choices that are wrong.
        *byte = (state >> 32) as u8 & (state >> 40) as u8 | (state >> 48) as u8 & 0x2b;
    }
    let bytes = &mut Bytes(&noise);
    let word = |frame: u64, index: u64| &memory.words()[(frame * 512 + index) as usize];
    for frame in NARROW {
        for index in NARROW_INDICES {
            let mut entry = u64::from(bytes.narrow_entry(frame));
            if index == SELF && level_of(frame) == 1 {
                entry = entry & 0xfff | ((NARROW.start + frame / 2 % 4 * 2) * PAGE);
            }
            word(frame, index / 2).fetch_or(entry << (index % 2 * 32), Ordering::Relaxed);
        }
    }
    for frame in WIDE {
        for index in WIDE_INDICES {
            let mut entry = bytes.wide_entry(frame);
            if index == SELF && level_of(frame) == 1 {
                entry = entry & 0xfff | ((WIDE.start + 1 + frame / 5 % 4 * 5) * PAGE);
            }
            word(frame, index).store(entry, Ordering::Relaxed);
        }
    }
    for index in 0..16 {
        word(PDPTES, index).store(bytes.pdpte(), Ordering::Relaxed);
    }
}

impl Bytes<'_> {
    fn table(&mut self, frames: &Range<u64>, level: u64) -> u64 {
        let n = u64::from(self.u8());
        let all = frames.end - frames.start;
        if n >= 0xf0 {
            return frames.start + n % all;
        }
        let mut fits = frames.clone().filter(|frame| level_of(*frame) == level);
        let count = fits.clone().count() as u64;
        fits.nth((n % count) as usize).expect("there are so many")
    }

    /// Guest-physical address of a page, of a table now and then.
    pub fn page(&mut self) -> u64 {
        let n = u64::from(self.u8());
        if n >= 0xd0 {
            return (TABLES.start + n % (TABLES.end - TABLES.start)) * PAGE;
        }
        BLOCKS[n as usize % BLOCKS.len()] + PAGES[n as usize / BLOCKS.len() % PAGES.len()]
    }

    fn flags(&mut self) -> u64 {
        let n = self.u16();
        let when = |condition: bool, bit| if condition { bit } else { 0 };
        when(n & 15 != 15, bits::P)
            | when(n >> 4 & 7 != 7, bits::RW)
            | when(n >> 7 & 7 != 7, bits::US)
            | when(n >> 10 & 1 != 0, bits::A)
            | when(n >> 11 & 1 != 0, bits::D)
            | when(n >> 12 & 3 == 3, bits::G)
            | when(n >> 14 & 3 == 3, bits::PCD)
    }

    /// An entry of 8 bytes for a frame.
    pub fn wide_entry(&mut self, frame: u64) -> u64 {
        let how = self.u8();
        let level = if how & 15 == 15 { u64::from(how >> 4) % 5 + 1 } else { level_of(frame) };
        let large = how & 16 != 0 && matches!(level, 2 | 3);
        let mut entry = self.flags();
        entry |= match level {
            1 => self.page(),
            3 if large => bits::PS | self.pick(&[0, GIB, 2 * GIB, 4 * GIB]),
            _ if large => bits::PS | self.pick(&BLOCKS),
            _ => self.table(&WIDE, level - 1) * PAGE,
        };
        if how & 0xe0 == 0xe0 {
            entry ^= 1 << (self.u8() & 63);
        } else if how & 0xe0 == 0xc0 {
            entry |= bits::NX;
        }
        entry
    }

    /// An entry of 4 bytes for a frame.
    pub fn narrow_entry(&mut self, frame: u64) -> u32 {
        let how = self.u8();
        let level = if how & 15 == 15 { u64::from(how >> 4) % 2 + 1 } else { level_of(frame) };
        let mut entry = self.flags();
        entry |= match level {
            1 => self.page() & 0xffff_f000,
            _ if how & 16 != 0 => {
                let block = self.pick(&BLOCKS);
                bits::PS | block & 0xffc0_0000 | (block >> 32) << 13
            }
            _ => self.table(&NARROW, 1) * PAGE,
        };
        if how & 0xe0 == 0xe0 {
            entry ^= 1 << (self.u8() & 31);
        }
        entry as u32
    }

    pub fn pdpte(&mut self) -> u64 {
        let how = self.u8();
        let entry = (self.table(&WIDE, 2) * PAGE) | u64::from(how & 7 != 7);
        if how >> 3 == 31 { entry ^ 1 << (self.u8() & 63) } else { entry }
    }

    /// What a guest loads into CR3 in a mode.
    pub fn cr3(&mut self, mode: Mode) -> u64 {
        match mode {
            Mode::Off => 0,
            Mode::Narrow => self.table(&NARROW, 2) * PAGE,
            Mode::Pae => PDPTES * PAGE + u64::from(self.u8() % 4) * 32,
            Mode::Four => self.table(&WIDE, 4) * PAGE,
            Mode::Five => self.table(&WIDE, 5) * PAGE,
        }
    }

    /// Registers of any mode that shadow tables of so many levels can follow.
    pub fn guest_regs(&mut self, levels: u8) -> Regs {
        let modes = [Mode::Four, Mode::Narrow, Mode::Pae, Mode::Off, Mode::Five];
        let mode = self.pick(&modes[..if levels == 5 { 5 } else { 4 }]);
        let flags = self.u16();
        let on = |n: u32, bit: u64| if flags >> n & 1 != 0 { bit } else { 0 };
        let mut regs = unpaged();
        // What most guests have set is set by 0.
        regs.cr0 |= bits::CR0_WP ^ on(0, bits::CR0_WP);
        regs.cr4 = on(1, bits::CR4_SMEP) | on(2, bits::CR4_SMAP) | on(3, bits::CR4_LAM_SUP);
        regs.cr4 |= on(4, bits::CR4_PGE) | (bits::CR4_PSE ^ on(5, bits::CR4_PSE));
        regs.efer = bits::EFER_NXE ^ on(6, bits::EFER_NXE);
        regs.rflags |= on(7, bits::RFLAGS_AC);
        regs.maxphyaddr = [52, 40, 36, 52][usize::from(flags >> 8 & 3)];
        regs.cr3 = self.cr3(mode);
        if mode != Mode::Off {
            regs.cr0 |= bits::CR0_PG;
        }
        if matches!(mode, Mode::Pae | Mode::Four | Mode::Five) {
            regs.cr4 |= bits::CR4_PAE;
        }
        match mode {
            Mode::Pae => regs.pdptrs = core::array::from_fn(|_| self.pdpte()),
            Mode::Four | Mode::Five => {
                regs.efer |= bits::EFER_LME | bits::EFER_LMA;
                regs.cr3 |= on(10, bits::CR3_LAM_U48) | on(11, bits::CR3_LAM_U57);
                regs.cr4 |= on(12, bits::CR4_PCIDE);
                regs.cr3 |= on(12, u64::from(flags >> 13));
            }
            _ => {}
        }
        if mode == Mode::Five {
            regs.cr4 |= bits::CR4_LA57;
        }
        regs
    }

    /// The address of a page whose walk passes entries that are there.
    pub fn gva(&mut self, mode: Mode) -> Gva {
        if mode == Mode::Off {
            return Gva(self.page() & 0xffff_ffff);
        }
        let n = u64::from(self.u8());
        let wide =
            |level: u32| WIDE_INDICES[(n >> (2 * (level - 1))) as usize & 3] << (3 + 9 * level);
        let narrow = |shift: u32| NARROW_INDICES[(n >> shift) as usize & 7];
        match mode {
            Mode::Narrow => return Gva(narrow(3) << 22 | narrow(0) << 12),
            Mode::Pae => return Gva(wide(1) | wide(2) | (n >> 4 & 3) << 30),
            _ => {}
        }
        let tweak = u64::from(self.u8());
        let low = wide(1) | wide(2) | wide(3) | wide(4);
        let canonical = match mode {
            Mode::Five => ((low | WIDE_INDICES[tweak as usize & 3] << 48) << 7) as i64 >> 7,
            _ => (low << 16) as i64 >> 16,
        } as u64;
        Gva(match tweak {
            // One bit that matters, then tags.
            0xf0..0x100 => canonical ^ 1 << (tweak - 0xf0 + 48),
            0xe8..0xf0 => canonical ^ (tweak - 0xe0) << 57,
            0xe0..0xe8 => canonical ^ (tweak - 0xdf) << 48,
            _ => canonical,
        })
    }

    pub fn offset(&mut self) -> u64 {
        self.pick(&OFFSETS)
    }
}
