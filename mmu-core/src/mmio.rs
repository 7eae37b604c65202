// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device bus: which device answers at a guest-physical address.
//!
//! Devices are registered and removed while vCPUs look up; a look-up takes no lock and sees one
//! immutable table. A device that is removed lives until the accesses that found it have ended.

use crate::addr::Gpa;
use crate::sync::{Door, Mutex, lock};
use core::fmt;
use std::sync::Arc;

/// A device's registers.
pub trait Device: Send + Sync {
    /// Reads `buf.len()` bytes at `offset` bytes into the device's range.
    fn read(&self, offset: u64, buf: &mut [u8]);

    /// Writes bytes at `offset` bytes into the device's range.
    fn write(&self, offset: u64, bytes: &[u8]);
}

/// Why a device was not registered or removed; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("{size:#x} bytes at {base} are no range")]
    BadRange {
        /// First address.
        base: Gpa,
        /// Bytes.
        size: u64,
    },
    /// Another device has part of the range.
    #[error("{size:#x} bytes at {base} overlap the device at {other}")]
    Overlap {
        /// First address.
        base: Gpa,
        /// Bytes.
        size: u64,
        /// The other device's first address.
        other: Gpa,
    },
    /// No device begins there.
    #[error("no device begins at {0}")]
    NoDevice(Gpa),
}

struct Range {
    base: u64,
    size: u64,
    device: Arc<dyn Device>,
}

/// A device bus.
pub struct Bus {
    /// Sorted by address, without overlaps.
    ranges: Door<Vec<Arc<Range>>>,
    writer: Mutex<()>,
}

impl Bus {
    pub(crate) fn new() -> Self {
        Self { ranges: Door::new(Arc::new(Vec::new())), writer: Mutex::new(()) }
    }

    /// Adds a device for `size` bytes at `base`.
    ///
    /// # Errors
    ///
    /// [`BusError`], which names the range.
    pub fn register(&self, base: Gpa, size: u64, device: Arc<dyn Device>) -> Result<(), BusError> {
        let end = base.0.checked_add(size).filter(|_| size > 0);
        let end = end.ok_or(BusError::BadRange { base, size })?;
        let _writer = lock(&self.writer);
        let mut ranges = self.ranges.load().to_vec();
        let at = ranges.partition_point(|r| r.base < base.0);
        let before = at.checked_sub(1).map(|i| &ranges[i]).filter(|r| r.base + r.size > base.0);
        if let Some(other) = before.or(ranges.get(at).filter(|r| r.base < end)) {
            return Err(BusError::Overlap { base, size, other: Gpa(other.base) });
        }
        ranges.insert(at, Arc::new(Range { base: base.0, size, device }));
        self.ranges.store(Arc::new(ranges));
        Ok(())
    }

    /// Removes the device that begins at `base`. Accesses that have found it may still be in it.
    ///
    /// # Errors
    ///
    /// [`BusError::NoDevice`].
    pub fn remove(&self, base: Gpa) -> Result<Arc<dyn Device>, BusError> {
        let _writer = lock(&self.writer);
        let mut ranges = self.ranges.load().to_vec();
        let at = ranges.iter().position(|r| r.base == base.0).ok_or(BusError::NoDevice(base))?;
        let removed = ranges.remove(at);
        self.ranges.store(Arc::new(ranges));
        Ok(Arc::clone(&removed.device))
    }

    /// Reads `buf.len()` bytes from the device that has all of them; whether one has. Takes no lock.
    #[must_use]
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> bool {
        self.with(gpa, buf.len(), |device, offset| device.read(offset, buf))
    }

    /// Writes bytes to the device that has all of them; whether one has. Takes no lock.
    #[must_use]
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> bool {
        self.with(gpa, bytes.len(), |device, offset| device.write(offset, bytes))
    }

    fn with(&self, gpa: Gpa, len: usize, access: impl FnOnce(&dyn Device, u64)) -> bool {
        let ranges = self.ranges.load();
        let at = ranges.partition_point(|r| r.base <= gpa.0);
        let found = at.checked_sub(1).map(|i| &ranges[i]).filter(|r| {
            let offset = gpa.0 - r.base;
            offset.checked_add(len as u64).is_some_and(|end| end <= r.size)
        });
        found.inspect(|range| access(&*range.device, gpa.0 - range.base)).is_some()
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.load();
        f.debug_list().entries(ranges.iter().map(|r| (Gpa(r.base), r.size))).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);
    impl Device for Log {
        fn read(&self, offset: u64, buf: &mut [u8]) {
            buf.fill(offset as u8);
        }
        fn write(&self, offset: u64, bytes: &[u8]) {
            self.0.lock().unwrap().push((offset, bytes.to_vec()));
        }
    }

    #[test]
    fn the_device_that_has_the_whole_access_answers() {
        let bus = Bus::new();
        let device = Arc::new(Log::default());
        bus.register(Gpa(0x1000), 0x10, device.clone()).unwrap();
        assert!(bus.write(Gpa(0x100c), &[1, 2, 3, 4]) && !bus.write(Gpa(0x100d), &[0; 4]));
        assert!(!bus.write(Gpa(0xfff), &[0; 2]) && !bus.write(Gpa(0x1010), &[0]));
        let mut buf = [0; 2];
        assert!(bus.read(Gpa(0x1008), &mut buf));
        assert_eq!(buf, [8, 8]);
        assert_eq!(*device.0.lock().unwrap(), [(0xc, vec![1, 2, 3, 4])]);
        assert!(bus.remove(Gpa(0x1000)).is_ok() && !bus.read(Gpa(0x1008), &mut buf));
    }

    #[test]
    fn refuses_bad_ranges_by_name() {
        let bus = Bus::new();
        let new = || Arc::new(Log::default());
        let bad = |base, size| BusError::BadRange { base: Gpa(base), size };
        assert_eq!(bus.register(Gpa(4), 0, new()), Err(bad(4, 0)));
        assert_eq!(bus.register(Gpa(u64::MAX), 2, new()), Err(bad(u64::MAX, 2)));
        bus.register(Gpa(0x1000), 0x100, new()).unwrap();
        for (base, size) in [(0xfff, 2), (0x1000, 1), (0x10ff, 1), (0, 0x10000)] {
            let overlap = BusError::Overlap { base: Gpa(base), size, other: Gpa(0x1000) };
            assert_eq!(bus.register(Gpa(base), size, new()), Err(overlap));
        }
        assert_eq!(bus.remove(Gpa(0x1001)).err(), Some(BusError::NoDevice(Gpa(0x1001))));
        bus.register(Gpa(0x1100), 1, new()).unwrap();
    }
}
