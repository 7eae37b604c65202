// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How this host's KVM really treats page tables that the VMM writes.
//!
//! On a processor that walks the tables itself, a downgrade needs nothing but the TLB flush that the stub's
//! `invlpg` or CR3 load is. A KVM that shadows the guest's tables in software may go on using an entry that the host
//! has changed, until the guest itself writes to it. The self-test tries on a small VM of its own.
//!
//! Guarantees: a few milliseconds, once per process; touches no other VM; a downgrade that does not work is an error,
//! because nothing could be safe then.
//!
//! `unsafe` here: access to the tables and pages of that VM.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::layout::{PAGE, pte};
use super::mapping::Mapping;
use super::{Downgrade, Exit, KvmError, KvmMachine, KvmVcpu, TableArena};
use crate::regs::Regs;

/// How this host's KVM behaves.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TrapReport {
    /// A host store to a present leaf entry takes effect without any flush. (Stale is what
    /// the architecture allows.)
    pub host_store_seen: bool,
    /// A host store to a present leaf entry takes effect after a CR3 load alone. False: this KVM shadows
    /// the tables itself, and only the stub's touch makes it look again.
    pub reload_is_enough: bool,
    /// The stub's touch of the entry and `invlpg` works. (Else the self-test fails.)
    pub entry_touch_works: bool,
    /// The stub's two-byte touch of a table frame drops what was derived from all of the frame's entries. False: all 512
    /// entries are touched instead.
    pub frame_touch_works: bool,
    /// Translations tried for `frame_touch_works`.
    pub frame_entries_tried: u32,
    /// Duration of the self-test, in microseconds.
    pub micros: u64,
}

/// Runs the self-test, once per process; later calls give the first one's answer.
///
/// # Errors
///
/// As [`KvmMachine::new`]; [`KvmError::SelfTest`] if the guest does not do what it must. Errors are not
/// remembered.
pub fn self_test() -> Result<TrapReport, KvmError> {
    static REPORT: OnceLock<TrapReport> = OnceLock::new();
    if let Some(report) = REPORT.get() {
        return Ok(report.clone());
    }
    let report = run()?;
    Ok(REPORT.get_or_init(|| report).clone())
}

/// Page tables filled by hand, and the pages they map.
pub(super) struct Playground {
    pub(super) arena: TableArena,
    /// Next unused frame.
    next: u32,
    pages: Arc<Mapping>,
    slot_at: u64,
}

/// Bits of a non-leaf entry.
const TABLE: u64 = pte::P | pte::W | pte::U | pte::A;
/// Bits of a writable leaf entry.
pub(super) const PAGE_RW: u64 = TABLE | pte::D;

impl Playground {
    /// Page tables in `machine`'s arena from frame `first` on, and `pages` pages of memory at machine address `slot_at`.
    pub(super) fn new(
        machine: &KvmMachine,
        first: u32,
        slot_at: u64,
        pages: u64,
    ) -> Result<Playground, KvmError> {
        let bytes = (pages * PAGE) as usize;
        let pages = Mapping::new(bytes).map_err(|error| KvmError::Memory {
            what: "self-test",
            bytes,
            error,
        })?;
        let pages = Arc::new(pages);
        let owner = Arc::clone(&pages);
        // SAFETY: the owner is the mapping itself; it is accessed through atomics and raw copies only.
        unsafe { machine.add_memory(slot_at, pages.start(), bytes as u64, false, owner) }?;
        Ok(Playground { arena: machine.tables(), next: first, pages, slot_at })
    }

    /// The machine address of page `n`.
    pub(super) fn page(&self, n: u64) -> u64 {
        self.slot_at + n * PAGE
    }

