// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The audit finds each kind of disagreement, and says which.

use super::*;
use crate::addr::{Gpa, Gva, LEVELS, Machine};
use crate::memory::{Alias, AllocatedMemory, Backing, SlotConfig, SlotFlags, SlotId};
use crate::paging::Regs;
use crate::shadow::frames::UNPROTECTED;
use crate::shadow::{Name, Processor, Shape, index};
use crate::sync::epoch::Collector;
use crate::vcpu::{SoftVcpu, Vcpu};
use std::sync::Arc;

struct Unkicked;
impl Processor for Unkicked {
    fn kick(&self) {}
}

const DATA: Gva = Gva(0x1000);
const READ_ONLY: Gva = Gva(0x2000);
const DEVICE: Gva = Gva(0x3000);
/// The data by way of an entry above that grants neither writing nor execution.
const NARROW: Gva = Gva(0x20_1000);
/// A block in a slot of its own, without a log.
const BLOCK: Gva = Gva(0x40_0000);
/// The data again, in a page of 1 GiB.
const LARGE: Gva = Gva(0x4000_5000);

/// A guest that has touched each kind of page, under write-protection for the dirty log.
struct Setup {
    engine: Arc<Engine>,
    memory: Arc<AllocatedMemory>,
    cpu: SoftVcpu,
}

impl Setup {
    fn new(unsync: bool) -> Self {
        Self::with(LEVELS, unsync)
    }

    fn with(levels: u8, unsync: bool) -> Self {
        let tables = Arc::new(AllocatedMemory::new(1 << 20));
        let shape = Shape { levels, largest: 2, unsync, reserved: None };
        let engine = Arc::new(Engine::new(tables, shape, Collector::new()));
        let memory = Arc::new(AllocatedMemory::new(1 << 16));
        let dirty = DirtyMode::WriteProtect;
        let flags = SlotFlags { read_only: false, dirty };
        engine
            .create_slot(SlotConfig { flags, ..SlotConfig::new(0, Gpa(0), memory.clone()) })
            .unwrap();
        let blocks = Arc::new(AllocatedMemory::at(1 << 22, Machine(1 << 40)));
        engine.create_slot(SlotConfig::new(1, Gpa(BLOCK.0), blocks)).unwrap();
        let entries = [
            (0x1000, 0x2007),
            (0x2000, 0x3007),
            (0x2008, 0xe7),
            (0x3000, 0x4007),
            (0x3008, 0x4005 | bits::NX),
            (0x3010, BLOCK.0 | 0xe7),
            (0x4008, 0x5067),
            (0x4010, 0x6065),
            (0x4018, 0x10_0000_0067),
            // The leaf table, by way of which it is written natively.
            (0x4020, 0x4067),
        ];
        for (at, value) in entries {
            memory.words()[at / 8].store(value, Ordering::Relaxed);
        }
        let regs =
            Regs { efer: Regs::long_mode(0).efer | bits::EFER_NXE, ..Regs::long_mode(0x1000) };
        let vcpu = Vcpu::new(Arc::clone(&engine), Arc::new(Unkicked), regs).unwrap();
        let mut cpu = SoftVcpu::new(vcpu);
        cpu.session().store(DATA, &[1], true).unwrap();
        cpu.session().load(READ_ONLY, &mut [0], true).unwrap();
        cpu.session().load(DEVICE, &mut [0], true).unwrap_err();
        cpu.session().load(NARROW, &mut [0], true).unwrap();
        cpu.session().store(BLOCK, &[1], true).unwrap();
        cpu.session().load(LARGE, &mut [0], true).unwrap();
        let mut setup = Self { engine, memory, cpu };
        if unsync {
            setup.write_natively();
        }
        setup.audit().unwrap();
        setup
    }

    /// The guest writes its leaf table, in an entry that it does not use.
    fn write_natively(&mut self) {
        self.cpu.session().store(Gva(0x4000), &0x5067u64.to_le_bytes(), true).unwrap();
        assert!(self.engine.is_written_natively(self.leaf(DATA).frame()));
    }

    /// Writes a guest entry past the engine.
    fn edit(&self, at: usize, value: u64) {
        self.memory.words()[at / 8].store(value, Ordering::Relaxed);
    }

    fn audit(&self) -> Result<AuditReport, Disagreement> {
        let handle = self.engine.collector.register();
        self.engine.audit(&handle.pin())
    }

    fn root(&self) -> FrameId {
        self.engine.flush.roots()[0]
    }

