// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The baseline `chase`: a walk's loads and nothing else.
//!
//! Four loads, each of an address that the one before gave, with the shifts and masks that find
//! the entry. No slot is looked up, no bit is tested, nothing can fail: what memory and the load
//! units allow. `unsafe` is needed because no load is checked.

use core::arch::asm;
use mmu_core::paging::bits::ADDR;
use std::sync::atomic::{AtomicU64, Ordering};

/// The same value, of which the compiler knows nothing. No instruction is made for it.
#[inline(always)]
pub fn opaque(mut value: u64) -> u64 {
    // SAFETY: a comment in assembly; it does nothing.
    unsafe { asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags)) };
    value
}

/// The address with a dependency on the result before it: `after` has bit 63 clear, which the
/// compiler does not know, so that this walk cannot begin before that one has ended.
#[inline(always)]
pub fn chained(gva: u64, after: u64) -> u64 {
    gva + (opaque(after) >> 63)
}

/// Walks 4-level tables in `words`, which hold guest-physical memory from 0 on.
///
/// # Safety
///
/// Every entry that the walk reads must be present and map a page or refer to a table within
/// `words`; a checked walk of the same address has shown it.
#[inline(always)]
pub unsafe fn walk(words: &[AtomicU64], root: u64, gva: u64) -> u64 {
    let mut table = root;
    for level in (0..4).rev() {
        let at = table + (gva >> (12 + 9 * level) & 511) * 8;
        // SAFETY: the caller's promise. Relaxed: a plain load, as all are on this architecture.
        table = unsafe { words.get_unchecked((at / 8) as usize) }.load(Ordering::Relaxed) & ADDR;
    }
    table | gva & 0xfff
}
