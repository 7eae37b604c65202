// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the address spaces lie in guest-physical memory, and what is in them at the start.
//!
//! They are made of the memory of the data ranges, from its start on, in whole 2M: the *mirror*, which
//! every space maps twice, by 4K pages at [`MIRROR_GVA`] and by 2M pages at
//! [`MIRROR_LARGE_GVA`](crate::guest::layout::MIRROR_LARGE_GVA). The last [`PROBES`] pages of its first 2M
//! are kept free for the slots of 2M to show.

use super::*;
use crate::guest::GuestImage;
use crate::guest::layout::{ImageError, Layout, MIRROR_GVA, SPACE_GVA};
use crate::guest::paging::{NX, P, PS, U, W, index};
use std::collections::BTreeMap;

/// Size of a large page.
pub(super) const LARGE: u64 = 2 << 20;
/// What entries that refer to tables carry.
const TABLE: u64 = P | W | U;
/// What entries of pages carry at the start.
const LEAF: u64 = P | W | U | NX;
/// Most that slots of 2M show, in units of 2M.
const VIEWS: u64 = 1 << VIEW_BITS;
/// Most that the mirror's tables can map, in units of 2M.
const MOST: u64 = 512;

/// Pages by guest-physical address.
pub(super) type Pages = BTreeMap<u64, Box<[u64; 512]>>;

/// The address spaces of a guest.
#[derive(Clone, Debug)]
pub struct Spaces {
    vcpus: usize,
    /// Guest-physical address of the mirror, and its size in units of 2M.
    base: u64,
    chunks: u64,
    views: u64,
    /// Of the mirror's tables: pointers, directory of 4K pages, directory of 2M pages, page tables.
    mirror: u64,
    shared: u64,
    /// [`OWN`] for each vCPU.
    blocks: Vec<u64>,
    desks: Vec<u64>,
}

/// Pages that are not taken yet.
struct Room {
    next: u64,
    end: u64,
}

impl Room {
    /// Adjoining pages, none of them shown by a slot of 2M.
    fn take(&mut self, pages: u64) -> Option<u64> {
        let last = self.next % LARGE / PAGE + pages;
        if last > PROBE {
            self.next = self.next.next_multiple_of(LARGE);
        }
        let taken = self.next;
        self.next += pages * PAGE;
        (self.next <= self.end && pages <= PROBE).then_some(taken)
    }
}

impl Spaces {
    /// Finds room for them.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoSpaces`] if the guest has too little memory for its vCPUs.
    pub fn new(layout: &Layout) -> Result<Self, ImageError> {
        let (vcpus, memory) = (layout.vcpus(), layout.memory());
        let start = layout.data_gpa();
        let mut base = start - start % LARGE;
        if start > base + PROBE * PAGE {
            base += LARGE;
        }
        let most = ((memory / LARGE).saturating_sub(base / LARGE)).min(MOST);
        let made = (2..=most).find_map(|chunks| {
            // More than are needed for the sake of the slots of 2M.
            let enough = chunks >= VIEWS || chunks == most;
            let mut room = Room { next: start.max(base), end: base + chunks * LARGE };
            let mirror = room.take(3 + chunks)?;
            let shared = room.take(SHARED_PAGES)?;
            let block = |_| room.take(block::PAGES);
            let blocks = (0..vcpus * OWN).map(block).collect::<Option<_>>()?;
            let desks = (0..vcpus).map(|_| room.take(1)).collect::<Option<_>>()?;
            let views = if chunks < VIEWS { 2 } else { VIEWS };
            let made = Self { vcpus, base, chunks, views, mirror, shared, blocks, desks };
            enough.then_some(made)
        });
        made.ok_or(ImageError::NoSpaces { memory_mib: memory >> 20, vcpus })
    }

    /// Where the mirror shows a guest-physical address.
    #[must_use]
    pub fn mirror(&self, gpa: u64) -> u64 {
        MIRROR_GVA + gpa - self.base
    }

    /// Guest-physical address of vCPU `id`'s page of arguments and results.
    #[must_use]
    pub fn desk(&self, id: usize) -> u64 {
        self.desks[id]
    }

    /// CR3 of the space that is number `n` in reach of vCPU `id`.
    #[must_use]
    pub fn root(&self, id: usize, n: usize) -> u64 {
        self.block(id, n) + block::ROOT
    }

    /// Guest-physical address of that space's memory.
    #[must_use]
    pub fn block(&self, id: usize, n: usize) -> u64 {
        let before = (id + self.vcpus - 1) % self.vcpus;
        let owner = if n < OWN { id } else { before };
        self.blocks[owner * OWN + n % OWN]
    }

    /// Whether vCPU `id` edits a slot of that space.
    #[must_use]
    pub fn is_editor(&self, n: usize, slot: usize) -> bool {
        let foreign = (FOREIGN_SLOT..LARGE_SLOT).contains(&slot) || slot == LARGE_SLOT + 1;
        self.vcpus == 1 || foreign == (n >= OWN)
    }

    /// Guest-physical address of the first of the pages that all spaces share.
    #[must_use]
    pub fn shared(&self) -> u64 {
        self.shared
    }

    /// How many 2M the slots of 2M show: a power of two.
    #[must_use]
    pub fn views(&self) -> u64 {
        self.views
    }

    /// Guest-physical address of one of them.
    #[must_use]
    pub fn view(&self, n: u64) -> u64 {
        self.base + n * LARGE
    }

