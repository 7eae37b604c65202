// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks of a guest's memory after a program has ended, from outside.
//!
//! Each check reads guest-physical memory through a closure (`read(gpa, buffer)`, never across a page
//! boundary) and knows by itself what must be there. No vCPU may run meanwhile.

use super::churn;
use super::image::{GuestImage, precopy_state};
use super::layout::*;
use super::paging::{A, ADDR, D, NX, P, PAGE, U, W, index};
use super::programs::{MAGIC_SEED, mix, remap_switches, xorshift};
use std::collections::BTreeMap;
use thiserror::Error;

/// The first wrong word.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what} at gva {gva:#x} (gpa {gpa:#x}): expected {expected:#x}, seen {seen:#x}")]
pub struct Mismatch {
    /// What the word is.
    pub what: &'static str,
    /// Its guest-virtual address.
    pub gva: u64,
    /// Its guest-physical address.
    pub gpa: u64,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub seen: u64,
}

/// How memory is read.
pub type Read<'a> = &'a mut dyn FnMut(u64, &mut [u8]);

/// The content of one page.
struct Page {
    gva: u64,
    gpa: u64,
    bytes: [u8; PAGE as usize],
}

impl Page {
    fn read(read: Read<'_>, gva: u64, gpa: u64) -> Self {
        let mut page = Page { gva, gpa, bytes: [0; PAGE as usize] };
        read(gpa, &mut page.bytes);
        page
    }

    fn word(&self, offset: u64) -> u64 {
        let at = (offset & (PAGE - 8)) as usize;
        self.bytes[at..at + 8].iter().rev().fold(0, |w, b| w << 8 | u64::from(*b))
    }

    fn expect(&self, what: &'static str, offset: u64, expected: u64) -> Result<(), Mismatch> {
        let seen = self.word(offset);
        if seen == expected {
            return Ok(());
        }
        let (gva, gpa) = (self.gva + offset, self.gpa + offset);
        Err(Mismatch { what, gva, gpa, expected, seen })
    }
}

/// All words of both ranges after one pass of `touch` with `seed` (the last one, if there were several)
/// on all vCPUs.
pub fn touch(image: &GuestImage, seed: u64, read: Read<'_>) -> Result<(), Mismatch> {
    let layout = image.layout();
    for n in 0..layout.data_pages() {
        let page = Page::read(read, DATA_GVA + n * PAGE, layout.data_gpa() + n * PAGE);
        for offset in (0..8).map(|w| w * 0x208) {
            page.expect("word of a share", offset, mix(page.gva + offset, seed))?;
        }
    }
    for n in 0..layout.data_pages() {
        let page = Page::read(read, OVERLAP_GVA + n * PAGE, layout.overlap_gpa() + n * PAGE);
        for offset in (0..layout.vcpus() as u64).map(|id| id * 8) {
            page.expect("lane", offset, mix(page.gva + offset, seed))?;
        }
    }
    Ok(())
}

/// The window's page tables and frames after `rounds` rounds of `remap` (as call 0 says) on a fresh image.
pub fn remap(image: &GuestImage, rounds: u64, read: Read<'_>) -> Result<(), Mismatch> {
    let layout = image.layout();
    let vcpus = layout.vcpus() as u64;
    let control = Page::read(read, CONTROL_GVA, CONTROL_GPA);
    let live = remap_switches(rounds) & 1;
    control.expect("finished rounds", control::DONE, rounds)?;
    control.expect("number of the table in use", control::LIVE, live)?;

    // The page-directory entry, then the entries below it; accessed and dirty bits may have come up.
    let entry = |page: &mut Page, what, slot: usize, expected: u64, optional: u64| {
        let offset = slot as u64 * 8;
        let seen = page.word(offset);
        if seen & !optional == expected {
            return Ok(());
        }
        let (gva, gpa) = (page.gva + offset, page.gpa + offset);
        Err(Mismatch { what, gva, gpa, expected, seen })
    };
    let pde_gpa = image.window_pde_gpa();
    let mut directory = Page::read(read, TABLES_GVA + 2 * PAGE, pde_gpa & ADDR);
    let tables = image.window_tables();
    let table = tables[live as usize & 1];
    entry(&mut directory, "page-directory entry", index(WINDOW_GVA, 2), table | P | W | U, A)?;
    let mut page = Page::read(read, TABLES_GVA + live * PAGE, table);
    for n in 0..WINDOW_PAGES {
        let slot = index(WINDOW_GVA + n * PAGE, 1);
        let expected = layout.window_frame(rounds & 1, n) | P | W | U | NX;
        entry(&mut page, "page-table entry", slot, expected, A | D)?;
    }

    for set in 0..2 {
        // The last round with this set, 0 if there was none.
        let last = if rounds & 1 == set { rounds } else { rounds.saturating_sub(1) };
        for n in 0..WINDOW_PAGES {
            let gpa = layout.window_frame(set, n);
            let page = Page::read(read, WINDOW_GVA + n * PAGE, gpa);
            page.expect("magic", 0, mix(gpa, MAGIC_SEED))?;
            for id in 0..vcpus {
                page.expect("round seen last", 8 + id * 8, last)?;
            }
        }
    }
    Ok(())
}

