// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The instruction emulator's accesses beside what they should do. They go through the guest's own
//! tables, so no invalidation is needed before them.

use crate::World;
use crate::guest::{DEVICE, WIDE};
use crate::input::Bytes;
use crate::model::{End, Moment, Part, is_twofold, overlaps};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::mmio::{Answer, Device};
use mmu_core::paging::{Access, Kind, Reason};
use mmu_core::vcpu::{AccessError, Fragment, PatchError};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the device's registers: not all of its second page.
pub const DEVICE_SIZE: u64 = 0x1800;

/// A device whose registers read as their addresses, and that counts the bytes written.
#[derive(Default)]
pub struct Registers(pub AtomicU64);

fn register(address: u64) -> u8 {
    address as u8 ^ 0x5a
}

impl Device for Registers {
    fn read(&self, base: u64, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= DEVICE_SIZE);
        data.iter_mut().zip(base + offset..).for_each(|(byte, at)| *byte = register(at));
    }

    fn write(&self, base: u64, offset: u64, data: &[u8]) {
        assert!(base == DEVICE && offset + data.len() as u64 <= DEVICE_SIZE);
        self.0.fetch_add(data.len() as u64, Ordering::Relaxed);
    }
}

/// What an accessor does with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Read,
    Fetch,
    Write,
    ReadEmulated,
    WriteEmulated,
    Cmpxchg,
    PinToRead,
    PinToWrite,
    ViewRead,
    ViewWrite,
    ViewCmpxchg,
    Patch,
}

use Operation::*;

const ALL: [Operation; 12] = [
    Read,
    Write,
    ReadEmulated,
    WriteEmulated,
    Cmpxchg,
    Fetch,
    PinToRead,
    PinToWrite,
    ViewRead,
    ViewWrite,
    ViewCmpxchg,
    Patch,
];

impl Operation {
    /// Whether it needs pages that can be written.
    fn stores(self) -> bool {
        matches!(self, Write | WriteEmulated | Cmpxchg | PinToWrite | ViewWrite | ViewCmpxchg)
    }

    fn exchanges(self) -> bool {
        matches!(self, Cmpxchg | ViewCmpxchg)
    }

    fn knows_devices(self) -> bool {
        matches!(self, ReadEmulated | WriteEmulated)
    }
}

/// The refusal of an access whose parts end so, before anything is read or written.
fn refusal(parts: &[Part], apic: Option<Gpa>, operation: Operation) -> Option<AccessError> {
    let at_apic = |gpa: Gpa| apic.is_some_and(|page| page.gfn() == gpa.gfn());
    let asks_apic = operation.exchanges() || operation.knows_devices();
    let faults = parts.iter().filter_map(|part| match part.end {
        End::Fault(fault) => Some(fault),
        _ => None,
    });
    if let Some(fault) = faults.min_by_key(|fault| fault.reason != Reason::NonCanonical) {
        return Some(AccessError::Fault(fault));
    }
    // A page of the APIC's is asked for no rights of the host's, but for those of its tables.
    let host = parts.iter().find_map(|part| match part.end {
        End::HostReadOnly(gpa) => Some(AccessError::HostReadOnly { gpa }),
        _ => None,
    });
    let device = parts.iter().find_map(|part| match part.end {
        End::Device(gpa) | End::Memory(gpa) if asks_apic && at_apic(gpa) => {
            Some(AccessError::Apic { gpa })
        }
        End::Device(gpa) => Some(AccessError::Mmio { gpa, len: part.bytes.len() }),
        _ => None,
    });
    host.or(device.filter(|_| !operation.knows_devices()))
}

/// Whether a locked access can be made as one step on x86-64.
fn is_one_step(gva: Gva, size: usize) -> bool {
    match size {
        1 | 2 | 4 | 8 => gva.0 % 64 + size as u64 <= 64,
        16 => gva.0.is_multiple_of(16),
        _ => false,
    }
}

