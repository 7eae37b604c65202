// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of the memory map under a guest that uses it: moves, flags, aliases, deletions, and who is
//! refused.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, reason, store};
use mmu_core::PinError;
use mmu_core::addr::{Gpa, Gva, Hva};
use mmu_core::memory::{
    Alias, AliasError, AllocatedMemory, Backing, DirtyMode, MAX_OLD_MAPS, SlotConfig, SlotError,
    SlotFlags, SlotId,
};
use mmu_core::paging::{Reason, bits};
use mmu_core::shadow::{PageRange, RangeError, Release};
use mmu_core::sync::WouldDeadlock;
use mmu_core::vcpu::SoftExit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SLOT: SlotId = SlotId(1);
const HERE: u64 = 16 * MIB;
const THERE: u64 = 64 * MIB;
const WINDOW: u64 = 0x1000_0000;

/// A guest that sees `pages` pages at `HERE` at `WINDOW`, and those at `THERE` 16 MiB on.
fn guest(pages: u64) -> Guest {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    for page in 0..pages {
        guest.map(Gva(WINDOW + page * PAGE), Gpa(HERE + page * PAGE), RWU);
        guest.map(Gva(WINDOW + 16 * MIB + page * PAGE), Gpa(THERE + page * PAGE), RWU);
    }
    guest
}

fn memory(size: u64) -> Arc<AllocatedMemory> {
    Arc::new(AllocatedMemory::new(size))
}

#[test]
fn a_moved_slot_is_at_its_new_place_only() {
    let guest = guest(4);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(HERE), memory(4 * PAGE))).unwrap();
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW + PAGE, 7);
    guest.mmu.move_slot(SLOT, Gpa(THERE)).unwrap();
    let gone = cpu.session().load(Gva(WINDOW + PAGE), &mut [0], true);
    assert_eq!(gone, Err(SoftExit::Mmio(Gpa(HERE + PAGE))));
    assert_eq!(load(&mut cpu, WINDOW + 16 * MIB + PAGE), 7);
    guest.audit();
    // Over itself, a page further on.
    guest.mmu.move_slot(SLOT, Gpa(THERE + PAGE)).unwrap();
    assert_eq!(load(&mut cpu, WINDOW + 16 * MIB + 2 * PAGE), 7);
    guest.mmu.move_slot(SLOT, Gpa(THERE + PAGE)).unwrap();
    guest.audit();
    let id = SLOT;
    let refused = |base| guest.mmu.move_slot(SLOT, Gpa(base)).unwrap_err();
    let base = Gpa(4 * MIB - PAGE);
    assert_eq!(refused(base.0), SlotError::Overlap { id, base, other: SlotId(0) });
    assert_eq!(refused(5), SlotError::MisalignedBase { id, base: Gpa(5) });
    let base = Gpa((1 << 52) - PAGE);
    assert_eq!(refused(base.0), SlotError::WrapsAround { id, base, size: 4 * PAGE });
    let unknown = guest.mmu.move_slot(SlotId(9), Gpa(0)).unwrap_err();
    assert_eq!(unknown, SlotError::NoSuchSlot(SlotId(9)));
    assert_eq!(load(&mut cpu, WINDOW + 16 * MIB + 2 * PAGE), 7);
}

/// While a slot moves to and fro, a guest that knows both places finds it at one of them at least.
#[test]
fn a_moving_slot_is_never_nowhere() {
    let guest = guest(1);
    let words = memory(PAGE);
    words.words()[0].store(7, Ordering::Relaxed);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(HERE), words)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let mover = s.spawn(|| {
            let mut moves = 0;
            while !stop.load(Ordering::Acquire) || moves < 2 {
                guest.mmu.move_slot(SLOT, Gpa([THERE, HERE][moves % 2])).unwrap();
                moves += 1;
            }
        });
        let places = || {
            let map = guest.mmu.memory();
            [HERE, THERE].iter().filter(|at| map.read(Gpa(**at), &mut [0; 8]) == 8).count()
        };
        let elsewhere = (0..20_000).find(|_| places() != 1);
        stop.store(true, Ordering::Release);
        mover.join().unwrap();
        assert_eq!(elsewhere, None, "one place in each map");
    });
    guest.audit();
}

