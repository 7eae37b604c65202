// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cache of decoded instructions.
//!
//! Direct-mapped by address, and correct whatever is done to the code: an entry counts only if the bytes
//! at that address still are those it was decoded from, or if the bus vouches for it with an unchanged
//! [`Bus::code_stamp`]. Entries depend on nothing else, so a cache outlives changes of CR3.

use super::bus::{Bus, Exception, InsnBytes, MAX_INSN, Stop};
use super::insn::Insn;
use super::lower::{self, Lowered};
use std::fmt;

/// One decoded instruction and what it was decoded from.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    rip: u64,
    /// The bytes, zero-extended.
    bytes: u128,
    /// Covers the instruction's bytes; zero marks an empty entry.
    mask: u128,
    /// [`Bus::code_stamp`] when the bytes were last compared.
    stamp: Option<u64>,
    pub(super) insn: Insn,
}

impl Entry {
    /// The instruction's bytes.
    #[cold]
    pub(super) fn bytes(&self) -> InsnBytes {
        insn_bytes(self.bytes, usize::from(self.insn.len))
    }
}

/// A direct-mapped cache of decoded instructions, one for each vCPU.
pub struct DecodeCache {
    entries: Box<[Entry]>,
}

impl fmt::Debug for DecodeCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecodeCache").field("entries", &self.entries.len()).finish()
    }
}

impl Default for DecodeCache {
    fn default() -> Self {
        Self::new()
    }
}

impl DecodeCache {
    /// A cache of 1024 entries (about 110 KiB).
    #[must_use]
    pub fn new() -> Self {
        Self::with_entries(1024)
    }

    /// A cache of at least `entries` entries (rounded up to a power of two).
    #[must_use]
    pub fn with_entries(entries: usize) -> Self {
        let empty =
            Entry { rip: 0, bytes: 0, mask: 0, stamp: None, insn: lower::unsupported_insn() };
        DecodeCache { entries: vec![empty; entries.max(1).next_power_of_two()].into() }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        for e in &mut self.entries {
            e.mask = 0;
            e.stamp = None;
        }
    }

    /// The instruction at `rip`, from the cache if the bytes are the same.
    #[inline]
    pub(super) fn lookup<B: Bus>(
        &mut self,
        rip: u64,
        bus: &mut B,
    ) -> Result<&Entry, Stop<B::Stop>> {
        let index = (rip ^ (rip >> 10)) as usize & (self.entries.len() - 1);
        let entry = &mut self.entries[index];
        let stamp = bus.code_stamp(rip);
        let hit = entry.rip == rip && entry.mask != 0;
        if hit && stamp.is_some() && entry.stamp == stamp {
            return Ok(entry);
        }
        if !bus.is_canonical(rip) {
            return Err(at(Exception::gp(0), rip).into());
        }
        let mut buf = [0; MAX_INSN];
        let got = bus.fetch(rip, &mut buf).map_err(Stop::Bus)?.clamp(1, MAX_INSN);
        if hit && got >= usize::from(entry.insn.len) && to_word(&buf) & entry.mask == entry.bytes {
            entry.stamp = stamp;
            return Ok(entry);
        }
        fill(entry, rip, bus, buf, got)?;
        entry.stamp = stamp;
        Ok(entry)
    }
}

/// Decodes the instruction at `rip`, of which `got` bytes are known.
#[cold]
#[inline(never)]
fn fill<B: Bus>(
    entry: &mut Entry,
    rip: u64,
    bus: &mut B,
    mut buf: [u8; MAX_INSN],
    mut got: usize,
) -> Result<(), Stop<B::Stop>> {
    loop {
        match lower::decode(&buf[..got], rip) {
            Lowered::Insn(insn) => {
                let mask = (1u128 << (8 * u32::from(insn.len))) - 1;
                *entry = Entry { rip, bytes: to_word(&buf) & mask, mask, stamp: None, insn };
                return Ok(());
            }
            Lowered::NeedMore if got < MAX_INSN => {
                let gva = rip.wrapping_add(got as u64);
                if !bus.is_canonical(gva) {
                    return Err(at(Exception::gp(0), rip).into());
                }
                let mut more = [0; MAX_INSN];
                let n = bus.fetch(gva, &mut more).map_err(Stop::Bus)?.clamp(1, MAX_INSN - got);
                buf[got..got + n].copy_from_slice(&more[..n]);
                got += n;
            }
            // No instruction, or (where processors raise #GP) one longer than 15 bytes.
            Lowered::NeedMore | Lowered::Invalid => {
                return Err(with_bytes(Exception::ud(), rip, &buf, got).into());
            }
        }
    }
}

fn at(e: Exception, rip: u64) -> Exception {
    Exception { rip, ..e }
}

fn with_bytes(e: Exception, rip: u64, buf: &[u8; MAX_INSN], got: usize) -> Exception {
    Exception { rip, bytes: insn_bytes(to_word(buf), got), ..e }
}

fn insn_bytes(word: u128, len: usize) -> InsnBytes {
    let mut bytes = [0; MAX_INSN];
    bytes.copy_from_slice(&word.to_le_bytes()[..MAX_INSN]);
    InsnBytes { bytes, len: len.min(MAX_INSN) as u8 }
}

#[inline]
fn to_word(buf: &[u8; MAX_INSN]) -> u128 {
    let mut all = [0; 16];
    all[..MAX_INSN].copy_from_slice(buf);
    u128::from_le_bytes(all)
}
