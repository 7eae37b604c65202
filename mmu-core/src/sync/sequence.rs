// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Words that change together now and then, and are read together often.
//!
//! A reader that finds a writer at work, or finds that one was, reads again. What is counted is
//! whether anything was written, not what, so a writer that puts the old values back does not
//! deceive a reader.

use super::{AtomicU64, Backoff, Mutex, Ordering, fence, lock, rule};

/// Counts the steps of the writers: odd while one is at work.
#[derive(Debug)]
pub(crate) struct Sequence {
    steps: AtomicU64,
    writer: Mutex<()>,
}

impl Sequence {
    pub(crate) fn new() -> Self {
        Self { steps: AtomicU64::new(0), writer: Mutex::new(()) }
    }

    /// Stores words, atomics, with Relaxed order or a stronger one, as one step for `read`. Waits for
    /// other writers. Readers wait for `store`, so it must be short, and not panic.
    pub(crate) fn write<R>(&self, store: impl FnOnce() -> R) -> R {
        let _writer = lock(&self.writer);
        // Relaxed: writers are serialised by the lock.
        let steps = self.steps.load(Ordering::Relaxed);
        self.steps.store(steps + 1, Ordering::Relaxed);
        // Pairs with the fence in `read`: who sees one of the stores below sees this step.
        fence(Ordering::Release);
        let result = store();
        // Release: who sees the end sees the stores.
        self.steps.store(steps + 2, Ordering::Release);
        result
    }

    /// Loads words, all from before any one write, or all from after it. Spins while a writer
    /// stores.
    pub(crate) fn read<R>(&self, mut load: impl FnMut() -> R) -> R {
        let mut backoff = Backoff::default();
        loop {
            // Acquire pairs with the Release in `write`.
            let steps = self.steps.load(Ordering::Acquire);
            if steps % 2 == 0 || !rule!(R39) {
                let result = load();
                // Pairs with the fence in `write`: the load below sees the step of a writer whose
                // stores were seen.
                fence(Ordering::Acquire);
                if self.steps.load(Ordering::Relaxed) == steps || !rule!(R39) {
                    return result;
                }
            }
            backoff.wait();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::thread::scope;

    #[test]
    fn a_read_is_of_one_write() {
        let sequence = Sequence::new();
        let words = [AtomicU64::new(0), AtomicU64::new(0)];
        const WRITES: u64 = 20_000;
        scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    for _ in 0..WRITES {
                        sequence.write(|| {
                            let next = words[0].load(Ordering::Relaxed) + 1;
                            words[0].store(next, Ordering::Relaxed);
                            std::hint::spin_loop();
                            words[1].store(next, Ordering::Relaxed);
                        });
                    }
                });
            }
            let mut last = 0;
            while last < 2 * WRITES {
                let load = |i: usize| words[i].load(Ordering::Relaxed);
                let (second, first) = sequence.read(|| (load(1), load(0)));
                assert_eq!(first, second);
                assert!(first >= last);
                last = first;
            }
        });
    }
}
