// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest may rely on, through the shadow: each test names the rule of the SDM (vol. 3) or APM
//! that it checks. The walker's own tests have the rest (`paging_*.rs`).

mod common;

use common::{Guest, MIB, PAGE, RWU, load, reason, store};
use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{AllocatedMemory, DirtyMode, SlotConfig, SlotFlags, SlotId};
use mmu_core::paging::{Access, Illegal, Reason, Regs, bits};
use mmu_core::vcpu::{SoftExit, SoftVcpu, VcpuError};
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

const RO: u64 = bits::P | bits::US;
const GVA: u64 = 0x40_0000;
/// A page of the guest's for each table entry that is looked at.
const DATA: u64 = 0x10_0000;

fn guest() -> Guest {
    Guest::new(8 * MIB, 4 * MIB, 512, false)
}

/// The same on shadow tables of 5 levels.
fn guest_on_five() -> Guest {
    let tables = Arc::new(AllocatedMemory::new(512 * PAGE));
    let mmu = Mmu::new(Config::new(tables).levels(5)).unwrap();
    mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(8 * MIB)))).unwrap();
    Guest::over(mmu, 4 * MIB)
}

/// A guest that starts on its own tables needs a page of 2 MiB at a congruent machine address.
fn guest_with_blocks() -> Guest {
    let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(512 * PAGE)))).unwrap();
    let memory = AllocatedMemory::at(8 * MIB, Machine(1 << 40));
    mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(memory))).unwrap();
    Guest::over(mmu, 6 * MIB)
}

fn read(cpu: &mut SoftVcpu, gva: u64, user: bool) -> Result<u64, SoftExit> {
    cpu.session().load_u64(Gva(gva), user)
}

fn write(cpu: &mut SoftVcpu, gva: u64, user: bool) -> Result<(), SoftExit> {
    cpu.session().store(Gva(gva), &[1], user)
}

fn fetch(cpu: &mut SoftVcpu, gva: u64, user: bool) -> Result<(), SoftExit> {
    cpu.session().fetch(Gva(gva), &mut [0; 2], user)
}

fn code<T: std::fmt::Debug>(result: Result<T, SoftExit>) -> u32 {
    match result {
        Err(SoftExit::Fault(fault)) => fault.error_code,
        other => panic!("{other:?}"),
    }
}

/// C5: with CR0.WP = 0 the supervisor writes to a read-only page, and dirties it (5.6.1). Nothing of
/// that lets the user write, or the supervisor execute under SMEP.
#[test]
fn a_supervisors_write_without_wp_opens_nothing() {
    for (flags, level) in [(RO, 1), (RO | bits::PS, 2)] {
        let guest = guest_with_blocks();
        let at = guest.entry(guest.root, Gva(GVA), level);
        guest.write(at, (2 * MIB) | flags);
        let regs = guest.regs();
        let regs = Regs { cr0: regs.cr0 & !bits::CR0_WP, cr4: regs.cr4 | bits::CR4_SMEP, ..regs };
        let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
        for _ in 0..2 {
            assert_eq!(code(write(&mut cpu, GVA, true)), 7);
            assert_eq!(guest.read(at) & bits::D, 0);
            assert_eq!(read(&mut cpu, GVA, true), Ok(guest.read(Gpa(2 * MIB))));
            assert_eq!(write(&mut cpu, GVA, false), Ok(()));
            assert_eq!(guest.read(at) & (bits::A | bits::D), bits::A | bits::D);
            assert_eq!(code(write(&mut cpu, GVA, true)), 7);
            assert_eq!(reason(fetch(&mut cpu, GVA, false)), Reason::Smep);
            assert_eq!(fetch(&mut cpu, GVA, true), Ok(()));
            guest.audit();
            guest.write(at, (2 * MIB) | flags);
            cpu.session().invlpg(Gva(GVA));
        }
        // With WP again it is read-only again.
        let cr0 = cpu.vcpu().regs().cr0;
        cpu.vcpu_mut().set_cr0(cr0 | bits::CR0_WP).unwrap();
        assert_eq!(code(write(&mut cpu, GVA, false)), 3);
        guest.audit();
    }
}

