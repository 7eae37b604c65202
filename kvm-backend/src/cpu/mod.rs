// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One guest vCPU with the engine behind it, on real hardware or in software.
//!
//! Both kinds run the same guest code over the same engine; what differs is who executes the
//! instructions: the processor ([`KvmCpu`]) or the emulator ([`SoftCpu`]).

mod bus;
mod kvm;
mod soft;

pub use kvm::{KvmCpu, NewCpuError};
pub use soft::SoftCpu;

use crate::emu::Exception;
use crate::regs::Regs;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::paging::Fault;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a guest cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Crash {
    /// A page fault, or a non-canonical address, that the guest has no handler for.
    #[error("unhandled {0}")]
    Fault(Fault),
    /// Another exception.
    #[error("unhandled {0}")]
    Exception(Exception),
    /// An exception without an instruction that could be decoded for it.
    #[error("unhandled exception {vector}, error code {error_code:#x}")]
    Vector {
        /// The vector.
        vector: u8,
        /// The error code, 0 if the vector has none.
        error_code: u32,
    },
    /// An access to guest-physical memory where there is no memory and no device.
    #[error("access to guest-physical {0}, where there is neither memory nor a device")]
    NoDevice(Gpa),
    /// A write that belongs into the ring of coalesced writes, which is full: whoever has registered
    /// coalesced ranges on the bus drains it.
    #[error("coalesced write to guest-physical {0}, and nobody has drained the ring")]
    CoalescedFull(Gpa),
    /// A write to a page that the host has made read-only: this backend has no use for that yet.
    #[error("write to guest-physical {0}, which the host has made read-only")]
    HostReadOnly(Gpa),
    /// The vCPU's dirty ring is full: this backend harvests bitmaps.
    #[error("the dirty ring is full")]
    RingFull,
    /// The guest's CR3 points at no memory: the processor would shut down.
    #[error("CR3 points at no memory")]
    RootOutside,
    /// An access to the part of the address space that the backend keeps for itself.
    #[error("access to {0}, which the VMM reserves for itself")]
    Reserved(Gva),
    /// A locked access that this backend cannot make as one step.
    #[error("locked access of {size} bytes at {gva}, which cannot be made as one step")]
    Locked {
        /// Guest-virtual address.
        gva: Gva,
        /// Bytes.
        size: usize,
    },
    /// The host cannot run the guest any further.
    #[error("{0}")]
    Host(String),
}

/// Why a vCPU came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest executed `hlt`; its registers say what it wants.
    Halt,
    /// Somebody asked for the vCPU back.
    Stopped,
    /// The guest cannot go on.
    Crash(Crash),
}

/// A guest vCPU; belongs to one thread.
pub trait Cpu {
    /// The guest's registers.
    fn regs(&self) -> Regs;

    /// Sets the guest's registers.
    fn set_regs(&mut self, regs: &Regs);

    /// Runs the guest until something happens.
    fn run(&mut self) -> Event;

    /// Called now and then while the vCPU does not run: lets others get on that wait for it.
    fn idle(&mut self);
}

/// What other threads may watch of a vCPU.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<WatchState>);

#[derive(Debug, Default)]
struct WatchState {
    exits: AtomicU64,
    rip: AtomicU64,
}

impl Watch {
    /// Notes that the vCPU came out of the guest.
    fn exit(&self, rip: u64) {
        // Relaxed: a hint for people.
        self.0.rip.store(rip, Ordering::Relaxed);
        self.0.exits.fetch_add(1, Ordering::Relaxed);
    }

    /// How often the vCPU came out of the guest so far.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.0.exits.load(Ordering::Relaxed)
    }
}

/// A vCPU's place when it was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The vCPU's number.
    pub vcpu: usize,
    /// Its registers.
    pub regs: Regs,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Regs { gpr, rip, .. } = self.regs;
        write!(f, "vCPU {} at rip {rip:#x} (rsp {:#x}, rax {:#x})", self.vcpu, gpr[4], gpr[0])
    }
}
