// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VM-wide handle.

use crate::addr::{ENTRIES, Gfn, Gpa, LEVELS, PAGE_SIZE, PHYSICAL_BITS};
use crate::memory::{
    Alias, AliasError, Backing, DirtyPage, MemoryMap, PinnedPage, Slot, SlotConfig, SlotError,
    SlotFlags, SlotId,
};
use crate::mmio::{Bus, CoalescedRing, Space};
use crate::paging::{Access, BadRegisters, Regs};
use crate::shadow::{
    AuditReport, Disagreement, Engine, Invalidation, MIN_FRAMES, PageRange, Processor, QuotaError,
    RangeError, Release, Shape, StatsSnapshot, shift,
};
use crate::sync::epoch::Collector;
use crate::sync::{Mark, Ordering, WouldDeadlock, fence, rule};
use crate::vcpu::{GuestView, PatchError, SoftProcessor, SoftVcpu, Vcpu, VcpuError};
use core::fmt;
use std::sync::Arc;

/// Fewest table frames an engine works with; more are needed for more than eight vCPUs.
pub const MIN_TABLE_FRAMES: u64 = MIN_FRAMES as u64;

/// How an engine is made.
#[derive(Debug)]
pub struct Config {
    /// Memory for shadow tables; its size bounds their number. The consumer's processor must see
    /// it at [`Backing::machine`]. It must be zeroed and belong to this engine alone.
    pub tables: Arc<dyn Backing>,
    /// An entry of every root table that belongs to the consumer: (index, value). The engine puts
    /// the value there and leaves it alone; guests cannot use that part of the address space.
    pub reserved_root_entry: Option<(usize, u64)>,
    /// Levels of the shadow tables: 4, or 5 where the consumer's processor runs with CR4.LA57. Guests
    /// with 5-level paging need 5.
    pub levels: u8,
    /// Bytes of the largest page that the consumer's processor can map: 4 KiB, 2 MiB or 1 GiB.
    pub largest_page: u64,
    /// Whether guests may write their leaf tables natively, to be compared when they flush
    /// ([`Vcpu::invlpg`]); else each such write is emulated.
    pub unsync: bool,
    /// The reclaimer.
    pub collector: Collector,
}

impl Config {
    /// An engine with these tables, in 4 levels with pages of up to 1 GiB, whose guests write leaf tables
    /// natively (in a model: pages of 4 KiB, and every such write emulated), and no reserved entry.
    #[must_use]
    pub fn new(tables: Arc<dyn Backing>) -> Self {
        Self {
            tables,
            reserved_root_entry: None,
            levels: LEVELS,
            largest_page: if cfg!(loom) { PAGE_SIZE } else { 1 << 30 },
            unsync: !cfg!(loom),
            collector: Collector::new(),
        }
    }

    /// The same with shadow tables of so many levels, 4 or 5.
    #[must_use]
    pub fn levels(self, levels: u8) -> Self {
        Self { levels, ..self }
    }

    /// The same with pages of so many bytes at most: 4 KiB, 2 MiB or 1 GiB.
    #[must_use]
    pub fn largest_page(self, bytes: u64) -> Self {
        Self { largest_page: bytes, ..self }
    }

    /// The same with guests' writes to leaf tables native, or all emulated.
    #[must_use]
    pub fn unsync(self, unsync: bool) -> Self {
        Self { unsync, ..self }
    }

    /// The same with an entry of every root that belongs to the consumer.
    #[must_use]
    pub fn reserve_root_entry(self, index: usize, value: u64) -> Self {
        Self { reserved_root_entry: Some((index, value)), ..self }
    }
}

