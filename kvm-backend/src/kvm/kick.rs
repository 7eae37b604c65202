// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Making a vCPU leave `KVM_RUN`, from any thread.
//!
//! A kick sets a flag, then `immediate_exit` in the page that the kernel shares, then sends a signal
//! if the vCPU's thread is in (or about to call) `KVM_RUN`.
//!
//! Guarantees:
//!
//! * *Not lost.* A thread stores its id, fences and calls `KVM_RUN`, which reads `immediate_exit`; a kicker
//!   stores `immediate_exit`, fences and reads the id. One of them sees the other (SeqCst fences), and a
//!   signal that arrives at any point after the id was stored ends `KVM_RUN`. The flag stays set
//!   until the vCPU reports [`Exit::Interrupted`](super::Exit::Interrupted).
//! * *Coalesced.* While the flag is set, further kicks send nothing. What a kicker stored before its kick is
//!   visible to the vCPU's thread after the `Interrupted` that answers it.
//! * *A stale kick is harmless*: at most one `Interrupted` without a reason.
//! * *Safe at any time.* A kicker holds no vCPU alive; once the vCPU is gone, a kick does nothing. A signal that
//!   comes too late meets a handler that does nothing and restarts system calls. `tgkill` names process and
//!   thread, so at worst another thread of this process runs that handler.
//!
//! System calls: the kicker's thread calls `tgkill`; the vCPU's thread calls `gettid` and
//! `rt_sigprocmask` when it changes; the first vCPU of a process calls `rt_sigaction`.
//!
//! `unsafe` here: the shared page (mmap of the vCPU's descriptor) and the signal calls.

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering, fence};
use std::sync::{Arc, OnceLock, Weak};

use kvm_bindings::kvm_run;

use super::KvmError;
use super::layout::PAGE;

/// The kick signal is `SIGRTMIN` plus this.
pub const KICK_SIGNAL_OFFSET: i32 = 4;

/// The first page of a vCPU's shared area: `struct kvm_run`.
#[derive(Debug)]
pub(super) struct RunPage(NonNull<kvm_run>);

const _: () = assert!(size_of::<kvm_run>() <= PAGE as usize);

// SAFETY: plain shared memory; the one field that two threads touch is accessed as an atomic, the
// others only by the thread that owns the vCPU.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of the vCPU with descriptor `fd`.
    pub(super) fn new(fd: RawFd) -> io::Result<RunPage> {
        // SAFETY: a fresh shared mapping of a vCPU's first page, at an address of the kernel's choice.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(raw.cast()).map(RunPage).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// The structure. Only the vCPU's thread may access fields through it, and never
    /// `immediate_exit`.
    pub(super) fn ptr(&self) -> *mut kvm_run {
        self.0.as_ptr()
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping, which lives as long as `self`; everybody in this
        // process accesses it as an atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: exactly the page mapped in `new`; the last owner is gone.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE as usize) };
    }
}

/// What a vCPU shares with those who kick it.
#[derive(Debug)]
pub(super) struct KickState {
    page: RunPage,
    kicked: AtomicBool,
    /// The thread in `KVM_RUN`, or 0.
    tid: AtomicI32,
}

impl KickState {
    pub(super) fn new(page: RunPage) -> KickState {
        KickState { page, kicked: AtomicBool::new(false), tid: AtomicI32::new(0) }
    }

    pub(super) fn page(&self) -> &RunPage {
        &self.page
    }

    /// To be called before `KVM_RUN`, with the caller's thread id.
    pub(super) fn begin(&self, tid: i32) {
        self.tid.store(tid, Ordering::Relaxed);
        // Pairs with the fence in `kick`.
        fence(Ordering::SeqCst);
    }

    /// To be called after `KVM_RUN`.
    pub(super) fn end(&self) {
        self.tid.store(0, Ordering::Release);
    }

    /// Whether a kick waits to be reported.
    pub(super) fn pending(&self) -> bool {
        self.kicked.load(Ordering::Relaxed)
    }

    /// Lets the next `KVM_RUN` enter although a kick is still to be reported: a new kick sends no
    /// signal meanwhile.
    pub(super) fn hold(&self) {
        self.page.immediate_exit().store(0, Ordering::Relaxed);
    }

    /// Makes the next `KVM_RUN` only complete what the last one left half done.
    pub(super) fn complete_only(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Ends all kicks so far, to report them. `immediate_exit` is cleared before the flag: a kicker that finds
    /// the flag clear sets `immediate_exit` after this.
    pub(super) fn take(&self) {
        self.page.immediate_exit().store(0, Ordering::SeqCst);
        self.kicked.swap(false, Ordering::AcqRel);
    }

    fn kick(&self) {
        if self.kicked.swap(true, Ordering::AcqRel) {
            return;
        }
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        // Pairs with the fence in `begin`.
        fence(Ordering::SeqCst);
        let tid = self.tid.load(Ordering::Relaxed);
        if tid != 0 {
            // SAFETY: no memory is touched. The thread may be gone or (in theory) its id in use
            // by another thread of this process: then nothing or a handler without effect.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal()) };
        }
    }
}

/// Makes one vCPU leave the guest. See the module's guarantees.
#[derive(Clone, Debug)]
pub struct Kicker(Weak<KickState>);

impl Kicker {
    pub(super) fn new(state: &Arc<KickState>) -> Kicker {
        Kicker(Arc::downgrade(state))
    }

    /// The vCPU's `run` that is under way, or else its next one, returns
    /// [`Exit::Interrupted`](super::Exit::Interrupted) soon (an exception that is just being
    /// delivered is returned first). Never blocks; at most one system call.
    pub fn kick(&self) {
        if let Some(state) = self.0.upgrade() {
            state.kick();
        }
    }

    /// Whether the vCPU still exists.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() != 0
    }
}

/// The number of the kick signal.
#[must_use]
pub fn signal() -> i32 {
    libc::SIGRTMIN() + KICK_SIGNAL_OFFSET
}

extern "C" fn on_kick(_: i32) {}

/// Installs the handler, once per process. It only has to exist: the signal's arrival ends `KVM_RUN`.
pub(super) fn install_handler() -> Result<(), KvmError> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: `sigaction` is plain data for which all zeros is valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(i32) as usize;
        // System calls other than KVM_RUN (which never restarts) go on.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: valid signal number, valid action, a handler that touches nothing.
        let r = unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    });
    done.map_err(|error| KvmError::Signal {
        signal: signal(),
        error: io::Error::from_raw_os_error(error),
    })
}

/// Prepares the calling thread for kicks (the signal must not be blocked) and tells its id.
pub(super) fn adopt_thread() -> Result<i32, KvmError> {
    // SAFETY: the set is initialised by sigemptyset before use; the calls touch nothing else.
    let r = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if r != 0 {
        let error = io::Error::from_raw_os_error(r);
        return Err(KvmError::Signal { signal: signal(), error });
    }
    // SAFETY: no arguments, no memory.
    Ok(unsafe { libc::syscall(libc::SYS_gettid) } as i32)
}
