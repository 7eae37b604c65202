// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that writes while its dirty log is harvested without pause, as during a migration.
//!
//! There are two guests of each kind. The log that is harvested is always that of the first; what
//! differs is which of the two writes meanwhile. So the harvested guest has every page's right to
//! write taken away soon after it came, and the other one never.

use crate::cpu::together;
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Variant, interleave, per_operation, undisturbed};
use crate::processor::Writer;
use crate::regime::{Regime, Vm};
use crate::rows::threads::needs_two;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, DirtyMode, SlotConfig, SlotId};
use mmu_core::vcpu::SoftVcpu;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Pages of the slot with the log: 1 GiB.
const SLOT_PAGES: u64 = 1 << 18;
/// Where it is, in both kinds of addresses.
const BASE: u64 = 1 << 32;
const SLOT: SlotId = SlotId(1);
/// Pages that the guest of the first figure writes to: 16 MiB.
const PAGES: u64 = 1 << 12;

/// Where a guest stores, one 8-byte word after the other; numbers of pages are powers of two.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// Every word of so many pages, page by page.
    Whole(u64),
    /// One word of a page, then of another of so many.
    Sparse(u64),
}

impl Pattern {
    /// Page and word of a store.
    #[inline(always)]
    fn place(self, store: u64) -> (u64, u64) {
        match self {
            Self::Whole(pages) => ((store / 512) & (pages - 1), store % 512),
            // An odd factor: each page once, then each once more.
            Self::Sparse(pages) => {
                let word = (store >> pages.trailing_zeros()) % 512;
                (store.wrapping_mul(0x9e37_79b9) & (pages - 1), word)
            }
        }
    }
}

/// Who runs a guest.
enum Cpu {
    /// The engine's software vCPU.
    Soft(SoftVcpu),
    /// One whose faults are under the regime's lock.
    Own(Writer),
}

/// What guests have in common.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// Of a processor of the bench's; without one it is the software vCPU that runs.
    regime: Option<Regime>,
    dirty: DirtyMode,
    /// That are mapped, and may be written.
    pages: u64,
}

/// A guest with a dirty log.
struct Guest {
    vm: Vm,
    data: Arc<AllocatedMemory>,
    cpu: RefCell<Cpu>,
    /// Stores so far.
    stores: Cell<u64>,
}

/// What one thread of a sample did.
enum Did {
    Stored { ns: f64, stores: u64 },
    Harvested { log: Log, harvests: u64 },
}

/// What harvests have found.
struct Log {
    all: Vec<u64>,
    last: Vec<u64>,
}

impl Log {
    fn new() -> Self {
        let words = (SLOT_PAGES / 64) as usize;
        Self { all: vec![0; words], last: vec![0; words] }
    }

    /// One harvest.
    fn take(&mut self, vm: &Vm) -> Result<(), Failure> {
        let found = vm.exclusive(|| vm.mmu().dirty_log(SLOT, &mut self.last));
        if found.map_err(Failure::in_step("harvest"))? > 0 {
            self.all.iter_mut().zip(&self.last).for_each(|(all, new)| *all |= *new);
        }
        Ok(())
    }

    /// The log has the pages of these stores and no others.
    fn verify(&self, pattern: Pattern, stores: Range<u64>) -> Result<(), Failure> {
        let mut written = vec![0u64; self.all.len()];
        for store in stores {
            let page = pattern.place(store).0;
            written[(page / 64) as usize] |= 1 << (page % 64);
        }
        match (0..SLOT_PAGES / 64).find(|n| self.all[*n as usize] != written[*n as usize]) {
            None => Ok(()),
            Some(n) => Err(Failure::new(format!(
                "pages from {}: logged {:#x}, written {:#x}",
                n * 64,
                self.all[n as usize],
                written[n as usize]
            ))),
        }
    }
}

