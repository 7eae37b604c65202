// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What walkers are known to get wrong, and what guests rely on (C1 to C15), one test each.
#![cfg(not(loom))]

mod paging_oracle;

use mmu_core::addr::{Gfn, Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, Hint, MemoryMap, SlotConfig};
use mmu_core::paging::{
    Access, Allowed, BadPdptrs, Entry, Fault, PagingMode, Path, Reason, Regs, Rights, Walk,
    load_pdptrs, pdptrs_changed, read_pdptrs,
};
use mmu_core::sync::Ordering;
use paging_oracle::Memory;
use std::sync::Arc;

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const NX: u64 = 1 << 63;
const ALL: u64 = P | RW | US;

/// Tables at 0x1000 (top) to 0x5000; every index of the walked address is 1, 2, 3, …
struct Guest {
    memory: Memory,
    map: MemoryMap,
    regs: Regs,
}

const GVA: u64 = 4 << 39 | 3 << 30 | 2 << 21 | 1 << 12;

impl Guest {
    /// 4-level, everything granted.
    fn long() -> Self {
        let memory = Memory::new(&[(0, 0x10000)]);
        let map = memory.map();
        let guest = Self { memory, map, regs: Regs::long_mode(0x1000) };
        for level in 1..=4 {
            guest.set(level, (6 - level) << 12 | ALL);
        }
        guest.set(1, 0x9000 | ALL);
        guest
    }

    fn at(level: u64) -> u64 {
        (5 - level) * 0x1000 + level * 8
    }

    fn set(&self, level: u64, value: u64) {
        self.memory.write8(Self::at(level), value);
    }

    fn get(&self, level: u64) -> u64 {
        self.memory.read8(Self::at(level)).unwrap()
    }

    fn mode(&self) -> PagingMode {
        PagingMode::new(&self.regs).unwrap()
    }

    fn walk_at(&self, gva: u64, access: Access) -> Result<Walk, Fault> {
        self.mode().walk(&self.map, &Hint::default(), Gva(gva), access)
    }

    fn walk(&self, access: Access) -> Result<Walk, Fault> {
        self.walk_at(GVA, access)
    }

    fn error(&self, access: Access) -> (u32, Reason, u8) {
        let fault = self.walk(access).unwrap_err();
        assert_eq!(fault.vector, Fault::PF);
        (fault.error_code, fault.reason, fault.level)
    }
}

#[test]
fn c1_rights_are_anded_over_every_level() {
    for level in 1..=4 {
        let guest = Guest::long();
        guest.set(level, guest.get(level) & !RW);
        assert_eq!(guest.error(Access::write().user()), (7, Reason::Write, 1));
        guest.set(level, (guest.get(level) | RW) & !US);
        assert_eq!(guest.error(Access::read().user()), (5, Reason::User, 1));
        guest.set(level, guest.get(level) | US | NX);
        assert_eq!(guest.error(Access::execute().user()), (0x15, Reason::Fetch, 1));
        assert!(guest.walk(Access::write().user()).is_ok());
    }
}

