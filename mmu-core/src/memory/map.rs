// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The published map of memslots, and reads and writes through it.

use super::index::{Index, View};
use super::{Slot, SlotConfig, SlotError, SlotId};
use crate::addr::{Gfn, Gpa, Machine, PAGE_SHIFT, PAGE_SIZE};
use crate::sync::{AtomicU64, Life, Ordering, Snapshot};
use core::cell::Cell;
use std::sync::Arc;

/// Most slots of one map.
const MAX_SLOTS: usize = 32_764;

/// Remembers where the last look-up ended, so that the next one in the same slot costs an add and
/// a compare. Belongs to one reader.
#[derive(Clone, Debug, Default)]
pub struct Hint(Cell<u32>);

/// An immutable map from guest-physical memory to memslots.
#[derive(Debug)]
pub struct MemoryMap {
    generation: u64,
    /// Sorted by guest frame.
    slots: Box<[Arc<Slot>]>,
    /// Of `slots`.
    index: Index,
    /// Sorted by machine address. Also holds slots that are being deleted: until every shadow
    /// entry that maps their memory is gone, its page must be found from the entry (R14, R27).
    by_machine: Box<[Arc<Slot>]>,
    life: Life,
}

impl Snapshot for MemoryMap {
    fn life(&self) -> &Life {
        &self.life
    }
}

impl MemoryMap {
    pub(super) fn empty() -> Self {
        Self {
            generation: 0,
            slots: [].into(),
            index: Index::default(),
            by_machine: [].into(),
            life: Life::default(),
        }
    }

    /// A map of these slots, for readers that have no engine: memory images, tests, debuggers.
    ///
    /// # Errors
    ///
    /// What is wrong with the first slot that does not fit.
    pub fn build(slots: impl IntoIterator<Item = SlotConfig>) -> Result<Self, SlotError> {
        slots.into_iter().try_fold(Self::empty(), |map, slot| map.with(slot))
    }

    /// The map with one slot more.
    pub(crate) fn with(&self, config: SlotConfig) -> Result<Self, SlotError> {
        let id = config.id;
        let base = config.base;
        let slot = Slot::new(config)?;
        if self.by_id(id).is_some() {
            return Err(SlotError::Exists(id));
        }
        if self.slots.len() >= MAX_SLOTS {
            return Err(SlotError::TooMany { id, limit: MAX_SLOTS });
        }
        let at = self.slots.partition_point(|s| s.base() < slot.base());
        let end = slot.base().0 + slot.pages();
        let before = at.checked_sub(1).and_then(|i| self.slots.get(i));
        let before = before.filter(|s| s.contains(slot.base()));
        if let Some(other) = before.or(self.slots.get(at).filter(|s| s.base().0 < end)) {
            return Err(SlotError::Overlap { id, base, other: other.id() });
        }
        let machine = slot.machine();
        let machine_end = machine.0 + (slot.pages() << PAGE_SHIFT);
        let at_machine = self.by_machine.partition_point(|s| s.machine() < machine);
        let before = at_machine.checked_sub(1).and_then(|i| self.by_machine.get(i));
        let before = before.filter(|s| s.machine().0 + (s.pages() << PAGE_SHIFT) > machine.0);
        let after = self.by_machine.get(at_machine).filter(|s| s.machine().0 < machine_end);
        if let Some(other) = before.or(after) {
            return Err(SlotError::SharedBacking { id, machine, other: other.id() });
        }
        let slot = Arc::new(slot);
        let mut slots = self.slots.to_vec();
        slots.insert(at, Arc::clone(&slot));
        let mut by_machine = self.by_machine.to_vec();
        by_machine.insert(at_machine, slot);
        Ok(self.next(slots, by_machine))
    }

    /// The map without the slot: guest-physical look-ups miss it, machine look-ups still find it.
    pub(crate) fn hiding(&self, id: SlotId) -> Result<(Self, Arc<Slot>), SlotError> {
        let slot = Arc::clone(self.by_id(id).ok_or(SlotError::NoSuchSlot(id))?);
        let slots = self.slots.iter().filter(|s| s.id() != id).cloned().collect();
        Ok((self.next(slots, self.by_machine.to_vec()), slot))
    }

