// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random guests in every paging mode, through the shadow, against the walker.
//!
//! Tables refer to each other, to themselves and to anything else, at more than one level and by paths
//! with different rights; two vCPUs, each in a mode of its own, load, store, fetch and edit them while
//! registers, memslots, logs and the host's wishes change. Each access must do what the walker says on
//! the same registers: raise the same fault, see and leave the same bytes, set the same accessed and
//! dirty bits and no others. The audit follows each sequence.
//!
//! In a storm both vCPUs and the VMM do all that at once, on a thread each, and nothing is compared; when
//! it is over, and each vCPU has flushed, everything must agree again.
//!
//! `MODES_SEQUENCES` (sequences for each shape of the shadow), `MODES_STORMS` and `MODES_SEED` make it longer and
//! other; a failure names the seed of its sequence, which `MODES_ONLY` runs alone, with `MODES_AUDIT`
//! auditing after each step.

mod common;

use common::{MIB, PAGE, Random, setting};
use mmu_core::addr::{Gfn, Gpa, Gva, Machine};
use mmu_core::memory::{
    Alias, AllocatedMemory, DirtyMode, MemoryMap, SlotConfig, SlotFlags, SlotId,
};
use mmu_core::paging::{Access, Entry, Fault, Kind, PagingMode, Reason, Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::{AccessError, SoftExit, SoftVcpu, VcpuError};
use mmu_core::{Config, Mmu};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Frames of page tables: with 4-byte entries, with 8-byte entries, and the page of PDPTEs.
const NARROW: [u64; 2] = [16, 24];
const WIDE: [u64; 2] = [24, 44];
const PDPTES: u64 = 44;
const TABLES_END: u64 = 48;
/// Entries that walks pass through.
const WIDE_INDICES: [u64; 4] = [0, 1, 2, 511];
const NARROW_INDICES: [u64; 8] = [0, 1, 2, 255, 256, 511, 767, 1023];
/// Where 2 MiB and 4 MiB pages may lie: with tables in it, without, across the end of a slot, behind
/// memory that is not congruent, in the slot that comes and goes, in a large one, above 4 GiB.
const BLOCKS: [u64; 10] =
    [0, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB, GIB, GIB + 4 * MIB, GIB + 512 * MIB, HIGH];
const HIGH: u64 = 0x1_2340_0000;
/// Offsets of the pages in them that are looked at.
const PAGES: [u64; 5] = [0, PAGE, 5 * PAGE, 0x10_0000, 0x1f_f000];
const PASSING: SlotId = SlotId(2);
const PASSING_AT: [u64; 3] = [64 * MIB, 8 * MIB, 65 * MIB];
const ALIAS_AT: u64 = 9 * MIB;
const LOGS: [DirtyMode; 4] =
    [DirtyMode::Off, DirtyMode::Off, DirtyMode::WriteProtect, DirtyMode::DirtyBits];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Narrow,
    Pae,
    Four,
    Five,
}

fn mode_of(regs: &Regs) -> Mode {
    match (regs.cr0 & bits::CR0_PG != 0, regs.is_long(), regs.is_pae()) {
        (false, ..) => Mode::Off,
        (_, false, false) => Mode::Narrow,
        (_, _, true) => Mode::Pae,
        _ if regs.cr4 & bits::CR4_LA57 != 0 => Mode::Five,
        _ => Mode::Four,
    }
}

/// An entry of a path.
#[derive(Clone, Copy, Debug)]
struct Step {
    at: Gpa,
    size: u64,
    value: u64,
    leaf: bool,
}

/// What an access to bytes of one page should do.
#[derive(Clone, Debug)]
struct Expected {
    end: Result<Gpa, SoftExit>,
    steps: Vec<Step>,
}

struct World {
    mmu: Mmu,
    levels: u8,
    random: Random,
    cpus: Vec<SoftVcpu>,
    /// Whether what the vCPU remembers is what the tables say.
    fresh: Vec<bool>,
    /// Pages that walks have passed through, wherever the guest's wild entries led them.
    tables: BTreeSet<(SlotId, u64)>,
    host_read_only: BTreeSet<(SlotId, u64)>,
    /// Pages written since their slot's log was taken.
    written: BTreeSet<(SlotId, u64)>,
    recent: Vec<Gva>,
    /// On the way to which an entry has just changed.
    changed: Option<Gva>,
    /// Accesses that went through, or to a device, and faults.
    counts: [u64; 3],
}

