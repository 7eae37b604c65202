// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU: the guest program's registers, its root, its queue, and the order in which they take effect.
//!
//! The guest program's registers live in [`KvmVcpu`] while it is outside. An entry gives the vCPU either the program's
//! state as it is, or a program for the stub whose last instruction loads it; which of the
//! two depends on the queue alone. So nothing of an entry that was broken off in the stub is lost or needed:
//! the next one starts from the same registers and the same queue.
//!
//! System calls of the vCPU's thread: `ioctl` on the vCPU (`KVM_RUN`; `KVM_GET_VCPU_EVENTS` after a kick;
//! the state calls when a vCPU is first run or has failed), and what the `kick` module names.
//!
//! `unsafe` here: the page shared with KVM.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, ThreadId};

use kvm_bindings as kb;
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::drain::{self, End, Job, Queue};
use super::kick::{self, KickState, Kicker};
use super::layout::{PAGE, sel};
use super::machine::{KvmMachine, Seat};
use super::region::VcpuPages;
use super::state::{code3, user_flags};
use super::{Downgrade, Exit, FailureKind, KvmError, stub};
use crate::regs::Regs;
use entry::{Back, Start};

const SYNC_REGS: u64 = kb::KVM_SYNC_X86_REGS as u64;
const SYNC_SREGS: u64 = kb::KVM_SYNC_X86_SREGS as u64;

mod entry;

/// One vCPU, owned by one thread at a time.
#[derive(Debug)]
pub struct KvmVcpu {
    // Dropped before the machine: it holds the VM open.
    kick: Arc<KickState>,
    machine: Arc<KvmMachine>,
    id: usize,
    /// Some until dropped.
    seat: Option<Seat>,
    pages: VcpuPages,
    thread: Option<(ThreadId, i32)>,
    regs: Regs,
    /// The guest program is in 64-bit mode, not in compatibility mode.
    long: bool,
    fs_base: u64,
    gs_base: u64,
    cr2: u64,
    root: u64,
    queue: Queue,
    program: Vec<u64>,
    /// The program in the queue page ends with `leave`.
    leaves: bool,
    /// KVM holds a state of ours: false at first and after a failure.
    live: bool,
    /// KVM did not take the special registers it was given last.
    stale: bool,
}

impl KvmVcpu {
    pub(super) fn new(
        machine: Arc<KvmMachine>,
        id: usize,
        seat: Seat,
        kick: Arc<KickState>,
    ) -> KvmVcpu {
        let pages = machine.region().vcpu(id);
        KvmVcpu {
            kick,
            machine,
            id,
            seat: Some(seat),
            pages,
            thread: None,
            regs: Regs::default(),
            long: true,
            fs_base: 0,
            gs_base: 0,
            cr2: 0,
            root: 0,
            queue: Queue::default(),
            program: Vec::new(),
            leaves: false,
            live: false,
            stale: false,
        }
    }

    /// This vCPU's number.
    #[must_use]
    pub fn id(&self) -> usize {
        self.id
    }

    /// The machine it belongs to.
    #[must_use]
    pub fn machine(&self) -> &Arc<KvmMachine> {
        &self.machine
    }

    /// The guest program's registers.
    #[must_use]
    pub fn regs(&self) -> Regs {
        self.regs
    }

    /// Sets the guest program's registers for the next entry. Of RFLAGS, only those a ring-3 program may
    /// have count; IF is always set.
    pub fn set_regs(&mut self, regs: &Regs) {
        self.regs = *regs;
        self.regs.rflags = user_flags(regs.rflags);
    }

    /// The bases of FS and GS.
    #[must_use]
    pub fn segment_bases(&self) -> (u64, u64) {
        (self.fs_base, self.gs_base)
    }

    /// Sets the bases of FS and GS for the next entry.
    ///
    /// # Errors
    ///
    /// [`KvmError::BadBase`] if one is not canonical; then neither is set.
    pub fn set_segment_bases(&mut self, fs: u64, gs: u64) -> Result<(), KvmError> {
        if let Some(base) = [fs, gs].into_iter().find(|&base| !is_canonical(base)) {
            return Err(KvmError::BadBase { base });
        }
        (self.fs_base, self.gs_base) = (fs, gs);
        Ok(())
    }