    fn leaf(&self, gva: Gva) -> Location {
        self.engine.leaf_at(self.root(), gva).unwrap()
    }

    /// The entry of the root that leads to the data.
    fn link(&self) -> (Location, FrameId) {
        let at = self.above(DATA, self.engine.levels());
        (at, self.engine.table_at(self.engine.entry(at).machine()).unwrap())
    }

    /// The entry at that level on the way to the address.
    fn above(&self, gva: Gva, level: u8) -> Location {
        let at = |table, level| Location::new(table, index(gva, level));
        (level..self.engine.levels()).rev().fold(
            at(self.root(), self.engine.levels()),
            |above, level| {
                at(self.engine.table_at(self.engine.entry(above).machine()).unwrap(), level)
            },
        )
    }

    /// An APIC answers at the data's frame, and the entry is there as before.
    fn name_apic(&self) {
        let (at, old) = (self.leaf(DATA), self.engine.entry(self.leaf(DATA)));
        self.engine.move_apic(None, Some(Gfn(5))).unwrap();
        self.set(at, |_| old);
    }

    fn set(&self, at: Location, spte: impl FnOnce(Spte) -> Spte) {
        let old = self.engine.entry(at);
        self.engine.frames.entry(at).store(spte(old).0, Ordering::Relaxed);
    }

    fn slot(&self) -> Arc<Slot> {
        self.slot_of(0)
    }

    fn slot_of(&self, id: u32) -> Arc<Slot> {
        Arc::clone(self.engine.memory.snapshot().by_id(SlotId(id)).unwrap())
    }
}

/// What the page in the frame is found by.
fn named(engine: &Engine, frame: FrameId) -> Name {
    engine.name_of(frame, engine.frames.page(frame).key())
}

/// What the audit says after `spoil`.
fn found(spoil: impl FnOnce(&Setup)) -> Disagreement {
    let setup = Setup::new(false);
    spoil(&setup);
    setup.audit().unwrap_err()
}

/// What it says of an entry at that level.
#[track_caller]
fn why(level: u8, spoil: impl FnOnce(&Setup)) -> &'static str {
    entry_at(level, found(spoil))
}

/// The same where the guest writes the leaf table natively.
#[track_caller]
fn why_unsync(spoil: impl FnOnce(&Setup)) -> &'static str {
    let setup = Setup::new(true);
    spoil(&setup);
    entry_at(1, setup.audit().unwrap_err())
}

#[track_caller]
fn entry_at(level: u8, found: Disagreement) -> &'static str {
    match found {
        Disagreement::Entry { level: at, why, .. } if at == level => why,
        other => panic!("{other}"),
    }
}

/// What it says of an entry of the leaf table.
#[track_caller]
fn wrong(gva: Gva, spte: impl FnOnce(Spte) -> Spte) -> &'static str {
    why(1, |setup| setup.set(setup.leaf(gva), spte))
}

/// An entry that may do everything.
fn all(old: Spte) -> Spte {
    Spte::page(old.machine(), true, true, true)
}

#[test]
fn a_wrong_leaf_is_found() {
    let page = "maps another page than the guest's entry";
    assert_eq!(wrong(DATA, |old| Spte(old.0 + 0x1000)), page);
    let grants = "says that the guest's entries grant writing, they do not";
    assert_eq!(wrong(READ_ONLY, |old| all(old).granting_write(true)), grants);
    let writable = "is writable, the guest's entries do not say so";
    assert_eq!(wrong(READ_ONLY, all), writable);
    let elsewhere = "is MMIO at another frame than the guest's entry";
    assert_eq!(wrong(DEVICE, |old| Spte(old.0 + 8)), elsewhere);
    let absent = "the guest's entry is not present and accessed";
    let unmapped = Gva(0x9000);
    let one = |setup: &Setup| setup.engine.entry(setup.leaf(DATA));
    let why = found(|setup| setup.set(setup.leaf(unmapped), |_| one(setup)));
    assert!(matches!(why, Disagreement::Entry { why, .. } if why == absent), "{why}");
}

#[test]
fn an_unfinished_operation_is_found() {
    for left in [Spte::FROZEN, Spte::pending(7)] {
        let why = found(|setup| setup.set(setup.leaf(Gva(0x9000)), |_| left));
        assert!(
            matches!(why, Disagreement::Unfinished { level: 1, value, .. } if value == left.0),
            "{why}"
        );
    }
    let setup = Setup::new(false);
    let narrowing = setup.engine.flush.narrow();
    assert_eq!(setup.audit(), Err(Disagreement::NotQuiescent(1)));
    drop(narrowing);
    setup.audit().unwrap();
}