impl Guest {
    fn new(Kind { regime, dirty, pages }: Kind) -> Result<Self, Failure> {
        let mut memory = Memory::new((pages / 512 + 8) * PAGE + MIB, PAGE);
        let root = memory.table();
        for page in 0..pages {
            memory.map(root, BASE + page * PAGE, BASE + page * PAGE);
        }
        let tables = Arc::new(AllocatedMemory::new((pages / 512 + 64) * PAGE));
        let mmu = memory.engine_in(tables.clone())?;
        let data = Arc::new(AllocatedMemory::new(SLOT_PAGES * PAGE));
        let slot = SlotConfig::new(SLOT.0, Gpa(BASE), data.clone()).track(dirty);
        mmu.create_slot(slot).map_err(Failure::in_step("slot"))?;
        let vm = Vm::new(mmu, regime.unwrap_or(Regime::Rcu));
        let cpu = match regime {
            None => {
                Cpu::Soft(vm.mmu().create_soft_vcpu(regs(root)).map_err(Failure::in_step("vCPU"))?)
            }
            Some(_) => Cpu::Own(Writer::new(&vm, root, tables, data.clone())?),
        };
        let guest = Self { vm, data, cpu: RefCell::new(cpu), stores: Cell::new(0) };
        // Maps every page, writable.
        let all = Pattern::Sparse(pages);
        let stores = guest.cpu.borrow_mut().write(&guest.vm, all, 0, |stores| stores == pages)?;
        guest.stores.set(stores);
        Ok(guest)
    }

    fn faults(&self) -> u64 {
        self.vm.mmu().stats().pf_fixed
    }

    /// What was stored last is there.
    fn verify(&self, pattern: Pattern, stores: Range<u64>) -> Result<(), Failure> {
        for store in stores.rev().take(PAGES as usize) {
            let (page, word) = pattern.place(store);
            let word = &self.data.words()[(page * 512 + word) as usize];
            check_eq("what was stored", word.load(Ordering::Relaxed), store)?;
        }
        Ok(())
    }
}

impl Cpu {
    /// Stores from number `first` on until told to stop, each time the number of the store;
    /// returns how many times, at least once.
    fn write(
        &mut self,
        vm: &Vm,
        pattern: Pattern,
        first: u64,
        stop: impl Fn(u64) -> bool,
    ) -> Result<u64, Failure> {
        match self {
            Self::Soft(cpu) => {
                let mut session = cpu.session();
                numbered(pattern, first, stop, |gva, value| {
                    let stored = session.store(Gva(gva), &value.to_le_bytes(), true);
                    stored.map_err(Failure::in_step("store"))
                })
            }
            Self::Own(cpu) => {
                let stores = numbered(pattern, first, stop, |gva, value| cpu.store(vm, gva, value));
                cpu.leave();
                stores
            }
        }
    }
}

#[inline(always)]
fn numbered(
    pattern: Pattern,
    first: u64,
    stop: impl Fn(u64) -> bool,
    mut store: impl FnMut(u64, u64) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let mut stores = 0;
    while stores == 0 || !stop(stores) {
        let (page, word) = pattern.place(first + stores);
        store(BASE + page * PAGE + word * 8, first + stores)?;
        stores += 1;
    }
    Ok(stores)
}

/// Two guests: the log of one is harvested whichever of them writes.
struct Pair {
    harvested: Guest,
    other: Guest,
}

/// What was counted while the harvested guest wrote.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    harvests: u64,
    seconds: f64,
    stores: u64,
    faults: u64,
}

impl Pair {
    fn new(kind: Kind) -> Result<Self, Failure> {
        let (harvested, other) = (Guest::new(kind)?, Guest::new(kind)?);
        let mut log = Log::new();
        log.take(&harvested.vm)?;
        log.verify(Pattern::Sparse(kind.pages), 0..kind.pages)?;
        Ok(Self { harvested, other })
    }

