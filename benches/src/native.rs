// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that a processor runs, through the kernel's KVM: one whose page faults the engine serves,
//! one that runs on page tables of its own and knows no engine. Both run the same program on memory
//! laid out alike, enter and leave the guest by the same means, and are made to fault anew by them.
//!
//! The program stores to each address of a list. Its pages are the same distance apart throughout.
//!
//! `unsafe` is needed to give the kernel memory as a guest's.

use crate::cpu::thread_time;
use crate::figure::{Failure, check_eq};
use crate::guest::{MIB, Memory, PAGE, TABLE, regs};
use kvm_backend::cpu::{Cpu, Event, KvmCpu, Watch};
use kvm_backend::kvm::{Downgrade, Exit, KvmMachine, KvmVcpu};
use kvm_backend::regs::Regs;
use kvm_backend::vm::Tables;
use mmu_core::addr::{Gpa, Machine};
use mmu_core::memory::Backing;
use mmu_core::paging::bits;
use mmu_core::{Config, Mmu};
use std::collections::BTreeSet;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Where the processor sees the first byte of guest memory: above what KVM wants for itself.
const MEMORY: u64 = 4 << 30;
/// Guest-virtual addresses of the code, of the list, and of the first page.
const CODE: u64 = 0x40_0000;
const LIST: u64 = 0x1_0000_0000;
const FIRST: u64 = 0x7f00_0000_0000;
const RAX: usize = 0;
const RCX: usize = 1;
const RBX: usize = 3;
const RDI: usize = 7;
const PAGE_FAULT: u8 = 14;
/// Entries of a cache line.
const LINE: u64 = 8;
/// What `hlt` raises in ring 3.
const GENERAL_PROTECTION: u8 = 13;

/// For rcx addresses from rbx on: the address, plus rax, stored at the address.
const STORE: &[u8] = &[
    0x48, 0x8b, 0x3b, // mov rdi, [rbx]
    0x48, 0x8d, 0x14, 0x07, // lea rdx, [rdi + rax]
    0x48, 0x89, 0x17, // mov [rdi], rdx
    0x48, 0x83, 0xc3, 0x08, // add rbx, 8
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xed, // jnz, to the first
    0xf4, // hlt
];
/// What a guest does after it has edited its tables.
const INVALIDATE: &[u8] = &[
    0x0f, 0x01, 0x3f, // invlpg [rdi]
    0xf4, // hlt
];
/// Offset of `INVALIDATE` in the code page.
const INVALIDATE_AT: u64 = 0x800;

/// Which pages a guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How many.
    pub pages: u64,
    /// From one to the next, in pages.
    pub distance: u64,
}

impl Shape {
    fn gva(self, page: u64) -> u64 {
        FIRST + page * self.distance * PAGE
    }

    /// Where in its page the program stores: not in the same set of the cache for all.
    fn offset(page: u64) -> u64 {
        page % 512 * 8
    }

    fn leaf_tables(self) -> u64 {
        (self.pages * self.distance).div_ceil(512)
    }

    /// Every address that is mapped, with the page of memory behind it: the program's, then the
    /// pages to be stored to.
    fn mapped(self) -> impl Iterator<Item = (u64, u64)> {
        let list = (self.pages * 8).div_ceil(PAGE);
        let list = (0..list).map(move |n| (LIST + n * PAGE, self.pages + 1 + n));
        let data = (0..self.pages).map(move |page| (self.gva(page), page));
        [(CODE, self.pages)].into_iter().chain(list).chain(data)
    }

    /// Where tables may begin.
    fn end(self) -> u64 {
        (self.pages + 1 + (self.pages * 8).div_ceil(PAGE)) * PAGE
    }

    /// Memory with the program in it.
    fn memory(self) -> Memory {
        let tables = (self.leaf_tables() + 16) * PAGE + 2 * MIB;
        let memory = Memory::at(Machine(MEMORY), self.end() + tables, self.end());
        for (at, code) in [(0, STORE), (INVALIDATE_AT, INVALIDATE)] {
            for (n, chunk) in code.chunks(8).enumerate() {
                let mut bytes = [0; 8];
                bytes[..chunk.len()].copy_from_slice(chunk);
                let at = self.pages * PAGE + at + n as u64 * 8;
                memory.word(at).store(u64::from_le_bytes(bytes), Ordering::Relaxed);
            }
        }
        // So that the kernel finds every page of it.
        for page in 0..self.pages {
            memory.word(page * PAGE).store(0, Ordering::Relaxed);
        }
        memory
    }
}

