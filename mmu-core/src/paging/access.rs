// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accesses, rights, and which rights an access needs (SDM 5.6).

use super::bits::*;
use super::fault::{Reason, code};
use super::regs::Regs;

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Data is read.
    Read,
    /// Data is written. A read-modify-write is a write (SDM 5.6).
    Write,
    /// An instruction is fetched.
    Execute,
}

/// An access: what is done, and who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What is done.
    pub kind: Kind,
    /// Made at CPL 3.
    pub user: bool,
    /// Made by the processor itself to a system structure (descriptor tables, the TSS): a
    /// supervisor access whatever `user` says, which EFLAGS.AC does not exempt from SMAP (SDM 5.6).
    pub implicit: bool,
}

impl Access {
    const fn new(kind: Kind) -> Self {
        Self { kind, user: false, implicit: false }
    }

    /// An explicit supervisor read.
    #[must_use]
    pub const fn read() -> Self {
        Self::new(Kind::Read)
    }

    /// An explicit supervisor write.
    #[must_use]
    pub const fn write() -> Self {
        Self::new(Kind::Write)
    }

    /// A supervisor fetch.
    #[must_use]
    pub const fn execute() -> Self {
        Self::new(Kind::Execute)
    }

    /// The same, made in user mode.
    #[must_use]
    pub const fn user(self) -> Self {
        Self { user: true, ..self }
    }

    /// The same, made implicitly.
    #[must_use]
    pub const fn implicit(self) -> Self {
        Self { implicit: true, ..self }
    }

    /// Index into the compiled rules.
    #[inline]
    pub(super) fn index(self) -> usize {
        self.kind as usize * 4 + usize::from(self.user) * 2 + usize::from(self.implicit)
    }

    /// Whether pointer tags are stripped: from data pointers only (SDM chapter 4), not from
    /// the addresses that the processor makes itself.
    pub(super) fn strips_tags(self) -> bool {
        self.kind != Kind::Execute && !self.implicit
    }
}

/// Rights of a translation: each the AND over the levels (SDM 5.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rights {
    /// R/W is set at every level.
    pub write: bool,
    /// U/S is set at every level.
    pub user: bool,
    /// NX is clear at every level.
    pub execute: bool,
    /// Protection key of the leaf, 0 to 15, as stored; 0 in formats without keys.
    pub key: u8,
}

/// What may be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Allowed {
    /// Data may be read.
    pub read: bool,
    /// Data may be written.
    pub write: bool,
    /// Instructions may be fetched.
    pub execute: bool,
}

/// What one kind of access needs, compiled from the control registers.
///
/// It is applied to the *sum* of a walk: the AND over the levels of the entries with bit 63
/// inverted, so that a set bit grants; bit 6 is the leaf's alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// The bits of the sum that matter.
    pub(super) care: u64,
    /// Their value for an access that goes through and leaves the tables as they are.
    pub(super) want: u64,
    /// Keys that deny, for supervisor pages and for user pages. Bit 16 + k is bit k again, so
    /// that an entry's five highest bits can be the index.
    pub(super) keys: [u32; 2],
    /// Error code of a fault on a not-present entry.
    pub(super) error: u32,
}

/// What the tables' own bits must say before an access leaves them as they are.
const TRACKED: u64 = A | D;

