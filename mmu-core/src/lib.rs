// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A concurrent x86 shadow MMU: guest page tables in, shadow page tables out, by as many vCPUs at a
//! time as there are.
//!
//! A guest's page tables map guest-virtual to guest-physical addresses. A VMM without (or with no
//! use for) two-level translation gives the processor *shadow* tables instead: guest-virtual
//! straight to machine addresses, made on faults, kept consistent while the guest edits its own.
//! Linux KVM serves every such fault under one lock for each VM. Here nothing VM-wide is held:
//! walkers read an epoch-protected snapshot of the memory map, faults publish entries by
//! compare-and-swap, writers publish new snapshots. Every rule that this rests on is numbered,
//! stands in `docs/protocols.md`, and is model-checked on this code.
//!
//! | module | holds |
//! | --- | --- |
//! | [`addr`] | addresses, frame numbers, geometry |
//! | [`sync`] | the only door to atomics, epochs and concurrent maps |
//! | [`memory`] | memslots and the published map of them |
//! | [`paging`] | the guest's page tables: formats, walks, rights, error codes |
//! | [`shadow`] | shadow entries, faults, flushes, audit |
//! | [`vcpu`] | vCPUs, the emulator's accessors, the software vCPU |
//! | [`mmio`] | the device buses |
//!
//! Modules depend on those above them only. [`Mmu`] is the VM-wide handle, [`vcpu::Vcpu`] belongs to
//! one thread.
//!
//! ```
//! use mmu_core::addr::{Gpa, Gva};
//! use mmu_core::memory::{AllocatedMemory, SlotConfig};
//! use mmu_core::paging::Regs;
//! use mmu_core::{Config, Mmu};
//! use std::sync::Arc;
//!
//! // 1 MiB for shadow tables, 4 MiB of guest memory.
//! let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
//! mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(4 << 20))))?;
//! // Guest page tables: gva 0x1000 to gpa 0x5000, user, writable.
//! for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007)] {
//!     mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
//! }
//! let mut cpu = mmu.create_soft_vcpu(Regs::long_mode(0x1000))?;
//! cpu.session().store(Gva(0x1008), b"hello", true)?;
//! let mut back = [0; 5];
//! mmu.memory().read(Gpa(0x5008), &mut back);
//! assert_eq!(&back, b"hello");
//! assert_eq!(mmu.audit()?.sptes, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Unsafe code
//!
//! It is confined to: `sync` (lists and snapshots behind raw pointers, exchanges that the standard
//! library lacks), `memory` and `shadow::frames` (guest and table memory as slices of atomics),
//! `vcpu::soft` (the TLB's pointers into guest memory), `vcpu::access::vm_memory` (slices lent to
//! vm-memory), `mmio` (tables and devices that are used without being counted).

pub mod addr;
pub mod memory;
pub mod mmio;
mod mmu;
pub mod paging;
pub mod shadow;
#[cfg(all(test, not(loom)))]
mod stopped;
pub mod sync;
pub mod vcpu;

pub use mmu::{Config, ConfigError, DirtyLogError, MIN_TABLE_FRAMES, Mmu, PinError, Resolver};

/// The project's README, whose examples are tested.
#[cfg(all(doctest, feature = "vm-memory"))]
#[doc = include_str!("../../README.md")]
struct Readme;
