// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulator's accessors, one at a time: every operation on every kind of page, whole and across
//! a border; what each tells the dirty log and the shadow; pins; patches of code; views.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, PinnedAccessError, SlotConfig, SlotId};
use mmu_core::paging::{Access, Fault, Reason, Regs, bits, code};
use mmu_core::shadow::PageRange;
use mmu_core::sync::WouldDeadlock;
use mmu_core::vcpu::{AccessError, Fragment, MAX_PINNED, PatchError, SoftExit, SoftVcpu, Vcpu};
use std::sync::Arc;

/// Two pages of the guest's, which are no neighbours in its memory.
const HERE: u64 = 0x1_0000_0000;
const NEXT: u64 = HERE + PAGE;
const HERE_GPA: u64 = 0x2_0000;
const NEXT_GPA: u64 = 0x3_0000;
/// A slot that guests cannot write, and where no slot is.
const ROM: u64 = 0x100 * MIB;
const NOTHING: u64 = 0xd000_0000;
const APIC: u64 = 0xfee0_0000;

const USER: Access = Access::read().user();

fn guest() -> Guest {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, true);
    let rom = Arc::new(AllocatedMemory::new(16 * PAGE));
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(ROM), rom).read_only()).unwrap();
    guest.map(Gva(HERE), Gpa(HERE_GPA), RWU);
    guest.map(Gva(NEXT), Gpa(NEXT_GPA), RWU);
    guest
}

fn bytes_at(guest: &Guest, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert_eq!(guest.mmu.memory().read(Gpa(gpa), &mut bytes), len);
    bytes
}

/// What the dirty log of slot 0 has had since it was asked last.
fn dirtied(guest: &Guest) -> Vec<u64> {
    let mut bitmap = [0; 16];
    guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    mmu_core::memory::runs(&bitmap).flatten().collect()
}

/// Another path to the same operation.
type Operation = (&'static str, Access, fn(&SoftVcpu, Gva, &mut [u8]) -> Result<(), AccessError>);

/// Everything that reads or writes bytes and does not know devices.
const IN_MEMORY: [Operation; 6] = [
    ("read", USER, |cpu, gva, buf| cpu.vcpu().read(gva, buf, USER)),
    ("read code", Access::execute().user(), |cpu, gva, buf| {
        cpu.vcpu().read(gva, buf, Access::execute().user())
    }),
    ("write", Access::write().user(), |cpu, gva, buf| cpu.vcpu().write(gva, buf, USER)),
    ("view read", USER, |cpu, gva, buf| cpu.vcpu().view(USER).read(gva, buf)),
    ("view write", Access::write().user(), |cpu, gva, buf| cpu.vcpu().view(USER).write(gva, buf)),
    ("pin", Access::write().user(), |cpu, gva, buf| {
        let pinned = cpu.vcpu().pin(gva, buf.len(), Access::write().user())?;
        pinned.write(0, buf).unwrap();
        Ok(())
    }),
];

/// The operations that leave the rest to devices.
const EMULATED: [(&str, bool); 2] = [("read", false), ("write", true)];

fn emulated(
    vcpu: &Vcpu,
    write: bool,
    gva: u64,
    buf: &mut [u8],
) -> Result<Vec<Fragment>, AccessError> {
    match write {
        true => vcpu.write_emulated(Gva(gva), buf, USER),
        false => vcpu.read_emulated(Gva(gva), buf, USER),
    }
}

/// What an access finds in a page.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Page {
    Ram,
    Absent,
    ReadOnly,
    Supervisor,
    NoFetch,
    Reserved,
    Rom,
    Device,
    HostReadOnly,
}

impl Page {
    const ALL: [Self; 9] = [
        Self::Ram,
        Self::Absent,
        Self::ReadOnly,
        Self::Supervisor,
        Self::NoFetch,
        Self::Reserved,
        Self::Rom,
        Self::Device,
        Self::HostReadOnly,
    ];

    /// Makes the page so: `gpa` is where its memory would be.
    fn set(self, guest: &Guest, gva: u64, gpa: u64) {
        let range = PageRange::Guest { base: Gpa(gpa), size: PAGE };
        guest.mmu.set_host_writable(range, self != Self::HostReadOnly).unwrap();
        let entry = match self {
            Self::Ram | Self::HostReadOnly => gpa | RWU,
            Self::Absent => 0,
            Self::ReadOnly => gpa | bits::P | bits::US,
            Self::Supervisor => gpa | bits::P | bits::RW,
            Self::NoFetch => gpa | RWU | bits::NX,
            Self::Reserved => gpa | RWU | 1 << 51,
            Self::Rom => ROM | RWU,
            Self::Device => NOTHING | RWU,
        };
        guest.write(guest.entry(guest.root, Gva(gva), 1), entry);
    }

