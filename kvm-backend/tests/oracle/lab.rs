// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU that makes one access in ring 3, on tables in the arena, and a copy of these tables for
//! the walker.
//!
//! The trap: a KVM without nested paging does not see the host's stores to tables that it has
//! shadowed. So a frame is filled once, while it is all zero, and then changed by the guest's own
//! accesses alone; when all are used, they are zeroed and dropped by the queue before the next use.
//!
//! `unsafe` is needed here to lend memory to the VM, and to see the arena as atomics.

use super::tables::{CODE_SLOT, Limits, World};
use kvm_backend::kvm::{Downgrade, Exit, KvmMachine, KvmVcpu};
use kvm_backend::regs::Regs as UserRegs;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, Hint, MemoryMap, SlotConfig};
use mmu_core::paging::bits::{A, D, G, P, RW, US};
use mmu_core::paging::{Access, Fault, Kind, PagingMode, Path, Reason, Regs, Walk, code};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The stub's top-level slot.
pub const STUB_SLOT: u64 = kvm_backend::kvm::STUB_SLOT as u64;
/// Machine address of the data pages: a 1 GiB boundary.
pub const DATA: u64 = 0x4000_0000;
/// Their size: two 2 MiB pages.
pub const DATA_BYTES: u64 = 4 << 20;
/// Machine address of the program.
const CODE: u64 = 0x10_0000;
/// Its linear address.
const CODE_VA: u64 = CODE_SLOT << 39;
/// KVM may have pages of its own in the highest part below 4 GiB, and devices are there.
const RESERVED: std::ops::Range<u64> = 0xfec0_0000..0x1_0000_0000;
/// Table frames; the first are the program's tables and a root without anything else.
const FRAMES: u32 = 4096;
const OWN_FRAMES: u64 = 4;

const RAX: usize = 0;
const RDI: usize = 7;

/// The program: each part makes one access to [rdi] and stops.
#[rustfmt::skip]
const PROGRAM: [u8; 24] = [
    0x48, 0x8b, 0x07, 0x0f, 0x0b, 0x90, 0x90, 0x90, // mov rax, [rdi]; ud2
    0x48, 0x89, 0x07, 0x0f, 0x0b, 0x90, 0x90, 0x90, // mov [rdi], rax; ud2
    0xf0, 0x48, 0x83, 0x0f, 0x00, 0x0f, 0x0b, 0x90, // lock or qword [rdi], 0; ud2
];

/// A data word: `mov eax, n; ud2`. Read, it says where it is; executed, too. Bit 0 is clear: as a
/// table entry it is not present.
fn data_word(n: u64) -> u64 {
    0xb8 | n << 8 | 0x0b0f << 40
}

/// What the walker says of an access.
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    pub result: Result<Walk, Fault>,
    pub path: Path,
    /// The result is not the walker's: see [`Lab::amd_refuses`].
    pub amd: bool,
}

/// What the guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The access was made; what was read, or the identity of the code that ran.
    Done(u64),
    /// It was made where nothing is.
    Device { machine: u64, write: Option<u64> },
    /// It faulted; CR2 counts for page faults.
    Fault { vector: u8, error_code: u32, cr2: Option<u64> },
    /// Anything else.
    Other(Exit),
}

/// Why a case is not tried.
#[derive(Clone, Copy, Debug)]
pub enum Skip {
    /// A table where no memory is: what the bus answers is not architecture.
    TableOutside,
    /// The stub, the program, or pages of KVM's.
    Forbidden,
    /// Code where there is none.
    NoCode,
}

pub struct Lab {
    vcpu: KvmVcpu,
    live: ArenaWords,
    copy: Arc<AllocatedMemory>,
    data: Arc<AllocatedMemory>,
    map: MemoryMap,
    /// Machine address of the arena.
    base: u64,
    limit: u64,
    /// Next unused frame.
    next: u64,
    root: u64,
    writes: u64,
}

/// The arena as atomics.
struct ArenaWords(kvm_backend::kvm::TableArena);

