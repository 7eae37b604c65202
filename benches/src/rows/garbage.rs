// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What waits to be freed while a reader stands still and writers publish.
//!
//! The storm creates slots, the one change that waits for no reader. Its thread counts its own
//! bytes: nobody else frees what it retires, as the other thread does nothing but hold its
//! section. What a publication retires depends on the slots that there are, so the limit is what as
//! many publications retire as may wait, of the same slots.

use crate::alloc::{live, peak, reset_peak};
use crate::backing::Part;
use crate::cpu::together;
use crate::figure::{Failure, Figure, Found, Goal, Row, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Samples};
use crate::regime::{Brief, Walker};
use mmu_core::Mmu;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, MAX_OLD_MAPS, SlotConfig};
use mmu_core::vcpu::Vcpu;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Slots that are there before the storm.
const SLOTS: u64 = 64;
/// A storm that nothing bounds ends after so many slots more, or with so many bytes.
const STORM: u64 = 4096;
const TOO_MUCH: i64 = 32 << 20;
/// How often a device writes while a reader stands.
const DEVICE_WRITES: u64 = 1000;
/// Where the slots are, two pages apart.
const BASE: u64 = 1 << 32;
/// How long freeing may take once the reader has gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a storm left behind, in bytes.
#[derive(Clone, Copy, Debug)]
struct Storm {
    /// Slots created while the reader stood.
    created: u64,
    /// What waited to be freed, at most.
    garbage: i64,
    /// What the engine has taken since before the storm, once all was freed that can be.
    kept: i64,
}

/// The same slots, made by whom no storm hurries, in bytes.
#[derive(Clone, Copy, Debug)]
struct Calm {
    /// What the first [`MAX_OLD_MAPS`] publications retire.
    retired: i64,
    /// What the engine keeps for all slots.
    kept: i64,
}

/// An engine, and memory for slots.
struct Setup {
    mmu: Mmu,
    vcpu: Vcpu,
    gva: Gva,
    block: Arc<AllocatedMemory>,
}

impl Setup {
    fn new() -> Result<Self, Failure> {
        let (mut memory, gva) = (Memory::new(MIB, PAGE), 0x4000_0000);
        let root = memory.table();
        memory.map(root, gva, 0);
        let mmu = memory.engine(64)?;
        let vcpu = mmu.create_vcpu(Arc::new(Brief), regs(root));
        let vcpu = vcpu.map_err(Failure::in_step("vCPU"))?;
        let block = Arc::new(AllocatedMemory::new((SLOTS + STORM + 1) * PAGE));
        (1..SLOTS).try_for_each(|slot| create(&mmu, &block, slot))?;
        settle(&mmu);
        Ok(Self { mmu, vcpu, gva: Gva(gva), block })
    }

    /// Creates slots for as long as `limit` while a reader stands still.
    fn storm(mut self, limit: Duration) -> Result<Storm, Failure> {
        let (mmu, block, gva) = (&self.mmu, &self.block, self.gva);
        let vcpu = &mut self.vcpu;
        let gone = &AtomicBool::new(false);
        let (standing, stands) = mpsc::channel();
        let (ended, ends) = mpsc::channel::<()>();
        let reader = move || {
            let mut walker = vcpu.walker();
            let walk = walker.walk(gva, Walker::ACCESS);
            let _ = standing.send(());
            // The storm may be waiting for this reader, or over.
            let _ = ends.recv_timeout(limit);
            gone.store(true, Ordering::Release);
            drop(walker);
            walk.map(|_| None).map_err(Failure::in_step("walk"))
        };
        let storm = move || {
            stands.recv().map_err(Failure::in_step("reader"))?;
            let before = live();
            reset_peak();
            let mut created = 0;
            while !gone.load(Ordering::Acquire) && created < STORM && live() - before < TOO_MUCH {
                create(mmu, block, SLOTS + created)?;
                created += 1;
            }
            let peak = peak();
            drop(ended);
            while !gone.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            settle(mmu);
            Ok(Some(Storm { created, garbage: peak - live(), kept: live() - before }))
        };
        let both = together(vec![Box::new(reader), Box::new(storm)])?;
        self.mmu.audit().map_err(Failure::in_step("audit"))?;
        both.values.into_iter().flatten().next().ok_or_else(|| Failure::new("no storm"))
    }

