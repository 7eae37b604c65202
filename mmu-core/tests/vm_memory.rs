// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a VMM on the `vm-memory` crate as the engine's.
#![cfg(feature = "vm-memory")]

mod common;

use common::{Guest, PAGE, RWU, load, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{
    AllocatedMemory, Backing, DirtyLog, RegionError, SlotConfig, SlotId, VmMemoryRegion, runs,
};
use mmu_core::paging::{Access, Regs, bits};
use mmu_core::vcpu::AccessError;
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, GuestMemoryMmap,
    Permissions,
};

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

/// Two guest-virtual pages that are no neighbours in memory, and what comes after them: a page that
/// is read-only, and one that is not there.
const HERE: u64 = 0x1_0000_0000;

fn guest() -> Guest {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, true);
    for (page, (gpa, flags)) in
        [(0x2_0000, RWU), (0x3_0000, RWU), (0x4_0000, bits::P | bits::US)].into_iter().enumerate()
    {
        guest.map(Gva(HERE + page as u64 * PAGE), Gpa(gpa), flags);
    }
    guest
}

fn at(offset: u64) -> GuestAddress {
    GuestAddress(HERE + offset)
}

/// The cause that an error of vm-memory carries.
fn cause(error: &GuestMemoryError) -> AccessError {
    let GuestMemoryError::IOError(error) = error else { panic!("{error}") };
    *error.get_ref().and_then(|cause| cause.downcast_ref()).expect("a cause")
}

#[test]
fn all_of_bytes_works_on_guest_virtual_addresses() {
    let guest = guest();
    let space = guest.mmu.view(&guest.regs(), Access::read().user()).unwrap();
    let memory = space.memory();
    let bytes: Vec<u8> = (0..200).collect();
    memory.write_slice(&bytes, at(PAGE - 100)).unwrap();
    let mut back = [0; 100];
    guest.mmu.memory().read(Gpa(0x3_0000), &mut back);
    assert_eq!(back[..], bytes[100..]);
    let mut back = vec![0; 200];
    memory.read_slice(&mut back, at(PAGE - 100)).unwrap();
    assert_eq!(back, bytes);
    memory.write_obj(0x0123_4567_89ab_cdefu64, at(PAGE - 3)).unwrap();
    assert_eq!(memory.read_obj::<u64>(at(PAGE - 3)).unwrap(), 0x0123_4567_89ab_cdef);
    memory.store(7u32, at(0x10), Ordering::Release).unwrap();
    assert_eq!(memory.load::<u32>(at(0x10), Ordering::Acquire).unwrap(), 7);
    // From a file and to one.
    assert_eq!(memory.read_volatile_from(at(PAGE - 4), &mut &b"12345678"[..], 8).unwrap(), 8);
    let mut sink = Vec::new();
    memory.write_all_volatile_to(at(PAGE - 4), &mut sink, 8).unwrap();
    assert_eq!(sink, b"12345678");
    assert_eq!(memory.write(&[], at(10 * PAGE)).unwrap(), 0);
    assert!(memory.physical_memory().is_none());
}

