// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `switch`: runs in several address spaces in turn and edits their page tables, whether they are loaded
//! nowhere, here, or on another vCPU, until told to stop. [`crate::guest::switch`] says what the spaces,
//! their slots and records are, and what may be seen when.
//!
//! | register | argument |
//! | --- | --- |
//! | rdi | this vCPU's [`desk`]; it is mapped in the spaces only |
//! | rsi | control page |
//! | rdx | this vCPU's number |
//! | rcx, rbx | CR3 of its first space, CR3 to end with |
//! | r8 | state of the generator, not zero |
//! | r9 | address of the mirror by 4K pages; that by 2M pages is [`MIRROR_LARGE_GVA`] − [`MIRROR_GVA`] further on |
//! | r10 | address of what differs between the spaces |
//!
//! A draw advances the generator ([`xorshift`](super::xorshift)). Bits of a draw d, n bits from bit b on
//! as d\[b, n\]; the number of a space, `space(b)`, is d\[b, 3\], less 6 from 6 on. A turn has three
//! parts, each of which begins with a draw.
//!
//! 1. If d\[8, 1\] is 1, d\[16, 4\] + 1 edits in space `space(12)`, each with a draw. In a space of its own
//!    the slot is 8 if d\[30, 2\] is 0, else 30 if d\[34, 2\] is 0, else d\[8, 4\]; in another 16, else 31, else
//!    16 + d\[8, 4\], or 31 if that is 30 or more. d\[16, 3\] says what; for slots of 4K: 0 to 2 *remap*, 3 to
//!    5 change P, W, U, 6 and 7 *swap* with the slot whose number differs in the lowest bit; of 2M: 4 to 6
//!    change P, W, U, the rest remap.
//!    * The entry is edited in the mirror by 2M pages if d\[20, 1\] is 1; entries that are replaced, by
//!      `mov`, or `xchg` if d\[21, 2\] is 2, or `lock cmpxchg` if it is 3; bits that are changed, by
//!      `lock xor` of the whole entry if d\[21, 1\] is 1, else by `xor` of its first byte.
//!    * A slot of 4K is remapped to private page d\[24, 2\] or shared page d\[24, 4\]. A slot of 2M to the
//!      2M with the number d\[24, 2\], of as many as there are: as a page if it was split, or if d\[27, 1\]
//!      is 0; else split, by a page table that is written first and shows the pages rotated by
//!      d\[28, 2\]. The new entry has P, W, U and NX, A if d\[32, 1\] is 1, D if d\[33, 1\] is 1.
//! 2. By d\[8, 3\]: 0 and 1 nothing; 2 and 3 flushes slot d\[16, 5\] by INVLPG; 4 flushes the slots
//!    d\[16, 5\], d\[21, 5\], d\[26, 5\], d\[31, 5\]; 5 loads CR3 again; 6 and 7 load that of `space(16)`.
//! 3. d\[8, 2\] + 4 accesses, each with a draw, to slot 16 if d\[30, 2\] is 0, else 30 + d\[8, 1\] if d\[34, 2\]
//!    is 0, else d\[8, 5\]; of 2M in page d\[16, 2\] of those to be looked at; after a flush of the slot if
//!    d\[26, 2\] is 0. If d\[24, 1\] is 0 a read of the first word; else a store, by `xchg` if d\[28, 1\] is 1,
//!    of the number of the store, to the vCPU's word at [`KEPT`] if the vCPU edits the slot and has not
//!    since the last flush, else to that at [`RACING`], which it clears again where it finds it.
//!
//! What is met must be what a version of the entry leads to: some page, or a page fault. If so many
//! versions were stored meanwhile that the record has not all of them, any page that the slot can show
//! will do, and any missing right.
//!
//! The end is call 0 with the number of turns in rbx, the rest in the desk; something wrong, call 1,
//! with pages as their first words and faults as error codes.

use super::guest_code;
use crate::guest::layout::{MIRROR_GVA, MIRROR_LARGE_GVA, control};
use crate::guest::paging::{A, ADDR, D, NX, P, PAGE, PS, U, W};
use crate::guest::switch::{
    BEGUN, CODE_SHIFT, DONE, FOREIGN_SLOT, HISTORY, KEPT, KNOWN, LARGE_INDEX, LARGE_SLOT, OWN,
    PRIVATE_PAGES, PROBE, PROBES, RACING, REACH, RECORD, SHARED_PAGES, SHARED_SLOT, SLOTS, TAG,
    VIEW_BITS, block, desk,
};

