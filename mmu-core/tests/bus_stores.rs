// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An access stores nothing but in its initiator's own line: the bus, its tables and what is registered
//! lie in memory without write permission here, so a store would end the process.
#![cfg(target_os = "linux")]

use mmu_core::mmio::{Answer, Bus, CoalescedRing, Device, Space, Trigger};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

const PROT_READ: c_int = 1;
const PROT_WRITE: c_int = 2;
const MAP_PRIVATE_ANONYMOUS: c_int = 0x22;

unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        at: i64,
    ) -> *mut c_void;
    fn mprotect(at: *mut c_void, len: usize, prot: c_int) -> c_int;
}

/// Bytes of the arena.
const SIZE: usize = 1 << 20;

/// Serves the threads that ask for it from a mapping of its own, which never gets anything back.
struct Arena {
    start: AtomicPtr<u8>,
    used: AtomicUsize,
}

thread_local! {
    static IN_ARENA: Cell<bool> = const { Cell::new(false) };
}

#[global_allocator]
static ARENA: Arena = Arena { start: AtomicPtr::new(null_mut()), used: AtomicUsize::new(0) };

impl Arena {
    fn contains(&self, pointer: *const u8) -> bool {
        let start = self.start.load(Ordering::Relaxed);
        !start.is_null() && (pointer as usize).wrapping_sub(start as usize) < SIZE
    }

    /// Runs `f`, whose allocations are in the arena.
    fn within<R>(&self, f: impl FnOnce() -> R) -> R {
        IN_ARENA.set(true);
        let result = f();
        IN_ARENA.set(false);
        result
    }

    fn map(&self) {
        // SAFETY: a new mapping, of memory that nobody has.
        let start =
            unsafe { mmap(null_mut(), SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0) };
        assert_ne!(start as isize, -1, "mmap");
        self.start.store(start.cast(), Ordering::Relaxed);
    }

    fn protect(&self, prot: c_int) {
        let start = self.start.load(Ordering::Relaxed);
        // SAFETY: the arena's own mapping. Whoever stores there meanwhile ends the process, which is
        // what the test is for.
        assert_eq!(unsafe { mprotect(start.cast(), SIZE, prot) }, 0, "mprotect");
    }
}

// SAFETY: memory of the arena is handed out once and never again; the rest is the system's.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !IN_ARENA.get() {
            // SAFETY: as the caller promises.
            return unsafe { System.alloc(layout) };
        }
        let size = layout.size() + layout.align();
        let at = self.used.fetch_add(size, Ordering::Relaxed);
        if at + size > SIZE {
            return null_mut();
        }
        let start = self.start.load(Ordering::Relaxed).wrapping_add(at);
        start.wrapping_add(start.align_offset(layout.align()))
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if !self.contains(pointer) {
            // SAFETY: as the caller promises; it came from the system.
            unsafe { System.dealloc(pointer, layout) }
        }
    }
}

/// A device that stores nothing either.
struct Constant;

impl Device for Constant {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {}
}

thread_local! {
    static RUNG: Cell<u32> = const { Cell::new(0) };
}

#[test]
fn nothing_shared_is_stored() {
    const DEVICES: u64 = 100;
    ARENA.map();
    let device: Arc<dyn Device> = ARENA.within(|| Arc::new(Constant));
    let bus = ARENA.within(|| Bus::new(Space::Mmio, Arc::new(CoalescedRing::default())));
    let mut cpus = [bus.initiator(), bus.initiator()];
    ARENA.within(|| {
        for n in 0..DEVICES {
            bus.register(n * 0x1000, 0x800, Arc::clone(&device)).unwrap();
            let bell = Arc::new(|| RUNG.set(RUNG.get() + 1));
            bus.register_doorbell(Trigger::valued(n * 0x1000 + 8, 2, n), bell).unwrap();
        }
        bus.register_coalesced(DEVICES * 0x1000, 0x1000).unwrap();
    });
    assert!(ARENA.contains(Arc::as_ptr(&device).cast()));
    assert!(ARENA.contains(Arc::as_ptr(bus.coalesced()).cast()));
    ARENA.protect(PROT_READ);
    for turn in 0..10_000u64 {
        let n = turn * 7 % DEVICES;
        let (cpu, at) = (&mut cpus[turn as usize % 2], n * 0x1000);
        let mut data = [0xff; 4];
        assert!(cpu.read(at + 0x7fc, &mut data) && data == [0xfc; 4]);
        assert_eq!(cpu.write(at, &data), Answer::Device);
        assert_eq!(cpu.write(at + 8, &(n as u16).to_le_bytes()), Answer::Doorbell);
        assert_eq!(cpu.write_now(at + 8, &[0xff; 2]), Answer::Device);
        assert_eq!(cpu.write(at + 0x7fd, &data), Answer::Unhandled);
        assert!(!cpu.read(at + 0x800, &mut data));
    }
    ARENA.protect(PROT_READ | PROT_WRITE);
    assert_eq!(RUNG.get(), 10_000);
}
