// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a host thread does, each time with a random choice of where. An operation for which there is
//! no room, or nothing to do it with, is left out.

use super::Host;
use crate::guest::churn::stable_gpa;
use crate::guest::layout::{CHURN_GPA, DENSE_PAGES, SPARSE_PAGES};
use crate::guest::paging::PAGE;
use crate::workload::churn::counts::Kind;
use crate::workload::churn::host::{HOSTS, PAUSE, SHARE};
use crate::workload::churn::memory::{Grave, Memory};
use crate::workload::churn::model::{Named, Placed, Target};
use mmu_core::addr::{Gpa, Hva};
use mmu_core::memory::{Alias, DirtyMode, SlotConfig, SlotFlags, SlotId};
use mmu_core::shadow::{PageRange, QuotaError};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most pages of a memory.
const MOST_PAGES: u64 = 16;
/// First number of a memslot in the window.
const FIRST_SLOT: u32 = 16;
/// Most memslots of a thread.
const SLOTS: u32 = 16;
/// Most aliases of a thread.
const ALIASES: u32 = 4;
/// How long deleted memory may have other holders.
const PATIENCE: Duration = Duration::from_secs(10);
/// Memories that stay poisoned before the oldest of them is given back.
const GRAVES: usize = 4;

impl Host<'_> {
    /// One operation, and a look at memory that the guest has had.
    ///
    /// # Errors
    ///
    /// What was wrong.
    pub(super) fn step(&mut self) -> Result<(), String> {
        match self.below(1000) {
            0..200 => self.add(),
            200..340 => self.delete(),
            340..520 => self.relocate(),
            // These zap everything: the guest must get on in between.
            520..535 => self.alias(),
            535..545 => self.unalias(),
            545..610 => self.protect(),
            610..660 => self.begin_copy(),
            660..760 => self.harvest_one(),
            760..810 => self.end_copy(),
            810..830 => self.log_stable(),
            830..840 => self.resize(),
            840..845 => self.zap(),
            845..890 => self.invalidate(),
            _ => self.inspect(),
        }?;
        let grave = self.below(self.graves.len().max(1) as u64) as usize;
        self.graves.get(grave).map_or(Ok(()), Grave::check).map_err(|wrong| wrong.to_string())
    }

    /// `pages` pages of the window.
    fn somewhere(&mut self, pages: u64) -> Range<u64> {
        let base = self.pages.start + self.below(SHARE - pages + 1);
        base..base + pages
    }

    fn some_slot(&mut self) -> Option<usize> {
        let n = self.below(self.map.slots.len().max(1) as u64) as usize;
        Some(n).filter(|n| *n < self.map.slots.len())
    }

    pub(super) fn add(&mut self) -> Result<(), String> {
        let mine = FIRST_SLOT + self.index as u32 * SLOTS;
        let used = |slot: u32| self.map.slots.iter().any(|s| s.slot == slot);
        let Some(slot) = (mine..mine + SLOTS).find(|slot| !used(*slot)) else { return Ok(()) };
        let old = self.graves.len() == GRAVES && self.below(2) == 0;
        let old = if old { self.graves.pop_front() } else { None };
        let backing = match old {
            Some(grave) => grave.open().map_err(|wrong| wrong.to_string())?,
            None => {
                let pages = 1 + self.below(MOST_PAGES);
                self.vm.new_memory(pages * PAGE).map_err(|error| error.to_string())?
            }
        };
        let pages = backing.size() / PAGE;
        let mut tries = [0; 8].map(|_| self.somewhere(pages)).into_iter();
        let Some(range) = tries.find(|range| self.map.has_room(range, None)) else {
            return Ok(());
        };
        let number = self.next;
        self.next += HOSTS;
        let mut memory = Memory::new(number, backing);
        let mut config = SlotConfig::new(slot, window(range.start), Arc::clone(memory.backing()));
        if self.below(4) == 0 {
            config = config.track(self.some_mode());
            memory.begin_copy();
        }
        let flags = config.flags;
        self.memories.insert(number, memory);
        let mut after = self.map.clone();
        let base = range.start;
        after.slots.push(Placed { slot, memory: number, base, pages, flags });
        self.counts.bump(Kind::Add);
        let what = format!("added memory {number} at {range:?} as slot {slot}, {flags:?}");
        self.change(what, after, |mmu| mmu.create_slot(config))
    }

    fn delete(&mut self) -> Result<(), String> {
        let Some(n) = self.some_slot() else { return Ok(()) };
        let mut after = self.map.clone();
        let Placed { slot, memory, base, pages, .. } = after.slots.swap_remove(n);
        let what = format!("deleted slot {slot}, memory {memory} at {base} for {pages}");
        let release = self.change(what, after, |mmu| mmu.delete_slot(SlotId(slot)))?;
        self.counts.bump(Kind::Delete);
        let Some(mut memory) = self.memories.remove(&memory) else { return Ok(()) };
        // Another thread that takes a dirty log holds a snapshot, or is dropping it.
        let since = Instant::now();
        while Arc::strong_count(memory.backing()) != 1 {
            if since.elapsed() > PATIENCE {
                return Err(format!("the engine said {release:?} and holds the memory"));
            }
            std::thread::yield_now();
        }
        memory.check(self.vm, self.pages.clone()).map_err(|wrong| wrong.to_string())?;
        if self.graves.len() == GRAVES {
            // The last owner: on KVM the memory leaves the machine here.
            if let Some(grave) = self.graves.pop_front() {
                grave.open().map(drop).map_err(|wrong| wrong.to_string())?;
            }
        }
        self.graves.push_back(memory.poison());
        Ok(())
    }

    fn relocate(&mut self) -> Result<(), String> {
        let Some(n) = self.some_slot() else { return Ok(()) };
        let Placed { slot, base, pages, .. } = self.map.slots[n];
        // By some pages, over itself, or anywhere.
        let near = self.below(2) == 0;
        let tries = [0; 8].map(|_| match near {
            true => {
                let base = (base + self.below(5)).saturating_sub(2);
                base..base + pages
            }
            false => self.somewhere(pages),
        });
        let all = &self.pages;
        let mut tries = tries.into_iter().filter(|r| all.start <= r.start && r.end <= all.end);
        let fits = |r: &Range<u64>| r.start != base && self.map.has_room(r, Some(slot));
        let Some(range) = tries.find(fits) else { return Ok(()) };
        let mut after = self.map.clone();
        after.slots[n].base = range.start;
        self.counts.bump(Kind::Move);
        let what = format!("moved slot {slot} from {base} to {range:?}");
        self.change(what, after, |mmu| mmu.move_slot(SlotId(slot), window(range.start)))
    }

    fn alias(&mut self) -> Result<(), String> {
        let mine = self.index as u32 * ALIASES;
        let used = |number: u32| self.map.aliases.iter().any(|a| a.number == number);
        let Some(number) = (mine..mine + ALIASES).find(|n| !used(*n)) else { return Ok(()) };
        let pages = 1 + self.below(MOST_PAGES);
        let range = self.somewhere(pages);
        let (target, gpa) = match self.below(3) {
            0 => {
                let page = self.below(DENSE_PAGES - pages + 1);
                (Target::Stable(page), Gpa(stable_gpa(self.vm.image().layout(), page)))
            }
            _ => {
                let page = self.somewhere(pages).start;
                (Target::Window(page), window(page))
            }
        };
        let mut after = self.map.clone();
        after.aliases.push(Named { number, base: range.start, pages, target });
        self.counts.bump(Kind::Alias);
        let alias = Alias { number, base: window(range.start), size: pages * PAGE, target: gpa };
        let what = format!("aliased {range:?} to {target:?} as {number}");
        self.change(what, after, |mmu| mmu.set_alias(alias))
    }

    pub(super) fn unalias(&mut self) -> Result<(), String> {
        let n = self.below(u64::from(ALIASES)) as usize;
        let mut after = self.map.clone();
        if n >= after.aliases.len() {
            return Ok(());
        }
        let number = after.aliases.swap_remove(n).number;
        self.counts.bump(Kind::Alias);
        self.change(format!("removed alias {number}"), after, |mmu| mmu.remove_alias(number))
    }

    /// Gives a slot these flags.
    pub(super) fn flags(&mut self, n: usize, flags: SlotFlags) -> Result<(), String> {
        let mut after = self.map.clone();
        let placed = &mut after.slots[n];
        placed.flags = flags;
        let slot = placed.slot;
        self.counts.bump(Kind::Flag);
        self.change(format!("slot {slot}: {flags:?}"), after, |mmu| {
            mmu.set_slot_flags(SlotId(slot), flags)
        })
    }

    fn protect(&mut self) -> Result<(), String> {
        let Some(n) = self.some_slot() else { return Ok(()) };
        let flags = self.map.slots[n].flags;
        self.flags(n, SlotFlags { read_only: !flags.read_only, ..flags })
    }

    /// A way to keep a dirty log.
    fn some_mode(&mut self) -> DirtyMode {
        [DirtyMode::WriteProtect, DirtyMode::DirtyBits][self.below(2) as usize]
    }

    pub(super) fn begin_copy(&mut self) -> Result<(), String> {
        let Some(n) = self.some_slot() else { return Ok(()) };
        let Placed { memory, flags, .. } = self.map.slots[n];
        if flags.dirty != DirtyMode::Off {
            return Ok(());
        }
        let dirty = self.some_mode();
        self.flags(n, SlotFlags { dirty, ..flags })?;
        // The first round copies everything; what is written meanwhile is in a later log.
        self.memories.get_mut(&memory).into_iter().for_each(Memory::begin_copy);
        Ok(())
    }

    fn harvest(&mut self, n: usize) -> Result<(), String> {
        let Placed { slot, memory, pages, .. } = self.map.slots[n];
        self.note(format!("harvested slot {slot}"));
        let mut bitmap = [0; MOST_PAGES.div_ceil(64) as usize];
        let dirty = self.vm.mmu().dirty_log(SlotId(slot), &mut bitmap);
        let dirty = dirty.map_err(|error| format!("refused: {error}"))?;
        let bits: u32 = bitmap.iter().map(|bits| bits.count_ones()).sum();
        if dirty != u64::from(bits) || bitmap[0] >> pages != 0 {
            return Err(format!("a log of {pages} pages with {dirty} dirty ones: {bitmap:x?}"));
        }
        self.counts.bump(Kind::Harvest);
        self.memories.get_mut(&memory).into_iter().for_each(|m| m.copy_dirty(&bitmap));
        Ok(())
    }

    /// One of the slots that keep a log.
    fn some_log(&mut self) -> Option<usize> {
        let logs = |s: &&(usize, &Placed)| s.1.flags.dirty != DirtyMode::Off;
        let count = self.map.slots.iter().enumerate().filter(|s| logs(&s)).count();
        let n = self.below(count.max(1) as u64) as usize;
        self.map.slots.iter().enumerate().filter(|s| logs(&s)).nth(n).map(|(n, _)| n)
    }

    pub(super) fn harvest_one(&mut self) -> Result<(), String> {
        self.some_log().map_or(Ok(()), |n| self.harvest(n))
    }

    pub(super) fn end_copy(&mut self) -> Result<(), String> {
        let Some(n) = self.some_log() else { return Ok(()) };
        let Placed { memory, flags, .. } = self.map.slots[n];
        // The guest writes no more: the last log has everything.
        self.flags(n, SlotFlags { read_only: true, ..flags })?;
        self.harvest(n)?;
        self.counts.bump(Kind::Copy);
        let ended = self.memories.get_mut(&memory).map_or(Ok(()), Memory::end_copy);
        ended.map_err(|wrong| wrong.to_string())?;
        self.flags(n, SlotFlags::default())
    }

    /// Changes the dirty log of memory that stays, and takes it.
    fn log_stable(&mut self) -> Result<(), String> {
        let slot = SlotId((self.index % self.vm.slots() as u64) as u32);
        let dirty = if self.below(3) == 0 { DirtyMode::Off } else { self.some_mode() };
        self.note(format!("{slot}: {dirty:?}"));
        let flags = SlotFlags { read_only: false, dirty };
        let changed = self.vm.mmu().set_slot_flags(slot, flags);
        changed.map_err(|error| format!("refused: {error}"))?;
        self.counts.bump(Kind::Flag);
        if dirty == DirtyMode::Off {
            return Ok(());
        }
        let words = self.vm.image().layout().memory() / PAGE / 64 + 1;
        let mut bitmap = vec![0; words as usize];
        self.vm.mmu().dirty_log(slot, &mut bitmap).map_err(|error| format!("refused: {error}"))?;
        self.counts.bump(Kind::Harvest);
        Ok(())
    }

    fn resize(&mut self) -> Result<(), String> {
        let least = match self.vm.mmu().set_nr_mmu_pages(0) {
            Err(QuotaError::TooFew { minimum, .. }) => minimum,
            other => return Err(format!("a quota of nothing: {other:?}")),
        };
        // The least that the engine takes, some more, or what it takes by itself.
        let quota = match self.below(4) {
            0 => None,
            1 => Some(least),
            _ => Some(least + self.below(2 * SPARSE_PAGES)),
        };
        self.note(format!("quota {quota:?}"));
        self.counts.bump(Kind::Resize);
        self.vm.mmu().set_nr_mmu_pages(quota).map_err(|error| format!("refused: {error}"))
    }

    fn zap(&mut self) -> Result<(), String> {
        self.note("zapped all".to_owned());
        self.counts.bump(Kind::Zap);
        self.vm.mmu().zap_all();
        Ok(())
    }

    /// Takes a memory away for a moment, as a host does that swaps: the map stays, vCPUs wait.
    fn invalidate(&mut self) -> Result<(), String> {
        let Some(n) = self.some_slot() else { return Ok(()) };
        let Placed { slot, memory, .. } = self.map.slots[n];
        let Some(memory) = self.memories.get(&memory) else { return Ok(()) };
        let words = memory.backing().words();
        let base = Hva(words.as_ptr() as u64);
        let range = PageRange::Host { base, size: memory.backing().size() };
        self.note(format!("invalidated slot {slot}"));
        self.counts.bump(Kind::Invalidate);
        let held = self.vm.mmu().invalidate(range);
        let held = held.map_err(|error| format!("refused: {error}"))?;
        std::thread::sleep(Duration::from_micros(self.below(PAUSE)));
        held.end();
        Ok(())
    }

    /// Checks a memory that the guest has.
    fn inspect(&mut self) -> Result<(), String> {
        let Some(n) = self.some_slot() else { return Ok(()) };
        let number = self.map.slots[n].memory;
        self.counts.bump(Kind::Inspect);
        let Some(memory) = self.memories.get_mut(&number) else { return Ok(()) };
        memory.check(self.vm, self.pages.clone()).map_err(|wrong| wrong.to_string())
    }
}

/// Guest-physical address of a page of the window.
pub(super) fn window(page: u64) -> Gpa {
    Gpa(CHURN_GPA + page * PAGE)
}
