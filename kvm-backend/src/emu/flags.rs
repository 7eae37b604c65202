// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arithmetic with the flags it leaves behind, as pure functions.
//!
//! Operands come zero-extended to 64 bits with their size in bytes, results leave so. Flags that the
//! architecture leaves undefined are either kept or computed as processors usually do.

use super::insn::{Alu, Shift};

pub(super) const CF: u64 = 1;
pub(super) const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
pub(super) const SF: u64 = 1 << 7;
pub(super) const TF: u64 = 1 << 8;
pub(super) const DF: u64 = 1 << 10;
pub(super) const OF: u64 = 1 << 11;
/// The six arithmetic flags.
pub(super) const ARITH: u64 = CF | PF | AF | ZF | SF | OF;

/// The bits of an operand of `size` bytes.
#[inline(always)]
pub(super) fn mask(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * (u32::from(size) & 15)).min(63)
}

/// Sign-extends an operand.
#[inline(always)]
pub(super) fn sext(v: u64, size: u8) -> i64 {
    let unused = (64 - 8 * (u32::from(size) & 15)).min(63);
    ((v << unused) as i64) >> unused
}

/// Number of bits of an operand.
#[inline(always)]
pub(super) fn bits(size: u8) -> u32 {
    u32::from(size) * 8
}

#[inline(always)]
fn msb(v: u64, size: u8) -> bool {
    (v >> (bits(size) - 1)) & 1 != 0
}

#[inline(always)]
fn flag(on: bool, which: u64) -> u64 {
    if on { which } else { 0 }
}

/// ZF, SF and PF of a result.
#[inline(always)]
fn szp(r: u64, size: u8) -> u64 {
    flag(r == 0, ZF) | flag(msb(r, size), SF) | flag((r as u8).count_ones() & 1 == 0, PF)
}

#[inline(always)]
fn add(a: u64, b: u64, carry: u64, size: u8, fl: u64) -> (u64, u64) {
    let r = a.wrapping_add(b).wrapping_add(carry) & mask(size);
    let cf = msb((a & b) | ((a | b) & !r), size);
    let of = msb((a ^ r) & (b ^ r), size);
    (r, (fl & !ARITH) | szp(r, size) | ((a ^ b ^ r) & AF) | flag(cf, CF) | flag(of, OF))
}

#[inline(always)]
fn sub(a: u64, b: u64, borrow: u64, size: u8, fl: u64) -> (u64, u64) {
    let r = a.wrapping_sub(b).wrapping_sub(borrow) & mask(size);
    let cf = msb((!a & b) | (!(a ^ b) & r), size);
    let of = msb((a ^ b) & (a ^ r), size);
    (r, (fl & !ARITH) | szp(r, size) | ((a ^ b ^ r) & AF) | flag(cf, CF) | flag(of, OF))
}

#[inline(always)]
fn logic(r: u64, size: u8, fl: u64) -> (u64, u64) {
    (r, (fl & !ARITH) | szp(r, size))
}

/// add, or, adc, sbb, and, sub, xor, cmp, test: result and flags (cmp and test have a result, too).
#[inline(always)]
pub(super) fn alu(op: Alu, a: u64, b: u64, size: u8, fl: u64) -> (u64, u64) {
    match op {
        Alu::Add => add(a, b, 0, size, fl),
        Alu::Adc => add(a, b, fl & CF, size, fl),
        Alu::Sub | Alu::Cmp => sub(a, b, 0, size, fl),
        Alu::Sbb => sub(a, b, fl & CF, size, fl),
        Alu::And | Alu::Test => logic(a & b, size, fl),
        Alu::Or => logic(a | b, size, fl),
        Alu::Xor => logic(a ^ b, size, fl),
    }
}

/// inc: CF stays.
pub(super) fn inc(a: u64, size: u8, fl: u64) -> (u64, u64) {
    let (r, f) = add(a, 1, 0, size, fl);
    (r, (f & !CF) | (fl & CF))
}

/// dec: CF stays.
pub(super) fn dec(a: u64, size: u8, fl: u64) -> (u64, u64) {
    let (r, f) = sub(a, 1, 0, size, fl);
    (r, (f & !CF) | (fl & CF))
}

/// neg.
pub(super) fn neg(a: u64, size: u8, fl: u64) -> (u64, u64) {
    sub(0, a, 0, size, fl)
}

/// CF and OF of a multiplication; the others are undefined and kept.
pub(super) fn mul_flags(overflow: bool, fl: u64) -> u64 {
    (fl & !(CF | OF)) | flag(overflow, CF | OF)
}

/// Two-operand imul.
pub(super) fn imul(a: u64, b: u64, size: u8, fl: u64) -> (u64, u64) {
    let full = i128::from(sext(a, size)) * i128::from(sext(b, size));
    let r = full as u64 & mask(size);
    (r, mul_flags(i128::from(sext(r, size)) != full, fl))
}

/// The count of a shift as the processor masks it.
pub(super) fn shift_count(count: u64, size: u8) -> u32 {
    count as u32 & if size == 8 { 63 } else { 31 }
}

