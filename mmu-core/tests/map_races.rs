// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of the memory map's writers that were lost once: each is led into the order in which it broke.

mod common;
use common::{Guest, MIB, PAGE, RWU, load, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{
    AllocatedMemory, Backing, DirtyLog, DirtyMode, MemoryMap, SlotConfig, SlotError, SlotFlags,
    SlotId,
};
use mmu_core::paging::bits;
use mmu_core::vcpu::SoftExit;
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Runs `body` on a thread; false if it takes longer than the time.
fn ends(limit: Duration, body: impl FnOnce() + Send + 'static) -> bool {
    let done = Arc::new(AtomicBool::new(false));
    let flag = done.clone();
    std::thread::spawn(move || {
        body();
        flag.store(true, Ordering::Release)
    });
    let end = Instant::now() + limit;
    while !done.load(Ordering::Acquire) {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}
fn far(page: u64) -> u64 {
    page << 39 >> 2 & 0x7fff_ffff_f000
}

/// Frames that a vCPU has torn down before it became idle.
#[test]
fn retired_frames_of_an_idle_vcpu_come_back() {
    let guest = Guest::new(64 * MIB, 32 * MIB, 64, false);
    for page in 0..200u64 {
        guest.map(Gva(far(page)), Gpa(page * PAGE), RWU);
    }
    let mut idle = guest.vcpu();
    let mut cpu = guest.vcpu();
    for page in 0..16 {
        store(&mut cpu, far(page), page);
    }
    guest.mmu.zap_all();
    for page in 0..6 {
        load(&mut idle, far(page));
    }
    // `idle` stays alive, outside, and does nothing.
    let ok = ends(Duration::from_secs(5), move || {
        for page in 0..200u64 {
            store(&mut cpu, far(page), page);
        }
    });
    assert!(ok, "the fault of a vCPU waits for ever for frames in an idle vCPU's bag");
    drop(idle);
}

/// The same for tables that it has written as data and that were torn down for that.
#[test]
fn flooded_tables_of_an_idle_vcpu_come_back() {
    const WORDS: u64 = 8;
    let guest = Guest::new(64 * MIB, 32 * MIB, 64, false);
    for page in 0..200u64 {
        guest.map(Gva(far(page)), Gpa(page * PAGE), RWU);
    }
    let mut idle = guest.vcpu();
    let mut cpu = guest.vcpu();
    let window = |page: u64| 0x7f00_0000_0000 + page * PAGE;
    let tables: Vec<_> = (0..6).map(|page| guest.entry(guest.root, Gva(far(page)), 2)).collect();
    for (page, entry) in tables.iter().enumerate() {
        guest.map(Gva(window(page as u64)), entry.page(), RWU);
        load(&mut idle, far(page as u64));
    }
    for page in 0..tables.len() as u64 {
        (256..256 + WORDS).for_each(|word| store(&mut idle, window(page) + word * 8, 0));
    }
    assert_eq!(guest.mmu.stats().mmu_flooded, tables.len() as u64);
    let ok = ends(Duration::from_secs(5), move || {
        for page in 0..200u64 {
            store(&mut cpu, far(page), page);
        }
    });
    assert!(ok, "the fault of a vCPU waits for ever for frames in an idle vCPU's bag");
    drop(idle);
}

/// From dirty bits to write-protection: an entry goes between the publication and the protection.
#[test]
fn a_dirty_bit_that_goes_during_a_change_of_mode_is_logged() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let dirty = |dirty| SlotFlags { read_only: false, dirty };
    guest.mmu.set_slot_flags(SlotId(0), dirty(DirtyMode::DirtyBits)).unwrap();
    for page in 0..8 {
        guest.map(
            Gva(0x7000_0000 + page * PAGE),
            Gpa(0x10_0000 + page * PAGE),
            RWU | bits::D | bits::A,
        );
    }
    let mut bitmap = vec![0u64; 16];
    let mut cpu = guest.vcpu();
    load(&mut cpu, 0x7000_0000);
    guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    store(&mut cpu, 0x7000_0000, 1);
    let reader = guest.vcpu();
    let walker = reader.vcpu().walker();
    std::thread::scope(|s| {
        let mmu = guest.mmu.clone();
        let change =
            s.spawn(move || mmu.set_slot_flags(SlotId(0), dirty(DirtyMode::WriteProtect)).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!change.is_finished());
        // Any zap: the guest's own table write.
        let at = guest.entry(guest.root, Gva(0x7000_0000), 1);
        guest.write(at, 0);
        drop(walker);
    });
    guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    assert!(bitmap[0x100 / 64] & 1 != 0, "the write is in no log");
}

/// An entry whose generation comes round again while a reader holds the change up.
#[test]
fn mmio_entries_go_before_their_generation_returns() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let mmu = &guest.mmu;
    let mem = Arc::new(AllocatedMemory::new(PAGE));
    let flip = |n: u32| {
        let on = SlotFlags { read_only: n % 2 == 1, dirty: DirtyMode::Off };
        mmu.set_slot_flags(SlotId(7), on).unwrap();
    };
    mmu.create_slot(SlotConfig::new(7, Gpa(1 << 32), mem)).unwrap();
    let until = |generation: u64| {
        let mut n = mmu.memory().slots().find(|s| s.id().0 == 7).unwrap().is_read_only() as u32;
        while mmu.memory().generation() < generation {
            n += 1;
            flip(n);
        }
        assert_eq!(mmu.memory().generation(), generation);
    };
    guest.map(Gva(0x1000), Gpa(1 << 30), RWU);
    until(1 << 15);
    let mut cpu = guest.vcpu();
    assert_eq!(cpu.session().load_u64(Gva(0x1000), true), Err(SoftExit::Mmio(Gpa(1 << 30))));
    until((2 << 15) - 1);
    let other = guest.vcpu();
    let walker = other.vcpu().walker();
    std::thread::scope(|s| {
        let mmu = guest.mmu.clone();
        s.spawn(move || {
            mmu.create_slot(SlotConfig::new(1, Gpa(1 << 30), Arc::new(AllocatedMemory::new(PAGE))))
                .unwrap();
        });
        while guest.mmu.memory().generation() < 2 << 15 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        let got = cpu.session().load_u64(Gva(0x1000), true);
        drop(walker);
        assert_eq!(got, Ok(0), "R09: RAM treated as a device");
    });
}

