// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Aliases: second names for guest-physical ranges (KVM_SET_MEMORY_ALIAS, 2007).
//!
//! * An alias lies over slots: within its range it alone says what memory is there.
//! * Of two aliases that overlap, the one with the smaller number says it.
//! * Aliases are not followed twice: the target range names slots, never other aliases.
//! * Where the target has no slot the alias has none either, and follows when one comes or goes.
//! * Dirty log, write-protection and reverse maps belong to the memory, whichever name is used.

use crate::addr::{Gpa, PAGE_SIZE, PHYSICAL_BITS};

/// Aliases that an engine can have (KVM had four).
pub const MAX_ALIASES: u32 = 32;

/// `size` bytes at `base` are another name for those at `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The alias's number, below [`MAX_ALIASES`]; setting it again replaces it.
    pub number: u32,
    /// First guest-physical byte; a multiple of 4096.
    pub base: Gpa,
    /// Bytes; a multiple of 4096, not 0.
    pub size: u64,
    /// First byte of the range that is named a second time; a multiple of 4096.
    pub target: Gpa,
}

/// Why an alias was refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AliasError {
    /// Numbers are below [`MAX_ALIASES`].
    #[error("alias {0}: there are {MAX_ALIASES} aliases, counted from 0")]
    BadNumber(u32),
    /// The range must not be empty.
    #[error("alias {0}: the size is zero")]
    ZeroSize(u32),
    /// Base, size and target are whole pages.
    #[error("alias {number}: {what} {value:#x} is not a multiple of 4096")]
    Misaligned {
        /// The alias asked for.
        number: u32,
        /// Which value.
        what: &'static str,
        /// The value given.
        value: u64,
    },
    /// A range runs past the end of the 52-bit physical address space.
    #[error("alias {number}: {size:#x} bytes at {base} run past the 52-bit physical address space")]
    WrapsAround {
        /// The alias asked for.
        number: u32,
        /// First address of the range, base or target.
        base: Gpa,
        /// The size given, in bytes.
        size: u64,
    },
    /// No alias has this number.
    #[error("alias {0} does not exist")]
    NoSuchAlias(u32),
    /// The calling thread must not wait.
    #[error("alias {number}: {why}")]
    WouldDeadlock {
        /// The alias asked for.
        number: u32,
        /// Why it must not.
        why: crate::sync::WouldDeadlock,
    },
}

impl Alias {
    pub(super) fn check(&self) -> Result<(), AliasError> {
        let Self { number, base, size, target } = *self;
        if number >= MAX_ALIASES {
            return Err(AliasError::BadNumber(number));
        }
        if size == 0 {
            return Err(AliasError::ZeroSize(number));
        }
        for (what, value) in [("base", base.0), ("size", size), ("target", target.0)] {
            if value % PAGE_SIZE != 0 {
                return Err(AliasError::Misaligned { number, what, value });
            }
        }
        for base in [base, target] {
            if base.0.checked_add(size).is_none_or(|end| end > 1 << PHYSICAL_BITS) {
                return Err(AliasError::WrapsAround { number, base, size });
            }
        }
        Ok(())
    }
}