impl ArenaWords {
    fn get(&self, offset: u64) -> &AtomicU64 {
        assert!(offset < u64::from(self.0.frames()) * 4096 && offset % 8 == 0);
        // SAFETY: in bounds and aligned by the assertion; the arena lives as long as `self`; all
        // accesses on this side are atomic.
        unsafe { AtomicU64::from_ptr(self.0.host().as_ptr().add(offset as usize).cast()) }
    }
}

impl Lab {
    /// A machine with one vCPU, its program and its data.
    pub fn new() -> Lab {
        let machine = KvmMachine::new(1, FRAMES).unwrap();
        let arena = machine.tables();
        let base = arena.machine();
        let add = |at: u64, bytes: u64| {
            let memory = Arc::new(AllocatedMemory::new(bytes));
            let host = NonNull::from(memory.words()).cast();
            let owner = Arc::clone(&memory);
            // SAFETY: the owner is the memory itself, which lends itself as atomics only.
            unsafe { machine.add_memory(at, host, bytes, false, owner) }.unwrap();
            memory
        };
        let code = add(CODE, 4096);
        for (word, bytes) in code.words().iter().zip(PROGRAM.chunks_exact(8)) {
            word.store(u64::from_le_bytes(bytes.try_into().unwrap()), Ordering::SeqCst);
        }
        let data = add(DATA, DATA_BYTES);
        for (n, word) in (0..).zip(data.words()) {
            word.store(data_word(n), Ordering::SeqCst);
        }
        let copy = Arc::new(AllocatedMemory::new(u64::from(arena.frames()) * 4096));
        let map = MemoryMap::build([
            SlotConfig::new(0, Gpa(base), Arc::clone(&copy) as Arc<dyn Backing>),
            SlotConfig::new(1, Gpa(DATA), Arc::clone(&data) as Arc<dyn Backing>),
        ])
        .unwrap();
        let lab = Lab {
            vcpu: machine.vcpu(0).unwrap(),
            live: ArenaWords(arena),
            copy,
            data,
            map,
            base,
            limit: machine.memory_limit(),
            next: OWN_FRAMES,
            root: 0,
            writes: 0,
        };
        // Frames 0 to 2 lead to the program, whose page is the first of the last; 3 is a bare root.
        let marked = P | US | A | D;
        lab.put(0, (base + 4096) | marked | RW);
        lab.put(4096, (base + 8192) | marked | RW);
        lab.put(8192, CODE | marked);
        let (index, stub) = machine.stub_root_entry();
        lab.put(3 * 4096 + index as u64 * 8, stub);
        lab
    }

    /// Puts a word into the arena and its copy.
    fn put(&self, offset: u64, value: u64) {
        self.live.get(offset).store(value, Ordering::SeqCst);
        self.copy.words()[(offset / 8) as usize].store(value, Ordering::SeqCst);
    }

    /// `n` frames that KVM knows nothing of, all zero.
    pub fn frames(&mut self, n: u64) -> Vec<u64> {
        let end = u64::from(self.live.0.frames());
        if self.next + n > end {
            self.expect_arena_as_copied();
            for offset in (OWN_FRAMES * 4096..end * 4096).step_by(8) {
                self.put(offset, 0);
            }
            self.vcpu.set_root(self.base + 3 * 4096).unwrap();
            self.vcpu.push(Downgrade::Everything { frames: end as u32 }).unwrap();
            while self.vcpu.drain_only(0).unwrap() != Exit::Drained {}
            self.next = OWN_FRAMES;
        }
        self.next += n;
        (self.next - n..self.next).map(|frame| self.base + frame * 4096).collect()
    }

    /// The whole arena is what the walker left in the copy.
    pub fn expect_arena_as_copied(&self) {
        for (n, word) in (0..).zip(self.copy.words()) {
            let (live, copy) =
                (self.live.get(n * 8).load(Ordering::SeqCst), word.load(Ordering::SeqCst));
            let at = self.base + n * 8;
            assert!(live == copy, "a table word at {at:#x} is {live:#x}, not {copy:#x}");
        }
    }