/// C6: each of these takes effect with the write of the register (5.10.4.1; SMEP, SMAP, NXE by the
/// roles of the shadow).
#[test]
fn register_bits_take_effect_at_once() {
    let guest = guest();
    guest.map(Gva(GVA), Gpa(DATA), RWU);
    guest.map(Gva(GVA + PAGE), Gpa(DATA), RWU | bits::NX);
    let mut cpu = guest.vcpu();
    let regs = *cpu.vcpu().regs();
    for _ in 0..3 {
        assert_eq!(fetch(&mut cpu, GVA, false), Ok(()));
        cpu.vcpu_mut().set_cr4(regs.cr4 | bits::CR4_SMEP).unwrap();
        assert_eq!(reason(fetch(&mut cpu, GVA, false)), Reason::Smep);
        assert_eq!(write(&mut cpu, GVA, false), Ok(()));
        cpu.vcpu_mut().set_cr4(regs.cr4 | bits::CR4_SMAP).unwrap();
        assert_eq!(fetch(&mut cpu, GVA, false), Ok(()));
        assert_eq!(reason(write(&mut cpu, GVA, false)), Reason::Smap);
        cpu.vcpu_mut().set_cr4(regs.cr4).unwrap();
        assert_eq!(write(&mut cpu, GVA, false), Ok(()));
        // Without NXE bit 63 is reserved, and a fetch says nothing of its kind (5.7).
        assert_eq!(code(fetch(&mut cpu, GVA + PAGE, true)), 0x15);
        assert_eq!(read(&mut cpu, GVA + PAGE, true), Ok(guest.read(Gpa(DATA))));
        cpu.vcpu_mut().set_efer(regs.efer & !bits::EFER_NXE).unwrap();
        assert_eq!(code(fetch(&mut cpu, GVA + PAGE, true)), 0xd);
        assert_eq!(code(read(&mut cpu, GVA + PAGE, false)), 9);
        assert_eq!(read(&mut cpu, GVA, true), Ok(guest.read(Gpa(DATA))));
        cpu.vcpu_mut().set_efer(regs.efer).unwrap();
        guest.audit();
    }
}

/// C7: one table reached by paths with different rights gives each its own (5.6: the AND over the
/// levels), one linked at two levels is both.
#[test]
fn paths_to_a_shared_table_are_not_conflated() {
    let guest = guest();
    let (table, data) = (guest.new_table(), Gpa(DATA));
    guest.write(table, data.0 | RWU);
    let rights = [RWU, RO, bits::P | bits::RW, bits::P, RWU | bits::NX];
    let at = |n: u64| n << 30;
    for (n, rights) in (1..).zip(rights) {
        guest.write(guest.entry(guest.root, Gva(at(n)), 2), table.0 | rights);
    }
    let mut cpu = guest.vcpu();
    for round in 0..2 {
        for (n, rights) in (1..).zip(rights) {
            for user in [round == 0, round != 0] {
                let fits = !user || rights & bits::US != 0;
                assert_eq!(read(&mut cpu, at(n), user).is_ok(), fits);
                let may_write = fits && rights & bits::RW != 0;
                assert_eq!(write(&mut cpu, at(n), user).is_ok(), may_write, "{n} {user}");
                let may_fetch = fits && rights & bits::NX == 0;
                assert_eq!(fetch(&mut cpu, at(n), user).is_ok(), may_fetch);
            }
        }
    }
    guest.audit();
    // The same table as a page directory: its entry is a table there, the data page.
    guest.write(guest.entry(guest.root, Gva(at(9)), 3), table.0 | RWU);
    guest.write(data, (DATA + PAGE) | RWU);
    guest.write(Gpa(DATA + PAGE), 0x77);
    assert_eq!(read(&mut cpu, at(9), true), Ok(0x77));
    // The data page is a table now, and its writes through the other paths are seen.
    let entry = ((DATA + 2 * PAGE) | RWU).to_le_bytes();
    cpu.session().store(Gva(at(1)), &entry, true).unwrap();
    cpu.session().invlpg(Gva(at(9)));
    assert_eq!(read(&mut cpu, at(9), true), Ok(0));
    guest.audit();
}

/// C7: tables that refer to themselves, at every level, and are written through that.
#[test]
fn tables_that_contain_themselves_are_followed() {
    let guest = guest();
    guest.map(Gva(GVA), Gpa(DATA), RWU);
    // The recursive entry of the root: 511.
    guest.write(Gpa(guest.root.0 + 511 * 8), guest.root.0 | RWU);
    let sign = 0xffff << 48;
    let table = |gva: u64| sign | 511 << 39 | (gva >> 9 & 0x7f_ffff_f000);
    let mut cpu = guest.vcpu();
    let entry = guest.entry(guest.root, Gva(GVA), 1);
    let window = table(GVA) + (GVA >> 12 & 511) * 8;
    for round in 1..4 {
        let new = (DATA + round * PAGE) | RWU;
        store(&mut cpu, window, new);
        assert_eq!(guest.read(entry), new);
        cpu.session().invlpg(Gva(GVA));
        store(&mut cpu, GVA, round);
        assert_eq!(guest.read(Gpa(DATA + round * PAGE)), round);
        assert_eq!(load(&mut cpu, window), new | bits::A | bits::D);
        guest.audit();
    }
    // The root itself, as a page: the recursive entry goes.
    let root = sign | 511 << 39 | 511 << 30 | 511 << 21 | 511 << 12;
    assert_eq!(load(&mut cpu, root), guest.read(guest.root));
    store(&mut cpu, root + 511 * 8, 0);
    cpu.session().flush();
    assert_eq!(reason(write(&mut cpu, window, true)), Reason::NotPresent);
    guest.audit();
}

