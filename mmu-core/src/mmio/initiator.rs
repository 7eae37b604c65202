// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The readers' side of a bus: look-ups and accesses.
//!
//! Unsafe code: an access names what it uses by a bare pointer, from a look on.

use super::bus::Shared;
use super::presence::Presence;
use super::table::Span;
use super::{CoalescedWrite, MAX_ACCESS, Space};
use core::fmt;
use std::sync::Arc;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Answer {
    /// A device took it.
    Device,
    /// It rang a doorbell, which is all that it had to do.
    Doorbell,
    /// It is in the ring.
    Coalesced,
    /// It belongs into the ring, which is full. Nothing has happened: drain the ring and carry out what
    /// was in it, then this with [`Initiator::write_now`], as one does with KVM's exit.
    RingFull,
    /// Nobody took it; or it has no bytes, or more than 16.
    Unhandled,
}

impl Answer {
    /// Whether nothing is left to do for the write.
    #[must_use]
    pub fn is_done(self) -> bool {
        !matches!(self, Self::RingFull | Self::Unhandled)
    }
}

/// A thread's way onto a bus: a vCPU has one for each of the two.
///
/// An access finds its device in the table of one moment, without a lock and without a store to
/// memory that other initiators use, in a number of steps that depends on the table alone: by halving
/// among the ranges. Then it calls the device; what that waits for is the device's business. A device
/// that makes accesses of its own has an initiator of its own, and keeps the bus by it ([`Bus::clear`]).
///
/// [`Bus::clear`]: super::Bus::clear
pub struct Initiator {
    bus: Arc<Shared>,
    presence: Arc<Presence>,
    /// Looks so far.
    looks: u64,
}

impl Initiator {
    pub(super) fn new(bus: Arc<Shared>, presence: Arc<Presence>) -> Self {
        Self { bus, presence, looks: 0 }
    }

    /// The addresses of its bus.
    #[must_use]
    pub fn space(&self) -> Space {
        self.bus.space
    }

    /// Reads from the device that has all of the 1 to 16 bytes (`kvm_io_bus_read`). `false` if none
    /// has, or for another number of bytes; `data` is unchanged then.
    ///
    /// Reads the bus's table once. The look-up waits for nobody.
    #[must_use]
    pub fn read(&mut self, address: u64, data: &mut [u8]) -> bool {
        if data.is_empty() || data.len() > MAX_ACCESS {
            return false;
        }
        self.looks += 1;
        let look = self.presence.look(self.looks);
        let Some(Span { base, what, .. }) = self.bus.table(&look).device(address, data.len())
        else {
            return false;
        };
        // SAFETY: it was found in the published table within this look.
        let inside = unsafe { look.enter(what) };
        inside.call(self.bus.owner, |device| device.read(base, address - base, data));
        true
    }

    /// Writes 1 to 16 bytes (`kvm_io_bus_write`): to a doorbell, into the ring, or to a device.
    ///
    /// Reads the bus's table once. The look-up waits for nobody; nor does a write that goes into the
    /// ring, but there one of several at a time gets on.
    pub fn write(&mut self, address: u64, data: &[u8]) -> Answer {
        self.send(address, data, true)
    }

    /// The same for a write that must not wait in the ring: one that came out of there, or did not
    /// get in.
    pub fn write_now(&mut self, address: u64, data: &[u8]) -> Answer {
        self.send(address, data, false)
    }

    fn send(&mut self, address: u64, data: &[u8], coalesce: bool) -> Answer {
        let bus = &*self.bus;
        // A copy from before the look: what others wait for touches none of the caller's memory.
        let Some(write) = CoalescedWrite::new(bus.space, address, data) else {
            return Answer::Unhandled;
        };
        self.looks += 1;
        let look = self.presence.look(self.looks);
        let table = bus.table(&look);
        if let Some(doorbell) = table.doorbell(&write) {
            // SAFETY: it was found in the published table within this look.
            let inside = unsafe { look.enter(doorbell) };
            inside.call(bus.owner, |doorbell| doorbell.ring());
            return Answer::Doorbell;
        }
        if coalesce && table.coalesces(address, data.len()) {
            return if bus.ring.push(&write) { Answer::Coalesced } else { Answer::RingFull };
        }
        let Some(Span { base, what, .. }) = table.device(address, data.len()) else {
            return Answer::Unhandled;
        };
        // SAFETY: as above.
        let inside = unsafe { look.enter(what) };
        inside.call(bus.owner, |device| device.write(base, address - base, data));
        Answer::Device
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        self.presence.go();
    }
}

impl fmt::Debug for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Initiator").field("space", &self.bus.space).finish_non_exhaustive()
    }
}