/// Shifts and rotates; `count` is unmasked.
pub(super) fn shift(op: Shift, a: u64, count: u64, size: u8, fl: u64) -> (u64, u64) {
    let c = shift_count(count, size);
    if c == 0 {
        return (a, fl);
    }
    let n = bits(size);
    let m = mask(size);
    // Bit `c - 1` of what is shifted out upwards, for sizes below and at 64 bits.
    match op {
        Shift::Shl => {
            let r = (a << c) & m;
            let cf = msb(a << (c - 1), size);
            let of = msb(r, size) != cf;
            (r, (fl & !ARITH) | szp(r, size) | flag(cf, CF) | flag(of, OF))
        }
        Shift::Shr => {
            let r = a >> c;
            let cf = (a >> (c - 1)) & 1 != 0;
            (r, (fl & !ARITH) | szp(r, size) | flag(cf, CF) | flag(msb(a, size), OF))
        }
        Shift::Sar => {
            let s = sext(a, size);
            let r = (s >> c) as u64 & m;
            let cf = (s >> (c - 1)) & 1 != 0;
            (r, (fl & !ARITH) | szp(r, size) | flag(cf, CF))
        }
        Shift::Rol => {
            let k = c % n;
            let r = if k == 0 { a } else { ((a << k) | (a >> (n - k))) & m };
            let cf = r & 1 != 0;
            (r, (fl & !(CF | OF)) | flag(cf, CF) | flag(msb(r, size) != cf, OF))
        }
        Shift::Ror => {
            let k = c % n;
            let r = if k == 0 { a } else { ((a >> k) | (a << (n - k))) & m };
            let cf = msb(r, size);
            let of = cf != msb(r << 1, size);
            (r, (fl & !(CF | OF)) | flag(cf, CF) | flag(of, OF))
        }
        Shift::Rcl | Shift::Rcr => rotate_carry(op, a, c % (n + 1), size, fl),
    }
}

fn rotate_carry(op: Shift, a: u64, count: u32, size: u8, fl: u64) -> (u64, u64) {
    if count == 0 {
        return (a, fl);
    }
    let top = bits(size) - 1;
    let (mut r, mut cf) = (a, fl & CF);
    for _ in 0..count {
        if op == Shift::Rcl {
            let out = (r >> top) & 1;
            r = ((r << 1) | cf) & mask(size);
            cf = out;
        } else {
            let out = r & 1;
            r = (r >> 1) | (cf << top);
            cf = out;
        }
    }
    let of = if op == Shift::Rcl {
        msb(r, size) != (cf != 0)
    } else {
        msb(r, size) != msb(r << 1, size)
    };
    (r, (fl & !(CF | OF)) | cf | flag(of, OF))
}

/// shld (`left`) and shrd; `count` is unmasked. Counts above the size of a 16-bit operand are undefined.
pub(super) fn shift_double(
    left: bool,
    a: u64,
    b: u64,
    count: u64,
    size: u8,
    fl: u64,
) -> (u64, u64) {
    let c = shift_count(count, size);
    let n = bits(size);
    if c == 0 || c > n {
        return (a, fl);
    }
    let (r, cf) = if left {
        let joined = (u128::from(a) << n) | u128::from(b);
        ((joined >> (n - c)) as u64 & mask(size), (a >> (n - c)) & 1)
    } else {
        let joined = (u128::from(b) << n) | u128::from(a);
        ((joined >> c) as u64 & mask(size), (a >> (c - 1)) & 1)
    };
    (r, (fl & !ARITH) | szp(r, size) | cf | flag(msb(r ^ a, size), OF))
}

/// bsf and bsr: `None` for a zero source, which leaves the destination alone.
pub(super) fn bit_scan(v: u64, reverse: bool, fl: u64) -> (Option<u64>, u64) {
    if v == 0 {
        (None, fl | ZF)
    } else {
        let at = if reverse { 63 - v.leading_zeros() } else { v.trailing_zeros() };
        (Some(u64::from(at)), fl & !ZF)
    }
}

/// popcnt.
pub(super) fn popcnt(v: u64, fl: u64) -> (u64, u64) {
    (u64::from(v.count_ones()), (fl & !ARITH) | flag(v == 0, ZF))
}

/// tzcnt and lzcnt.
pub(super) fn count_zeros(v: u64, leading: bool, size: u8, fl: u64) -> (u64, u64) {
    let n = bits(size);
    let r = if v == 0 {
        n
    } else if leading {
        v.leading_zeros() - (64 - n)
    } else {
        v.trailing_zeros()
    };
    (u64::from(r), (fl & !(CF | ZF)) | flag(v == 0, CF) | flag(r == 0, ZF))
}

/// Whether condition `cc` (the low four bits of the opcode) holds.
#[inline(always)]
pub(super) fn condition(cc: u8, fl: u64) -> bool {
    let less = (fl & SF != 0) != (fl & OF != 0);
    let holds = match (cc >> 1) & 7 {
        0 => fl & OF != 0,
        1 => fl & CF != 0,
        2 => fl & ZF != 0,
        3 => fl & (CF | ZF) != 0,
        4 => fl & SF != 0,
        5 => fl & PF != 0,
        6 => less,
        _ => less || fl & ZF != 0,
    };
    holds != (cc & 1 != 0)
}
