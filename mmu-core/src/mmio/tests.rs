// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One thread: what is refused, and what an access finds.

use super::*;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// Remembers writes; a read's bytes are the low byte of the address.
#[derive(Default)]
struct Log(Mutex<Vec<(u64, u64, Vec<u8>)>>);

impl Device for Log {
    fn read(&self, base: u64, offset: u64, data: &mut [u8]) {
        data.fill((base + offset) as u8);
    }

    fn write(&self, base: u64, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((base, offset, data.to_vec()));
    }
}

fn bus(space: Space) -> Bus {
    Bus::new(space, Arc::default())
}

fn device() -> Arc<dyn Device> {
    Arc::new(Log::default())
}

/// A doorbell and how often it was rung.
fn bell() -> (Arc<AtomicU32>, Arc<dyn Doorbell>) {
    let rung = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&rung);
    let bell = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    (rung, Arc::new(bell))
}

#[test]
fn the_device_that_has_the_whole_access_answers() {
    let bus = bus(Space::Mmio);
    let log = Arc::new(Log::default());
    bus.register(0x1000, 0x10, log.clone()).unwrap();
    bus.register(0x1010, 0x10, log.clone()).unwrap();
    let mut cpu = bus.initiator();
    assert_eq!(cpu.write(0x100c, &[1, 2, 3, 4]), Answer::Device);
    assert_eq!(cpu.write(0x1010, &[5; 16]), Answer::Device);
    // Across the border of two devices, before the first, after the last.
    for (address, length) in [(0x100d, 4), (0xfff, 1), (0xfff, 2), (0x1011, 16), (0x1020, 1)] {
        let mut data = [7; 16];
        assert_eq!(cpu.write(address, &data[..length]), Answer::Unhandled, "{address:#x}");
        assert!(!cpu.read(address, &mut data[..length]) && data == [7; 16], "{address:#x}");
    }
    // No access has these lengths, and none wraps around.
    assert_eq!(cpu.write(0x1000, &[]), Answer::Unhandled);
    assert_eq!(cpu.write(0x1000, &[0; 17]), Answer::Unhandled);
    assert!(!cpu.read(0x1000, &mut []) && !cpu.read(0x1000, &mut [0; 17]));
    assert!(!cpu.read(u64::MAX, &mut [0; 8]));
    let mut data = [0; 3];
    assert!(cpu.read(0x1015, &mut data));
    assert_eq!(data, [0x15; 3]);
    let expected = [(0x1000, 0xc, vec![1, 2, 3, 4]), (0x1010, 0, vec![5; 16])];
    assert_eq!(*log.0.lock().unwrap(), expected);
}

#[test]
fn refuses_bad_ranges_by_name() {
    for space in [Space::Mmio, Space::Pio] {
        let (bus, end) = (bus(space), space.end());
        let zero = BusError::ZeroSize { space, base: 4 };
        assert_eq!(bus.register(4, 0, device()), Err(zero));
        assert_eq!(bus.register_coalesced(4, 0), Err(zero));
        for (base, size) in [(end, 1), (end - 1, 2), (0, end + 1), (1, u64::MAX), (u64::MAX, 1)] {
            let wraps = BusError::WrapsAround { space, base, size };
            assert_eq!(bus.register(base, size, device()), Err(wraps));
            assert_eq!(bus.register_coalesced(base, size), Err(wraps));
        }
        bus.register(0x1000, 0x100, device()).unwrap();
        bus.register(0x1200, 0x10, device()).unwrap();
        bus.register_coalesced(0x1000, 0x100).unwrap();
        for (base, size) in [(0xfff, 2), (0x1000, 1), (0x10ff, 1), (0x1000, 0x100), (0, 0x8000)] {
            let (other_base, other_size) = (0x1000, 0x100);
            let overlap = BusError::Overlap { space, base, size, other_base, other_size };
            assert_eq!(bus.register(base, size, device()), Err(overlap));
            let overlap = BusError::CoalescedOverlap { space, base, size, other_base, other_size };
            assert_eq!(bus.register_coalesced(base, size), Err(overlap));
        }
        for base in [0, 0x1001, 0x1100, 0x1201] {
            assert_eq!(bus.remove(base).unwrap_err(), BusError::NoDevice { space, base });
            let none = BusError::NoCoalesced { space, base };
            assert_eq!(bus.remove_coalesced(base), Err(none));
        }
        // All of this has changed nothing.
        bus.register(0x1100, 0x100, device()).unwrap();
        bus.register(end - 1, 1, device()).unwrap();
        bus.remove(0x1000).unwrap();
        bus.remove_coalesced(0x1000).unwrap();
        bus.register(0, 0x1100, device()).unwrap();
        let debug = format!("{bus:?}");
        assert!(debug.contains("devices: [0..4352, 4352..4608, 4608..4624,"), "{debug}");
    }
    let text = bus(Space::Pio).register(0xffff, 4, device()).unwrap_err().to_string();
    assert_eq!(text, "0x4 bytes at I/O port 0xffff run past the end of the bus");
}

