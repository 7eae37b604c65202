// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages at which local APICs answer: accesses to them come out of the guest.
//!
//! The shadow is shared, so that no vCPU may have such a page mapped as long as one of them has its APIC
//! there. (KVM's `kvm_faultin_pfn` goes to emulation for its APIC page, too, unless the processor
//! virtualises it.) The frames are part of the memory map: a fault that maps the page is one by an
//! older map, and has ended when the page is taken away (R8).

use super::Engine;
use crate::addr::Gfn;
use crate::sync::{WouldDeadlock, lock, rule};
use std::sync::Arc;

impl Engine {
    /// A vCPU's APIC answers at `to` and no longer at `from`. When this returns, no processor reaches
    /// memory at `to`.
    pub(crate) fn move_apic(
        &self,
        from: Option<Gfn>,
        to: Option<Gfn>,
    ) -> Result<(), WouldDeadlock> {
        self.change(Err, |handle| {
            self.forget_apic(from);
            lock(&self.apics).extend(to);
            let (map, apics) = (self.memory.snapshot(), self.apic_frames());
            if map.apics() == &*apics {
                return Ok(());
            }
            let page = to.filter(|to| !map.apics().contains(to)).and_then(|to| map.page(to));
            let mut next = map.renewed();
            next.set_apics(apics);
            self.publish(next, handle);
            let Some(page) = page else { return Ok(()) };
            // R08, as in `delete_slot`: faults by older maps have ended after this.
            if rule!(R08) {
                self.wait_for_readers(handle);
            }
            let pages = page.index..page.index + 1;
            let settled = self.for_mapped(page.slot, pages, handle, |guard, page, narrowing| {
                self.drop_mappings(guard, page, narrowing);
            });
            self.wait_acknowledged(settled);
            Ok(())
        })
    }

    /// A vCPU that had its APIC there is gone, or has moved it. Waits for nobody: the next map will
    /// not have it.
    pub(crate) fn forget_apic(&self, frame: Option<Gfn>) {
        let Some(frame) = frame else { return };
        let mut apics = lock(&self.apics);
        if let Some(place) = apics.iter().position(|known| *known == frame) {
            apics.swap_remove(place);
        }
    }

    /// The frames, each once, in order.
    pub(super) fn apic_frames(&self) -> Arc<[Gfn]> {
        let mut frames = lock(&self.apics).clone();
        frames.sort_unstable();
        frames.dedup();
        frames.into()
    }
}
