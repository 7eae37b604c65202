// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which values control registers take (SDM 2.5, 5.1, 5.10), C13 and C15.
#![cfg(not(loom))]

use mmu_core::paging::{BadRegisters, Illegal, PagingMode, Regs};

const PG: u64 = 1 << 31;
const WP: u64 = 1 << 16;
const CD: u64 = 1 << 30;
const NW: u64 = 1 << 29;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const PCIDE: u64 = 1 << 17;
const SMEP: u64 = 1 << 20;
const CET: u64 = 1 << 23;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;
const NXE: u64 = 1 << 11;

fn long() -> Regs {
    Regs::long_mode(0x1000)
}

fn legacy() -> Regs {
    Regs { cr0: 1 | PG, cr4: 0, efer: 0, maxphyaddr: 36, ..long() }
}

fn refuses(regs: Regs) -> BadRegisters {
    PagingMode::new(&regs).unwrap_err()
}

#[test]
fn snapshots_that_no_processor_has() {
    for maxphyaddr in [0, 31, 53, 64, 255] {
        assert_eq!(refuses(Regs { maxphyaddr, ..long() }), BadRegisters::MaxPhyAddr(maxphyaddr));
    }
    for maxphyaddr in [32, 36, 52] {
        assert!(PagingMode::new(&Regs { maxphyaddr, ..long() }).is_ok());
    }
    let cr3 = 1 << 36;
    assert_eq!(
        refuses(Regs { cr3, maxphyaddr: 36, ..long() }),
        BadRegisters::Cr3 { cr3, maxphyaddr: 36 }
    );
    assert!(matches!(refuses(Regs { cr3: 1 << 63, ..long() }), BadRegisters::Cr3 { .. }));
    assert!(matches!(refuses(Regs { cr3: 1 << 61, ..legacy() }), BadRegisters::Cr3 { .. }));
    let illegal = |regs| match refuses(regs) {
        BadRegisters::Illegal(illegal) => illegal,
        other => panic!("{other}"),
    };
    assert_eq!(illegal(Regs { cr0: PG, ..long() }), Illegal::PagingWithoutProtection(PG));
    let cr0 = 1 | PG | NW;
    assert_eq!(illegal(Regs { cr0, ..long() }), Illegal::NotWriteThrough(cr0));
    let cr0 = 1 | PG | 1 << 32;
    assert_eq!(illegal(Regs { cr0, ..long() }), Illegal::Cr0Reserved(cr0));
    for bit in [15, 26, 29, 30, 31, 33, 63] {
        let cr4 = PAE | 1 << bit;
        assert_eq!(illegal(Regs { cr4, ..long() }), Illegal::Cr4Reserved(cr4));
    }
    let efer = long().efer;
    assert_eq!(illegal(Regs { cr4: 0, ..long() }), Illegal::LongModeWithoutPae { cr4: 0, efer });
    for bit in [1, 7, 9, 16, 20, 22, 63] {
        let efer = efer | 1 << bit;
        assert_eq!(illegal(Regs { efer, ..long() }), Illegal::EferReserved(efer));
    }
    let cr4 = PCIDE;
    assert_eq!(illegal(Regs { cr4, ..legacy() }), Illegal::PcidOutsideLongMode { cr4 });
    let (cr0, cr4) = (1 | PG, PAE | CET);
    assert_eq!(illegal(Regs { cr0, cr4, ..long() }), Illegal::CetWithoutWriteProtect { cr4, cr0 });
    for efer in [LME, LMA, 0x500 & !LME | LMA] {
        assert!(matches!(
            refuses(Regs { efer, cr4: PAE, ..legacy() }),
            BadRegisters::LongModeActive { .. }
        ));
    }
    assert!(matches!(refuses(Regs { cr0: 1, ..long() }), BadRegisters::LongModeActive { .. }));
    // The message names the value.
    assert!(refuses(Regs { cr3: 1 << 52, ..long() }).to_string().contains("0x10000000000000"));
}

