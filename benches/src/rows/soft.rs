// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The software vCPU's TLB hit beside a bare load, and hits of several vCPUs.
//!
//! An engine that has a lock must keep a page from being taken away while a vCPU loads from it. So
//! under `rwlock` a hit holds the lock for reading, under `mutex` it holds the lock: for each load, as
//! walks do, or for [`BATCH`] of them, as a vCPU would that lets changes wait so long.

use super::lanes::{Crowd, Ids, Sampled, Whats, after, each, ids, measure};
use crate::chase::chained;
use crate::cpu::{Work, together};
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs, xorshift};
use crate::measure::{Effort, Samples, calibrate, interleave, per_operation, timed};
use crate::regime::{Regime, Vm};
use mmu_core::addr::Gva;
use mmu_core::vcpu::{Session, SoftVcpu};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages in use: fewer than the TLB has entries.
const PAGES: u64 = 64;
/// First mapped address; guest-physical memory begins with these pages.
const FIRST: u64 = 0x5555_0000_0000;
/// Loads of a pass.
const LOADS: u64 = 512;
/// Loads that hold the lock once.
const BATCH: usize = 64;

struct Guest {
    memory: Memory,
    vm: Vm,
    root: u64,
    /// Offsets of the words to load.
    offsets: Vec<u64>,
    sum: u64,
}

impl Guest {
    fn new(regime: Regime) -> Result<Self, Failure> {
        let mut memory = Memory::new(2 * MIB, MIB);
        let root = memory.table();
        for page in 0..PAGES {
            memory.map(root, FIRST + page * PAGE, page * PAGE);
        }
        let (mut x, mut offsets, mut sum) = (1, Vec::new(), 0u64);
        for n in 0..LOADS {
            x = xorshift(x);
            let offset = (x >> 20) % (PAGES * 512) * 8;
            memory.word(offset).store(n + 1, Ordering::Relaxed);
            offsets.push(offset);
        }
        for offset in &offsets {
            sum += memory.word(*offset).load(Ordering::Relaxed);
        }
        let vm = Vm::new(memory.engine(512)?, regime);
        Ok(Self { memory, vm, root, offsets, sum })
    }

    fn vcpu(&self) -> Result<SoftVcpu, Failure> {
        self.vm.mmu().create_soft_vcpu(regs(self.root)).map_err(Failure::in_step("vCPU"))
    }

    fn verify(&self) -> Result<(), Failure> {
        let audit = self.vm.mmu().audit().map_err(Failure::in_step("audit"))?;
        check_eq("shadow entries", audit.sptes, PAGES)
    }

    fn check(&self, sum: Option<u64>) -> Result<(), Failure> {
        check_eq("sum of the words", sum, Some(self.sum))
    }

    /// Loads every word; each load waits for the one before if `CHAINED`.
    #[inline(always)]
    fn pass<const CHAINED: bool>(&self, mut load: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
        let (mut sum, mut last) = (0, 0);
        for offset in &self.offsets {
            last = load(if CHAINED { chained(*offset, last) } else { *offset })?;
            sum += last;
        }
        Some(sum)
    }

    #[inline(never)]
    fn hits<const CHAINED: bool>(&self, session: &mut Session<'_>) -> Option<u64> {
        self.pass::<CHAINED>(|offset| session.load_u64(Gva(FIRST + offset), true).ok())
    }

    /// Loads every word, and takes the regime's lock for each `BATCH` of them.
    #[inline(never)]
    fn held<const BATCH: usize>(&self, session: &mut Session<'_>) -> Option<u64> {
        let mut sum = 0;
        for batch in self.offsets.chunks_exact(BATCH) {
            sum += self.vm.shared(|| {
                let mut sum = 0;
                for offset in batch {
                    sum += session.load_u64(Gva(FIRST + offset), true).ok()?;
                }
                Some(sum)
            })?;
        }
        Some(sum)
    }

    #[inline(never)]
    fn bare<const CHAINED: bool>(&self, words: &[AtomicU64]) -> Option<u64> {
        self.pass::<CHAINED>(|offset| {
            // SAFETY: the offsets are within the first `PAGES` pages of 2 MiB.
            let word = unsafe { words.get_unchecked((offset / 8) as usize) };
            // Acquire, as in the engine: no instruction on this architecture.
            Some(word.load(Ordering::Acquire))
        })
    }

    fn measure<const CHAINED: bool>(&self, effort: &Effort) -> Result<Samples, Failure> {
        let (words, count) = (self.memory.words(), self.offsets.len());
        let bare = || self.check(self.bare::<CHAINED>(words));
        let passes = calibrate(effort, bare)?;
        let mut cpu = self.vcpu()?;
        let hit = |_: usize| {
            let mut session = cpu.session();
            // Fills the TLB; later passes hit.
            self.check(self.hits::<CHAINED>(&mut session))?;
            timed(passes, count, || self.check(self.hits::<CHAINED>(&mut session)))
        };
        interleave(
            effort,
            vec![("hit", Box::new(hit)), ("bare", Box::new(move |_| timed(passes, count, bare)))],
        )
    }
}

