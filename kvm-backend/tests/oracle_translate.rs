// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `KVM_TRANSLATE` as an oracle for addresses, in every paging mode that KVM lets a vCPU have: no
//! code runs, so the mode needs no program and no support by the processor's ring 3.
//!
//! What that call answers is a supervisor read by the host kernel's own walker (whatever walks
//! tables for running guests), with peculiarities that are allowed for here:
//!
//! * it always says `writeable` and never `usermode`: only `valid` and the address mean something;
//! * it sets accessed bits, as the read would; compared with those of `PagingMode::walk`;
//! * it does not look whether an address is canonical: only canonical ones are asked for;
//! * with PSE-36, it takes a physical address to have 36 bits, whatever CPUID says: 4 MiB pages
//!   that use more are asked for only where CPUID says 36;
//! * bit 8 of a PML4E is reserved if CPUID names AMD (APM 5.3.3), ignored if it names Intel (SDM
//!   5.5.4): the walker is as the SDM says.
//!
//! `SHADOWMMU_ORACLE_CASES` asks for more cases than usual, `SHADOWMMU_ORACLE_SEED` for others.

mod oracle;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, Hint, MemoryMap, SlotConfig};
use mmu_core::paging::bits::*;
use mmu_core::paging::{Access, PagingMode, Path, Reason, Regs, Walk, load_pdptrs};
use oracle::{Disagreements, Random, Tally, cases};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Guest memory: (guest-physical base, frames).
const PIECES: [(u64, u64); 2] = [(0, 24), (0x1_4000_0000, 8)];
/// Addresses asked for with the same tables.
const ADDRESSES: u64 = 60;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Unpaged,
    ThirtyTwo,
    Pae,
    Four,
    Five,
}

