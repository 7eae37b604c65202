// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VM with three vCPUs, and what is done in it.

use crate::addr::{Gpa, Gva, Machine, PAGE_SIZE};
use crate::memory::{
    AllocatedMemory, DirtyMode, DirtyPage, DirtyRing, SlotConfig, SlotFlags, SlotId,
};
use crate::mmio::{Answer, Device, Initiator};
use crate::paging::{Access, Regs, bits};
use crate::shadow::PageRange;
use crate::vcpu::SoftVcpu;
use crate::{Config, MIN_TABLE_FRAMES, Mmu};
use std::sync::{Arc, Mutex, MutexGuard};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const RWU: u64 = bits::P | bits::RW | bits::US;

/// Guest-physical addresses: memory with the guest's tables, logged memory of all vCPUs, memory that
/// only the third uses, logged memory by dirty bits, a small slot, and memory for blocks.
const TABLES: u64 = PAGE_SIZE;
pub const DATA: u64 = 16 * MIB;
pub const FAR: u64 = 32 * MIB;
const BITS: u64 = 48 * MIB;
const SMALL: u64 = 64 * MIB;
pub const ELSEWHERE: u64 = 96 * MIB;
pub const BLOCKS: u64 = 512 * MIB;
const BLOCK: u64 = 2 * MIB;
const SIZE: u64 = 512 * KIB;
pub const PAGES: u64 = 32;

const MEMORY: SlotId = SlotId(0);
pub const LOGGED: SlotId = SlotId(1);
pub const FAR_SLOT: SlotId = SlotId(2);
const SMALL_SLOT: SlotId = SlotId(3);
pub const DIRTY_BITS: SlotId = SlotId(4);
pub const BLOCK_SLOT: SlotId = SlotId(5);

/// Devices, and a range of writes that wait in the ring.
pub const DEVICE: u64 = 0xd000_0000;
const PLUGGED: u64 = 0xd100_0000;
const COALESCED: u64 = 0xd200_0000;

/// Guest-virtual addresses: logged memory, its second half by another table, the small slot, the first
/// page table as data, memory logged by dirty bits,
pub const NEAR: u64 = 0;
pub const NEXT: u64 = GIB;
pub const IN_SMALL: u64 = 2 * GIB;
pub const TABLE: u64 = 3 * GIB;
pub const IN_BITS: u64 = 4 * GIB;
/// a large page, one page behind a page table in the same block, another large page,
pub const HUGE: u64 = 5 * GIB;
pub const IN_BLOCK: u64 = 6 * GIB;
pub const OTHER_HUGE: u64 = 7 * GIB;
/// more regions, whose tables need more frames than there are.
const MANY: u64 = 64 * GIB;
pub const REGIONS: u64 = 40;

/// Where the page table for [`IN_BLOCK`] is.
const TABLE_IN_BLOCK: u64 = BLOCKS + 16 * PAGE_SIZE;

struct Zeroes;

impl Device for Zeroes {
    fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {}
}

pub struct Scene {
    pub mmu: Mmu,
    cpus: [Mutex<SoftVcpu>; 3],
    initiators: [Mutex<Initiator>; 2],
    /// The second vCPU's.
    ring: Arc<DirtyRing>,
    /// Root tables of the first two vCPUs, and of the third.
    roots: [u64; 2],
    /// First page table of the first root.
    table: u64,
    next: Mutex<u64>,
}

