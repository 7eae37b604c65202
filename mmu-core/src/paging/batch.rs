// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many walks at once.
//!
//! A walk over large tables waits for memory, one entry after the other. A batch lets the waits of
//! many walks overlap: it goes down the levels for a group of addresses together and asks for each
//! lane's next entry before it looks at any of them; addresses that share a table share the
//! look-up. Then the walks are made one by one, from the cache. The first pass is a hint only: what
//! is reported comes from the second, so a batch means exactly what its walks mean.
//!
//! `unsafe` is needed here for the prefetch instruction.

use super::access::Access;
use super::bits::{ADDR, P};
use super::descend::{Window, half};
use super::fault::Fault;
use super::format::{Entry, Layout, with_layout};
use super::mode::PagingMode;
use super::walk::Walk;
use crate::addr::Gva;
use crate::memory::{Hint, MemoryMap};
use crate::sync::{AtomicU64, Ordering};

/// Addresses of a group: enough to keep every outstanding miss of a core busy.
const LANES: usize = 32;

impl PagingMode {
    /// Walks for each address, and calls `each` with its position and what
    /// [`walk`](Self::walk) returned, in order. Much faster than single walks where the tables are
    /// not in the processor's caches.
    pub fn walk_batch(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gvas: &[Gva],
        access: Access,
        mut each: impl FnMut(usize, Result<Walk, Fault>),
    ) {
        for (group, gvas) in gvas.chunks(LANES).enumerate() {
            // The model has no caches.
            if cfg!(not(loom)) {
                with_layout!(self.format, L => self.fetch::<L>(map, hint, gvas), none => ());
            }
            for (lane, gva) in gvas.iter().enumerate() {
                each(group * LANES + lane, self.walk(map, hint, *gva, access));
            }
        }
    }

    /// Brings the entries that the walks will read into the cache. Looks at no right: a walk that
    /// faults reads the same entries.
    fn fetch<L: Layout>(&self, map: &MemoryMap, hint: &Hint, gvas: &[Gva]) {
        let Some(mut window) = Window::at(map, hint, self.root) else { return };
        let mut lanes: [Option<&AtomicU64>; LANES] = [None; LANES];
        for (lane, gva) in lanes.iter_mut().zip(gvas) {
            let table = if L::PDPTRS {
                match self.masks.decode_pdpte(self.pdptrs[(gva.0 >> 30) as usize & 3]) {
                    Entry::Table(table) => table.0,
                    _ => continue,
                }
            } else {
                self.root
            };
            *lane = window.entry::<L>(map, hint, table, gva.0, L::LEVELS);
        }
        for level in (2..=L::LEVELS).rev() {
            // The entry looked at last, what it was, and where it led.
            let mut last: (Option<&AtomicU64>, u64) = (None, 0);
            for (lane, gva) in lanes.iter_mut().zip(gvas) {
                let Some(cell) = *lane else { continue };
                let entry = match last {
                    (Some(shared), entry) if core::ptr::eq(shared, cell) && L::WIDE => entry,
                    _ => {
                        let word = cell.load(Ordering::Relaxed);
                        if L::WIDE { word } else { half(word, L::index(gva.0, level)) }
                    }
                };
                last = (Some(cell), entry);
                *lane = None;
                if entry & self.masks.table == P {
                    *lane = window.entry::<L>(map, hint, entry & ADDR, gva.0, level - 1);
                    if let Some(next) = *lane {
                        prefetch(next);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn prefetch(cell: &AtomicU64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch of any address has no effect on the program.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(cell).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    core::hint::black_box(cell.load(Ordering::Relaxed));
}