    /// One sample with one of the two guests writing, the harvested one if there are `sums`.
    /// Nanoseconds a store, and whether the sample was disturbed.
    fn sample(
        &self,
        effort: &Effort,
        pattern: Pattern,
        sums: Option<&Cell<Sums>>,
    ) -> Result<(f64, bool), Failure> {
        let own = sums.is_some();
        let guest = if own { &self.harvested } else { &self.other };
        let (first, faults) = (guest.stores.get(), guest.faults());
        let mut cpu = guest.cpu.borrow_mut();
        let (cpu, vm, harvested) = (&mut *cpu, &guest.vm, &self.harvested.vm);
        let stop = &AtomicBool::new(false);
        let write = move || {
            let start = Instant::now();
            let stores = cpu.write(vm, pattern, first, |_| stop.load(Ordering::Relaxed))?;
            Ok(Did::Stored { ns: per_operation(start.elapsed(), stores), stores })
        };
        let harvest = move || {
            let (mut log, mut harvests) = (Log::new(), 0);
            let start = Instant::now();
            let mut result = Ok(());
            while result.is_ok() && (harvests == 0 || start.elapsed() < effort.sample) {
                result = log.take(harvested);
                harvests += 1;
            }
            // Also if it failed, so that the guest ends.
            stop.store(true, Ordering::Relaxed);
            result.map(|()| Did::Harvested { log, harvests })
        };
        let both = together(vec![Box::new(write), Box::new(harvest)])?;
        let Ok([Did::Stored { ns, stores }, Did::Harvested { mut log, harvests }]) =
            <[Did; 2]>::try_from(both.values)
        else {
            return Err(Failure::new("two threads, in this order"));
        };
        guest.stores.set(first + stores);
        // What was written after the last harvest.
        log.take(harvested)?;
        let done = first..first + stores;
        guest.verify(pattern, done.clone())?;
        log.verify(pattern, if own { done } else { 0..0 })?;
        if let Some(sums) = sums {
            let before = sums.get();
            sums.set(Sums {
                harvests: before.harvests + harvests,
                seconds: before.seconds + both.elapsed.as_secs_f64(),
                stores: before.stores + stores,
                faults: before.faults + guest.faults() - faults,
            });
        }
        Ok((ns, both.disturbed))
    }
}

/// The kinds of pairs.
const KINDS: [Kind; 5] = [
    Kind { regime: None, dirty: DirtyMode::WriteProtect, pages: 16 * PAGES },
    Kind { regime: None, dirty: DirtyMode::DirtyBits, pages: PAGES },
    Kind { regime: Some(Regime::Rcu), dirty: DirtyMode::WriteProtect, pages: PAGES },
    Kind { regime: Some(Regime::Rwlock), dirty: DirtyMode::WriteProtect, pages: PAGES },
    Kind { regime: Some(Regime::Mutex), dirty: DirtyMode::WriteProtect, pages: PAGES },
];

/// What is compared: the names of a pair's two variants, and what they write.
struct Case {
    id: &'static str,
    what: &'static str,
    names: [&'static str; 2],
    /// Index of [`KINDS`].
    kind: usize,
    pattern: Pattern,
}

const CASES: [Case; 9] = [
    Case {
        id: "D2",
        what: "a guest writes 16 MiB of 1 GiB, its log harvested",
        names: ["soft", "soft, other"],
        kind: 0,
        pattern: Pattern::Whole(PAGES),
    },
    Case {
        id: "D2.x4",
        what: "the same, 64 MiB",
        names: ["x4", "x4, other"],
        kind: 0,
        pattern: Pattern::Whole(4 * PAGES),
    },
    Case {
        id: "D2.x16",
        what: "the same, 256 MiB",
        names: ["x16", "x16, other"],
        kind: 0,
        pattern: Pattern::Whole(16 * PAGES),
    },
    Case {
        id: "D2.sparse",
        what: "the same, one word of a page, then of another",
        names: ["sparse", "sparse, other"],
        kind: 0,
        pattern: Pattern::Sparse(16 * PAGES),
    },
    Case {
        id: "D2.bits",
        what: "16 MiB, the log kept by dirty bits",
        names: ["bits", "bits, other"],
        kind: 1,
        pattern: Pattern::Whole(PAGES),
    },
    Case {
        id: "D2.bits.sparse",
        what: "the same, one word of a page, then of another",
        names: ["bits, sparse", "bits, sparse, other"],
        kind: 1,
        pattern: Pattern::Sparse(PAGES),
    },
    Case {
        id: "D2.rcu",
        what: "16 MiB, on a processor of the bench's",
        names: ["rcu", "rcu, other"],
        kind: 2,
        pattern: Pattern::Whole(PAGES),
    },
    Case {
        id: "D2.rwlock",
        what: "the same under rwlock",
        names: ["rwlock", "rwlock, other"],
        kind: 3,
        pattern: Pattern::Whole(PAGES),
    },
    Case {
        id: "D2.mutex",
        what: "the same under mutex",
        names: ["mutex", "mutex, other"],
        kind: 4,
        pattern: Pattern::Whole(PAGES),
    },
];

/// D2.
#[derive(Debug)]
pub struct BesideHarvest;

impl Row for BesideHarvest {
    fn id(&self) -> &'static str {
        "D2"
    }

