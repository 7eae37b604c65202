// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stand-in for crossbeam-epoch in models: it frees at the earliest moment that RCU allows.
//!
//! Its books (who is pinned, what waits for whom) are kept outside the model. What the model sees
//! is what the real collector promises and no more: a SeqCst fence when a section begins and when
//! something is retired, and a release/acquire edge from the end of each section to whatever runs
//! after it has ended. Anything still deferred when the collector goes is run then.

use crate::sync::checker::thread::yield_now;
use crate::sync::{AtomicBool, Ordering, fence};
use core::fmt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

type Call = Box<dyn FnOnce() + Send>;

/// Readers at a time.
const READERS: usize = 16;

#[derive(Default)]
struct Books {
    readers: BTreeSet<usize>,
    /// Readers so far have numbers below this.
    used: usize,
    /// Reader → how many guards it holds, and the number of its present section.
    pinned: BTreeMap<usize, (u32, u64)>,
    sections: u64,
    limbo: Vec<(Vec<u64>, Call)>,
}

impl Books {
    fn open(&self) -> Vec<u64> {
        self.pinned.values().map(|(_, section)| *section).collect()
    }
}

struct Inner {
    books: Mutex<Books>,
    /// For each reader, what it touches at the begin and end of a section. Made with the collector,
    /// because whoever uses an atomic must have seen it made.
    sections: [AtomicBool; READERS],
}

impl Default for Inner {
    fn default() -> Self {
        Self { books: Mutex::default(), sections: core::array::from_fn(|_| AtomicBool::new(false)) }
    }
}

impl Inner {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs every call that no open section delays any more.
    fn collect(&self) {
        let due: Vec<_> = {
            let mut books = self.books();
            let open = books.open();
            let limbo = core::mem::take(&mut books.limbo);
            let (waits, due) =
                limbo.into_iter().partition(|(w, _)| w.iter().any(|s| open.contains(s)));
            books.limbo = waits;
            due
        };
        if !due.is_empty() {
            self.look(Ordering::Acquire);
            due.into_iter().for_each(|(_, call)| call());
        }
    }

    /// Looks at every reader. With Acquire this pairs with the Release at the end of each section;
    /// in any case the model then explores both orders of this and the begin or end of a section.
    /// Read-modify-writes, because a load may return a value from before that release.
    fn look(&self, ordering: Ordering) {
        let used = self.books().used;
        for section in &self.sections[..used] {
            section.fetch_or(false, ordering);
        }
    }
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
        let mut books = self.0.books();
        let free = (0..READERS).find(|id| !books.readers.contains(id));
        let id = free.expect("a model has few readers");
        books.readers.insert(id);
        books.used = books.used.max(id + 1);
        Handle { inner: Arc::clone(&self.0), id }
    }
}

/// See the module.
pub struct Handle {
    inner: Arc<Inner>,
    id: usize,
}

impl Handle {
    pub fn pin(&self) -> Guard<'_> {
        self.inner.sections[self.id].fetch_or(true, Ordering::Relaxed);
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
        self.inner.look(Ordering::Relaxed);
        let wait = self.inner.books().open();
        while self.inner.books().open().iter().any(|s| wait.contains(s)) {
            yield_now();
        }
        self.inner.look(Ordering::Acquire);
        self.inner.collect();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inner.collect();
        self.inner.books().readers.remove(&self.id);
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
        self.handle.inner.look(Ordering::Relaxed);
        let mut books = self.handle.inner.books();
        let open = books.open();
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
        // Pairs with `look`.
        self.handle.inner.sections[self.handle.id].fetch_or(true, Ordering::Release);
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
