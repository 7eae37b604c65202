// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs on the interpreter, vCPUs on threads, over a walker of the tests' own with a TLB that
//! forgets nothing but what `invlpg` names.

mod churn;
mod switch;

use super::layout::*;
use super::paging::PAGE;
use super::programs::{Call, Program};
use super::verify::{self, Mismatch};
use super::{GuestImage, ImageError};
use crate::emu::{Bus, Class, DecodeCache, Event, Stop, run};
use crate::regs::Regs;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// Guest-physical memory.
#[derive(Clone)]
struct Ram(Arc<[AtomicU64]>);

impl Ram {
    fn of(image: &GuestImage) -> Self {
        let words = image.layout().memory() / 8;
        let ram = Ram((0..words).map(|_| AtomicU64::new(0)).collect());
        image.write(&mut |gpa, bytes| ram.write(gpa, bytes));
        ram
    }

    fn word(&self, gpa: u64) -> &AtomicU64 {
        &self.0[(gpa / 8) as usize]
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) {
        if buf.len() == 8 && gpa % 8 == 0 {
            buf.copy_from_slice(&self.word(gpa).load(SeqCst).to_le_bytes());
            return;
        }
        for (at, b) in (gpa..).zip(buf) {
            *b = self.word(at).load(SeqCst).to_le_bytes()[(at % 8) as usize];
        }
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        let mut at = gpa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let start = (at % 8) as usize;
            let (part, next) = rest.split_at(rest.len().min(8 - start));
            self.word(at)
                .fetch_update(SeqCst, SeqCst, |old| {
                    let mut b = old.to_le_bytes();
                    b[start..start + part.len()].copy_from_slice(part);
                    Some(u64::from_le_bytes(b))
                })
                .unwrap();
            at += part.len() as u64;
            rest = next;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fault {
    gva: u64,
    write: bool,
}

/// The memory of one vCPU.
struct Vcpu {
    ram: Ram,
    cr3: u64,
    /// By page and kind of access.
    tlb: HashMap<(u64, bool, bool), u64>,
}

impl Vcpu {
    fn new(image: &GuestImage, ram: &Ram) -> Self {
        Vcpu { ram: ram.clone(), cr3: image.cr3(), tlb: HashMap::new() }
    }

    fn translate(&mut self, gva: u64, write: bool, fetch: bool) -> Result<u64, Fault> {
        let page = gva & !0xfff;
        if let Some(gpa) = self.tlb.get(&(page, write, fetch)) {
            return Ok(gpa | (gva & 0xfff));
        }
        let fault = Fault { gva, write };
        let mut table = self.cr3;
        for level in (0..4).rev() {
            let at = table + (gva >> (12 + 9 * level) & 511) * 8;
            let entry = self.ram.word(at).load(SeqCst);
            // Present, user.
            if entry & 5 != 5 || (write && entry & 2 == 0) || (fetch && entry >> 63 != 0) {
                return Err(fault);
            }
            let dirty = if write && level == 0 { 0x60 } else { 0x20 };
            // A walker sets the bits only in an entry that is still the one it used.
            if entry & dirty != dirty
                && self.ram.word(at).compare_exchange(entry, entry | dirty, SeqCst, SeqCst).is_err()
            {
                return self.translate(gva, write, fetch);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        self.tlb.insert((page, write, fetch), table);
        Ok(table | (gva & 0xfff))
    }
}

impl Bus for Vcpu {
    type Stop = Fault;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, Fault> {
        let gpa = self.translate(gva, false, true)?;
        let n = ((PAGE - gva % PAGE) as usize).min(15);
        self.ram.read(gpa, &mut buf[..n]);
        Ok(n)
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Fault> {
        assert!(gva % PAGE + buf.len() as u64 <= PAGE, "the programs keep to pages");
        let gpa = self.translate(gva, false, false)?;
        self.ram.read(gpa, buf);
        Ok(())
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Fault> {
        assert!(gva % PAGE + bytes.len() as u64 <= PAGE, "the programs keep to pages");
        let gpa = self.translate(gva, true, false)?;
        self.ram.write(gpa, bytes);
        Ok(())
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Fault> {
        assert!(size == 8 && gva % 8 == 0, "the programs lock aligned words only");
        let gpa = self.translate(gva, true, false)?;
        let result = self.ram.word(gpa).compare_exchange(old as u64, new as u64, SeqCst, SeqCst);
        Ok(result.map(|_| ()).map_err(u128::from))
    }

    fn invlpg(&mut self, gva: u64) -> Result<(), Stop<Fault>> {
        for (write, fetch) in [(false, false), (true, false), (false, true)] {
            self.tlb.remove(&(gva & !0xfff, write, fetch));
        }
        Ok(())
    }
}

/// Runs a vCPU until its next call.
fn until_call(regs: &mut Regs, bus: &mut Vcpu, cache: &mut DecodeCache) -> Call {
    loop {
        let mut budget = 100_000;
        match run(regs, bus, cache, &mut budget).unwrap() {
            Event::Halt => return Call::from_regs(regs),
            Event::Pause => std::thread::yield_now(),
            Event::Retired | Event::Again => {}
        }
    }
}

/// Runs all vCPUs from `start`, each until its first call, while `meanwhile` does something else.
fn all(
    image: &GuestImage,
    ram: &Ram,
    start: impl Fn(usize) -> Regs + Sync,
    meanwhile: impl FnOnce(),
) -> Vec<Call> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..image.layout().vcpus())
            .map(|id| {
                let start = &start;
                scope.spawn(move || {
                    let mut bus = Vcpu::new(image, ram);
                    until_call(&mut start(id), &mut bus, &mut DecodeCache::new())
                })
            })
            .collect();
        meanwhile();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Flips a bit of the word at `gva`, checks that `verify` names it, and flips it back.
fn corrupted(
    ram: &Ram,
    gva: u64,
    gpa: u64,
    verify: impl Fn(verify::Read<'_>) -> Result<(), Mismatch>,
) {
    let word = ram.word(gpa);
    let good = word.fetch_xor(1 << 17, SeqCst);
    let error = verify(&mut |gpa, buf| ram.read(gpa, buf)).unwrap_err();
    assert_eq!((error.gva, error.gpa, error.seen), (gva, gpa, good ^ 1 << 17), "{error}");
    word.store(good, SeqCst);
    verify(&mut |gpa, buf| ram.read(gpa, buf)).unwrap();
}

#[test]
fn touch_fills_memory_and_its_verifier_sees_each_wrong_word() {
    for vcpus in [1, 2, 5] {
        let image = GuestImage::new(4, vcpus).unwrap();
        let ram = Ram::of(&image);
        let calls = all(&image, &ram, |id| image.touch(id, 77), || {});
        assert_eq!(calls, vec![Call::Done(77); vcpus]);
        let verify = |read: verify::Read<'_>| verify::touch(&image, 77, read);
        verify(&mut |gpa, buf| ram.read(gpa, buf)).unwrap();
        assert!(verify::touch(&image, 78, &mut |gpa, buf| ram.read(gpa, buf)).is_err());
        let last = image.layout().data_pages() - 1;
        for gva in [
            DATA_GVA,
            DATA_GVA + last * PAGE + 7 * 0x208,
            OVERLAP_GVA + (vcpus as u64 - 1) * 8,
            OVERLAP_GVA + last * PAGE,
        ] {
            corrupted(&ram, gva, image.translate(gva).unwrap(), verify);
        }
    }
}

#[test]
fn touch_goes_on_with_the_next_seed() {
    let image = GuestImage::new(4, 1).unwrap();
    let ram = Ram::of(&image);
    let (mut regs, mut bus, mut cache) =
        (image.touch(0, 5), Vcpu::new(&image, &ram), DecodeCache::new());
    for seed in 5..7 {
        assert_eq!(until_call(&mut regs, &mut bus, &mut cache), Call::Done(seed));
    }
    verify::touch(&image, 6, &mut |gpa, buf| ram.read(gpa, buf)).unwrap();
}

#[test]
fn touch_reports_what_it_cannot_read_back() {
    let image = GuestImage::new(4, 1).unwrap();
    let ram = Ram::of(&image);
    let (mut regs, mut bus, mut cache) =
        (image.touch(0, 5), Vcpu::new(&image, &ram), DecodeCache::new());
    // The last page of the share is another page's frame: its words are wrong on re-reading.
    let last = DATA_GVA + (image.layout().data_pages() - 1) * PAGE;
    for write in [false, true] {
        bus.tlb.insert((last, write, false), image.layout().data_gpa());
    }
    let call = until_call(&mut regs, &mut bus, &mut cache);
    let Call::Failed { gva: DATA_GVA, expected, seen } = call else { panic!("{call:?}") };
    assert_eq!(expected, super::programs::mix(DATA_GVA, 5));
    assert_eq!(seen, super::programs::mix(last, 5));
    // It stays failed.
    assert_eq!(until_call(&mut regs, &mut bus, &mut cache), call);
}

#[test]
fn remap_sees_each_edit_after_invlpg() {
    for (vcpus, rounds) in [(1, 29), (2, 200), (3, 43), (2, 0), (2, 1), (2, 3)] {
        let image = GuestImage::new(4, vcpus).unwrap();
        let ram = Ram::of(&image);
        let calls = all(&image, &ram, |id| image.remap(id, rounds), || {});
        assert_eq!(calls, vec![Call::Done(rounds); vcpus]);
        let verify = |read: verify::Read<'_>| verify::remap(&image, rounds, read);
        verify(&mut |gpa, buf| ram.read(gpa, buf)).unwrap();
        let live = super::programs::remap_switches(rounds) & 1;
        let gva = WINDOW_GVA + 3 * PAGE;
        for set in 0..2 {
            let frame = image.layout().window_frame(set, 3);
            corrupted(&ram, gva, frame, verify);
            corrupted(&ram, gva + 8, frame + 8, verify);
        }
        let pte = 8 * (WINDOW_GVA >> 12 & 511) + 5 * 8;
        let gva = TABLES_GVA + live * PAGE + pte;
        corrupted(&ram, gva, image.window_tables()[live as usize] + pte, verify);
        let pde = 8 * (WINDOW_GVA >> 21 & 511);
        corrupted(&ram, TABLES_GVA + 2 * PAGE + pde, image.window_pde_gpa(), verify);
    }
}

#[test]
fn remap_without_invlpg_is_caught() {
    struct Forgetful(Vcpu);
    impl Bus for Forgetful {
        type Stop = Fault;
        fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, Fault> {
            self.0.fetch(gva, buf)
        }
        fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Fault> {
            self.0.read(gva, buf)
        }
        fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Fault> {
            self.0.write(gva, bytes)
        }
        fn cmpxchg(
            &mut self,
            gva: u64,
            old: u128,
            new: u128,
            size: usize,
        ) -> Result<Result<(), u128>, Fault> {
            self.0.cmpxchg(gva, old, new, size)
        }
        fn invlpg(&mut self, _: u64) -> Result<(), Stop<Fault>> {
            Ok(())
        }
    }
    let image = GuestImage::new(4, 1).unwrap();
    let ram = Ram::of(&image);
    let mut regs = image.remap(0, 5);
    let mut bus = Forgetful(Vcpu::new(&image, &ram));
    let event = run(&mut regs, &mut bus, &mut DecodeCache::new(), &mut 1_000_000);
    assert_eq!(event, Ok(Event::Halt));
    let call = Call::from_regs(&regs);
    let Call::Failed { gva, .. } = call else { panic!("{call:?}") };
    assert_eq!(gva, WINDOW_GVA);
}

#[test]
fn remap_stops_when_told() {
    let image = GuestImage::new(4, 2).unwrap();
    let ram = Ram::of(&image);
    let stop = || {
        std::thread::sleep(Duration::from_millis(30));
        ram.word(image.control_gpa(control::STOP)).store(1, SeqCst);
    };
    let calls = all(&image, &ram, |id| image.remap(id, u64::MAX - 1), stop);
    let Call::Done(rounds) = calls[0] else { panic!("{calls:?}") };
    assert_eq!(calls[1], Call::Done(rounds));
    verify::remap(&image, rounds, &mut |gpa, buf| ram.read(gpa, buf)).unwrap();
}

#[test]
fn precopy_writes_until_told_to_stop() {
    let image = GuestImage::new(4, 2).unwrap();
    let ram = Ram::of(&image);
    let stop = || {
        std::thread::sleep(Duration::from_millis(30));
        ram.word(image.control_gpa(control::STOP)).store(1, SeqCst);
    };
    let calls = all(&image, &ram, |id| image.precopy(id, 99), stop);
    let counts: Vec<u64> = calls
        .iter()
        .map(|c| match c {
            Call::Done(n) => *n,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(counts.iter().all(|n| *n > 100), "{counts:?}");
    let verify = |read: verify::Read<'_>| verify::precopy(&image, 99, &counts, read);
    verify(&mut |gpa, buf| ram.read(gpa, buf)).unwrap();
    // A lane and a word of a tail that have been written.
    let layout = image.layout();
    let lane = (0..layout.data_pages())
        .map(|n| n * PAGE + 8)
        .find(|at| ram.word(layout.data_gpa() + at).load(SeqCst) != 0)
        .unwrap();
    corrupted(&ram, DATA_GVA + lane, layout.data_gpa() + lane, verify);
    let tail = (0..TAIL_PAGES * 512)
        .map(|n| n * 8)
        .find(|at| ram.word(layout.tails_gpa() + at).load(SeqCst) != 0)
        .unwrap();
    corrupted(&ram, TAILS_GVA + tail, layout.tails_gpa() + tail, verify);
}

#[test]
fn crash_programs_end_as_they_say() {
    let image = GuestImage::new(4, 1).unwrap();
    let ram = Ram::of(&image);
    let mut bus = Vcpu::new(&image, &ram);
    let mut go = |program, budget: &mut u64| {
        let mut regs = image.entry(program, 0);
        (run(&mut regs, &mut bus, &mut DecodeCache::new(), budget), regs)
    };
    let (result, regs) = go(Program::ReadUnmapped, &mut 10);
    assert_eq!(result, Err(Stop::Bus(Fault { gva: UNMAPPED_GVA, write: false })));
    assert_eq!(regs, image.entry(Program::ReadUnmapped, 0));
    let (result, _) = go(Program::Ud2, &mut 10);
    let Err(Stop::Exception(e)) = result else { panic!("{result:?}") };
    assert_eq!((e.vector, e.class, e.bytes.as_slice()), (6, Class::Fault, &[0x0f, 0x0b][..]));
    let (result, _) = go(Program::NonCanonical, &mut 10);
    let Err(Stop::Exception(e)) = result else { panic!("{result:?}") };
    assert_eq!((e.vector, e.error_code, e.bytes.as_slice()), (13, Some(0), &[0xff, 0xe0][..]));
    let mut budget = 1000;
    let (result, regs) = go(Program::Spin, &mut budget);
    assert_eq!((result, budget), (Ok(Event::Retired), 0));
    assert_eq!(regs, image.entry(Program::Spin, 0));
}

#[test]
fn sizes_have_bounds_and_errors_name_them() {
    assert_eq!(GuestImage::new(3, 1).unwrap_err(), ImageError::MemoryTooSmall(3));
    assert_eq!(
        GuestImage::new(3, 1).unwrap_err().to_string(),
        "a guest needs at least 4 MiB of memory, not 3"
    );
    assert_eq!(GuestImage::new(u64::MAX, 1).unwrap_err(), ImageError::MemoryTooLarge(u64::MAX));
    assert_eq!(GuestImage::new(4, 0).unwrap_err(), ImageError::Vcpus(0));
    assert_eq!(GuestImage::new(4, 65).unwrap_err(), ImageError::Vcpus(65));
    for (mib, vcpus) in [(4, 1), (4, 64), (5, 3), (64, 2), (1025, 7), (4096, 64)] {
        let image = GuestImage::new(mib, vcpus).unwrap();
        let layout = image.layout();
        // Every mapped page is in memory, and no two regions overlap.
        let end = layout.overlap_gpa() + layout.data_pages() * PAGE;
        assert!(end <= layout.memory() && layout.memory() - end < 2 * PAGE, "{layout:?}");
        assert!(layout.data_pages() * 2 * PAGE > layout.memory() / 2, "{layout:?}");
        let last = (layout.data_pages() - 1) * PAGE;
        assert_eq!(image.translate(OVERLAP_GVA + last), Some(layout.overlap_gpa() + last));
        assert_eq!(image.translate(OVERLAP_GVA + last + PAGE), None);
        assert_eq!(image.translate(UNMAPPED_GVA), None);
        let mut tables = 0;
        image.write(&mut |gpa, bytes| {
            assert!(gpa % PAGE + bytes.len() as u64 <= PAGE);
            assert!(gpa >= PAGE && gpa < layout.data_gpa());
            tables += u64::from(layout.tables().contains(&gpa));
        });
        let room = (layout.tables().end - layout.tables().start) / PAGE;
        assert!(tables <= room && room - tables < 32, "{tables} of {room} tables used");
        for pieces in [1, 2, 3, 7, usize::MAX] {
            let parts = layout.split(pieces);
            let mut next = 0;
            for (gpa, size) in parts {
                assert_eq!(gpa, next);
                assert!(size > 0 && size % PAGE == 0);
                next += size;
            }
            assert_eq!(next, layout.memory());
        }
    }
}

#[test]
fn programs_fit_and_hold_no_absolute_addresses() {
    let end = Program::Spin.offset() + Program::Spin.code().len() as u64;
    assert!(end <= CODE_PAGES * PAGE, "{end} bytes of code");
    for p in Program::ALL {
        assert!(!p.code().is_empty(), "{p:?}");
    }
    // Run from another place, a program does the same.
    let image = GuestImage::new(4, 1).unwrap();
    let ram = Ram::of(&image);
    let code = Program::Remap.code();
    ram.write(image.translate(DATA_GVA).unwrap(), code);
    let mut bus = Vcpu::new(&image, &ram);
    for n in 0..2 {
        // The data range is no-execute: the test's TLB says otherwise.
        bus.tlb.insert((DATA_GVA + n * PAGE, false, true), image.layout().data_gpa() + n * PAGE);
    }
    let mut regs = image.remap(0, 8);
    regs.rip = DATA_GVA;
    assert_eq!(until_call(&mut regs, &mut bus, &mut DecodeCache::new()), Call::Done(8));
}
