// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The four table formats, as data.
//!
//! | format | levels in memory | entry | index bits | source |
//! | --- | --- | --- | --- | --- |
//! | 32-bit | 2 | 4 bytes | 10 | SDM 5.3 |
//! | PAE | 2, below four registers | 8 bytes | 9 | SDM 5.4 |
//! | 4-level | 4 | 8 bytes | 9 | SDM 5.5 |
//! | 5-level | 5 | 8 bytes | 9 | SDM 5.5 |

use super::bits::*;
use crate::addr::{Gpa, INDEX_BITS, LEVELS, PAGE_SHIFT};

/// What the walker must know of a format at compile time.
pub(super) trait Layout {
    /// Levels whose entries a walk reads from memory.
    const LEVELS: u8;
    /// log2 of a table's entries.
    const INDEX_BITS: u32;
    /// Entries are 8 bytes, not 4.
    const WIDE: bool;
    /// Linear addresses have 64 bits and may be non-canonical; otherwise they have 32.
    const LONG: bool;
    /// The level above is four registers (SDM 5.4.1).
    const PDPTRS: bool = false;

    /// Index of the entry for `gva` in a table of this level.
    #[inline(always)]
    fn index(gva: u64, level: u8) -> u64 {
        gva >> Self::shift(level) & ((1 << Self::INDEX_BITS) - 1)
    }

    /// Bytes that an entry of this level maps.
    #[inline(always)]
    fn size(level: u8) -> u64 {
        1 << Self::shift(level)
    }

    /// log2 of that.
    #[inline(always)]
    fn shift(level: u8) -> u32 {
        PAGE_SHIFT + Self::INDEX_BITS * (u32::from(level) - 1)
    }

    /// First byte of the page that a leaf entry maps.
    #[inline(always)]
    fn page(entry: u64, level: u8) -> u64 {
        let low = Self::size(level) - 1;
        if Self::WIDE || level == 1 {
            entry & ADDR & !low
        } else {
            // SDM 5.3, table 5-4 (PSE-36): bits 20:13 hold bits 39:32 of the address.
            entry & 0xffff_ffff & !low | (entry >> 13 & 0xff) << 32
        }
    }
}

#[derive(Debug)]
pub(super) struct TwoLevel;
#[derive(Debug)]
pub(super) struct Pae;
#[derive(Debug)]
pub(super) struct FourLevel;
#[derive(Debug)]
pub(super) struct FiveLevel;

impl Layout for TwoLevel {
    const LEVELS: u8 = 2;
    const INDEX_BITS: u32 = 10;
    const WIDE: bool = false;
    const LONG: bool = false;
}

impl Layout for Pae {
    const LEVELS: u8 = 2;
    const INDEX_BITS: u32 = 9;
    const WIDE: bool = true;
    const LONG: bool = false;
    const PDPTRS: bool = true;
}

impl Layout for FourLevel {
    const LEVELS: u8 = LEVELS;
    const INDEX_BITS: u32 = INDEX_BITS;
    const WIDE: bool = true;
    const LONG: bool = true;
}

impl Layout for FiveLevel {
    const LEVELS: u8 = LEVELS + 1;
    const INDEX_BITS: u32 = INDEX_BITS;
    const WIDE: bool = true;
    const LONG: bool = true;
}

/// Which layout a mode uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// CR0.PG = 0.
    None,
    TwoLevel,
    Pae,
    FourLevel,
    FiveLevel,
}

/// Runs an expression with `$layout` bound to the layout of a format that has tables, or `$none`.
macro_rules! with_layout {
    ($format:expr, $layout:ident => $body:expr, none => $none:expr) => {
        match $format {
            $crate::paging::format::Format::FourLevel => {
                type $layout = $crate::paging::format::FourLevel;
                $body
            }
            $crate::paging::format::Format::FiveLevel => {
                type $layout = $crate::paging::format::FiveLevel;
                $body
            }
            $crate::paging::format::Format::Pae => {
                type $layout = $crate::paging::format::Pae;
                $body
            }
            $crate::paging::format::Format::TwoLevel => {
                type $layout = $crate::paging::format::TwoLevel;
                $body
            }
            $crate::paging::format::Format::None => $none,
        }
    };
}
pub(super) use with_layout;