    /// Whether the guest program is in 32-bit (compatibility) mode, which it may enter and leave by a
    /// far jump.
    #[must_use]
    pub fn compatibility_mode(&self) -> bool {
        !self.long
    }

    /// Sets the mode of the next entry: 32-bit (compatibility) or 64-bit.
    pub fn set_compatibility_mode(&mut self, on: bool) {
        self.long = !on;
    }

    /// The root of the next entry: the machine address of a table frame that holds the
    /// [stub's entry](KvmMachine::stub_root_entry). The old root is not looked at any more.
    ///
    /// # Errors
    ///
    /// [`KvmError::BadRoot`] if it is not a frame of the arena.
    pub fn set_root(&mut self, root: u64) -> Result<(), KvmError> {
        if !self.machine.is_table(root) {
            return Err(KvmError::BadRoot { root });
        }
        self.root = root;
        Ok(())
    }

    /// The root of the next entry; 0 at first.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Queues a downgrade for the next entry. The queue is not bounded; one that exceeds
    /// [`queue_capacity`](Self::queue_capacity) takes several trips.
    ///
    /// # Errors
    ///
    /// [`KvmError::BadDowngrade`] if it names something outside the arena.
    pub fn push(&mut self, downgrade: Downgrade) -> Result<(), KvmError> {
        self.queue.push(downgrade, self.machine.tables().frames())
    }

    /// Leaf downgrades that are carried out without a trip to the VMM.
    #[must_use]
    pub fn queue_capacity(&self) -> usize {
        drain::CAPACITY
    }

