// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accesses where rules meet: at the ends of the address space, on tables of two formats, on pages that
//! the host is taking the right to write from, and after the vCPU that they were made through is gone.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, DirtyPage, DirtyRing, Hint, SlotConfig, SlotId};
use mmu_core::paging::{Access, Fault, Regs, bits, code, load_pdptrs};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::{AccessError, SoftExit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

const USER: Access = Access::read().user();

fn guest() -> Guest {
    Guest::new(4 * MIB, 2 * MIB, 256, true)
}

/// An access that goes through the shadow faults as one through the guest's own tables: an address is
/// checked before it is translated.
#[test]
fn the_end_of_a_native_access_is_checked_before_its_beginning_is_translated() {
    let guest = guest();
    let mut cpu = guest.vcpu();
    // The last canonical page of the lower half is not mapped.
    let at = Gva((1 << 47) - 4);
    let fault = |result: Result<(), SoftExit>| match result {
        Err(SoftExit::Fault(fault)) => (fault.vector, fault.error_code, fault.gva),
        other => panic!("{other:?}"),
    };
    let end = (Fault::GP, 0, Gva(1 << 47));
    let mut session = cpu.session();
    assert_eq!(fault(session.load(at, &mut [0; 8], true)), end);
    assert_eq!(fault(session.fetch(at, &mut [0; 8], true)), end);
    assert_eq!(fault(session.store(at, &[0; 8], true)), end);
    assert_eq!(fault(session.cmpxchg(at, 8, 0, 0, true).map(drop)), end);
    assert_eq!(fault(session.load(at, &mut [0; 4], true)), (Fault::PF, code::U, at));
    // From the last byte of the address space to its first: canonical all the way.
    guest.map(Gva(0), Gpa(0x1_0000), RWU);
    guest.map(Gva(!(PAGE - 1)), Gpa(0x2_0000), RWU);
    session.store(Gva(u64::MAX), b"ab", true).unwrap();
    let mut seen = [0; 2];
    session.load(Gva(u64::MAX), &mut seen, true).unwrap();
    assert_eq!(&seen, b"ab");
}

/// With 32-bit paging the address after the last is the first (SDM vol. 3, 5.3.1: a linear address has
/// 32 bits), also in CR2.
#[test]
fn thirty_two_bits_wrap_around() {
    let guest = guest();
    let (directory, table) = (Gpa(0x6000), Gpa(0x7000));
    let entry = |at: u64, value: u64| {
        assert_eq!(guest.mmu.write_phys(Gpa(at), &(value as u32).to_le_bytes()), 4);
    };
    entry(directory.0, table.0 | RWU);
    entry(directory.0 + 4 * 1023, table.0 | RWU);
    entry(table.0 + 4 * 1023, 0x1_0000 | RWU);
    let regs = Regs { cr4: 0, efer: 0, ..Regs::long_mode(directory.0) };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    let at = Gva(0xffff_fffe);
    let missing = |error_code| (Fault::PF, error_code, Gva(0));
    let Err(AccessError::Fault(fault)) = cpu.vcpu().write(at, b"abcd", USER) else {
        panic!("address 0 is not mapped");
    };
    assert_eq!((fault.vector, fault.error_code, fault.gva), missing(code::U | code::W));
    let Err(SoftExit::Fault(fault)) = cpu.session().load(at, &mut [0; 4], true) else {
        panic!("address 0 is not mapped");
    };
    assert_eq!((fault.vector, fault.error_code, fault.gva), missing(code::U));
    entry(table.0, 0x2_0000 | RWU);
    cpu.vcpu().write(at, b"abcd", USER).unwrap();
    let mut seen = [0; 4];
    cpu.session().load(at, &mut seen, true).unwrap();
    assert_eq!(&seen, b"abcd");
    guest.mmu.memory().read(Gpa(0x2_0000), &mut seen[..2]);
    assert_eq!(&seen, b"cdcd");
    guest.audit();
}

/// The accessed bit of an odd 4-byte entry is an address bit of the 8-byte entry that it is half of. Who
/// sets it tells the shadow of a vCPU with 8-byte entries.
#[test]
fn a_walkers_accessed_bits_are_told_to_the_shadow_of_the_other_format() {
    let guest = guest();
    // As a page table of 4-byte entries it maps 0x1000 to 0; as one of 8-byte entries it maps its
    // first page to 0x7_0000_0000, or to 0x27_0000_0000 once that has been used.
    let high = |accessed: u64| (7 | accessed) << 32;
    for (slot, at) in [(1, high(0)), (2, high(bits::A))] {
        let memory = Arc::new(AllocatedMemory::new(PAGE));
        guest.mmu.create_slot(SlotConfig::new(slot, Gpa(at), memory)).unwrap();
        guest.mmu.write_phys(Gpa(at), &[slot as u8]);
    }
    let gva = Gva(0x20_0000);
    let entry = guest.entry(guest.root, gva, 1);
    guest.write(entry, high(0) | RWU | bits::A);
    let directory = Gpa(0x6000);
    guest.write(directory, entry.page().0 | RWU | bits::A);
    let narrow = Regs { cr4: 0, efer: 0, ..Regs::long_mode(directory.0) };
    let narrow = guest.mmu.create_soft_vcpu(narrow).unwrap();
    let mut wide = guest.vcpu();
    assert_eq!(load(&mut wide, gva.0), 1);
    let walk = narrow.vcpu().walker().walk(Gva(0x1000), USER).unwrap();
    assert_eq!(walk.gpa, Gpa(0));
    assert_eq!(guest.read(entry), high(bits::A) | RWU | bits::A);
    wide.session().invlpg(gva);
    assert_eq!(load(&mut wide, gva.0), 2, "the entry as it was before the walk");
    guest.audit();
}

/// When the host hears that a page is read-only, no write to it is under way any more.
#[test]
fn nobody_writes_what_the_host_has_made_read_only() {
    const PAGES: u64 = 256;
    const LAST: Gpa = Gpa((256 + PAGES - 1) * PAGE);
    let guest = guest();
    for page in 0..PAGES {
        guest.map(Gva(16 * MIB + page * PAGE), Gpa(MIB + page * PAGE), RWU);
    }
    let stop = AtomicBool::new(false);
    let range = PageRange::Guest { base: LAST, size: PAGE };
    let word = || guest.read(Gpa(LAST.0 + PAGE - 8));
    scope(|s| {
        s.spawn(|| {
            let cpu = guest.vcpu();
            let view = cpu.vcpu().view(USER);
            let mut bytes = vec![0u8; (PAGES * PAGE) as usize];
            for round in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                bytes.fill(round as u8);
                let result = match round % 2 {
                    0 => cpu.vcpu().write(Gva(16 * MIB), &bytes, USER),
                    _ => view.write(Gva(16 * MIB), &bytes),
                };
                let refused = AccessError::HostReadOnly { gpa: LAST };
                assert!(result.is_ok() || result == Err(refused), "{result:?}");
            }
        });
        let mut late = 0;
        for _ in 0..40 {
            guest.mmu.set_host_writable(range, false).unwrap();
            let seen = word();
            sleep(Duration::from_millis(5));
            late += u32::from(word() != seen);
            guest.mmu.set_host_writable(range, true).unwrap();
            sleep(Duration::from_millis(2));
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(late, 0, "writes after the page was read-only");
    });
    guest.audit();
}

/// A patch that crosses from a page into the same page.
#[test]
fn code_that_goes_on_in_its_own_page_is_patched() {
    let guest = guest();
    let page = Gpa(0x3_0000);
    guest.map(Gva(0x8000), page, RWU);
    guest.map(Gva(0x9000), page, RWU);
    let mut cpu = guest.vcpu();
    let (old, new) = ([0x0f, 0x01, 0xc1], [0x0f, 0x01, 0xd9]);
    cpu.vcpu().write(Gva(0x8fff), &old, USER).unwrap();
    let fetch = Access::execute().user();
    assert_eq!(cpu.vcpu_mut().patch_code(Gva(0x8fff), &old, &new, fetch), Ok(true));
    let mut seen = [0; 3];
    cpu.session().fetch(Gva(0x8fff), &mut seen, true).unwrap();
    assert_eq!(seen, new);
    // Nothing is left behind that would stall a fault, or another patch.
    assert_eq!(cpu.vcpu_mut().patch_code(Gva(0x8fff), &new, &old, fetch), Ok(true));
    guest.audit();
}

/// What was made through a vCPU outlives it, and the engine's last handle.
#[test]
fn pins_and_views_outlive_their_vcpu_and_their_engine() {
    let guest = guest();
    guest.map(Gva(0x8000), Gpa(0x3_0000), RWU);
    let window = Gva(0x40_0000);
    let entry = guest.entry(guest.root, window, 1);
    guest.map(Gva(0x9000), entry.page(), RWU);
    let mut other = guest.vcpu();
    guest.write(entry, 0x1_0000 | RWU);
    guest.write(Gpa(0x1_0000), 1);
    guest.write(Gpa(0x3_0000), 2);
    assert_eq!(load(&mut other, window.0), 1);
    let cpu = guest.vcpu();
    let table = Gva(0x9000 + entry.page_offset());
    let pinned = cpu.vcpu().pin(table, 8, Access::write().user()).unwrap();
    let view = cpu.vcpu().view(USER);
    drop(cpu);
    // Both still tell the shadow of writes to a guest table.
    pinned.write(0, &(0x3_0000 | RWU).to_le_bytes()).unwrap();
    other.session().invlpg(window);
    assert_eq!(load(&mut other, window.0), 2);
    view.write(table, &(0x1_0000 | RWU).to_le_bytes()).unwrap();
    other.session().invlpg(window);
    assert_eq!(load(&mut other, window.0), 1);
    guest.audit();
    let Guest { mmu, .. } = guest;
    drop(other);
    let release = mmu.delete_slot(SlotId(0)).unwrap();
    assert_eq!(release.pinned_pages, 1);
    drop(mmu);
    pinned.write(0, &[7]).unwrap();
    assert!(matches!(view.read(table, &mut [0]), Err(AccessError::Fault(_))), "no tables any more");
}

/// The part in the second page has its own rights: CR2 is its first byte, the code says why (SDM vol. 3,
/// 5.6 and 5.7).
#[test]
fn the_second_page_refuses_for_every_reason() {
    let guest = guest();
    const HERE: u64 = 0x8000;
    const NEXT: Gva = Gva(HERE + PAGE);
    let [user, supervisor] = [RWU, bits::P | bits::RW];
    let (read, write, execute) = (Access::read(), Access::write(), Access::execute());
    let key = |n: u64| n << 59;
    let with = |cr4: u64, pkru| {
        let regs = guest.regs();
        Regs { cr4: regs.cr4 | cr4, cr0: regs.cr0 | bits::CR0_WP, pkru, ..regs }
    };
    let plain = with(0, 0);
    let smep = with(bits::CR4_SMEP, 0);
    let smap = with(bits::CR4_SMAP, 0);
    let lifted = Regs { rflags: bits::RFLAGS_AC, ..smap };
    let keys = with(bits::CR4_PKE, 0b1001 << 2);
    let lax = Regs { cr0: plain.cr0 & !bits::CR0_WP, ..plain };
    use code::{I, P, PK, U, W};
    let cases = [
        // Registers, who, the first page, the second, what becomes of it.
        (plain, write.user(), user, bits::P | bits::US, Some(P | W | U)),
        (plain, write, user, bits::P | bits::US, Some(P | W)),
        (lax, write, user, bits::P | bits::US, None),
        (lax, write.user(), user, bits::P | bits::US, Some(P | W | U)),
        (plain, read.user(), user, supervisor, Some(P | U)),
        (plain, read.user().implicit(), user, supervisor, None),
        (plain, execute.user(), user, user | bits::NX, Some(P | I | U)),
        (plain, execute, supervisor, 0, Some(I)),
        (smep, execute, supervisor, user, Some(P | I)),
        (smep, execute.user(), user, user, None),
        (smap, read, supervisor, user, Some(P)),
        (smap, write, supervisor, user, Some(P | W)),
        (smap, execute, supervisor, user, None),
        (lifted, read, supervisor, user, None),
        (lifted, read.implicit(), supervisor, user, Some(P)),
        (lifted, read.user().implicit(), supervisor, user, Some(P)),
        (keys, read.user(), user, user | key(1), Some(P | U | PK)),
        (keys, write.user(), user, user | key(2), Some(P | W | U | PK)),
        (keys, read.user(), user, user | key(2), None),
        (keys, execute.user(), user, user | key(1), None),
    ];
    for (n, (regs, who, first, second, expected)) in cases.into_iter().enumerate() {
        guest.map(Gva(HERE), Gpa(0x1_0000), first);
        guest.map(NEXT, Gpa(0x2_0000), second);
        let view = guest.mmu.view(&regs, who).unwrap();
        let at = Gva(NEXT.0 - 3);
        let result = match who.kind {
            mmu_core::paging::Kind::Write => view.write(at, &[1; 8]),
            _ => view.read(at, &mut [0; 8]),
        };
        let found = match result {
            Ok(()) => None,
            Err(AccessError::Fault(fault)) => {
                assert_eq!((fault.vector, fault.gva), (Fault::PF, NEXT), "case {n}");
                Some(fault.error_code)
            }
            Err(other) => panic!("case {n}: {other}"),
        };
        assert_eq!(found, expected, "case {n}: {who:?}");
        if regs.cr4 & bits::CR4_PKE == 0 {
            let cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
            let result = cpu.vcpu().read_emulated(at, &mut [0; 8], who);
            let fault = result.err().map(|error| match error {
                AccessError::Fault(fault) => (fault.gva, fault.error_code),
                other => panic!("case {n}: {other}"),
            });
            assert_eq!(fault, expected.map(|code| (NEXT, code)), "case {n}: {who:?}");
        }
    }
}

/// A view with PAE registers reads by the PDPTE registers that it was given, as a vCPU does.
#[test]
fn a_view_has_the_pdpte_registers_that_it_was_given() {
    let guest = guest();
    let entries = [(0x6020, 0x7000 | bits::P), (0x7000, 0x8000 | RWU), (0x8008, 0x1_0000 | RWU)];
    for (at, value) in entries {
        guest.write(Gpa(at), value);
    }
    guest.write(Gpa(0x1_0000), 7);
    let regs = Regs { cr3: 0x6020, cr4: bits::CR4_PAE, efer: 0, ..guest.regs() };
    let absent = guest.mmu.view(&regs, USER).unwrap();
    assert!(matches!(absent.read(Gva(0x1000), &mut [0]), Err(AccessError::Fault(_))));
    let pdptrs = load_pdptrs(&guest.mmu.memory(), &Hint::default(), &regs).unwrap();
    let view = guest.mmu.view(&Regs { pdptrs, ..regs }, USER).unwrap();
    let mut seen = [0];
    view.read(Gva(0x1000), &mut seen).unwrap();
    assert_eq!(seen, [7]);
    // The registers, not the memory that they came from (SDM vol. 3, 5.4.1).
    guest.write(Gpa(0x6020), 0);
    view.write(Gva(0x1000), &[8]).unwrap();
    assert_eq!(guest.read(Gpa(0x1_0000)), 8);
}

/// What a vCPU's accessors write is listed in its ring, once until it is collected: data, and the tables
/// whose accessed and dirty bits are set.
#[test]
fn accessors_list_pages_in_the_vcpus_ring() {
    let guest = guest();
    guest.map(Gva(0x8000), Gpa(0x1_0000), RWU);
    guest.map(Gva(0x9000), Gpa(0x2_0000), RWU);
    let mut cpu = guest.vcpu();
    let ring = Arc::new(DirtyRing::new(64).unwrap());
    cpu.vcpu_mut().set_dirty_ring(Some(Arc::clone(&ring)));
    let mut bitmap = [0; 16];
    let listed = || {
        let mut pages = [DirtyPage { slot: SlotId(0), page: 0 }; 64];
        let len = ring.collect(&mut pages);
        guest.mmu.reset_dirty_pages(&pages[..len]).unwrap();
        pages[..len].iter().map(|page| page.page).collect::<Vec<_>>()
    };
    guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    let table = guest.entry(guest.root, Gva(0x8000), 1).gfn().0;
    let write = Access::write().user();
    cpu.vcpu().write(Gva(0x8ffc), &[1; 8], write).unwrap();
    let first = listed();
    assert!(first.contains(&table) && first.ends_with(&[0x10, 0x20]), "{first:x?}");
    assert!(first.iter().all(|page| first.iter().filter(|p| *p == page).count() == 1));
    let fetch = Access::execute().user();
    cpu.vcpu().write(Gva(0x8000), &[2], write).unwrap();
    assert_eq!(cpu.vcpu().write_emulated(Gva(0x8008), &[2], write), Ok(vec![]));
    assert_eq!(listed(), [0x10], "two writes to one page");
    assert_eq!(cpu.vcpu().cmpxchg(Gva(0x9000), 4, 0x0101_0101, 1, write), Ok(Ok(())));
    assert_eq!(cpu.vcpu().cmpxchg(Gva(0x8000), 4, 99, 1, write), Ok(Err(2)));
    assert_eq!(listed(), [0x20], "an exchange that was made, and one that was not");
    assert_eq!(cpu.vcpu_mut().patch_code(Gva(0x8fff), &[1, 1], &[3, 3], fetch), Ok(true));
    assert_eq!(listed(), [0x10, 0x20]);
    store(&mut cpu, 0x8000, 4);
    assert_eq!(listed(), [0x10]);
    // More pages than there is room for: the log has them all.
    for page in 0..80 {
        guest.map(Gva(16 * MIB + page * PAGE), Gpa(MIB + page * PAGE), RWU);
    }
    guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    cpu.vcpu().write(Gva(16 * MIB), &vec![5; 80 * PAGE as usize], write).unwrap();
    assert!(ring.take_lost());
    assert_eq!(cpu.session().load(Gva(0x8000), &mut [0], true), Err(SoftExit::RingFull));
    let dirty = guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    assert!(dirty >= 80, "{dirty}");
}

/// What a VMM prints in a log is short.
#[test]
fn vcpus_and_engines_are_printed_in_short() {
    let guest = guest();
    let mut cpu = guest.vcpu();
    let printed = [format!("{cpu:?}"), format!("{:?}", cpu.session()), format!("{:?}", guest.mmu)];
    for text in printed {
        assert!(text.len() < 1000, "{} bytes: {}", text.len(), &text[..200]);
    }
}

/// The last addresses, and lengths of nothing and of everything.
#[test]
fn addresses_and_lengths_at_their_ends() {
    let guest = guest();
    guest.map(Gva(0x8000), Gpa(0x1_0000), RWU);
    // To the last guest-physical page but one, where there is memory, and to the last, where there is not.
    const LAST: u64 = (1 << 52) - PAGE;
    let memory = Arc::new(AllocatedMemory::new(PAGE));
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(LAST - PAGE), memory)).unwrap();
    guest.map(Gva(0x9000), Gpa(LAST - PAGE), RWU);
    guest.map(Gva(0xa000), Gpa(LAST), RWU);
    let mut cpu = guest.vcpu();
    let write = Access::write().user();
    let left = cpu.vcpu().write_emulated(Gva(0x9ffc), b"12345678", write).unwrap();
    assert_eq!((left.len(), left[0].gpa, left[0].bytes.clone()), (1, Gpa(LAST), 4..8));
    let mut seen = [0; 4];
    assert_eq!(guest.mmu.memory().read(Gpa(LAST - 4), &mut seen), 4);
    assert_eq!(&seen, b"1234");
    // Nothing is no access: also where nothing is mapped, or can be.
    for gva in [Gva(0x8000), Gva(0xb000), Gva(1 << 47), Gva(u64::MAX)] {
        let vcpu = cpu.vcpu();
        vcpu.read(gva, &mut [], USER).unwrap();
        vcpu.write(gva, &[], write).unwrap();
        assert_eq!(vcpu.fetch(gva, &mut [], Access::execute().user()), Ok(0));
        assert_eq!(vcpu.read_emulated(gva, &mut [], USER), Ok(vec![]));
        assert_eq!(vcpu.write_emulated(gva, &[], write), Ok(vec![]));
        assert!(vcpu.pin(gva, 0, write).unwrap().is_empty());
        let refused = AccessError::Unsupported { gva, size: 0 };
        assert_eq!(vcpu.cmpxchg(gva, 0, 0, 0, write), Err(refused));
        let refused = AccessError::Unsupported { gva, size: usize::MAX };
        assert_eq!(vcpu.cmpxchg(gva, usize::MAX, 0, 0, write), Err(refused));
        cpu.session().load(gva, &mut [], true).unwrap();
        cpu.session().store(gva, &[], true).unwrap();
        let max = mmu_core::vcpu::MAX_PINNED;
        let refused = AccessError::TooLong { gva, len: usize::MAX, max };
        assert_eq!(cpu.vcpu().pin(gva, usize::MAX, write).err(), Some(refused));
    }
    for gpa in [Gpa(LAST), Gpa(LAST + PAGE), Gpa(1 << 53), Gpa(u64::MAX - 3), Gpa(u64::MAX)] {
        guest.mmu.note_write(gpa, 0);
        guest.mmu.note_write(gpa, u64::MAX);
        assert_eq!(guest.mmu.write_phys(gpa, &[1; 16]), 0);
        assert_eq!(guest.mmu.memory().read(gpa, &mut [1; 16]), 0);
        assert!(guest.mmu.pin_page(gpa, false).is_err());
        assert!(guest.mmu.patch_code(gpa, &[0; 8], &[1; 8]).is_err());
    }
    guest.mmu.note_write(Gpa(0), u64::MAX);
    assert_eq!(guest.mmu.write_phys(Gpa(LAST - 1), &[1; 16]), 1);
    guest.audit();
}
