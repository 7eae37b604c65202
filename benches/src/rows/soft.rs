// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The software vCPU's TLB hit beside a bare load.

use crate::chase::chained;
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs, xorshift};
use crate::measure::{Effort, Samples, calibrate, interleave, timed};
use mmu_core::Mmu;
use mmu_core::addr::Gva;
use mmu_core::vcpu::{Session, SoftVcpu};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages in use: fewer than the TLB has entries.
const PAGES: u64 = 64;
/// First mapped address; guest-physical memory begins with these pages.
const FIRST: u64 = 0x5555_0000_0000;

struct Guest {
    memory: Memory,
    mmu: Mmu,
    cpu: RefCell<SoftVcpu>,
    /// Offsets of the words to load.
    offsets: Vec<u64>,
    sum: u64,
}

impl Guest {
    fn new() -> Result<Self, Failure> {
        let mut memory = Memory::new(2 * MIB, MIB);
        let root = memory.table();
        for page in 0..PAGES {
            memory.map(root, FIRST + page * PAGE, page * PAGE);
        }
        let (mut x, mut offsets, mut sum) = (1, Vec::new(), 0u64);
        for n in 0..512 {
            x = xorshift(x);
            let offset = (x >> 20) % (PAGES * 512) * 8;
            memory.word(offset).store(n + 1, Ordering::Relaxed);
            offsets.push(offset);
        }
        for offset in &offsets {
            sum += memory.word(*offset).load(Ordering::Relaxed);
        }
        let mmu = memory.engine(64)?;
        let cpu = mmu.create_soft_vcpu(regs(root)).map_err(Failure::in_step("vCPU"))?;
        Ok(Self { memory, mmu, cpu: RefCell::new(cpu), offsets, sum })
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
        let hit = |_: usize| {
            let mut cpu = self.cpu.borrow_mut();
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

/// T1.
#[derive(Debug)]
pub struct TlbHit;

impl Row for TlbHit {
    fn id(&self) -> &'static str {
        "T1"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["T1", "T1.chained"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let guest = Guest::new()?;
        let samples = guest.measure::<false>(effort)?;
        let what = "software vCPU, TLB hit, 8-byte load";
        found.figure(Figure::cost("T1", what, &samples, ["hit", "bare"])?.goal(Goal::AtMost(6.0)));
        found.plots.push(("T1: a load that hits the TLB", "ns", samples));
        let samples = guest.measure::<true>(effort)?;
        let what = "the same, each load waits for the last";
        found.figure(Figure::cost("T1.chained", what, &samples, ["hit", "bare"])?);
        let audit = guest.mmu.audit().map_err(Failure::in_step("audit"))?;
        check_eq("shadow entries", audit.sptes, PAGES)?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_load_the_same() {
        let guest = Guest::new().unwrap();
        let mut cpu = guest.cpu.borrow_mut();
        let mut session = cpu.session();
        assert_eq!(guest.hits::<true>(&mut session), Some(guest.sum));
        assert_eq!(guest.hits::<false>(&mut session), Some(guest.sum));
        assert_eq!(guest.bare::<true>(guest.memory.words()), Some(guest.sum));
        assert_eq!(guest.bare::<false>(guest.memory.words()), Some(guest.sum));
    }
}