    /// A word of page `n`.
    pub(super) fn word(&self, n: u64, index: u64) -> &AtomicU64 {
        let word = self.pages.word(n * PAGE + index * 8);
        // SAFETY: in bounds and aligned by `word`; lives as long as `self`; atomics only.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    /// Puts code into page `n`.
    pub(super) fn code(&self, n: u64, bytes: &[u8]) {
        for (i, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0x90; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(n, i as u64).store(u64::from_le_bytes(word), Ordering::SeqCst);
        }
    }

    /// The entry at byte `offset` of the arena.
    pub(super) fn entry(&self, offset: u64) -> &AtomicU64 {
        assert!(offset < u64::from(self.arena.frames()) * PAGE && offset % 8 == 0);
        // SAFETY: in bounds and aligned by the assertion; the arena lives as long as `self`; all
        // access to tables is atomic.
        unsafe { AtomicU64::from_ptr(self.arena.host().as_ptr().add(offset as usize).cast()) }
    }

    /// An unused frame, all zero.
    pub(super) fn frame(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    /// A new root with the stub in it.
    pub(super) fn root(&mut self, machine: &KvmMachine) -> u64 {
        let frame = self.frame();
        let (index, value) = machine.stub_root_entry();
        self.entry(u64::from(frame) * PAGE + index as u64 * 8).store(value, Ordering::SeqCst);
        self.arena.machine() + u64::from(frame) * PAGE
    }

    /// Byte offset of the leaf entry for `gva`, with the tables above it made where needed.
    pub(super) fn leaf(&mut self, root: u64, gva: u64) -> u64 {
        let mut table = root - self.arena.machine();
        for shift in [39, 30, 21] {
            let offset = table + (gva >> shift & 511) * 8;
            let mut entry = NonZeroU64::new(self.entry(offset).load(Ordering::SeqCst));
            if entry.is_none() {
                let new = (self.arena.machine() + u64::from(self.frame()) * PAGE) | TABLE;
                self.entry(offset).store(new, Ordering::SeqCst);
                entry = NonZeroU64::new(new);
            }
            table = (entry.map_or(0, NonZeroU64::get) & pte::ADDR) - self.arena.machine();
        }
        table + (gva >> 12 & 511) * 8
    }

    /// Byte offset of the entry that points to `gva`'s leaf table.
    #[cfg(test)]
    pub(super) fn parent(&self, root: u64, gva: u64) -> u64 {
        let mut table = root - self.arena.machine();
        for shift in [39, 30] {
            let entry = self.entry(table + (gva >> shift & 511) * 8).load(Ordering::SeqCst);
            table = (entry & pte::ADDR) - self.arena.machine();
        }
        table + (gva >> 21 & 511) * 8
    }

    /// Maps `gva` to `machine` with `bits`; returns the entry's offset.
    pub(super) fn map(&mut self, root: u64, gva: u64, machine: u64, bits: u64) -> u64 {
        let offset = self.leaf(root, gva);
        self.entry(offset).store(machine | bits, Ordering::SeqCst);
        offset
    }
}

/// Where the self-test's code and data are in the guest.
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x800_0000;
/// Pages that the sum runs over.
const COUNT: u64 = 64;

/// Adds up the first words of rcx pages from rsi on into rax, then stops with #UD.
pub(super) const SUM: &[u8] = &[
    0x31, 0xc0, // xor eax, eax
    0x48, 0x03, 0x06, // 1: add rax, [rsi]
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add rsi, 4096
    0xff, 0xc9, // dec ecx
    0x75, 0xf2, // jnz 1b
    0x0f, 0x0b, // ud2
];

/// Has the guest add up `count` pages.
fn sum(vcpu: &mut KvmVcpu, count: u64) -> Result<u64, KvmError> {
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[1] = count;
    regs.gpr[6] = DATA;
    vcpu.set_regs(&regs);
    for _ in 0..100 {
        match vcpu.run(0)? {
            Exit::Exception { vector: 6, .. } => return Ok(vcpu.regs().gpr[0]),
            Exit::Interrupted => {}
            exit => {
                let why = format!("{exit:x?}, registers {:x?}", vcpu.regs());
                return Err(KvmError::SelfTest(why));
            }
        }
    }
    Err(KvmError::SelfTest("interrupted again and again".into()))
}

fn run() -> Result<TrapReport, KvmError> {
    let start = Instant::now();
    let mut report = TrapReport {
        host_store_seen: false,
        reload_is_enough: false,
        entry_touch_works: false,
        frame_touch_works: true,
        frame_entries_tried: COUNT as u32,
        micros: 0,
    };
    let machine = KvmMachine::build(1, 1, report.clone())?;
    let mut vcpu = machine.vcpu(0)?;
    // Page 0 is code; pages 1..=COUNT hold 1 each; the next COUNT hold 1000 each.
    let mut p = Playground::new(&machine, 0, 0x10_0000, 1 + 2 * COUNT)?;
    p.code(0, SUM);
    for n in 0..COUNT {
        p.word(1 + n, 0).store(1, Ordering::SeqCst);
        p.word(1 + COUNT + n, 0).store(1000, Ordering::SeqCst);
    }
    let root = p.root(&machine);
    p.map(root, CODE, p.page(0), TABLE);
    for n in 0..COUNT {
        p.map(root, DATA + n * PAGE, p.page(1 + n), PAGE_RW);
    }
    vcpu.set_root(root)?;
    let expect = |what: &str, got: u64, want: u64| {
        if got == want {
            return Ok(());
        }
        Err(KvmError::SelfTest(format!("{what}: the guest added up {got}, not {want}")))
    };
    expect("first run", sum(&mut vcpu, COUNT)?, COUNT)?;

    // One entry changed: without a flush, after a CR3 load, after a touch.
    let first = p.map(root, DATA, p.page(1 + COUNT), PAGE_RW);
    report.host_store_seen = sum(&mut vcpu, 1)? == 1000;
    vcpu.push(Downgrade::Reload)?;
    report.reload_is_enough = sum(&mut vcpu, 1)? == 1000;
    vcpu.push(Downgrade::Leaf { entry: first, gva: DATA })?;
    expect("entry touched", sum(&mut vcpu, 1)?, 1000)?;
    report.entry_touch_works = true;

    // All entries of one table changed, its frame touched.
    for n in 0..COUNT {
        p.map(root, DATA + n * PAGE, p.page(1 + COUNT + n), PAGE_RW);
    }
    vcpu.push(Downgrade::Frame { frame: (first / PAGE) as u32 })?;
    report.frame_touch_works = sum(&mut vcpu, COUNT)? == 1000 * COUNT;
    report.micros = start.elapsed().as_micros() as u64;
    Ok(report)
}
