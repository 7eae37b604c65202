// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An address space for the length of one read section: where the parts of an access go, and the
//! accesses themselves.
//!
//! Every part is translated, and every refusal known, before the first byte is read or written.
//! The translations of one access are of one memory map (R31).

use super::error::{AccessError, Fragment};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE};
use crate::memory::words::{self, Exchange};
use crate::memory::{Hint, MemoryMap, Page};
use crate::paging::{Access, Kind, PagingMode, Path, Reason};
use crate::shadow::{Engine, Stats, withheld};
use crate::sync::epoch::Guard;
use crate::sync::rule;
use core::ops::Range;

/// See the module.
pub(super) struct Space<'a> {
    pub(super) engine: &'a Engine,
    pub(super) stats: &'a Stats,
    pub(super) guard: &'a Guard<'a>,
    pub(super) map: &'a MemoryMap,
    pub(super) mode: &'a PagingMode,
    pub(super) hint: &'a Hint,
}

/// The bytes of an access in one page.
pub(super) struct Part<'a> {
    pub(super) gpa: Gpa,
    /// Which bytes of the access.
    pub(super) bytes: Range<usize>,
    pub(super) target: Target<'a>,
}

/// Where a part goes.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    Memory(Page<'a>),
    Device,
    Apic,
}

/// The parts of an access, in the order of their addresses. Only an access that crosses a page
/// allocates.
#[derive(Default)]
pub(super) struct Parts<'a> {
    first: Option<Part<'a>>,
    rest: Vec<Part<'a>>,
}

impl<'a> Parts<'a> {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Part<'a>> {
        self.first.iter().chain(&self.rest)
    }

    /// The parts in memory: page, offset in it, bytes of the access.
    pub(super) fn memory(&self) -> impl Iterator<Item = (Page<'a>, u64, Range<usize>)> {
        self.iter().filter_map(|part| match part.target {
            Target::Memory(page) => Some((page, part.gpa.page_offset(), part.bytes.clone())),
            _ => None,
        })
    }

    /// Refuses an access that is not all in memory.
    pub(super) fn all_in_memory(self) -> Result<Self, AccessError> {
        let refused = self.iter().find_map(|part| match part.target {
            Target::Memory(_) => None,
            Target::Device => Some(AccessError::Mmio { gpa: part.gpa, len: part.bytes.len() }),
            Target::Apic => Some(AccessError::Apic { gpa: part.gpa }),
        });
        refused.map_or(Ok(self), Err)
    }

    /// What is left to the VMM.
    pub(super) fn fragments(&self) -> Vec<Fragment> {
        /// Bytes that a bus carries at once (KVM_EXIT_MMIO's `data`).
        const WIDTH: usize = 8;
        let left = self.iter().filter(|part| !matches!(part.target, Target::Memory(_)));
        let pieces = left.flat_map(|part| {
            let apic = matches!(part.target, Target::Apic);
            part.bytes.clone().step_by(WIDTH).map(move |at| Fragment {
                gpa: part.gpa.wrapping_add((at - part.bytes.start) as u64),
                bytes: at..part.bytes.end.min(at + WIDTH),
                apic,
            })
        });
        pieces.collect()
    }
}

