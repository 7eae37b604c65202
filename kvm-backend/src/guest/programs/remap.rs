// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `remap`: vCPUs take turns at editing the page tables they are running on.
//!
//! | register | argument |
//! | --- | --- |
//! | rdi | control page |
//! | rsi, rdx | this vCPU's number, number of vCPUs |
//! | rcx, rbx | window: address, pages |
//! | r8, r9 | where the guest sees the window's first entry in page table A, and in B |
//! | r10 | where it sees the page-directory entry above them |
//! | r11, r12 | entry of the window's first page for the frames of set A, and of B |
//! | r13, r14 | page-directory entry for page table A, and for B |
//! | r15 | rounds |
//!
//! In round r = 1, 2, … vCPU r mod vcpus is the editor: it maps the window to the frames of set r & 1. By
//! r mod 7 it does so in the page table in use, by plain stores (0, 1), by `xchg` (2), by
//! `lock cmpxchg` (4), by two halves with the entry not present in between (5); or it fills the page table
//! *not* in use and switches the page-directory entry (3, 6). It invalidates the window, checks it, and
//! publishes the round; the others, waiting for that, invalidate, check, and acknowledge. To check is to
//! find in each page's first word the magic of its frame, and to store r in the word at 8 + id × 8. The
//! next editor begins when all have acknowledged.
//!
//! The end is call 0 with the number of finished rounds in rbx: after the last round, or as soon as an
//! editor finds the stop word set.

use super::{MAGIC_SEED, MIX1, MIX2, guest_code, scramble};
use crate::guest::layout::control;
use crate::guest::paging::ADDR;

guest_code!(
    /// The code.
    code,
    "smmu_guest_remap",
    "smmu_guest_remap_end",
    concat!(
        "
        sub rsp, 64
        mov [rsp], rdx          # vcpus
        mov [rsp + 8], r15      # last round
        mov [rsp + 16], rcx     # window
        mov ebp, 1              # round
    2:                          # ---- a round
        cmp rbp, [rsp + 8]
        ja 19f
        mov rax, rbp
        xor edx, edx
        div qword ptr [rsp]
        cmp rdx, rsi
        jne 15f

    3:                          # ---- editor: wait for the end of the last round
        lea rax, [rbp - 1]
        cmp qword ptr [rdi + {DONE}], rax
        je 4f
        pause
        jmp 3b
    4:
        cmp qword ptr [rdi + {STOP}], 0
        jne 18f
        mov qword ptr [rdi + {ACKS}], 0
        mov r15, r11            # the new entries: set r & 1
        test bpl, 1
        cmovnz r15, r12
        mov rax, rbp
        xor edx, edx
        mov ecx, 7
        div rcx                 # rdx: how
        mov rcx, rbx            # pages to go
        cmp edx, 3
        je 10f
        cmp edx, 6
        je 10f
        mov rax, r8             # the page table in use
        cmp qword ptr [rdi + {LIVE}], 0
        cmovne rax, r9
        cmp edx, 2
        je 6f
        cmp edx, 4
        je 7f
        cmp edx, 5
        je 9f
    5:                          # plain stores
        mov [rax], r15
        add rax, 8
        add r15, 0x1000
        dec rcx
        jnz 5b
        jmp 13f
    6:                          # xchg
        mov rdx, r15
        xchg [rax], rdx
        add rax, 8
        add r15, 0x1000
        dec rcx
        jnz 6b
        jmp 13f
    7:                          # lock cmpxchg
        mov rdx, rax
    8:
        mov rax, [rdx]
    22:
        lock cmpxchg [rdx], r15
        jne 22b
        add rdx, 8
        add r15, 0x1000
        dec rcx
        jnz 8b
        jmp 13f
    9:                          # two halves
        mov dword ptr [rax], 0
        mov rdx, r15
        shr rdx, 32
        mov [rax + 4], edx
        mov [rax], r15d
        add rax, 8
        add r15, 0x1000
        dec rcx
        jnz 9b
        jmp 13f
    10:                         # fill the page table not in use, then switch
        mov rax, r9
        cmp qword ptr [rdi + {LIVE}], 0
        cmovne rax, r8
    12:
        mov [rax], r15
        add rax, 8
        add r15, 0x1000
        dec rcx
        jnz 12b
        xor qword ptr [rdi + {LIVE}], 1
        mov rax, r13
        cmovnz rax, r14
        mov [r10], rax
    13:                         # ---- look at it, publish it, wait for the others
        call 24f
        mov [rdi + {ROUND}], rbp
        mov rax, [rsp]
        dec rax
    14:
        cmp qword ptr [rdi + {ACKS}], rax
        je 23f
        pause
        jmp 14b
    23:
        mov [rdi + {DONE}], rbp
        inc rbp
        jmp 2b

    15:                         # ---- reader: wait for the round
        mov rax, [rdi + {ROUND}]
        cmp rax, rbp
        je 16f
        cmp rax, -1
        je 19f
        pause
        jmp 15b
    16:
        call 24f
        lock inc qword ptr [rdi + {ACKS}]
        inc rbp
        jmp 2b

    18:                         # ---- stop: tell the others
        mov qword ptr [rdi + {ROUND}], -1
    19:
        lea rbx, [rbp - 1]
        xor eax, eax
        hlt
        jmp 19b

    24:                         # ---- invalidate and check the window (one return address on the stack)
        mov r15, r11
        test bpl, 1
        cmovnz r15, r12
        mov rcx, [rsp + 24]
        mov rdx, rbx
    25:
        invlpg [rcx]
        add rcx, 0x1000
        dec rdx
        jnz 25b
        mov rcx, [rsp + 24]
        mov [rsp + 40], rbx     # pages to go
    26:
        movabs rax, {ADDR}
        and rax, r15            # the frame
        movabs rdx, {MAGIC}
        add rax, rdx
        ",
        scramble!(),
        "
        mov rdx, [rcx]
        cmp rdx, rax
        jne 28f
        mov [rcx + rsi*8 + 8], rbp
        add rcx, 0x1000
        add r15, 0x1000
        dec qword ptr [rsp + 40]
        jnz 26b
        ret

    28:                         # ---- [rcx] is rdx and should be rax
        mov rbx, rcx
        mov rcx, rax
    29:
        mov eax, 1
        hlt
        jmp 29b
        "
    ),
    ROUND = control::ROUND,
    ACKS = control::ACKS,
    STOP = control::STOP,
    LIVE = control::LIVE,
    DONE = control::DONE,
    ADDR = ADDR,
    MAGIC = MAGIC_SEED,
    MIX1 = MIX1,
    MIX2 = MIX2,
);
