// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that come and go on both buses, and a ledger of what they were told.
//!
//! A vCPU numbers its writes. Whether a write goes to a device, rings a doorbell, waits in the ring, or is
//! left to the VMM: in the ledger it comes once, and behind the vCPU's earlier ones. So whoever carries out
//! a write carries out first what waits in the ring, as a VMM must.

use crate::guest::{Guest, PAGE, PLACES};
use crate::seeds::{below, one_in};
use mmu_core::mmio::{Answer, Bus, CoalescedRing, Device, Initiator, Trigger};
use shuttle::sync::Mutex;
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Where devices are: at a place where the passing slot may be, and at ports.
pub(crate) const AT: [u64; 2] = [PLACES[0] * PAGE, 0x40];
/// Bytes of a device, and of what is coalesced: its second half.
pub(crate) const SIZE: u64 = 32;
/// Offset of a doorbell, which is in that half.
const DOORBELL: u64 = 24;
/// What reads as.
const READS: u8 = 0x5a;
/// Changes of the buses.
const CHANGES: u64 = 12;

/// What all devices share.
#[derive(Debug)]
pub(crate) struct Devices {
    ring: Arc<CoalescedRing>,
    /// Writes, in the order in which they were carried out.
    ledger: Mutex<Vec<u64>>,
    /// Writes that each vCPU has made, and what became of them.
    made: [AtomicU64; 3],
    coalesced: AtomicU64,
    taken: AtomicU64,
    rung: AtomicU64,
    answered: AtomicU64,
}

/// The `n`th write of vCPU `id`.
const fn write(id: u64, n: u64) -> u64 {
    id << 32 | n
}

fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed) + 1
}

impl Devices {
    pub(crate) fn new(ring: &Arc<CoalescedRing>) -> Self {
        Self {
            ring: Arc::clone(ring),
            ledger: Mutex::new(Vec::new()),
            made: Default::default(),
            coalesced: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            rung: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        }
    }

    /// Carries out what waits in the ring, and then `own`.
    fn carry_out(&self, own: Option<u64>) {
        let mut ledger = self.ledger.lock().unwrap();
        for waiting in self.ring.drain() {
            ledger.push(u64::from_le_bytes(waiting.data().try_into().unwrap()));
        }
        ledger.extend(own);
    }

    /// The next write of a vCPU.
    pub(crate) fn write(&self, id: u64, bus: &mut Initiator, address: u64) {
        let own = write(id, count(&self.made[id as usize]));
        match bus.write(address, &own.to_le_bytes()) {
            Answer::Device => _ = count(&self.taken),
            Answer::Coalesced => _ = count(&self.coalesced),
            answer => {
                self.answered.fetch_add(u64::from(answer == Answer::Doorbell), Ordering::Relaxed);
                self.carry_out(Some(own));
            }
        }
    }

    /// A read.
    pub(crate) fn read(bus: &mut Initiator, address: u64) {
        let mut bytes = [0; 8];
        let answered = bus.read(address, &mut bytes);
        let expected = [if answered { READS } else { 0 }; 8];
        assert_eq!(bytes, expected, "a read of a device");
    }

    /// When all is over: every write is in the ledger, once and in order.
    pub(crate) fn check(&self) {
        self.carry_out(None);
        let ledger = self.ledger.lock().unwrap();
        for (id, made) in (0..).zip(&self.made) {
            let made: Vec<_> = (1..=made.load(Ordering::Relaxed)).map(|n| write(id, n)).collect();
            let done: Vec<_> = ledger.iter().copied().filter(|done| done >> 32 == id).collect();
            assert_eq!(done, made, "R37: lost, repeated or overtaken writes of vCPU {id}");
        }
        let [rung, answered] =
            [&self.rung, &self.answered].map(|rings| rings.load(Ordering::Relaxed));
        assert_eq!(rung, answered, "rings of doorbells, and writes that were answered so");
    }

    /// What happened.
    pub(crate) fn tally(&self) -> [(&'static str, u64); 3] {
        let Self { coalesced, taken, rung, .. } = self;
        [("coalesced", coalesced), ("device_writes", taken), ("doorbells", rung)]
            .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}

/// A device. Each registration has another one.
struct Register {
    devices: Arc<Devices>,
    gone: AtomicBool,
}

impl Register {
    fn check(&self) {
        assert!(!self.gone.load(Ordering::Relaxed), "R30: an access in a device that is gone");
    }
}

impl Device for Register {
    fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        self.check();
        thread::yield_now();
        data.fill(READS);
        self.check();
    }

    fn write(&self, _base: u64, _offset: u64, data: &[u8]) {
        self.check();
        self.devices.carry_out(Some(u64::from_le_bytes(data.try_into().unwrap())));
        self.check();
    }
}

/// What stands on one bus.
#[derive(Default)]
struct Standing {
    device: Option<Arc<Register>>,
    coalesced: bool,
    doorbell: bool,
}

/// Registers and removes what there is, on both buses.
pub(crate) fn come_and_go(guest: &Guest) {
    let buses = [guest.mmu.bus(), guest.mmu.ports()];
    let mut standing = [Standing::default(), Standing::default()];
    for _ in 0..CHANGES {
        let n = below(2) as usize;
        change(guest.devices(), buses[n], AT[n], &mut standing[n]);
    }
}

fn change(devices: &Arc<Devices>, bus: &Bus, at: u64, standing: &mut Standing) {
    let trigger = Trigger::sized(at + DOORBELL, 8);
    match below(4) {
        0 | 1 => match standing.device.take() {
            Some(device) => {
                let removal = bus.remove(at).unwrap();
                if one_in(2) {
                    removal.wait().unwrap();
                    device.gone.store(true, Ordering::Relaxed);
                }
            }
            None => {
                let devices = Arc::clone(devices);
                let device = Arc::new(Register { devices, gone: AtomicBool::new(false) });
                bus.register(at, SIZE, Arc::clone(&device) as Arc<dyn Device>).unwrap();
                standing.device = Some(device);
            }
        },
        2 => {
            match standing.coalesced {
                true => bus.remove_coalesced(at + SIZE / 2),
                false => bus.register_coalesced(at + SIZE / 2, SIZE / 2),
            }
            .unwrap();
            standing.coalesced ^= true;
        }
        _ => {
            if standing.doorbell {
                drop(bus.remove_doorbell(trigger).unwrap());
            } else {
                let devices = Arc::clone(devices);
                let ring = move || _ = count(&devices.rung);
                bus.register_doorbell(trigger, Arc::new(ring)).unwrap();
            }
            standing.doorbell ^= true;
        }
    }
    if one_in(3) {
        devices.carry_out(None);
    }
}
