// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the comparison with the processor does not reach: control transfer, flags and counters of the
//! system, decode cache, sizes of accesses.

use super::*;
use crate::emu::{REP_BATCH, run};

#[test]
fn branches_go_where_their_condition_says() {
    let mut rng = Rng(7);
    for cc in 0..16u8 {
        for _ in 0..64 {
            let (mut regs, mut bus) = program(&[0x70 | cc, 0x10]);
            regs.rflags |= rng.next() & 0x8d5;
            // setcc is compared with the processor elsewhere.
            let (mut by_set, mut set) = program(&[0x0f, 0x90 | cc, 0xc0]);
            by_set.rflags = regs.rflags;
            one(&mut by_set, &mut set).unwrap();
            assert_eq!(one(&mut regs, &mut bus), Ok(Event::Retired));
            assert_eq!(regs.rip, if by_set.gpr[0] == 1 { CODE + 0x12 } else { CODE + 2 });
        }
    }
}

#[test]
fn calls_and_returns() {
    // call +3; ud2 (at +5, skipped); … at +8: ret 16
    let (mut regs, mut bus) = program(&[0xe8, 3, 0, 0, 0, 0x90, 0x90, 0x90, 0xc2, 16, 0]);
    let sp = regs.gpr[4];
    one(&mut regs, &mut bus).unwrap();
    assert_eq!((regs.rip, regs.gpr[4]), (CODE + 8, sp - 8));
    one(&mut regs, &mut bus).unwrap();
    assert_eq!((regs.rip, regs.gpr[4]), (CODE + 5, sp + 16));
    // call [rax]; jmp rcx
    for (code, target) in [(&[0xff, 0x10][..], 0x2222u64), (&[0xff, 0xe1][..], 0x3333)] {
        let (mut regs, mut bus) = program(code);
        regs.gpr[0] = CODE + 0x100;
        regs.gpr[1] = 0x3333;
        bus.mem[0x100..0x108].copy_from_slice(&0x2222u64.to_le_bytes());
        one(&mut regs, &mut bus).unwrap();
        assert_eq!(regs.rip, target);
    }
    // loop -2 with rcx 3: twice taken; jrcxz with rcx 0.
    let (mut regs, mut bus) = program(&[0xe2, 0xfe]);
    regs.gpr[1] = 3;
    for rip in [CODE, CODE, CODE + 2] {
        one(&mut regs, &mut bus).unwrap();
        assert_eq!(regs.rip, rip);
    }
    let (mut regs, mut bus) = program(&[0xe3, 0x20]);
    one(&mut regs, &mut bus).unwrap();
    assert_eq!(regs.rip, CODE + 0x22);
}

#[test]
fn popf_in_ring_3_keeps_interrupts_and_iopl() {
    // popfq; pushfq
    let (mut regs, mut bus) = program(&[0x9d, 0x9c]);
    let sp = regs.gpr[4];
    bus.mem[0x8000..0x8008].copy_from_slice(&(!0x100u64).to_le_bytes());
    regs.rflags = 0x202 | 1 << 16;
    one(&mut regs, &mut bus).unwrap();
    // CF PF AF ZF SF DF OF NT AC ID, and IF as before.
    assert_eq!(regs.rflags, 0x8d5 | 0x400 | 0x4000 | 1 << 18 | 1 << 21 | 0x202);
    one(&mut regs, &mut bus).unwrap();
    assert_eq!(regs.gpr[4], sp);
    assert_eq!(bus.mem[0x8000..0x8008], regs.rflags.to_le_bytes());
    // The 16-bit form leaves the upper half alone.
    let (mut regs, mut bus) = program(&[0x66, 0x9d]);
    regs.rflags = 0x202 | 1 << 18;
    one(&mut regs, &mut bus).unwrap();
    assert_eq!((regs.rflags, regs.gpr[4]), (0x202 | 1 << 18, CODE + 0x8002));
}

