// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest in any mode, its instruction emulator and its VMM, on any configuration of the shadow.
//!
//! The first bytes choose the configuration and the tables; the others are operations of two software
//! vCPUs, each in a mode of its own, and of those around them. An access must do what the walker says on
//! the same registers, after the invalidation that the architecture requires: raise the same fault, see
//! and leave the same bytes, set the same accessed and dirty bits and no others. So must every accessor of
//! the emulator, without an invalidation. What was written is in the dirty log. At the end, and whenever
//! a sequence asks for it, the audit is clean.
#![no_main]

mod accessors;
mod guest;
#[path = "../input.rs"]
mod input;
mod memory;
mod model;

use accessors::{DEVICE_SIZE, Registers};
use guest::{
    DEVICE, GIB, HIGH, MIB, Mode, NARROW, NARROW_INDICES, PAGE, PASSING_AT, SELF, TABLES, WIDE,
    WIDE_INDICES, mode_of, unpaged,
};
use input::Bytes;
use libfuzzer_sys::fuzz_target;
use memory::Pieces;
use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{
    Alias, AllocatedMemory, Backing, DirtyMode, MemoryMap, SlotConfig, SlotFlags, SlotId,
};
use mmu_core::paging::{Access, Invpcid, Kind, Reason, Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::{SoftExit, SoftVcpu, VcpuError};
use mmu_core::{Config, Mmu};
use model::{End, Moment, Part, Place, linear, overlaps, place};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const TIB: u64 = 1 << 40;
const PASSING: SlotId = SlotId(2);
/// Entry of every root that is the VMM's, where there is one.
const RESERVED: usize = 510;
const CPUS: usize = 2;

struct World {
    mmu: Mmu,
    levels: u8,
    reserved: bool,
    device: Arc<Registers>,
    cpus: Vec<SoftVcpu>,
    /// Whether what the vCPU remembers is what the tables say.
    fresh: [bool; CPUS],
    /// Pages of the vCPUs' APICs.
    apic: [Option<Gpa>; CPUS],
    host_read_only: BTreeSet<Place>,
    /// Pages written since their slot's log was taken.
    written: BTreeSet<Place>,
    recent: Vec<Gva>,
}

impl World {
    fn new(bytes: &mut Bytes<'_>) -> Self {
        let shape = bytes.u8();
        let levels = 4 + (shape & 1);
        let largest = [GIB, 2 * MIB, PAGE, GIB][usize::from(shape >> 1 & 3)];
        let frames = [256, 96, 1024, 160][usize::from(shape >> 4 & 3)];
        let mut pieces = Pieces::new();
        let config =
            Config::new(pieces.take(frames * PAGE, 8 * TIB)).levels(levels).largest_page(largest);
        let reserved = shape & 64 != 0;
        let config = if reserved { config.reserve_root_entry(RESERVED, 0) } else { config };
        let mmu = Mmu::new(config.unsync(shape & 8 == 0)).expect("a configuration that there is");
        let slot = |id, base, memory: Arc<dyn Backing>| {
            mmu.create_slot(SlotConfig::new(id, Gpa(base), memory)).expect("slots apart");
        };
        let low = pieces.take(4 * MIB, TIB);
        guest::write_tables(&*low, bytes.u8());
        slot(0, 0, low);
        slot(1, 16 * MIB, pieces.take(2 * MIB, TIB + 32 * MIB + 3 * PAGE));
        slot(4, HIGH, pieces.take(2 * MIB, 4 * TIB));
        if shape & 128 == 0 {
            slot(3, GIB, pieces.take(GIB, 2 * TIB));
        }
        let passing = AllocatedMemory::at(16 * PAGE, Machine(TIB + 64 * MIB));
        slot(PASSING.0, PASSING_AT[0], Arc::new(passing));
        let device = Arc::new(Registers::default());
        let registered = mmu.bus().register(DEVICE, DEVICE_SIZE, Arc::clone(&device) as _);
        registered.expect("nothing else is there");
        let cpu = |_| mmu.create_soft_vcpu(unpaged()).expect("there are frames");
        let mut world = Self {
            cpus: (0..CPUS).map(cpu).collect(),
            mmu,
            levels,
            reserved,
            device,
            fresh: [true; CPUS],
            apic: [None; CPUS],
            host_read_only: BTreeSet::new(),
            written: BTreeSet::new(),
            recent: Vec::new(),
        };
        for cpu in 0..CPUS {
            world.set_regs(cpu, bytes);
        }
        world
    }

    fn moment<'a>(&'a self, map: &'a MemoryMap, cpu: usize) -> Moment<'a> {
        Moment { map, vcpu: self.cpus[cpu].vcpu(), host_read_only: &self.host_read_only }
    }

    /// Registers as the VMM sets them.
    fn set_regs(&mut self, cpu: usize, bytes: &mut Bytes<'_>) {
        let regs = bytes.guest_regs(self.levels);
        match self.cpus[cpu].vcpu_mut().set_regs(regs) {
            Ok(()) => self.fresh[cpu] = true,
            // An alias to nowhere may lie over the tables.
            Err(VcpuError::RootOutside { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// One register as the guest writes it; it may be refused.
    fn write_register(&mut self, cpu: usize, bytes: &mut Bytes<'_>) {
        let regs = *self.cpus[cpu].vcpu().regs();
        let mode = mode_of(&regs);
        let which = bytes.u8();
        let cr3 = bytes.cr3(mode) | regs.cr3 & (bits::CR3_LAM_U48 | bits::CR3_LAM_U57);
        let pcid = if regs.cr4 & bits::CR4_PCIDE != 0 { u64::from(which >> 5) } else { 0 };
        let cr4 = [
            bits::CR4_SMEP,
            bits::CR4_SMAP,
            bits::CR4_PSE,
            bits::CR4_PGE,
            bits::CR4_PAE,
            bits::CR4_LA57,
            bits::CR4_PCIDE,
            bits::CR4_LAM_SUP,
        ];
        let vcpu = self.cpus[cpu].vcpu_mut();
        let done = match which % 9 {
            0 => vcpu.set_cr3(cr3 | pcid),
            1 => vcpu.set_cr3(regs.cr3),
            // Translations of the PCID are kept; what the engine has is up to date all the same.
            2 => vcpu.set_cr3(cr3 | pcid | 1 << 63),
            3 => vcpu.set_cr0(regs.cr0 ^ bits::CR0_WP),
            4 => vcpu.set_cr0(regs.cr0 ^ bits::CR0_PG),
            5 => vcpu.set_cr4(regs.cr4 ^ cr4[usize::from(which >> 5)]),
            6 => vcpu.set_efer(regs.efer ^ bits::EFER_NXE),
            7 => vcpu.set_regs(Regs { rflags: regs.rflags ^ bits::RFLAGS_AC, ..regs }),
            _ => {
                vcpu.reset_context();
                Ok(())
            }
        };
        self.fresh[cpu] |= done.is_ok();
    }

    /// An address with entries on the way to it, of late rather than a new one.
    fn gva(&mut self, cpu: usize, bytes: &mut Bytes<'_>) -> Gva {
        let which = usize::from(bytes.u8());
        if which < 0xa0 && !self.recent.is_empty() {
            let page = self.recent[which % self.recent.len()];
            return Gva(page.0 + bytes.offset());
        }
        let page = bytes.gva(mode_of(self.cpus[cpu].vcpu().regs()));
        if self.recent.len() > 5 {
            self.recent.remove(0);
        }
        self.recent.push(page);
        Gva(page.0.wrapping_add(bytes.offset()))
    }

    /// What the guest invalidates before it uses an address; whether that is enough.
    fn invalidate(&mut self, cpu: usize, gvas: [Gva; 2], bytes: &mut Bytes<'_>) -> bool {
        let regs = *self.cpus[cpu].vcpu().regs();
        let how = bytes.u8();
        let mut session = self.cpus[cpu].session();
        match how % 8 {
            0..4 => gvas.into_iter().for_each(|gva| session.invlpg(gva)),
            4 => session.flush(),
            5 => return false,
            _ => {
                let (kind, pcid) = (u64::from(how >> 3 & 3), u64::from(how >> 5));
                let Ok(what) = Invpcid::decode(kind, [pcid, gvas[0].0], &regs) else {
                    return false;
                };
                session.invpcid(what);
                let own = |pcid: u16| {
                    u64::from(pcid)
                        == if regs.cr4 & bits::CR4_PCIDE == 0 { 0 } else { regs.cr3 & 0xfff }
                };
                match what {
                    Invpcid::Address { pcid, .. } => {
                        return own(pcid) && gvas[0].page() == gvas[1].page();
                    }
                    Invpcid::Context { pcid } if !own(pcid) => return false,
                    _ => {}
                }
            }
        }
        drop(session);
        self.fresh[cpu] |= how % 8 >= 4;
        true
    }

    /// One access by the vCPU beside what it should do.
    fn access(&mut self, cpu: usize, how: u8, gva: Gva, bytes: &mut Bytes<'_>) {
        let kinds = [Kind::Read, Kind::Write, Kind::Write, Kind::Execute];
        let kind = kinds[usize::from(how & 3)];
        let access =
            Access { kind, user: how & 4 != 0, implicit: kind == Kind::Read && how & 0xf8 == 0xf8 };
        let size = [8, 8, 4, 1, 2, 8, 16, 7][usize::from(how >> 3 & 7)];
        let last = gva.wrapping_add(size as u64 - 1);
        // Inside already, and with what it remembers: once before, so that it changes nothing later.
        let warm = (how & 0x80 != 0).then(|| self.recent[0]);
        if let Some(warm) = warm {
            let _ = self.cpus[cpu].session().load(warm, &mut [0], access.user);
        }
        let mut exact = self.fresh[cpu];
        if !exact {
            let regs = self.cpus[cpu].vcpu().regs();
            let gvas = [gva, last].map(|gva| linear(regs, gva, access));
            exact = self.invalidate(cpu, gvas, bytes);
        }
        let map = self.mmu.memory();
        let mut parts = self.moment(&map, cpu).parts(gva, size, access, kind == Kind::Write);
        // The page of its own APIC comes out, whatever is there. (The processor's own accesses are the
        // emulator's here, and the APIC is not asked.)
        let apic = self.apic[cpu].filter(|_| !access.implicit);
        for part in &mut parts {
            if let End::Memory(gpa) | End::HostReadOnly(gpa) = part.end
                && apic.is_some_and(|page| page.gfn() == gpa.gfn())
            {
                part.end = End::Device(gpa);
            }
        }
        let exact = exact && !overlaps(&map, &parts);
        let before = self.moment(&map, cpu).bytes(&parts, size);
        let mut value = [0; 16];
        if kind == Kind::Write {
            let narrow = mode_of(self.cpus[cpu].vcpu().regs()) == Mode::Narrow;
            let entry = match narrow {
                true => u64::from(bytes.narrow_entry(16)) | u64::from(bytes.narrow_entry(16)) << 32,
                // Of a leaf table.
                false => bytes.wide_entry(WIDE.start + 1),
            };
            value[..8].copy_from_slice(&entry.to_le_bytes());
            value[8..].copy_from_slice(&(!entry).to_le_bytes());
        }
        let value = &value[..size];
        let mut seen = vec![0; size];
        let exchange = kind == Kind::Write
            && how & 0x40 != 0
            && matches!(size, 1 | 2 | 4 | 8)
            && gva.0 % 8 + size as u64 <= 8;
        let mut session = self.cpus[cpu].session();
        if let Some(warm) = warm {
            let _ = session.load(warm, &mut [0], access.user);
        }
        let number = |bytes: &[u8]| {
            bytes.iter().rev().fold(0, |number, byte| number << 8 | u128::from(*byte))
        };
        let result = match kind {
            Kind::Read => session.read(gva, &mut seen, access),
            Kind::Execute => session.fetch(gva, &mut seen, access.user),
            Kind::Write if exchange => {
                let (old, new) = (number(&before), number(value));
                session
                    .cmpxchg(gva, size, old, new, access.user)
                    .map(|met| assert!(met.is_ok() || !exact, "{old:#x} expected, {met:x?}"))
            }
            Kind::Write => session.store(gva, value, access.user),
        };
        drop(session);
        if kind == Kind::Write && !exact {
            // A stale translation may have been of another page.
            self.fresh = [false; CPUS];
        }
        if !exact {
            return;
        }
        if self.reserved && matches!(result, Err(SoftExit::Reserved(_))) {
            let shift = 3 + 9 * u32::from(self.levels);
            let regs = self.cpus[cpu].vcpu().regs();
            let [first, last] = [gva, last]
                .map(|gva| linear(regs, gva, access).0 >> shift & 511 == RESERVED as u64);
            assert!(first || last, "{gva} is not reserved");
            return;
        }
        let context = || {
            let regs = self.cpus[cpu].vcpu().regs();
            format!("{access:?} of {size} at {gva}: {parts:x?} {regs:x?}")
        };
        let not_canonical = parts.iter().find_map(|part| match part.end {
            End::Fault(fault) if fault.reason == Reason::NonCanonical => {
                Some(SoftExit::Fault(fault))
            }
            _ => None,
        });
        // That the end is not canonical comes before the page fault of the beginning.
        let refused = parts.iter().find_map(|part| match part.end {
            End::Fault(fault) => Some(SoftExit::Fault(fault)),
            End::HostReadOnly(gpa) => Some(SoftExit::HostReadOnly(gpa)),
            End::Device(gpa) => Some(SoftExit::Mmio(gpa)),
            End::Memory(_) => None,
        });
        let refused = not_canonical.or(refused);
        // An access that the processor makes itself is checked as a whole.
        let implicit = access.implicit && parts.len() > 1 && refused.is_some();
        assert!(implicit && result.is_err() || result.err() == refused, "{result:?} {}", context());
        if refused.is_none() {
            let moment = self.moment(&map, cpu);
            let there = moment.bytes(&parts, size);
            assert_eq!(
                there,
                if kind == Kind::Write { value } else { &before[..] },
                "{}",
                context()
            );
            assert!(kind == Kind::Write || seen == there, "{seen:x?} {there:x?} {}", context());
            moment.check_marks(&parts, access);
        }
        if kind == Kind::Write && refused.is_none() {
            self.note_stores(&map, &parts, |_| true);
        }
    }

    /// A guest's own edit of a leaf table, through a mapping that most of them have of another.
    fn edit_natively(&mut self, cpu: usize, bytes: &mut Bytes<'_>) {
        let (how, index) = (bytes.u8(), bytes.u8());
        let mode = mode_of(self.cpus[cpu].vcpu().regs());
        let window = self.gva(cpu, bytes).page();
        // Whole entries.
        let (at, size) = match mode {
            Mode::Narrow => {
                (window.0 & !0x3f_f000 | (NARROW_INDICES[usize::from(index & 7)] * 4), 2 << 3)
            }
            _ => (window.0 & !0x1f_f000 | (WIDE_INDICES[usize::from(index & 3)] * 8), 0),
        };
        let write = 1;
        self.access(cpu, how & 0xc4 | size | write, Gva(at | SELF << 12), bytes);
    }

    /// The parts in memory have been written.
    fn note_stores(&mut self, map: &MemoryMap, parts: &[Part], counts: impl Fn(Gpa) -> bool) {
        for gpa in parts.iter().filter_map(Part::gpa).filter(|gpa| counts(*gpa)) {
            self.note(map, gpa);
        }
    }

    fn note(&mut self, map: &MemoryMap, gpa: Gpa) {
        let place = place(map, gpa);
        // A bit that is wrong may make a table of any page.
        self.fresh = [false; CPUS];
        self.written.extend(place);
    }

    /// A device's or the VMM's write.
    fn write_phys(&mut self, at: u64, bytes: &[u8]) {
        let done = self.mmu.write_phys(Gpa(at), bytes);
        let map = self.mmu.memory();
        if done > 0 {
            self.note(&map, Gpa(at));
            self.note(&map, Gpa(at + done as u64 - 1));
        }
    }

    /// An edit of a table past the vCPUs: a whole entry, or a few bytes anywhere around one.
    fn edit(&mut self, bytes: &mut Bytes<'_>) {
        let how = bytes.u8();
        let place = u64::from(bytes.u8());
        let (at, entry, whole) = if how & 1 != 0 {
            let frame = NARROW.start + place % 8;
            let at = frame * PAGE + NARROW_INDICES[(place >> 3) as usize & 7] * 4;
            (at, u64::from(bytes.narrow_entry(frame)), 4)
        } else {
            let frame = WIDE.start + place % 20;
            let index = WIDE_INDICES[(place / 20) as usize & 3];
            (frame * PAGE + index * 8, bytes.wide_entry(frame), 8)
        };
        let size = [whole, whole, whole, 1, 2, 4, 8, 16][usize::from(how >> 1 & 7)];
        let shift = if size == whole { 0 } else { u64::from(how >> 4 & 7) };
        let at = (at + shift).min(TABLES.end * PAGE - size);
        let mut image = [0; 16];
        image[..8].copy_from_slice(&entry.to_le_bytes());
        image[8..].copy_from_slice(&entry.rotate_left(12).to_le_bytes());
        if how & 0x80 == 0 {
            return self.write_phys(at, &image[..size as usize]);
        }
        // Past the engine, which is told afterwards.
        let at = at & !7;
        if let Ok(page) = self.mmu.pin_page(Gpa(at), true) {
            let word = &page.words()[(at % PAGE / 8) as usize];
            word.store(entry, Ordering::Relaxed);
            drop(page);
            self.mmu.note_write(Gpa(at), 8);
            let map = self.mmu.memory();
            self.note(&map, Gpa(at));
        }
    }

    fn range(bytes: &mut Bytes<'_>) -> PageRange {
        let base = Gpa(bytes.page());
        PageRange::Guest { base, size: bytes.pick(&[1, 4, 16, 512]) * PAGE }
    }

    /// What the VMM and the host do.
    fn manage(&mut self, bytes: &mut Bytes<'_>) {
        let mmu = self.mmu.clone();
        let which = bytes.u8();
        let id = SlotId(u32::from(which >> 4) % 5);
        match which & 15 {
            0 => mmu.zap_all(),
            1 => mmu.maintain(),
            2 => {
                let _ = mmu.set_nr_mmu_pages(bytes.pick(&[None, Some(64), Some(80), Some(200)]));
            }
            3 => {
                let held = mmu.invalidate(Self::range(bytes));
                assert!(held.is_err() || mmu.remove_alias(0).is_err(), "it waits for itself");
            }
            4 | 5 => {
                let (range, writable) = (Self::range(bytes), which & 16 != 0);
                if mmu.set_host_writable(range, writable).is_ok() {
                    let PageRange::Guest { base, size } = range else { unreachable!() };
                    let map = mmu.memory();
                    for page in 0..size / PAGE {
                        let Some(place) = place(&map, Gpa(base.0 + page * PAGE)) else { continue };
                        if writable {
                            self.host_read_only.remove(&place);
                        } else {
                            self.host_read_only.insert(place);
                        }
                    }
                }
            }
            6 => {
                let _ = match which & 16 {
                    0 => mmu.clear_young(Self::range(bytes), |_, _, _| ()),
                    _ => mmu.test_young(Self::range(bytes), |_, _, _| ()),
                };
            }
            7 => {
                use DirtyMode::{DirtyBits, Off, WriteProtect};
                let how = bytes.u8();
                let dirty = [WriteProtect, DirtyBits, Off][usize::from(how % 3)];
                let Some(before) = mmu.memory().by_id(id).map(|slot| slot.flags()) else { return };
                let flags = SlotFlags { read_only: how & 0xf0 == 0xf0, dirty };
                mmu.set_slot_flags(id, flags).expect("the slot is there");
                if before.dirty == Off || dirty == Off {
                    self.written.retain(|(slot, _)| *slot != id);
                }
            }
            8 => self.harvest(id, true),
            9 => self.harvest(id, false),
            10 => {
                if mmu.memory().by_id(PASSING).is_some() {
                    let release = mmu.delete_slot(PASSING).expect("it is there");
                    assert!(release.is_complete(), "{release:?}");
                    self.host_read_only.retain(|(slot, _)| *slot != PASSING);
                    self.written.retain(|(slot, _)| *slot != PASSING);
                } else {
                    let machine = Machine(TIB + 64 * MIB + u64::from(which >> 7) * PAGE);
                    let size = bytes.pick(&[16 * PAGE, 2 * MIB, 2 * MIB + 16 * PAGE]);
                    let memory = Arc::new(AllocatedMemory::at(size, machine));
                    let at = Gpa(bytes.pick(&PASSING_AT));
                    let slot = SlotConfig::new(PASSING.0, at, memory);
                    mmu.create_slot(slot).expect("nothing else is there");
                }
            }
            11 => {
                let _ = mmu.move_slot(PASSING, Gpa(bytes.pick(&PASSING_AT)));
            }
            12 => {
                let base = Gpa(bytes.pick(&[9 * MIB, 2 * MIB + PAGE, 24 * PAGE]));
                let target = Gpa(bytes.page());
                let number = u32::from(which >> 4 & 1);
                let _ = mmu.set_alias(Alias { number, base, size: 4 * PAGE, target });
            }
            13 => {
                let _ = mmu.remove_alias(u32::from(which >> 4 & 1));
            }
            14 => {
                let cpu = usize::from(which >> 4 & 1);
                let page = (which & 0x80 == 0).then(|| Gpa(bytes.page()));
                self.apic[cpu] = page;
                self.cpus[cpu]
                    .vcpu_mut()
                    .set_apic_page(page)
                    .expect("nobody resolves or invalidates");
            }
            _ => self.audit(),
        }
    }

    /// Takes the log, or looks at it and clears a part.
    fn harvest(&mut self, id: SlotId, take: bool) {
        let map = self.mmu.memory();
        let Some(slot) = map.by_id(id).filter(|slot| slot.logs_dirty()) else { return };
        let mut bitmap = vec![0u64; slot.pages().div_ceil(64) as usize];
        match take {
            true => self.mmu.dirty_log(id, &mut bitmap),
            false => self.mmu.peek_dirty_log(id, &mut bitmap),
        }
        .expect("the slot logs");
        for (_, page) in self.written.iter().filter(|(slot, _)| *slot == id) {
            let set = bitmap[*page as usize / 64] >> (page % 64) & 1 != 0;
            assert!(set, "the write to page {page:#x} of {id} is not in the log");
        }
        let mut cleared = slot.pages();
        if !take {
            cleared = 64.min(cleared);
            self.mmu.clear_dirty_log(id, 0, &bitmap[..1]).expect("the slot logs");
        }
        self.written.retain(|(slot, page)| *slot != id || *page >= cleared);
    }

    /// Whether there was another operation.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let Some(operation) = bytes.next() else { return false };
        let cpu = usize::from(operation >> 7);
        match operation % 32 {
            0..11 => {
                let (how, gva) = (bytes.u8(), self.gva(cpu, bytes));
                self.access(cpu, how, gva, bytes);
            }
            11..14 => self.edit_natively(cpu, bytes),
            14..18 => self.edit(bytes),
            18..23 => self.emulate(cpu, bytes),
            23 => {
                let gva = self.gva(cpu, bytes);
                self.invalidate(cpu, [gva; 2], bytes);
            }
            24..27 => self.write_register(cpu, bytes),
            27 => self.set_regs(cpu, bytes),
            _ => self.manage(bytes),
        }
        true
    }

    fn audit(&self) {
        self.mmu.audit().unwrap_or_else(|error| panic!("audit: {error}"));
    }
}

fuzz_target!(|data: &[u8]| {
    let bytes = &mut Bytes(data);
    let mut world = World::new(bytes);
    while world.step(bytes) {}
    (0..5).for_each(|id| world.harvest(SlotId(id), true));
    world.audit();
});
