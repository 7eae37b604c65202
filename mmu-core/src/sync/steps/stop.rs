// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stops a thread at one of its steps until it is let go.

use super::What;
use crate::sync::Backoff;
use core::cell::{Cell, RefCell};
use core::ops::{Deref, DerefMut};
use core::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};

/// A place in the sources.
pub(crate) type Place = &'static Location<'static>;

/// Where a thread was stopped, and what it held.
#[derive(Clone, Debug)]
pub(crate) struct Stopped {
    pub(crate) place: Place,
    /// What, and where it was taken.
    pub(crate) holds: Vec<(What, Place)>,
}

/// A thread's course through the steps of an operation.
#[derive(Default)]
pub(crate) struct Course {
    /// Stops when it comes to this place for the so-manieth time; the first is 1.
    stop_at: Option<(Place, u64)>,
    /// How often it has been there.
    visits: AtomicU64,
    /// Keeps the places of all steps.
    trace: Option<Mutex<Vec<Place>>>,
    /// Steps so far, and steps of waits for others.
    steps: AtomicU64,
    waits: AtomicU64,
    /// Who is let go if this thread waits for him.
    holder: Option<Holder>,
    /// The holder was let go.
    rescued: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

/// A stopped thread that another may wait for.
struct Holder {
    course: Arc<Course>,
    /// With more steps of waiting, or steps in all, the other does not get on.
    waits: u64,
    steps: u64,
}

#[derive(Default)]
struct State {
    stopped: Option<Stopped>,
    released: bool,
    over: bool,
}

std::thread_local! {
    static COURSE: RefCell<Option<Arc<Course>>> = const { RefCell::new(None) };
    static IS_SET: Cell<bool> = const { Cell::new(false) };
    static HOLDS: RefCell<Vec<(What, Place)>> = const { RefCell::new(Vec::new()) };
}

impl Course {
    /// Notes the places of all steps.
    pub(crate) fn traced() -> Self {
        Self { trace: Some(Mutex::default()), ..Self::default() }
    }

    /// Stops before the step at this place, when it comes there for the so-manieth time.
    pub(crate) fn to(place: Place, visit: u64) -> Self {
        Self { stop_at: Some((place, visit)), ..Self::default() }
    }

    /// Lets the holder go when this thread has made so many steps of waiting, or steps in all.
    pub(crate) fn rescued_by(waits: u64, steps: u64, course: Arc<Course>) -> Self {
        Self { holder: Some(Holder { course, waits, steps }), ..Self::default() }
    }

    /// Lets the holder go.
    pub(crate) fn rescue(&self) {
        self.rescued.store(true, Ordering::SeqCst);
        if let Some(holder) = &self.holder {
            holder.course.release();
        }
    }

    /// Whether the holder had to be let go.
    pub(crate) fn is_rescued(&self) -> bool {
        self.rescued.load(Ordering::SeqCst)
    }

    /// Runs an operation of this thread on the course.
    pub(crate) fn run<R>(self: &Arc<Self>, operation: impl FnOnce() -> R) -> R {
        struct End<'a>(&'a Course);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                IS_SET.set(false);
                COURSE.with(|course| course.borrow_mut().take());
                self.0.state.lock().unwrap().over = true;
                self.0.changed.notify_all();
            }
        }
        COURSE.with(|course| *course.borrow_mut() = Some(Arc::clone(self)));
        IS_SET.set(true);
        let _end = End(self);
        operation()
    }

    fn step(&self, place: Place) {
        let step = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(trace) = &self.trace {
            trace.lock().unwrap().push(place);
        }
        if self.holder.as_ref().is_some_and(|holder| step == holder.steps) {
            self.rescue();
        }
        let is_there = |(at, visit): (Place, u64)| {
            at == place && self.visits.fetch_add(1, Ordering::Relaxed) + 1 == visit
        };
        if self.stop_at.is_some_and(is_there) {
            let holds = HOLDS.with(|holds| holds.borrow().clone());
            let mut state = self.state.lock().unwrap();
            state.stopped = Some(Stopped { place, holds });
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |state| !state.released).unwrap());
        }
    }

    /// Waits until the thread has stopped; `None` if it came to the end without.
    pub(crate) fn wait(&self) -> Option<Stopped> {
        let state = self.state.lock().unwrap();
        let going = |state: &mut State| state.stopped.is_none() && !state.over;
        self.changed.wait_while(state, going).unwrap().stopped.clone()
    }

    /// Lets the thread go on.
    pub(crate) fn release(&self) {
        self.state.lock().unwrap().released = true;
        self.changed.notify_all();
    }

    /// The places of all steps.
    pub(crate) fn places(&self) -> Vec<Place> {
        self.trace.as_ref().map(|trace| trace.lock().unwrap().clone()).unwrap_or_default()
    }
}

fn course() -> Option<Arc<Course>> {
    IS_SET.get().then(|| COURSE.with(|course| course.borrow().clone()))?
}

/// A step at which this thread may be stopped.
#[track_caller]
pub(crate) fn point() {
    if let Some(course) = course() {
        course.step(Location::caller());
    }
}

/// A step of a wait for another thread; whether nobody else runs just now: the only other thread of the
/// test is stopped.
pub(crate) fn waits_in_vain() -> bool {
    course().is_some_and(|course| {
        let waits = course.waits.fetch_add(1, Ordering::Relaxed) + 1;
        if course.holder.as_ref().is_some_and(|holder| waits == holder.waits) {
            course.rescue();
        }
        course.holder.is_some() && !course.is_rescued()
    })
}

/// Says, while it lives, that this thread holds something.
#[derive(Debug)]
pub(crate) struct Held(What);

impl Held {
    #[track_caller]
    pub(crate) fn new(what: What) -> Self {
        let place = Location::caller();
        HOLDS.with(|holds| holds.borrow_mut().push((what, place)));
        Self(what)
    }

    /// For what is not released where it was taken.
    pub(crate) fn keep(self) {
        core::mem::forget(self);
    }

    /// The end of what was kept.
    pub(crate) fn end(what: What) {
        HOLDS.with(|holds| {
            let mut holds = holds.borrow_mut();
            if let Some(at) = holds.iter().rposition(|(held, _)| *held == what) {
                holds.remove(at);
            }
        });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        Self::end(self.0);
    }
}

/// A locked mutex of the facade.
struct Locked<'m, T> {
    guard: MutexGuard<'m, T>,
    // After the guard: what is held is held at least as long.
    _held: Held,
}

impl<T> Deref for Locked<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// The facade's `lock`, whose waits are seen.
#[track_caller]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> impl DerefMut<Target = T> + '_ {
    point();
    let mut backoff = Backoff::default();
    let guard = loop {
        match mutex.try_lock() {
            Ok(guard) => break guard,
            Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => backoff.wait(),
        }
    };
    let locked = Locked { guard, _held: Held::new(What::Lock(core::any::type_name::<T>())) };
    point();
    locked
}