    /// The fault, HostReadOnly, or nothing; whether memory is there for the access.
    fn outcome(self, access: Access) -> Result<bool, Result<Fault, ()>> {
        use mmu_core::paging::Kind::{Execute, Write};
        let fault = |reason, found| {
            let kind = match access.kind {
                Write => code::W,
                Execute => code::I,
                _ => 0,
            };
            let error_code = code::U | kind | found;
            Err(Ok(Fault { gva: Gva(0), vector: 14, error_code, level: 1, reason }))
        };
        match self {
            Self::Absent => fault(Reason::NotPresent, 0),
            Self::Reserved => fault(Reason::Reserved, code::P | code::RSVD),
            Self::Supervisor => fault(Reason::User, code::P),
            Self::ReadOnly if access.kind == Write => fault(Reason::Write, code::P),
            Self::NoFetch if access.kind == Execute => fault(Reason::Fetch, code::P),
            Self::HostReadOnly if access.kind == Write => Err(Err(())),
            Self::Rom => Ok(access.kind != Write),
            Self::Device => Ok(false),
            _ => Ok(true),
        }
    }

    fn gpa(self, gpa: u64) -> u64 {
        match self {
            Self::Rom => ROM,
            Self::Device => NOTHING,
            _ => gpa,
        }
    }
}

/// Registers with a processor whose physical addresses end below bit 51, so that there is something to
/// reserve.
fn cpu(guest: &Guest) -> SoftVcpu {
    let regs = Regs { maxphyaddr: 48, ..guest.regs() };
    guest.mmu.create_soft_vcpu(regs).unwrap()
}

/// Five bytes in the first page and eleven in the second, on every pair of pages.
#[test]
fn every_pair_of_pages_meets_every_operation() {
    let guest = guest();
    let cpu = cpu(&guest);
    const AT: u64 = HERE + PAGE - 5;
    let places = [(HERE, HERE_GPA), (NEXT, NEXT_GPA)];
    for first in Page::ALL {
        for second in Page::ALL {
            let pages = [first, second];
            let parts = [(AT, HERE_GPA + PAGE - 5, 0..5), (NEXT, NEXT_GPA, 5..16)];
            let fresh = || {
                for (page, (gva, gpa)) in pages.into_iter().zip(places) {
                    Page::Ram.set(&guest, gva, gpa);
                    guest.mmu.write_phys(Gpa(gpa), &[0x11; PAGE as usize]);
                    page.set(&guest, gva, gpa);
                }
            };
            // What the access meets first: page faults, then what the host forbids, then devices.
            let expected = |access: Access, devices: bool| {
                let outcomes = pages.map(|page| page.outcome(access));
                let met = outcomes.iter().zip(&parts);
                let faults = met.clone().find_map(|(outcome, (gva, ..))| match outcome {
                    Err(Ok(fault)) => Some(AccessError::Fault(Fault { gva: Gva(*gva), ..*fault })),
                    _ => None,
                });
                let host = met.clone().find_map(|(outcome, (_, gpa, _))| match outcome {
                    Err(Err(())) => Some(AccessError::HostReadOnly { gpa: Gpa(*gpa) }),
                    _ => None,
                });
                let device =
                    met.zip(pages).find_map(|((outcome, (_, gpa, bytes)), page)| match outcome {
                        Ok(false) if !devices => Some(AccessError::Mmio {
                            gpa: Gpa(page.gpa(gpa & !(PAGE - 1)) + gpa % PAGE),
                            len: bytes.len(),
                        }),
                        _ => None,
                    });
                faults.or(host).or(device).map_or(Ok(()), Err)
            };
            let there = || [bytes_at(&guest, HERE_GPA, 4096), bytes_at(&guest, NEXT_GPA, 4096)];
            for (name, access, operation) in IN_MEMORY {
                fresh();
                let before = there();
                let mut buf = *b"0123456789abcdef";
                let result = operation(&cpu, Gva(AT), &mut buf);
                assert_eq!(result, expected(access, false), "{name} on {pages:?}");
                let write = access.kind == mmu_core::paging::Kind::Write;
                if result.is_err() || !write {
                    assert_eq!(there(), before, "{name} on {pages:?} wrote");
                } else {
                    assert_eq!(there()[0][4091..], *b"01234", "{name} on {pages:?}");
                    assert_eq!(there()[1][..11], *b"56789abcdef", "{name} on {pages:?}");
                }
                if result.is_err() || write {
                    assert_eq!(&buf, b"0123456789abcdef", "{name} on {pages:?} read");
                } else {
                    let seen = |page: Page| if page == Page::Rom { 0 } else { 0x11 };
                    assert_eq!(buf[..5], [seen(first); 5], "{name} on {pages:?}");
                    assert_eq!(buf[5..], [seen(second); 11], "{name} on {pages:?}");
                }
            }
            for (name, write) in EMULATED {
                fresh();
                let access = if write { Access::write().user() } else { USER };
                let before = there();
                let mut buf = *b"0123456789abcdef";
                let result = emulated(cpu.vcpu(), write, AT, &mut buf);
                let Ok(left) = result else {
                    assert_eq!(result.map(drop), expected(access, true), "{name} on {pages:?}");
                    assert_eq!((there(), &buf), (before, b"0123456789abcdef"));
                    continue;
                };
                assert_eq!(Ok(()), expected(access, true), "{name} on {pages:?}");
                // Each byte is in memory or in a fragment, which are in order and 8 bytes at most.
                let mut covered: Vec<usize> =
                    left.iter().flat_map(|fragment| fragment.bytes.clone()).collect();
                assert!(covered.is_sorted());
                assert!(left.iter().all(|f| (1..=8).contains(&f.bytes.len()) && !f.apic));
                for (page, (gva, gpa, bytes)) in pages.into_iter().zip(&parts) {
                    let in_memory = page.outcome(access) == Ok(true);
                    for byte in bytes.clone() {
                        let at = covered.iter().position(|covered| *covered == byte);
                        assert_eq!(at.is_none(), in_memory, "{name} on {pages:?}, byte {byte}");
                        at.map(|at| covered.remove(at));
                        let offset = (gva % PAGE) as usize + byte - bytes.start;
                        if let Some(fragment) = left.iter().find(|f| f.bytes.contains(&byte)) {
                            let gpa = fragment.gpa.0 + (byte - fragment.bytes.start) as u64;
                            let named = page.gpa(0) + offset as u64;
                            assert_eq!(gpa, named, "{name} on {pages:?}, byte {byte}");
                            assert_eq!(buf[byte], b"0123456789abcdef"[byte]);
                        } else if write {
                            let now = bytes_at(&guest, gpa & !(PAGE - 1), 4096)[offset];
                            assert_eq!(now, buf[byte], "{name} on {pages:?}, byte {byte}");
                        } else if page == Page::Rom {
                            assert_eq!(buf[byte], 0);
                        } else {
                            assert_eq!(buf[byte], 0x11);
                        }
                    }
                }
                assert!(covered.is_empty());
            }
            // A locked access across a page: its faults first, then the refusal.
            fresh();
            let before = there();
            let refused = AccessError::Unsupported { gva: Gva(HERE + PAGE - 4), size: 8 };
            let result = cpu.vcpu().cmpxchg(Gva(HERE + PAGE - 4), 8, 0, 1, USER);
            let same = |error: AccessError| match error {
                AccessError::Fault(f) => (0, f.gva.0 & !(PAGE - 1)),
                AccessError::Mmio { gpa, .. } => (1, gpa.0 & !(PAGE - 1)),
                AccessError::HostReadOnly { gpa } => (2, gpa.0 & !(PAGE - 1)),
                _ => (3, 0),
            };
            let expected = expected(Access::write().user(), false).err().unwrap_or(refused);
            assert_eq!(same(result.unwrap_err()), same(expected), "cmpxchg on {pages:?}");
            assert_eq!(there(), before);
        }
    }
    guest.audit();
}

