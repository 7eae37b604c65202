// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! No processor uses a translation from before an operation that relies on the flush, once that has
//! returned, nor one from before its guest's own edit and invalidation: checked use by use on a
//! processor that forgets nothing unasked (`consumer`), under every such operation at once. Consumers
//! that break their side of the contract must be caught by the same check. A few seconds; `STALE_SECONDS` and `STALE_SEED` make it longer and other.

mod consumer;

use consumer::{
    ALIASED, BANKS, CHANGING, CODE, CODE_AT, Cpu, EDITED, Habit, Kind, LARGE, LOGGED, MOVED,
    MOVING, PAGES, PASSING, PLAIN, REGIONS, Report, Spot, TABLES, World,
};
use mmu_core::addr::Gpa;
use mmu_core::memory::{Alias, DirtyMode, SlotFlags, SlotId};
use mmu_core::shadow::{Invalidation, StatsSnapshot};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const FRAMES: u64 = 64;

fn spot(region: usize, page: usize) -> Spot {
    Spot { region, page }
}

fn slot(bank: usize) -> SlotId {
    SlotId(World::slot_of(bank))
}

fn nothing() {}

/// Each operation alone, in an order that leaves the consumer no excuse.
mod one_by_one {
    use super::*;

    /// Runs it with each habit: an honest consumer breaks no promise, and each of `caught` does.
    fn check(scenario: fn(&World, Habit), caught: &[Habit]) {
        check_with(true, scenario, caught);
    }

    /// The same with guests that write their leaf tables natively, or not.
    fn check_with(unsync: bool, scenario: fn(&World, Habit), caught: &[Habit]) {
        let reports = |habit| {
            let world = World::new(FRAMES, unsync);
            scenario(&world, habit);
            if habit == Habit::Honest {
                world.mmu.audit().unwrap();
            }
            world.watch.take_reports()
        };
        let honest = reports(Habit::Honest);
        assert!(honest.is_empty(), "{}", honest[0]);
        for habit in caught {
            let found = reports(*habit);
            assert!(!found.is_empty(), "{habit:?} was not caught");
            println!("{habit:?}: {}", found[0]);
        }
    }

    const ENTRIES: [Habit; 2] = [Habit::IgnoresEntries, Habit::ForgetsLate];

    #[test]
    fn a_slot_is_deleted() {
        check(
            |world, habit| {
                let bank = BANKS.passing.start;
                world.watch.may_show(PASSING, bank);
                world.create(World::slot_of(bank), World::place(PASSING), bank, |slot| slot);
                let mut cpu = Cpu::new(world, habit);
                assert!(cpu.store(spot(PASSING, 3), 0, 1, &mut nothing));
                cpu.leave();
                world.mmu.delete_slot(slot(bank)).unwrap();
                world.watch.shows_only(PASSING, None);
                assert_eq!(cpu.load(spot(PASSING, 3), 0, &mut nothing), None);
            },
            &ENTRIES,
        );
    }

