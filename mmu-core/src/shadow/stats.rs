// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters under the names that KVM exports, where KVM has one.

use core::sync::atomic::{AtomicU64, Ordering};

/// One event counter. Not part of any protocol, so not loom's.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Counts up; for a counter that one thread writes.
    #[inline]
    pub(crate) fn bump(&self) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// Counts up; for a counter that several threads write.
    #[inline]
    pub(crate) fn bump_shared(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// Counters of one vCPU, or of what belongs to none.
        #[derive(Debug, Default)]
        pub(crate) struct Stats {
            $($(#[doc = $doc])* pub(crate) $name: Counter,)*
        }

        /// Event counts since the engine was made. Names are KVM's where KVM has them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct StatsSnapshot {
            $($(#[doc = $doc])* pub $name: u64,)*
        }

        impl StatsSnapshot {
            pub(crate) fn add(&mut self, stats: &Stats) {
                $(self.$name += stats.$name.0.load(Ordering::Relaxed);)*
            }

            /// Every counter with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Faults that ended with an entry made or widened.
    pf_fixed,
    /// Of these, the ones that only made an entry writable again, without a walk.
    pf_fast,
    /// Of the fixed ones, those that map 2 MiB or 1 GiB.
    pf_large,
    /// Entries made around a fault, for pages that the guest had used before.
    pte_prefetched,
    /// Faults that belong to the guest.
    pf_guest,
    /// Faults that found the entry already there.
    pf_spurious,
    /// Write faults on shadowed guest tables, handed back for emulation.
    pf_emulate,
    /// Faults on addresses without memory, or writes to read-only memory.
    pf_mmio,
    /// Of these, the ones that an MMIO entry answered.
    mmio_cached,
    /// Faults that had to wait for a flush, a frame or the host.
    pf_retry,
    /// Installs that lost a race and were taken back.
    pf_restart,
    /// Guest writes to shadowed guest tables.
    mmu_pte_write,
    /// Entries dropped because a guest write changed what they were made from.
    mmu_pte_zapped,
    /// Shadows of former guest tables that were torn down because the guest writes other data there.
    mmu_flooded,
    /// Leaf tables that the guest began to write natively.
    mmu_unsync,
    /// Such tables that were found unchanged and protected again.
    mmu_synced,
    /// Shadow pages made.
    mmu_cache_miss,
    /// Shadow pages made by two faults at once, of which one was dropped.
    mmu_cache_race,
    /// Shadow pages torn down.
    mmu_shadow_zapped,
    /// Shadow pages torn down because table frames ran out.
    mmu_recycled,
    /// Leaves of 2 MiB or 1 GiB taken away because something inside needs pages of its own.
    mmu_block_broken,
    /// Entries write-protected for a shadowed table or the dirty log.
    mmu_write_protected,
    /// Drains of a vCPU that found something.
    remote_tlb_flush,
    /// Requests to a vCPU to drain.
    remote_tlb_flush_requests,
    /// Kicks of a vCPU that was inside the guest.
    remote_tlb_flush_kicks,
    /// Drains that had to flush everything.
    flush_overflow,
    /// Look-ups of a vCPU's root that had to load one.
    root_loads,
}
