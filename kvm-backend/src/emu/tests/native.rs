// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random instructions, executed by the processor and by the emulator, must leave the same registers,
//! defined flags and memory.

use super::encode::{encode, table};
use super::{Flat, Outside, Rng};
use crate::emu::{Bus, DecodeCache, Event, Stop, step};
use crate::regs::Regs;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register, RflagsBits};

// One instruction on the processor: `emu_native_run(state, code)` loads all registers from `state`
// (the layout of `Native`), jumps to `code`, and saves them when the code jumps to `emu_native_back`.
core::arch::global_asm!(
    ".pushsection .data",
    ".balign 8",
    "emu_native_host: .quad 0",
    "emu_native_state: .quad 0",
    "emu_native_code: .quad 0",
    "emu_native_rsp: .quad 0",
    ".popsection",
    ".pushsection .text",
    ".globl emu_native_run",
    "emu_native_run:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov qword ptr [rip + emu_native_host], rsp",
    "mov qword ptr [rip + emu_native_state], rdi",
    "mov qword ptr [rip + emu_native_code], rsi",
    "push qword ptr [rdi + 128]",
    "popfq",
    "mov rax, [rdi]; mov rcx, [rdi + 8]; mov rdx, [rdi + 16]; mov rbx, [rdi + 24]",
    "mov rsp, [rdi + 32]; mov rbp, [rdi + 40]; mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]; mov r9, [rdi + 72]; mov r10, [rdi + 80]; mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]; mov r13, [rdi + 104]; mov r14, [rdi + 112]; mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "jmp qword ptr [rip + emu_native_code]",
    ".globl emu_native_back",
    "emu_native_back:",
    "mov qword ptr [rip + emu_native_rsp], rsp",
    "mov rsp, qword ptr [rip + emu_native_host]",
    "push rdi",
    "pushfq",
    "mov rdi, qword ptr [rip + emu_native_state]",
    "mov [rdi], rax; mov [rdi + 8], rcx; mov [rdi + 16], rdx; mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp; mov [rdi + 48], rsi",
    "mov [rdi + 64], r8; mov [rdi + 72], r9; mov [rdi + 80], r10; mov [rdi + 88], r11",
    "mov [rdi + 96], r12; mov [rdi + 104], r13; mov [rdi + 112], r14; mov [rdi + 120], r15",
    "pop qword ptr [rdi + 128]",
    "pop qword ptr [rdi + 56]",
    "mov rax, qword ptr [rip + emu_native_rsp]",
    "mov [rdi + 32], rax",
    "cld",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    ".popsection",
);

/// All registers, as the trampoline knows them.
#[repr(C)]
struct Native {
    gpr: [u64; 16],
    rflags: u64,
}

unsafe extern "C" {
    fn emu_native_run(state: *mut Native, code: *const u8);
    fn emu_native_back();
}

const PAGE: usize = 4096;
/// Pages of scratch memory behind the code page.
const SCRATCH: usize = 4;

/// A code page and scratch memory below 2 GiB, so that absolute and 32-bit addresses reach it.
struct Arena(*mut u8);

impl Arena {
    fn new() -> Option<Self> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing else.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (1 + SCRATCH) * PAGE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        (p != libc::MAP_FAILED).then_some(Arena(p.cast()))
    }

    fn code(&mut self) -> &mut [u8] {
        // SAFETY: the first page of the mapping, which lives as long as `self`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0, PAGE) }
    }

    fn scratch(&mut self) -> &mut [u8] {
        // SAFETY: the other pages of the mapping, as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(PAGE), SCRATCH * PAGE) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.0.cast(), (1 + SCRATCH) * PAGE) };
    }
}