/// Vendors as CPUID says them in EBX, ECX, EDX.
const VENDORS: [(&str, [u32; 3]); 2] = [
    ("Intel", [0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
    ("AMD", [0x6874_7541, 0x444d_4163, 0x6974_6e65]),
];

/// Two memories with the same content: the VM's, and the walker's.
struct Memory {
    live: Vec<Arc<AllocatedMemory>>,
    copy: Vec<Arc<AllocatedMemory>>,
    map: MemoryMap,
}

impl Memory {
    fn new() -> Memory {
        let new = || {
            let memory = |(_, frames): (u64, u64)| Arc::new(AllocatedMemory::new(frames * 4096));
            PIECES.map(memory).to_vec()
        };
        let copy = new();
        let slots = (0..).zip(PIECES).zip(&copy).map(|((id, (base, _)), memory)| {
            SlotConfig::new(id, Gpa(base), Arc::clone(memory) as Arc<dyn Backing>)
        });
        let map = MemoryMap::build(slots).unwrap();
        Memory { live: new(), copy, map }
    }

    /// Makes every word what `word` says.
    fn fill(&self, mut word: impl FnMut() -> u64) {
        let copy = self.copy.iter().flat_map(|m| m.words());
        for (live, copy) in self.live.iter().flat_map(|m| m.words()).zip(copy) {
            let value = word();
            live.store(value, Ordering::SeqCst);
            copy.store(value, Ordering::SeqCst);
        }
    }

    /// The words at `gpa` of both.
    fn pair(&self, gpa: u64) -> Option<(u64, u64)> {
        let n = PIECES.iter().position(|(base, f)| gpa.wrapping_sub(*base) < f * 4096)?;
        let index = ((gpa - PIECES[n].0) / 8) as usize;
        let word = |m: &[Arc<AllocatedMemory>]| m[n].words()[index].load(Ordering::SeqCst);
        Some((word(&self.live), word(&self.copy)))
    }

    /// The first word that is not the same in both: its number, and both.
    fn difference(&self) -> Option<(usize, u64, u64)> {
        let words = |m: &'_ [Arc<AllocatedMemory>]| -> Vec<u64> {
            m.iter().flat_map(|m| m.words()).map(|w| w.load(Ordering::SeqCst)).collect()
        };
        let (live, copy) = (words(&self.live), words(&self.copy));
        let n = (0..live.len()).find(|n| live[*n] != copy[*n])?;
        Some((n, live[n], copy[n]))
    }
}

/// A vCPU of a processor of our making.
struct Cpu {
    fd: VcpuFd,
    name: String,
    amd: bool,
    maxphyaddr: u32,
}

impl Cpu {
    fn new(vm: &VmFd, id: u64, cpuid: &CpuId, vendor: usize, maxphyaddr: u32) -> Cpu {
        let (name, [ebx, ecx, edx]) = VENDORS[vendor];
        let mut cpuid = cpuid.clone();
        for e in cpuid.as_mut_slice() {
            match e.function {
                0 => (e.ebx, e.ecx, e.edx) = (ebx, ecx, edx),
                0x8000_0008 => e.eax = e.eax & 0xff00 | maxphyaddr,
                _ => {}
            }
        }
        let fd = vm.create_vcpu(id).unwrap();
        fd.set_cpuid2(&cpuid).unwrap();
        Cpu { fd, name: format!("{name}, {maxphyaddr} bits"), amd: vendor == 1, maxphyaddr }
    }

    /// Gives the vCPU these registers, or says why this KVM does not take them.
    fn set(&self, regs: &Regs) -> Result<(), String> {
        let mut s = self.fd.get_sregs().unwrap();
        (s.cr0, s.cr3, s.cr4, s.efer) = (regs.cr0, regs.cr3, regs.cr4, regs.efer);
        s.cs.l = u8::from(regs.is_long());
        s.cs.db = u8::from(!regs.is_long());
        self.fd.set_sregs(&s).map_err(|error| format!("KVM_SET_SREGS: {error}"))?;
        // A KVM without VMX or SVM may know long mode only: then PG quietly stays clear.
        let now = self.fd.get_sregs().unwrap();
        let taken = [now.cr0, now.cr3, now.cr4, now.efer];
        let asked = [regs.cr0, regs.cr3, regs.cr4, regs.efer];
        let same = || format!("CR0, CR3, CR4 and EFER are {taken:x?} and not {asked:x?}");
        (taken == asked).then_some(()).ok_or_else(same)
    }
}

fn frame(random: &mut Random, mode: Mode) -> u64 {
    let (base, frames) = PIECES[usize::from(mode != Mode::ThirtyTwo && random.percent(25))];
    base + random.below(frames) * 4096
}

fn registers(random: &mut Random, mode: Mode, maxphyaddr: u32) -> Regs {
    let mut regs = Regs::long_mode(0);
    regs.maxphyaddr = maxphyaddr as u8;
    // PE, ET, NE.
    regs.cr0 = 0x31 | random.bit(CR0_WP, 50);
    regs.cr0 |= if mode == Mode::Unpaged { 0 } else { CR0_PG };
    regs.cr4 = random.bit(CR4_PSE, 70) | random.bit(CR4_PGE, 50);
    regs.efer = random.bit(EFER_NXE, 60);
    if matches!(mode, Mode::Pae | Mode::Four | Mode::Five) {
        regs.cr4 |= CR4_PAE;
    }
    if matches!(mode, Mode::Four | Mode::Five) {
        regs.efer |= EFER_LME | EFER_LMA;
        regs.cr4 |= if mode == Mode::Five { CR4_LA57 } else { 0 };
    }
    regs.cr3 = match mode {
        // 32-byte aligned, and below 4 GiB.
        Mode::Pae => frame(random, Mode::ThirtyTwo) | (random.below(128) * 32),
        _ => frame(random, mode),
    };
    regs.cr3 |= random.bit(PWT, 20) | random.bit(PCD, 20);
    regs
}

fn entry(random: &mut Random, mode: Mode, regs: &Regs) -> u64 {
    let mut entry = frame(random, mode) | random.bit(P, 95) | random.bit(RW, 70);
    entry |= random.bit(US, 60) | random.bit(A, 50) | random.bit(D, 40) | random.bit(G, 20);
    entry |= random.next() & (PWT | PCD | 0xe00);
    if random.percent(15) {
        entry |= PS;
        let low = random.pick(&[0x1f_e000u64, 0x3f_e000, 0x3fff_e000]);
        entry &= !low;
        if random.percent(30) {
            entry |= random.next() & random.next() & low;
        }
        if random.percent(50) {
            // Anywhere.
            entry ^= random.next() & ((1 << regs.maxphyaddr) - 0x40_0000);
        }
    }
    if regs.is_long() && random.percent(40) {
        entry |= random.next() & 0x7ff << 52;
    }
    if regs.efer & EFER_NXE != 0 {
        entry |= random.bit(NX, 20);
    }
    if random.percent(4) {
        entry ^= 1 << random.below(64);
    }
    entry
}

fn address(random: &mut Random, mode: Mode) -> u64 {
    let gva = random.next();
    match mode {
        Mode::Four => ((gva << 16) as i64 >> 16) as u64,
        Mode::Five => ((gva << 7) as i64 >> 7) as u64,
        _ => gva & 0xffff_ffff,
    }
}

/// What is known of KVM, and what is not asked of it.
struct Oracle {
    memory: Memory,
    giant: bool,
    tally: Tally,
    bad: Disagreements,
    cases: u64,
}

impl Oracle {
    /// One set of tables, in one mode. An error if this KVM does not have it.
    fn round(&mut self, random: &mut Random, cpu: &Cpu, mode: Mode) -> Result<(), String> {
        let mut regs = registers(random, mode, cpu.maxphyaddr);
        let narrow = mode == Mode::ThirtyTwo;
        self.memory.fill(|| match entry(random, mode, &regs) {
            word if narrow => word & 0xffff_ffff | entry(random, mode, &regs) << 32,
            word => word,
        });
        if mode == Mode::Pae {
            self.fill_pdptes(random, &regs);
            match load_pdptrs(&self.memory.map, &Hint::default(), &regs) {
                Ok(pdptrs) => regs.pdptrs = pdptrs,
                // KVM then keeps those of before.
                Err(_) => {
                    self.tally.add("skipped, no legal PDPTEs");
                    return Ok(());
                }
            }
        }
        cpu.set(&regs)?;
        let paging = PagingMode::new(&regs).unwrap();
        let paging = if self.giant { paging } else { paging.without_1g_pages() };
        for _ in 0..ADDRESSES {
            let gva = address(random, mode);
            self.compare(cpu, mode, &regs, &paging, gva);
        }
        if let Some((n, live, copy)) = self.memory.difference() {
            let text = format!("{mode:?}, {}: word {n} is {live:#x}, not {copy:#x}", cpu.name);
            self.bad.add(text);
        }
        Ok(())
    }

    /// Four entries that a load of CR3 accepts.
    fn fill_pdptes(&self, random: &mut Random, regs: &Regs) {
        for i in 0..4 {
            let at = (regs.cr3 & 0xffff_ffe0) + i * 8;
            let value = frame(random, Mode::Pae) | random.bit(P, 85) | random.next() & 0xe18;
            for memory in [&self.memory.live, &self.memory.copy] {
                memory[0].words()[(at / 8) as usize].store(value, Ordering::SeqCst);
            }
        }
    }

    fn compare(&mut self, cpu: &Cpu, mode: Mode, regs: &Regs, paging: &PagingMode, gva: u64) {
        let map = &self.memory.map;
        let hint = Hint::default();
        let any = paging.translate(map, &hint, Gva(gva), None);
        let mut result = paging.translate(map, &hint, Gva(gva), Some(Access::read()));
        assert_eq!(any, result, "a supervisor read needs no rights here");
        let mut path = Path::new();
        if cpu.amd && regs.is_long() {
            let top = if mode == Mode::Five { 5 } else { 4 };
            if self.amd_refuses(paging, gva, top) {
                let answer = cpu.fd.translate_gva(gva).unwrap();
                self.cases += 1;
                self.tally.add("AMD, bit 8 of a top-level entry: refused");
                if answer.valid != 0 {
                    self.bad.add(format!("{mode:?}, {}: {gva:#x} with bit 8", cpu.name));
                }
                return;
            }
        }
        if mode == Mode::ThirtyTwo && cpu.maxphyaddr != 36 && regs.cr4 & CR4_PSE != 0 {
            let at = (regs.cr3 & 0xffff_f000) + (gva >> 22) * 4;
            let word = self.memory.pair(at).map_or(0, |(_, copy)| copy) >> (8 * (at & 4));
            if word & (P | PS) == P | PS && word & 0x3f_e000 != 0 {
                return self.tally.add("skipped, more than 36 bits of PSE-36");
            }
        }
        if result.is_ok() {
            result = paging.walk_path(map, &hint, Gva(gva), Access::read(), &mut path);
        }
        let answer = cpu.fd.translate_gva(gva).unwrap();
        self.cases += 1;
        let label = match &result {
            Ok(Walk { page_size, .. }) => format!("{mode:?}: translated, {} KiB", page_size / 1024),
            Err(fault) => format!("{mode:?}: {} level {}", fault.reason.name(), fault.level),
        };
        let agrees = match &result {
            Ok(walk) => answer.valid != 0 && answer.physical_address == walk.gpa.0,
            Err(fault) => answer.valid == 0 && fault.reason != Reason::NonCanonical,
        };
        // After a translation the accessed bits are set; otherwise nothing is.
        let marked = path.steps().iter().all(|step| {
            self.memory.pair(step.entry.0 & !7).is_some_and(|(live, copy)| live == copy)
        });
        if !agrees || !marked {
            self.bad.add(format!(
                "{mode:?}, {}: {gva:#x} is {:#x} (valid {}), not {result:x?}; accessed bits as \
                 they should be: {marked}; {regs:x?}, path {:x?}",
                cpu.name,
                answer.physical_address,
                answer.valid,
                path.steps()
            ));
        }
        self.tally.add(label);
    }

    fn amd_refuses(&self, paging: &PagingMode, gva: u64, top: u8) -> bool {
        let at = paging.root_address().0 + paging.index(Gva(gva), top) * 8;
        let copy = self.memory.pair(at).map_or(0, |(_, copy)| copy);
        copy & (P | G) == P | G
    }
}

#[test]
fn kvm_translate_agrees_in_every_mode() {
    let start = Instant::now();
    if !oracle::has_kvm("oracle_translate") {
        return;
    }
    let kvm = Kvm::new().unwrap();
    let mut random = Random::seeded("oracle_translate");
    let vm = kvm.create_vm().unwrap();
    let memory = Memory::new();
    for ((slot, (base, frames)), memory) in (0..).zip(PIECES).zip(&memory.live) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: base,
            memory_size: frames * 4096,
            userspace_addr: memory.words().as_ptr() as u64,
        };
        // SAFETY: the memory outlives the VM's use of it: no vCPU runs, and KVM_TRANSLATE is not
        // called after this function has returned. On this side it is used as atomics only.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let leaf = |function| cpuid.as_slice().iter().find(|e| e.function == function && e.index == 0);
    let giant = leaf(0x8000_0001).is_some_and(|e| e.edx & 1 << 26 != 0);
    let five = leaf(7).is_some_and(|e| e.ecx & 1 << 16 != 0);
    if !giant {
        println!("SKIPPED: 1 GiB pages: not in CPUID (PS of a PDPTE must then be reserved)");
    }
    if !five {
        println!("SKIPPED: 5-level paging: not in CPUID");
    }
    let own = leaf(0x8000_0008).map_or(36, |e| e.eax & 0xff);
    let mut cpus = Vec::new();
    for (vendor, _) in VENDORS.iter().enumerate() {
        for maxphyaddr in [36, 40, own] {
            cpus.push(Cpu::new(&vm, cpus.len() as u64, &cpuid, vendor, maxphyaddr));
        }
    }
    let (tally, bad) = (Tally::default(), Disagreements::default());
    let mut oracle = Oracle { memory, giant, tally, bad, cases: 0 };
    let all = cases(6000);
    let mut modes = vec![Mode::Unpaged, Mode::ThirtyTwo, Mode::Pae, Mode::Four];
    modes.extend(five.then_some(Mode::Five));
    while oracle.cases < all && !oracle.bad.many() {
        modes.retain(|&mode| {
            // The simplest mode needs no more than a look.
            if mode == Mode::Unpaged && random.percent(80) {
                return true;
            }
            let cpu = &cpus[random.below(cpus.len() as u64) as usize];
            match oracle.round(&mut random, cpu, mode) {
                Ok(()) => true,
                Err(why) => {
                    println!("SKIPPED: {mode:?}: this KVM does not take it: {why}");
                    false
                }
            }
        });
    }
    let Oracle { tally, bad, cases, .. } = oracle;
    println!("{cases} cases in {:.1?}\n{tally}", start.elapsed());
    bad.expect_none();
    for (outcome, at_least) in [
        ("Unpaged: translated", 50),
        ("ThirtyTwo: translated, 4 KiB", 100),
        ("ThirtyTwo: translated, 4096 KiB", 50),
        ("ThirtyTwo: not_present", 50),
        ("ThirtyTwo: reserved", 5),
        ("Pae: translated, 4 KiB", 100),
        ("Pae: translated, 2048 KiB", 20),
        ("Pae: not_present", 50),
        ("Pae: reserved", 30),
        ("Four: translated, 4 KiB", 100),
        ("Four: translated, 2048 KiB", 20),
        ("Four: not_present", 50),
        ("Four: reserved", 50),
        ("AMD, bit 8", 20),
    ] {
        let of_mode = modes.iter().any(|mode| outcome.starts_with(&format!("{mode:?}")));
        if of_mode || outcome.starts_with("AMD") {
            tally.expect(outcome, at_least);
        }
    }
    assert!(modes.contains(&Mode::Unpaged) && modes.contains(&Mode::Four), "{modes:?}");
}
