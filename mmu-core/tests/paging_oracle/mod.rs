// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A second walker, written from the manuals sentence by sentence, without regard to speed, and
//! with nothing in common with the crate's: no masks, no sums, one bit at a time.
//!
//! Sections are those of the SDM, volume 3, where chapter 5 is "Paging".
#![allow(dead_code)]

use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, MemoryMap, SlotConfig};
use mmu_core::paging::{Access, Fault, Kind, Reason, Regs, Walk};
use mmu_core::sync::Ordering;
use std::sync::Arc;

/// Guest memory in pieces, which the oracle reads without a memory map.
pub struct Memory {
    pub pieces: Vec<(u64, Arc<AllocatedMemory>)>,
}

impl Memory {
    /// Pieces of (base, bytes).
    pub fn new(pieces: &[(u64, u64)]) -> Self {
        let new = |&(base, size): &(u64, u64)| (base, Arc::new(AllocatedMemory::new(size)));
        Self { pieces: pieces.iter().map(new).collect() }
    }

    pub fn map(&self) -> MemoryMap {
        let slot = |(i, (base, memory)): (usize, &(u64, Arc<AllocatedMemory>))| {
            SlotConfig::new(i as u32, Gpa(*base), Arc::clone(memory) as Arc<dyn Backing>)
        };
        MemoryMap::build(self.pieces.iter().enumerate().map(slot)).unwrap()
    }

    pub fn read8(&self, gpa: u64) -> Option<u64> {
        self.pieces.iter().find_map(|(base, memory)| {
            let offset = gpa.checked_sub(*base)?;
            Some(memory.words().get((offset / 8) as usize)?.load(Ordering::Relaxed))
        })
    }

    pub fn read4(&self, gpa: u64) -> Option<u64> {
        let word = self.read8(gpa & !7)?;
        Some(if gpa & 4 == 0 { word & 0xffff_ffff } else { word >> 32 })
    }

    pub fn write8(&self, gpa: u64, value: u64) {
        for (base, memory) in &self.pieces {
            if let Some(word) =
                gpa.checked_sub(*base).and_then(|o| memory.words().get((o / 8) as usize))
            {
                return word.store(value, Ordering::Relaxed);
            }
        }
        panic!("no memory at {gpa:#x}");
    }

