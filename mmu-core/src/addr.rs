// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Addresses, frame numbers and the geometry of page tables.
//!
//! Every address is in bytes, every frame number counts 4 KiB pages. The types carry no
//! validity promise: a [`Gva`] may be non-canonical and a [`Gpa`] may lie in no memslot; the code
//! that uses them checks.

use core::fmt;

/// log2 of the page size in bytes (SDM vol. 3, 5.1.1: the smallest page is 4 KiB).
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Physical address bits of x86's page-table formats (SDM vol. 3, 5.1.4).
pub(crate) const PHYSICAL_BITS: u32 = 52;
/// log2 of the entries of an 8-byte-entry table: 9 (SDM vol. 3, 5.5). Model checking shrinks a
/// table to two entries, four with shuttle; the code above this constant stays the same.
pub const INDEX_BITS: u32 = match () {
    () if cfg!(shuttle) => 2,
    () if cfg!(loom) => 1,
    () => 9,
};
/// Entries of a table with 8-byte entries.
pub const ENTRIES: usize = 1 << INDEX_BITS;
/// Levels of 4-level paging; two in model checking, three with shuttle.
pub const LEVELS: u8 = match () {
    () if cfg!(shuttle) => 3,
    () if cfg!(loom) => 2,
    () => 4,
};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on; wraps at 2^64 as the processor's adders do.
            #[inline]
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// Offset in bytes within the 4 KiB page.
            #[inline]
            #[must_use]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// The first byte of the 4 KiB page.
            #[inline]
            #[must_use]
            pub const fn page(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// Guest-virtual (linear) address, in bytes.
    Gva
}
address! {
    /// Guest-physical address, in bytes.
    Gpa
}
address! {
    /// Address in this process, in bytes.
    Hva
}
address! {
    /// Machine address, in bytes: what the consumer's processor calls a byte of guest memory or
    /// of a shadow table. A software vCPU uses host-virtual addresses; the KVM backend uses
    /// addresses in its VM's physical address space.
    Machine
}

impl Gpa {
    /// The frame that holds this address.
    #[inline]
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

/// Guest frame number: a guest-physical address in units of 4 KiB pages.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The first byte of the frame.
    #[inline]
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gfn({:#x})", self.0)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_offsets() {
        let a = Gpa(0x1234_5678);
        assert_eq!(a.gfn(), Gfn(0x12345));
        assert_eq!(a.page_offset(), 0x678);
        assert_eq!(a.page(), a.gfn().gpa());
        assert_eq!(Gva(u64::MAX).wrapping_add(1), Gva(0));
        assert_eq!(format!("{} {:?} {:x}", a, a, a), "0x12345678 Gpa(0x12345678) 12345678");
    }
}
