// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an access should do: by the walker, which the shadow has no part in, the memory map and the
//! host's wishes.

use crate::guest::{Mode, mode_of};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{MemoryMap, SlotId};
use mmu_core::paging::{Access, Entry, Fault, Kind, PagingMode, Regs, bits};
use mmu_core::vcpu::Vcpu;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A slot and a page in it.
pub type Place = (SlotId, u64);

/// An entry of a path.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub at: Gpa,
    pub size: u64,
    pub value: u64,
    pub leaf: bool,
}

/// Where the bytes of an access in one page go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Fault(Fault),
    /// An accessed or dirty bit cannot be set, or the page not be written, because of the host.
    HostReadOnly(Gpa),
    Device(Gpa),
    Memory(Gpa),
}

/// The bytes of an access in one page.
#[derive(Clone, Debug)]
pub struct Part {
    pub bytes: Range<usize>,
    pub end: End,
    pub steps: Vec<Step>,
}

impl Part {
    /// Where in memory.
    pub fn gpa(&self) -> Option<Gpa> {
        if let End::Memory(gpa) = self.end { Some(gpa) } else { None }
    }
}

/// An access by a vCPU at one moment.
pub struct Moment<'a> {
    pub map: &'a MemoryMap,
    pub vcpu: &'a Vcpu,
    pub host_read_only: &'a BTreeSet<Place>,
}

impl Moment<'_> {
    /// The parts of an access, in ascending order. With `store` the pages are about to be written.
    pub fn parts(&self, gva: Gva, len: usize, access: Access, store: bool) -> Vec<Part> {
        let first = len.min((0x1000 - gva.page_offset()) as usize);
        [0..first, first..len]
            .into_iter()
            .filter(|bytes| !bytes.is_empty())
            .map(|bytes| self.part(gva.wrapping_add(bytes.start as u64), bytes, access, store))
            .collect()
    }

    fn part(&self, gva: Gva, bytes: Range<usize>, access: Access, store: bool) -> Part {
        let map = self.map;
        let walk = match self.vcpu.walker().translate(gva, Some(access)) {
            Ok(walk) => walk,
            Err(fault) => return Part { bytes, end: End::Fault(fault), steps: Vec::new() },
        };
        let steps = path(self.vcpu.regs(), map, gva, access);
        let lacks = |step: &&Step| {
            let needed = marks(step, access);
            step.value & needed != needed && !is_read_only(map, step.at) && self.is_hosts(step.at)
        };
        let gpa = walk.gpa;
        let end = if let Some(step) = steps.iter().find(lacks) {
            End::HostReadOnly(step.at)
        } else if store {
            self.end_of_store(gpa)
        } else if map.slot(gpa.gfn()).is_none() {
            End::Device(gpa)
        } else {
            End::Memory(gpa)
        };
        Part { bytes, end, steps }
    }

    /// Where bytes go that are written, whatever the guest's tables say.
    pub fn end_of_store(&self, gpa: Gpa) -> End {
        match self.map.slot(gpa.gfn()) {
            Some(slot) if !slot.is_read_only() && self.is_hosts(gpa) => End::HostReadOnly(gpa),
            Some(slot) if !slot.is_read_only() => End::Memory(gpa),
            _ => End::Device(gpa),
        }
    }

    /// Whether the host has made the page read-only.
    fn is_hosts(&self, gpa: Gpa) -> bool {
        place(self.map, gpa).is_some_and(|place| self.host_read_only.contains(&place))
    }

    /// Accessed in all entries that the parts passed, dirty in the leaves of a write; no other bit.
    pub fn check_marks(&self, parts: &[Part], access: Access) {
        let mut after: BTreeMap<(Gpa, u64), (Step, u64)> = BTreeMap::new();
        for step in parts.iter().flat_map(|part| &part.steps) {
            let fixed = is_read_only(self.map, step.at) || self.is_hosts(step.at);
            let marks = if fixed { 0 } else { marks(step, access) };
            let key = (real(self.map, step.at), step.size);
            after.entry(key).or_insert((*step, step.value)).1 |= marks;
        }
        for (step, after) in after.into_values() {
            let now = read(self.map, step.at, step.size);
            assert_eq!(now, Some(after), "{step:x?} {access:?} {parts:x?}");
        }
    }

    /// Bytes of the parts in memory; those of devices are 0.
    pub fn bytes(&self, parts: &[Part], len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for part in parts {
            if let Some(gpa) = part.gpa() {
                let buf = &mut bytes[part.bytes.clone()];
                assert_eq!(self.map.read(gpa, buf), buf.len(), "{part:x?}");
            }
        }
        bytes
    }
}

