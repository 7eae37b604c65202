// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What live shadow pages are found by.
//!
//! A page that shadows a guest table or a stretch of memory is found by its key. The root of PAE paging
//! shadows neither: the processor has read the four PDPTEs into registers, and what becomes of the
//! memory they came from does not matter until it is told to read it again (SDM vol. 3, 5.4.1). So it
//! is found by what the registers hold, whoever loaded them from wherever. Its key has a number in the
//! place of the guest frame, which it shares with the pages between it and the guest's tables.
//!
//! Either way the page itself says by what it is found, and whoever tears it down takes it out: there
//! are no more names than pages, however many values a guest loads.

use super::Engine;
use super::location::FrameId;
use super::role::{GFN_BITS, Key, Regime, Role};
use crate::addr::{Gfn, Gpa};
use crate::paging::{PagingMode, bits};
use crate::sync::{AtomicU64, ConcurrentMap, Ordering};

/// What a root of PAE paging stands for. All bits of the registers count, those that the processor
/// ignores too: values that mean the same have pages of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Registers {
    pdptrs: [u64; 4],
    role: Role,
}

/// What a page is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Key(Key),
    Registers(Registers),
}

/// Live shadow pages by their names.
#[derive(Debug)]
pub(super) struct Pages {
    by_key: ConcurrentMap<Key, FrameId>,
    by_registers: ConcurrentMap<Registers, FrameId>,
    /// Roots of PAE paging that were made so far.
    numbers: AtomicU64,
}

impl Name {
    /// What the PDPTE registers hold, if the page stands for them.
    pub(super) fn pdptrs(&self) -> Option<[u64; 4]> {
        match self {
            Self::Key(_) => None,
            Self::Registers(registers) => Some(registers.pdptrs),
        }
    }

    /// The guest's root table, whose memory the page cannot be without.
    pub(super) fn home(&self) -> Option<Gfn> {
        match self {
            Self::Key(key) if key.role().has_home() => Some(key.gfn()),
            _ => None,
        }
    }
}

impl Pages {
    pub(super) fn new() -> Self {
        let (by_key, by_registers) = (ConcurrentMap::new(), ConcurrentMap::new());
        Self { by_key, by_registers, numbers: AtomicU64::new(0) }
    }

    pub(super) fn get(&self, name: &Name) -> Option<FrameId> {
        match name {
            Name::Key(key) => self.by_key.get(key),
            Name::Registers(registers) => self.by_registers.get(registers),
        }
    }

    /// Inserts unless a page has the name; then returns that.
    pub(super) fn insert_if_absent(&self, name: Name, frame: FrameId) -> Result<(), FrameId> {
        match name {
            Name::Key(key) => self.by_key.insert_if_absent(key, frame),
            Name::Registers(registers) => self.by_registers.insert_if_absent(registers, frame),
        }
    }

    /// Removes the name if it is still this page's.
    pub(super) fn remove_if_equal(&self, name: &Name, frame: FrameId) -> bool {
        match name {
            Name::Key(key) => self.by_key.remove_if_equal(key, frame),
            Name::Registers(registers) => self.by_registers.remove_if_equal(registers, frame),
        }
    }

    /// Every page. Consistent only while nobody writes.
    pub(super) fn entries(&self) -> Vec<(Name, FrameId)> {
        let keys = self.by_key.entries().into_iter();
        let registers = self.by_registers.entries().into_iter();
        keys.map(|(key, frame)| (Name::Key(key), frame))
            .chain(registers.map(|(registers, frame)| (Name::Registers(registers), frame)))
            .collect()
    }
}

/// Half of the numbers that there are.
const HALF: u64 = 1 << (GFN_BITS - 1);

impl Engine {
    /// The name of the root for these registers.
    pub(crate) fn name_of_root(&self, mode: &PagingMode, regime: Regime) -> Name {
        let format = mode.entry_format();
        let role = Role::root(self.levels(), regime, format);
        if !mode.is_paging() {
            Name::Key(Key::new(Gfn(0), role.direct()))
        } else if format.is_pae() {
            // Registers are no table, whatever has room for them.
            Name::Registers(Registers { pdptrs: *mode.pdptrs(), role: role.upper() })
        } else {
            let role = if mode.levels() < self.levels() { role.upper() } else { role };
            Name::Key(Key::new(mode.root(), role))
        }
    }

