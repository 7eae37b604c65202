// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where things lie: in the VM's physical ("machine") address space and in the one top-level slot
//! of the guest's address space that belongs to the stub.
//!
//! Both are laid out alike, so that one subtraction converts between them:
//!
//! ```text
//! machine                          guest-virtual
//! base + 0      stub region        STUB_VA + 0        code, IDT, per-vCPU pages
//! base + 1 GiB  table arena        STUB_VA + 1 GiB    alias of the arena, 2 MiB pages
//! ```
//!
//! Everything below `STUB_VA`'s top-level slot is mapped for the supervisor only, with accessed and
//! dirty set in advance (no processor ever writes these tables) and without the global bit.

/// Size of a page and of a table frame.
pub const PAGE: u64 = 4096;

/// The top-level (PML4) slot that holds the stub: a hole in the address-space layout of Linux, so
/// that a guest kernel with that layout never uses it.
pub const STUB_SLOT: usize = 509;

/// First guest-virtual address of the stub: slot [`STUB_SLOT`], sign-extended.
pub const STUB_VA: u64 = 0xffff_0000_0000_0000 | ((STUB_SLOT as u64) << 39);

/// Distance from the stub region to the table arena, in machine and in virtual addresses alike.
pub const ARENA_OFFSET: u64 = 1 << 30;

/// Guest-virtual address of the first byte of the arena's alias.
pub const ARENA_VA: u64 = STUB_VA + ARENA_OFFSET;

/// Table frames in one 2 MiB page of the alias; the arena is a multiple of it.
pub const ARENA_GRANULE: u32 = 512;

/// Most table frames of one machine (64 GiB of tables).
pub const MAX_TABLE_FRAMES: u32 = 64 << 18;

/// Most vCPUs of one machine.
pub const MAX_VCPUS: usize = 1024;

/// Start of the few pages below 4 GiB that KVM itself may occupy on Intel processors without
/// unrestricted guest mode: identity map (1 page), then TSS (3 pages).
pub const KVM_RESERVED: u64 = 0xfffb_c000;

/// End (exclusive) of the pages at [`KVM_RESERVED`].
pub const KVM_RESERVED_END: u64 = KVM_RESERVED + 4 * PAGE;

/// Machine address of the stub region on a processor with `width` physical address bits: the upper
/// half of the address space, at most 512 GiB. Machine addresses of guest memory lie below.
#[must_use]
pub const fn machine_base(width: u32) -> u64 {
    1 << (if width < 40 { width - 1 } else { 39 })
}

/// Frames of the stub region before the per-vCPU ones: code, IDT.
pub const SHARED_FRAMES: u64 = 2;
/// Frame of the stub's code.
pub const CODE_FRAME: u64 = 0;
/// Frame of the interrupt descriptor table.
pub const IDT_FRAME: u64 = 1;
/// Frames per vCPU: one for GDT, TSS and stacks, one for the queue.
pub const VCPU_FRAMES: u64 = 2;

/// Bits of a page-table entry used here.
pub mod pte {
    /// Present.
    pub const P: u64 = 1;
    /// Writable.
    pub const W: u64 = 1 << 1;
    /// User.
    pub const U: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty.
    pub const D: u64 = 1 << 6;
    /// Large page.
    pub const PS: u64 = 1 << 7;
    /// No execute.
    pub const NX: u64 = 1 << 63;
    /// The address in an entry.
    pub const ADDR: u64 = 0x000f_ffff_ffff_f000;
}

/// Selectors of the GDT; the numbers are those of Linux, which guests may expect to see.
pub mod sel {
    /// Ring-0 64-bit code.
    pub const CODE0: u16 = 0x10;
    /// Ring-0 data.
    pub const DATA0: u16 = 0x18;
    /// Ring-3 32-bit code (compatibility mode).
    pub const CODE3_32: u16 = 0x23;
    /// Ring-3 data.
    pub const DATA3: u16 = 0x2b;
    /// Ring-3 64-bit code.
    pub const CODE3: u16 = 0x33;
    /// The task state segment.
    pub const TSS: u16 = 0x40;
}
