// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fuzzer's bytes as registers, tables and addresses.
//!
//! The bytes are read one field after the other; where they end, fields are 0. Entries are
//! written so that one changed byte is one changed idea: which frame, which flags, which single
//! bit is wrong.
#![allow(dead_code, reason = "each target uses a part")]

use mmu_core::paging::bits::*;
use mmu_core::paging::{Access, Regs};

/// Guest memory: (guest-physical base, frames). The last piece is read-only.
///
/// Bases are multiples of 1 GiB, 1 GiB and 2 MiB, so that large pages can lead there too.
pub const PIECES: [(u64, u64); 3] = [(0, 8), (0x1_4000_0000, 4), (0x20_0000, 2)];

/// All frames.
pub const FRAMES: u64 = PIECES[0].1 + PIECES[1].1 + PIECES[2].1;

/// Most entries that differ from their frame's.
const OVERRIDES: u8 = 48;
/// Most addresses.
const ADDRESSES: usize = 12;

/// Address of the frame.
pub fn frame(n: u64) -> u64 {
    let mut n = n % FRAMES;
    for (base, frames) in PIECES {
        if n < frames {
            return base + n * 4096;
        }
        n -= frames;
    }
    0
}

/// What remains of the bytes.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let (now, later) = self.0.split_at(N.min(self.0.len()));
        out[..now.len()].copy_from_slice(now);
        self.0 = later;
        out
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// The next byte, until there is none.
    pub fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// One of a few.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.u8()) % from.len()]
    }

    /// Once in `n` times; not where the bytes have ended.
    pub fn one_in(&mut self, n: u8) -> bool {
        self.u8() % n == n - 1
    }

    /// A table entry: a frame with flags, or eight bytes as they are.
    pub fn entry(&mut self) -> u64 {
        let pick = self.u8();
        if pick == 0xff {
            return self.u64();
        }
        let flags = u64::from(self.u16());
        // Bits 11:0 as they are, then bit 12 (PAT of a large page), bit 63 and two key bits.
        let mut entry = frame(u64::from(pick & 0x3f)) | flags & 0x1fff;
        entry |= (flags >> 13 & 1) << 63 | (flags >> 14 & 3) << 59;
        if pick & 0x40 != 0 {
            entry ^= 1 << (self.u8() & 63);
        }
        entry
    }

    /// Registers that [`mmu_core::paging::PagingMode::new`] must accept.
    pub fn regs(&mut self) -> Regs {
        let mode = self.u8() % 5;
        let flags = self.u16();
        let on = |n: u32, bit: u64| if flags >> n & 1 != 0 { bit } else { 0 };
        let maxphyaddr = 32 + self.u8() % 21;
        let mut regs = Regs::long_mode(0);
        regs.cr0 = CR0_PE | on(0, CR0_WP) | if mode == 0 { 0 } else { CR0_PG };
        regs.cr4 = on(1, CR4_PSE) | on(2, CR4_PGE) | on(3, CR4_SMEP) | on(4, CR4_SMAP);
        regs.cr4 |= on(5, CR4_PKE) | on(6, CR4_PKS) | on(7, CR4_LAM_SUP);
        regs.cr4 |= if mode >= 2 { CR4_PAE } else { 0 } | if mode == 4 { CR4_LA57 } else { 0 };
        regs.efer = on(8, EFER_NXE) | if mode >= 3 { EFER_LME | EFER_LMA } else { 0 };
        regs.rflags = 2 | on(9, RFLAGS_AC);
        regs.maxphyaddr = maxphyaddr;
        regs.pkru = self.u32();
        regs.pkrs = self.u32();
        regs.cr3 = self.entry() & ((1 << maxphyaddr) - 1);
        if mode >= 3 {
            regs.cr3 |= on(10, CR3_LAM_U48) | on(11, CR3_LAM_U57) | on(12, CR3_PCID);
            regs.cr4 |= on(12, CR4_PCIDE);
        }
        for pdpte in &mut regs.pdptrs {
            *pdpte = self.entry();
        }
        regs
    }

    /// All words of memory: each frame's own entry, repeated, then single entries.
    pub fn tables(&mut self, wide: bool, image: &mut Vec<u64>) {
        for n in 1..=FRAMES as usize {
            let word = self.word(wide);
            image.resize(n * 512, word);
        }
        for _ in 0..self.u8() % OVERRIDES {
            let at = usize::from(self.u8()) * 512 + usize::from(self.u16() % 512);
            let at = at % image.len();
            image[at] = self.word(wide);
        }
    }

    /// An entry of 8 bytes, or two of 4.
    fn word(&mut self, wide: bool) -> u64 {
        let entry = self.entry();
        if wide { entry } else { entry & 0xffff_ffff | self.entry() << 32 }
    }

    /// Addresses, and who uses them how.
    pub fn addresses(&mut self, accesses: &[Access]) -> Vec<(u64, Access)> {
        let mut out = Vec::new();
        while !self.0.is_empty() && out.len() < ADDRESSES {
            let access = accesses[usize::from(self.u8()) % accesses.len()];
            out.push((self.u64(), access));
        }
        out
    }
}