/// C8: a large page through two addresses with different rights; the dirty bit of each is its own.
#[test]
fn a_large_page_seen_twice_keeps_rights_and_dirty_bits() {
    let guest = guest_with_blocks();
    let at = [(1 << 30, RWU), (2 << 30, RO), (3 << 30, RWU)].map(|(gva, rights)| {
        let at = guest.entry(guest.root, Gva(gva), 2);
        guest.write(at, (2 * MIB) | rights | bits::PS);
        at
    });
    let mut cpu = guest.vcpu();
    store(&mut cpu, 1 << 30, 5);
    assert_eq!(load(&mut cpu, 2 << 30), 5);
    assert_eq!(reason(write(&mut cpu, 2 << 30, true)), Reason::Write);
    assert_eq!(load(&mut cpu, 3 << 30), 5);
    let dirty = || at.map(|at| guest.read(at) & bits::D != 0);
    assert_eq!(dirty(), [true, false, false]);
    store(&mut cpu, (3 << 30) + PAGE, 6);
    assert_eq!(dirty(), [true, false, true]);
    assert_eq!(load(&mut cpu, (2 << 30) + PAGE), 6);
    guest.audit();
}

/// C9: neighbours that were mapped ahead change no error code and set no bit.
#[test]
fn what_is_mapped_ahead_is_not_to_be_seen() {
    let guest = guest();
    let used = bits::A | bits::D;
    let flags = [RWU | used, RWU, RO | bits::A, RWU | bits::A, bits::P | used, 0, RWU | 1 << 51];
    for (n, flags) in (0..).zip(flags) {
        guest.map(Gva(GVA + n * PAGE), Gpa(DATA + n * PAGE), flags);
    }
    let entry = |n: u64| guest.read(guest.entry(guest.root, Gva(GVA + n * PAGE), 1)) & used;
    let regs = Regs { maxphyaddr: 40, ..guest.regs() };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    store(&mut cpu, GVA, 1);
    let before = [0, 1, 2, 3, 4, 5, 6].map(entry);
    assert_eq!(before, [used, 0, bits::A, bits::A, used, 0, 0]);
    assert_eq!(code(write(&mut cpu, GVA + 2 * PAGE, true)), 7);
    assert_eq!(code(read(&mut cpu, GVA + 4 * PAGE, true)), 5);
    assert_eq!(code(read(&mut cpu, GVA + 5 * PAGE, true)), 4);
    assert_eq!(code(read(&mut cpu, GVA + 6 * PAGE, true)), 13);
    load(&mut cpu, GVA + 3 * PAGE);
    assert_eq!([0, 1, 2, 3, 4, 5, 6].map(entry), before);
    store(&mut cpu, GVA + 3 * PAGE, 1);
    assert_eq!(entry(3), used);
    guest.audit();
}

/// C10: INVLPG of any address in a page drops every translation of it, of whatever size the
/// processor made them (5.10.4.1); so does a fault there. Without either it is the old or the new.
#[test]
fn invlpg_of_any_address_in_a_large_page_is_enough() {
    for skewed in [false, true] {
        let guest = if skewed { guest() } else { guest_with_blocks() };
        let window = 1 << 30;
        let at = guest.entry(guest.root, Gva(window), 2);
        guest.write(at, RWU | bits::PS);
        for page in 0..16 {
            guest.write(Gpa(page * PAGE + 8), 1);
            guest.write(Gpa(2 * MIB + page * PAGE + 8), 2);
        }
        let mut cpu = guest.vcpu();
        // A vCPU that stays inside the guest uses what it remembers.
        let mut session = cpu.session();
        for (to, seen, rights) in [(2 * MIB, 2, RWU), (0, 1, RO), (2 * MIB, 2, RWU), (0, 1, RWU)] {
            for page in 0..16 {
                let old = session.load_u64(Gva(window + page * PAGE + 8), true);
                assert_eq!(old, Ok(3 - seen));
                // For writes, too, if it may.
                let _ = session.store(Gva(window + page * PAGE), &[1], true);
            }
            guest.write(at, to | rights | bits::PS);
            let either = session.load_u64(Gva(window + 5 * PAGE + 8), true);
            assert!(either == Ok(seen) || either == Ok(3 - seen));
            session.invlpg(Gva(window + 20 * PAGE));
            for page in 0..16 {
                let now = session.load_u64(Gva(window + page * PAGE + 8), true);
                assert_eq!(now, Ok(seen), "{skewed} {page}");
            }
            let stored = session.store(Gva(window + 7 * PAGE), &[1], true);
            assert_eq!(stored.is_ok(), rights == RWU);
        }
        drop(session);
        guest.audit();
    }
}