    #[test]
    fn a_slot_moves() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                assert!(cpu.store(spot(MOVING, 3), 0, 1, &mut nothing));
                cpu.leave();
                world.watch.may_show(MOVED, BANKS.moving);
                world.mmu.move_slot(slot(BANKS.moving), World::place(MOVED)).unwrap();
                world.watch.shows_only(MOVING, None);
                assert_eq!(cpu.load(spot(MOVING, 3), 0, &mut nothing), None);
                assert_eq!(cpu.load(spot(MOVED, 3), 0, &mut nothing), Some(1));
            },
            &ENTRIES,
        );
    }

    #[test]
    fn the_host_takes_a_page_away() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                assert!(cpu.store(spot(CHANGING, 3), 0, 1, &mut nothing));
                cpu.leave();
                let gone = world.mmu.invalidate(World::range(CHANGING, 3..4)).unwrap();
                world.watch.taken(World::spots(CHANGING, 3..4), Kind::Access);
                let mut gone = Some(gone);
                let mut give_back = || {
                    if let Some(gone) = gone.take() {
                        world.watch.given(World::spots(CHANGING, 3..4), Kind::Access);
                        gone.end();
                    }
                };
                let seen = cpu.load(spot(CHANGING, 3), 0, &mut give_back);
                assert_eq!(seen.is_some(), habit == Habit::Honest);
            },
            &ENTRIES,
        );
    }

    #[test]
    fn the_host_makes_a_page_read_only() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                assert!(cpu.store(spot(CHANGING, 3), 0, 1, &mut nothing));
                cpu.leave();
                world.mmu.set_host_writable(World::range(CHANGING, 3..4), false).unwrap();
                world.watch.taken(World::spots(CHANGING, 3..4), Kind::HostWrite);
                assert!(!cpu.store(spot(CHANGING, 3), 0, 2, &mut nothing));
                assert_eq!(cpu.load(spot(CHANGING, 3), 0, &mut nothing), Some(1));
            },
            &ENTRIES,
        );
    }

    #[test]
    fn a_slot_becomes_read_only() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                assert!(cpu.store(spot(CHANGING, 3), 0, 1, &mut nothing));
                cpu.leave();
                let flags = SlotFlags { read_only: true, dirty: DirtyMode::Off };
                world.mmu.set_slot_flags(slot(BANKS.changing), flags).unwrap();
                world.watch.taken(World::spots(CHANGING, 0..PAGES), Kind::SlotWrite);
                assert!(!cpu.store(spot(CHANGING, 3), 0, 2, &mut nothing));
            },
            &ENTRIES,
        );
    }

    fn harvested(world: &World, habit: Habit, dirty: DirtyMode) {
        let flags = SlotFlags { read_only: false, dirty };
        world.mmu.set_slot_flags(slot(BANKS.logged), flags).unwrap();
        let mut cpu = Cpu::new(world, habit);
        assert!(cpu.store(spot(LOGGED, 3), 0, 1, &mut nothing));
        cpu.leave();
        assert_eq!(harvest(world), 1);
        cpu.store(spot(LOGGED, 3), 0, 2, &mut nothing);
        cpu.leave();
        if habit == Habit::Honest {
            assert_eq!(harvest(world), 1);
        }
    }

    #[test]
    fn a_log_is_taken() {
        check(|world, habit| harvested(world, habit, DirtyMode::WriteProtect), &ENTRIES);
    }

    #[test]
    fn a_log_by_dirty_bits_is_taken() {
        check(|world, habit| harvested(world, habit, DirtyMode::DirtyBits), &ENTRIES);
    }

    #[test]
    fn a_page_becomes_a_shadowed_table() {
        check_with(
            false,
            |world, habit| {
                let (region, entry) = (PLAIN.start, World::guest_entry(spot(PLAIN.start, 0)));
                let mut writer = Cpu::new(world, habit);
                let table = spot(TABLES, region);
                assert!(writer.store(table, 0, entry, &mut nothing));
                let mut walker = Cpu::new(world, Habit::Honest);
                // It waits until the writer has come out and drained.
                let mut waits = || writer.poll(&mut nothing);
                assert!(walker.load(spot(region, 0), 0, &mut waits).is_some());
                walker.leave();
                let stored = writer.store(table, 0, entry, &mut nothing);
                assert_eq!(stored, habit == Habit::Honest);
            },
            &ENTRIES,
        );
    }

    #[test]
    fn the_guest_changes_an_entry() {
        for unsync in [true, false] {
            check_with(
                unsync,
                |world, habit| {
                    let mut cpu = Cpu::new(world, habit);
                    let at = spot(EDITED, 3);
                    assert!(cpu.load(at, 0, &mut nothing).is_some());
                    for page in [35, 3, 35] {
                        assert!(edit(world, &mut cpu, at, page, |cpu| cpu.invlpg(at)));
                        let seen = cpu.load(at, 0, &mut nothing);
                        assert!(seen.is_some() || habit != Habit::Honest);
                    }
                },
                &[Habit::KeepsAddresses],
            );
        }
    }

    #[test]
    fn the_guest_changes_an_entry_natively() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                let at = spot(EDITED, 3);
                for page in [35, 3, 35] {
                    assert!(edit(world, &mut cpu, at, page, |cpu| cpu.invlpg(at)));
                    cpu.load(at, 0, &mut nothing);
                }
                assert!(world.mmu.stats().mmu_unsync > 0);
            },
            &[Habit::TellsNothing],
        );
    }

    /// A table that was written natively is protected again, and a processor does not hear of it.
    #[test]
    fn a_table_settles() {
        check(
            |world, habit| {
                let (mut writer, mut other) =
                    (Cpu::new(world, habit), Cpu::new(world, Habit::Honest));
                let at = spot(EDITED, 3);
                assert!(writer.load(at, 0, &mut nothing).is_some());
                assert!(edit(world, &mut writer, at, 35, |cpu| cpu.invlpg(at)));
                writer.load(at, 0, &mut nothing);
                for _ in 0..4 {
                    writer.leave();
                    other.load_cr3(false);
                    other.load(spot(EDITED, 4), 0, &mut nothing);
                }
                other.leave();
                assert!(world.mmu.stats().mmu_synced > 0);
                assert!(edit(world, &mut writer, at, 3, |cpu| cpu.invlpg(at)));
                let seen = writer.load(at, 0, &mut nothing);
                assert!(seen.is_some() || habit != Habit::Honest);
            },
            &ENTRIES,
        );
    }

    /// As long as a processor may write it, that processor's edits are seen, however often others flush.
    #[test]
    fn a_table_does_not_settle_under_a_writer() {
        check(
            |world, habit| {
                let (mut writer, mut other) =
                    (Cpu::new(world, habit), Cpu::new(world, Habit::Honest));
                let at = spot(EDITED, 3);
                let invalidate = |cpu: &mut Cpu<'_>| cpu.invlpg(at);
                assert!(writer.load(at, 0, &mut nothing).is_some());
                for page in [35, 3] {
                    assert!(edit(world, &mut writer, at, page, invalidate));
                    writer.load(at, 0, &mut nothing);
                }
                // It stays inside, and is not kicked.
                for _ in 0..4 {
                    other.load_cr3(false);
                    other.load(spot(EDITED, 4), 0, &mut nothing);
                    other.leave();
                }
                assert!(edit(world, &mut writer, at, 35, invalidate));
                let seen = writer.load(at, 0, &mut nothing);
                assert!(seen.is_some() || habit != Habit::Honest);
            },
            &[Habit::TellsNothing],
        );
    }

    #[test]
    fn code_is_patched() {
        check(
            |world, habit| {
                // Patches that are over, and the number of the last fetch that came to its middle.
                let (done, halfway) = (AtomicU64::new(0), AtomicU64::new(0));
                std::thread::scope(|s| {
                    let patches = s.spawn(|| {
                        let mut last = 0;
                        for n in 0..200 {
                            // One patch in the middle of each fetch: two would undo each other.
                            while halfway.load(Ordering::Acquire) == last {
                                std::thread::yield_now();
                            }
                            last = halfway.load(Ordering::Acquire);
                            patch(world, n % 2);
                            done.fetch_add(1, Ordering::Release);
                        }
                    });
                    let mut cpu = Cpu::new(world, habit);
                    for number in 1.. {
                        // It stays in the middle until the patch is over, unless that waits for it.
                        let before = done.load(Ordering::Acquire);
                        fetch(world, &mut cpu, || {
                            halfway.store(number, Ordering::Release);
                            done.load(Ordering::Acquire) == before && !patches.is_finished()
                        });
                        if patches.is_finished() {
                            break;
                        }
                    }
                });
            },
            &ENTRIES,
        );
    }

    #[test]
    fn a_page_of_a_block_is_taken_away() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                let (one, other) = (spot(LARGE, 2), spot(LARGE, 3));
                assert!(cpu.store(one, 0, 1, &mut nothing) && cpu.store(other, 0, 1, &mut nothing));
                assert_eq!(world.mmu.stats().pf_large, 1);
                cpu.leave();
                let mut gone = Some(world.mmu.invalidate(World::range_of(other)).unwrap());
                world.watch.taken([other].into_iter(), Kind::Access);
                let mut give_back = || {
                    if let Some(gone) = gone.take() {
                        world.watch.given([other].into_iter(), Kind::Access);
                        gone.end();
                    }
                };
                // The rest of the block is there.
                assert_eq!(cpu.load(one, 0, &mut || panic!("a stall")), Some(1));
                let seen = cpu.load(other, 0, &mut give_back);
                assert_eq!(seen.is_some(), habit == Habit::Honest);
            },
            &ENTRIES,
        );
    }

    #[test]
    fn a_log_begins_over_a_block() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                let at = spot(LARGE, 2);
                assert!(cpu.store(at, 0, 1, &mut nothing));
                assert_eq!(world.mmu.stats().pf_large, 1);
                cpu.leave();
                let flags = SlotFlags { read_only: false, dirty: DirtyMode::WriteProtect };
                let log = slot(BANKS.large);
                world.mmu.set_slot_flags(log, flags).unwrap();
                // As if everything had been harvested before: a log begins empty.
                world.watch.harvested(world.watch.harvest_begins(), at);
                cpu.store(at, 0, 2, &mut nothing);
                cpu.leave();
                let mut bitmap = vec![0; PAGES / 2 * 512 / 64];
                let dirty = world.mmu.dirty_log(log, &mut bitmap).unwrap();
                assert_eq!(dirty, u64::from(habit == Habit::Honest));
            },
            &ENTRIES,
        );
    }

    #[test]
    fn everything_is_zapped() {
        check(
            |world, habit| {
                let mut cpu = Cpu::new(world, habit);
                assert!(cpu.store(spot(PLAIN.start, 3), 0, 1, &mut nothing));
                cpu.leave();
                let begun = world.watch.now();
                world.mmu.zap_all();
                world.watch.zapped(begun);
                let seen = cpu.load(spot(PLAIN.start, 3), 0, &mut nothing);
                assert_eq!(seen.is_some(), habit == Habit::Honest);
            },
            &[Habit::IgnoresRoots],
        );
    }

    #[test]
    fn an_alias_shows_other_memory() {
        check(
            |world, habit| {
                show(world, 0);
                let mut cpu = Cpu::new(world, habit);
                assert!(cpu.store(spot(ALIASED, 3), 0, 1, &mut nothing));
                cpu.leave();
                show(world, 1);
                let seen = cpu.load(spot(ALIASED, 3), 0, &mut nothing);
                assert_eq!(seen, (habit == Habit::Honest).then_some(0));
            },
            &[Habit::IgnoresRoots],
        );
    }

    /// A processor remembers tables whose frames others need. `meanwhile` is what it does while they
    /// wait for it.
    fn recycled(world: &World, habit: Habit, meanwhile: fn(&mut Cpu<'_>)) {
        let few = PLAIN.start..PLAIN.start + 9;
        let mut cpu = Cpu::new(world, habit);
        for region in few.clone() {
            assert!(cpu.load(spot(region, 0), 0, &mut nothing).is_some());
        }
        let mut other = Cpu::new(world, Habit::Honest);
        for region in PLAIN.chain(PLAIN) {
            for page in 0..2 {
                let mut waits = || meanwhile(&mut cpu);
                assert!(other.load(spot(region, page), 0, &mut waits).is_some());
            }
        }
        other.leave();
        for region in few.clone() {
            cpu.speculate(spot(region, 0));
        }
        meanwhile(&mut cpu);
        assert!(world.mmu.stats().mmu_recycled > 0);
        // Pages that it has no translations of: by the tables that it remembers.
        for region in few {
            let mut waits = || other.idle();
            let seen = cpu.load(spot(region, 1), 0, &mut waits);
            assert!(seen.is_some() || habit != Habit::Honest, "{region}");
        }
    }

    #[test]
    fn a_table_frame_is_used_again() {
        check(
            |world, habit| recycled(world, habit, |cpu| cpu.poll(&mut nothing)),
            &[Habit::KeepsTables],
        );
    }

    #[test]
    fn a_table_frame_is_used_again_while_another_processor_waits() {
        check(
            |world, habit| recycled(world, habit, |cpu| cpu.drain()),
            &[Habit::KeepsTables, Habit::OnlySaysDrained],
        );
    }
}