#[test]
fn note_write_of_everything_ends() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let mmu = guest.mmu.clone();
    assert!(
        ends(Duration::from_secs(5), move || mmu.note_write(Gpa(0), u64::MAX)),
        "hours in one read section"
    );
}

/// The excess goes with the memory, not with the next fault.
#[test]
fn a_quota_that_shrinks_with_the_memory_costs_no_fault() {
    let guest = Guest::new(1024 * MIB, 512 * MIB, 60_000, false);
    guest
        .mmu
        .create_slot(SlotConfig::new(1, Gpa(1 << 40), Arc::new(AllocatedMemory::new(16 << 30))))
        .unwrap();
    let mut cpu = guest.vcpu();
    for page in 0..30_000u64 {
        guest.map(Gva(page << 21), Gpa(0x1000), RWU);
    }
    for page in 0..30_000u64 {
        load(&mut cpu, page << 21);
    }
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    guest.map(Gva(0x7fff_0000_0000), Gpa(0x1000), RWU);
    let before = guest.mmu.stats().pf_retry;
    load(&mut cpu, 0x7fff_0000_0000);
    let retries = guest.mmu.stats().pf_retry - before;
    guest.audit();
    assert!(retries < 20, "{retries}");
}

#[derive(Debug)]
struct Logged(AllocatedMemory, DirtyLog);
// SAFETY: as AllocatedMemory.
unsafe impl Backing for Logged {
    fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }
    fn dirty_log(&self) -> Option<&DirtyLog> {
        Some(&self.1)
    }
}

/// A map for a debugger, or a second VM, over memory whose log is in use.
#[test]
fn a_second_user_of_a_backing_leaves_its_log_alone() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let memory = Arc::new(Logged(AllocatedMemory::new(MIB), DirtyLog::new(MIB)));
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(1 << 30), memory.clone()).log_dirty()).unwrap();
    guest.mmu.write_phys(Gpa(1 << 30), &[1]);
    let config = SlotConfig::new(0, Gpa(0), memory.clone());
    MemoryMap::build([config.clone()]).unwrap();
    let refused = MemoryMap::build([config.clone().log_dirty()]).unwrap_err();
    assert_eq!(refused, SlotError::LogInUse(SlotId(0)));
    let mut bitmap = [0; 4];
    assert_eq!(guest.mmu.dirty_log(SlotId(1), &mut bitmap), Ok(1), "erased");
    guest.mmu.write_phys(Gpa(1 << 30), &[1]);
    assert_eq!(guest.mmu.dirty_log(SlotId(1), &mut bitmap), Ok(1), "disabled");
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    drop(MemoryMap::build([config.clone().log_dirty()]).unwrap());
    MemoryMap::build([config.log_dirty()]).unwrap();
}

/// A harvest by dirty bits straddles the change to write-protection.
#[test]
fn a_harvest_straddles_a_change_of_mode() {
    let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(256 * PAGE)))).unwrap();
    let size = 4u64 << 30;
    mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(size)))).unwrap();
    let dirty = |dirty| SlotFlags { read_only: false, dirty };
    let last = size - PAGE;
    // One page mapped: the slot's last.
    for (at, v) in
        [(0x1000u64, 0x2067u64), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, last | 0x67)]
    {
        mmu.write_phys(Gpa(at), &v.to_le_bytes());
    }
    let mut cpu = mmu.create_soft_vcpu(mmu_core::paging::Regs::long_mode(0x1000)).unwrap();
    let words = (size / PAGE / 64) as usize;
    let mut bitmap = vec![0u64; words];
    let mut lost = 0;
    for round in 0..200u64 {
        mmu.set_slot_flags(SlotId(0), dirty(DirtyMode::DirtyBits)).unwrap();
        store(&mut cpu, 0x1000, round);
        let mut other = vec![0u64; words];
        std::thread::scope(|s| {
            let m = mmu.clone();
            let o = &mut other;
            let h = s.spawn(move || m.dirty_log(SlotId(0), o));
            std::thread::sleep(Duration::from_micros(10 + round % 100 * 3));
            mmu.set_slot_flags(SlotId(0), dirty(DirtyMode::WriteProtect)).unwrap();
            store(&mut cpu, 0x1000, round + 1);
            let _ = h.join().unwrap();
        });
        // The harvest has returned: any further write is in a later one.
        store(&mut cpu, 0x1000, round + 2);
        mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
        lost += u64::from(bitmap[words - 1] >> 63 == 0);
        mmu.set_slot_flags(SlotId(0), dirty(DirtyMode::Off)).unwrap();
    }
    assert_eq!(lost, 0, "writes in no log");
}
#[test]
fn a_release_counts_slots_that_are_held() {
    let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20)))).unwrap();
    let backing = Arc::new(AllocatedMemory::new(4096));
    mmu.create_slot(SlotConfig::new(0, Gpa(0), backing.clone())).unwrap();
    let held = mmu.memory().by_id(SlotId(0)).unwrap().clone();
    let release = mmu.delete_slot(SlotId(0)).unwrap();
    assert_eq!(release.is_complete(), Arc::strong_count(&backing) == 1, "{release:?}");
    drop(held);
}
