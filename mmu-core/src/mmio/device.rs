// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can stand on a bus, and where.

use crate::addr::PHYSICAL_BITS;
use core::fmt;

/// Most bytes of an access.
pub const MAX_ACCESS: usize = 16;

/// The addresses of a bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// Guest-physical addresses, of 52 bits (SDM vol. 3, 5.1.4).
    #[default]
    Mmio,
    /// I/O ports, of 16 bits (SDM vol. 1, 20.3).
    Pio,
}

impl Space {
    /// The address after the last one.
    pub(super) const fn end(self) -> u64 {
        match self {
            Self::Mmio => 1 << PHYSICAL_BITS,
            Self::Pio => 1 << 16,
        }
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mmio => "guest-physical address",
            Self::Pio => "I/O port",
        })
    }
}

/// A device's registers (`kvm_io_device_ops`).
///
/// Called on the thread that makes the access, on several at a time, with no lock held. A panic ends
/// the access as a return does.
pub trait Device: Send + Sync {
    /// Reads `data.len()` bytes, 1 to 16, at `offset` bytes into the range that begins at `base`.
    fn read(&self, base: u64, offset: u64, data: &mut [u8]);

    /// Writes 1 to 16 bytes at `offset` bytes into the range that begins at `base`.
    fn write(&self, base: u64, offset: u64, data: &[u8]);
}

/// What a write only has to wake (an eventfd for KVM_IOEVENTFD).
///
/// Closures are doorbells. So whatever has a way to be woken rings by one line: with the `vmm-sys-util`
/// crate's `EventFd`, `Arc::new(move || drop(event.write(1)))`; with a file, as here.
///
/// ```
/// # #[cfg(unix)] {
/// use mmu_core::mmio::{Answer, Bus, Space, Trigger};
/// use std::io::{Read, Write};
/// use std::sync::Arc;
///
/// // In the place of an eventfd: one end for the bus, the other for the device's thread.
/// let (event, mut device) = std::os::unix::net::UnixStream::pair()?;
/// let bus = Bus::new(Space::Pio, Arc::default());
/// let ring = move || {
///     // A doorbell that has been rung too often to take another ring is rung.
///     let _ = (&event).write(&1u64.to_ne_bytes());
/// };
/// bus.register_doorbell(Trigger::valued(0xc050, 2, 3), Arc::new(ring))?;
///
/// assert_eq!(bus.initiator().write(0xc050, &[3, 0]), Answer::Doorbell);
/// let mut count = [0; 8];
/// device.read_exact(&mut count)?;
/// assert_eq!(u64::from_ne_bytes(count), 1);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Doorbell: Send + Sync {
    /// Called on the thread that makes the write, on several at a time, with no lock held.
    fn ring(&self);
}

impl<F: Fn() + Send + Sync> Doorbell for F {
    fn ring(&self) {
        self();
    }
}

/// The writes that ring a doorbell (`struct kvm_ioeventfd`).
// In the order in which a table sorts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Trigger {
    /// The address of the write's first byte, exactly.
    pub address: u64,
    /// The write's bytes, exactly: 1, 2, 4 or 8; or 0 for any number.
    pub length: u8,
    /// The value written, read as little-endian (KVM_IOEVENTFD_FLAG_DATAMATCH); or `None` for any.
    pub value: Option<u64>,
}

impl Trigger {
    /// Any write to `address`.
    #[must_use]
    pub const fn any(address: u64) -> Self {
        Self { address, length: 0, value: None }
    }

    /// Any write of `length` bytes, which must be 1, 2, 4 or 8.
    #[must_use]
    pub const fn sized(address: u64, length: u8) -> Self {
        Self { address, length, value: None }
    }

    /// A write of this value in `length` bytes, which must be 1, 2, 4 or 8.
    #[must_use]
    pub const fn valued(address: u64, length: u8, value: u64) -> Self {
        Self { address, length, value: Some(value) }
    }

    /// Whether some write would match both (`ioeventfd_check_collision`).
    pub(super) fn collides(&self, other: &Self) -> bool {
        let lengths = self.length == other.length || self.length == 0 || other.length == 0;
        let (one, two) = (self.value, other.value);
        // One for any length is for any value, too.
        self.address == other.address && lengths && (one == two || one.is_none() || two.is_none())
    }
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.length, self.value) {
            (0, None) => write!(f, "any write")?,
            (length, None) => write!(f, "any write of {length} bytes")?,
            (length, Some(value)) => write!(f, "a write of {value:#x} in {length} bytes")?,
        }
        write!(f, " to {:#x}", self.address)
    }
}
