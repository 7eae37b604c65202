// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sequences of registrations, removals and accesses against lists that are searched from end to end.

use mmu_core::mmio::{Answer, Bus, BusError, CoalescedRing, Device, Doorbell, Space, Trigger};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

/// What a device or doorbell was called for; the first number says which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Read(usize, u64, u64, usize),
    Write(usize, u64, u64, Vec<u8>),
    Ring(usize),
}

type Calls = Arc<Mutex<Vec<Call>>>;

struct Probe(usize, Calls);

impl Probe {
    fn call(&self, call: Call) {
        self.1.lock().unwrap().push(call);
    }
}

impl Device for Probe {
    fn read(&self, base: u64, offset: u64, data: &mut [u8]) {
        data.fill(self.0 as u8);
        self.call(Call::Read(self.0, base, offset, data.len()));
    }

    fn write(&self, base: u64, offset: u64, data: &[u8]) {
        self.call(Call::Write(self.0, base, offset, data.to_vec()));
    }
}

impl Doorbell for Probe {
    fn ring(&self) {
        self.call(Call::Ring(self.0));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Register(u64, u64),
    Remove(u64),
    RegisterCoalesced(u64, u64),
    RemoveCoalesced(u64),
    RegisterDoorbell(Trigger),
    RemoveDoorbell(Trigger),
    Read(u64, usize),
    Write { address: u64, data: Vec<u8>, now: bool },
    Drain,
}

/// Few addresses, so that steps meet: at the beginning of the bus, and around its end.
fn address(end: u64) -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..40u64, 1 => end - 20..end + 2, 1 => u64::MAX - 3..=u64::MAX]
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..20u64, 1 => Just(u64::MAX), 1 => any::<u64>()]
}

fn trigger(end: u64) -> impl Strategy<Value = Trigger> {
    let length = prop_oneof![8 => prop::sample::select(vec![0, 1, 2, 4, 8]), 1 => 0..=9u8];
    let value = prop::option::of(prop_oneof![4 => 0..3u64, 1 => Just(0x100), 1 => any::<u64>()]);
    (address(end), length, value).prop_map(|(address, length, value)| Trigger {
        address,
        length,
        value,
    })
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let small = (0..3u8, 0..=17usize).prop_map(|(low, length)| {
        let mut data = vec![0; length];
        data.iter_mut().take(1).for_each(|byte| *byte = low);
        data
    });
    prop_oneof![4 => small, 1 => prop::collection::vec(any::<u8>(), 0..18)]
}

fn step(end: u64) -> impl Strategy<Value = Step> {
    let at = move || address(end);
    prop_oneof![
        4 => (at(), size()).prop_map(|(base, size)| Step::Register(base, size)),
        2 => at().prop_map(Step::Remove),
        2 => (at(), size()).prop_map(|(base, size)| Step::RegisterCoalesced(base, size)),
        1 => at().prop_map(Step::RemoveCoalesced),
        4 => trigger(end).prop_map(Step::RegisterDoorbell),
        2 => trigger(end).prop_map(Step::RemoveDoorbell),
        4 => (at(), 0..=17usize).prop_map(|(address, length)| Step::Read(address, length)),
        12 => (at(), data(), prop::bool::weighted(0.3))
            .prop_map(|(address, data, now)| Step::Write { address, data, now }),
        1 => Just(Step::Drain),
    ]
}

/// The lists. Ranges are (base, size, which).
struct Oracle {
    space: Space,
    end: u128,
    devices: Vec<(u64, u64, usize)>,
    coalesced: Vec<(u64, u64, usize)>,
    doorbells: Vec<(Trigger, usize)>,
    ring: Vec<(u64, Vec<u8>)>,
}

/// The addresses of some bytes; none of a bus is beyond 64 bits.
fn bytes(base: u64, size: u64) -> core::ops::Range<u128> {
    u128::from(base)..u128::from(base) + u128::from(size)
}

/// The ranges that have some of the bytes.
fn overlapping(list: &[(u64, u64, usize)], base: u64, size: u64) -> Vec<(u64, u64, usize)> {
    let new = bytes(base, size);
    let overlaps = |(base, size, _): &&(u64, u64, usize)| {
        let old = bytes(*base, *size);
        old.start < new.end && new.start < old.end
    };
    list.iter().filter(overlaps).copied().collect()
}