fn marks(step: &Step, access: Access) -> u64 {
    bits::A | if access.kind == Kind::Write && step.leaf { bits::D } else { 0 }
}

/// Whether an access touches entries of its own path, which it also marks.
pub fn overlaps(map: &MemoryMap, parts: &[Part]) -> bool {
    let meets = |gpa: Gpa, len: u64, step: &Step| {
        let (gpa, at) = (real(map, gpa), real(map, step.at));
        gpa.0 & !7 < at.0 + step.size && at.0 < (gpa.0 + len + 7) & !7
    };
    let steps = || parts.iter().flat_map(|part| &part.steps);
    let touches = |part: &Part| {
        let len = part.bytes.len() as u64;
        part.gpa().is_some_and(|gpa| steps().any(|step| meets(gpa, len, step)))
    };
    parts.iter().any(touches)
}

/// Whether two parts are of the same memory.
pub fn is_twofold(map: &MemoryMap, parts: &[Part]) -> bool {
    let pages: Vec<_> = parts.iter().filter_map(Part::gpa).map(|gpa| place(map, gpa)).collect();
    pages.len() == 2 && pages[0] == pages[1]
}

fn is_read_only(map: &MemoryMap, gpa: Gpa) -> bool {
    map.slot(gpa.gfn()).is_some_and(|slot| slot.is_read_only())
}

/// The slot and its page at an address.
pub fn place(map: &MemoryMap, gpa: Gpa) -> Option<Place> {
    let alias = map.aliases().iter().find(|a| (a.base.0..a.base.0 + a.size).contains(&gpa.0));
    let gfn = match alias {
        Some(alias) => Gpa(gpa.0 - alias.base.0 + alias.target.0).gfn(),
        None => gpa.gfn(),
    };
    let slot =
        map.slots().find(|slot| (0..slot.pages()).contains(&gfn.0.wrapping_sub(slot.base().0)));
    assert_eq!(map.slot(gpa.gfn()).map(|slot| slot.id()), slot.map(|slot| slot.id()), "{gpa}");
    slot.map(|slot| (slot.id(), gfn.0 - slot.base().0))
}

/// The address without aliases.
fn real(map: &MemoryMap, gpa: Gpa) -> Gpa {
    place(map, gpa).map_or(gpa, |(slot, page)| {
        let base = map.by_id(slot).expect("it was found").base().gpa();
        base.wrapping_add(page * 0x1000 + gpa.page_offset())
    })
}

fn read(map: &MemoryMap, gpa: Gpa, size: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    let all = map.read(gpa, &mut bytes[..size as usize]) == size as usize;
    all.then(|| u64::from_le_bytes(bytes))
}

/// The address that is translated: linear-address masking, then 32 bits outside long mode (SDM
/// chapter 4, 5.1.1).
pub fn linear(regs: &Regs, gva: Gva, access: Access) -> Gva {
    if !regs.is_long() {
        return Gva(gva.0 & 0xffff_ffff);
    }
    let (high, five) = (gva.0 >> 63 != 0, regs.cr4 & bits::CR4_LA57 != 0);
    let top = match high {
        _ if access.kind == Kind::Execute || access.implicit => 63,
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
    Gva(((gva.0 << (63 - top)) as i64 >> (63 - top)) as u64)
}

/// The entries that a walk which finds a page reads, as they are.
fn path(regs: &Regs, map: &MemoryMap, gva: Gva, access: Access) -> Vec<Step> {
    let mode = PagingMode::new(regs).expect("the vCPU has them");
    let gva = linear(regs, gva, access);
    let (mut steps, mut table, mut level) = (Vec::new(), mode.root_address(), mode.levels());
    if mode_of(regs) == Mode::Pae {
        level = 2;
        table = Gpa(regs.pdptrs[(gva.0 >> 30) as usize & 3] & bits::ADDR);
    }
    while level > 0 {
        let size = mode.entry_size();
        let at = table.wrapping_add(mode.index(gva, level) * size);
        let value = read(map, at, size).expect("the walk read it");
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
