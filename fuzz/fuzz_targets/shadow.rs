// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest, and the VMM around it, can do to the shadow.
//!
//! The bytes are a sequence of operations: stores, loads, fetches and compare-and-swaps of two software
//! vCPUs at either privilege, edits of tables that may refer to anything, register writes, and the
//! memory map's writers. Before each access its translation is invalidated; then the access must do what
//! the walker alone says, which the shadow has no part in:
//!
//! * it faults if the walk does, with the same fault;
//! * it reads what is at the guest-physical address, or leaves there what it wrote;
//! * at the end, and whenever a sequence asks for it, the audit is clean.
#![no_main]

mod input;

use input::Bytes;
use libfuzzer_sys::fuzz_target;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{Alias, AllocatedMemory, Backing, DirtyMode, SlotConfig, SlotFlags, SlotId};
use mmu_core::paging::{Access, Kind, Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::{SoftExit, SoftVcpu};
use mmu_core::{Config, Mmu};
use std::sync::Arc;

const PAGE: u64 = 4096;
/// Frames of the first slot, which always is there; tables are written to the first ones.
const FRAMES: u64 = 24;
/// Where the second slot may be, and the alias.
const ELSEWHERE: [u64; 3] = [64, 66, 1 << 20];

impl Bytes<'_> {
    fn byte(&mut self) -> u64 {
        self.u8().into()
    }

    /// An entry: any frame, few ways to be wrong.
    fn guest_entry(&mut self) -> u64 {
        let (frame, flags) = (self.byte(), self.byte());
        let wrong = [0, 0, 0, 0, 0, 1 << 51, bits::G, bits::P];
        let set = |bit: u64, flag| if flags >> bit & 1 != 0 { flag } else { 0 };
        let rights = set(0, bits::US) | set(1, bits::RW) | set(2, bits::NX) | set(3, bits::PS);
        let used = set(4, bits::A | bits::D);
        ((self.frame(frame) * PAGE) | bits::P | rights | used) ^ wrong[(flags >> 5) as usize]
    }

    fn frame(&self, n: u64) -> u64 {
        match n as usize % 28 {
            n @ 0..24 => n as u64,
            n => *ELSEWHERE.get(n - 24).unwrap_or(&0x40_0000),
        }
    }

    /// An address: each index is one of two, so that paths cross.
    fn gva(&mut self) -> Gva {
        let byte = self.byte();
        let index = |bit: u64| if byte >> bit & 1 != 0 { 1 } else { 0 };
        let page = index(0) | index(1) << 9 | index(2) << 18 | index(3) << 27;
        Gva(page << 12 | [0, 8, 0xff8, 0xffc][(byte >> 4) as usize % 4])
    }
}

struct World {
    mmu: Mmu,
    cpus: Vec<SoftVcpu>,
}

impl World {
    fn new() -> Self {
        let memory = |frames| Arc::new(AllocatedMemory::new(frames * PAGE));
        let mmu = Mmu::new(Config::new(memory(64))).expect("64 frames are enough");
        mmu.create_slot(SlotConfig::new(0, Gpa(0), memory(FRAMES))).expect("the first slot");
        let cpu = || mmu.create_soft_vcpu(Regs::long_mode(0)).expect("its root is in a slot");
        Self { cpus: vec![cpu(), cpu()], mmu }
    }

    /// One access through the shadow, beside what the walker says of it.
    fn access(&mut self, bytes: &mut Bytes<'_>) {
        let how = bytes.byte();
        let (gva, value) = (bytes.gva(), bytes.byte() * 0x0101_0101_0101_0101);
        let user = how & 1 != 0;
        let kind = [Kind::Read, Kind::Write, Kind::Execute, Kind::Write][(how >> 1) as usize % 4];
        let access = Access { kind, user, implicit: false };
        let cpu = &mut self.cpus[(how >> 3) as usize % 2];
        let crosses = gva.page_offset() > PAGE - 8;
        let expected = cpu.vcpu().translate(gva, Some(access));
        let mut session = cpu.session();
        session.invlpg(gva);
        session.invlpg(gva.wrapping_add(7));
        let mut seen = [0; 8];
        let result = match kind {
            Kind::Read => session.load(gva, &mut seen, user),
            Kind::Execute => session.fetch(gva, &mut seen, user),
            Kind::Write if how & 16 != 0 && !crosses => {
                let new = value;
                session.cmpxchg(gva, 8, 0, new.into(), user).map(|_| ())
            }
            Kind::Write => session.store(gva, &value.to_le_bytes(), user),
        };
        drop(session);
        match (expected, result) {
            (Err(fault), Err(SoftExit::Fault(met))) => assert_eq!(met, fault),
            (Err(fault), other) => panic!("{fault:?} expected, {other:?}"),
            (Ok(walk), Ok(())) if !crosses => {
                let mut there = [0; 8];
                let read = self.mmu.memory().read(walk.gpa, &mut there);
                assert_eq!(read, 8, "an access where there is no memory");
                if kind == Kind::Write {
                    if how & 16 == 0 {
                        assert_eq!(u64::from_le_bytes(there), value);
                    }
                } else if !self.is_table(walk.gpa) {
                    // An access to a table sets bits in it as it goes.
                    assert_eq!(seen, there);
                }
            }
            (Ok(walk), Err(SoftExit::Mmio(gpa))) if !crosses => {
                assert_eq!(gpa, walk.gpa);
                let map = self.mmu.memory();
                let slot = map.slot(gpa.gfn());
                let refused = |slot: &_| kind == Kind::Write && is_read_only(slot);
                assert!(slot.is_none_or(refused), "memory taken for a device");
            }
            (Ok(_), Err(SoftExit::HostReadOnly(_))) => {}
            (Ok(_), Ok(()) | Err(SoftExit::Fault(_) | SoftExit::Mmio(_))) if crosses => {}
            (Ok(walk), other) => panic!("{walk:?} expected, {other:?}"),
        }
    }