/// The guest maps the spot to page `page` of its region, by a write of its own to its table, and
/// invalidates the address; false if it could not write.
fn edit(
    world: &World,
    cpu: &mut Cpu<'_>,
    at: Spot,
    page: usize,
    invalidate: impl FnOnce(&mut Cpu<'_>),
) -> bool {
    let [new, old] = [page, page ^ 32].map(|page| World::edited(spot(EDITED, page)));
    world.watch.may_lead(at, [old, new]);
    let entry = World::guest_entry(spot(EDITED, page));
    let stored = cpu.store(spot(TABLES, EDITED), at.page, entry, &mut std::thread::yield_now);
    if stored {
        invalidate(cpu);
    }
    world.watch.leads_to(at, if stored { new } else { old });
    stored
}

/// The alias shows the other slot from now on.
fn show(world: &World, n: usize) {
    let (base, target) = (World::place(ALIASED), World::alias_target(n));
    world.watch.may_show(ALIASED, BANKS.alias[n]);
    let size = PAGES as u64 * consumer::PAGE;
    world.mmu.set_alias(Alias { number: 0, base, size, target }).unwrap();
    world.watch.shows_only(ALIASED, Some(BANKS.alias[n]));
}

/// Takes the log; how many pages were dirty.
fn harvest(world: &World) -> u64 {
    let mut bitmap = [0];
    let harvest = world.watch.harvest_begins();
    let pages = world.mmu.dirty_log(slot(BANKS.logged), &mut bitmap).unwrap();
    for page in (0..PAGES).filter(|page| bitmap[0] >> page & 1 != 0) {
        world.watch.harvested(harvest, spot(LOGGED, page));
    }
    pages
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

struct Random(u64);

impl Random {
    fn new(seed: u64, salt: u64) -> Self {
        Self((seed << 32 ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, n: u64) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 16) % n) as usize
    }
}

/// What the code that is patched may be.
const PATCHES: [u64; 2] = [0, u64::MAX];

/// Replaces this one of them by the other.
fn patch(world: &World, n: usize) {
    let at = Gpa(World::gpa(CODE).0 + CODE_AT);
    let [old, new] = [n, 1 - n].map(|n| PATCHES[n].to_le_bytes());
    assert_eq!(world.mmu.patch_code(at, &old, &new), Ok(true));
}

/// The processor fetches that code; between the halves it stays as long as `stays` says.
fn fetch(world: &World, cpu: &mut Cpu<'_>, stays: impl Fn() -> bool) {
    let seen = cpu.fetch(&mut std::thread::yield_now, &stays);
    if seen.is_some_and(|seen| !PATCHES.contains(&seen)) {
        world.watch.half_patched(CODE);
    }
}

/// Everything at once.
struct Storm<'w> {
    world: &'w World,
    seed: u64,
    stop: AtomicBool,
    hits: AtomicU64,
    table_hits: AtomicU64,
    changes: AtomicU64,
}