/// The words written by `precopy` with `seed`, when `counts[id]` is what vCPU `id` gave as its number of
/// writes. Replays all of them, so it takes about as long as the guest did.
pub fn precopy(
    image: &GuestImage,
    seed: u64,
    counts: &[u64],
    read: Read<'_>,
) -> Result<(), Mismatch> {
    let layout = image.layout();
    let pages = layout.data_pages();
    for (id, &count) in counts.iter().enumerate() {
        // Zero stands for "not written": the generator never yields it.
        let mut lanes = vec![0; pages as usize];
        let mut tail = BTreeMap::new();
        let mut x = precopy_state(id, seed);
        for n in 1..=count {
            x = xorshift(x);
            let low = x & 0xffff_ffff;
            if n & 7 != 0 {
                lanes[((low * pages) >> 32) as usize] = x;
            } else {
                tail.insert((low * TAIL_PAGES) >> 32 << 9 | (x >> 32 & 511), x);
            }
        }
        let mut word = |what, gva, gpa, expected| {
            let mut bytes = [0; 8];
            read(gpa, &mut bytes);
            let seen = u64::from_le_bytes(bytes);
            if seen == expected {
                return Ok(());
            }
            Err(Mismatch { what, gva, gpa, expected, seen })
        };
        let lane = id as u64 * 8;
        for (n, &x) in lanes.iter().enumerate().filter(|(_, x)| **x != 0) {
            let offset = n as u64 * PAGE + lane;
            word("lane", DATA_GVA + offset, layout.data_gpa() + offset, x)?;
        }
        let start = id as u64 * TAIL_PAGES * PAGE;
        for (at, x) in tail {
            let offset = start + at * 8;
            word("word of a tail", TAILS_GVA + offset, layout.tails_gpa() + offset, x)?;
        }
    }
    Ok(())
}

/// The pages that stay after `churn`, when `counts[id]` is what vCPU `id` gave as its number of increments:
/// identities, counts, zeros, and in the lanes `lanes` of each page what `check_lanes` accepts.
pub fn churn(
    image: &GuestImage,
    counts: &[u64],
    lanes: &[churn::Lanes],
    last: &dyn Fn(usize) -> u64,
    read: Read<'_>,
) -> Result<(), churn::Wrong> {
    let layout = image.layout();
    for n in 0..churn::STABLE_PAGES {
        let page = Page::read(read, 0, churn::stable_gpa(layout, n));
        for offset in (0..PAGE).step_by(8) {
            let id = (offset.wrapping_sub(churn::COUNTS) / 8) as usize;
            let (what, expected) = match (offset, counts.get(id)) {
                (churn::IDENTITY, _) => ("identity", churn::identity(churn::STABLE, n)),
                (_, Some(&count)) => {
                    let passes = count / churn::STABLE_PAGES;
                    let more = u64::from(n < count % churn::STABLE_PAGES);
                    ("count", churn::count(n, id as u64, passes + more))
                }
                _ if churn::is_lane(offset) => continue,
                _ => ("word that nobody writes", 0),
            };
            let seen = page.word(offset);
            if seen != expected {
                let (memory, offset) = (churn::STABLE, n * PAGE + offset);
                return Err(churn::Wrong { what, memory, offset, expected, seen });
            }
        }
        let none = churn::Lanes::default();
        let lanes = lanes.get(n as usize).unwrap_or(&none);
        let word = |offset: u64| page.word(offset % PAGE);
        churn::check_lanes(churn::STABLE, n, lanes, &word, last)?;
    }
    Ok(())
}
