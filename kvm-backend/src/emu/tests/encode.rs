// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random instances of the supported instructions, for the comparison with the processor.

use super::Rng;

/// Operand width of an opcode: bytes, or 16, 32 and 64 bits by prefix, or fixed.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum W {
    Byte,
    Var,
    Fixed,
}

/// The rest of an instruction.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum F {
    /// ModRM with a register.
    R,
    /// ModRM with an opcode extension.
    X(u8),
    /// Register in the opcode.
    Plus,
    /// Nothing.
    None,
}

/// Immediate bytes.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum I {
    No,
    One,
    /// 2 bytes with prefix 66, else 4.
    Z,
    /// As the operand: 2, 4 or 8.
    V,
}

/// What may be put before or demanded of it.
const PLAIN: u8 = 0;
const LOCK: u8 = 1;
const MEM: u8 = 2;
const REP: u8 = 4;
const F3: u8 = 8;

pub(super) type Row = (&'static [u8], W, F, I, u8);

#[rustfmt::skip]
pub(super) fn table() -> Vec<Row> {
    let mut t: Vec<Row> = vec![
        (&[0x88], W::Byte, F::R, I::No, PLAIN), (&[0x89], W::Var, F::R, I::No, PLAIN),
        (&[0x8a], W::Byte, F::R, I::No, PLAIN), (&[0x8b], W::Var, F::R, I::No, PLAIN),
        (&[0xc6], W::Byte, F::X(0), I::One, PLAIN), (&[0xc7], W::Var, F::X(0), I::Z, PLAIN),
        (&[0xb0], W::Byte, F::Plus, I::One, PLAIN), (&[0xb8], W::Var, F::Plus, I::V, PLAIN),
        (&[0x0f, 0xb6], W::Var, F::R, I::No, PLAIN), (&[0x0f, 0xb7], W::Var, F::R, I::No, PLAIN),
        (&[0x0f, 0xbe], W::Var, F::R, I::No, PLAIN), (&[0x0f, 0xbf], W::Var, F::R, I::No, PLAIN),
        (&[0x63], W::Var, F::R, I::No, PLAIN), (&[0x8d], W::Var, F::R, I::No, MEM),
        (&[0x84], W::Byte, F::R, I::No, PLAIN), (&[0x85], W::Var, F::R, I::No, PLAIN),
        (&[0xa8], W::Byte, F::None, I::One, PLAIN), (&[0xa9], W::Var, F::None, I::Z, PLAIN),
        (&[0x86], W::Byte, F::R, I::No, LOCK), (&[0x87], W::Var, F::R, I::No, LOCK),
        (&[0x0f, 0xc0], W::Byte, F::R, I::No, LOCK), (&[0x0f, 0xc1], W::Var, F::R, I::No, LOCK),
        (&[0x0f, 0xb0], W::Byte, F::R, I::No, LOCK), (&[0x0f, 0xb1], W::Var, F::R, I::No, LOCK),
        (&[0x0f, 0xc7], W::Var, F::X(1), I::No, LOCK | MEM),
        (&[0x0f, 0xaf], W::Var, F::R, I::No, PLAIN),
        (&[0x69], W::Var, F::R, I::Z, PLAIN), (&[0x6b], W::Var, F::R, I::One, PLAIN),
        (&[0x0f, 0xa4], W::Var, F::R, I::One, PLAIN), (&[0x0f, 0xa5], W::Var, F::R, I::No, PLAIN),
        (&[0x0f, 0xac], W::Var, F::R, I::One, PLAIN), (&[0x0f, 0xad], W::Var, F::R, I::No, PLAIN),
        (&[0x0f, 0xa3], W::Var, F::R, I::No, PLAIN), (&[0x0f, 0xab], W::Var, F::R, I::No, LOCK),
        (&[0x0f, 0xb3], W::Var, F::R, I::No, LOCK), (&[0x0f, 0xbb], W::Var, F::R, I::No, LOCK),
        (&[0x0f, 0xba], W::Var, F::X(4), I::One, PLAIN),
        (&[0x0f, 0xba], W::Var, F::X(5), I::One, LOCK),
        (&[0x0f, 0xba], W::Var, F::X(6), I::One, LOCK),
        (&[0x0f, 0xba], W::Var, F::X(7), I::One, LOCK),
        (&[0x0f, 0xbc], W::Var, F::R, I::No, PLAIN), (&[0x0f, 0xbd], W::Var, F::R, I::No, PLAIN),
        (&[0x0f, 0xb8], W::Var, F::R, I::No, F3), (&[0x0f, 0xbc], W::Var, F::R, I::No, F3),
        (&[0x0f, 0xbd], W::Var, F::R, I::No, F3), (&[0x0f, 0xc8], W::Var, F::Plus, I::No, PLAIN),
        (&[0xff], W::Var, F::X(6), I::No, PLAIN), (&[0x8f], W::Var, F::X(0), I::No, PLAIN),
        (&[0x50], W::Var, F::Plus, I::No, PLAIN), (&[0x58], W::Var, F::Plus, I::No, PLAIN),
        (&[0x68], W::Var, F::None, I::Z, PLAIN), (&[0x6a], W::Var, F::None, I::One, PLAIN),
        (&[0xc9], W::Fixed, F::None, I::No, PLAIN),
        (&[0x98], W::Var, F::None, I::No, PLAIN), (&[0x99], W::Var, F::None, I::No, PLAIN),
        (&[0x90], W::Var, F::Plus, I::No, PLAIN), (&[0x0f, 0x1f], W::Var, F::X(0), I::No, PLAIN),
        (&[0x9e], W::Fixed, F::None, I::No, PLAIN), (&[0x9f], W::Fixed, F::None, I::No, PLAIN),
        (&[0xf5], W::Fixed, F::None, I::No, PLAIN), (&[0xf8], W::Fixed, F::None, I::No, PLAIN),
        (&[0xf9], W::Fixed, F::None, I::No, PLAIN), (&[0xfc], W::Fixed, F::None, I::No, PLAIN),
        (&[0xfd], W::Fixed, F::None, I::No, PLAIN),
        (&[0xd7], W::Fixed, F::None, I::No, PLAIN),
        (&[0x0f, 0xae, 0xf0], W::Fixed, F::None, I::No, PLAIN),
        (&[0x0f, 0xae], W::Fixed, F::X(7), I::No, MEM),
        (&[0x0f, 0x38, 0xf0], W::Var, F::R, I::No, MEM),
        (&[0x0f, 0x38, 0xf1], W::Var, F::R, I::No, MEM),
    ];
    for s in [0xa4u8, 0xaa, 0xac, 0xa6, 0xae] {
        let (b, w): (&'static [u8], &'static [u8]) = match s {
            0xa4 => (&[0xa4], &[0xa5]), 0xaa => (&[0xaa], &[0xab]), 0xac => (&[0xac], &[0xad]),
            0xa6 => (&[0xa6], &[0xa7]), _ => (&[0xae], &[0xaf]),
        };
        t.push((b, W::Byte, F::None, I::No, REP));
        t.push((w, W::Var, F::None, I::No, REP));
    }
    // add, or, adc, sbb, and, sub, xor, cmp in all their forms.
    static ALU: [[u8; 1]; 64] = {
        let mut a = [[0; 1]; 64];
        let mut i = 0;
        while i < 64 { a[i] = [i as u8]; i += 1; }
        a
    };
    for op in 0..8usize {
        let lock = if op == 7 { PLAIN } else { LOCK };
        t.push((&ALU[op * 8], W::Byte, F::R, I::No, lock));
        t.push((&ALU[op * 8 + 1], W::Var, F::R, I::No, lock));
        t.push((&ALU[op * 8 + 2], W::Byte, F::R, I::No, PLAIN));
        t.push((&ALU[op * 8 + 3], W::Var, F::R, I::No, PLAIN));
        t.push((&ALU[op * 8 + 4], W::Byte, F::None, I::One, PLAIN));
        t.push((&ALU[op * 8 + 5], W::Var, F::None, I::Z, PLAIN));
        t.push((&[0x80], W::Byte, F::X(op as u8), I::One, lock));
        t.push((&[0x81], W::Var, F::X(op as u8), I::Z, lock));
        t.push((&[0x83], W::Var, F::X(op as u8), I::One, lock));
    }
    // Shifts and rotates (extension 6 is an alias of shl).
    for x in 0..8 {
        t.push((&[0xc0], W::Byte, F::X(x), I::One, PLAIN));
        t.push((&[0xc1], W::Var, F::X(x), I::One, PLAIN));
        t.push((&[0xd0], W::Byte, F::X(x), I::No, PLAIN));
        t.push((&[0xd1], W::Var, F::X(x), I::No, PLAIN));
        t.push((&[0xd2], W::Byte, F::X(x), I::No, PLAIN));
        t.push((&[0xd3], W::Var, F::X(x), I::No, PLAIN));
    }
    // not, neg, mul, imul, div, idiv; inc, dec; test.
    for x in 2..8 {
        let lock = if x < 4 { LOCK } else { PLAIN };
        t.push((&[0xf6], W::Byte, F::X(x), I::No, lock));
        t.push((&[0xf7], W::Var, F::X(x), I::No, lock));
    }
    for x in 0..2 {
        t.push((&[0xfe], W::Byte, F::X(x), I::No, LOCK));
        t.push((&[0xff], W::Var, F::X(x), I::No, LOCK));
    }
    t.push((&[0xf6], W::Byte, F::X(0), I::One, PLAIN));
    t.push((&[0xf7], W::Var, F::X(0), I::Z, PLAIN));
    static CC: [[[u8; 2]; 16]; 2] = {
        let mut a = [[[0x0f, 0]; 16]; 2];
        let mut i = 0;
        while i < 16 { a[0][i][1] = 0x90 + i as u8; a[1][i][1] = 0x40 + i as u8; i += 1; }
        a
    };
    for (set, cmov) in CC[0].iter().zip(&CC[1]) {
        t.push((set, W::Byte, F::X(0), I::No, PLAIN));
        t.push((cmov, W::Var, F::R, I::No, PLAIN));
    }
    t
}

/// A random instance of `row`; absolute and rip-relative operands point into the scratch memory.
pub(super) fn encode(rng: &mut Rng, row: &Row, code: u64, target: u64) -> Vec<u8> {
    let &(opcode, width, form, imm, what) = row;
    let mut b = Vec::new();
    let memory = what & MEM != 0 || rng.below(2) == 0;
    let mut wide = 0u8;
    let mut short = false;
    if width == W::Var {
        match rng.below(3) {
            0 => short = true,
            1 => wide = 8,
            _ => {}
        }
    }
    if matches!(form, F::R | F::X(_)) && memory && rng.below(8) == 0 {
        b.push(0x67);
    }
    if short {
        b.push(0x66);
    }
    if what & F3 != 0 {
        b.push(0xf3);
    }
    if what & LOCK != 0 && memory && rng.below(2) == 0 {
        b.push(0xf0);
    }
    if what & REP != 0 {
        match rng.below(3) {
            0 => b.push(0xf3),
            1 => b.push(0xf2),
            _ => {}
        }
    }
    let rex = wide | rng.below(8) as u8;
    if rex != 0 || rng.below(4) == 0 {
        b.push(0x40 | rex);
    }
    b.extend_from_slice(opcode);
    let reg = rng.below(8) as u8;
    let mut rip_at = None;
    match form {
        F::Plus => *b.last_mut().unwrap() |= reg,
        F::None => {}
        F::R | F::X(_) => {
            let reg = if let F::X(x) = form { x } else { reg };
            let mode = if memory { rng.below(3) as u8 } else { 3 };
            let rm = rng.below(8) as u8;
            b.push(mode << 6 | reg << 3 | rm);
            if mode != 3 {
                let mut absolute = mode == 0 && rm == 5;
                if absolute {
                    rip_at = Some(b.len());
                }
                if rm == 4 {
                    let sib = rng.next() as u8;
                    b.push(sib);
                    absolute |= mode == 0 && sib & 7 == 5;
                }
                match mode {
                    1 => b.push(rng.next() as u8),
                    2 => b.extend_from_slice(&(rng.next() as u32).to_le_bytes()),
                    _ if absolute => b.extend_from_slice(&(target as u32).to_le_bytes()),
                    _ => {}
                }
            }
        }
    }
    match imm {
        I::No => {}
        I::One => b.push(rng.next() as u8),
        I::V if wide != 0 => b.extend_from_slice(&rng.value().to_le_bytes()),
        I::Z | I::V if short && wide == 0 => {
            b.extend_from_slice(&(rng.next() as u16).to_le_bytes())
        }
        I::Z | I::V => b.extend_from_slice(&(rng.value() as u32).to_le_bytes()),
    }
    if let Some(at) = rip_at {
        let disp = target.wrapping_sub(code + b.len() as u64) as u32;
        b[at..at + 4].copy_from_slice(&disp.to_le_bytes());
    }
    b
}
