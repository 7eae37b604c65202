// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One entry into the guest, and the reading of what came back.
//!
//! What ends an entry, and what is then the guest program's state:
//!
//! | KVM says | privilege level | means | state |
//! | --- | --- | --- | --- |
//! | halted | 0, in a vector | exception of ring 3 | the frame on the stack page |
//! | halted | 0, at `syscall` | SYSCALL of ring 3 | rcx and r11 |
//! | halted | 0, at `exit` | this part of the drain is done | as before the entry |
//! | halted | 0, in the page-fault vector, at `syscall` in ring 3 | SYSCALL where KVM leaves the privilege level | rcx and r11 |
//! | interrupted | 3 | kick | KVM's registers |
//! | interrupted | 3, exception pending | kick during delivery | run on: the delivery enters a vector |
//! | interrupted | 0, in a vector | kick after delivery | as for halted |
//! | interrupted | 0, at `leave` | kick after a drain | as before the entry |
//! | interrupted | 0, elsewhere | kick during a drain | run on: the drain now ends with `exit` |
//! | MMIO | 3 | no slot, or a read-only one | KVM's registers, the access completed |
//! | `EFAULT` | 3 | the host lacks the memory | KVM's registers |
//!
//! Guarantee: whatever ends an entry, [`KvmVcpu`]'s registers and queue are such that the next one goes on from
//! there.
//!
//! `unsafe` here: the page shared with KVM, and the call of `KVM_RUN`.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use kvm_bindings as kb;
use kvm_bindings::kvm_regs;

use super::super::layout::sel;
use super::super::state::{self, code3, user_flags};
use super::super::{Exit, Failure, FailureKind, stub};
use super::{KvmVcpu, SYNC_REGS, SYNC_SREGS};
use crate::regs::Regs;

vmm_sys_util::ioctl_io_nr!(KVM_RUN, kb::KVMIO, 0x80);

/// What came back from `KVM_RUN`.
pub(super) enum Back {
    /// An exit, given to the caller as it is.
    Exit(Exit),
    /// A drain ended with `exit`.
    Drained,
}

/// Where an entry starts.
pub(super) enum Start {
    /// At the guest program's registers, in ring 3.
    User,
    /// In the stub, at the program in the queue page.
    Stub,
}

impl KvmVcpu {
    /// One entry.
    pub(super) fn go(&mut self, start: Start) -> Back {
        let mut dirty = SYNC_REGS;
        let r = self.regs;
        let (rip, rsp, rflags) = match start {
            Start::User => (r.rip, r.gpr[4], r.rflags),
            Start::Stub => {
                let at = self.program_start(self.program.len());
                (self.program[0], at + 8, 2)
            }
        };
        let (root, long, bases) = (self.root, self.long, (self.fs_base, self.gs_base));
        let stale = std::mem::take(&mut self.stale);
        let s = self.sregs();
        let want = match start {
            Start::User => code3(long),
            Start::Stub => sel::CODE0,
        };
        if stale || s.cs.selector != want || s.cr3 != root || (s.fs.base, s.gs.base) != bases {
            match start {
                Start::User => state::ring3(s, long),
                Start::Stub => state::ring0(s),
            }
            s.cr3 = root;
            (s.fs.base, s.gs.base) = bases;
            dirty |= SYNC_SREGS;
        }
        *self.kvm_regs() = to_kvm(&r, rip, rsp, rflags);
        // SAFETY: as in `prepare`.
        unsafe { (*self.kick.page().ptr()).kvm_dirty_regs = dirty };
        self.resume(start)
    }