    /// What the page with this key in the frame is found by.
    pub(super) fn name_of(&self, frame: FrameId, key: Key) -> Name {
        let role = key.role();
        match role.stands_for_registers() && role.level() == self.levels() {
            true => {
                let pdptrs = self.frames.page(frame).pdptrs();
                Name::Registers(Registers { pdptrs, role })
            }
            false => Name::Key(key),
        }
    }

    /// The key for a page of this name. That of a root of PAE paging is another each time.
    ///
    /// Numbers come again after 2^40 of them. So that a page does not meet what was below an older one of
    /// its number, everything is zapped whenever one half of the numbers has been used up: what had a
    /// number of the other half is obsolete then, before the first of that half comes again.
    pub(super) fn key_for(&self, name: Name) -> Key {
        match name {
            Name::Key(key) => key,
            Name::Registers(registers) => {
                // Relaxed: nothing but the number.
                let number = self.pages.numbers.fetch_add(1, Ordering::Relaxed);
                if number != 0 && number % HALF == 0 {
                    self.zap_all();
                }
                Key::new(Gfn(number % (2 * HALF)), registers.role)
            }
        }
    }
}

/// The guest table that entry `index` of the page above it leads to, by these PDPTE registers.
pub(super) fn table_of(pdptrs: &[u64; 4], index: usize) -> Gfn {
    Gpa(pdptrs[index % pdptrs.len()] & bits::ADDR).gfn()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::LEVELS;
    use crate::memory::{AllocatedMemory, SlotConfig};
    use crate::paging::Regs;
    use crate::shadow::{Context, Shape, Stats};
    use crate::sync::epoch::Collector;
    use std::sync::Arc;

    fn setup() -> (Engine, Context) {
        let tables = Arc::new(AllocatedMemory::new(1 << 20));
        let shape = Shape { levels: LEVELS, largest: 1, unsync: false, reserved: None };
        let engine = Engine::new(tables, shape, Collector::new());
        let memory = Arc::new(AllocatedMemory::new(1 << 16));
        engine.create_slot(SlotConfig::new(0, Gpa(0), memory)).unwrap();
        let context = engine.seat().unwrap();
        (engine, context)
    }

    /// The root that registers with these PDPTEs load.
    fn root(engine: &Engine, context: &Context, pdptrs: [u64; 4]) -> FrameId {
        let regs = Regs { cr4: bits::CR4_PAE, efer: 0, pdptrs, ..Regs::long_mode(0x1000) };
        let mode = PagingMode::new(&regs).unwrap();
        let name = engine.name_of_root(&mode, Regime::of(&regs, true));
        let root = engine.load_root(context, &Stats::default(), name).unwrap().unwrap();
        let key = engine.frames.page(root).key();
        assert_eq!((engine.name_of(root, key), name.pdptrs()), (name, Some(pdptrs)));
        root
    }

    #[test]
    fn each_register_counts() {
        let (engine, context) = setup();
        let values = [[0x2001, 0, 0, 0], [0, 0x2001, 0, 0], [0, 0, 0, 0x2001], [0x2009, 0, 0, 0]];
        let roots = values.map(|pdptrs| root(&engine, &context, pdptrs));
        for (i, pdptrs) in values.into_iter().enumerate() {
            assert_eq!(root(&engine, &context, pdptrs), roots[i]);
            assert!(roots[..i].iter().all(|other| *other != roots[i]));
        }
        let number = |root: FrameId| engine.frames.page(root).key().gfn().0;
        assert_eq!(roots.map(number), [0, 1, 2, 3]);
    }

    /// The numbers come to their end, and each half of them finds the pages of its last time obsolete.
    #[test]
    fn numbers_come_again() {
        let (engine, context) = setup();
        let number = |root: FrameId| engine.frames.page(root).key().gfn().0;
        let mut new = 0;
        let mut load = || {
            new += 1;
            root(&engine, &context, [new << 12 | 1, 0, 0, 0])
        };
        let first = load();
        engine.pages.numbers.store(HALF - 1, Ordering::Relaxed);
        let last = load();
        assert!(engine.is_current(first) && engine.is_current(last));
        let upper = load();
        assert_eq!((number(first), number(last), number(upper)), (0, HALF - 1, HALF));
        assert!(!engine.is_current(first) && !engine.is_current(last));
        assert!(engine.is_current(upper));
        engine.pages.numbers.store(2 * HALF - 1, Ordering::Relaxed);
        let (end, again) = (load(), load());
        assert_eq!((number(end), number(again)), (2 * HALF - 1, 0));
        assert!(!engine.is_current(upper) && !engine.is_current(end) && engine.is_current(again));
    }
}
