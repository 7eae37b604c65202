// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PDPTE registers of PAE paging (SDM 5.4.1).

use super::bits::P;
use super::format::{Format, Masks};
use super::regs::Regs;
use crate::addr::Gpa;
use crate::memory::{Hint, MemoryMap};
use crate::sync::Ordering;

/// Why the PDPTE registers cannot be loaded. The instruction that wanted to gets #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPdptrs {
    /// The four entries are in no memslot.
    #[error("the PDPTEs at {0} lie in no memslot")]
    Outside(Gpa),
    /// A present entry has a reserved bit set: 2:1, 8:5 or 63:MAXPHYADDR (SDM 5.4.1).
    #[error("PDPTE {index} is {value:#x}, which has reserved bits set")]
    Reserved {
        /// Which of the four.
        index: u8,
        /// The entry.
        value: u64,
    },
}

/// The four entries in memory, unchecked; `None` if they are in no memslot. CR3 is 32-byte aligned
/// (SDM 5.4.1, table 5-7).
#[must_use]
pub fn read_pdptrs(map: &MemoryMap, hint: &Hint, cr3: u64) -> Option<[u64; 4]> {
    let base = Gpa(cr3 & 0xffff_ffe0);
    let mut entries = [0; 4];
    for (i, entry) in entries.iter_mut().enumerate() {
        *entry = map.word(base.wrapping_add(8 * i as u64), hint)?.load(Ordering::Acquire);
    }
    Some(entries)
}

/// The four entries as a load of CR3 reads and checks them.
///
/// # Errors
///
/// [`BadPdptrs`]: the load raises #GP and changes nothing.
pub fn load_pdptrs(map: &MemoryMap, hint: &Hint, regs: &Regs) -> Result<[u64; 4], BadPdptrs> {
    let outside = BadPdptrs::Outside(Gpa(regs.cr3 & 0xffff_ffe0));
    let entries = read_pdptrs(map, hint, regs.cr3).ok_or(outside)?;
    let maxphyaddr = u32::from(regs.maxphyaddr).clamp(32, 52);
    let reserved = Masks::new(Format::Pae, maxphyaddr, true, true).pdpte_reserved;
    for (index, &value) in entries.iter().enumerate() {
        if value & P != 0 && value & reserved != 0 {
            return Err(BadPdptrs::Reserved { index: index as u8, value });
        }
    }
    Ok(entries)
}

/// Whether the entries in memory differ from the registers. Also true if they cannot be read.
#[must_use]
pub fn pdptrs_changed(map: &MemoryMap, hint: &Hint, regs: &Regs) -> bool {
    read_pdptrs(map, hint, regs.cr3) != Some(regs.pdptrs)
}
