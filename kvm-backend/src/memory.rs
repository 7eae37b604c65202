// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory for a guest that runs: what backs its memslots, and where the processor sees it.
//!
//! Guarantees: two pieces that live at the same time never share a machine address; on KVM the
//! processor can reach a piece from before it is handed out until its last owner lets go of it.
//! Then its KVM slot goes first, its machine addresses become free next, and its pages last. Should
//! KVM refuse to take the slot away, addresses and pages are kept for as long as the VM lives.
//!
//! System calls: `ioctl` on the VM (KVM_SET_USER_MEMORY_REGION) by the thread that makes a piece
//! and by the one that drops its last owner. The engine lets go of a deleted slot's backing in the
//! call that deletes it, or with the last holder of a [`mmu_core::Mmu::memory`] (which whoever takes a
//! dirty log is meanwhile): never on a vCPU's thread.
//!
//! `unsafe` here: lending the pages to KVM and to the engine.

use crate::kvm::{KvmError, KvmMachine};
use mmu_core::addr::{Machine, PAGE_SIZE};
use mmu_core::memory::{AllocatedMemory, Backing, OutOfMemory};
use mmu_core::sync::AtomicU64;
use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// No size for memory.
    #[error("{size:#x} bytes are no whole pages of guest memory")]
    BadSize {
        /// The size asked for.
        size: u64,
    },
    /// All machine addresses are taken.
    #[error("no machine addresses are left for {size:#x} bytes of guest memory")]
    NoAddresses {
        /// The size asked for.
        size: u64,
    },
    /// The host has no memory left.
    #[error(transparent)]
    Host(#[from] OutOfMemory),
    /// KVM refused it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The next larger page than 4 KiB.
const LARGE_PAGE: u64 = 2 << 20;

/// Where a guest's memory comes from. Clones give from the same.
#[derive(Clone, Debug)]
pub(crate) struct Memories(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    kvm: Option<Arc<KvmMachine>>,
    /// Free machine addresses: start and end, neither overlapping nor adjacent.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl Memories {
    /// Memory at these machine addresses, in this VM if it is KVM's.
    pub(crate) fn new(kvm: Option<Arc<KvmMachine>>, addresses: Range<u64>) -> Self {
        let free = Some(addresses).filter(|a| !a.is_empty()).map(|a| (a.start, a.end));
        Self(Arc::new(Shared { kvm, free: Mutex::new(free.into_iter().collect()) }))
    }

    /// `size` zeroed bytes that the processor can reach.
    ///
    /// # Errors
    ///
    /// [`MemoryError`], which names the size; nothing is taken then.
    pub(crate) fn allocate(&self, size: u64) -> Result<Arc<dyn Backing>, MemoryError> {
        self.allocate_for(0, size)
    }

    /// The same for memory at a guest-physical address: where there are large pages, they lie alike in
    /// guest-physical and machine addresses, so that the engine can map them whole.
    pub(crate) fn allocate_for(
        &self,
        gpa: u64,
        size: u64,
    ) -> Result<Arc<dyn Backing>, MemoryError> {
        if size == 0 || size % PAGE_SIZE != 0 {
            return Err(MemoryError::BadSize { size });
        }
        let start = self.0.take(gpa, size).ok_or(MemoryError::NoAddresses { size })?;
        match self.lend(start, size) {
            Ok(lent) => Ok(Arc::new(lent)),
            Err(error) => {
                self.0.give_back(start, size);
                Err(error)
            }
        }
    }

    fn lend(&self, start: u64, size: u64) -> Result<Lent, MemoryError> {
        let pages = Arc::new(AllocatedMemory::try_at(size, Machine(start))?);
        let slot = match &self.0.kvm {
            Some(kvm) => {
                let host = NonNull::from(pages.words()).cast();
                let owner = Arc::clone(&pages);
                // SAFETY: the owner keeps the pages, which are only ever lent as atomics.
                Some(unsafe { kvm.add_memory(start, host, size, false, owner) }?)
            }
            None => None,
        };
        Ok(Lent { pages, slot, home: Arc::clone(&self.0) })
    }
}

impl Shared {
    /// Takes the first free machine addresses that are enough.
    fn take(&self, gpa: u64, size: u64) -> Option<u64> {
        let large = if size < LARGE_PAGE { PAGE_SIZE } else { LARGE_PAGE };
        let fit = |a: u64| a + (gpa.wrapping_sub(a) & (large - 1));
        let mut free = lock(&self.free);
        let mut stretches = free.iter().map(|(a, b)| (*a, *b));
        let fits = |&(a, b): &(u64, u64)| fit(a) <= b && b - fit(a) >= size;
        let (from, end) = stretches.find(fits)?;
        let start = fit(from);
        free.remove(&from);
        let rest = [(from, start), (start + size, end)];
        free.extend(rest.into_iter().filter(|(a, b)| a < b));
        Some(start)
    }

    fn give_back(&self, start: u64, size: u64) {
        let mut free = lock(&self.free);
        let (mut start, mut end) = (start, start + size);
        if let Some((below, _)) = free.range(..start).next_back().filter(|(_, b)| **b == start) {
            start = *below;
        }
        if let Some(above) = free.remove(&end) {
            end = above;
        }
        free.insert(start, end);
    }
}

/// One piece of memory.
#[derive(Debug)]
struct Lent {
    pages: Arc<AllocatedMemory>,
    /// Of KVM.
    slot: Option<u32>,
    home: Arc<Shared>,
}

// SAFETY: the pages are owned and never replaced; they are only lent as shared atomics.
unsafe impl Backing for Lent {
    fn words(&self) -> &[AtomicU64] {
        self.pages.words()
    }

    fn machine(&self) -> Machine {
        self.pages.machine()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(kvm), Some(slot)) = (&self.home.kvm, self.slot) {
            if kvm.remove_memory(slot).is_err() {
                // The machine is the pages' other owner; nobody else may have the addresses.
                return;
            }
        }
        self.home.give_back(self.machine().0, self.size());
    }
}

