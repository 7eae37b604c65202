// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a vCPU does in a storm, and what it must find.

mod code;
mod devices;
mod logged;
mod shared;

use crate::guest::{
    AWAY, BLOCK, BLOCKS_AT, Guest, LARGE, LEAF, NEWS, OWN, PAGE, PASSING, SHARED, data, gva,
    leaf_entry, middle_entry, window, word,
};
use crate::seeds::{below, one_in};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::mmio::Initiator;
use mmu_core::paging::{Access, Invpcid, bits};
use mmu_core::vcpu::{Session, SoftExit, SoftVcpu};

/// Operations of a vCPU; of one that has only few kinds of them; and of one whose last operation is looked
/// at.
const OPERATIONS: u64 = 12;
const FEW_OPERATIONS: u64 = 5;
const MANY_OPERATIONS: u64 = 30;

/// What a vCPU is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// All that guests do.
    All,
    /// Pages of any vCPU, looked at from a state in which nothing is remembered.
    Look,
    /// Faults that are served once, and left as they are.
    Fault,
    /// Its own pages and tables, edited.
    Edit,
    /// Its entry of a table that all write natively.
    Share,
    /// Stores to a page that say when they are done.
    Store,
    /// The same with a small dirty ring.
    Ring,
    /// The same through pins.
    Pin,
    /// The same to a page that may be in a block.
    StoreLarge,
    /// The entry of the page to which another one stores.
    Move,
    /// Code, which is patched.
    Code,
    /// Devices.
    Devices,
    /// Pages behind a table that moves with them.
    Tables,
}

/// One thing that a vCPU does.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Store,
    Load,
    Look,
    SwapPages,
    SwapTables,
    MapLarge,
    TakeRight,
    TellNews,
    HearNews,
    /// An access to one of so many virtual pages from the first one on.
    Somewhere(u64, u64),
    Fault,
    LoadRoot,
    ToggleWp,
    Reset,
    Point,
    FlushShared,
    StoreShared,
    StoreEmulated,
    StorePinned,
    StoreLarge,
    MoveShared,
    Patch,
    Fetch,
    Device,
    BehindTable,
}

impl Work {
    /// Each of these is as likely as the others.
    const fn operations(self) -> &'static [Operation] {
        use Operation::*;
        match self {
            Self::All => &[
                Store,
                Store,
                Load,
                Load,
                SwapPages,
                SwapPages,
                SwapTables,
                MapLarge,
                TakeRight,
                TellNews,
                TellNews,
                HearNews,
                HearNews,
                Somewhere(AWAY, 8),
                Somewhere(PASSING, 8),
                Somewhere(LARGE, 4),
                Fault,
                LoadRoot,
                ToggleWp,
                Reset,
            ],
            Self::Look => &[Look, Look, Look, LoadRoot, ToggleWp],
            Self::Fault => &[Fault, Fault, Fault, LoadRoot],
            Self::Edit => &[Store, SwapPages, SwapPages, SwapTables, Load, Reset],
            Self::Share => &[Point, Point, Point, FlushShared, FlushShared],
            Self::Store => &[StoreShared],
            Self::Ring => &[StoreShared, StoreShared, StoreEmulated],
            Self::Pin => &[StorePinned, StorePinned, Load],
            Self::StoreLarge => &[StoreLarge],
            Self::Move => &[MoveShared],
            Self::Code => &[Patch, Fetch, Fetch],
            Self::Devices => &[Device],
            Self::Tables => &[BehindTable],
        }
    }
}

/// A vCPU with pages and tables of its own.
struct Cpu<'g> {
    guest: &'g Guest,
    id: u64,
    cpu: SoftVcpu,
    user: bool,
    /// Its ways onto both buses, once it has used them.
    initiators: Option<[Initiator; 2]>,
    own: Own,
}

/// What is in the pages and tables of a vCPU.
struct Own {
    /// Its leaf tables: the data page behind each entry. What each of its data pages has in its first
    /// word.
    behind: [[u64; LEAF as usize]; 2],
    stored: [u64; OWN as usize],
    /// The leaf table in each half of its pages.
    order: [u64; 2],
}

