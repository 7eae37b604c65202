// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device bus while everything on it changes: devices that are removed under their users, and
//! threads that must not wait.

mod common;

use common::{Guest, PAGE};
use mmu_core::addr::Gpa;
use mmu_core::mmio::{
    Answer, Bus, CoalescedRing, Device, Doorbell, Initiator, Removal, Space, Trigger,
};
use mmu_core::shadow::PageRange;
use mmu_core::sync::WouldDeadlock;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::time::Duration;

const BASE: u64 = 0x1000;

fn bus() -> Bus {
    Bus::new(Space::Mmio, Arc::default())
}

/// A device whose accesses run a closure.
struct Does<F>(F);

impl<F: Fn() + Send + Sync> Device for Does<F> {
    fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        (self.0)();
    }

    fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {
        (self.0)();
    }
}

/// Counts up when called.
fn counter(count: &Arc<AtomicU64>) -> impl Fn() + Send + Sync + 'static {
    let count = Arc::clone(count);
    move || {
        count.fetch_add(1, Ordering::SeqCst);
    }
}

/// A device that says when an access is inside, keeps it there until it is told to go on, and
/// says when it is dropped.
struct Held {
    inside: Receiver<()>,
    go: Sender<()>,
    dropped: Arc<AtomicBool>,
}

/// Sets its flag when dropped.
struct Flag(Arc<AtomicBool>);

impl Flag {
    /// For closures that are to own it.
    fn keep(&self) {}
}

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Held {
    /// The handle, and what an access does.
    fn new() -> (Self, impl Fn() + Send + Sync) {
        let ((say, inside), (go, wait)) = (channel(), channel());
        let dropped = Arc::new(AtomicBool::new(false));
        let (flag, wait) = (Flag(Arc::clone(&dropped)), Mutex::new(wait));
        let access = move || {
            flag.keep();
            say.send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
        };
        (Self { inside, go, dropped }, access)
    }

    fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::SeqCst)
    }
}

/// An access is inside what `remove` takes away, until `body` has gone through.
fn during<T: ?Sized>(
    bus: &Bus,
    held: &Held,
    remove: impl FnOnce() -> Removal<T>,
    body: impl FnOnce(Removal<T>),
) {
    let mut cpu = bus.initiator();
    std::thread::scope(|s| {
        let access = s.spawn(move || {
            assert!(cpu.write(BASE, &[1]).is_done());
            cpu
        });
        held.inside.recv().unwrap();
        let removal = remove();
        // The access that comes now finds nothing.
        assert_eq!(bus.initiator().write(BASE, &[1]), Answer::Unhandled);
        assert_eq!(removal.accesses(), 1);
        body(removal);
        assert!(!access.is_finished() && !held.is_dropped());
        held.go.send(()).unwrap();
        let mut cpu = access.join().unwrap();
        assert_eq!(cpu.write(BASE, &[1]), Answer::Unhandled);
    });
}

#[test]
fn a_removed_device_is_dropped_when_its_last_access_ends() {
    let bus = bus();
    let (held, access) = Held::new();
    bus.register(BASE, 4, Arc::new(Does(access))).unwrap();
    during(&bus, &held, || bus.remove(BASE).unwrap(), drop);
    assert!(held.is_dropped());
}

#[test]
fn a_removed_doorbell_is_dropped_when_its_last_ring_ends() {
    let bus = bus();
    let (held, access) = Held::new();
    bus.register_doorbell(Trigger::any(BASE), Arc::new(access)).unwrap();
    during(&bus, &held, || bus.remove_doorbell(Trigger::any(BASE)).unwrap(), drop);
    assert!(held.is_dropped());
}

#[test]
fn a_removal_that_is_kept_keeps_the_device() {
    let bus = bus();
    let (held, access) = Held::new();
    bus.register(BASE, 4, Arc::new(Does(access))).unwrap();
    let kept = OnceLock::new();
    during(&bus, &held, || bus.remove(BASE).unwrap(), |removal| assert!(kept.set(removal).is_ok()));
    let removal = kept.get().unwrap();
    assert_eq!((removal.accesses(), removal.wait(), held.is_dropped()), (0, Ok(()), false));
    drop(kept);
    assert!(held.is_dropped());
}

