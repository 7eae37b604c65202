// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs a guest's vCPUs, one thread each, under a watchdog.

use crate::cpu::{Cpu, Crash, Event, Place, Watch};
use crate::guest::programs::deliver;
use crate::regs::Regs;
use crate::vm::{Vm, VmError};
use mmu_core::vcpu::VcpuHandle;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// How often a waiting thread looks up.
const TICK: Duration = Duration::from_millis(50);
/// How often an idle vCPU looks whether somebody waits for it.
const IDLE: Duration = Duration::from_millis(1);

/// Why a guest's run ended badly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A vCPU cannot go on.
    #[error("{place}: {crash}")]
    Crash {
        /// Where it was.
        place: Box<Place>,
        /// Why.
        crash: Crash,
    },
    /// No vCPU came out of the guest for too long; they were stopped.
    #[error("no progress for {} s: {}", limit.as_secs(), list(places))]
    Stuck {
        /// How long.
        limit: Duration,
        /// Where the vCPUs were that had not finished.
        places: Vec<Place>,
    },
    /// A vCPU's thread did not come back even when it was asked to.
    #[error("vCPU {vcpu} did not stop when it was asked to")]
    Lost {
        /// The vCPU.
        vcpu: usize,
    },
    /// A vCPU could not be made.
    #[error("vCPU {vcpu}: {error}")]
    NoCpu {
        /// The vCPU.
        vcpu: usize,
        /// Why.
        error: VmError,
    },
    /// The guest's program found, or left, something wrong.
    #[error("{0}")]
    Failed(String),
}

fn list(places: &[Place]) -> String {
    places.iter().map(Place::to_string).collect::<Vec<_>>().join(", ")
}

struct Report {
    vcpu: usize,
    event: Event,
    regs: Regs,
}

/// What a vCPU's thread is told.
struct Order {
    regs: Regs,
    /// Page faults that the program expects are its own affair.
    deliver: bool,
}

struct Seat {
    commands: Sender<Order>,
    handle: VcpuHandle,
    watch: Watch,
    running: bool,
}

/// A guest whose vCPUs are there to be run.
pub struct Session<'t> {
    seats: Vec<Seat>,
    reports: Receiver<Report>,
    limit: Duration,
    tick: &'t mut dyn FnMut(),
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("vcpus", &self.seats.len()).finish_non_exhaustive()
    }
}

