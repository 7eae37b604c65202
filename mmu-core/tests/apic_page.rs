// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page of a local APIC: its vCPU's accesses come out of the guest although there is memory, which
//! others still reach.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, store};
use mmu_core::Mmu;
use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{Alias, AllocatedMemory, SlotConfig};
use mmu_core::paging::{Access, bits};
use mmu_core::shadow::Outcome;
use mmu_core::sync::WouldDeadlock;
use mmu_core::vcpu::{Fragment, SoftExit, SoftVcpu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;

const USER: Access = Access::read().user();
/// In memory that a guest page of 2 MiB maps.
const APIC: u64 = 4 * MIB + 0x7000;
const AT: u64 = 16 * MIB + 0x7000;

/// 16 MiB to 4 MiB, once by a large page.
fn guest() -> Guest {
    let mmu = Mmu::new(Guest::config(256).largest_page(2 * MIB)).unwrap();
    let memory = Arc::new(AllocatedMemory::at(8 * MIB, Machine(1 << 40)));
    mmu.create_slot(SlotConfig::new(0, Gpa(0), memory)).unwrap();
    let guest = Guest::over(mmu, 2 * MIB);
    guest.write(guest.entry(guest.root, Gva(16 * MIB), 2), (4 * MIB) | RWU | bits::PS);
    guest.map(Gva(0x9000), Gpa(APIC), RWU);
    guest.map(Gva(0xa000), Gpa(APIC + PAGE), RWU | bits::A | bits::D);
    guest
}

fn apic_exits(cpu: &mut SoftVcpu, gva: u64) {
    let exit = SoftExit::Mmio(Gpa(APIC + 0x80));
    let mut session = cpu.session();
    assert_eq!(session.load(Gva(gva + 0x80), &mut [0; 4], true), Err(exit));
    assert_eq!(session.store(Gva(gva + 0x80), &[0; 4], true), Err(exit));
    assert_eq!(session.fetch(Gva(gva + 0x80), &mut [0; 4], true), Err(exit));
    assert_eq!(session.cmpxchg(Gva(gva + 0x80), 4, 0, 0, true), Err(exit));
}

#[test]
fn a_guests_access_to_the_apic_page_comes_out() {
    let guest = guest();
    guest.write(Gpa(APIC + 0x80), 0x11);
    guest.write(Gpa(APIC + PAGE), 0x22);
    let [mut one, mut other] = [guest.vcpu(), guest.vcpu()];
    for cpu in [&mut one, &mut other] {
        assert_eq!([load(cpu, AT + 0x80), load(cpu, 0x9080)], [0x11; 2]);
    }
    assert!(guest.mmu.stats().pf_large > 0, "the large page is mapped whole");
    one.vcpu_mut().set_apic_page(Some(Gpa(APIC + 0x123))).unwrap();
    for cpu in [&mut one, &mut other] {
        // Neighbours are mapped, by a table in the place of the large page.
        assert_eq!([load(cpu, AT + PAGE), load(cpu, 0xa000)], [0x22; 2]);
        store(cpu, AT - PAGE, 5);
    }
    apic_exits(&mut one, AT);
    apic_exits(&mut one, 0x9000);
    let fault = |cpu: &mut SoftVcpu| cpu.vcpu_mut().fault(Gva(AT), USER);
    assert_eq!(fault(&mut one), Ok(Outcome::Mmio { gpa: Gpa(APIC) }));
    // For the other it is memory, which is reached as it was.
    assert_eq!(fault(&mut other), Ok(Outcome::Emulate { gpa: Gpa(APIC) }));
    assert_eq!([load(&mut other, AT + 0x80), load(&mut other, 0x9080)], [0x11; 2]);
    store(&mut other, AT + 0x80, 0x12);
    assert_eq!(other.session().cmpxchg(Gva(0x9080), 8, 0x12, 0x11, true), Ok(Ok(())));
    let mut code = [0; 16];
    other.session().fetch(Gva(AT + 0x7c), &mut code, true).unwrap();
    assert_eq!(code[4], 0x11);
    guest.audit();
    // The accessors know whose it is.
    let mut buf = [0; 4];
    let fragment = Fragment { gpa: Gpa(APIC + 0x80), bytes: 0..4, apic: true };
    let left = one.vcpu().read_emulated(Gva(AT + 0x80), &mut buf, USER);
    assert_eq!(left, Ok(vec![fragment]));
    assert_eq!(other.vcpu().read_emulated(Gva(AT + 0x80), &mut buf, USER), Ok(vec![]));
    assert_eq!(buf, [0x11, 0, 0, 0]);

    // As long as one of them has its APIC there.
    other.vcpu_mut().set_apic_page(Some(Gpa(APIC))).unwrap();
    one.vcpu_mut().set_apic_page(None).unwrap();
    assert_eq!(fault(&mut one), Ok(Outcome::Emulate { gpa: Gpa(APIC) }));
    other.vcpu_mut().set_apic_page(Some(Gpa(0xfee0_0000))).unwrap();
    assert_eq!([load(&mut one, AT + 0x80), load(&mut other, 0x9080)], [0x11; 2]);
    guest.audit();
    // A vCPU that is gone has none, as soon as the map changes.
    other.vcpu_mut().set_apic_page(Some(Gpa(APIC))).unwrap();
    apic_exits(&mut other, AT);
    drop(other);
    let slot = SlotConfig::new(1, Gpa(64 * MIB), Arc::new(AllocatedMemory::new(PAGE)));
    guest.mmu.create_slot(slot).unwrap();
    assert_eq!(load(&mut one, AT + 0x80), 0x11);
    assert_eq!(fault(&mut one), Ok(Outcome::Fixed), "mapped");
    guest.audit();
}

#[test]
fn a_thread_that_must_not_wait_is_refused() {
    let guest = guest();
    let mut cpu = guest.vcpu();
    {
        let _resolver = guest.mmu.resolver();
        let refused = cpu.vcpu_mut().set_apic_page(Some(Gpa(APIC)));
        assert_eq!(refused, Err(WouldDeadlock::Resolver));
    }
    load(&mut cpu, AT);
    let mut buf = [0; 4];
    assert_eq!(cpu.vcpu().read_emulated(Gva(AT), &mut buf, USER), Ok(vec![]), "not named");
}

/// A page is named while others use it and what is around it: after that nobody has it mapped.
#[test]
fn nobody_has_a_page_mapped_that_was_named() {
    let guest = guest();
    // Odd while the page is named.
    let (named, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                let mut cpu = guest.vcpu();
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let was_named = named.load(Ordering::SeqCst);
                    let gva = if round % 2 == 0 { AT } else { 0x9000 };
                    let faults = cpu.vcpu().faults();
                    load(&mut cpu, gva);
                    let natively = cpu.vcpu().faults() == faults;
                    let is_named = named.load(Ordering::SeqCst);
                    assert!(
                        !(natively && was_named == is_named && is_named % 2 == 1),
                        "round {round}"
                    );
                    load(&mut cpu, gva + PAGE);
                }
            });
        }
        let mut cpu = guest.vcpu();
        for _ in 0..60 {
            cpu.vcpu_mut().set_apic_page(Some(Gpa(APIC))).unwrap();
            named.fetch_add(1, Ordering::SeqCst);
            std::thread::yield_now();
            apic_exits(&mut cpu, AT);
            named.fetch_add(1, Ordering::SeqCst);
            cpu.vcpu_mut().set_apic_page(None).unwrap();
            load(&mut cpu, AT);
        }
        stop.store(true, Ordering::Relaxed);
    });
    guest.audit();
}