#[test]
fn a_removal_waits_for_the_accesses_inside() {
    let bus = bus();
    let (held, access) = Held::new();
    bus.register(BASE, 4, Arc::new(Does(access))).unwrap();
    let mut cpus = [bus.initiator(), bus.initiator()];
    std::thread::scope(|s| {
        // The second one comes in when the first has left.
        for cpu in &mut cpus {
            s.spawn(move || assert_eq!(cpu.write(BASE, &[1]), Answer::Device));
        }
        held.inside.recv().unwrap();
        held.inside.recv().unwrap();
        let removal = bus.remove(BASE).unwrap();
        assert_eq!(removal.accesses(), 2);
        let waiter = s.spawn({
            let dropped = Arc::clone(&held.dropped);
            move || {
                removal.wait().unwrap();
                assert_eq!(removal.accesses(), 0);
                drop(removal);
                assert!(dropped.load(Ordering::SeqCst));
            }
        });
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiter.is_finished());
            held.go.send(()).unwrap();
        }
    });
}

#[test]
fn a_device_that_is_not_accessed_is_dropped_with_the_removal() {
    let (bus, dropped) = (bus(), Arc::new(AtomicBool::new(false)));
    let flag = Flag(Arc::clone(&dropped));
    bus.register(BASE, 4, Arc::new(Does(move || flag.keep()))).unwrap();
    // Neither a look at it nor another initiator keeps it.
    let mut cpu = bus.initiator();
    assert_eq!(cpu.write(BASE, &[1]), Answer::Device);
    let removal = bus.remove(BASE).unwrap();
    assert!(!dropped.load(Ordering::SeqCst));
    drop(removal);
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn devices_go_with_the_last_handle_of_their_bus() {
    let (bus, dropped) = (bus(), Arc::new(AtomicU64::new(0)));
    struct Counts(Arc<AtomicU64>);
    impl Counts {
        fn keep(&self) {}
    }
    impl Drop for Counts {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let counts = || Counts(Arc::clone(&dropped));
    for n in 0..3 {
        let (device, doorbell) = (counts(), counts());
        bus.register(n * 8, 8, Arc::new(Does(move || device.keep()))).unwrap();
        bus.register_doorbell(Trigger::any(n), Arc::new(move || doorbell.keep())).unwrap();
    }
    // A refused one goes at once.
    let refused = counts();
    assert!(bus.register(4, 8, Arc::new(Does(move || refused.keep()))).is_err());
    assert_eq!(dropped.swap(0, Ordering::SeqCst), 1);
    let (other, mut cpu) = (bus.clone(), bus.initiator());
    let removal = bus.remove(0).unwrap();
    drop((bus, other));
    assert_eq!(cpu.write(8, &[1]), Answer::Device);
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    drop(cpu);
    assert_eq!(dropped.load(Ordering::SeqCst), 5);
    drop(removal);
    assert_eq!(dropped.load(Ordering::SeqCst), 6);
}

#[test]
fn a_device_may_remove_itself_but_not_wait() {
    let (bus, dropped) = (bus(), Arc::new(AtomicBool::new(false)));
    let flag = Flag(Arc::clone(&dropped));
    let own = bus.clone();
    let device = move || {
        let removal = own.remove(BASE).unwrap();
        assert_eq!((removal.accesses(), removal.wait()), (1, Err(WouldDeadlock::InDevice)));
        // It may change the bus in any other way, too.
        own.register(BASE, 4, Arc::new(Does(|| ()))).unwrap();
        own.register_coalesced(BASE + 4, 4).unwrap();
        drop(removal);
        assert!(!flag.0.load(Ordering::SeqCst));
    };
    bus.register(BASE, 4, Arc::new(Does(device))).unwrap();
    let mut cpu = bus.initiator();
    assert_eq!(cpu.write(BASE, &[1]), Answer::Device);
    assert!(dropped.load(Ordering::SeqCst));
    assert_eq!(cpu.write(BASE, &[1]), Answer::Device);
    assert_eq!(cpu.write(BASE + 4, &[1]), Answer::Coalesced);
    bus.remove(BASE).unwrap().wait().unwrap();
}

#[test]
fn nobody_waits_inside_a_device_of_the_same_engine() {
    let guest = Guest::new(64 * PAGE, 0, 256, false);
    let other = bus();
    for bus in [guest.mmu.bus(), guest.mmu.ports(), &other] {
        bus.register(BASE, 4, Arc::new(Does(|| ()))).unwrap();
    }
    let mmu = guest.mmu.clone();
    let (stranger, removed) = (other.clone(), AtomicU64::new(0));
    let bell = move || {
        for bus in [mmu.bus(), mmu.ports()] {
            let removal = bus.remove(BASE).unwrap();
            assert_eq!((removal.accesses(), removal.wait()), (0, Err(WouldDeadlock::InDevice)));
            removed.fetch_add(1, Ordering::SeqCst);
        }
        stranger.remove(BASE).unwrap().wait().unwrap();
    };
    guest.mmu.bus().register_doorbell(Trigger::any(0), Arc::new(bell)).unwrap();
    assert_eq!(guest.mmu.bus().initiator().write(0, &[1]), Answer::Doorbell);
    // Outside again.
    guest.mmu.bus().register(BASE, 4, Arc::new(Does(|| ()))).unwrap();
    guest.mmu.bus().remove(BASE).unwrap().wait().unwrap();
    assert!(other.remove(BASE).is_err());
    // The doorbell holds the engine.
    guest.mmu.bus().clear();
}

/// A device may touch guest memory whose page a resolver brings, or change the memory map.
#[test]
fn resolvers_and_invalidating_threads_do_not_wait() {
    let guest = Guest::new(64 * PAGE, 0, 256, false);
    let mmu = &guest.mmu;
    let remove = || {
        mmu.bus().register(BASE, 4, Arc::new(Does(|| ()))).unwrap();
        mmu.bus().remove(BASE).unwrap()
    };
    let resolver = mmu.resolver();
    assert_eq!(remove().wait(), Err(WouldDeadlock::Resolver));
    drop(resolver);
    let taken = mmu.invalidate(PageRange::Guest { base: Gpa(0), size: PAGE }).unwrap();
    assert_eq!(remove().wait(), Err(WouldDeadlock::Invalidating));
    taken.end();
    assert_eq!(remove().wait(), Ok(()));
}

#[test]
fn a_panic_ends_an_access() {
    let bus = bus();
    bus.register(BASE, 4, Arc::new(Does(|| panic!("a device's own")))).unwrap();
    let mut cpu = bus.initiator();
    for _ in 0..2 {
        let access = || cpu.write(BASE, &[1]);
        assert!(catch_unwind(AssertUnwindSafe(access)).is_err());
    }
    let removal = bus.remove(BASE).unwrap();
    assert_eq!((removal.accesses(), removal.wait()), (0, Ok(())));
    assert_eq!(cpu.write(BASE, &[1]), Answer::Unhandled);
}

#[test]
fn a_device_makes_accesses_through_an_initiator_of_its_own() {
    let bus = bus();
    let rung = Arc::new(AtomicU64::new(0));
    bus.register_doorbell(Trigger::any(0), Arc::new(counter(&rung))).unwrap();
    let dma = Mutex::new(bus.initiator());
    let device = move || assert_eq!(dma.lock().unwrap().write(0, &[1]), Answer::Doorbell);
    bus.register(BASE, 4, Arc::new(Does(device))).unwrap();
    let mut cpu = bus.initiator();
    assert!(cpu.read(BASE, &mut [0; 4]));
    assert_eq!(rung.load(Ordering::SeqCst), 1);
    // The device holds its bus.
    bus.clear();
}

#[test]
fn a_cleared_bus_is_empty() {
    let (bus, dropped) = (bus(), Arc::new(AtomicBool::new(false)));
    let (flag, own) = (Flag(Arc::clone(&dropped)), bus.clone());
    let device = move || {
        flag.keep();
        own.clear();
    };
    bus.register(BASE, 8, Arc::new(Does(device))).unwrap();
    bus.register(BASE + 8, 8, Arc::new(Does(|| ()))).unwrap();
    bus.register_coalesced(BASE + 8, 8).unwrap();
    bus.register_doorbell(Trigger::any(0), Arc::new(|| ())).unwrap();
    let mut cpu = bus.initiator();
    assert_eq!(cpu.write(BASE, &[1]), Answer::Device);
    assert!(dropped.load(Ordering::SeqCst));
    for address in [BASE, BASE + 8, 0] {
        assert_eq!(cpu.write(address, &[1]), Answer::Unhandled);
    }
}

/// A device that must not be used once its removal has been waited for.
struct Numbered {
    number: u64,
    /// The removal has been waited for.
    over: Arc<AtomicBool>,
    inside: AtomicU64,
    dropped: Arc<AtomicU64>,
}

impl Numbered {
    fn access(&self) {
        self.inside.fetch_add(1, Ordering::SeqCst);
        assert!(!self.over.load(Ordering::SeqCst), "used after its removal");
        std::hint::black_box(self.number);
        assert!(!self.over.load(Ordering::SeqCst), "used after its removal");
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Device for Numbered {
    fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.number.to_le_bytes());
        self.access();
    }

    fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {
        self.access();
    }
}

impl Doorbell for Numbered {
    fn ring(&self) {
        self.access();
    }
}

impl Drop for Numbered {
    fn drop(&mut self) {
        assert_eq!(self.inside.load(Ordering::SeqCst), 0, "dropped under an access");
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// One place on the bus, whose devices are replaced one after the other; every third removal is not
/// waited for. Readers see the numbers rise, never a device whose removal has returned. Now and then a
/// device stays until each reader has met it, so that all of them run.
#[test]
fn accesses_meet_devices_that_come_and_go() {
    const ROUNDS: u64 = 1500;
    let bus = bus();
    // Neighbours, so that tables move in memory.
    for n in 0..20 {
        bus.register(0x10_0000 + n * 0x100, 0x100, Arc::new(Does(|| ()))).unwrap();
    }
    let dropped = Arc::new(AtomicU64::new(0));
    let (removed, done) = (AtomicU64::new(0), AtomicBool::new(false));
    // One more than the number of the last device that each reader has met.
    let met: [AtomicU64; 3] = Default::default();
    std::thread::scope(|s| {
        let mut readers = Vec::new();
        for (seed, met) in (0..).zip(&met) {
            let (bus, removed, done) = (&bus, &removed, &done);
            readers.push(s.spawn(move || {
                let mut cpu = bus.initiator();
                let (mut last, mut turn) = (0, seed);
                while !done.load(Ordering::Acquire) {
                    turn += 1;
                    if turn % 64 == 0 {
                        // Initiators come and go as well.
                        cpu = bus.initiator();
                    }
                    let floor = removed.load(Ordering::SeqCst);
                    let mut data = [0; 8];
                    match turn % 3 {
                        0 => assert_ne!(cpu.write(BASE, &data), Answer::Doorbell),
                        1 => assert_ne!(cpu.write(BASE + 8, &data), Answer::Device),
                        _ if cpu.read(BASE, &mut data) => {
                            let number = u64::from_le_bytes(data);
                            assert!(number >= floor, "{number} had been removed");
                            assert!(number >= last, "{number} came back after {last}");
                            last = number;
                            met.store(number + 1, Ordering::Relaxed);
                        }
                        _ => {}
                    }
                }
            }));
        }
        for number in 0..ROUNDS {
            let over = Arc::new(AtomicBool::new(false));
            let device = || {
                let (over, dropped) = (Arc::clone(&over), Arc::clone(&dropped));
                Arc::new(Numbered { number, over, inside: AtomicU64::new(0), dropped })
            };
            bus.register(BASE, 8, device()).unwrap();
            bus.register_doorbell(Trigger::any(BASE + 8), device()).unwrap();
            let all_met = || met.iter().all(|met| met.load(Ordering::Relaxed) > number);
            while number % 64 == 0 && !all_met() && !readers.iter().any(|r| r.is_finished()) {
                std::thread::yield_now();
            }
            if number % 16 == 0 {
                std::thread::yield_now();
            }
            let bell = bus.remove_doorbell(Trigger::any(BASE + 8)).unwrap();
            let removal = bus.remove(BASE).unwrap();
            removed.store(number + 1, Ordering::SeqCst);
            if number % 3 > 0 {
                removal.wait().unwrap();
                bell.wait().unwrap();
                over.store(true, Ordering::SeqCst);
                let before = dropped.load(Ordering::SeqCst);
                drop((removal, bell));
                assert!(dropped.load(Ordering::SeqCst) >= before + 2);
            }
        }
        done.store(true, Ordering::Release);
    });
    assert_eq!(dropped.load(Ordering::SeqCst), 2 * ROUNDS);
}

/// Several threads want one place: one at a time has it.
#[test]
fn one_of_several_gets_a_place() {
    const THREADS: u64 = 4;
    let (bus, holders) = (bus(), Arc::new(AtomicU64::new(0)));
    let won: u64 = std::thread::scope(|s| {
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                let (bus, holders) = (&bus, &holders);
                s.spawn(move || {
                    let mut won = 0;
                    for round in 0..500 {
                        // Ranges of different sizes that all have one address in common.
                        let base = 0x100 - (n + round) % 7;
                        if bus.register(base, 8, Arc::new(Does(|| ()))).is_err() {
                            continue;
                        }
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        assert!(bus.initiator().read(0x100, &mut [0]));
                        holders.fetch_sub(1, Ordering::SeqCst);
                        bus.remove(base).unwrap();
                        won += 1;
                    }
                    won
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(won > 0 && !bus.initiator().read(0x100, &mut [0]));
}

/// A vCPU's write: its number, and how many it has made.
fn stamp(vcpu: u64, count: u64) -> [u8; 8] {
    (vcpu << 32 | count).to_le_bytes()
}

/// Every write of every vCPU is carried out once, and each vCPU's in its order, whether it was
/// coalesced or found the ring full; while another thread drains as it likes.
#[test]
fn coalesced_writes_are_carried_out_once_and_in_order() {
    const VCPUS: u64 = 3;
    const WRITES: u64 = 6000;
    let ring = Arc::new(CoalescedRing::default());
    let [memory, ports] = [Space::Mmio, Space::Pio].map(|s| Bus::new(s, Arc::clone(&ring)));
    for bus in [&memory, &ports] {
        bus.register_coalesced(0x100, 0x100).unwrap();
    }
    // What a VMM keeps to put writes in order: whoever drains carries out what it got before
    // somebody else drains.
    let carried: Mutex<Vec<Vec<u64>>> = Mutex::new(vec![Vec::new(); VCPUS as usize]);
    let carry_out = |own: Option<[u8; 8]>| {
        let mut carried = carried.lock().unwrap();
        let mut one = |space, data: &[u8]| {
            let word = u64::from_le_bytes(data.try_into().unwrap());
            let (vcpu, count) = (word >> 32, word & 0xffff_ffff);
            assert_eq!(space == Space::Pio, count % 5 == 0);
            carried[vcpu as usize].push(count);
        };
        ring.drain().iter().for_each(|write| one(write.space(), write.data()));
        if let Some(data) = own {
            let pio = u64::from_le_bytes(data) & 0xffff_ffff;
            one(if pio % 5 == 0 { Space::Pio } else { Space::Mmio }, &data);
        }
    };
    let (begin, done) = (Barrier::new(VCPUS as usize), AtomicBool::new(false));
    let full = AtomicU64::new(0);
    std::thread::scope(|s| {
        let vcpus: Vec<_> = (0..VCPUS)
            .map(|vcpu| {
                let (memory, ports, begin, full) = (&memory, &ports, &begin, &full);
                let carry_out = &carry_out;
                s.spawn(move || {
                    let mut buses = [memory.initiator(), ports.initiator()];
                    begin.wait();
                    for count in 0..WRITES {
                        let cpu: &mut Initiator = &mut buses[usize::from(count % 5 == 0)];
                        let data = stamp(vcpu, count);
                        match cpu.write(0x100 + count % 0xf9, &data) {
                            Answer::Coalesced => {}
                            Answer::RingFull => {
                                full.fetch_add(1, Ordering::Relaxed);
                                carry_out(Some(data));
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                })
            })
            .collect();
        s.spawn(|| {
            while !done.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(200));
                carry_out(None);
            }
        });
        let ended: Vec<_> = vcpus.into_iter().map(|vcpu| vcpu.join()).collect();
        done.store(true, Ordering::Release);
        assert!(ended.iter().all(Result::is_ok));
    });
    carry_out(None);
    let carried = carried.into_inner().unwrap();
    for counts in carried {
        assert!(counts.into_iter().eq(0..WRITES));
    }
    assert!(full.into_inner() > 0, "the ring was never full");
}

/// A range whose coalescing ends while vCPUs write: what was coalesced is in the ring, the rest went to
/// the device, in each vCPU's order.
#[test]
fn no_write_is_coalesced_after_its_range_has_gone() {
    for round in 0..300u64 {
        let bus = bus();
        let made = Arc::new(AtomicU64::new(0));
        bus.register(BASE, 8, Arc::new(Does(counter(&made)))).unwrap();
        bus.register_coalesced(BASE, 8).unwrap();
        std::thread::scope(|s| {
            let mut cpu = bus.initiator();
            let writer = s.spawn(move || {
                let answers: Vec<_> = (0..60).map(|_| cpu.write(BASE, &[1])).collect();
                let coalesced = answers.iter().take_while(|a| **a == Answer::Coalesced).count();
                assert!(answers[coalesced..].iter().all(|a| *a == Answer::Device));
                coalesced
            });
            for _ in 0..round {
                std::hint::spin_loop();
            }
            bus.remove_coalesced(BASE).unwrap();
            let drained = bus.coalesced().drain().len();
            let coalesced = writer.join().unwrap();
            assert_eq!((coalesced, 60 - coalesced as u64), (drained, made.load(Ordering::SeqCst)));
        });
    }
}