#[test]
fn a_fault_drops_the_translation_of_its_page() {
    let guest = guest();
    guest.write(Gpa(DATA), 1);
    guest.write(Gpa(DATA + PAGE), 2);
    guest.map(Gva(GVA), Gpa(DATA), RO);
    guest.map(Gva(GVA + PAGE), Gpa(DATA), RO);
    let mut cpu = guest.vcpu();
    let mut session = cpu.session();
    assert_eq!(session.load_u64(Gva(GVA), true), Ok(1));
    guest.map(Gva(GVA), Gpa(DATA + PAGE), RO);
    assert_eq!(code(session.store(Gva(GVA), &[1], true)), 7);
    assert_eq!(session.load_u64(Gva(GVA + PAGE), true), Ok(1));
    assert_eq!(session.load_u64(Gva(GVA), true), Ok(2));
    drop(session);
    guest.audit();
}

/// C11: SMAP (5.6.1), with WP = 0 too; EFLAGS.AC lifts it for explicit accesses only.
#[test]
fn smap_is_lifted_by_ac_for_explicit_accesses() {
    for wp in [0, bits::CR0_WP] {
        for level in [1, 2] {
            let guest = guest_with_blocks();
            let flags = if level == 1 { RWU } else { RWU | bits::PS };
            guest.write(guest.entry(guest.root, Gva(GVA), level), (2 * MIB) | flags);
            let regs = guest.regs();
            let regs =
                Regs { cr0: regs.cr0 & !bits::CR0_WP | wp, cr4: regs.cr4 | bits::CR4_SMAP, ..regs };
            let open = Regs { rflags: 2 | bits::RFLAGS_AC, ..regs };
            let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
            for _ in 0..2 {
                cpu.vcpu_mut().set_regs(regs).unwrap();
                assert_eq!(fetch(&mut cpu, GVA, false), Ok(()));
                assert_eq!(reason(read(&mut cpu, GVA, false).map(drop)), Reason::Smap);
                assert_eq!(reason(write(&mut cpu, GVA, false)), Reason::Smap);
                assert_eq!(fetch(&mut cpu, GVA + PAGE / 2, false), Ok(()));
                // Pages that the fetch may have brought along.
                let beside = if level == 1 { GVA } else { GVA + 3 * PAGE };
                assert_eq!(reason(read(&mut cpu, beside, false).map(drop)), Reason::Smap);
                assert_eq!(write(&mut cpu, GVA, true), Ok(()));
                cpu.vcpu_mut().set_regs(open).unwrap();
                assert_eq!(write(&mut cpu, GVA, false), Ok(()));
                let mut implicit = |user| {
                    let access = Access { user, ..Access::read().implicit() };
                    reason(cpu.session().read(Gva(GVA), &mut [0; 8], access))
                };
                assert_eq!([implicit(false), implicit(true)], [Reason::Smap; 2]);
                assert_eq!(fetch(&mut cpu, GVA, false), Ok(()));
                guest.audit();
            }
        }
    }
}

/// A fetch of what the supervisor may not read brings nothing along that it then may: the pages around
/// it, where a large page of the guest's is mapped small.
#[test]
fn a_fetch_brings_no_data_along() {
    let guest = guest_with_blocks();
    let log = SlotFlags { read_only: false, dirty: DirtyMode::WriteProtect };
    guest.mmu.set_slot_flags(SlotId(0), log).unwrap();
    guest.write(guest.entry(guest.root, Gva(GVA), 2), (2 * MIB) | RWU | bits::PS);
    let regs = Regs { cr4: guest.regs().cr4 | bits::CR4_SMAP, ..guest.regs() };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    assert_eq!(fetch(&mut cpu, GVA, false), Ok(()));
    for page in 0..512 {
        let found = read(&mut cpu, GVA + page * PAGE, false);
        assert_eq!(reason(found.map(drop)), Reason::Smap, "page {page}");
    }
    guest.audit();
}