#[test]
fn the_end_of_an_access_is_checked_before_its_beginning_is_translated() {
    let guest = guest();
    let cpu = guest.vcpu();
    // The last canonical page of the lower half is not mapped.
    let at = Gva((1 << 47) - 4);
    let fault = |result: Result<(), AccessError>| match result {
        Err(AccessError::Fault(fault)) => (fault.vector, fault.error_code, fault.gva),
        other => panic!("{other:?}"),
    };
    let end = Gva(1 << 47);
    assert_eq!(fault(cpu.vcpu().read(at, &mut [0; 8], USER)), (Fault::GP, 0, end));
    assert_eq!(fault(cpu.vcpu().write(at, &[0; 8], USER)), (Fault::GP, 0, end));
    assert_eq!(fault(cpu.vcpu().read(at, &mut [0; 4], USER)), (Fault::PF, code::U, at));
    // From the last byte of the address space to its first.
    guest.map(Gva(0), Gpa(HERE_GPA), RWU);
    guest.map(Gva(!(PAGE - 1)), Gpa(NEXT_GPA), RWU);
    cpu.vcpu().write(Gva(u64::MAX), b"ab", USER).unwrap();
    assert_eq!(bytes_at(&guest, HERE_GPA, 1), *b"b");
    assert_eq!(bytes_at(&guest, NEXT_GPA + PAGE - 1, 1), *b"a");
}

#[test]
fn a_refused_access_leaves_the_guests_tables_alone() {
    let guest = guest();
    let cpu = guest.vcpu();
    let entry = guest.entry(guest.root, Gva(HERE), 1);
    Page::ReadOnly.set(&guest, NEXT, NEXT_GPA);
    let before = guest.read(entry);
    cpu.vcpu().write(Gva(NEXT - 4), &[1; 8], USER).unwrap_err();
    assert_eq!(guest.read(entry), before, "accessed and dirty bits without a write");
    Page::Ram.set(&guest, NEXT, NEXT_GPA);
    cpu.vcpu().write(Gva(NEXT - 4), &[1; 8], USER).unwrap();
    assert_eq!(guest.read(entry), before | bits::A | bits::D);
    // A fetch touches the page that it is in, and asks for the right to fetch.
    let next = guest.entry(guest.root, Gva(NEXT), 1);
    Page::NoFetch.set(&guest, NEXT, NEXT_GPA);
    let mut code = [0; 15];
    assert_eq!(cpu.vcpu().fetch(Gva(NEXT - 4), &mut code, USER), Ok(4));
    assert!(cpu.vcpu().fetch(Gva(NEXT), &mut code, USER).is_err());
    assert_eq!(guest.read(next) & bits::A, 0);
}

