// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual processor: its registers, its roots, its flushes, and the accesses that an
//! instruction emulator makes on its behalf.
//!
//! A [`Vcpu`] belongs to one thread at a time. It is *outside* the guest except between
//! [`Vcpu::enter`] and [`Vcpu::leave`]; other threads wait for it to drain only while it is inside.
//!
//! # Registers, flushes and entries
//!
//! | here | in KVM | waits for |
//! | --- | --- | --- |
//! | [`Vcpu::set_cr0`], [`Vcpu::set_cr3`], [`Vcpu::set_cr4`], [`Vcpu::set_efer`], [`Vcpu::set_regs`] | `kvm_set_cr0` and its siblings, `load_pdptrs`, KVM_SET_SREGS | nobody |
//! | [`Vcpu::invlpg`], [`Vcpu::invpcid`], [`Vcpu::flush`] | `kvm_mmu_invlpg`, `kvm_handle_invpcid`, `kvm_mmu_sync_roots` | nobody |
//! | [`Vcpu::reset_context`], [`Vcpu::invalidate`] | `kvm_mmu_reset_context`, KVM_REQ_TLB_FLUSH_GUEST | nobody |
//! | [`Vcpu::translate`], [`Vcpu::walker`] | `kvm_translate_gpa`, KVM_TRANSLATE | nobody |
//! | [`Vcpu::fault`] | `kvm_mmu_page_fault` | nobody, but for a spin on the list of one guest page or table; else it returns a [`Stall`] |
//! | [`Vcpu::must_wait`] | | nobody: it is polled |
//! | [`Vcpu::enter`], [`Vcpu::leave`], [`Vcpu::drain`], [`Vcpu::drained`] | `vcpu_enter_guest`, `kvm_mmu_reload` | nobody; a root that cannot be made yet is a [`Stall`] |
//! | [`Vcpu::set_dirty_ring`] | KVM_CAP_DIRTY_LOG_RING | nobody |
//! | [`Vcpu::set_apic_page`] | `vcpu_is_mmio_gpa`, `kvm_faultin_pfn` | changes of the memory map, host invalidations; readers and vCPUs inside the guest, if there is memory |
//!
//! All of them belong to the vCPU's thread. Of guest memory they read page-table entries, each as one,
//! and each of the four PDPTEs. Exceptions are results: a [`Fault`] has the vector, the error code and
//! what goes into CR2. To deliver it, a fault in the delivery included (#DF, then shutdown), is the VMM's.
//!
//! # The emulator's accesses
//!
//! | here | in KVM | where part of it is no memory |
//! | --- | --- | --- |
//! | [`Vcpu::read`] | `emulator_read_std` | an error |
//! | [`Vcpu::fetch`] | `kvm_fetch_guest_virt` | an error |
//! | [`Vcpu::write`] | `emulator_write_std` | an error |
//! | [`Vcpu::read_emulated`] | `emulator_read_emulated` | a [`Fragment`] |
//! | [`Vcpu::write_emulated`] | `emulator_write_emulated` | a [`Fragment`] |
//! | [`Vcpu::cmpxchg`] | `emulator_cmpxchg_emulated` | an error |
//! | [`Vcpu::pin`] | `gva_to_page` in `kvm_emulate_pio_string` | an error |
//! | [`Vcpu::patch_code`] | `kvm_fix_hypercall` | an error |
//! | [`Vcpu::view`]: a [`GuestView`] | | an error |
//!
//! An access may cross pages, and each page has a fate of its own. All are known before the first
//! byte is read or written, so an error means that nothing was; the fault is that of the first page
//! that has one, but an address that is not canonical comes before every page fault. (The processor,
//! too, checks all of an access before it stores any of it.) Accessed and dirty bits are set as by a
//! processor.
//!
//! Each aligned 8-byte word, or the part of it that an access has, is read or written as one: an
//! aligned access of 1, 2, 4 or 8 bytes is a single step with respect to every vCPU, hardware
//! ones included (SDM vol. 3, 9.1.1). The bytes beside a written part keep what others write to them
//! at the same time. A write is in the dirty log and in the vCPU's dirty ring, and if it hits a guest
//! page table that has a shadow, what was derived from it is dropped (R2). No access waits: a fetch
//! that meets a patch under way spins while two words are stored. [`Vcpu::patch_code`] itself waits for
//! changes of the memory map and for vCPUs inside the guest.