impl Session<'_> {
    /// Makes the vCPUs of `vm`, one thread each, and calls `body` with them. `limit` is the
    /// watchdog's patience; `tick` is called several times a second while vCPUs run.
    ///
    /// # Errors
    ///
    /// What `body` returns, or [`RunError::NoCpu`].
    pub fn with<R>(
        vm: &Vm,
        limit: Duration,
        tick: &mut dyn FnMut(),
        body: impl FnOnce(&mut Session<'_>) -> Result<R, RunError>,
    ) -> Result<R, RunError> {
        let (report, reports) = mpsc::channel();
        std::thread::scope(|scope| {
            let mut seats = Vec::new();
            for vcpu in 0..vm.vcpus() {
                let (commands, orders) = mpsc::channel();
                let (ready, made) = mpsc::channel();
                let (report, watch) = (report.clone(), Watch::default());
                let seen = watch.clone();
                scope.spawn(move || match vm.cpu(vcpu, watch) {
                    Ok((cpu, handle)) => {
                        let _ = ready.send(Ok(handle));
                        serve(vcpu, cpu, &orders, &report);
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                });
                match made.recv() {
                    Ok(Ok(handle)) => {
                        seats.push(Seat { commands, handle, watch: seen, running: false });
                    }
                    Ok(Err(error)) => return Err(RunError::NoCpu { vcpu, error }),
                    Err(_) => return Err(RunError::Lost { vcpu }),
                }
            }
            let mut session = Session { seats, reports, limit, tick };
            let result = body(&mut session);
            // However it ended, no thread may keep the scope open.
            let _ = session.stop();
            result
        })
    }

    /// Starts a vCPU with these registers.
    pub fn start(&mut self, vcpu: usize, regs: Regs) {
        self.order(vcpu, Order { regs, deliver: false });
    }

    /// The same for a program that [expects page faults](deliver).
    pub fn start_delivering(&mut self, vcpu: usize, regs: Regs) {
        self.order(vcpu, Order { regs, deliver: true });
    }

    fn order(&mut self, vcpu: usize, order: Order) {
        let seat = &mut self.seats[vcpu];
        seat.running = seat.commands.send(order).is_ok();
    }

    /// Waits until every vCPU that was started has executed `hlt`; returns their registers in order.
    ///
    /// # Errors
    ///
    /// A crash, or a guest that makes no progress. All vCPUs are stopped then.
    pub fn wait(&mut self) -> Result<Vec<Regs>, RunError> {
        let mut halted = vec![Regs::default(); self.seats.len()];
        let mut exits = self.exits();
        let mut since = Instant::now();
        while self.seats.iter().any(|seat| seat.running) {
            match self.reports.recv_timeout(TICK) {
                Ok(report) => {
                    halted[report.vcpu] = report.regs;
                    self.finished(report)?;
                    since = Instant::now();
                }
                Err(_) => (self.tick)(),
            }
            let now = self.exits();
            if now != exits {
                exits = now;
                since = Instant::now();
            }
            if since.elapsed() > self.limit {
                let places = self.stop()?;
                return Err(RunError::Stuck { limit: self.limit, places });
            }
        }
        Ok(halted)
    }

    /// Lets the guest run until `deadline`; no vCPU is expected to stop before.
    ///
    /// # Errors
    ///
    /// A crash, or a failed check of the guest's.
    pub fn run_until(&mut self, deadline: Instant) -> Result<(), RunError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            match self.reports.recv_timeout(left.min(TICK)) {
                Ok(report) => {
                    let (vcpu, regs) = (report.vcpu, report.regs);
                    self.finished(report)?;
                    let call = crate::guest::Call::from_regs(&regs);
                    return Err(RunError::Failed(format!(
                        "{}: stopped before it was told to: {call:x?}",
                        Place { vcpu, regs }
                    )));
                }
                Err(RecvTimeoutError::Timeout) => (self.tick)(),
                Err(RecvTimeoutError::Disconnected) => return Err(RunError::Lost { vcpu: 0 }),
            }
        }
    }

    fn exits(&self) -> u64 {
        self.seats.iter().map(|seat| seat.watch.exits()).sum()
    }

    fn finished(&mut self, report: Report) -> Result<(), RunError> {
        let Report { vcpu, event, regs } = report;
        self.seats[vcpu].running = false;
        match event {
            Event::Halt => Ok(()),
            Event::Crash(crash) => {
                Err(RunError::Crash { place: Box::new(Place { vcpu, regs }), crash })
            }
            Event::Stopped => Err(RunError::Lost { vcpu }),
        }
    }

    /// Stops every running vCPU; where they were.
    ///
    /// # Errors
    ///
    /// [`RunError::Lost`] if one does not come back.
    pub(crate) fn stop(&mut self) -> Result<Vec<Place>, RunError> {
        let mut places = Vec::new();
        let end = Instant::now() + self.limit;
        while let Some(vcpu) = self.seats.iter().position(|seat| seat.running) {
            for seat in self.seats.iter().filter(|seat| seat.running) {
                seat.handle.request_exit();
            }
            match self.reports.recv_timeout(TICK) {
                Ok(Report { vcpu, regs, .. }) => {
                    self.seats[vcpu].running = false;
                    places.push(Place { vcpu, regs });
                }
                Err(_) if Instant::now() > end => return Err(RunError::Lost { vcpu }),
                Err(_) => {}
            }
        }
        places.sort_by_key(|place| place.vcpu);
        Ok(places)
    }
}

/// A vCPU's thread: runs the guest when told to, lets others get on meanwhile.
fn serve(vcpu: usize, mut cpu: Box<dyn Cpu>, orders: &Receiver<Order>, report: &Sender<Report>) {
    loop {
        match orders.recv_timeout(IDLE) {
            Ok(order) => {
                cpu.set_regs(&order.regs);
                let event = run(&mut *cpu, order.deliver);
                if report.send(Report { vcpu, event, regs: cpu.regs() }).is_err() {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => cpu.idle(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Runs the guest until something happens that it does not see to itself.
fn run(cpu: &mut dyn Cpu, delivers: bool) -> Event {
    loop {
        let event = cpu.run();
        let Event::Crash(Crash::Fault(fault)) = &event else { return event };
        let mut regs = cpu.regs();
        if !delivers || !deliver(fault, &mut regs) {
            return event;
        }
        cpu.set_regs(&regs);
    }
}
