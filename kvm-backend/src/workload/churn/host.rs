// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread of the host that changes the memory map under a running guest.
//!
//! Each has pages of the window to itself. Around every change it tells the guest, page by page,
//! what it may find: before, what is there and what will be; after, what is there. So whatever the
//! guest finds between two reads of one state has to be exactly what the engine promises.

mod operations;
#[cfg(test)]
mod tests;

use super::counts::Counts;
use super::memory::{Grave, Memory, word_of};
use super::model::{Map, View};
use crate::guest::churn::{Lanes, STABLE, STABLE_PAGES, STATE, Wrong};
use crate::guest::layout::{CHURN_PAGES, STATES_GPA, control};
use crate::guest::programs::xorshift;
use crate::vm::Vm;
use mmu_core::Mmu;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Threads that change the map.
pub(super) const HOSTS: u64 = control::MOVE_RECORDS;
/// Pages of the window for each.
const SHARE: u64 = CHURN_PAGES / HOSTS;
/// Longest pause after an operation, in microseconds.
const PAUSE: u64 = 500;
/// Operations told of when something is wrong.
const TOLD: usize = 12;

/// One of the threads.
#[derive(Debug)]
pub(super) struct Host<'a> {
    vm: &'a Vm,
    index: u64,
    pages: Range<u64>,
    random: u64,
    map: Map,
    /// By number.
    memories: BTreeMap<u64, Memory>,
    graves: VecDeque<Grave>,
    next: u64,
    /// Which pages that stay were shown where, by this thread.
    stable: Vec<Lanes>,
    counts: Counts,
    told: VecDeque<String>,
}

impl<'a> Host<'a> {
    /// Number `index` of [`HOSTS`], whose window is empty.
    pub(super) fn new(vm: &'a Vm, index: u64, seed: u64) -> Self {
        let host = Self {
            vm,
            index,
            pages: index * SHARE..(index + 1) * SHARE,
            random: xorshift(seed ^ (index + 1) << 32) | 1,
            map: Map::default(),
            memories: BTreeMap::new(),
            graves: VecDeque::new(),
            next: STABLE + 1 + index,
            stable: vec![Lanes::default(); STABLE_PAGES as usize],
            counts: Counts::default(),
            told: VecDeque::new(),
        };
        for place in host.pages.clone() {
            host.tell(place, View::Hole, View::Hole, 0);
        }
        host
    }

    /// Changes the map until `stop`.
    ///
    /// # Errors
    ///
    /// What was wrong.
    pub(super) fn run(&mut self, stop: &AtomicBool) -> Result<(), String> {
        while !stop.load(Ordering::Relaxed) {
            self.step().map_err(|wrong| format!("host thread {}: {wrong}", self.index))?;
            std::thread::sleep(Duration::from_micros(self.below(PAUSE)));
        }
        Ok(())
    }

    /// The last operations.
    pub(super) fn history(&self) -> String {
        let told: Vec<&str> = self.told.iter().map(String::as_str).collect();
        format!("host thread {} did last: {}", self.index, told.join("; "))
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    pub(super) fn stable(&self) -> &[Lanes] {
        &self.stable
    }

    /// Checks all memory that the guest has, or has had.
    ///
    /// # Errors
    ///
    /// The first wrong word.
    pub(super) fn check(&mut self) -> Result<(), Wrong> {
        for memory in self.memories.values_mut() {
            memory.check(self.vm, self.pages.clone())?;
        }
        self.graves.iter().try_for_each(Grave::check)
    }

    /// A number below `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.random = xorshift(self.random);
        ((self.random >> 32) * n) >> 32
    }

    /// Tells the guest what it may find on a page of the window.
    fn tell(&self, place: u64, one: View, other: View, rights: u64) {
        let at = STATES_GPA + place * STATE;
        let version = word_of(self.vm, at);
        self.vm.write_word(at, version + 1);
        self.vm.write_word(at + 8, one.identity());
        self.vm.write_word(at + 16, other.identity());
        self.vm.write_word(at + 24, rights);
        self.vm.write_word(at, version + 2);
    }

    /// Tells the guest that a page moves; zero for the identity: that nothing does.
    fn tell_move(&self, from: u64, to: u64, identity: u64) {
        let at = self.vm.image().control_gpa(control::MOVES + self.index * control::MOVE_STRIDE);
        let version = word_of(self.vm, at);
        self.vm.write_word(at, version + 1);
        self.vm.write_word(at + 8, from);
        self.vm.write_word(at + 16, to);
        self.vm.write_word(at + 24, identity);
        self.vm.write_word(at, version + 2);
    }

    fn note(&mut self, what: String) {
        if self.told.len() == TOLD {
            self.told.pop_front();
        }
        self.told.push_back(what);
    }

    /// Has the engine make the map what `after` says.
    fn change<R, E: Display>(
        &mut self,
        what: String,
        after: Map,
        call: impl FnOnce(&Mmu) -> Result<R, E>,
    ) -> Result<R, String> {
        self.note(what);
        let changes = self.map.changes(&after, self.pages.clone());
        for &place in &changes {
            let view = after.view(place);
            match view {
                View::Hole => {}
                View::Page { memory: STABLE, page, .. } => {
                    self.stable[page as usize].places |= 1 << place;
                }
                View::Page { memory, page, .. } => {
                    self.memories.get_mut(&memory).into_iter().for_each(|m| m.shown(page, place));
                }
            }
            self.tell(place, self.map.view(place), view, 0);
        }
        let goes = self.map.goes(&after, self.pages.clone());
        if let Some((from, to)) = goes {
            self.tell_move(from, to, after.view(to).identity());
        }
        let called = call(self.vm.mmu());
        if goes.is_some() {
            self.tell_move(0, 0, 0);
        }
        let called = called.map_err(|error| format!("refused: {error}"))?;
        self.map = after;
        for place in changes {
            let view = self.map.view(place);
            self.tell(place, view, view, view.rights());
        }
        Ok(called)
    }
}