    /// Whether the word may be a page-table entry of some walk.
    fn is_table(&self, gpa: Gpa) -> bool {
        let index = gpa.page_offset() / 8;
        index < 2
    }

    /// Whether there was another operation.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let Some(operation) = bytes.next() else { return false };
        let mmu = self.mmu.clone();
        match operation % 24 {
            0..8 => self.access(bytes),
            8..14 => {
                let at = Gpa(bytes.byte() % 12 * PAGE + bytes.byte() % 2 * 8);
                let entry = bytes.guest_entry();
                mmu.write_phys(at, &entry.to_le_bytes());
            }
            14 => {
                let how = bytes.byte();
                let cpu = self.cpus[(how & 1) as usize].vcpu_mut();
                let regs = cpu.regs();
                let toggled = regs.cr0 ^ if how & 2 != 0 { bits::CR0_WP } else { 0 };
                let _ = match how >> 2 & 3 {
                    0 => cpu.set_cr0(toggled),
                    1 => cpu.set_cr3((how >> 4) * PAGE),
                    2 => cpu.set_cr4(regs.cr4 ^ bits::CR4_SMEP),
                    _ => cpu.set_cr4(regs.cr4 ^ bits::CR4_SMAP),
                };
            }
            15 => mmu.zap_all(),
            16 => mmu.maintain(),
            17 => {
                let memory = Arc::new(AllocatedMemory::new(2 * PAGE));
                let at = ELSEWHERE[bytes.byte() as usize % 3] * PAGE;
                let config = SlotConfig::new(1, Gpa(at), memory as Arc<dyn Backing>);
                let _ = mmu.create_slot(config);
            }
            18 => {
                let _ = mmu.delete_slot(SlotId(1));
            }
            19 => {
                let _ = mmu.move_slot(SlotId(1), Gpa(ELSEWHERE[bytes.byte() as usize % 3] * PAGE));
            }
            20 => {
                let how = bytes.byte();
                let dirty = [DirtyMode::Off, DirtyMode::WriteProtect, DirtyMode::DirtyBits];
                let flags =
                    SlotFlags { read_only: how & 8 != 0, dirty: dirty[(how >> 1) as usize % 3] };
                let _ = mmu.set_slot_flags(SlotId((how & 1) as u32), flags);
            }
            21 => {
                let (number, place) = ((bytes.byte() % 2) as u32, bytes.byte());
                let base = Gpa(bytes.frame(place) * PAGE);
                let target = Gpa(bytes.byte() % FRAMES * PAGE);
                if place & 0x80 != 0 {
                    let _ = mmu.remove_alias(number);
                } else {
                    let _ = mmu.set_alias(Alias { number, base, size: PAGE, target });
                }
            }
            22 => {
                let how = bytes.byte();
                let base = Gpa(how % 16 * PAGE);
                let _ = mmu.set_host_writable(PageRange::Guest { base, size: PAGE }, how & 16 != 0);
            }
            _ => {
                let range = PageRange::Guest { base: Gpa(0), size: FRAMES * PAGE };
                let _ = mmu.clear_young(range, |_, _, _| ());
                let _ = mmu.dirty_log(SlotId(0), &mut [0; 1]);
                mmu.audit().expect("clean");
            }
        }
        true
    }
}

fn is_read_only(slot: &Arc<mmu_core::memory::Slot>) -> bool {
    slot.is_read_only()
}

fuzz_target!(|data: &[u8]| {
    let mut world = World::new();
    let mut bytes = Bytes(data);
    while world.step(&mut bytes) {}
    world.mmu.audit().expect("clean");
});