#[test]
fn an_access_is_made_up_to_the_page_that_refuses() {
    let guest = guest();
    let memory = guest.mmu.view(&guest.regs(), Access::read().user()).unwrap().memory();
    assert_eq!(memory.write(&[1; 0x3000], at(PAGE - 1)).unwrap(), 0x1001);
    let error = memory.write_slice(&[1; 0x3000], at(PAGE - 1)).unwrap_err();
    assert!(matches!(error, GuestMemoryError::PartialBuffer { completed: 0x1001, .. }), "{error}");
    let fault = |error| match cause(&error) {
        AccessError::Fault(fault) => (fault.gva.0 - HERE, fault.error_code),
        other => panic!("{other}"),
    };
    assert_eq!(fault(memory.write(&[1], at(2 * PAGE + 9)).unwrap_err()), (2 * PAGE + 9, 7));
    assert_eq!(fault(memory.read(&mut [1], at(3 * PAGE)).unwrap_err()), (3 * PAGE, 4));
    assert_eq!(memory.read(&mut [0; 0x3000], at(PAGE)).unwrap(), 0x2000);
    // Of slices, the error is the last.
    let slices = memory.get_slices(at(PAGE), 0x3000, Permissions::Read).unwrap();
    let lengths: Vec<_> = slices.map(|slice| slice.map(|slice| slice.len()).ok()).collect();
    assert_eq!(lengths, [Some(0x1000), Some(0x1000), None]);
    let slices = memory.get_slices(at(0), 0, Permissions::Write).unwrap();
    assert_eq!(slices.stop_on_error().unwrap().count(), 0);
    // A look that touches nothing.
    let entry = guest.entry(guest.root, Gva(HERE + PAGE), 1);
    guest.write(entry, 0x3_0000 | RWU);
    let range = |from: u64, len, permissions| memory.check_range(at(from), len, permissions);
    assert!(range(0, 0x2000, Permissions::ReadWrite) && range(0, 0x3000, Permissions::Read));
    assert!(!range(0, 0x2001, Permissions::Write) && !range(0, 0x3001, Permissions::Read));
    assert!(range(0, 0x3000, Permissions::No) && !range(0x3000, 1, Permissions::No));
    assert_eq!(guest.read(entry), 0x3_0000 | RWU);
    // The kernel may not read what is the user's, unless the registers say so.
    let smap = Regs { cr4: guest.regs().cr4 | bits::CR4_SMAP, ..guest.regs() };
    let kernel = |regs| guest.mmu.view(&regs, Access::read()).unwrap().memory();
    assert!(kernel(smap).read_obj::<u8>(at(0)).is_err());
    let ac = Regs { rflags: smap.rflags | bits::RFLAGS_AC, ..smap };
    assert!(kernel(ac).read_obj::<u8>(at(0)).is_ok());
    // A view of code.
    guest.map(Gva(HERE), Gpa(0x2_0000), RWU | bits::NX);
    let code = guest.mmu.view(&guest.regs(), Access::execute().user()).unwrap().memory();
    assert_eq!(fault(code.read_obj::<u8>(at(0)).unwrap_err()), (0, 0x15));
    assert!(code.read_obj::<u8>(at(PAGE)).is_ok() && code.write_obj(1u8, at(0)).is_ok());
}

#[test]
fn writes_reach_the_log_and_the_shadow() {
    let guest = guest();
    let window = Gva(0x40_0000);
    let entry = guest.entry(guest.root, window, 1);
    guest.map(Gva(HERE + 8 * PAGE), entry.page(), RWU);
    guest.write(entry, 0x1000 | RWU);
    guest.write(Gpa(0x1000), 0xa);
    guest.write(Gpa(0x2000), 0xb);
    let mut cpu = guest.vcpu();
    let memory = cpu.vcpu().view(Access::read().user()).memory();
    let edit = at(8 * PAGE + entry.page_offset());
    // The walk's own bits.
    memory.write_obj(0x1000 | RWU, edit).unwrap();
    memory.write_slice(&[0; 0x1001], at(0)).unwrap();
    for (round, frame) in [0x2000u64, 0x1000, 0x2000, 0x1000].into_iter().enumerate() {
        let expected = [0xa, 0xb][round % 2];
        assert_eq!(load(&mut cpu, window.0), expected);
        if round < 2 {
            memory.write_obj(frame | RWU, edit).unwrap();
        } else {
            memory.store(frame | RWU, edit, Ordering::Release).unwrap();
        }
        cpu.session().invlpg(window);
        assert_eq!(load(&mut cpu, window.0), 0x15 - expected);
        guest.audit();
    }
    let log = || {
        let mut bitmap = [0; 16];
        guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
        runs(&bitmap).flatten().collect::<Vec<_>>()
    };
    log();
    memory.write_slice(&[1; 2], at(PAGE - 1)).unwrap();
    memory.read_slice(&mut [1; 2], at(2 * PAGE)).unwrap();
    assert_eq!(log()[..2], [0x20, 0x30]);
    assert!(!log().contains(&0x40));
}

