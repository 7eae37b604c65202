// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine has promised so far, and every use of a translation that breaks it.
//!
//! Nothing is reported that the promises allow. A translation is stamped *after* its entry was read,
//! by a processor that is inside the guest; a promise is noted *after* the operation has returned, and
//! taken back *before* the operation that ends it begins. So a stamp from before a promise, used after
//! it, is a use of what should be gone. (A stamp may be later than the entry that it is for: a stale use
//! in that short time goes unseen.)

use super::world::{PAGES, REGIONS, TABLES};
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Page `page` of region `region` of the guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    pub region: usize,
    pub page: usize,
}

impl Spot {
    fn index(self) -> usize {
        self.region * PAGES + self.page
    }
}

/// What an operation takes away from a spot until another gives it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any use: a host invalidation.
    Access,
    /// Writes: the host has made the page read-only.
    HostWrite,
    /// Writes: the slot is read-only.
    SlotWrite,
}

const KINDS: [Kind; 3] = [Kind::Access, Kind::HostWrite, Kind::SlotWrite];

/// What was promised of one spot.
#[derive(Default)]
struct Promises {
    /// Banks of memory that may be behind it, as a mask.
    banks: AtomicU64,
    /// Pages of its bank that may be behind it: one in each half.
    pages: AtomicU64,
    /// For each kind how often it was taken away and given back: odd while it is away.
    away: [AtomicU64; 3],
    /// The last harvest that has returned and reported the page.
    harvested: AtomicU64,
}

const fn both(page: usize, other: usize) -> u64 {
    (page as u64) << 32 | other as u64
}

/// When a translation was made.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    made: u64,
    away: [u64; 3],
    harvests: u64,
}

/// What a cached translation says, as far as promises are about it.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    pub spot: Spot,
    pub write: bool,
    /// Bank and page of it that the translation leads to; `None` if that is no guest memory.
    pub target: Option<(usize, usize)>,
    pub stamp: Stamp,
    /// The time of the last complete zap when the processor went inside.
    pub zapped: u64,
}

/// A use of a translation that should have been forgotten.
#[derive(Clone, Debug)]
pub struct Report {
    pub what: &'static str,
    pub at: Use,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:x?}", self.what, self.at)
    }
}

/// See the module.
pub struct Watch {
    clock: AtomicU64,
    spots: Vec<Promises>,
    /// Whether shadowed guest tables are never writable; else leaf tables may be.
    protects: bool,
    /// When something derived from the region's page table was last seen in the shadow.
    derived: Vec<AtomicU64>,
    /// When the last zap began that has returned.
    zapped: AtomicU64,
    /// Harvests that have begun.
    harvests: AtomicU64,
    reports: Mutex<Vec<Report>>,
}

impl Watch {
    /// `pages` are the pages of their banks that are behind the spots, in order.
    pub fn new(pages: impl Iterator<Item = usize>, protects: bool) -> Self {
        let promises =
            |page| Promises { pages: AtomicU64::new(both(page, page)), ..<_>::default() };
        Self {
            clock: AtomicU64::new(1),
            spots: pages.map(promises).collect(),
            protects,
            derived: (0..REGIONS).map(|_| AtomicU64::new(0)).collect(),
            zapped: AtomicU64::new(0),
            harvests: AtomicU64::new(0),
            reports: Mutex::default(),
        }
    }

    /// A time that nothing else has.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }

    fn spot(&self, spot: Spot) -> &Promises {
        &self.spots[spot.index()]
    }

    fn region(&self, region: usize) -> &[Promises] {
        &self.spots[region * PAGES..(region + 1) * PAGES]
    }

    /// From now on the bank may be behind the region, too.
    pub fn may_show(&self, region: usize, bank: usize) {
        for spot in self.region(region) {
            spot.banks.fetch_or(1 << bank, SeqCst);
        }
    }

    /// Nobody finds anything but this bank, if any, behind the region any more.
    pub fn shows_only(&self, region: usize, bank: Option<usize>) {
        let mask = bank.map_or(0, |bank| 1 << bank);
        self.region(region).iter().for_each(|spot| spot.banks.store(mask, SeqCst));
    }

    /// The guest is about to write an entry, with which the other page of the bank is behind the spot.
    /// Only the processor that does so may use the spot.
    pub fn may_lead(&self, spot: Spot, pages: [usize; 2]) {
        self.spot(spot).pages.store(both(pages[0], pages[1]), SeqCst);
    }

    /// The guest has invalidated the address: only this page may be behind it.
    pub fn leads_to(&self, spot: Spot, page: usize) {
        self.may_lead(spot, [page; 2]);
    }

    /// The operation has returned that takes this away.
    pub fn taken(&self, spots: impl Iterator<Item = Spot>, kind: Kind) {
        for spot in spots {
            let before = self.spot(spot).away[kind as usize].fetch_add(1, SeqCst);
            assert_eq!(before % 2, 0, "{spot:?} {kind:?}: taken twice");
        }
    }