mod access;
mod roots;
mod soft;

pub use access::{AccessError, Fragment, GuestView, MAX_PINNED, PatchError, PinnedRange, Walker};
#[cfg(all(feature = "vm-memory", not(loom)))]
pub use access::{GuestVirtualMemory, NoBackend, Written};
pub(crate) use soft::SoftProcessor;
pub use soft::{Session, SoftExit, SoftVcpu};

use crate::addr::{Gfn, Gva, Machine};
use crate::memory::DirtyRing;
use crate::paging::{
    Access, BadPdptrs, BadRegisters, Fault, Illegal, Invpcid, PagingMode, Regs, Walk, bits,
    load_pdptrs,
};
use crate::shadow::{
    Context, Cursor, Downgrade, Engine, FaultInfo, FrameId, Generation, Outcome, Processor, Regime,
    Stall, VcpuState, request,
};
use crate::sync::{Backoff, lock, rule};
use core::fmt;
use roots::Recent;
use std::sync::Arc;

/// Why a vCPU, or new registers for it, were refused; an existing vCPU keeps the old ones.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// No processor accepts the combination.
    #[error(transparent)]
    Illegal(#[from] BadRegisters),
    /// The register write raises #GP(0).
    #[error(transparent)]
    Gp(#[from] Illegal),
    /// The walker follows this, the shadow does not yet.
    #[error(
        "{what} is not shadowed yet (CR0 {cr0:#x}, CR3 {cr3:#x}, CR4 {cr4:#x}, EFER {efer:#x})"
    )]
    Unsupported {
        /// What is not supported.
        what: &'static str,
        /// CR0 given.
        cr0: u64,
        /// CR3 given.
        cr3: u64,
        /// CR4 given.
        cr4: u64,
        /// EFER given.
        efer: u64,
    },
    /// The table memory is too small for another vCPU.
    #[error("the table memory is enough for {vcpus} vCPUs, which there are")]
    TooFewFrames {
        /// vCPUs that it is enough for.
        vcpus: usize,
    },
    /// The PDPTE registers cannot be loaded: #GP(0).
    #[error(transparent)]
    Pdptrs(#[from] BadPdptrs),
    /// The root table would lie in no memslot.
    #[error("CR3 {cr3:#x} points at no memslot")]
    RootOutside {
        /// CR3 given.
        cr3: u64,
    },
}

/// What [`Vcpu::enter`] decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The vCPU is inside: run it on this root.
    Run {
        /// Machine address of the root table. If it is not the one of the last entry, translations
        /// made under that one must go, as a processor drops them when it loads CR3.
        root: Machine,
        /// The generation that was handed out; [`Vcpu::drained`] once the processor has applied it.
        generation: Generation,
    },
    /// CR3 points at no memslot any more: a processor would shut down. The vCPU is outside.
    RootOutside,
    /// Somebody wants the thread back ([`VcpuHandle::request_exit`]). The vCPU is outside.
    Exit,
    /// The dirty ring has reached its soft limit ([`Vcpu::set_dirty_ring`]): pages must be collected
    /// first. The vCPU is outside.
    RingFull,
}

/// Another thread's hold on a vCPU.
#[derive(Clone, Debug)]
pub struct VcpuHandle(Arc<VcpuState>);

impl VcpuHandle {
    /// Makes the vCPU's next [`Vcpu::enter`] return [`Entry::Exit`], and kicks it if it is inside.
    pub fn request_exit(&self) {
        self.0.request_exit();
    }
}