/// Why an engine could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Too few frames for a fault to succeed.
    #[error("{frames} table frames are too few: at least {MIN_TABLE_FRAMES} are needed")]
    TooFewFrames {
        /// Frames given.
        frames: u64,
    },
    /// The machine address of the tables is not a page or above 52 bits.
    #[error("the tables' machine address {0:#x} is misaligned or above 52 bits")]
    BadMachineAddress(u64),
    /// No processor has tables of so many levels.
    #[error("{0} levels of shadow tables: there are 4 or 5")]
    BadLevels(u8),
    /// No processor has pages of that size.
    #[error("{0:#x} bytes are no page size: 4 KiB, 2 MiB and 1 GiB are")]
    BadPageSize(u64),
    /// The reserved entry is not one of a root's.
    #[error("reserved root entry {0}: a root has {ENTRIES} entries")]
    BadReservedEntry(usize),
}

/// The MMU of one virtual machine. Clones are handles to the same.
///
/// # Who may wait for whom
///
/// | call | waits for |
/// | --- | --- |
/// | [`Vcpu::fault`], [`Vcpu::translate`], [`Vcpu::read`], [`Vcpu::write`] and what else goes through the guest's tables, [`Mmu::memory`], [`Mmu::stats`], [`Mmu::pin_page`], [`Mmu::write_phys`], [`Mmu::note_write`] | nobody (a fault may spin briefly on one page's reverse map) |
/// | [`Vcpu::must_wait`], after a fault that stalled | nobody: it is polled |
/// | [`Mmu::zap_all`], [`Mmu::set_nr_mmu_pages`], [`Mmu::test_young`], [`Mmu::clear_young`], [`Mmu::peek_dirty_log`] of a write-protected log | nobody |
/// | [`Mmu::dirty_log`], [`Mmu::clear_dirty_log`], [`Mmu::reset_dirty_pages`] | vCPUs inside the guest, until they come out or drain; readers, where the log uses dirty bits |
/// | [`Mmu::create_slot`] | other changes of the map, active invalidations; readers, once [`MAX_OLD_MAPS`](crate::memory::MAX_OLD_MAPS) old maps wait for them |
/// | [`Mmu::delete_slot`], [`Mmu::move_slot`], [`Mmu::set_slot_flags`], [`Mmu::set_alias`], [`Mmu::remove_alias`] | other changes of the map, active invalidations, readers, vCPUs inside the guest |
/// | [`Mmu::invalidate`], [`Mmu::patch_code`], [`Vcpu::patch_code`] | changes of the map under way, vCPUs inside the guest |
/// | [`Mmu::set_host_writable`] | readers, vCPUs inside the guest |
/// | [`Vcpu::set_apic_page`] | other changes of the map, active invalidations; readers and vCPUs inside the guest, where a memslot has the page |
/// | [`Mmu::synchronize`] | readers, vCPUs inside the guest |
/// | [`Initiator`](crate::mmio::Initiator)s of [`Mmu::bus`] and [`Mmu::ports`] | nobody, apart from the device itself |
/// | [`Bus::register`], [`Bus::remove`] and the like | other changes of that bus, look-ups on it; never a device |
/// | [`Removal::wait`](crate::mmio::Removal::wait) | accesses inside the device |
///
/// *Nobody* leaves out locks that are held for a few steps; `docs/protocols.md` has the table of who
/// waits for a thread that is stopped in the middle of anything.
///
/// A thread that is inside the guest with its vCPU, or holds a [`Walker`](crate::vcpu::Walker), must
/// not make a call that waits for vCPUs or readers. A thread that resolves faults of guest memory
/// says so ([`Mmu::resolver`]) and is then refused by every call that waits. A thread that has begun an
/// [`Invalidation`] is refused by the calls that wait for invalidations, and by another one. Threads of
/// either kind, and those inside a device, are refused by [`Removal::wait`](crate::mmio::Removal::wait).
#[derive(Clone)]
pub struct Mmu {
    engine: Arc<Engine>,
    bus: Bus,
    ports: Bus,
}

impl fmt::Debug for Mmu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.memory().slots().len();
        f.debug_struct("Mmu").field("slots", &slots).finish_non_exhaustive()
    }
}

