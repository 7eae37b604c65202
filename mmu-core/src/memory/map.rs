// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The published map of memslots, and reads and writes through it.

use super::alias::{Alias, AliasError};
use super::ranges::Ranges;
use super::slot::Page;
use super::{DirtyMode, DirtyRing, Region, Slot, SlotConfig, SlotError, SlotFlags, SlotId, words};
use crate::addr::{Gfn, Gpa, Machine, PAGE_SHIFT, PAGE_SIZE};
use crate::memory::PAGE_WORDS;
use crate::sync::{AtomicU64, Life, Ordering, Snapshot, unique};
use core::cell::Cell;
use core::ops::Range;
use core::ptr::NonNull;
use std::sync::Arc;

/// Most slots of one map.
pub const MAX_SLOTS: usize = 32_764;

/// A stretch of guest-physical memory, as a look-up finds it.
#[derive(Clone, Debug)]
struct Place {
    /// The first word: of the slot, or of the part that an alias shows.
    words: NonNull<AtomicU64>,
    slot: Arc<Slot>,
}

// SAFETY: `words` points to memory shared as atomics, which the slot keeps alive.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    fn new(slot: Arc<Slot>, first: usize) -> Self {
        // From the slice, not from one word: the pointer must be good for all that follow.
        let words = NonNull::from(&slot.region().words()[first * PAGE_WORDS..]).cast();
        Self { words, slot }
    }

    /// The same from `pages` on.
    fn from(&self, pages: u64) -> Self {
        Self::new(Arc::clone(&self.slot), self.first() + pages as usize)
    }

    /// Index in the slot of the first page.
    #[inline]
    fn first(&self) -> usize {
        let words = self.slot.region().words().as_ptr();
        (self.words.as_ptr() as usize - words as usize) / (PAGE_WORDS * size_of::<AtomicU64>())
    }
}

/// A slot's memory, or the part that an alias shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'m> {
    /// First guest-physical byte.
    pub(crate) base: Gpa,
    pub(crate) words: &'m [AtomicU64],
}

/// Stretches that a [`Hint`] remembers: the levels of a walk take turns, and each goes back to the
/// same slots again and again.
const TURNS: usize = 4;

/// Remembers where the last look-ups ended, so that the next ones in the same stretches cost an add
/// and a compare each, and after a change of the map elsewhere little more. A vCPU's also knows its dirty ring. Belongs to one reader.
#[derive(Clone, Debug, Default)]
pub struct Hint {
    /// The map that it was last used with.
    map: Cell<u64>,
    last: [Last; TURNS],
    ring: Option<Arc<DirtyRing>>,
}

#[derive(Clone, Debug)]
struct Last {
    /// First guest frame, and number of them.
    start: Cell<u64>,
    pages: Cell<u64>,
    words: Cell<NonNull<AtomicU64>>,
}

impl Default for Last {
    fn default() -> Self {
        Self { start: Cell::new(0), pages: Cell::new(0), words: Cell::new(NonNull::dangling()) }
    }
}

impl Last {
    #[inline]
    fn has(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.start.get()) < self.pages.get()
    }

    fn overlaps(&self, frames: &Range<u64>) -> bool {
        let start = self.start.get();
        start < frames.end && frames.start < start + self.pages.get()
    }
}

// SAFETY: the pointers are used only while a map that has their memory is borrowed: the one that left
// them, or one made from it that has lost nothing of theirs.
unsafe impl Send for Hint {}

impl Hint {
    /// Where pages that this reader dirties are listed.
    pub(crate) fn ring(&self) -> Option<&DirtyRing> {
        self.ring.as_deref()
    }

    pub(crate) fn set_ring(&mut self, ring: Option<Arc<DirtyRing>>) {
        self.ring = ring;
    }
}

/// What a [`Hint`] needs to know of a map.
#[derive(Debug)]
struct Origin {
    /// No other map in this process has it.
    id: u64,
    /// The map that this one was made from, and the guest frames at which it has not the same memory.
    /// Where that one had none this one may have some.
    from: u64,
    lost: Range<u64>,
}

