// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the host of `churn` gives to the guest and takes away, and checks of what is in it.

use crate::guest::churn::{
    self, Lanes, Ledger, Word, Wrong, check_filler, check_lanes, check_poison, fill_page,
};
use crate::guest::paging::PAGE;
use crate::vm::Vm;
use mmu_core::memory::Backing;
use mmu_core::sync::Ordering;
use std::ops::Range;
use std::sync::Arc;

/// Guest memory as the VMM sees it. Acquire: what a vCPU stored before the word is seen, too.
pub(super) fn word_of(vm: &Vm, gpa: u64) -> u64 {
    vm.word(gpa).map_or(0, |word| word.load(Ordering::Acquire))
}

/// The number of a vCPU's last store to the window.
pub(super) fn last_of(vm: &Vm, vcpu: usize) -> u64 {
    Ledger::of(vm.image().layout(), vcpu).last(&|gpa| word_of(vm, gpa))
}

/// Raises the floors in `lanes`, which are those of the pages of `memory`, to what the ledgers say
/// of these pages of the window.
pub(super) fn raise_floors(vm: &Vm, memory: u64, places: Range<u64>, lanes: &mut [Lanes]) {
    let word: Word<'_> = &|gpa| word_of(vm, gpa);
    for lanes in &mut *lanes {
        lanes.floors.resize(vm.vcpus(), 0);
    }
    for vcpu in 0..vm.vcpus() {
        let ledger = Ledger::of(vm.image().layout(), vcpu);
        for (number, identity) in places.clone().filter_map(|place| ledger.entry(word, place)) {
            let page = churn::identified(identity).filter(|(of, _)| *of == memory);
            if let Some(lanes) = page.and_then(|(_, page)| lanes.get_mut(page as usize)) {
                let floor = &mut lanes.floors[vcpu];
                *floor = number.max(*floor);
            }
        }
    }
}

/// Memory, and what its pages may hold.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) number: u64,
    backing: Arc<dyn Backing>,
    lanes: Vec<Lanes>,
    /// The destination of a copy by dirty log.
    pub(super) copy: Option<Vec<u64>>,
}

impl Memory {
    /// Fills memory that is new to the guest.
    pub(super) fn new(number: u64, backing: Arc<dyn Backing>) -> Self {
        let pages = backing.size() / PAGE;
        let words = backing.words();
        for page in 0..pages {
            fill_page(number, page, &mut |offset, value| {
                words[offset as usize / 8].store(value, Ordering::Release);
            });
        }
        let lanes = vec![Lanes::default(); pages as usize];
        Self { number, backing, lanes, copy: None }
    }

    pub(super) fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    pub(super) fn pages(&self) -> u64 {
        self.lanes.len() as u64
    }

    /// From now on the guest may see a page as page `place` of the window.
    pub(super) fn shown(&mut self, page: u64, place: u64) {
        self.lanes[page as usize].places |= 1 << place;
    }

    fn word(&self, offset: u64) -> u64 {
        self.backing.words()[offset as usize / 8].load(Ordering::Acquire)
    }

    /// Checks every word. The guest may have the memory meanwhile, in these pages of the window.
    ///
    /// # Errors
    ///
    /// The first word that cannot be.
    pub(super) fn check(&mut self, vm: &Vm, places: Range<u64>) -> Result<(), Wrong> {
        // What a ledger says now holds for the lanes from now on.
        raise_floors(vm, self.number, places, &mut self.lanes);
        for (page, lanes) in self.lanes.iter().enumerate() {
            check_filler(self.number, page as u64, &|offset| self.word(offset))?;
            let word: Word<'_> = &|offset| self.word(offset);
            check_lanes(self.number, page as u64, lanes, word, &|vcpu| last_of(vm, vcpu))?;
        }
        Ok(())
    }

    /// Begins a copy: the memory as it is, to which the pages in each dirty log are added.
    pub(super) fn begin_copy(&mut self) {
        self.copy = Some((0..self.pages() * PAGE).step_by(8).map(|at| self.word(at)).collect());
    }

    /// Copies the pages in a dirty log.
    pub(super) fn copy_dirty(&mut self, bitmap: &[u64]) {
        let Some(mut copy) = self.copy.take() else { return };
        for (page, copied) in copy.chunks_mut(PAGE as usize / 8).enumerate() {
            if bitmap[page / 64] >> (page % 64) & 1 != 0 {
                let from = (page as u64 * PAGE..).step_by(8);
                copied.iter_mut().zip(from).for_each(|(word, at)| *word = self.word(at));
            }
        }
        self.copy = Some(copy);
    }

    /// Ends a copy, which must equal the memory; the guest must not be able to write it.
    ///
    /// # Errors
    ///
    /// The first word that was written and is in no log.
    pub(super) fn end_copy(&mut self) -> Result<(), Wrong> {
        let copy = self.copy.take().unwrap_or_default();
        for (copied, offset) in copy.into_iter().zip((0..).step_by(8)) {
            let seen = self.word(offset);
            if seen != copied {
                let (what, memory) = ("word of a page that no dirty log names", self.number);
                return Err(Wrong { what, memory, offset, expected: copied, seen });
            }
        }
        Ok(())
    }

    /// Poisons memory that the guest has no more.
    pub(super) fn poison(self) -> Grave {
        let Self { number, backing, .. } = self;
        for (word, offset) in backing.words().iter().zip((0..).step_by(8)) {
            word.store(churn::poison(number, offset), Ordering::Release);
        }
        Grave { number, backing }
    }
}

/// Memory that the guest has had.
#[derive(Debug)]
pub(super) struct Grave {
    number: u64,
    pub(super) backing: Arc<dyn Backing>,
}

impl Grave {
    /// Checks that nobody has written it.
    ///
    /// # Errors
    ///
    /// The first word that somebody has.
    pub(super) fn check(&self) -> Result<(), Wrong> {
        let words = self.backing.words();
        let pages = self.backing.size() / PAGE;
        check_poison(self.number, pages, &|at| words[at as usize / 8].load(Ordering::Acquire))
    }

    /// Its memory, for a new life under another number.
    ///
    /// # Errors
    ///
    /// As [`Grave::check`].
    pub(super) fn open(self) -> Result<Arc<dyn Backing>, Wrong> {
        self.check()?;
        Ok(self.backing)
    }
}