    /// `KVM_RUN` until there is something to tell.
    fn resume(&mut self, start: Start) -> Back {
        loop {
            let result = self.kvm_run();
            let run = self.kick.page().ptr();
            // SAFETY: as in `prepare`.
            let (reason, dirty) = unsafe { ((*run).exit_reason, (*run).kvm_dirty_regs) };
            let rip = self.kvm_regs().rip;
            let ring3 = self.sregs().cs.selector & 3 == 3;
            let vector = stub::vector_at(rip).filter(|_| !ring3);
            match (result, reason) {
                (Err(libc::EINTR), _) if dirty != 0 => {
                    // Left before it took the registers.
                    self.stale = true;
                    self.kick.take();
                    return Back::Exit(Exit::Interrupted);
                }
                (Err(libc::EINTR), _) if ring3 && self.exception_pending() => self.kick.hold(),
                (Ok(()), kb::KVM_EXIT_HLT) | (Err(libc::EINTR), _) if vector.is_some() => {
                    return Back::Exit(self.exception(vector.unwrap_or_default()));
                }
                (Ok(()), kb::KVM_EXIT_HLT) | (Err(libc::EINTR), _)
                    if !ring3 && rip.wrapping_sub(stub::syscall()) <= 1 =>
                {
                    return Back::Exit(self.syscall());
                }
                (Err(libc::EINTR), _) if !ring3 && !stub::has_drained(rip) => {
                    self.cut_short();
                    self.kick.hold();
                }
                (Err(libc::EINTR), _) => {
                    self.queue.advance();
                    if ring3 {
                        self.save();
                    }
                    self.kick.take();
                    return Back::Exit(Exit::Interrupted);
                }
                (Err(errno @ (libc::EFAULT | libc::EHWPOISON)), _) if ring3 && dirty == 0 => {
                    return Back::Exit(self.bad_memory(reason, errno));
                }
                (Err(errno), _) => return Back::Exit(self.fail(FailureKind::Call { errno })),
                (Ok(()), kb::KVM_EXIT_HLT)
                    if matches!(start, Start::Stub) && rip.wrapping_sub(stub::exit()) <= 1 =>
                {
                    return Back::Drained;
                }
                (Ok(()), kb::KVM_EXIT_INTR) => {}
                (Ok(()), kb::KVM_EXIT_MMIO) if ring3 => match self.mmio() {
                    Some(exit) => return Back::Exit(exit),
                    None => self.kick.hold(),
                },
                (Ok(()), reason) => return Back::Exit(self.unexpected(reason)),
            }
        }
    }

    /// Takes the guest program's state from KVM: it was in ring 3.
    fn save(&mut self) {
        self.regs = from_kvm(self.kvm_regs());
        self.save_segments();
        self.long = self.sregs().cs.selector != sel::CODE3_32;
    }

    fn save_segments(&mut self) {
        let s = self.sregs();
        (self.fs_base, self.gs_base) = (s.fs.base, s.gs.base);
    }

    /// The vCPU stands at the target of `syscall`.
    fn syscall(&mut self) -> Exit {
        self.queue.advance();
        let long = self.long;
        self.save();
        self.long = long;
        self.after_syscall()
    }

    /// The registers are those at the target of `syscall`: goes back to those after the instruction.
    fn after_syscall(&mut self) -> Exit {
        self.regs.rip = self.regs.gpr[1];
        self.regs.rflags = user_flags(self.regs.gpr[11]);
        Exit::Syscall
    }

    fn bad_memory(&mut self, reason: u32, errno: i32) -> Exit {
        self.queue.advance();
        self.save();
        let run = self.kick.page().ptr();
        // SAFETY: as in `prepare`; the member of the union that belongs to the exit reason.
        let machine = (reason == kb::KVM_EXIT_MEMORY_FAULT)
            .then(|| unsafe { (*run).__bindgen_anon_1.memory_fault.gpa });
        Exit::BadMemory { machine, errno }
    }

    /// Completes an access that no memory slot took. None if an exception is to be delivered first.
    fn mmio(&mut self) -> Option<Exit> {
        let run = self.kick.page().ptr();
        // SAFETY: as in `prepare`; the member of the union that belongs to the exit reason.
        let first = unsafe { (*run).__bindgen_anon_1.mmio };
        loop {
            // SAFETY: as above.
            unsafe { (*run).__bindgen_anon_1.mmio.data = [0xff; 8] };
            self.kick.complete_only();
            let result = self.kvm_run();
            // SAFETY: as in `prepare`.
            let reason = unsafe { (*run).exit_reason };
            match (result, reason) {
                // An access across pages is one exit for each.
                (Ok(()), kb::KVM_EXIT_MMIO) => {}
                (Err(libc::EINTR), _) => break,
                (Ok(()), reason) => return Some(self.unexpected(reason)),
                (Err(errno), _) => return Some(self.fail(FailureKind::Call { errno })),
            }
        }
        if self.exception_pending() {
            return None;
        }
        // A kick meanwhile is reported by the next entry.
        self.kick.hold();
        self.queue.advance();
        self.save();
        let write = (first.is_write != 0).then(|| {
            let bytes = (first.len as usize).min(8);
            let mut value = [0; 8];
            value[..bytes].copy_from_slice(&first.data[..bytes]);
            u64::from_le_bytes(value)
        });
        Some(Exit::Mmio { machine: first.phys_addr, len: first.len, write })
    }