    /// All pages at the start.
    pub(super) fn pages(&self, image: &GuestImage) -> Pages {
        let mut pages = Pages::new();
        self.add_mirror(&mut pages);
        for n in 0..SHARED_PAGES {
            add(&mut pages, self.shared + n * PAGE, identity);
        }
        for view in 0..self.views {
            for n in PROBE..PROBE + PROBES {
                add(&mut pages, self.view(view) + n * PAGE, identity);
            }
        }
        for &block in &self.blocks {
            self.add_block(&mut pages, block, image.low_table());
        }
        for id in 0..self.vcpus {
            add(&mut pages, self.desks[id], |_, page| self.fill_desk(id, page));
        }
        pages
    }

    /// Writes them into the memory of the guest: `out` gets guest-physical addresses and bytes, a page
    /// at a time. To be called before each start of the program, while no vCPU runs.
    pub fn write(&self, image: &GuestImage, out: &mut dyn FnMut(u64, &[u8])) {
        for (gpa, words) in self.pages(image) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            out(gpa, &bytes);
        }
    }

    /// Whether the page is one of the guest's page tables, whose accessed and dirty bits come up.
    pub(super) fn is_table(&self, gpa: u64) -> bool {
        let mirror = self.mirror..self.mirror + (3 + self.chunks) * PAGE;
        let tables = |block: &u64| (*block..block + block::RECORDS).contains(&gpa);
        mirror.contains(&gpa) || self.blocks.iter().any(tables)
    }

    fn add_mirror(&self, pages: &mut Pages) {
        let [pointers, small, large, tables] = [0, 1, 2, 3].map(|n| self.mirror + n * PAGE);
        add(pages, pointers, |_, page| (page[0], page[1]) = (small | TABLE, large | TABLE));
        add(pages, small, |_, page| {
            for n in 0..self.chunks {
                page[n as usize] = (tables + n * PAGE) | TABLE;
            }
        });
        add(pages, large, |_, page| {
            for n in 0..self.chunks {
                page[n as usize] = (self.base + n * LARGE) | LEAF | PS;
            }
        });
        for n in 0..self.chunks {
            add(pages, tables + n * PAGE, |_, page| {
                for (entry, at) in page.iter_mut().zip(0..) {
                    *entry = (self.base + n * LARGE + at * PAGE) | LEAF;
                }
            });
        }
    }

    fn add_block(&self, pages: &mut Pages, block: u64, low: u64) {
        let mut entries = [0; SLOTS];
        for (slot, entry) in entries.iter_mut().enumerate() {
            let n = slot as u64;
            *entry = match slot {
                0..SHARED_SLOT => (block + block::PRIVATE + n % PRIVATE_PAGES * PAGE) | LEAF,
                SHARED_SLOT..LARGE_SLOT => (self.shared + n % SHARED_PAGES * PAGE) | LEAF,
                _ => self.base | LEAF | PS,
            };
        }
        add(pages, block + block::ROOT, |_, page| {
            page[0] = low | TABLE;
            page[index(MIRROR_GVA, 4)] = self.mirror | TABLE;
            page[index(SPACE_GVA, 4)] = (block + block::DIRECTORY_POINTERS) | TABLE;
        });
        add(pages, block + block::DIRECTORY_POINTERS, |_, page| {
            page[0] = (block + block::DIRECTORY) | TABLE;
        });
        add(pages, block + block::DIRECTORY, |_, page| {
            page[0] = (block + block::TABLE) | TABLE;
            for (n, &entry) in entries[LARGE_SLOT..].iter().enumerate() {
                page[LARGE_INDEX as usize + n] = entry;
            }
        });
        add(pages, block + block::TABLE, |_, page| {
            page[..LARGE_SLOT].copy_from_slice(&entries[..LARGE_SLOT]);
        });
        for n in 0..(SLOTS - LARGE_SLOT) as u64 {
            add(pages, block + block::SPLIT + n * PAGE, |_, _| ());
        }
        add(pages, block + block::RECORDS, |_, page| {
            for (slot, &entry) in entries.iter().enumerate() {
                page[(slot as u64 * RECORD + HISTORY) as usize / 8] = entry;
            }
        });
        for n in 0..PRIVATE_PAGES {
            add(pages, block + block::PRIVATE + n * PAGE, identity);
        }
    }

    fn fill_desk(&self, id: usize, page: &mut [u64; 512]) {
        let mut word = |offset: u64, value| page[offset as usize / 8] = value;
        word(desk::BASE, self.base);
        word(desk::SHARED, self.shared - self.base);
        word(desk::LAST_VIEW, self.views - 1);
        for n in 0..REACH {
            let mine = (0..SLOTS).filter(|slot| self.is_editor(n, *slot));
            word(desk::MINE + n as u64 * 8, mine.fold(0, |mask, slot| mask | 1 << slot));
            word(desk::BLOCKS + n as u64 * 8, self.block(id, n) - self.base);
        }
    }
}

fn add(pages: &mut Pages, gpa: u64, fill: impl FnOnce(u64, &mut [u64; 512])) {
    let mut page = Box::new([0; 512]);
    fill(gpa, &mut page);
    pages.insert(gpa, page);
}

/// A page that slots show.
fn identity(gpa: u64, page: &mut [u64; 512]) {
    page[0] = TAG | gpa;
}