#[test]
fn c2_order_of_reasons() {
    let mut guest = Guest::long();
    guest.regs.maxphyaddr = 40;
    // A reserved bit below a right that is missing above; then not present above both.
    guest.set(4, guest.get(4) & !US);
    guest.set(1, 0x9000 | P | 1 << 45);
    assert_eq!(guest.error(Access::write().user()), (0xf, Reason::Reserved, 1));
    guest.set(3, 1 << 45);
    assert_eq!(guest.error(Access::write().user()), (6, Reason::NotPresent, 3));
    // The first of user, SMEP, SMAP, fetch, write, key; the key's bit is set in any case.
    let mut guest = Guest::long();
    guest.regs.cr4 |= 1 << 22 | 1 << 24;
    guest.regs.pkru = 0xc;
    guest.regs.pkrs = 0xc;
    guest.set(1, 0x9000 | P | 1 << 59);
    assert_eq!(guest.error(Access::write().user()), (0x27, Reason::User, 1));
    guest.set(1, 0x9000 | P | US | 1 << 59);
    assert_eq!(guest.error(Access::write().user()), (0x27, Reason::Write, 1));
    guest.set(1, 0x9000 | ALL | 1 << 59);
    assert_eq!(guest.error(Access::write().user()), (0x27, Reason::Pkey, 1));
    guest.regs.cr4 |= 1 << 20 | 1 << 21;
    assert_eq!(guest.error(Access::write()), (0x23, Reason::Smap, 1));
    guest.set(1, 0x9000 | ALL | NX | 1 << 59);
    assert_eq!(guest.error(Access::execute()), (0x11, Reason::Smep, 1));
    // Fetches are reported as such only if NX or SMEP can forbid them.
    guest.set(1, 0);
    assert_eq!(guest.error(Access::execute()).0, 0x10);
    guest.regs.efer &= !(1 << 11);
    assert_eq!(guest.error(Access::execute()).0, 0x10);
    guest.regs.cr4 &= !(1 << 20);
    assert_eq!(guest.error(Access::execute()).0, 0);
}

#[test]
fn c3_reserved_bits() {
    let mut guest = Guest::long();
    guest.regs.maxphyaddr = 36;
    for level in 1..=4 {
        let good = guest.get(level);
        for bit in 36..52 {
            guest.set(level, good | 1 << bit);
            assert_eq!(guest.error(Access::read()), (9, Reason::Reserved, level as u8));
        }
        // Ignored ones.
        guest.set(level, good | 0x7ff << 52 | 7 << 9);
        assert!(guest.walk(Access::read()).is_ok());
        guest.regs.efer &= !(1 << 11);
        guest.set(level, good | NX);
        assert_eq!(guest.error(Access::read()), (9, Reason::Reserved, level as u8));
        guest.regs.efer |= 1 << 11;
        guest.set(level, good);
    }
    // PS in a PML4E is reserved, not a large page.
    guest.set(4, guest.get(4) | PS);
    assert_eq!(guest.error(Access::write()), (0xb, Reason::Reserved, 4));
    guest.set(4, guest.get(4) & !PS);
    for (level, bits) in [(3, 13..30), (2, 13..21)] {
        let table = guest.get(level);
        for bit in bits {
            guest.set(level, ALL | PS | 1 << bit);
            assert_eq!(guest.error(Access::read()), (9, Reason::Reserved, level as u8));
        }
        guest.set(level, ALL | PS | 0x8_0000_0000);
        assert_eq!(guest.walk(Access::read()).unwrap().level, level as u8);
        guest.set(level, table);
    }
    // A processor without 1 GiB pages.
    let table = guest.get(3);
    guest.set(3, ALL | PS);
    let mode = guest.mode().without_1g_pages();
    let fault = mode.translate(&guest.map, &Hint::default(), Gva(GVA), None).unwrap_err();
    assert_eq!((fault.reason, fault.level), (Reason::Reserved, 3));
    assert_eq!(mode.decode(ALL | PS, 3), Entry::Reserved);
    // Bit 8 where there is no page: reserved by AMD in the uppermost levels, otherwise ignored.
    guest.set(3, table);
    for level in 2..=4 {
        let good = guest.get(level);
        guest.set(level, good | 0x100);
        let translate =
            |mode: PagingMode| mode.translate(&guest.map, &Hint::default(), Gva(GVA), None);
        assert!(translate(guest.mode()).is_ok());
        let amd = translate(guest.mode().with_amd_reserved_bits());
        let refused = amd.map_err(|f| (f.reason, f.error_code, f.level)).err();
        assert_eq!(refused, (level == 4).then_some((Reason::Reserved, 9, 4)));
        guest.set(level, good);
    }
}