/// Gives the address registers values that make the operand's address `target`; false if impossible.
fn aim(rng: &mut Rng, i: &Instruction, gpr: &mut [u64; 16], target: u64) -> bool {
    if i.is_string_instruction() {
        gpr[6] = target;
        gpr[7] = target ^ 0x800;
        gpr[1] = rng.below(20);
        return true;
    }
    if i.mnemonic() == Mnemonic::Xlatb {
        gpr[3] = target;
        return true;
    }
    if !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        return true;
    }
    let number = |r: Register| r.full_register().number();
    let (base, index) = (i.memory_base(), i.memory_index());
    if matches!(base, Register::RIP | Register::EIP) {
        return true;
    }
    let mut rest = target.wrapping_sub(i.memory_displacement64());
    if index != Register::None {
        if base != Register::None && number(base) == number(index) {
            return false;
        }
        let scale = u64::from(i.memory_index_scale());
        if base == Register::None {
            gpr[number(index)] = rest / scale;
            return rest % scale == 0;
        }
        gpr[number(index)] = rng.value();
        rest = rest.wrapping_sub(gpr[number(index)].wrapping_mul(scale));
    }
    if base != Register::None {
        gpr[number(base)] = rest;
    }
    true
}

/// The flags that `i` leaves undefined; `None` if its result is, too.
fn undefined(i: &Instruction, before: &Regs) -> Option<u64> {
    let (cf, of, af) = (1u64, 1 << 11, 1 << 4);
    let size = match i.op_kind(0) {
        OpKind::Register => i.op0_register().size(),
        _ => i.memory_size().size(),
    } as u64;
    let count_at = if matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd) { 2 } else { 1 };
    let count = || {
        let raw = match i.op_kind(count_at) {
            OpKind::Register => before.gpr[1],
            _ => i.immediate(count_at),
        };
        raw & if size == 8 { 63 } else { 31 }
    };
    Some(match i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar => match count() {
            0 => 0,
            1 => af,
            n if n >= size * 8 => af | of | cf,
            _ => af | of,
        },
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr => {
            if count() <= 1 {
                0
            } else {
                of
            }
        }
        Mnemonic::Shld | Mnemonic::Shrd => match count() {
            0 => 0,
            1 => af,
            n if n > size * 8 => return None,
            _ => af | of,
        },
        Mnemonic::Bswap if size == 2 => return None,
        _ => {
            let u = i.rflags_undefined();
            [
                (RflagsBits::OF, of),
                (RflagsBits::SF, 1 << 7),
                (RflagsBits::ZF, 1 << 6),
                (RflagsBits::AF, af),
                (RflagsBits::CF, cf),
                (RflagsBits::PF, 1 << 2),
            ]
            .into_iter()
            .filter(|(theirs, _)| u & theirs != 0)
            .fold(0, |all, (_, ours)| all | ours)
        }
    })
}

/// Executes the prepared code on the processor.
fn run_native(arena: &mut Arena, regs: &Regs) -> Regs {
    let mut state = Native { gpr: regs.gpr, rflags: regs.rflags };
    // SAFETY: the code page holds one instruction and a jump to `emu_native_back`. The emulator has
    // executed the instruction before: it does not fault, transfers no control, and its accesses stay in
    // the scratch memory, where the stack pointer is only if it is the instruction's business. The
    // trampoline restores what the ABI preserves. Its statics are used by this one test only.
    unsafe { emu_native_run(&mut state, arena.0) };
    Regs { gpr: state.gpr, rflags: state.rflags, rip: regs.rip }
}