#[test]
fn flags_change_at_once_and_state_survives() {
    let guest = guest(4);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(HERE), memory(4 * PAGE))).unwrap();
    let mut cpu = guest.vcpu();
    let set = |read_only, dirty| {
        guest.mmu.set_slot_flags(SLOT, SlotFlags { read_only, dirty }).unwrap();
        guest.audit();
    };
    store(&mut cpu, WINDOW, 1);
    set(true, DirtyMode::Off);
    let refused = cpu.session().store(Gva(WINDOW), &[2], true);
    assert_eq!(refused, Err(SoftExit::Mmio(Gpa(HERE))));
    assert_eq!(load(&mut cpu, WINDOW), 1);
    set(false, DirtyMode::WriteProtect);
    let mut log = [0];
    let mut harvest = || guest.mmu.dirty_log(SLOT, &mut log).map(|_| log[0]);
    assert_eq!(harvest(), Ok(0), "a log begins empty");
    store(&mut cpu, WINDOW, 2);
    store(&mut cpu, WINDOW + 3 * PAGE, 2);
    set(true, DirtyMode::WriteProtect);
    guest.mmu.move_slot(SLOT, Gpa(THERE)).unwrap();
    assert_eq!(harvest(), Ok(0b1001), "the log survives a change of flags and of place");
    guest.mmu.move_slot(SLOT, Gpa(HERE)).unwrap();
    set(false, DirtyMode::WriteProtect);
    store(&mut cpu, WINDOW, 3);
    set(false, DirtyMode::DirtyBits);
    store(&mut cpu, WINDOW + PAGE, 3);
    set(false, DirtyMode::WriteProtect);
    assert_eq!(harvest(), Ok(0b11), "the log survives a change of its kind");
    set(false, DirtyMode::Off);
    assert!(harvest().is_err());
    store(&mut cpu, WINDOW, 4);
    set(false, DirtyMode::DirtyBits);
    assert_eq!(harvest(), Ok(0));
    let unknown = guest.mmu.set_slot_flags(SlotId(9), SlotFlags::default()).unwrap_err();
    assert_eq!(unknown, SlotError::NoSuchSlot(SlotId(9)));
}

/// Guest tables in a slot that was read-only need not have A set; writable, they must (R35).
#[test]
fn tables_in_memory_that_becomes_writable_get_their_accessed_bits() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 64, false);
    let rom = memory(PAGE);
    rom.words()[5].store(0x5000 | RWU, Ordering::Relaxed);
    let config = SlotConfig::new(1, Gpa(HERE), rom.clone()).read_only();
    guest.mmu.create_slot(config).unwrap();
    guest.write(guest.entry(guest.root, Gva(0), 2), HERE | RWU);
    let mut cpu = guest.vcpu();
    load(&mut cpu, 0x5000);
    assert_eq!(rom.words()[5].load(Ordering::Relaxed) & bits::A, 0);
    guest.mmu.set_slot_flags(SLOT, SlotFlags::default()).unwrap();
    guest.audit();
    store(&mut cpu, 0x5000, 1);
    assert_eq!(rom.words()[5].load(Ordering::Relaxed) & (bits::A | bits::D), bits::A | bits::D);
    guest.audit();
}

#[test]
fn an_alias_is_another_name_for_the_same_page() {
    let guest = guest(4);
    let config = SlotConfig::new(1, Gpa(THERE), memory(4 * PAGE)).log_dirty();
    guest.mmu.create_slot(config).unwrap();
    let alias = Alias { number: 3, base: Gpa(HERE), size: 2 * PAGE, target: Gpa(THERE + PAGE) };
    guest.mmu.set_alias(alias).unwrap();
    assert_eq!(guest.mmu.memory().aliases(), [alias]);
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW, 1);
    assert_eq!(load(&mut cpu, WINDOW + 16 * MIB + PAGE), 1);
    let mut log = [0];
    guest.mmu.dirty_log(SLOT, &mut log).unwrap();
    assert_eq!(log, [0b10], "logged for the target");
    store(&mut cpu, WINDOW + 16 * MIB + PAGE, 2);
    guest.mmu.dirty_log(SLOT, &mut log).unwrap();
    assert_eq!((log, load(&mut cpu, WINDOW)), ([0b10], 2), "whichever name is used");
    guest.audit();
    // Beyond the alias, and once it has been removed, there is nothing.
    let nothing = |at| Err(SoftExit::Mmio(Gpa(at)));
    let gone = cpu.session().load(Gva(WINDOW + 2 * PAGE), &mut [0], true);
    assert_eq!(gone, nothing(HERE + 2 * PAGE));
    guest.mmu.remove_alias(3).unwrap();
    assert_eq!(cpu.session().load(Gva(WINDOW), &mut [0], true), nothing(HERE));
    assert_eq!(guest.mmu.remove_alias(3), Err(AliasError::NoSuchAlias(3)));
    guest.audit();
}

