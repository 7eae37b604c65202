// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VM: its memory slots, its vCPUs' seats, the table arena and the stub.
//!
//! Guarantees: memory lent to the VM is kept alive until its slot is gone; a failed call changes nothing; a vCPU is
//! held by one [`KvmVcpu`] at a time and may be taken again after that one was dropped.
//!
//! System calls: `ioctl` on the VM (memory slots) by whoever calls `add_memory` and `remove_memory`.
//!
//! `unsafe` here: handing memory to KVM.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};

use super::kick::{self, KickState, RunPage};
use super::layout::{self, ARENA_GRANULE, ARENA_OFFSET, MAX_TABLE_FRAMES, MAX_VCPUS, PAGE};
use super::mapping::Mapping;
use super::region::Region;
use super::state::Features;
use super::vcpu::KvmVcpu;
use super::{KvmError, STUB_SLOT, TrapReport, probe, selftest, stub};

/// Slot of the stub region.
const STUB_MEM: u32 = 0;
/// Slot of the table arena.
const ARENA_MEM: u32 = 1;
/// First slot of guest memory.
const FIRST_SLOT: u32 = 2;

/// The memory that holds the page tables vCPUs run on. Clones share it; it lives as long as any of
/// them, whether the machine still exists or not.
#[derive(Clone, Debug)]
pub struct TableArena {
    memory: Arc<Mapping>,
    machine: u64,
}

impl TableArena {
    /// The first byte, on the host. Page-aligned; zeroed when the machine was made.
    #[must_use]
    pub fn host(&self) -> NonNull<u8> {
        self.memory.start()
    }

    /// Number of 4 KiB frames.
    #[must_use]
    pub fn frames(&self) -> u32 {
        (self.memory.len() as u64 / PAGE) as u32
    }

    /// Machine address of the first frame: what an entry or CR3 says.
    #[must_use]
    pub fn machine(&self) -> u64 {
        self.machine
    }
}

/// What is kept of a vCPU while nobody holds it.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) fd: VcpuFd,
    pub(super) xsave: Option<Box<kvm_xsave>>,
}

/// A slot of guest memory.
struct Slot {
    start: u64,
    end: u64,
    /// Keeps the memory mapped.
    _owner: Arc<dyn Any + Send + Sync>,
}

/// A VM whose vCPUs run on page tables of the caller's making. See the [module](super).
pub struct KvmMachine {
    // Dropped in this order: vCPUs, VM, then the memory it used.
    seats: Mutex<Vec<Option<Seat>>>,
    vm: VmFd,
    slots: Mutex<BTreeMap<u32, Slot>>,
    max_slots: u32,
    region: Region,
    arena: TableArena,
    base: u64,
    features: Features,
    trap: TrapReport,
}

impl fmt::Debug for KvmMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmMachine")
            .field("vcpus", &lock(&self.seats).len())
            .field("slots", &lock(&self.slots).len())
            .field("arena", &self.arena)
            .finish_non_exhaustive()
    }
}

impl KvmMachine {
    /// Makes a VM with `vcpus` vCPUs and an arena of at least `table_frames` frames (rounded up to 512). The
    /// first machine of a process runs the [self-test](super::self_test) first.
    ///
    /// # Errors
    ///
    /// See [`KvmError`]: no KVM, a missing capability, numbers out of range, no memory, or a failed self-test.
    pub fn new(vcpus: usize, table_frames: u32) -> Result<Arc<KvmMachine>, KvmError> {
        let trap = selftest::self_test()?;
        Self::build(vcpus, table_frames, trap)
    }