/// The range that has every byte.
fn holder(list: &[(u64, u64, usize)], address: u64, length: usize) -> Option<(u64, usize)> {
    let access = bytes(address, length as u64);
    let all = |(base, size, _): &&(u64, u64, usize)| {
        let range = bytes(*base, *size);
        range.start <= access.start && access.end <= range.end
    };
    list.iter().find(all).map(|(base, _, which)| (*base, *which))
}

impl Oracle {
    /// What is wrong with a range, apart from other ranges.
    fn range(&self, base: u64, size: u64) -> Result<(), BusError> {
        let space = self.space;
        if size == 0 {
            return Err(BusError::ZeroSize { space, base });
        }
        match bytes(base, size).end > self.end {
            true => Err(BusError::WrapsAround { space, base, size }),
            false => Ok(()),
        }
    }

    fn trigger(&self, trigger: Trigger) -> Result<(), BusError> {
        let bits = match trigger.length {
            0 | 1 | 2 | 4 | 8 => u32::from(trigger.length) * 8,
            _ => return Err(BusError::BadLength { trigger }),
        };
        if trigger.value.is_some_and(|v| bits == 0 || u128::from(v) >> bits != 0) {
            return Err(BusError::BadValue { trigger });
        }
        self.range(trigger.address, u64::from(trigger.length.max(1)))
    }

    /// Whether the write matches (KVM's `ioeventfd_in_range`).
    fn rings(trigger: &Trigger, address: u64, data: &[u8]) -> bool {
        let mut word = [0; 8];
        let value = data.len() <= 8 && {
            word[..data.len()].copy_from_slice(data);
            trigger.value.is_none_or(|value| value == u64::from_le_bytes(word))
        };
        trigger.address == address
            && (trigger.length == 0 || usize::from(trigger.length) == data.len() && value)
    }

    /// Whether one write would match both: tried with the writes that match either.
    fn collide(a: &Trigger, b: &Trigger) -> bool {
        [a, b].into_iter().any(|t| {
            [1, 2, 4, 8].into_iter().any(|length| {
                [a.value, b.value, Some(0)].into_iter().flatten().any(|value| {
                    let data = &value.to_le_bytes()[..length];
                    let both = |other| Self::rings(other, t.address, data);
                    both(a) && both(b)
                })
            })
        })
    }

    fn write(&mut self, address: u64, data: &[u8], now: bool) -> (Answer, Option<Call>) {
        if data.is_empty() || data.len() > 16 {
            return (Answer::Unhandled, None);
        }
        let bell = self.doorbells.iter().find(|(trigger, _)| Self::rings(trigger, address, data));
        if let Some((_, which)) = bell {
            return (Answer::Doorbell, Some(Call::Ring(*which)));
        }
        if !now && holder(&self.coalesced, address, data.len()).is_some() {
            if self.ring.len() == CoalescedRing::CAPACITY {
                return (Answer::RingFull, None);
            }
            self.ring.push((address, data.to_vec()));
            return (Answer::Coalesced, None);
        }
        match holder(&self.devices, address, data.len()) {
            Some((base, which)) => {
                let call = Call::Write(which, base, address - base, data.to_vec());
                (Answer::Device, Some(call))
            }
            None => (Answer::Unhandled, None),
        }
    }
}

/// A registration must have failed as the value alone does, or else by one of the `errors` that others on
/// the bus are reason for, if there are any.
fn check_result(
    result: Result<(), BusError>,
    alone: Result<(), BusError>,
    errors: impl Iterator<Item = BusError>,
) -> Result<(), TestCaseError> {
    let errors: Vec<_> = match alone {
        Ok(()) => errors.collect(),
        Err(error) => vec![error],
    };
    match result {
        Ok(()) => prop_assert!(errors.is_empty(), "accepted despite {:?}", errors),
        Err(error) => prop_assert!(errors.contains(&error), "{:?} is none of {:?}", error, errors),
    }
    Ok(())
}

