// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Harvests of a dirty log, kept by write-protection and by the dirty bits of shadow entries.

use crate::cpu::thread_time;
use crate::figure::{Failure, Figure, Found, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples, Variant, calibrate, interleave, timed};
use crate::processor;
use crate::regime::Brief;
use mmu_core::Mmu;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, DirtyMode, SlotConfig, SlotId};
use mmu_core::paging::Access;
use mmu_core::shadow::Outcome;
use mmu_core::vcpu::{Entry, Vcpu};
use serde_json::json;
use std::cell::RefCell;
use std::sync::Arc;

/// Pages of the slot.
const PAGES: u64 = 1 << 18;
/// Where the slot is, in both kinds of addresses.
const BASE: u64 = 1 << 32;
/// Of the slot with the log.
const SLOT: SlotId = SlotId(1);
/// A page of so many is dirty.
const SHARES: [u64; 3] = [100, 10, 1];

/// A kind of log: the names of its variants, and of its figures what they are. The first is of a
/// harvest that finds nothing, the others of the [`SHARES`].
struct Kind {
    mode: DirtyMode,
    names: [&'static str; 4],
    figures: [(&'static str, &'static str); 4],
}

const KINDS: [Kind; 2] = [
    Kind {
        mode: DirtyMode::WriteProtect,
        names: ["0 %", "1 %", "10 %", "100 %"],
        figures: [
            ("D1.d0", "harvest of 1 GiB, nothing dirty, over a bitmap's copy"),
            ("D1.d1", "a dirty page's harvest, 1 % dirty"),
            ("D1.d10", "the same, 10 % dirty"),
            ("D1.d100", "the same, all dirty"),
        ],
    },
    Kind {
        mode: DirtyMode::DirtyBits,
        names: ["0 %, bits", "1 %, bits", "10 %, bits", "100 %, bits"],
        figures: [
            ("D1.bits.d0", "nothing dirty, by dirty bits, over a bitmap's copy"),
            ("D1.bits.d1", "a dirty page's harvest by dirty bits, 1 % dirty"),
            ("D1.bits.d10", "the same, 10 % dirty"),
            ("D1.bits.d100", "the same, all dirty"),
        ],
    },
];

/// A guest that writes, and its log.
struct Guest {
    mmu: Mmu,
    vcpu: Vcpu,
    tables: Arc<AllocatedMemory>,
    bitmap: Vec<u64>,
}

impl Guest {
    fn new(pages: u64, mode: DirtyMode) -> Result<Self, Failure> {
        let mut memory = Memory::new((pages / 512 + 8) * PAGE + MIB, PAGE);
        let root = memory.table();
        for page in 0..pages {
            memory.map(root, BASE + page * PAGE, BASE + page * PAGE);
        }
        let tables = Arc::new(AllocatedMemory::new((pages / 512 + 64) * PAGE));
        let mmu = memory.engine_in(tables.clone())?;
        // Never touched: faults look at tables only.
        let data = Arc::new(AllocatedMemory::new(pages * PAGE));
        let slot = SlotConfig::new(SLOT.0, Gpa(BASE), data).track(mode);
        mmu.create_slot(slot).map_err(Failure::in_step("slot"))?;
        let vcpu = mmu.create_vcpu(Arc::new(Brief), regs(root));
        let vcpu = vcpu.map_err(Failure::in_step("vCPU"))?;
        Ok(Self { mmu, vcpu, tables, bitmap: vec![0; (pages / 64) as usize] })
    }

    fn pages(&self) -> u64 {
        self.bitmap.len() as u64 * 64
    }

    /// Writes to every page of the slot whose number leaves this rest, as far as the log hears of
    /// it; returns how many.
    fn write(&mut self, divisor: u64, rest: u64) -> Result<u64, Failure> {
        let root = match self.vcpu.enter(true, |_| ()) {
            Ok(Entry::Run { root, .. }) => root,
            other => return Err(Failure::new(format!("entry: {other:?}"))),
        };
        let mut count = 0;
        for page in (rest % divisor..self.pages()).step_by(divisor as usize) {
            let gva = BASE + page * PAGE;
            while !processor::mark_written(&self.tables, root, gva) {
                match self.vcpu.fault(Gva(gva), Access::write().user()) {
                    Ok(Outcome::Fixed) => {}
                    Ok(other) => return Err(Failure::new(format!("page {page}: {other:?}"))),
                    Err(stall) => while self.vcpu.must_wait(stall) {},
                }
            }
            count += 1;
        }
        self.vcpu.leave();
        Ok(count)
    }

    fn harvest(&mut self) -> Result<u64, Failure> {
        self.mmu.dirty_log(SLOT, &mut self.bitmap).map_err(Failure::in_step("harvest"))
    }

    /// The log's pages must be those that were written.
    fn verify(&self, found: u64, divisor: u64, rest: u64, written: u64) -> Result<(), Failure> {
        check_eq("dirty pages", found, written)?;
        let set = self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
        check_eq("pages of the log", written, set)?;
        let bit = |page: &u64| self.bitmap[(page / 64) as usize] >> (page % 64) & 1;
        let mut pages = (rest % divisor..self.pages()).step_by(divisor as usize);
        match pages.find(|page| bit(page) == 0) {
            None => Ok(()),
            Some(page) => Err(Failure::new(format!("page {page} is not in the log"))),
        }
    }