impl Scene {
    pub fn new(frames: u64) -> Self {
        let mmu =
            Mmu::new(Config::new(Arc::new(AllocatedMemory::new(frames * PAGE_SIZE)))).unwrap();
        let slot = |id: SlotId, base, size| {
            SlotConfig::new(id.0, Gpa(base), Arc::new(AllocatedMemory::new(size)))
        };
        let blocks = Arc::new(AllocatedMemory::at(2 * BLOCK, Machine(1 << 50)));
        mmu.create_slot(slot(MEMORY, 0, SIZE)).unwrap();
        mmu.create_slot(slot(LOGGED, DATA, SIZE).log_dirty()).unwrap();
        mmu.create_slot(slot(FAR_SLOT, FAR, SIZE)).unwrap();
        mmu.create_slot(slot(SMALL_SLOT, SMALL, PAGES * PAGE_SIZE)).unwrap();
        mmu.create_slot(slot(DIRTY_BITS, BITS, SIZE)).unwrap();
        mmu.create_slot(SlotConfig::new(BLOCK_SLOT.0, Gpa(BLOCKS), blocks)).unwrap();
        mmu.bus().register(DEVICE, PAGE_SIZE, Arc::new(Zeroes)).unwrap();
        mmu.bus().register_coalesced(COALESCED, PAGE_SIZE).unwrap();
        let roots = [TABLES, TABLES + PAGE_SIZE];
        let cpu = |root: u64| Mutex::new(mmu.create_soft_vcpu(Regs::long_mode(root)).unwrap());
        let cpus = [cpu(roots[0]), cpu(roots[0]), cpu(roots[1])];
        let initiators = [(); 2].map(|()| Mutex::new(mmu.bus().initiator()));
        let ring = Arc::new(DirtyRing::new(1024).unwrap());
        cpus[1].lock().unwrap().vcpu_mut().set_dirty_ring(Some(Arc::clone(&ring)));
        let next = Mutex::new(TABLES + 2 * PAGE_SIZE);
        let mut scene = Self { mmu, cpus, initiators, ring, roots, table: 0, next };
        scene.log_by(DIRTY_BITS, DirtyMode::DirtyBits);
        for page in 0..16 {
            scene.map(0, NEAR + page * PAGE_SIZE, DATA + page * PAGE_SIZE);
            scene.map(0, NEXT + page * PAGE_SIZE, DATA + (16 + page) * PAGE_SIZE);
            scene.map(0, IN_SMALL + page * PAGE_SIZE, SMALL + page * PAGE_SIZE);
            scene.map(0, IN_BITS + page * PAGE_SIZE, BITS + page * PAGE_SIZE);
            scene.map(1, NEAR + page * PAGE_SIZE, FAR + page * PAGE_SIZE);
            scene.map(1, NEXT + page * PAGE_SIZE, FAR + (16 + page) * PAGE_SIZE);
        }
        for (root, gva, gpa) in [(0, HUGE, BLOCKS), (1, OTHER_HUGE, BLOCKS + BLOCK)] {
            scene.write(scene.entry(root, gva, 2), gpa | RWU | bits::PS);
        }
        scene.write(scene.entry(0, IN_BLOCK, 2), TABLE_IN_BLOCK | RWU);
        scene.write(TABLE_IN_BLOCK, FAR | RWU);
        if frames == MIN_TABLE_FRAMES || frames == FEW {
            for region in 0..REGIONS {
                scene.map(0, Self::many(region), DATA + region * PAGE_SIZE);
            }
        }
        scene.table = scene.entry(0, NEAR, 1) & !(PAGE_SIZE - 1);
        scene.map(0, TABLE, scene.table);
        scene
    }

    pub fn read(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(self.mmu.memory().read(Gpa(gpa), &mut bytes), 8);
        u64::from_le_bytes(bytes)
    }

    pub fn write(&self, gpa: u64, value: u64) {
        assert_eq!(self.mmu.write_phys(Gpa(gpa), &value.to_le_bytes()), 8);
    }

    /// Guest-physical address of the guest's entry for the address at a level; makes the tables above.
    pub fn entry(&self, root: usize, gva: u64, level: u64) -> u64 {
        let mut table = self.roots[root];
        for above in (level..=4).rev() {
            let at = table + (gva >> (12 + 9 * (above - 1)) & 511) * 8;
            if above == level {
                return at;
            }
            if self.read(at) == 0 {
                let mut next = self.next.lock().unwrap();
                self.write(at, *next | RWU);
                *next += PAGE_SIZE;
            }
            table = self.read(at) & bits::ADDR;
        }
        table
    }

    fn map(&self, root: usize, gva: u64, gpa: u64) {
        self.write(self.entry(root, gva, 1), gpa | RWU);
    }