#[test]
fn pat_of_a_large_page_is_not_address() {
    let guest = Guest::long();
    guest.set(2, 0x4020_0000 | ALL | PS | 1 << 12);
    let walk = guest.walk(Access::read()).unwrap();
    assert_eq!((walk.gpa, walk.page_size, walk.level), (Gpa(0x4020_1000), 0x20_0000, 2));
    assert!(walk.pat && !walk.pcd && !walk.pwt);
    guest.set(2, 0x4020_0000 | ALL | PS | 0x18);
    let walk = guest.walk(Access::read()).unwrap();
    assert!(!walk.pat && walk.pcd && walk.pwt && !walk.global);
    guest.set(2, 0x4000 | ALL);
    guest.set(1, 0x9000 | ALL | 0x80 | 0x100);
    let walk = guest.walk(Access::read());
    assert!(walk.is_ok_and(|w| w.pat && w.global && w.page_size == 0x1000));
}

#[test]
fn c4_accessed_and_dirty() {
    let guest = Guest::long();
    guest.walk(Access::read()).unwrap();
    assert!((1..=4).all(|level| guest.get(level) & (A | D) == A));
    let walk = guest.walk(Access::write()).unwrap();
    assert!(walk.accessed && walk.dirty);
    assert!((2..=4).all(|level| guest.get(level) & (A | D) == A));
    assert_eq!(guest.get(1) & (A | D), A | D);
    // Not when the access fails, at whatever level.
    let guest = Guest::long();
    guest.set(1, 0x9000 | P | US);
    guest.walk(Access::write()).unwrap_err();
    guest.set(1, 0);
    guest.walk(Access::read()).unwrap_err();
    assert!((1..=4).all(|level| guest.get(level) & (A | D) == 0));
    // A fetch does not dirty; a dirty bit above the leaf is ignored and left alone.
    guest.set(1, 0x9000 | ALL);
    guest.set(2, 0x4000 | ALL | D);
    assert!(!guest.walk(Access::execute()).unwrap().dirty);
    assert_eq!(guest.get(2), 0x4000 | ALL | A | D);
    let guest = Guest::long();
    let hint = Hint::default();
    assert!(guest.mode().translate(&guest.map, &hint, Gva(GVA), Some(Access::write())).is_ok());
    assert!((1..=4).all(|level| guest.get(level) & (A | D) == 0));
}

#[test]
fn c5_write_protect_off() {
    let mut guest = Guest::long();
    guest.set(1, 0x9000 | P | US);
    assert_eq!(guest.error(Access::write()), (3, Reason::Write, 1));
    guest.regs.cr0 &= !(1 << 16);
    let walk = guest.walk(Access::write()).unwrap();
    assert!(walk.dirty && !walk.rights.write && walk.rights.user);
    assert_eq!(guest.error(Access::write().user()), (7, Reason::Write, 1));
    let mode = guest.mode();
    assert!(mode.allowed(walk.rights, false).write && !mode.allowed(walk.rights, true).write);
    guest.regs.cr4 |= 1 << 20;
    assert!(!guest.mode().allowed(walk.rights, false).execute);
}

#[test]
fn c7_one_table_over_two_paths() {
    let guest = Guest::long();
    // PDE 2 and PDE 5 refer to the same page table with different rights.
    guest.memory.write8(0x3000 + 5 * 8, 0x4000 | P);
    let other = GVA ^ (2 ^ 5) << 21;
    assert!(guest.walk(Access::write().user()).is_ok());
    let rights = guest.walk_at(other, Access::read()).unwrap().rights;
    assert_eq!(rights, Rights { write: false, user: false, execute: true, key: 0 });
    assert!(guest.walk_at(other, Access::write().user()).is_err());
}

#[test]
fn smep_without_nx() {
    let mut guest = Guest::long();
    guest.regs.efer &= !(1 << 11);
    guest.regs.cr4 |= 1 << 20;
    assert_eq!(guest.error(Access::execute()), (0x11, Reason::Smep, 1));
    assert!(guest.walk(Access::execute().user()).is_ok());
    // In 32-bit paging too.
    let memory = Memory::new(&[(0, 0x10000)]);
    let mut regs = Regs { cr4: 1 << 20, efer: 0, maxphyaddr: 40, ..Regs::long_mode(0x1000) };
    memory.write4(0x1000, 0x2007);
    memory.write4(0x2000, 0x3007);
    let walk = |regs: &Regs| {
        let mode = PagingMode::new(regs).unwrap();
        mode.walk(&memory.map(), &Hint::default(), Gva(0), Access::execute())
    };
    assert_eq!(walk(&regs).unwrap_err().error_code, 0x11);
    regs.cr4 = 0;
    assert!(walk(&regs).is_ok());
}