impl Mmu {
    /// A VM without memory.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the value.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let Config {
            tables,
            reserved_root_entry: reserved,
            levels,
            largest_page,
            unsync,
            collector,
        } = config;
        let frames = tables.size() / PAGE_SIZE;
        if frames < MIN_TABLE_FRAMES {
            return Err(ConfigError::TooFewFrames { frames });
        }
        let machine = tables.machine();
        let end = machine.0.checked_add(tables.size());
        if machine.page_offset() != 0 || end.is_none_or(|end| end > 1 << 52) {
            return Err(ConfigError::BadMachineAddress(machine.0));
        }
        if !(LEVELS..=LEVELS + 1).contains(&levels) {
            return Err(ConfigError::BadLevels(levels));
        }
        let largest = (1..=3).find(|level| 1 << shift(*level) == largest_page);
        let largest = largest.ok_or(ConfigError::BadPageSize(largest_page))?;
        if let Some((index, _)) = reserved.filter(|(index, _)| *index >= ENTRIES) {
            return Err(ConfigError::BadReservedEntry(index));
        }
        let shape = Shape { levels, largest, unsync, reserved };
        let engine = Arc::new(Engine::new(tables, shape, collector));
        let ring = Arc::new(CoalescedRing::default());
        let bus = |space| Bus::of_engine(space, Arc::clone(&ring), engine.id());
        Ok(Self { bus: bus(Space::Mmio), ports: bus(Space::Pio), engine })
    }

    /// Adds a memslot. Running vCPUs see it from their next fault on.
    ///
    /// # Errors
    ///
    /// [`SlotError`], which names the value; nothing has changed then.
    pub fn create_slot(&self, config: SlotConfig) -> Result<(), SlotError> {
        self.engine.create_slot(config)
    }

    /// Deletes a memslot. When this returns, no reader, shadow entry or vCPU uses its memory; who
    /// else holds it is in the [`Release`], and with the last of them the backing is dropped.
    ///
    /// # Errors
    ///
    /// [`SlotError`], which names the value; nothing has changed then.
    pub fn delete_slot(&self, id: SlotId) -> Result<Release, SlotError> {
        self.engine.delete_slot(id)
    }

    /// Moves a memslot to another guest-physical address. Its memory, dirty log and pinned pages stay.
    /// There is no moment at which it is at neither place.
    ///
    /// # Errors
    ///
    /// [`SlotError`], which names the value; nothing has changed then.
    pub fn move_slot(&self, id: SlotId, base: Gpa) -> Result<(), SlotError> {
        self.engine.move_slot(id, base)
    }

    /// Changes what may change of a memslot. When this returns, every vCPU obeys the new flags: with
    /// a dirty log, every later write is in it. A log that is switched on begins empty.
    ///
    /// # Errors
    ///
    /// [`SlotError`], which names the value; nothing has changed then.
    pub fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<(), SlotError> {
        self.engine.set_slot_flags(id, flags)
    }

    /// Sets an alias, or replaces the one with its number. All shadow mappings are zapped
    /// (KVM_SET_MEMORY_ALIAS). [`Alias`] says what a guest finds there.
    ///
    /// ```
    /// # use mmu_core::{Config, Mmu, addr::Gpa, memory::{Alias, AllocatedMemory, SlotConfig}};
    /// # use std::sync::Arc;
    /// let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// mmu.create_slot(SlotConfig::new(0, Gpa(0x10_0000), Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// // The VGA window of 1987 onto the frame buffer.
    /// mmu.set_alias(Alias { number: 0, base: Gpa(0xa_0000), size: 0x8000, target: Gpa(0x18_0000) })?;
    /// mmu.write_phys(Gpa(0xa_0010), b"text");
    /// let mut seen = [0; 4];
    /// mmu.memory().read(Gpa(0x18_0010), &mut seen);
    /// assert_eq!(&seen, b"text");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AliasError`], which names the value; nothing has changed then.
    pub fn set_alias(&self, alias: Alias) -> Result<(), AliasError> {
        self.engine.set_alias(alias)
    }

    /// Removes an alias. All shadow mappings are zapped.
    ///
    /// # Errors
    ///
    /// [`AliasError::NoSuchAlias`], [`AliasError::WouldDeadlock`].
    pub fn remove_alias(&self, number: u32) -> Result<(), AliasError> {
        self.engine.remove_alias(number)
    }

    /// The memory map of this moment, for holders that outlive a read section. Keeps the memory of
    /// its slots alive.
    #[must_use]
    pub fn memory(&self) -> Arc<MemoryMap> {
        self.engine.memory.snapshot()
    }

    /// Pins a page of guest memory, for as long as the result lives, whatever becomes of its slot
    /// (`gfn_to_page` in KVM). Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`PinError`], which names the address.
    pub fn pin_page(&self, gpa: Gpa, write: bool) -> Result<PinnedPage, PinError> {
        let handle = self.engine.handles.get();
        let guard = handle.pin();
        let page = self.engine.memory.load(&guard).page(gpa.gfn());
        let page = page.ok_or(PinError::NoMemory(gpa))?;
        if write && !page.is_writable() {
            return Err(PinError::ReadOnly(gpa));
        }
        Ok(PinnedPage::new(page, write))
    }

    /// Takes the slot's dirty log into `bitmap` (bit `n` of word `w` is page `64 w + n`; words
    /// beyond the slot are cleared) and returns the number of dirty pages. Pages written from now
    /// on are in a later log (R13). With several callers at a time each page is in one caller's.
    /// [`runs`](crate::memory::runs) goes through the bitmap by runs of pages.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError`]; nothing has been taken then.
    pub fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<u64, DirtyLogError> {
        let (engine, mut handle) = (&self.engine, self.engine.handles.get());
        self.with_log(id, bitmap.len(), |slot| engine.harvest(slot, bitmap, &mut handle))
    }

    /// As [`Mmu::dirty_log`], but the log keeps its pages, and the guest goes on writing to them
    /// unnoticed, until [`Mmu::clear_dirty_log`] (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): copy a page
    /// after it was cleared there.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError`].
    pub fn peek_dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<u64, DirtyLogError> {
        let (engine, mut handle) = (&self.engine, self.engine.handles.get());
        self.with_log(id, bitmap.len(), |slot| engine.peek_dirty(slot, bitmap, &mut handle))
    }

    /// Takes the pages that are set in `bitmap` out of the slot's log; bit `n` of word `w` is page
    /// `first_page + 64 w + n`. Pages written from now on are in the log again. Returns how many of
    /// them the log had.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError`]; nothing has been cleared then. `first_page` must be a multiple of 64, and
    /// no bit beyond the slot may be set.
    pub fn clear_dirty_log(
        &self,
        id: SlotId,
        first_page: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError> {
        let last = bitmap.iter().rposition(|bits| *bits != 0);
        let (engine, handle) = (&self.engine, self.engine.handles.get());
        self.with_log(id, usize::MAX, |slot| {
            let end = last.map_or(Some(first_page), |word| {
                let bits = 64 - bitmap[word].leading_zeros();
                first_page.checked_add(word as u64 * 64 + u64::from(bits))
            });
            if first_page % 64 != 0 || end.is_none_or(|end| end > slot.pages()) {
                let pages = slot.pages();
                return Err(DirtyLogError::BadRange { id, first_page, pages });
            }
            Ok(engine.clear_dirty(slot, (first_page / 64) as usize, bitmap, &handle))
        })?
    }

    /// Takes pages that dirty rings have listed out of their slots' logs (KVM_RESET_DIRTY_RINGS):
    /// a page that is written from now on is listed again. Copy them after this. Returns how many the
    /// logs had; pages of slots that are gone are passed over.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError::WouldDeadlock`].
    pub fn reset_dirty_pages(&self, pages: &[DirtyPage]) -> Result<u64, DirtyLogError> {
        self.engine.may_wait()?;
        let handle = self.engine.handles.get();
        Ok(self.engine.reset_dirty(&self.engine.memory.snapshot(), pages, &handle))
    }

    fn with_log<R>(
        &self,
        id: SlotId,
        given: usize,
        body: impl FnOnce(&Arc<Slot>) -> R,
    ) -> Result<R, DirtyLogError> {
        self.engine.may_wait()?;
        let map = self.engine.memory.snapshot();
        let slot = map.by_id(id).ok_or(DirtyLogError::NoSuchSlot(id))?;
        if !slot.logs_dirty() {
            return Err(DirtyLogError::NotLogging(id));
        }
        let needed = slot.pages().div_ceil(64) as usize;
        if given < needed {
            return Err(DirtyLogError::TooShort { id, needed, given });
        }
        Ok(body(slot))
    }

    /// Writes guest-physical memory for a device (`kvm_write_guest`): tells the shadow and the dirty log.
    /// Returns how many bytes could be written before the first one without memory. Each part of an
    /// aligned 8-byte word is written as one. Waits for nobody.
    pub fn write_phys(&self, gpa: Gpa, bytes: &[u8]) -> usize {
        let handle = self.engine.handles.get();
        let guard = handle.pin();
        let map = self.engine.memory.load(&guard);
        self.engine.write_phys(&self.engine.stats, &guard, map, None, gpa, bytes)
    }

    /// Tells the shadow of a write past the engine to `len` bytes at `gpa`, through a pinned page or
    /// the VMM's own mapping: what was derived from guest page tables there is dropped. Until then it
    /// is stale, as a processor's translations are. Waits for nobody.
    pub fn note_write(&self, gpa: Gpa, len: u64) {
        let handle = self.engine.handles.get();
        let guard = handle.pin();
        let map = self.engine.memory.load(&guard);
        let end = gpa.0.saturating_add(len).min(1 << PHYSICAL_BITS);
        if !rule!(R36) {
            return;
        }
        // R2: the write, fence, then who shadows it.
        fence(Ordering::SeqCst);
        // By stretches of memory and the guest tables in them: a VMM may name the whole guest.
        for (gfn, slot, pages) in map.stretches_at(gpa.gfn().0..end.div_ceil(PAGE_SIZE)) {
            let shadows = slot.region().shadows.iter_range(pages.clone());
            for (index, _) in shadows.filter(|(_, shadows)| !shadows.is_empty()) {
                let page = Gfn(gfn + (index - pages.start) as u64).gpa().0;
                let (from, to) = (page.max(gpa.0), (page + PAGE_SIZE).min(end));
                self.engine.guest_wrote(&self.engine.stats, &guard, map, Gpa(from), to - from);
            }
        }
    }

    /// The memory of an address space as somebody in it sees it, with these registers. `who` has the
    /// privilege, and says by its kind what a read through the view is: a read, a fetch, or the first
    /// half of a read-modify-write. EFLAGS.AC is in the registers, and lifts SMAP. So are the PDPTE
    /// registers of PAE paging: [`load_pdptrs`](crate::paging::load_pdptrs) reads them from memory.
    /// Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`BadRegisters`], which names the value.
    pub fn view(&self, regs: &Regs, who: Access) -> Result<GuestView, BadRegisters> {
        GuestView::new(Arc::clone(&self.engine), regs, who)
    }

    /// Replaces code at `gpa`, `old`, by `new`, if it is still there; whether it was.
    /// [`Vcpu::patch_code`] says how, and what it waits for. For code in one run of guest-physical
    /// memory: a debugger's breakpoint.
    ///
    /// # Errors
    ///
    /// [`PatchError`], which names the values; nothing has changed then.
    pub fn patch_code(&self, gpa: Gpa, old: &[u8], new: &[u8]) -> Result<bool, PatchError> {
        self.engine.patch_phys(gpa, old, new)
    }

    /// Tears the whole shadow down, in constant time: vCPUs build another one from their next entry
    /// on, and the faults that follow free the old one a few pages at a time; [`Mmu::maintain`] frees
    /// what is left.
    pub fn zap_all(&self) {
        self.engine.zap_all();
    }

    /// Sets how many shadow pages there may be (KVM_SET_NR_MMU_PAGES); `None` for the default, a
    /// fiftieth of the memory's pages. Beyond that, pages that no fault has used lately are torn
    /// down for new ones.
    ///
    /// # Errors
    ///
    /// [`QuotaError`], which names the values; nothing has changed then.
    pub fn set_nr_mmu_pages(&self, pages: impl Into<Option<u64>>) -> Result<(), QuotaError> {
        self.engine.set_quota(pages.into())
    }

    /// How many shadow pages there may be, and how many there are; those included that processors may
    /// still remember.
    #[must_use]
    pub fn nr_mmu_pages(&self) -> (u64, u64) {
        let (quota, used) = self.engine.quota_and_used();
        (quota.into(), used.into())
    }

    /// Takes a range of guest memory away from every processor until the result is dropped: when this
    /// returns no vCPU uses it, and faults on it stall. The engine's own accesses, those of the emulator
    /// included, go on: they go through this process's mapping, and meet what the host makes of it. For a
    /// host that is about to discard, swap, copy
    /// or replace what is behind it. A thread begins one at a time; two threads must not each wait,
    /// within an invalidation, for the other to begin one.
    ///
    /// # Errors
    ///
    /// [`RangeError`], which names the values; nothing has changed then.
    pub fn invalidate(&self, range: PageRange) -> Result<Invalidation, RangeError> {
        self.engine.invalidate(&[range])
    }

    /// Makes a range of guest memory read-only for every processor, or writable again: the host has
    /// merged or shares the pages, or wants to copy them before they change. A guest's write is an
    /// [`Outcome::HostReadOnly`](crate::shadow::Outcome::HostReadOnly) then, its emulator's an
    /// [`AccessError::HostReadOnly`](crate::vcpu::AccessError::HostReadOnly). When this returns no such
    /// write is under way any more. Pages that are pinned for writing, slices that vm-memory lends, and
    /// the VMM's own stores are its own to stop.
    ///
    /// # Errors
    ///
    /// [`RangeError`], which names the values; nothing has changed then.
    pub fn set_host_writable(&self, range: PageRange, writable: bool) -> Result<(), RangeError> {
        self.engine.set_host_writable(range, writable)
    }

    /// Reports the pages of a range that processors have used since their entries were made or aged:
    /// `report` gets the slot, the index in it of a page (a multiple of 64), and a bit for each page
    /// from there on. Returns the number of pages. Some that were mapped ahead of a run of accesses
    /// are among them, used or not.
    ///
    /// # Errors
    ///
    /// [`RangeError`], which names the values.
    pub fn test_young(
        &self,
        range: PageRange,
        report: impl FnMut(&Slot, u64, u64),
    ) -> Result<u64, RangeError> {
        self.engine.young(range, false, report)
    }

    /// As [`Mmu::test_young`]; the pages count as unused from now on. A vCPU that stays inside the
    /// guest may use what it remembers unnoticed until it drains.
    ///
    /// # Errors
    ///
    /// [`RangeError`], which names the values.
    pub fn clear_young(
        &self,
        range: PageRange,
        report: impl FnMut(&Slot, u64, u64),
    ) -> Result<u64, RangeError> {
        self.engine.young(range, true, report)
    }

    /// Waits until every read section that is open now has ended, and no vCPU uses anything that was
    /// taken away before this call.
    ///
    /// # Errors
    ///
    /// [`WouldDeadlock`].
    pub fn synchronize(&self) -> Result<(), WouldDeadlock> {
        self.engine.synchronize()
    }

    /// Says that this thread resolves faults of guest memory (userfaultfd) while the result lives.
    /// Readers and vCPUs may wait for it in the middle of an access, so every call that would wait for
    /// them refuses this thread (R32).
    pub fn resolver(&self) -> Resolver {
        Resolver { _mark: Mark::new(self.engine.id(), WouldDeadlock::Resolver) }
    }

    /// Adds a vCPU with these registers, while others run (KVM_CREATE_VCPU); dropping it takes it away
    /// again. The quota of shadow pages follows the number of vCPUs. Both wait for others that come or go,
    /// for some stores, and for nobody else.
    ///
    /// # Errors
    ///
    /// [`VcpuError`], which names the values.
    pub fn create_vcpu(
        &self,
        processor: Arc<dyn Processor>,
        regs: Regs,
    ) -> Result<Vcpu, VcpuError> {
        Vcpu::new(Arc::clone(&self.engine), processor, regs)
    }

    /// Adds a software vCPU with these registers.
    ///
    /// # Errors
    ///
    /// [`VcpuError`], which names the values.
    pub fn create_soft_vcpu(&self, regs: Regs) -> Result<SoftVcpu, VcpuError> {
        Ok(SoftVcpu::new(self.create_vcpu(Arc::new(SoftProcessor), regs)?))
    }

    /// Table frames in use or used before have indices below this; for a consumer that must make
    /// its processor forget all of them ([`crate::shadow::Downgrade::Everything`]).
    #[must_use]
    pub fn table_frames_used(&self) -> u32 {
        self.engine.frames_used()
    }

    /// The bus of devices at guest-physical addresses.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// The bus of devices at I/O ports. Both buses share one ring for coalesced writes.
    #[must_use]
    pub fn ports(&self) -> &Bus {
        &self.ports
    }

    /// Event counts since the engine was made.
    #[must_use]
    pub fn stats(&self) -> StatsSnapshot {
        self.engine.stats()
    }

    /// Compares the whole shadow with the guest's tables and with itself. The engine must be
    /// quiescent: no operation in flight on any thread, every vCPU outside the guest.
    ///
    /// # Errors
    ///
    /// The first [`Disagreement`].
    pub fn audit(&self) -> Result<AuditReport, Disagreement> {
        let handle = self.engine.handles.get();
        let guard = handle.pin();
        self.engine.audit(&guard)
    }

    /// Tears down what is left of zapped trees and frees what can be freed; for VMs that idle. Waits
    /// for nobody.
    pub fn maintain(&self) {
        self.engine.maintain();
    }
}