/// The masks of a format with its reserved bits, which depend on MAXPHYADDR, EFER.NXE and CR4.PSE.
#[derive(Clone, Copy, Debug)]
pub(super) struct Masks {
    /// At levels 2 and 3, an entry with `entry & table == P` refers to a table.
    pub(super) table: u64,
    /// The same at levels 4 and 5.
    pub(super) top_table: u64,
    /// At the lowest level, an entry with `entry & page == P` maps a page.
    pub(super) page: u64,
    /// The bit that makes an entry above the lowest level a leaf: PS, or none in 32-bit paging
    /// without CR4.PSE, where it is ignored.
    large_bit: u64,
    /// Bits that must be 0 in an entry with PS = 1 of levels 2 to 5; PS itself where no large page
    /// exists.
    large_reserved: [u64; 4],
    /// Bits that must be 0 in a PDPTE register (SDM 5.4.1, table 5-8): 2:1, 8:5 and those above
    /// MAXPHYADDR.
    pub(super) pdpte_reserved: u64,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// P = 0; the other bits are the guest's own.
    Absent,
    /// P = 1 and a reserved bit is set.
    Reserved,
    /// Refers to the table at this address.
    Table(Gpa),
    /// Maps the page at this address, whose size is that of the entry's level.
    Leaf(Gpa),
}

impl Masks {
    /// The bits from `from` to `to`, both included.
    const fn bits(from: u32, to: u32) -> u64 {
        u64::MAX >> (63 - to) & u64::MAX << from
    }

    pub(super) fn new(format: Format, maxphyaddr: u32, nxe: bool, pse: bool) -> Self {
        let nx = if nxe { 0 } else { NX };
        // Callers have checked that MAXPHYADDR is at most 52.
        let above = |to| if maxphyaddr > to { 0 } else { Self::bits(maxphyaddr, to) };
        let large = |level| {
            let size = FourLevel::size(level);
            (size - 1) & ADDR & !PAT_LARGE
        };
        let (always, large_bit, large_reserved) = match format {
            // SDM 5.3: no reserved bits but in an entry for a 4 MiB page: bits 21:(M-19), where
            // M is MAXPHYADDR, 40 at most.
            Format::None | Format::TwoLevel => {
                let psb = Self::bits(maxphyaddr.min(40) - 19, 21);
                (0, if pse { PS } else { 0 }, [psb, PS, PS, PS])
            }
            // SDM 5.4.2: bits 62:M, and in a PDE for a 2 MiB page bits 20:13.
            Format::Pae => {
                let large = (Pae::size(2) - 1) & ADDR & !PAT_LARGE;
                (above(62) | nx, PS, [large, PS, PS, PS])
            }
            // SDM 5.5.4: bits 51:M; bits 20:13 and 29:13 for 2 MiB and 1 GiB pages; PS of a PML4E
            // or PML5E.
            Format::FourLevel | Format::FiveLevel => {
                (above(51) | nx, PS, [large(2), large(3), PS, PS])
            }
        };
        Self {
            table: P | always | large_bit,
            top_table: P | always | large_bit,
            page: P | always,
            large_bit,
            large_reserved: large_reserved.map(|bits| bits | always),
            pdpte_reserved: Self::bits(1, 2) | Self::bits(5, 8) | above(63) | NX,
        }
    }

    /// The same for a processor without 1 GiB pages, where PS of a PDPTE is reserved.
    pub(super) fn without_1g(mut self) -> Self {
        self.large_reserved[1] |= PS;
        self
    }

    /// The same for an AMD processor, where bit 8 of a PML4E or PML5E must be 0.
    pub(super) fn on_amd(mut self) -> Self {
        self.top_table |= G;
        self
    }

    /// The mask of tables' entries of this level.
    #[inline(always)]
    pub(super) fn table_at(&self, level: u8) -> u64 {
        if level >= 4 { self.top_table } else { self.table }
    }

    /// What an entry of this level (1 to the format's levels in memory) says.
    #[inline]
    pub(super) fn decode<L: Layout>(&self, entry: u64, level: u8) -> Entry {
        if entry & P == 0 {
            Entry::Absent
        } else if level <= 1 {
            if entry & self.page == P {
                Entry::Leaf(Gpa(L::page(entry, 1)))
            } else {
                Entry::Reserved
            }
        } else if entry & self.table_at(level) == P {
            Entry::Table(Gpa(entry & ADDR))
        } else if entry & self.large_bit == 0
            || entry & self.large_reserved[usize::from(level - 2) % 4] != 0
        {
            Entry::Reserved
        } else {
            Entry::Leaf(Gpa(L::page(entry, level)))
        }
    }

    /// What a PDPTE register says.
    #[inline]
    pub(super) fn decode_pdpte(&self, entry: u64) -> Entry {
        if entry & P == 0 {
            Entry::Absent
        } else if entry & self.pdpte_reserved != 0 {
            Entry::Reserved
        } else {
            Entry::Table(Gpa(entry & ADDR))
        }
    }
}
