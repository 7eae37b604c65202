// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest programs: position-independent x86-64 code for ring 3, with arguments in registers.
//!
//! Each program is in a file of its own, with its registers documented. None keeps state outside of
//! registers, its stack and the control page, so a VMM starts one again by setting the registers.

mod churn;
mod crash;
mod precopy;
mod remap;
mod switch;
mod touch;

use crate::regs::Regs;
use mmu_core::paging::Fault;

/// What a guest says with `hlt`, by the function number in rax.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// 0: a pass is done; rbx holds a result (`remap`: rounds; `precopy`: writes; `churn`: increments;
    /// `switch`: turns; `touch`: the seed).
    Done(u64),
    /// 1: a check failed.
    Failed {
        /// rbx: where.
        gva: u64,
        /// rcx: what should be there.
        expected: u64,
        /// rdx: what was.
        seen: u64,
    },
    /// Anything else: not from these programs.
    Unknown(u64),
}

impl Call {
    /// The call in the registers of a vCPU that has executed `hlt`.
    #[must_use]
    pub fn from_regs(regs: &Regs) -> Self {
        let [rax, rcx, rdx, rbx, ..] = regs.gpr;
        match rax {
            0 => Call::Done(rbx),
            1 => Call::Failed { gva: rbx, expected: rcx, seen: rdx },
            n => Call::Unknown(n),
        }
    }
}

/// Delivers a page fault to a program that expects one: if r12 is not zero the program goes on there, with
/// the error code in r13, the address in r14 and zero in r12. There is no other handler; whether the guest
/// expected the fault.
pub fn deliver(fault: &Fault, regs: &mut Regs) -> bool {
    let resume = std::mem::take(&mut regs.gpr[12]);
    if fault.vector != Fault::PF || resume == 0 {
        regs.gpr[12] = resume;
        return false;
    }
    regs.rip = resume;
    regs.gpr[13] = u64::from(fault.error_code);
    regs.gpr[14] = fault.gva.0;
    true
}

/// The programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Writes and re-reads memory: own share, then own lane of every page.
    Touch,
    /// Edits its own live page tables.
    Remap,
    /// Writes at random until told to stop.
    Precopy,
    /// Reads and writes memory that comes and goes, and counts in memory that stays.
    Churn,
    /// Switches between address spaces and edits their page tables.
    Switch,
    /// Reads the unmapped address in rdi.
    ReadUnmapped,
    /// Executes `ud2`.
    Ud2,
    /// Jumps to a non-canonical address.
    NonCanonical,
    /// Jumps to itself.
    Spin,
}

impl Program {
    /// All of them, in the order of the code pages.
    pub const ALL: [Program; 9] = [
        Program::Touch,
        Program::Remap,
        Program::Precopy,
        Program::Churn,
        Program::Switch,
        Program::ReadUnmapped,
        Program::Ud2,
        Program::NonCanonical,
        Program::Spin,
    ];

    /// The machine code; its first byte is the entry point.
    #[must_use]
    pub fn code(self) -> &'static [u8] {
        match self {
            Program::Touch => touch::code(),
            Program::Remap => remap::code(),
            Program::Precopy => precopy::code(),
            Program::Churn => churn::code(),
            Program::Switch => switch::code(),
            Program::ReadUnmapped => crash::read_unmapped(),
            Program::Ud2 => crash::ud2(),
            Program::NonCanonical => crash::non_canonical(),
            Program::Spin => crash::spin(),
        }
    }

    /// The offset of its entry point in the code pages.
    #[must_use]
    pub fn offset(self) -> u64 {
        let mut at = 0;
        for p in Self::ALL {
            if p == self {
                break;
            }
            at += (p.code().len() as u64).next_multiple_of(64);
        }
        at
    }
}

/// First factor of [`mix`].
const MIX1: u64 = 0xff51_afd7_ed55_8ccd;
/// Second factor of [`mix`].
const MIX2: u64 = 0xc4ce_b9fe_1a85_ec53;

/// The value that belongs at `address` under `seed`; the guest's code computes the same.
#[must_use]
pub fn mix(address: u64, seed: u64) -> u64 {
    let mut x = address.wrapping_add(seed);
    x ^= x >> 33;
    x = x.wrapping_mul(MIX1);
    x ^= x >> 29;
    x = x.wrapping_mul(MIX2);
    x ^ (x >> 32)
}

/// The seed of the magics in the first words of the window's frames.
pub const MAGIC_SEED: u64 = 0x6d61_6769_6331_3233;

/// One step of the generator of `precopy`, `churn` and `switch` (xorshift64).
#[must_use]
pub fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

/// The number of PDE switches (rounds with method 3 or 6) in rounds 1 to `rounds` of `remap`.
#[must_use]
pub fn remap_switches(rounds: u64) -> u64 {
    rounds / 7 * 2 + u64::from(rounds % 7 >= 3) + u64::from(rounds % 7 >= 6)
}

/// Lines of assembly: rax = scramble(rax), the second half of [`mix`] (the caller has added the seed).
/// Clobbers rdx.
macro_rules! scramble {
    () => {
        "
        mov rdx, rax
        shr rdx, 33
        xor rax, rdx
        movabs rdx, {MIX1}
        imul rax, rdx
        mov rdx, rax
        shr rdx, 29
        xor rax, rdx
        movabs rdx, {MIX2}
        imul rax, rdx
        mov rdx, rax
        shr rdx, 32
        xor rax, rdx
        "
    };
}

/// Assembles a program as read-only data between two symbols, and defines the function that returns it.
macro_rules! guest_code {
    ($(#[$doc:meta])* $name:ident, $start:literal, $end:literal, $body:expr $(, $op:ident = $value:expr)* $(,)?) => {
        core::arch::global_asm!(
            ".pushsection .rodata",
            concat!(".globl ", $start),
            concat!(".globl ", $end),
            concat!($start, ":"),
            $body,
            concat!($end, ":"),
            ".popsection",
            $($op = const $value,)*
        );

        $(#[$doc])*
        pub(super) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $start]
                static START: u8;
                #[link_name = $end]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both symbols are defined by the block above, in this order and in one section, so
            // that all bytes between them are initialised, immutable and live for ever.
            unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
        }
    };
}
use {guest_code, scramble};
