// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Anonymous memory of the VMM that is lent to the VM: zeroed, aligned to 2 MiB, never moved, and
//! unmapped when its last owner is gone.
//!
//! `unsafe` here: the calls to mmap and munmap, and the claim that the owner may cross threads.

use std::io;
use std::ptr::NonNull;

/// Alignment of every mapping, so that the VM may map it by large pages.
const ALIGN: usize = 2 << 20;

/// One private anonymous mapping.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory without thread affinity; the type gives out a raw pointer
// only, whose users state their own rules.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` offers no access to the memory but by that pointer.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` zeroed bytes (a multiple of the page size).
    pub(super) fn new(len: usize) -> io::Result<Mapping> {
        let whole = len.checked_add(ALIGN).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                whole,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = raw.cast::<u8>().align_offset(ALIGN);
        // SAFETY: `head < ALIGN <= whole`: inside the mapping.
        let start = unsafe { raw.cast::<u8>().add(head) };
        // SAFETY: `head + len <= whole`: inside the mapping, or one past its end.
        let end = unsafe { start.add(len) };
        for (at, n) in [(raw.cast::<u8>(), head), (end, ALIGN - head)] {
            if n != 0 {
                // SAFETY: the part of the mapping made above before `start` or from `end` on,
                // which nobody has a pointer into.
                unsafe { libc::munmap(at.cast(), n) };
            }
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, len })
    }

    /// The first byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes mapped.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// A pointer to the 64-bit word at byte `offset`.
    ///
    /// # Panics
    ///
    /// If the word does not lie in the mapping or is misaligned (an error of this crate).
    pub(super) fn word(&self, offset: u64) -> NonNull<u64> {
        let offset = offset as usize;
        assert!(offset % 8 == 0 && offset < self.len, "word at {offset:#x} of {:#x}", self.len);
        // SAFETY: in bounds by the assertion; the mapping is page-aligned and so the word is aligned.
        unsafe { self.start.add(offset).cast() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` kept; the last owner is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
