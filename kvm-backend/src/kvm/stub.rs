// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The few ring-0 instructions that run inside the guest.
//!
//! Two kinds. *Vectors*: exception `n` of the guest program enters at vector `n`, which leaves to the VMM
//! by `hlt` at once: one instruction. The processor has put the frame on the vCPU's
//! stack page and the vector is known from the instruction pointer, so nothing needs saving.
//! *Gadgets*: short pieces that end in `ret`. The VMM writes a drain as a sequence of words
//! (gadget, operands, gadget, operands, …) into the vCPU's queue page and enters with the stack
//! pointer on it: each piece pops its operands and returns into the next. No loop, no counter, no
//! register to save but rax: on a host that emulates ring 0 every instruction costs over a microsecond.
//!
//! Guarantees:
//!
//! * Position-independent and without data: copied as bytes into a page that is mapped read-only
//!   and executable for the supervisor.
//! * A gadget never stores a *value* into a table entry, only `lock or entry, 0`: what another vCPU
//!   installed meanwhile stays.
//! * Every sequence may be started again from its beginning at any point: popping writes nothing, a locked `or` of zero
//!   is idempotent. Its words may be changed while the vCPU is outside, as long as they were not popped.
//! * An exception inside the stub goes through the same vectors, on the stack page reserved for
//!   exceptions (not on the queue), and is told by the privilege level in its frame.
//! * Interrupts are off (vectors are interrupt gates, entries have IF clear).
//!
//! `unsafe` here: the symbols that delimit the code.

use super::layout::{PAGE, STUB_VA};

/// Copies of a `leaf`, `entry` or `frame` gadget in a row; a run of `k` enters `k` copies before the end.
pub(super) const UNROLL: usize = 48;
/// Frames or entry groups touched per turn of a sweep's loop.
pub(super) const SWEEP_UNROLL: u64 = 32;
/// Bytes from one vector to the next.
pub(super) const VECTOR_STRIDE: u64 = 8;
/// Vectors: the exceptions of the architecture. There are no interrupts.
pub(super) const VECTORS: u64 = 32;
/// Byte in the queue page of the acknowledged generation.
pub(super) const ACK_OFFSET: u64 = 0;
/// Words from the operand after `ack`'s to the end of the queue page: `ack` finds its word by
/// distance from the stack pointer, so it is always this far from the end.
pub(super) const ACK_TAIL_WORDS: u64 = 7;

core::arch::global_asm!(
    // A label that other code generation units see, but no other object.
    ".macro shadowmmu_label name",
    ".globl \\name",
    ".hidden \\name",
    "\\name:",
    ".endm",
    ".pushsection .rodata.shadowmmu_stub, \"a\", @progbits",
    ".balign 16",
    "shadowmmu_label shadowmmu_stub_start",
    // Vectors. `hlt` leaves to the VMM (there is no interrupt controller in the kernel). Nobody
    // resumes after it; should a VMM do so by mistake, `ud2` makes it an exception in the stub.
    // The 33rd is for interrupts, of which there are none.
    ".rept 33",
    ".balign 8",
    "hlt",
    "ud2",
    ".endr",
    // syscall: with SYSCALL the guest program arrives here, on its own stack pointer (not used), rcx and r11
    // holding its instruction pointer and flags.
    ".balign 8",
    "shadowmmu_label shadowmmu_stub_syscall",
    "hlt",
    "ud2",
    // leaf: operands entry, gva. The locked write makes a kernel that shadows these tables drop
    // what it derived from the entry; the invlpg drops the processor's translation.
    ".balign 16",
    "shadowmmu_label shadowmmu_stub_leaf",
    ".rept {unroll}",
    "popq %rax",
    "lock orq $0, (%rax)",
    "popq %rax",
    "invlpg (%rax)",
    ".endr",
    "shadowmmu_label shadowmmu_stub_leaf_end",
    "retq",
    // entry: operand entry. As leaf, for an entry with more than one gva: a CR3 load follows.
    "shadowmmu_label shadowmmu_stub_entry",
    ".rept {unroll}",
    "popq %rax",
    "lock orq $0, (%rax)",
    ".endr",
    "shadowmmu_label shadowmmu_stub_entry_end",
    "retq",
    // frame: operand first byte of a table frame. A *two-byte* write says to a kernel that shadows
    // the frame that it is no page table any more; a CR3 load follows.
    "shadowmmu_label shadowmmu_stub_frame",
    ".rept {unroll}",
    "popq %rax",
    "lock orw $0, (%rax)",
    ".endr",
    "shadowmmu_label shadowmmu_stub_frame_end",
    "retq",
    // cr3: operand root. Drops all translations (none is global, CR4.PCIDE = 0).
    "shadowmmu_label shadowmmu_stub_cr3",
    "popq %rax",
    "movq %rax, %cr3",
    "retq",
    // sweep_frames: operands first frame, turns, the guest's rcx. `frame` for 32 frames a turn.
    "shadowmmu_label shadowmmu_stub_sweep_frames",
    "popq %rax",
    "popq %rcx",
    "2:",
    ".set shadowmmu_i, 0",
    ".rept {sweep}",
    "lock orw $0, shadowmmu_i(%rax)",
    ".set shadowmmu_i, shadowmmu_i + 4096",
    ".endr",
    "addq $({sweep} * 4096), %rax",
    "decq %rcx",
    "jnz 2b",
    "popq %rcx",
    "retq",
    // sweep_entries: operands first entry, turns, the guest's rcx. `entry` for 32 entries a turn:
    // for hosts where the two-byte write is not enough.
    "shadowmmu_label shadowmmu_stub_sweep_entries",
    "popq %rax",
    "popq %rcx",
    "2:",
    ".set shadowmmu_i, 0",
    ".rept {sweep}",
    "lock orq $0, shadowmmu_i(%rax)",
    ".set shadowmmu_i, shadowmmu_i + 8",
    ".endr",
    "addq $({sweep} * 8), %rax",
    "decq %rcx",
    "jnz 2b",
    "popq %rcx",
    "retq",
    // ack: operand generation, popped into the acknowledged word. (A pop computes a destination
    // relative to rsp after it has incremented rsp: SDM vol. 2, POP.)
    "shadowmmu_label shadowmmu_stub_ack",
    "popq ({ack} - 4096 + {tail} * 8)(%rsp)",
    "retq",
    // leave: operands the guest's rax, then its iretq frame. Enters ring 3.
    "shadowmmu_label shadowmmu_stub_leave",
    "popq %rax",
    "iretq",
    // exit: a drain-only entry ends here, in the VMM.
    ".balign 8",
    "shadowmmu_label shadowmmu_stub_exit",
    "hlt",
    "ud2",
    "shadowmmu_label shadowmmu_stub_end",
    ".popsection",
    ".purgem shadowmmu_label",
    unroll = const UNROLL,
    sweep = const SWEEP_UNROLL,
    ack = const ACK_OFFSET,
    tail = const ACK_TAIL_WORDS,
    options(att_syntax)
);

