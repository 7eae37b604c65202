// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every writer at once against running vCPUs, and random sequences of single operations against a
//! trivial model of guest memory with the audit after each. A few seconds; `CHURN_SECONDS` and
//! `CHURN_SEED` make it longer and other.

mod common;

use common::{Guest, MIB, PAGE, RWU};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{
    Alias, AllocatedMemory, Backing, DirtyMode, DirtyPage, DirtyRing, SlotConfig, SlotFlags, SlotId,
};
use mmu_core::paging::bits;
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::{SoftExit, SoftVcpu};
use mmu_core::{MIN_TABLE_FRAMES, Mmu};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

struct Random(u64);

impl Random {
    fn new(salt: u64) -> Self {
        Self((setting("CHURN_SEED", 1) << 48 ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

const VCPUS: u64 = 4;
/// Table frames: little more than the vCPUs must have.
const FRAMES: u64 = 96;
/// Each vCPU remaps this many pages of its own among twice as many frames.
const PAGES: u64 = 32;
/// Pages of the slots that come, go, move and change.
const SMALL: u64 = 64;

const STABLE: SlotId = SlotId(0);
const MOVING: SlotId = SlotId(1);
const PASSING: SlotId = SlotId(2);
const CHANGING: SlotId = SlotId(3);

/// Where the slots lie in guest-physical memory. MOVING is at one of two places that overlap, and
/// the alias shows one of two stretches.
const SIZE: u64 = 16 * MIB;
const TABLES: u64 = 8 * MIB;
const MOVING_AT: [u64; 3] = [64 * MIB, 64 * MIB + SMALL / 2 * PAGE, 96 * MIB];
const PASSING_AT: u64 = 128 * MIB;
const CHANGING_AT: u64 = 160 * MIB;
const ALIAS_AT: u64 = 192 * MIB;
/// One page for each vCPU, that the alias may show, and as many that say so.
const COUNTERS: u64 = 4 * MIB;
const MARKED: u64 = 5 * MIB;
const MARK: u64 = 0x5eed_5eed;
/// Pages that the device and the pins write.
const DEVICE: u64 = 6 * MIB;
const PINNED: u64 = 6 * MIB + SMALL * PAGE;

/// Where they are seen by all vCPUs: guest-physical memory above 64 MiB as it is, and the rest.
const PHYSICAL: u64 = 0x60_0000_0000;

fn stretch(base: u64, pages: u64) -> PageRange {
    PageRange::Guest { base: Gpa(base), size: pages * PAGE }
}

/// What became of an access that may find nothing.
fn settle<T>(mut access: impl FnMut() -> Result<T, SoftExit>) -> Option<T> {
    loop {
        match access() {
            Ok(value) => return Some(value),
            Err(SoftExit::Mmio(_) | SoftExit::HostReadOnly(_)) => return None,
            Err(SoftExit::RingFull) => std::thread::yield_now(),
            Err(other) => panic!("{other:?}"),
        }
    }
}

fn load(cpu: &mut SoftVcpu, gva: u64, user: bool) -> Option<u64> {
    settle(|| cpu.session().load_u64(Gva(gva), user))
}

fn store(cpu: &mut SoftVcpu, gva: u64, value: u64, user: bool) -> bool {
    settle(|| cpu.session().store(Gva(gva), &value.to_le_bytes(), user)).is_some()
}

struct World {
    guest: Guest,
    round: u64,
    changing: Arc<AllocatedMemory>,
    rings: Vec<Arc<DirtyRing>>,
    stop: AtomicBool,
    writers_done: AtomicBool,
    /// Adds to the one word that all vCPUs share.
    added: AtomicU64,
}

impl World {
    fn new(round: u64) -> Self {
        let guest = Guest::new(SIZE, TABLES, FRAMES, true);
        let small = || Arc::new(AllocatedMemory::new(SMALL * PAGE));
        let (moving, changing) = (small(), small());
        let slot = |id: SlotId, base, memory| SlotConfig::new(id.0, Gpa(base), memory);
        guest.mmu.create_slot(slot(MOVING, MOVING_AT[0], moving).log_dirty()).unwrap();
        guest.mmu.create_slot(slot(CHANGING, CHANGING_AT, changing.clone())).unwrap();
        for (base, pages) in [
            (COUNTERS, VCPUS + 1),
            (MOVING_AT[0], SMALL + SMALL / 2),
            (MOVING_AT[2], SMALL),
            (PASSING_AT, SMALL),
            (CHANGING_AT, SMALL),
            (ALIAS_AT, VCPUS + 1),
        ] {
            for page in 0..pages {
                let at = base + page * PAGE;
                guest.map(Gva(PHYSICAL + at), Gpa(at), RWU);
            }
        }
        for page in 0..=VCPUS {
            (0..512).for_each(|word| guest.write(Gpa(MARKED + page * PAGE + word * 8), MARK));
        }
        let rings = (0..VCPUS).map(|_| Arc::new(DirtyRing::new(64).unwrap())).collect();
        let [stop, writers_done] = [false; 2].map(AtomicBool::new);
        Self { guest, round, changing, rings, stop, writers_done, added: AtomicU64::new(0) }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// One vCPU: what it has stored it must find, wherever it is found at the moment.
    fn run(&self, id: u64, edit: u64) -> u64 {
        let mut random = Random::new(self.round << 16 | id);
        let mut cpu = self.cpu(id);
        let own = (id + 1) << 32;
        let mut frames: Vec<u64> = (0..PAGES).map(|p| id * 2 * PAGES + p).collect();
        let mut spare: Vec<u64> = (PAGES..2 * PAGES).map(|p| id * 2 * PAGES + p).collect();
        let mut values = HashMap::new();
        // Its words in the slots: one in each page of MOVING and CHANGING, and a page of counters.
        let mut words = HashMap::new();
        let mut done = 0;
        while self.goes_on() {
            let user = random.below(4) != 0;
            let page = random.below(PAGES);
            let gva = own + page * PAGE + random.below(512) * 8;
            let key = (frames[page as usize], gva % PAGE);
            let new = random.next();
            match random.below(12) {
                0 => {
                    // Another frame behind the page, through either way to the table.
                    let window = edit + random.below(2) * 0x4000_0000;
                    let next = spare.swap_remove(random.below(PAGES) as usize);
                    spare.push(std::mem::replace(&mut frames[page as usize], next));
                    assert!(store(&mut cpu, window + page * 8, (next * PAGE) | RWU, user));
                    cpu.session().invlpg(Gva(own + page * PAGE));
                }
                1 | 2 => {
                    assert!(store(&mut cpu, gva, new, user));
                    values.insert(key, new);
                }
                3 | 4 => {
                    let expected = values.get(&key).copied().unwrap_or(0);
                    assert_eq!(load(&mut cpu, gva, user), Some(expected));
                }
                5 => {
                    let at = Gva(PHYSICAL + COUNTERS + VCPUS * PAGE);
                    let swapped = settle(|| {
                        let mut session = cpu.session();
                        let old = session.load_u64(at, user)?;
                        session.cmpxchg(at, 8, old.into(), (old + 1).into(), user)
                    });
                    self.added.fetch_add(u64::from(swapped == Some(Ok(()))), Ordering::Relaxed);
                }
                6 => {
                    // Its own page of counters, and what the alias shows there.
                    let word = random.below(512) * 8;
                    let at = COUNTERS + id * PAGE + word;
                    let value: &mut u64 = words.entry(at).or_insert(0);
                    assert_eq!(load(&mut cpu, PHYSICAL + at, user), Some(*value));
                    let alias = PHYSICAL + ALIAS_AT + id * PAGE + word;
                    let seen = load(&mut cpu, alias, user);
                    assert!(seen.is_none_or(|seen| seen == *value || seen == MARK), "{seen:x?}");
                    assert!(store(&mut cpu, PHYSICAL + at, new, user));
                    *value = new;
                }
                7 => {
                    // Where the slot is not, there is none, or another page of it.
                    let page = random.below(SMALL);
                    for base in MOVING_AT {
                        if let Some(seen) = load(&mut cpu, PHYSICAL + base + page * PAGE, user) {
                            let shift = SMALL / 2;
                            let near = [page, page + shift, page.wrapping_sub(shift)];
                            assert!(seen == 0 || near.contains(&(seen - 1)), "{page}: {seen}");
                        }
                    }
                }
                8 => {
                    let page = random.below(SMALL);
                    let base = MOVING_AT[random.below(3) as usize];
                    let gva = PHYSICAL + base + page * PAGE;
                    // Each vCPU has a word in each page; wherever this one lands, it is its own.
                    store(&mut cpu, gva + 8 + id * 8, new, user);
                }
                9 => {
                    let page = random.below(SMALL);
                    let at = CHANGING_AT + page * PAGE + id * 8;
                    let value: &mut u64 = words.entry(at).or_insert(0);
                    assert_eq!(load(&mut cpu, PHYSICAL + at, user), Some(*value));
                    if store(&mut cpu, PHYSICAL + at, new, user) {
                        *value = new;
                    }
                }
                10 => {
                    let at = PHYSICAL + PASSING_AT + random.below(SMALL) * PAGE;
                    if !store(&mut cpu, at, new, user) {
                        load(&mut cpu, at, user);
                    }
                }
                _ if random.below(64) == 0 => {
                    drop(cpu);
                    cpu = self.cpu(id);
                }
                _ => {
                    let cr0 = cpu.vcpu().regs().cr0;
                    cpu.vcpu_mut().set_cr0(cr0 ^ bits::CR0_WP).unwrap();
                }
            }
            done += 1;
        }
        for (at, value) in words {
            let seen = load(&mut cpu, PHYSICAL + at, true);
            assert_eq!(seen, Some(value), "{at:#x}");
        }
        done
    }

    fn cpu(&self, id: u64) -> SoftVcpu {
        let mut cpu = self.guest.vcpu();
        cpu.vcpu_mut().set_dirty_ring(Some(self.rings[id as usize].clone()));
        cpu
    }

    /// Changes of the memory map.
    fn change_map(&self) -> u64 {
        let (mmu, mut random) = (&self.guest.mmu, Random::new(self.round << 16 | 100));
        let (mut passing, mut place, mut alias) = (false, 0, false);
        let mut done = 0;
        while self.goes_on() {
            match random.below(5) {
                0 if passing => {
                    let release = mmu.delete_slot(PASSING).unwrap();
                    assert_eq!(release.pinned_pages, 0);
                    passing = false;
                }
                0 => {
                    let memory = Arc::new(AllocatedMemory::new(SMALL * PAGE));
                    let slot = SlotConfig::new(PASSING.0, Gpa(PASSING_AT), memory);
                    let modes = [DirtyMode::Off, DirtyMode::WriteProtect, DirtyMode::DirtyBits];
                    mmu.create_slot(slot.track(modes[random.below(3) as usize])).unwrap();
                    passing = true;
                }
                1 => {
                    place = (place + 1 + random.below(2) as usize) % 3;
                    mmu.move_slot(MOVING, Gpa(MOVING_AT[place])).unwrap();
                }
                2 => {
                    let modes = [DirtyMode::Off, DirtyMode::WriteProtect, DirtyMode::DirtyBits];
                    let dirty = modes[random.below(3) as usize];
                    let flags = SlotFlags { read_only: random.below(3) == 0, dirty };
                    mmu.set_slot_flags(CHANGING, flags).unwrap();
                }
                3 => {
                    let modes = [DirtyMode::WriteProtect, DirtyMode::DirtyBits];
                    for slot in [STABLE, MOVING] {
                        let dirty = modes[random.below(2) as usize];
                        mmu.set_slot_flags(slot, SlotFlags { read_only: false, dirty }).unwrap();
                    }
                }
                _ if alias && random.below(2) == 0 => {
                    mmu.remove_alias(3).unwrap();
                    alias = false;
                }
                _ => {
                    let target = Gpa([COUNTERS, MARKED][random.below(2) as usize]);
                    let size = (VCPUS + 1) * PAGE;
                    mmu.set_alias(Alias { number: 3, base: Gpa(ALIAS_AT), size, target }).unwrap();
                    alias = true;
                }
            }
            done += 1;
            std::thread::sleep(Duration::from_micros(random.below(300)));
        }
        let flags = SlotFlags { read_only: false, dirty: DirtyMode::Off };
        mmu.set_slot_flags(CHANGING, flags).unwrap();
        done
    }

    /// What a host does.
    fn be_the_host(&self) -> u64 {
        let (mmu, mut random) = (&self.guest.mmu, Random::new(self.round << 16 | 200));
        let mut done = 0;
        let mut pins = Vec::new();
        while self.goes_on() {
            // vCPUs' words in the page, which must not change while it is away or read-only.
            let page = random.below(SMALL);
            let first = page as usize * 512;
            let words = |memory: &AllocatedMemory| -> Vec<u64> {
                let words = &memory.words()[first..first + 1 + VCPUS as usize];
                words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
            };
            let range = stretch(CHANGING_AT + page * PAGE, 1 + random.below(SMALL - page));
            let pause = Duration::from_micros(random.below(100));
            match random.below(9) {
                0 => {
                    let gone = mmu.invalidate(range).unwrap();
                    let before = words(&self.changing);
                    std::thread::sleep(pause);
                    assert_eq!(words(&self.changing), before, "written while it was away");
                    gone.end();
                }
                1 => {
                    mmu.set_host_writable(range, false).unwrap();
                    let before = words(&self.changing);
                    std::thread::sleep(pause);
                    assert_eq!(words(&self.changing), before, "written while it was read-only");
                    mmu.set_host_writable(range, true).unwrap();
                }
                2 => {
                    let base = random.below(TABLES / PAGE);
                    let pages = 1 + random.below(64);
                    drop(mmu.invalidate(stretch(base * PAGE, pages)).unwrap());
                }
                3 => {
                    let base = random.below(SIZE / PAGE);
                    let pages = 1 + random.below(1024);
                    let range = stretch(base * PAGE, pages);
                    let aged = mmu.clear_young(range, |_, _, _| ()).unwrap();
                    assert!(aged <= pages);
                    mmu.test_young(range, |_, _, _| ()).unwrap();
                }
                4 => mmu.zap_all(),
                5 => {
                    let pages = [None, Some(MIN_TABLE_FRAMES), Some(FRAMES)];
                    mmu.set_nr_mmu_pages(pages[random.below(3) as usize]).unwrap();
                }
                6 => {
                    mmu.maintain();
                    mmu.synchronize().unwrap();
                }
                7 => {
                    let at = DEVICE + random.below(SMALL * 512) * 8;
                    assert_eq!(mmu.write_phys(Gpa(at), &random.next().to_le_bytes()), 8);
                }
                _ => {
                    let at = Gpa(PINNED + random.below(SMALL) * PAGE);
                    pins.push(mmu.pin_page(at, true).unwrap());
                    for pin in &pins {
                        pin.words()[random.below(512) as usize].store(done, Ordering::Relaxed);
                    }
                    if pins.len() > 8 {
                        pins.swap_remove(random.below(8) as usize);
                    }
                }
            }
            done += 1;
            std::thread::sleep(Duration::from_micros(random.below(200)));
        }
        done
    }

    /// Copies both logged slots by their dirty logs, taken in every way there is, until all others
    /// have stopped, and once more.
    fn migrate(&self) -> u64 {
        let (mmu, mut random) = (&self.guest.mmu, Random::new(self.round << 16 | 300));
        let map = mmu.memory();
        let memory = |id| Arc::clone(map.by_id(id).unwrap().backing());
        let slots = [(STABLE, memory(STABLE)), (MOVING, memory(MOVING))];
        let mut copies = slots.each_ref().map(|(_, memory)| vec![0u64; memory.words().len()]);
        let copy = |copies: &mut [Vec<u64>; 2], which: usize, page: usize| {
            let words = page * 512..page * 512 + 512;
            for (to, from) in
                copies[which][words.clone()].iter_mut().zip(&slots[which].1.words()[words])
            {
                *to = from.load(Ordering::Acquire);
            }
        };
        let copy_all = |copies: &mut [Vec<u64>; 2], which: usize, bitmap: &[u64]| {
            let pages = (0..bitmap.len() * 64).filter(|n| bitmap[n / 64] >> (n % 64) & 1 != 0);
            pages.for_each(|page| copy(copies, which, page));
        };
        // The log began with the slot, and the guest's tables were written since: all is in it.
        let mut harvests = 0;
        loop {
            let last = self.writers_done.load(Ordering::Acquire);
            for which in 0..2 {
                let (id, memory) = &slots[which];
                let mut bitmap = vec![0; memory.words().len() / 512 / 64];
                match random.below(3) {
                    _ if last => drop(mmu.dirty_log(*id, &mut bitmap).unwrap()),
                    0 => drop(mmu.dirty_log(*id, &mut bitmap).unwrap()),
                    1 => {
                        mmu.peek_dirty_log(*id, &mut bitmap).unwrap();
                        let from = random.below(bitmap.len() as u64) as usize;
                        bitmap[..from].fill(0);
                        mmu.clear_dirty_log(*id, from as u64 * 64, &bitmap[from..]).unwrap();
                    }
                    _ => {
                        for ring in &self.rings {
                            let mut pages = [DirtyPage { slot: STABLE, page: 0 }; 48];
                            let n = ring.collect(&mut pages);
                            let _ = ring.take_lost();
                            mmu.reset_dirty_pages(&pages[..n]).unwrap();
                            for page in &pages[..n] {
                                if let Some(which) = slots.iter().position(|s| s.0 == page.slot) {
                                    copy(&mut copies, which, page.page as usize);
                                }
                            }
                        }
                    }
                }
                copy_all(&mut copies, which, &bitmap);
            }
            harvests += 1;
            if last {
                break;
            }
            std::thread::sleep(Duration::from_micros(random.below(500)));
        }
        for (which, (id, memory)) in slots.iter().enumerate() {
            for (at, (copied, word)) in copies[which].iter().zip(memory.words()).enumerate() {
                let there = word.load(Ordering::Acquire);
                assert_eq!(*copied, there, "{id}, page {:#x} word {}: lost", at / 512, at % 512);
            }
        }
        harvests
    }
}

#[test]
fn every_writer_at_once() {
    let end = Instant::now() + Duration::from_secs(setting("CHURN_SECONDS", 3));
    // Many short rounds: a write that was lost shows only if nothing writes there again.
    for round in 0.. {
        one_round(round, Duration::from_millis(250));
        if Instant::now() > end {
            return;
        }
    }
}

fn one_round(round: u64, time: Duration) {
    let world = World::new(round);
    let guest = &world.guest;
    (0..SMALL).for_each(|page| guest.write(Gpa(MOVING_AT[0] + page * PAGE), page + 1));
    let mut edits = Vec::new();
    for id in 0..VCPUS {
        let own = (id + 1) << 32;
        for page in 0..PAGES {
            guest.map(Gva(own + page * PAGE), Gpa((id * 2 * PAGES + page) * PAGE), RWU);
        }
        // Two ways to the table of these.
        let table = guest.entry(guest.root, Gva(own), 1);
        edits.push(own + 0x4000_0000);
        guest.map(Gva(own + 0x4000_0000), table, RWU);
        guest.map(Gva(own + 0x8000_0000), table, RWU);
    }
    let counts: Vec<u64> = std::thread::scope(|s| {
        let world = &world;
        let run = |id: u64| {
            let edit = edits[id as usize];
            move || world.run(id, edit)
        };
        let mut threads: Vec<_> = (0..VCPUS).map(|id| s.spawn(run(id))).collect();
        threads.push(s.spawn(|| world.change_map()));
        threads.push(s.spawn(|| world.be_the_host()));
        let log = s.spawn(|| world.migrate());
        std::thread::sleep(time);
        world.stop.store(true, Ordering::Relaxed);
        let counts: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        world.writers_done.store(true, Ordering::Release);
        let copied = log.join();
        counts.into_iter().chain([copied]).map(|count| count.unwrap()).collect()
    });
    assert!(counts.iter().sum::<u64>() > 100, "{counts:?}");
    assert_eq!(guest.read(Gpa(COUNTERS + VCPUS * PAGE)), world.added.load(Ordering::Relaxed));
    guest.audit();
    guest.mmu.maintain();
    guest.audit();
}

/// As many vCPUs as the smallest table memory is for, all short of frames, all get on.
#[test]
fn the_fewest_frames_are_enough() {
    let seconds = setting("CHURN_SECONDS", 1).min(20);
    for (frames, vcpus) in [(MIN_TABLE_FRAMES, 8), (256, 32)] {
        let guest = Guest::new(64 * MIB, 32 * MIB, frames, false);
        let far = |page: u64| page << 39 >> 2 & 0x7fff_ffff_f000;
        (0..200u64).for_each(|page| guest.map(Gva(far(page)), Gpa(page * PAGE), RWU));
        let end = Instant::now() + Duration::from_secs(seconds);
        let done: Vec<u64> = std::thread::scope(|s| {
            let guest = &guest;
            let run = |id: u64| {
                move || {
                    let (mut cpu, mut random) = (guest.vcpu(), Random::new(id));
                    let (mut done, mut longest) = (0, Duration::ZERO);
                    // However long it takes: who gets the frames is not fair.
                    while done < 10 || Instant::now() < end {
                        let before = Instant::now();
                        let at = far(random.below(200)) + id * 8;
                        assert!(store(&mut cpu, at, done, random.below(2) == 0));
                        longest = longest.max(before.elapsed());
                        done += 1;
                        if random.below(1000) == 0 {
                            guest.mmu.zap_all();
                        }
                    }
                    (done, longest)
                }
            };
            let threads: Vec<_> = (0..vcpus).map(|id| s.spawn(run(id))).collect();
            let results: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            eprintln!("{frames} frames: longest {:?}", results.iter().map(|r| r.1).max());
            results.into_iter().map(|r| r.0).collect()
        });
        eprintln!("{done:?}");
        guest.audit();
    }
}

/// Guest memory as the VMM made it.
#[derive(Default)]
struct Model {
    slots: HashMap<u32, Slot>,
    aliases: HashMap<u32, (u64, u64, u64)>,
}

#[derive(Clone)]
struct Slot {
    base: u64,
    flags: SlotFlags,
    /// One word of each page.
    words: Vec<u64>,
    host_read_only: BTreeSet<u64>,
    dirty: BTreeSet<u64>,
    backing: Arc<AllocatedMemory>,
}

impl Model {
    /// The slot and page at a frame.
    fn find(&self, gfn: u64) -> Option<(u32, u64)> {
        let mut numbers: Vec<_> = self.aliases.keys().collect();
        numbers.sort();
        for number in numbers {
            let (base, pages, target) = self.aliases[number];
            if (base..base + pages).contains(&gfn) {
                return self.find_slot(target + gfn - base);
            }
        }
        self.find_slot(gfn)
    }

    fn find_slot(&self, gfn: u64) -> Option<(u32, u64)> {
        let there = |slot: &Slot| gfn >= slot.base && gfn < slot.base + slot.words.len() as u64;
        self.slots.iter().find(|(_, slot)| there(slot)).map(|(id, slot)| (*id, gfn - slot.base))
    }

    fn is_free(&self, id: u32, base: u64, pages: u64) -> bool {
        let clear =
            |slot: &Slot| base + pages <= slot.base || slot.base + slot.words.len() as u64 <= base;
        self.slots.iter().all(|(other, slot)| *other == id || clear(slot))
    }
}

/// The window of guest frames that slots and aliases lie in.
const WINDOW: u64 = 0x10_0000;
const WIDTH: u64 = 48;
/// The last frames of the physical address space.
const TOP: u64 = (1 << 40) - 8;

fn check_everything(model: &Model, mmu: &Mmu, cpu: &mut SoftVcpu, random: &mut Random) {
    for _ in 0..6 {
        let gfn =
            if random.below(8) == 0 { TOP + random.below(8) } else { WINDOW + random.below(WIDTH) };
        let gva = Gva(PHYSICAL + (gfn & 0xf_ffff) * PAGE);
        let expected = match model.find(gfn) {
            Some((id, page)) => Ok(model.slots[&id].words[page as usize]),
            None => Err(SoftExit::Mmio(Gpa(gfn * PAGE))),
        };
        assert_eq!(cpu.session().load_u64(gva, random.below(2) == 0), expected, "{gfn:#x}");
        let mut word = [0; 8];
        let read = mmu.memory().read(Gpa(gfn * PAGE), &mut word);
        assert_eq!((read == 8).then(|| u64::from_le_bytes(word)), expected.ok());
    }
}

/// One thread: each operation succeeds and fails as in the model, every access finds what it
/// should, every log has what was written, and the audit holds after each step.
#[test]
fn any_sequence_is_as_in_the_model() {
    let steps = 3_000 * setting("CHURN_SECONDS", 1);
    let guest = Guest::new(4 * MIB, 2 * MIB, 80, false);
    let (mmu, random) = (&guest.mmu, &mut Random::new(400));
    for gfn in (WINDOW..WINDOW + WIDTH).chain(TOP..TOP + 8) {
        guest.map(Gva(PHYSICAL + (gfn & 0xf_ffff) * PAGE), Gpa(gfn * PAGE), RWU);
    }
    let regs = mmu_core::paging::Regs { maxphyaddr: 52, ..guest.regs() };
    let mut cpus = [(); 2].map(|()| mmu.create_soft_vcpu(regs).unwrap());
    let mut model = Model::default();
    let modes = [DirtyMode::Off, DirtyMode::WriteProtect, DirtyMode::DirtyBits];
    let mut stamp = 1;
    for step in 0..steps {
        let id = 1 + random.below(4) as u32;
        let pages = 1 + random.below(12);
        let base =
            if random.below(8) == 0 { TOP + random.below(8) } else { WINDOW + random.below(WIDTH) };
        let fits = base + pages <= 1 << 40;
        let cpu = &mut cpus[random.below(2) as usize];
        match random.below(14) {
            0 => {
                let backing = Arc::new(AllocatedMemory::new(pages * PAGE));
                let flags = SlotFlags {
                    read_only: random.below(4) == 0,
                    dirty: modes[random.below(3) as usize],
                };
                let config =
                    SlotConfig { flags, ..SlotConfig::new(id, Gpa(base * PAGE), backing.clone()) };
                let ok = fits && !model.slots.contains_key(&id) && model.is_free(id, base, pages);
                assert_eq!(mmu.create_slot(config).is_ok(), ok);
                if ok {
                    let (words, dirty) = (vec![0; pages as usize], BTreeSet::new());
                    let host_read_only = BTreeSet::new();
                    model
                        .slots
                        .insert(id, Slot { base, flags, words, host_read_only, dirty, backing });
                }
            }
            1 => {
                let release = mmu.delete_slot(SlotId(id));
                let slot = model.slots.remove(&id);
                assert_eq!(release.is_ok(), slot.is_some());
                if let Some(slot) = slot {
                    assert!(release.unwrap().is_complete());
                    assert_eq!(Arc::strong_count(&slot.backing), 1);
                }
            }
            2 | 3 => {
                let moved = mmu.move_slot(SlotId(id), Gpa(base * PAGE));
                let count = model.slots.get(&id).map(|slot| slot.words.len() as u64);
                let ok = count.is_some_and(|n| base + n <= 1 << 40 && model.is_free(id, base, n));
                assert_eq!(moved.is_ok(), ok, "{moved:?}");
                if ok {
                    model.slots.get_mut(&id).unwrap().base = base;
                }
            }
            4 => {
                let flags = SlotFlags {
                    read_only: random.below(4) == 0,
                    dirty: modes[random.below(3) as usize],
                };
                let changed = mmu.set_slot_flags(SlotId(id), flags);
                assert_eq!(changed.is_ok(), model.slots.contains_key(&id));
                if let Some(slot) = model.slots.get_mut(&id) {
                    if slot.flags.dirty == DirtyMode::Off || flags.dirty == DirtyMode::Off {
                        slot.dirty.clear();
                    }
                    slot.flags = flags;
                }
            }
            5 => {
                let number = random.below(3) as u32;
                let target = WINDOW + random.below(WIDTH);
                let alias = Alias {
                    number,
                    base: Gpa(base * PAGE),
                    size: pages * PAGE,
                    target: Gpa(target * PAGE),
                };
                assert_eq!(mmu.set_alias(alias).is_ok(), fits);
                if fits {
                    model.aliases.insert(number, (base, pages, target));
                }
            }
            6 => {
                let number = random.below(3) as u32;
                assert_eq!(
                    mmu.remove_alias(number).is_ok(),
                    model.aliases.remove(&number).is_some()
                );
            }
            7 => {
                let writable = random.below(2) == 0;
                mmu.set_host_writable(stretch(base * PAGE, pages), writable).unwrap();
                for gfn in base..base + pages {
                    if let Some((id, page)) = model.find(gfn) {
                        let set = &mut model.slots.get_mut(&id).unwrap().host_read_only;
                        if writable {
                            set.remove(&page)
                        } else {
                            set.insert(page)
                        };
                    }
                }
            }
            8 => {
                drop(mmu.invalidate(stretch(base * PAGE, pages)).unwrap());
                mmu.clear_young(stretch(base * PAGE, pages), |_, _, _| ()).unwrap();
            }
            9 => mmu.zap_all(),
            10 => {
                let quota =
                    [None, Some(64), Some(80), Some(63), Some(81)][random.below(5) as usize];
                let set = mmu.set_nr_mmu_pages(quota);
                assert_eq!(set.is_ok(), quota.is_none_or(|quota| quota == 64 || quota == 80));
            }
            11 => {
                let Some(slot) = model.slots.get_mut(&id) else { continue };
                let mut bitmap = [0];
                let peek = random.below(2) == 0;
                let taken = match peek {
                    true => mmu.peek_dirty_log(SlotId(id), &mut bitmap),
                    false => mmu.dirty_log(SlotId(id), &mut bitmap),
                };
                assert_eq!(taken.is_ok(), slot.flags.dirty != DirtyMode::Off);
                if taken.is_ok() {
                    let found = |page: &u64| bitmap[0] >> page & 1 != 0;
                    assert!(slot.dirty.iter().all(found), "{step}: {:?} {bitmap:x?}", slot.dirty);
                    if peek {
                        mmu.clear_dirty_log(SlotId(id), 0, &bitmap).unwrap();
                    }
                    slot.dirty.clear();
                }
            }
            _ => {
                for _ in 0..4 {
                    let gfn = if random.below(8) == 0 {
                        TOP + random.below(8)
                    } else {
                        WINDOW + random.below(WIDTH)
                    };
                    let gva = Gva(PHYSICAL + (gfn & 0xf_ffff) * PAGE);
                    stamp += 1;
                    let stored =
                        cpu.session().store(gva, &u64::to_le_bytes(stamp), random.below(2) == 0);
                    let gpa = Gpa(gfn * PAGE);
                    let expected = match model.find(gfn) {
                        Some((id, page)) => {
                            let slot = model.slots.get_mut(&id).unwrap();
                            if slot.flags.read_only {
                                Err(SoftExit::Mmio(gpa))
                            } else if slot.host_read_only.contains(&page) {
                                Err(SoftExit::HostReadOnly(gpa))
                            } else {
                                slot.words[page as usize] = stamp;
                                slot.dirty.insert(page);
                                Ok(())
                            }
                        }
                        None => Err(SoftExit::Mmio(gpa)),
                    };
                    assert_eq!(stored, expected, "{step}: {gfn:#x}");
                }
            }
        }
        if step % 8 == 0 {
            mmu.maintain();
        }
        check_everything(&model, mmu, &mut cpus[random.below(2) as usize], random);
        cpus.iter_mut().for_each(|cpu| drop(cpu.session()));
        mmu.audit().unwrap_or_else(|error| panic!("{step}: {error}"));
    }
}