    /// Writes and harvests; nanoseconds of the harvest, and of each dirty page.
    fn sample(&mut self, divisor: u64, rest: u64) -> Result<(f64, f64), Failure> {
        let written = self.write(divisor, rest)?;
        let start = thread_time();
        let found = self.harvest()?;
        let elapsed = thread_time().saturating_sub(start).as_nanos() as f64;
        self.verify(found, divisor, rest, written)?;
        Ok((elapsed, elapsed / written as f64))
    }

    /// With everything mapped, so that all harvests meet a shadow of one size.
    fn mapped(pages: u64, mode: DirtyMode) -> Result<Self, Failure> {
        let mut guest = Self::new(pages, mode)?;
        guest.sample(1, 0)?;
        Ok(guest)
    }
}

/// D1.
#[derive(Debug)]
pub struct Harvest;

impl Row for Harvest {
    fn id(&self) -> &'static str {
        "D1"
    }

    fn figures(&self) -> &'static [&'static str] {
        const {
            &[
                KINDS[0].figures[0].0,
                KINDS[0].figures[1].0,
                KINDS[0].figures[2].0,
                KINDS[0].figures[3].0,
                "D1.x4",
                "D1.x16",
                KINDS[1].figures[0].0,
                KINDS[1].figures[1].0,
                KINDS[1].figures[2].0,
                KINDS[1].figures[3].0,
            ]
        }
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let guests = KINDS.map(|kind| Guest::mapped(PAGES, kind.mode).map(RefCell::new));
        let guests = guests.into_iter().collect::<Result<Vec<_>, _>>()?;
        let (from, to) = (vec![0x5555u64; (PAGES / 64) as usize], RefCell::new(vec![0u64; 4096]));
        let copy = || {
            to.borrow_mut().copy_from_slice(core::hint::black_box(&from));
            core::hint::black_box(&to);
            Ok(())
        };
        let copies = calibrate(effort, copy)?;
        let mut variants: Vec<Variant<'_>> = vec![("copy", Box::new(|_| timed(copies, 1, copy)))];
        for (kind, guest) in KINDS.iter().zip(&guests) {
            let nothing = || check_eq("dirty pages", guest.borrow_mut().harvest()?, 0);
            let harvests = calibrate(effort, nothing)?;
            variants.push((kind.names[0], Box::new(move |_| timed(harvests, 1, nothing))));
            for (name, divisor) in kind.names[1..].iter().zip(SHARES) {
                let run =
                    move |round: usize| Ok(guest.borrow_mut().sample(divisor, round as u64)?.0);
                variants.push((name, Box::new(run)));
            }
        }
        let samples = interleave(effort, variants)?;
        for (kind, guest) in KINDS.iter().zip(&guests) {
            let (id, what) = kind.figures[0];
            let figure = Figure::cost(id, what, &samples, [kind.names[0], "copy"])?;
            found.figure(figure.detail("mapped_pages", json!(PAGES)));
            for (n, divisor) in SHARES.into_iter().enumerate() {
                let (name, (id, what)) = (kind.names[n + 1], kind.figures[n + 1]);
                let dirty = PAGES as f64 / divisor as f64;
                let each = samples.of(name)?.iter().map(|ns| ns / dirty).collect();
                let each = Samples::from([(name, each)]);
                let over = crate::stats::median(&samples.ratios(name, "copy")?);
                let figure = Figure::plain(id, what, &each, name, "ns")?;
                found.figure(figure.detail("over_copy", json!(over)));
            }
            guest.borrow().mmu.audit().map_err(Failure::in_step("audit"))?;
        }
        growth(effort, &mut guests[0].borrow_mut(), &mut found)?;
        found.plots.push(("D1: a harvest of a dirty log", "ns", samples));
        Ok(found)
    }
}

/// A dirty page's share of the harvest, 1 % dirty, of larger slots.
fn growth(effort: &Effort, guest: &mut Guest, found: &mut Found) -> Result<(), Failure> {
    let (divisor, mode) = (SHARES[0], KINDS[0].mode);
    let mut four = Guest::mapped(4 * PAGES, mode)?;
    let mut sixteen = Guest::mapped(16 * PAGES, mode)?;
    let each = |guest: &mut Guest, round: usize| Ok(guest.sample(divisor, round as u64)?.1);
    let variants: Vec<Variant<'_>> = vec![
        ("1 GiB", Box::new(|round| each(guest, round))),
        ("4 GiB", Box::new(|round| each(&mut four, round))),
        ("16 GiB", Box::new(|round| each(&mut sixteen, round))),
    ];
    let samples = interleave(effort, variants)?;
    let what = "a dirty page's, 1 % of 4 GiB, over that of 1 GiB";
    found.figure(Figure::cost("D1.x4", what, &samples, ["4 GiB", "1 GiB"])?);
    let what = "the same, 16 GiB";
    found.figure(Figure::cost("D1.x16", what, &samples, ["16 GiB", "1 GiB"])?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_what_was_written() {
        for kind in &KINDS {
            let mut guest = Guest::new(1024, kind.mode).unwrap();
            for (divisor, rest) in [(1, 0), (10, 3), (100, 7), (10, 13)] {
                let written = guest.write(divisor, rest).unwrap();
                let found = guest.harvest().unwrap();
                guest.verify(found, divisor, rest, written).unwrap();
                assert!(guest.verify(found, divisor, rest, written + 1).is_err());
            }
            assert_eq!(guest.harvest().unwrap(), 0);
        }
    }
}
