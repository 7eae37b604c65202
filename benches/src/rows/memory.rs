// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine keeps for what it maps, in bytes of the process's heap.
//!
//! Counted is everything that was allocated since before the engine was made, its fixed parts
//! included, but for guest memory and the memory of the shadow tables, which are made before.

use crate::alloc::live;
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples};
use crate::regime::Brief;
use mmu_core::addr::Gva;
use mmu_core::memory::AllocatedMemory;
use mmu_core::paging::Access;
use mmu_core::shadow::Outcome;
use serde_json::json;
use std::sync::Arc;

/// First mapped address.
const FIRST: u64 = 0x4000_0000;

/// What a guest cost.
struct Cost {
    /// All bytes.
    bytes: u64,
    /// Those that the engine had before the first fault.
    fixed: u64,
    mapped: u64,
    tables: u64,
}

/// Maps `pages` pages that lie `stride` apart; `vcpus` in turn fault on each.
fn map(pages: u64, stride: u64, vcpus: usize) -> Result<Cost, Failure> {
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
    let mmu = memory.engine_in(tables)?;
    let vcpus = (0..vcpus).map(|_| mmu.create_vcpu(Arc::new(Brief), regs(root)));
    let mut vcpus: Vec<_> = vcpus.collect::<Result<_, _>>().map_err(Failure::in_step("vCPU"))?;
    let fixed = live() - start;
    for page in 0..pages {
        let turn = page as usize % vcpus.len();
        let vcpu = &mut vcpus[turn];
        loop {
            match vcpu.fault(Gva(FIRST + page * stride), Access::write().user()) {
                Ok(Outcome::Fixed) => break,
                Ok(other) => return Err(Failure::new(format!("page {page}: {other:?}"))),
                Err(stall) => while vcpu.must_wait(stall) {},
            }
        }
    }
    let bytes = live() - start;
    let audit = mmu.audit().map_err(Failure::in_step("audit"))?;
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
        &["M1.page", "M1.v2", "M1.v8", "M1.v32", "M1.table"]
    }

    fn run(&self, _: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        for (id, what, vcpus) in [
            ("M1.page", "bytes for a page mapped, 512 a table", 1),
            ("M1.v2", "the same by 2 vCPUs", 2),
            ("M1.v8", "the same by 8 vCPUs", 8),
            ("M1.v32", "the same by 32 vCPUs", 32),
        ] {
            let dense = map(1 << 16, PAGE, vcpus)?;
            let bytes = vec![dense.bytes as f64 / dense.mapped as f64];
            let samples = Samples::from([("dense", bytes)]);
            let figure = Figure::plain(id, what, &samples, "dense", "bytes")?
                .detail("pages", json!(dense.mapped))
                .detail("bytes", json!(dense.bytes))
                .detail("fixed_bytes", json!(dense.fixed));
            found.figure(if vcpus == 1 { figure.goal(Goal::AtMost(20.0)) } else { figure });
        }
        let sparse = map(1 << 12, 2 * MIB, 1)?;
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
        let (few, many) = (map(512, PAGE, 1).unwrap(), map(5120, PAGE, 2).unwrap());
        assert!(few.fixed > 0 && few.bytes >= few.fixed);
        assert!(many.bytes > few.bytes + 4608 * 4, "{} {}", many.bytes, few.bytes);
        assert_eq!((few.mapped, few.tables), (512, 4));
    }
}
