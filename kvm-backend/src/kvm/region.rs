// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stub region: the memory that the ring-0 stub needs, built once, and the page tables that map
//! it (and the alias of the table arena) under one top-level entry.
//!
//! Guarantees: only supervisor pages; code read-only, all else no-execute; no
//! global bit; accessed and dirty set in advance. After `new` the host writes only the queue pages.
//!
//! `unsafe` here: stores into the mapping, and the words of the per-vCPU pages.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{
    ARENA_GRANULE, CODE_FRAME, IDT_FRAME, PAGE, SHARED_FRAMES, STUB_VA, VCPU_FRAMES, pte, sel,
};
use super::mapping::Mapping;
use super::{KvmError, stub};

/// Offset of the TSS in a vCPU's first page (the GDT is at 0).
const TSS_OFFSET: u64 = 0x100;
/// Limit of the TSS: no I/O bitmap, so that every port access from ring 3 faults.
pub(super) const TSS_LIMIT: u16 = 0x67;
/// Limit of the GDT.
pub(super) const GDT_LIMIT: u16 = sel::TSS + 16 - 1;
/// Limit of the IDT: all vectors.
pub(super) const IDT_LIMIT: u16 = (256 * 16 - 1) as u16;
/// Ends (exclusive) of the stacks in a vCPU's first page: all exceptions; double fault; ring 0 (unused).
const IST1_TOP: u64 = 0x800;
const IST2_TOP: u64 = 0xc00;
const RSP0_TOP: u64 = 0x1000;

/// Where one vCPU's pages are, as guest-virtual addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct VcpuPages {
    pub(super) gdt: u64,
    pub(super) tss: u64,
    /// End of the exception stack.
    pub(super) stack_top: u64,
    /// End of the double-fault stack.
    pub(super) double_fault_top: u64,
    /// The queue page.
    pub(super) queue: u64,
}

/// The built region.
#[derive(Debug)]
pub(super) struct Region {
    memory: Mapping,
    /// The entry for the top-level slot.
    root_entry: u64,
    vcpus: usize,
}

impl Region {
    /// Builds the region for `vcpus` vCPUs at machine address `base`, with an alias of the arena of `frames`
    /// frames at machine address `arena`.
    pub(super) fn new(
        base: u64,
        vcpus: usize,
        arena: u64,
        frames: u32,
    ) -> Result<Region, KvmError> {
        let mapped = SHARED_FRAMES + vcpus as u64 * VCPU_FRAMES;
        let leaf_tables = mapped.div_ceil(512);
        let large_pages = u64::from(frames / ARENA_GRANULE);
        let arena_tables = large_pages.div_ceil(512);
        // PDPT, page directory of the region, its leaf tables, page directories of the alias.
        let pdpt = mapped;
        let pd = pdpt + 1;
        let pts = pd + 1;
        let pds = pts + leaf_tables;
        let total = pds + arena_tables;

        let len = (total * PAGE) as usize;
        let memory = Mapping::new(len).map_err(|error| KvmError::Memory {
            what: "stub region",
            bytes: len,
            error,
        })?;
        let region = Region { root_entry: (base + pdpt * PAGE) | Self::TABLE, memory, vcpus };

        region.fill_code();
        region.fill_idt();
        for id in 0..vcpus {
            region.fill_vcpu(id);
        }

        region.set(pdpt, 0, (base + pd * PAGE) | Self::TABLE);
        for i in 0..leaf_tables {
            region.set(pd, i, (base + (pts + i) * PAGE) | Self::TABLE);
        }
        for i in 0..mapped {
            let kind = if i == CODE_FRAME { pte::P | pte::A } else { Self::TABLE | pte::NX };
            region.set(pts + i / 512, i % 512, (base + i * PAGE) | kind | pte::D);
        }
        for i in 0..arena_tables {
            region.set(pdpt, 1 + i, (base + (pds + i) * PAGE) | Self::TABLE);
        }
        for i in 0..large_pages {
            let entry = (arena + i * PAGE * 512) | Self::TABLE | pte::D | pte::PS | pte::NX;
            region.set(pds + i / 512, i % 512, entry);
        }
        Ok(region)
    }

    /// Present, writable, accessed, supervisor: a non-leaf entry.
    const TABLE: u64 = pte::P | pte::W | pte::A;

    pub(super) fn root_entry(&self) -> u64 {
        self.root_entry
    }

    pub(super) fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// The pages of vCPU `id`.
    pub(super) fn vcpu(&self, id: usize) -> VcpuPages {
        let gdt = STUB_VA + Self::vcpu_offset(id);
        VcpuPages {
            gdt,
            tss: gdt + TSS_OFFSET,
            stack_top: gdt + IST1_TOP,
            double_fault_top: gdt + IST2_TOP,
            queue: gdt + PAGE,
        }
    }