/// How a guest's processor is entered, and what it left for.
trait Runs {
    /// Runs until the program halts.
    fn run(&mut self, regs: &Regs) -> Result<(), Failure>;

    /// Makes the first store to each page fault again, if only these were stored to. The tables above
    /// the leaf entries stay, the kernel's shadow of them as well.
    fn forget(&mut self, stored: &[u64]) -> Result<(), Failure>;
}

/// A guest and what it has done; or one of its vCPUs.
struct Guest<R> {
    shape: Shape,
    /// The pages that are its to store to.
    own: Range<u64>,
    memory: Memory,
    runs: R,
    /// Passes so far, from which follows what they store.
    passes: u64,
    /// The pages of the last one.
    last: Vec<u64>,
}

impl<R: Runs> Guest<R> {
    /// Runs the program once on everything, so that what it consists of is mapped.
    fn ready(shape: Shape, own: Range<u64>, memory: Memory, runs: R) -> Result<Self, Failure> {
        let all: Vec<_> = own.clone().collect();
        let mut guest = Self { shape, own, memory, runs, passes: 0, last: Vec::new() };
        guest.first_stores(&all)?;
        Ok(guest)
    }

    /// How much longer stores to these pages take if each is the first than if none is.
    fn first_stores(&mut self, pages: &[u64]) -> Result<Duration, Failure> {
        self.forget(pages)?;
        let first = self.stores()?;
        let again = self.stores()?;
        Ok(first.saturating_sub(again))
    }

    /// These pages are the next to be stored to, and no store has been the first.
    fn forget(&mut self, pages: &[u64]) -> Result<(), Failure> {
        for (n, page) in pages.iter().enumerate() {
            let gva = self.shape.gva(*page) + Shape::offset(*page);
            let at = self.shape.pages * PAGE + PAGE + (self.own.start + n as u64) * 8;
            self.memory.word(at).store(gva, Ordering::Relaxed);
        }
        self.runs.forget(&self.last)?;
        self.last = pages.to_vec();
        Ok(())
    }

    fn stores(&mut self) -> Result<Duration, Failure> {
        self.passes += 1;
        let pages = &self.last;
        let tag = self.passes << 48;
        let mut regs = Regs { rip: CODE, ..Regs::default() };
        (regs.gpr[RAX], regs.gpr[RCX]) = (tag, pages.len() as u64);
        regs.gpr[RBX] = LIST + self.own.start * 8;
        let start = thread_time();
        self.runs.run(&regs)?;
        let elapsed = thread_time().saturating_sub(start);
        for page in pages {
            let word = self.memory.word(page * PAGE + Shape::offset(*page));
            let expected = self.shape.gva(*page) + Shape::offset(*page) + tag;
            check_eq("what the guest stored", word.load(Ordering::Relaxed), expected)?;
        }
        Ok(elapsed)
    }

    /// The pages that the last pass has stored to.
    fn stored(&self) -> u64 {
        let tag = self.passes << 48;
        let stored = |page: &u64| {
            let word = self.memory.word(page * PAGE + Shape::offset(*page));
            let expected = self.shape.gva(*page) + Shape::offset(*page) + tag;
            word.load(Ordering::Relaxed) == expected
        };
        self.own.clone().filter(stored).count() as u64
    }
}

/// A machine with this memory.
fn machine(memory: &Memory, vcpus: usize, frames: u64) -> Result<Arc<KvmMachine>, Failure> {
    let machine = KvmMachine::new(vcpus, frames as u32).map_err(Failure::in_step("machine"))?;
    let backing = memory.backing();
    let (host, size) = (NonNull::from(backing.words()).cast(), backing.size());
    // SAFETY: the owner keeps the memory, which is only ever lent as atomics.
    unsafe { machine.add_memory(MEMORY, host, size, false, backing) }
        .map_err(Failure::in_step("memory"))?;
    Ok(machine)
}

/// Why there can be no guest here; with `shadowing`, why there can be none whose tables the kernel
/// shadows.
pub fn unavailable(shadowing: bool) -> Option<String> {
    match kvm_backend::kvm::self_test() {
        Err(error) => Some(error.to_string()),
        Ok(trap) if shadowing && trap.reload_is_enough => {
            Some("this KVM shadows no page tables: guests' faults never reach it".to_owned())
        }
        Ok(_) => None,
    }
}

/// A guest whose page faults the engine serves.
pub struct Served {
    guest: Guest<Engine>,
}