impl<'w> Storm<'w> {
    fn new(world: &'w World, seed: u64) -> Self {
        let [hits, table_hits, changes] = [0; 3].map(AtomicU64::new);
        Self { world, seed, stop: AtomicBool::new(false), hits, table_hits, changes }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// One processor.
    fn run(&self, id: u64, habit: Habit) {
        let mut random = Random::new(self.seed, id);
        // Pages of the region whose entries this one changes: where they lead.
        let mut edited: Vec<usize> = (id as usize..PAGES / 2).step_by(4).collect();
        let mut cpu = Cpu::new(self.world, habit);
        let meanwhile = &mut std::thread::yield_now;
        let busy = [PASSING, MOVING, MOVED, CHANGING, LOGGED, ALIASED];
        while self.goes_on() {
            // Mostly a few regions, whose tables stay, or more of those that need more frames than
            // there are.
            let wide = random.below([64, 8][self.seed as usize % 2]) == 0;
            let regions = if wide { PLAIN.len() as u64 } else { 4 };
            let plain = PLAIN.start + random.below(regions);
            let page = random.below(8);
            match random.below(32) {
                0..16 => {
                    let at = spot(busy[random.below(6)], page);
                    match random.below(2) {
                        0 => drop(cpu.load(at, 0, meanwhile)),
                        _ => drop(cpu.store(at, id as usize, 1, meanwhile)),
                    }
                }
                16..20 => {
                    cpu.load(spot(plain, page), 0, meanwhile);
                }
                20..24 => {
                    cpu.load(spot(LARGE, random.below(PAGES as u64)), 0, meanwhile);
                }
                24..29 => {
                    // The guest writes an entry of its tables as it was, used or not.
                    let entry = World::guest_entry(spot(plain, page));
                    cpu.store(spot(TABLES, plain), page, entry, meanwhile);
                }
                29 => cpu.invlpg(spot(plain, page)),
                30 if random.below(2) == 0 => {
                    let page = random.below(edited.len() as u64);
                    let at = spot(EDITED, id as usize + 4 * page);
                    let way = random.below(4);
                    let invalidate = |cpu: &mut Cpu<'_>| match way {
                        0 => cpu.load_cr3(true),
                        1 => cpu.load_cr3(false),
                        _ => cpu.invlpg(at),
                    };
                    if edit(self.world, &mut cpu, at, edited[page] ^ 32, invalidate) {
                        edited[page] ^= 32;
                    }
                    cpu.load(at, 0, meanwhile);
                }
                30 if random.below(4) == 0 => {
                    fetch(self.world, &mut cpu, || false);
                }
                30 if random.below(64) == 0 => cpu.change_privilege(),
                30 if random.below(512) == 0 => {
                    self.count(&cpu);
                    cpu = Cpu::new(self.world, habit);
                }
                _ => {
                    cpu.idle();
                    std::thread::yield_now();
                    cpu.speculate(spot(plain, page));
                    cpu.idle();
                }
            }
        }
        self.count(&cpu);
    }

