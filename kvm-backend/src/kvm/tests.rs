// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Small ring-3 programs on page tables filled by hand. Each test prints why and passes where there is no
//! `/dev/kvm`.

mod drains;
mod faults;
mod kicks;
mod slots;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::layout::{PAGE, pte};
use super::selftest::{PAGE_RW, Playground, SUM};
use super::*;
use crate::regs::Regs;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x800_0000;
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

/// A machine with a root, code at `CODE` (page 0), pages from 1 on for data.
struct Setup {
    p: Playground,
    root: u64,
    vcpus: Vec<KvmVcpu>,
    machine: Arc<KvmMachine>,
}

fn setup(vcpus: usize, code: &[u8]) -> Option<Setup> {
    if let Err(error) = probe() {
        println!("skipped: {error}");
        return None;
    }
    Some(populate(KvmMachine::new(vcpus, 1024).unwrap(), vcpus, code))
}

fn populate(machine: Arc<KvmMachine>, vcpus: usize, code: &[u8]) -> Setup {
    let mut p = Playground::new(&machine, 0, 0x10_0000, 1024).unwrap();
    p.code(0, code);
    let root = p.root(&machine);
    p.map(root, CODE, p.page(0), PAGE_RW & !pte::W);
    let vcpus = (0..vcpus)
        .map(|id| {
            let mut vcpu = machine.vcpu(id).unwrap();
            vcpu.set_root(root).unwrap();
            vcpu.set_regs(&Regs { rip: CODE, ..Regs::default() });
            vcpu
        })
        .collect();
    Setup { p, root, vcpus, machine }
}

/// Runs until something else than an interruption.
fn run(vcpu: &mut KvmVcpu) -> Exit {
    loop {
        match vcpu.run(0).unwrap() {
            Exit::Interrupted => {}
            exit => return exit,
        }
    }
}

fn exception(vector: u8, error_code: Option<u32>) -> impl Fn(&Exit) -> bool {
    move |e| matches!(e, Exit::Exception { vector: v, error_code: c, .. } if (*v, *c) == (vector, error_code))
}

#[test]
fn the_self_test_answers() {
    match self_test() {
        Ok(report) => println!("{report:?}"),
        Err(KvmError::Unavailable { path, error }) => println!("skipped: {path}: {error}"),
        Err(error) => panic!("{error}"),
    }
}

/// Has the guest add up the first words of `count` pages.
fn sum(vcpu: &mut KvmVcpu, count: u64, generation: u64) -> u64 {
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[RCX] = count;
    regs.gpr[RSI] = DATA;
    vcpu.set_regs(&regs);
    loop {
        match vcpu.run(generation).unwrap() {
            Exit::Interrupted => {}
            exit => {
                assert!(exception(6, None)(&exit), "{exit:x?} {:x?}", vcpu.regs());
                return vcpu.regs().gpr[RAX];
            }
        }
    }
}

/// Maps `count` pages from `DATA` on to pages that hold `value`; returns the entries.
fn fill(s: &mut Setup, count: u64, first_page: u64, value: u64) -> Vec<u64> {
    (0..count)
        .map(|n| {
            s.p.word(first_page + n, 0).store(value, Ordering::SeqCst);
            s.p.map(s.root, DATA + n * PAGE, s.p.page(first_page + n), PAGE_RW)
        })
        .collect()
}
