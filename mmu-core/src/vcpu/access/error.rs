// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why an access was not made, and what is left of one to the VMM.

use crate::addr::{Gpa, Gva};
use crate::paging::Fault;
use core::ops::Range;

/// Why an access was not made. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The guest's tables forbid it. The fault's address is the first byte of the access in the page
    /// that faults (SDM vol. 3, 5.7).
    #[error(transparent)]
    Fault(#[from] Fault),
    /// Part of it has no memory, or is a write to read-only memory.
    #[error("no memory at guest-physical {gpa} for {len} bytes")]
    Mmio {
        /// Guest-physical address of the part.
        gpa: Gpa,
        /// Bytes of the part.
        len: usize,
    },
    /// Part of a locked access is in the page that the VMM has named as the APIC's
    /// ([`Vcpu::set_apic_page`](super::Vcpu::set_apic_page)).
    #[error("the APIC page at guest-physical {gpa}")]
    Apic {
        /// Guest-physical address of the part.
        gpa: Gpa,
    },
    /// Part of it is a write to a page that the host has made read-only.
    #[error("the host has made the page at guest-physical {gpa} read-only")]
    HostReadOnly {
        /// Guest-physical address of the part.
        gpa: Gpa,
    },
    /// A locked access that cannot be made as one step.
    #[error(
        "a locked access of {size} bytes at {gva}: not 1, 2, 4, 8 or an aligned 16, across a cache line, or not on this processor"
    )]
    Unsupported {
        /// Guest-virtual address.
        gva: Gva,
        /// Bytes.
        size: usize,
    },
    /// More bytes than can be pinned at a time.
    #[error("{len} bytes at {gva} are too many to pin: at most {max}")]
    TooLong {
        /// Guest-virtual address.
        gva: Gva,
        /// Bytes given.
        len: usize,
        /// Most bytes.
        max: usize,
    },
}

/// Bytes of an access that are in no memory: the VMM's to read from, or to write to, a device (an
/// element of KVM's `mmio_fragments`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Guest-physical address.
    pub gpa: Gpa,
    /// Which bytes of the access: 1 to 8 of them.
    pub bytes: Range<usize>,
    /// Whether they are in the page that the VMM has named as the APIC's
    /// ([`Vcpu::set_apic_page`](super::Vcpu::set_apic_page)).
    pub apic: bool,
}
