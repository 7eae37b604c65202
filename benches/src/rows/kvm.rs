// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's own walk of a guest's tables.
//!
//! `unsafe` is needed to give the kernel memory as a guest's.

use super::walk::{ADDRESSES, Bench, SMALL, Tables, chained};
use crate::figure::{Failure, Figure, Found, Goal, Outcome, Row, check_eq};
use crate::guest::regs;
use crate::measure::{Effort, Variant, calibrate, interleave, timed};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde_json::json;
use std::marker::PhantomData;
use std::sync::atomic::AtomicU64;

/// A virtual machine of the kernel's with one vCPU that is never run.
pub struct Guest<'m> {
    kvm: Kvm,
    vm: VmFd,
    vcpu: VcpuFd,
    /// The memory behind its slots.
    memory: PhantomData<&'m [AtomicU64]>,
}

/// The kernel's interface, or why it cannot be had here.
pub fn open() -> Result<(Kvm, VmFd), String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
    let vm = kvm.create_vm().map_err(|error| format!("KVM_CREATE_VM: {error}"))?;
    Ok((kvm, vm))
}

impl<'m> Guest<'m> {
    /// With the registers and the memory that the engine's walks have.
    pub fn new((kvm, vm): (Kvm, VmFd), tables: &'m Tables) -> Result<Self, Failure> {
        let vcpu = vm.create_vcpu(0).map_err(Failure::in_step("vCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(Failure::in_step("CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(Failure::in_step("CPUID"))?;
        let mut sregs = vcpu.get_sregs().map_err(Failure::in_step("registers"))?;
        let regs = regs(tables.root);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (regs.cr0, regs.cr3, regs.cr4, regs.efer);
        vcpu.set_sregs(&sregs).map_err(Failure::in_step("registers"))?;
        let guest = Self { kvm, vm, vcpu, memory: PhantomData };
        guest.set_slot(0, 0, tables.memory.words())?;
        Ok(guest)
    }

    /// Makes, moves or (without words) deletes a memslot without a dirty log.
    pub fn set_slot(&self, slot: u32, gpa: u64, words: &'m [AtomicU64]) -> Result<(), Failure> {
        self.set_slot_with(slot, gpa, words, 0)
    }

    /// The same with flags.
    pub fn set_slot_with(
        &self,
        slot: u32,
        gpa: u64,
        words: &'m [AtomicU64],
        flags: u32,
    ) -> Result<(), Failure> {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: gpa,
            memory_size: size_of_val(words) as u64,
            userspace_addr: words.as_ptr() as u64,
            flags,
        };
        // SAFETY: the memory outlives the machine (`'m`); all else uses it as atomics.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(Failure::in_step("memslot"))
    }

    /// The kernel's translation.
    pub fn walk(&self, gva: u64) -> Option<u64> {
        let translation = self.vcpu.translate_gva(gva).ok()?;
        (translation.valid == 1).then_some(translation.physical_address)
    }
}

/// W5.
#[derive(Debug)]
pub struct Translate;

impl Row for Translate {
    fn id(&self) -> &'static str {
        "W5"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["W5"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let opened = match open() {
            Ok(opened) => opened,
            Err(reason) => {
                found.outcomes.push(Outcome::Skipped { id: "W5", reason });
                return Ok(found);
            }
        };
        let bench = Bench::new(SMALL)?;
        let guest = Guest::new(opened, &bench.tables)?;
        let gvas = &bench.tables.addresses(ADDRESSES, 1)[..];
        let sum = Tables::sum(gvas);
        let walk = || check_eq("sum of the walks", Bench::WALK(&bench, gvas), Some(sum));
        let translate = || {
            let found = chained(gvas, |gva| guest.walk(gva));
            check_eq("sum of the kernel's translations", found, Some(sum))
        };
        // What it costs to ask the kernel for anything.
        let ask = || match gvas.iter().all(|_| guest.kvm.check_extension_int(Cap::UserMemory) > 0) {
            true => Ok(()),
            false => Err(Failure::new("no user memory")),
        };
        let [walks, translations, questions] =
            [calibrate(effort, walk)?, calibrate(effort, translate)?, calibrate(effort, ask)?];
        let n = gvas.len();
        let variants: Vec<Variant<'_>> = vec![
            ("walk", Box::new(|_| timed(walks, n, walk))),
            ("KVM_TRANSLATE", Box::new(|_| timed(translations, n, translate))),
            ("KVM_CHECK_EXTENSION", Box::new(|_| timed(questions, n, ask))),
        ];
        let samples = interleave(effort, variants)?;
        let what = "W1, speed over KVM_TRANSLATE";
        found.figure(
            Figure::throughput("W5", what, &samples, ["walk", "KVM_TRANSLATE"])?
                .goal(Goal::AtLeast(100.0))
                .detail("table_bytes", json!(bench.tables.bytes())),
        );
        found.plots.push(("W5: a walk beside the kernel's", "ns", samples));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_translates_as_the_tables_say() {
        let Ok(opened) = open() else { return };
        let tables = Tables::new(2);
        let gvas = tables.addresses(50, 3);
        let guest = Guest::new(opened, &tables).unwrap();
        assert_eq!(chained(&gvas, |gva| guest.walk(gva)), Some(Tables::sum(&gvas)));
        assert_eq!(guest.walk(0x1000), None);
    }
}