/// An immutable map from guest-physical memory to memslots.
#[derive(Debug)]
// Not in a cache line with the counts of its `Arc`, which writers change.
#[repr(align(64))]
pub struct MemoryMap {
    origin: Origin,
    /// By guest frame, with aliases resolved.
    places: Ranges<Place>,
    generation: u64,
    /// By guest frame, without aliases.
    slots: Ranges<Place>,
    /// By machine frame. Also holds slots that are being deleted: until every shadow entry that
    /// maps their memory is gone, its page must be found from the entry (R14, R27).
    by_machine: Ranges<Arc<Slot>>,
    by_id: Ranges<Arc<Slot>>,
    /// By number.
    aliases: Arc<[Alias]>,
    /// Frames at which local APICs answer, in order: no entry maps them, whatever memory is there.
    apics: Arc<[Gfn]>,
    /// Of all slots.
    pages: u64,
    life: Life,
}

impl Snapshot for MemoryMap {
    fn life(&self) -> &Life {
        &self.life
    }
}

/// Every guest frame.
const ANY: Range<u64> = 0..u64::MAX;

fn frames(slot: &Slot) -> Range<u64> {
    slot.base().0..slot.base().0 + slot.pages()
}

fn machine_frames(region: &Region) -> Range<u64> {
    let first = region.machine().0 >> PAGE_SHIFT;
    first..first + region.pages()
}

fn number(id: SlotId) -> Range<u64> {
    u64::from(id.0)..u64::from(id.0) + 1
}