    /// The operation begins that gives it back.
    pub fn given(&self, spots: impl Iterator<Item = Spot>, kind: Kind) {
        for spot in spots {
            let before = self.spot(spot).away[kind as usize].fetch_add(1, SeqCst);
            assert_eq!(before % 2, 1, "{spot:?} {kind:?}: given back twice");
        }
    }

    /// A harvest begins.
    pub fn harvest_begins(&self) -> u64 {
        self.harvests.fetch_add(1, SeqCst) + 1
    }

    /// The harvest has returned and reported the page.
    pub fn harvested(&self, harvest: u64, spot: Spot) {
        self.spot(spot).harvested.fetch_max(harvest, SeqCst);
    }

    /// The zap that began at `begun` has returned.
    pub fn zapped(&self, begun: u64) {
        self.zapped.fetch_max(begun, SeqCst);
    }

    /// When the last zap began that has returned.
    pub fn last_zap(&self) -> u64 {
        self.zapped.load(SeqCst)
    }

    /// A processor has found an entry derived from the region's page table; it looked after `before`.
    pub fn derived(&self, region: usize, before: u64) {
        self.derived[region].fetch_max(before, SeqCst);
    }

    /// For a translation of the spot whose entry has been read just now.
    pub fn stamp(&self, spot: Spot) -> Stamp {
        let promises = self.spot(spot);
        Stamp {
            away: KINDS.map(|kind| promises.away[kind as usize].load(SeqCst)),
            harvests: self.harvests.load(SeqCst),
            made: self.now(),
        }
    }

    /// Whether the translation may be used now. If not, that is on record.
    pub fn may_use(&self, at: Use) -> bool {
        let wrong = self.wrong(at);
        if let Some(what) = wrong {
            self.report(what, at);
        }
        wrong.is_none()
    }

    /// A processor has walked ahead, by a table that it has not been told to forget.
    pub fn speculated(&self, spot: Spot, target: Option<(usize, usize)>) {
        if target.is_none_or(|(_, page)| !self.may_be(spot, page)) {
            let (stamp, zapped) = (self.stamp(spot), self.last_zap());
            let at = Use { spot, write: false, target, stamp, zapped };
            self.report("a remembered table is another's", at);
        }
    }

    /// Whether this page of its bank may be behind the spot.
    fn may_be(&self, spot: Spot, page: usize) -> bool {
        let pages = self.spot(spot).pages.load(SeqCst);
        [pages >> 32, pages & 0xffff_ffff].contains(&(page as u64))
    }

    /// A processor has fetched an instruction of which one half was patched.
    pub fn half_patched(&self, spot: Spot) {
        let (stamp, zapped) = (self.stamp(spot), self.last_zap());
        let at = Use { spot, write: false, target: None, stamp, zapped };
        self.report("half of it was patched", at);
    }

    fn report(&self, what: &'static str, at: Use) {
        self.reports.lock().unwrap().push(Report { what, at });
    }

    fn wrong(&self, at: Use) -> Option<&'static str> {
        let Use { spot, write, target, stamp, zapped } = at;
        let Some((bank, page)) = target else { return Some("leads to no guest memory") };
        let promises = self.spot(spot);
        if !self.may_be(spot, page) {
            return Some("leads to another page than the guest's tables");
        }
        if promises.banks.load(SeqCst) >> bank & 1 == 0 {
            return Some("leads to memory that is not there any more");
        }
        // Odd when it was made means that a walk found what nobody may have installed.
        let broken = |kind: Kind| {
            let (now, made) =
                (promises.away[kind as usize].load(SeqCst), stamp.away[kind as usize]);
            now != made || made % 2 != 0
        };
        if broken(Kind::Access) {
            return Some("used although the host has taken the page away");
        }
        if stamp.made < zapped {
            return Some("from before everything was zapped");
        }
        if !write {
            return None;
        }
        if broken(Kind::HostWrite) {
            return Some("written although the host has made the page read-only");
        }
        if broken(Kind::SlotWrite) {
            return Some("written although the slot is read-only");
        }
        if promises.harvested.load(SeqCst) > stamp.harvests {
            return Some("written unnoticed after a harvest");
        }
        let table =
            (self.protects && spot.region == TABLES).then(|| self.derived[spot.page].load(SeqCst));
        if table.is_some_and(|derived| derived > stamp.made) {
            return Some("written although it is a shadowed guest table");
        }
        None
    }

    /// Everything reported so far.
    pub fn take_reports(&self) -> Vec<Report> {
        std::mem::take(&mut self.reports.lock().unwrap())
    }

    /// Whether anything was reported.
    pub fn has_reports(&self) -> bool {
        !self.reports.lock().unwrap().is_empty()
    }
}
