// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ageing: which pages a guest has used since somebody last asked, and what asking costs it.

use crate::cpu::thread_time;
use crate::figure::{Failure, Figure, Found, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples, Variant, interleave};
use mmu_core::Mmu;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::SoftVcpu;
use serde_json::json;
use std::cell::RefCell;
use std::sync::Arc;

/// Mapped pages of the first figures: 64 MiB.
const PAGES: u64 = 1 << 14;
/// Where they are, in both kinds of addresses.
const BASE: u64 = 1 << 32;

/// A guest that reads all its pages in turn.
struct Guest {
    mmu: Mmu,
    cpu: SoftVcpu,
    pages: u64,
    /// What was reported last, a bit for each page.
    young: Vec<u64>,
}

impl Guest {
    fn new(pages: u64) -> Result<Self, Failure> {
        let mut memory = Memory::new((pages / 512 + 8) * PAGE + MIB, PAGE);
        let root = memory.table();
        for page in 0..pages {
            memory.map(root, BASE + page * PAGE, BASE + page * PAGE);
        }
        let mmu = memory.engine(pages / 512 + 64)?;
        let data = Arc::new(AllocatedMemory::new(pages * PAGE));
        let slot = SlotConfig::new(1, Gpa(BASE), data);
        mmu.create_slot(slot).map_err(Failure::in_step("slot"))?;
        let cpu = mmu.create_soft_vcpu(regs(root)).map_err(Failure::in_step("vCPU"))?;
        let mut guest = Self { mmu, cpu, pages, young: vec![0; (pages / 64) as usize] };
        guest.read()?;
        Ok(guest)
    }

    /// Reads a word of every page; nanoseconds a page.
    fn read(&mut self) -> Result<f64, Failure> {
        let start = thread_time();
        let mut session = self.cpu.session();
        for page in 0..self.pages {
            let word = session.load_u64(Gva(BASE + page * PAGE + page % 512 * 8), true);
            check_eq("word", word.map_err(Failure::in_step("load"))?, 0)?;
        }
        drop(session);
        Ok(each(start, self.pages))
    }

    /// Asks which pages were used, and with `clear` ages them; they must be `expected`.
    /// Nanoseconds a page.
    fn ask(&mut self, clear: bool, expected: u64) -> Result<f64, Failure> {
        let Self { mmu, young, pages, .. } = self;
        young.fill(0);
        let start = thread_time();
        let range = PageRange::Guest { base: Gpa(BASE), size: *pages * PAGE };
        let report = |_: &_, page: u64, bits: u64| young[(page / 64) as usize] = bits;
        let found = match clear {
            true => mmu.clear_young(range, report),
            false => mmu.test_young(range, report),
        };
        let elapsed = each(start, *pages);
        check_eq("young pages", found.map_err(Failure::in_step("ageing"))?, expected)?;
        let bits: u64 = young.iter().map(|word| u64::from(word.count_ones())).sum();
        check_eq("pages reported", bits, expected)?;
        Ok(elapsed)
    }

    /// All that a round measures: asking, ageing, asking for more, using again, and using what is
    /// still young.
    fn round(&mut self) -> Result<[f64; 5], Failure> {
        let test = self.ask(false, self.pages)?;
        let clear = self.ask(true, self.pages)?;
        let none = self.ask(true, 0)?;
        let again = self.read()?;
        Ok([test, clear, none, again, self.read()?])
    }
}

/// Of this thread's time since `start`, for each of so many pages.
fn each(start: std::time::Duration, pages: u64) -> f64 {
    thread_time().saturating_sub(start).as_nanos() as f64 / pages as f64
}

/// A1.
#[derive(Debug)]
pub struct Ageing;

impl Row for Ageing {
    fn id(&self) -> &'static str {
        "A1"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["A1.clear", "A1.again", "A1.x4", "A1.x16"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let sizes = [("x1", PAGES), ("x4", 4 * PAGES), ("x16", 16 * PAGES)];
        let parts = RefCell::new(Vec::new());
        let mut guests = Vec::new();
        for (name, pages) in sizes {
            guests.push((name, Guest::new(pages)?));
        }
        let parts = &parts;
        let variants = guests.iter_mut().map(|(name, guest)| -> Variant<'_> {
            let run = move |round| {
                let times = guest.round()?;
                if round > 0 && guest.pages == PAGES {
                    parts.borrow_mut().push(times);
                }
                Ok(times[1])
            };
            (name, Box::new(run))
        });
        let growth = interleave(effort, variants.collect())?;
        let part = |n: usize| parts.borrow().iter().map(|times| times[n]).collect::<Vec<_>>();
        let asked =
            Samples::from([("test", part(0)), ("clear", part(1)), ("clear, none young", part(2))]);
        let what = "a page's test-and-clear-young, all young";
        let figure = Figure::plain("A1.clear", what, &asked, "clear", "ns")?;
        found.figure(figure.detail("pages", json!(PAGES)));
        let used = Samples::from([("after ageing", part(3)), ("young", part(4))]);
        let what = "a load of each page after it, over one without";
        found.figure(Figure::cost("A1.again", what, &used, ["after ageing", "young"])?);
        let what = "A1.clear of 4 times the pages over these";
        found.figure(Figure::cost("A1.x4", what, &growth, ["x4", "x1"])?);
        let what = "the same, 16 times";
        found.figure(Figure::cost("A1.x16", what, &growth, ["x16", "x1"])?);
        found.plots.push(("A1: a page's test-and-clear-young", "ns", asked));
        found.plots.push(("A1: a load of a page after it", "ns", used));
        guests[0].1.mmu.audit().map_err(Failure::in_step("audit"))?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_young_once_used() {
        let mut guest = Guest::new(1024).unwrap();
        for _ in 0..2 {
            assert!(guest.round().unwrap().into_iter().all(|ns| ns > 0.0));
        }
        assert!(guest.ask(false, 7).is_err());
        guest.ask(true, 1024).unwrap();
        guest.cpu.session().load_u64(Gva(BASE + 700 * PAGE), true).unwrap();
        guest.ask(true, 1).unwrap();
        assert_eq!(guest.young[700 / 64], 1 << (700 % 64));
    }
}