/// A guest that ran without paging, with SMEP or SMAP in CR4 already: what was mapped then, where no
/// page is the user's, is not found by the supervisor of its tables.
#[test]
fn what_was_mapped_without_paging_does_not_lift_smep_or_smap() {
    let (smep, smap) = (bits::CR4_SMEP, bits::CR4_SMAP);
    for (largest, cr4) in [(PAGE, smep), (PAGE, smap), (PAGE, smep | smap), (2 * MIB, smep)] {
        let tables = Arc::new(AllocatedMemory::new(512 * PAGE));
        let mmu = Mmu::new(Config::new(tables).largest_page(largest)).unwrap();
        let memory = AllocatedMemory::at(8 * MIB, Machine(1 << 40));
        mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(memory))).unwrap();
        let guest = Guest::over(mmu, 6 * MIB);
        let at = guest.entry(guest.root, Gva(0), 2);
        guest.write(at, RWU | bits::PS | bits::A | bits::D);
        let regs = Regs { cr4: guest.regs().cr4 | cr4, ..guest.regs() };
        let unpaged = Regs {
            cr0: regs.cr0 & !bits::CR0_PG,
            efer: regs.efer & !(bits::EFER_LMA | bits::EFER_LME),
            ..regs
        };
        let mut cpu = guest.mmu.create_soft_vcpu(unpaged).unwrap();
        for at in [0x1000, 0x2000] {
            assert_eq!(fetch(&mut cpu, at, false), Ok(()));
            assert_eq!(write(&mut cpu, at, false), Ok(()));
        }
        cpu.vcpu_mut().set_regs(regs).unwrap();
        for at in [0x1000, 0x2000, 0x3000] {
            // What is permitted comes first, so that the tables are linked.
            match cr4 & smap {
                0 => assert_eq!(write(&mut cpu, at, false), Ok(())),
                _ => assert_eq!(fetch(&mut cpu, at, false).is_ok(), cr4 & smep == 0),
            }
            assert_eq!(write(&mut cpu, at, false).is_ok(), cr4 & smap == 0);
            assert_eq!(read(&mut cpu, at, false).is_ok(), cr4 & smap == 0);
            assert_eq!(fetch(&mut cpu, at, false).is_ok(), cr4 & smep == 0);
        }
        guest.audit();
    }
}

/// C13: LA57 cannot change in long mode (5.1.1); addresses are canonical at 48 or 57 bits, whatever the
/// shadow remembers of the canonical one.
#[test]
fn addresses_must_be_canonical() {
    let guest = guest_on_five();
    guest.map(Gva(GVA), Gpa(DATA), RWU);
    guest.map(Gva(GVA + PAGE), Gpa(1 << 38), RWU);
    let long = guest.regs();
    let five = guest.new_table();
    guest.write(five, guest.root.0 | RWU);
    let regs = Regs { cr4: long.cr4 | bits::CR4_LA57, cr3: five.0, ..long };
    for (regs, top) in [(long, 47), (regs, 56)] {
        let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
        store(&mut cpu, GVA, 1);
        let device = |cpu: &mut SoftVcpu, gva| cpu.session().load(Gva(gva), &mut [0], true);
        for _ in 0..2 {
            assert_eq!(device(&mut cpu, GVA + PAGE), Err(SoftExit::Mmio(Gpa(1 << 38))));
        }
        assert!(guest.mmu.stats().mmio_cached > 0);
        for bit in top..64 {
            let wrong = GVA ^ 1 << bit;
            assert_eq!(reason(write(&mut cpu, wrong, true)), Reason::NonCanonical, "bit {bit}");
            assert_eq!(reason(fetch(&mut cpu, wrong, false)), Reason::NonCanonical);
            let device = device(&mut cpu, wrong + PAGE);
            assert_eq!(reason(device), Reason::NonCanonical, "a device at bit {bit}");
        }
        let cr4 = cpu.vcpu().regs().cr4 ^ bits::CR4_LA57;
        let refused = cpu.vcpu_mut().set_cr4(cr4);
        assert!(matches!(refused, Err(VcpuError::Gp(Illegal::La57InLongMode { .. }))));
        guest.audit();
    }
    // On tables of 4 levels there is no 5-level guest.
    let small = self::guest();
    let refused = small.mmu.create_soft_vcpu(Regs { cr3: small.root.0, ..regs });
    assert!(matches!(refused.map(drop), Err(VcpuError::Unsupported { .. })));
}

