// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rows of the table, one module for each kind of workload.

mod age;
mod anew;
mod change;
mod crowd;
mod cycle;
mod dirty;
mod edit;
mod fault;
mod garbage;
mod kvm;
mod lanes;
mod memory;
mod precopy;
mod publish;
mod rivals;
mod shares;
mod size;
mod slots;
mod soft;
mod threads;
mod trap;
mod walk;
mod zap;

use crate::figure::Row;

/// Every row, in the order of the table.
pub fn all() -> Vec<Box<dyn Row>> {
    vec![
        Box::new(walk::Cached),
        Box::new(walk::Large),
        Box::new(walk::Pinned),
        Box::new(walk::Batch),
        Box::new(kvm::Translate),
        Box::new(publish::BesideWriter),
        Box::new(threads::TwoWalkers),
        Box::new(slots::ManySlots),
        Box::new(crowd::Crowded),
        Box::new(fault::Single),
        Box::new(cycle::Cycles::own_tables()),
        Box::new(cycle::Cycles::own_ranges()),
        Box::new(cycle::Cycles::one_range()),
        Box::new(trap::OwnFault),
        Box::new(trap::RoundTrip),
        Box::new(trap::MapAround),
        Box::new(cycle::Cycles::emulated()),
        Box::new(edit::Edits),
        Box::new(soft::TlbHit),
        Box::new(change::Slots),
        Box::new(dirty::Harvest),
        Box::new(precopy::BesideHarvest),
        Box::new(zap::ZapAll),
        Box::new(age::Ageing),
        Box::new(memory::Metadata),
        Box::new(garbage::Garbage),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    #[test]
    fn ids_are_unique_and_belong_to_their_rows() {
        let mut seen = HashSet::new();
        for row in super::all() {
            for id in row.figures() {
                assert!(seen.insert(*id), "{id} twice");
                let rest = id.strip_prefix(row.id()).unwrap();
                assert!(rest.is_empty() || rest.starts_with('.'), "{id}");
            }
        }
    }
}
