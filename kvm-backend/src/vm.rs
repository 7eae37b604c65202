// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest with its memory, its engine and, on KVM, its VM.

use crate::cpu::{Cpu, KvmCpu, NewCpuError, SoftCpu, Watch};
use crate::guest::{GuestImage, ImageError};
use crate::kvm::{self, KvmError, KvmMachine, TableArena};
use crate::memory::{Memories, MemoryError};
use mmu_core::addr::{Gpa, Machine, PAGE_SIZE};
use mmu_core::memory::{AllocatedMemory, Backing, OutOfMemory, SlotConfig, SlotError};
use mmu_core::paging::Regs as ControlRegs;
use mmu_core::sync::AtomicU64;
use mmu_core::vcpu::{VcpuError, VcpuHandle};
use mmu_core::{Config, ConfigError, Mmu};
use std::sync::Arc;

/// Memslots that a guest's memory is cut into.
const SLOTS: usize = 2;
/// First machine address of the guest's memory: not its guest-physical one, and above the pages that
/// KVM wants for itself.
const MEMORY_BASE: u64 = 4 << 30;
/// Machine address of the shadow tables of a software VM.
const SOFT_TABLES: u64 = 1 << 46;

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The processor, through KVM.
    Kvm,
    /// The emulator, over the library's software vCPU.
    Soft,
}

impl Backend {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        }
    }

    /// The best backend here, and why: KVM where it can be opened and has what is needed.
    #[must_use]
    pub fn best() -> (Self, String) {
        match kvm::probe().and_then(|probe| probe.check()) {
            Ok(()) => (Self::Kvm, "/dev/kvm can be opened and has what is needed".to_owned()),
            Err(error) => (Self::Soft, error.to_string()),
        }
    }
}