#[test]
fn each_operand_is_one_access_of_its_size() {
    type Accesses = [(usize, bool)];
    let cases: [(&[u8], &Accesses); 13] = [
        (&[0x88, 0x03], &[(1, true)]),
        (&[0x66, 0x89, 0x03], &[(2, true)]),
        (&[0x89, 0x03], &[(4, true)]),
        (&[0x48, 0x89, 0x03], &[(8, true)]),
        (&[0x48, 0x8b, 0x03], &[(8, false)]),
        // mov eax, [0x1100] with a 64-bit address
        (&[0xa1, 0, 0x11, 0, 0, 0, 0, 0, 0], &[(4, false)]),
        (&[0x48, 0xc7, 0x03, 1, 0, 0, 0], &[(8, true)]),
        (&[0x48, 0x01, 0x03], &[(8, false), (8, true)]),
        // xchg and lock inc: a load, then cmpxchg (a load and a store of this bus).
        (&[0x48, 0x87, 0x03], &[(8, false), (8, false), (8, true)]),
        (&[0xf0, 0x48, 0xff, 0x03], &[(8, false), (8, false), (8, true)]),
        (&[0xf0, 0x48, 0x0f, 0xc7, 0x0b], &[(16, false), (16, true)]),
        (&[0x48, 0xa5], &[(8, false), (8, true)]),
        (&[0xff, 0x33], &[(8, false), (8, true)]),
    ];
    for (code, expected) in cases {
        let (mut regs, mut bus) = program(code);
        regs.gpr[3] = CODE + 0x100;
        regs.gpr[6] = CODE + 0x100;
        regs.gpr[7] = CODE + 0x200;
        one(&mut regs, &mut bus).unwrap();
        let seen: Vec<_> = bus.log.iter().map(|(_, size, write)| (*size, *write)).collect();
        assert_eq!(seen, expected, "{code:x?}");
    }
}

#[test]
fn rewritten_code_is_decoded_again() {
    let (mut regs, mut bus) = program(&[0xb8, 1, 0, 0, 0]);
    let mut cache = DecodeCache::with_entries(1);
    for (byte, value) in [(0xb8, 1), (0xb9, 1), (0xb8, 1)] {
        bus.mem[0] = byte;
        regs.rip = CODE;
        regs.gpr = [0; 16];
        step(&mut regs, &mut bus, &mut cache).unwrap();
        assert_eq!(regs.gpr[usize::from(byte - 0xb8)], value);
    }
    // An immediate, too; and a flush changes nothing but speed.
    bus.mem[4] = 0x80;
    regs.rip = CODE;
    step(&mut regs, &mut bus, &mut cache).unwrap();
    assert_eq!(regs.gpr[0], 0x8000_0001);
    cache.flush();
    regs.rip = CODE;
    step(&mut regs, &mut bus, &mut cache).unwrap();
    assert_eq!(regs.rip, CODE + 5);
}

/// A bus whose code changes only with its stamp.
struct Stamped(Flat, u64, u32);

impl Bus for Stamped {
    type Stop = Outside;
    fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, Outside> {
        self.2 += 1;
        self.0.fetch(gva, buf)
    }
    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Outside> {
        self.0.read(gva, buf)
    }
    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Outside> {
        self.0.write(gva, bytes)
    }
    fn cmpxchg(&mut self, _: u64, _: u128, _: u128, _: usize) -> Result<Result<(), u128>, Outside> {
        Ok(Err(0))
    }
    fn code_stamp(&mut self, _: u64) -> Option<u64> {
        Some(self.1)
    }
}