#[test]
fn the_apic_page_comes_before_memory() {
    let guest = guest();
    let memory = Arc::new(AllocatedMemory::new(PAGE));
    guest.mmu.create_slot(SlotConfig::new(2, Gpa(APIC), memory)).unwrap();
    guest.map(Gva(HERE), Gpa(APIC), RWU);
    let mut cpu = guest.vcpu();
    let tpr = Gva(HERE + 0x80);
    let written = cpu.vcpu().write_emulated(tpr, &[7; 4], USER);
    assert_eq!(written, Ok(vec![]), "no page was named");
    cpu.vcpu_mut().set_apic_page(Some(Gpa(APIC))).unwrap();
    let fragment = |gpa, bytes, apic| Fragment { gpa: Gpa(gpa), bytes, apic };
    let mut buf = [1; 4];
    let vcpu = cpu.vcpu();
    let expected = vec![fragment(APIC + 0x80, 0..4, true)];
    assert_eq!(vcpu.read_emulated(tpr, &mut buf, USER), Ok(expected.clone()));
    assert_eq!(vcpu.write_emulated(tpr, &[9; 4], USER), Ok(expected));
    assert_eq!((buf, bytes_at(&guest, APIC + 0x80, 4)), ([1; 4], vec![7; 4]));
    let refused = AccessError::Apic { gpa: Gpa(APIC + 0x80) };
    assert_eq!(vcpu.cmpxchg(tpr, 4, 0, 0, USER), Err(refused));
    // Sixteen bytes from the APIC's page into memory: two exits of eight bytes at most.
    let parts = vcpu.read_emulated(Gva(NEXT - 12), &mut [0; 16], USER).unwrap();
    let last = APIC + PAGE;
    assert_eq!(parts, [fragment(last - 12, 0..8, true), fragment(last - 4, 8..12, true)]);
    // What is surely memory is read as memory.
    let mut there = [0; 4];
    vcpu.read(tpr, &mut there, USER).unwrap();
    assert_eq!(there, [7; 4]);
    cpu.vcpu_mut().set_apic_page(None).unwrap();
    assert_eq!(cpu.vcpu().cmpxchg(tpr, 4, 0x0707_0707, 1, USER), Ok(Ok(())));
}

#[test]
fn exchanges_of_every_size_and_place() {
    let guest = guest();
    let mut cpu = guest.vcpu();
    let has_16 = cfg!(target_arch = "x86_64") && {
        let wide = cpu.vcpu().cmpxchg(Gva(HERE), 16, 0, 0, USER);
        wide != Err(AccessError::Unsupported { gva: Gva(HERE), size: 16 })
    };
    for size in [1, 2, 4, 8, 16] {
        for offset in 0..128 {
            let gva = Gva(HERE + 0x100 + offset);
            let old: [u8; 128] = core::array::from_fn(|i| i as u8);
            let both = [false, true].map(|native| {
                guest.mmu.write_phys(Gpa(HERE_GPA + 0x100), &[0xee; 160]);
                guest.mmu.write_phys(Gpa(HERE_GPA + 0x100), &old);
                let mut expected = [0; 16];
                let seen = bytes_at(&guest, HERE_GPA + 0x100 + offset, size);
                expected[..size].copy_from_slice(&seen);
                let expected = u128::from_le_bytes(expected);
                let new = !expected & (u128::MAX >> (128 - 8 * size));
                let mut exchange = |old, new| match native {
                    true => cpu.session().cmpxchg(gva, size, old, new, true).map_err(|e| match e {
                        SoftExit::Unsupported { gva, size } => {
                            AccessError::Unsupported { gva, size }
                        }
                        other => panic!("{other:?}"),
                    }),
                    false => cpu.vcpu().cmpxchg(gva, size, old, new, USER),
                };
                let first = exchange(expected ^ 1, new);
                if first.is_ok() {
                    assert_eq!(first, Ok(Err(expected)), "{size} at {offset}");
                    assert_eq!(exchange(expected, new), Ok(Ok(())));
                }
                let mut wanted = [0xee; 160];
                wanted[..128].copy_from_slice(&old);
                if first.is_ok() {
                    let place = offset as usize..offset as usize + size;
                    wanted[place].copy_from_slice(&new.to_le_bytes()[..size]);
                }
                assert_eq!(bytes_at(&guest, HERE_GPA + 0x100, 160), wanted, "{size} at {offset}");
                first.is_ok()
            });
            let within_word = offset % 8 + size as u64 <= 8;
            let within_line = offset % 64 + size as u64 <= 64;
            let possible = match size {
                16 => has_16 && offset % 16 == 0,
                _ => within_word || cfg!(target_arch = "x86_64") && within_line,
            };
            assert_eq!(both, [possible; 2], "{size} at {offset}");
        }
    }
    for size in [0, 3, 5, 9, 15, 17, 64, usize::MAX] {
        let refused = AccessError::Unsupported { gva: Gva(HERE), size };
        assert_eq!(cpu.vcpu().cmpxchg(Gva(HERE), size, 0, 0, USER), Err(refused));
        let refused = SoftExit::Unsupported { gva: Gva(HERE), size };
        assert_eq!(cpu.session().cmpxchg(Gva(HERE), size, 0, 0, true), Err(refused));
    }
    // A fault of either page comes before the refusal of a split lock.
    Page::ReadOnly.set(&guest, NEXT, NEXT_GPA);
    let at = |result: Result<_, AccessError>| match result {
        Err(AccessError::Fault(fault)) => (fault.gva, fault.error_code),
        other => panic!("{other:?}"),
    };
    let write = code::P | code::W | code::U;
    assert_eq!(at(cpu.vcpu().cmpxchg(Gva(NEXT - 4), 8, 0, 0, USER)), (Gva(NEXT), write));
    assert!(matches!(
        cpu.session().cmpxchg(Gva(NEXT - 4), 8, 0, 0, true),
        Err(SoftExit::Fault(fault)) if (fault.gva, fault.error_code) == (Gva(NEXT), write)
    ));
    // The right to write is needed even if nothing is exchanged.
    assert_eq!(at(cpu.vcpu().cmpxchg(Gva(NEXT), 8, 1, 0, USER)), (Gva(NEXT), write));
    guest.audit();
}

