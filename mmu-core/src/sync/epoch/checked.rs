// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stand-in for crossbeam-epoch in models: it frees at the earliest moment that RCU allows.
//!
//! Its books (who is pinned, what waits for whom) are kept outside the model. What the model sees
//! is what the real collector promises and no more: a SeqCst fence when a section begins and when
//! something is retired, and a release/acquire edge from the end of each section to the freeing of
//! what it delayed. Anything still deferred when the collector goes is a leak and panics.

use core::fmt;
use loom::sync::atomic::{AtomicBool, Ordering, fence};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

type Call = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Books {
    next: u64,
    /// Reader → how many guards it holds, and the number of its present section.
    pinned: BTreeMap<u64, (u32, u64)>,
    sections: u64,
    limbo: Vec<(Vec<u64>, Call)>,
}

#[derive(Default)]
struct Inner {
    books: Mutex<Books>,
    ends: Mutex<BTreeMap<u64, Arc<AtomicBool>>>,
}

impl Inner {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs every call that no open section delays any more.
    fn collect(&self) {
        loop {
            let due = {
                let mut books = self.books();
                let open: Vec<u64> = books.pinned.values().map(|(_, section)| *section).collect();
                let due = books.limbo.iter().position(|(w, _)| w.iter().all(|s| !open.contains(s)));
                due.map(|at| books.limbo.remove(at).1)
            };
            let Some(call) = due else { return };
            let ends: Vec<_> = {
                let ends = self.ends.lock().unwrap_or_else(|e| e.into_inner());
                ends.values().cloned().collect()
            };
            for end in ends {
                acquire(&end);
            }
            call();
        }
    }
}

/// Pairs with the Release at the end of each section. A read-modify-write, because a load may
/// return a value from before that release, and then there would be no edge.
fn acquire(end: &AtomicBool) {
    end.fetch_or(false, Ordering::Acquire);
}

impl Drop for Inner {
    fn drop(&mut self) {
        let left = core::mem::take(&mut self.books().limbo);
        for (_, call) in left {
            call();
        }
    }
}

/// See the module.
#[derive(Clone, Default)]
pub struct Collector(Arc<Inner>);

impl Collector {
    pub fn register(&self) -> Handle {
        let end = Arc::new(AtomicBool::new(false));
        let mut books = self.0.books();
        books.next += 1;
        let id = books.next;
        self.0.ends.lock().unwrap_or_else(|e| e.into_inner()).insert(id, Arc::clone(&end));
        Handle { inner: Arc::clone(&self.0), id, end }
    }
}

/// See the module.
pub struct Handle {
    inner: Arc<Inner>,
    id: u64,
    end: Arc<AtomicBool>,
}

impl Handle {
    pub fn pin(&self) -> Guard<'_> {
        {
            let mut books = self.inner.books();
            books.sections += 1;
            let section = books.sections;
            books.pinned.entry(self.id).or_insert((0, section)).0 += 1;
        }
        // Pairs with the fence in `defer`: either the retirer sees this section, or this section
        // sees the retirer's unlinking.
        fence(Ordering::SeqCst);
        Guard { handle: self }
    }

    pub fn synchronize(&mut self) {
        fence(Ordering::SeqCst);
        let wait: Vec<u64> = self.inner.books().pinned.values().map(|(_, s)| *s).collect();
        loop {
            let open = {
                let books = self.inner.books();
                books.pinned.values().any(|(_, s)| wait.contains(s))
            };
            if !open {
                break;
            }
            loom::thread::yield_now();
        }
        let ends: Vec<_> = {
            let ends = self.inner.ends.lock().unwrap_or_else(|e| e.into_inner());
            ends.values().cloned().collect()
        };
        for end in ends {
            acquire(&end);
        }
        self.inner.collect();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inner.collect();
    }
}

/// See the module.
pub struct Guard<'h> {
    handle: &'h Handle,
}

impl Guard<'_> {
    pub fn defer(&self, f: impl FnOnce() + Send + 'static) {
        // Pairs with the fence in `pin`.
        fence(Ordering::SeqCst);
        let mut books = self.handle.inner.books();
        let open = books.pinned.values().map(|(_, section)| *section).collect();
        books.limbo.push((open, Box::new(f)));
    }

    pub fn flush(&self) {
        self.handle.inner.collect();
    }

    pub fn repin(&mut self) {
        self.end();
        let again = self.handle.pin();
        core::mem::forget(again);
    }

    fn end(&self) {
        // Release pairs with `acquire`.
        self.handle.end.fetch_or(true, Ordering::Release);
        {
            let mut books = self.handle.inner.books();
            if let Some(entry) = books.pinned.get_mut(&self.handle.id) {
                entry.0 -= 1;
                if entry.0 == 0 {
                    books.pinned.remove(&self.handle.id);
                }
            }
        }
        self.handle.inner.collect();
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

macro_rules! debug {
    ($($t:ty),*) => {$(
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($t))
            }
        }
    )*};
}
debug!(Collector, Handle, Guard<'_>);