#[test]
fn refuses_bad_doorbells_by_name() {
    let bus = bus(Space::Pio);
    let register = |trigger| bus.register_doorbell(trigger, bell().1);
    for length in [3, 5, 7, 9, 16, 255] {
        let trigger = Trigger::sized(0, length);
        assert_eq!(register(trigger), Err(BusError::BadLength { trigger }));
    }
    let valued = |address, length, value| Trigger::valued(address, length, value);
    for (length, value) in [(0, 0), (1, 0x100), (2, 0x1_0000), (4, u64::MAX)] {
        let trigger = valued(0, length, value);
        assert_eq!(register(trigger), Err(BusError::BadValue { trigger }));
    }
    for (trigger, size) in [(Trigger::sized(0xffff, 2), 2), (Trigger::any(0x1_0000), 1)] {
        let (space, base) = (Space::Pio, trigger.address);
        assert_eq!(register(trigger), Err(BusError::WrapsAround { space, base, size }));
    }
    // (what is there, what some write would ring as well)
    let (any, four) = (Trigger::any(8), Trigger::sized(8, 4));
    for (other, trigger) in [
        (any, any),
        (any, four),
        (any, valued(8, 2, 0)),
        (four, any),
        (four, four),
        (four, valued(8, 4, 1)),
        (valued(8, 4, 1), any),
        (valued(8, 4, 1), four),
        (valued(8, 4, 1), valued(8, 4, 1)),
    ] {
        register(other).unwrap();
        assert_eq!(register(trigger), Err(BusError::DoorbellExists { trigger, other }));
        bus.remove_doorbell(other).unwrap();
    }
    for trigger in [four, Trigger::sized(8, 2), Trigger::any(9), valued(8, 8, u64::MAX)] {
        assert_eq!(bus.remove_doorbell(trigger).unwrap_err(), BusError::NoDoorbell { trigger });
        register(trigger).unwrap();
    }
    let text = BusError::NoDoorbell { trigger: valued(8, 2, 0xab) }.to_string();
    assert_eq!(text, "no doorbell waits for a write of 0xab in 2 bytes to 0x8");
}

