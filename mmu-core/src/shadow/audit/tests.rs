// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The audit finds each kind of disagreement, and says which.

use super::*;
use crate::addr::{Gpa, Gva, LEVELS};
use crate::memory::{AllocatedMemory, Backing, SlotConfig, SlotFlags, SlotId};
use crate::paging::Regs;
use crate::shadow::{Name, Processor, Shape};
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

/// A guest that has touched each kind of page, under write-protection for the dirty log.
struct Setup {
    engine: Arc<Engine>,
    _cpu: SoftVcpu,
}

impl Setup {
    fn new(unsync: bool) -> Self {
        let tables = Arc::new(AllocatedMemory::new(1 << 20));
        let shape = Shape { levels: LEVELS, largest: 2, unsync, reserved: None };
        let engine = Arc::new(Engine::new(tables, shape, Collector::new()));
        let memory = Arc::new(AllocatedMemory::new(1 << 16));
        let dirty = DirtyMode::WriteProtect;
        let flags = SlotFlags { read_only: false, dirty };
        engine
            .create_slot(SlotConfig { flags, ..SlotConfig::new(0, Gpa(0), memory.clone()) })
            .unwrap();
        let entries = [
            (0x1000, 0x2007),
            (0x2000, 0x3007),
            (0x3000, 0x4007),
            (0x4008, 0x5067),
            (0x4010, 0x6065),
            (0x4018, 0x10_0000_0067),
            // The leaf table, by way of which it is written natively.
            (0x4020, 0x4067),
        ];
        for (at, value) in entries {
            memory.words()[at / 8].store(value, Ordering::Relaxed);
        }
        let regs = Regs::long_mode(0x1000);
        let vcpu = Vcpu::new(Arc::clone(&engine), Arc::new(Unkicked), regs).unwrap();
        let mut cpu = SoftVcpu::new(vcpu);
        cpu.session().store(DATA, &[1], true).unwrap();
        cpu.session().load(READ_ONLY, &mut [0], true).unwrap();
        cpu.session().load(DEVICE, &mut [0], true).unwrap_err();
        if unsync {
            cpu.session().store(Gva(0x4000), &0x5067u64.to_le_bytes(), true).unwrap();
        }
        let setup = Self { engine, _cpu: cpu };
        setup.audit().unwrap();
        setup
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
        let at = Location::new(self.root(), 0);
        (at, self.engine.table_at(self.engine.entry(at).machine()).unwrap())
    }

    fn set(&self, at: Location, spte: impl FnOnce(Spte) -> Spte) {
        let old = self.engine.entry(at);
        self.engine.frames.entry(at).store(spte(old).0, Ordering::Relaxed);
    }

    fn slot(&self) -> Arc<crate::memory::Slot> {
        Arc::clone(self.engine.memory.snapshot().by_id(SlotId(0)).unwrap())
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

/// What it says of an entry of the leaf table.
fn wrong(gva: Gva, spte: impl FnOnce(Spte) -> Spte) -> &'static str {
    match found(|setup| setup.set(setup.leaf(gva), spte)) {
        Disagreement::Entry { level: 1, why, .. } => why,
        other => panic!("{other}"),
    }
}

#[test]
fn a_wrong_leaf_is_found() {
    let all = |old: Spte| Spte::page(old.machine(), true, true, true);
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
    assert!(matches!(block, Disagreement::Count { level: 2, counted: 4, .. }), "{block}");
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
fn a_page_that_is_writable_and_not_logged_is_found() {
    let why = found(|setup| {
        setup.slot().region().dirty.clear(0, 1 << 5);
    });
    let unlogged = "is writable, but the page is not in the dirty log";
    assert!(matches!(why, Disagreement::Entry { why, .. } if why == unlogged), "{why}");
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