impl World {
    fn new(levels: u8, largest: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let frames = random.pick(&[96, 256, 1024]);
        let tables = Arc::new(AllocatedMemory::at(frames * PAGE, Machine(8 * TIB)));
        let config = Config::new(tables).levels(levels).largest_page(largest);
        let mmu = Mmu::new(config).unwrap();
        let mut slot = |id, base, size, machine| {
            let memory = Arc::new(AllocatedMemory::at(size, Machine(machine)));
            let flags = SlotFlags { read_only: false, dirty: random.pick(&LOGS) };
            let slot = SlotConfig { flags, ..SlotConfig::new(id, Gpa(base), memory) };
            mmu.create_slot(slot).unwrap();
        };
        slot(0, 0, 8 * MIB, TIB);
        slot(1, 16 * MIB, 4 * MIB, TIB + 32 * MIB + 3 * PAGE);
        slot(3, GIB, GIB + 512 * MIB, 2 * TIB);
        slot(4, HIGH, 4 * MIB, 4 * TIB);
        let cpus = (0..2).map(|_| mmu.create_soft_vcpu(unpaged()).unwrap()).collect();
        let mut world = Self {
            mmu,
            levels,
            random,
            cpus,
            fresh: vec![true; 2],
            tables: BTreeSet::new(),
            host_read_only: BTreeSet::new(),
            written: BTreeSet::new(),
            recent: Vec::new(),
            changed: None,
            counts: [0; 3],
        };
        for frame in NARROW[0]..NARROW[1] {
            for index in NARROW_INDICES {
                let entry = world.narrow_entry(frame) as u32;
                world.write_phys(frame * PAGE + index * 4, &entry.to_le_bytes());
            }
        }
        for frame in WIDE[0]..WIDE[1] {
            for index in WIDE_INDICES {
                let entry = world.wide_entry(frame);
                world.write_phys(frame * PAGE + index * 8, &entry.to_le_bytes());
            }
        }
        for index in 0..16 {
            let entry = world.pdpte();
            world.write_phys(PDPTES * PAGE + index * 8, &entry.to_le_bytes());
        }
        for cpu in 0..2 {
            world.set_regs(cpu);
        }
        world
    }

    /// What the entries of a frame mean most of the time.
    fn level_of(frame: u64) -> u64 {
        if frame < WIDE[0] { 1 + frame % 2 } else { 1 + frame % 5 }
    }

    fn table_frame(&mut self, [first, end]: [u64; 2], level: u64) -> u64 {
        if self.random.one_in(10) {
            return first + self.random.below(end - first);
        }
        let fits: Vec<u64> = (first..end).filter(|f| Self::level_of(*f) == level).collect();
        self.random.pick(&fits)
    }

    fn page(&mut self) -> u64 {
        if self.random.one_in(5) {
            return self.random.below(TABLES_END - 16) * PAGE + 16 * PAGE;
        }
        self.random.pick(&BLOCKS) + self.random.pick(&PAGES)
    }

    fn flags(&mut self) -> u64 {
        let random = &mut self.random;
        let mut set = |bit, often| if random.below(100) < often { bit } else { 0 };
        set(bits::P, 95)
            | set(bits::RW, 75)
            | set(bits::US, 75)
            | set(bits::A | bits::D, 30)
            | set(bits::A, 30)
            | set(bits::G, 20)
            | set(bits::PCD, 10)
    }

    fn wide_entry(&mut self, frame: u64) -> u64 {
        let level = match self.random.one_in(10) {
            true => 1 + self.random.below(5),
            false => Self::level_of(frame),
        };
        let large = matches!(level, 2 | 3) && self.random.one_in(2);
        let mut entry = self.flags();
        entry |= match level {
            1 => self.page(),
            3 if large => bits::PS | self.random.pick(&[0, GIB, 2 * GIB, 4 * GIB]),
            _ if large => bits::PS | self.random.pick(&BLOCKS),
            _ => self.table_frame(WIDE, level - 1) * PAGE,
        };
        if self.random.one_in(10) {
            entry |= bits::NX;
        }
        if self.random.one_in(30) {
            entry ^= 1 << self.random.below(64);
        }
        entry
    }

    fn narrow_entry(&mut self, frame: u64) -> u64 {
        let level =
            if self.random.one_in(10) { 1 + self.random.below(2) } else { Self::level_of(frame) };
        let large = level == 2 && self.random.one_in(2);
        let mut entry = self.flags();
        entry |= match level {
            1 => self.page() & 0xffff_f000,
            _ if large => {
                let block = self.random.pick(&BLOCKS);
                bits::PS | block & 0xffc0_0000 | (block >> 32) << 13
            }
            _ => self.table_frame(NARROW, 1) * PAGE,
        };
        if self.random.one_in(30) {
            entry ^= 1 << self.random.below(32);
        }
        entry
    }

    fn pdpte(&mut self) -> u64 {
        let wrong = if self.random.one_in(20) { 1 << self.random.below(64) } else { 0 };
        let present = u64::from(!self.random.one_in(8));
        ((self.table_frame(WIDE, 2) * PAGE) | present) ^ wrong
    }