#[test]
fn a_wrong_link_is_found() {
    let links = |list, spoil: fn(&Setup)| match found(spoil) {
        Disagreement::Links { list: found, listed, present, .. } => {
            assert_eq!(found, list);
            (listed, present)
        }
        other => panic!("{other}"),
    };
    let lost = links("rmap", |setup| {
        assert!(setup.slot().region().rmap.get_or_alloc(5).remove(setup.leaf(DATA).word()));
    });
    assert_eq!(lost, (0, 1));
    let left = links("rmap", |setup| {
        setup.slot().region().rmap.get_or_alloc(8).add(setup.leaf(DATA).word());
    });
    assert_eq!(left, (1, 0));
    let parent = links("parents", |setup| {
        let (at, child) = setup.link();
        assert!(setup.engine.frames.page(child).parents.remove(at.word()));
    });
    assert_eq!(parent, (0, 1));
    let shadow = links("shadows", |setup| setup.slot().region().add_shadow(8, 40));
    assert_eq!(shadow, (1, 0));
}

#[test]
fn wrong_counts_are_found() {
    let roots = found(|setup| setup.engine.hold_root(setup.root()));
    assert!(matches!(roots, Disagreement::Roots { counted: 2.., .. }), "{roots}");
    let given_up = found(|setup| setup.engine.release_root(setup.root()));
    assert!(matches!(given_up, Disagreement::Roots { .. }), "{given_up}");
    let quota = found(|setup| assert!(setup.engine.frames.allocate().is_some()));
    assert!(
        matches!(quota, Disagreement::Quota { counted, used } if counted == used + 1),
        "{quota}"
    );
    let block = found(|setup| {
        let root = u64::from(setup.root().0) + 1;
        assert!(setup.slot().region().shadows.get_or_alloc(1).remove(root));
    });
    assert!(matches!(block, Disagreement::Count { level: 2, counted: 5, .. }), "{block}");
    let hash = found(|setup| {
        let (_, child) = setup.link();
        setup.engine.pages.remove_if_equal(&named(&setup.engine, child), child);
    });
    assert!(matches!(hash, Disagreement::Hash { .. }), "{hash}");
}

/// A root of PAE paging that is found by other values than it stands for, or leads elsewhere than they say.
#[test]
fn wrong_registers_are_found() {
    let setup = Setup::new(false);
    let engine = &setup.engine;
    let pae = |pdptrs| Regs { cr4: bits::CR4_PAE, efer: 0, pdptrs, ..Regs::long_mode(0x1000) };
    let regs = pae([0x3001, 0, 0, 0]);
    let vcpu = Vcpu::new(Arc::clone(engine), Arc::new(Unkicked), regs).unwrap();
    let mut cpu = SoftVcpu::new(vcpu);
    cpu.session().load(DATA, &mut [0], true).unwrap();
    setup.audit().unwrap();
    let roots = engine.flush.roots();
    let root = roots.into_iter().find(|root| named(engine, *root).pdptrs().is_some()).unwrap();
    let name = named(engine, root);
    // Nothing below entry 3 was used.
    for (wrong, leads_astray) in [([0x3001, 0, 0, 1], false), ([0x2001, 0, 0, 0], true)] {
        engine.frames.stands_for(root, wrong);
        let why = setup.audit().unwrap_err();
        assert!(matches!(why, Disagreement::Hash { frame, .. } if frame == root.0), "{why}");
        assert!(engine.pages.remove_if_equal(&name, root));
        let other = named(engine, root);
        engine.pages.insert_if_absent(other, root).unwrap();
        let another = "points at a page for another root";
        let audit = setup.audit();
        let found = matches!(audit, Err(Disagreement::Entry { why, .. }) if why == another);
        assert_eq!((found, audit.is_ok()), (leads_astray, !leads_astray), "{audit:?}");
        // As it was; and a name too many.
        engine.frames.stands_for(root, [0x3001, 0, 0, 0]);
        engine.pages.insert_if_absent(name, root).unwrap();
        let why = setup.audit().unwrap_err();
        assert!(matches!(why, Disagreement::Hash { .. }), "{why}");
        assert!(engine.pages.remove_if_equal(&other, root));
        setup.audit().unwrap();
    }
}

