// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `precopy`: writes at random without pause, until told to stop.
//!
//! | register | argument |
//! | --- | --- |
//! | rdi, rsi | range shared by all vCPUs: address, pages (below 2^32) |
//! | rdx | this vCPU's number |
//! | r8 | state of the generator, not zero |
//! | r9 | control page |
//! | r10, r11 | private tail: address, pages (below 2^32) |
//! | rbx | writes so far (0) |
//!
//! Each write advances the generator ([`xorshift`](super::xorshift)) and stores its state x: in the lane
//! id × 8 of page (x mod 2^32) × pages / 2^32 of the shared range; each eighth write instead in word
//! (x >> 32) mod 512 of a page of the tail, chosen in the same way. When the control page's stop word is
//! set: call 0 with the number of writes in rbx. After it the program goes on.

use super::guest_code;
use crate::guest::layout::control;

guest_code!(
    /// The code.
    code,
    "smmu_guest_precopy",
    "smmu_guest_precopy_end",
    "
        lea r12, [rdi + rdx*8]  # own lane of page 0
    2:
        cmp qword ptr [r9 + {STOP}], 0
        jne 4f
        mov rax, r8
        shl rax, 13
        xor r8, rax
        mov rax, r8
        shr rax, 7
        xor r8, rax
        mov rax, r8
        shl rax, 17
        xor r8, rax
        inc rbx
        mov eax, r8d
        test bl, 7
        jz 3f
        imul rax, rsi
        shr rax, 32
        shl rax, 12
        mov [r12 + rax], r8
        jmp 2b
    3:                          # each eighth write
        imul rax, r11
        shr rax, 32
        shl rax, 12
        add rax, r10
        mov rcx, r8
        shr rcx, 32
        and ecx, 511
        mov [rax + rcx*8], r8
        jmp 2b
    4:
        xor eax, eax
        hlt
        jmp 2b
    ",
    STOP = control::STOP,
);