    /// Registers of any mode.
    fn regs(&mut self) -> Regs {
        let modes = [Mode::Off, Mode::Narrow, Mode::Pae, Mode::Four, Mode::Five];
        let most = if self.levels == 5 { 5 } else { 4 };
        let mode = match self.random.one_in(8) {
            true => Mode::Off,
            false => modes[1 + self.random.below(most - 1) as usize],
        };
        let random = &mut self.random;
        let mut on = |bit: u64| if random.one_in(2) { bit } else { 0 };
        let mut regs = unpaged();
        regs.cr0 |= on(bits::CR0_WP);
        regs.cr4 = on(bits::CR4_SMEP) | on(bits::CR4_SMAP) | on(bits::CR4_LAM_SUP);
        regs.cr4 |= on(bits::CR4_PGE) | on(bits::CR4_PSE);
        regs.efer = on(bits::EFER_NXE);
        regs.rflags |= on(bits::RFLAGS_AC);
        let lam = on(bits::CR3_LAM_U48) | on(bits::CR3_LAM_U57);
        regs.maxphyaddr = random.pick(&[36, 40, 52]);
        if mode != Mode::Off {
            regs.cr0 |= bits::CR0_PG;
        }
        match mode {
            Mode::Off => {}
            Mode::Narrow => regs.cr3 = self.table_frame(NARROW, 2) * PAGE,
            Mode::Pae => {
                regs.cr4 |= bits::CR4_PAE;
                regs.cr3 = PDPTES * PAGE + self.random.below(4) * 32;
                regs.pdptrs = core::array::from_fn(|_| self.pdpte());
            }
            Mode::Four | Mode::Five => {
                regs.cr4 |= bits::CR4_PAE;
                regs.efer |= bits::EFER_LME | bits::EFER_LMA;
                let level = if mode == Mode::Five { 5 } else { 4 };
                regs.cr3 = (self.table_frame(WIDE, level) * PAGE) | lam;
                if mode == Mode::Five {
                    regs.cr4 |= bits::CR4_LA57;
                }
            }
        }
        regs
    }

