// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM as an oracle: what a ring-3 access does on a real vCPU is what the walker says.
//!
//! Compared: whether the access is made, and where (each data word says where it is; a place
//! without memory comes back as a device access with its machine address); vector, error code and
//! CR2 of a fault; every word of the tables afterwards, so accessed and dirty bits at every level
//! and that nothing else changed.
//!
//! Who answers: with nested paging the processor itself. Without, its ring-3 code runs on tables
//! that the host kernel derives, and faults, accessed and dirty bits come from that kernel's own
//! walker, which is independent of ours all the same.
//!
//! Not compared, because the architecture leaves it open: accessed bits that a *faulting* walk sets
//! in upper levels (counted), and walks through tables where no memory is.
//!
//! `SHADOWMMU_ORACLE_CASES` asks for more cases than usual, `SHADOWMMU_ORACLE_SEED` for others.

mod oracle;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use mmu_core::paging::{Fault, Kind};
use oracle::lab::{Lab, Outcome};
use oracle::tables::{Limits, World};
use oracle::{Disagreements, Random, Tally, cases};
use std::time::Instant;

const KINDS: [Kind; 3] = [Kind::Read, Kind::Write, Kind::Execute];

/// What CPUID offers, and messages about what it does not.
fn limits() -> Limits {
    let kvm = kvm_ioctls::Kvm::new().unwrap();
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let leaf = |function, index| {
        cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).copied()
    };
    let maxphyaddr = leaf(0x8000_0008, 0).map_or(36, |e| e.eax & 0xff);
    let giant = leaf(0x8000_0001, 0).is_some_and(|e| e.edx & 1 << 26 != 0);
    // "AuthenticAMD", "HygonGenuine".
    let amd = leaf(0, 0).is_some_and(|e| [0x6874_7541, 0x6f67_7948].contains(&e.ebx));
    println!(
        "MAXPHYADDR is {maxphyaddr}, bit 8 of PML4Es is {}",
        if amd { "reserved" } else { "ignored" }
    );
    if !giant {
        println!("SKIPPED: 1 GiB pages: not in CPUID (PS of a PDPTE must then be reserved)");
    }
    let seven = leaf(7, 0).unwrap_or_default();
    for (offered, what) in [
        (seven.ecx & 1 << 3 != 0, "protection keys"),
        (seven.ecx & 1 << 16 != 0, "5-level paging"),
        (seven.ebx & 1 << 7 != 0, "SMEP (no part in ring 3 but the error code)"),
    ] {
        let why = if offered { "the backend's vCPUs do not enable it" } else { "not in CPUID" };
        println!("SKIPPED: {what}: {why}");
    }
    Limits { maxphyaddr, giant, amd }
}

/// Index in the top table.
fn slot(gva: u64) -> u64 {
    gva >> 39 & 511
}

/// The lab, and what came out so far.
struct Trial {
    lab: Lab,
    limits: Limits,
    tally: Tally,
    bad: Disagreements,
    cases: u64,
    /// Top-level slots that the host has taken.
    taken: Vec<u64>,
}

impl Trial {
    /// Reads one page through every top-level slot. A host kernel without nested paging runs in
    /// the guest's address space and may have use for some of its upper half: there a present
    /// page is never seen, and nothing can be learnt.
    fn find_taken_slots(&mut self) {
        let world = World::slots(&self.lab.frames(4));
        self.lab.enter(&world);
        for &gva in &world.gvas {
            let prediction = self.lab.predict(self.limits, gva, Kind::Read).unwrap();
            let expected = self.lab.expected(&prediction, Kind::Read);
            let outcome = self.lab.access(&prediction, gva, Kind::Read);
            if outcome != expected {
                println!("SKIPPED: {gva:#x} and what shares its top-level slot: {outcome:x?}");
                self.taken.push(slot(gva));
            }
        }
        assert!(self.taken.iter().all(|slot| *slot >= 256) && self.taken.len() <= 8);
    }