/// C14: linear-address masking (SDM chapter 4): tags of data pointers are ignored, and those of fetches,
/// of the other half, and of bits below are not. INVLPG of a tagged address does nothing.
#[test]
fn tags_are_ignored_for_data() {
    for five_shadow in [false, true] {
        for five_guest in [false, true] {
            let guest = if five_shadow { guest_on_five() } else { guest() };
            if five_guest && !five_shadow {
                continue;
            }
            let top = if five_guest { 56 } else { 47 };
            guest.map(Gva(GVA), Gpa(DATA), RWU);
            // The upper half: the same page, by the last entry of each table.
            let five = guest.new_table();
            guest.write(five, guest.root.0 | RWU);
            guest.write(Gpa(five.0 + 511 * 8), guest.root.0 | RWU);
            let at = guest.entry(guest.root, Gva(511 << 39), 1);
            guest.write(at, DATA | RWU);
            let upper = u64::MAX << 39;
            let regs = Regs { cr4: guest.regs().cr4 | bits::CR4_LAM_SUP, ..guest.regs() };
            let regs = match five_guest {
                true => Regs { cr4: regs.cr4 | bits::CR4_LA57, cr3: five.0, ..regs },
                false => regs,
            };
            let tags_of = |low: u32| {
                (low..63).map(|bit| 1u64 << bit).chain([u64::MAX >> 1 & u64::MAX << low])
            };
            for (lam, low) in [(bits::CR3_LAM_U48, 48), (bits::CR3_LAM_U57, 57), (0, 63)] {
                let regs = Regs { cr3: regs.cr3 | lam, ..regs };
                let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
                store(&mut cpu, GVA, 7);
                for tag in tags_of(low).filter(|tag| *tag >> 63 == 0 && low < 63) {
                    assert_eq!(read(&mut cpu, GVA | tag, true), Ok(7), "{tag:#x}");
                    assert_eq!(read(&mut cpu, GVA | tag, false), Ok(7));
                    assert_eq!(write(&mut cpu, GVA | tag, true), Ok(()));
                    store(&mut cpu, GVA | tag, 7);
                    assert!(fetch(&mut cpu, GVA | tag, true).is_err());
                    cpu.session().invlpg(Gva(GVA | tag));
                }
                for tag in (top.max(47)..low).map(|bit| 1u64 << bit).filter(|tag| tag >> 63 == 0) {
                    assert!(read(&mut cpu, GVA | tag, true).is_err(), "{tag:#x}");
                }
                let supervisor = if five_guest { 57 } else { 48 };
                for tag in tags_of(supervisor) {
                    assert_eq!(read(&mut cpu, upper & !tag, false), Ok(7), "{tag:#x}");
                    assert_eq!(reason(fetch(&mut cpu, upper & !tag, false)), Reason::NonCanonical);
                }
                guest.audit();
            }
        }
    }
}

/// C15: CR3's low bits and the no-flush bit (5.10.4.1), and which of CR4.PCIDE is legal (5.10.1).
#[test]
fn pcids_are_not_part_of_the_root() {
    let guest = guest();
    guest.map(Gva(GVA), Gpa(DATA), RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, GVA, 1);
    let (cr3, cr4) = (guest.root.0, cpu.vcpu().regs().cr4);
    let vcpu = cpu.vcpu_mut();
    // Without PCIDE bits 11:0 but PWT and PCD are ignored, and bit 63 is reserved.
    vcpu.set_cr3(cr3 | 0xfff).unwrap();
    assert!(matches!(vcpu.set_cr3(cr3 | 1 << 63), Err(VcpuError::Gp(_))));
    let refused = vcpu.set_cr4(cr4 | bits::CR4_PCIDE);
    assert!(matches!(refused, Err(VcpuError::Gp(Illegal::PcidNotZero { .. }))));
    assert_eq!(load(&mut cpu, GVA), 1);
    let vcpu = cpu.vcpu_mut();
    vcpu.set_cr3(cr3).unwrap();
    vcpu.set_cr4(cr4 | bits::CR4_PCIDE).unwrap();
    let loads = guest.mmu.stats().root_loads;
    for pcid in [1, 2, 0xfff] {
        for no_flush in [0, bits::CR3_NO_FLUSH] {
            cpu.vcpu_mut().set_cr3(cr3 | pcid | no_flush).unwrap();
            assert_eq!(cpu.vcpu().regs().cr3, cr3 | pcid);
            // The edit of another context's is seen once it was invalidated.
            let page = Gpa(DATA + pcid % 16 * PAGE);
            guest.map(Gva(GVA), page, RWU);
            cpu.session().invlpg(Gva(GVA));
            store(&mut cpu, GVA, pcid);
            assert_eq!(guest.read(page), pcid);
        }
    }
    assert_eq!(guest.mmu.stats().root_loads, loads, "found again without a look-up");
    guest.audit();
}

