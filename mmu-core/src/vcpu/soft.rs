// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The software vCPU: walks the shadow tables as a processor does, with a TLB that obeys flushes.
//!
//! It is the consumer to use where there is no hardware, and to test with where there is. Like a
//! processor it walks without a read section: what keeps it right is the flush protocol alone.

use super::access::split;
use super::{AccessError, Entry, Vcpu, VcpuHandle};
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::memory::PAGE_WORDS;
use crate::memory::words::{self, Exchange};
use crate::paging::{Access, Fault, Invpcid, Kind};
use crate::shadow::{Downgrade, FrameId, Location, Outcome, Processor, Stall, index};
use crate::sync::{AtomicU64, Backoff, Ordering};
use core::fmt;
use core::ops::Range;

/// Entries of the TLB; direct-mapped.
const TLB: usize = if cfg!(loom) { 2 } else { 512 };

/// The software vCPU's side of the flush protocol. It polls for requests, so a kick has nothing to
/// do, and it remembers no tables at all.
#[derive(Debug)]
pub(crate) struct SoftProcessor;

impl Processor for SoftProcessor {
    fn kick(&self) {}

    fn forgets_outside(&self) -> bool {
        true
    }
}

/// Why an access was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SoftExit {
    /// The fault to deliver to the guest.
    #[error(transparent)]
    Fault(Fault),
    /// The access is the VMM's to emulate: no memory, or a write to read-only memory.
    #[error("no memory at guest-physical {0}")]
    Mmio(Gpa),
    /// A write to a page that the host has made read-only: the VMM's to make writable again.
    #[error("the host has made the page at guest-physical {0} read-only")]
    HostReadOnly(Gpa),
    /// The address is in the part of the address space that the consumer has reserved.
    #[error("{0} is reserved by the VMM")]
    Reserved(Gva),
    /// A locked access that cannot be made as one step.
    #[error("{}", AccessError::Unsupported { gva: *gva, size: *size })]
    Unsupported {
        /// Guest-virtual address.
        gva: Gva,
        /// Bytes.
        size: usize,
    },
    /// Somebody wants the thread back.
    #[error("the vCPU was asked to exit")]
    Requested,
    /// The dirty ring has reached its soft limit: collect pages, then go on.
    #[error("the dirty ring is full")]
    RingFull,
}

#[derive(Clone, Copy)]
struct Translation {
    /// Page and privilege; `u64::MAX` for an empty entry.
    tag: u64,
    page: *const AtomicU64,
    write: bool,
    execute: bool,
}

impl Translation {
    const NONE: Self =
        Self { tag: u64::MAX, page: core::ptr::null(), write: false, execute: false };
}

/// A software vCPU.
pub struct SoftVcpu {
    vcpu: Vcpu,
    tlb: Box<[Translation; TLB]>,
    /// Whether translations in the TLB may be of parts of one larger page of the guest's.
    fractured: bool,
    roots: [Option<FrameId>; 2],
}

// SAFETY: the pointers in the TLB are to guest memory, which is shared atomics; they are used only
// while the vCPU is inside, by whichever thread has it then.
unsafe impl Send for SoftVcpu {}

impl fmt::Debug for SoftVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftVcpu").field("vcpu", &self.vcpu).finish_non_exhaustive()
    }
}

impl SoftVcpu {
    pub(crate) fn new(vcpu: Vcpu) -> Self {
        Self { vcpu, tlb: Box::new([Translation::NONE; TLB]), fractured: false, roots: [None; 2] }
    }

    /// The vCPU itself: registers, and accesses through the guest's own tables.
    #[must_use]
    pub fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }

    /// The same, to change registers. The TLB is emptied, as a load of CR3 does.
    pub fn vcpu_mut(&mut self) -> &mut Vcpu {
        self.flush_all();
        &mut self.vcpu
    }

    /// Another thread's hold on this vCPU.
    #[must_use]
    pub fn handle(&self) -> VcpuHandle {
        self.vcpu.handle()
    }

    /// INVLPG: forgets the translations of one page of the guest's, whatever its size: all of them,
    /// though each is of 4 KiB here (SDM vol. 3, 5.10.4.1).
    pub fn invlpg(&mut self, gva: Gva) {
        if self.fractured {
            self.flush_all();
        }
        for user in [false, true] {
            let tag = tag(gva, user);
            let slot = &mut self.tlb[slot(gva)];
            if slot.tag == tag {
                *slot = Translation::NONE;
            }
        }
        self.vcpu.invlpg(gva);
    }

    /// Forgets all translations, as a load of CR3 does.
    pub fn flush(&mut self) {
        self.flush_all();
        self.vcpu.flush();
    }

    /// Goes inside the guest for a number of accesses. While the session lives, other threads that
    /// need a flush wait for its next access; end it before doing anything slow.
    pub fn session(&mut self) -> Session<'_> {
        Session { cpu: self, inside: false, stays: 0 }
    }

    fn flush_all(&mut self) {
        self.fractured = false;
        self.tlb.fill(Translation::NONE);
    }
}

