// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `touch`: writes memory and re-reads it.
//!
//! | register | argument |
//! | --- | --- |
//! | rdi, rsi | first range: address, pages |
//! | rdx, rcx | this vCPU's number, number of vCPUs |
//! | r8 | seed |
//! | r9, r10 | second range: address, pages |
//!
//! Phase 1: in each page of its share (the id-th of vcpus parts) of the first range, eight words 0x208
//! bytes apart. Phase 2: in every page of the second range the word at id × 8; vCPUs start at different
//! pages, and those with odd numbers walk downwards. The word at an address holds
//! [`mix`](super::mix)(address, seed). A wrong word ends in call 1; a pass in call 0, after which the
//! program goes on with another pass and the next seed.

use super::{MIX1, MIX2, guest_code, scramble};

guest_code!(
    /// The code.
    code,
    "smmu_guest_touch",
    "smmu_guest_touch_end",
    concat!(
        "
        mov r15, rdx            # id
        mov r14, rcx            # vcpus
    2:                          # ---- a pass; phase 1
        mov rax, rsi
        mul r15
        div r14
        mov rbx, rax
        shl rbx, 12
        add rbx, rdi            # first address of the share
        lea rcx, [r15 + 1]
        mov rax, rsi
        mul rcx
        div r14
        mov rbp, rax
        shl rbp, 12
        add rbp, rdi            # end of the share
        xor r13d, r13d          # 0: write, 1: re-read
    3:
        mov r11, rbx
    4:
        cmp r11, rbp
        jae 7f
        mov ecx, 8
        mov r12, r11
    5:
        lea rax, [r12 + r8]
        ",
        scramble!(),
        "
        test r13d, r13d
        jnz 6f
        mov [r12], rax
    6:
        mov rdx, [r12]
        cmp rdx, rax
        jne 20f
        add r12, 0x208
        dec ecx
        jnz 5b
        add r11, 0x1000
        jmp 4b
    7:
        inc r13d
        cmp r13d, 2
        jb 3b

        xor r13d, r13d          # ---- phase 2
    8:
        mov rax, r10
        mul r15
        div r14
        mov rbx, rax            # first page
        mov rbp, r10            # pages left
    9:
        test rbp, rbp
        jz 14f
        mov r12, rbx
        shl r12, 12
        add r12, r9
        lea r12, [r12 + r15*8]
        lea rax, [r12 + r8]
        ",
        scramble!(),
        "
        test r13d, r13d
        jnz 12f
        mov [r12], rax
    12:
        mov rdx, [r12]
        cmp rdx, rax
        jne 20f
        dec rbp
        test r15b, 1
        jnz 13f
        inc rbx                 # even: upwards, from the last page to the first
        xor eax, eax
        cmp rbx, r10
        cmove rbx, rax
        jmp 9b
    13:
        lea rax, [r10 - 1]      # odd: downwards, from the first page to the last
        sub rbx, 1
        cmovc rbx, rax
        jmp 9b
    14:
        inc r13d
        cmp r13d, 2
        jb 8b

        mov rbx, r8             # ---- done with this seed
        xor eax, eax
        hlt
        inc r8
        jmp 2b

    20:                         # ---- [r12] is rdx and should be rax
        mov rbx, r12
        mov rcx, rax
    21:
        mov eax, 1
        hlt
        jmp 21b
        "
    ),
    MIX1 = MIX1,
    MIX2 = MIX2,
);