impl Rule {
    pub(super) fn new(regs: &Regs, access: Access) -> Self {
        let Access { kind, implicit, .. } = access;
        let user = access.user && !implicit;
        let (mut care, mut want) = (A, A);
        let mut need = |bit| {
            care |= bit;
            want |= bit;
        };
        if user {
            need(US);
        }
        match kind {
            Kind::Read => {}
            Kind::Write => {
                need(D);
                // SDM 5.6.1: a supervisor may write to any page while CR0.WP is 0.
                if user || regs.cr0 & CR0_WP != 0 {
                    need(RW);
                }
            }
            // Entries that say "not executable" with NXE = 0 are reserved and never get here.
            Kind::Execute => need(NX),
        }
        // SDM 5.6.1: SMAP for data, unless the access is explicit and AC is set; SMEP for fetches.
        let smap = regs.cr4 & CR4_SMAP != 0 && (implicit || regs.rflags & RFLAGS_AC == 0);
        let smep = regs.cr4 & CR4_SMEP != 0;
        if !user && if kind == Kind::Execute { smep } else { smap } {
            care |= US;
        }
        let keys = [(CR4_PKS, regs.pkrs), (CR4_PKE, regs.pkru)].map(|(enable, register)| {
            // SDM 5.6.2: keys exist in 4-level and 5-level paging, and never deny fetches.
            let on = regs.cr4 & enable != 0 && regs.efer & EFER_LMA != 0;
            if on && kind != Kind::Execute { denied_keys(register, access, regs.cr0) } else { 0 }
        });
        // SDM 5.7: I/D is reported if NX or SMEP can forbid a fetch.
        let nx = regs.cr4 & CR4_PAE != 0 && regs.efer & EFER_NXE != 0;
        let error = match kind {
            Kind::Read => 0,
            Kind::Write => code::W,
            Kind::Execute if smep || nx => code::I,
            Kind::Execute => 0,
        };
        Self { care, want, keys, error: error | if user { code::U } else { 0 } }
    }

    /// Whether the key in the leaf denies. Only for formats that have keys.
    #[inline]
    pub(super) fn key_denies(&self, sum: u64, leaf: u64) -> bool {
        let keys = self.keys[usize::from(sum & US != 0)];
        keys >> (leaf >> KEY_SHIFT) & 1 != 0
    }

    /// Whether the access goes through and leaves the tables as they are.
    #[inline(always)]
    pub(super) fn is_met(&self, sum: u64, leaf: u64) -> bool {
        (sum ^ self.want) & self.care == 0 && !self.key_denies(sum, leaf)
    }

    /// The rule of a walk that checks no rights and touches nothing.
    pub(super) const NONE: Self = Self { care: 0, want: 0, keys: [0; 2], error: 0 };

    /// The rule of a walk that touches nothing.
    pub(super) fn untracked(&self) -> Self {
        Self { care: self.care & !TRACKED, ..*self }
    }

    /// Whether the rights suffice, the key aside.
    #[inline]
    pub(super) fn grants(&self, sum: u64) -> bool {
        (sum ^ self.want) & self.care & !TRACKED == 0
    }

    /// The accessed and dirty bits that the access sets in the leaf.
    #[inline]
    pub(super) fn marks(&self) -> u64 {
        self.want & TRACKED
    }

    /// Why the access fails, if it does: the first of user, SMEP, SMAP, fetch, write, key.
    pub(super) fn refusal(&self, kind: Kind, sum: u64, key_denies: bool) -> Option<Reason> {
        let wrong = (sum ^ self.want) & self.care;
        if wrong & US != 0 {
            return Some(match (self.want & US != 0, kind) {
                (true, _) => Reason::User,
                (false, Kind::Execute) => Reason::Smep,
                (false, _) => Reason::Smap,
            });
        }
        if wrong & NX != 0 {
            Some(Reason::Fetch)
        } else if wrong & RW != 0 {
            Some(Reason::Write)
        } else {
            key_denies.then_some(Reason::Pkey)
        }
    }
}

/// The keys that deny a data access (SDM 5.6.2), twice.
fn denied_keys(register: u32, access: Access, cr0: u64) -> u32 {
    let write_protected = access.user && !access.implicit || cr0 & CR0_WP != 0;
    let one = (0..16).fold(0, |keys, key| {
        let (no_access, no_write) =
            (register >> (2 * key) & 1 != 0, register >> (2 * key + 1) & 1 != 0);
        let write = no_write && access.kind == Kind::Write && write_protected;
        keys | u32::from(no_access || write) << key
    });
    one | one << 16
}
