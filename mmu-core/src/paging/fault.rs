// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a walk reports when there is no translation.

use crate::addr::Gva;
use core::fmt;

/// Bits of the page-fault error code (SDM 5.7).
pub mod code {
    /// The fault was a violation of rights or of reserved bits, not a missing entry.
    pub const P: u32 = 1;
    /// The access was a write.
    pub const W: u32 = 1 << 1;
    /// The access was made in user mode.
    pub const U: u32 = 1 << 2;
    /// A reserved bit was set in an entry.
    pub const RSVD: u32 = 1 << 3;
    /// The access was an instruction fetch, and NX or SMEP is enabled.
    pub const I: u32 = 1 << 4;
    /// A protection key denied the access.
    pub const PK: u32 = 1 << 5;
}

/// Why an access cannot be made. If several rights fail, the reason is the first of `User`,
/// `Smep`, `Smap`, `Fetch`, `Write`, `Pkey`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// An entry has P = 0.
    NotPresent,
    /// The page is read-only.
    Write,
    /// The page is for the supervisor.
    User,
    /// The page is not executable.
    Fetch,
    /// An entry has a reserved bit set.
    Reserved,
    /// The page's protection key denies.
    Pkey,
    /// The supervisor fetches from a user page.
    Smep,
    /// The supervisor touches data in a user page.
    Smap,
    /// The address is not canonical: a general protection exception, not a page fault.
    NonCanonical,
    /// A table lies in no memslot; a processor would read what the bus answers. Reported with the
    /// error code of an entry that is not present.
    TableOutside,
}

impl Reason {
    /// The name that `shadowmmu walk` prints.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotPresent => "not_present",
            Self::Write => "write",
            Self::User => "user",
            Self::Fetch => "fetch",
            Self::Reserved => "reserved",
            Self::Pkey => "pkey",
            Self::Smep => "smep",
            Self::Smap => "smap",
            Self::NonCanonical => "non_canonical",
            Self::TableOutside => "table_outside_image",
        }
    }
}

/// The exception that an access raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The linear address: what the processor writes to CR2, so without the pointer tag that LAM
    /// removes. For a general protection exception the address as given.
    pub gva: Gva,
    /// 14, or 13 for an address that is not canonical (12 if the access was made through SS, which
    /// a walk does not know).
    pub vector: u8,
    /// As the processor pushes it.
    pub error_code: u32,
    /// 1 = page table to 5 = PML5. For `NotPresent` and `Reserved` of that entry; for rights of
    /// the leaf; for `TableOutside` of the entry read last, 0 if the top table itself is outside;
    /// 0 for `NonCanonical`.
    pub level: u8,
    /// Why.
    pub reason: Reason,
}

impl Fault {
    /// Vector of a page fault.
    pub const PF: u8 = 14;
    /// Vector of a general protection exception.
    pub const GP: u8 = 13;
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gva, vector, error_code, level, reason } = self;
        let reason = reason.name();
        write!(f, "{reason} at level {level} for {gva}: vector {vector}, code {error_code:#x}")
    }
}

impl core::error::Error for Fault {}
