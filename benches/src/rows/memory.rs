// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine keeps for what it maps, in bytes of the process's heap.
//!
//! Counted is everything that was allocated since before the engine was made, its fixed parts
//! included, but for guest memory and the memory of the shadow tables, which are made before. vCPUs
//! fault at the same time, each on a thread of its own, whose bytes are counted too.

use super::lanes::{Ids, LANES, after, each, fault, ids, said};
use crate::alloc::live;
use crate::cpu::{Work, together};
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples};
use crate::regime::{Brief, Regime, Vm};
use mmu_core::memory::AllocatedMemory;
use mmu_core::shadow::Outcome;
use serde_json::json;
use std::sync::Arc;

/// First mapped address.
const FIRST: u64 = 0x4000_0000;

/// Figures for a page.
const PAGE_IDS: &Ids = {
    let [_, two, eight, many] = *ids!("M1");
    &[["M1.page", "M1.page.rwlock", "M1.page.mutex"], two, eight, many]
};

/// What a guest cost.
struct Cost {
    /// All bytes.
    bytes: u64,
    /// Those that the engine had before the first fault.
    fixed: u64,
    mapped: u64,
    tables: u64,
}

/// Maps `pages` pages that lie `stride` apart; vCPU *n* of `vcpus` faults on each *n*th.
fn map(pages: u64, stride: u64, vcpus: usize, regime: Regime) -> Result<Cost, Failure> {
    let span = pages * stride;
    let data = pages * PAGE;
    let mut memory = Memory::new(data + (span / 512 / PAGE + 64) * PAGE + 2 * MIB, data);
    let root = memory.table();
    for page in 0..pages {
        memory.map(root, FIRST + page * stride, page * PAGE);
    }
    let frames = span.div_ceil(2 * MIB) + span.div_ceil(1 << 30) + 64 + 8 * vcpus as u64;
    let tables = Arc::new(AllocatedMemory::new(frames * PAGE));
    let start = live();
    let vm = Vm::new(memory.engine_in(tables)?, regime);
    let vcpus = (0..vcpus).map(|_| vm.mmu().create_vcpu(Arc::new(Brief), regs(root)));
    let mut vcpus: Vec<_> = vcpus.collect::<Result<_, _>>().map_err(Failure::in_step("vCPU"))?;
    let fixed = live() - start;
    let count = vcpus.len();
    let work = vcpus.iter_mut().enumerate().map(|(n, vcpu)| {
        let vm = &vm;
        let run = move || {
            let start = live();
            for page in (n as u64..pages).step_by(count) {
                let outcome = fault(vm, vcpu, FIRST + page * stride)?;
                check_eq("fault", outcome, Outcome::Fixed)?;
            }
            Ok(live() - start)
        };
        Box::new(run) as Work<'_, i64>
    });
    let bytes = fixed + together(work.collect())?.values.iter().sum::<i64>();
    let audit = vm.mmu().audit().map_err(Failure::in_step("audit"))?;
    check_eq("shadow entries", audit.sptes, pages)?;
    let unsigned = |bytes: i64| u64::try_from(bytes).map_err(Failure::in_step("bytes"));
    Ok(Cost {
        bytes: unsigned(bytes)?,
        fixed: unsigned(fixed)?,
        mapped: audit.sptes,
        tables: audit.pages,
    })
}

/// M1.
#[derive(Debug)]
pub struct Metadata;

impl Row for Metadata {
    fn id(&self) -> &'static str {
        "M1"
    }

    fn figures(&self) -> &'static [&'static str] {
        const FIGURES: [&str; 13] = after(&["M1.table"], &[PAGE_IDS]);
        &FIGURES
    }

    fn run(&self, _: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let what = each!("bytes for a page mapped, 512 a table");
        for ((ids, what), lanes) in PAGE_IDS.iter().zip(what).zip(LANES) {
            for (id, regime) in ids.iter().zip(Regime::ALL) {
                let dense = map(1 << 16, PAGE, lanes, regime)?;
                let bytes = vec![dense.bytes as f64 / dense.mapped as f64];
                let samples = Samples::from([("dense", bytes)]);
                let figure = Figure::plain(id, said(what, regime), &samples, "dense", "bytes")?
                    .detail("pages", json!(dense.mapped))
                    .detail("bytes", json!(dense.bytes))
                    .detail("fixed_bytes", json!(dense.fixed));
                let judged = lanes == 1 && regime == Regime::Rcu;
                found.figure(if judged { figure.goal(Goal::AtMost(20.0)) } else { figure });
            }
        }
        let sparse = map(1 << 12, 2 * MIB, 1, Regime::Rcu)?;
        let samples = Samples::from([("sparse", vec![sparse.bytes as f64 / sparse.tables as f64])]);
        let what = "bytes for a shadow page beside its table";
        found.figure(
            Figure::plain("M1.table", what, &samples, "sparse", "bytes")?
                .goal(Goal::AtMost(4608.0))
                .detail("tables", json!(sparse.tables))
                .detail("bytes", json!(sparse.bytes))
                .detail("fixed_bytes", json!(sparse.fixed)),
        );
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_grow_with_pages() {
        let (few, many) =
            (map(512, PAGE, 1, Regime::Rcu).unwrap(), map(5120, PAGE, 2, Regime::Rcu).unwrap());
        assert!(few.fixed > 0 && few.bytes >= few.fixed);
        assert!(many.bytes > few.bytes + 4608 * 4, "{} {}", many.bytes, few.bytes);
        assert_eq!((few.mapped, few.tables), (512, 4));
        let mutex = map(512, PAGE, 1, Regime::Mutex).unwrap();
        assert_eq!(mutex.fixed, few.fixed);
        // A thread's own few bytes may differ.
        assert!(mutex.bytes.abs_diff(few.bytes) < 512, "{} {}", mutex.bytes, few.bytes);
    }
}