    /// The map in which machine look-ups miss the slot as well.
    pub(crate) fn forgetting(&self, slot: &Arc<Slot>) -> Self {
        let by_machine = self.by_machine.iter().filter(|s| !Arc::ptr_eq(s, slot)).cloned();
        self.next(self.slots.to_vec(), by_machine.collect())
    }

    fn next(&self, slots: Vec<Arc<Slot>>, by_machine: Vec<Arc<Slot>>) -> Self {
        Self {
            generation: self.generation + 1,
            index: Index::new(&slots),
            slots: slots.into(),
            by_machine: by_machine.into(),
            life: Life::default(),
        }
    }

    /// Counts the maps published before this one.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The slots, by guest frame.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = &Arc<Slot>> {
        self.slots.iter()
    }

    /// The slot with this number.
    #[must_use]
    pub fn by_id(&self, id: SlotId) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|s| s.id() == id)
    }

    /// The slot that holds the frame.
    #[inline]
    #[must_use]
    pub fn slot(&self, gfn: Gfn, hint: &Hint) -> Option<&Arc<Slot>> {
        self.life.check();
        let at = self.index.find(gfn, hint.0.get() as usize)?;
        hint.0.set(at as u32);
        self.slots.get(at)
    }

    /// The memory of the slot that holds the frame.
    #[inline]
    pub(crate) fn view(&self, gfn: Gfn, hint: &Hint) -> Option<View<'_>> {
        self.life.check();
        let at = self.index.find(gfn, hint.0.get() as usize)?;
        hint.0.set(at as u32);
        self.view_at(at)
    }

    /// The same, neither trying nor changing a hint.
    #[inline]
    pub(crate) fn view_unhinted(&self, gfn: Gfn) -> Option<View<'_>> {
        self.life.check();
        self.view_at(self.index.search(gfn)?)
    }

    #[inline]
    fn view_at(&self, at: usize) -> Option<View<'_>> {
        let slot = self.index.slot(at)?;
        // SAFETY: `slots` keeps the slot alive as long as this map lives, and with it the memory,
        // which `Backing` promises to stay where it is and to be used as atomics only.
        Some(View { base: slot.base().gpa(), words: unsafe { slot.words().as_ref() } })
    }

    /// The slot and page index that a machine address belongs to.
    #[must_use]
    pub(crate) fn by_machine(&self, machine: Machine) -> Option<(&Arc<Slot>, usize)> {
        self.life.check();
        let at = self.by_machine.partition_point(|s| s.machine() <= machine).checked_sub(1)?;
        let slot = &self.by_machine[at];
        let index = (machine.0 - slot.machine().0) >> PAGE_SHIFT;
        (index < slot.pages()).then_some((slot, index as usize))
    }

    /// The 8-byte word at `gpa` (rounded down to a multiple of 8), if it lies in a slot.
    #[inline]
    #[must_use]
    pub fn word(&self, gpa: Gpa, hint: &Hint) -> Option<&AtomicU64> {
        let slot = self.slot(gpa.gfn(), hint)?;
        slot.word(slot.index_of(gpa.gfn()), gpa.page_offset())
    }

    /// Copies guest-physical memory out; returns how many bytes could be read before the first
    /// one that lies in no slot. Each aligned 8-byte word is read atomically.
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> usize {
        let hint = Hint::default();
        let mut done = 0;
        while done < buf.len() {
            let at = gpa.wrapping_add(done as u64);
            let Some(word) = self.word(at, &hint) else { break };
            let skip = (at.0 % 8) as usize;
            let n = (8 - skip).min(buf.len() - done);
            // Acquire: what a vCPU stored before it stored this word is seen.
            let bytes = word.load(Ordering::Acquire).to_le_bytes();
            buf[done..done + n].copy_from_slice(&bytes[skip..skip + n]);
            done += n;
        }
        done
    }

    /// Copies into guest-physical memory without telling the shadow; returns how many bytes could
    /// be written before the first one that lies in no slot. Marks the pages dirty after the
    /// bytes are there (R13). A part of an aligned word is written atomically together with the
    /// rest of the word as it is.
    pub(crate) fn write(&self, gpa: Gpa, bytes: &[u8]) -> usize {
        let hint = Hint::default();
        let mut done = 0;
        while done < bytes.len() {
            let at = gpa.wrapping_add(done as u64);
            let Some(slot) = self.slot(at.gfn(), &hint) else { break };
            let index = slot.index_of(at.gfn());
            let page = ((PAGE_SIZE - at.page_offset()) as usize).min(bytes.len() - done);
            for (word, value, mask) in words_of(at.page_offset(), &bytes[done..done + page]) {
                let Some(cell) = slot.word(index, word) else { return done };
                store_masked(cell, value, mask);
            }
            slot.mark_dirty(index);
            done += page;
        }
        done
    }
}

