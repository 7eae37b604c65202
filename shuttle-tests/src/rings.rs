// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A copy of slot 0 that follows the dirty rings of all vCPUs, and the log only where a ring was full.

use crate::copied::Copied;
use crate::guest::{Guest, MAIN};
use mmu_core::memory::{DirtyPage, DirtyRing};
use shuttle::sync::Mutex;
use std::sync;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// See the module.
#[derive(Debug)]
pub(crate) struct Rings {
    /// Of vCPUs that have gone as well. Not locked while anything of the engine is called.
    all: sync::Mutex<Vec<Arc<DirtyRing>>>,
    /// `None` until the first collection. Locked from the collection of a page to its copy: a later copy
    /// must not be overwritten by an earlier one.
    copied: Mutex<Option<Copied>>,
    collected: AtomicU64,
    lost: AtomicU64,
}

impl Rings {
    pub(crate) fn new() -> Self {
        Self {
            all: sync::Mutex::default(),
            copied: Mutex::new(None),
            collected: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        }
    }

    /// Another vCPU's.
    pub(crate) fn add(&self, capacity: u32) -> Arc<DirtyRing> {
        let ring = Arc::new(DirtyRing::new(capacity).unwrap());
        self.all.lock().unwrap().push(Arc::clone(&ring));
        ring
    }

    /// The copy begins. To be called before any vCPU runs.
    pub(crate) fn begin(&self, guest: &Guest) {
        *self.copied.lock().unwrap() = Some(Copied::of(guest, MAIN));
    }

    /// Collects all rings, and copies the pages in them.
    pub(crate) fn collect(&self, guest: &Guest) {
        let mut copied = self.copied.lock().unwrap();
        copied.as_mut().unwrap().follow(guest, |_| {
            let all = self.all.lock().unwrap().clone();
            let mut pages = Vec::new();
            let mut lost = false;
            for ring in &all {
                lost |= ring.take_lost();
                let mut some = [DirtyPage { slot: MAIN, page: 0 }; 4];
                loop {
                    let n = ring.collect(&mut some);
                    if n == 0 {
                        break;
                    }
                    pages.extend_from_slice(&some[..n]);
                }
            }
            self.collected.fetch_add(pages.len() as u64, Ordering::Relaxed);
            guest.mmu.reset_dirty_pages(&pages).unwrap();
            let mut pages: Vec<_> = pages.into_iter().map(|page| page.page).collect();
            if lost {
                self.lost.fetch_add(1, Ordering::Relaxed);
                let mut log = [0];
                guest.mmu.dirty_log(MAIN, &mut log).unwrap();
                pages.extend((0..64).filter(|page| log[0] >> page & 1 != 0));
            }
            pages
        });
    }

    /// Collects a last time. The copy must be what the slot is.
    pub(crate) fn check(&self, guest: &Guest) {
        self.collect(guest);
        self.copied.lock().unwrap().as_ref().unwrap().check(guest);
    }

    /// What happened.
    pub(crate) fn tally(&self) -> [(&'static str, u64); 2] {
        [("ring_pages", &self.collected), ("ring_full", &self.lost)]
            .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}