/// A guest page table that is shadowed under one name is edited under another.
#[test]
fn a_table_edited_through_an_alias_is_the_same_table() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    guest.map(Gva(WINDOW), Gpa(0x1000), RWU);
    let entry = guest.entry(guest.root, Gva(WINDOW), 1);
    let table = entry.page();
    guest.map(Gva(0x80_0000), Gpa(HERE), RWU);
    let alias = Alias { number: 0, base: Gpa(HERE), size: PAGE, target: table };
    guest.mmu.set_alias(alias).unwrap();
    guest.write(Gpa(0x1000), 0xa);
    guest.write(Gpa(0x2000), 0xb);
    let mut cpu = guest.vcpu();
    assert_eq!(load(&mut cpu, WINDOW), 0xa);
    store(&mut cpu, 0x80_0000 + entry.page_offset(), 0x2000 | RWU);
    cpu.session().invlpg(Gva(WINDOW));
    assert_eq!(load(&mut cpu, WINDOW), 0xb);
    guest.audit();
}

#[test]
fn aliases_lie_over_slots_and_are_not_followed_twice() {
    let guest = guest(4);
    let at = |at: u64| {
        let mut word = [0; 8];
        let map = guest.mmu.memory();
        (map.read(Gpa(at), &mut word) == 8).then(|| u64::from_le_bytes(word))
    };
    let set = |number, base, pages, target| {
        let (base, target) = (Gpa(base), Gpa(target));
        guest.mmu.set_alias(Alias { number, base, size: pages * PAGE, target }).unwrap();
    };
    for page in 0..16 {
        guest.write(Gpa(page * PAGE), page);
    }
    // Over a slot, splitting it.
    set(1, 4 * PAGE, 2, 8 * PAGE);
    assert_eq!([3, 4, 5, 6].map(|page| at(page * PAGE)), [3, 8, 9, 6].map(Some));
    // An alias of the alias's range names what lies under it.
    set(2, HERE, 3, 3 * PAGE);
    assert_eq!([0, 1, 2].map(|page| at(HERE + page * PAGE)), [3, 4, 5].map(Some));
    // Of two, the smaller number is on top.
    set(0, 5 * PAGE, 1, 15 * PAGE);
    assert_eq!([4, 5, 6].map(|page| at(page * PAGE)), [8, 15, 6].map(Some));
    // An alias to a hole is a hole, and follows the slot that comes and goes there.
    set(3, 10 * PAGE, 1, THERE);
    assert_eq!(at(10 * PAGE), None);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(THERE), memory(PAGE))).unwrap();
    guest.write(Gpa(10 * PAGE), 77);
    assert_eq!(at(THERE), Some(77));
    guest.mmu.delete_slot(SLOT).unwrap();
    assert_eq!(at(10 * PAGE), None);
    // Onto itself, and over the end of a slot.
    set(4, 12 * PAGE, 1, 12 * PAGE);
    set(5, 32 * MIB, 2, 4 * MIB - PAGE);
    assert_eq!([at(12 * PAGE), at(32 * MIB), at(32 * MIB + PAGE)], [Some(12), Some(0), None]);
    for number in 0..6 {
        guest.mmu.remove_alias(number).unwrap();
    }
    assert_eq!((0..16).map(|page| at(page * PAGE)).collect::<Vec<_>>(), {
        (0..16).map(Some).collect::<Vec<_>>()
    });
}