struct Engine {
    mmu: Mmu,
    cpu: KvmCpu,
    memory: Memory,
    /// The guest's leaf tables for the pages to be stored to.
    tables: Vec<u64>,
}

impl Runs for Engine {
    fn run(&mut self, regs: &Regs) -> Result<(), Failure> {
        self.cpu.set_regs(regs);
        match self.cpu.run() {
            Event::Halt => Ok(()),
            other => Err(Failure::new(format!("guest: {other:?}"))),
        }
    }

    fn forget(&mut self, _stored: &[u64]) -> Result<(), Failure> {
        for (n, table) in self.tables.clone().into_iter().enumerate() {
            let mut bytes = [0; PAGE as usize];
            for (n, chunk) in bytes.chunks_exact_mut(8).enumerate() {
                let word = self.memory.word(table + n as u64 * 8).load(Ordering::Relaxed);
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            for bytes in [[0; PAGE as usize], bytes] {
                let written = self.mmu.write_phys(Gpa(table), &bytes);
                check_eq("bytes of a table", written, bytes.len())?;
            }
            // Table by table: of more than the engine remembers the processor would forget all.
            let mut regs = Regs { rip: CODE + INVALIDATE_AT, ..Regs::default() };
            regs.gpr[RDI] = FIRST + n as u64 * 512 * PAGE;
            self.run(&regs)?;
        }
        Ok(())
    }
}

/// What the engine did in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Faults that ended with an entry.
    pub faults: u64,
    /// Entries made, those around faults included.
    pub entries: u64,
}

impl Served {
    /// With an engine of its own.
    pub fn new(shape: Shape) -> Result<Self, Failure> {
        let mut memory = shape.memory();
        let root = memory.table();
        for (gva, page) in shape.mapped() {
            memory.map(root, gva, page * PAGE);
        }
        let leaf = |n| FIRST + n * 512 * PAGE;
        let tables: Vec<_> =
            (0..shape.leaf_tables()).map(|n| memory.leaf_table(root, leaf(n))).collect();
        let machine = machine(&memory, 1, tables.len() as u64 + 512)?;
        let (index, entry) = machine.stub_root_entry();
        let config = Config::new(Arc::new(Tables::new(machine.tables())));
        let mmu = memory.engine_of(config.reserve_root_entry(index, entry))?;
        let vcpu = machine.vcpu(0).map_err(Failure::in_step("vCPU"))?;
        let cpu = KvmCpu::new(&mmu, vcpu, regs(root), Watch::default());
        let cpu = cpu.map_err(Failure::in_step("vCPU"))?;
        let runs = Engine { mmu, cpu, memory: memory.clone(), tables };
        Ok(Self { guest: Guest::ready(shape, 0..shape.pages, memory, runs)? })
    }

    /// How long first stores to these pages take, for all, and what the engine did meanwhile.
    pub fn first_stores(&mut self, pages: &[u64]) -> Result<(Duration, Work), Failure> {
        let made = |mmu: &Mmu| {
            let stats = mmu.stats();
            (stats.pf_fixed, stats.pte_prefetched)
        };
        let before = made(&self.guest.runs.mmu);
        let elapsed = self.guest.first_stores(pages)?;
        let after = made(&self.guest.runs.mmu);
        let faults = after.0 - before.0;
        Ok((elapsed, Work { faults, entries: faults + after.1 - before.1 }))
    }

    /// Fails unless the last pass stored to so many pages, and the shadow is as it must be.
    pub fn verify(&self, pages: u64) -> Result<(), Failure> {
        check_eq("pages that the guest stored to", self.guest.stored(), pages)?;
        self.guest.runs.mmu.audit().map(drop).map_err(Failure::in_step("audit"))
    }
}

/// What happens to the leaf entries of a guest without an engine when it is to fault again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// They stay. What the kernel made of them goes, so that each first store is a fault of the
    /// kernel's own.
    Stay,
    /// They go, and come back in the fault's handler: one store of what they were.
    Stored,
}

/// A guest on tables that nobody changes but by [`Leaves`]; or one of its vCPUs.
pub struct Plain {
    guest: Guest<Tabled>,
}

struct Tabled {
    tables: Tables,
    vcpu: KvmVcpu,
    shape: Shape,
    leaves: Leaves,
    /// Offset in the tables, and value, of the entry of each page.
    entries: Arc<[(u64, u64)]>,
    faults: u64,
}

impl Tabled {
    fn entry(&self, offset: u64) -> &AtomicU64 {
        &self.tables.words()[(offset / 8) as usize]
    }