/// A virtual processor; in cache lines of its own, as it changes with each fault.
#[repr(align(128))]
pub struct Vcpu {
    engine: Arc<Engine>,
    state: Arc<VcpuState>,
    cursor: Cursor,
    context: Context,
    regs: Regs,
    mode: PagingMode,
    /// Roots in use, for the supervisor and for the user.
    roots: [Option<FrameId>; 2],
    recent: Recent,
    /// The root that the processor was last told to run on. It stays on it, for drains too, until
    /// it is told another: R19.
    loaded: Option<FrameId>,
    faults: u64,
    repeats: Repeats,
    /// Where its local APIC answers.
    apic: Option<Gfn>,
    /// The next entry drains.
    stale: bool,
    /// What is waited for, and how long already.
    stall: Option<Stall>,
    wait: Backoff,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("regs", &self.regs)
            .field("apic", &self.apic)
            .field("stall", &self.stall)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

impl Vcpu {
    pub(crate) fn new(
        engine: Arc<Engine>,
        processor: Arc<dyn Processor>,
        regs: Regs,
    ) -> Result<Self, VcpuError> {
        let Some(context) = engine.seat() else {
            return Err(VcpuError::TooFewFrames { vcpus: engine.most_vcpus() });
        };
        let mode = compile(&engine, &context, &regs).inspect_err(|_| engine.give_up(&context))?;
        let (state, cursor) = engine.flush.join(processor);
        Ok(Self {
            engine,
            state,
            cursor,
            context,
            regs,
            mode,
            roots: [None; 2],
            recent: Recent::default(),
            loaded: None,
            stale: false,
            stall: None,
            wait: Backoff::default(),
            faults: 0,
            repeats: Repeats::default(),
            apic: None,
        })
    }

    /// The registers that decide how addresses are translated.
    #[must_use]
    pub fn regs(&self) -> &Regs {
        &self.regs
    }

    /// Loads registers; translations made under the old ones are not used any more. The PDPTE registers
    /// are loaded as given. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`VcpuError`], which names the values; the old registers stay.
    pub fn set_regs(&mut self, regs: Regs) -> Result<(), VcpuError> {
        self.mode = compile(&self.engine, &self.context, &regs)?;
        self.release_roots();
        self.regs = regs;
        self.stale = true;
        Ok(())
    }

    /// MOV to CR0, or LMSW, CLTS. Reads each PDPTE that it loads as one; waits for nobody.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Gp`] where the processor raises #GP(0); the others where this engine cannot
    /// follow. The old value stays.
    pub fn set_cr0(&mut self, cr0: u64) -> Result<(), VcpuError> {
        let regs = self.regs.with_cr0(cr0)?;
        self.load_pdptrs(regs, self.regs.reloads_pdptrs(&regs))
    }

    /// MOV to CR3: another address space. Whether translations of its PCID are to be kept
    /// ([`Cr3Load::no_flush`](crate::paging::Cr3Load)) is a permission that the roots need not use:
    /// they are found again by their guest table and the registers. Reads each PDPTE that it loads as one;
    /// waits for nobody.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::set_cr0`]; [`VcpuError::RootOutside`] if the table lies in no memslot.
    pub fn set_cr3(&mut self, cr3: u64) -> Result<(), VcpuError> {
        let regs = self.regs.with_cr3(cr3)?.regs;
        self.load_pdptrs(regs, regs.is_pae())
    }

    /// Loads registers, and before that the PDPTE registers if `reload`s (SDM vol. 3, 5.4.1).
    fn load_pdptrs(&mut self, mut regs: Regs, reload: bool) -> Result<(), VcpuError> {
        if reload {
            let guard = self.context.handle.pin();
            let map = self.engine.memory.load(&guard);
            regs.pdptrs = load_pdptrs(map, &self.context.hint, &regs)?;
        }
        self.set_regs(regs)
    }

    /// MOV to CR4. Reads each PDPTE that it loads as one; waits for nobody.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::set_cr0`].
    pub fn set_cr4(&mut self, cr4: u64) -> Result<(), VcpuError> {
        let regs = self.regs.with_cr4(cr4)?;
        self.load_pdptrs(regs, self.regs.reloads_pdptrs(&regs))
    }

    /// WRMSR to IA32_EFER. Waits for nobody.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::set_cr0`].
    pub fn set_efer(&mut self, efer: u64) -> Result<(), VcpuError> {
        self.set_regs(self.regs.with_efer(efer)?)
    }