fn check(space: Space, end: u64, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let bus = Bus::new(space, Arc::default());
    let mut cpu = bus.initiator();
    let calls = Calls::default();
    let (devices, coalesced, doorbells, ring) = Default::default();
    let mut oracle = Oracle { space, end: end.into(), devices, coalesced, doorbells, ring };
    for (which, step) in steps.into_iter().enumerate() {
        let mut expected = None;
        match step {
            Step::Register(base, size) => {
                let result = bus.register(base, size, Arc::new(Probe(which, calls.clone())));
                let others = overlapping(&oracle.devices, base, size);
                let error = |(other_base, other_size, _)| BusError::Overlap {
                    space,
                    base,
                    size,
                    other_base,
                    other_size,
                };
                check_result(result, oracle.range(base, size), others.into_iter().map(error))?;
                if result.is_ok() {
                    oracle.devices.push((base, size, which));
                }
            }
            Step::RegisterCoalesced(base, size) => {
                let result = bus.register_coalesced(base, size);
                let others = overlapping(&oracle.coalesced, base, size);
                let error = |(other_base, other_size, _)| BusError::CoalescedOverlap {
                    space,
                    base,
                    size,
                    other_base,
                    other_size,
                };
                check_result(result, oracle.range(base, size), others.into_iter().map(error))?;
                if result.is_ok() {
                    oracle.coalesced.push((base, size, which));
                }
            }
            Step::RegisterDoorbell(trigger) => {
                let bell = Arc::new(Probe(which, calls.clone()));
                let result = bus.register_doorbell(trigger, bell);
                let others = oracle.doorbells.iter().map(|(other, _)| *other);
                let others = others.filter(|other| Oracle::collide(other, &trigger));
                let errors = others.map(|other| BusError::DoorbellExists { trigger, other });
                check_result(result, oracle.trigger(trigger), errors)?;
                if result.is_ok() {
                    oracle.doorbells.push((trigger, which));
                }
            }
            Step::Remove(base) => {
                let at = oracle.devices.iter().position(|(other, _, _)| *other == base);
                let got = bus.remove(base).map(|removal| removal.accesses());
                prop_assert_eq!(got, at.map(|_| 0).ok_or(BusError::NoDevice { space, base }));
                at.map(|at| oracle.devices.remove(at));
            }
            Step::RemoveCoalesced(base) => {
                let at = oracle.coalesced.iter().position(|(other, _, _)| *other == base);
                let none = BusError::NoCoalesced { space, base };
                prop_assert_eq!(bus.remove_coalesced(base), at.map(drop).ok_or(none));
                at.map(|at| oracle.coalesced.remove(at));
            }
            Step::RemoveDoorbell(trigger) => {
                let at = oracle.doorbells.iter().position(|(other, _)| *other == trigger);
                let got = bus.remove_doorbell(trigger).map(|removal| removal.accesses());
                prop_assert_eq!(got, at.map(|_| 0).ok_or(BusError::NoDoorbell { trigger }));
                at.map(|at| oracle.doorbells.remove(at));
            }
            Step::Read(address, length) => {
                let mut data = vec![0xee; length];
                let found = holder(&oracle.devices, address, length);
                let found = found.filter(|_| (1..=16).contains(&length));
                prop_assert_eq!(cpu.read(address, &mut data), found.is_some());
                let byte = found.map_or(0xee, |(_, which)| which as u8);
                prop_assert!(data.iter().all(|b| *b == byte));
                expected =
                    found.map(|(base, which)| Call::Read(which, base, address - base, length));
            }
            Step::Write { address, data, now } => {
                let got =
                    if now { cpu.write_now(address, &data) } else { cpu.write(address, &data) };
                let (answer, call) = oracle.write(address, &data, now);
                prop_assert_eq!(got, answer);
                expected = call;
            }
            Step::Drain => {
                let got = bus.coalesced().drain();
                prop_assert!(got.iter().all(|write| write.space() == space));
                let got: Vec<_> = got.iter().map(|w| (w.address(), w.data().to_vec())).collect();
                prop_assert_eq!(got, core::mem::take(&mut oracle.ring));
            }
        }
        let got = core::mem::take(&mut *calls.lock().unwrap());
        prop_assert_eq!(got, expected.into_iter().collect::<Vec<_>>());
    }
    // What is left of the devices goes with the bus, each once.
    prop_assert_eq!(Arc::strong_count(&calls), 1 + oracle.devices.len() + oracle.doorbells.len());
    drop((bus, cpu));
    prop_assert_eq!(Arc::strong_count(&calls), 1);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(debug_assertions) { 60 } else { 600 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn ports(steps in prop::collection::vec(step(1 << 16), 0..400)) {
        check(Space::Pio, 1 << 16, steps)?;
    }

    #[test]
    fn guest_physical_addresses(steps in prop::collection::vec(step(1 << 52), 0..400)) {
        check(Space::Mmio, 1 << 52, steps)?;
    }
}
