// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with a registration.

use super::{Space, Trigger};

/// Why something was not registered or removed. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// A range must not be empty.
    #[error("the range at {space} {base:#x} is empty")]
    ZeroSize {
        /// The bus.
        space: Space,
        /// First address.
        base: u64,
    },
    /// The range, or the write that a doorbell waits for, runs past the last address of the bus.
    #[error("{size:#x} bytes at {space} {base:#x} run past the end of the bus")]
    WrapsAround {
        /// The bus.
        space: Space,
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// Another device has part of the range.
    #[error(
        "{size:#x} bytes at {space} {base:#x} overlap the device with {other_size:#x} bytes at {other_base:#x}"
    )]
    Overlap {
        /// The bus.
        space: Space,
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
        /// The other device's first address.
        other_base: u64,
        /// The other device's bytes.
        other_size: u64,
    },
    /// Another coalesced range has part of the range.
    #[error(
        "{size:#x} bytes at {space} {base:#x} overlap the coalesced range of {other_size:#x} bytes at {other_base:#x}"
    )]
    CoalescedOverlap {
        /// The bus.
        space: Space,
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
        /// The other range's first address.
        other_base: u64,
        /// The other range's bytes.
        other_size: u64,
    },
    /// A doorbell's length is none of 0, 1, 2, 4 and 8.
    #[error("a doorbell cannot wait for {trigger}: the length must be 0, 1, 2, 4 or 8")]
    BadLength {
        /// What was asked for.
        trigger: Trigger,
    },
    /// A doorbell has a value that no write of its length has; or no length, but a value.
    #[error("a doorbell cannot wait for {trigger}: the value does not fit into that many bytes")]
    BadValue {
        /// What was asked for.
        trigger: Trigger,
    },
    /// Some write would ring two doorbells.
    #[error("a doorbell waits for {other} already, so that none can wait for {trigger}")]
    DoorbellExists {
        /// What was asked for.
        trigger: Trigger,
        /// What the other doorbell waits for.
        other: Trigger,
    },
    /// No device's range begins there.
    #[error("no device begins at {space} {base:#x}")]
    NoDevice {
        /// The bus.
        space: Space,
        /// Address asked for.
        base: u64,
    },
    /// No coalesced range begins there.
    #[error("no coalesced range begins at {space} {base:#x}")]
    NoCoalesced {
        /// The bus.
        space: Space,
        /// Address asked for.
        base: u64,
    },
    /// No doorbell waits for exactly that.
    #[error("no doorbell waits for {trigger}")]
    NoDoorbell {
        /// What was asked for.
        trigger: Trigger,
    },
}
