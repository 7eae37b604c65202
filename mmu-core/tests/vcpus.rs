// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vCPUs that are created and destroyed while others run, the guest is migrated, and its shadow is torn
//! down again and again.

mod common;

use common::{Guest, MIB, PAGE, RWU, Random, load, setting, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{DirtyRing, SlotId, runs};
use mmu_core::paging::Access;
use mmu_core::vcpu::{SoftExit, SoftVcpu, VcpuError};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;

const WRITE: Access = Access::write().user();
const SIZE: u64 = 4 * MIB;
/// Where everybody's pages are: eight for each thread.
const AT: u64 = 16 * MIB;

/// As many as there may be.
fn all(guest: &Guest) -> Vec<SoftVcpu> {
    let mut cpus = Vec::new();
    loop {
        match guest.mmu.create_soft_vcpu(guest.regs()) {
            Ok(cpu) => cpus.push(cpu),
            Err(VcpuError::TooFewFrames { vcpus }) => {
                assert_eq!(vcpus, cpus.len());
                return cpus;
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn the_quota_follows_the_number_of_vcpus() {
    let guest = Guest::new(SIZE, 2 * MIB, 256, false);
    for page in 0..8 {
        guest.map(Gva(AT + page * PAGE), Gpa(MIB + page * PAGE), RWU);
    }
    guest.mmu.set_nr_mmu_pages(64).unwrap();
    let quota = || guest.mmu.nr_mmu_pages().0;
    let mut cpus = all(&guest);
    let (most, largest) = (cpus.len(), quota());
    assert!(most > 2 && largest > 64, "{most} vCPUs, {largest} pages");
    // All of them find room for a root and a way down.
    for cpu in &mut cpus {
        store(cpu, AT, 7);
        assert_eq!(load(cpu, AT), 7);
    }
    let mut last = largest;
    while let Some(cpu) = cpus.pop() {
        drop(cpu);
        assert!(quota() <= last);
        last = quota();
    }
    assert_eq!(last, 64);
    assert_eq!(all(&guest).len(), most, "the places of those that are gone are free");
    guest.audit();
}

struct Copy(Vec<u64>);

impl Copy {
    /// Takes what was written since the last time.
    fn catch_up(&mut self, guest: &Guest) {
        let mut bitmap = [0; (SIZE / PAGE / 64) as usize];
        guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
        for page in runs(&bitmap).flatten() {
            self.page(guest, page);
        }
    }

    fn page(&mut self, guest: &Guest, page: u64) {
        let mut bytes = [0; PAGE as usize];
        assert_eq!(guest.mmu.memory().read(Gpa(page * PAGE), &mut bytes), bytes.len());
        let words = &mut self.0[(page * PAGE / 8) as usize..][..PAGE as usize / 8];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap());
        }
    }
}

/// What a vCPU does in its short life, in pages of its thread's own; or the error that ended it.
fn live(guest: &Guest, cpu: &mut SoftVcpu, first: Gva, random: &mut Random) {
    let ring = random.one_in(2).then(|| Arc::new(DirtyRing::new(64).unwrap()));
    cpu.vcpu_mut().set_dirty_ring(ring);
    for _ in 0..random.below(12) {
        let at = first.wrapping_add(random.below(8) * PAGE + 8 * random.below(512));
        let value = random.next();
        match random.below(6) {
            0 => cpu.vcpu().write(at, &value.to_le_bytes(), WRITE).unwrap(),
            1 => {
                let pinned = cpu.vcpu().pin(at, 8, WRITE).unwrap();
                pinned.write(0, &value.to_le_bytes()).unwrap();
            }
            2 => {
                let mut old = [0; 8];
                cpu.vcpu().read(at, &mut old, WRITE).unwrap();
                let fetch = Access::execute().user();
                let done = cpu.vcpu_mut().patch_code(at, &old, &value.to_le_bytes(), fetch);
                assert_eq!(done, Ok(true));
            }
            3 => {
                // Natively, behind a new translation of the page.
                let entry = guest.entry(guest.root, at, 1);
                let now = guest.read(entry);
                guest.write(entry, now & !0x60);
                cpu.session().invlpg(at);
                store(cpu, at.0, value);
            }
            _ => store(cpu, at.0, value),
        }
        assert_eq!(load(cpu, at.0), value);
    }
}

#[test]
fn vcpus_come_and_go_while_others_run() {
    let rounds = setting("VCPUS_ROUNDS", 150);
    // Few frames, so that recycling is part of it.
    let guest = Guest::new(SIZE, 2 * MIB, 96, true);
    const THREADS: u64 = 4;
    for page in 0..8 * THREADS {
        guest.map(Gva(AT + page * PAGE), Gpa(MIB + page * PAGE), RWU);
    }
    let quota = guest.mmu.nr_mmu_pages().0;
    let most = all(&guest).len();
    let mut copy = Copy(vec![0; (SIZE / 8) as usize]);
    (0..SIZE / PAGE).for_each(|page| copy.page(&guest, page));
    let (running, lives) = (AtomicU64::new(2), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    scope(|s| {
        for n in 0..THREADS {
            let (guest, running, lives, stop) = (&guest, &running, &lives, &stop);
            let first = Gva(AT + n * 8 * PAGE);
            let mut random = Random::new(n);
            s.spawn(move || {
                if n < 2 {
                    // One vCPU for all that time, which is asked to exit now and then.
                    let mut cpu = guest.vcpu();
                    while !stop.load(Ordering::Relaxed) {
                        cpu.handle().request_exit();
                        let exit = cpu.session().load(first, &mut [0], true);
                        assert_eq!(exit, Err(SoftExit::Requested));
                        live(guest, &mut cpu, first, &mut random);
                    }
                    return;
                }
                let mut kept = Vec::new();
                for _ in 0..rounds {
                    let mut cpu = match guest.mmu.create_soft_vcpu(guest.regs()) {
                        Ok(cpu) => cpu,
                        Err(VcpuError::TooFewFrames { .. }) => continue,
                        Err(other) => panic!("{other}"),
                    };
                    live(guest, &mut cpu, first, &mut random);
                    // Both outlive it for a while.
                    kept.push((cpu.vcpu().pin(first, 8, WRITE).unwrap(), cpu.vcpu().view(WRITE)));
                    drop(cpu);
                    lives.fetch_add(1, Ordering::Relaxed);
                    if kept.len() > 3 {
                        let (pinned, view) = kept.swap_remove(random.below(3) as usize);
                        pinned.write(0, &[n as u8]).unwrap();
                        view.write(first.wrapping_add(PAGE), &[n as u8]).unwrap();
                    }
                }
                running.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let mut random = Random::new(99);
        while running.load(Ordering::Relaxed) > 0 {
            copy.catch_up(&guest);
            if random.one_in(4) {
                guest.mmu.zap_all();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(lives.load(Ordering::Relaxed) > rounds);
    copy.catch_up(&guest);
    for page in 0..SIZE / PAGE {
        let before = copy.0[(page * PAGE / 8) as usize..][..512].to_vec();
        copy.page(&guest, page);
        let now = &copy.0[(page * PAGE / 8) as usize..][..512];
        assert_eq!(before, now, "page {page} was written after it was copied");
    }
    assert_eq!(guest.mmu.nr_mmu_pages().0, quota);
    assert_eq!(all(&guest).len(), most);
    guest.audit();
}
