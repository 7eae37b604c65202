// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens to the vCPUs of a storm.

use crate::copied::Copied;
use crate::devices;
use crate::guest::{
    AWAY, BLOCKS, Guest, LARGE, LEAF, MAIN, PAGE, PASSING_SLOT, PLACES, READ_ONLY, SHARED, TABLES,
    leaf_entry, middle_entry, word,
};
use crate::seeds::{below, one_in};
use mmu_core::addr::Gpa;
use mmu_core::memory::{DirtyMode, PinnedPage, SlotFlags, SlotId};
use mmu_core::shadow::PageRange;
use shuttle::thread;
use std::mem;

/// Changes of each thread.
const CHANGES: u64 = 4;
/// Offset of the word that is written through pinned pages, and by nobody else.
const PINNED_AT: u64 = 16;

/// What one thread changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A slot comes, goes and moves; pages of it stay pinned meanwhile.
    Map,
    /// A slot moves that has a table and the pages behind it.
    Tables,
    /// The host takes pages away, makes them read-only, ages them.
    Host,
    /// What was derived from the guest's tables goes, again and again.
    Shadows,
    /// Everything is zapped, and the quota changes.
    Frames,
    /// The quota is watched.
    Quota,
    /// The log of a slot of blocks is switched on and off and taken.
    Blocks,
    /// The log of slot 0 is taken while its kind changes.
    Log,
    /// The log of slot 0 is taken.
    Copy,
    /// Dirty rings are collected.
    Rings,
    /// Devices come and go.
    Devices,
}

impl Change {
    /// Makes changes; a copy of what was logged.
    pub(crate) fn run(self, guest: &Guest) -> Option<Copied> {
        match self {
            Self::Blocks => return Some(log_blocks(guest)),
            Self::Log => return Some(copy_while_modes_change(guest)),
            Self::Copy => {
                let mut copied = Copied::of(guest, MAIN);
                while_busy(guest, || copied.update(guest));
                return Some(copied);
            }
            Self::Map => change_map(guest),
            Self::Tables => move_tables(guest),
            Self::Host => (0..CHANGES).for_each(|n| change_host(guest, n)),
            // Not for ever: a fault needs some time without.
            Self::Shadows => {
                (0..15 * CHANGES).take_while(|_| guest.is_busy()).for_each(|_| zap_shadows(guest))
            }
            Self::Frames => (0..CHANGES).for_each(|_| change_frames(guest)),
            Self::Quota => while_busy(guest, || watch_quota(guest)),
            Self::Rings => {
                let rings = guest.rings().expect("vCPUs with rings");
                while_busy(guest, || rings.collect(guest));
            }
            Self::Devices => devices::come_and_go(guest),
        }
        None
    }
}

/// Until the last vCPU has come to its end.
fn while_busy(guest: &Guest, mut change: impl FnMut()) {
    while guest.is_busy() {
        change();
        thread::yield_now();
    }
}

/// A page of the passing slot, pinned for writing.
struct Pinned {
    page: PinnedPage,
    /// What was written through it, at [`PINNED_AT`].
    value: u64,
    /// Whether its slot still exists.
    lives: bool,
}

impl Pinned {
    fn of(guest: &Guest, value: u64) -> Option<Self> {
        // Not the first one, where vCPUs look for a device.
        let place = PLACES[below(2) as usize] + 1 + below(3);
        let page = guest.mmu.pin_page(Gpa(place * PAGE), true).ok()?;
        page.write(PINNED_AT, &value.to_le_bytes()).unwrap();
        Some(Self { page, value, lives: true })
    }

