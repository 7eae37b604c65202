// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A walk that finds the accessed and dirty bits set stores nothing: its tables are mapped without
//! write permission here, so a store would end the process.
#![cfg(all(not(loom), feature = "vm-memory", unix))]

use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{Hint, MemoryMap, SlotConfig, VmMemoryRegion};
use mmu_core::paging::{Access, PagingMode, Path, Regs};
use std::io::Write;
use std::sync::Arc;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const PROT_READ: i32 = 1;
const MAP_SHARED: i32 = 1;

#[test]
fn nothing_is_stored() {
    let mut bytes = vec![0u8; 0x6000];
    let mut set = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    set(0x1000, 0x2027);
    set(0x2000, 0x3027);
    set(0x3000, 0x4027);
    for i in 0..512 {
        set(0x4000 + i * 8, 0x10_0067 + ((i as u64) << 12));
    }
    // For translate: nothing set, and entries that no access may use.
    set(0x1008, 0x2001);
    let path = std::env::temp_dir().join(format!("paging-stores-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let region =
        MmapRegion::build(Some(FileOffset::new(file, 0)), 0x6000, PROT_READ, MAP_SHARED).unwrap();
    let region = GuestRegionMmap::<()>::new(region, GuestAddress(0)).unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
    let backing = Arc::new(VmMemoryRegion::new(memory, GuestAddress(0)).unwrap());
    let map = MemoryMap::build([SlotConfig::new(0, Gpa(0), backing).log_dirty()]).unwrap();

    let mode = PagingMode::new(&Regs::long_mode(0x1000)).unwrap();
    let hint = Hint::default();
    let kinds = [Access::read(), Access::write().user(), Access::execute()];
    // More often than an epoch collects.
    for i in 0..1000u64 {
        let gva = Gva((i % 512) << 12);
        for access in kinds {
            let walk = mode.walk(&map, &hint, gva, access).unwrap();
            assert_eq!(walk.gpa, Gpa(0x10_0000 + gva.0));
            let mut path = Path::new();
            assert_eq!(mode.walk_path(&map, &hint, gva, access, &mut path), Ok(walk));
        }
        let other = Gva(1 << 39 | gva.0);
        assert!(mode.translate(&map, &hint, other, None).is_ok());
        assert!(mode.translate(&map, &hint, other, Some(Access::write().user())).is_err());
        assert!(mode.walk(&map, &hint, other, Access::write()).is_err());
    }
    let gvas: Vec<_> = (0..100).map(|i| Gva(i << 12)).collect();
    mode.walk_batch(&map, &hint, &gvas, Access::write(), |_, walk| assert!(walk.is_ok()));
}
