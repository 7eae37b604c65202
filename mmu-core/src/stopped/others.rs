// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What other threads do while one is stopped, and what may hold them up.

use super::cause::Cause::{self, *};
use super::scene::*;
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::memory::{Alias, DirtyMode, DirtyPage, SlotFlags};
use crate::paging::Access;

/// An operation of another thread.
pub struct Other {
    pub name: &'static str,
    /// What of the stopped thread it may wait for, in the order in which it meets it.
    pub waits_for: &'static [Cause],
    pub run: fn(&Scene),
}

impl Other {
    /// Whether it is one of those that wait for readers, vCPUs or each other anyway. These are not tried
    /// at every step.
    pub fn waits_often(&self) -> bool {
        [Reads, Inside, Map].iter().any(|cause| self.waits_for.contains(cause))
            && !self.waits_for.contains(&Frames)
    }
}

/// Faults: out of frames; the lists of their pages and tables; the look-up of a table; before a new
/// shadow of a guest table is used every processor must have heard of its protection; and the host's
/// pages.
const FAULT: &[Cause] = &[Frames, List, Shard, Inside, Away];
/// Changes of the memory map, which take something away.
const CHANGE: &[Cause] = &[Map, Away, Seats, Reads, List, Shard, Inside];

pub const OTHERS: &[Other] = &[
    Other {
        name: "a walk, a read",
        waits_for: &[],
        run: |scene| {
            let cpu = scene.cpu(1);
            cpu.vcpu().translate(Gva(NEAR), None).unwrap();
            cpu.vcpu().read(Gva(NEAR), &mut [0; 8], Access::read().user()).unwrap();
        },
    },
    Other {
        name: "an emulated write to memory",
        waits_for: &[],
        run: |scene| {
            let at = Gva(NEAR + 9 * PAGE_SIZE);
            scene.cpu(1).vcpu().write(at, &[1], Access::write().user()).unwrap();
        },
    },
    Other {
        name: "a fetch of code",
        waits_for: &[Patch],
        run: |scene| {
            let access = Access::execute().user();
            scene.cpu(1).vcpu().fetch(Gva(NEAR), &mut [0; 15], access).unwrap();
        },
    },
    Other {
        name: "a pin of a page",
        waits_for: &[Pins],
        run: |scene| {
            let page = scene.mmu.pin_page(Gpa(DATA + 11 * PAGE_SIZE), true).unwrap();
            page.write(0, &[1]).unwrap();
        },
    },
    Other {
        name: "a fault far away",
        waits_for: FAULT,
        run: |scene| {
            scene.access(2, NEAR + 13 * PAGE_SIZE, true);
            scene.access(2, NEXT, false);
        },
    },
    Other {
        name: "a fault that makes a block",
        waits_for: FAULT,
        run: |scene| scene.access(2, OTHER_HUGE, true),
    },
    Other {
        name: "a fault at the same address",
        waits_for: FAULT,
        run: |scene| scene.access(1, NEAR, true),
    },
    Other {
        name: "a fault in the same tables",
        waits_for: FAULT,
        run: |scene| scene.access(1, NEAR + 9 * PAGE_SIZE, true),
    },
    Other {
        name: "a fault in the same block",
        waits_for: FAULT,
        run: |scene| scene.access(1, HUGE + PAGE_SIZE, true),
    },
    Other {
        name: "a device's write to a guest table",
        waits_for: &[List],
        run: |scene| {
            let value = Scene::near_value(2).to_le_bytes();
            assert_eq!(scene.mmu.write_phys(scene.near_entry(2), &value), 8);
        },
    },
    Other { name: "a guest's own edit", waits_for: FAULT, run: |scene| edit_natively(scene, 1, 5) },
    Other {
        name: "an INVLPG",
        waits_for: &[List],
        run: |scene| scene.cpu(1).vcpu_mut().invlpg(Gva(NEAR + 2 * PAGE_SIZE)),
    },
    Other { name: "a flush", waits_for: &[List], run: |scene| scene.cpu(1).vcpu_mut().flush() },
    Other {
        name: "a root load and release",
        waits_for: FAULT,
        run: |scene| load_root(scene, 1, 1),
    },
    Other {
        name: "ageing",
        waits_for: &[List],
        run: |scene| {
            scene.mmu.clear_young(Scene::near_pages(), |_, _, _| ()).unwrap();
        },
    },
    Other { name: "a complete zap", waits_for: &[], run: |scene| scene.mmu.zap_all() },
    Other {
        name: "the end of zapped trees",
        waits_for: &[List, Shard],
        run: |scene| scene.mmu.maintain(),
    },
    Other {
        name: "a quota",
        waits_for: &[Seats, List, Shard],
        run: |scene| scene.mmu.set_nr_mmu_pages(None).unwrap(),
    },
    Other {
        name: "statistics",
        waits_for: &[Sums],
        run: |scene| {
            let _ = scene.mmu.stats();
        },
    },
    Other {
        name: "a vCPU that comes and goes",
        waits_for: &[Seats, Vcpus, Sums, Frames, List, Shard, Inside, Away],
        run: come_and_go,
    },
    Other { name: "an access to a device", waits_for: &[], run: |scene| scene.use_device(1) },
    Other { name: "a coalesced write", waits_for: &[], run: |scene| scene.coalesce(1) },
    Other {
        name: "a drain of the coalesced ring",
        waits_for: &[Drain, Cell],
        run: |scene| drop(scene.mmu.bus().coalesced().drain()),
    },
    Other { name: "a device that comes and goes", waits_for: &[Bus, Look], run: plug_and_unplug },
    Other {
        name: "the end of a device",
        waits_for: &[Bus, Look, Device],
        run: |scene| {
            // Unless it has ended before.
            if let Ok(removal) = scene.mmu.bus().remove(DEVICE) {
                removal.wait().unwrap();
            }
        },
    },
    Other { name: "a collection of a dirty ring", waits_for: &[Ring], run: collect },
    Other {
        name: "a harvest",
        // Readers, while the log's kind changes.
        waits_for: &[Pins, List, Inside, Reads],
        run: |scene| harvest(scene, LOGGED),
    },
    Other {
        name: "a harvest of dirty bits",
        waits_for: &[Pins, Reads, List, Inside],
        run: |scene| harvest(scene, DIRTY_BITS),
    },
    Other {
        name: "a reset of dirty pages",
        waits_for: &[List, Inside],
        run: |scene| reset(scene, 3),
    },
    Other {
        name: "a write-protection by the host",
        waits_for: &[Reads, List, Inside],
        run: |scene| scene.mmu.set_host_writable(Scene::near_pages(), false).unwrap(),
    },
    Other {
        name: "an invalidation",
        waits_for: &[Map, List, Inside],
        run: |scene| scene.mmu.invalidate(Scene::near_pages()).unwrap().end(),
    },
    Other {
        name: "a patch of code",
        waits_for: &[Map, List, Patch, Inside],
        run: |scene| {
            scene.mmu.patch_code(Gpa(DATA + 10 * PAGE_SIZE + 0x104), &[0; 8], &[0; 8]).unwrap();
        },
    },
    Other {
        name: "a new slot",
        waits_for: &[Map, Away, Seats],
        run: |scene| scene.mmu.create_slot(Scene::slot(8, 2 * ELSEWHERE)).unwrap(),
    },
    Other { name: "the end of a slot", waits_for: CHANGE, run: end_slot },
    Other {
        name: "a slot that moves",
        waits_for: CHANGE,
        run: |scene| move_slot(scene, 3 * ELSEWHERE),
    },
    Other {
        name: "a change of flags",
        waits_for: CHANGE,
        run: |scene| {
            let flags = SlotFlags { read_only: false, dirty: DirtyMode::WriteProtect };
            scene.mmu.set_slot_flags(FAR_SLOT, flags).unwrap();
        },
    },
    Other {
        name: "a new alias",
        waits_for: CHANGE,
        run: |scene| {
            let (base, target) = (Gpa(4 * ELSEWHERE), Gpa(FAR));
            let size = PAGES * PAGE_SIZE;
            scene.mmu.set_alias(Alias { number: 1, base, size, target }).unwrap();
        },
    },
    Other {
        name: "an APIC that moves",
        waits_for: CHANGE,
        run: |scene| {
            let page = Some(Gpa(DATA + 10 * PAGE_SIZE));
            scene.cpu(1).vcpu_mut().set_apic_page(page).unwrap();
        },
    },
    Other {
        name: "synchronize",
        waits_for: &[Reads, Inside],
        run: |scene| scene.mmu.synchronize().unwrap(),
    },
];

/// Takes a page that a ring has listed out of the log.
fn reset(scene: &Scene, page: u64) {
    scene.mmu.reset_dirty_pages(&[DirtyPage { slot: LOGGED, page }]).unwrap();
}
