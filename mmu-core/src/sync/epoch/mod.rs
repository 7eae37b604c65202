// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Epoch-based reclamation: one [`Collector`] for each engine, one [`Handle`] for each thread that
//! reads, a [`Guard`] while it reads.
//!
//! A pinned thread never blocks another; it only delays the freeing of what was retired while it
//! was pinned. So no guard may be held across a system call, a wait or a callback: the API ties
//! each guard to a borrow of its handle, and what waits ([`Handle::synchronize`]) takes the handle
//! exclusively.

#[cfg(loom)]
mod checked;
mod crossbeam;
#[cfg(loom)]
mod model;

#[cfg(not(loom))]
pub use crossbeam::{Collector, Guard, Handle};
#[cfg(loom)]
pub use model::{Collector, Guard, Handle};