    fn count(&self, cpu: &Cpu) {
        self.hits.fetch_add(cpu.hits, Ordering::Relaxed);
        self.table_hits.fetch_add(cpu.table_hits, Ordering::Relaxed);
    }

    /// Changes of the memory map.
    fn change_map(&self) {
        let (World { mmu, watch, .. }, mut random) = (self.world, Random::new(self.seed, 100));
        let (mut passing, mut bank, mut read_only) = (false, BANKS.passing.start, false);
        let (mut from, mut to) = (MOVING, MOVED);
        while self.goes_on() {
            match random.below(5) {
                0 if passing => {
                    mmu.delete_slot(slot(bank)).unwrap();
                    watch.shows_only(PASSING, None);
                    bank =
                        if bank + 1 == BANKS.passing.end { BANKS.passing.start } else { bank + 1 };
                    passing = false;
                }
                0 => {
                    watch.may_show(PASSING, bank);
                    self.world.create(World::slot_of(bank), World::place(PASSING), bank, |s| s);
                    passing = true;
                }
                1 => {
                    watch.may_show(to, BANKS.moving);
                    mmu.move_slot(slot(BANKS.moving), World::place(to)).unwrap();
                    watch.shows_only(from, None);
                    (from, to) = (to, from);
                }
                2 => {
                    if read_only {
                        watch.given(World::spots(CHANGING, 0..PAGES), Kind::SlotWrite);
                    }
                    read_only = !read_only;
                    let flags = SlotFlags { read_only, dirty: DirtyMode::Off };
                    mmu.set_slot_flags(slot(BANKS.changing), flags).unwrap();
                    if read_only {
                        watch.taken(World::spots(CHANGING, 0..PAGES), Kind::SlotWrite);
                    }
                }
                3 => {
                    let dirty = [DirtyMode::WriteProtect, DirtyMode::DirtyBits][random.below(2)];
                    let flags = SlotFlags { read_only: false, dirty };
                    mmu.set_slot_flags(slot(BANKS.logged), flags).unwrap();
                }
                _ if random.below(8) == 0 && mmu.remove_alias(0).is_ok() => {
                    watch.shows_only(ALIASED, None);
                }
                _ if random.below(8) == 0 => show(self.world, random.below(2)),
                _ => {}
            }
            self.pause(&mut random);
        }
    }