impl MemoryMap {
    pub(super) fn empty() -> Self {
        let id = unique();
        Self {
            origin: Origin { id, from: id, lost: 0..0 },
            places: Ranges::default(),
            generation: 0,
            slots: Ranges::default(),
            by_machine: Ranges::default(),
            by_id: Ranges::default(),
            aliases: [].into(),
            apics: [].into(),
            pages: 0,
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
        let slot = Arc::new(Slot::new(config)?);
        let id = slot.id();
        if self.by_id(id).is_some() {
            return Err(SlotError::Exists(id));
        }
        if self.slots.len() >= MAX_SLOTS {
            return Err(SlotError::TooMany { id, limit: MAX_SLOTS });
        }
        self.check_overlap(&slot)?;
        let machine = machine_frames(slot.region());
        if let Some((_, other)) = self.by_machine.overlapping(machine.clone()).next() {
            let machine = slot.machine();
            return Err(SlotError::SharedBacking { id, machine, other: other.id() });
        }
        if slot.logs_dirty() && !slot.region().start_log() {
            return Err(SlotError::LogInUse(id));
        }
        slot.region().set_dirty_bits(slot.flags().dirty == DirtyMode::DirtyBits);
        let pages = self.pages + slot.pages();
        Ok(self.next(
            self.slots.insert(frames(&slot), Place::new(Arc::clone(&slot), 0)),
            self.by_machine.insert(machine, Arc::clone(&slot)),
            self.by_id.insert(number(id), slot),
            &self.aliases,
            pages,
            0..0,
        ))
    }

    fn check_overlap(&self, slot: &Slot) -> Result<(), SlotError> {
        let mut there = self.slots.overlapping(frames(slot)).map(|(_, place)| place.slot.id());
        match there.find(|other| *other != slot.id()) {
            Some(other) => {
                Err(SlotError::Overlap { id: slot.id(), base: slot.base().gpa(), other })
            }
            None => Ok(()),
        }
    }

    /// The map without the slot: guest-physical look-ups miss it, machine look-ups still find it.
    pub(crate) fn hiding(&self, id: SlotId) -> Result<(Self, Arc<Slot>), SlotError> {
        let slot = Arc::clone(self.by_id(id).ok_or(SlotError::NoSuchSlot(id))?);
        let slots = self.slots.remove(slot.base().0);
        let by_id = self.by_id.remove(u64::from(id.0));
        let pages = self.pages - slot.pages();
        let by_machine = self.by_machine.clone();
        Ok((self.next(slots, by_machine, by_id, &self.aliases, pages, self.named(&slot)), slot))
    }

    /// The map in which machine look-ups miss the slot as well.
    pub(crate) fn forgetting(&self, slot: &Slot) -> Self {
        let by_machine = self.by_machine.remove(machine_frames(slot.region()).start);
        self.next(
            self.slots.clone(),
            by_machine,
            self.by_id.clone(),
            &self.aliases,
            self.pages,
            0..0,
        )
    }

    /// The map with the slot at another place.
    pub(crate) fn moving(&self, id: SlotId, base: Gpa) -> Result<Self, SlotError> {
        let old = self.by_id(id).ok_or(SlotError::NoSuchSlot(id))?;
        let slot = old.at(base)?;
        self.check_overlap(&slot)?;
        Ok(self.replacing(slot, self.named(old)))
    }

    /// The map with the slot's flags changed.
    pub(crate) fn flagged(&self, id: SlotId, flags: SlotFlags) -> Result<Self, SlotError> {
        let old = self.by_id(id).ok_or(SlotError::NoSuchSlot(id))?;
        Ok(self.replacing(old.with_flags(flags), 0..0))
    }

    /// The map with this slot in the place of the one with its number. `lost` as in [`Origin`].
    fn replacing(&self, slot: Slot, lost: Range<u64>) -> Self {
        let slot = Arc::new(slot);
        let id = number(slot.id());
        let old = self.by_id.get(id.start).map_or(slot.base(), |(old, _)| old.base());
        let machine = machine_frames(slot.region());
        let place = Place::new(Arc::clone(&slot), 0);
        self.next(
            self.slots.remove(old.0).insert(frames(&slot), place),
            self.by_machine.remove(machine.start).insert(machine, Arc::clone(&slot)),
            self.by_id.remove(id.start).insert(id, slot),
            &self.aliases,
            self.pages,
            lost,
        )
    }

    /// Guest frames outside which nothing shows the slot's memory.
    fn named(&self, slot: &Slot) -> Range<u64> {
        if self.aliases.is_empty() { frames(slot) } else { ANY }
    }

    /// The map with the alias set.
    pub(crate) fn with_alias(&self, alias: Alias) -> Result<Self, AliasError> {
        alias.check()?;
        let others = self.aliases.iter().filter(|other| other.number != alias.number);
        let mut aliases: Vec<_> = others.copied().chain([alias]).collect();
        aliases.sort_by_key(|alias| alias.number);
        Ok(self.with_aliases(&aliases.into()))
    }

    /// The map without the alias.
    pub(crate) fn without_alias(&self, number: u32) -> Result<Self, AliasError> {
        let aliases: Vec<_> =
            self.aliases.iter().filter(|alias| alias.number != number).copied().collect();
        if aliases.len() == self.aliases.len() {
            return Err(AliasError::NoSuchAlias(number));
        }
        Ok(self.with_aliases(&aliases.into()))
    }

    /// The same, as a map of its own.
    pub(crate) fn renewed(&self) -> Self {
        self.with_aliases(&self.aliases)
    }

    /// Before it is published: where local APICs answer, in order.
    pub(crate) fn set_apics(&mut self, apics: Arc<[Gfn]>) {
        self.apics = apics;
    }

    fn with_aliases(&self, aliases: &Arc<[Alias]>) -> Self {
        let (slots, by_machine) = (self.slots.clone(), self.by_machine.clone());
        self.next(slots, by_machine, self.by_id.clone(), aliases, self.pages, ANY)
    }

    fn next(
        &self,
        slots: Ranges<Place>,
        by_machine: Ranges<Arc<Slot>>,
        by_id: Ranges<Arc<Slot>>,
        aliases: &Arc<[Alias]>,
        pages: u64,
        lost: Range<u64>,
    ) -> Self {
        Self {
            origin: Origin { id: unique(), from: self.origin.id, lost },
            places: resolve(&slots, aliases),
            generation: self.generation + 1,
            slots,
            by_machine,
            by_id,
            aliases: Arc::clone(aliases),
            apics: Arc::clone(&self.apics),
            pages,
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
        self.slots.iter().map(|(_, place)| &place.slot)
    }

    /// Pages of all slots.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// The aliases, by number.
    #[must_use]
    pub fn aliases(&self) -> &[Alias] {
        &self.aliases
    }

    /// The frames at which local APICs answer, in order.
    pub(crate) fn apics(&self) -> &[Gfn] {
        &self.apics
    }

    /// Whether a local APIC answers in these frames.
    #[inline]
    pub(crate) fn has_apic(&self, gfns: Range<u64>) -> bool {
        self.apics.iter().any(|gfn| gfns.contains(&gfn.0))
    }

    /// The slot with this number.
    #[must_use]
    pub fn by_id(&self, id: SlotId) -> Option<&Arc<Slot>> {
        self.life.check();
        self.by_id.get(u64::from(id.0)).map(|(slot, _)| slot)
    }

    /// The slot whose memory is at the frame, under its own name or an alias's.
    #[inline]
    #[must_use]
    pub fn slot(&self, gfn: Gfn) -> Option<&Arc<Slot>> {
        self.page(gfn).map(|page| page.slot)
    }

    /// The page at the frame.
    #[inline]
    pub(crate) fn page(&self, gfn: Gfn) -> Option<Page<'_>> {
        self.life.check();
        let (place, offset) = self.places.get(gfn.0)?;
        Some(Page { slot: &place.slot, index: place.first() + offset as usize })
    }

    /// The first page of the aligned block of `pages` (a power of two) around the frame, if one slot
    /// has it all at machine addresses that are aligned as well.
    pub(crate) fn block(&self, gfn: Gfn, pages: u64) -> Option<Page<'_>> {
        self.life.check();
        let (range, place) = self.places.range_of(gfn.0)?;
        let first = gfn.0 & !(pages - 1);
        if first < range.start || first + pages > range.end {
            return None;
        }
        let page =
            Page { slot: &place.slot, index: place.first() + (first - range.start) as usize };
        (page.machine().0 >> PAGE_SHIFT & (pages - 1) == 0).then_some(page)
    }