#[test]
fn c11_smap() {
    let mut guest = Guest::long();
    guest.regs.cr4 |= 1 << 21;
    for wp in [0, 1 << 16] {
        guest.regs.cr0 = 1 | 1 << 31 | wp;
        guest.regs.rflags = 2;
        assert_eq!(guest.error(Access::read()), (1, Reason::Smap, 1));
        assert_eq!(guest.error(Access::write()), (3, Reason::Smap, 1));
        assert!(guest.walk(Access::execute()).is_ok());
        assert!(guest.walk(Access::read().user()).is_ok());
        guest.regs.rflags |= 1 << 18;
        assert!(guest.walk(Access::write()).is_ok());
        assert_eq!(guest.error(Access::read().implicit()), (1, Reason::Smap, 1));
        assert_eq!(guest.error(Access::read().user().implicit()), (1, Reason::Smap, 1));
    }
}

#[test]
fn c12_protection_keys() {
    let mut guest = Guest::long();
    guest.set(1, 0x9000 | ALL | 5 << 59);
    guest.regs.cr4 |= 1 << 22;
    guest.regs.pkru = 1 << 11; // WD of key 5
    assert_eq!(guest.walk(Access::read().user()).unwrap().rights.key, 5);
    assert_eq!(guest.error(Access::write().user()), (0x27, Reason::Pkey, 1));
    assert_eq!(guest.error(Access::write()), (0x23, Reason::Pkey, 1));
    guest.regs.cr0 &= !(1 << 16);
    assert!(guest.walk(Access::write()).is_ok());
    guest.regs.pkru = 1 << 10; // AD of key 5
    assert_eq!(guest.error(Access::read()), (0x21, Reason::Pkey, 1));
    assert!(guest.walk(Access::execute().user()).is_ok());
    let rights = Rights { write: true, user: true, execute: true, key: 5 };
    let only_execute = Allowed { read: false, write: false, execute: true };
    assert_eq!(guest.mode().allowed(rights, true), only_execute);
    // Supervisor pages have their own register.
    guest.set(1, 0x9000 | P | RW | 5 << 59);
    assert!(guest.walk(Access::read()).is_ok());
    guest.regs.cr4 |= 1 << 24;
    guest.regs.pkrs = 1 << 10;
    assert_eq!(guest.error(Access::read()), (0x21, Reason::Pkey, 1));
}

#[test]
fn c13_canonical_addresses() {
    let mut guest = Guest::long();
    guest.memory.write8(0x1000 + 256 * 8, 0x2000 | ALL);
    let gp = |guest: &Guest, gva| {
        let fault = guest.walk_at(gva, Access::write().user()).unwrap_err();
        (fault.vector, fault.error_code, fault.level, fault.reason)
    };
    let general_protection = (Fault::GP, 0, 0, Reason::NonCanonical);
    for gva in
        [1 << 47, 0x7fff_ffff_ffff + 1, 1 << 63, !0 << 46 & !(1 << 63), 0xffff_7fff_ffff_ffff]
    {
        assert_eq!(gp(&guest, gva), general_protection, "{gva:#x}");
        assert!(!guest.mode().is_canonical(Gva(gva)));
    }
    assert_eq!(gp(&guest, 0xffff_8000_0000_0000).3, Reason::NotPresent);
    assert!(guest.mode().is_canonical(Gva(0xffff_8000_0000_0000)));
    guest.regs.cr4 |= 1 << 12;
    for gva in [1 << 56, 0xfeff_ffff_ffff_ffff, 1 << 62] {
        assert_eq!(gp(&guest, gva), general_protection, "{gva:#x}");
    }
    assert_ne!(gp(&guest, 1 << 47), general_protection);
    assert_ne!(gp(&guest, 0xff00_0000_0000_0000), general_protection);
}