    /// What a host does, and complete zaps.
    fn be_the_host(&self) {
        let (World { mmu, watch, .. }, mut random) = (self.world, Random::new(self.seed, 200));
        let mut patched = 0;
        while self.goes_on() {
            let page = random.below(8);
            let pages = page..page + 1 + random.below(4);
            let range = World::range(CHANGING, pages.clone());
            let spots = || World::spots(CHANGING, pages.clone());
            match random.below(9) {
                8 if random.below(4) == 0 => {
                    patch(self.world, patched);
                    patched = 1 - patched;
                }
                8 => {
                    let at = spot(LARGE, random.below(PAGES as u64));
                    let gone = mmu.invalidate(World::range_of(at)).unwrap();
                    watch.taken([at].into_iter(), Kind::Access);
                    std::thread::sleep(Duration::from_micros(50));
                    watch.given([at].into_iter(), Kind::Access);
                    gone.end();
                }
                0 => {
                    let gone: Invalidation = mmu.invalidate(range).unwrap();
                    watch.taken(spots(), Kind::Access);
                    std::thread::sleep(Duration::from_micros(50));
                    watch.given(spots(), Kind::Access);
                    gone.end();
                }
                1 => {
                    mmu.set_host_writable(range, false).unwrap();
                    watch.taken(spots(), Kind::HostWrite);
                    std::thread::sleep(Duration::from_micros(50));
                    watch.given(spots(), Kind::HostWrite);
                    mmu.set_host_writable(range, true).unwrap();
                }
                2 if random.below(8) == 0 => {
                    let begun = watch.now();
                    mmu.zap_all();
                    watch.zapped(begun);
                }
                3 if random.below(8) == 0 => {
                    // Guest tables, so that they may be written for a while.
                    let tables = World::range(TABLES, 0..REGIONS);
                    mmu.set_host_writable(tables, true).unwrap();
                }
                4 => {
                    let region = random.below(REGIONS as u64);
                    mmu.clear_young(World::range(region, 0..PAGES), |_, _, _| ()).unwrap();
                }
                5 => drop(mmu.set_nr_mmu_pages([Some(64), Some(60), None][random.below(3)])),
                6 => mmu.maintain(),
                _ => mmu.synchronize().unwrap(),
            }
            self.pause(&mut random);
        }
    }

