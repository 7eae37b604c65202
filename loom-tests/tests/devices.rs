// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device bus: what is taken off it against the accesses that have found it (R30), and the ring of
//! coalesced writes (R37).
#![cfg(loom)]

use loom_tests::{model, spawn, then};
use mmu_core::mmio::{Answer, Bus, CoalescedRing, CoalescedWrite, Device, Initiator, Space};
use mmu_core::sync::{AtomicU32, Ordering, rules};
use std::sync::Arc;

/// What is known of a device from outside.
struct Fate {
    /// Accesses that are inside.
    inside: AtomicU32,
    /// Set when nobody may come any more.
    over: AtomicU32,
    freed: AtomicU32,
}

impl Fate {
    fn new() -> Arc<Self> {
        let zero = || AtomicU32::new(0);
        Arc::new(Self { inside: zero(), over: zero(), freed: zero() })
    }

    fn is_inside(&self) -> bool {
        self.inside.load(Ordering::Relaxed) != 0
    }

    /// Without its rule a bus leaks devices instead of freeing them under their users.
    fn assert_freed(&self, times: u32) {
        let freed = self.freed.load(Ordering::Relaxed);
        assert!(freed == times || !rules::in_force("R30"), "freed {freed} times, not {times}");
    }
}

struct Probe(Arc<Fate>);

impl Device for Probe {
    fn read(&self, _base: u64, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {
        self.0.inside.store(1, Ordering::Relaxed);
        let over = self.0.over.load(Ordering::Relaxed) != 0;
        assert!(!over, "R30: an access is in a device whose removal is over");
        self.0.inside.store(0, Ordering::Relaxed);
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        assert!(!self.0.is_inside(), "R30: a device was freed while an access was inside");
        self.0.freed.fetch_add(1, Ordering::Relaxed);
    }
}

/// A bus, its device, and a way onto it.
fn bus() -> (Bus, Arc<Fate>, Initiator) {
    let bus = Bus::new(Space::Mmio, Arc::default());
    let fate = Fate::new();
    bus.register(0x1000, 8, Arc::new(Probe(Arc::clone(&fate)))).unwrap();
    let initiator = bus.initiator();
    (bus, fate, initiator)
}

/// A device is removed while somebody writes to it, and the removal is watched: when it says that no
/// access is inside, none is, and none comes.
fn a_device_is_removed_during_an_access() {
    let (bus, fate, mut initiator) = bus();
    let writer = spawn(move || {
        let answer = initiator.write(0x1000, &[1]);
        assert!(matches!(answer, Answer::Device | Answer::Unhandled));
        initiator
    });
    let removal = bus.remove(0x1000).unwrap();
    let look = || {
        if removal.accesses() == 0 {
            assert!(!fate.is_inside(), "R30: an access is inside that nobody counts");
            fate.over.store(1, Ordering::Relaxed);
        }
    };
    then(look, || drop(writer.join().unwrap()));
    assert_eq!((removal.accesses(), removal.wait()), (0, Ok(())));
    fate.assert_freed(0);
    drop(removal);
    fate.assert_freed(1);
}

model!(
    r30_device_removed_during_access,
    r30_device_removed_during_access_mutant,
    "R30:",
    a_device_is_removed_during_an_access
);

/// A device is removed while somebody writes to it, and nobody waits: who is last frees it.
fn a_device_is_freed_by_its_last_access() {
    let (bus, fate, mut initiator) = bus();
    let writer = spawn(move || {
        let _ = initiator.write(0x1000, &[1]);
        initiator
    });
    drop(bus.remove(0x1000).unwrap());
    drop(writer.join().unwrap());
    fate.assert_freed(1);
}

model!(
    r30_device_freed_by_its_last_access,
    r30_device_freed_by_its_last_access_mutant,
    "R30:",
    a_device_is_freed_by_its_last_access
);

/// A device is added while somebody writes twice and leaves: the old table goes, its device stays.
fn accesses_meet_a_new_device() {
    let (bus, fate, mut initiator) = bus();
    let writer = spawn(move || {
        assert_eq!(initiator.write(0x1000, &[1]), Answer::Device);
        assert_eq!(initiator.write(0x1000, &[1]), Answer::Device);
        drop(initiator);
    });
    // Whoever makes an initiator looks for those that have gone.
    let another = bus.initiator();
    bus.register(0x2000, 8, Arc::new(Probe(Fate::new()))).unwrap();
    writer.join().unwrap();
    drop(another);
    drop(bus);
    fate.assert_freed(1);
}

model!(
    r30_accesses_meet_a_new_device,
    r30_accesses_meet_a_new_device_mutant,
    "R30:",
    accesses_meet_a_new_device
);

/// A coalesced range is removed while somebody writes to it: what was coalesced is in the ring then.
fn a_write_meets_the_end_of_its_range() {
    let ring = Arc::new(CoalescedRing::default());
    let bus = Bus::new(Space::Mmio, Arc::clone(&ring));
    bus.register_coalesced(0x1000, 8).unwrap();
    let mut initiator = bus.initiator();
    let writer = spawn(move || (initiator.write(0x1000, &[1]), initiator));
    bus.remove_coalesced(0x1000).unwrap();
    let coalesced = ring.drain().len();
    let (answer, initiator) = writer.join().unwrap();
    drop(initiator);
    match answer {
        Answer::Coalesced => assert_eq!(coalesced, 1, "R30: coalesced after the range had gone"),
        answer => assert_eq!((answer, coalesced), (Answer::Unhandled, 0)),
    }
}

model!(
    r30_write_meets_the_end_of_its_range,
    r30_write_meets_the_end_of_its_range_mutant,
    "R30:",
    a_write_meets_the_end_of_its_range
);

/// Two vCPUs fill the ring, and one drains it before an access of its own: its writes are in there,
/// whatever the other one is doing, and in the end every write was drained once.
fn writes_meet_a_drain() {
    let ring = Arc::new(CoalescedRing::default());
    let bus = Bus::new(Space::Mmio, Arc::clone(&ring));
    bus.register_coalesced(0x1000, 8).unwrap();
    let (mut one, mut two) = (bus.initiator(), bus.initiator());
    // Like an address, the last byte says which write this is: a torn one is of two.
    let write = |initiator: &mut Initiator, n: u8| {
        initiator.write(0x1000 + u64::from(n), &[n; 1]) == Answer::Coalesced
    };
    let number = |write: &CoalescedWrite| {
        let &[n] = write.data() else { panic!("R37: {write:?} was never made") };
        assert_eq!(write.address(), 0x1000 + u64::from(n), "R37: half of {write:?} is another");
        n
    };
    let other = spawn(move || (write(&mut two, 2), two));
    let mine = write(&mut one, 1);
    let mut drained: Vec<u8> = ring.drain().iter().map(number).collect();
    let seen = drained.contains(&1);
    let again = write(&mut one, 3);
    let (theirs, two) = other.join().unwrap();
    assert!(mine && theirs, "a ring with room was full");
    assert!(seen, "R37: a drain without a write that was made before it");
    assert!(again || !drained.contains(&2), "a ring with room was full");
    drained.extend(ring.drain().iter().map(number));
    let one_of = |n| drained.iter().filter(|seen| **seen == n).count();
    assert_eq!([one_of(1), one_of(2), one_of(3)], [1, 1, usize::from(again)], "R37: {drained:?}");
    drop((one, two));
}

model!(r37_writes_meet_a_drain, r37_writes_meet_a_drain_mutant, "R37:", writes_meet_a_drain);
