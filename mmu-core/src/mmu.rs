// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VM-wide handle.

use crate::addr::{ENTRIES, Gpa, PAGE_SIZE};
use crate::memory::{Backing, MemoryMap, SlotConfig, SlotError, SlotId};
use crate::mmio::Bus;
use crate::paging::Regs;
use crate::shadow::{AuditReport, Disagreement, Engine, Processor, StatsSnapshot};
use crate::sync::epoch::Collector;
use crate::vcpu::{SoftProcessor, SoftVcpu, Vcpu, VcpuError};
use std::sync::Arc;

/// Fewest table frames an engine works with: a full path for each of several vCPUs.
pub const MIN_TABLE_FRAMES: u64 = if cfg!(loom) { 4 } else { 64 };

/// How an engine is made.
#[derive(Debug)]
pub struct Config {
    /// Memory for shadow tables; its size bounds their number. The consumer's processor must see
    /// it at [`Backing::machine`]. It must be zeroed and belong to this engine alone.
    pub tables: Arc<dyn Backing>,
    /// An entry of every root table that belongs to the consumer: (index, value). The engine puts
    /// the value there and leaves it alone; guests cannot use that part of the address space.
    pub reserved_root_entry: Option<(usize, u64)>,
    /// The reclaimer.
    pub collector: Collector,
}

impl Config {
    /// An engine with these tables and no reserved entry.
    #[must_use]
    pub fn new(tables: Arc<dyn Backing>) -> Self {
        Self { tables, reserved_root_entry: None, collector: Collector::new() }
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
/// | [`Vcpu::fault`], [`Vcpu::read`], [`Vcpu::write`], [`Vcpu::translate`], [`Mmu::memory`], [`Mmu::stats`] | nobody (a fault may spin briefly on one page's reverse map) |
/// | [`Vcpu::must_wait`], after a fault that stalled | nobody for a flush: it is polled; for table frames, once vCPUs have drained, readers |
/// | [`Mmu::create_slot`] | other writers of the map |
/// | [`Mmu::dirty_log`] | vCPUs inside the guest, until they come out or drain |
/// | [`Mmu::delete_slot`] | other writers, readers, vCPUs inside the guest |
///
/// A thread that is inside the guest with its vCPU must not make a call that waits for vCPUs.
#[derive(Clone, Debug)]
pub struct Mmu {
    engine: Arc<Engine>,
    bus: Arc<Bus>,
}

impl Mmu {
    /// A VM without memory.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the value.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { tables, reserved_root_entry, collector } = config;
        let frames = tables.size() / PAGE_SIZE;
        if frames < MIN_TABLE_FRAMES {
            return Err(ConfigError::TooFewFrames { frames });
        }
        let machine = tables.machine();
        let end = machine.0.checked_add(tables.size());
        if machine.page_offset() != 0 || end.is_none_or(|end| end > 1 << 52) {
            return Err(ConfigError::BadMachineAddress(machine.0));
        }
        if let Some((index, _)) = reserved_root_entry.filter(|(index, _)| *index >= ENTRIES) {
            return Err(ConfigError::BadReservedEntry(index));
        }
        let bus = Arc::new(Bus::new());
        let engine = Arc::new(Engine::new(tables, reserved_root_entry, collector));
        Ok(Self { engine, bus })
    }

    /// Adds a memslot. Running vCPUs see it from their next fault on.
    ///
    /// # Errors
    ///
    /// [`SlotError`], which names the value; nothing has changed then.
    pub fn create_slot(&self, config: SlotConfig) -> Result<(), SlotError> {
        self.engine.create_slot(config)
    }

    /// Deletes a memslot. When this returns, no reader, shadow entry or vCPU uses its memory, and
    /// the backing is released unless a holder of an earlier [`Mmu::memory`] keeps it.
    ///
    /// # Errors
    ///
    /// [`SlotError::NoSuchSlot`].
    pub fn delete_slot(&self, id: SlotId) -> Result<(), SlotError> {
        self.engine.delete_slot(id)
    }

    /// The memory map of this moment, for holders that outlive a read section. Keeps the memory of
    /// its slots alive.
    #[must_use]
    pub fn memory(&self) -> Arc<MemoryMap> {
        self.engine.memory.snapshot()
    }

    /// Takes the slot's dirty log into `bitmap` (bit `n` of word `w` is page `64 w + n`; words
    /// beyond the slot are cleared) and returns the number of dirty pages. Pages written from now
    /// on are in a later log (R13). With several callers at a time each page is in one caller's.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError`]; nothing has been taken then.
    pub fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<u64, DirtyLogError> {
        let map = self.engine.memory.snapshot();
        let slot = map.by_id(id).ok_or(DirtyLogError::NoSuchSlot(id))?;
        if !slot.logs_dirty() {
            return Err(DirtyLogError::NotLogging(id));
        }
        let (needed, given) = (slot.pages().div_ceil(64) as usize, bitmap.len());
        if given < needed {
            return Err(DirtyLogError::TooShort { id, needed, given });
        }
        Ok(self.engine.harvest(slot, bitmap, &self.engine.collector.register()))
    }

    /// Writes guest-physical memory for a device: tells the shadow and the dirty log. Returns how
    /// many bytes could be written before the first one without memory.
    pub fn write_phys(&self, gpa: Gpa, bytes: &[u8]) -> usize {
        let handle = self.engine.collector.register();
        let guard = handle.pin();
        let map = self.engine.memory.load(&guard);
        self.engine.write_phys(&self.engine.stats, &guard, map, gpa, bytes)
    }

    /// Tears the whole shadow down; faults build it again.
    pub fn zap_all(&self) {
        let handle = self.engine.collector.register();
        self.engine.zap_all(&mut handle.pin());
    }

    /// Adds a vCPU with these registers.
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

    /// The device bus.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
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
        let handle = self.engine.collector.register();
        let guard = handle.pin();
        self.engine.audit(&guard)
    }

    /// Hands this thread's garbage on and frees what can be freed; for VMs that idle.
    pub fn maintain(&self) {
        self.engine.collector.register().pin().flush();
        self.engine.memory.reclaim();
    }
}

/// Why a dirty log could not be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// No such slot.
    #[error("{0} does not exist")]
    NoSuchSlot(SlotId),
    /// The slot was created without a log.
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
}