    fn take_logs(&self) {
        let mut random = Random::new(self.seed, 300);
        while self.goes_on() {
            harvest(self.world);
            self.pause(&mut random);
        }
    }

    fn pause(&self, random: &mut Random) {
        self.changes.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(random.below(500) as u64));
    }

    /// Until the time is over or something is reported.
    fn rage(&self, cpus: &[Habit], time: Duration) {
        let end = Instant::now() + time;
        std::thread::scope(|s| {
            let mut threads: Vec<_> =
                (0..).zip(cpus).map(|(id, habit)| s.spawn(move || self.run(id, *habit))).collect();
            threads.push(s.spawn(|| self.change_map()));
            threads.push(s.spawn(|| self.be_the_host()));
            threads.push(s.spawn(|| self.take_logs()));
            let over = || threads.iter().any(|thread| thread.is_finished());
            while Instant::now() < end && !self.world.watch.has_reports() && !over() {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.stop.store(true, Ordering::Relaxed);
        });
    }
}

fn storm(seed: u64, cpus: &[Habit], time: Duration) -> (Vec<Report>, StatsSnapshot) {
    // With more frames than the smallest quota, tables go when the quota changes, too.
    let world = World::new([FRAMES, FRAMES * 3 / 2][seed as usize % 2], seed % 4 < 3);
    let storm = Storm::new(&world, seed);
    storm.rage(cpus, time);
    let reports = world.watch.take_reports();
    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    println!(
        "seed {seed}: {} uses of translations, {} of tables, {} changes, {} reports",
        count(&storm.hits),
        count(&storm.table_hits),
        count(&storm.changes),
        reports.len()
    );
    if reports.is_empty() {
        assert!(count(&storm.hits) > 0 && count(&storm.table_hits) > 0);
        world.mmu.audit().unwrap_or_else(|error| panic!("STALE_SEED={seed}: {error}"));
    }
    let stats = world.mmu.stats();
    (reports, stats)
}

#[test]
fn honest_consumers_use_nothing_stale() {
    let (seconds, seed) = (setting("STALE_SECONDS", 3), setting("STALE_SEED", 1));
    const ROUND: Duration = Duration::from_millis(500);
    let mut recycled = 0;
    for seed in seed..seed + seconds * 2 {
        let cpus = [Habit::Honest; 4];
        let (reports, stats) = storm(seed, &cpus[..2 + seed as usize % 3], ROUND);
        assert!(reports.is_empty(), "STALE_SEED={seed}: {}", reports[0]);
        recycled += stats.mmu_recycled;
    }
    assert!(recycled > 0, "no table frame was used again");
}

#[test]
fn broken_consumers_are_caught_in_the_storm() {
    for habit in [
        Habit::IgnoresEntries,
        Habit::KeepsTables,
        Habit::ForgetsLate,
        Habit::OnlySaysDrained,
        Habit::IgnoresRoots,
        Habit::KeepsAddresses,
        Habit::TellsNothing,
    ] {
        let (reports, _) = storm(1, &[habit, Habit::Honest, habit], Duration::from_secs(30));
        assert!(!reports.is_empty(), "{habit:?} was not caught");
        println!("{habit:?}: {}", reports[0]);
    }
}