/// Why a dirty log could not be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// No such slot.
    #[error("{0} does not exist")]
    NoSuchSlot(SlotId),
    /// The slot does not log now.
    #[error("{0} does not log dirty pages")]
    NotLogging(SlotId),
    /// The caller's bitmap cannot hold the log.
    #[error("{id}: the bitmap has {given} words, the log {needed}")]
    TooShort {
        /// The slot.
        id: SlotId,
        /// Words needed.
        needed: usize,
        /// Words given.
        given: usize,
    },
    /// The range to clear does not begin at a multiple of 64 or runs past the slot.
    #[error(
        "{id}: pages from {first_page} on are no range of its {pages} pages that begins at a multiple of 64"
    )]
    BadRange {
        /// The slot.
        id: SlotId,
        /// First page given.
        first_page: u64,
        /// Pages of the slot.
        pages: u64,
    },
    /// The calling thread must not wait.
    #[error(transparent)]
    WouldDeadlock(#[from] WouldDeadlock),
}

/// Why a page could not be pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// No memslot there.
    #[error("no memory at guest-physical {0}")]
    NoMemory(Gpa),
    /// The slot, or the host, forbids writing.
    #[error("the page at guest-physical {0} is read-only")]
    ReadOnly(Gpa),
}

/// The thread that made it resolves faults of guest memory: [`Mmu::resolver`].
#[derive(Debug)]
#[must_use = "the thread is a resolver while this lives"]
pub struct Resolver {
    _mark: Mark,
}
