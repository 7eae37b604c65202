// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who waits for a stopped thread: each operation is stopped before each of its steps in turn, and
//! each other operation is tried then (the table of `docs/protocols.md`).
//!
//! A step is an operation on an atomic of the facade, a mutex taken, or a look into the concurrent map
//! under its shard's lock. Of many steps at one place some are tried; `STOPPED_ALL=1` tries them all,
//! which takes hours. Whoever does not get on within a number of steps of waiting (no time is measured)
//! must be in the list (`waiters`), and must get on when the stopped thread does; whoever is in the list
//! must wait. After each, everybody comes to an end, and the audit must agree.

mod cause;
mod operations;
mod others;
mod scene;
mod waiters;

use crate::sync::steps::stop::{Course, Place, Stopped};
use cause::Cause;
use operations::{OPERATIONS, Operation};
use others::{OTHERS, Other};
use scene::Scene;
use std::collections::{BTreeMap, BTreeSet};
// Not the facade's: no steps of what is tried.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Scope, scope, sleep, spawn};
use std::time::{Duration, Instant};
use waiters::Waited;

/// More steps of waiting than any operation makes that nobody holds up: a fault spins some dozens of
/// times on another's reservation, and starts again some times.
const WAITS: u64 = 5_000;
/// More steps than any operation makes that gets on.
const STEPS: u64 = 3_000_000;
/// A thread that does not come to its end for so long is blocked in something that has no steps.
const BLOCKED: Duration = Duration::from_secs(60);
/// Steps at one place that are tried, unless all are.
const SAME: u64 = 3;

/// Whether the operation is stopped at every step.
fn tries_all() -> bool {
    std::env::var_os("STOPPED_ALL").is_some()
}

/// Where the operation is stopped: each place, and when it comes there for the so-manieth time: every
/// time, or the first, one in the middle and the last. (How many steps there are before that may differ
/// from run to run, as when a fault meets the end of a grace period.)
fn stops(places: &[Place]) -> Vec<(Place, u64)> {
    let mut visits: BTreeMap<Place, u64> = BTreeMap::new();
    for place in places {
        *visits.entry(place).or_default() += 1;
    }
    let few = |(place, visits): (Place, u64)| {
        let some = if visits <= SAME || tries_all() {
            (1..=visits).collect()
        } else {
            vec![1, visits / 2, visits]
        };
        some.into_iter().map(move |visit| (place, visit))
    };
    visits.into_iter().flat_map(few).collect()
}

/// Lets the stopped thread go when another is blocked where no step is counted.
struct Watchdog {
    operation: &'static str,
    tried: Mutex<Option<(Instant, Arc<Course>)>>,
    is_over: AtomicBool,
}

impl Watchdog {
    fn runs<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        scope.spawn(|| {
            while !self.is_over.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(50));
                let tried = self.tried.lock().unwrap().clone();
                if let Some((since, course)) = tried.filter(|(since, _)| since.elapsed() > BLOCKED)
                {
                    course.rescue();
                    // The stopped thread goes on, and this one does not.
                    if since.elapsed() > 4 * BLOCKED {
                        eprintln!("{} hangs", self.operation);
                        std::process::abort();
                    }
                }
            }
        });
    }
}

/// One operation, and what is tried in the middle of it.
struct Trial<'t> {
    operation: &'t Operation,
    watchdog: &'t Watchdog,
}

impl Trial<'_> {
    /// Tries another operation on this thread while one is stopped; whether it got on before that did.
    fn try_other(&self, other: &Other, scene: &Scene, holder: &Arc<Course>) -> bool {
        let course = Arc::new(Course::rescued_by(WAITS, STEPS, Arc::clone(holder)));
        let watched = |what| *self.watchdog.tried.lock().unwrap() = what;
        watched(Some((Instant::now(), Arc::clone(&course))));
        course.run(|| (other.run)(scene));
        watched(None);
        !course.is_rescued()
    }

    /// Stops the operation before a step, and tries those of the others that `chosen` chooses,
    /// until one waits. Returns where that was, and who got on; `None` if the operation came to its end
    /// before that.
    fn stop(
        &self,
        (place, visit): (Place, u64),
        chosen: impl FnOnce(&Stopped) -> Vec<usize>,
    ) -> Option<(Stopped, Vec<(usize, bool)>)> {
        let Operation { name, frames, before, run, .. } = *self.operation;
        let scene = Arc::new(Scene::new(frames));
        before(&scene);
        let course = Arc::new(Course::to(place, visit));
        let thread = spawn({
            let (scene, course) = (Arc::clone(&scene), Arc::clone(&course));
            move || course.run(|| run(&scene))
        });
        let stopped = course.wait();
        let mut tried = Vec::new();
        for number in stopped.as_ref().map(chosen).unwrap_or_default() {
            let got_on = self.try_other(&OTHERS[number], &scene, &course);
            tried.push((number, got_on));
            if !got_on {
                break;
            }
        }
        course.release();
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let audit = scene.mmu.audit();
        audit.unwrap_or_else(|error| {
            panic!("{name}, visit {visit} of {place}, {stopped:?}: {error}")
        });
        Some((stopped?, tried))
    }

    /// Stops the operation everywhere; who has waited for what.
    fn run(&self) -> Waited {
        let operation = self.operation;
        let scene = Scene::new(operation.frames);
        (operation.before)(&scene);
        let course = Arc::new(Course::traced());
        course.run(|| (operation.run)(&scene));
        let places = course.places();
        drop(scene);
        let (stops, all) = (stops(&places), tries_all());
        let (mut waited, mut tries) = (Waited::new(), 0);
        // Others that wait often are tried where the place is new, or what is held; and of whom it is
        // known that he waits for who holds the same, he is not tried again.
        let (mut seen, mut known) = (BTreeSet::new(), BTreeSet::new());
        for &stop in &stops {
            let (mut next, mut is_new) = (0, None);
            while next < OTHERS.len() {
                let choose = |stopped: &Stopped| {
                    let causes = Cause::of(operation, stopped);
                    let is_new = *is_new
                        .get_or_insert_with(|| seen.insert((stopped.place, causes.clone())) || all);
                    let worth = |number: &usize| {
                        (is_new || !OTHERS[*number].waits_often())
                            && (all || !known.contains(&(causes.clone(), *number)))
                    };
                    (next..OTHERS.len()).filter(worth).collect()
                };
                let Some((stopped, tried)) = self.stop(stop, choose) else { break };
                let causes = Cause::of(operation, &stopped);
                tries += tried.len();
                next = OTHERS.len();
                for (number, _) in tried.into_iter().filter(|(_, got_on)| !got_on) {
                    let other = &OTHERS[number];
                    let cause = other.waits_for.iter().find(|cause| causes.contains(cause));
                    let cause = cause.unwrap_or_else(|| {
                        let (name, waits) = (operation.name, other.name);
                        let (place, visit) = stop;
                        panic!("{name}, visit {visit} of {place}, with {causes:?}: {waits} waits")
                    });
                    waited.entry(*cause).or_default().insert(other.name);
                    known.insert((causes.clone(), number));
                    next = number + 1;
                }
            }
        }
        println!("{}: {} of {} steps, {tries} tries", operation.name, stops.len(), places.len());
        waited
    }
}