impl<'a> Space<'a> {
    /// Where each part of an access goes. With `store` it is about to be written; `apic` is the
    /// APIC's page, which comes before memory.
    ///
    /// The fault is that of the first page that has one. It is known before any accessed or dirty bit
    /// is set, unless the guest changes its tables meanwhile.
    pub(super) fn plan(
        &self,
        gva: Gva,
        len: usize,
        access: Access,
        store: bool,
        apic: Option<Gfn>,
    ) -> Result<Parts<'a>, AccessError> {
        let mut parts = split(gva, len);
        let Some((at, bytes)) = parts.next() else { return Ok(Parts::default()) };
        if bytes.end < len {
            let fault = |(at, _)| self.mode.translate(self.map, self.hint, at, Some(access)).err();
            // An address is checked before it is translated (SDM vol. 1, 3.3.7.1): that the end is
            // not canonical comes before the page fault of the beginning.
            let faults = split(gva, len).filter_map(fault);
            if let Some(fault) = faults.min_by_key(|f| f.reason != Reason::NonCanonical) {
                return Err(fault.into());
            }
        }
        let place = |(at, bytes)| self.place(at, bytes, access, store, apic);
        let first = Some(place((at, bytes))?);
        Ok(Parts { first, rest: parts.map(place).collect::<Result<_, _>>()? })
    }

    fn place(
        &self,
        gva: Gva,
        bytes: Range<usize>,
        access: Access,
        store: bool,
        apic: Option<Gfn>,
    ) -> Result<Part<'a>, AccessError> {
        let gpa = self.locate(gva, access)?;
        // R31: the map that was walked.
        let map = if rule!(R31) { self.map } else { self.engine.memory.load(self.guard) };
        let page = map.page(gpa.gfn()).filter(|page| {
            // A model's pages are shorter.
            !cfg!(loom) || gpa.page_offset() as usize + bytes.len() <= size_of_val(page.words())
        });
        let target = match page {
            _ if apic == Some(gpa.gfn()) => Target::Apic,
            Some(page) if !store || page.is_writable() => Target::Memory(page),
            Some(page) if !page.slot.is_read_only() => {
                return Err(AccessError::HostReadOnly { gpa });
            }
            _ => Target::Device,
        };
        Ok(Part { gpa, bytes, target })
    }

    /// Walks, and sets accessed and dirty bits.
    pub(super) fn locate(&self, gva: Gva, access: Access) -> Result<Gpa, AccessError> {
        let Self { map, mode, .. } = *self;
        let mut path = Path::default();
        let walk = mode.walk_path(map, self.hint, gva, access, &mut path)?;
        self.engine.guest_walked(self.stats, self.guard, map, mode, &path);
        // The guest's entry may be in memory that the host has made read-only.
        match withheld(map, &path, access.kind == Kind::Write) {
            Some(gpa) => Err(AccessError::HostReadOnly { gpa }),
            None => Ok(walk.gpa),
        }
    }

    /// Reads the parts in memory.
    pub(super) fn load(&self, parts: &Parts<'_>, buf: &mut [u8], kind: Kind) {
        let mut load = || {
            for (page, offset, bytes) in parts.memory() {
                words::load(page.words(), offset, &mut buf[bytes]);
            }
        };
        let word = |part: &Part<'_>| part.gpa.page_offset() as usize % 8 + part.bytes.len() <= 8;
        if kind != Kind::Execute || parts.rest.is_empty() && parts.first.iter().all(word) {
            return load();
        }
        // R39: an instruction that is being patched.
        self.engine.patches.read(load);
    }

    /// Writes the parts in memory; tells the dirty log and the shadow.
    pub(super) fn store(&self, parts: &Parts<'_>, bytes: &[u8]) {
        for (page, offset, part) in parts.memory() {
            let end = offset + part.len() as u64;
            words::store(page.words(), offset, &bytes[part]);
            self.wrote(page, offset..end);
        }
    }

    /// Compares and exchanges.
    pub(super) fn cmpxchg(
        &self,
        gva: Gva,
        size: usize,
        (old, new): (u128, u128),
        access: Access,
        apic: Option<Gfn>,
    ) -> Result<Result<(), u128>, AccessError> {
        let unsupported = AccessError::Unsupported { gva, size };
        let exchange = Exchange::new(gva.0, size, old, new).ok_or(unsupported)?;
        let access = Access { kind: Kind::Write, ..access };
        let parts = self.plan(gva, size, access, true, apic)?.all_in_memory()?;
        let Some((page, offset, _)) = parts.memory().next().filter(|_| parts.rest.is_empty())
        else {
            return Err(unsupported);
        };
        let words = page.words().get((offset / 8) as usize..).unwrap_or_default();
        let result = exchange.apply(words).ok_or(unsupported)?;
        if result.is_ok() {
            self.wrote(page, offset..offset + size as u64);
        }
        Ok(result)
    }

    fn wrote(&self, page: Page<'_>, bytes: Range<u64>) {
        let Self { engine, stats, guard, map, hint, .. } = *self;
        engine.wrote(stats, guard, map, hint.ring(), page, bytes);
    }
}

/// Splits an access by pages: the address of each part and its place in the buffer.
pub(in crate::vcpu) fn split(gva: Gva, len: usize) -> impl Iterator<Item = (Gva, Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = gva.wrapping_add(done as u64);
        let part = ((PAGE_SIZE - at.page_offset()) as usize).min(len - done);
        done += part;
        (part > 0).then(|| (at, done - part..done))
    })
}
