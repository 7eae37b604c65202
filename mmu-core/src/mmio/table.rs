// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What stands on a bus at one moment: an immutable table, published as a whole.
//!
//! Three sorted arrays. A look-up halves those that it has to look into; a change copies one of them, as
//! KVM copies its `struct kvm_io_bus`.

use super::coalesced::CoalescedWrite;
use super::registration::Registration;
use super::{BusError, Device, Doorbell, Space, Trigger};
use crate::sync::Life;
use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;
use std::sync::Arc;

pub(super) type DevicePointer = NonNull<Registration<dyn Device>>;
pub(super) type DoorbellPointer = NonNull<Registration<dyn Doorbell>>;

/// See the module. Does not own what its pointers name.
#[derive(Default)]
pub(super) struct Table {
    devices: Spans<DevicePointer>,
    coalesced: Spans<()>,
    doorbells: Arc<[(Trigger, DoorbellPointer)]>,
    life: Life,
}

/// A range of addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span<T> {
    pub(super) base: u64,
    pub(super) size: u64,
    pub(super) what: T,
}

impl<T> Span<T> {
    /// A range of a bus.
    pub(super) fn new(space: Space, base: u64, size: u64, what: T) -> Result<Self, BusError> {
        if size == 0 {
            return Err(BusError::ZeroSize { space, base });
        }
        match base.checked_add(size) {
            Some(end) if end <= space.end() => Ok(Self { base, size, what }),
            _ => Err(BusError::WrapsAround { space, base, size }),
        }
    }

    fn range(&self) -> Range<u64> {
        self.base..self.base + self.size
    }

    /// Whether all bytes of an access at or behind the base are in the range; it may wrap around.
    fn contains(&self, address: u64, length: usize) -> bool {
        let end = (address - self.base).checked_add(length as u64);
        end.is_some_and(|end| end <= self.size)
    }
}

/// Ranges by address, none of which overlap.
type Spans<T> = Arc<[Span<T>]>;

/// The range that has the whole access (KVM's `kvm_io_bus_get_first_dev`, and `in_range` of a device).
#[inline]
fn find<T>(spans: &[Span<T>], address: u64, length: usize) -> Option<&Span<T>> {
    let after = spans.partition_point(|span| span.base <= address);
    spans[..after].last().filter(|span| span.contains(address, length))
}

/// The same ranges and one more, or the range that overlaps it.
fn with<T: Copy>(spans: &[Span<T>], span: Span<T>) -> Result<Spans<T>, Span<T>> {
    let at = spans.partition_point(|other| other.base < span.base);
    let (before, after) = spans.split_at(at);
    let left = before.last().filter(|other| span.base - other.base < other.size);
    if let Some(other) = left.or(after.first().filter(|o| o.base - span.base < span.size)) {
        return Err(*other);
    }
    Ok(insert(spans, at, span))
}

/// The same ranges but the one that begins at `base`, and that one.
fn without<T: Copy>(spans: &[Span<T>], base: u64) -> Option<(Spans<T>, Span<T>)> {
    let at = spans.binary_search_by_key(&base, |span| span.base).ok()?;
    Some((remove(spans, at), spans[at]))
}

fn insert<T: Copy>(items: &[T], at: usize, item: T) -> Arc<[T]> {
    let (before, after) = items.split_at(at);
    before.iter().copied().chain([item]).chain(after.iter().copied()).collect()
}

fn remove<T: Copy>(items: &[T], at: usize) -> Arc<[T]> {
    let (before, after) = (&items[..at], &items[at + 1..]);
    before.iter().chain(after).copied().collect()
}

impl Table {
    /// The device that has all bytes of the access.
    #[inline]
    pub(super) fn device(&self, address: u64, length: usize) -> Option<Span<DevicePointer>> {
        self.life.check();
        find(&self.devices, address, length).copied()
    }

    /// Whether a coalesced range has all bytes of the write.
    #[inline]
    pub(super) fn coalesces(&self, address: u64, length: usize) -> bool {
        self.life.check();
        find(&self.coalesced, address, length).is_some()
    }

    /// The doorbell that the write rings (`ioeventfd_in_range`). There is one at most, since no two
    /// may wait for the same write.
    #[inline]
    pub(super) fn doorbell(&self, write: &CoalescedWrite) -> Option<DoorbellPointer> {
        self.life.check();
        let address = write.address();
        let at = self.doorbells.partition_point(|(trigger, _)| trigger.address < address);
        let (first, pointer) = self.doorbells.get(at)?;
        if first.address != address {
            return None;
        }
        if first.length == 0 {
            return Some(*pointer);
        }
        // No doorbell waits for more than 8 bytes.
        let (length, value) = write.as_integer();
        let here = &self.doorbells[at..];
        [Trigger::sized(address, length), Trigger::valued(address, length, value)]
            .into_iter()
            .find_map(|trigger| here.binary_search_by_key(&trigger, |(trigger, _)| *trigger).ok())
            .map(|at| here[at].1)
    }