/// Runs vCPU number `id`, which is returned with nothing flushed.
pub(crate) fn run(guest: &Guest, id: u64, work: Work) -> SoftVcpu {
    let half = |half: u64| [0, 1, 2, 3].map(|page| id * OWN + half * LEAF + page);
    let mut own = Own { behind: [half(0), half(1)], stored: [0; OWN as usize], order: [0, 1] };
    // Room for those that an operation counts on from its own.
    let many = match work {
        Work::All => OPERATIONS,
        Work::Fault => FEW_OPERATIONS,
        _ => MANY_OPERATIONS,
    };
    let mut values = (1..=many).map(|n| (id + 1) << 32 | n << 8);
    // It goes now and then, and another one comes in its place.
    loop {
        let vcpu = guest.logged_vcpu(work == Work::Ring);
        let mut cpu = Cpu { guest, id, cpu: vcpu, user: true, initiators: None, own };
        let goes = values.by_ref().any(|value| {
            cpu.user = !one_in(4);
            let operations = work.operations();
            cpu.operate(operations[below(operations.len() as u64) as usize], value);
            one_in(40)
        });
        if !goes {
            guest.has_worked();
            return cpu.cpu;
        }
        own = cpu.own;
    }
}

impl Cpu<'_> {
    fn operate(&mut self, operation: Operation, value: u64) {
        let page = below(OWN);
        match operation {
            Operation::Store => self.store(page, value),
            Operation::Load => self.load(),
            Operation::Look => self.look_afresh(),
            Operation::SwapPages => self.swap_pages(page, below(OWN)),
            Operation::SwapTables => self.swap_tables(),
            Operation::MapLarge => self.map_large(below(2), value),
            Operation::TakeRight => self.take_right(page),
            Operation::TellNews if self.id == 0 => self.tell_news(),
            Operation::TellNews | Operation::HearNews => self.hear_news(),
            Operation::Somewhere(first, pages) => self.somewhere(first + below(pages), value),
            Operation::Fault => self.fault(page),
            Operation::LoadRoot => Guest::load_root(&mut self.cpu, below(2)),
            Operation::ToggleWp => {
                let cr0 = self.cpu.vcpu().regs().cr0;
                self.cpu.vcpu_mut().set_cr0(cr0 ^ bits::CR0_WP).unwrap();
            }
            Operation::Reset => self.cpu.vcpu_mut().reset_context(),
            Operation::Point => self.point(),
            Operation::FlushShared => self.flush_shared(),
            Operation::StoreShared => self.store_shared(value),
            Operation::StoreEmulated => self.store_emulated(value),
            Operation::StorePinned => self.store_pinned(value),
            Operation::StoreLarge => self.store_large(value),
            Operation::MoveShared => self.move_shared(),
            Operation::Patch => self.patch(),
            Operation::Fetch => _ = self.fetch(),
            Operation::Device => self.device(),
            Operation::BehindTable => self.behind_table(),
        }
    }

    fn at(&self, page: u64) -> Gva {
        gva(self.id * OWN + page)
    }

    fn behind(&self, page: u64) -> u64 {
        self.own.behind[self.own.order[(page / LEAF) as usize] as usize][(page % LEAF) as usize]
    }

    fn entry(&self, page: u64) -> Gpa {
        leaf_entry(self.id * OWN + self.own.order[(page / LEAF) as usize] * LEAF + page % LEAF)
    }

    fn stored(&mut self, data_page: u64) -> &mut u64 {
        &mut self.own.stored[(data_page - self.id * OWN) as usize]
    }

    /// Twice in one session: the second time it goes where the first one went, as long as nobody asks it
    /// to flush.
    fn store(&mut self, page: u64, value: u64) {
        let (at, entry, user) = (self.at(page), self.entry(page), self.user);
        let mut session = self.cpu.session();
        session.store(at, &0u64.to_le_bytes(), user).unwrap();
        session.store(at, &value.to_le_bytes(), user).unwrap();
        drop(session);
        let place = self.behind(page);
        *self.stored(place) = value;
        let used = self.guest.read(entry).unwrap() & (bits::A | bits::D);
        assert_eq!(used, bits::A | bits::D, "R35: a store to virtual page {page} left no trace");
    }

    /// In one session, so that others wait for this vCPU to come out.
    fn load(&mut self) {
        let pages = [0; 3].map(|_| below(OWN));
        let expected = pages.map(|page| {
            let place = self.behind(page);
            (*self.stored(place), place)
        });
        let at = pages.map(|page| self.at(page));
        let mut session = self.cpu.session();
        for (at, (value, place)) in at.into_iter().zip(expected) {
            look(&mut session, at, self.user, place, value);
        }
    }

    /// Each look is a walk of the shadow tables. Nobody edits the guest's.
    fn look_afresh(&mut self) {
        let pages = [0; 4].map(|_| if one_in(3) { LARGE + below(4) } else { below(SHARED) });
        let user = one_in(2);
        let mut session = self.cpu.session();
        for page in pages {
            session.flush();
            let seen = session.load_u64(gva(page).wrapping_add(8), user).unwrap();
            let named = if page < LARGE { data(page).0 / PAGE } else { BLOCKS_AT + page - LARGE };
            assert_eq!(seen, named, "stale: virtual page {page} is not what it is mapped to");
        }
    }

    /// Writes an entry of a table as guests and devices do; only as vCPUs do, if they have rings.
    fn edit(&mut self, entry: Gpa, value: u64) {
        let (at, bytes) = (window(entry), value.to_le_bytes());
        let way = below(8);
        match if self.guest.rings().is_some() { way | 2 } else { way } {
            0 => self.guest.write(entry, value),
            1 => {
                let page = self.guest.mmu.pin_page(Gpa(entry.0 & !(PAGE - 1)), true).unwrap();
                page.write(entry.0 % PAGE, &bytes).unwrap();
                self.guest.mmu.note_write(entry, 8);
            }
            2 => {
                let who = Access { user: self.user, ..Access::write() };
                self.cpu.session().vcpu().write(at, &bytes, who).unwrap();
            }
            _ => self.cpu.session().store(at, &bytes, self.user).unwrap(),
        }
    }

    /// Flushes translations of these of its pages at least.
    fn flush(&mut self, pages: impl Iterator<Item = u64>) {
        let pages: Vec<_> = pages.map(|page| self.at(page)).collect();
        self.forget(&pages);
    }

    fn forget(&mut self, pages: &[Gva]) {
        match below(8) {
            0 | 1 => self.cpu.session().flush(),
            2 => self.cpu.session().invpcid(Invpcid::All),
            3 => Guest::load_root(&mut self.cpu, below(2)),
            _ => {
                let mut session = self.cpu.session();
                pages.iter().for_each(|at| session.invlpg(*at));
            }
        }
    }

    /// Two of its pages change places.
    fn swap_pages(&mut self, one: u64, other: u64) {
        let places = [self.behind(one), self.behind(other)];
        for (page, place) in [one, other].into_iter().zip([places[1], places[0]]) {
            let table = self.own.order[(page / LEAF) as usize];
            self.own.behind[table as usize][(page % LEAF) as usize] = place;
        }
        for page in [one, other] {
            self.edit(self.entry(page), word(data(self.behind(page))));
        }
        self.flush([one, other].into_iter());
        let mut session = self.cpu.session();
        for (page, place) in [one, other].into_iter().zip([places[1], places[0]]) {
            let value = self.own.stored[(place - self.id * OWN) as usize];
            look(&mut session, gva(self.id * OWN + page), self.user, place, value);
        }
    }

    /// The entry for the leaf table of one half.
    fn middle(&self, half: u64) -> Gpa {
        middle_entry(self.id * OWN + half * LEAF)
    }

    fn restore_middle(&mut self, half: u64) {
        let table = self.own.order[half as usize];
        let leaf = leaf_entry(self.id * OWN + table * LEAF);
        self.edit(self.middle(half), word(leaf));
    }

    /// Its two tables change places.
    fn swap_tables(&mut self) {
        self.own.order.swap(0, 1);
        self.restore_middle(0);
        self.restore_middle(1);
        self.flush(0..OWN);
        self.load();
    }

    /// Half of its pages are, for a moment, a large page.
    fn map_large(&mut self, half: u64, value: u64) {
        let place = self.id * OWN + half * LEAF;
        let entry = word(data(place)) | bits::PS;
        assert_eq!(entry & (BLOCK - 1) & !0xfff, 0);
        self.edit(self.middle(half), entry);
        self.flush(half * LEAF..(half + 1) * LEAF);
        let (user, at) = (self.user, self.at(half * LEAF));
        let expected = [0, 1, 2].map(|page| *self.stored(place + page));
        let last = at.wrapping_add(3 * PAGE);
        let mut session = self.cpu.session();
        for (page, value) in (0..).zip(expected) {
            look(&mut session, at.wrapping_add(page * PAGE), user, place + page, value);
        }
        session.store(last, &value.to_le_bytes(), user).unwrap();
        look(&mut session, last, user, place + 3, value);
        drop(session);
        *self.stored(place + 3) = value;
        self.restore_middle(half);
        self.flush(half * LEAF..(half + 1) * LEAF);
        self.load();
    }

    /// One of its pages may not be written for a moment, or not be used.
    fn take_right(&mut self, page: u64) {
        let (at, entry, place) = (self.at(page), self.entry(page), self.behind(page));
        let value = *self.stored(place);
        let right = if one_in(2) { bits::RW } else { bits::P };
        self.edit(entry, word(data(place)) & !right);
        self.flush([page].into_iter());
        let refused = self.cpu.session().store(at, &[0xff; 8], true);
        assert!(matches!(refused, Err(SoftExit::Fault(_))), "virtual page {page}: {refused:?}");
        if right == bits::RW {
            look(&mut self.cpu.session(), at, self.user, place, value);
        }
        self.edit(entry, word(data(place)));
        self.flush([page].into_iter());
        self.load();
    }

    /// Changes what all vCPUs see, or only has it found unused.
    fn tell_news(&mut self) {
        if one_in(3) {
            let (entry, value) = self.guest.old_news();
            return self.edit(entry, value);
        }
        let (entry, value) = self.guest.news();
        self.edit(entry, value);
        self.guest.tell();
    }

    /// Flushes, and sees what was told before.
    fn hear_news(&mut self) {
        let told = self.guest.told();
        self.forget(&[gva(NEWS)]);
        let seen = self.cpu.session().load_u64(gva(NEWS), self.user).unwrap();
        assert!(seen >= told, "stale: news {seen} after a flush, but {told} had been told before");
    }

    /// An access that may find nothing, or be refused by the host.
    fn somewhere(&mut self, page: u64, value: u64) {
        let (at, user) = (gva(page), self.user);
        let mut session = self.cpu.session();
        let done = match one_in(3) {
            true => session.load_u64(at, user).map(drop),
            false => [0, value]
                .iter()
                .try_for_each(|value| session.store(at, &value.to_le_bytes(), user)),
        };
        match done {
            Ok(()) | Err(SoftExit::Mmio(_) | SoftExit::HostReadOnly(_)) => {}
            Err(other) => panic!("virtual page {page}: {other:?}"),
        }
    }

    /// A fault that may be of no use, or stall.
    fn fault(&mut self, page: u64) {
        let (at, user) = (self.at(page), self.user);
        let access = if one_in(2) { Access::read() } else { Access::write() };
        let _ = self.cpu.vcpu_mut().fault(at, Access { user, ..access });
    }
}

/// Looks at both words of a page that is mapped to a data page.
fn look(session: &mut Session<'_>, at: Gva, user: bool, place: u64, value: u64) {
    let mut words = [0; 2];
    for (word, value) in (0..).zip(words.iter_mut()) {
        *value = session.load_u64(at.wrapping_add(word * 8), user).unwrap();
    }
    let page = data(place).0 / PAGE;
    assert_eq!(words, [value, page], "stale: {at} is not what it was mapped to (page {page})");
}