#[test]
fn bad_aliases_are_refused_by_name() {
    let guest = guest(1);
    let good = Alias { number: 0, base: Gpa(HERE), size: PAGE, target: Gpa(0) };
    let refused = |alias| guest.mmu.set_alias(alias).unwrap_err();
    assert_eq!(refused(Alias { number: 32, ..good }), AliasError::BadNumber(32));
    assert_eq!(refused(Alias { size: 0, ..good }), AliasError::ZeroSize(0));
    let misaligned = |what, value| AliasError::Misaligned { number: 0, what, value };
    assert_eq!(refused(Alias { base: Gpa(8), ..good }), misaligned("base", 8));
    assert_eq!(refused(Alias { size: 5, ..good }), misaligned("size", 5));
    assert_eq!(refused(Alias { target: Gpa(1), ..good }), misaligned("target", 1));
    let (base, size) = (Gpa((1 << 52) - PAGE), 2 * PAGE);
    let wraps = |base| AliasError::WrapsAround { number: 0, base, size };
    assert_eq!(refused(Alias { base, size, ..good }), wraps(base));
    assert_eq!(refused(Alias { target: base, size, ..good }), wraps(base));
    let base = Gpa(!(PAGE - 1));
    assert_eq!(refused(Alias { base, size, ..good }), wraps(base));
    assert!(guest.mmu.memory().aliases().is_empty());
}

#[test]
fn a_deletion_says_who_still_holds_the_memory() {
    let guest = guest(4);
    let backing = memory(4 * PAGE);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(HERE), backing.clone())).unwrap();
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW, 5);
    let (first, page) = (guest.mmu.memory(), guest.mmu.pin_page(Gpa(HERE), true).unwrap());
    let second = guest.mmu.memory();
    assert!(Arc::ptr_eq(&first, &second));
    let release = guest.mmu.delete_slot(SLOT).unwrap();
    assert_eq!(release, Release { snapshots: 2, pinned_pages: 1, held: true });
    assert!(!release.is_complete());
    drop((first, second));
    // The page outlives its slot.
    assert_eq!(page.words()[0].load(Ordering::Relaxed), 5);
    assert_eq!((page.place(), Arc::strong_count(&backing)), ((SLOT, 0), 2));
    drop(page);
    assert_eq!(Arc::strong_count(&backing), 1);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(HERE), backing)).unwrap();
    assert!(guest.mmu.delete_slot(SLOT).unwrap().is_complete());
    assert_eq!(guest.mmu.pin_page(Gpa(HERE), false).unwrap_err(), PinError::NoMemory(Gpa(HERE)));
}

/// Memory that takes a while to give back, as large memory does.
#[derive(Debug)]
struct Slow(AllocatedMemory, Arc<AtomicBool>);

// SAFETY: as its first field.
unsafe impl Backing for Slow {
    fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        std::thread::sleep(std::time::Duration::from_micros(20));
        self.1.store(true, Ordering::Release);
    }
}

#[test]
fn a_complete_release_means_that_nobody_holds_the_memory() {
    let guest = guest(1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut n = 0u32;
            while !stop.load(Ordering::Relaxed) {
                let held = guest.mmu.memory();
                n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (0..n >> 24).for_each(|_| std::hint::spin_loop());
                drop(held);
            }
        });
        let mut early = 0;
        for _ in 0..5_000 {
            let gone = Arc::new(AtomicBool::new(false));
            let backing = Arc::new(Slow(AllocatedMemory::new(PAGE), Arc::clone(&gone)));
            guest.mmu.create_slot(SlotConfig::new(1, Gpa(HERE), backing)).unwrap();
            let release = guest.mmu.delete_slot(SLOT).unwrap();
            early += u32::from(release.is_complete() && !gone.load(Ordering::Acquire));
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(early, 0);
    });
}