#[test]
fn writes_of_the_vmm_and_of_the_guest_are_in_one_log() {
    let ranges = [(GuestAddress(0), 4 << 20)];
    let memory = Arc::new(GuestMemoryMmap::<DirtyLog>::from_ranges(&ranges).unwrap());
    let guest = Guest::new(64 * MIB, 32 * MIB, 256, false);
    let region = VmMemoryRegion::with_dirty_log(Arc::clone(&memory), GuestAddress(0)).unwrap();
    let log = region.dirty_log().unwrap().clone();
    let config = SlotConfig::new(1, Gpa(128 * MIB), Arc::new(region)).log_dirty();
    guest.mmu.create_slot(config).unwrap();
    guest.map(Gva(0x1000), Gpa(128 * MIB + 2 * PAGE), RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, 0x1000, 7);
    memory.write_obj(8u64, GuestAddress(3 * PAGE)).unwrap();
    let seen: u64 = memory.read_obj(GuestAddress(2 * PAGE)).unwrap();
    let mut bitmap = [0; 16];
    assert_eq!(guest.mmu.dirty_log(SlotId(1), &mut bitmap), Ok(2));
    assert_eq!((seen, bitmap[0], log.is_enabled()), (7, 0b1100, true));
    memory.write_obj(9u64, GuestAddress(3 * PAGE)).unwrap();
    // A slot that is refused leaves the log of the one that has the memory alone.
    let other = VmMemoryRegion::with_dirty_log(Arc::clone(&memory), GuestAddress(0)).unwrap();
    guest.mmu.create_slot(SlotConfig::new(2, Gpa(256 * MIB), Arc::new(other))).unwrap_err();
    assert_eq!(guest.mmu.dirty_log(SlotId(1), &mut bitmap), Ok(1));
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    memory.write_obj(9u64, GuestAddress(0)).unwrap();
    assert!(!log.is_enabled());
}

#[test]
fn a_memory_object_keeps_the_slots_it_was_made_with() {
    let guest = guest();
    let slot = |backing| SlotConfig::new(1, Gpa(16 * MIB), backing);
    let backing = Arc::new(AllocatedMemory::new(PAGE));
    guest.mmu.create_slot(slot(backing.clone())).unwrap();
    guest.map(Gva(HERE), Gpa(16 * MIB), RWU);
    let space = guest.mmu.view(&guest.regs(), Access::read().user()).unwrap();
    let old = space.memory();
    old.write_obj(1u8, at(0)).unwrap();
    let slice = old.get_slices(at(0), 8, Permissions::Write).unwrap().next().unwrap().unwrap();
    let release = guest.mmu.delete_slot(SlotId(1)).unwrap();
    assert_eq!((release.is_complete(), release.snapshots), (false, 1));
    // The memory of a slice that is about stays, though it is the guest's no more.
    slice.write_obj(2u8, 0).unwrap();
    let gone = AccessError::Mmio { gpa: Gpa(16 * MIB), len: 1 };
    assert_eq!(cause(&old.read_obj::<u8>(at(0)).unwrap_err()), gone);
    // Another slot there, even at the same machine address, is not found before the next snapshot.
    guest.mmu.create_slot(slot(backing.clone())).unwrap();
    assert_eq!(cause(&old.read_obj::<u8>(at(0)).unwrap_err()), gone);
    assert_eq!(space.memory().read_obj::<u8>(at(0)).unwrap(), 2);
    drop(old);
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    assert_eq!(Arc::strong_count(&backing), 1);
}

/// Device code that knows nothing but vm-memory's traits, on several threads.
#[test]
fn device_code_is_generic() {
    fn fill<A: GuestAddressSpace>(space: &A, address: GuestAddress, byte: u8) {
        for _ in 0..200 {
            space.memory().write_slice(&[byte; 64], address).unwrap();
            let mut seen = [0; 64];
            space.memory().read_slice(&mut seen, address).unwrap();
            assert_eq!(seen, [byte; 64]);
        }
    }
    let guest = guest();
    let space = guest.mmu.view(&guest.regs(), Access::read().user()).unwrap();
    std::thread::scope(|s| {
        for n in 0..4 {
            let space = space.clone();
            s.spawn(move || fill(&space, at(PAGE - 96 + 64 * n), n as u8 + 1));
        }
    });
    guest.audit();
}
