// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a vCPU came back from the guest.

use std::fmt;

/// Why a vCPU came back. Unless it `Failed`, [`KvmVcpu::regs`](super::KvmVcpu::regs) is the guest program's state in
/// ring 3, and it may go on from there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The guest program raised an exception. For faults `rip` is the faulting instruction, for traps
    /// (#BP, single step) the next one.
    Exception {
        /// The vector.
        vector: u8,
        /// The error code, if the vector has one.
        error_code: Option<u32>,
        /// CR2: the faulting address of the last page fault.
        cr2: u64,
    },
    /// The guest program executed `syscall`. As the instruction does, it has put `rip` (the next instruction) into
    /// rcx and RFLAGS into r11. On some hosts a jump to the stub's address for it looks the same: that rcx was
    /// `rip` is then the guest program's claim.
    Syscall,
    /// A kick or another signal arrived. Downgrades that were not carried out are still queued.
    Interrupted,
    /// A drain-only entry has done its work.
    Drained,
    /// The guest program reached a machine address that no slot backs, or wrote to a read-only slot. The access has
    /// been completed: a read gave all ones, a write went nowhere.
    Mmio {
        /// The machine address.
        machine: u64,
        /// Bytes accessed.
        len: u32,
        /// The value, for a write.
        write: Option<u64>,
    },
    /// The host has no memory behind a machine address that the guest program uses: its backing file was truncated,
    /// its mapping is gone or poisoned. `rip` is the instruction, which would try again.
    BadMemory {
        /// The machine address, where KVM tells it.
        machine: Option<u64>,
        /// The error number: `EFAULT`, or `EHWPOISON`.
        errno: i32,
    },
    /// The vCPU cannot go on. It may be set up anew with `set_regs` and `set_root`.
    Failed(Box<Failure>),
}

/// What is known of a vCPU that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What happened.
    pub kind: FailureKind,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Code segment selector (its low two bits are the privilege level).
    pub cs: u16,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
}

/// The unexpected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureKind {
    /// Triple fault: the root does not map the stub, or the stub's memory is damaged.
    Shutdown,
    /// An exception in the stub's own code.
    Stub {
        /// The vector.
        vector: u8,
        /// The error code, if any.
        error_code: Option<u32>,
    },
    /// The processor refused the state.
    EntryFailed {
        /// Its reason.
        reason: u64,
    },
    /// KVM gave up.
    Internal {
        /// KVM's number for why.
        suberror: u32,
        /// The first two words of its details.
        data: [u64; 2],
    },
    /// Any other exit.
    Exit {
        /// KVM's exit reason.
        reason: u32,
    },
    /// `KVM_RUN` itself failed.
    Call {
        /// The error number.
        errno: i32,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FailureKind::Shutdown => write!(f, "triple fault"),
            FailureKind::Stub { vector, error_code } => {
                write!(f, "exception {vector} (error code {error_code:x?}) in the stub")
            }
            FailureKind::EntryFailed { reason } => write!(f, "entry refused, reason {reason:#x}"),
            FailureKind::Internal { suberror, data } => {
                write!(f, "KVM internal error {suberror} {data:x?}")
            }
            FailureKind::Exit { reason } => write!(f, "unexpected KVM exit {reason}"),
            FailureKind::Call { errno } => {
                write!(f, "KVM_RUN: {}", std::io::Error::from_raw_os_error(errno))
            }
        }?;
        write!(
            f,
            " at cs {:#x} rip {:#x} rsp {:#x} cr2 {:#x} cr3 {:#x}",
            self.cs, self.rip, self.rsp, self.cr2, self.cr3
        )
    }
}
