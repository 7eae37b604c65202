// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens to the vCPUs of a storm.

use crate::guest::{
    AWAY, BLOCKS, BLOCKS_PAGES, Guest, MAIN, MAIN_PAGES, PAGE, PASSING_SLOT, PLACES, READ_ONLY,
    WORDS,
};
use crate::seeds::{below, one_in};
use mmu_core::addr::Gpa;
use mmu_core::memory::{DirtyMode, SlotFlags, SlotId};
use mmu_core::shadow::PageRange;
use shuttle::thread;

/// Changes of each thread.
const CHANGES: u64 = 4;

/// What one thread changes.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// A slot comes, goes and moves.
    Map,
    /// The host takes pages away, makes them read-only, ages them.
    Host,
    /// Everything is zapped, and the quota changes.
    Frames,
    /// The log of a slot of blocks is switched on and off and taken.
    Blocks,
    /// The log of slot 0 is taken while its kind changes.
    Log,
}

/// The copy that a migration makes of a slot, whose log is on.
#[derive(Debug)]
pub(crate) struct Copied {
    slot: SlotId,
    words: Vec<u64>,
}

impl Copied {
    fn of(guest: &Guest, slot: SlotId) -> Self {
        let pages = if slot == MAIN { MAIN_PAGES } else { BLOCKS_PAGES };
        Self { slot, words: guest.words(slot, 0..pages) }
    }

    fn pages(&self) -> u64 {
        self.words.len() as u64 / WORDS
    }

    /// Takes the log and copies what it says.
    fn update(&mut self, guest: &Guest, in_two_steps: bool) {
        let (mmu, slot, mut log) = (&guest.mmu, self.slot, [0]);
        if in_two_steps {
            mmu.peek_dirty_log(slot, &mut log).unwrap();
            mmu.clear_dirty_log(slot, 0, &log).unwrap();
        } else {
            mmu.dirty_log(slot, &mut log).unwrap();
        }
        for page in (0..self.pages()).filter(|page| log[0] >> page & 1 != 0) {
            let words = guest.words(slot, page..page + 1);
            self.words[(page * WORDS) as usize..][..WORDS as usize].copy_from_slice(&words);
        }
    }

    /// Takes the log a last time. The copy must be what the slot is.
    pub(crate) fn check(mut self, guest: &Guest) {
        self.update(guest, false);
        let now = Self::of(guest, self.slot);
        for page in 0..self.pages() {
            let words =
                |all: &Self| all.words[(page * WORDS) as usize..][..WORDS as usize].to_vec();
            let (copy, now) = (words(&self), words(&now));
            assert_eq!(copy, now, "R13: a write to page {page} of {} is in no log", self.slot);
        }
    }
}

impl Change {
    /// Makes changes; a copy of what was logged.
    pub(crate) fn run(self, guest: &Guest) -> Option<Copied> {
        match self {
            Self::Blocks => return Some(log_blocks(guest)),
            Self::Log => return Some(copy_main(guest)),
            Self::Map => (0..CHANGES).for_each(|_| change_map(guest)),
            Self::Host => (0..CHANGES).for_each(|n| change_host(guest, n)),
            Self::Frames => (0..CHANGES).for_each(|_| change_frames(guest)),
        }
        None
    }
}

fn change_map(guest: &Guest) {
    let mmu = &guest.mmu;
    // Each may be refused because of where the slot is.
    match below(4) {
        0 | 1 => drop(mmu.create_slot(Guest::passing_slot())),
        2 => drop(mmu.delete_slot(PASSING_SLOT)),
        _ => {
            let place = PLACES[below(2) as usize];
            let _ = mmu.move_slot(PASSING_SLOT, Gpa(place * PAGE));
        }
    }
}

fn change_host(guest: &Guest, n: u64) {
    let mmu = &guest.mmu;
    match below(6) {
        0 | 1 => {
            let away = AWAY..AWAY + 1 + below(4);
            let gone = mmu.invalidate(Guest::range(away.clone())).unwrap();
            let before = guest.data_words(away.clone());
            thread::yield_now();
            assert_eq!(guest.data_words(away), before, "R07: written while it was away");
            gone.end();
        }
        2 => {
            // Each page once, and none that is taken away: a fault that meets the end of such a time may
            // hand its write to the emulator, which another time does not stop; it meets what the host
            // has made of the process's own mapping.
            let pages = READ_ONLY + n..READ_ONLY + n + 1;
            mmu.set_host_writable(Guest::range(pages.clone()), false).unwrap();
            let before = guest.data_words(pages.clone());
            thread::yield_now();
            let after = guest.data_words(pages.clone());
            assert_eq!(after, before, "R07: written while it was read-only");
            mmu.set_host_writable(Guest::range(pages), true).unwrap();
        }
        3 => {
            // Where there was no memory there is none.
            let places = PLACES.map(|place| Gpa(place * PAGE));
            let base = places[below(2) as usize];
            let gone = mmu.invalidate(PageRange::Guest { base, size: 4 * PAGE }).unwrap();
            let before = places.map(|place| guest.read(place).is_some());
            thread::yield_now();
            let after = places.map(|place| guest.read(place).is_some());
            assert_eq!(after, before, "R26: memory came or went in an invalidation");
            gone.end();
        }
        4 if one_in(2) => drop(mmu.clear_young(Guest::range(0..32), |_, _, _| ())),
        4 => drop(mmu.invalidate(Guest::tables())),
        _ => {
            // What was derived from its tables goes.
            mmu.set_host_writable(Guest::tables(), true).unwrap();
            mmu.synchronize().unwrap();
        }
    }
}

fn change_frames(guest: &Guest) {
    let mmu = &guest.mmu;
    match below(4) {
        0 | 1 => mmu.zap_all(),
        2 => mmu.set_nr_mmu_pages((!one_in(3)).then_some(crate::storm::FRAMES)).unwrap(),
        _ => mmu.maintain(),
    }
}

fn log_by(guest: &Guest, slot: SlotId, dirty: DirtyMode) {
    guest.mmu.set_slot_flags(slot, SlotFlags { read_only: false, dirty }).unwrap();
}

fn some_log() -> DirtyMode {
    [DirtyMode::WriteProtect, DirtyMode::DirtyBits][below(2) as usize]
}

fn log_blocks(guest: &Guest) -> Copied {
    for _ in 0..below(2) {
        log_by(guest, BLOCKS, some_log());
        guest.mmu.dirty_log(BLOCKS, &mut [0]).unwrap();
        log_by(guest, BLOCKS, DirtyMode::Off);
        thread::yield_now();
    }
    log_by(guest, BLOCKS, some_log());
    let mut copied = Copied::of(guest, BLOCKS);
    for _ in 0..2 {
        copied.update(guest, one_in(2));
    }
    copied
}

fn copy_main(guest: &Guest) -> Copied {
    let mut copied = Copied::of(guest, MAIN);
    for _ in 0..CHANGES {
        match below(3) {
            0 => log_by(guest, MAIN, some_log()),
            two_steps => copied.update(guest, two_steps == 1),
        }
    }
    copied
}