    /// One access.
    fn case(&mut self, world: &World, gva: u64, kind: Kind) {
        // Not at the end of a page: whoever decodes the code may look at the next one as well.
        let gva = if kind == Kind::Execute { gva & !0x800 } else { gva };
        if self.taken.contains(&slot(gva)) {
            return self.tally.add("skipped, slot taken by the host");
        }
        let prediction = match self.lab.predict(self.limits, gva, kind) {
            Ok(prediction) => prediction,
            Err(skip) => return self.tally.add(format_args!("skipped {skip:?}")),
        };
        let expected = self.lab.expected(&prediction, kind);
        let outcome = self.lab.access(&prediction, gva, kind);
        let marks = self.lab.compare(world, &prediction);
        self.cases += 1;
        let label = match (&expected, prediction.result) {
            (Outcome::Device { .. }, _) => format!("made {kind:?}, no memory"),
            (_, Ok(walk)) => format!("made {kind:?}, {} KiB page", walk.page_size / 1024),
            _ if prediction.amd => "fault 14 reserved level 4, bit 8 (AMD only)".into(),
            (_, Err(Fault { vector, error_code, level, reason, .. })) => {
                format!("fault {vector} {} level {level}, code {error_code:#04x}", reason.name())
            }
        };
        if outcome != expected || marks.is_err() {
            let steps: Vec<_> = prediction.path.steps().iter().map(|s| s.value).collect();
            self.bad.add(format!(
                "{kind:?} of {gva:#x}: {outcome:x?}, not {expected:x?}; {marks:x?}; root {:#x}, \
                 path {steps:x?}, {prediction:x?}",
                world.frames[0]
            ));
        }
        if let Ok(n @ 1..) = marks {
            (0..n).for_each(|_| self.tally.add("accessed bit set by a faulting walk"));
        }
        self.tally.add(label);
    }
}

#[test]
fn ring_3_accesses_do_what_the_walker_says() {
    let start = Instant::now();
    if !oracle::has_kvm("oracle_ring3") {
        return;
    }
    let lab = Lab::new();
    let mut random = Random::seeded("oracle_ring3");
    let limits = limits();
    let (tally, bad) = (Tally::default(), Disagreements::default());
    let mut trial = Trial { lab, limits, tally, bad, cases: 0, taken: Vec::new() };

    trial.find_taken_slots();
    // Every bit of every entry of a clean path.
    for leaf in 1..=3 {
        for level in leaf..=4 {
            for marks in [0, 0x60] {
                let world = World::sweep(&trial.lab.frames(4), level, leaf, marks);
                trial.lab.enter(&world);
                for &gva in &world.gvas {
                    let first = random.below(3) as usize;
                    (0..3).for_each(|k| trial.case(&world, gva, KINDS[(first + k) % 3]));
                }
            }
        }
    }
    let swept = trial.cases;

    let all = swept + cases(4000);
    while trial.cases < all && !trial.bad.many() {
        let world = if random.percent(60) {
            let frames = trial.lab.frames(3 * (1 + random.below(4)) + 1);
            World::tree(&mut random, &frames, limits)
        } else {
            let frames = trial.lab.frames(1 + random.below(8));
            World::tangle(&mut random, &frames, limits)
        };
        trial.lab.enter(&world);
        for _ in 0..60 {
            let gva = random.pick(&world.gvas);
            trial.case(&world, gva, random.pick(&KINDS));
        }
    }
    trial.lab.expect_arena_as_copied();
    let Trial { tally, bad, cases, .. } = trial;
    println!(
        "{} accessed bits in upper levels were set by walks that faulted",
        tally.count("accessed bit")
    );
    println!("{cases} cases, {swept} of them single bits, in {:.1?}\n{tally}", start.elapsed());
    bad.expect_none();
    for (outcome, at_least) in [
        ("made Read, 4 KiB", 200),
        ("made Write, 4 KiB", 200),
        ("made Execute, 4 KiB", 200),
        ("made Read, 2048 KiB", 50),
        ("made Write, 2048 KiB", 50),
        ("made Execute, 2048 KiB", 50),
        ("made Read, no memory", 5),
        ("fault 14 not_present", 200),
        ("fault 14 reserved", 100),
        ("fault 14 user", 50),
        ("fault 14 write", 50),
        ("fault 14 fetch", 50),
        ("fault 13 non_canonical", 5),
    ] {
        tally.expect(outcome, at_least);
    }
}
