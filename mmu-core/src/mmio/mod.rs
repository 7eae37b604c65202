// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device bus: which device, doorbell or coalesced range answers at a guest-physical address, or
//! at an I/O port.
//!
//! A VM has two [`Bus`]es of one type, which differ in their [`Space`] ([`crate::Mmu::bus`],
//! [`crate::Mmu::ports`]), and one [`CoalescedRing`] that they share. What stands on a bus is
//! registered and removed at run time, while vCPUs access it; a thread that makes accesses has an
//! [`Initiator`].
//!
//! # What an access finds
//!
//! An access has 1 to 16 bytes. It goes, in this order, to
//!
//! 1. if it is a write, the doorbell whose [`Trigger`] it matches: the doorbell rings, and nothing
//!    else happens;
//! 2. if it is a write and lies wholly in a coalesced range, the ring, to be carried out later;
//! 3. the device in whose range it wholly lies;
//! 4. nobody: the VMM's business, as is a write that finds the ring full.
//!
//! KVM has all three on one `kvm_io_bus`, where ranges may overlap and the first that accepts an
//! access has it; here devices do not overlap devices, nor coalesced ranges each other, and who goes
//! first is fixed.
//!
//! # Who waits for whom
//!
//! | call | origin | waits for | reads |
//! | --- | --- | --- | --- |
//! | look-up, in [`Initiator::read`] and [`Initiator::write`] | `vcpu_find_mmio_dev`, `kvm_io_bus_read`, `kvm_io_bus_write` | nobody: a bounded number of steps, no lock, no store to memory that another vCPU uses | the table of one moment, once |
//! | [`Bus::register`], [`Bus::register_doorbell`], [`Bus::register_coalesced`] | `kvm_io_bus_register_dev`, `KVM_IOEVENTFD`, `KVM_REGISTER_COALESCED_MMIO` | other changes of this bus; look-ups under way | |
//! | [`Bus::remove`], [`Bus::remove_doorbell`], [`Bus::remove_coalesced`], [`Bus::clear`] | `kvm_io_bus_unregister_dev`, `KVM_IOEVENTFD_FLAG_DEASSIGN`, `KVM_UNREGISTER_COALESCED_MMIO`, `kvm_io_bus_destroy` | the same; never for a device | |
//! | [`Bus::initiator`] | | changes of this bus | |
//! | [`Removal::accesses`] | | nobody | a count |
//! | [`Removal::wait`] | `synchronize_srcu` in `kvm_io_bus_unregister_dev` | accesses inside the device; refuses threads that these may wait for | |
//! | [`CoalescedRing::drain`] | `kvm_coalesced_mmio_ring` | other drainers; writes that are being put into the ring | each write whole, in order |
//!
//! Devices and doorbells are called without any lock and outside of any section that somebody waits
//! for, so they may do all of the above, register and remove on their own bus included; only
//! [`Removal::wait`] is refused in there. A look-up touches no guest memory, so threads that bring some
//! ([`crate::Mmu::resolver`]) may change a bus.
//!
//! # Example
//!
//! ```
//! use mmu_core::mmio::{Answer, Bus, Device, Space, Trigger};
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU32, Ordering};
//!
//! /// A register that counts its reads.
//! #[derive(Default)]
//! struct Counter(AtomicU32);
//! impl Device for Counter {
//!     fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
//!         let reads = self.0.fetch_add(1, Ordering::Relaxed);
//!         data.copy_from_slice(&reads.to_le_bytes()[offset as usize..][..data.len()]);
//!     }
//!     fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {
//!         self.0.store(0, Ordering::Relaxed);
//!     }
//! }
//!
//! let bus = Bus::new(Space::Mmio, Arc::default());
//! bus.register(0xd000_0000, 4, Arc::new(Counter::default()))?;
//! let rung = Arc::new(AtomicU32::new(0));
//! let kick = Arc::clone(&rung);
//! bus.register_doorbell(Trigger::any(0xd000_1000), Arc::new(move || {
//!     kick.fetch_add(1, Ordering::Relaxed);
//! }))?;
//!
//! let mut vcpu = bus.initiator();
//! let mut data = [0xff; 4];
//! assert!(vcpu.read(0xd000_0000, &mut data) && vcpu.read(0xd000_0000, &mut data));
//! assert_eq!(data, [1, 0, 0, 0]);
//! // Not wholly in the range.
//! assert_eq!(vcpu.write(0xd000_0002, &[0; 4]), Answer::Unhandled);
//! assert_eq!(vcpu.write(0xd000_1000, &[0; 2]), Answer::Doorbell);
//! assert_eq!(rung.load(Ordering::Relaxed), 1);
//!
//! // No later access finds the device; it may be freed when those that are inside have ended.
//! let removal = bus.remove(0xd000_0000)?;
//! removal.wait()?;
//! assert!(!vcpu.read(0xd000_0000, &mut data));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bus;
mod coalesced;
mod device;
mod error;
mod initiator;
mod presence;
mod registration;
mod removal;
mod table;

pub use bus::Bus;
pub use coalesced::{CoalescedRing, CoalescedWrite};
pub use device::{Device, Doorbell, MAX_ACCESS, Space, Trigger};
pub use error::BusError;
pub use initiator::{Answer, Initiator};
pub use removal::Removal;

#[cfg(all(test, not(loom)))]
mod tests;
