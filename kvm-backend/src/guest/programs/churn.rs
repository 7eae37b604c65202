// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `churn`: reads and writes a window in which the host adds, removes, moves and aliases memory, and counts
//! in memory that stays, until told to stop.
//!
//! | register | argument |
//! | --- | --- |
//! | rdi | control page |
//! | rsi | this vCPU's number |
//! | rdx | states of the window's pages |
//! | rcx, rbx | window: address, distance of its second mapping |
//! | r8 | state of the generator, not zero |
//! | r9 | this vCPU's [ledger](crate::guest::churn::Ledger), zeros |
//! | r10, r11 | pages that stay: first of the dense ones, first of the sparse ones |
//!
//! A turn advances the generator ([`xorshift`](super::xorshift)), which chooses a page of the window and one
//! of its mappings.
//!
//! 1. Reads the page's identity between two reads of its state. If the host's version of the state is even
//!    and did not change, the identity must be one of the two that the state names; else, any well-formed one
//!    or the hole's.
//! 2. Reads its own lane of the page, writes its next [lane](crate::guest::churn::Lane), reads again. If the
//!    state still did not change and names one identity: in a hole both reads must be the hole's; in
//!    read-only memory they must agree; else the second read must be what was written, and the first not
//!    older than the ledger says of this identity; identity and number go into the ledger. In any case a
//!    lane must be this vCPU's and no newer than its last. (Three of four holes are passed by: an access there costs
//!    two exits.)
//! 3. Increments its own count in the next page that stays, and reads it again.
//! 4. If the host's record of a move says that one is under way: who does not see the page where it was any
//!    more must see it where it goes.
//!
//! A wrong word ends in call 1; the end, in call 0 with the number of increments in rbx.

use super::guest_code;
use crate::guest::churn::{
    CHECK, COUNT_TAG, COUNTS, LANES, NEXT, NUMBER_BITS, PLACE_BITS, READ_ONLY, STABLE_PAGES, STATE,
    WRITABLE,
};
use crate::guest::layout::{CHURN_PAGES, DENSE_PAGES, SPARSE_STRIDE, control};