    pub fn write4(&self, gpa: u64, value: u64) {
        let word = self.read8(gpa & !7).unwrap();
        let value = value & 0xffff_ffff;
        let new = if gpa & 4 == 0 {
            word & !0xffff_ffff | value
        } else {
            word & 0xffff_ffff | value << 32
        };
        self.write8(gpa & !7, new);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Off,
    ThirtyTwo,
    Pae,
    Four,
    Five,
}

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

fn field(value: u64, high: u32, low: u32) -> u64 {
    (low..=high).filter(|n| bit(value, *n)).map(|n| 1 << (n - low)).sum()
}

/// 5.1.1: "If CR0.PG = 0, paging is not used. If CR4.PAE = 0, 32-bit. If CR4.PAE = 1 and EFER.LME
/// = 0, PAE. If LME = 1 and CR4.LA57 = 0, 4-level, else 5-level."
pub fn mode(regs: &Regs) -> Mode {
    match (bit(regs.cr0, 31), bit(regs.cr4, 5), bit(regs.efer, 8), bit(regs.cr4, 12)) {
        (false, ..) => Mode::Off,
        (true, false, ..) => Mode::ThirtyTwo,
        (true, true, false, _) => Mode::Pae,
        (true, true, true, false) => Mode::Four,
        (true, true, true, true) => Mode::Five,
    }
}

/// Tables 5-4 to 5-6 and 5-8 to 5-20: is this bit of a present entry reserved?
fn is_reserved(regs: &Regs, level: u8, large: bool, n: u32) -> bool {
    let m = u32::from(regs.maxphyaddr);
    let nxe = bit(regs.efer, 11);
    let long_common = (m..52).contains(&n) || n == 63 && !nxe;
    let pae_common = (m..63).contains(&n) || n == 63 && !nxe;
    match (mode(regs), level, large) {
        (Mode::ThirtyTwo, 2, true) => n >= m.min(40) - 19 && n <= 21,
        (Mode::ThirtyTwo, ..) => false,
        (Mode::Pae, 3, _) => n == 1 || n == 2 || (5..=8).contains(&n) || n >= m,
        (Mode::Pae, 2, true) => (13..=20).contains(&n) || pae_common,
        (Mode::Pae, ..) => pae_common,
        (_, 4 | 5, _) => n == 7 || long_common,
        (_, 3, true) => (13..=29).contains(&n) || long_common,
        (_, 2, true) => (13..=20).contains(&n) || long_common,
        _ => long_common,
    }
}

/// 5.6.2: "ADi: no data access; WDi: no user-mode write, and if CR0.WP = 1 no supervisor-mode
/// write."
fn key_denies(regs: &Regs, access: Access, user_page: bool, key: u64) -> bool {
    let long = matches!(mode(regs), Mode::Four | Mode::Five);
    let enabled = if user_page { bit(regs.cr4, 22) } else { bit(regs.cr4, 24) };
    if !long || !enabled || access.kind == Kind::Execute {
        return false;
    }
    let register = u64::from(if user_page { regs.pkru } else { regs.pkrs });
    let (ad, wd) = (bit(register, 2 * key as u32), bit(register, 2 * key as u32 + 1));
    let user_mode = access.user && !access.implicit;
    ad || wd && access.kind == Kind::Write && (user_mode || bit(regs.cr0, 16))
}

/// What an entry is worth, and how it was read.
struct Passed {
    level: u8,
    at: u64,
    value: u64,
}

pub struct Answer {
    pub result: Result<Walk, Fault>,
    /// Entries after the walk, root first: (level, address, value).
    pub passed: Vec<(u8, u64, u64)>,
}

/// The walk; changes nothing in memory.
pub fn walk(memory: &Memory, regs: &Regs, gva: u64, access: Access) -> Answer {
    let mut passed = Vec::new();
    let result = attempt(memory, regs, gva, access, &mut passed);
    let set_in_memory = result.is_ok();
    let last = passed.len().saturating_sub(1);
    let finished = passed.iter().enumerate().map(|(i, p)| {
        let mut value = p.value;
        if set_in_memory {
            value |= 1 << 5;
            if i == last && access.kind == Kind::Write {
                value |= 1 << 6;
            }
        }
        (p.level, p.at, value)
    });
    let passed: Vec<_> = finished.collect();
    let result = result.map(|walk| match passed.last() {
        Some((.., leaf)) => Walk { accessed: bit(*leaf, 5), dirty: bit(*leaf, 6), ..walk },
        None => walk,
    });
    Answer { result, passed }
}

fn attempt(
    memory: &Memory,
    regs: &Regs,
    gva: u64,
    access: Access,
    passed: &mut Vec<Passed>,
) -> Result<Walk, Fault> {
    let mode = mode(regs);
    let user_mode = access.user && !access.implicit;
    let smep = bit(regs.cr4, 20);
    // 5.7, the error code.
    let fault = |gva, level, reason, present: bool, reserved: bool, key: bool| {
        let fetch =
            access.kind == Kind::Execute && (smep || bit(regs.cr4, 5) && bit(regs.efer, 11));
        let bits = [present, access.kind == Kind::Write, user_mode, reserved, fetch, key];
        let error_code = bits.iter().enumerate().map(|(n, on)| u32::from(*on) << n).sum();
        Fault { gva: Gva(gva), vector: 14, error_code, level, reason }
    };
    let gva = match mode {
        Mode::Four | Mode::Five => linear(regs, gva, access).ok_or(Fault {
            gva: Gva(gva),
            vector: 13,
            error_code: 0,
            level: 0,
            reason: Reason::NonCanonical,
        })?,
        _ => field(gva, 31, 0),
    };
    // 5.3 figure 5-2, 5.4.2 figure 5-5, 5.5.4 figure 5-8: the fields of the linear address.
    let fields: &[(u8, u32, u32)] = match mode {
        Mode::Off => &[],
        Mode::ThirtyTwo => &[(2, 31, 22), (1, 21, 12)],
        Mode::Pae => &[(3, 31, 30), (2, 29, 21), (1, 20, 12)],
        Mode::Four => &[(4, 47, 39), (3, 38, 30), (2, 29, 21), (1, 20, 12)],
        Mode::Five => &[(5, 56, 48), (4, 47, 39), (3, 38, 30), (2, 29, 21), (1, 20, 12)],
    };
    let mut table = match mode {
        Mode::ThirtyTwo => field(regs.cr3, 31, 12) << 12,
        _ => field(regs.cr3, 51, 12) << 12,
    };
    let (mut write, mut user, mut execute) = (true, true, true);
    let mut level_read = 0;
    for &(level, high, low) in fields {
        let index = field(gva, high, low);
        let entry = if mode == Mode::ThirtyTwo {
            let at = table + 4 * index;
            memory.read4(at).map(|value| Passed { level, at, value })
        } else if mode == Mode::Pae && level == 3 {
            let value = regs.pdptrs[index as usize];
            Some(Passed { level, at: u64::MAX, value })
        } else {
            let at = table + 8 * index;
            memory.read8(at).map(|value| Passed { level, at, value })
        };
        let Some(entry) = entry else {
            return Err(fault(gva, level_read, Reason::TableOutside, false, false, false));
        };
        level_read = level;
        let value = entry.value;
        let register = entry.at == u64::MAX;
        if !register {
            passed.push(entry);
        }
        if !bit(value, 0) {
            return Err(fault(gva, level, Reason::NotPresent, false, false, false));
        }
        let may_be_large = match mode {
            Mode::ThirtyTwo => level == 2 && bit(regs.cr4, 4),
            Mode::Pae => level == 2,
            _ => level == 2 || level == 3,
        };
        let large = may_be_large && bit(value, 7);
        if (0..64).any(|n| bit(value, n) && is_reserved(regs, level, large, n)) {
            return Err(fault(gva, level, Reason::Reserved, true, true, false));
        }
        if !register {
            write &= bit(value, 1);
            user &= bit(value, 2);
            execute &= mode == Mode::ThirtyTwo || !bit(value, 63);
        }
        if level > 1 && !large {
            let high = if mode == Mode::ThirtyTwo { 31 } else { 51 };
            table = field(value, high, 12) << 12;
            continue;
        }
        let long = matches!(mode, Mode::Four | Mode::Five);
        let key = if long { field(value, 62, 59) } else { 0 };
        // 5.6.1, in the order of its paragraphs.
        let mut wrong = Vec::new();
        let denied_by_key = key_denies(regs, access, user, key);
        if denied_by_key {
            wrong.push(Reason::Pkey);
        }
        let smap = bit(regs.cr4, 21) && (access.implicit || !bit(regs.rflags, 18));
        match (user_mode, access.kind) {
            (false, Kind::Read) => {
                if user && smap {
                    wrong.push(Reason::Smap);
                }
            }
            (false, Kind::Write) => {
                if user && smap {
                    wrong.push(Reason::Smap);
                }
                if bit(regs.cr0, 16) && !write {
                    wrong.push(Reason::Write);
                }
            }
            (false, Kind::Execute) => {
                if user && smep {
                    wrong.push(Reason::Smep);
                }
                if !execute {
                    wrong.push(Reason::Fetch);
                }
            }
            (true, kind) => {
                if !user {
                    wrong.push(Reason::User);
                }
                if kind == Kind::Write && !write {
                    wrong.push(Reason::Write);
                }
                if kind == Kind::Execute && !execute {
                    wrong.push(Reason::Fetch);
                }
            }
        }
        use Reason::{Fetch, Pkey, Smap, Smep, User, Write};
        let first = [User, Smep, Smap, Fetch, Write, Pkey].into_iter().find(|r| wrong.contains(r));
        if let Some(reason) = first {
            return Err(fault(gva, level, reason, true, false, denied_by_key));
        }
        let frame = match (mode, level) {
            (Mode::ThirtyTwo, 2) => field(value, 20, 13) << 32 | field(value, 31, 22) << 22,
            (Mode::ThirtyTwo, _) => field(value, 31, 12) << 12,
            (_, 3) => field(value, 51, 30) << 30,
            (_, 2) => field(value, 51, 21) << 21,
            _ => field(value, 51, 12) << 12,
        };
        return Ok(Walk {
            gpa: Gpa(frame + field(gva, low - 1, 0)),
            page_size: 1 << low,
            level,
            rights: mmu_core::paging::Rights { write, user, execute, key: key as u8 },
            global: bit(value, 8),
            accessed: bit(value, 5),
            dirty: bit(value, 6),
            pat: bit(value, if level == 1 { 7 } else { 12 }),
            pcd: bit(value, 4),
            pwt: bit(value, 3),
        });
    }
    Ok(Walk {
        gpa: Gpa(gva),
        page_size: 4096,
        level: 1,
        rights: mmu_core::paging::Rights { write: true, user: true, execute: true, key: 0 },
        global: false,
        accessed: false,
        dirty: false,
        pat: false,
        pcd: false,
        pwt: false,
    })
}

/// Volume 1, 3.3.7.1 and linear-address masking: the tag becomes copies of the bit below it, bit 63
/// stays; then bits 63:47 (or 63:56) must be equal.
fn linear(regs: &Regs, gva: u64, access: Access) -> Option<u64> {
    let five = mode(regs) == Mode::Five;
    let supervisor_pointer = bit(gva, 63);
    let sign = if access.kind == Kind::Execute || access.implicit {
        None
    } else if supervisor_pointer {
        bit(regs.cr4, 28).then_some(if five { 56 } else { 47 })
    } else if bit(regs.cr3, 61) {
        Some(56)
    } else {
        bit(regs.cr3, 62).then_some(47)
    };
    let masked: u64 = (0..64)
        .map(|n| match sign {
            Some(sign) if (sign + 1..63).contains(&n) => u64::from(bit(gva, sign)) << n,
            _ => u64::from(bit(gva, n)) << n,
        })
        .sum();
    let top = if five { 56 } else { 47 };
    let canonical = (top..64).all(|n| bit(masked, n) == bit(masked, 63));
    canonical.then_some(masked)
}

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

pub fn accesses() -> Vec<Access> {
    let kinds = [Access::read(), Access::write(), Access::execute()];
    let all = kinds.map(|a| [a, a.user(), a.implicit(), a.user().implicit()]);
    all.into_iter().flatten().collect()
}