#[test]
fn a_table_that_was_torn_down_by_half_is_found() {
    let why = found(|setup| {
        let (_, child) = setup.link();
        let page = setup.engine.frames.page(child);
        setup.engine.pages.remove_if_equal(&named(&setup.engine, child), child);
        page.state.store(state::ZAPPING, Ordering::Relaxed);
    });
    assert!(matches!(why, Disagreement::Entry { why: "points at a dead page", .. }), "{why}");
}

#[test]
fn a_table_above_that_does_not_know_of_native_writes_is_found() {
    let setup = Setup::new(true);
    let leaf = setup.leaf(DATA).frame();
    assert!(setup.engine.is_written_natively(leaf));
    let above = Location::from_word(setup.engine.frames.page(leaf).parents.only().unwrap()).frame();
    assert!(setup.engine.frames.page(above).below.remove(u64::from(leaf.0) + 1));
    assert_eq!(setup.audit(), Err(Disagreement::Unmarked { frame: leaf.0, above: above.0 }));
}

/// The guest's entry has changed, and the shadow has not heard of it.
#[test]
fn a_leaf_that_grants_more_than_the_guests_entry_is_found() {
    let edited = |value| why(1, |setup: &Setup| setup.edit(0x4008, value));
    assert_eq!(edited(0x5063), "lets the user reach a supervisor page");
    assert_eq!(edited(0x5067 | bits::NX), "is executable, the guest's entries are not");
    let grants = "says that the guest's entries grant writing, they do not";
    assert_eq!((edited(0x5065), edited(0x5027)), (grants, grants));
    assert_eq!(edited(0x5047), "the guest's entry is not present and accessed");
    assert_eq!(edited(0x6067), "maps another page than the guest's entry");
    assert_eq!(edited(0x20_0067), "maps a frame without memory");
    let edited = |value| why(2, |setup: &Setup| setup.edit(0x3010, value));
    assert_eq!(edited(BLOCK.0 | 0x20e7), "the guest's entry has reserved bits set");
    assert_eq!(edited(0x4067), "maps memory, the guest's entry is a table");
}

/// What the memory map, the host and the log forbid is found whether the guest writes the entry's table
/// natively or not.
#[test]
fn a_leaf_that_its_page_does_not_allow_is_found() {
    let taken = |setup: &Setup| setup.slot().region().invalid.begin(5..6);
    let host = |setup: &Setup| setup.slot().region().set_host_read_only(5..6, true);
    let table = |setup: &Setup| {
        setup.slot().region().add_shadow(5, u64::from(setup.root().0) + 1);
    };
    let unlogged = |setup: &Setup| {
        setup.slot().region().dirty.clear(0, 1 << 5);
    };
    let read_only = |setup: &Setup| {
        let (at, old) = (setup.leaf(DATA), setup.engine.entry(setup.leaf(DATA)));
        let flags = SlotFlags { read_only: true, ..setup.slot().flags() };
        setup.engine.set_slot_flags(SlotId(0), flags).unwrap();
        setup.set(at, |_| old);
    };
    let grants = |setup: &Setup| setup.set(setup.leaf(DATA), all);
    let forbidden = "is writable, but the slot or the host forbids it";
    let cases: [(fn(&Setup), _); 7] = [
        (taken, "maps a page that the host has taken away"),
        (host, forbidden),
        (read_only, forbidden),
        (table, "is writable, but maps a shadowed guest table"),
        (unlogged, "is writable, but the page is not in the dirty log"),
        (grants, "is writable, the guest's entries do not say so"),
        (Setup::name_apic, "maps the page of a local APIC"),
    ];
    for (spoil, expected) in cases {
        assert_eq!((why(1, spoil), why_unsync(spoil)), (expected, expected));
    }
}

/// Before the guest flushes, the shadow may grant what its entry granted before.
#[test]
fn a_native_write_is_no_disagreement_before_its_flush() {
    let guest = [0, 0x5065, 0x5063, 0x5047, 0x5067 | bits::NX, 0x6067, 0x20_0067, 0x7];
    for (at, value) in [0x4008, 0x4010, 0x4018].into_iter().flat_map(|at| guest.map(|v| (at, v))) {
        let mut setup = Setup::new(true);
        setup.edit(at, value);
        setup.audit().unwrap();
        setup.cpu.session().flush();
        setup.audit().unwrap();
    }
}