/// Why a guest could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// A number is out of range.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Guest memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory for the shadow tables cannot be had.
    #[error(transparent)]
    Tables(#[from] OutOfMemory),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The engine refused its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The engine refused a memslot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The engine refused a vCPU.
    #[error(transparent)]
    Cpu(#[from] NewCpuError),
}

impl From<VcpuError> for VmError {
    fn from(error: VcpuError) -> Self {
        Self::Cpu(error.into())
    }
}

/// The arena of a KVM machine as the engine's table memory: zeroed words, of which the first is at the
/// arena's machine address.
#[derive(Debug)]
pub struct Tables(TableArena);

impl Tables {
    /// Of this arena, which lives as long.
    #[must_use]
    pub fn new(arena: TableArena) -> Self {
        Self(arena)
    }
}

// SAFETY: the arena owns its mapping, whose pages live as long as the arena, and hands it out as a
// pointer only.
unsafe impl Backing for Tables {
    fn words(&self) -> &[AtomicU64] {
        let len = self.0.frames() as usize * (PAGE_SIZE as usize / 8);
        // SAFETY: the mapping has that many words, is page-aligned and zeroed, and is accessed as
        // atomics or by processors.
        unsafe { std::slice::from_raw_parts(self.0.host().as_ptr().cast(), len) }
    }

    fn machine(&self) -> Machine {
        Machine(self.0.machine())
    }
}

/// A guest.
#[derive(Debug)]
pub struct Vm {
    mmu: Mmu,
    image: GuestImage,
    kvm: Option<Arc<KvmMachine>>,
    memories: Memories,
    /// What the memslots that were there from the start are backed by, from guest-physical 0 on.
    memory: Vec<Arc<dyn Backing>>,
}

impl Vm {
    /// A guest with all of its memory, and the programs and page tables in it.
    ///
    /// # Errors
    ///
    /// [`VmError`], which names the value.
    pub fn new(
        backend: Backend,
        vcpus: usize,
        memory_mib: u64,
        log_dirty: bool,
    ) -> Result<Self, VmError> {
        let image = GuestImage::new(memory_mib, vcpus)?;
        let frames = table_frames(image.layout().memory(), vcpus);
        let (kvm, config, end) = match backend {
            Backend::Kvm => {
                let kvm = KvmMachine::new(vcpus, frames)?;
                let (index, value) = kvm.stub_root_entry();
                let config = Config::new(Arc::new(Tables::new(kvm.tables())));
                let end = kvm.memory_limit();
                // Every processor has pages of 2 MiB.
                let config = config.largest_page(2 << 20).reserve_root_entry(index, value);
                (Some(kvm), config, end)
            }
            Backend::Soft => {
                let size = u64::from(frames) * PAGE_SIZE;
                let tables = AllocatedMemory::try_at(size, Machine(SOFT_TABLES))?;
                (None, Config::new(Arc::new(tables)), SOFT_TABLES)
            }
        };
        let memories = Memories::new(kvm.clone(), MEMORY_BASE..end);
        let mut vm = Self { mmu: Mmu::new(config)?, image, kvm, memories, memory: Vec::new() };
        for (n, (gpa, size)) in vm.image.layout().split(SLOTS).into_iter().enumerate() {
            let backing = vm.memories.allocate_for(gpa, size)?;
            let config = SlotConfig::new(n as u32, Gpa(gpa), Arc::clone(&backing));
            vm.mmu.create_slot(if log_dirty { config.log_dirty() } else { config })?;
            vm.memory.push(backing);
        }
        let mmu = &vm.mmu;
        vm.image.write(&mut |gpa, bytes| {
            mmu.write_phys(Gpa(gpa), bytes);
        });
        Ok(vm)
    }

    /// Zeroed memory for another memslot of the running guest; on KVM the processor can reach it
    /// until its last owner is gone. See [`crate::memory`] for the system calls.
    ///
    /// # Errors
    ///
    /// [`MemoryError`], which names the size.
    pub fn new_memory(&self, size: u64) -> Result<Arc<dyn Backing>, MemoryError> {
        self.memories.allocate(size)
    }

    /// The engine.
    #[must_use]
    pub fn mmu(&self) -> &Mmu {
        &self.mmu
    }

    /// What the guest consists of.
    #[must_use]
    pub fn image(&self) -> &GuestImage {
        &self.image
    }

    /// Memslots that were there from the start; their numbers are those below this one.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.memory.len()
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.image.layout().vcpus()
    }

    /// Takes vCPU `id` for the calling thread.
    ///
    /// # Errors
    ///
    /// [`VmError`].
    pub fn cpu(&self, id: usize, watch: Watch) -> Result<(Box<dyn Cpu>, VcpuHandle), VmError> {
        let regs = ControlRegs::long_mode(self.image.cr3());
        Ok(match &self.kvm {
            Some(kvm) => {
                let cpu = KvmCpu::new(&self.mmu, kvm.vcpu(id)?, regs, watch)?;
                let handle = cpu.handle();
                (Box::new(cpu), handle)
            }
            None => {
                let cpu = SoftCpu::new(&self.mmu, regs, watch)?;
                let handle = cpu.handle();
                (Box::new(cpu), handle)
            }
        })
    }

    /// Writes a word of guest memory as a device would.
    pub fn write_word(&self, gpa: u64, value: u64) {
        self.mmu.write_phys(Gpa(gpa), &value.to_le_bytes());
    }

    /// The word at `gpa`, rounded down, of the memory that was there from the start.
    #[must_use]
    pub fn word(&self, gpa: u64) -> Option<&AtomicU64> {
        let mut at = gpa / 8;
        self.memory.iter().find_map(|backing| {
            let words = backing.words();
            let word = words.get(usize::try_from(at).ok()?);
            at = at.wrapping_sub(words.len() as u64);
            word
        })
    }

    /// Calls `f` with a function that reads guest-physical memory.
    pub fn with_memory<R>(&self, f: impl FnOnce(&mut dyn FnMut(u64, &mut [u8])) -> R) -> R {
        let map = self.mmu.memory();
        f(&mut |gpa, buf| {
            let read = map.read(Gpa(gpa), buf);
            buf[read..].fill(0);
        })
    }
}

/// Shadow tables for a guest whose memory is mapped a few times over, in units of 4 KiB.
fn table_frames(memory: u64, vcpus: usize) -> u32 {
    let leaves = 2 * memory / (512 * PAGE_SIZE);
    (leaves + 512 + 64 * vcpus as u64).next_multiple_of(512).min(u64::from(u32::MAX / 2)) as u32
}
