// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INVPCID: what it names, and when it raises #GP (SDM vol. 2, INVPCID).

use super::bits::CR4_PCIDE;
use super::mode::PagingMode;
use super::regs::Regs;
use crate::addr::Gva;

/// What an INVPCID invalidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invpcid {
    /// One address in one context, but for global pages (type 0).
    Address {
        /// The process-context identifier.
        pcid: u16,
        /// The address.
        gva: Gva,
    },
    /// One context, but for global pages (type 1).
    Context {
        /// The process-context identifier.
        pcid: u16,
    },
    /// All contexts and global pages (type 2).
    All,
    /// All contexts, but for global pages (type 3).
    AllButGlobal,
}

/// Why an INVPCID raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadInvpcid {
    /// Types are 0 to 3.
    #[error("INVPCID type {0:#x}: 0 to 3 are defined")]
    Type(u64),
    /// Bits 63:12 of the descriptor are reserved.
    #[error("INVPCID descriptor {0:#x} has reserved bits set")]
    Reserved(u64),
    /// Without CR4.PCIDE the only context is 0.
    #[error("INVPCID of context {0:#x} while CR4.PCIDE is clear")]
    Context(u16),
    /// The address of type 0 must be canonical.
    #[error("INVPCID of {0}, which is not canonical")]
    NonCanonical(Gva),
}

impl Invpcid {
    /// What INVPCID of a type with a descriptor (low word first) names under these registers.
    ///
    /// ```
    /// use mmu_core::addr::Gva;
    /// use mmu_core::paging::{BadInvpcid, Invpcid, Regs};
    ///
    /// let regs = Regs::long_mode(0x1000);
    /// let named = Invpcid::decode(0, [0, 0x5000], &regs);
    /// assert_eq!(named, Ok(Invpcid::Address { pcid: 0, gva: Gva(0x5000) }));
    /// assert_eq!(Invpcid::decode(1, [7, 0], &regs), Err(BadInvpcid::Context(7)));
    /// assert_eq!(Invpcid::decode(4, [0, 0], &regs), Err(BadInvpcid::Type(4)));
    /// ```
    ///
    /// # Errors
    ///
    /// Why it raises #GP(0).
    pub fn decode(kind: u64, descriptor: [u64; 2], regs: &Regs) -> Result<Self, BadInvpcid> {
        let [low, high] = descriptor;
        if kind > 3 {
            return Err(BadInvpcid::Type(kind));
        }
        if low >> 12 != 0 {
            return Err(BadInvpcid::Reserved(low));
        }
        let (pcid, gva) = (low as u16, Gva(high));
        if kind < 2 && pcid != 0 && regs.cr4 & CR4_PCIDE == 0 {
            return Err(BadInvpcid::Context(pcid));
        }
        // Registers that no processor can have hold no address.
        let canonical = || PagingMode::new(regs).is_ok_and(|mode| mode.is_canonical(gva));
        match kind {
            0 if !canonical() => Err(BadInvpcid::NonCanonical(gva)),
            0 => Ok(Self::Address { pcid, gva }),
            1 => Ok(Self::Context { pcid }),
            2 => Ok(Self::All),
            _ => Ok(Self::AllButGlobal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C15: the legality matrix.
    #[test]
    fn what_is_legal() {
        let without = Regs::long_mode(0);
        let with = Regs { cr4: without.cr4 | CR4_PCIDE, ..without };
        for regs in [&without, &with] {
            for kind in 0..4 {
                assert!(Invpcid::decode(kind, [0, 0], regs).is_ok());
                let reserved = Err(BadInvpcid::Reserved(1 << 12));
                assert_eq!(Invpcid::decode(kind, [1 << 12, 0], regs), reserved);
                let other = Invpcid::decode(kind, [0xfff, 0], regs);
                let refused = kind < 2 && regs.cr4 & CR4_PCIDE == 0;
                assert_eq!(other.is_err(), refused, "type {kind}");
                let address = Invpcid::decode(kind, [0, 1 << 47], regs);
                assert_eq!(address.is_err(), kind == 0, "type {kind}");
            }
            assert_eq!(Invpcid::decode(u64::MAX, [0, 0], regs), Err(BadInvpcid::Type(u64::MAX)));
        }
        let named = Invpcid::decode(0, [5, u64::MAX], &with);
        assert_eq!(named, Ok(Invpcid::Address { pcid: 5, gva: Gva(u64::MAX) }));
        assert_eq!(Invpcid::decode(1, [5, 1 << 60], &with), Ok(Invpcid::Context { pcid: 5 }));
    }
}
