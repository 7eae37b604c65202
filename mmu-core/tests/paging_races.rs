// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! R24: accessed and dirty bits against the guest's own stores to the same entries.
#![cfg(not(loom))]

mod paging_oracle;

use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{Backing, Hint};
use mmu_core::paging::{Access, PagingMode, Reason, Regs};
use mmu_core::sync::{AtomicBool, AtomicU64, Ordering};
use paging_oracle::{Memory, Random};

const A: u64 = 0x20;
const D: u64 = 0x40;

/// Tells the guest when to stop: after so many rounds and so many walks that raced with them.
struct Race {
    walks: AtomicU64,
    stop: AtomicBool,
}

impl Race {
    const ROUNDS: u64 = if cfg!(debug_assertions) { 50_000 } else { 500_000 };

    fn new() -> Self {
        Self { walks: AtomicU64::new(0), stop: AtomicBool::new(false) }
    }

    /// For a walker.
    fn goes_on(&self) -> bool {
        self.walks.fetch_add(1, Ordering::Relaxed);
        !self.stop.load(Ordering::Relaxed)
    }

    /// The rounds of the guest, counted from 0; returns how many there were.
    fn rounds(&self, mut round: impl FnMut(u64)) -> u64 {
        // Also when a round panics.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&self.stop);
        let mut n = 0;
        while n < Self::ROUNDS || self.walks.load(Ordering::Relaxed) < Self::ROUNDS {
            // A walker that panicked walks no more: end, and let the scope report it.
            if n > 1000 * Self::ROUNDS {
                break;
            }
            round(n);
            n += 1;
        }
        n
    }
}

/// Walks that have set their bits, and those that gave up: after a thousand races lost in a row, which
/// happens where the line takes long from one processor to the other.
#[derive(Default)]
struct Marked {
    marked: u64,
    given_up: u64,
}

impl Marked {
    fn count(&mut self, marked: bool) {
        self.marked += u64::from(marked);
        self.given_up += u64::from(!marked);
    }

    fn check(&self) {
        let Self { marked, given_up } = self;
        eprintln!("{given_up} of {} walks gave up", marked + given_up);
        assert!(marked > given_up);
    }
}

fn tables() -> Memory {
    let memory = Memory::new(&[(0, 0x10000)]);
    for (at, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x9007)] {
        memory.write8(at, value);
    }
    memory
}

/// The guest counts in the software bits of each entry by compare-and-swap, and takes the accessed
/// and dirty bits away; nothing it wrote may be lost.
#[test]
fn no_store_of_the_guest_is_lost() {
    let memory = tables();
    let map = memory.map();
    let mode = PagingMode::new(&Regs::long_mode(0x1000)).unwrap();
    let words = memory.pieces[0].1.words();
    let race = Race::new();
    std::thread::scope(|s| {
        for access in [Access::read(), Access::write().user()] {
            let (map, mode, race) = (&map, &mode, &race);
            s.spawn(move || {
                let hint = Hint::default();
                let mut marked = Marked::default();
                while race.goes_on() {
                    let walk = mode.walk(map, &hint, Gva(0x123), access).unwrap();
                    assert_eq!(walk.gpa, Gpa(0x9123));
                    marked.count(walk.accessed);
                }
                marked.check();
            });
        }
        let counted = [0x1000, 0x2000, 0x3000, 0x4000].map(|at| &words[at / 8]);
        let mut random = Random(1);
        let mut counts = [0u64; 4];
        race.rounds(|_| {
            let n = random.below(4) as usize;
            let mut old = counted[n].load(Ordering::Relaxed);
            loop {
                // Seven bits at 58:52; the walkers change A and D only.
                assert_eq!(old >> 52 & 0x7f, counts[n] & 0x7f);
                let new = old & !(0x7f << 52 | A | D) | ((counts[n] + 1) & 0x7f) << 52;
                match counted[n].compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => break,
                    Err(now) => old = now,
                }
            }
            counts[n] += 1;
        });
    });
}

/// The guest swaps the page out and in: bits must never land in an entry that is not present, nor
/// in one that no longer maps the page.
#[test]
fn entries_that_are_not_present_stay_as_they_are() {
    let memory = tables();
    let map = memory.map();
    let mode = PagingMode::new(&Regs::long_mode(0x1000)).unwrap();
    let words = memory.pieces[0].1.words();
    let race = Race::new();
    std::thread::scope(|s| {
        s.spawn(|| {
            let hint = Hint::default();
            while race.goes_on() {
                match mode.walk(&map, &hint, Gva(0), Access::write()) {
                    Ok(walk) => assert!([Gpa(0x9000), Gpa(0xa000)].contains(&walk.gpa)),
                    Err(fault) => assert!(matches!(
                        (fault.reason, fault.level),
                        (Reason::NotPresent, 1) | (Reason::Write, 1)
                    )),
                }
            }
        });
        let leaf = &words[0x4000 / 8];
        race.rounds(|i| {
            let i = i % 0x1000_0000;
            // A swap entry, then another page, read-only: A may appear, D never.
            let was = leaf.swap(0xbad0_0000 + (i << 1), Ordering::AcqRel);
            assert!(was & !(A | D) == 0x9007 || i == 0, "{was:#x}");
            std::hint::spin_loop();
            let was = leaf.swap(0xa005, Ordering::AcqRel);
            assert_eq!(was, 0xbad0_0000 + (i << 1));
            let was = leaf.swap(0x9007, Ordering::AcqRel);
            assert_eq!(was, 0xa005);
        });
    });
}

/// In 32-bit paging the neighbouring entry shares the word.
#[test]
fn neighbours_in_a_word_are_left_alone() {
    let memory = Memory::new(&[(0, 0x10000)]);
    memory.write4(0x1000, 0x2007);
    memory.write4(0x2000, 0x9007);
    let map = memory.map();
    let regs = Regs { cr4: 0, efer: 0, ..Regs::long_mode(0x1000) };
    let mode = PagingMode::new(&regs).unwrap();
    let word = &memory.pieces[0].1.words()[0x2000 / 8];
    let race = Race::new();
    let rounds = std::thread::scope(|s| {
        s.spawn(|| {
            let hint = Hint::default();
            let mut marked = Marked::default();
            while race.goes_on() {
                let walk = mode.walk(&map, &hint, Gva(0x77), Access::write()).unwrap();
                assert_eq!(walk.gpa, Gpa(0x9077));
                marked.count(walk.dirty);
            }
            marked.check();
        });
        race.rounds(|i| {
            // The guest stores to the upper half and takes A and D out of the lower.
            let before = word.fetch_add(1 << 32, Ordering::AcqRel);
            assert_eq!(before >> 32, i & 0xffff_ffff);
            word.fetch_and(!(A | D), Ordering::AcqRel);
        })
    });
    assert_eq!(word.load(Ordering::Relaxed) & !(A | D), rounds << 32 | 0x9007);
}