    /// INVLPG: what was derived for the address, from tables that the guest writes natively, is what
    /// they say now (SDM vol. 3, 5.10.4.1; KVM's `kvm_mmu_invlpg`). Waits for nobody; costs one load
    /// for each root where no table below it is written natively. A processor that does not carry out
    /// INVLPG itself on the shadow tables needs [`Vcpu::invalidate`] besides.
    pub fn invlpg(&mut self, gva: Gva) {
        // Tags do not count (SDM chapter 4): such an address is not canonical, and nothing happens.
        if let Ok(gva) = self.mode.linear_of(gva, Access::execute()) {
            for root in self.roots.into_iter().flatten() {
                self.engine.sync_address(&self.context, &self.state.stats, root, gva);
            }
        }
    }

    /// INVPCID, as [`Invpcid::decode`] understood it. Contexts other than the one in use are brought up
    /// to date when their CR3 is loaded, whether or not that load keeps their translations. Waits for nobody.
    pub fn invpcid(&mut self, what: Invpcid) {
        let current = match self.regs.cr4 & bits::CR4_PCIDE {
            0 => 0,
            _ => (self.regs.cr3 & bits::CR3_PCID) as u16,
        };
        match what {
            Invpcid::Address { pcid, gva } if pcid == current => self.invlpg(gva),
            Invpcid::Context { pcid } if pcid == current => self.flush(),
            Invpcid::Address { .. } | Invpcid::Context { .. } => {}
            Invpcid::All | Invpcid::AllButGlobal => self.flush(),
        }
    }

    /// Gives up the roots in use; the next entry or fault loads them again, up to date (KVM's
    /// `kvm_mmu_reset_context`). For what changes outside the registers how addresses are translated. Waits
    /// for nobody.
    pub fn reset_context(&mut self) {
        self.release_roots();
        self.stale = true;
    }

    /// As [`Vcpu::invlpg`] for all addresses (MOV to CR3 of the same value, a change of CR4.PGE). Waits for
    /// nobody.
    pub fn flush(&mut self) {
        for root in self.roots.into_iter().flatten() {
            self.engine.sync_root(&self.context, &self.state.stats, root);
        }
    }

    /// The guest has executed an invalidation (INVLPG, INVPCID, MOV to CR3) that the processor does not
    /// carry out itself on the shadow tables: the next entry hands out everything that was taken away
    /// until now, other vCPUs' edits included. A processor whose own invalidation reaches its
    /// translations, as the software vCPU's does, has no need of this.
    pub fn invalidate(&mut self) {
        self.stale = true;
    }

    /// Faults that [`Vcpu::fault`] was asked to serve so far.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults
    }

    /// Another thread's hold on this vCPU.
    #[must_use]
    pub fn handle(&self) -> VcpuHandle {
        VcpuHandle(Arc::clone(&self.state))
    }

    /// Serves a fault at `gva`. The vCPU must be outside.
    ///
    /// # Errors
    ///
    /// A [`Stall`]: wait with [`Vcpu::must_wait`], then try again.
    pub fn fault(&mut self, gva: Gva, access: Access) -> Result<Outcome, Stall> {
        self.leave();
        self.faults += 1;
        // Without its tag: what the shadow is indexed by.
        let gva = match self.mode.linear_of(gva, access) {
            Ok(linear) => linear,
            Err(fault) => {
                self.state.stats.pf_guest.bump();
                return Ok(Outcome::Guest(fault));
            }
        };
        let user = access.user && !access.implicit;
        loop {
            let root = self.root(user)?;
            let mode = &self.mode;
            let Some(root) = root else {
                // CR3 points at no memory any more: what the guest's walk makes of that.
                let guard = self.context.handle.pin();
                let map = self.engine.memory.load(&guard);
                match mode.walk(map, &self.context.hint, gva, access) {
                    Err(fault) => return Ok(Outcome::Guest(fault)),
                    // The memory is back.
                    Ok(_) => continue,
                }
            };
            let regime = Regime::of(&self.regs, user);
            let emulate = self.repeats.is_stuck(gva, access);
            let apic = self.apic;
            let info = FaultInfo { mode, regime, root, gva, access, emulate, apic };
            let outcome = self.engine.fault(&self.context, &self.state.stats, &info);
            self.stale |= self.context.relinked.take();
            let repaired = self.context.repaired.take();
            // What only waits has not been served.
            if outcome.is_ok() {
                self.repeats.count(repaired);
            }
            return outcome;
        }
    }

