// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Models of the log: run by `cargo loom`.

use super::*;

/// A log whose page 0 is dirty, or one that is disabled. Another thread changes a word and
/// marks; `harvest` says whether it saw the change.
fn model(enabled: bool, mark: fn(&DirtyLog), harvest: fn(&DirtyLog, &AtomicU64) -> bool) {
    loom::model(move || {
        let log = DirtyLog::new(PAGE_SIZE);
        if enabled {
            log.set_enabled(true);
            log.mark(0);
        }
        let state = Arc::new(AtomicU64::new(0));
        let writer = loom::thread::spawn({
            let (log, state) = (log.clone(), Arc::clone(&state));
            move || {
                state.store(1, Ordering::Relaxed);
                mark(&log);
            }
        });
        let seen = harvest(&log, &state);
        writer.join().unwrap();
        assert!(seen || log.is_dirty(0), "R13: neither seen by the harvest nor marked");
    });
}

fn harvest(log: &DirtyLog, state: &AtomicU64) -> bool {
    log.clear(0, u64::MAX);
    state.load(Ordering::Relaxed) == 1
}

#[test]
fn r13_mark_of_a_dirty_page_meets_a_harvest() {
    model(true, |log| _ = log.mark(0), harvest);
}

#[test]
fn r13_unpinned_mark_of_a_dirty_page_meets_a_harvest() {
    model(true, |log| log.mark_unpinned(0..1), harvest);
}

#[test]
fn r13_unpinned_mark_meets_the_start_of_logging() {
    model(
        false,
        |log| log.mark_unpinned(0..1),
        |log, state| {
            log.reset();
            log.set_enabled(true);
            state.load(Ordering::Relaxed) == 1
        },
    );
}