#[test]
fn c14_pointer_tags() {
    let mut guest = Guest::long();
    let tagged = GVA | 0x5a << 57;
    assert_eq!(guest.walk_at(tagged, Access::read()).unwrap_err().vector, 13);
    guest.regs.cr3 |= 1 << 61;
    assert!(guest.walk_at(tagged & !(1 << 63), Access::read()).is_ok());
    assert_eq!(guest.walk_at(tagged & !(1 << 63), Access::execute()).unwrap_err().vector, 13);
    assert_eq!(guest.walk_at(GVA | 1 << 50, Access::read()).unwrap_err().vector, 13);
    guest.regs.cr3 ^= 3 << 61;
    assert!(guest.walk_at(GVA | 1 << 50, Access::read()).is_ok());
    // CR2 has no tag.
    guest.set(1, 0);
    assert_eq!(guest.walk_at(GVA | 1 << 50, Access::read()).unwrap_err().gva, Gva(GVA));
    // Supervisor pointers go by CR4.
    let high = 0x00ff_8000_0000_0000 | 1 << 63;
    assert_eq!(guest.walk_at(high, Access::read()).unwrap_err().vector, 13);
    guest.regs.cr4 |= 1 << 28;
    let fault = guest.walk_at(high, Access::read()).unwrap_err();
    assert_eq!((fault.vector, fault.gva), (14, Gva(0xffff_8000_0000_0000)));
    // 48-bit tags in 5-level paging: bits 56:48 are tag, though they are address bits without.
    guest.regs.cr4 |= 1 << 12;
    let fault = guest.walk_at(GVA | 1 << 50, Access::read()).unwrap_err();
    assert_eq!(fault.gva, Gva(GVA));
}

#[test]
fn lam_bits_of_cr3_are_not_address() {
    let mut guest = Guest::long();
    guest.regs.cr3 |= 3 << 61 | 0xfff;
    assert_eq!(guest.mode().root(), Gfn(1));
    assert!(guest.walk(Access::read()).is_ok());
}

fn pae() -> (Memory, Regs) {
    let memory = Memory::new(&[(0, 0x10000)]);
    // 32-byte aligned, not page-aligned.
    let cr3 = 0x1fe0;
    for i in 0..4 {
        memory.write8(cr3 + i * 8, (0x2000 + 0x1000 * i) | P);
    }
    memory.write8(0x3000 + 8, 0x6000 | ALL);
    memory.write8(0x6000 + 16, 0x9000 | ALL);
    let regs = Regs { efer: 1 << 11, maxphyaddr: 40, ..Regs::long_mode(cr3) };
    (memory, regs)
}