    /// As `new`, on a host that behaves like `trap`.
    pub(super) fn build(
        vcpus: usize,
        table_frames: u32,
        trap: TrapReport,
    ) -> Result<Arc<KvmMachine>, KvmError> {
        range("table frames", table_frames.into(), MAX_TABLE_FRAMES.into())?;
        let frames = table_frames.next_multiple_of(ARENA_GRANULE);
        let bytes = frames as usize * PAGE as usize;

        let kvm = probe::open()?;
        let probe = probe::ask(&kvm);
        probe.check()?;
        let max = probe.get("max_vcpus").clamp(1, MAX_VCPUS as i32);
        range("vCPUs", vcpus as u64, max as u64)?;
        kick::install_handler()?;
        let features = Features::of(&kvm)?;
        let base = layout::machine_base(features.width);
        let end = base + ARENA_OFFSET + bytes as u64;
        if features.width < 33 || end > 1 << features.width.min(52) {
            return Err(KvmError::AddressWidth { width: features.width, end });
        }

        let vm = kvm.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
        // Only Intel processors without unrestricted guest mode use these, and only before the
        // first entry in 64-bit mode; KVM wants them to be somewhere.
        vm.set_identity_map_address(layout::KVM_RESERVED)
            .map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address((layout::KVM_RESERVED + PAGE) as usize)
            .map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;

        let memory = Mapping::new(bytes).map_err(|error| KvmError::Memory {
            what: "table arena",
            bytes,
            error,
        })?;
        let arena = TableArena { memory: Arc::new(memory), machine: base + ARENA_OFFSET };
        let region = Region::new(base, vcpus, arena.machine, frames)?;

        let seats = (0..vcpus)
            .map(|id| {
                let fd = vm.create_vcpu(id as u64).map_err(KvmError::call("KVM_CREATE_VCPU"))?;
                let xsave = features.init(&fd, id)?;
                Ok(Some(Seat { fd, xsave }))
            })
            .collect::<Result<_, KvmError>>()?;
        let machine = KvmMachine {
            seats: Mutex::new(seats),
            vm,
            slots: Mutex::default(),
            max_slots: probe.get("nr_memslots").max(32) as u32,
            region,
            arena,
            base,
            features,
            trap,
        };
        machine.set_region(
            STUB_MEM,
            base,
            machine.region.memory().start(),
            machine.region.memory().len() as u64,
            0,
        )?;
        machine.set_region(
            ARENA_MEM,
            machine.arena.machine,
            machine.arena.host(),
            bytes as u64,
            0,
        )?;
        Ok(Arc::new(machine))
    }

    /// The table arena.
    #[must_use]
    pub fn tables(&self) -> TableArena {
        self.arena.clone()
    }

    /// The entry that every root needs: its index and its value, the same for all roots.
    #[must_use]
    pub fn stub_root_entry(&self) -> (usize, u64) {
        (STUB_SLOT, self.region.root_entry())
    }

    /// Machine addresses of guest memory lie below this one. (The 16 KiB from 0xfffbc000 on are KVM's.)
    #[must_use]
    pub fn memory_limit(&self) -> u64 {
        self.base
    }

    /// How this host's KVM behaves.
    #[must_use]
    pub fn trap(&self) -> &TrapReport {
        &self.trap
    }

