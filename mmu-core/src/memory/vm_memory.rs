// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a VMM that uses the `vm-memory` crate, as the backing of memslots.

use super::{Backing, DirtyLog};
use crate::addr::{PAGE_SHIFT, PAGE_SIZE};
use crate::sync::AtomicU64;
use core::fmt;
use core::ptr::NonNull;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Why a region cannot back a memslot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// No region of the collection holds the address.
    #[error("no memory region at guest-physical {0:#x}")]
    NoRegion(u64),
    /// The region has no host memory to point at.
    #[error("the memory region at guest-physical {base:#x} has no host address: {source}")]
    NotMapped {
        /// First guest-physical address of the region.
        base: u64,
        /// What vm-memory said.
        source: vm_memory::GuestMemoryError,
    },
    /// Region sizes and host addresses must be whole pages.
    #[error(
        "the memory region at guest-physical {base:#x} is not page-aligned: {size:#x} bytes at host {host:#x}"
    )]
    Misaligned {
        /// First guest-physical address of the region.
        base: u64,
        /// Bytes.
        size: u64,
        /// Host-virtual address.
        host: u64,
    },
    /// The region's bitmap is not the log of exactly the region.
    #[error(
        "the dirty log of the memory region at guest-physical {base:#x} begins {offset:#x} bytes after the log's first page and has {given} pages in all, the region {needed}"
    )]
    WrongLog {
        /// First guest-physical address of the region.
        base: u64,
        /// Where in the log's memory the region begins, in bytes; must be 0.
        offset: usize,
        /// Pages of the region.
        needed: u64,
        /// Pages of the log.
        given: u64,
    },
}

/// One region of any [`GuestMemoryBackend`]; keeps the whole collection alive.
pub struct VmMemoryRegion<M> {
    words: NonNull<[AtomicU64]>,
    base: u64,
    log: Option<DirtyLog>,
    memory: Arc<M>,
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> VmMemoryRegion<M> {
    /// The region of `memory` that holds `address`.
    ///
    /// # Errors
    ///
    /// [`RegionError`], which names the address.
    pub fn new(memory: Arc<M>, address: GuestAddress) -> Result<Self, RegionError> {
        let region = memory.find_region(address).ok_or(RegionError::NoRegion(address.0))?;
        let base = region.start_addr().0;
        let size = region.len();
        let host = region
            .get_slice(MemoryRegionAddress(0), size as usize)
            .map_err(|source| RegionError::NotMapped { base, source })?
            .ptr_guard_mut()
            .as_ptr();
        if size % PAGE_SIZE != 0 || host as u64 % PAGE_SIZE != 0 {
            return Err(RegionError::Misaligned { base, size, host: host as u64 });
        }
        let words =
            core::ptr::slice_from_raw_parts_mut(host.cast::<AtomicU64>(), size as usize / 8);
        // SAFETY: the pointer of a volatile slice is valid, hence not null.
        let words = unsafe { NonNull::new_unchecked(words) };
        Ok(Self { words, base, log: None, memory })
    }

    /// The region of `memory` that holds `address`, with its bitmap: a memslot over it that logs
    /// uses that log as its own, so what the VMM writes through `memory` is reported together with
    /// what the guest writes. Each region must have a log of its own, as `from_ranges` makes them.
    ///
    /// Not recorded is what the VMM writes through raw pointers or atomic references, since
    /// vm-memory does not mark that.
    ///
    /// # Errors
    ///
    /// [`RegionError`], which names the address.
    pub fn with_dirty_log(memory: Arc<M>, address: GuestAddress) -> Result<Self, RegionError>
    where
        M::R: GuestMemoryRegion<B = DirtyLog>,
    {
        let mut this = Self::new(memory, address)?;
        let region = this.memory.find_region(address).ok_or(RegionError::NoRegion(address.0))?;
        let bitmap = region.bitmap();
        let (offset, log) = (bitmap.offset(), bitmap.log().clone());
        let (needed, given) = (region.len() >> PAGE_SHIFT, log.pages());
        if offset != 0 || given != needed {
            return Err(RegionError::WrongLog { base: this.base, offset, needed, given });
        }
        this.log = Some(log);
        Ok(this)
    }

    /// First guest-physical address of the region.
    #[must_use]
    pub fn base(&self) -> crate::addr::Gpa {
        crate::addr::Gpa(self.base)
    }

    /// The collection.
    #[must_use]
    pub fn memory(&self) -> &Arc<M> {
        &self.memory
    }
}

// SAFETY: the pointer is to memory owned by `memory`, which is `Send + Sync`, used as atomics.
unsafe impl<M: Send + Sync> Send for VmMemoryRegion<M> {}
// SAFETY: as above.
unsafe impl<M: Send + Sync> Sync for VmMemoryRegion<M> {}

// SAFETY: whoever made the region's volatile slice vouched for its bytes while the region is
// borrowed; `memory` is never handed out mutably and keeps the region. vm-memory lends guest memory
// as volatile slices and atomics only.
unsafe impl<M: Send + Sync> Backing for VmMemoryRegion<M> {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: see the impl.
        unsafe { self.words.as_ref() }
    }

    fn dirty_log(&self) -> Option<&DirtyLog> {
        self.log.as_ref()
    }
}

impl<M> fmt::Debug for VmMemoryRegion<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmMemoryRegion").field("base", &self.base).finish_non_exhaustive()
    }
}