#[test]
fn pae_top_entries_are_registers() {
    let (memory, mut regs) = pae();
    let (map, hint) = (memory.map(), Hint::default());
    regs.pdptrs = load_pdptrs(&map, &hint, &regs).unwrap();
    assert_eq!(regs.pdptrs, [0x2001, 0x3001, 0x4001, 0x5001]);
    let gva = Gva(1 << 30 | 1 << 21 | 2 << 12);
    let mode = PagingMode::new(&regs).unwrap();
    // They have no R/W or U/S, and get no accessed bit.
    let mut path = Path::new();
    let walk = mode.walk_path(&map, &hint, gva, Access::write().user(), &mut path).unwrap();
    assert_eq!((walk.gpa, walk.rights.write, walk.rights.user), (Gpa(0x9000), true, true));
    assert_eq!(memory.read8(0x1fe8), Some(0x3001));
    assert_eq!(path.steps().iter().map(|s| s.level).collect::<Vec<_>>(), [2, 1]);
    // Memory may change; the registers stay until CR3 is loaded.
    assert!(!pdptrs_changed(&map, &hint, &regs));
    memory.write8(0x1fe8, 0);
    assert!(pdptrs_changed(&map, &hint, &regs));
    assert!(mode.walk(&map, &hint, gva, Access::read()).is_ok());
    regs.pdptrs = load_pdptrs(&map, &hint, &regs).unwrap();
    let mode = PagingMode::new(&regs).unwrap();
    let fault = mode.walk(&map, &hint, gva, Access::write().user()).unwrap_err();
    assert_eq!((fault.error_code, fault.level, fault.reason), (6, 3, Reason::NotPresent));
    // Reserved bits are found when they are loaded, in present entries.
    for bit in [1, 2, 5, 6, 7, 8, 40, 51, 62, 63] {
        memory.write8(0x1fe8, 1 << bit);
        assert!(load_pdptrs(&map, &hint, &regs).is_ok());
        let value = 0x3001 | 1 << bit;
        memory.write8(0x1fe8, value);
        let bad = BadPdptrs::Reserved { index: 1, value };
        assert_eq!(load_pdptrs(&map, &hint, &regs), Err(bad));
        regs.pdptrs = read_pdptrs(&map, &hint, regs.cr3).unwrap();
        let mode = PagingMode::new(&regs).unwrap();
        let fault = mode.walk(&map, &hint, gva, Access::read()).unwrap_err();
        assert_eq!((fault.error_code, fault.level, fault.reason), (9, 3, Reason::Reserved));
    }
    for bit in [3, 4, 9, 10, 11] {
        memory.write8(0x1fe8, 0x3001 | 1 << bit);
        assert!(load_pdptrs(&map, &hint, &regs).is_ok());
    }
    regs.cr3 = 0x20000;
    assert_eq!(load_pdptrs(&map, &hint, &regs), Err(BadPdptrs::Outside(Gpa(0x20000))));
}

#[test]
fn pse_36() {
    let memory = Memory::new(&[(0, 0x10000)]);
    let map = memory.map();
    let mut regs = Regs { cr4: 1 << 4, efer: 0, maxphyaddr: 40, ..Regs::long_mode(0x1000) };
    // PDE 3: 4 MiB at 0xab_0c40_0000.
    memory.write4(0x1000 + 12, 0x0c40_0087 | 0xab << 13);
    let walk = |regs: &Regs| {
        let mode = PagingMode::new(regs).unwrap();
        mode.translate(&map, &Hint::default(), Gva(3 << 22 | 0x12_3456), None)
    };
    let found = walk(&regs).unwrap();
    assert_eq!((found.gpa, found.page_size), (Gpa(0xab_0c52_3456), 4 << 20));
    // More processor than PSE-36 covers: still 40 bits; less: the rest is reserved.
    regs.maxphyaddr = 52;
    assert_eq!(walk(&regs).unwrap().gpa, Gpa(0xab_0c52_3456));
    regs.maxphyaddr = 39;
    assert_eq!(walk(&regs).unwrap_err().reason, Reason::Reserved);
    regs.maxphyaddr = 40;
    memory.write4(0x1000 + 12, 0x0c60_0087);
    assert_eq!(walk(&regs).unwrap_err().error_code, 9);
    // Without PSE the bit is ignored and the entry refers to a table.
    regs.cr4 = 0;
    memory.write4(0x1000 + 12, 0x2087);
    memory.write4(0x2000 + 0x123 * 4, 0x7000 | P);
    assert_eq!(walk(&regs).unwrap().gpa, Gpa(0x7456));
}

#[test]
fn tables_outside() {
    let guest = Guest::long();
    for level in (1..=4u8).rev() {
        let guest = Guest::long();
        let expected = match level {
            4 => 0,
            level => {
                guest.set(u64::from(level) + 1, 0x10000 | ALL);
                level + 1
            }
        };
        let mut regs = guest.regs;
        if level == 4 {
            regs.cr3 = 0x10000;
        }
        let mode = PagingMode::new(&regs).unwrap();
        assert_eq!(mode.root_is_inside(&guest.map), level != 4);
        let fault = mode.walk(&guest.map, &Hint::default(), Gva(GVA), Access::write().user());
        let fault = fault.unwrap_err();
        assert_eq!((fault.vector, fault.error_code), (14, 6));
        assert_eq!((fault.reason, fault.level), (Reason::TableOutside, expected));
    }
    // A leaf outside is an answer.
    guest.set(1, 0xffff_f000 | ALL);
    assert_eq!(guest.walk(Access::write()).unwrap().gpa, Gpa(0xffff_f000));
}

