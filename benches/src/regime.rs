// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The same engine under three regimes of locking.
//!
//! | regime | a walk | a load through a software TLB | a fault, an emulated write | a change of the memory map |
//! | --- | --- | --- | --- | --- |
//! | `rcu` | is in a read section and loads the published map | as the engine does it | as the engine does it | as the engine does it |
//! | `rwlock` | holds the lock for reading | holds it for reading | holds it for writing | holds it for writing |
//! | `mutex` | holds the lock | holds the lock | holds the lock | holds the lock |
//!
//! The operations are the engine's own in all three. Walks under a lock are spared the pin: the
//! lock protects a handle to the map, which whoever changes the map replaces before letting go.
//! Waiting for other vCPUs is done without the lock. The locks are the standard library's: a
//! futex each, which spin before they sleep and let whoever is quickest have the lock.

use crate::figure::Failure;
use crate::guest::regs;
use mmu_core::Mmu;
use mmu_core::addr::Gva;
use mmu_core::memory::{Hint, MemoryMap};
use mmu_core::paging::{Access, Fault, PagingMode, Walk};
use mmu_core::shadow::Processor;
use mmu_core::vcpu::{self, Vcpu};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Who excludes whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regime {
    /// The engine as it is.
    Rcu,
    /// Walks share, the rest excludes.
    Rwlock,
    /// Everything excludes everything.
    Mutex,
}

impl Regime {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Rcu, Self::Rwlock, Self::Mutex];

    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rcu => "rcu",
            Self::Rwlock => "rwlock",
            Self::Mutex => "mutex",
        }
    }
}

/// An engine under a regime.
#[derive(Debug)]
pub struct Vm {
    mmu: Mmu,
    gate: Gate,
}

#[derive(Debug)]
enum Gate {
    Rcu,
    Rwlock(RwLock<Arc<MemoryMap>>),
    Mutex(Mutex<Arc<MemoryMap>>),
}

impl Vm {
    /// Puts an engine under a regime.
    pub fn new(mmu: Mmu, regime: Regime) -> Self {
        let gate = match regime {
            Regime::Rcu => Gate::Rcu,
            Regime::Rwlock => Gate::Rwlock(RwLock::new(mmu.memory())),
            Regime::Mutex => Gate::Mutex(Mutex::new(mmu.memory())),
        };
        Self { mmu, gate }
    }

    /// The engine, for what is not measured.
    pub fn mmu(&self) -> &Mmu {
        &self.mmu
    }

    /// Uses of what faults have derived.
    #[inline]
    pub fn shared<T>(&self, operation: impl FnOnce() -> T) -> T {
        match &self.gate {
            Gate::Rcu => operation(),
            Gate::Rwlock(lock) => {
                let _held = lock.read().unwrap_or_else(PoisonError::into_inner);
                operation()
            }
            Gate::Mutex(_) => self.exclusive(operation),
        }
    }

    /// A fault, or a guest's write to its page tables.
    #[inline]
    pub fn exclusive<T>(&self, operation: impl FnOnce() -> T) -> T {
        match &self.gate {
            Gate::Rcu => operation(),
            Gate::Rwlock(lock) => {
                let _held = lock.write().unwrap_or_else(PoisonError::into_inner);
                operation()
            }
            Gate::Mutex(lock) => {
                let _held = lock.lock().unwrap_or_else(PoisonError::into_inner);
                operation()
            }
        }
    }

    /// A change of the memory map.
    pub fn change<T>(&self, operation: impl FnOnce(&Mmu) -> T) -> T {
        match &self.gate {
            Gate::Rcu => operation(&self.mmu),
            Gate::Rwlock(lock) => {
                let mut map = lock.write().unwrap_or_else(PoisonError::into_inner);
                let result = operation(&self.mmu);
                *map = self.mmu.memory();
                result
            }
            Gate::Mutex(lock) => {
                let mut map = lock.lock().unwrap_or_else(PoisonError::into_inner);
                let result = operation(&self.mmu);
                *map = self.mmu.memory();
                result
            }
        }
    }
}

/// A processor that is never inside for long and remembers nothing outside.
#[derive(Debug)]
pub struct Brief;

impl Processor for Brief {
    fn kick(&self) {}

    fn forgets_outside(&self) -> bool {
        true
    }
}

/// One thread that walks a guest's tables.
#[derive(Debug)]
pub struct Walker {
    vcpu: Vcpu,
    mode: PagingMode,
    hint: Hint,
}

impl Walker {
    /// What is walked for.
    pub const ACCESS: Access = Access::read().user();

    /// For the tables at `root`.
    ///
    /// # Errors
    ///
    /// What the engine says of the root.
    pub fn new(vm: &Vm, root: u64) -> Result<Self, Failure> {
        let regs = regs(root);
        let vcpu = vm.mmu.create_vcpu(Arc::new(Brief), regs).map_err(Failure::in_step("vCPU"))?;
        let mode = PagingMode::new(&regs).map_err(Failure::in_step("registers"))?;
        Ok(Self { vcpu, mode, hint: Hint::default() })
    }

    /// Many walks. What each of them costs in shared memory depends on the regime.
    pub fn session<'w>(&'w self, vm: &'w Vm) -> Session<'w> {
        match vm.gate {
            Gate::Rcu => Session::Open(self.vcpu.walker()),
            _ => self.single(vm),
        }
    }

    /// Many walks, each protected by itself.
    pub fn single<'w>(&'w self, vm: &'w Vm) -> Session<'w> {
        Session::Single { walker: self, vm }
    }

    /// One walk, protected by itself.
    #[inline(always)]
    pub fn walk(&self, vm: &Vm, gva: u64) -> Result<Walk, Fault> {
        let under = |map: &MemoryMap| self.mode.walk(map, &self.hint, Gva(gva), Self::ACCESS);
        match &vm.gate {
            Gate::Rcu => self.vcpu.translate(Gva(gva), Some(Self::ACCESS)),
            Gate::Rwlock(lock) => under(&lock.read().unwrap_or_else(PoisonError::into_inner)),
            Gate::Mutex(lock) => under(&lock.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// Walks one after the other, each protected from changes.
#[derive(Debug)]
pub enum Session<'w> {
    /// One read section that goes on from walk to walk, and looks at each for a newer map.
    Open(vcpu::Walker<'w>),
    /// Each walk pins, or takes the lock.
    Single {
        /// Who walks.
        walker: &'w Walker,
        /// Whose lock.
        vm: &'w Vm,
    },
}

impl Session<'_> {
    /// The next walk.
    #[inline(always)]
    pub fn walk(&mut self, gva: u64) -> Result<Walk, Fault> {
        match self {
            Self::Open(open) => open.walk(Gva(gva), Walker::ACCESS),
            Self::Single { walker, vm } => walker.walk(vm, gva),
        }
    }
}