/// Two names of one page of memory, one of which is an APIC's: a table that the guest changes from the
/// other to that keeps nothing that was derived from it, whether it is in sync or not.
#[test]
fn what_was_mapped_by_another_name_goes() {
    const ALIAS: u64 = 64 * MIB;
    const TABLE: u64 = 0xb000;
    for natively in [false, true] {
        let guest = guest();
        let alias = Alias { number: 0, base: Gpa(ALIAS), size: PAGE, target: Gpa(APIC) };
        guest.mmu.set_alias(alias).unwrap();
        let [mut one, mut other] = [guest.vcpu(), guest.vcpu()];
        one.vcpu_mut().set_apic_page(Some(Gpa(ALIAS))).unwrap();
        let flags = RWU | bits::A | bits::D;
        let entry = guest.entry(guest.root, Gva(0x9000), 1);
        guest.map(Gva(TABLE), entry.page(), flags);
        for cpu in [&mut one, &mut other] {
            load(cpu, 0x9000);
        }
        if natively {
            store(&mut one, TABLE + entry.page_offset(), ALIAS | flags);
            assert_eq!(guest.mmu.stats().mmu_unsync, 1);
        } else {
            guest.write(entry, ALIAS | flags);
        }
        for cpu in [&mut one, &mut other] {
            cpu.invlpg(Gva(0x9000));
        }
        let exit = SoftExit::Mmio(Gpa(ALIAS));
        assert_eq!(one.session().load(Gva(0x9000), &mut [0; 4], true), Err(exit));
        let fault = other.vcpu_mut().fault(Gva(0x9000), USER);
        assert_eq!(fault, Ok(Outcome::Emulate { gpa: Gpa(ALIAS) }));
        guest.audit();
    }
}
