// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's page tables: their formats, walks over them, rights and page-fault error codes.
//!
//! A walk is a pure function of a memory map, a register snapshot and an access. [`Regs`] is the
//! snapshot; [`PagingMode::new`] checks it and compiles everything that stays the same between
//! register writes into masks and small tables, so that one walking algorithm, instantiated once
//! for each table format, serves every mode and tests no control bit while it walks.
//!
//! Sources are cited as SDM (Intel 64 and IA-32 Architectures Software Developer's Manual, volume
//! 3, where chapter 5 is "Paging") and APM (AMD64 Architecture Programmer's Manual, volume 2).
//!
//! Left out, and neither checked nor modelled: shadow-stack accesses (SDM 5.6, CR4.CET: entries
//! with R/W = 0 and D = 1 are plain read-only pages here), HLAT, SGX, LASS, AMD's upper address
//! ignore (EFER.UAIE is refused), the reserved bits of processors without PAT or with SME.

mod access;
mod accessed;
mod batch;
pub mod bits;
mod descend;
mod entry_format;
mod fault;
mod format;
mod invpcid;
mod mode;
mod pdptr;
mod regs;
mod tables;
mod walk;

pub use access::{Access, Allowed, Kind, Rights};
pub(crate) use entry_format::EntryFormat;
pub use fault::{Fault, Reason, code};
pub use format::Entry;
pub use invpcid::{BadInvpcid, Invpcid};
pub use mode::PagingMode;
pub use pdptr::{BadPdptrs, load_pdptrs, pdptrs_changed, read_pdptrs};
pub use regs::{BadRegisters, Cr3Load, Illegal, Regs};
pub use tables::Tables;
pub use walk::{Path, Step, Walk};
