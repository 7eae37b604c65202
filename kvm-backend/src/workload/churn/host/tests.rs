// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host without a guest, and with an engine that does not do what it says.

use super::*;
use crate::guest::churn::{LANES, identity};
use crate::guest::layout::CHURN_GPA;
use crate::guest::paging::PAGE;
use crate::session::{RunError, Session};
use crate::vm::Backend;
use crate::workload::churn::NoMemory;
use crate::workload::churn::model::{Named, Target};
use mmu_core::addr::Gpa;
use mmu_core::memory::{SlotFlags, SlotId};
use std::sync::Arc;
use std::time::Instant;

fn small() -> Vm {
    let vm = Vm::new(Backend::Soft, 2, 4, false).unwrap();
    vm.image().write_stable(&mut |gpa, bytes| {
        vm.mmu().write_phys(Gpa(gpa), bytes);
    });
    vm
}

/// The engine's map is the host's, and so is what the guest is told.
fn compare(vm: &Vm, host: &Host<'_>) {
    for place in 0..CHURN_PAGES {
        let view = host.map.view(place);
        let mut bytes = [0xff; 8];
        let read = vm.mmu().memory().read(operations::window(place), &mut bytes);
        assert_eq!(read == 8, view != View::Hole, "place {place}");
        assert_eq!(u64::from_le_bytes(bytes), view.identity(), "place {place}");
        if host.pages.contains(&place) {
            let state = |word: u64| word_of(vm, STATES_GPA + place * STATE + word * 8);
            let told = (state(0) % 2, state(1), state(2), state(3));
            assert_eq!(told, (0, view.identity(), view.identity(), view.rights()));
        }
    }
}

#[test]
fn the_engines_map_follows_the_hosts() {
    let vm = small();
    let mut host = Host::new(&vm, 1, 0x5eed);
    for step in 0..3000 {
        host.step().unwrap_or_else(|wrong| panic!("{wrong}; {}", host.history()));
        if step % 8 == 0 {
            compare(&vm, &host);
        }
    }
    compare(&vm, &host);
    host.check().unwrap();
    assert!(host.map.slots.len() > 1 && host.graves.len() > 1, "{:?}", host.map);
    println!("{}", host.counts());
    let history = host.history();
    assert!(history.contains("host thread 1") && history.contains("deleted slot"), "{history}");
    vm.mmu().audit().unwrap();
}

/// Runs guests, and has the host lie to them. What they take offence at.
fn offence(lie: impl FnOnce(&mut Host<'_>) -> Result<(), String>) -> String {
    let vm = small();
    let device = Arc::new(NoMemory::default());
    vm.mmu().bus().register(CHURN_GPA, CHURN_PAGES * PAGE, device).unwrap();
    let mut host = Host::new(&vm, 0, 3);
    let _other = Host::new(&vm, 1, 3);
    while host.map.slots.len() < 4 || host.map.slots.iter().any(|s| s.flags.read_only) {
        host.step().unwrap();
    }
    while !host.map.aliases.is_empty() {
        host.unalias().unwrap();
    }
    let result = Session::with(&vm, Duration::from_secs(5), &mut || (), |session| {
        (0..2).for_each(|id| session.start(id, vm.image().churn(id, 3)));
        session.run_until(Instant::now() + Duration::from_millis(50))?;
        lie(&mut host).map_err(RunError::Failed)?;
        session.run_until(Instant::now() + Duration::from_secs(10))
    });
    match result {
        Err(RunError::Failed(wrong)) => wrong,
        other => panic!("{other:?}; {}", host.history()),
    }
}

/// The engine is asked for nothing, and says that it was done.
fn nothing(_: &Mmu) -> Result<(), String> {
    Ok(())
}

#[test]
fn guests_see_memory_that_was_not_deleted() {
    let seen = offence(|host| {
        let mut after = host.map.clone();
        after.slots.remove(0);
        host.change(String::new(), after, nothing)
    });
    assert!(seen.contains("Failed") && seen.contains("expected: ffffffffffffffff"), "{seen}");
}

#[test]
fn guests_see_memory_that_did_not_come() {
    let seen = offence(|host| {
        let mut after = host.map.clone();
        let slot = after.slots.remove(0);
        host.change(String::new(), after, |mmu| mmu.delete_slot(SlotId(slot.slot)))?;
        let mut after = host.map.clone();
        after.slots.push(slot);
        host.change(String::new(), after, nothing)
    });
    assert!(seen.contains("Failed") && seen.contains("seen: ffffffffffffffff"), "{seen}");
}

#[test]
fn guests_see_memory_that_was_not_protected() {
    let seen = offence(|host| {
        let mut after = host.map.clone();
        after.slots[0].flags.read_only = true;
        host.change(String::new(), after, nothing)
    });
    assert!(seen.contains("Failed"), "{seen}");
}

#[test]
fn guests_see_an_alias_that_was_not_set() {
    let seen = offence(|host| {
        let (mut after, base) = (host.map.clone(), host.map.slots[0].base);
        after.aliases.push(Named { number: 0, base, pages: 1, target: Target::Stable(3) });
        host.change(String::new(), after, nothing)
    });
    let stable = format!("expected: {:x}", identity(STABLE, 3));
    assert!(seen.contains("Failed") && seen.contains(&stable), "{seen}");
}

#[test]
fn the_host_sees_stores_to_memory_that_was_taken_away() {
    let vm = small();
    let mut host = Host::new(&vm, 0, 9);
    while host.graves.is_empty() {
        host.step().unwrap();
    }
    host.graves[0].backing.words()[(LANES / 8) as usize].store(1, Ordering::Relaxed);
    let error = (0..1000).find_map(|_| host.step().err()).expect("nothing seen");
    assert!(error.contains("store to memory that was taken away"), "{error}");
}

#[test]
fn the_host_sees_pages_that_no_log_names() {
    let vm = small();
    let mut host = Host::new(&vm, 0, 9);
    while host.map.slots.is_empty() {
        host.add().unwrap();
    }
    host.flags(0, SlotFlags::default()).unwrap();
    host.begin_copy().unwrap();
    let slot = host.map.slots[0].clone();
    let lane = operations::window(slot.base).wrapping_add(LANES);
    vm.mmu().write_phys(lane, &1u64.to_le_bytes());
    host.harvest_one().unwrap();
    vm.mmu().write_phys(lane, &2u64.to_le_bytes());
    // Somebody takes the log and does not copy.
    assert_eq!(vm.mmu().dirty_log(SlotId(slot.slot), &mut [0; 1]), Ok(1));
    let error = host.end_copy().unwrap_err();
    assert!(error.contains("no dirty log names"), "{error}");
    assert!(error.contains("expected 0x1, seen 0x2"), "{error}");
}
