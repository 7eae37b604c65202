// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the emulator: single cases here, the comparison with the processor in `native`.

mod encode;
mod faults;
mod native;
mod units;

use super::{Bus, DecodeCache, Event, MAX_INSN, Stop, step};
use crate::regs::Regs;

/// A fixed-seed generator (xorshift64*).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }

    /// A number of random length, with the interesting ones more often.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.below(256),
            _ => self.next() >> self.below(64),
        }
    }
}

/// An access outside of [`Flat`].
#[derive(Debug, PartialEq, Eq)]
struct Outside(u64);

/// A bus over one piece of memory; everything else is outside.
struct Flat {
    base: u64,
    mem: Vec<u8>,
    /// Accesses as (address, size, is a write), in order.
    log: Vec<(u64, usize, bool)>,
    /// The first byte that must not be written, for restart tests.
    read_only_from: u64,
}

impl Flat {
    fn new(base: u64, size: usize) -> Self {
        Flat { base, mem: vec![0; size], log: Vec::new(), read_only_from: u64::MAX }
    }

    fn at(&mut self, gva: u64, len: usize) -> Result<&mut [u8], Outside> {
        let start = usize::try_from(gva.wrapping_sub(self.base)).map_err(|_| Outside(gva))?;
        let end = start.checked_add(len).ok_or(Outside(gva))?;
        self.mem.get_mut(start..end).ok_or(Outside(gva))
    }
}

impl Bus for Flat {
    type Stop = Outside;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; MAX_INSN]) -> Result<usize, Outside> {
        let left = self.mem.len() as u64 - gva.wrapping_sub(self.base).min(self.mem.len() as u64);
        let n = left.min(MAX_INSN as u64) as usize;
        if n == 0 {
            return Err(Outside(gva));
        }
        buf[..n].copy_from_slice(self.at(gva, n)?);
        Ok(n)
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Outside> {
        self.log.push((gva, buf.len(), false));
        buf.copy_from_slice(self.at(gva, buf.len())?);
        Ok(())
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Outside> {
        if gva.saturating_add(bytes.len() as u64) > self.read_only_from {
            return Err(Outside(gva));
        }
        self.log.push((gva, bytes.len(), true));
        self.at(gva, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Outside> {
        let mut seen = [0; 16];
        self.read(gva, &mut seen[..size])?;
        let seen = u128::from_le_bytes(seen);
        if seen != old {
            return Ok(Err(seen));
        }
        self.write(gva, &new.to_le_bytes()[..size])?;
        Ok(Ok(()))
    }
}

/// Where test programs stand.
const CODE: u64 = 0x1000;

/// Memory of 64 KiB at [`CODE`] with `code` at its start, and registers to run it.
fn program(code: &[u8]) -> (Regs, Flat) {
    let mut bus = Flat::new(CODE, 0x10000);
    bus.mem[..code.len()].copy_from_slice(code);
    let mut regs = Regs { rip: CODE, rflags: 0x202, ..Regs::default() };
    regs.gpr[4] = CODE + 0x8000;
    (regs, bus)
}

/// Executes one instruction with an empty cache.
fn one(regs: &mut Regs, bus: &mut Flat) -> Result<Event, Stop<Outside>> {
    step(regs, bus, &mut DecodeCache::with_entries(1))
}
