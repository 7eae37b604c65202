// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! R25: a vCPU whose fault comes again and again gets on by emulation.

mod common;

use common::{Guest, MIB, PAGE, RWU, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::SlotId;
use mmu_core::paging::{Access, bits};
use mmu_core::shadow::{Outcome, PageRange, Processor, Stall};
use mmu_core::vcpu::Vcpu;
use std::sync::Arc;

struct Still;

impl Processor for Still {
    fn kick(&self) {}

    fn forgets_outside(&self) -> bool {
        true
    }
}

const DATA: u64 = 0x40_0000;
/// The fault of this number in a row is emulated.
const PATIENCE: usize = 16;

fn write(vcpu: &mut Vcpu, gva: u64) -> Outcome {
    loop {
        match vcpu.fault(Gva(gva), Access::write().user()) {
            Ok(outcome) => return outcome,
            Err(stall) => while vcpu.must_wait(stall) {},
        }
    }
}

fn guest() -> Guest {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    for page in 0..2 {
        let gpa = Gpa(0x1000 + page * PAGE);
        guest.map(Gva(DATA + page * PAGE), gpa, RWU | bits::A | bits::D);
    }
    guest
}

fn vcpu(guest: &Guest) -> Vcpu {
    guest.mmu.create_vcpu(Arc::new(Still), guest.regs()).unwrap()
}

/// Whatever takes the entry away before the access is repeated: here, the host.
#[test]
fn the_same_write_again_and_again_is_emulated() {
    let guest = guest();
    let mut vcpu = vcpu(&guest);
    for _ in 0..2 {
        for time in 1..PATIENCE {
            assert_eq!(write(&mut vcpu, DATA), Outcome::Fixed, "{time}");
            guest.mmu.zap_all();
        }
        assert_eq!(write(&mut vcpu, DATA), Outcome::Emulate { gpa: Gpa(0x1000) });
        vcpu.write(Gva(DATA), &7u64.to_le_bytes(), Access::write().user()).unwrap();
        assert_eq!(guest.read(Gpa(0x1000)), 7);
    }
    guest.audit();
}

/// Other faults in between are progress: nothing is emulated.
#[test]
fn writes_in_turn_are_never_emulated() {
    let guest = guest();
    let mut vcpu = vcpu(&guest);
    for time in 0..4 * PATIENCE as u64 {
        assert_eq!(write(&mut vcpu, DATA + time % 2 * PAGE), Outcome::Fixed, "{time}");
        guest.mmu.zap_all();
    }
    guest.audit();
}

/// What needs only W was there: the log was taken between two stores, most likely. A log that is taken again
/// before each store does not stop the guest for ever.
#[test]
fn stores_that_a_log_is_taken_between_are_emulated_late() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, true);
    guest.map(Gva(DATA), Gpa(0x1000), RWU | bits::A | bits::D);
    let mut cpu = guest.vcpu();
    for value in 0..50 * PATIENCE as u64 {
        store(&mut cpu, DATA, value);
        assert!(guest.mmu.dirty_log(SlotId(0), &mut [0; 16]).unwrap() > 0);
    }
    let stats = guest.mmu.stats();
    assert_eq!((stats.pf_emulate, stats.pf_fast), (0, 50 * PATIENCE as u64 - 1), "{stats:?}");
    let mut vcpu = vcpu(&guest);
    let late = (0..).find(|_| {
        let outcome = write(&mut vcpu, DATA);
        guest.mmu.dirty_log(SlotId(0), &mut [0; 16]).unwrap();
        outcome == Outcome::Emulate { gpa: Gpa(0x1000) }
    });
    assert_eq!(late, Some(60 * PATIENCE));
    guest.audit();
}

/// A fault that waits has not been served in vain.
#[test]
fn stalls_are_not_counted() {
    let guest = guest();
    let mut vcpu = vcpu(&guest);
    let range = PageRange::Guest { base: Gpa(0x1000), size: PAGE };
    let taken = guest.mmu.invalidate(range).unwrap();
    for _ in 0..4 * PATIENCE {
        let stalled = vcpu.fault(Gva(DATA), Access::write().user());
        assert!(matches!(stalled, Err(Stall::Invalidation(_))), "{stalled:?}");
    }
    drop(taken);
    assert_eq!(write(&mut vcpu, DATA), Outcome::Fixed);
    guest.audit();
}

/// A stack in the very table that maps it, and tables that point at themselves at every level: each
/// store changes what it goes through, and each one ends.
#[test]
fn stores_to_the_tables_they_go_through_end() {
    for native in [false, true] {
        let guest = Guest::with(Guest::config(256).unsync(native), 4 * MIB, 2 * MIB, false);
        let table = Gpa(guest.entry(guest.root, Gva(DATA), 1).0 & !(PAGE - 1));
        guest.map(Gva(DATA), table, RWU);
        // The last entry of the root is the root: all tables are visible.
        guest.write(Gpa(guest.root.0 + 8 * 511), guest.root.0 | RWU);
        let mut cpu = guest.vcpu();
        for round in 0..100 {
            store(&mut cpu, DATA + 8 * (8 + round), (0x1000 + round * PAGE) | RWU);
            store(&mut cpu, (!0 << 12) | (8 * (8 + round)), (0x1000 + round * PAGE) | RWU);
            let seen = guest.read(Gpa(guest.root.0 + 8 * (8 + round)));
            assert_eq!(seen & bits::ADDR, 0x1000 + round * PAGE);
            let seen = guest.read(Gpa(table.0 + 8 * (8 + round)));
            assert_eq!(seen & bits::ADDR, 0x1000 + round * PAGE);
        }
        cpu.flush();
        guest.audit();
    }
}
