// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A real vCPU on page tables of our own.
//!
//! KVM has no exit for a guest's page fault, and a software KVM does not see what the VMM stores into page
//! tables. This module works around both and knows nothing of the engine that makes the tables: a
//! [`KvmMachine`] owns a VM, an arena for page tables and a stub of ring-0 code; a
//! [`KvmVcpu`] runs guest code in ring 3 on a root that lies in the arena, turns every exception into an [`Exit`],
//! and carries out queued [`Downgrade`]s *inside the guest* before it returns to ring 3; a [`Kicker`] makes it
//! leave the guest.
//!
//! | module | holds |
//! | --- | --- |
//! | `layout` | addresses, selectors, page-table bits |
//! | `stub` | the ring-0 code |
//! | `region` | the memory around it: IDT, GDT, TSS, stacks, queues, the stub's page tables |
//! | `drain` | the downgrade queue and its translation for the stub |
//! | `machine`, `state` | the VM, memory slots, a vCPU's fixed state |
//! | `vcpu`, `vcpu::entry`, `exit` | a vCPU, one entry into the guest, what comes back |
//! | `kick` | leaving the guest from outside |
//! | `probe`, `selftest` | what this host's KVM can do, and how it really behaves |
//!
//! # Guarantees
//!
//! * Nothing here relies on a software KVM: every step is architecturally sufficient on a processor
//!   that walks the tables itself.
//! * A generation is acknowledged only after everything queued before the entry was done inside the guest,
//!   or when nothing was queued.
//! * Guest code runs in ring 3, IF = 1, IOPL = 0, no port access; the stub's memory is supervisor-only.
//!   What it can do is fault, or `syscall` into the VMM.
//! * A kick is never lost; a stale one costs one [`Exit::Interrupted`].
//!
//! # What the caller owes
//!
//! * Every root passed to [`KvmVcpu::set_root`] holds [`KvmMachine::stub_root_entry`] in its slot,
//!   and no entry with the user bit leads to the arena or to the stub.
//! * No shadow entry has the global bit.
//! * An entry that was present is followed by a [`Downgrade`] on every vCPU whenever the host takes something
//!   from it, and a vCPU that is taken later begins with [`Downgrade::Everything`]; a table frame is put to a new use
//!   only after a [`Downgrade::Frame`] was acknowledged by all.
//! * Guest entries map machine addresses that have a slot, writable only where the slot is.
//!
//! # Choices made by measurement
//!
//! Where ring 0 is emulated (about 2 us an instruction), with the alternatives within a few percent of each other unless
//! said otherwise; `cargo test --release kvm::tests::drains -- --nocapture` prints the costs of the host at hand.
//!
//! * An exception takes one ring-0 instruction, `hlt`; `out` costs the same but leaves something to be completed.
//! * Ring 3 is entered by loading its segments through the shared page, which is no slower than one `iretq`, and makes
//!   an entry independent of where the last one ended: after a kick, the next entry passes through the stub or
//!   not as its queue demands, and nothing needs to be injected.
//! * A root is changed through the shared page too; that is free where the root changes anyway.
//! * A drain of one leaf is 7 instructions, each further one 4: no loop, no saved registers but rax.
//!
//! # What ring 3 does not notice, or cannot do
//!
//! `popf` cannot change IF or IOPL; `pushf`, segment-register reads, `lar`, `lsl`, `verr` show this module's state;
//! `sgdt`, `sidt`, `sldt`, `str`, `smsw` too where the host has no UMIP; `cpuid`, and `vmcall` where the host's KVM
//! offers hypercalls (there `vmmcall` or `vmcall` returns an error in rax), are answered by KVM. `sysenter` is #GP or #UD, `int n` is
//! #GP (#UD where a software KVM cannot emulate it), `int3` is #BP. Alignment is not checked (CR0.AM = 0).

mod drain;
mod exit;
mod kick;
mod layout;
mod machine;
mod mapping;
mod probe;
mod region;
mod selftest;
mod state;
mod stub;
mod vcpu;

#[cfg(test)]
mod tests;

use std::io;

pub use drain::Downgrade;
pub use exit::{Exit, Failure, FailureKind};
pub use kick::{KICK_SIGNAL_OFFSET, Kicker};
pub use layout::{STUB_SLOT, STUB_VA};
pub use machine::{KvmMachine, TableArena};
pub use probe::{Probe, probe};
pub use selftest::{TrapReport, self_test};
pub use vcpu::KvmVcpu;

/// What can go wrong, apart from what a guest does.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// KVM cannot be opened.
    #[error("{path}: {error}")]
    Unavailable {
        /// The device.
        path: &'static str,
        /// Why.
        error: io::Error,
    },
    /// KVM is there but cannot do what is needed.
    #[error("this KVM lacks {0}")]
    MissingCapability(&'static str),
    /// A KVM call failed.
    #[error("{call}: {error}")]
    Call {
        /// The call, as KVM's documentation names it.
        call: &'static str,
        /// Why.
        error: io::Error,
    },
    /// Memory for the VM could not be allocated.
    #[error("{bytes} bytes for the {what}: {error}")]
    Memory {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: usize,
        /// Why.
        error: io::Error,
    },
    /// The kick signal could not be set up.
    #[error("signal {signal}: {error}")]
    Signal {
        /// Its number.
        signal: i32,
        /// Why.
        error: io::Error,
    },
    /// A number of vCPUs or of table frames out of range.
    #[error("{what}: {asked} is not within 1..={max}")]
    Range {
        /// Of what.
        what: &'static str,
        /// The number.
        asked: u64,
        /// The largest possible.
        max: u64,
    },
    /// The processor's physical addresses are too short.
    #[error("{width} physical address bits do not reach {end:#x}")]
    AddressWidth {
        /// Physical address bits.
        width: u32,
        /// The end of what must be reached.
        end: u64,
    },
    /// There is no vCPU of that number, or it is in use.
    #[error("vCPU {id} is {why} (the machine has {vcpus})")]
    NoVcpu {
        /// The number.
        id: usize,
        /// vCPUs of the machine.
        vcpus: usize,
        /// Why not.
        why: &'static str,
    },
    /// A memory slot with bad addresses.
    #[error("memory slot {machine:#x}+{len:#x} at host {host:#x}: {why}")]
    BadSlot {
        /// Machine address.
        machine: u64,
        /// Host address.
        host: u64,
        /// Length.
        len: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// No memory slot has that number.
    #[error("no memory slot {slot}")]
    NoSlot {
        /// The number.
        slot: u32,
    },
    /// A root that is not a frame of the arena.
    #[error("root {root:#x} is not a frame of the table arena")]
    BadRoot {
        /// The root.
        root: u64,
    },
    /// A segment base that no processor accepts.
    #[error("segment base {base:#x} is not canonical")]
    BadBase {
        /// The base.
        base: u64,
    },
    /// A downgrade of something outside the arena.
    #[error("{item:x?} lies outside the table arena of {frames} frames")]
    BadDowngrade {
        /// The downgrade.
        item: Downgrade,
        /// Frames of the arena.
        frames: u32,
    },
    /// The self-test got an answer that makes the backend unusable.
    #[error("self-test: {0}")]
    SelfTest(String),
}

impl KvmError {
    fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
        move |error| KvmError::Call { call, error: error.into() }
    }
}