#[test]
fn the_way_into_long_mode_and_out() {
    let real = Regs { cr0: 0x10, cr4: 0, efer: 0, cr3: 0, ..long() };
    let with_pae = real.with_cr4(PAE | LA57).unwrap();
    let enabled = with_pae.with_efer(LME | NXE | LMA).unwrap();
    assert_eq!(enabled.efer, LME | NXE, "LMA is the processor's");
    let cr3 = enabled.with_cr3(0x1000).unwrap().regs;
    let long = cr3.with_cr0(1 | PG | WP).unwrap();
    assert_eq!(long.efer, LME | LMA | NXE);
    assert_eq!(PagingMode::new(&long).unwrap().levels(), 5);
    // In long mode.
    assert_eq!(long.with_cr4(PAE), Err(Illegal::La57InLongMode { cr4: PAE }));
    assert!(matches!(long.with_cr4(LA57), Err(Illegal::LongModeWithoutPae { .. })));
    assert_eq!(long.with_efer(NXE), Err(Illegal::LongModeWhilePaging(NXE)));
    assert_eq!(long.with_efer(LME).unwrap().efer, LME | LMA);
    let out = long.with_cr0(1).unwrap();
    assert_eq!(out.efer, LME | NXE);
    assert!(out.with_cr4(0).is_ok() && out.with_efer(0).is_ok());
    // Paging with LME but without PAE.
    let bad = real.with_efer(LME).unwrap().with_cr0(1 | PG);
    assert_eq!(bad, Err(Illegal::LongModeWithoutPae { cr4: 0, efer: LME }));
    assert_eq!(real.with_cr0(PG), Err(Illegal::PagingWithoutProtection(PG)));
    assert!(real.with_cr0(NW | CD).is_ok());
    assert_eq!(real.with_cr0(NW), Err(Illegal::NotWriteThrough(NW)));
    let cet = long.with_cr4(PAE | LA57 | CET).unwrap();
    assert!(matches!(cet.with_cr0(1 | PG), Err(Illegal::CetWithoutWriteProtect { .. })));
    let no_wp = long.with_cr0(1 | PG).unwrap();
    assert!(matches!(no_wp.with_cr4(cet.cr4), Err(Illegal::CetWithoutWriteProtect { .. })));
}

#[test]
fn c15_process_context_identifiers() {
    let regs = long();
    let bit63 = 1 << 63 | 0x2000;
    assert_eq!(regs.with_cr3(bit63), Err(Illegal::Cr3Reserved(bit63)));
    let flags = regs.with_cr3(0x2018).unwrap();
    assert_eq!((flags.pcid, flags.no_flush), (0, false));
    let cr4 = PAE | PCIDE;
    assert_eq!(flags.regs.with_cr4(cr4), Err(Illegal::PcidNotZero { cr4, cr3: 0x2018 }));
    let regs = regs.with_cr4(cr4).unwrap();
    let load = regs.with_cr3(1 << 63 | 0x2123).unwrap();
    assert_eq!((load.pcid, load.no_flush, load.regs.cr3), (0x123, true, 0x2123));
    assert!(!regs.with_cr3(0x2123).unwrap().no_flush);
    // Once set, other PCIDs do not matter; PG cannot go before PCIDE.
    assert!(load.regs.with_cr4(cr4 | SMEP).is_ok());
    assert_eq!(load.regs.with_cr0(1), Err(Illegal::PcidOutsideLongMode { cr4 }));
    assert!(load.regs.with_cr4(PAE).unwrap().with_cr0(1).is_ok());
    let cr4_pcide = legacy().with_cr4(PCIDE);
    assert_eq!(cr4_pcide, Err(Illegal::PcidOutsideLongMode { cr4: PCIDE }));
}

#[test]
fn addresses_in_cr3() {
    let regs = Regs { maxphyaddr: 40, ..long() };
    for bit in 40..61 {
        let value = 1 << bit;
        assert_eq!(regs.with_cr3(value), Err(Illegal::Cr3Reserved(value)));
    }
    assert!(regs.with_cr3(1 << 39).is_ok() && regs.with_cr3(3 << 61).is_ok());
    assert!(legacy().with_cr3(0xffff_ffff).is_ok() && legacy().with_cr3(1 << 32).is_err());
}

#[test]
fn what_loads_the_pdptes() {
    let pae = Regs { cr4: PAE, ..legacy() };
    assert!(pae.is_pae() && !long().is_pae() && !legacy().is_pae());
    assert!(legacy().reloads_pdptrs(&legacy().with_cr4(PAE).unwrap()));
    assert!(!pae.reloads_pdptrs(&pae.with_cr4(0).unwrap()));
    for bit in [PSE, 1 << 7, SMEP] {
        assert!(pae.reloads_pdptrs(&pae.with_cr4(PAE | bit).unwrap()));
    }
    assert!(!pae.reloads_pdptrs(&pae.with_cr4(PAE | 1 << 21).unwrap()));
    assert!(pae.reloads_pdptrs(&pae.with_cr0(1 | PG | CD).unwrap()));
    assert!(!pae.reloads_pdptrs(&pae.with_cr0(1 | PG | WP).unwrap()));
    assert!(pae.with_cr0(1).unwrap().reloads_pdptrs(&pae));
}
