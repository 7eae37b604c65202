// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a slot's size costs when it is created and deleted, nothing of it ever used.
//!
//! All slots are the beginning of one reserved block, one at a time. It is never touched: what
//! differs is what the engine prepares for each page.

use crate::backing::Reserved;
use crate::figure::{Failure, Figure, Found, Outcome};
use crate::guest::{MIB, Memory, PAGE};
use crate::measure::{Effort, Variant, calibrate, interleave, timed};
use mmu_core::Mmu;
use mmu_core::addr::Gpa;
use mmu_core::memory::{AllocatedMemory, Backing, SlotConfig, SlotId};
use serde_json::json;
use std::sync::Arc;

/// Where the slots of changing size are.
const BASE: u64 = 1 << 44;
/// Slots that stay.
const OTHERS: u32 = 64;
/// The base.
const SMALLEST: (&str, u64) = ("4 KiB", PAGE);
const SIZES: [(&str, &str, &str, u64); 4] = [
    ("S1.size.2m", "2 MiB", "a slot of 2 MiB made and deleted, over 4 KiB", 2 * MIB),
    ("S1.size.1g", "1 GiB", "the same, 1 GiB", 1 << 30),
    ("S1.size.64g", "64 GiB", "the same, 64 GiB", 1 << 36),
    ("S1.size.1t", "1 TiB", "the same, 1 TiB", 1 << 40),
];

/// The ids of the figures.
pub const IDS: [&str; 4] = [SIZES[0].0, SIZES[1].0, SIZES[2].0, SIZES[3].0];

/// Adds the figures; of sizes that there is no address space for, why not.
pub fn measure(effort: &Effort, found: &mut Found) -> Result<(), Failure> {
    let mmu = &Memory::new(MIB, PAGE).engine(64)?;
    for slot in 1..OTHERS {
        let memory = Arc::new(AllocatedMemory::new(PAGE));
        let slot = SlotConfig::new(slot, Gpa(u64::from(slot) << 32), memory);
        mmu.create_slot(slot).map_err(Failure::in_step("slot"))?;
    }
    let largest = SIZES.iter().rev().find_map(|(.., size)| Reserved::new(*size));
    let backing: Arc<dyn Backing> =
        Arc::new(largest.ok_or_else(|| Failure::new("no address space"))?);
    let fits = |size: u64| size <= backing.size();
    let sizes = SIZES.iter().map(|(_, name, _, size)| (*name, *size));
    let mut variants: Vec<Variant<'_>> = Vec::new();
    for (name, size) in [SMALLEST].into_iter().chain(sizes).filter(|(_, size)| fits(*size)) {
        let cycle = {
            let backing = &backing;
            move || cycle(mmu, backing, size)
        };
        let cycles = calibrate(effort, cycle)?;
        variants.push((name, Box::new(move |_| timed(cycles, 2, cycle))));
    }
    let samples = interleave(effort, variants)?;
    for (id, name, what, size) in SIZES {
        if !fits(size) {
            let reason = format!("no address space of {name}");
            found.outcomes.push(Outcome::Skipped { id, reason });
            continue;
        }
        let figure = Figure::cost(id, what, &samples, [name, SMALLEST.0])?;
        found.figure(figure.detail("slots", json!(OTHERS)));
    }
    found.plots.push(("S1: a change by the slot's size", "ns", samples));
    Ok(())
}

/// Creates and deletes the slot.
fn cycle(mmu: &Mmu, backing: &Arc<dyn Backing>, size: u64) -> Result<(), Failure> {
    let config = SlotConfig::new(OTHERS, Gpa(BASE), Arc::clone(backing));
    let created = mmu.create_slot(SlotConfig { size, ..config });
    created.map_err(Failure::in_step("create"))?;
    mmu.delete_slot(SlotId(OTHERS)).map(drop).map_err(Failure::in_step("delete"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_size_has_a_figure() {
        let effort = Effort { pairs: 1, sample: Duration::from_micros(1) };
        let mut found = Found::default();
        measure(&effort, &mut found).unwrap();
        let ids: Vec<_> = found.outcomes.iter().map(Outcome::id).collect();
        assert_eq!(ids, IDS);
    }
}