#[test]
fn random_instructions_do_what_the_processor_does() {
    let Some(mut arena) = Arena::new() else {
        eprintln!("skipped: no executable memory below 2 GiB");
        return;
    };
    let code = arena.0 as u64;
    let scratch = code + PAGE as u64;
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let table = table();
    let mut done = vec![0u32; table.len()];
    let mut cache = DecodeCache::new();
    let mut bus = Flat::new(scratch, SCRATCH * PAGE);
    // In debug builds the time goes into filling memory.
    let rounds = if cfg!(debug_assertions) { 300 } else { 1000 };
    for round in 0..rounds * table.len() {
        let n = round % table.len();
        let target = scratch + 0x1800 + rng.below(0x800);
        let bytes = encode(&mut rng, &table[n], code, target);
        let i = Decoder::with_ip(64, &bytes, code, DecoderOptions::NONE).decode();
        if i.is_invalid() || i.len() != bytes.len() {
            continue;
        }
        let mut regs = Regs { rip: code, rflags: 0x202, ..Regs::default() };
        regs.rflags |= rng.next() & 0x8d5;
        if rng.below(4) == 0 {
            regs.rflags |= 0x400;
        }
        for r in &mut regs.gpr {
            *r = rng.value();
        }
        regs.gpr[4] = scratch + 0x2000 + (rng.below(0x800) & !7);
        if i.mnemonic() == Mnemonic::Leave {
            regs.gpr[5] = target;
        }
        if !aim(&mut rng, &i, &mut regs.gpr, target) {
            continue;
        }
        for word in bus.mem.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next().to_le_bytes());
        }
        if rng.below(4) == 0 {
            // Divisions that fit, exchanges that succeed, scans of zero, matching strings.
            let (a, d) = (regs.gpr[0], regs.gpr[2]);
            bus.mem[0x1800..0x2800].fill(0);
            for at in (0..0x800).step_by(8) {
                bus.mem[0x1800 + at..][..8]
                    .copy_from_slice(&(if at & 8 == 0 { a } else { d }).to_le_bytes());
            }
        }
        if rng.below(4) == 0 {
            regs.gpr[2] = rng.below(4);
        }
        let Some(undefined) = undefined(&i, &regs) else { continue };
        arena.scratch().copy_from_slice(&bus.mem);
        bus.log.clear();
        let mut emulated = regs;
        let mut with_code = Split { code: &bytes, at: code, data: &mut bus };
        match step(&mut emulated, &mut with_code, &mut cache) {
            Ok(Event::Retired) => {}
            Ok(other) => panic!("{i:?}: {other:?}"),
            Err(Stop::Exception(e)) if matches!(e.vector, 0 | 12 | 13) => continue,
            Err(Stop::Bus(_)) => continue,
            Err(Stop::Exception(e)) => panic!("{i:?}: {e}"),
        }
        let page = arena.code();
        page[..bytes.len()].copy_from_slice(&bytes);
        // jmp [rip + 0]
        let tail = &mut page[bytes.len()..bytes.len() + 14];
        tail[..6].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
        tail[6..].copy_from_slice(&(emu_native_back as *const () as u64).to_le_bytes());
        let native = run_native(&mut arena, &regs);
        let context = format!("{} {i:?}\nbefore {regs:x?}", hex(&bytes));
        let zero_scan =
            matches!(i.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) && native.rflags & 0x40 != 0;
        // Processors differ in the upper half of a 32-bit register that cmpxchg did not exchange.
        let not_exchanged = i.mnemonic() == Mnemonic::Cmpxchg
            && i.op0_register().is_gpr32()
            && native.rflags & 0x40 == 0;
        if !zero_scan && !not_exchanged {
            assert_eq!(
                emulated.gpr, native.gpr,
                "{context}\n{:x?}\n{:x?}",
                emulated.gpr, native.gpr
            );
        }
        let flags = (0x8d5 | 0x400) & !undefined;
        assert_eq!(emulated.rflags & flags, native.rflags & flags, "{context}");
        assert_eq!(emulated.rip, code + bytes.len() as u64, "{context}");
        assert!(arena.scratch() == bus.mem.as_slice(), "memory: {context}");
        done[n] += 1;
    }
    let total: u32 = done.iter().sum();
    eprintln!("{total} instructions compared, {} opcodes", done.len());
    for (n, count) in done.iter().enumerate() {
        assert!(*count >= 50, "{} compared {count} times only", hex(table[n].0));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x} ")).collect()
}

/// Code from a slice, data from a [`Flat`].
struct Split<'a> {
    code: &'a [u8],
    at: u64,
    data: &'a mut Flat,
}

impl Bus for Split<'_> {
    type Stop = Outside;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, Outside> {
        assert_eq!(gva, self.at);
        buf[..self.code.len()].copy_from_slice(self.code);
        Ok(self.code.len())
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Outside> {
        self.data.read(gva, buf)
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Outside> {
        self.data.write(gva, bytes)
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Outside> {
        self.data.cmpxchg(gva, old, new, size)
    }
}