/// Each way to write is in the dirty log, with the pages that it wrote and no others, and drops what
/// was derived from the entry.
#[test]
fn writes_are_logged_and_told_to_the_shadow() {
    let guest = guest();
    let window = Gva(0x40_0000);
    let entry = guest.entry(guest.root, window, 1);
    // The guest reaches its own table.
    guest.map(Gva(HERE), entry.page(), RWU);
    let at = Gva(HERE + entry.page_offset());
    guest.write(Gpa(0x1000), 0xa);
    guest.write(Gpa(0x2000), 0xb);
    let mut cpu = guest.vcpu();
    let code = Access::execute().user();
    type Write = fn(&Guest, &mut SoftVcpu, Gva, u64, u64);
    let ways: [(&str, Write); 9] = [
        ("write", |_, cpu, at, _, new| {
            cpu.vcpu().write(at, &new.to_le_bytes(), USER).unwrap();
        }),
        ("write_emulated", |_, cpu, at, _, new| {
            assert_eq!(cpu.vcpu().write_emulated(at, &new.to_le_bytes(), USER), Ok(vec![]));
        }),
        ("cmpxchg", |_, cpu, at, old, new| {
            let done = cpu.vcpu().cmpxchg(at, 8, old.into(), new.into(), USER);
            assert_eq!(done, Ok(Ok(())));
        }),
        ("cmpxchg of a part", |_, cpu, at, old, new| {
            let (old, new) = (old as u16 as u128, new as u16 as u128);
            assert_eq!(cpu.vcpu().cmpxchg(at, 2, old, new, USER), Ok(Ok(())));
        }),
        ("pin", |_, cpu, at, _, new| {
            let pinned = cpu.vcpu().pin(at, 8, Access::write().user()).unwrap();
            pinned.write(0, &new.to_le_bytes()).unwrap();
        }),
        ("view", |_, cpu, at, _, new| {
            cpu.vcpu().view(USER).write(at, &new.to_le_bytes()).unwrap();
        }),
        ("view cmpxchg", |_, cpu, at, old, new| {
            let view = cpu.vcpu().view(USER);
            assert_eq!(view.cmpxchg(at, 8, old.into(), new.into()), Ok(Ok(())));
        }),
        ("native cmpxchg", |_, cpu, at, old, new| {
            let done = cpu.session().cmpxchg(at, 8, old.into(), new.into(), true);
            assert_eq!(done, Ok(Ok(())));
        }),
        ("patch", |guest, _, at, old, new| {
            let gpa = Gpa(at.0 - HERE + guest.entry(guest.root, Gva(0x40_0000), 1).page().0);
            let (old, new) = (old.to_le_bytes(), new.to_le_bytes());
            assert_eq!(guest.mmu.patch_code(gpa, &old, &new), Ok(true));
        }),
    ];
    for (name, write) in ways {
        // With A and D, so that a walk changes nothing.
        let [old, new] = [0x1000, 0x2000].map(|gpa| gpa | RWU | bits::A | bits::D);
        guest.write(entry, old);
        cpu.session().invlpg(window);
        assert_eq!(load(&mut cpu, window.0), 0xa, "{name}");
        // The tables on the way get their bits.
        cpu.vcpu().read(at, &mut [0], Access::write().user()).unwrap();
        let _ = cpu.vcpu().read(at, &mut [0], code);
        dirtied(&guest);
        write(&guest, &mut cpu, at, old, new);
        assert_eq!(guest.read(entry), new, "{name}");
        cpu.session().invlpg(window);
        assert_eq!(load(&mut cpu, window.0), 0xb, "{name}: the old translation is still there");
        assert_eq!(dirtied(&guest), [entry.gfn().0], "{name}");
        guest.audit();
    }
}

