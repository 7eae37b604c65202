// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bits of page-table entries (SDM 5.3 to 5.5) and of the control registers that paging reads
//! (SDM 2.5, 2.2.1).

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const RW: u64 = 1 << 1;
/// User mode may use it.
pub const US: u64 = 1 << 2;
/// Page-level write-through.
pub const PWT: u64 = 1 << 3;
/// Page-level cache disable.
pub const PCD: u64 = 1 << 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty; ignored in entries that refer to tables.
pub const D: u64 = 1 << 6;
/// Page size: the entry above the lowest level maps a large page.
pub const PS: u64 = 1 << 7;
/// Third bit of the memory type's index in an entry of the lowest level.
pub const PAT: u64 = 1 << 7;
/// Global; ignored in entries that refer to tables.
pub const G: u64 = 1 << 8;
/// Third bit of the memory type's index in an entry that maps a large page.
pub const PAT_LARGE: u64 = 1 << 12;
/// Execute disable.
pub const NX: u64 = 1 << 63;
/// Address bits of an 8-byte entry that maps a 4 KiB page or refers to a table.
pub const ADDR: u64 = 0x000f_ffff_ffff_f000;
/// Lowest bit of the 4-bit protection key (SDM 5.6.2).
pub const KEY_SHIFT: u32 = 59;

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1;
/// CR0.WP: read-only pages are read-only for the supervisor too.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.NW: not write-through.
pub const CR0_NW: u64 = 1 << 29;
/// CR0.CD: cache disable.
pub const CR0_CD: u64 = 1 << 30;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;

/// CR3.LAM_U57: bits 62:57 of user pointers are a tag.
pub const CR3_LAM_U57: u64 = 1 << 61;
/// CR3.LAM_U48: bits 62:48 of user pointers are a tag.
pub const CR3_LAM_U48: u64 = 1 << 62;
/// Bit 63 of a value moved to CR3 with CR4.PCIDE = 1: translations of the PCID stay (SDM 5.10.4.1).
pub const CR3_NO_FLUSH: u64 = 1 << 63;
/// The process-context identifier in CR3 (SDM 5.10.1).
pub const CR3_PCID: u64 = 0xfff;

/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: 8-byte entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.LA57: 5-level paging.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.PCIDE: process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.SMEP: the supervisor must not execute user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: the supervisor must not touch user pages' data while EFLAGS.AC is 0.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE: protection keys of user pages.
pub const CR4_PKE: u64 = 1 << 22;
/// CR4.CET: control-flow enforcement; needs CR0.WP.
pub const CR4_CET: u64 = 1 << 23;
/// CR4.PKS: protection keys of supervisor pages.
pub const CR4_PKS: u64 = 1 << 24;
/// CR4.LAM_SUP: tags in supervisor pointers.
pub const CR4_LAM_SUP: u64 = 1 << 28;
/// Every bit of CR4 that some processor defines: 14:0, 25:16, LASS, LAM_SUP and FRED (SDM 2.5).
pub const CR4_DEFINED: u64 = 0x7fff | 0x3ff << 16 | 1 << 27 | CR4_LAM_SUP | 1 << 32;

/// EFER.LME: long mode enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: long mode active; the processor keeps it equal to LME and CR0.PG.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: bit 63 of entries is execute-disable, otherwise reserved.
pub const EFER_NXE: u64 = 1 << 11;
/// Every bit of EFER that some processor defines, but UAIE: SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR,
/// TCE, MCOMMIT, INTWB, AIBRSE (APM 3.1.7).
pub const EFER_DEFINED: u64 =
    1 | EFER_LME | EFER_LMA | EFER_NXE | 0xf << 12 | 1 << 17 | 1 << 18 | 1 << 21;

/// EFLAGS.AC: lifts SMAP for explicit accesses.
pub const RFLAGS_AC: u64 = 1 << 18;