    /// The root for one privilege, loaded if need be; `None` if CR3 points at no memslot any more.
    fn root(&mut self, user: bool) -> Result<Option<FrameId>, Stall> {
        self.release_dead_roots();
        let held = &mut self.roots[usize::from(user)];
        if held.is_none() {
            let (engine, context) = (&self.engine, &self.context);
            let name = engine.name_of_root(&self.mode, Regime::of(&self.regs, user));
            let known = self.recent.find(&name);
            *held = match known.filter(|frame| engine.hold_again(context, *frame, name)) {
                Some(frame) => Some(frame),
                None => engine.load_root(context, &self.state.stats, name)?,
            };
            if let Some(root) = *held {
                // What a load of CR3 flushes.
                engine.sync_root(context, &self.state.stats, root);
                self.recent.remember(name, root);
                self.show_roots();
            }
        }
        Ok(self.roots[usize::from(user)])
    }

    /// Gives up dead roots of either privilege: their frames wait for it.
    fn release_dead_roots(&mut self) {
        let dead = self.roots.map(|held| held.filter(|root| !self.engine.is_current(*root)));
        for (held, dead) in self.roots.iter_mut().zip(dead) {
            if let Some(dead) = dead {
                self.engine.release_root(dead);
                *held = None;
            }
        }
        if dead != [None; 2] {
            self.show_roots();
        }
    }

    fn release_roots(&mut self) {
        for root in self.roots.iter_mut().filter_map(Option::take) {
            self.engine.release_root(root);
        }
        self.show_roots();
    }

    fn show_roots(&self) {
        self.state.show_roots([self.roots[0], self.roots[1], self.loaded]);
    }

    /// Whether the operation that stalled must wait on. Poll it outside the guest; a consumer
    /// whose processor remembers tables outside (unless [`Processor::forgets_outside`]) must let it
    /// drain inside between polls, without running guest code, so that two vCPUs that wait for each
    /// other get on. Waits for nobody itself.
    ///
    /// False also when the vCPU was asked to exit, which the next [`Vcpu::enter`] says: go back to that,
    /// rather than repeat what stalled.
    pub fn must_wait(&mut self, stall: Stall) -> bool {
        self.leave();
        if self.stall.replace(stall) != Some(stall) {
            self.wait = Backoff::default();
        }
        let kick = self.wait.is_milestone();
        self.wait.step();
        let wait = !self.cursor.must_exit()
            && match stall {
                Stall::Flush(generation) => !self.engine.flush.acknowledged(generation, kick),
                Stall::Frames(generation) => {
                    !self.engine.flush.drained(generation, kick)
                        || !self.engine.frames_are_back(&self.context, kick)
                }
                Stall::Invalidation(ended) => self.engine.invalidations_ended() == ended,
            };
        if !wait {
            self.stall = None;
        }
        wait
    }

    /// Lists each page that this vCPU dirties from now on, in slots whose log uses write-protection,
    /// when its bit in the log is set; `None` ends that. Pages that others dirty (devices, the host)
    /// are in the slots' logs alone.
    pub fn set_dirty_ring(&mut self, ring: Option<Arc<DirtyRing>>) {
        self.context.hint.set_ring(ring);
    }

    /// Prepares to run the guest at one privilege: handles requests, loads the root, hands
    /// what the processor must forget to `apply`, and marks the vCPU as inside.
    ///
    /// # Errors
    ///
    /// A [`Stall`], as in [`Vcpu::fault`].
    pub fn enter(&mut self, user: bool, mut apply: impl FnMut(Downgrade)) -> Result<Entry, Stall> {
        loop {
            let requests = self.cursor.take_requests();
            self.stale |= requests & request::FLUSH != 0;
            if requests & request::EXIT != 0 {
                return Ok(Entry::Exit);
            }
            if self.context.hint.ring().is_some_and(DirtyRing::is_soft_full) {
                return Ok(Entry::RingFull);
            }
            let Some(root) = self.root(user)? else { return Ok(Entry::RootOutside) };
            if self.stale {
                self.cursor.drain(&self.engine.flush, &mut apply);
                self.stale = false;
            }
            let generation = self.cursor.seen();
            // R19: a root that became obsolete before the generation that is acknowledged now must
            // not be run on.
            if rule!(R19) && !self.engine.is_current(root) {
                continue;
            }
            if self.cursor.enter() {
                if self.loaded != Some(root) {
                    self.engine.hold_root(root);
                    if let Some(old) = self.loaded.replace(root) {
                        self.engine.release_root(old);
                    }
                    self.show_roots();
                }
                return Ok(Entry::Run { root: self.engine.table_machine(root), generation });
            }
        }
    }