#[test]
fn what_is_pinned_stays() {
    let guest = guest();
    let backing = Arc::new(AllocatedMemory::new(4 * PAGE));
    let slot = SlotConfig::new(3, Gpa(16 * MIB), backing.clone()).log_dirty();
    guest.mmu.create_slot(slot).unwrap();
    guest.map(Gva(HERE), Gpa(16 * MIB), RWU);
    let cpu = guest.vcpu();
    let vcpu = cpu.vcpu();
    let write = Access::write().user();
    let pinned = vcpu.pin(Gva(NEXT - 6), 10, write).unwrap();
    assert_eq!((pinned.len(), pinned.is_empty(), pinned.pages().len()), (10, false, 2));
    assert_eq!(pinned.pages()[0].place(), (SlotId(3), 0));
    assert_eq!(pinned.pages()[1].place(), (SlotId(0), NEXT_GPA));
    pinned.write(0, b"0123456789").unwrap();
    // Reported until it is released, and once more.
    let log = || {
        let mut bitmap = [0];
        guest.mmu.dirty_log(SlotId(3), &mut bitmap).unwrap();
        bitmap[0]
    };
    assert_eq!([log(), log()], [1, 1]);
    // The slot goes, the guest's table changes; the bytes are where they were.
    let release = guest.mmu.delete_slot(SlotId(3)).unwrap();
    assert_eq!((release.pinned_pages, release.is_complete()), (1, false));
    guest.map(Gva(NEXT), Gpa(NEXT_GPA + PAGE), RWU);
    pinned.write(3, b"ABCDE").unwrap();
    let mut bytes = [0; 10];
    pinned.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"012ABCDE89");
    pinned.read(5, &mut bytes[..3]).unwrap();
    assert_eq!(&bytes[..3], b"CDE");
    assert_eq!(bytes_at(&guest, NEXT_GPA, 4), *b"DE89"[..].to_vec());
    drop(pinned);
    assert_eq!(Arc::strong_count(&backing), 1, "the pin was the last hold");
    // What is not pinned is not reached.
    let pinned = vcpu.pin(Gva(NEXT + 8), 16, USER).unwrap();
    let size = 16;
    for (at, len) in [(0, 17), (1, 16), (17, 0), (u64::MAX, 2), (16, 1)] {
        let out = PinnedAccessError::OutOfRange { at, len, size };
        assert_eq!(pinned.read(at, &mut vec![0; len]), Err(out));
        assert_eq!(pinned.write(at, &vec![0; len]), Err(out));
    }
    let refused = PinnedAccessError::ReadOnly { at: 8, len: 1 };
    assert_eq!(pinned.write(0, &[1]), Err(refused), "pinned for reading");
    assert_eq!(pinned.read(16, &mut []), Ok(()));
    let page = &pinned.pages()[0];
    assert_eq!(page.read(PAGE - 1, &mut [0]), Ok(()));
    let out = PinnedAccessError::OutOfRange { at: PAGE - 1, len: 2, size: PAGE };
    assert_eq!(page.read(PAGE - 1, &mut [0; 2]), Err(out));
    assert!(format!("{pinned:?}").contains("len: 16"));
}

#[test]
fn a_fault_comes_before_the_first_pin() {
    let guest = guest();
    let cpu = guest.vcpu();
    let write = Access::write().user();
    dirtied(&guest);
    Page::ReadOnly.set(&guest, NEXT, NEXT_GPA);
    let refused = cpu.vcpu().pin(Gva(NEXT - 4), 8, write).unwrap_err();
    let AccessError::Fault(fault) = refused else { panic!("{refused:?}") };
    assert_eq!((fault.gva, fault.error_code), (Gva(NEXT), code::P | code::W | code::U));
    assert!(!dirtied(&guest).contains(&(HERE_GPA / PAGE)), "a page pinned for writing is dirty");
    assert!(cpu.vcpu().pin(Gva(NEXT - 4), 8, USER).is_ok());
    let too_long = AccessError::TooLong { gva: Gva(HERE), len: MAX_PINNED + 1, max: MAX_PINNED };
    assert_eq!(cpu.vcpu().pin(Gva(HERE), MAX_PINNED + 1, USER).unwrap_err(), too_long);
    assert!(cpu.vcpu().pin(Gva(HERE), MAX_PINNED, USER).is_ok());
    assert!(cpu.vcpu().pin(Gva(0x7000), 0, USER).unwrap().is_empty());
    Page::Device.set(&guest, NEXT, NEXT_GPA);
    let refused = AccessError::Mmio { gpa: Gpa(NOTHING), len: 4 };
    assert_eq!(cpu.vcpu().pin(Gva(NEXT - 4), 8, USER).unwrap_err(), refused);
}

#[test]
fn code_is_patched_where_it_is_fetched() {
    let guest = guest();
    let mut cpu = guest.vcpu();
    let fetch = Access::execute().user();
    // Within a word, across words, across a line, across a page.
    for at in [HERE + 0x101, HERE + 0x106, HERE + 0x13e, NEXT - 1] {
        let (old, new) = ([0x0f, 0x01, 0xc1], [0x0f, 0x01, 0xd9]);
        cpu.vcpu().write(Gva(at - 2), &[0x90; 7], USER).unwrap();
        cpu.vcpu().write(Gva(at), &old, USER).unwrap();
        let mut code = [0; 7];
        cpu.session().fetch(Gva(at - 2), &mut code, true).unwrap();
        assert_eq!(code, [0x90, 0x90, 0x0f, 0x01, 0xc1, 0x90, 0x90]);
        dirtied(&guest);
        assert_eq!(cpu.vcpu_mut().patch_code(Gva(at), &old, &new, fetch), Ok(true));
        let pages = if at == NEXT - 1 { vec![HERE_GPA, NEXT_GPA] } else { vec![HERE_GPA] };
        let pages: Vec<_> = pages.into_iter().map(|gpa| gpa / PAGE).collect();
        assert_eq!(dirtied(&guest), pages, "{at:#x}");
        cpu.session().fetch(Gva(at - 2), &mut code, true).unwrap();
        assert_eq!(code, [0x90, 0x90, 0x0f, 0x01, 0xd9, 0x90, 0x90], "{at:#x}");
        // Not there any more: nothing happens, not even to the part that is the same.
        assert_eq!(cpu.vcpu_mut().patch_code(Gva(at), &old, &[1, 2, 3], fetch), Ok(false));
        cpu.session().fetch(Gva(at - 2), &mut code, true).unwrap();
        assert_eq!(code, [0x90, 0x90, 0x0f, 0x01, 0xd9, 0x90, 0x90], "{at:#x}");
        assert_eq!(dirtied(&guest), [0; 0]);
    }
    guest.audit();
}