#[test]
fn threads_that_would_wait_for_themselves_are_refused() {
    let guest = guest(1);
    let mmu = &guest.mmu;
    let config = SlotConfig::new(1, Gpa(HERE), memory(PAGE));
    let all = PageRange::Guest { base: Gpa(0), size: PAGE };
    let why = WouldDeadlock::Resolver;
    {
        let _resolver = mmu.resolver();
        let refused = SlotError::WouldDeadlock { id: SLOT, why };
        assert_eq!(mmu.create_slot(config.clone()), Err(refused.clone()));
        assert_eq!(mmu.delete_slot(SLOT), Err(refused.clone()));
        assert_eq!(mmu.move_slot(SLOT, Gpa(0)), Err(refused.clone()));
        assert_eq!(mmu.set_slot_flags(SLOT, SlotFlags::default()), Err(refused));
        assert_eq!(mmu.remove_alias(0), Err(AliasError::WouldDeadlock { number: 0, why }));
        assert_eq!(mmu.dirty_log(SlotId(0), &mut []).unwrap_err().to_string(), why.to_string());
        assert_eq!(mmu.reset_dirty_pages(&[]).unwrap_err().to_string(), why.to_string());
        assert_eq!(mmu.invalidate(all).unwrap_err(), RangeError::WouldDeadlock(why));
        assert_eq!(mmu.set_host_writable(all, true), Err(RangeError::WouldDeadlock(why)));
        assert_eq!(mmu.synchronize(), Err(why));
        // Another thread is none, nor is this one for another engine.
        std::thread::scope(|s| s.spawn(|| mmu.synchronize()).join()).unwrap().unwrap();
        Guest::new(4 * MIB, 2 * MIB, 64, false).mmu.synchronize().unwrap();
    }
    mmu.synchronize().unwrap();
    let invalidation = mmu.invalidate(all).unwrap();
    let refused = SlotError::WouldDeadlock { id: SLOT, why: WouldDeadlock::Invalidating };
    assert_eq!(mmu.create_slot(config.clone()), Err(refused));
    invalidation.end();
    mmu.create_slot(config).unwrap();
    let bad = PageRange::Host { base: Hva(u64::MAX - 0xfff), size: 2 * PAGE };
    let error = RangeError::BadRange { base: u64::MAX - 0xfff, size: 2 * PAGE };
    assert_eq!(mmu.invalidate(bad).unwrap_err(), error);
}

/// A reader that does not end its section: writers publish as many maps as may be left over, and then
/// wait for it.
#[test]
fn old_maps_are_bounded() {
    let guest = guest(1);
    let cpu = guest.vcpu();
    let ended = AtomicBool::new(false);
    let toggle = |round: u64| {
        let id = 10 + round as u32;
        let config = SlotConfig::new(id, Gpa(THERE + round * PAGE), memory(PAGE));
        guest.mmu.create_slot(config).unwrap();
    };
    std::thread::scope(|s| {
        let mut walker = cpu.vcpu().walker();
        walker.walk(Gva(0), mmu_core::paging::Access::read()).unwrap_err();
        let writer = s.spawn(|| {
            let mut before = 0;
            for round in 0..2 * MAX_OLD_MAPS {
                toggle(round);
                before += u64::from(!ended.load(Ordering::Acquire));
            }
            before
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!writer.is_finished());
        ended.store(true, Ordering::Release);
        drop(walker);
        let before = writer.join().unwrap();
        assert!(before <= MAX_OLD_MAPS + 1, "{before} maps while a reader stood still");
    });
    assert_eq!(guest.mmu.memory().slots().len() as u64, 1 + 2 * MAX_OLD_MAPS);
}

#[test]
fn a_guest_survives_memory_that_moves_under_its_tables() {
    let guest = guest(1);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(HERE), memory(PAGE))).unwrap();
    let gva = Gva(0x5_0000_0000);
    let at = guest.entry(guest.root, gva, 2);
    guest.write(at, HERE | RWU);
    guest.write(Gpa(HERE), 0x3000 | RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, gva.0, 9);
    guest.mmu.move_slot(SLOT, Gpa(THERE)).unwrap();
    guest.audit();
    let lost = cpu.session().load(gva, &mut [0], true);
    assert_eq!(reason(lost), Reason::TableOutside);
    guest.write(at, THERE | RWU);
    cpu.session().invlpg(gva);
    assert_eq!(load(&mut cpu, gva.0), 9);
    guest.audit();
}