// Where the code has numbers of its own.
const _: () =
    assert!(KNOWN == 8 && PROBES.is_power_of_two() && REACH == 6 && BEGUN == 0 && RECORD == 128);
const _: () = assert!(SLOTS == 32 && PRIVATE_PAGES == 4 && SHARED_PAGES == 16 && VIEW_BITS == 2);
const _: () = assert!(P == 1 && W == 2 && U == 4 && A == 0x20 && D == 0x40 && block::ROOT == 0);

guest_code!(
    /// The code.
    code,
    "smmu_guest_switch",
    "smmu_guest_switch_end",
    "
        sub rsp, 64
        mov [rsp], rsi          # control page
        mov [rsp + 8], rbx      # CR3 to end with
        mov [rsp + 16], r10     # what differs
        mov qword ptr [rsp + 24], 0 # turns
        lea rsi, [rdx*8]        # this vCPU's words in a page
        xor r15d, r15d          # stores
        xor r12d, r12d          # no fault is expected
        mov cr3, rcx            # the desk is mapped from here on
        xor eax, eax
        call 70f
    2:                          # ---- a turn
        mov rax, [rsp]
        cmp qword ptr [rax + {STOP}], 0
        jne 85f
        inc qword ptr [rsp + 24]
        call 60f
        bt r8, 8
        jnc 30f
        mov rax, r8
        shr rax, 12
        call 62f
        mov [rsp + 32], rax     # the space
        mov rbx, [rdi + rax*8 + {BLOCKS}]
        add rbx, r9             # its memory, from here to the end of the edits
        mov eax, r8d
        shr eax, 16
        and eax, 15
        inc eax
        mov [rsp + 40], rax     # edits to go

    3:                          # ---- an edit: ecx: slot
        call 60f
        mov ecx, r8d
        shr ecx, 8
        and ecx, 15
        cmp qword ptr [rsp + 32], {OWN}
        jae 4f
        mov edx, {SHARED_SLOT}
        mov r13d, {LARGE_SLOT}
        jmp 5f
    4:
        mov edx, {FOREIGN_SLOT}
        mov r13d, {LARGE_SLOT} + 1
        add ecx, edx
        cmp ecx, {LARGE_SLOT}
        cmovae ecx, r13d
    5:
        call 94f
        mov ebp, ecx
        shl ebp, 7
        lea rbp, [rbx + rbp + {RECORDS}] # its record
        mov eax, [rbp + {DONE}]
        and eax, 7
        mov r10, [rbp + rax*8 + {HISTORY}] # its entry
        lea r13, [rbx + rcx*8 + {TABLE}] # where that is
        cmp ecx, {LARGE_SLOT}
        jb 6f
        lea r13, [rbx + rcx*8 + {DIRECTORY} + 8*({LARGE_INDEX} - {LARGE_SLOT})]
    6:
        bt r8, 20
        jnc 7f
        add r13, {TO_LARGE}
    7:
        mov edx, r8d
        shr edx, 16
        and edx, 7              # what
        cmp ecx, {LARGE_SLOT}
        jae 20f
        cmp edx, 6
        jae 16f
        sub edx, 3
        jae 14f
        mov rax, r8             # ---- remap 4K
        shr rax, 12
        cmp ecx, {SHARED_SLOT}
        jae 8f
        and eax, 0x3000
        lea rax, [rax + rbx + {PRIVATE}]
        sub rax, r9
        jmp 9f
    8:
        and eax, 0xf000
        add rax, [rdi + {SHARED}]
    9:
        add rax, [rdi + {BASE}]
        movabs rdx, {LEAF}
    12:
        or rax, rdx
        mov rdx, r8
        shr rdx, 32 - 5
        and edx, {AD}
        or rax, rdx
        call 64f
        call 65f
        mov [rbp + {DONE}], rdx
        jmp 29f

    14:                         # ---- change P, W or U: edx: which
        mov ecx, edx
        mov r14d, 1
        shl r14d, cl
        mov rax, r10
        xor rax, r14
        call 64f
        bt r8, 21
        jc 15f
        xor byte ptr [r13], r14b
        mov [rbp + {DONE}], rdx
        jmp 29f
    15:
        lock xor qword ptr [r13], r14
        mov [rbp + {DONE}], rdx
        jmp 29f

    16:                         # ---- swap
        mov r14, rbp
        xor r14, {RECORD}       # the other's record
        mov eax, [r14 + {DONE}]
        and eax, 7
        mov rax, [r14 + rax*8 + {HISTORY}]
        call 64f
        mov [rsp + 48], rdx
        xchg rbp, r14
        xchg rax, r10
        call 64f
        xor r13, 8
        call 65f
        xor r13, 8
        mov rax, r10
        call 65f
        mov [rbp + {DONE}], rdx
        mov rdx, [rsp + 48]
        mov [r14 + {DONE}], rdx
        jmp 29f

    20:                         # ---- an edit of 2M
        sub edx, 4
        jb 22f
        cmp edx, 3
        jb 14b
    22:                         # ---- remap 2M
        mov rax, r8
        shr rax, 24
        and rax, [rdi + {LAST_VIEW}]
        test r10b, {PS}
        jz 23f
        bt r8, 27
        jc 24f
    23:
        shl rax, 21
        add rax, [rdi + {BASE}]
        movabs rdx, {LARGE_LEAF}
        jmp 12b
    24:                         # ---- split
        mov rdx, r8
        shr rdx, 28
        and edx, {PROBES} - 1
        mov [rsp + 48], rdx     # rotation
        lea r10, [rax + rdx*4]
        shl r10, {CODE_SHIFT}
        movabs rdx, {LEAF}
        or r10, rdx
        mov r14, rax            # entry of the first page to be looked at
        shl r14, 21
        add r14, [rdi + {BASE}]
        lea r14, [r14 + rdx + {PROBE}*{PAGE}]
        mov edx, ecx
        shl edx, 12
        lea rdx, [rbx + rdx + {SPLIT} - {LARGE_SLOT}*{PAGE}] # the page table
        mov rax, rdx
        sub rax, r9
        add rax, [rdi + {BASE}]
        or rax, r10
        mov r10, r8
        shr r10, 32 - 5
        and r10d, {AD}
        or rax, r10
        mov r10, rdx
        call 64f
        bt r8, 20
        jnc 25f
        add r10, {TO_LARGE}
    25:
        mov [rsp + 56], rax
        xor ecx, ecx
    26:
        mov eax, ecx
        add eax, [rsp + 48]
        and eax, {PROBES} - 1
        shl eax, 12
        add rax, r14
        mov [r10 + rcx*8 + {PROBE}*8], rax
        inc ecx
        cmp ecx, {PROBES}
        jb 26b
        mov rax, [rsp + 56]
        call 65f
        mov [rbp + {DONE}], rdx
    29:
        dec qword ptr [rsp + 40]
        jnz 3b

    30:                         # ---- flushes
        call 60f
        mov eax, r8d
        shr eax, 8
        and eax, 7
        cmp eax, 2
        jb 40f
        mov r14, r8
        shr r14, 16
        mov qword ptr [rsp + 40], 1
        cmp eax, 4
        jb 33f
        ja 34f
        mov qword ptr [rsp + 40], 4
    33:
        mov ecx, r14d
        and ecx, 31
        call 66f
        shr r14, 5
        dec qword ptr [rsp + 40]
        jnz 33b
        jmp 40f
    34:
        cmp eax, 5
        mov rax, [rdi + {CURRENT}]
        je 35f
        mov rax, r14
        call 62f
    35:
        call 70f

    40:                         # ---- accesses
        call 60f
        mov eax, r8d
        shr eax, 8
        and eax, 3
        add eax, 4
        mov [rsp + 40], rax
    41:                         # ---- an access: ecx: slot, rbp: record, rbx: address, r10: version, edx: 2 for a store
        call 60f
        mov ecx, r8d
        shr ecx, 8
        and ecx, 31
        mov edx, {FOREIGN_SLOT}
        mov r13d, r8d
        shr r13d, 8
        and r13d, 1
        add r13d, {LARGE_SLOT}
        call 94f
        test r8d, 3 << 26
        jnz 42f
        call 66f
    42:
        mov ebp, ecx
        shl ebp, 7
        lea rbp, [r11 + rbp + {RECORDS}]
        mov eax, ecx
        shl rax, 12
        cmp ecx, {LARGE_SLOT}
        jb 43f
        lea eax, [rcx + {LARGE_INDEX} - {LARGE_SLOT}]
        shl rax, 21
        mov edx, r8d
        shr edx, 16 - 12
        and edx, ({PROBES} - 1)*{PAGE}
        lea rax, [rax + rdx + {PROBE}*{PAGE}]
    43:
        mov rbx, [rsp + 16]
        add rbx, rax
        mov r10, [rdi + rcx*8 + {SEEN}]
        bt r8, 24
        jc 48f
        xor edx, edx            # ---- a read
        lea r12, [rip + 46f]
        mov rax, [rbx]
        xor r12d, r12d
    44:
        call 72f
    45:
        dec qword ptr [rsp + 40]
        jnz 41b
        jmp 2b
    46:                         # ---- a page fault at r14 with code r13
        mov rax, r13
        cmp r14, rbx
        je 44b
        mov rcx, rbx
        mov rdx, r14
        jmp 88f

    48:                         # ---- a store
        mov edx, 2
        inc r15
        mov rax, [rdi + {CURRENT}]
        mov rax, [rdi + rax*8 + {MINE}]
        bt rax, rcx
        jnc 51f
        cmp r10, [rbp + {DONE}]
        jne 51f
        lea rbx, [rbx + rsi + {KEPT}]
        call 58f
        mov eax, r10d           # it went where the entry says
        and eax, 7
        mov rax, [rbp + rax*8 + {HISTORY}]
        call 76f
        cmp rax, 16
        jb 86f
        shl rax, 16
        shr rax, 16
        sub rax, [rdi + {BASE}]
        add rax, r9
        bt r8, 29
        jnc 50f
        add rax, {TO_LARGE}
    50:
        mov rax, [rax + rsi + {KEPT}]
        cmp rax, r15
        je 45b
        jmp 87f

    51:                         # ---- a store to a page that is looked for
        lea rbx, [rbx + rsi + {RACING}]
        call 58f
        mov r13d, {PRIVATE_PAGES}
        lea rax, [r11 + {PRIVATE}]
        cmp ecx, {SHARED_SLOT}
        jb 52f
        mov r13d, {SHARED_PAGES}
        mov rax, [rdi + {SHARED}]
        add rax, r9
        cmp ecx, {LARGE_SLOT}
        jae 53f
    52:
        cmp [rax + rsi + {RACING}], r15
        je 56f
        add rax, {PAGE}
        dec r13d
        jnz 52b
        jmp 55f
    53:
        mov r14, [rdi + {LAST_VIEW}]
        lea rax, [r9 + {PROBE}*{PAGE}]
        mov r13d, {PROBES}
    54:
        cmp [rax + rsi + {RACING}], r15
        je 56f
        add rax, {PAGE}
        dec r13d
        jnz 54b
        mov r13d, {PROBES}
        add rax, {PROBE}*{PAGE}
        dec r14
        jns 54b
    55:                         # it is nowhere
        xor eax, eax
        jmp 87f
    56:
        mov qword ptr [rax + rsi + {RACING}], 0
        sub rax, r9
        add rax, [rdi + {BASE}]
        movabs r13, {TAG}
        or rax, r13
        jmp 44b

    58:                         # ---- stores r15 at rbx; to the fault's place if there is one
        lea r12, [rip + 59f]
        mov rax, r15
        bt r8, 28
        jc 57f
        mov [rbx], rax
        xor r12d, r12d
        ret
    57:
        xchg [rbx], rax
        xor r12d, r12d
        ret
    59:
        add rsp, 8
        jmp 46b

    60:                         # ---- draws; clobbers rax
        mov rax, r8
        shl rax, 13
        xor r8, rax
        mov rax, r8
        shr rax, 7
        xor r8, rax
        mov rax, r8
        shl rax, 17
        xor r8, rax
        ret

    62:                         # ---- rax: number of a space
        and eax, 7
        cmp eax, {REACH}
        jb 63f
        sub eax, {REACH}
    63:
        ret

    94:                         # ---- ecx: rather slot edx, or r13; clobbers rax
        mov rax, r8
        shr rax, 30
        test eax, 3
        cmovz ecx, edx
        jz 95f
        test eax, 0x30
        cmovz ecx, r13d
    95:
        ret

    64:                         # ---- begins to store entry rax by record rbp; rdx: version; clobbers rcx
        mov rdx, [rbp + {DONE}]
        inc rdx
        mov ecx, edx
        and ecx, 7
        mov [rbp + rcx*8 + {HISTORY}], rax
        mov [rbp], rdx
        ret

    65:                         # ---- stores entry rax at r13; clobbers rax, rcx
        mov ecx, r8d
        shr ecx, 21
        and ecx, 3
        sub ecx, 2
        mov rcx, rax
        je 68f
        ja 69f
        mov [r13], rax
        ret
    68:
        xchg [r13], rax
        ret
    69:
        mov rax, [r13]
    61:
        lock cmpxchg [r13], rcx
        jne 61b
        ret

    66:                         # ---- flushes slot rcx; clobbers rax, rbp
        mov ebp, ecx
        shl ebp, 7
        mov rax, [r11 + rbp + {RECORDS} + {DONE}]
        mov [rdi + rcx*8 + {SEEN}], rax
        mov rax, [rsp + 8 + 16]
        cmp ecx, {LARGE_SLOT}
        jae 67f
        mov ebp, ecx
        shl ebp, 12
        invlpg [rax + rbp]
        ret
    67:
        lea ebp, [rcx + {LARGE_INDEX} - {LARGE_SLOT}]
        shl rbp, 21
        lea rbp, [rax + rbp + {PROBE}*{PAGE}]
        mov eax, {PROBES}
    92:
        invlpg [rbp]
        add rbp, {PAGE}
        dec eax
        jnz 92b
        ret

    70:                         # ---- loads the space with the number rax; r11: its memory
        mov [rdi + {CURRENT}], rax
        mov r11, [rdi + rax*8 + {BLOCKS}]
        mov rax, r11
        add rax, [rdi + {BASE}]
        add r11, r9
        lea rbp, [r11 + {RECORDS}]
        xor ecx, ecx
    71:
        mov rdx, [rbp + {DONE}]
        mov [rdi + rcx*8 + {SEEN}], rdx
        add rbp, {RECORD}
        inc ecx
        cmp ecx, {SLOTS}
        jb 71b
        mov cr3, rax
        ret

    72:                         # ---- rax must be what a version from r10 on leads to
        inc qword ptr [rdi + {CHECKS}]
        push rax
        mov r13, [rbp]
        lea r14, [r13 - 7]
        cmp r14, r10
        cmovl r14, r10
    73:
        mov eax, r14d
        and eax, 7
        mov rax, [rbp + rax*8 + {HISTORY}]
        call 76f
        cmp rax, [rsp]
        je 75f
        inc r14
        cmp r14, r13
        jbe 73b
        mov r14, [rbp]          # are these all?
        sub r14, r10
        cmp r14, 6
        ja 74f
        pop rdx
        mov rcx, rax
        jmp 88f
    74:
        inc qword ptr [rdi + {LOOSE}]
        mov rax, [rsp]
        lea r14d, [rdx + 4]
        cmp rax, r14
        je 75f
        inc r14d
        cmp rax, r14
        je 75f
        movabs r13, {TAG}
        xor rax, r13
        sub rax, [rdi + {BASE}]
        test eax, {PAGE} - 1
        jnz 79f
        cmp ecx, {SHARED_SLOT}
        jae 77f
        add rax, r9
        sub rax, r11
        sub rax, {PRIVATE}
        cmp rax, {PRIVATE_PAGES}*{PAGE}
        jb 75f
        jmp 79f
    77:
        cmp ecx, {LARGE_SLOT}
        jae 78f
        sub rax, [rdi + {SHARED}]
        cmp rax, {SHARED_PAGES}*{PAGE}
        jb 75f
        jmp 79f
    78:
        mov r13d, eax
        and r13d, 0x1fffff
        cmp r13d, {PROBE}*{PAGE}
        jb 79f
        shr rax, 21
        cmp rax, [rdi + {LAST_VIEW}]
        jbe 75f
    79:
        pop rdx
        xor ecx, ecx
        jmp 88f
    75:
        pop rax
        ret

    76:                         # ---- rax: what entry rax leads to
        test al, {P}
        jz 80f
        test al, {U}
        jz 81f
        test al, {W}
        jnz 82f
        test edx, edx
        jz 82f
    81:
        lea eax, [rdx + 5]
        ret
    80:
        lea eax, [rdx + 4]
        ret
    82:
        push r13
        movabs r13, {ADDR}
        cmp ecx, {LARGE_SLOT}
        jae 83f
        and rax, r13
        jmp 90f
    83:
        test al, {PS}
        jz 84f
        and rax, r13
        shr rax, 21
        shl rax, 21
        mov r13d, r8d
        shr r13d, 16
        and r13d, {PROBES} - 1
        jmp 89f
    84:                         # split
        shr rax, {CODE_SHIFT}
        mov r13d, eax
        shr r13d, {VIEW_BITS}
        push rax
        mov eax, r8d
        shr eax, 16
        add r13d, eax
        and r13d, {PROBES} - 1
        pop rax
        and eax, 3
        shl rax, 21
        add rax, [rdi + {BASE}]
    89:
        add r13d, {PROBE}
        shl r13d, 12
        add rax, r13
    90:
        movabs r13, {TAG}
        or rax, r13
        pop r13
        ret

    85:                         # ---- the end
        mov [rdi + {GENERATOR}], r8
        mov [rdi + {STORES}], r15
        mov rbx, [rsp + 24]
        mov rax, [rsp + 8]
        mov cr3, rax
    91:
        xor eax, eax
        hlt
        jmp 91b

    86:                         # ---- store r15 went through, and should have met code rax
        mov rcx, rax
        mov rdx, r15
        jmp 88f
    87:                         # ---- store r15 is not where it should be: rax is
        mov rcx, r15
        mov rdx, rax
    88:                         # ---- [rbx] is rdx and should be rcx
        mov eax, 1
        hlt
        jmp 88b
    ",
    STOP = control::STOP,
    TO_LARGE = MIRROR_LARGE_GVA - MIRROR_GVA,
    OWN = OWN,
    REACH = REACH,
    SLOTS = SLOTS,
    SHARED_SLOT = SHARED_SLOT,
    FOREIGN_SLOT = FOREIGN_SLOT,
    LARGE_SLOT = LARGE_SLOT,
    LARGE_INDEX = LARGE_INDEX,
    PRIVATE_PAGES = PRIVATE_PAGES,
    SHARED_PAGES = SHARED_PAGES,
    PROBE = PROBE,
    PROBES = PROBES,
    DIRECTORY = block::DIRECTORY,
    TABLE = block::TABLE,
    SPLIT = block::SPLIT,
    RECORDS = block::RECORDS,
    PRIVATE = block::PRIVATE,
    RECORD = RECORD,
    DONE = DONE,
    HISTORY = HISTORY,
    TAG = TAG,
    KEPT = KEPT,
    RACING = RACING,
    CODE_SHIFT = CODE_SHIFT,
    VIEW_BITS = VIEW_BITS,
    GENERATOR = desk::GENERATOR,
    STORES = desk::STORES,
    CURRENT = desk::CURRENT,
    BASE = desk::BASE,
    SHARED = desk::SHARED,
    LAST_VIEW = desk::LAST_VIEW,
    CHECKS = desk::CHECKS,
    LOOSE = desk::LOOSE,
    MINE = desk::MINE,
    BLOCKS = desk::BLOCKS,
    SEEN = desk::SEEN,
    PAGE = PAGE,
    LEAF = P | W | U | NX,
    LARGE_LEAF = P | W | U | PS | NX,
    AD = A | D,
    ADDR = ADDR,
    P = P,
    W = W,
    U = U,
    PS = PS,
);