/// C16: one page mapped at very many addresses: one more costs no more than the first did, nor does
/// taking one away, the newest or the oldest.
#[test]
fn a_page_at_many_addresses_stays_fast() {
    const TABLES: u64 = 64;
    let guest = Guest::new(16 * MIB, 8 * MIB, 2048, true);
    guest.mmu.set_nr_mmu_pages(2048).unwrap();
    let at = |n: u64| (n / 512) << 30 | (n % 512) << 12;
    let mut cpu = guest.vcpu();
    for oldest_first in [false, true] {
        (0..TABLES * 512).for_each(|n| guest.map(Gva(at(n)), Gpa(DATA), RWU));
        let mut store_all = |table| {
            let begin = Instant::now();
            (table * 512..(table + 1) * 512).for_each(|n| store(&mut cpu, at(n), n));
            begin.elapsed()
        };
        let made: Vec<_> = (0..TABLES).map(&mut store_all).collect();
        assert!(guest.audit().sptes >= TABLES * 512);
        let mut bitmap = [0; 64];
        assert!(guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap() > 0);
        guest.audit();
        let unmap_all = |part: u64| {
            let begin = Instant::now();
            for n in part * 512..(part + 1) * 512 {
                let n = if oldest_first { n } else { TABLES * 512 - 1 - n };
                guest.map(Gva(at(n)), Gpa(DATA + PAGE), RWU);
            }
            begin.elapsed()
        };
        let mut unmapped: Vec<_> = (0..TABLES).map(unmap_all).collect();
        assert_eq!(guest.audit().sptes, 0);
        // From the fewest to the most; the best of each quarter, since others use the machine.
        unmapped.reverse();
        for times in [made, unmapped] {
            let best = |quarter: usize| times[quarter * 16..][..16].iter().min().unwrap();
            assert!(*best(3) < 8 * *best(0), "oldest first: {oldest_first}: {times:?}");
        }
    }
}

/// C17: accesses across pages and the border of memory are whole or not made; locked ones are one step.
#[test]
fn accesses_across_pages_are_whole_or_not_made() {
    let guest = guest();
    for (n, gpa) in [DATA, DATA + 5 * PAGE, 1 << 38].into_iter().enumerate() {
        guest.map(Gva(GVA + n as u64 * PAGE), Gpa(gpa), RWU);
    }
    guest.map(Gva(GVA + 4 * PAGE), Gpa(DATA + 6 * PAGE), RO);
    guest.map(Gva(GVA + 3 * PAGE), Gpa(DATA + 7 * PAGE), RWU);
    let mut cpu = guest.vcpu();
    let mut session = cpu.session();
    for size in 2..=16usize {
        for before in 1..size as u64 {
            let at = Gva(GVA + PAGE - before);
            let bytes: Vec<u8> = (0..size as u8).map(|n| n + size as u8).collect();
            session.store(at, &bytes, true).unwrap();
            let mut seen = vec![0; size];
            session.load(at, &mut seen, true).unwrap();
            assert_eq!(seen, bytes);
            let map = guest.mmu.memory();
            map.read(Gpa(DATA + PAGE - before), &mut seen[..before as usize]);
            map.read(Gpa(DATA + 5 * PAGE), &mut seen[before as usize..]);
            assert_eq!(seen, bytes);
            // Half memory, half device.
            let at = Gva(GVA + 2 * PAGE - before);
            let refused = Err(SoftExit::Mmio(Gpa(1 << 38)));
            assert_eq!(session.store(at, &bytes, true), refused);
            assert_eq!(session.load(at, &mut seen, true), refused);
            // Half writable.
            let at = Gva(GVA + 4 * PAGE - before);
            assert_eq!(reason(session.store(at, &bytes, true)), Reason::Write);
            session.load(at, &mut seen, true).unwrap();
        }
    }
    drop(session);
    assert_eq!(guest.read(Gpa(DATA + 6 * PAGE - 8)), 0, "part of a refused store was made");
    assert_eq!(guest.read(Gpa(DATA + 8 * PAGE - 8)), 0, "part of a refused store was made");
    // A locked operation needs the right to write even if it changes nothing, and D (5.6, 5.8).
    let refused = cpu.session().cmpxchg(Gva(GVA + 4 * PAGE), 8, 1, 2, true);
    assert_eq!(reason(refused.map(drop)), Reason::Write);
    guest.map(Gva(GVA + 3 * PAGE), Gpa(DATA + 7 * PAGE), RWU);
    cpu.session().invlpg(Gva(GVA + 3 * PAGE));
    assert_eq!(cpu.session().cmpxchg(Gva(GVA + 3 * PAGE), 8, 1, 2, true), Ok(Err(0)));
    assert_ne!(guest.read(guest.entry(guest.root, Gva(GVA + 3 * PAGE), 1)) & bits::D, 0);
    guest.audit();
}