    /// The 64-bit word at guest-virtual address `va` of a page of a vCPU. Atomic, because other threads
    /// read acknowledged generations while the guest writes them.
    ///
    /// # Panics
    ///
    /// If `va` lies outside the vCPUs' pages (an error of this crate).
    pub(super) fn word(&self, va: u64) -> &AtomicU64 {
        let offset = va.wrapping_sub(STUB_VA);
        assert!(
            (SHARED_FRAMES * PAGE..Self::vcpu_offset(self.vcpus)).contains(&offset),
            "no per-vCPU word at {va:#x}"
        );
        let word = self.memory.word(offset);
        // SAFETY: in bounds and aligned by `Mapping::word`; lives as long as `self`; the host
        // accesses these pages only as atomics once a vCPU may run.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    fn vcpu_offset(id: usize) -> u64 {
        (SHARED_FRAMES + id as u64 * VCPU_FRAMES) * PAGE
    }

    fn set(&self, frame: u64, index: u64, value: u64) {
        self.put(frame * PAGE + index * 8, value);
    }

    fn put(&self, offset: u64, value: u64) {
        let word: NonNull<u64> = self.memory.word(offset);
        // SAFETY: in bounds and aligned by `Mapping::word`; called before anybody else knows the memory.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }.store(value, Ordering::Relaxed);
    }

    fn fill_code(&self) {
        for (i, bytes) in stub::code().chunks(8).enumerate() {
            let mut word = [0xf4; 8]; // hlt
            word[..bytes.len()].copy_from_slice(bytes);
            self.put(CODE_FRAME * PAGE + i as u64 * 8, u64::from_le_bytes(word));
        }
    }

    /// One 64-bit interrupt gate per vector (SDM vol. 3, 7.14.1). There are no interrupts: those from 32 on share
    /// one entry point, never reached.
    fn fill_idt(&self) {
        for n in 0..256 {
            let at = stub::vector(n.min(stub::VECTORS));
            // A ring-3 `int3` or `into` is an exception like others; `int n` otherwise faults.
            let dpl = if n == 3 || n == 4 { 3 } else { 0 };
            let ist = if n == 8 { 2 } else { 1 };
            let low = (at & 0xffff)
                | (u64::from(sel::CODE0) << 16)
                | (ist << 32)
                | ((0x8e | dpl << 5) << 40)
                | ((at >> 16 & 0xffff) << 48);
            self.put(IDT_FRAME * PAGE + n * 16, low);
            self.put(IDT_FRAME * PAGE + n * 16 + 8, at >> 32);
        }
    }

    /// GDT and TSS (SDM vol. 3, 3.4.5 and 9.7).
    fn fill_vcpu(&self, id: usize) {
        let at = Self::vcpu_offset(id);
        let pages = self.vcpu(id);
        let gdt = |selector: u16, value| self.put(at + u64::from(selector & !7), value);
        // Base 0, limit 4 GiB, accessed; L for 64-bit code, D/B otherwise.
        gdt(sel::CODE0, 0x00af_9b00_0000_ffff);
        gdt(sel::DATA0, 0x00cf_9300_0000_ffff);
        gdt(sel::CODE3_32, 0x00cf_fb00_0000_ffff);
        gdt(sel::DATA3, 0x00cf_f300_0000_ffff);
        gdt(sel::CODE3, 0x00af_fb00_0000_ffff);
        let base = pages.tss;
        let tss = u64::from(TSS_LIMIT)
            | (base & 0xff_ffff) << 16
            | 0x8b << 40 // busy 64-bit TSS, DPL 0
            | (base >> 24 & 0xff) << 56;
        gdt(sel::TSS, tss);
        gdt(sel::TSS + 8, base >> 32);

        // The TSS's 64-bit fields are aligned to 4 modulo 8: write it as 32-bit words.
        let mut words = [0u32; 26];
        let mut field = |offset: usize, value: u64| {
            words[offset / 4] = value as u32;
            words[offset / 4 + 1] = (value >> 32) as u32;
        };
        field(0x04, pages.gdt + RSP0_TOP);
        field(0x24, pages.stack_top);
        field(0x2c, pages.double_fault_top);
        words[0x64 / 4] = (u32::from(TSS_LIMIT) + 1) << 16; // I/O bitmap beyond the limit
        for (i, pair) in words.chunks(2).enumerate() {
            let value = u64::from(pair[0]) | u64::from(pair[1]) << 32;
            self.put(at + TSS_OFFSET + i as u64 * 8, value);
        }
    }
}