    /// Downgrades not carried out yet.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// The generation acknowledged last.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.machine.acknowledged(self.id)
    }

    /// Something to make this vCPU leave the guest with.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        Kicker::new(&self.kick)
    }

    /// Carries out what is queued, acknowledges `generation`, then runs the guest program until something
    /// happens. With nothing queued, `generation` is acknowledged at once.
    ///
    /// # Errors
    ///
    /// [`KvmError::BadRoot`] if no root was set; [`KvmError::Call`] or [`KvmError::Signal`] if the
    /// vCPU cannot be set up. What happens in the guest is an [`Exit`], never an error.
    pub fn run(&mut self, generation: u64) -> Result<Exit, KvmError> {
        self.enter(generation, false)
    }

    /// Carries out what is queued and acknowledges `generation`, on the root that is set, without running the guest
    /// program: [`Exit::Drained`], or [`Exit::Interrupted`].
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn drain_only(&mut self, generation: u64) -> Result<Exit, KvmError> {
        self.enter(generation, true)
    }

    fn enter(&mut self, generation: u64, drain_only: bool) -> Result<Exit, KvmError> {
        if self.kick.pending() {
            self.kick.take();
            return Ok(Exit::Interrupted);
        }
        self.prepare()?;
        if !drain_only && !self.rip_is_canonical() {
            // What a jump there would have raised (SDM vol. 1, 3.3.7.1); no processor can be loaded
            // with such an instruction pointer.
            return Ok(Exit::Exception { vector: 13, error_code: Some(0), cr2: self.cr2 });
        }
        let must_pass_stub =
            !self.queue.is_empty() || drain_only && self.loaded_root() != self.root;
        if !must_pass_stub {
            self.acknowledge(generation);
            if drain_only {
                return Ok(Exit::Drained);
            }
            return Ok(match self.go(Start::User) {
                Back::Exit(exit) => exit,
                Back::Drained => self.fail(FailureKind::Exit { reason: kb::KVM_EXIT_HLT }),
            });
        }
        loop {
            let last = self.compose(generation, drain_only);
            match self.go(Start::Stub) {
                Back::Exit(exit) => return Ok(exit),
                Back::Drained => {}
            }
            self.queue.advance();
            if last && drain_only {
                return Ok(Exit::Drained);
            }
            // The last program comes back here only if it was interrupted.
            if last || self.kick.pending() {
                self.kick.take();
                return Ok(Exit::Interrupted);
            }
        }
    }

    /// Nothing was queued for this vCPU since it last drained, so it has nothing to do.
    fn acknowledge(&self, generation: u64) {
        self.word(self.pages.queue + stub::ACK_OFFSET).store(generation, Ordering::Release);
    }

    /// Writes the next program to the end of the queue page.
    fn compose(&mut self, generation: u64, drain_only: bool) -> bool {
        let job = Job {
            root: self.root,
            generation,
            rcx: self.regs.gpr[1],
            touch_frames: self.machine.trap().frame_touch_works,
        };
        let end = if drain_only {
            End::Exit
        } else {
            let r = &self.regs;
            let cs = u64::from(code3(self.long));
            let frame = [r.rip, cs, r.rflags, r.gpr[4], u64::from(sel::DATA3)];
            End::Leave { rax: r.gpr[0], frame }
        };
        let mut program = std::mem::take(&mut self.program);
        let last = self.queue.compose(&job, end, &mut program);
        let at = self.program_start(program.len());
        for (i, word) in program.iter().enumerate() {
            self.word(at + i as u64 * 8).store(*word, Ordering::Relaxed);
        }
        self.program = program;
        self.leaves = last && !drain_only;
        last
    }

    /// Makes the program under way end in the VMM.
    fn cut_short(&self) {
        if self.leaves {
            let leave = self.pages.queue + PAGE - stub::ACK_TAIL_WORDS * 8;
            self.word(leave).store(stub::exit(), Ordering::Relaxed);
        }
    }

    fn program_start(&self, words: usize) -> u64 {
        self.pages.queue + PAGE - words as u64 * 8
    }

    fn word(&self, va: u64) -> &std::sync::atomic::AtomicU64 {
        self.machine.region().word(va)
    }

    /// Sets KVM's state on first use, after a failure and on a new thread.
    fn prepare(&mut self) -> Result<(), KvmError> {
        if self.root == 0 {
            return Err(KvmError::BadRoot { root: 0 });
        }
        let current = thread::current().id();
        if self.thread.is_none_or(|(id, _)| id != current) {
            self.thread = Some((current, kick::adopt_thread()?));
        }
        if !self.live {
            let seat = self.seat.as_ref().expect("present until dropped");
            let s = self.machine.features().reset(
                &seat.fd,
                seat.xsave.as_deref(),
                &self.pages,
                self.root,
            )?;
            let run = self.kick.page().ptr();
            // SAFETY: this thread owns the vCPU and is not in KVM_RUN: nobody else accesses these fields.
            unsafe {
                (*run).request_interrupt_window = 0;
                (*run).kvm_valid_regs = SYNC_REGS | SYNC_SREGS;
                (*run).kvm_dirty_regs = 0;
                (*run).s.regs.sregs = s;
            }
            self.live = true;
        }
        Ok(())
    }

    fn rip_is_canonical(&self) -> bool {
        if self.long { is_canonical(self.regs.rip) } else { self.regs.rip >> 32 == 0 }
    }

    /// The special registers as KVM last told them.
    fn sregs(&mut self) -> &mut kvm_sregs {
        // SAFETY: as in `prepare`; initialised there. `&mut self` is held as long as the reference.
        unsafe { &mut (*self.kick.page().ptr()).s.regs.sregs }
    }

    fn kvm_regs(&mut self) -> &mut kvm_regs {
        // SAFETY: as in `sregs`; all bit patterns are valid.
        unsafe { &mut (*self.kick.page().ptr()).s.regs.regs }
    }

    /// The root in KVM's CR3.
    fn loaded_root(&mut self) -> u64 {
        self.sregs().cr3
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        if let Some(seat) = self.seat.take() {
            self.machine.give_back(self.id, seat);
        }
    }
}

/// Bits 63:47 of an address are equal where 4-level paging is on.
fn is_canonical(address: u64) -> bool {
    let high = (address as i64) >> 47;
    high == 0 || high == -1
}