    /// Whether another thread waits for this vCPU. A thread that keeps its vCPU outside for long
    /// must look at this now and then and let the processor drain.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.cursor.has_requests()
    }

    /// Marks the vCPU as outside.
    pub fn leave(&mut self) {
        self.cursor.leave();
    }

    /// Hands out what the processor must forget without entering the guest, for a drain-only
    /// entry.
    pub fn drain(&mut self, apply: impl FnMut(Downgrade)) -> Generation {
        self.cursor.drain(&self.engine.flush, apply)
    }

    /// Says that the processor has forgotten, inside the guest, everything up to `generation`.
    pub fn drained(&mut self, generation: Generation) {
        self.cursor.drained_inside(generation);
    }

    /// Translates an address without touching the guest's accessed and dirty bits. With an access,
    /// its rights are checked. Waits for nobody.
    ///
    /// # Errors
    ///
    /// The [`Fault`] that the access would raise.
    pub fn translate(&self, gva: Gva, access: Option<Access>) -> Result<Walk, Fault> {
        let guard = self.context.handle.pin();
        let map = self.engine.memory.load(&guard);
        self.mode.translate(map, &self.context.hint, gva, access)
    }
}

/// The same fault, again and again (R25).
#[derive(Debug, Default)]
struct Repeats {
    last: Option<(Gva, Access)>,
    /// How often it was served, in repairs.
    times: u32,
}

impl Repeats {
    const MOST: u32 = if cfg!(loom) { 4 } else { 16 };
    /// What a fault that was served from the beginning on counts for. One that found its entry there but
    /// for W most often comes of a harvest of the log, and the access was made since the one before.
    const REPAIRS: u32 = if cfg!(loom) { 4 } else { 64 };

    /// Whether this fault came so often in a row that what it asks for is better emulated than mapped.
    fn is_stuck(&mut self, gva: Gva, access: Access) -> bool {
        if self.last.replace((gva, access)) != Some((gva, access)) {
            self.times = 0;
        }
        self.times >= (Self::MOST - 1) * Self::REPAIRS && rule!(R25)
    }

    /// The last fault was served, by a repair or from the beginning on.
    fn count(&mut self, repaired: bool) {
        let times = self.times + if repaired { 1 } else { Self::REPAIRS };
        self.times = if times < Self::MOST * Self::REPAIRS { times } else { 0 };
    }
}

/// Checks registers and compiles them.
fn compile(engine: &Engine, context: &Context, regs: &Regs) -> Result<PagingMode, VcpuError> {
    let mode = PagingMode::new(regs)?;
    let Regs { cr0, cr3, cr4, efer, .. } = *regs;
    let refused = [
        (mode.levels() > engine.levels(), "5-level paging on shadow tables of 4 levels"),
        (cr4 & (bits::CR4_PKE | bits::CR4_PKS) != 0, "protection keys"),
    ];
    if let Some((_, what)) = refused.into_iter().find(|(refused, _)| *refused) {
        return Err(VcpuError::Unsupported { what, cr0, cr3, cr4, efer });
    }
    let guard = context.handle.pin();
    match mode.root_is_inside(engine.memory.load(&guard)) {
        true => Ok(mode),
        false => Err(VcpuError::RootOutside { cr3 }),
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.leave();
        self.release_roots();
        if let Some(loaded) = self.loaded {
            self.engine.release_root(loaded);
        }
        self.engine.flush.leave(&self.state);
        self.engine.forget_apic(self.apic);
        self.engine.give_up(&self.context);
        lock(&self.engine.past).add(&self.state.stats);
    }
}