/// Software vCPUs with the same pages.
struct Hitters {
    guests: Vec<Guest>,
    cpus: RefCell<Vec<SoftVcpu>>,
    pass: Pass,
}

/// Loads of every word.
type Pass = fn(&Guest, &mut Session<'_>) -> Option<u64>;

impl Sampled for Hitters {
    fn calibrate(&self, effort: &Effort) -> Result<u64, Failure> {
        let (guest, cpu) = (&self.guests[0], &mut self.cpus.borrow_mut()[0]);
        let mut session = cpu.session();
        calibrate(effort, || guest.check((self.pass)(guest, &mut session)))
    }

    /// For each load.
    fn sample(&self, passes: u64) -> Result<(f64, bool), Failure> {
        let (mut cpus, pass) = (self.cpus.borrow_mut(), self.pass);
        let loads = cpus.len() as u64 * passes * LOADS;
        let work = cpus.iter_mut().enumerate().map(|(n, cpu)| {
            let guest = &self.guests[n % self.guests.len()];
            let run = move || {
                let mut session = cpu.session();
                (0..passes).try_for_each(|_| guest.check(pass(guest, &mut session)))
            };
            Box::new(run) as Work<'_, ()>
        });
        let all = together(work.collect())?;
        Ok((per_operation(all.elapsed, loads), all.disturbed))
    }

    fn verify(&self) -> Result<(), Failure> {
        self.guests.iter().try_for_each(Guest::verify)
    }
}

impl Crowd for Hitters {
    type Work = Pass;

    fn one(pass: Pass, regime: Regime, lanes: usize) -> Result<Self, Failure> {
        let guest = Guest::new(regime)?;
        let cpus = (0..lanes).map(|_| guest.vcpu()).collect::<Result<_, _>>()?;
        Ok(Self { guests: vec![guest], cpus: RefCell::new(cpus), pass })
    }

    fn private(pass: Pass, lanes: usize) -> Result<Self, Failure> {
        let guests = (0..lanes).map(|_| Guest::new(Regime::Rcu));
        let guests = guests.collect::<Result<Vec<_>, _>>()?;
        let cpus = guests.iter().map(Guest::vcpu).collect::<Result<_, _>>()?;
        Ok(Self { guests, cpus: RefCell::new(cpus), pass })
    }
}

/// How long vCPUs hold the lock.
const HELD: [(Pass, &Ids, Whats); 2] = [
    (Guest::held::<1>, ids!("T1"), each!("TLB hits")),
    (Guest::held::<BATCH>, ids!("T1.batch"), each!("TLB hits, 64 for each lock")),
];

/// T1.
#[derive(Debug)]
pub struct TlbHit;

impl Row for TlbHit {
    fn id(&self) -> &'static str {
        "T1"
    }

    fn figures(&self) -> &'static [&'static str] {
        const FIGURES: [&str; 26] = after(&["T1", "T1.chained"], &[HELD[0].1, HELD[1].1]);
        &FIGURES
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let guest = Guest::new(Regime::Rcu)?;
        let samples = guest.measure::<false>(effort)?;
        let what = "software vCPU, TLB hit, 8-byte load";
        found.figure(Figure::cost("T1", what, &samples, ["hit", "bare"])?.goal(Goal::AtMost(6.0)));
        found.plots.push(("T1: a load that hits the TLB", "ns", samples));
        let samples = guest.measure::<true>(effort)?;
        let what = "the same, each load waits for the last";
        found.figure(Figure::cost("T1.chained", what, &samples, ["hit", "bare"])?);
        guest.verify()?;
        for (pass, ids, what) in HELD {
            found.append(measure::<Hitters>(effort, pass, ids, what, None)?);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_load_the_same() {
        let guest = Guest::new(Regime::Rcu).unwrap();
        let mut cpu = guest.vcpu().unwrap();
        let mut session = cpu.session();
        assert_eq!(guest.hits::<true>(&mut session), Some(guest.sum));
        assert_eq!(guest.hits::<false>(&mut session), Some(guest.sum));
        assert_eq!(guest.bare::<true>(guest.memory.words()), Some(guest.sum));
        assert_eq!(guest.bare::<false>(guest.memory.words()), Some(guest.sum));
    }

    #[test]
    fn every_vcpu_loads_every_word_under_every_regime() {
        for (pass, ..) in HELD {
            let crowds = Regime::ALL.map(|regime| Hitters::one(pass, regime, 3));
            for crowd in crowds.into_iter().chain([Hitters::private(pass, 3)]) {
                let crowd = crowd.unwrap();
                crowd.sample(2).unwrap();
                crowd.verify().unwrap();
                // Another word than the one that was stored is noticed.
                let guest = &crowd.guests[0];
                guest.memory.word(guest.offsets[7]).fetch_add(1, Ordering::Relaxed);
                assert!(crowd.sample(1).is_err());
            }
        }
    }
}
