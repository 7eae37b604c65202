// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whole guests on every backend that is here: the workloads, and guests that go wrong.

use kvm_backend::cpu::Crash;
use kvm_backend::guest::layout::{CHURN_GPA, CHURN_GVA, CODE_GVA, DATA_GVA, UNMAPPED_GVA};
use kvm_backend::guest::paging::index;
use kvm_backend::guest::{Call, Program};
use kvm_backend::kvm::STUB_VA;
use kvm_backend::session::{RunError, Session};
use kvm_backend::vm::{Backend, Vm};
use kvm_backend::workload::{self, Plan, Workload};
use mmu_core::addr::{Gpa, Gva, PAGE_SIZE};
use mmu_core::memory::{SlotConfig, SlotId};
use mmu_core::paging::Reason;
use std::sync::Arc;
use std::time::Duration;

/// The backends that can be tried here; says which cannot.
fn backends() -> Vec<Backend> {
    let mut all = vec![Backend::Soft];
    match Backend::best() {
        (Backend::Kvm, _) => all.push(Backend::Kvm),
        (_, why) => eprintln!("SKIPPED on KVM: {why}"),
    }
    all
}

fn verify(workload: Workload, vcpus: usize) {
    for backend in backends() {
        let time = Duration::from_millis(700);
        let plan = Plan { backend, vcpus, memory_mib: 8, time };
        let outcome = workload::run(workload, &plan, &mut |_| ()).unwrap();
        assert!(outcome.verified(), "{backend:?}: {:?} {:?}", outcome.error, outcome.audit);
        assert!(outcome.faults() > 50, "{backend:?}: {:?}", outcome.stats);
        println!("{backend:?} {workload:?} with {vcpus} vCPUs: {}", outcome.summary);
    }
}

#[test]
fn touch() {
    verify(Workload::Touch, 2);
    verify(Workload::Touch, 5);
}

#[test]
fn remap() {
    verify(Workload::Remap, 2);
    verify(Workload::Remap, 4);
}

#[test]
fn precopy() {
    verify(Workload::Precopy, 2);
    verify(Workload::Precopy, 3);
}

#[test]
fn churn() {
    verify(Workload::Churn, 1);
    verify(Workload::Churn, 2);
    verify(Workload::Churn, 5);
}

#[test]
fn switch() {
    verify(Workload::Switch, 1);
    verify(Workload::Switch, 2);
    verify(Workload::Switch, 5);
}

/// Runs a program on vCPU 1 (vCPU 0 idles) and returns how it ended.
fn end_of(vm: &Vm, program: Program, address: Option<u64>) -> Result<Call, RunError> {
    let limit = Duration::from_secs(2);
    Session::with(vm, limit, &mut || (), |session| {
        let mut regs = vm.image().entry(program, 1);
        if let Some(address) = address {
            regs.gpr[7] = address;
        }
        session.start(1, regs);
        session.wait().map(|halted| Call::from_regs(&halted[1]))
    })
}

fn small(backend: Backend) -> Vm {
    Vm::new(backend, 2, 4, false).unwrap()
}

#[test]
fn a_guest_that_crashes_is_reported() {
    for backend in backends() {
        let vm = small(backend);
        match end_of(&vm, Program::ReadUnmapped, None) {
            Err(RunError::Crash { place, crash: Crash::Fault(fault) }) => {
                assert_eq!(fault.gva, Gva(UNMAPPED_GVA), "{backend:?}");
                assert_eq!((fault.reason, fault.error_code), (Reason::NotPresent, 4));
                assert_eq!(place.vcpu, 1);
                let program = CODE_GVA + Program::ReadUnmapped.offset();
                assert!((program..program + 64).contains(&place.regs.rip), "{place}");
            }
            other => panic!("{backend:?}: {other:?}"),
        }
        let ud = end_of(&vm, Program::Ud2, None).unwrap_err().to_string();
        assert!(ud.contains("#UD"), "{backend:?}: {ud}");
        let gp = end_of(&vm, Program::NonCanonical, None).unwrap_err().to_string();
        assert!(gp.contains("vCPU 1") && (gp.contains("#GP") || gp.contains("canonical")), "{gp}");
        vm.mmu().audit().unwrap();
    }
}