#[test]
fn a_doorbell_rings_for_the_writes_that_it_waits_for() {
    let bus = bus(Space::Mmio);
    let log = Arc::new(Log::default());
    bus.register(0x1000, 0x100, log.clone()).unwrap();
    bus.register_coalesced(0x1000, 0x100).unwrap();
    let add = |trigger| {
        let (rung, bell) = bell();
        bus.register_doorbell(trigger, bell).unwrap();
        move || rung.swap(0, Ordering::Relaxed)
    };
    let any = add(Trigger::any(0x1010));
    let (two, four) = (add(Trigger::sized(0x1020, 2)), add(Trigger::sized(0x1020, 4)));
    let values: Vec<_> = (0..300).map(|v| add(Trigger::valued(0x1030, 2, v))).collect();
    let wide = add(Trigger::valued(0x1038, 8, u64::MAX));
    let outside = add(Trigger::any(0x2000));
    let mut cpu = bus.initiator();
    let rings = |cpu: &mut Initiator, address, data: &[u8]| {
        assert_eq!(cpu.write_now(address, data), Answer::Doorbell);
        assert_eq!(cpu.write(address, data), Answer::Doorbell);
    };
    for length in 1..=16 {
        rings(&mut cpu, 0x1010, &[9; 16][..length]);
    }
    assert_eq!(any(), 32);
    rings(&mut cpu, 0x1020, &[0; 2]);
    rings(&mut cpu, 0x1020, &[1; 4]);
    assert_eq!((two(), four()), (2, 2));
    rings(&mut cpu, 0x1030, &[0x2b, 1]);
    assert!(values.iter().enumerate().all(|(v, rung)| rung() == if v == 0x12b { 2 } else { 0 }));
    rings(&mut cpu, 0x1038, &[0xff; 8]);
    rings(&mut cpu, 0x2000, &[0]);
    assert_eq!((wide(), outside()), (2, 2));
    // A doorbell hears nothing but its own writes; the rest is the device's and the ring's.
    assert!(cpu.read(0x1010, &mut [0; 4]) && !cpu.read(0x2000, &mut [0]));
    for (address, length) in
        [(0x100f, 4), (0x1011, 1), (0x1020, 1), (0x1020, 8), (0x1030, 1), (0x1038, 16)]
    {
        assert_eq!(cpu.write_now(address, &[0xff; 16][..length]), Answer::Device);
        assert_eq!(cpu.write(address, &[0xff; 16][..length]), Answer::Coalesced);
    }
    assert_eq!(cpu.write_now(0x1030, &[0x2c, 1]), Answer::Device);
    assert_eq!((log.0.lock().unwrap().len(), bus.coalesced().drain().len()), (7, 6));
    bus.remove_doorbell(Trigger::any(0x1010)).unwrap().wait().unwrap();
    assert_eq!((cpu.write_now(0x1010, &[1]), any()), (Answer::Device, 0));
}

#[test]
fn writes_to_a_coalesced_range_wait_in_the_ring() {
    let ring = Arc::new(CoalescedRing::default());
    let log = Arc::new(Log::default());
    let [memory, ports] = [Space::Mmio, Space::Pio].map(|space| {
        let bus = Bus::new(space, Arc::clone(&ring));
        bus.register(0x100, 0x40, log.clone()).unwrap();
        bus.register_coalesced(0x110, 0x10).unwrap();
        bus
    });
    // A range without a device, as for one that the VMM keeps elsewhere.
    ports.register_coalesced(0x3c0, 0x20).unwrap();
    let (mut memory, mut ports) = (memory.initiator(), ports.initiator());
    assert_eq!(ports.write(0x3c4, &[1, 2]), Answer::Coalesced);
    assert_eq!(memory.write(0x110, &[3; 16]), Answer::Coalesced);
    assert_eq!(ports.write(0x11f, &[4]), Answer::Coalesced);
    // Not wholly in the range; and a read never is.
    assert_eq!(memory.write(0x10f, &[5; 2]), Answer::Device);
    assert_eq!(memory.write(0x11f, &[6; 2]), Answer::Device);
    assert!(memory.read(0x110, &mut [0; 16]) && !ports.read(0x3c4, &mut [0]));
    let got = ring.drain();
    let seen: Vec<_> = got.iter().map(|w| (w.space(), w.address(), w.data())).collect();
    let expected = [
        (Space::Pio, 0x3c4, &[1, 2][..]),
        (Space::Mmio, 0x110, &[3; 16]),
        (Space::Pio, 0x11f, &[4]),
    ];
    assert_eq!(seen, expected);
    // Full: nothing happens, and what was before it goes first.
    log.0.lock().unwrap().clear();
    for n in 0..CoalescedRing::CAPACITY {
        assert_eq!(memory.write(0x110, &[n as u8]), Answer::Coalesced);
    }
    assert_eq!(memory.write(0x111, &[7]), Answer::RingFull);
    assert_eq!(ports.write(0x3c4, &[7]), Answer::RingFull);
    assert!(!Answer::RingFull.is_done() && log.0.lock().unwrap().is_empty());
    for write in ring.drain() {
        assert_eq!(memory.write_now(write.address(), write.data()), Answer::Device);
    }
    assert_eq!(memory.write_now(0x111, &[7]), Answer::Device);
    let log = log.0.lock().unwrap();
    let (last, first) = log.split_last().unwrap();
    assert!(first.iter().enumerate().all(|(n, w)| *w == (0x100, 0x10, vec![n as u8])));
    assert_eq!((first.len(), last), (CoalescedRing::CAPACITY, &(0x100, 0x11, vec![7])));
}
