// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a VMM on the `vm-memory` crate as the engine's.
#![cfg(feature = "vm-memory")]

use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, RegionError, SlotConfig, VmMemoryRegion};
use mmu_core::paging::Regs;
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;

#[test]
fn both_sides_see_one_memory() {
    let regions = [(GuestAddress(0), 2 << 20), (GuestAddress(8 * MIB), 1 << 20)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&regions).unwrap());
    let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(MIB)))).unwrap();
    for (id, (base, _)) in regions.iter().enumerate() {
        let region = VmMemoryRegion::new(Arc::clone(&memory), *base).unwrap();
        assert_eq!(region.base(), Gpa(base.0));
        mmu.create_slot(SlotConfig::new(id as u32, region.base(), Arc::new(region))).unwrap();
    }
    // Tables in the first region, the page in the second: gva 0 to gpa 8 MiB.
    for (entry, value) in [(0x1000, 0x2007u64), (0x2000, 0x3007), (0x3000, 0x4007)] {
        memory.write_obj(value, GuestAddress(entry)).unwrap();
    }
    memory.write_obj((8 * MIB) | 7, GuestAddress(0x4000)).unwrap();
    let mut cpu = mmu.create_soft_vcpu(Regs::long_mode(0x1000)).unwrap();
    cpu.session().store(Gva(0x10), &0xfeedu64.to_le_bytes(), true).unwrap();
    assert_eq!(memory.read_obj::<u64>(GuestAddress(8 * MIB + 0x10)).unwrap(), 0xfeed);
    memory.write_obj(0xbeefu64, GuestAddress(8 * MIB + 0x18)).unwrap();
    assert_eq!(cpu.session().load_u64(Gva(0x18), true).unwrap(), 0xbeef);
    mmu.audit().unwrap();
}

#[test]
fn a_region_that_is_not_there_is_named() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let error = VmMemoryRegion::new(Arc::new(memory), GuestAddress(4 * MIB)).unwrap_err();
    assert!(matches!(error, RegionError::NoRegion(0x40_0000)), "{error}");
}
