// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `churn`: the host changes the memory map while the guest uses it.
//!
//! Two threads of the host add, delete, move and alias memory in a window of guest-physical memory,
//! change its flags, take its dirty log, resize the quota of the shadow and tear it down, at random.
//! The guest checks what it finds ([`crate::guest::programs`]); the host checks what the guest
//! leaves ([`crate::guest::churn`]).

mod counts;
mod host;
mod memory;
mod model;

use super::{Done, WATCHDOG, audit, done};
use crate::guest::churn::{HOLE, LANES, Lane, Lanes, STABLE, STABLE_PAGES, Wrong};
use crate::guest::layout::{CHURN_GPA, CHURN_PAGES, control};
use crate::guest::paging::PAGE;
use crate::guest::verify;
use crate::session::{RunError, Session};
use crate::vm::Vm;
use counts::Counts;
use host::{HOSTS, Host};
use memory::{last_of, raise_floors};
use mmu_core::addr::Gpa;
use mmu_core::mmio::Device;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often the guest's vCPUs and the host's threads are looked after.
const LOOK: Duration = Duration::from_millis(20);

/// What answers in the window where there is no memory, and takes stores to read-only memory.
#[derive(Debug, Default)]
struct NoMemory {
    reads: AtomicU64,
    writes: AtomicU64,
    wrong: Mutex<Option<String>>,
}

impl Device for NoMemory {
    fn read(&self, _base: u64, _offset: u64, buf: &mut [u8]) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        buf.fill(HOLE as u8);
    }

    fn write(&self, _base: u64, offset: u64, bytes: &[u8]) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        let lane = bytes.try_into().map(|bytes| Lane::of(u64::from_le_bytes(bytes)));
        let here = (offset / PAGE, offset % PAGE);
        let right = |lane: &Lane| (lane.place, LANES + lane.vcpu * 8) == here && lane.number > 0;
        if !lane.as_ref().is_ok_and(right) {
            let wrong = format!("the device was written {bytes:x?} at {offset:#x}: {lane:?}");
            lock(&self.wrong).get_or_insert(wrong);
        }
    }
}

pub(super) fn churn(vm: &Vm, session: &mut Session<'_>, end: Instant) -> Done {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let mut hosts: Vec<Host<'_>> = (0..HOSTS).map(|index| Host::new(vm, index, seed)).collect();
    match with_hosts(vm, session, &mut hosts, seed, end) {
        Ok((summary, ran)) => Ok((format!("{summary}; seed {seed:#x}"), ran)),
        Err(error) => {
            let histories: Vec<String> = hosts.iter().map(Host::history).collect();
            let histories = histories.join("; ");
            Err(RunError::Failed(format!("{error}; seed {seed:#x}; {histories}")))
        }
    }
}

fn with_hosts(
    vm: &Vm,
    session: &mut Session<'_>,
    hosts: &mut [Host<'_>],
    seed: u64,
    end: Instant,
) -> Done {
    let failed = |wrong: &dyn Display| RunError::Failed(wrong.to_string());
    let device = Arc::new(NoMemory::default());
    let size = CHURN_PAGES * PAGE;
    let registered = vm.mmu().bus().register(CHURN_GPA, size, Arc::clone(&device) as _);
    registered.map_err(|error| failed(&error))?;
    vm.image().write_stable(&mut |gpa, bytes| {
        vm.mmu().write_phys(Gpa(gpa), bytes);
    });
    let begin = Instant::now();
    for id in 0..vm.vcpus() {
        session.start(id, vm.image().churn(id, seed));
    }
    together(session, hosts, end)?;
    vm.write_word(vm.image().control_gpa(control::STOP), 1);
    let increments = done(&session.wait()?)?;
    let ran = begin.elapsed();

    if let Some(wrong) = lock(&device.wrong).take() {
        return Err(RunError::Failed(wrong));
    }
    hosts.iter_mut().try_for_each(Host::check).map_err(|wrong| failed(&wrong))?;
    check_stable(vm, hosts, &increments).map_err(|wrong| failed(&wrong))?;
    audit(vm)?;
    let mut counts = Counts::default();
    hosts.iter().for_each(|host| counts.add(host.counts()));
    let turns: u64 = increments.iter().sum();
    let stores: u64 = (0..vm.vcpus()).map(|vcpu| last_of(vm, vcpu)).sum();
    let [reads, writes] = [&device.reads, &device.writes].map(|n| n.load(Ordering::Relaxed));
    let guest =
        format!("{turns} turns, {stores} stores, {reads} reads and {writes} writes of holes");
    Ok((format!("{counts}; {guest}"), ran))
}

/// Runs the host's threads while the guest runs, until `end` or until something is wrong.
fn together(
    session: &mut Session<'_>,
    hosts: &mut [Host<'_>],
    end: Instant,
) -> Result<(), RunError> {
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            hosts.iter_mut().map(|host| scope.spawn(move || host.run(stop))).collect();
        let mut ran = Ok(());
        while ran.is_ok() && Instant::now() < end {
            ran = session.run_until(end.min(Instant::now() + LOOK));
            if threads.iter().any(ScopedJoinHandle::is_finished) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let since = Instant::now();
        while !threads.iter().all(ScopedJoinHandle::is_finished) {
            match &ran {
                Ok(()) => ran = session.run_until(Instant::now() + LOOK),
                Err(_) => std::thread::sleep(LOOK),
            }
            if since.elapsed() > WATCHDOG && ran.is_ok() {
                // Outside the guest, vCPUs let go of what the host waits for.
                let places = session.stop();
                ran = places.and_then(|places| Err(RunError::Stuck { limit: WATCHDOG, places }));
            }
        }
        for thread in threads {
            let wrong = match thread.join() {
                Ok(Ok(())) => continue,
                Ok(Err(wrong)) => wrong,
                Err(_) => "a thread of the host panicked".to_owned(),
            };
            let also = ran.err().map_or(String::new(), |error| format!("; {error}"));
            ran = Err(RunError::Failed(wrong + &also));
        }
        ran
    })
}

/// Checks the memory that was there all the time.
fn check_stable(vm: &Vm, hosts: &[Host<'_>], increments: &[u64]) -> Result<(), Wrong> {
    let mut lanes = vec![Lanes::default(); STABLE_PAGES as usize];
    for (n, lanes) in lanes.iter_mut().enumerate() {
        lanes.places = hosts.iter().fold(0, |places, host| places | host.stable()[n].places);
    }
    raise_floors(vm, STABLE, 0..CHURN_PAGES, &mut lanes);
    let last = |vcpu| last_of(vm, vcpu);
    vm.with_memory(|read| verify::churn(vm.image(), increments, &lanes, &last, read))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