    /// The stretches of slots in a range of guest frames: what they are, and their page indices.
    pub(crate) fn stretches(
        &self,
        gfns: Range<u64>,
    ) -> impl Iterator<Item = (&Arc<Slot>, Range<usize>)> {
        self.stretches_at(gfns).map(|(_, slot, pages)| (slot, pages))
    }

    /// The same with the guest frame that each begins at.
    pub(crate) fn stretches_at(
        &self,
        gfns: Range<u64>,
    ) -> impl Iterator<Item = (u64, &Arc<Slot>, Range<usize>)> {
        self.places.overlapping(gfns.clone()).map(move |(range, place)| {
            let start = gfns.start.max(range.start);
            let (from, to) = (start - range.start, gfns.end.min(range.end) - range.start);
            (start, &place.slot, place.first() + from as usize..place.first() + to as usize)
        })
    }

    /// Whether machine look-ups lead to the region.
    pub(super) fn has(&self, region: &Region) -> bool {
        let found = self.by_machine.get(region.machine().0 >> PAGE_SHIFT);
        found.is_some_and(|(slot, _)| core::ptr::eq(&**slot.region(), region))
    }

    /// The memory around the frame. `turn` is which of the hint's stretches to try.
    #[inline(always)]
    pub(crate) fn view(&self, gfn: Gfn, hint: &Hint, turn: usize) -> Option<View<'_>> {
        self.life.check();
        let last = &hint.last[turn % TURNS];
        if hint.map.get() != self.origin.id || !last.has(gfn) {
            self.remember(gfn, hint, turn)?;
        }
        // SAFETY: the stretch was left by this map, or by the one it was made from, and has not been
        // lost since.
        Some(unsafe { View::new(last.start.get(), last.pages.get(), last.words.get()) })
    }

    #[inline(never)]
    fn remember(&self, gfn: Gfn, hint: &Hint, turn: usize) -> Option<()> {
        let Origin { id, from, lost } = &self.origin;
        let left_by = hint.map.replace(*id);
        if left_by != *id {
            let stays = |last: &Last| left_by == *from && !last.overlaps(lost);
            hint.last.iter().filter(|last| !stays(last)).for_each(|last| last.pages.set(0));
        }
        let last = &hint.last[turn % TURNS];
        if last.has(gfn) {
            return Some(());
        }
        let (range, place) = self.places.range_of(gfn.0)?;
        last.start.set(range.start);
        last.pages.set(range.end - range.start);
        last.words.set(place.words);
        Some(())
    }

    /// The same, neither trying nor changing a hint.
    #[inline]
    pub(crate) fn view_unhinted(&self, gfn: Gfn) -> Option<View<'_>> {
        self.life.check();
        let (range, place) = self.places.range_of(gfn.0)?;
        // SAFETY: the stretch is of this map.
        Some(unsafe { View::new(range.start, range.end - range.start, place.words) })
    }

    /// The page that a machine address belongs to.
    #[must_use]
    pub(crate) fn by_machine(&self, machine: Machine) -> Option<Page<'_>> {
        self.life.check();
        let (slot, index) = self.by_machine.get(machine.0 >> PAGE_SHIFT)?;
        Some(Page { slot, index: index as usize })
    }

    /// The 8-byte word at `gpa` (rounded down to a multiple of 8), if it lies in a slot.
    #[inline]
    #[must_use]
    pub fn word(&self, gpa: Gpa, hint: &Hint) -> Option<&AtomicU64> {
        let View { base, words } = self.view(gpa.gfn(), hint, 0)?;
        let offset = gpa.0 - base.0;
        let word = (offset % PAGE_SIZE / 8) as usize;
        if cfg!(loom) && word >= PAGE_WORDS {
            return None;
        }
        words.get((offset / PAGE_SIZE) as usize * PAGE_WORDS + word)
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
    pub(crate) fn write(&self, gpa: Gpa, bytes: &[u8], ring: Option<&DirtyRing>) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let at = gpa.wrapping_add(done as u64);
            let Some(found) = self.page(at.gfn()) else { break };
            let page = ((PAGE_SIZE - at.page_offset()) as usize).min(bytes.len() - done);
            if !words::store(found.words(), at.page_offset(), &bytes[done..done + page]) {
                break;
            }
            found.mark_dirty(ring);
            done += page;
        }
        done
    }
}