    /// A vCPU: 0 is the stopped thread's own, 1 has the same root, 2 another.
    pub fn cpu(&self, n: usize) -> MutexGuard<'_, SoftVcpu> {
        self.cpus[n].lock().unwrap()
    }

    /// Reads or writes as a guest does, whatever comes of it.
    pub fn access(&self, n: usize, gva: u64, write: bool) {
        let mut cpu = self.cpu(n);
        let mut session = cpu.session();
        let _ = match write {
            true => session.store(Gva(gva), &[1], true),
            false => session.load_u64(Gva(gva), true).map(drop),
        };
    }

    /// A fault alone, until it does not stall.
    pub fn fault(&self, n: usize, gva: u64, access: Access) {
        let mut cpu = self.cpu(n);
        let vcpu = cpu.vcpu_mut();
        while let Err(stall) = vcpu.fault(Gva(gva), access.user()) {
            let mut backoff = crate::sync::Backoff::default();
            while vcpu.must_wait(stall) {
                backoff.wait();
            }
        }
    }

    /// The first vCPU has used everything near, the third everything of its own.
    pub fn warm(&self) {
        for page in 0..6 {
            self.access(0, NEAR + page * PAGE_SIZE, page % 2 == 0);
            self.access(0, NEXT + page * PAGE_SIZE, page % 2 == 0);
            self.access(0, IN_SMALL + page * PAGE_SIZE, page % 2 == 0);
            self.access(0, IN_BITS + page * PAGE_SIZE, page % 2 == 0);
            self.access(2, NEAR + page * PAGE_SIZE, page % 2 == 0);
        }
        self.access(1, NEAR, true);
    }

    /// Every table frame is in use.
    pub fn crowd(&self) {
        self.warm();
        for region in 0..REGIONS - 2 {
            self.access(0, Self::many(region), false);
        }
    }

    /// The guest's entry for a page of the first table.
    pub fn near_entry(&self, page: u64) -> Gpa {
        Gpa(self.table + page * 8)
    }

    pub fn near_value(page: u64) -> u64 {
        (DATA + page * PAGE_SIZE) | RWU
    }

    /// A page that needs tables of its own.
    pub fn many(region: u64) -> u64 {
        MANY + region * GIB
    }

    pub fn slot(id: u32, base: u64) -> SlotConfig {
        SlotConfig::new(id, Gpa(base), Arc::new(AllocatedMemory::new(PAGES * PAGE_SIZE)))
    }

    /// The pages that the first vCPU uses.
    pub fn near_pages() -> PageRange {
        PageRange::Guest { base: Gpa(DATA), size: 8 * PAGE_SIZE }
    }

    pub fn log_by(&self, slot: SlotId, dirty: DirtyMode) {
        self.mmu.set_slot_flags(slot, SlotFlags { read_only: false, dirty }).unwrap();
    }

    /// Reads a register, if the device is still there.
    pub fn use_device(&self, initiator: usize) {
        let _ = self.initiators[initiator].lock().unwrap().read(DEVICE, &mut [0; 4]);
    }

    pub fn coalesce(&self, initiator: usize) {
        let answer = self.initiators[initiator].lock().unwrap().write(COALESCED, &[1]);
        assert_eq!(answer, Answer::Coalesced);
    }
}

/// Frames that are enough until the quota falls.
pub const FEW: u64 = 192;

/// The guest changes an entry of its first page table by itself, and invalidates the address.
pub fn edit_natively(scene: &Scene, cpu: usize, page: u64) {
    let mut cpu = scene.cpu(cpu);
    let mut session = cpu.session();
    let _ = session.store(Gva(TABLE + page * 8), &Scene::near_value(page).to_le_bytes(), true);
    session.invlpg(Gva(NEAR + page * PAGE_SIZE));
    let _ = session.load_u64(Gva(NEAR + page * PAGE_SIZE), true);
}

/// Another root, an entry of it, and back.
pub fn load_root(scene: &Scene, cpu: usize, other: usize) {
    for root in [other, 1 - other] {
        scene.cpu(cpu).vcpu_mut().set_cr3(scene.roots[root]).unwrap();
        scene.access(cpu, NEAR, false);
    }
}

pub fn harvest(scene: &Scene, slot: SlotId) {
    let mut bitmap = vec![0; (SIZE / PAGE_SIZE / 64) as usize];
    // Another thread may have switched the log off.
    let _ = scene.mmu.dirty_log(slot, &mut bitmap);
}

pub fn collect(scene: &Scene) {
    scene.ring.collect(&mut [DirtyPage { slot: LOGGED, page: 0 }; 8]);
}

/// Unless another thread has already.
pub fn end_slot(scene: &Scene) {
    let _ = scene.mmu.delete_slot(SMALL_SLOT);
}

/// If it is still there.
pub fn move_slot(scene: &Scene, base: u64) {
    let _ = scene.mmu.move_slot(SMALL_SLOT, Gpa(base));
}

pub fn come_and_go(scene: &Scene) {
    let mut cpu = scene.mmu.create_soft_vcpu(Regs::long_mode(scene.roots[0])).unwrap();
    let _ = cpu.session().load_u64(Gva(NEAR), true);
}

/// A device of its own comes and goes, unless another thread's is in its place.
pub fn plug_and_unplug(scene: &Scene) {
    if scene.mmu.bus().register(PLUGGED, PAGE_SIZE, Arc::new(Zeroes)).is_ok() {
        drop(scene.mmu.bus().remove(PLUGGED));
    }
}
