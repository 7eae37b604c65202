// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The workloads of `shadowmmu run`: what the guest does, and how the host checks it.

mod churn;
mod switch;

use crate::guest::layout::control;
use crate::guest::{Call, GuestImage, verify};
use crate::regs::Regs;
use crate::session::{RunError, Session};
use crate::vm::{Backend, Vm, VmError};
use mmu_core::addr::PAGE_SIZE;
use mmu_core::shadow::{AuditReport, Disagreement, StatsSnapshot};
use std::time::{Duration, Instant};

/// First seed of the guests' patterns.
const SEED: u64 = 0x5eed_0001;
/// How long a guest may make no progress.
pub const WATCHDOG: Duration = Duration::from_secs(20);

/// A workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// Every vCPU writes and re-reads its share of a range, then all of them the same range.
    Touch,
    /// Guests edit their own live page tables.
    Remap,
    /// The host copies memory by dirty-log rounds while the guests write without pause.
    Precopy,
    /// The host changes the memory map while the guests use it.
    Churn,
    /// Guests switch between address spaces and edit their page tables.
    Switch,
}

impl Workload {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 5] = [Self::Touch, Self::Remap, Self::Precopy, Self::Churn, Self::Switch];

    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Touch => "touch",
            Self::Remap => "remap",
            Self::Precopy => "precopy",
            Self::Churn => "churn",
            Self::Switch => "switch",
        }
    }
}

/// How a workload is run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Who executes the guest.
    pub backend: Backend,
    /// vCPUs.
    pub vcpus: usize,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// How long.
    pub time: Duration,
}

/// What came of a workload.
#[derive(Debug)]
pub struct Outcome {
    /// The workload.
    pub workload: Workload,
    /// The first thing that was wrong.
    pub error: Option<RunError>,
    /// The audit of the shadow afterwards.
    pub audit: Result<AuditReport, Disagreement>,
    /// The engine's counters.
    pub stats: StatsSnapshot,
    /// How long the guest ran.
    pub time: Duration,
    /// What the workload counted, for people.
    pub summary: String,
}

impl Outcome {
    /// Whether the guest's memory and the shadow were as they should be.
    #[must_use]
    pub fn verified(&self) -> bool {
        self.error.is_none() && self.audit.is_ok()
    }

    /// Faults that the engine served.
    #[must_use]
    pub fn faults(&self) -> u64 {
        let s = &self.stats;
        s.pf_fixed + s.pf_spurious + s.pf_emulate + s.pf_guest + s.pf_mmio
    }

