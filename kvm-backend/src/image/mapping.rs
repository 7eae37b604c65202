// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file as bytes in memory, read-only.
//!
//! `unsafe` here: the calls to mmap and munmap, and the copies out of the mapping. No reference to
//! the mapped bytes is ever made, since another process may change the file; a copy then holds
//! old or new bytes. A file that somebody truncates meanwhile ends the process with SIGBUS.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// What headers are read from.
pub(super) trait Bytes {
    /// Number of bytes.
    fn len(&self) -> u64;

    /// Copies the bytes from `at` on; false, and nothing copied, if some are beyond the end.
    fn read(&self, at: u64, to: &mut [u8]) -> bool;

    /// The same for a fixed number of bytes.
    #[inline]
    fn get<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes).then_some(bytes)
    }
}

/// A private read-only mapping of a whole file.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping has no thread affinity and is only read.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The first `len` bytes of the file; `len` is not 0.
    pub(super) fn new(file: &File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Tables lie scattered: reading ahead would fetch what nobody asks for. Only advice, so
        // that a refusal changes nothing.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(start, len, libc::MADV_RANDOM) };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// Copies `words` little-endian words from `at` on; false, and nothing copied, if some are
    /// beyond the end.
    #[inline]
    pub(super) fn read_words(&self, at: u64, words: &mut [u64]) -> bool {
        let Some(at) = self.inside(at, 8 * words.len()) else { return false };
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: `8 * words.len()` bytes from `at` on are in the mapping, which lives as long
            // as `self`; any bytes are a `u64`.
            let raw = unsafe { self.start.as_ptr().add(at + 8 * i).cast::<u64>().read_unaligned() };
            *word = u64::from_le(raw);
        }
        true
    }

    /// `at` as an offset, if `len` bytes from there on are in the mapping.
    #[inline]
    fn inside(&self, at: u64, len: usize) -> Option<usize> {
        let at = usize::try_from(at).ok()?;
        (at <= self.len && len <= self.len - at).then_some(at)
    }
}

impl Bytes for Mapping {
    fn len(&self) -> u64 {
        self.len as u64
    }

    #[inline]
    fn read(&self, at: u64, to: &mut [u8]) -> bool {
        let Some(at) = self.inside(at, to.len()) else { return false };
        // SAFETY: the source is inside the mapping, which lives as long as `self`; `to` is
        // exclusively borrowed and so is no part of it.
        unsafe {
            std::ptr::copy_nonoverlapping(self.start.as_ptr().add(at), to.as_mut_ptr(), to.len());
        }
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nothing borrows from it: reads copy.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
impl Bytes for [u8] {
    fn len(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, at: u64, to: &mut [u8]) -> bool {
        let from = usize::try_from(at).ok().and_then(|at| self.get(at..)?.get(..to.len()));
        from.is_some_and(|from| {
            to.copy_from_slice(from);
            true
        })
    }
}