    pub(super) fn with_device(
        &self,
        space: Space,
        span: Span<DevicePointer>,
    ) -> Result<Self, BusError> {
        let Span { base, size, .. } = span;
        let devices = with(&self.devices, span).map_err(|other| {
            let (other_base, other_size) = (other.base, other.size);
            BusError::Overlap { space, base, size, other_base, other_size }
        })?;
        Ok(Self { devices, ..self.share() })
    }

    pub(super) fn without_device(
        &self,
        space: Space,
        base: u64,
    ) -> Result<(Self, DevicePointer), BusError> {
        let found = without(&self.devices, base).ok_or(BusError::NoDevice { space, base });
        found.map(|(devices, span)| (Self { devices, ..self.share() }, span.what))
    }

    pub(super) fn with_coalesced(&self, space: Space, span: Span<()>) -> Result<Self, BusError> {
        let Span { base, size, .. } = span;
        let coalesced = with(&self.coalesced, span).map_err(|other| {
            let (other_base, other_size) = (other.base, other.size);
            BusError::CoalescedOverlap { space, base, size, other_base, other_size }
        })?;
        Ok(Self { coalesced, ..self.share() })
    }

    pub(super) fn without_coalesced(&self, space: Space, base: u64) -> Result<Self, BusError> {
        let found = without(&self.coalesced, base).ok_or(BusError::NoCoalesced { space, base });
        found.map(|(coalesced, _)| Self { coalesced, ..self.share() })
    }

    pub(super) fn with_doorbell(
        &self,
        trigger: Trigger,
        pointer: DoorbellPointer,
    ) -> Result<Self, BusError> {
        let from = self.doorbells.partition_point(|(other, _)| other.address < trigger.address);
        let same = self.doorbells[from..].iter().map(|(other, _)| *other);
        let mut same = same.take_while(|other| other.address == trigger.address);
        if let Some(other) = same.find(|other| other.collides(&trigger)) {
            return Err(BusError::DoorbellExists { trigger, other });
        }
        let at = self.doorbells.partition_point(|(other, _)| *other < trigger);
        let doorbells = insert(&self.doorbells, at, (trigger, pointer));
        Ok(Self { doorbells, ..self.share() })
    }

    pub(super) fn without_doorbell(
        &self,
        trigger: Trigger,
    ) -> Result<(Self, DoorbellPointer), BusError> {
        let found = self.doorbells.binary_search_by_key(&trigger, |(trigger, _)| *trigger);
        let at = found.map_err(|_| BusError::NoDoorbell { trigger })?;
        let doorbells = remove(&self.doorbells, at);
        Ok((Self { doorbells, ..self.share() }, self.doorbells[at].1))
    }

    /// Another table of the same.
    fn share(&self) -> Self {
        Self {
            devices: Arc::clone(&self.devices),
            coalesced: Arc::clone(&self.coalesced),
            doorbells: Arc::clone(&self.doorbells),
            life: Life::default(),
        }
    }

    /// Every device and every doorbell, to give them up with the table.
    pub(super) fn pointers(
        &self,
    ) -> (impl Iterator<Item = DevicePointer>, impl Iterator<Item = DoorbellPointer>) {
        (
            self.devices.iter().map(|span| span.what),
            self.doorbells.iter().map(|(_, pointer)| *pointer),
        )
    }

    /// What to remove to have an empty table: devices, coalesced ranges, doorbells.
    pub(super) fn names(&self) -> (Vec<u64>, Vec<u64>, Vec<Trigger>) {
        (
            self.devices.iter().map(|span| span.base).collect(),
            self.coalesced.iter().map(|span| span.base).collect(),
            self.doorbells.iter().map(|(trigger, _)| *trigger).collect(),
        )
    }

    /// In a model, says that nobody may look into the table any more.
    #[cfg(loom)]
    pub(super) fn end(&self) {
        self.life.end();
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = self.devices.iter().map(Span::range);
        let coalesced = self.coalesced.iter().map(Span::range);
        let doorbells = self.doorbells.iter().map(|(trigger, _)| trigger);
        f.debug_struct("Table")
            .field("devices", &devices.collect::<Vec<_>>())
            .field("coalesced", &coalesced.collect::<Vec<_>>())
            .field("doorbells", &doorbells.collect::<Vec<_>>())
            .finish()
    }
}
