// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How fast the interpreter is: `cargo test --release -- --ignored --nocapture interpreter_speed`.

use super::*;
use crate::emu::run;
use std::time::Instant;

/// Memory without a log: what the emulator itself costs.
struct Bare<const STAMP: bool>(Vec<u8>);

impl<const STAMP: bool> Bare<STAMP> {
    fn at(&mut self, gva: u64, len: usize) -> Result<&mut [u8], Outside> {
        let start = gva.wrapping_sub(CODE) as usize;
        self.0.get_mut(start..start.wrapping_add(len)).ok_or(Outside(gva))
    }
}

impl<const STAMP: bool> Bus for Bare<STAMP> {
    type Stop = Outside;
    #[inline]
    fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, Outside> {
        buf.copy_from_slice(self.at(gva, 15)?);
        Ok(15)
    }
    #[inline]
    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Outside> {
        buf.copy_from_slice(self.at(gva, buf.len())?);
        Ok(())
    }
    #[inline]
    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Outside> {
        self.at(gva, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }
    fn cmpxchg(&mut self, _: u64, _: u128, _: u128, _: usize) -> Result<Result<(), u128>, Outside> {
        Ok(Ok(()))
    }
    fn code_stamp(&mut self, _: u64) -> Option<u64> {
        STAMP.then_some(1)
    }
}

fn measure<const STAMP: bool>() -> f64 {
    // A loop of a hash over memory: load, xor, imul, shr, store, add, cmp, jb; 9 instructions.
    let code = [
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0x48, 0x31, 0xc8, // xor rax, rcx
        0x48, 0x0f, 0xaf, 0xc2, // imul rax, rdx
        0x48, 0xc1, 0xe8, 0x03, // shr rax, 3
        0x48, 0x89, 0x03, // mov [rbx], rax
        0x48, 0x8d, 0x5b, 0x08, // lea rbx, [rbx + 8]
        0x48, 0x39, 0xf3, // cmp rbx, rsi
        0x48, 0x0f, 0x43, 0xdf, // cmovae rbx, rdi
        0xeb, 0xe2, // jmp to the start
    ];
    let mut bus = Bare::<STAMP>(vec![0; 0x10000]);
    bus.0[..code.len()].copy_from_slice(&code);
    let mut regs = Regs { rip: CODE, rflags: 0x202, ..Regs::default() };
    (regs.gpr[1], regs.gpr[2]) = (0x1234_5678, 0x9e37_79b9);
    (regs.gpr[3], regs.gpr[6], regs.gpr[7]) = (CODE + 0x1000, CODE + 0x8000, CODE + 0x1000);
    let mut cache = DecodeCache::new();
    let n = if cfg!(debug_assertions) { 1_000_000 } else { 50_000_000 };
    let start = Instant::now();
    assert_eq!(run(&mut regs, &mut bus, &mut cache, &mut { n }), Ok(Event::Retired));
    n as f64 / start.elapsed().as_secs_f64() / 1e6
}

#[test]
#[ignore = "a measurement"]
fn interpreter_speed() {
    eprintln!("{:.0} M instructions/s comparing bytes", measure::<false>());
    eprintln!("{:.0} M instructions/s with a code stamp", measure::<true>());
}