#[test]
fn tables_in_read_only_memory_keep_their_bits() {
    let memory = Arc::new(AllocatedMemory::new(0x10000));
    let word = |gpa: u64| &memory.words()[(gpa / 8) as usize];
    for (at, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x9007)] {
        word(at).store(value, Ordering::Relaxed);
    }
    let slot = SlotConfig::new(0, Gpa(0), memory.clone()).read_only();
    let map = MemoryMap::build([slot]).unwrap();
    let mode = PagingMode::new(&Regs::long_mode(0x1000)).unwrap();
    let walk = mode.walk(&map, &Hint::default(), Gva(0), Access::write()).unwrap();
    assert!(!walk.accessed && !walk.dirty && walk.gpa == Gpa(0x9000));
    assert_eq!(word(0x4000).load(Ordering::Relaxed), 0x9007);
}

#[test]
fn tables_in_many_slots() {
    // Each table in a slot of its own, the top one in the last.
    let pieces: Vec<_> = (0..5u64).map(|i| (0x10_0000 * (5 - i), 0x1000)).collect();
    let memory = Memory::new(&pieces);
    let base = |i: usize| pieces[i].0;
    for i in 0..4 {
        memory.write8(base(i) + 8 * 7, base(i + 1) | ALL);
    }
    let mode = PagingMode::new(&Regs::long_mode(base(0))).unwrap();
    let gva = Gva(7 << 39 | 7 << 30 | 7 << 21 | 7 << 12 | 5);
    let walk = mode.walk(&memory.map(), &Hint::default(), gva, Access::write()).unwrap();
    assert_eq!(walk.gpa, Gpa(base(4) + 5));
}

#[test]
fn tables_that_refer_to_themselves() {
    // The classic: entry 511 of the top table is the top table.
    let guest = Guest::long();
    guest.memory.write8(0x1000 + 511 * 8, 0x1000 | ALL);
    let walk = guest.walk_at(0xffff_ffff_ffff_f008, Access::write()).unwrap();
    assert_eq!(walk.gpa, Gpa(0x1008));
    assert_eq!(guest.memory.read8(0x1000 + 511 * 8), Some(0x1000 | ALL | A | D));
}

#[test]
fn geometry() {
    let guest = Guest::long();
    let mode = guest.mode();
    assert_eq!((mode.levels(), mode.entry_size(), mode.root()), (4, 8, Gfn(1)));
    let indices: Vec<_> = (1..=4).map(|level| mode.index(Gva(GVA), level)).collect();
    assert_eq!(indices, [1, 2, 3, 4]);
    assert_eq!([1, 2, 3].map(|l| mode.page_size(l)), [0x1000, 0x20_0000, 0x4000_0000]);
    assert_eq!(mode.decode(0x1234_5000 | P, 1), Entry::Leaf(Gpa(0x1234_5000)));
    assert_eq!(mode.decode(0x1234_5000 | P, 2), Entry::Table(Gpa(0x1234_5000)));
    assert_eq!(mode.decode(0x1234_5000, 2), Entry::Absent);
    let (_, regs) = pae();
    let mode = PagingMode::new(&regs).unwrap();
    assert_eq!((mode.levels(), mode.entries(3), mode.entries(2)), (3, 4, 512));
    assert_eq!((mode.index(Gva(3 << 30), 3), mode.root_address()), (3, Gpa(0x1fe0)));
    let regs = Regs { cr0: 1, cr4: 0, efer: 0, ..Regs::long_mode(0) };
    let mode = PagingMode::new(&regs).unwrap();
    assert_eq!((mode.levels(), mode.is_paging()), (0, false));
    let walk = mode.walk(&guest.map, &Hint::default(), Gva(0x1234), Access::write().user());
    assert_eq!(walk.unwrap().gpa, Gpa(0x1234));
}