impl World {
    /// One access of the instruction emulator's.
    pub fn emulate(&mut self, cpu: usize, bytes: &mut Bytes<'_>) {
        let operation = bytes.pick(&ALL);
        let how = bytes.u8();
        let gva = self.gva(cpu, bytes);
        let len = [8, 1, 2, 4, 16, 3, 7, 12, 0, 5, 6, 8, 9, 15, 4, 16][usize::from(how & 15)];
        let kind = match operation {
            _ if operation.stores() => Kind::Write,
            Fetch | Patch => Kind::Execute,
            // The first half of a read-modify-write, and code read as such.
            _ => [Kind::Read, Kind::Read, Kind::Write, Kind::Execute][usize::from(how >> 4 & 3)],
        };
        let access = Access { kind, user: how & 64 != 0, implicit: how & 128 != 0 };
        let map = self.mmu.memory();
        let len = match operation {
            Fetch => len.min((0x1000 - gva.page_offset()) as usize),
            _ => len,
        };
        let mut apic = self.apic[cpu];
        if !operation.exchanges() && !operation.knows_devices() {
            apic = None;
        }
        let vcpu = self.cpus[cpu].vcpu();
        let moment = Moment { map: &map, vcpu, host_read_only: &self.host_read_only };
        let at_apic = |gpa: Gpa| apic.is_some_and(|page| page.gfn() == gpa.gfn());
        let mut parts = moment.parts(gva, len, access, operation.stores());
        // What a part would be without `stores` tells whether it was the page or its tables.
        for (part, plain) in parts.iter_mut().zip(moment.parts(gva, len, access, false)) {
            match plain.end {
                End::Memory(gpa) | End::Device(gpa) if at_apic(gpa) => part.end = plain.end,
                _ => {}
            }
        }
        let blurred = overlaps(&map, &parts) || is_twofold(&map, &parts);
        let before = moment.bytes(&parts, len);
        let mut value = [0; 16];
        let entry = bytes.wide_entry(WIDE.start + 1).to_le_bytes();
        value[..8].copy_from_slice(&entry);
        value[8..].copy_from_slice(&u64::from_le_bytes(entry).rotate_left(9).to_le_bytes());
        let value = &value[..len];
        let mut buf = vec![0xcc; len];
        let wrong = bytes.one_in(4) && len > 0;
        let mut old = before.clone();
        if wrong {
            old[0] ^= 1;
        }
        let (old_word, new_word) = (word(&old), word(value));

        // `Some(fragments)` if it was carried out.
        let result: Result<Vec<Fragment>, AccessError> = match operation {
            Read => vcpu.read(gva, &mut buf, access).map(|()| Vec::new()),
            Fetch => vcpu.fetch(gva, &mut buf, access).map(|n| {
                assert_eq!(n, len);
                Vec::new()
            }),
            Write => vcpu.write(gva, value, access).map(|()| Vec::new()),
            ReadEmulated => vcpu.read_emulated(gva, &mut buf, access),
            WriteEmulated => vcpu.write_emulated(gva, value, access),
            Cmpxchg => vcpu.cmpxchg(gva, len, old_word, new_word, access).map(|met| {
                check_exchange(met, wrong, blurred, &before);
                Vec::new()
            }),
            PinToRead | PinToWrite => {
                let mut pinned = || {
                    let pinned = vcpu.pin(gva, len, access)?;
                    assert_eq!(pinned.len(), len);
                    if kind == Kind::Write {
                        pinned.write(0, value).expect("within the range");
                    } else {
                        assert!(len == 0 || pinned.write(0, value).is_err());
                        pinned.read(0, &mut buf).expect("within the range");
                    }
                    assert!(pinned.read(len as u64, &mut [0]).is_err());
                    Ok(Vec::new())
                };
                pinned()
            }
            ViewRead => vcpu.view(access).read(gva, &mut buf).map(|()| Vec::new()),
            ViewWrite => vcpu.view(access).write(gva, value).map(|()| Vec::new()),
            ViewCmpxchg => vcpu.view(access).cmpxchg(gva, len, old_word, new_word).map(|met| {
                check_exchange(met, wrong, blurred, &before);
                Vec::new()
            }),
            Patch => return self.patch(cpu, gva, &old, value, wrong || blurred, access, &parts),
        };

        // A pin to read with the right to write is one to write.
        let pinned = matches!(operation, PinToRead | PinToWrite);
        let writes = operation.stores() || pinned && kind == Kind::Write;
        if pinned && writes && !operation.stores() {
            parts = moment.parts(gva, len, access, true);
        }
        let context = || {
            let regs = vcpu.regs();
            format!("{operation:?} {access:?} of {len} at {gva}: {parts:x?} {regs:x?}")
        };
        let mut expected = refusal(&parts, apic, operation);
        if operation.exchanges() {
            let unsupported = AccessError::Unsupported { gva, size: len };
            // Lengths that none has come first; what faults, before the refusal of a split lock.
            let never = !matches!(len, 1 | 2 | 4 | 8 | 16);
            if never || expected.is_none() && !is_one_step(gva, len) {
                expected = Some(unsupported);
            }
        }
        assert_eq!(result.as_ref().err(), expected.as_ref(), "{}", context());
        let done = result.is_ok() && !(operation.exchanges() && wrong);
        let stored = writes && done;
        if !blurred {
            let after = moment.bytes(&parts, len);
            let is_memory = |part: &Part| part.gpa().is_some_and(|gpa| !at_apic(gpa));
            for part in parts.iter().filter(|part| is_memory(part)) {
                let bytes = part.bytes.clone();
                let left = if stored { value } else { &before[..] };
                assert_eq!(after[bytes.clone()], left[bytes.clone()], "{}", context());
                if result.is_ok() && !writes {
                    assert_eq!(buf[bytes.clone()], before[bytes], "{}", context());
                }
            }
            if result.is_ok() {
                moment.check_marks(&parts, access);
            }
        }
        if result.is_err() && !writes {
            assert!(buf.iter().all(|byte| *byte == 0xcc), "{}", context());
        }
        if let Ok(fragments) = &result {
            let left = parts.iter().filter(|part| part.gpa().is_none_or(at_apic));
            let left: usize = left.map(|part| part.bytes.len()).sum();
            let told: usize = fragments.iter().map(|fragment| fragment.bytes.len()).sum();
            assert_eq!(told, left, "{} {fragments:x?}", context());
            for fragment in fragments {
                let of = |part: &&Part| part.bytes.contains(&fragment.bytes.start);
                let part = parts.iter().find(of).expect("a part of the access");
                let (End::Device(gpa) | End::Memory(gpa)) = part.end else { unreachable!() };
                let skip = (fragment.bytes.start - part.bytes.start) as u64;
                assert_eq!(fragment.gpa, gpa.wrapping_add(skip), "{}", context());
                assert_eq!(fragment.apic, at_apic(gpa), "{}", context());
                assert!(fragment.bytes.len() <= 8 && fragment.bytes.end <= part.bytes.end);
                self.finish(fragment, writes, value, &mut buf);
            }
        }
        if stored {
            self.note_stores(&map, &parts, |gpa| !at_apic(gpa));
        }
    }