guest_code!(
    /// The code.
    code,
    "smmu_guest_churn",
    "smmu_guest_churn_end",
    "
        sub rsp, 64
        mov [rsp], rdx          # states
        mov [rsp + 8], rcx      # window
        mov [rsp + 16], rbx     # to its second mapping
        mov [rsp + 24], r10     # dense pages
        mov [rsp + 32], r11     # sparse pages
        xor r13d, r13d          # next page that stays
        xor r14d, r14d          # passes over them
        xor r15d, r15d          # stores to the window
    2:                          # ---- a turn
        cmp qword ptr [rdi + {STOP}], 0
        jne 40f
        mov rax, r8
        shl rax, 13
        xor r8, rax
        mov rax, r8
        shr rax, 7
        xor r8, rax
        mov rax, r8
        shl rax, 17
        xor r8, rax
        mov rcx, r8
        shr rcx, 20
        and ecx, {CHURN_PAGES} - 1
        mov r12, rcx            # its state
        shl r12, {STATE_SHIFT}
        add r12, [rsp]
        mov rbp, rcx            # its address
        shl rbp, 12
        add rbp, [rsp + 8]
        bt r8, 40
        jnc 3f
        add rbp, [rsp + 16]

    3:                          # ---- 1: the identity
        mov rbx, [r12]          # version; made odd here if the state changes
        mov r10, [r12 + 8]      # one identity
        mov r11, [r12 + 16]     # the other
        mov rdx, [r12 + 24]
        mov [rsp + 40], rdx     # rights
        mov rax, [rbp]
        cmp [r12], rbx
        jne 4f
        test bl, 1
        jnz 4f
        cmp rax, r10
        je 5f
        cmp rax, r11
        je 5f
        jmp 42f
    4:
        or rbx, 1
        cmp rax, -1
        je 5f
        mov r10, rax
        shr r10, 16
        movabs rdx, {CHECK}
        imul r10, rdx
        not r10
        shr r10, 48
        cmp r10w, ax
        jne 42f
    5:
        cmp rax, -1
        jne 6f
        bt r8, 41
        jc 20f
        bt r8, 42
        jc 20f

    6:                          # ---- 2: the lane
        lea rbp, [rbp + rsi*8 + {LANES}]
        mov rax, [rbp]
        call 30f
        mov [rsp + 48], rax     # what was there
        inc r15
        mov [r9 + {NEXT}], r15
        mov rdx, rsi
        shl rdx, {PLACE_BITS}
        or rdx, rcx
        shl rdx, {NUMBER_BITS}
        or rdx, r15
        mov [rsp + 56], rdx     # what is written
        mov [rbp], rdx
        mov rax, [rbp]
        call 30f
        cmp [r12], rbx
        jne 20f
        test bl, 1
        jnz 20f
        cmp r10, r11
        jne 20f
        mov rdx, [rsp + 48]
        cmp r10, -1
        je 8f
        cmp rdx, -1
        je 43f
        test byte ptr [rsp + 40], {READ_ONLY}
        jnz 9f
        test byte ptr [rsp + 40], {WRITABLE}
        jz 20f
        mov r11, r10
        mov r10, [rsp + 56]
        cmp rax, r10
        jne 42f
        shl rcx, 4
        add rcx, r9
        cmp [rcx + 8], r11
        jne 7f
        mov rax, rdx
        shl rdx, 64 - {NUMBER_BITS}
        shr rdx, 64 - {NUMBER_BITS}
        mov r10, [rcx]
        cmp rdx, r10
        jb 42f
    7:
        mov qword ptr [rcx + 8], 0
        mov [rcx], r15
        mov [rcx + 8], r11
        jmp 20f
    8:                          # a hole
        cmp rax, -1
        jne 42f
        cmp rdx, -1
        jne 43f
        jmp 20f
    9:                          # read-only
        mov r10, rdx
        cmp rax, rdx
        jne 42f

    20:                         # ---- 3: memory that stays
        mov rbp, r13
        shl rbp, 12
        add rbp, [rsp + 24]
        cmp r13, {DENSE_PAGES}
        jb 21f
        lea rbp, [r13 - {DENSE_PAGES}]
        shl rbp, {SPARSE_SHIFT}
        add rbp, [rsp + 32]
    21:
        lea rbp, [rbp + rsi*8 + {COUNTS}]
        mov r10d, {COUNT_TAG}
        shl r10, 8
        or r10, r13
        shl r10, 8
        or r10, rsi
        shl r10, 40
        or r10, r14
        mov rax, [rbp]
        cmp rax, r10
        jne 42f
        test r13b, 1
        jnz 22f
        inc qword ptr [rbp]
        jmp 23f
    22:
        lock inc qword ptr [rbp]
    23:
        inc r10
        mov rax, [rbp]
        cmp rax, r10
        jne 42f
        inc r13
        cmp r13, {STABLE_PAGES}
        jb 24f
        xor r13d, r13d
        inc r14

    24:                         # ---- 4: moves
        lea rdx, [rdi + {MOVES}]
        bt r8, 43
        jnc 25f
        add rdx, {MOVE_STRIDE}
    25:
        mov rbx, [rdx]
        test bl, 1
        jnz 2b
        mov r10, [rdx + 24]     # identity; zero if nothing moves
        test r10, r10
        jz 2b
        mov rcx, [rdx + 8]
        mov rbp, [rdx + 16]
        shl rcx, 12
        shl rbp, 12
        add rcx, [rsp + 8]
        add rbp, [rsp + 8]
        mov rcx, [rcx]
        mov rax, [rbp]
        cmp [rdx], rbx
        jne 2b
        cmp rcx, r10
        je 2b
        cmp rax, r10
        je 2b
        jmp 42f

    30:                         # ---- rax must be a lane of this vCPU; clobbers rdx
        test rax, rax
        jz 31f
        cmp rax, -1
        je 31f
        mov rdx, rax
        shr rdx, {NUMBER_BITS} + {PLACE_BITS}
        cmp rdx, rsi
        jne 32f
        mov rdx, rax
        shl rdx, 64 - {NUMBER_BITS}
        shr rdx, 64 - {NUMBER_BITS}
        cmp rdx, r15
        ja 32f
    31:
        ret
    32:
        mov r10, r15
        jmp 42f

    40:                         # ---- the end
        imul rbx, r14, {STABLE_PAGES}
        add rbx, r13
    41:
        xor eax, eax
        hlt
        jmp 41b

    43:                         # ---- [rbp] was rdx
        mov rax, rdx
    42:                         # ---- [rbp] is rax and should be r10
        mov rbx, rbp
        mov rcx, r10
        mov rdx, rax
    44:
        mov eax, 1
        hlt
        jmp 44b
    ",
    STOP = control::STOP,
    MOVES = control::MOVES,
    MOVE_STRIDE = control::MOVE_STRIDE,
    CHURN_PAGES = CHURN_PAGES,
    DENSE_PAGES = DENSE_PAGES,
    STABLE_PAGES = STABLE_PAGES,
    SPARSE_SHIFT = SPARSE_STRIDE.ilog2(),
    STATE_SHIFT = STATE.ilog2(),
    CHECK = CHECK,
    COUNT_TAG = COUNT_TAG,
    COUNTS = COUNTS,
    LANES = LANES,
    NEXT = NEXT,
    NUMBER_BITS = NUMBER_BITS,
    PLACE_BITS = PLACE_BITS,
    READ_ONLY = READ_ONLY,
    WRITABLE = WRITABLE,
);