    /// The handler: what is left of a fault without an engine.
    fn fill(&mut self, gva: u64) -> Result<(), Failure> {
        let page = gva.wrapping_sub(FIRST) / (self.shape.distance * PAGE);
        let Some((offset, value)) = self.entries.get(page as usize) else {
            return Err(Failure::new(format!("a fault at {gva:#x}")));
        };
        // Release, as the engine publishes.
        self.entry(*offset).store(*value, Ordering::Release);
        self.faults += 1;
        Ok(())
    }
}

impl Runs for Tabled {
    fn run(&mut self, regs: &Regs) -> Result<(), Failure> {
        self.vcpu.set_regs(regs);
        loop {
            match self.vcpu.run(0).map_err(Failure::in_step("guest"))? {
                Exit::Interrupted => {}
                Exit::Exception { vector: PAGE_FAULT, cr2, .. }
                    if self.leaves == Leaves::Stored =>
                {
                    self.fill(cr2)?;
                }
                Exit::Exception { vector: GENERAL_PROTECTION, .. } => return Ok(()),
                other => return Err(Failure::new(format!("guest: {other:?}"))),
            }
        }
    }

    fn forget(&mut self, stored: &[u64]) -> Result<(), Failure> {
        // The kernel maps around its faults as well: those whose entries are in the same line.
        let lines: BTreeSet<_> = stored.iter().map(|page| page / LINE).collect();
        let pages = lines.into_iter().flat_map(|line| line * LINE..(line + 1) * LINE);
        for page in pages.take_while(|page| *page < self.shape.pages) {
            let (entry, _) = self.entries[page as usize];
            if self.leaves == Leaves::Stored {
                self.entry(entry).store(0, Ordering::Release);
            }
            let downgrade = Downgrade::Leaf { entry, gva: self.shape.gva(page) };
            self.vcpu.push(downgrade).map_err(Failure::in_step("downgrade"))?;
        }
        while self.vcpu.drain_only(1).map_err(Failure::in_step("drain"))? != Exit::Drained {}
        Ok(())
    }
}

impl Plain {
    /// With tables that map every page.
    pub fn new(shape: Shape, leaves: Leaves) -> Result<Self, Failure> {
        let mut vcpus = Self::several(shape, leaves, 1)?;
        vcpus.pop().ok_or_else(|| Failure::new("no vCPU"))
    }

    /// The vCPUs of such a guest, which share the pages out.
    pub fn several(shape: Shape, leaves: Leaves, vcpus: usize) -> Result<Vec<Self>, Failure> {
        let memory = shape.memory();
        let machine = machine(&memory, vcpus, shape.leaf_tables() + 16)?;
        let arena = machine.tables();
        let (at, tables) = (arena.machine(), Tables::new(arena.clone()));
        let (index, stub) = machine.stub_root_entry();
        tables.words()[index].store(stub, Ordering::Relaxed);
        // The root is frame 0.
        let mut frames = 1;
        let mut entries = Vec::new();
        for (gva, page) in shape.mapped() {
            let mut table = 0;
            for level in (2..=4).rev() {
                let word =
                    &tables.words()[(table / 8 + (gva >> (12 + 9 * (level - 1)) & 511)) as usize];
                if word.load(Ordering::Relaxed) == 0 {
                    word.store((at + frames * PAGE) | TABLE, Ordering::Relaxed);
                    frames += 1;
                }
                table = (word.load(Ordering::Relaxed) & bits::ADDR) - at;
            }
            let offset = table + (gva >> 12 & 511) * 8;
            let value = (MEMORY + page * PAGE) | crate::guest::LEAF;
            tables.words()[(offset / 8) as usize].store(value, Ordering::Relaxed);
            if gva >= FIRST {
                entries.push((offset, value));
            }
        }
        let (entries, share) = (Arc::from(entries), shape.pages / vcpus as u64);
        let plain = |n| {
            let mut vcpu = machine.vcpu(n).map_err(Failure::in_step("vCPU"))?;
            vcpu.set_root(at).map_err(Failure::in_step("root"))?;
            let (tables, entries) = (Tables::new(arena.clone()), Arc::clone(&entries));
            let runs = Tabled { tables, vcpu, shape, leaves, entries, faults: 0 };
            let own = n as u64 * share..(n as u64 + 1) * share;
            Ok(Self { guest: Guest::ready(shape, own, memory.clone(), runs)? })
        };
        (0..vcpus).map(plain).collect()
    }

