// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! In a model the reclaimer is chosen when the collector is made: the checked stand-in, or
//! crossbeam-epoch's own code over loom.

use super::{checked, crossbeam};
use core::fmt;

/// The garbage of one engine.
#[derive(Clone)]
pub enum Collector {
    /// The checked stand-in.
    Checked(checked::Collector),
    /// crossbeam-epoch's own code.
    Crossbeam(crossbeam::Collector),
}

impl Collector {
    /// The checked stand-in.
    #[must_use]
    pub fn new() -> Self {
        Self::Checked(checked::Collector::default())
    }

    /// crossbeam-epoch's own code.
    #[must_use]
    pub fn crossbeam() -> Self {
        Self::Crossbeam(crossbeam::Collector::new())
    }

    /// Registers a reader.
    #[must_use]
    pub fn register(&self) -> Handle {
        match self {
            Self::Checked(c) => Handle::Checked(c.register()),
            Self::Crossbeam(c) => Handle::Crossbeam(c.register()),
        }
    }
}

impl Default for Collector {
    fn default() -> Self {
        Self::new()
    }
}

/// A registered reader.
pub enum Handle {
    /// Of the stand-in.
    Checked(checked::Handle),
    /// Of crossbeam-epoch.
    Crossbeam(crossbeam::Handle),
}

impl Handle {
    /// Begins a read section.
    #[must_use]
    pub fn pin(&self) -> Guard<'_> {
        match self {
            Self::Checked(h) => Guard::Checked(h.pin()),
            Self::Crossbeam(h) => Guard::Crossbeam(h.pin()),
        }
    }

    /// Waits until every read section that is open now has ended.
    pub fn synchronize(&mut self) {
        match self {
            Self::Checked(h) => h.synchronize(),
            Self::Crossbeam(h) => h.synchronize(),
        }
    }
}

/// An open read section.
pub enum Guard<'h> {
    /// Of the stand-in.
    Checked(checked::Guard<'h>),
    /// Of crossbeam-epoch.
    Crossbeam(crossbeam::Guard<'h>),
}

impl Guard<'_> {
    /// Runs `f` once every read section open now has ended.
    pub fn defer(&self, f: impl FnOnce() + Send + 'static) {
        match self {
            Self::Checked(g) => g.defer(f),
            Self::Crossbeam(g) => g.defer(f),
        }
    }

    /// Tries to run what is due.
    pub fn flush(&self) {
        match self {
            Self::Checked(g) => g.flush(),
            Self::Crossbeam(g) => g.flush(),
        }
    }

    /// Ends this read section and begins another.
    pub fn repin(&mut self) {
        match self {
            Self::Checked(g) => g.repin(),
            Self::Crossbeam(g) => g.repin(),
        }
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
