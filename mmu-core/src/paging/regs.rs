// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register snapshot, and what may be written to control registers.

use super::bits::*;

/// The registers that paging depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regs {
    /// CR0.
    pub cr0: u64,
    /// CR3, without the no-flush bit.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The EFER model-specific register; LMA must equal LME and CR0.PG.
    pub efer: u64,
    /// RFLAGS, of which AC matters.
    pub rflags: u64,
    /// Protection-key rights of user pages.
    pub pkru: u32,
    /// Protection-key rights of supervisor pages (IA32_PKRS).
    pub pkrs: u32,
    /// Physical-address bits of the processor, 32 to 52 (SDM 5.1.4).
    pub maxphyaddr: u8,
    /// The PDPTE registers; they matter in PAE paging only.
    pub pdptrs: [u64; 4],
}

/// Registers that no processor can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadRegisters {
    /// MAXPHYADDR is 32 to 52 (SDM 5.1.4).
    #[error("maxphyaddr {0} is not in 32..=52")]
    MaxPhyAddr(u8),
    /// CR3 has address bits that the processor does not have.
    #[error("cr3 {cr3:#x} does not fit into {maxphyaddr} physical-address bits")]
    Cr3 {
        /// The value.
        cr3: u64,
        /// The processor's bits.
        maxphyaddr: u8,
    },
    /// EFER.LMA is LME and CR0.PG (SDM 5.1.1).
    #[error("efer {efer:#x} with cr0 {cr0:#x}: LMA is not LME and CR0.PG")]
    LongModeActive {
        /// The value of EFER.
        efer: u64,
        /// The value of CR0.
        cr0: u64,
    },
    /// A register has a value that cannot be written to it.
    #[error(transparent)]
    Illegal(#[from] Illegal),
}

/// Why a write to a control register raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Illegal {
    /// Bits 63:32 of CR0 are reserved (SDM 2.5).
    #[error("cr0 {0:#x}: bits 63:32 are reserved")]
    Cr0Reserved(u64),
    /// CR0.PG needs CR0.PE (SDM 2.5).
    #[error("cr0 {0:#x}: PG without PE")]
    PagingWithoutProtection(u64),
    /// CR0.NW needs CR0.CD (SDM 2.5).
    #[error("cr0 {0:#x}: NW without CD")]
    NotWriteThrough(u64),
    /// Long mode needs CR4.PAE (SDM 5.1.2).
    #[error("cr4 {cr4:#x}: PAE is clear, and efer {efer:#x} has LME with paging on")]
    LongModeWithoutPae {
        /// The value of CR4.
        cr4: u64,
        /// The value of EFER.
        efer: u64,
    },
    /// CR4.PCIDE needs long mode (SDM 5.10.1).
    #[error("cr4 {cr4:#x}: PCIDE outside long mode")]
    PcidOutsideLongMode {
        /// The value of CR4.
        cr4: u64,
    },
    /// CR4.PCIDE is set only while CR3 holds PCID 0 (SDM 5.10.1).
    #[error("cr4 {cr4:#x}: PCIDE is set while bits 11:0 of cr3 {cr3:#x} are not 0")]
    PcidNotZero {
        /// The value of CR4.
        cr4: u64,
        /// The value of CR3.
        cr3: u64,
    },
    /// CR4.LA57 cannot change in long mode (SDM 5.1.1).
    #[error("cr4 {cr4:#x}: LA57 cannot change in long mode")]
    La57InLongMode {
        /// The value of CR4.
        cr4: u64,
    },
    /// CR4.CET needs CR0.WP (SDM 2.5).
    #[error("cr4 {cr4:#x}: CET while cr0 {cr0:#x} has WP clear")]
    CetWithoutWriteProtect {
        /// The value of CR4.
        cr4: u64,
        /// The value of CR0.
        cr0: u64,
    },
    /// Bits of CR4 that no processor defines (SDM 2.5).
    #[error("cr4 {0:#x} has reserved bits set")]
    Cr4Reserved(u64),
    /// Bits of EFER that no processor defines (APM 3.1.7), or UAIE, which is not supported.
    #[error("efer {0:#x} has reserved bits set")]
    EferReserved(u64),
    /// EFER.LME cannot change while paging is on (SDM 5.1.2).
    #[error("efer {0:#x}: LME cannot change while paging is on")]
    LongModeWhilePaging(u64),
    /// Bits of CR3 that must be 0: those above MAXPHYADDR, and the no-flush bit without CR4.PCIDE
    /// (SDM 5.10.4.1, 5.5.2).
    #[error("cr3 {0:#x} has reserved bits set")]
    Cr3Reserved(u64),
}