    /// What was written through it is there, and so it is where the slot is now.
    fn check(&self, guest: &Guest) {
        let mut bytes = [0; 8];
        self.page.read(PINNED_AT, &mut bytes).unwrap();
        let (value, (_, offset)) = (u64::from_le_bytes(bytes), self.page.place());
        let base = guest.mmu.memory().by_id(PASSING_SLOT).map(|slot| slot.base().gpa().0);
        let at = base.filter(|_| self.lives).map(|base| Gpa(base + offset + PINNED_AT));
        let seen = at.map_or(self.value, |at| guest.read(at).unwrap());
        assert_eq!([value, seen], [self.value; 2], "R27: a pinned page is not its slot's");
    }
}

fn change_map(guest: &Guest) {
    let mmu = &guest.mmu;
    let mut pinned: Option<Pinned> = None;
    for n in 1..=CHANGES {
        // Each may be refused because of where the slot is.
        match below(4) {
            0 | 1 => drop(mmu.create_slot(Guest::passing_slot())),
            2 => {
                if let Ok(release) = mmu.delete_slot(PASSING_SLOT) {
                    let pins = pinned.as_mut().map(|pinned| mem::replace(&mut pinned.lives, false));
                    let pins = u64::from(pins.unwrap_or(false));
                    assert_eq!(release.pinned_pages, pins, "R30: pins of a slot that is gone");
                    assert!(release.held || pins == 0, "R30: a pinned page is held by nobody");
                }
            }
            _ => {
                let place = PLACES[below(2) as usize];
                let _ = mmu.move_slot(PASSING_SLOT, Gpa(place * PAGE));
            }
        }
        if one_in(2) {
            // One at a time.
            drop(pinned.take());
            pinned = Pinned::of(guest, n);
        }
        pinned.iter().for_each(|pinned| pinned.check(guest));
    }
}

/// The passing slot begins with a leaf table, which names the pages behind it.
fn move_tables(guest: &Guest) {
    let mmu = &guest.mmu;
    let [here, there] = PLACES.map(|place| Gpa(place * PAGE));
    let create = || {
        mmu.create_slot(Guest::passing_slot()).unwrap();
        for n in 1..LEAF {
            guest.write(Gpa(here.0 + n * 8), word(Gpa(here.0 + n * PAGE)));
        }
    };
    create();
    guest.write(middle_entry(LARGE), word(here));
    for _ in 0..2 * CHANGES {
        if one_in(3) {
            mmu.delete_slot(PASSING_SLOT).unwrap();
            create();
        } else {
            mmu.move_slot(PASSING_SLOT, there).unwrap();
            mmu.move_slot(PASSING_SLOT, here).unwrap();
        }
    }
}

/// What was derived from one of the guest's tables in use goes, or from all.
fn zap_shadows(guest: &Guest) {
    let table = |base| PageRange::Guest { base, size: PAGE };
    let tables = match below(4) {
        0 => Guest::tables(),
        1 => table(Gpa(leaf_entry(SHARED).0 & !(PAGE - 1))),
        _ => table(Gpa(below(TABLES / 2) * PAGE)),
    };
    guest.mmu.set_host_writable(tables, true).unwrap();
    // Frames that somebody may still walk are not freed by this.
    guest.mmu.maintain();
}

/// Frames in use are never more than there may be.
fn watch_quota(guest: &Guest) {
    let (quota, used) = guest.mmu.nr_mmu_pages();
    assert!(used <= quota, "R28: {used} table frames of {quota}");
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
    let mut copied = None;
    for _ in 0..3 {
        if copied.is_some() {
            log_by(guest, BLOCKS, DirtyMode::Off);
            thread::yield_now();
        }
        log_by(guest, BLOCKS, some_log());
        let copied = copied.insert(Copied::of(guest, BLOCKS));
        for _ in 0..below(3) {
            copied.update(guest);
        }
    }
    copied.unwrap()
}

fn copy_while_modes_change(guest: &Guest) -> Copied {
    let mut copied = Copied::of(guest, MAIN);
    for _ in 0..CHANGES {
        match one_in(3) {
            true => log_by(guest, MAIN, some_log()),
            false => copied.update(guest),
        }
    }
    copied
}