/// The tables above grant no more, whatever the guest wrote in this one.
#[test]
fn an_unsync_leaf_that_no_entry_could_grant_is_found() {
    let set = |gva, spte: fn(Spte) -> Spte| why_unsync(|setup| setup.set(setup.leaf(gva), spte));
    let executable = "is executable, the guest's entries are not";
    assert_eq!(set(NARROW, |old| Spte::page(old.machine(), false, true, true)), executable);
    let grants = "says that the guest's entries grant writing, they do not";
    assert_eq!(set(NARROW, |old| old.granting_write(true)), grants);
    let nowhere = "maps a frame without memory";
    assert_eq!(set(DATA, |_| all(Spte(1 << 45)).granting_write(true)), nowhere);
}

/// The same memory may be mapped by another name than the one at which an APIC answers.
#[test]
fn the_page_of_an_apic_may_be_mapped_by_another_name() {
    let mut setup = Setup::new(true);
    let (number, base) = (0, Gpa(0x20_0000));
    setup.engine.set_alias(Alias { number, base, size: 0x1000, target: Gpa(0x5000) }).unwrap();
    setup.engine.move_apic(None, Some(Gfn(5))).unwrap();
    setup.edit(0x4028, 0x20_0067);
    setup.cpu.session().load(Gva(0x5000), &mut [0], true).unwrap();
    setup.write_natively();
    let mapped = setup.engine.entry(setup.leaf(Gva(0x5000))).machine();
    assert_eq!(mapped, Machine(setup.memory.machine().0 + 0x5000));
    setup.audit().unwrap();
    // An APIC at that name as well.
    let (at, old) = (setup.leaf(Gva(0x5000)), setup.engine.entry(setup.leaf(Gva(0x5000))));
    setup.engine.move_apic(None, Some(base.gfn())).unwrap();
    setup.audit().unwrap();
    setup.set(at, |_| old);
    assert_eq!(entry_at(1, setup.audit().unwrap_err()), "maps the page of a local APIC");
}

#[test]
fn a_wrong_block_is_found() {
    let touched = "maps a block that the host has touched: R20";
    let host = |setup: &Setup| setup.slot_of(1).region().set_host_read_only(7..8, true);
    let away = |setup: &Setup| setup.slot_of(1).region().invalid.begin(511..512);
    assert_eq!((why(2, host), why(2, away)), (touched, touched));
    let table = why(2, |setup| {
        setup.slot_of(1).region().add_shadow(7, u64::from(setup.root().0) + 1);
    });
    assert_eq!(table, "maps a block with a guest table in it: R20");
    /// The entry is there after this as before.
    fn despite(setup: &Setup, change: impl FnOnce(&Engine)) {
        let (at, old) = (setup.above(BLOCK, 2), setup.engine.entry(setup.above(BLOCK, 2)));
        assert!(old.is_large() && old.is_writable());
        change(&setup.engine);
        setup.set(at, |_| old);
    }
    let apic = |engine: &Engine| {
        engine.move_apic(None, Some(Gfn(Gpa(BLOCK.0).gfn().0 + 9))).unwrap();
    };
    assert_eq!(why(2, |setup| despite(setup, apic)), "maps the page of a local APIC");
    let gone = |engine: &Engine| {
        engine.delete_slot(SlotId(1)).unwrap();
    };
    assert_eq!(why(2, |setup| despite(setup, gone)), "maps a frame without memory");
    // A block under a log has no page of its own to be in it.
    for dirty in [DirtyMode::DirtyBits, DirtyMode::WriteProtect] {
        let log = |engine: &Engine| {
            engine.set_slot_flags(SlotId(1), SlotFlags { read_only: false, dirty }).unwrap();
        };
        let unlogged = "is writable, but the page is not in the dirty log";
        assert_eq!(why(2, |setup| despite(setup, log)), unlogged);
    }
}

#[test]
fn a_wrong_link_downwards_is_found() {
    fn points(setup: &Setup, at: Location, machine: Machine) {
        setup.set(at, |_| Spte::table(machine));
    }
    let leaf = |setup: &Setup| setup.engine.frames.machine(setup.leaf(DATA).frame());
    let outside = why(4, |setup| points(setup, setup.link().0, Machine(1 << 45)));
    assert_eq!(outside, "points outside the tables");
    let other = "points at a page for another table or role";
    assert_eq!(why(4, |setup| points(setup, setup.link().0, leaf(setup))), other);
    assert_eq!(why(2, |setup| points(setup, setup.above(NARROW, 2), leaf(setup))), other);
    let absent = why(3, |setup| setup.edit(0x2000, 0x3007));
    assert_eq!(absent, "the guest's entry is not present and accessed");
    let stretch = why(2, |setup| points(setup, setup.above(LARGE, 2), leaf(setup)));
    assert_eq!(stretch, "points at another stretch");
    let setup = Setup::with(LEVELS + 1, false);
    points(&setup, setup.link().0, leaf(&setup));
    let why = entry_at(LEVELS + 1, setup.audit().unwrap_err());
    assert_eq!(why, "points at a page for another root");
}

