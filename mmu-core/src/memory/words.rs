// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bytes in the atomic words of a page.

use crate::sync::{AtomicU64, Ordering, exchange_across};

/// Copies bytes from `offset` of a page on out of its words, each word read as one; false if not
/// all are there.
pub(crate) fn load(words: &[AtomicU64], offset: u64, buf: &mut [u8]) -> bool {
    let mut done = 0;
    while done < buf.len() {
        let at = offset as usize + done;
        let Some(word) = words.get(at / 8) else { return false };
        let skip = at % 8;
        let n = (8 - skip).min(buf.len() - done);
        // Acquire: what a vCPU stored before it stored this word is seen.
        let bytes = word.load(Ordering::Acquire).to_le_bytes();
        buf[done..done + n].copy_from_slice(&bytes[skip..skip + n]);
        done += n;
    }
    true
}

/// Copies bytes to `offset` of a page on into its words, each word written as one, together with the
/// rest of it as it is; false if not all are there.
pub(crate) fn store(words: &[AtomicU64], offset: u64, bytes: &[u8]) -> bool {
    parts(offset, bytes).all(|(index, value, mask)| {
        words.get(index).map(|word| store_masked(word, value, mask)).is_some()
    })
}

/// Splits bytes at `offset` of a page by words: (index of the word, value, mask).
pub(crate) fn parts(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
    let mut at = 0;
    core::iter::from_fn(move || {
        let byte = offset + at as u64;
        let n = (8 - (byte % 8) as usize).min(bytes.len() - at);
        let (value, mask) = in_one(byte, &bytes[at..at + n])?;
        at += n;
        Some(((byte / 8) as usize, value, mask))
    })
}

/// Bytes that lie within an aligned word, as its value and mask.
#[inline]
pub(crate) fn in_one(address: u64, bytes: &[u8]) -> Option<(u64, u64)> {
    let skip = (address % 8) as usize;
    if bytes.is_empty() || skip + bytes.len() > 8 {
        return None;
    }
    let mut value = [0; 8];
    value[skip..skip + bytes.len()].copy_from_slice(bytes);
    let mask = u64::MAX >> (64 - 8 * bytes.len()) << (8 * skip);
    Some((u64::from_le_bytes(value), mask))
}

/// Stores the bytes under `mask`; the others keep what a vCPU may be writing to them.
#[inline]
pub(crate) fn store_masked(cell: &AtomicU64, value: u64, mask: u64) {
    if mask == u64::MAX {
        // Release: a vCPU that sees the word sees what was written before it.
        return cell.store(value, Ordering::Release);
    }
    let mut old = cell.load(Ordering::Relaxed);
    while let Err(now) =
        cell.compare_exchange_weak(old, old & !mask | value, Ordering::Release, Ordering::Relaxed)
    {
        old = now;
    }
}

/// Exchanges the bytes under `mask` if they are `old`; the others keep what they are. The bytes as
/// they were if they are not.
pub(crate) fn exchange_masked(cell: &AtomicU64, old: u64, new: u64, mask: u64) -> Result<(), u64> {
    let mut now = cell.load(Ordering::Acquire);
    loop {
        if now & mask != old & mask {
            return Err(now & mask);
        }
        let next = now & !mask | new & mask;
        // AcqRel: a locked instruction orders everything around it (SDM vol. 3, 9.2.2).
        match cell.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Ok(()),
            Err(changed) => now = changed,
        }
    }
}

/// A compare-and-exchange of 1, 2, 4, 8 or 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange {
    /// Bytes from the beginning of the first word.
    at: usize,
    size: usize,
    old: u128,
    new: u128,
}

impl Exchange {
    /// `None` for any other size.
    pub(crate) fn new(address: u64, size: usize, old: u128, new: u128) -> Option<Self> {
        let at = (address % 8) as usize;
        matches!(size, 1 | 2 | 4 | 8 | 16).then_some(Self { at, size, old, new })
    }

    /// Applies it to the words from the one with the first byte on: the bytes as they were, if they
    /// were not the expected ones. `None` if it cannot be done as one step.
    pub(crate) fn apply(self, words: &[AtomicU64]) -> Option<Result<(), u128>> {
        let Self { at, size, old, new } = self;
        if at + size > 8 {
            return exchange_across(words.first_chunk()?, at, size, old, new);
        }
        let shift = 8 * at;
        let mask = u64::MAX >> (64 - 8 * size) << shift;
        let result =
            exchange_masked(words.first()?, (old as u64) << shift, (new as u64) << shift, mask);
        Some(result.map_err(|now| u128::from(now >> shift)))
    }
}