#[test]
fn a_patch_is_refused_by_name() {
    let guest = guest();
    let mut cpu = guest.vcpu();
    let fetch = Access::execute().user();
    let mut patch =
        |gva: u64, old: &[u8], new: &[u8]| cpu.vcpu_mut().patch_code(Gva(gva), old, new, fetch);
    for (old, new) in [(0, 0), (3, 2), (9, 9), (0, 1)] {
        let bad = PatchError::BadLength { old, new };
        assert_eq!(patch(HERE, &vec![0; old], &vec![0; new]), Err(bad));
        assert_eq!(guest.mmu.patch_code(Gpa(HERE_GPA), &vec![0; old], &vec![0; new]), Err(bad));
    }
    // The guest's right to write is not needed, the one to fetch is.
    Page::ReadOnly.set(&guest, NEXT, NEXT_GPA);
    assert_eq!(patch(NEXT - 1, &[0; 2], &[1; 2]), Ok(true));
    Page::NoFetch.set(&guest, NEXT, NEXT_GPA);
    let refused = patch(NEXT - 1, &[1; 2], &[0; 2]);
    assert!(
        matches!(refused, Err(PatchError::Access(AccessError::Fault(fault)))
            if fault.gva == Gva(NEXT) && fault.reason == Reason::Fetch),
        "{refused:?}"
    );
    let access = |error| Err(PatchError::Access(error));
    Page::HostReadOnly.set(&guest, NEXT, NEXT_GPA);
    let refused = AccessError::HostReadOnly { gpa: Gpa(NEXT_GPA) };
    assert_eq!(patch(NEXT - 1, &[1; 2], &[0; 2]), access(refused));
    for (page, gpa) in [(Page::Rom, ROM), (Page::Device, NOTHING)] {
        page.set(&guest, NEXT, NEXT_GPA);
        let refused = AccessError::Mmio { gpa: Gpa(gpa), len: 1 };
        assert_eq!(patch(NEXT - 1, &[1; 2], &[0; 2]), access(refused));
        let refused = AccessError::Mmio { gpa: Gpa(gpa), len: 2 };
        assert_eq!(guest.mmu.patch_code(Gpa(gpa), &[1; 2], &[0; 2]), access(refused));
    }
    assert!(guest.mmu.patch_code(Gpa(u64::MAX), &[0; 2], &[0; 2]).is_err());
    assert_eq!(bytes_at(&guest, HERE_GPA + PAGE - 1, 1), [1], "the first page was not touched");
    // Threads that must not wait.
    {
        let _resolver = guest.mmu.resolver();
        let refused = Err(PatchError::WouldDeadlock(WouldDeadlock::Resolver));
        assert_eq!(guest.mmu.patch_code(Gpa(HERE_GPA), &[0], &[0]), refused);
    }
    let range = PageRange::Guest { base: Gpa(0), size: PAGE };
    let _invalid = guest.mmu.invalidate(range).unwrap();
    let refused = Err(PatchError::WouldDeadlock(WouldDeadlock::Invalidating));
    assert_eq!(guest.mmu.patch_code(Gpa(HERE_GPA), &[0], &[0]), refused);
}

