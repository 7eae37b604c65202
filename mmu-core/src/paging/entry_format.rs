// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest entry means by itself, in a few bits: for those who know a table but no vCPU.

use super::access::Access;
use super::descend::half;
use super::fault::Fault;
use super::format::{Entry, Format, FourLevel, Masks, Pae, TwoLevel, with_layout};
use super::mode::PagingMode;
use crate::addr::{Gpa, Gva};

/// The layout of entries, and what else decides which of their bits are reserved, but for EFER.NXE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryFormat(pub(crate) u16);

const LAYOUT: u16 = 3;
const NARROW: u16 = 0;
/// With CR4.PSE.
const NARROW_PSE: u16 = 1;
const PAE: u16 = 2;
const LONG: u16 = 3;
const MAXPHYADDR: u32 = 2;

impl EntryFormat {
    pub(super) const fn new(format: Format, maxphyaddr: u32, pse: bool) -> Self {
        let layout = match format {
            Format::None => return Self(0),
            Format::TwoLevel if pse => NARROW_PSE,
            Format::TwoLevel => NARROW,
            Format::Pae => PAE,
            Format::FourLevel | Format::FiveLevel => LONG,
        };
        Self(layout | (maxphyaddr as u16 - 32) << MAXPHYADDR)
    }

    /// Whether entries have 8 bytes, not 4.
    pub(crate) const fn is_wide(self) -> bool {
        self.0 & LAYOUT >= PAE
    }

    pub(crate) const fn is_pae(self) -> bool {
        self.0 & LAYOUT == PAE
    }

    /// The entry at `at` in the 8-byte word that has it.
    pub(crate) fn entry_of(self, word: u64, at: Gpa) -> u64 {
        if self.is_wide() { word } else { half(word, at.0 >> 2) }
    }

    /// What an entry of this level says, with EFER.NXE or without. PDPTE registers are no entries.
    pub(crate) fn decode(self, entry: u64, level: u8, nxe: bool) -> Entry {
        let layout = self.0 & LAYOUT;
        let format = match layout {
            LONG => Format::FourLevel,
            PAE => Format::Pae,
            _ => Format::TwoLevel,
        };
        let maxphyaddr = u32::from(self.0 >> MAXPHYADDR) + 32;
        let masks = Masks::new(format, maxphyaddr, nxe, layout == NARROW_PSE);
        match format {
            Format::TwoLevel => masks.decode::<TwoLevel>(entry, level),
            Format::Pae => masks.decode::<Pae>(entry, level),
            _ => masks.decode::<FourLevel>(entry, level),
        }
    }
}

impl PagingMode {
    /// What the entries of this mode's tables mean.
    pub(crate) fn entry_format(&self) -> EntryFormat {
        self.entry_format
    }

    /// The entry at `at` in the 8-byte word that has it.
    pub(crate) fn entry_of(&self, word: u64, at: Gpa) -> u64 {
        self.entry_format.entry_of(word, at)
    }

    /// The linear address that an access to `gva` translates, without its tag; the fault if it is
    /// not canonical.
    pub(crate) fn linear_of(&self, gva: Gva, access: Access) -> Result<Gva, Fault> {
        with_layout!(self.format, L => self.linear::<L>(gva, access).map(Gva),
            none => Ok(self.cut(gva)))
    }

    /// The bits of a linear address that matter: 32 outside long mode.
    pub(crate) fn cut(&self, gva: Gva) -> Gva {
        if self.is_long() { gva } else { Gva(gva.0 & 0xffff_ffff) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Regs;
    use super::super::bits::*;
    use super::*;

    /// The entries' meaning by the format alone is that by the registers.
    #[test]
    fn agrees_with_the_mode() {
        let long = Regs::long_mode(0);
        let narrow = Regs { cr4: 0, efer: 0, ..long };
        let all = [
            long,
            Regs { efer: EFER_LMA | EFER_LME, maxphyaddr: 40, ..long },
            Regs { cr4: CR4_PAE | CR4_LA57, maxphyaddr: 46, ..long },
            narrow,
            Regs { cr4: CR4_PSE, maxphyaddr: 36, ..narrow },
            Regs { cr4: CR4_PAE, maxphyaddr: 36, ..narrow },
            Regs { cr4: CR4_PAE, efer: EFER_NXE, maxphyaddr: 36, ..narrow },
        ];
        let mut word = 1u64;
        for regs in all {
            let mode = PagingMode::new(&regs).unwrap();
            let nxe = regs.efer & EFER_NXE != 0;
            let wide = mode.entry_format().is_wide();
            assert_eq!(wide, mode.entry_size() == 8);
            for _ in 0..5_000 {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                // Few reserved bits at a time.
                let sparse = word & word.rotate_left(11) & word.rotate_left(29) | word & 0xfff;
                let entry = if wide { sparse } else { sparse & 0xffff_ffff };
                for level in 1..=if mode.is_long() { 4 } else { 2 } {
                    let found = mode.entry_format().decode(entry, level, nxe);
                    assert_eq!(found, mode.decode(entry, level), "{entry:#x} at {level}");
                }
            }
        }
    }
}