#[test]
fn a_stamp_saves_fetches_until_it_changes() {
    let (mut regs, flat) = program(&[0x90, 0xeb, 0xfd]);
    let mut bus = Stamped(flat, 1, 0);
    let mut cache = DecodeCache::new();
    run(&mut regs, &mut bus, &mut cache, &mut 100).unwrap();
    assert_eq!(bus.2, 2);
    bus.1 = 2;
    run(&mut regs, &mut bus, &mut cache, &mut 100).unwrap();
    assert_eq!(bus.2, 4);
    bus.0.mem[0] = 0xf4;
    assert_eq!(run(&mut regs, &mut bus, &mut cache, &mut 100), Ok(Event::Retired));
    bus.1 = 3;
    assert_eq!(run(&mut regs, &mut bus, &mut cache, &mut 100), Ok(Event::Halt));
    assert_eq!(regs.rip, CODE + 1);
    // The lock of this bus never succeeds: bounded, and nothing has changed.
    let (mut regs, flat) = program(&[0xf0, 0x0f, 0xb0, 0x0b]);
    regs.gpr[3] = CODE + 0x100;
    let before = regs;
    assert_eq!(step(&mut regs, &mut Stamped(flat, 1, 0), &mut cache), Ok(Event::Again));
    assert_eq!(regs, before);
    let (mut regs, flat) = program(&[0xf0, 0xff, 0x03]);
    regs.gpr[3] = CODE + 0x100;
    let before = regs;
    assert_eq!(step(&mut regs, &mut Stamped(flat, 2, 0), &mut cache), Ok(Event::Again));
    assert_eq!(regs, before);
}

#[test]
fn long_repetitions_come_in_batches() {
    // rep stosb
    let (mut regs, mut bus) = program(&[0xf3, 0xaa]);
    let count = u64::from(REP_BATCH) * 2 + 5;
    (regs.gpr[0], regs.gpr[1], regs.gpr[7]) = (0x5a, count, CODE + 0x100);
    let mut cache = DecodeCache::new();
    for _ in 0..2 {
        assert_eq!(step(&mut regs, &mut bus, &mut cache), Ok(Event::Again));
        assert_eq!(regs.rip, CODE);
    }
    assert_eq!(step(&mut regs, &mut bus, &mut cache), Ok(Event::Retired));
    assert_eq!((regs.rip, regs.gpr[1], regs.gpr[7]), (CODE + 2, 0, CODE + 0x100 + count));
    let end = 0x100 + count as usize;
    assert!(bus.mem[0x100..end].iter().all(|b| *b == 0x5a) && bus.mem[end] == 0);
    // The longest count there is does not hang.
    regs.rip = CODE;
    regs.gpr[1] = u64::MAX;
    regs.gpr[7] = CODE + 0x100;
    assert_eq!(step(&mut regs, &mut bus, &mut cache), Ok(Event::Again));
}

#[test]
fn information_instructions() {
    // cpuid
    let (mut regs, mut bus) = program(&[0x0f, 0xa2]);
    regs.gpr[0] = u64::from(u32::MAX) << 32 | 1;
    regs.gpr[1] = u64::MAX;
    one(&mut regs, &mut bus).unwrap();
    assert_eq!(regs.gpr[0], 0x600);
    assert_ne!(regs.gpr[1] & 1 << 13, 0, "cmpxchg16b");
    // rdtsc goes up
    let (mut regs, mut bus) = program(&[0x0f, 0x31]);
    let mut last = 0;
    for _ in 0..10 {
        regs.rip = CODE;
        one(&mut regs, &mut bus).unwrap();
        let now = regs.gpr[2] << 32 | regs.gpr[0];
        assert!(now >= last && regs.gpr[0] >> 32 == 0);
        last = now;
    }
    // pause, mfence, clflush [rbx]
    let (mut regs, mut bus) = program(&[0xf3, 0x90, 0x0f, 0xae, 0xf0, 0x0f, 0xae, 0x3b]);
    regs.gpr[3] = CODE + 0x100;
    assert_eq!(one(&mut regs, &mut bus), Ok(Event::Pause));
    assert_eq!(one(&mut regs, &mut bus), Ok(Event::Retired));
    assert_eq!(one(&mut regs, &mut bus), Ok(Event::Retired));
    assert_eq!(regs.rip, CODE + 8);
    assert_eq!(bus.log, [(CODE + 0x100, 1, false)]);
}
