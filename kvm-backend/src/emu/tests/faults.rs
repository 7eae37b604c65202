// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exceptions, restartability, privileged instructions, hostile bytes.

use super::*;
use crate::emu::{Class, Exception};

fn exception(code: &[u8], prepare: impl FnOnce(&mut Regs)) -> Exception {
    let (mut regs, mut bus) = program(code);
    prepare(&mut regs);
    let before = (regs, bus.mem.clone());
    let result = one(&mut regs, &mut bus);
    assert_eq!((regs, bus.mem), before, "{code:x?}");
    match result {
        Err(Stop::Exception(e)) => e,
        other => panic!("{code:x?}: {other:?}"),
    }
}

#[test]
fn exceptions_have_vector_class_address_and_bytes() {
    type Case = (&'static [u8], u8, Option<u32>, Class, u64);
    let cases: [Case; 15] = [
        (&[0x0f, 0x0b], 6, None, Class::Fault, 0),
        (&[0x0f, 0x05], 6, None, Class::Fault, 0),
        (&[0xcc], 3, None, Class::Trap, 1),
        (&[0xf1], 1, None, Class::Trap, 1),
        (&[0xcd, 0x80], 0x80, None, Class::Software, 2),
        (&[0xf7, 0xf3], 0, None, Class::Fault, 0),
        (&[0xfa], 13, Some(0), Class::Fault, 0),
        // addps, mov ds, ax, fld1, far ret, enter, insb: not ours.
        (&[0x0f, 0x58, 0xc0], 6, None, Class::Unsupported, 0),
        (&[0x8e, 0xd8], 6, None, Class::Unsupported, 0),
        (&[0xd9, 0xe8], 6, None, Class::Unsupported, 0),
        (&[0xcb], 6, None, Class::Unsupported, 0),
        (&[0xc8, 0, 0, 0], 6, None, Class::Unsupported, 0),
        (&[0x6c], 6, None, Class::Unsupported, 0),
        // mov cr3, rax and rdmsr on a bus without privileges
        (&[0x0f, 0x22, 0xd8], 13, Some(0), Class::Fault, 0),
        (&[0x0f, 0x32], 13, Some(0), Class::Fault, 0),
    ];
    for (code, vector, error_code, class, advance) in cases {
        let e = exception(code, |_| {});
        assert_eq!((e.vector, e.error_code, e.class), (vector, error_code, class), "{e:?}");
        assert_eq!((e.rip, e.bytes.as_slice()), (CODE + advance, code));
    }
    // Not an instruction in 64-bit mode; lock where it must not be.
    for code in [&[0x06][..], &[0xf0, 0x90], &[0xf0, 0x48, 0x89, 0xc3]] {
        let e = exception(code, |_| {});
        assert_eq!((e.vector, e.class), (6, Class::Fault), "{e:?}");
        assert_eq!(&e.bytes.as_slice()[..code.len()], code);
    }
    // Longer than 15 bytes.
    assert_eq!(exception(&[0x66; 20], |_| {}).vector, 6);
    let text = exception(&[0x0f, 0x58, 0xc0], |_| {}).to_string();
    assert_eq!(text, "#UD at 0x1000, unsupported instruction [0f 58 c0]");
}

#[test]
fn division_overflows() {
    // div rbx with rdx >= rbx; idiv of the least number by -1; div bl
    assert_eq!(exception(&[0x48, 0xf7, 0xf3], |r| (r.gpr[2], r.gpr[3]) = (5, 5)).vector, 0);
    let least = |r: &mut Regs| {
        (r.gpr[0], r.gpr[2], r.gpr[3]) = (1 << 63, u64::MAX, u64::MAX);
    };
    assert_eq!(exception(&[0x48, 0xf7, 0xfb], least).vector, 0);
    let least = |r: &mut Regs| (r.gpr[2], r.gpr[3]) = (1 << 63, u64::MAX);
    assert_eq!(exception(&[0x48, 0xf7, 0xfb], least).vector, 0);
    assert_eq!(exception(&[0xf6, 0xf3], |r| (r.gpr[0], r.gpr[3]) = (0x1ff, 1)).vector, 0);
}

#[test]
fn non_canonical_addresses() {
    let bad = 1 << 47;
    // mov rax, [rbx]; the last byte beyond; push; jmp rbx; call rbx; ret
    let e = exception(&[0x48, 0x8b, 0x03], |r| r.gpr[3] = bad);
    assert_eq!((e.vector, e.error_code), (13, Some(0)));
    assert_eq!(exception(&[0x48, 0x8b, 0x03], |r| r.gpr[3] = bad - 4).vector, 13);
    assert_eq!(exception(&[0x50], |r| r.gpr[4] = bad + 16).vector, 12);
    assert_eq!(exception(&[0x48, 0x8b, 0x45, 0], |r| r.gpr[5] = bad).vector, 12);
    assert_eq!(exception(&[0xff, 0xe3], |r| r.gpr[3] = bad).vector, 13);
    assert_eq!(exception(&[0xff, 0xd3], |r| r.gpr[3] = bad).vector, 13);
    // Execution itself beyond: no bytes.
    let (mut regs, mut bus) = program(&[]);
    regs.rip = bad;
    let Err(Stop::Exception(e)) = one(&mut regs, &mut bus) else { panic!() };
    assert_eq!((e.vector, e.rip, e.bytes.as_slice()), (13, bad, &[][..]));
    // Shortly below: the bytes of the instruction go on beyond.
    let mut bus = Flat::new(bad - 2, 2);
    bus.mem.copy_from_slice(&[0x48, 0xb8]);
    let mut regs = Regs { rip: bad - 2, ..Regs::default() };
    let Err(Stop::Exception(e)) = one(&mut regs, &mut bus) else { panic!() };
    assert_eq!((e.vector, e.rip), (13, bad - 2));
}

#[test]
fn single_step_traps_after_the_instruction() {
    let (mut regs, mut bus) = program(&[0xff, 0xc0, 0xf4]);
    regs.rflags |= 0x100;
    let Err(Stop::Exception(e)) = one(&mut regs, &mut bus) else { panic!() };
    assert_eq!((e.vector, e.class, e.rip), (1, Class::Trap, CODE + 2));
    assert_eq!((regs.rip, regs.gpr[0]), (CODE + 2, 1));
}

#[test]
fn failing_accesses_leave_everything_as_it_was() {
    // Each has a memory operand at [rbx] or the stack, or strings; memory is read-only.
    let cases: [&[u8]; 22] = [
        &[0x48, 0x89, 0x03],
        &[0x48, 0x01, 0x03],
        &[0xf0, 0x48, 0x01, 0x03],
        &[0x48, 0x87, 0x03],
        &[0x48, 0x0f, 0xc1, 0x03],
        &[0x48, 0x0f, 0xb1, 0x03],
        &[0x48, 0x0f, 0xc7, 0x0b],
        &[0x48, 0x0f, 0xab, 0x03],
        &[0x48, 0xd1, 0x23],
        &[0x48, 0xf7, 0x1b],
        &[0x48, 0xff, 0x03],
        &[0x0f, 0x94, 0x03],
        &[0x50],
        &[0xff, 0x33],
        &[0x8f, 0x03],
        &[0x9c],
        &[0xe8, 0, 0, 0, 0],
        &[0xff, 0x13],
        &[0x48, 0xa5],
        &[0xf3, 0x48, 0xab],
        &[0x48, 0x0f, 0xa4, 0x03, 5],
        &[0x48, 0x0f, 0x38, 0xf1, 0x03],
    ];
    for code in cases {
        let (mut regs, mut bus) = program(code);
        for (n, r) in regs.gpr.iter_mut().enumerate() {
            if n != 4 {
                *r = CODE + 0x100 + 0x20 * n as u64;
            }
        }
        bus.mem[0x100..0x400].fill(0);
        if code == [0x48, 0x0f, 0xb1, 0x03] {
            regs.gpr[0] = 0;
        }
        if code == [0x48, 0x0f, 0xc7, 0x0b] {
            (regs.gpr[0], regs.gpr[2]) = (0, 0);
        }
        bus.read_only_from = CODE;
        let before = (regs, bus.mem.clone());
        let result = one(&mut regs, &mut bus);
        assert!(matches!(result, Err(Stop::Bus(Outside(_)))), "{code:x?}: {result:?}");
        assert_eq!((regs, &bus.mem), (before.0, &before.1), "{code:x?}");
        // Once it may, it does.
        bus.read_only_from = u64::MAX;
        if code[0] != 0xf3 {
            assert_eq!(one(&mut regs, &mut bus), Ok(Event::Retired), "{code:x?}");
        }
    }
}

#[test]
fn repetitions_keep_their_progress_over_a_fault() {
    // rep movsq over the end of what can be written, twice.
    let (mut regs, mut bus) = program(&[0xf3, 0x48, 0xa5]);
    (regs.gpr[1], regs.gpr[6], regs.gpr[7]) = (10, CODE + 0x100, CODE + 0x200);
    bus.read_only_from = CODE + 0x200 + 24;
    assert_eq!(one(&mut regs, &mut bus), Err(Stop::Bus(Outside(CODE + 0x218))));
    assert_eq!(regs.rip, CODE);
    assert_eq!((regs.gpr[1], regs.gpr[6], regs.gpr[7]), (7, CODE + 0x118, CODE + 0x218));
    bus.read_only_from = u64::MAX;
    assert_eq!(one(&mut regs, &mut bus), Ok(Event::Retired));
    assert_eq!((regs.rip, regs.gpr[1], regs.gpr[7]), (CODE + 3, 0, CODE + 0x250));
    // repe cmpsb that faults has the old flags.
    let (mut regs, mut bus) = program(&[0xf3, 0xa6]);
    (regs.gpr[1], regs.gpr[6], regs.gpr[7]) = (100, CODE + 0x100, CODE + 0xfff0);
    assert_eq!(one(&mut regs, &mut bus), Err(Stop::Bus(Outside(CODE + 0x10000))));
    assert_eq!((regs.gpr[1], regs.rflags), (84, 0x202));
}

#[test]
fn an_instruction_at_the_end_of_memory() {
    // Complete: executed without asking for more; incomplete: the fault is that of the next page.
    let mut bus = Flat::new(CODE, 2);
    bus.mem.copy_from_slice(&[0xff, 0xc0]);
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    assert_eq!(one(&mut regs, &mut bus), Ok(Event::Retired));
    bus.mem.copy_from_slice(&[0x48, 0xff]);
    regs.rip = CODE;
    assert_eq!(one(&mut regs, &mut bus), Err(Stop::Bus(Outside(CODE + 2))));
    assert_eq!(one(&mut regs, &mut bus), Err(Stop::Bus(Outside(CODE + 2))));
    regs.rip = CODE + 2;
    assert_eq!(one(&mut regs, &mut bus), Err(Stop::Bus(Outside(CODE + 2))));
}

/// A bus that may do everything, and notes it.
struct Kernel(Flat, Vec<String>);

impl Bus for Kernel {
    type Stop = Outside;
    fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, Outside> {
        self.0.fetch(gva, buf)
    }
    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Outside> {
        self.0.read(gva, buf)
    }
    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Outside> {
        self.0.write(gva, bytes)
    }
    fn cmpxchg(&mut self, g: u64, o: u128, n: u128, s: usize) -> Result<Result<(), u128>, Outside> {
        self.0.cmpxchg(g, o, n, s)
    }
    fn fs_base(&self) -> u64 {
        0x40
    }
    fn read_cr(&mut self, n: u8) -> Result<u64, Stop<Outside>> {
        Ok(0xc0 + u64::from(n))
    }
    fn write_cr(&mut self, n: u8, value: u64) -> Result<(), Stop<Outside>> {
        if value == 0xbad {
            return Err(Exception::gp(0).into());
        }
        self.1.push(format!("cr{n} {value:x}"));
        Ok(())
    }
    fn invlpg(&mut self, gva: u64) -> Result<(), Stop<Outside>> {
        self.1.push(format!("invlpg {gva:x}"));
        Ok(())
    }
    fn invpcid(&mut self, kind: u64, d: [u64; 2]) -> Result<(), Stop<Outside>> {
        self.1.push(format!("invpcid {kind} {:x} {:x}", d[0], d[1]));
        Ok(())
    }
    fn port_in(&mut self, port: u16, size: usize) -> Result<u32, Stop<Outside>> {
        self.1.push(format!("in {port:x} {size}"));
        Ok(0x8877_6655)
    }
    fn port_out(&mut self, port: u16, size: usize, value: u32) -> Result<(), Stop<Outside>> {
        self.1.push(format!("out {port:x} {size} {value:x}"));
        Ok(())
    }
    fn rdmsr(&mut self, index: u32) -> Result<u64, Stop<Outside>> {
        self.1.push(format!("rdmsr {index:x}"));
        Ok(0x1111_2222_3333_4444)
    }
    fn wrmsr(&mut self, index: u32, value: u64) -> Result<(), Stop<Outside>> {
        self.1.push(format!("wrmsr {index:x} {value:x}"));
        Ok(())
    }
}

#[test]
fn privileged_instructions_reach_the_bus() {
    let cases: [(&[u8], &str); 13] = [
        (&[0x0f, 0x22, 0xd8], "cr3 aaaa"),
        (&[0x0f, 0x22, 0xe3], "cr4 1100"),
        (&[0x44, 0x0f, 0x22, 0xc0], "cr8 aaaa"),
        (&[0x0f, 0x01, 0x3b], "invlpg 1100"),
        (&[0x64, 0x0f, 0x01, 0x3b], "invlpg 1140"),
        (&[0x66, 0x0f, 0x38, 0x82, 0x03], "invpcid 43690 7 8"),
        (&[0xec], "in d0d 1"),
        (&[0xe5, 0x80], "in 80 4"),
        (&[0xe6, 0x81], "out 81 1 aa"),
        (&[0x66, 0xef], "out d0d 2 aaaa"),
        (&[0x0f, 0x32], "rdmsr cccc"),
        (&[0x0f, 0x30], "wrmsr cccc d0d0000aaaa"),
        (&[0xf4], ""),
    ];
    for (code, note) in cases {
        let (mut regs, mut flat) = program(code);
        regs.gpr[..4].copy_from_slice(&[0xaaaa, 0xcccc, 0xd0d, CODE + 0x100]);
        regs.gpr[3] = 0x1100;
        flat.mem[0x100] = 7;
        flat.mem[0x108] = 8;
        let mut bus = Kernel(flat, Vec::new());
        let event = step(&mut regs, &mut bus, &mut DecodeCache::new()).unwrap();
        assert_eq!(event, if code == [0xf4] { Event::Halt } else { Event::Retired });
        assert_eq!(bus.1.join(""), note);
        assert_eq!(regs.rip, CODE + code.len() as u64);
        match code[0] {
            0xec => assert_eq!(regs.gpr[0], 0xaa55),
            0xe5 => assert_eq!(regs.gpr[0], 0x8877_6655),
            _ => {}
        }
        if note.starts_with("rdmsr") {
            assert_eq!((regs.gpr[0], regs.gpr[2]), (0x3333_4444, 0x1111_2222));
        }
    }
    // mov rbx, cr2
    let (mut regs, flat) = program(&[0x0f, 0x20, 0xd3]);
    let mut bus = Kernel(flat, Vec::new());
    step(&mut regs, &mut bus, &mut DecodeCache::new()).unwrap();
    assert_eq!(regs.gpr[3], 0xc2);
    // Refused: the exception says where and what.
    let (mut regs, flat) = program(&[0x0f, 0x22, 0xd8]);
    regs.gpr[0] = 0xbad;
    let mut bus = Kernel(flat, Vec::new());
    let Err(Stop::Exception(e)) = step(&mut regs, &mut bus, &mut DecodeCache::new()) else {
        panic!()
    };
    assert_eq!((e.vector, e.rip, e.bytes.as_slice()), (13, CODE, &[0x0f, 0x22, 0xd8][..]));
    assert_eq!(regs.rip, CODE);
}

#[test]
fn random_bytes_and_registers_never_panic() {
    let mut rng = Rng(0x1234_5678_9abc_def1);
    let mut cache = DecodeCache::with_entries(16);
    let (_, flat) = program(&[]);
    let mut bus = Kernel(flat, Vec::new());
    let (mut executed, mut unsupported) = (0, 0);
    for round in 0..200_000u32 {
        for at in 0..2 {
            bus.0.mem[at * 8..at * 8 + 8].copy_from_slice(&rng.next().to_le_bytes());
        }
        bus.0.log.clear();
        bus.1.clear();
        let mut regs = Regs { rip: CODE, rflags: rng.value(), ..Regs::default() };
        for r in &mut regs.gpr {
            *r = if round & 1 == 0 { rng.value() } else { CODE + rng.below(0x10010) };
        }
        match step(&mut regs, &mut bus, &mut cache) {
            Ok(_) => executed += 1,
            Err(Stop::Exception(e)) if e.class == Class::Unsupported => unsupported += 1,
            Err(_) => {}
        }
    }
    assert!(executed > 20_000 && unsupported > 1000, "{executed} {unsupported}");
}