macro_rules! symbols {
    ($($name:ident = $symbol:ident;)*) => {
        unsafe extern "C" {
            $(static $symbol: u8;)*
        }
        $(
            /// Guest-virtual address of the label of that name.
            pub(super) fn $name() -> u64 {
                let (at, start) = (&raw const $symbol, &raw const shadowmmu_stub_start);
                STUB_VA + (at as u64 - start as u64)
            }
        )*
    };
}

symbols! {
    vectors = shadowmmu_stub_start;
    syscall = shadowmmu_stub_syscall;
    leaf = shadowmmu_stub_leaf;
    leaf_end = shadowmmu_stub_leaf_end;
    entry = shadowmmu_stub_entry;
    entry_end = shadowmmu_stub_entry_end;
    frame = shadowmmu_stub_frame;
    frame_end = shadowmmu_stub_frame_end;
    cr3 = shadowmmu_stub_cr3;
    sweep_frames = shadowmmu_stub_sweep_frames;
    sweep_entries = shadowmmu_stub_sweep_entries;
    ack = shadowmmu_stub_ack;
    leave = shadowmmu_stub_leave;
    exit = shadowmmu_stub_exit;
    end = shadowmmu_stub_end;
}

/// The code, to be copied to the page mapped at [`STUB_VA`].
///
/// # Panics
///
/// If the code has outgrown its page (found by any test).
pub(super) fn code() -> &'static [u8] {
    let len = end() - vectors();
    assert!(len <= PAGE, "stub of {len} bytes");
    // SAFETY: the assembly above lays `len` initialised read-only bytes from `start` to `end`.
    unsafe { std::slice::from_raw_parts(&raw const shadowmmu_stub_start, len as usize) }
}

/// Whether the vCPU has popped a program's last gadget, `leave`: everything before is done.
pub(super) fn has_drained(rip: u64) -> bool {
    (leave()..exit()).contains(&rip)
}

/// Vector `n`'s address.
pub(super) fn vector(n: u64) -> u64 {
    vectors() + n * VECTOR_STRIDE
}

/// The vector whose code `rip` lies in: at its `hlt`, or just after it.
pub(super) fn vector_at(rip: u64) -> Option<u8> {
    let distance = rip.checked_sub(vectors())?;
    (distance < VECTORS * VECTOR_STRIDE && distance % VECTOR_STRIDE <= 1)
        .then_some((distance / VECTOR_STRIDE) as u8)
}