#[test]
fn a_fault_that_is_expected_goes_to_the_program() {
    let there = CODE_GVA + Program::ReadUnmapped.offset();
    let limit = Duration::from_secs(2);
    for backend in backends() {
        let vm = small(backend);
        let run = |deliver: bool, resume| {
            Session::with(&vm, limit, &mut || (), |session| {
                let mut regs = vm.image().entry(Program::ReadUnmapped, 1);
                regs.gpr[12] = resume;
                match deliver {
                    true => session.start_delivering(1, regs),
                    false => session.start(1, regs),
                }
                session.wait().map(|halted| halted[1])
            })
        };
        // Behind the instruction that faults (48 8b 07) the program says that it is done.
        let regs = run(true, there + 3).unwrap();
        assert_eq!(Call::from_regs(&regs), Call::Done(0), "{backend:?}");
        assert_eq!(regs.gpr[12..15], [0, 4, UNMAPPED_GVA], "{backend:?}");
        // To the faulting instruction itself: the second time nothing is expected.
        for (deliver, resume) in [(true, there), (true, 0), (false, there + 3)] {
            match run(deliver, resume) {
                Err(RunError::Crash { place, crash: Crash::Fault(fault) }) => {
                    assert_eq!((fault.gva, place.regs.rip), (Gva(UNMAPPED_GVA), there));
                    assert_eq!(place.regs.gpr[12], if deliver { 0 } else { resume });
                }
                other => panic!("{backend:?}: {other:?}"),
            }
        }
        vm.mmu().audit().unwrap();
    }
}

#[test]
fn the_watchdog_ends_a_guest_that_hangs() {
    for backend in backends() {
        match end_of(&small(backend), Program::Spin, None) {
            Err(RunError::Stuck { places, .. }) => {
                let spin = CODE_GVA + Program::Spin.offset();
                assert_eq!(places.len(), 1, "{backend:?}");
                assert!((spin..spin + 64).contains(&places[0].regs.rip), "{}", places[0]);
            }
            other => panic!("{backend:?}: {other:?}"),
        }
    }
}

#[test]
fn the_stubs_part_of_the_address_space_is_refused() {
    for backend in backends().into_iter().filter(|backend| *backend == Backend::Kvm) {
        let vm = small(backend);
        // Not mapped by the guest: an ordinary fault.
        match end_of(&vm, Program::ReadUnmapped, Some(STUB_VA)) {
            Err(RunError::Crash { crash: Crash::Fault(fault), .. }) => {
                assert_eq!(fault.gva, Gva(STUB_VA));
            }
            other => panic!("{other:?}"),
        }
        // Mapped by the guest: it would read its own memory there on a real machine.
        let entry = |gva| vm.image().cr3() + 8 * index(gva, 4) as u64;
        let mut data = [0; 8];
        vm.with_memory(|read| read(entry(DATA_GVA), &mut data));
        vm.write_word(entry(STUB_VA), u64::from_le_bytes(data));
        match end_of(&vm, Program::ReadUnmapped, Some(STUB_VA)) {
            Err(RunError::Crash { crash: Crash::Reserved(gva), .. }) => {
                assert_eq!(gva, Gva(STUB_VA));
            }
            other => panic!("{other:?}"),
        }
        vm.mmu().audit().unwrap();
    }
}

#[test]
fn memory_comes_and_goes() {
    for backend in backends() {
        let vm = small(backend);
        let read = |page| end_of(&vm, Program::ReadUnmapped, Some(CHURN_GVA + page * PAGE_SIZE));
        let is_there = |page| match read(page) {
            Ok(Call::Done(_)) => true,
            Err(RunError::Crash { crash: Crash::NoDevice(gpa), .. }) => {
                assert_eq!(gpa, Gpa(CHURN_GPA + page * PAGE_SIZE), "{backend:?}");
                false
            }
            other => panic!("{backend:?}: {other:?}"),
        };
        assert!(!is_there(0) && !is_there(1));
        let memory = vm.new_memory(PAGE_SIZE).unwrap();
        let machine = memory.machine();
        let config = SlotConfig::new(7, Gpa(CHURN_GPA), Arc::clone(&memory));
        vm.mmu().create_slot(config).unwrap();
        assert!(is_there(0) && !is_there(1));
        vm.mmu().move_slot(SlotId(7), Gpa(CHURN_GPA + PAGE_SIZE)).unwrap();
        assert!(!is_there(0) && is_there(1));
        let other = vm.new_memory(PAGE_SIZE).unwrap();
        assert_ne!(other.machine(), machine);
        assert!(vm.mmu().delete_slot(SlotId(7)).unwrap().is_complete());
        assert!(!is_there(0) && !is_there(1));
        // With its last owner it is gone, and other memory can be where it was.
        assert_eq!(Arc::strong_count(&memory), 1);
        drop(memory);
        let memory = vm.new_memory(PAGE_SIZE).unwrap();
        assert_eq!(memory.machine(), machine, "{backend:?}");
        vm.mmu().create_slot(SlotConfig::new(8, Gpa(CHURN_GPA), memory)).unwrap();
        assert!(is_there(0) && !is_there(1));
        vm.mmu().audit().unwrap();
    }
}

#[test]
fn guests_that_cannot_be_made_are_refused_by_name() {
    for (vcpus, memory, said) in [(0, 64, "not 0"), (65, 64, "not 65"), (2, 3, "not 3")] {
        let error = Vm::new(Backend::Soft, vcpus, memory, false).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