    /// Puts the world into the arena, and makes it current.
    pub fn enter(&mut self, world: &World) {
        for (frame, words) in world.frames.iter().zip(&world.words) {
            for (i, word) in (0..).zip(words) {
                self.put(frame - self.base + i * 8, *word);
            }
        }
        self.root = world.frames[0];
        let root = self.root - self.base;
        self.put(root + CODE_SLOT * 8, self.base | P | US | RW | A | D);
        let stub = self.live.get(3 * 4096 + STUB_SLOT * 8).load(Ordering::SeqCst);
        self.put(root + STUB_SLOT * 8, stub);
        self.vcpu.set_root(self.root).unwrap();
    }

    /// The walker, with the registers of the backend's vCPUs.
    fn mode(&self, limits: Limits) -> PagingMode {
        let regs = Regs { maxphyaddr: limits.maxphyaddr as u8, ..Regs::long_mode(self.root) };
        let mode = PagingMode::new(&regs).unwrap();
        if limits.giant { mode } else { mode.without_1g_pages() }
    }

    /// Where manuals differ: bit 8 of a PML4E is ignored (SDM 5.5.4) or must be 0 (APM 5.3.3).
    fn amd_refuses(&self, mode: &PagingMode, gva: u64, access: Access) -> Option<Fault> {
        let at = self.root - self.base + mode.index(Gva(gva), 4) * 8;
        let entry = self.copy.words()[(at / 8) as usize].load(Ordering::SeqCst);
        let refuses = mode.is_canonical(Gva(gva)) && entry & (P | G) == P | G;
        refuses.then_some(())?;
        let kind = match access.kind {
            Kind::Read => 0,
            Kind::Write => code::W,
            Kind::Execute => code::I,
        };
        let error_code = code::P | code::RSVD | code::U | kind;
        Some(Fault {
            gva: Gva(gva),
            vector: Fault::PF,
            error_code,
            level: 4,
            reason: Reason::Reserved,
        })
    }

