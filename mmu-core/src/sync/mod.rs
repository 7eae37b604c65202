// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The only door to atomics, fences, epochs, arc-swap and the concurrent map.
//!
//! In a normal build these are the crates' own types. In a model build, `--cfg loom`, they are a
//! checker's, or stand-ins with the same operations, so that a model explores the code that ships. The
//! checker is loom, or with `--cfg shuttle` besides shuttle. Nothing outside this module names those
//! crates.
//!
//! | facade | normal build | model build |
//! | --- | --- | --- |
//! | atomics, [`fence`] | `core` | the checker's |
//! | `UnsafeCell` | `core` | loom's, in R15's name; with shuttle `core`'s |
//! | [`epoch`] | crossbeam-epoch | a checked stand-in, or crossbeam-epoch (over loom; shuttle does not see into it) |
//! | `ConcurrentMap` | dashmap | an ordered map under the checker's mutex |
//! | `Door` | arc-swap | a word of the checker's and an `Arc` |
//! | `Mutex` | `std` | the checker's |
//!
//! In unit tests atomics and mutexes are wrapped, so that a test can stop a thread between two of them
//! (`steps`).

mod chunks;
mod door;
pub mod epoch;
mod limbo;
mod map;
#[cfg(loom)]
pub mod rules;
mod sequence;
mod set;
pub(crate) mod steps;
mod threads;
mod wide;

pub(crate) use chunks::LazyArray;
/// In cache lines of its own: what some threads write while others use what lies beside it.
pub(crate) use crossbeam_utils::CachePadded;
pub(crate) use door::Door;
pub(crate) use limbo::{Life, Limbo, Published, Snapshot};
pub(crate) use map::ConcurrentMap;
pub(crate) use sequence::Sequence;
pub(crate) use set::LocationSet;
pub use threads::WouldDeadlock;
pub(crate) use threads::{Mark, thread_number, unique};
pub(crate) use wide::exchange_across;

pub use core::sync::atomic::Ordering;

#[cfg(not(any(loom, test)))]
pub use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::Mutex;
#[cfg(all(test, not(loom)))]
pub use steps::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, fence};

#[cfg(all(loom, not(shuttle)))]
pub(crate) use loom as checker;
#[cfg(all(loom, shuttle))]
pub(crate) use shuttle as checker;

#[cfg(loom)]
pub(crate) use checker::sync::Mutex;
#[cfg(loom)]
pub use checker::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, fence};

/// Atomics that no protocol rests on: hints and tallies, whose value only makes something cheaper or
/// earlier. Not loom's, so that they do not multiply what a model explores.
pub(crate) mod hint {
    pub(crate) use core::sync::atomic::{AtomicBool, AtomicU32};
}

/// Interior mutability whose every access the model checker sees. What is kept in one is the blocks of
/// lists, so two threads in one are a failure of R15, and reported as such.
#[cfg(all(loom, not(shuttle)))]
#[derive(Debug)]
pub(crate) struct UnsafeCell<T>(loom::cell::UnsafeCell<T>);

#[cfg(all(loom, not(shuttle)))]
impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::cell::UnsafeCell::new(value))
    }

    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        use std::panic::{AssertUnwindSafe, catch_unwind};
        // loom's check comes before the access. None of what `f` does is a step of the model, so that
        // nothing comes between.
        match catch_unwind(AssertUnwindSafe(|| self.0.with_mut(|at| at))) {
            Ok(at) => f(at),
            Err(_) => panic!("R15: two threads in one block of a list"),
        }
    }

    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

/// Interior mutability with loom's closure interface.
#[cfg(any(not(loom), shuttle))]
#[derive(Debug)]
pub(crate) struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

#[cfg(any(not(loom), shuttle))]
impl<T> UnsafeCell<T> {
    #[inline]
    pub(crate) const fn new(value: T) -> Self {
        Self(core::cell::UnsafeCell::new(value))
    }

    #[inline]
    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }

    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

/// Whether the rule is in force. Always, except in a model build whose model switched it off.
#[cfg(not(loom))]
macro_rules! rule {
    ($rule:ident) => {
        true
    };
}
#[cfg(loom)]
macro_rules! rule {
    ($rule:ident) => {{
        const { assert!($crate::sync::rules::has_switch(stringify!($rule))) };
        $crate::sync::rules::in_force(stringify!($rule))
    }};
}
pub(crate) use rule;

/// Locks, whether or not a panicking thread held the lock: every critical section in this crate
/// leaves its data consistent at each step.
#[cfg(not(all(test, not(loom))))]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> impl core::ops::DerefMut<Target = T> + '_ {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(all(test, not(loom)))]
pub(crate) use steps::lock;

/// One step of waiting for another thread's short critical section: spins a few times, then lets
/// the scheduler run the other thread.
#[derive(Debug, Default)]
pub(crate) struct Backoff(u32);

impl Backoff {
    const SPINS: u32 = 64;

    pub(crate) fn wait(&mut self) {
        #[cfg(loom)]
        checker::thread::yield_now();
        #[cfg(not(loom))]
        if steps::waits_in_vain() {
            // All others stand still.
        } else if self.0 < Self::SPINS {
            core::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
        self.step();
    }

    /// Counts a step of a wait whose waiting is done elsewhere.
    pub(crate) fn step(&mut self) {
        self.0 = self.0.saturating_add(1);
    }

    /// True at first, and then more and more rarely: when to kick those who are waited for.
    pub(crate) fn is_milestone(&self) -> bool {
        self.0 == 0 || self.0 > Self::SPINS && self.0.is_power_of_two()
    }

    /// Whether waiting has become slow, so that a caller who can do something else should.
    pub(crate) fn is_long(&self) -> bool {
        self.0 >= if cfg!(loom) { 1 } else { Self::SPINS }
    }
}