    fn figures(&self) -> &'static [&'static str] {
        const {
            &[
                CASES[0].id,
                CASES[1].id,
                CASES[2].id,
                CASES[3].id,
                CASES[4].id,
                CASES[5].id,
                CASES[6].id,
                CASES[7].id,
                CASES[8].id,
            ]
        }
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let (mut found, effort) = (Found::default(), &effort.short());
        if let Some(outcomes) = needs_two(self.figures()) {
            return Ok(Found { outcomes, ..found });
        }
        let pairs = KINDS.map(Pair::new);
        let pairs = pairs.into_iter().collect::<Result<Vec<_>, _>>()?;
        let sums = CASES.map(|_| Cell::new(Sums::default()));
        let mut variants: Vec<Variant<'_>> = Vec::new();
        for (case, sums) in CASES.iter().zip(&sums) {
            let pair = &pairs[case.kind];
            for (name, sums) in case.names.into_iter().zip([Some(sums), None]) {
                let run = move |_| undisturbed(|| pair.sample(effort, case.pattern, sums));
                variants.push((name, Box::new(run)));
            }
        }
        let samples = interleave(effort, variants)?;
        for (case, sums) in CASES.iter().zip(&sums) {
            let Sums { harvests, seconds, stores, faults } = sums.get();
            let figure = Figure::throughput(case.id, case.what, &samples, case.names)?
                .detail("harvests_per_second", json!(harvests as f64 / seconds))
                .detail("faults_per_store", json!(faults as f64 / stores as f64));
            found.figure(match case.id {
                "D2" => figure.goal(Goal::AtLeast(0.6)),
                _ => figure,
            });
        }
        for guest in pairs.iter().flat_map(|pair| [&pair.harvested, &pair.other]) {
            guest.vm.mmu().audit().map_err(Failure::in_step("audit"))?;
        }
        found.plots.push(("D2: a store while a log is harvested", "ns", samples));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_write_is_in_a_log() {
        let effort = Effort { pairs: 1, sample: Duration::from_millis(1) };
        for kind in KINDS {
            let pair = Pair::new(Kind { pages: 1024, ..kind }).unwrap();
            let faults = pair.other.faults();
            let sums = Cell::new(Sums::default());
            for pattern in [Pattern::Whole(1024), Pattern::Sparse(1024)] {
                assert!(pair.sample(&effort, pattern, Some(&sums)).unwrap().0 > 0.0);
                assert!(pair.sample(&effort, pattern, None).unwrap().0 > 0.0);
            }
            let sums = sums.get();
            assert!(sums.stores > 1 && sums.harvests > 1, "{kind:?} {sums:?}");
            assert_eq!(pair.other.faults(), faults, "{kind:?}");
        }
    }

    #[test]
    fn a_log_with_a_page_too_few_or_too_many_is_refused() {
        let log = Log::new();
        log.verify(Pattern::Whole(8), 0..0).unwrap();
        assert!(log.verify(Pattern::Whole(8), 5..6).is_err());
    }
}