/// Splits bytes at `offset` into aligned words: (offset of the word, value, mask).
fn words_of(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
    let mut at = 0;
    core::iter::from_fn(move || {
        let left = bytes.get(at..).filter(|left| !left.is_empty())?;
        let byte = offset + at as u64;
        let skip = (byte % 8) as usize;
        let n = (8 - skip).min(left.len());
        let (mut value, mut mask) = ([0; 8], [0; 8]);
        value[skip..skip + n].copy_from_slice(&left[..n]);
        mask[skip..skip + n].fill(0xff);
        at += n;
        Some((byte - skip as u64, u64::from_le_bytes(value), u64::from_le_bytes(mask)))
    })
}

/// Stores the bytes under `mask`; the others keep what a vCPU may be writing to them.
pub(crate) fn store_masked(cell: &AtomicU64, value: u64, mask: u64) {
    if mask == u64::MAX {
        // Release: a vCPU that sees the word sees what was written before it.
        return cell.store(value, Ordering::Release);
    }
    let mut old = cell.load(Ordering::Relaxed);
    while let Err(now) =
        cell.compare_exchange_weak(old, old & !mask | value, Ordering::Release, Ordering::Relaxed)
    {
        old = now;
    }
}

/// Exchanges the bytes under `mask` if they are `old`; the others keep what they are. The bytes as
/// they were if they are not.
pub(crate) fn exchange_masked(cell: &AtomicU64, old: u64, new: u64, mask: u64) -> Result<(), u64> {
    let mut now = cell.load(Ordering::Acquire);
    loop {
        if now & mask != old & mask {
            return Err(now & mask);
        }
        let next = now & !mask | new & mask;
        // AcqRel: a locked instruction orders everything around it (SDM vol. 3, 9.2.2).
        match cell.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Ok(()),
            Err(changed) => now = changed,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::AllocatedMemory;
    use super::*;

    fn slot(id: u32, base: u64, size: u64) -> SlotConfig {
        SlotConfig::new(id, Gpa(base), Arc::new(AllocatedMemory::new(size)))
    }

    fn map(slots: &[(u32, u64, u64)]) -> MemoryMap {
        slots.iter().fold(MemoryMap::empty(), |m, (i, b, s)| m.with(slot(*i, *b, *s)).unwrap())
    }

    #[test]
    fn refuses_each_mistake_by_name() {
        let m = map(&[(0, 0x10000, 0x4000)]);
        let id = SlotId(1);
        let with = |c: SlotConfig| m.with(c).unwrap_err();
        let sized = |base, size| SlotConfig { size, ..slot(1, base, 0x8000) };
        assert_eq!(with(sized(0, 0)), SlotError::ZeroSize(id));
        assert_eq!(with(sized(0, 0x1001)), SlotError::MisalignedSize { id, size: 0x1001 });
        assert_eq!(with(sized(8, 0x1000)), SlotError::MisalignedBase { id, base: Gpa(8) });
        let base = Gpa((1 << 52) - 0x1000);
        assert_eq!(with(sized(base.0, 0x2000)), SlotError::WrapsAround { id, base, size: 0x2000 });
        let base = Gpa(u64::MAX - 0xfff);
        assert_eq!(with(sized(base.0, 0x1000)), SlotError::WrapsAround { id, base, size: 0x1000 });
        let size = 0x9000;
        let small = SlotError::BackingTooSmall { id, size, backing: 0x8000 };
        assert_eq!(with(sized(0, size)), small);
        for (base, size) in
            [(0xf000, 0x2000), (0x13000, 0x1000), (0x11000, 0x1000), (0xf000, 0x8000)]
        {
            let overlap = SlotError::Overlap { id, base: Gpa(base), other: SlotId(0) };
            assert_eq!(with(sized(base, size)), overlap);
        }
        assert_eq!(with(slot(0, 0x100000, 0x1000)), SlotError::Exists(SlotId(0)));
        let backing = Arc::clone(m.by_id(SlotId(0)).unwrap().backing());
        let machine = backing.machine();
        let shared = SlotError::SharedBacking { id, machine, other: SlotId(0) };
        assert_eq!(with(SlotConfig::new(1, Gpa(0x100000), backing)), shared);
        let machine = Machine(0x1001);
        let odd = Arc::new(AllocatedMemory::at(0x1000, machine));
        let bad = SlotError::BadMachineAddress { id, machine };
        assert_eq!(with(SlotConfig::new(1, Gpa(0x100000), odd)), bad);
        assert_eq!(m.hiding(id).unwrap_err(), SlotError::NoSuchSlot(id));
        assert!(m.with(sized(0x14000, 0x1000)).is_ok() && m.with(sized(0xf000, 0x1000)).is_ok());
    }

    #[test]
    fn finds_slots_by_frame_and_by_machine_address() {
        let m = map(&[(3, 0x8000, 0x2000), (1, 0, 0x1000), (2, 0x20000, 0x3000)]);
        let hint = Hint::default();
        let id = |gfn| m.slot(Gfn(gfn), &hint).map(|s| s.id().0);
        let found: Vec<_> = [0, 1, 8, 9, 10, 0x20, 0x22, 0x23, 8, 0].map(id).into();
        assert_eq!(
            found,
            [Some(1), None, Some(3), Some(3), None, Some(2), Some(2), None, Some(3), Some(1)]
        );
        let slot = m.by_id(SlotId(2)).unwrap();
        let (found, index) = m.by_machine(Machine(slot.machine_of(2).0 + 5)).unwrap();
        assert_eq!((found.id(), index), (SlotId(2), 2));
        let (hidden, slot) = m.hiding(SlotId(2)).unwrap();
        assert!(hidden.slot(Gfn(0x20), &hint).is_none());
        assert!(hidden.by_machine(slot.machine()).is_some());
        assert!(hidden.forgetting(&slot).by_machine(slot.machine()).is_none());
    }

    #[test]
    fn reads_and_writes_bytes_across_words_pages_and_slots() {
        let m = map(&[(0, 0, 0x1000), (1, 0x1000, 0x2000)]);
        let bytes: Vec<u8> = (0..100).collect();
        for at in [0, 3, 0xfc3, 0x1ffd] {
            assert_eq!(m.write(Gpa(at), &bytes), 100);
            let mut back = [0; 100];
            assert_eq!(m.read(Gpa(at), &mut back), 100);
            assert_eq!(back[..], bytes[..]);
        }
        m.write(Gpa(8), &[0xff; 8]);
        m.write(Gpa(11), &[1, 2]);
        assert_eq!(
            m.word(Gpa(8), &Hint::default()).unwrap().load(Ordering::Relaxed),
            0xffff_ff02_01ff_ffff
        );
        assert_eq!(m.write(Gpa(0x2ffe), &bytes), 2);
        assert_eq!(m.read(Gpa(0x2ffe), &mut [0; 9]), 2);
        assert_eq!(m.read(Gpa(0x3000), &mut [0; 9]), 0);
    }

    #[test]
    fn logs_writes() {
        let m = MemoryMap::empty().with(slot(0, 0, 0x80000).log_dirty()).unwrap();
        m.write(Gpa(0xfff), &[1, 2]);
        m.write(Gpa(0x41000), &[1]);
        let s = m.by_id(SlotId(0)).unwrap();
        assert!(s.is_dirty(0x41) && !s.is_dirty(2));
        assert_eq!((s.take_dirty(0), s.take_dirty(1), s.take_dirty(9)), (3, 2, 0));
        assert_eq!(s.take_dirty(0), 0);
    }
}