impl View<'_> {
    /// # Safety
    ///
    /// The stretch must be of a map that lives as long as the view.
    #[inline]
    unsafe fn new(start: u64, pages: u64, words: NonNull<AtomicU64>) -> Self {
        let words = NonNull::slice_from_raw_parts(words, pages as usize * PAGE_WORDS);
        // SAFETY: the map keeps the slot alive, and with it the memory, which `Backing` promises to
        // stay where it is and to be used as atomics only. A place has as many pages as its range.
        Self { base: Gfn(start).gpa(), words: unsafe { words.as_ref() } }
    }
}

/// Lays aliases over slots; of two that overlap, the one with the smaller number on top.
fn resolve(slots: &Ranges<Place>, aliases: &[Alias]) -> Ranges<Place> {
    let mut places = slots.clone();
    for alias in aliases.iter().rev() {
        let (base, target) = (alias.base.gfn().0, alias.target.gfn().0);
        let pages = alias.size >> PAGE_SHIFT;
        places = places.cut(base..base + pages, Place::from);
        for (range, place) in slots.overlapping(target..target + pages) {
            let from = range.start.max(target);
            let to = range.end.min(target + pages);
            let named = base + (from - target)..base + (to - target);
            places = places.insert(named, place.from(from - range.start));
        }
    }
    places
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
        let id = |gfn| m.slot(Gfn(gfn)).map(|s| s.id().0);
        let found: Vec<_> = [0, 1, 8, 9, 10, 0x20, 0x22, 0x23, 8, 0].map(id).into();
        assert_eq!(
            found,
            [Some(1), None, Some(3), Some(3), None, Some(2), Some(2), None, Some(3), Some(1)]
        );
        let slot = m.by_id(SlotId(2)).unwrap();
        let found = m.by_machine(Machine(slot.machine().0 + 0x2005)).unwrap();
        assert_eq!((found.slot.id(), found.index), (SlotId(2), 2));
        let (hidden, slot) = m.hiding(SlotId(2)).unwrap();
        assert!(hidden.slot(Gfn(0x20)).is_none());
        assert!(hidden.by_machine(slot.machine()).is_some());
        assert!(hidden.forgetting(&slot).by_machine(slot.machine()).is_none());
    }

    #[test]
    fn reads_and_writes_bytes_across_words_pages_and_slots() {
        let m = map(&[(0, 0, 0x1000), (1, 0x1000, 0x2000)]);
        let bytes: Vec<u8> = (0..100).collect();
        for at in [0, 3, 0xfc3, 0x1ffd] {
            assert_eq!(m.write(Gpa(at), &bytes, None), 100);
            let mut back = [0; 100];
            assert_eq!(m.read(Gpa(at), &mut back), 100);
            assert_eq!(back[..], bytes[..]);
        }
        m.write(Gpa(8), &[0xff; 8], None);
        m.write(Gpa(11), &[1, 2], None);
        assert_eq!(
            m.word(Gpa(8), &Hint::default()).unwrap().load(Ordering::Relaxed),
            0xffff_ff02_01ff_ffff
        );
        assert_eq!(m.write(Gpa(0x2ffe), &bytes, None), 2);
        assert_eq!(m.read(Gpa(0x2ffe), &mut [0; 9]), 2);
        assert_eq!(m.read(Gpa(0x3000), &mut [0; 9]), 0);
    }

    #[test]
    fn hints_stand_as_long_as_what_they_name() {
        let maps = [map(&[(0, 0, 0x4000), (1, 0x8000, 0x4000)])];
        let hint = Hint::default();
        let look = |map: &MemoryMap| {
            for (turn, gfn) in [(0, Gfn(1)), (1, Gfn(9))] {
                let view = map.view(gfn, &hint, turn).map(|v| (v.base, v.words.as_ptr()));
                let fresh = map.view_unhinted(gfn).map(|v| (v.base, v.words.as_ptr()));
                assert_eq!(view, fresh);
            }
        };
        // What the second turn still has when the first has gone to a new map.
        let left = |map: &MemoryMap| {
            map.view(Gfn(1), &hint, 0);
            hint.last[1].pages.get()
        };
        look(&maps[0]);
        let [old] = maps;
        let more = old.with(slot(2, 0x10000, 0x1000)).unwrap();
        assert_eq!(left(&more), 4);
        let (fewer, _) = more.hiding(SlotId(2)).unwrap();
        assert_eq!(left(&fewer), 4);
        let flags = SlotFlags { read_only: true, ..SlotFlags::default() };
        let flagged = fewer.flagged(SlotId(1), flags).unwrap();
        assert_eq!(left(&flagged), 4);
        // Not the map's parent, nor one that it was made from long ago.
        assert_eq!((left(&old), left(&flagged)), (0, 0));
        look(&flagged);
        let moved = flagged.moving(SlotId(1), Gpa(0x9000)).unwrap();
        assert_eq!(left(&moved), 0);
        look(&moved);
        let alias = Alias { number: 0, base: Gpa(0x20000), size: 0x1000, target: Gpa(0x9000) };
        let aliased = moved.with_alias(alias).unwrap();
        assert_eq!(left(&aliased), 0);
        look(&aliased);
        // What an alias shows goes with its slot.
        assert!(aliased.view(Gfn(0x20), &hint, 1).is_some());
        let (hidden, _) = aliased.hiding(SlotId(1)).unwrap();
        assert_eq!(left(&hidden), 0);
        assert!(hidden.view(Gfn(0x20), &hint, 1).is_none());
    }

    proptest::proptest! {
        #[test]
        fn a_hint_never_says_otherwise_than_a_look_up(
            steps in proptest::collection::vec((0..9u8, 0..4u32, 0..12u64, 0..12u64), 1..80),
        ) {
            let mut maps = vec![map(&[(0, 0, 0x2000), (1, 0x4000, 0x1000)])];
            let hint = Hint::default();
            for (kind, number, at, other) in steps {
                let (now, base, id) = (&maps[maps.len() - 1], Gpa(at << 12), SlotId(number));
                let next = match kind {
                    0 => now.with(slot(number, base.0, (other % 3 + 1) << 12)).ok(),
                    1 => now.hiding(id).ok().map(|(map, slot)| map.forgetting(&slot)),
                    2 => now.moving(id, base).ok(),
                    3 => now.flagged(id, SlotFlags { read_only: at > 5, ..Default::default() }).ok(),
                    4 => {
                        let (size, target) = ((number as u64 + 1) << 12, Gpa(other << 12));
                        now.with_alias(Alias { number, base, size, target }).ok()
                    }
                    5 => now.without_alias(number).ok(),
                    _ => None,
                };
                maps.extend(next);
                // Mostly the newest, now and then a reader of an old one.
                let back = if kind == 6 { number as usize } else { 0 };
                let map = &maps[maps.len().saturating_sub(1 + back)];
                for (turn, gfn) in [at, other, at + 1].into_iter().enumerate() {
                    let place = |view: View<'_>| (view.base, view.words.as_ptr(), view.words.len());
                    let hinted = map.view(Gfn(gfn), &hint, turn).map(place);
                    let word = |(base, words, _): (Gpa, *const AtomicU64, _)| {
                        words.wrapping_add((gfn - base.gfn().0) as usize * PAGE_WORDS)
                    };
                    let fresh = map.view_unhinted(Gfn(gfn)).map(place);
                    proptest::prop_assert_eq!(hinted.map(word), fresh.map(word));
                }
            }
        }
    }

    #[test]
    fn logs_writes() {
        let m = MemoryMap::empty().with(slot(0, 0, 0x80000).log_dirty()).unwrap();
        m.write(Gpa(0xfff), &[1, 2], None);
        m.write(Gpa(0x41000), &[1], None);
        let s = m.by_id(SlotId(0)).unwrap();
        let take = |word| s.region().dirty.clear(word, u64::MAX);
        assert!(s.region().dirty.is_dirty(0x41) && !s.region().dirty.is_dirty(2));
        assert_eq!((take(0), take(1), take(9)), (3, 2, 0));
        assert_eq!(take(0), 0);
    }
}