    fn in_arena(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.base) < self.copy.size()
    }

    fn in_data(gpa: u64) -> bool {
        gpa.wrapping_sub(DATA) < DATA_BYTES
    }

    /// The walk, made in the copy.
    pub fn predict(&self, limits: Limits, gva: u64, kind: Kind) -> Result<Prediction, Skip> {
        let mode = &self.mode(limits);
        let access = Access { kind, ..Access::read().user() };
        let hint = Hint::default();
        if limits.amd {
            if let Some(result) = self.amd_refuses(mode, gva, access) {
                return Ok(Prediction { result: Err(result), path: Path::new(), amd: true });
            }
        }
        match mode.translate(&self.map, &hint, Gva(gva), Some(access)) {
            Ok(walk) => {
                let gpa = walk.gpa.0;
                let own = (self.base..self.base + OWN_FRAMES * 4096).contains(&gpa);
                let stub = (self.limit..self.base).contains(&gpa);
                if stub || own || gpa & !0xfff == CODE || RESERVED.contains(&gpa) {
                    return Err(Skip::Forbidden);
                }
                if kind == Kind::Execute && !Self::in_data(gpa) {
                    return Err(Skip::NoCode);
                }
            }
            Err(fault) if fault.reason == Reason::TableOutside => {
                return Err(Skip::TableOutside);
            }
            Err(_) => {}
        }
        let mut path = Path::new();
        let result = mode.walk_path(&self.map, &hint, Gva(gva), access, &mut path);
        Ok(Prediction { result, path, amd: false })
    }

    /// What the guest should do, given what the walker says.
    pub fn expected(&mut self, prediction: &Prediction, kind: Kind) -> Outcome {
        let gpa = match prediction.result {
            Err(Fault { vector, error_code, gva, .. }) => {
                let cr2 = (vector == Fault::PF).then_some(gva.0);
                return Outcome::Fault { vector, error_code, cr2 };
            }
            Ok(walk) => walk.gpa.0,
        };
        let word = if Self::in_data(gpa) {
            data_word((gpa - DATA) / 8)
        } else if self.in_arena(gpa) {
            self.copy.words()[((gpa - self.base) / 8) as usize].load(Ordering::SeqCst)
        } else {
            let write = (kind == Kind::Write).then_some((self.writes + 1) << 16);
            return Outcome::Device { machine: gpa, write };
        };
        match kind {
            Kind::Read => Outcome::Done(word),
            Kind::Write => Outcome::Done((self.writes + 1) << 16),
            Kind::Execute => Outcome::Done(word >> 8 & 0xffff_ffff),
        }
    }

    /// Makes the access in the guest. A page of a table is written without being changed.
    pub fn access(&mut self, prediction: &Prediction, gva: u64, kind: Kind) -> Outcome {
        self.writes += 1;
        let value = self.writes << 16;
        let target = prediction.result.ok().map(|walk| walk.gpa.0);
        let table = target.is_some_and(|gpa| self.in_arena(gpa));
        let (start, length) = match kind {
            Kind::Read => (CODE_VA, 3),
            Kind::Write if table => (CODE_VA + 16, 5),
            Kind::Write => (CODE_VA + 8, 3),
            Kind::Execute => (gva, 5),
        };
        let mut regs = UserRegs { rip: start, ..UserRegs::default() };
        regs.gpr[RAX] = value;
        regs.gpr[RDI] = gva;
        self.vcpu.set_regs(&regs);
        let exit = loop {
            match self.vcpu.run(0).unwrap() {
                Exit::Interrupted => {}
                exit => break exit,
            }
        };
        let now = self.vcpu.regs();
        match exit {
            Exit::Exception { vector: 6, .. } if now.rip == start + length => {
                if kind != Kind::Write || table {
                    return Outcome::Done(now.gpr[RAX]);
                }
                // Found where the walker says, and the word that was there put back.
                let gpa = target.filter(|gpa| Self::in_data(*gpa));
                let Some(n) = gpa.map(|gpa| (gpa - DATA) / 8) else { return Outcome::Other(exit) };
                Outcome::Done(self.data.words()[n as usize].swap(data_word(n), Ordering::SeqCst))
            }
            Exit::Exception { vector, error_code: Some(error_code), cr2 } if now.rip == start => {
                let cr2 = (vector == Fault::PF).then_some(cr2);
                Outcome::Fault { vector, error_code, cr2 }
            }
            Exit::Mmio { machine, len: 8, write } if now.rip == start + length => {
                Outcome::Device { machine, write }
            }
            exit => Outcome::Other(exit),
        }
    }

    /// Compares the tables with the walker's copy: all frames of the world, and the path. After a
    /// fault, accessed bits of present entries on the path may be set: processors differ. Returns how
    /// many were, or what is wrong; the copy then is as the tables are.
    pub fn compare(&self, world: &World, prediction: &Prediction) -> Result<u64, String> {
        let offset = |gpa: u64| self.in_arena(gpa).then(|| gpa - self.base);
        let steps = prediction.path.steps();
        let path: Vec<u64> = steps.iter().filter_map(|step| offset(step.entry.0)).collect();
        let frames = world.frames.iter().map(|frame| frame - self.base);
        let all = frames.flat_map(|frame| (frame..frame + 4096).step_by(8));
        let mut early = 0;
        for at in all.chain(path.iter().copied()) {
            let live = self.live.get(at).load(Ordering::Relaxed);
            let copy = &self.copy.words()[(at / 8) as usize];
            let expected = copy.load(Ordering::Relaxed);
            if live == expected {
                continue;
            }
            copy.store(live, Ordering::Relaxed);
            let faulted = prediction.result.is_err();
            if faulted && live == expected | A && expected & P != 0 && path.contains(&at) {
                early += 1;
                continue;
            }
            let at = self.base + at;
            return Err(format!("the entry at {at:#x} became {live:#x}, not {expected:#x}"));
        }
        Ok(early)
    }
}
