// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The user-visible registers of a vCPU.

/// General registers, instruction pointer and flags of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 … r15: the order of the hardware's encoding
    /// (SDM vol. 2, table 3-1).
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}
