// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log as a bitmap of vm-memory.

use super::*;
use crate::memory::{Backing, RegionError, VmMemoryRegion};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_memory::{GuestRegionMmap, MmapRegion};

fn dirty(log: &DirtyLog) -> Vec<u64> {
    (0..log.pages()).filter(|page| log.dirty_at((page * PAGE_SIZE) as usize)).collect()
}

#[test]
fn byte_ranges_become_pages() {
    let log = DirtyLog::with_len(0x8001);
    assert_eq!(log.pages(), 9);
    log.set_enabled(true);
    log.mark_dirty(0x1000, 0);
    assert!(dirty(&log).is_empty());
    log.mark_dirty(0xfff, 2);
    log.mark_dirty(0x3000, 0x1000);
    log.mark_dirty(0x8000, usize::MAX);
    log.mark_dirty(usize::MAX, usize::MAX);
    assert_eq!(dirty(&log), [0, 1, 3, 8]);
    assert!(log.dirty_at(0x1fff) && !log.dirty_at(0x2000) && !log.dirty_at(usize::MAX));
}

#[test]
fn slices_count_from_their_start() {
    let log = DirtyLog::new(0x8000);
    log.set_enabled(true);
    let slice = log.slice_at(0x1800).slice_at(0x1000);
    assert_eq!((slice.offset(), slice.log().pages()), (0x2800, 8));
    slice.mark_dirty(0x7ff, 2);
    assert_eq!(dirty(&log), [2, 3]);
    assert!(slice.dirty_at(0) && slice.dirty_at(0x17ff) && !slice.dirty_at(0x1800));
    slice.mark_dirty(usize::MAX, 1);
    assert_eq!(dirty(&log), [2, 3]);
}

#[test]
fn the_vmms_writes_are_in_the_backings_log() {
    let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x100000), 0x5000)];
    let memory = Arc::new(GuestMemoryMmap::<DirtyLog>::from_ranges(&ranges).unwrap());
    let backing = |address| {
        VmMemoryRegion::with_dirty_log(Arc::clone(&memory), GuestAddress(address)).unwrap()
    };
    let (low, high) = (backing(0x3000), backing(0x104fff));
    let (low, high) = (low.dirty_log().unwrap(), high.dirty_log().unwrap());
    assert_eq!((low.pages(), high.pages()), (0x10, 5));
    memory.write_slice(b"ignored", GuestAddress(0x100000)).unwrap();
    high.set_enabled(true);
    memory.write_slice(b"ignored", GuestAddress(0x2000)).unwrap();
    memory.write_slice(b"two pages", GuestAddress(0x101ffe)).unwrap();
    memory.store(7u32, GuestAddress(0x104ffc), Ordering::Relaxed).unwrap();
    let slice = memory.get_slice(GuestAddress(0x103000), 0x1000).unwrap();
    assert_eq!(dirty(high), [1, 2, 4]);
    slice.copy_from(&[1u8]);
    assert_eq!(high.clear(0, u64::MAX), 0b11110);
    assert!(dirty(low).is_empty());
    let plain = VmMemoryRegion::new(memory, GuestAddress(0)).unwrap();
    assert!(plain.dirty_log().is_none());
}

#[test]
fn a_log_of_something_else_is_refused() {
    let mapping: MmapRegion<DirtyLog> =
        MmapRegionBuilder::new_with_bitmap(0x4000, DirtyLog::new(0x3000)).build().unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0x1000)).unwrap();
    assert_eq!(region.bitmap().log().pages(), 3);
    let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
    assert!(memory.find_region(GuestAddress(0x1000)).is_some());
    let error = VmMemoryRegion::with_dirty_log(memory, GuestAddress(0x1000)).unwrap_err();
    assert!(matches!(
        error,
        RegionError::WrongLog { base: 0x1000, offset: 0, needed: 4, given: 3 }
    ));
}