/// What a write to CR3 does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cr3Load {
    /// The registers afterwards. In PAE paging the PDPTE registers must be loaded too.
    pub regs: Regs,
    /// The process-context identifier; 0 without CR4.PCIDE.
    pub pcid: u16,
    /// Translations cached for the PCID stay valid (SDM 5.10.4.1).
    pub no_flush: bool,
}

impl Regs {
    /// 64-bit mode as systems run in it: write protection and NX on, 4 levels, 52 address bits.
    #[must_use]
    pub const fn long_mode(cr3: u64) -> Self {
        Self {
            cr0: CR0_PG | CR0_WP | CR0_PE,
            cr3,
            cr4: CR4_PAE,
            efer: EFER_NXE | EFER_LMA | EFER_LME,
            rflags: 2,
            pkru: 0,
            pkrs: 0,
            maxphyaddr: 52,
            pdptrs: [0; 4],
        }
    }

    /// Whether some processor can have these registers.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), BadRegisters> {
        let Self { cr0, cr3, cr4, efer, maxphyaddr, .. } = *self;
        if !(32..=52).contains(&maxphyaddr) {
            return Err(BadRegisters::MaxPhyAddr(maxphyaddr));
        }
        check_cr0(cr0)?;
        check_cr4(cr4)?;
        check_efer(efer)?;
        let paging = cr0 & CR0_PG != 0;
        if (efer & EFER_LMA != 0) != (efer & EFER_LME != 0 && paging) {
            return Err(BadRegisters::LongModeActive { efer, cr0 });
        }
        if efer & EFER_LMA != 0 && cr4 & CR4_PAE == 0 {
            return Err(Illegal::LongModeWithoutPae { cr4, efer }.into());
        }
        if efer & EFER_LMA == 0 && cr4 & CR4_PCIDE != 0 {
            return Err(Illegal::PcidOutsideLongMode { cr4 }.into());
        }
        if cr4 & CR4_CET != 0 && cr0 & CR0_WP == 0 {
            return Err(Illegal::CetWithoutWriteProtect { cr4, cr0 }.into());
        }
        if (cr3 & !self.cr3_controls()) >> maxphyaddr != 0 {
            return Err(BadRegisters::Cr3 { cr3, maxphyaddr });
        }
        Ok(())
    }

    /// Whether 4-level or 5-level paging is on.
    #[must_use]
    pub const fn is_long(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// Whether the PDPTE registers are in use.
    #[must_use]
    pub const fn is_pae(&self) -> bool {
        self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && !self.is_long()
    }

    /// The bits above the address that CR3 can hold: LAM's, in long mode.
    const fn cr3_controls(&self) -> u64 {
        if self.is_long() { CR3_LAM_U48 | CR3_LAM_U57 } else { 0 }
    }

    /// A write to CR0 (MOV, CLTS, LMSW), made outside 64-bit code: there, clearing PG raises #GP
    /// (SDM 5.1.2), as setting it does under LME with CS.L set; both depend on CS, which is not in
    /// the snapshot.
    ///
    /// # Errors
    ///
    /// Why it raises #GP.
    pub fn with_cr0(&self, cr0: u64) -> Result<Self, Illegal> {
        check_cr0(cr0)?;
        let (cr4, efer) = (self.cr4, self.efer);
        let active = cr0 & CR0_PG != 0 && efer & EFER_LME != 0;
        if active && cr4 & CR4_PAE == 0 {
            return Err(Illegal::LongModeWithoutPae { cr4, efer });
        }
        // SDM 5.10.1: PG cannot be cleared while PCIDE is set.
        if cr0 & CR0_PG == 0 && cr4 & CR4_PCIDE != 0 {
            return Err(Illegal::PcidOutsideLongMode { cr4 });
        }
        if cr0 & CR0_WP == 0 && cr4 & CR4_CET != 0 {
            return Err(Illegal::CetWithoutWriteProtect { cr4, cr0 });
        }
        let efer = efer & !EFER_LMA | if active { EFER_LMA } else { 0 };
        Ok(Self { cr0, efer, ..*self })
    }

    /// A write to CR3. In PAE paging [`load_pdptrs`](super::load_pdptrs) must succeed too.
    ///
    /// # Errors
    ///
    /// Why it raises #GP.
    pub fn with_cr3(&self, value: u64) -> Result<Cr3Load, Illegal> {
        let pcide = self.cr4 & CR4_PCIDE != 0;
        let no_flush = pcide && value & CR3_NO_FLUSH != 0;
        // SDM 5.10.4.1: the bit is not stored.
        let cr3 = if pcide { value & !CR3_NO_FLUSH } else { value };
        let reserved = if self.is_long() {
            (cr3 & !self.cr3_controls()) >> self.maxphyaddr.min(63) != 0
        } else {
            // SDM 5.3, 5.4.1: 32 bits matter, and a 32-bit MOV writes no more.
            cr3 >> 32 != 0
        };
        if reserved {
            return Err(Illegal::Cr3Reserved(value));
        }
        let pcid = if pcide { (cr3 & CR3_PCID) as u16 } else { 0 };
        Ok(Cr3Load { regs: Self { cr3, ..*self }, pcid, no_flush })
    }

    /// A write to CR4. Bits of features that the guest was not given are the caller's to refuse.
    ///
    /// # Errors
    ///
    /// Why it raises #GP.
    pub fn with_cr4(&self, cr4: u64) -> Result<Self, Illegal> {
        check_cr4(cr4)?;
        let set = cr4 & !self.cr4;
        if self.is_long() && cr4 & CR4_PAE == 0 {
            return Err(Illegal::LongModeWithoutPae { cr4, efer: self.efer });
        }
        if self.is_long() && (cr4 ^ self.cr4) & CR4_LA57 != 0 {
            return Err(Illegal::La57InLongMode { cr4 });
        }
        if set & CR4_PCIDE != 0 && !self.is_long() {
            return Err(Illegal::PcidOutsideLongMode { cr4 });
        }
        if set & CR4_PCIDE != 0 && self.cr3 & CR3_PCID != 0 {
            return Err(Illegal::PcidNotZero { cr4, cr3: self.cr3 });
        }
        if cr4 & CR4_CET != 0 && self.cr0 & CR0_WP == 0 {
            return Err(Illegal::CetWithoutWriteProtect { cr4, cr0: self.cr0 });
        }
        Ok(Self { cr4, ..*self })
    }

    /// A write to EFER. LMA keeps its value whatever is written to it (SDM 2.2.1).
    ///
    /// # Errors
    ///
    /// Why it raises #GP.
    pub fn with_efer(&self, efer: u64) -> Result<Self, Illegal> {
        check_efer(efer)?;
        if self.cr0 & CR0_PG != 0 && (efer ^ self.efer) & EFER_LME != 0 {
            return Err(Illegal::LongModeWhilePaging(efer));
        }
        Ok(Self { efer: efer & !EFER_LMA | self.efer & EFER_LMA, ..*self })
    }

    /// Whether the write to CR0 or CR4 that leads from these registers to `new` loads the PDPTE
    /// registers: PAE paging is in use afterwards and CD, NW or PG, or PAE, PGE, PSE or SMEP
    /// changes (SDM 5.4.1).
    #[must_use]
    pub const fn reloads_pdptrs(&self, new: &Self) -> bool {
        new.is_pae()
            && ((self.cr0 ^ new.cr0) & (CR0_CD | CR0_NW | CR0_PG) != 0
                || (self.cr4 ^ new.cr4) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) != 0)
    }
}

fn check_cr0(cr0: u64) -> Result<(), Illegal> {
    if cr0 >> 32 != 0 {
        Err(Illegal::Cr0Reserved(cr0))
    } else if cr0 & CR0_PG != 0 && cr0 & CR0_PE == 0 {
        Err(Illegal::PagingWithoutProtection(cr0))
    } else if cr0 & CR0_NW != 0 && cr0 & CR0_CD == 0 {
        Err(Illegal::NotWriteThrough(cr0))
    } else {
        Ok(())
    }
}

fn check_cr4(cr4: u64) -> Result<(), Illegal> {
    if cr4 & !CR4_DEFINED == 0 { Ok(()) } else { Err(Illegal::Cr4Reserved(cr4)) }
}

fn check_efer(efer: u64) -> Result<(), Illegal> {
    if efer & !EFER_DEFINED == 0 { Ok(()) } else { Err(Illegal::EferReserved(efer)) }
}