    fn kvm_run(&mut self) -> Result<(), i32> {
        let tid = self.thread.map_or(0, |(_, tid)| tid);
        let fd = self.seat.as_ref().expect("present until dropped").fd.as_raw_fd();
        self.kick.begin(tid);
        // SAFETY: KVM_RUN on a vCPU's descriptor; it writes the shared page, to which no reference is
        // alive, and memory that was lent to the VM.
        let r = unsafe { libc::ioctl(fd, KVM_RUN(), 0) };
        let result = if r < 0 {
            Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
        } else {
            Ok(())
        };
        self.kick.end();
        result
    }

    /// After a kick in ring 3: whether an exception is on its way to the stub.
    fn exception_pending(&self) -> bool {
        let seat = self.seat.as_ref().expect("present until dropped");
        // If the question fails, running on would be right only sometimes, not running on too: it does not
        // fail on a live vCPU.
        seat.fd.get_vcpu_events().is_ok_and(|e| e.exception.injected | e.exception.pending != 0)
    }

    /// The vCPU stands in a vector: reads the frame that the processor pushed.
    fn exception(&mut self, vector: u8) -> Exit {
        let k = *self.kvm_regs();
        let cr2 = self.sregs().cr2;
        let top = if vector == 8 { self.pages.double_fault_top } else { self.pages.stack_top };
        let frame = |n: u64| self.word(top - n * 8).load(Ordering::Relaxed);
        let (rsp, rflags, cs, rip) = (frame(2), frame(3), frame(4), frame(5));
        let error_code = (top.wrapping_sub(k.rsp) == 48).then(|| frame(6) as u32);
        if cs & 3 != 3 || vector == 8 {
            self.live = false;
            let kind = FailureKind::Stub { vector, error_code };
            let failure = Failure { kind, rip, rsp, cs: cs as u16, cr2, cr3: self.root };
            return Exit::Failed(Box::new(failure));
        }
        self.queue.advance();
        self.cr2 = cr2;
        self.regs = from_kvm(&k);
        self.regs.rip = rip;
        self.regs.gpr[4] = rsp;
        self.regs.rflags = user_flags(rflags);
        self.long = cs as u16 != sel::CODE3_32;
        self.save_segments();
        if vector == 14 && rip == stub::syscall() && cr2 == rip {
            // A KVM that jumps without changing the privilege level.
            return self.after_syscall();
        }
        Exit::Exception { vector, error_code, cr2 }
    }

    fn unexpected(&mut self, reason: u32) -> Exit {
        let run = self.kick.page().ptr();
        // SAFETY: as in `prepare`; KVM filled the member of the union that belongs to the exit
        // reason, and all bit patterns are valid in any.
        let kind = unsafe {
            let u = &(*run).__bindgen_anon_1;
            match reason {
                kb::KVM_EXIT_SHUTDOWN => FailureKind::Shutdown,
                kb::KVM_EXIT_FAIL_ENTRY => {
                    FailureKind::EntryFailed { reason: u.fail_entry.hardware_entry_failure_reason }
                }
                kb::KVM_EXIT_INTERNAL_ERROR => FailureKind::Internal {
                    suberror: u.internal.suberror,
                    data: [u.internal.data[0], u.internal.data[1]],
                },
                _ => FailureKind::Exit { reason },
            }
        };
        self.fail(kind)
    }

    pub(super) fn fail(&mut self, kind: FailureKind) -> Exit {
        self.live = false;
        let k = *self.kvm_regs();
        let s = self.sregs();
        let (cs, cr2, cr3) = (s.cs.selector, s.cr2, s.cr3);
        Exit::Failed(Box::new(Failure { kind, rip: k.rip, rsp: k.rsp, cs, cr2, cr3 }))
    }
}

fn to_kvm(r: &Regs, rip: u64, rsp: u64, rflags: u64) -> kvm_regs {
    let [rax, rcx, rdx, rbx, _, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = r.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

fn from_kvm(k: &kvm_regs) -> Regs {
    Regs {
        gpr: [
            k.rax, k.rcx, k.rdx, k.rbx, k.rsp, k.rbp, k.rsi, k.rdi, k.r8, k.r9, k.r10, k.r11,
            k.r12, k.r13, k.r14, k.r15,
        ],
        rip: k.rip,
        rflags: user_flags(k.rflags),
    }
}
