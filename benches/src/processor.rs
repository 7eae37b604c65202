// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A processor made of the engine's public parts, whose faults can be put under a lock.
//!
//! The engine's own software vCPU ([`mmu_core::vcpu::SoftVcpu`]) serves its faults itself, where no
//! lock of another regime can be put around them. This one does the same by the interface that any
//! consumer has: it enters, walks the shadow tables in the memory it gave the engine, remembers
//! what it found, forgets what it is told to, and leaves for a fault.

use crate::figure::Failure;
use crate::guest::{PAGE, regs};
use crate::regime::{Brief, Vm};
use mmu_core::addr::{Gva, Machine};
use mmu_core::memory::{AllocatedMemory, Backing};
use mmu_core::paging::{Access, bits};
use mmu_core::shadow::{Downgrade, Outcome, Stall};
use mmu_core::vcpu::{Entry, Vcpu};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries of the TLB, which is direct-mapped, as many as the software vCPU has.
const TLB: usize = 512;
/// Tag of an entry that holds nothing.
const NOTHING: u64 = u64::MAX;

/// A vCPU of a user program that only writes.
#[derive(Debug)]
pub struct Writer {
    vcpu: Vcpu,
    tables: Arc<AllocatedMemory>,
    data: Arc<AllocatedMemory>,
    /// Page address, and index of the page's first word in the data.
    tlb: Box<[(u64, usize); TLB]>,
    root: Machine,
    inside: bool,
}

impl Writer {
    /// For an engine with these shadow tables and a guest that writes to pages of this memory.
    ///
    /// # Errors
    ///
    /// What the engine says of the root.
    pub fn new(
        vm: &Vm,
        root: u64,
        tables: Arc<AllocatedMemory>,
        data: Arc<AllocatedMemory>,
    ) -> Result<Self, Failure> {
        let vcpu = vm.mmu().create_vcpu(Arc::new(Brief), regs(root));
        let vcpu = vcpu.map_err(Failure::in_step("vCPU"))?;
        let tlb = Box::new([(NOTHING, 0); TLB]);
        Ok(Self { vcpu, tables, data, tlb, root: Machine(0), inside: false })
    }

    /// Stores an aligned word.
    ///
    /// # Errors
    ///
    /// The guest cannot write there.
    #[inline]
    pub fn store(&mut self, vm: &Vm, gva: u64, value: u64) -> Result<(), Failure> {
        let (tag, page) = self.tlb[slot(gva)];
        let hit = self.inside && !self.vcpu.is_wanted() && tag == gva & !(PAGE - 1);
        let page = if hit { page } else { self.find(vm, gva)? };
        let word = page + (gva % PAGE / 8) as usize;
        // Release, as x86 stores are.
        self.data.words()[word].store(value, Ordering::Release);
        Ok(())
    }

    /// The page behind an address, from the shadow tables or a fault.
    #[cold]
    fn find(&mut self, vm: &Vm, gva: u64) -> Result<usize, Failure> {
        loop {
            self.enter()?;
            if let Some(page) = self.walk(gva) {
                self.tlb[slot(gva)] = (gva & !(PAGE - 1), page);
                return Ok(page);
            }
            self.leave();
            match vm.exclusive(|| self.vcpu.fault(Gva(gva), Access::write().user())) {
                Ok(Outcome::Fixed) => {}
                Ok(other) => return Err(Failure::new(format!("store to {gva:#x}: {other:?}"))),
                Err(stall) => self.wait(stall),
            }
        }
    }

    fn enter(&mut self) -> Result<(), Failure> {
        self.leave();
        loop {
            let tlb = &mut self.tlb;
            let entered = self.vcpu.enter(true, |downgrade| match downgrade {
                Downgrade::Entry { gva: Some(gva), .. } => {
                    let entry = &mut tlb[slot(gva.0)];
                    if entry.0 == gva.0 {
                        entry.0 = NOTHING;
                    }
                }
                _ => tlb.fill((NOTHING, 0)),
            });
            match entered {
                Ok(Entry::Run { root, generation }) => {
                    self.vcpu.drained(generation);
                    if root != self.root {
                        self.tlb.fill((NOTHING, 0));
                    }
                    (self.root, self.inside) = (root, true);
                    return Ok(());
                }
                Ok(other) => return Err(Failure::new(format!("entry: {other:?}"))),
                Err(stall) => self.wait(stall),
            }
        }
    }

    /// Goes outside until the next store.
    pub fn leave(&mut self) {
        self.inside = false;
        self.vcpu.leave();
    }

    #[cold]
    fn wait(&mut self, stall: Stall) {
        while self.vcpu.must_wait(stall) {
            std::thread::yield_now();
        }
    }

    /// Index of the first word of the page in the data, if the shadow lets it be written.
    fn walk(&self, gva: u64) -> Option<usize> {
        // Acquire: what the entry refers to was there before it.
        let entry = leaf(&self.tables, self.root, gva)?.load(Ordering::Acquire);
        let writable = entry & (bits::P | bits::RW) == bits::P | bits::RW;
        writable.then(|| index_in(&self.data, entry & bits::ADDR))?
    }
}

/// What a processor does to the entry when it writes to an address: notes that it has, if it may
/// write there.
pub fn mark_written(tables: &AllocatedMemory, root: Machine, gva: u64) -> bool {
    let Some(entry) = leaf(tables, root, gva) else { return false };
    let mark = |old: u64| {
        let writable = old & (bits::P | bits::RW) == bits::P | bits::RW;
        writable.then_some(old | bits::A | bits::D)
    };
    let old = entry.load(Ordering::Acquire);
    // No store to an entry that says so already.
    mark(old) == Some(old) || entry.fetch_update(Ordering::AcqRel, Ordering::Acquire, mark).is_ok()
}

/// The entry of the lowest level that a processor on this root finds for an address.
fn leaf(tables: &AllocatedMemory, root: Machine, gva: u64) -> Option<&AtomicU64> {
    let mut table = root.0;
    for level in (1..=4).rev() {
        let index = (gva >> (12 + 9 * (level - 1)) & 511) as usize;
        let entry = &tables.words()[index_in(tables, table)? + index];
        if level == 1 {
            return Some(entry);
        }
        // Acquire: the table was there before the entry.
        let value = entry.load(Ordering::Acquire);
        if value & bits::P == 0 {
            return None;
        }
        table = value & bits::ADDR;
    }
    None
}

/// Index of the word at a machine address.
fn index_in(memory: &AllocatedMemory, machine: u64) -> Option<usize> {
    let offset = machine.wrapping_sub(memory.machine().0);
    (offset < memory.size()).then_some((offset / 8) as usize)
}

#[inline]
fn slot(gva: u64) -> usize {
    (gva / PAGE) as usize % TLB
}