#[test]
fn a_view_has_its_own_privilege() {
    let guest = guest();
    let regs = Regs { cr4: guest.regs().cr4 | bits::CR4_SMAP | bits::CR4_SMEP, ..guest.regs() };
    let ac = Regs { rflags: regs.rflags | bits::RFLAGS_AC, ..regs };
    guest.map(Gva(NEXT), Gpa(NEXT_GPA), bits::P | bits::RW | bits::NX);
    let view = |regs: &Regs, who| guest.mmu.view(regs, who).unwrap();
    let reason = |regs: &Regs, who, gva: u64| {
        let view = view(regs, who);
        let read = view.read(Gva(gva), &mut [0; 8]);
        let fault = match read {
            Err(AccessError::Fault(fault)) => Some(fault),
            Ok(()) => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(view.translate(Gva(gva)).err(), fault);
        fault.map(|fault| fault.reason)
    };
    let (user, kernel) = (Access::read().user(), Access::read());
    assert_eq!(reason(&regs, user, HERE), None);
    assert_eq!(reason(&regs, user, NEXT), Some(Reason::User));
    assert_eq!(reason(&regs, kernel, HERE), Some(Reason::Smap));
    assert_eq!(reason(&ac, kernel, HERE), None);
    assert_eq!(reason(&ac, kernel.implicit(), HERE), Some(Reason::Smap));
    assert_eq!(reason(&regs, kernel, NEXT), None);
    assert_eq!(reason(&regs, Access::execute(), HERE), Some(Reason::Smep));
    assert_eq!(reason(&regs, Access::execute(), NEXT), Some(Reason::Fetch));
    assert_eq!(reason(&regs, Access::execute().user(), HERE), None);
    assert!(matches!(
        view(&regs, kernel).write(Gva(HERE), &[1]),
        Err(AccessError::Fault(fault)) if fault.reason == Reason::Smap
    ));
    assert!(guest.mmu.view(&Regs { maxphyaddr: 9, ..regs }, user).is_err());
    // A vCPU's view keeps the registers of when it was made, and may go to another thread.
    let mut cpu = guest.vcpu();
    let old = cpu.vcpu().view(USER);
    let other = Gpa(guest.new_table().0);
    cpu.vcpu_mut().set_cr3(other.0).unwrap();
    let seen = std::thread::spawn(move || old.clone().read(Gva(HERE), &mut [0; 8]));
    assert_eq!(seen.join().unwrap(), Ok(()));
    assert!(cpu.vcpu().view(USER).read(Gva(HERE), &mut [0; 8]).is_err());
}

/// Modes that the shadow may not follow are no hindrance for a view: without paging, addresses have 32
/// bits and wrap.
#[test]
fn a_view_without_paging_wraps_at_four_gigabytes() {
    let guest = guest();
    let memory = Arc::new(AllocatedMemory::new(PAGE));
    guest.mmu.create_slot(SlotConfig::new(2, Gpa((4 << 30) - PAGE), memory)).unwrap();
    let real = Regs { cr0: 0x10, cr4: 0, efer: 0, ..guest.regs() };
    let view = guest.mmu.view(&real, Access::read()).unwrap();
    view.write(Gva((4 << 30) - 2), b"abcd").unwrap();
    assert_eq!(bytes_at(&guest, (4 << 30) - 2, 2), *b"ab");
    assert_eq!(bytes_at(&guest, 0, 2), *b"cd");
}

/// Tables that name themselves, each other, and nothing: whatever the guest does, an access ends, and
/// in one of the ways that are documented.
#[test]
fn tables_in_knots_end_in_an_answer() {
    let guest = guest();
    let cpu = cpu(&guest);
    // The root as its own child at every level: its entries are data, too.
    let root = guest.root;
    for index in 0..512 {
        guest.write(Gpa(root.0 + index * 8), root.0 | RWU);
    }
    let mut buf = [0; 16];
    for at in [0, 8, PAGE - 8, 0x7fff_ffff_eff8, 0xffff_8000_0000_0000] {
        cpu.vcpu().read(Gva(at), &mut buf, USER).unwrap();
        // Each store changes the table that translates it.
        cpu.vcpu().write(Gva(at + 4), &(root.0 | RWU).to_le_bytes(), USER).unwrap();
        let exchanged = cpu.vcpu().cmpxchg(Gva(at), 8, 0, 0, USER);
        assert!(matches!(exchanged, Ok(_) | Err(AccessError::Fault(_))), "{exchanged:?}");
        for index in 0..512 {
            guest.write(Gpa(root.0 + index * 8), root.0 | RWU);
        }
    }
    cpu.vcpu().write(Gva(0), &[0; 4096], USER).unwrap();
    assert!(cpu.vcpu().read(Gva(0), &mut buf, USER).is_err());
    // A table in a device, in ROM, and beyond the processor's addresses.
    for table in [NOTHING, ROM, 1 << 50] {
        guest.write(root, table | RWU);
        assert!(cpu.vcpu().read_emulated(Gva(0), &mut buf, USER).is_err());
        assert!(cpu.vcpu().write_emulated(Gva(PAGE - 1), &[0; 2], USER).is_err());
        assert!(cpu.vcpu().pin(Gva(PAGE - 1), 2, USER).is_err());
    }
    guest.audit();
}

#[test]
fn native_stores_are_whole_or_not_at_all() {
    let guest = guest();
    let mut cpu = guest.vcpu();
    store(&mut cpu, NEXT - 8, 0);
    Page::Device.set(&guest, NEXT, NEXT_GPA);
    cpu.session().invlpg(Gva(NEXT));
    let missed = cpu.session().store(Gva(NEXT - 4), &[0xff; 8], true);
    assert_eq!(missed, Err(SoftExit::Mmio(Gpa(NOTHING))));
    assert_eq!(load(&mut cpu, NEXT - 8), 0);
    // What the VMM does then: the part in memory, and a device's.
    let mut session = cpu.session();
    let left = session.vcpu().write_emulated(Gva(NEXT - 4), &[0xff; 8], USER);
    assert_eq!(left, Ok(vec![Fragment { gpa: Gpa(NOTHING), bytes: 4..8, apic: false }]));
    assert_eq!(session.load_u64(Gva(NEXT - 8), true), Ok(0xffff_ffff << 32));
}