    /// Creates as many slots: those that the limit allows for while a reader stands, the others
    /// after it.
    fn calm(self, created: u64) -> Result<Calm, Failure> {
        let Self { mmu, vcpu, block, .. } = self;
        let before = live();
        let reader = vcpu.walker();
        (0..MAX_OLD_MAPS).try_for_each(|n| create(&mmu, &block, SLOTS + n))?;
        let with = live();
        drop(reader);
        settle(&mmu);
        let retired = with - live();
        (MAX_OLD_MAPS..created).try_for_each(|n| create(&mmu, &block, SLOTS + n))?;
        settle(&mmu);
        Ok(Calm { retired, kept: live() - before })
    }
}

/// Bytes that a device's write leaves behind while a reader stands: no map is published, but each
/// call brings a read section of its own.
fn device() -> Result<f64, Failure> {
    let Setup { mmu, vcpu, .. } = Setup::new()?;
    let reader = vcpu.walker();
    let before = live();
    for write in 0..DEVICE_WRITES {
        check_eq("bytes written", mmu.write_phys(Gpa(0), &write.to_le_bytes()), 8)?;
    }
    let garbage = live() - before;
    drop(reader);
    Ok(garbage as f64 / DEVICE_WRITES as f64)
}

fn create(mmu: &Mmu, block: &Arc<AllocatedMemory>, slot: u64) -> Result<(), Failure> {
    let part = Part::new(Arc::clone(block), slot..slot + 1);
    let slot = SlotConfig::new(slot as u32, Gpa(BASE + slot * 2 * PAGE), part);
    mmu.create_slot(slot).map_err(Failure::in_step("slot"))
}

/// Frees what can be freed: until that has changed nothing for a while.
fn settle(mmu: &Mmu) {
    let (start, mut bytes, mut same) = (Instant::now(), live(), 0);
    while same < 16 && start.elapsed() < PATIENCE {
        mmu.maintain();
        let now = live();
        same = if now == bytes { same + 1 } else { 0 };
        bytes = now;
    }
}

/// M2.
#[derive(Debug)]
pub struct Garbage;

impl Row for Garbage {
    fn id(&self) -> &'static str {
        "M2"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["M2", "M2.left", "M2.device"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let storm = Setup::new()?.storm(effort.sample * 30)?;
        let calm = Setup::new()?.calm(storm.created)?;
        // The writer that waits has retired one map more; at the peak another is in the making, in two
        // copies of what changes.
        let each = calm.retired / MAX_OLD_MAPS as i64;
        let limit = calm.retired + 3 * each;
        let samples = Samples::from([("retired", vec![storm.garbage as f64])]);
        let what = "bytes not freed, a reader stands, slots are made";
        found.figure(
            Figure::plain("M2", what, &samples, "retired", "bytes")?
                .goal(Goal::AtMost(limit as f64))
                .detail("old_maps", json!(MAX_OLD_MAPS))
                .detail("retired_bytes_each", json!(each))
                .detail("slots_before", json!(SLOTS))
                .detail("slots_created", json!(storm.created))
                .detail("stopped_by_bench", json!(storm.garbage >= TOO_MUCH)),
        );
        let samples = Samples::from([("left", vec![(storm.kept - calm.kept) as f64])]);
        let what = "of these, once the reader has gone";
        found.figure(Figure::plain("M2.left", what, &samples, "left", "bytes")?);
        let samples = Samples::from([("a write", vec![device()?])]);
        let what = "bytes not freed of a device's write, a reader stands";
        let figure = Figure::plain("M2.device", what, &samples, "a write", "bytes")?;
        found.figure(figure.detail("writes", json!(DEVICE_WRITES)));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_waits_for_the_reader_and_not_longer() {
        let storm = Setup::new().unwrap().storm(Duration::from_millis(200)).unwrap();
        let calm = Setup::new().unwrap().calm(storm.created).unwrap();
        // A map has at least a pointer to each slot.
        assert!(storm.created > 1 && storm.garbage > (storm.created * SLOTS * 8) as i64);
        assert!(calm.retired > (MAX_OLD_MAPS * SLOTS * 8) as i64, "{calm:?}");
        assert!((storm.kept - calm.kept).abs() < calm.retired / 8, "{storm:?} {calm:?}");
    }
}
