// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations in the middle of which a thread is stopped.

use super::scene::*;
use crate::MIN_TABLE_FRAMES;
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::memory::{Alias, DirtyMode, DirtyPage};
use crate::paging::Access;
use crate::shadow::PageRange;

/// An operation that is stopped.
pub struct Operation {
    pub name: &'static str,
    /// Table frames of the VM.
    pub frames: u64,
    /// Whether all of them are in use then.
    pub short: bool,
    pub before: fn(&Scene),
    pub run: fn(&Scene),
}

const OPERATION: Operation =
    Operation { name: "", frames: 256, short: false, before: Scene::warm, run: |_| () };

pub const OPERATIONS: &[Operation] = &[
    Operation {
        name: "a fault that makes every table",
        before: |_| (),
        run: |scene| scene.fault(0, NEAR, Access::write()),
        ..OPERATION
    },
    Operation {
        name: "a fault that makes an entry",
        // Where the one in the same tables is.
        run: |scene| scene.fault(0, NEAR + 9 * PAGE_SIZE, Access::read()),
        ..OPERATION
    },
    Operation {
        name: "a fault that maps around",
        before: |scene| {
            scene.warm();
            scene.mmu.zap_all();
            scene.access(0, NEXT + PAGE_SIZE, false);
        },
        run: |scene| scene.fault(0, NEAR + 2 * PAGE_SIZE, Access::read()),
        ..OPERATION
    },
    Operation {
        name: "a write fault that widens an entry",
        run: |scene| scene.fault(0, NEAR + PAGE_SIZE, Access::write()),
        ..OPERATION
    },
    Operation {
        name: "a write fault that repairs an entry",
        before: |scene| {
            scene.warm();
            harvest(scene, LOGGED);
        },
        run: |scene| scene.fault(0, NEAR, Access::write()),
        ..OPERATION
    },
    Operation {
        name: "a fault that makes a block",
        before: |_| (),
        run: |scene| scene.fault(0, HUGE, Access::write()),
        ..OPERATION
    },
    Operation {
        name: "a fault on a table in a block",
        before: |scene| {
            scene.access(0, HUGE, true);
            scene.warm();
        },
        run: |scene| scene.fault(0, IN_BLOCK, Access::read()),
        ..OPERATION
    },
    Operation {
        name: "a fault short of frames",
        frames: MIN_TABLE_FRAMES,
        short: true,
        before: Scene::crowd,
        run: |scene| scene.fault(0, Scene::many(REGIONS - 1), Access::read()),
    },
    Operation {
        name: "a walk while frames are short",
        frames: MIN_TABLE_FRAMES,
        short: true,
        before: Scene::crowd,
        run: |scene| {
            scene.cpu(0).vcpu().translate(Gva(NEAR), None).unwrap();
        },
    },
    Operation {
        name: "an emulated write to a guest table",
        run: |scene| {
            let value = Scene::near_value(2).to_le_bytes();
            scene.cpu(0).vcpu().write(Gva(TABLE + 2 * 8), &value, Access::write().user()).unwrap();
        },
        ..OPERATION
    },
    Operation {
        name: "a locked write to a guest table",
        run: |scene| {
            let cpu = scene.cpu(0);
            let mut bytes = [0; 8];
            let at = Gva(TABLE + 2 * 8);
            cpu.vcpu().read(at, &mut bytes, Access::read().user()).unwrap();
            let (old, new) = (u64::from_le_bytes(bytes), Scene::near_value(2));
            // Another thread's walk may have set a bit meanwhile.
            let access = Access::write().user();
            let _ = cpu.vcpu().cmpxchg(at, 8, old.into(), new.into(), access).unwrap();
        },
        ..OPERATION
    },
    Operation {
        name: "a device's write to a guest table",
        run: |scene| scene.write(scene.near_entry(2).0, Scene::near_value(2)),
        ..OPERATION
    },
    Operation {
        name: "a fault that lets a table be written",
        run: |scene| scene.fault(0, TABLE, Access::write()),
        ..OPERATION
    },
    Operation {
        name: "a guest's own edit",
        before: |scene| {
            scene.warm();
            edit_natively(scene, 0, 3);
        },
        run: |scene| edit_natively(scene, 0, 2),
        ..OPERATION
    },
    Operation {
        name: "an INVLPG",
        before: |scene| {
            scene.warm();
            edit_natively(scene, 0, 3);
            // As the guest's own store, not invalidated yet.
            scene.cpu(0).session().store(Gva(TABLE + 2 * 8), &[0; 8], true).unwrap();
        },
        run: |scene| scene.cpu(0).vcpu_mut().invlpg(Gva(NEAR + 2 * PAGE_SIZE)),
        ..OPERATION
    },
    Operation {
        name: "flushes that settle a table",
        before: |scene| {
            scene.warm();
            edit_natively(scene, 0, 2);
        },
        run: |scene| (0..4).for_each(|_| scene.cpu(0).vcpu_mut().flush()),
        ..OPERATION
    },
    Operation {
        name: "a fault that links a written table",
        before: |scene| {
            scene.warm();
            edit_natively(scene, 0, 2);
            let link = scene.entry(0, NEAR, 2);
            let value = scene.read(link);
            scene.write(link, 0);
            scene.write(link, value);
        },
        run: |scene| scene.fault(0, NEAR, Access::read()),
        ..OPERATION
    },
    Operation {
        name: "an access inside the guest",
        run: |scene| scene.access(0, NEAR, true),
        ..OPERATION
    },
    Operation {
        name: "an emulator's accesses",
        run: |scene| {
            let (cpu, at) = (scene.cpu(0), Gva(NEAR + PAGE_SIZE - 4));
            cpu.vcpu().fetch(Gva(NEAR), &mut [0; 15], Access::execute().user()).unwrap();
            // Another thread may have forbidden it.
            if let Ok(pinned) = cpu.vcpu().pin(at, 8, Access::write().user()) {
                pinned.write(0, &[1; 8]).unwrap();
            }
        },
        ..OPERATION
    },
    Operation {
        name: "a patch of code",
        run: |scene| {
            // Another thread may have forbidden it.
            let _ = scene.mmu.patch_code(Gpa(DATA + 4), &[0; 8], &[0x90; 8]);
        },
        ..OPERATION
    },
    Operation {
        name: "a root load and release",
        before: |scene| {
            scene.warm();
            edit_natively(scene, 0, 2);
        },
        run: |scene| load_root(scene, 0, 1),
        ..OPERATION
    },
    Operation {
        name: "an entry that drains",
        before: |scene| {
            scene.warm();
            scene.write(scene.near_entry(2).0, Scene::near_value(2));
            scene.mmu.clear_young(Scene::near_pages(), |_, _, _| ()).unwrap();
        },
        run: |scene| scene.access(0, NEAR, false),
        ..OPERATION
    },
    Operation { name: "a harvest", run: |scene| harvest(scene, LOGGED), ..OPERATION },
    Operation {
        name: "a harvest of dirty bits",
        run: |scene| harvest(scene, DIRTY_BITS),
        ..OPERATION
    },
    Operation {
        name: "a reset of dirty pages",
        run: |scene| {
            let pages = [0, 2, 4].map(|page| DirtyPage { slot: LOGGED, page });
            scene.mmu.reset_dirty_pages(&pages).unwrap();
        },
        ..OPERATION
    },
    Operation { name: "a collection of a dirty ring", run: collect, ..OPERATION },
    Operation {
        name: "a write-protection by the host",
        run: |scene| scene.mmu.set_host_writable(Scene::near_pages(), false).unwrap(),
        ..OPERATION
    },
    Operation {
        name: "an end of write-protection",
        run: |scene| {
            // Of the guest's first page table: its shadow goes.
            let range = PageRange::Guest { base: scene.near_entry(0), size: PAGE_SIZE };
            scene.mmu.set_host_writable(range, true).unwrap();
        },
        ..OPERATION
    },
    Operation {
        name: "ageing",
        run: |scene| {
            scene.mmu.clear_young(Scene::near_pages(), |_, _, _| ()).unwrap();
        },
        ..OPERATION
    },
    Operation {
        name: "a smaller quota",
        frames: FEW,
        short: true,
        before: |scene| {
            scene.mmu.set_nr_mmu_pages(FEW).unwrap();
            scene.crowd();
        },
        run: |scene| scene.mmu.set_nr_mmu_pages(MIN_TABLE_FRAMES).unwrap(),
    },
    Operation { name: "a complete zap", run: |scene| scene.mmu.zap_all(), ..OPERATION },
    Operation {
        name: "the end of zapped trees",
        before: |scene| {
            scene.warm();
            scene.mmu.zap_all();
        },
        run: |scene| scene.mmu.maintain(),
        ..OPERATION
    },
    Operation {
        name: "an invalidation",
        run: |scene| scene.mmu.invalidate(Scene::near_pages()).unwrap().end(),
        ..OPERATION
    },
    Operation {
        name: "a new slot",
        run: |scene| scene.mmu.create_slot(Scene::slot(9, ELSEWHERE)).unwrap(),
        ..OPERATION
    },
    Operation { name: "the end of a slot", run: end_slot, ..OPERATION },
    Operation { name: "a slot that moves", run: |scene| move_slot(scene, ELSEWHERE), ..OPERATION },
    Operation {
        name: "a change of flags",
        run: |scene| scene.log_by(LOGGED, DirtyMode::DirtyBits),
        ..OPERATION
    },
    Operation {
        name: "a log over a block",
        before: |scene| scene.access(0, HUGE, true),
        run: |scene| scene.log_by(BLOCK_SLOT, DirtyMode::WriteProtect),
        ..OPERATION
    },
    Operation {
        name: "an end of the log of a block",
        before: |scene| {
            scene.log_by(BLOCK_SLOT, DirtyMode::WriteProtect);
            scene.access(0, HUGE, true);
        },
        run: |scene| scene.log_by(BLOCK_SLOT, DirtyMode::Off),
        ..OPERATION
    },
    Operation {
        name: "a new alias",
        run: |scene| {
            let (base, target) = (Gpa(ELSEWHERE), Gpa(FAR));
            let size = PAGES * PAGE_SIZE;
            scene.mmu.set_alias(Alias { number: 0, base, size, target }).unwrap();
        },
        ..OPERATION
    },
    Operation {
        name: "an APIC that moves",
        run: |scene| {
            let page = Some(Gpa(DATA + 9 * PAGE_SIZE));
            scene.cpu(0).vcpu_mut().set_apic_page(page).unwrap();
        },
        ..OPERATION
    },
    Operation { name: "a vCPU that comes and goes", run: come_and_go, ..OPERATION },
    Operation {
        name: "statistics",
        run: |scene| {
            let _ = scene.mmu.stats();
        },
        ..OPERATION
    },
    Operation { name: "an access to a device", run: |scene| scene.use_device(0), ..OPERATION },
    Operation { name: "a coalesced write", run: |scene| scene.coalesce(0), ..OPERATION },
    Operation {
        name: "a drain of the coalesced ring",
        before: |scene| (0..3).for_each(|_| scene.coalesce(0)),
        run: |scene| drop(scene.mmu.bus().coalesced().drain()),
        ..OPERATION
    },
    Operation { name: "a device that comes and goes", run: plug_and_unplug, ..OPERATION },
];