/// Tries one operation, and compares who waited with the list.
fn check(operation: &Operation) {
    let (tried, is_over) = (Mutex::default(), AtomicBool::new(false));
    let watchdog = Watchdog { operation: operation.name, tried, is_over };
    let waited = scope(|s| {
        watchdog.runs(s);
        struct End<'w>(&'w Watchdog);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.is_over.store(true, Ordering::Relaxed);
            }
        }
        let _end = End(&watchdog);
        Trial { operation, watchdog: &watchdog }.run()
    });
    let name = operation.name;
    for (cause, others) in &waited {
        println!("    (\"{name}\", {cause:?}, &{:?}),", Vec::from_iter(others));
    }
    let listed = waiters::listed(name);
    assert!(
        waited.keys().eq(listed.keys()),
        "{name}: waited for {:?}, listed are {:?}",
        waited.keys(),
        listed.keys()
    );
    for (cause, others) in &waited {
        let listed = &listed[cause];
        let missing = Vec::from_iter(listed.difference(others));
        assert!(missing.is_empty(), "{name}, {cause:?}: {missing:?} do not wait any more");
        let allowed = waiters::allowed(*cause, listed);
        let more = Vec::from_iter(others.difference(&allowed));
        assert!(more.is_empty(), "{name}, {cause:?}: {more:?} wait");
    }
}

/// The documents have the table: a row for each cause, with who waits and in the middle of what.
#[test]
fn the_documents_say_who_waits() {
    const TEXT: &str = include_str!("../../docs/protocols.md");
    let section =
        TEXT.split("\n## ").find(|section| section.starts_with("Who waits for a stopped"));
    let lines = section.expect("the section is there").lines();
    let found: Vec<_> = lines.filter(|line| line.starts_with("| ")).skip(2).collect();
    let rows: Vec<_> = Cause::ALL.into_iter().map(waiters::row).collect();
    assert_eq!(found, rows, "the table should be\n{}", rows.join("\n"));
}

/// The name of the operation's test.
fn test_name(name: &str) -> String {
    name.to_lowercase().replace('\'', "").replace(['-', ' '], "_")
}

macro_rules! stopped {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            let is_this = |operation: &&Operation| test_name(operation.name) == stringify!($name);
            check(OPERATIONS.iter().find(is_this).expect("an operation"));
        })*

        #[test]
        fn every_operation_is_tried() {
            let tried = [$(stringify!($name)),*];
            let all = OPERATIONS.iter().all(|o| tried.contains(&&*test_name(o.name)));
            assert!(all && tried.len() == OPERATIONS.len());
        }
    };
}

stopped! {
    a_fault_that_makes_every_table
    a_fault_that_makes_an_entry
    a_fault_that_maps_around
    a_write_fault_that_widens_an_entry
    a_write_fault_that_repairs_an_entry
    a_fault_that_makes_a_block
    a_fault_on_a_table_in_a_block
    a_fault_short_of_frames
    a_walk_while_frames_are_short
    an_emulated_write_to_a_guest_table
    a_locked_write_to_a_guest_table
    a_devices_write_to_a_guest_table
    a_fault_that_lets_a_table_be_written
    a_guests_own_edit
    an_invlpg
    flushes_that_settle_a_table
    a_fault_that_links_a_written_table
    an_access_inside_the_guest
    an_emulators_accesses
    a_patch_of_code
    a_root_load_and_release
    an_entry_that_drains
    a_harvest
    a_harvest_of_dirty_bits
    a_reset_of_dirty_pages
    a_collection_of_a_dirty_ring
    a_write_protection_by_the_host
    an_end_of_write_protection
    ageing
    a_smaller_quota
    a_complete_zap
    the_end_of_zapped_trees
    an_invalidation
    a_new_slot
    the_end_of_a_slot
    a_slot_that_moves
    a_change_of_flags
    a_log_over_a_block
    an_end_of_the_log_of_a_block
    a_new_alias
    an_apic_that_moves
    a_vcpu_that_comes_and_goes
    statistics
    an_access_to_a_device
    a_coalesced_write
    a_drain_of_the_coalesced_ring
    a_device_that_comes_and_goes
}