/// C18: global pages (5.10.2.4) may stay over a load of CR3; the entries of another address space are
/// what its tables say once they were invalidated, and a toggle of CR4.PGE drops all.
#[test]
fn global_pages_fall_with_pge() {
    let guest = guest();
    guest.map(Gva(GVA), Gpa(DATA), RWU | bits::G);
    let regs = Regs { cr4: guest.regs().cr4 | bits::CR4_PGE, ..guest.regs() };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    store(&mut cpu, GVA, 1);
    for round in 1..4 {
        guest.map(Gva(GVA), Gpa(DATA + round * PAGE), RWU | bits::G);
        let cr4 = cpu.vcpu().regs().cr4 ^ bits::CR4_PGE;
        cpu.vcpu_mut().set_cr4(cr4).unwrap();
        store(&mut cpu, GVA, round);
        assert_eq!(guest.read(Gpa(DATA + round * PAGE)), round);
        cpu.vcpu_mut().set_cr3(guest.root.0).unwrap();
        assert_eq!(load(&mut cpu, GVA), round);
    }
    guest.audit();
}

/// C10 between vCPUs: after the edit and both INVLPGs, in this order, the other sees the new page.
#[test]
fn a_shootdown_reaches_the_other_vcpu() {
    let guest = guest();
    guest.map(Gva(GVA), Gpa(DATA), RWU);
    let entry = guest.entry(guest.root, Gva(GVA), 1);
    (0..64).for_each(|n| guest.write(Gpa(DATA + n * PAGE), n));
    let (wanted, seen, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|s| {
        let (guest, wanted, seen, stop) = (&guest, &wanted, &seen, &stop);
        s.spawn(move || {
            let mut cpu = guest.vcpu();
            let mut session = cpu.session();
            let mut last = 0;
            while !stop.load(Ordering::Relaxed) {
                let now = wanted.load(Ordering::Acquire);
                if now != last {
                    // The interrupt.
                    session.invlpg(Gva(GVA));
                    assert_eq!(session.load_u64(Gva(GVA), true), Ok(now % 64));
                    last = now;
                    seen.store(now, Ordering::Release);
                } else {
                    let either = session.load_u64(Gva(GVA), true).unwrap();
                    assert!([last % 64, (last + 1) % 64].contains(&either), "a third: {either}");
                }
            }
        });
        let ends = scopeguard(stop);
        for round in 1..3000 {
            guest.write(entry, (DATA + round % 64 * PAGE) | RWU);
            wanted.store(round, Ordering::Release);
            while seen.load(Ordering::Acquire) != round {
                assert!(!stop.load(Ordering::Relaxed));
                std::thread::yield_now();
            }
        }
        drop(ends);
    });
    guest.audit();
}

/// Sets the flag when it goes, by a failure too.
fn scopeguard(flag: &AtomicBool) -> impl Drop + '_ {
    struct Sets<'a>(&'a AtomicBool);
    impl Drop for Sets<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    Sets(flag)
}

/// The accessed bit of an odd 4-byte entry is address bit 37 of the 8-byte entry that it is half of.
#[test]
fn accessed_bits_of_one_format_are_addresses_of_the_other() {
    let guest = Guest::new(8 * MIB, 4 * MIB, 512, false);
    guest.map(Gva(0), Gpa(0x10_0000), RWU);
    guest.write(Gpa(0x10_0000), 7);
    let table = guest.entry(guest.root, Gva(0), 1);
    let mut cpu = guest.vcpu();
    assert_eq!(load(&mut cpu, 0), 7);
    // The high half of the entry becomes present: bit 32 of the address of the 8-byte one.
    let directory = guest.new_table();
    guest.write(directory, table.0 | RWU);
    guest.write(table, guest.read(table) | 1 << 32 | bits::US << 32);
    let narrow = Regs { cr4: 0, efer: 0, cr3: directory.0, ..guest.regs() };
    let mut other = guest.mmu.create_soft_vcpu(narrow).unwrap();
    let device = |cpu: &mut SoftVcpu| {
        cpu.session().flush();
        cpu.session().load(Gva(0), &mut [0], true).unwrap_err()
    };
    let before = device(&mut cpu);
    other.session().load(Gva(0x1000), &mut [0], true).unwrap();
    assert_eq!(guest.read(table) >> 37 & 1, 1);
    assert_ne!(device(&mut cpu), before);
    guest.audit();
}
