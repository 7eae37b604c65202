// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guests: programs in machine code, the memory they run in, and what that memory must hold after.
//!
//! * [`programs`]: real x86-64 code for ring 3. The same bytes run on a KVM vCPU and on the interpreter
//!   ([`emu`](crate::emu)).
//! * [`layout`]: where everything lies, guest-physical and guest-virtual.
//! * [`paging`]: builds 4-level page tables.
//! * [`image`]: puts it together, and gives each vCPU its first registers.
//! * [`churn`]: the words of the program of that name.
//! * [`switch`]: the address spaces and words of the program of that name, and a model of what it does.
//! * [`verify`]: checks a guest's memory from outside.
//!
//! A guest talks to the VMM by `hlt` with the function in rax, see [`programs::Call`].

pub mod churn;
pub mod image;
pub mod layout;
pub mod paging;
pub mod programs;
pub mod switch;
#[cfg(test)]
mod tests;
pub mod verify;

pub use image::GuestImage;
pub use layout::{ImageError, Layout};
pub use programs::{Call, Program};
pub use verify::Mismatch;