    /// The VM, for calls this type does not make (dirty logs, device ioctls). Slots 0 and 1 are taken.
    #[must_use]
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Makes `len` bytes at `host` the VM's memory at machine address `machine`. Returns the slot. `owner` is kept
    /// until the slot is removed.
    ///
    /// # Errors
    ///
    /// [`KvmError::BadSlot`] for misaligned or overlapping addresses, or when no slot is left;
    /// [`KvmError::Call`] if KVM refuses.
    ///
    /// # Safety
    ///
    /// While `owner` lives, the memory must stay mapped, and must not be accessed by Rust references: the
    /// guest reads and writes it at any time.
    pub unsafe fn add_memory(
        &self,
        machine: u64,
        host: NonNull<u8>,
        len: u64,
        read_only: bool,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<u32, KvmError> {
        let bad = |why| {
            let host = host.as_ptr() as u64;
            Err(KvmError::BadSlot { machine, host, len, why })
        };
        if len == 0 || (machine | host.as_ptr() as u64 | len) % PAGE != 0 {
            return bad("not whole pages");
        }
        let Some(end) = machine.checked_add(len).filter(|&end| end <= self.base) else {
            return bad("beyond the machine's memory limit");
        };
        if machine < layout::KVM_RESERVED_END && layout::KVM_RESERVED < end {
            return bad("overlaps pages that KVM reserves");
        }
        if read_only
            && !self.vm.check_extension_raw(kvm_bindings::KVM_CAP_READONLY_MEM.into()).is_positive()
        {
            return Err(KvmError::MissingCapability("readonly_mem"));
        }
        let mut slots = lock(&self.slots);
        if slots.values().any(|s| machine < s.end && s.start < end) {
            return bad("overlaps another slot");
        }
        let Some(slot) = (FIRST_SLOT..self.max_slots).find(|n| !slots.contains_key(n)) else {
            return bad("no slot left");
        };
        let flags = if read_only { KVM_MEM_READONLY } else { 0 };
        self.set_region(slot, machine, host, len, flags)?;
        slots.insert(slot, Slot { start: machine, end, _owner: owner });
        Ok(slot)
    }

    /// Takes a slot away: afterwards no vCPU reaches its memory, and its owner is released.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoSlot`] if there is none of that number, [`KvmError::Call`] if KVM refuses.
    pub fn remove_memory(&self, slot: u32) -> Result<(), KvmError> {
        let mut slots = lock(&self.slots);
        let Some(start) = slots.get(&slot).map(|s| s.start) else {
            return Err(KvmError::NoSlot { slot });
        };
        self.set_region(slot, start, NonNull::dangling(), 0, 0)?;
        let gone = slots.remove(&slot);
        drop(slots);
        // The owner may run anything when it is dropped: not under the lock.
        drop(gone);
        Ok(())
    }

    /// Takes vCPU `id`, in its initial state: registers zero, no root.
    ///
    /// # Errors
    ///
    /// [`KvmError::NoVcpu`] if there is none or somebody holds it; [`KvmError::Call`] if KVM refuses.
    pub fn vcpu(self: &Arc<Self>, id: usize) -> Result<KvmVcpu, KvmError> {
        let mut seats = lock(&self.seats);
        let vcpus = seats.len();
        let Some(place) = seats.get_mut(id) else {
            return Err(KvmError::NoVcpu { id, vcpus, why: "unknown" });
        };
        let Some(seat) = place.take() else {
            return Err(KvmError::NoVcpu { id, vcpus, why: "in use" });
        };
        match RunPage::new(seat.fd.as_raw_fd()) {
            Ok(page) => {
                drop(seats);
                Ok(KvmVcpu::new(Arc::clone(self), id, seat, Arc::new(KickState::new(page))))
            }
            Err(error) => {
                *place = Some(seat);
                Err(KvmError::Call { call: "mmap of the vCPU", error })
            }
        }
    }

    /// The generation that vCPU `id` has acknowledged last (0 at first). Any thread may ask.
    ///
    /// # Panics
    ///
    /// If there is no such vCPU.
    #[must_use]
    pub fn acknowledged(&self, id: usize) -> u64 {
        self.region.word(self.region.vcpu(id).queue + stub::ACK_OFFSET).load(Ordering::Acquire)
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    pub(super) fn features(&self) -> &Features {
        &self.features
    }

    /// Whether `root` is a frame of the arena.
    pub(super) fn is_table(&self, root: u64) -> bool {
        let offset = root.wrapping_sub(self.arena.machine);
        offset % PAGE == 0 && offset / PAGE < u64::from(self.arena.frames())
    }

    pub(super) fn give_back(&self, id: usize, seat: Seat) {
        lock(&self.seats)[id] = Some(seat);
    }

    fn set_region(
        &self,
        slot: u32,
        guest_phys_addr: u64,
        host: NonNull<u8>,
        memory_size: u64,
        flags: u32,
    ) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr,
            memory_size,
            userspace_addr: if memory_size == 0 { 0 } else { host.as_ptr() as u64 },
        };
        // SAFETY: the memory is this machine's own mapping, or kept by an owner as `add_memory`'s
        // caller promised; it outlives the slot. Size 0 deletes the slot.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))
    }
}

fn range(what: &'static str, asked: u64, max: u64) -> Result<(), KvmError> {
    if asked == 0 || asked > max {
        return Err(KvmError::Range { what, asked, max });
    }
    Ok(())
}

/// The data behind these locks is changed by single assignments: a panic elsewhere leaves it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