/// What this lock protects is whole whenever it is released.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::probe;

    const PAGE: u64 = PAGE_SIZE;
    const START: u64 = 4 << 30;

    fn soft(pages: u64) -> Memories {
        Memories::new(None, START..START + pages * PAGE)
    }

    fn at(memory: &Arc<dyn Backing>) -> u64 {
        (memory.machine().0 - START) / PAGE
    }

    #[test]
    fn addresses_are_used_again_once_nobody_has_the_memory() {
        let memories = soft(8);
        let [a, b, c] = [2, 3, 3].map(|n| memories.allocate(n * PAGE).unwrap());
        assert_eq!([at(&a), at(&b), at(&c)], [0, 2, 5]);
        assert!(
            (0..PAGE / 8)
                .all(|n| b.words()[n as usize].load(mmu_core::sync::Ordering::Relaxed) == 0)
        );
        let holder = Arc::clone(&b);
        drop((b, c));
        let error = memories.allocate(6 * PAGE).unwrap_err();
        assert!(matches!(error, MemoryError::NoAddresses { size: 0x6000 }), "{error}");
        assert_eq!(at(&memories.allocate(3 * PAGE).unwrap()), 5);
        drop(holder);
        assert_eq!(at(&memories.allocate(6 * PAGE).unwrap()), 2);
        drop(a);
        assert_eq!(*lock(&memories.0.free), BTreeMap::from([(START, START + 8 * PAGE)]));
        assert_eq!(at(&memories.allocate(8 * PAGE).unwrap()), 0);
    }

    #[test]
    fn errors_name_the_size_and_take_nothing() {
        let memories = soft(1 << 40);
        for size in [0, 1, PAGE + 8] {
            let error = memories.allocate(size).unwrap_err();
            assert!(error.to_string().contains(&format!("{size:#x}")), "{error}");
        }
        let error = memories.allocate(1 << 51).unwrap_err();
        assert!(
            matches!(error, MemoryError::Host(OutOfMemory { size: 0x8_0000_0000_0000 })),
            "{error}"
        );
        assert_eq!(lock(&memories.0.free).len(), 1);
        assert!(soft(0).allocate(PAGE).is_err());
    }

    #[test]
    fn the_machines_slot_comes_and_goes_with_the_memory() {
        if let Err(error) = probe().and_then(|probe| probe.check()) {
            return println!("skipped: {error}");
        }
        let kvm = KvmMachine::new(1, 512).unwrap();
        let limit = kvm.memory_limit();
        let memories = Memories::new(Some(Arc::clone(&kvm)), limit - 2 * PAGE..limit + PAGE);
        let memory = memories.allocate(PAGE).unwrap();
        let machine = memory.machine().0;
        assert_eq!(machine, limit - 2 * PAGE);
        let taken = |machine| {
            let page = Arc::new(AllocatedMemory::new(PAGE));
            let host = NonNull::from(page.words()).cast();
            // SAFETY: the owner keeps the page, which nobody uses.
            let added = unsafe { kvm.add_memory(machine, host, PAGE, false, page) };
            added.map(|slot| kvm.remove_memory(slot).unwrap()).is_err()
        };
        assert!(taken(machine) && !taken(machine + PAGE));
        // Beyond what the machine can have: the addresses stay free.
        let error = memories.allocate(2 * PAGE).unwrap_err();
        assert!(matches!(error, MemoryError::Kvm(KvmError::BadSlot { .. })), "{error}");
        drop(memory);
        assert!(!taken(machine));
        assert_eq!(memories.allocate(2 * PAGE).unwrap().machine().0, machine);
        assert!(!taken(machine));
    }
}