    /// What the VMM does with a fragment: the device, if one has all of it.
    fn finish(&self, fragment: &Fragment, writes: bool, value: &[u8], buf: &mut [u8]) {
        let mut bus = self.mmu.bus().initiator();
        let (at, len) = (fragment.gpa.0, fragment.bytes.len() as u64);
        let has = DEVICE <= at && at + len <= DEVICE + DEVICE_SIZE;
        if writes {
            let before = self.device.0.load(Ordering::Relaxed);
            let answer = bus.write(at, &value[fragment.bytes.clone()]);
            assert_eq!(answer, if has { Answer::Device } else { Answer::Unhandled });
            let counted = self.device.0.load(Ordering::Relaxed) - before;
            assert_eq!(counted, if has { len } else { 0 });
        } else {
            let buf = &mut buf[fragment.bytes.clone()];
            assert_eq!(bus.read(at, buf), has);
            assert!(!has || buf.iter().zip(at..).all(|(byte, at)| *byte == register(at)));
        }
    }

    #[allow(clippy::too_many_arguments, reason = "what the caller has made for all operations")]
    fn patch(
        &mut self,
        cpu: usize,
        gva: Gva,
        old: &[u8],
        new: &[u8],
        blurred: bool,
        access: Access,
        parts: &[Part],
    ) {
        let map = self.mmu.memory();
        let before = {
            let vcpu = self.cpus[cpu].vcpu();
            Moment { map: &map, vcpu, host_read_only: &self.host_read_only }.bytes(parts, new.len())
        };
        let vcpu = self.cpus[cpu].vcpu_mut();
        let result = vcpu.patch_code(gva, old, new, access);
        let moment =
            Moment { map: &map, vcpu: self.cpus[cpu].vcpu(), host_read_only: &self.host_read_only };
        let context = || format!("patch of {old:x?} {new:x?} {access:?} at {gva}: {parts:x?}");
        let writable = moment.parts_at(parts);
        let expected = match refusal(parts, None, Patch).filter(is_no_device) {
            _ if !(1..=8).contains(&new.len()) => {
                Some(PatchError::BadLength { old: old.len(), new: new.len() })
            }
            Some(refused) => Some(refused.into()),
            None => refusal(&writable, None, Patch).map(|_| {
                // Of the pages in their order.
                let first = writable.iter().find_map(|part| match part.end {
                    End::HostReadOnly(gpa) => Some(AccessError::HostReadOnly { gpa }),
                    End::Device(gpa) => Some(AccessError::Mmio { gpa, len: part.bytes.len() }),
                    _ => None,
                });
                first.expect("it was refused").into()
            }),
        };
        match (&result, &expected) {
            (Err(error), Some(expected)) => assert_eq!(error, expected, "{}", context()),
            (Ok(done), None) => {
                assert!(blurred || *done == (old == before), "{result:?} {}", context());
                if *done {
                    assert!(blurred || moment.bytes(parts, new.len()) == new, "{}", context());
                    self.note_stores(&map, parts, |_| true);
                }
            }
            _ => panic!("{result:?}, {expected:?} expected: {}", context()),
        }
    }
}

fn is_no_device(error: &AccessError) -> bool {
    !matches!(error, AccessError::Mmio { .. })
}

impl Moment<'_> {
    /// The same places as what is about to be written by who needs no right of the guest's.
    fn parts_at(&self, parts: &[Part]) -> Vec<Part> {
        let at = |part: &Part| {
            let (End::Memory(gpa) | End::Device(gpa)) = part.end else { return part.clone() };
            Part { end: self.end_of_store(gpa), ..part.clone() }
        };
        parts.iter().map(at).collect()
    }
}

fn check_exchange(met: Result<(), u128>, wrong: bool, blurred: bool, before: &[u8]) {
    if !blurred {
        assert_eq!(met, if wrong { Err(word(before)) } else { Ok(()) });
    }
}

fn word(bytes: &[u8]) -> u128 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u128::from(*byte))
}
