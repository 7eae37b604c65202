// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An interpreter for 64-bit x86 user code and for the privileged instructions of deprivileged guests.
//!
//! One emulator serves two callers. The *software vCPU* runs whole guests on it, where there is no
//! `/dev/kvm`. The *KVM backend* runs guests on the processor and asks it for single instructions:
//! privileged ones, which arrive as #GP, and writes to write-protected page tables, which arrive as #PF.
//!
//! Decoding is iced-x86's (the module `lower` turns its answer into a compact form, kept in a
//! [`DecodeCache`]);
//! the semantics are ours. Whatever the instruction touches outside of [`Regs`] goes through a [`Bus`].
//!
//! # Guarantees
//!
//! * **Restartable.** If an access returns an error, [`Regs`] is as it was before the instruction: all
//!   accesses of an instruction come before its first change of a register. String instructions with a
//!   rep prefix commit each finished iteration, as the architecture has it, and leave the instruction
//!   pointer at the instruction.
//! * **One access, one call.** An operand of 1, 2, 4 or 8 bytes reaches the bus as one call of that
//!   size, so the bus can make it atomic where it is aligned. Locked operations reach it as
//!   [`Bus::cmpxchg`].
//! * **Bounded.** One [`step`] does at most [`REP_BATCH`] iterations of a string instruction and
//!   [`LOCK_TRIES`] attempts of a locked operation, then returns [`Event::Again`].
//! * **No panic** whatever the guest's bytes and the bus's answers are.
//!
//! # Limits
//!
//! 64-bit mode only, segment bases zero but for FS and GS. No x87, SSE, AVX, BMI2; no far transfers,
//! `enter`, `ins`/`outs`, segment or debug registers. Those end in #UD with [`Class::Unsupported`] and
//! the bytes in question. `syscall` is #UD as with EFER.SCE = 0. CR0.AM and the resume flag are not looked at.

mod bus;
mod cache;
mod control;
mod exec;
mod flags;
mod insn;
mod lower;
mod memory;
mod string;
mod system;
#[cfg(test)]
mod tests;

pub use bus::{Bus, Class, Event, Exception, InsnBytes, MAX_INSN, Stop, default_cpuid};
pub use cache::DecodeCache;
pub use memory::LOCK_TRIES;
pub use string::REP_BATCH;

use crate::regs::Regs;
use memory::Cpu;

/// Executes one instruction at `regs.rip`.
///
/// On success `regs` describes the state after it (for [`Event::Again`], a state in which the same
/// instruction goes on). On [`Stop::Bus`] and on faults `regs` is unchanged, but for finished iterations
/// of a rep string instruction. A single-step trap (#DB, [`Class::Trap`]) is reported *after* the
/// instruction, with `regs` already advanced; the other traps leave `regs` alone and say in
/// [`Exception::rip`] where the guest would go on.
#[inline]
pub fn step<B: Bus>(
    regs: &mut Regs,
    bus: &mut B,
    cache: &mut DecodeCache,
) -> Result<Event, Stop<B::Stop>> {
    let rip = regs.rip;
    let single_step = regs.rflags & flags::TF != 0;
    let entry = cache.lookup(rip, bus)?;
    let next = rip.wrapping_add(u64::from(entry.insn.len));
    let result = Cpu { regs, bus, next }.exec(&entry.insn);
    match result {
        Ok(Event::Again) => Ok(Event::Again),
        Ok(event) if !single_step => Ok(event),
        Ok(_) => Err(Stop::Exception(Exception {
            class: Class::Trap,
            rip: regs.rip,
            bytes: entry.bytes(),
            ..Exception::fault(1, None)
        })),
        Err(Stop::Exception(e)) => Err(Stop::Exception(complete(e, rip, next, entry.bytes()))),
        Err(stop) => Err(stop),
    }
}

/// Executes instructions until `budget` is used up ([`Event::Retired`]), or one ends in anything else.
///
/// `budget` counts down by one for each finished instruction (and each batch of a long one), so the
/// caller can tell how many there were, also after an error.
pub fn run<B: Bus>(
    regs: &mut Regs,
    bus: &mut B,
    cache: &mut DecodeCache,
    budget: &mut u64,
) -> Result<Event, Stop<B::Stop>> {
    while *budget > 0 {
        let event = step(regs, bus, cache)?;
        *budget -= 1;
        if !matches!(event, Event::Retired | Event::Again) {
            return Ok(event);
        }
    }
    Ok(Event::Retired)
}

/// Adds to an exception what only [`step`] knows.
#[cold]
fn complete(mut e: Exception, rip: u64, next: u64, bytes: InsnBytes) -> Exception {
    e.rip = match e.class {
        Class::Trap | Class::Software => next,
        Class::Fault | Class::Unsupported => rip,
    };
    e.bytes = bytes;
    e
}
