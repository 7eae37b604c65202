// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A consumer of the shadow on the public interface alone, and a watch over it.
//!
//! [`Cpu`] is a processor in software: it walks the shadow tables in the table memory itself, keeps
//! every translation and every table it has met until it is told to forget them, across exits too, and
//! comes out of the guest only when it is kicked. [`Watch`] knows what each operation of the engine has
//! promised when it returned, and reports every use of something that should have been forgotten by
//! then. [`World`] is the guest, of which it is known at any moment what its addresses may lead to.
#![allow(dead_code)]

mod cpu;
mod watch;
mod world;

pub use cpu::{Cpu, Habit};
pub use watch::{Kind, Report, Spot};
pub use world::{
    ALIASED, BANKS, CHANGING, CODE, CODE_AT, EDITED, LARGE, LOGGED, MOVED, MOVING, PAGE, PAGES,
    PASSING, PLAIN, REGIONS, TABLES, World,
};
