// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `switch`: guests run in several address spaces in turn and edit their page tables, whether they are
//! loaded nowhere, here, or on another vCPU.
//!
//! The guest checks what it meets ([`crate::guest::switch`]). Half of the time the host zaps the shadow
//! again and again, so that tables become shadowed while they are edited. Now and then the guest is
//! stopped, and the host compares all its memory with what the program must have left, audits the
//! shadow, and has it begin again with another seed.

use super::{Done, SEED, audit, check, done};
use crate::guest::layout::{MAX_VCPUS, control};
use crate::guest::switch::{Counts, Model, Spaces};
use crate::session::{RunError, Session};
use crate::vm::Vm;
use mmu_core::addr::Gpa;
use std::time::{Duration, Instant};

/// Longest time between two looks at the memory.
const PASS: Duration = Duration::from_millis(500);
/// Time between two zaps of the shadow.
const ZAP: Duration = Duration::from_millis(10);

pub(super) fn switch(vm: &Vm, session: &mut Session<'_>, end: Instant) -> Done {
    let spaces =
        Spaces::new(vm.image().layout()).map_err(|error| RunError::Failed(error.to_string()))?;
    let (mut passes, mut turns, mut ran) = (0, 0, Duration::ZERO);
    let mut counts = Counts::default();
    loop {
        // A vCPU's generator begins with the sum of its number and this.
        let seed = SEED + passes * MAX_VCPUS as u64;
        let begin = Instant::now();
        let end_of_pass = end.min(begin + PASS);
        let made = pass(vm, session, &spaces, seed, end_of_pass);
        ran += begin.elapsed();
        let mut model = Model::new(vm.image(), &spaces);
        let checked = made.and_then(|made| {
            made.iter().enumerate().for_each(|(id, turns)| model.replay(id, seed, *turns));
            check(vm, |_, read| model.check(read))?;
            audit(vm)?;
            Ok(made)
        });
        turns += checked.map_err(|error| of_pass(error, seed))?.iter().sum::<u64>();
        counts = counts.plus(model.counts());
        passes += 1;
        if Instant::now() >= end {
            check(vm, |_, read| model.check_rest(read)).map_err(|error| of_pass(error, seed))?;
            return Ok((format!("{passes} passes, {turns} turns: {counts}"), ran));
        }
    }
}

/// Turns that each vCPU made.
fn pass(
    vm: &Vm,
    session: &mut Session<'_>,
    spaces: &Spaces,
    seed: u64,
    end: Instant,
) -> Result<Vec<u64>, RunError> {
    let mut write = |gpa, bytes: &[u8]| {
        vm.mmu().write_phys(Gpa(gpa), bytes);
    };
    vm.image().reset_control(&mut write);
    spaces.write(vm.image(), &mut write);
    for id in 0..vm.vcpus() {
        session.start_delivering(id, vm.image().switch(spaces, id, seed));
    }
    // The first half of the time with zaps, the second without.
    let zaps = Instant::now() + end.saturating_duration_since(Instant::now()) / 2;
    while Instant::now() < zaps {
        session.run_until(zaps.min(Instant::now() + ZAP))?;
        vm.mmu().zap_all();
    }
    session.run_until(end)?;
    vm.write_word(vm.image().control_gpa(control::STOP), 1);
    done(&session.wait()?)
}

/// What is wrong, with what it takes to see it again.
fn of_pass(error: RunError, seed: u64) -> RunError {
    match error {
        RunError::Failed(wrong) => RunError::Failed(format!("{wrong}; seed {seed:#x}")),
        other => other,
    }
}