#[test]
fn a_table_that_is_not_protected_is_found() {
    let why = why(1, |setup| {
        let page = setup.engine.frames.page(setup.leaf(DATA).frame());
        page.protected.store(UNPROTECTED.0, Ordering::Relaxed);
    });
    assert_eq!(why, "its guest table is not write-protected yet");
}

#[test]
fn a_wrong_device_is_found() {
    let device = Gpa(0x10_0000_0000).gfn();
    let there = |setup: &Setup| {
        let memory = Arc::new(AllocatedMemory::new(1 << 12));
        setup.engine.create_slot(SlotConfig::new(2, device.gpa(), memory)).unwrap();
        let now = setup.engine.memory.snapshot().generation();
        setup.set(setup.leaf(DEVICE), |_| Spte::mmio(device, false, now));
    };
    let memory = "is MMIO, but there is memory: R09";
    assert_eq!((why(1, there), why_unsync(there)), (memory, memory));
    let mmio = |setup: &Setup, gva| {
        let now = setup.engine.memory.snapshot().generation();
        setup.set(setup.leaf(gva), |_| Spte::mmio(device, true, now));
    };
    let writable = "is writable MMIO, the guest's entries are not";
    let edited = |setup: &Setup| {
        setup.edit(0x4018, 0x10_0000_0065);
        mmio(setup, DEVICE);
    };
    assert_eq!(why(1, edited), writable);
    let supervisor = why(1, |setup| setup.edit(0x4018, 0x10_0000_0063));
    assert_eq!(supervisor, "lets the user reach a supervisor page");
    let unsync = |setup: &Setup| mmio(setup, Gva(0x20_3000));
    assert_eq!(why_unsync(unsync), writable);
}

/// What a page from before everything was zapped holds means nothing any more, but nothing may be left
/// half done in it.
#[test]
fn an_obsolete_page_with_an_unfinished_operation_is_found() {
    for left in [Spte::FROZEN, Spte::pending(7)] {
        let setup = Setup::new(false);
        let (at, device) = (setup.leaf(Gva(0x9000)), setup.leaf(DEVICE));
        setup.engine.zap_all();
        assert!(setup.engine.entry(device).is_mmio());
        assert_eq!(setup.audit().unwrap().pages, 0);
        setup.set(at, |_| left);
        let found = setup.audit().unwrap_err();
        assert!(matches!(found, Disagreement::Unfinished { level: 1, .. }), "{found}");
    }
}

#[test]
fn a_torn_down_page_that_is_in_use_is_found() {
    let spoilt = |spoil: fn(&Setup, FrameId, Name)| {
        let setup = Setup::new(false);
        let (_, child) = setup.link();
        let (name, handle) = (named(&setup.engine, child), setup.engine.collector.register());
        let guard = handle.pin();
        setup.engine.tear_down(&guard, child).unwrap();
        assert_eq!(setup.audit().unwrap().retired, 1);
        spoil(&setup, child, name);
        setup.audit().unwrap_err()
    };
    let dead = |found| match found {
        Disagreement::Dead { why, .. } => why,
        other => panic!("{other}"),
    };
    let linked = spoilt(|setup, frame, _| {
        setup.engine.frames.page(frame).parents.add(Location::new(setup.root(), 0).word());
    });
    assert_eq!(dead(linked), "entries still point at it");
    let full =
        spoilt(|setup, frame, _| setup.set(Location::new(frame, 0), |_| Spte::table(Machine(0))));
    assert_eq!(dead(full), "it maps something: R05");
    let hashed = spoilt(|setup, frame, name| {
        setup.engine.pages.insert_if_absent(name, frame).unwrap();
    });
    assert!(matches!(hashed, Disagreement::Hash { .. }), "{hashed}");
    let homeless = found(|setup| {
        let (hidden, _) = setup.engine.memory.snapshot().hiding(SlotId(0)).unwrap();
        setup.engine.publish(hidden, &mut setup.engine.collector.register());
    });
    assert_eq!(dead(homeless), "shadows no memory");
}