    fn set_regs(&mut self, cpu: usize) {
        let regs = self.regs();
        match self.cpus[cpu].vcpu_mut().set_regs(regs) {
            Ok(()) => self.fresh[cpu] = true,
            // An alias to nowhere may lie over the tables.
            Err(VcpuError::RootOutside { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// One register as the guest writes it; it may be refused.
    fn write_register(&mut self, cpu: usize) {
        let regs = *self.cpus[cpu].vcpu().regs();
        let (which, bit) = (self.random.below(6), self.random.below(6));
        let cr3 = match mode_of(&regs) {
            Mode::Narrow => self.table_frame(NARROW, 2) * PAGE,
            Mode::Pae => PDPTES * PAGE + self.random.below(4) * 32,
            Mode::Five => self.table_frame(WIDE, 5) * PAGE,
            _ => self.table_frame(WIDE, 4) * PAGE,
        };
        let lam = regs.cr3 & (bits::CR3_LAM_U48 | bits::CR3_LAM_U57);
        let vcpu = self.cpus[cpu].vcpu_mut();
        let cr4 = [
            bits::CR4_SMEP,
            bits::CR4_SMAP,
            bits::CR4_PSE,
            bits::CR4_PGE,
            bits::CR4_PAE,
            bits::CR4_LA57,
        ];
        let written = match which {
            0 => vcpu.set_cr0(regs.cr0 ^ bits::CR0_WP),
            1 => vcpu.set_cr0(regs.cr0 ^ bits::CR0_PG),
            2 => vcpu.set_cr3(cr3 | lam),
            3 => vcpu.set_cr4(regs.cr4 ^ cr4[bit as usize]),
            4 => vcpu.set_efer(regs.efer ^ bits::EFER_NXE),
            _ => vcpu.set_regs(Regs { rflags: regs.rflags ^ bits::RFLAGS_AC, ..regs }),
        };
        self.fresh[cpu] |= written.is_ok();
    }

    /// An address whose walk passes entries that are there.
    fn gva(&mut self, cpu: usize) -> Gva {
        if let Some(changed) = self.changed.take().filter(|_| !self.random.one_in(4)) {
            return Gva(changed.page().0 + self.offset());
        }
        if !self.recent.is_empty() && self.random.one_in(2) {
            let recent = self.random.pick(&self.recent);
            return Gva(recent.page().0 + self.offset());
        }
        let regs = *self.cpus[cpu].vcpu().regs();
        let mut wide = |level: u32| self.random.pick(&WIDE_INDICES) << (12 + 9 * (level - 1));
        let page = match mode_of(&regs) {
            Mode::Off => self.page() & 0xffff_ffff,
            Mode::Narrow => {
                let [table, page] = [(); 2].map(|()| self.random.pick(&NARROW_INDICES));
                table << 22 | page << 12
            }
            Mode::Pae => wide(1) | wide(2) | self.random.below(4) << 30,
            mode => {
                let (low, top) = (wide(1) | wide(2) | wide(3) | wide(4), wide(5));
                let (gva, unused) = if mode == Mode::Five { (low | top, 7) } else { (low, 16) };
                let canonical = ((gva << unused) as i64 >> unused) as u64;
                match self.random.below(12) {
                    0 => canonical ^ 1 << (47 + self.random.below(17)),
                    1 => canonical ^ self.random.next() & 0x7f << 57 & !(1 << 63),
                    2 => canonical ^ self.random.next() & 0x7fff << 48,
                    _ => canonical,
                }
            }
        };
        if self.recent.len() > 8 {
            self.recent.remove(0);
        }
        self.recent.push(Gva(page));
        Gva(page + self.offset())
    }

    fn offset(&mut self) -> u64 {
        let any = self.random.below(PAGE);
        self.random.pick(&[0, 4, 8, 16, 0x3fc, 0x400, 0x7fc, 0xff8, 0xffc, 0xffd, any])
    }

    /// What the walker, the memory map and the host's wishes make of an access within a page.
    fn expect(&self, map: &MemoryMap, cpu: usize, gva: Gva, access: Access) -> Expected {
        let vcpu = self.cpus[cpu].vcpu();
        let walk = match vcpu.translate(gva, Some(access)) {
            Ok(walk) => walk,
            Err(fault) => {
                return Expected { end: Err(SoftExit::Fault(fault)), steps: Vec::new() };
            }
        };
        let steps = path(vcpu.regs(), map, gva, access);
        let write = access.kind == Kind::Write;
        let lacks = |step: &&Step| {
            let needed = bits::A | if write && step.leaf { bits::D } else { 0 };
            let host = !self.is_read_only(map, step.at) && self.is_host_read_only(map, step.at);
            step.value & needed != needed && host
        };
        let end = if let Some(step) = steps.iter().find(lacks) {
            Err(SoftExit::HostReadOnly(step.at))
        } else if map.slot(walk.gpa.gfn()).is_none() || write && self.is_read_only(map, walk.gpa) {
            Err(SoftExit::Mmio(walk.gpa))
        } else if write && self.is_host_read_only(map, walk.gpa) {
            Err(SoftExit::HostReadOnly(walk.gpa))
        } else {
            Ok(walk.gpa)
        };
        Expected { end, steps }
    }

    fn is_read_only(&self, map: &MemoryMap, gpa: Gpa) -> bool {
        map.slot(gpa.gfn()).is_some_and(|slot| slot.is_read_only())
    }

    fn is_host_read_only(&self, map: &MemoryMap, gpa: Gpa) -> bool {
        place(map, gpa).is_some_and(|place| self.host_read_only.contains(&place))
    }

    /// One access by the vCPU beside what it should do.
    fn access(&mut self, cpu: usize) {
        let gva = self.gva(cpu);
        let user = self.random.one_in(2);
        let kind =
            self.random.pick(&[Kind::Read, Kind::Read, Kind::Write, Kind::Write, Kind::Execute]);
        let access = Access { kind, user, implicit: false };
        let size = self.random.pick(&[1, 2, 4, 8, 8, 8]) as usize;
        let last = gva.wrapping_add(size as u64 - 1);
        let crosses = gva.page() != last.page();
        let how = self.random.below(8);
        let exact = how != 0;
        // What is inside the guest already uses what it remembers. Once before, so that it changes
        // nothing later.
        let warm = self.recent.first().copied().filter(|_| how > 3);
        if let Some(warm) = warm {
            let _ = self.cpus[cpu].session().load(warm, &mut [0], user);
        }
        if exact && !self.fresh[cpu] {
            let regs = *self.cpus[cpu].vcpu().regs();
            let mut session = self.cpus[cpu].session();
            if how == 1 {
                session.flush();
                drop(session);
                self.fresh[cpu] = true;
            } else {
                // A tag makes an address not canonical, and INVLPG does nothing.
                session.invlpg(Gva(linear(&regs, gva, access)));
                session.invlpg(Gva(linear(&regs, last, access)));
            }
        }
        let exact = exact || self.fresh[cpu];
        let map = self.mmu.memory();
        let first = self.expect(&map, cpu, gva, access);
        let mut parts = vec![(first, gva, (PAGE - gva.page_offset()).min(size as u64))];
        if crosses {
            let (at, left) = (last.page(), size as u64 - parts[0].2);
            let second = self.expect(&map, cpu, at, access);
            let not_canonical = |part: &Expected| {
                matches!(part.end, Err(SoftExit::Fault(Fault { reason: Reason::NonCanonical, .. })))
            };
            if not_canonical(&second) && !not_canonical(&parts[0].0) {
                // Comes before the page fault of the beginning.
                parts.clear();
            }
            if parts.iter().all(|(part, ..)| part.end.is_ok()) {
                parts.push((second, at, left));
            }
        }
        let reads = Access { user, ..Access::read() };
        let warmed = warm.map(|warm| self.expect(&map, cpu, warm, reads));
        for step in parts.iter().map(|(part, ..)| part).chain(&warmed).flat_map(|part| &part.steps)
        {
            self.tables.extend(place(&map, step.at));
        }
        let value = match self.random.one_in(3) {
            true => self.wide_entry(WIDE[0]),
            false => self.random.next(),
        };
        let bytes = &value.to_le_bytes()[..size];
        let mut seen = vec![0; size];
        let exchange = kind == Kind::Write && gva.0 % 8 + size as u64 <= 8 && self.random.one_in(4);
        let mut old = [0; 8];
        if let Ok(gpa) = parts[0].0.end {
            map.read(gpa, &mut old[..size]);
        }
        let old = u64::from_le_bytes(old);
        let mut session = self.cpus[cpu].session();
        if let Some(warm) = warm {
            let _ = session.load(warm, &mut [0], user);
        }
        let result = match kind {
            Kind::Read => session.load(gva, &mut seen, user),
            Kind::Execute => session.fetch(gva, &mut seen, user),
            Kind::Write if exchange => {
                session.cmpxchg(gva, size, old.into(), value.into(), user).map(|r| {
                    let excused = !exact || overlaps(&map, &parts);
                    assert!(r.is_ok() || excused, "{old:#x} expected, {r:x?}");
                })
            }
            Kind::Write => session.store(gva, bytes, user),
        };
        drop(session);
        let to_table = |gpa: Gpa| {
            (16..TABLES_END).contains(&gpa.gfn().0)
                || place(&map, gpa).is_some_and(|place| self.tables.contains(&place))
        };
        if kind == Kind::Write {
            let stored: Vec<Gpa> = parts.iter().filter_map(|(part, ..)| part.end.ok()).collect();
            // A stale translation may have been of another page.
            if !exact || stored.iter().any(|gpa| to_table(*gpa)) {
                self.fresh.fill(false);
            }
            if exact && result.is_ok() {
                stored.iter().filter_map(|gpa| place(&map, *gpa)).for_each(|place| {
                    self.written.insert(place);
                });
            }
        }
        if !exact || overlaps(&map, &parts) {
            return;
        }
        let context = || {
            let regs = self.cpus[cpu].vcpu().regs();
            format!("{:?} {regs:x?} {access:?} of {size} at {gva}: {parts:x?}", mode_of(regs))
        };
        let end = parts.iter().find_map(|(part, ..)| part.end.as_ref().err());
        assert_eq!(result.err(), end.copied(), "{}", context());
        self.counts[match end {
            None => 0,
            Some(SoftExit::Mmio(_)) => 1,
            _ => 2,
        }] += 1;
        // Data, unless a table was written or marked.
        let mut done = 0;
        for (part, _, len) in parts.iter().filter(|(part, ..)| part.end.is_ok() && end.is_none()) {
            let gpa = *part.end.as_ref().unwrap();
            let range = done..done + *len as usize;
            done = range.end;
            let mut there = vec![0; range.len()];
            map.read(gpa, &mut there);
            let expected = if kind == Kind::Write { bytes } else { &seen };
            assert_eq!(there, expected[range], "{}", context());
        }
        // Accessed and dirty bits.
        let mut marked: BTreeMap<(Gpa, u64), (Step, u64)> = BTreeMap::new();
        for step in parts.iter().flat_map(|(part, ..)| &part.steps) {
            let writable =
                !self.is_read_only(&map, step.at) && !self.is_host_read_only(&map, step.at);
            let marks = bits::A | if kind == Kind::Write && step.leaf { bits::D } else { 0 };
            let marks = if writable { marks } else { 0 };
            marked.entry((real(&map, step.at), step.size)).or_insert((*step, step.value)).1 |=
                marks;
        }
        for (step, after) in marked.into_values() {
            let now = read(&map, step.at, step.size).unwrap();
            assert_eq!(now, after, "{step:x?}; {}", context());
        }
    }

    /// Changes what an entry on the way to an address that was used lately grants, or says of its use, and
    /// nothing else; false if no way was found.
    fn flip(&mut self, cpu: usize) -> bool {
        const RIGHTS: [u64; 5] = [bits::RW, bits::US, bits::A, bits::D, bits::NX];
        if self.recent.is_empty() {
            return false;
        }
        let (gva, map) = (self.random.pick(&self.recent), self.mmu.memory());
        let bit = match self.random.one_in(8) {
            true => self.random.pick(&[bits::P, bits::PS]),
            false => self.random.pick(&RIGHTS),
        };
        let reads = Access { user: self.random.one_in(2), ..Access::read() };
        let regs = *self.cpus[cpu].vcpu().regs();
        if mode_of(&regs) == Mode::Off || self.cpus[cpu].vcpu().translate(gva, Some(reads)).is_err()
        {
            return false;
        }
        let steps = path(&regs, &map, gva, reads);
        // Mostly the leaf.
        let step = match self.random.one_in(3) {
            true => steps[self.random.below(steps.len() as u64) as usize],
            false => steps[steps.len() - 1],
        };
        let bytes = (step.value ^ bit).to_le_bytes();
        self.write_phys(step.at.0, &bytes[..step.size as usize]);
        self.changed = Some(gva);
        true
    }

    fn write_phys(&mut self, at: u64, bytes: &[u8]) {
        let done = self.mmu.write_phys(Gpa(at), bytes);
        let map = self.mmu.memory();
        for byte in 0..done as u64 {
            self.written.extend(place(&map, Gpa(at + byte)));
        }
        self.fresh.fill(false);
    }

    /// An edit of a table: one bit of an entry that is in use, or a whole entry, or a few bytes anywhere
    /// around one.
    fn edit(&mut self, cpu: usize) {
        if self.random.one_in(2) && self.flip(cpu) {
            return;
        }
        let narrow = self.random.one_in(3);
        let (frame, at, entry) = if narrow {
            let frame = NARROW[0] + self.random.below(NARROW[1] - NARROW[0]);
            let index = self.random.pick(&NARROW_INDICES);
            (frame, index * 4, self.narrow_entry(frame))
        } else {
            let frame = WIDE[0] + self.random.below(WIDE[1] - WIDE[0]);
            let index = self.random.pick(&WIDE_INDICES);
            (frame, index * 8, self.wide_entry(frame))
        };
        let whole = if narrow { 4 } else { 8 };
        let size = self.random.pick(&[whole, whole, whole, 1, 2, 4, 8, 16]);
        let shift = if size == whole { 0 } else { self.random.below(8) };
        let at = (frame * PAGE + at + shift).min(TABLES_END * PAGE - size);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&entry.to_le_bytes());
        let next = if narrow { self.narrow_entry(frame) } else { self.wide_entry(frame) };
        bytes[8..].copy_from_slice(&next.to_le_bytes());
        let from = if size < 8 { (shift % 4) as usize } else { 0 };
        self.write_phys(at, &bytes[from..from + size as usize]);
    }

    /// A write of the instruction emulator's.
    fn emulate(&mut self, cpu: usize) {
        let (gva, user) = (self.gva(cpu), self.random.one_in(2));
        let bytes = self.random.next().to_le_bytes();
        let map = self.mmu.memory();
        let access = Access { user, ..Access::write() };
        let crosses = gva.page_offset() > PAGE - 8;
        let expected = self.expect(&map, cpu, gva, access);
        let result = self.cpus[cpu].vcpu().write(gva, &bytes, access);
        self.fresh.fill(false);
        if let (Ok(gpa), false) = (&expected.end, crosses) {
            self.written.extend(place(&map, *gpa));
        }
        let met = result.map_err(|error| match error {
            AccessError::Fault(fault) => SoftExit::Fault(fault),
            AccessError::Mmio { gpa, .. } => SoftExit::Mmio(gpa),
            AccessError::HostReadOnly { gpa } => SoftExit::HostReadOnly(gpa),
            other => unreachable!("neither locked nor the APIC's: {other}"),
        });
        if !crosses {
            assert_eq!(met.err(), expected.end.err(), "{gva} {user} {expected:x?}");
        }
    }

    fn range(&mut self) -> PageRange {
        let pages = self.random.pick(&[1, 1, 4, 512]);
        let base = match self.random.one_in(2) {
            true => (16 + self.random.below(TABLES_END - 16)) * PAGE,
            false => self.page(),
        };
        PageRange::Guest { base: Gpa(base), size: pages * PAGE }
    }

    /// What the VMM and the host do.
    fn manage(&mut self) {
        let mmu = self.mmu.clone();
        let id = SlotId(self.random.below(5) as u32);
        match self.random.below(12) {
            0 => mmu.zap_all(),
            1 => mmu.maintain(),
            2 => {
                let quota = [None, Some(64), Some(80)][self.random.below(3) as usize];
                mmu.set_nr_mmu_pages(quota).unwrap();
            }
            3 => drop(mmu.invalidate(self.range()).unwrap()),
            4 | 5 => {
                let (range, writable) = (self.range(), self.random.one_in(2));
                mmu.set_host_writable(range, writable).unwrap();
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
            6 => {
                mmu.clear_young(self.range(), |_, _, _| ()).unwrap();
            }
            7 => {
                let dirty = self.random.pick(&LOGS);
                let read_only = self.random.one_in(6);
                let Some(before) = mmu.memory().by_id(id).map(|slot| slot.flags()) else { return };
                mmu.set_slot_flags(id, SlotFlags { read_only, dirty }).unwrap();
                if before.dirty == DirtyMode::Off || dirty == DirtyMode::Off {
                    self.written.retain(|(slot, _)| *slot != id);
                }
            }
            8 => self.harvest(id),
            9 => {
                if mmu.memory().by_id(PASSING).is_some() {
                    mmu.delete_slot(PASSING).unwrap();
                    self.host_read_only.retain(|(slot, _)| *slot != PASSING);
                    self.written.retain(|(slot, _)| *slot != PASSING);
                } else {
                    let machine = Machine(TIB + 64 * MIB + self.random.pick(&[0, PAGE]));
                    let memory = Arc::new(AllocatedMemory::at(2 * MIB + 16 * PAGE, machine));
                    let at = self.random.pick(&PASSING_AT);
                    mmu.create_slot(SlotConfig::new(PASSING.0, Gpa(at), memory)).unwrap();
                }
            }
            10 => {
                let to = self.random.pick(&PASSING_AT);
                let _ = mmu.move_slot(PASSING, Gpa(to));
            }
            _ if self.random.one_in(2) => {
                let _ = mmu.remove_alias(0);
            }
            _ => {
                let base = self.random.pick(&[ALIAS_AT, 2 * MIB + PAGE, 24 * PAGE]);
                let target = Gpa(self.page());
                let alias = Alias { number: 0, base: Gpa(base), size: 4 * PAGE, target };
                mmu.set_alias(alias).unwrap();
            }
        }
    }

    fn harvest(&mut self, id: SlotId) {
        let map = self.mmu.memory();
        let Some(slot) = map.by_id(id).filter(|slot| slot.logs_dirty()) else { return };
        let mut bitmap = vec![0u64; slot.pages().div_ceil(64) as usize];
        self.mmu.dirty_log(id, &mut bitmap).unwrap();
        for (_, page) in self.written.iter().filter(|(slot, _)| *slot == id) {
            let set = bitmap[*page as usize / 64] >> (page % 64) & 1 != 0;
            assert!(set, "the write to page {page:#x} of {id} is not in the log");
        }
        self.written.retain(|(slot, _)| *slot != id);
    }

    fn step(&mut self) {
        let cpu = self.random.below(2) as usize;
        match self.random.below(40) {
            0..26 => self.access(cpu),
            26..31 => self.edit(cpu),
            31..33 => self.emulate(cpu),
            33..35 => self.write_register(cpu),
            35 => self.set_regs(cpu),
            36 if self.random.one_in(4) => self.audit(),
            _ => self.manage(),
        }
    }

    /// Everything at once.
    fn storm(&mut self, steps: u64) {
        let lane = |cpu: Option<SoftVcpu>, salt: u64| World {
            mmu: self.mmu.clone(),
            levels: self.levels,
            random: Random::new(salt),
            fresh: vec![false; cpu.iter().len()],
            tables: BTreeSet::new(),
            cpus: cpu.into_iter().collect(),
            host_read_only: self.host_read_only.clone(),
            written: BTreeSet::new(),
            recent: self.recent.clone(),
            changed: None,
            counts: [0; 3],
        };
        let cpus = core::mem::take(&mut self.cpus);
        let mut lanes: Vec<_> =
            cpus.into_iter().map(|cpu| lane(Some(cpu), self.random.next())).collect();
        let mut vmm = lane(None, self.random.next());
        std::thread::scope(|s| {
            for lane in &mut lanes {
                s.spawn(move || (0..steps).for_each(|_| lane.gust()));
            }
            s.spawn(|| (0..steps / 8).for_each(|_| vmm.manage()));
        });
        self.cpus = lanes.into_iter().flat_map(|lane| lane.cpus).collect();
        self.host_read_only = vmm.host_read_only;
        self.written.clear();
        self.cpus.iter_mut().for_each(|cpu| cpu.session().flush());
        self.fresh.fill(true);
    }

    /// Something that the only vCPU, or a device, does in a storm.
    fn gust(&mut self) {
        let (gva, user) = (self.gva(0), self.random.one_in(2));
        let value = match self.random.one_in(3) {
            true => self.wide_entry(WIDE[0]),
            false => self.random.next(),
        };
        let bytes = value.to_le_bytes();
        let mut seen = [0; 8];
        let which = self.random.below(40);
        let mut session = self.cpus[0].session();
        // Whatever it meets: the tables change under it.
        match which {
            0..8 => drop(session.load(gva, &mut seen, user)),
            8..10 => drop(session.fetch(gva, &mut seen, user)),
            10..18 => drop(session.store(gva, &bytes, user)),
            18..20 => drop(session.cmpxchg(Gva(gva.0 & !7), 8, 0, value.into(), user)),
            20..26 => session.invlpg(gva),
            26 => session.flush(),
            27..29 => {
                drop(session);
                let _ = self.cpus[0].vcpu().write(gva, &bytes, Access { user, ..Access::write() });
            }
            29..34 => {
                drop(session);
                self.edit(0);
            }
            34..38 => {
                drop(session);
                self.write_register(0);
            }
            _ => {
                drop(session);
                self.set_regs(0);
            }
        }
    }

    fn audit(&self) {
        self.mmu.audit().unwrap_or_else(|error| panic!("audit: {error}"));
    }
}

/// Whether an access touched entries of its own path.
fn overlaps(map: &MemoryMap, parts: &[(Expected, Gva, u64)]) -> bool {
    let meets = |gpa: Gpa, len: u64, step: &Step| {
        let (gpa, at) = (real(map, gpa), real(map, step.at));
        gpa.0 & !7 < at.0 + step.size && at.0 < (gpa.0 + len + 7) & !7
    };
    parts.iter().any(|(part, _, len)| {
        let steps = || parts.iter().flat_map(|(part, ..)| &part.steps);
        part.end.as_ref().is_ok_and(|gpa| steps().any(|step| meets(*gpa, *len, step)))
    })
}

fn unpaged() -> Regs {
    Regs { cr0: bits::CR0_PE, cr4: 0, efer: 0, ..Regs::long_mode(0) }
}

/// The slot and its page at an address.
fn place(map: &MemoryMap, gpa: Gpa) -> Option<(SlotId, u64)> {
    let alias = map.aliases().iter().find(|a| (a.base.0..a.base.0 + a.size).contains(&gpa.0));
    let gfn = match alias {
        Some(alias) => Gpa(gpa.0 - alias.base.0 + alias.target.0).gfn(),
        None => gpa.gfn(),
    };
    let slot =
        map.slots().find(|slot| (0..slot.pages()).contains(&gfn.0.wrapping_sub(slot.base().0)))?;
    assert_eq!(map.slot(gpa.gfn()).map(|slot| slot.id()), Some(slot.id()), "{}", Gfn(gfn.0));
    Some((slot.id(), gfn.0 - slot.base().0))
}

/// The address without aliases.
fn real(map: &MemoryMap, gpa: Gpa) -> Gpa {
    place(map, gpa).map_or(gpa, |(slot, page)| {
        map.by_id(slot).unwrap().base().gpa().wrapping_add(page * PAGE + gpa.page_offset())
    })
}

fn read(map: &MemoryMap, gpa: Gpa, size: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    let all = map.read(gpa, &mut bytes[..size as usize]) == size as usize;
    all.then(|| u64::from_le_bytes(bytes))
}

/// The address that is translated: linear-address masking, then 32 bits outside long mode (SDM
/// chapter 4, 5.1.1).
fn linear(regs: &Regs, gva: Gva, access: Access) -> u64 {
    if !regs.is_long() {
        return gva.0 & 0xffff_ffff;
    }
    let (high, five) = (gva.0 >> 63 != 0, regs.cr4 & bits::CR4_LA57 != 0);
    let top = match high {
        _ if access.kind == Kind::Execute => 63,
        true if regs.cr4 & bits::CR4_LAM_SUP != 0 => {
            if five {
                56
            } else {
                47
            }
        }
        false if regs.cr3 & bits::CR3_LAM_U57 != 0 => 56,
        false if regs.cr3 & bits::CR3_LAM_U48 != 0 => 47,
        _ => 63,
    };
    ((gva.0 << (63 - top)) as i64 >> (63 - top)) as u64
}

/// The entries that a walk which finds a page reads, as they are.
fn path(regs: &Regs, map: &MemoryMap, gva: Gva, access: Access) -> Vec<Step> {
    let mode = PagingMode::new(regs).unwrap();
    let gva = Gva(linear(regs, gva, access));
    let (mut steps, mut table, mut level) = (Vec::new(), mode.root_address(), mode.levels());
    if mode_of(regs) == Mode::Pae {
        level = 2;
        table = Gpa(regs.pdptrs[(gva.0 >> 30) as usize & 3] & bits::ADDR);
    }
    while level > 0 {
        let size = mode.entry_size();
        let at = table.wrapping_add(mode.index(gva, level) * size);
        // In a storm the tables may have changed since the walk.
        let Some(value) = read(map, at, size) else { break };
        let entry = mode.decode(value, level);
        steps.push(Step { at, size, value, leaf: matches!(entry, Entry::Leaf(_)) });
        match entry {
            Entry::Table(next) => table = next,
            _ => break,
        }
        level -= 1;
    }
    steps
}

struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with MODES_ONLY={}", self.0);
        }
    }
}

fn sequence(levels: u8, largest: u64, seed: u64) -> [u64; 3] {
    let _named = Named(seed);
    let mut world = World::new(levels, largest, seed);
    for _ in 0..setting("MODES_STEPS", 600) {
        world.step();
        if setting("MODES_AUDIT", 0) != 0 {
            world.audit();
        }
    }
    (0..5).for_each(|id| world.harvest(SlotId(id)));
    world.audit();
    world.mmu.maintain();
    world.audit();
    world.counts
}

fn sequences(levels: u8, largest: u64) {
    let first = setting("MODES_SEED", 1) << 32;
    let only = setting("MODES_ONLY", 0);
    let seeds =
        if only == 0 { first..first + setting("MODES_SEQUENCES", 60) } else { only..only + 1 };
    let mut counts = [0; 3];
    for seed in seeds {
        let met = sequence(levels, largest, seed);
        counts.iter_mut().zip(met).for_each(|(count, n)| *count += n);
    }
    eprintln!("{levels} levels, pages of {largest:#x}: {counts:?} accesses, devices, faults");
    assert!(only != 0 || counts.iter().all(|count| *count > 100), "{counts:?}");
}

/// After everything at once, everything agrees.
#[test]
fn storms_end_in_agreement() {
    let (first, only) = (setting("MODES_SEED", 1) << 32, setting("MODES_ONLY", 0));
    let shapes = [(4, PAGE), (4, 2 * MIB), (4, GIB), (5, GIB)];
    let mut counts = [0; 3];
    for (n, shape) in (0..setting("MODES_STORMS", 24)).zip(shapes.into_iter().cycle()) {
        let seed = if only == 0 { first + n } else { only };
        let _named = Named(seed);
        let mut world = World::new(shape.0, shape.1, seed);
        for _ in 0..4 {
            world.storm(400);
            world.audit();
            for _ in 0..150 {
                let cpu = world.random.below(2) as usize;
                world.access(cpu);
            }
            world.audit();
        }
        counts.iter_mut().zip(world.counts).for_each(|(count, n)| *count += n);
    }
    assert!(counts.iter().all(|count| *count > 100), "{counts:?}");
}

#[test]
fn on_four_levels_with_small_pages() {
    sequences(4, PAGE);
}

#[test]
fn on_four_levels_with_2m_pages() {
    sequences(4, 2 * MIB);
}

#[test]
fn on_four_levels_with_1g_pages() {
    sequences(4, GIB);
}

#[test]
fn on_five_levels_with_small_pages() {
    sequences(5, PAGE);
}

#[test]
fn on_five_levels_with_2m_pages() {
    sequences(5, 2 * MIB);
}

#[test]
fn on_five_levels_with_1g_pages() {
    sequences(5, GIB);
}