    /// Its pages.
    pub fn pages(&self) -> Range<u64> {
        self.guest.own.clone()
    }

    /// The next stores to its pages are the first.
    pub fn forget(&mut self) -> Result<(), Failure> {
        let own: Vec<_> = self.pages().collect();
        self.guest.forget(&own)
    }

    /// Stores to its pages.
    pub fn stores(&mut self) -> Result<(), Failure> {
        self.guest.stores().map(drop)
    }

    /// How long first stores to these pages take, for all.
    pub fn first_stores(&mut self, pages: &[u64]) -> Result<Duration, Failure> {
        let before = self.guest.runs.faults;
        let elapsed = self.guest.first_stores(pages)?;
        let expected = match self.guest.runs.leaves {
            Leaves::Stay => 0,
            Leaves::Stored => pages.len() as u64,
        };
        check_eq("faults", self.guest.runs.faults - before, expected)?;
        Ok(elapsed)
    }

    /// Fails unless the last pass stored to so many pages.
    pub fn verify(&self, pages: u64) -> Result<(), Failure> {
        check_eq("pages that the guest stored to", self.guest.stored(), pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENSE: Shape = Shape { pages: 1024, distance: 1 };
    const SPARSE: Shape = Shape { pages: 128, distance: LINE };

    /// Whether there are guests here.
    fn here() -> bool {
        let reason = unavailable(false);
        if let Some(reason) = &reason {
            println!("skipped: {reason}");
        }
        reason.is_none()
    }

    #[test]
    fn a_served_guest_faults_anew_in_each_pass() {
        if !here() {
            return;
        }
        let all: Vec<_> = (0..SPARSE.pages).collect();
        let mut guest = Served::new(SPARSE).unwrap();
        for _ in 0..2 {
            let (_, work) = guest.first_stores(&all).unwrap();
            assert_eq!(work, Work { faults: SPARSE.pages, entries: SPARSE.pages });
        }
        let (_, work) = guest.first_stores(&[5, 77]).unwrap();
        assert_eq!(work, Work { faults: 2, entries: 2 });
        guest.verify(2).unwrap();
        let mut guest = Served::new(DENSE).unwrap();
        let (_, work) = guest.first_stores(&(0..DENSE.pages).collect::<Vec<_>>()).unwrap();
        assert_eq!(work.entries, DENSE.pages);
        assert!(work.faults < DENSE.pages / 8, "{work:?}");
        guest.verify(DENSE.pages).unwrap();
    }

    #[test]
    fn a_plain_guest_needs_nobody_or_one_store_a_page() {
        if !here() {
            return;
        }
        for leaves in [Leaves::Stay, Leaves::Stored] {
            let mut guest = Plain::new(SPARSE, leaves).unwrap();
            // Counts the faults.
            guest.first_stores(&(0..SPARSE.pages).collect::<Vec<_>>()).unwrap();
            guest.verify(SPARSE.pages).unwrap();
        }
        let mut guest = Plain::new(DENSE, Leaves::Stay).unwrap();
        guest.first_stores(&[3, 1023, 500]).unwrap();
        guest.verify(3).unwrap();
    }

    #[test]
    fn vcpus_of_one_guest_store_to_their_own_pages() {
        if !here() {
            return;
        }
        let mut vcpus = Plain::several(SPARSE, Leaves::Stay, 4).unwrap();
        for vcpu in &mut vcpus {
            vcpu.forget().unwrap();
            vcpu.stores().unwrap();
        }
        for (n, vcpu) in vcpus.iter().enumerate() {
            assert_eq!(vcpu.pages(), n as u64 * 32..(n as u64 + 1) * 32);
            vcpu.verify(32).unwrap();
        }
    }

    #[test]
    fn what_was_not_stored_is_noticed() {
        if !here() {
            return;
        }
        let mut guest = Plain::new(SPARSE, Leaves::Stay).unwrap();
        guest.first_stores(&[3, 9]).unwrap();
        assert!(guest.verify(3).is_err());
        guest.guest.memory.word(9 * PAGE + Shape::offset(9)).store(0, Ordering::Relaxed);
        assert!(guest.verify(2).is_err());
        // A program that stores nothing.
        let code = guest.guest.memory.word(SPARSE.pages * PAGE);
        code.store(u64::from_le_bytes([0xf4; 8]), Ordering::Relaxed);
        let failure = guest.first_stores(&[3, 9]).unwrap_err().to_string();
        assert!(failure.starts_with("what the guest stored"), "{failure}");
    }
}