    /// Faults served per second of guest time.
    #[must_use]
    pub fn faults_per_second(&self) -> f64 {
        self.faults() as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// Makes a guest and runs a workload in it. `tick` is called several times a second with the
/// guest's engine.
///
/// # Errors
///
/// [`VmError`] if the guest cannot be made. What goes wrong in it is in the [`Outcome`].
pub fn run(workload: Workload, plan: &Plan, tick: &mut dyn FnMut(&Vm)) -> Result<Outcome, VmError> {
    let vm = Vm::new(plan.backend, plan.vcpus, plan.memory_mib, workload == Workload::Precopy)?;
    let begin = Instant::now();
    let mut timed = begin;
    let result = Session::with(&vm, WATCHDOG, &mut || tick(&vm), |session| {
        timed = Instant::now();
        let end = timed + plan.time;
        match workload {
            Workload::Touch => touch(&vm, session, end),
            Workload::Remap => remap(&vm, session, end),
            Workload::Precopy => precopy(&vm, session, end),
            Workload::Churn => churn::churn(&vm, session, end),
            Workload::Switch => switch::switch(&vm, session, end),
        }
    });
    let (summary, time, error) = match result {
        Ok((summary, time)) => (summary, time, None),
        Err(error) => (String::new(), timed.elapsed(), Some(error)),
    };
    let audit = vm.mmu().audit();
    Ok(Outcome { workload, error, audit, stats: vm.mmu().stats(), time, summary })
}

/// Summary, and how long the guest ran.
type Done = Result<(String, Duration), RunError>;

fn touch(vm: &Vm, session: &mut Session<'_>, end: Instant) -> Done {
    let (mut passes, mut ran) = (0, Duration::ZERO);
    loop {
        let seed = SEED + passes;
        let begin = Instant::now();
        for id in 0..vm.vcpus() {
            session.start(id, vm.image().touch(id, seed));
        }
        done(&session.wait()?)?;
        ran += begin.elapsed();
        passes += 1;
        check(vm, |image, read| verify::touch(image, seed, read))?;
        audit(vm)?;
        if Instant::now() >= end {
            return Ok((format!("{passes} passes over {} pages", pages(vm)), ran));
        }
        // The next pass faults everything in again.
        vm.mmu().zap_all();
    }
}

fn remap(vm: &Vm, session: &mut Session<'_>, end: Instant) -> Done {
    let begin = Instant::now();
    for id in 0..vm.vcpus() {
        session.start(id, vm.image().remap(id, u64::MAX - 1));
    }
    session.run_until(end)?;
    vm.write_word(vm.image().control_gpa(control::STOP), 1);
    let results = done(&session.wait()?)?;
    let ran = begin.elapsed();
    let rounds = results[0];
    if let Some(other) = results.iter().find(|other| **other != rounds) {
        return Err(RunError::Failed(format!("vCPU 0 saw {rounds} rounds, another {other}")));
    }
    check(vm, |image, read| verify::remap(image, rounds, read))?;
    Ok((format!("{rounds} rounds of edits"), ran))
}

fn precopy(vm: &Vm, session: &mut Session<'_>, end: Instant) -> Done {
    let mut copy = Copy::new(vm);
    let begin = Instant::now();
    for id in 0..vm.vcpus() {
        session.start(id, vm.image().precopy(id, SEED));
    }
    // The first round copies everything; what is written meanwhile is in a later one.
    copy.harvest(vm)?;
    copy.all(vm);
    let (mut rounds, mut copied) = (1, pages(vm));
    while Instant::now() < end {
        copied += copy.harvest(vm)?;
        rounds += 1;
        session.run_until(Instant::now() + Duration::from_millis(10))?;
    }
    vm.write_word(vm.image().control_gpa(control::STOP), 1);
    let counts = done(&session.wait()?)?;
    let ran = begin.elapsed();
    // Stopped: no operation is in flight on any thread.
    copied += copy.harvest(vm)?;
    copy.compare(vm)?;
    check(vm, |image, read| verify::precopy(image, SEED, &counts, read))?;
    let writes: u64 = counts.iter().sum();
    Ok((format!("{} rounds, {copied} pages copied, {writes} guest writes", rounds + 1), ran))
}

/// The destination of a migration.
struct Copy {
    bytes: Vec<u8>,
    bitmap: Vec<u64>,
}

impl Copy {
    fn new(vm: &Vm) -> Self {
        let size = vm.image().layout().memory();
        let words = (size / PAGE_SIZE).div_ceil(64) as usize;
        Self { bytes: vec![0; size as usize], bitmap: vec![0; words] }
    }

    fn page(&mut self, vm: &Vm, gpa: u64) {
        let range = gpa as usize..(gpa + PAGE_SIZE) as usize;
        vm.with_memory(|read| read(gpa, &mut self.bytes[range]));
    }

    fn all(&mut self, vm: &Vm) {
        vm.with_memory(|read| read(0, &mut self.bytes));
    }

    /// Takes the dirty log and copies what is in it; the number of pages.
    fn harvest(&mut self, vm: &Vm) -> Result<u64, RunError> {
        let mut pages = 0;
        let map = vm.mmu().memory();
        for slot in map.slots() {
            let mut bitmap = std::mem::take(&mut self.bitmap);
            let harvested = vm.mmu().dirty_log(slot.id(), &mut bitmap);
            pages += harvested.map_err(|error| RunError::Failed(error.to_string()))?;
            let base = slot.base().gpa().0;
            for (word, bits) in bitmap.iter().enumerate() {
                for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                    self.page(vm, base + (word as u64 * 64 + bit) * PAGE_SIZE);
                }
            }
            self.bitmap = bitmap;
        }
        Ok(pages)
    }

    /// The copy must equal the memory, byte for byte.
    fn compare(&self, vm: &Vm) -> Result<(), RunError> {
        let mut page = vec![0; PAGE_SIZE as usize];
        for (n, copied) in self.bytes.chunks(PAGE_SIZE as usize).enumerate() {
            let gpa = n as u64 * PAGE_SIZE;
            vm.with_memory(|read| read(gpa, &mut page));
            if let Some(at) = (0..copied.len()).find(|at| copied[*at] != page[*at]) {
                return Err(RunError::Failed(format!(
                    "the copy differs at gpa {:#x}: {:#x} in the copy, {:#x} in memory",
                    gpa + at as u64,
                    copied[at],
                    page[at]
                )));
            }
        }
        Ok(())
    }
}

fn pages(vm: &Vm) -> u64 {
    vm.image().layout().memory() / PAGE_SIZE
}

/// The results of guests that have all finished without finding anything wrong.
fn done(halted: &[Regs]) -> Result<Vec<u64>, RunError> {
    let result = |(vcpu, regs): (usize, &Regs)| match Call::from_regs(regs) {
        Call::Done(result) => Ok(result),
        Call::Failed { gva, expected, seen } => Err(RunError::Failed(format!(
            "vCPU {vcpu} read {seen:#x} at gva {gva:#x}, expected {expected:#x}"
        ))),
        Call::Unknown(function) => {
            Err(RunError::Failed(format!("vCPU {vcpu} made unknown hypercall {function:#x}")))
        }
    };
    halted.iter().enumerate().map(result).collect()
}

fn check(
    vm: &Vm,
    verify: impl FnOnce(&GuestImage, verify::Read<'_>) -> Result<(), verify::Mismatch>,
) -> Result<(), RunError> {
    vm.with_memory(|read| verify(vm.image(), read))
        .map_err(|mismatch| RunError::Failed(mismatch.to_string()))
}

fn audit(vm: &Vm) -> Result<(), RunError> {
    vm.mmu().audit().map(drop).map_err(|error| RunError::Failed(format!("audit: {error}")))
}