/// A software vCPU inside the guest.
#[derive(Debug)]
pub struct Session<'v> {
    cpu: &'v mut SoftVcpu,
    inside: bool,
    /// How often it went inside.
    stays: u64,
}

impl Session<'_> {
    /// Reads guest-virtual memory. Each aligned 8-byte word is read atomically.
    ///
    /// # Errors
    ///
    /// [`SoftExit`]; nothing has been read then.
    pub fn load(&mut self, gva: Gva, buf: &mut [u8], user: bool) -> Result<(), SoftExit> {
        self.read(gva, buf, Access { user, ..Access::read() })
    }

    /// Reads instruction bytes: all from before a [patch](Vcpu::patch_code) of them, or from after it.
    ///
    /// # Errors
    ///
    /// [`SoftExit`]; nothing has been read then.
    pub fn fetch(&mut self, gva: Gva, buf: &mut [u8], user: bool) -> Result<(), SoftExit> {
        self.read(gva, buf, Access { user, ..Access::execute() })
    }

    /// Reads an aligned 8-byte word; rounds the address down.
    ///
    /// # Errors
    ///
    /// [`SoftExit`].
    #[inline]
    pub fn load_u64(&mut self, gva: Gva, user: bool) -> Result<u64, SoftExit> {
        let access = Access { user, ..Access::read() };
        match self.translate(gva, access)? {
            Found::Page(page) => Ok(self.load_word(page, gva)),
            Found::Emulate => self.read_word(gva, access),
        }
    }

    /// Writes guest-virtual memory; a write to a guest page table is emulated. Each part of an
    /// aligned 8-byte word is written as one.
    ///
    /// # Errors
    ///
    /// [`SoftExit`]; nothing has been written then.
    pub fn store(&mut self, gva: Gva, bytes: &[u8], user: bool) -> Result<(), SoftExit> {
        let access = Access { user, ..Access::write() };
        if let Some((value, mask)) = words::in_one(gva.0, bytes) {
            return match self.translate(gva, access)? {
                Found::Page(page) => {
                    words::store_masked(self.word_of(page, gva), value, mask);
                    Ok(())
                }
                Found::Emulate => self.emulate(|vcpu| vcpu.write(gva, bytes, access)),
            };
        }
        // No part is written before the fault of a later part is known.
        let Some(parts) = self.parts(gva, bytes.len(), access)? else {
            return self.emulate(|vcpu| vcpu.write(gva, bytes, access));
        };
        for (page, at, part) in parts.iter() {
            words::store(self.words_from(page, at), at.0 % 8, &bytes[part]);
        }
        Ok(())
    }

    /// Compares `size` bytes with `old` and exchanges them for `new` if they are equal, as one step
    /// with respect to every vCPU. `Ok(Err(now))` if they were something else.
    ///
    /// # Errors
    ///
    /// [`SoftExit`]; [`SoftExit::Unsupported`] where [`Vcpu::cmpxchg`] refuses.
    pub fn cmpxchg(
        &mut self,
        gva: Gva,
        size: usize,
        old: u128,
        new: u128,
        user: bool,
    ) -> Result<Result<(), u128>, SoftExit> {
        let unsupported = SoftExit::Unsupported { gva, size };
        let exchange = Exchange::new(gva.0, size, old, new).ok_or(unsupported)?;
        let access = Access { user, ..Access::write() };
        // A fault comes before the refusal of a split lock.
        self.touch(gva, size, access)?;
        match self.translate(gva, access)? {
            Found::Page(page) => exchange.apply(self.words_from(page, gva)).ok_or(unsupported),
            Found::Emulate => self.emulate(|vcpu| vcpu.cmpxchg(gva, size, old, new, access)),
        }
    }

    /// The vCPU, for accesses through the guest's own tables: goes outside until the next access.
    pub fn vcpu(&mut self) -> &Vcpu {
        self.leave();
        &self.cpu.vcpu
    }

    /// INVLPG.
    pub fn invlpg(&mut self, gva: Gva) {
        self.cpu.invlpg(gva);
    }

    /// INVPCID: forgets all translations.
    pub fn invpcid(&mut self, what: Invpcid) {
        self.cpu.flush_all();
        self.cpu.vcpu.invpcid(what);
    }

    /// Forgets all translations, as a load of CR3 does.
    pub fn flush(&mut self) {
        self.cpu.flush();
    }

    /// Goes outside until the next access.
    pub fn leave(&mut self) {
        if self.inside {
            self.inside = false;
            self.cpu.vcpu.leave();
        }
    }

    /// Reads guest-virtual memory as part of any kind of access: the first half of a
    /// read-modify-write needs the right to write, and its fault is a write's.
    ///
    /// # Errors
    ///
    /// [`SoftExit`]; nothing has been read then.
    pub fn read(&mut self, gva: Gva, buf: &mut [u8], access: Access) -> Result<(), SoftExit> {
        if gva.0 % 8 + buf.len() as u64 <= 8 && !buf.is_empty() {
            return match self.translate(gva, access)? {
                Found::Page(page) => {
                    let skip = (gva.0 % 8) as usize;
                    let word = self.load_word(page, gva).to_le_bytes();
                    buf.copy_from_slice(&word[skip..skip + buf.len()]);
                    Ok(())
                }
                // These bytes, not their word: what is refused names the address of the access.
                Found::Emulate => self.emulate(|vcpu| vcpu.read(gva, buf, access)),
            };
        }
        // R38: all in one stay inside, so that a patch of code comes before all of it or after it.
        let Some(parts) = self.parts(gva, buf.len(), access)? else {
            return self.emulate(|vcpu| vcpu.read(gva, buf, access));
        };
        for (page, at, part) in parts.iter() {
            words::load(self.words_from(page, at), at.0 % 8, &mut buf[part]);
        }
        Ok(())
    }

    /// Makes the translations of an access that crosses a page, in ascending order: a fault is that of
    /// the first page that has one, at its first byte of the access (SDM vol. 3, 5.7). That the end is
    /// not canonical comes before the page fault of the beginning (SDM vol. 1, 3.3.7.1).
    #[inline]
    fn touch(&mut self, gva: Gva, len: usize, access: Access) -> Result<(), SoftExit> {
        let last = gva.wrapping_add(len.saturating_sub(1) as u64);
        if gva.page() == last.page() {
            return Ok(());
        }
        let mode = &self.cpu.vcpu.mode;
        let wrong = split(gva, len).find_map(|(at, _)| mode.linear_of(at, access).err());
        if let Some(fault) = wrong {
            return Err(self.raise(fault));
        }
        let mut at = gva;
        loop {
            self.translate(at, access)?;
            if at.page() == last.page() {
                return Ok(());
            }
            at = at.page().wrapping_add(PAGE_SIZE);
        }
    }

    /// The aligned word around `gva`, through the guest's own tables.
    #[cold]
    fn read_word(&mut self, gva: Gva, access: Access) -> Result<u64, SoftExit> {
        let mut bytes = [0; 8];
        self.emulate(|vcpu| vcpu.read(Gva(gva.0 & !7), &mut bytes, access))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The aligned word around `gva`, read or fetched.
    #[inline]
    fn load_word(&self, page: *const AtomicU64, gva: Gva) -> u64 {
        // Acquire, as x86 loads are.
        self.word_of(page, gva).load(Ordering::Acquire)
    }

    /// The host pages of an access, all found in the present stay inside; `None` if not all of it can
    /// go through the shadow.
    #[inline]
    fn parts(&mut self, gva: Gva, len: usize, access: Access) -> Result<Option<Parts>, SoftExit> {
        let head = len.min((PAGE_SIZE - gva.page_offset()) as usize);
        loop {
            let mut parts = Parts { gva, head, first: None, rest: Vec::new() };
            if len == 0 {
                return Ok(Some(parts));
            }
            self.touch(gva, len, access)?;
            let Found::Page(page) = self.translate(gva, access)? else { return Ok(None) };
            parts.first = Some(page);
            let stay = self.stays;
            for (at, part) in split(gva, len).skip(1) {
                let Found::Page(page) = self.translate(at, access)? else { return Ok(None) };
                parts.rest.push((page, at, part));
            }
            // A page from before it went outside may be somebody else's memory by now.
            if self.stays == stay {
                return Ok(Some(parts));
            }
        }
    }

    /// The words of the page from the one around `gva` on.
    fn words_from(&self, page: *const AtomicU64, gva: Gva) -> &[AtomicU64] {
        // SAFETY: as in `word_of`, for the whole page.
        let words = unsafe { core::slice::from_raw_parts(page, PAGE_WORDS) };
        words.get(word_index(gva)..).unwrap_or_default()
    }

    #[inline]
    fn word_of(&self, page: *const AtomicU64, gva: Gva) -> &AtomicU64 {
        // SAFETY: `page` points at a page of a slot's backing, PAGE_WORDS words long. It was found
        // by a walk of the shadow tables, or in the TLB, since the vCPU went inside; whoever
        // releases the backing first takes the page's entries away and waits until this vCPU has
        // left or drained, which needs this same `&self`.
        unsafe { &*page.add(word_index(gva)) }
    }

    /// Carries out an access through the guest's own tables, outside.
    fn emulate<T>(
        &mut self,
        access: impl FnOnce(&Vcpu) -> Result<T, AccessError>,
    ) -> Result<T, SoftExit> {
        self.leave();
        let done = access(&self.cpu.vcpu);
        done.map_err(|error| match error {
            AccessError::Fault(fault) => self.raise(fault),
            AccessError::Mmio { gpa, .. } | AccessError::Apic { gpa } => SoftExit::Mmio(gpa),
            AccessError::HostReadOnly { gpa } => SoftExit::HostReadOnly(gpa),
            AccessError::Unsupported { gva, size }
            | AccessError::TooLong { gva, len: size, .. } => SoftExit::Unsupported { gva, size },
        })
    }

    /// The host page behind an address, from the TLB, the shadow tables or a fault.
    #[inline]
    fn translate(&mut self, gva: Gva, access: Access) -> Result<Found, SoftExit> {
        // EFLAGS.AC, which chooses the tables, does not count for these.
        if access.implicit {
            return Ok(Found::Emulate);
        }
        if self.inside && !self.cpu.vcpu.cursor.has_requests() {
            let entry = &self.cpu.tlb[slot(gva)];
            let allowed = match access.kind {
                Kind::Read => true,
                Kind::Write => entry.write,
                Kind::Execute => entry.execute,
            };
            if entry.tag == tag(gva, access.user) && allowed {
                return Ok(Found::Page(entry.page));
            }
        }
        self.translate_slow(gva, access)
    }

    #[cold]
    fn translate_slow(&mut self, gva: Gva, access: Access) -> Result<Found, SoftExit> {
        loop {
            if self.go_inside(access.user)? {
                if let Some(found) = self.walk(gva, access) {
                    return Ok(Found::Page(found));
                }
            }
            self.leave();
            match self.cpu.vcpu.fault(gva, access) {
                Ok(Outcome::Fixed) => {}
                Ok(Outcome::Guest(fault)) => return Err(self.raise(fault)),
                Ok(Outcome::Emulate { .. }) => return Ok(Found::Emulate),
                Ok(Outcome::Mmio { gpa }) => return Err(SoftExit::Mmio(gpa)),
                Ok(Outcome::HostReadOnly { gpa }) => return Err(SoftExit::HostReadOnly(gpa)),
                Ok(Outcome::Reserved) => return Err(SoftExit::Reserved(gva)),
                Err(stall) => self.wait(stall),
            }
        }
    }

    /// A page fault also forgets the translations of its page (SDM vol. 3, 5.10.4.1).
    fn raise(&mut self, fault: Fault) -> SoftExit {
        self.cpu.invlpg(fault.gva);
        SoftExit::Fault(fault)
    }

    fn wait(&mut self, stall: Stall) {
        self.leave();
        let mut backoff = Backoff::default();
        // Once in any case: a frame may be in another thread's hands although no vCPU has to
        // acknowledge anything any more.
        backoff.wait();
        while self.cpu.vcpu.must_wait(stall) {
            backoff.wait();
        }
    }

    /// Goes inside if outside, or if somebody has asked for something; false if there is no root.
    fn go_inside(&mut self, user: bool) -> Result<bool, SoftExit> {
        let loaded = self.cpu.roots[usize::from(user)].is_some();
        if self.inside && loaded && !self.cpu.vcpu.cursor.has_requests() {
            return Ok(true);
        }
        self.leave();
        loop {
            let SoftVcpu { vcpu, tlb, .. } = &mut *self.cpu;
            let entered = vcpu.enter(user, |downgrade| match downgrade {
                Downgrade::Entry { gva: Some(gva), .. } => {
                    let entry = &mut tlb[slot(gva)];
                    if entry.tag & !1 == gva.page().0 {
                        *entry = Translation::NONE;
                    }
                }
                _ => tlb.fill(Translation::NONE),
            });
            match entered {
                Ok(Entry::Run { generation, .. }) => {
                    self.inside = true;
                    self.stays += 1;
                    self.cpu.vcpu.drained(generation);
                    if self.cpu.roots != self.cpu.vcpu.roots {
                        // As a load of CR3 does: the old tree may have become obsolete.
                        self.cpu.flush_all();
                        self.cpu.roots = self.cpu.vcpu.roots;
                    }
                    return Ok(true);
                }
                Ok(Entry::RootOutside) => return Ok(false),
                Ok(Entry::Exit) => return Err(SoftExit::Requested),
                Ok(Entry::RingFull) => return Err(SoftExit::RingFull),
                Err(stall) => self.wait(stall),
            }
        }
    }

    /// Walks the shadow tables as a processor does. `None` is a page fault.
    fn walk(&mut self, gva: Gva, access: Access) -> Option<*const AtomicU64> {
        let engine = &self.cpu.vcpu.engine;
        let linear = self.cpu.vcpu.mode.linear_of(gva, access).ok()?;
        if engine.extend(linear.0) != linear {
            return None;
        }
        let mut table = self.cpu.roots[usize::from(access.user)]?;
        let mut entry = Location::new(table, index(linear, engine.levels()));
        let mut spte = engine.entry(entry);
        for level in (1..engine.levels()).rev() {
            if spte.is_large() {
                break;
            }
            if !spte.is_present() {
                return None;
            }
            table = engine.table_at(spte.machine())?;
            entry = Location::new(table, index(linear, level));
            spte = engine.entry(entry);
        }
        let write = access.kind == Kind::Write;
        let execute = spte.is_executable();
        if !spte.is_present()
            || write && !spte.is_writable()
            || access.kind == Kind::Execute && !execute
        {
            return None;
        }
        // As a processor does: A when it translates, D when it writes (SDM vol. 3, 5.8).
        let spte = engine.use_entry(entry, spte, write)?;
        // From machine address to pointer: what a processor's memory bus does.
        let guard = self.cpu.vcpu.context.handle.pin();
        let block = spte.machine().wrapping_add(engine.offset_in(entry, linear));
        let page = engine.memory.load(&guard).by_machine(block)?;
        let first = page.index * PAGE_WORDS;
        // From the slice, not from one word: the pointer must be good for the whole page.
        let page = page.region().words().get(first..first + PAGE_WORDS)?.as_ptr();
        // A write through this translation needs no second look at the entry only if D is set.
        let write = spte.is_dirty();
        // INVLPG and flushes name addresses without tags.
        if linear != gva {
            return Some(page);
        }
        let fractured = engine.maps_part(entry);
        self.cpu.fractured |= fractured;
        self.cpu.tlb[slot(gva)] = Translation { tag: tag(gva, access.user), page, write, execute };
        Some(page)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Where an access goes.
enum Found {
    /// To this page of host memory.
    Page(*const AtomicU64),
    /// Through the guest's own tables: no shadow entry can grant it.
    Emulate,
}

/// Host pages of an access, good until the vCPU goes outside. Only an access that crosses a page
/// allocates.
struct Parts {
    gva: Gva,
    /// Bytes in the first page.
    head: usize,
    first: Option<*const AtomicU64>,
    rest: Vec<(*const AtomicU64, Gva, Range<usize>)>,
}

impl Parts {
    fn iter(&self) -> impl Iterator<Item = (*const AtomicU64, Gva, Range<usize>)> + '_ {
        let first = self.first.map(|page| (page, self.gva, 0..self.head));
        first.into_iter().chain(self.rest.iter().cloned())
    }
}

/// Index of the word in its page.
#[inline]
fn word_index(gva: Gva) -> usize {
    let index = (gva.page_offset() / 8) as usize;
    if cfg!(loom) { index % PAGE_WORDS } else { index }
}

#[inline]
fn tag(gva: Gva, user: bool) -> u64 {
    gva.0 & !(PAGE_SIZE - 1) | u64::from(user)
}

#[inline]
fn slot(gva: Gva) -> usize {
    (gva.0 / PAGE_SIZE) as usize % TLB
}
