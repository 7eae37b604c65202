// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `switch` on the interpreter: over processors that use old translations for as long as they may, and
//! over some that are wrong in one way.

use super::*;
use crate::guest::paging::{A, ADDR, D, P, PS, U, W, index};
use crate::guest::programs::deliver;
use crate::guest::switch::*;
use mmu_core::addr::Gva;
use mmu_core::paging;
use std::collections::BTreeSet;

/// What a processor does wrong, now and then or always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// INVLPG does nothing.
    Invlpg,
    /// A load of CR3 keeps old translations.
    Cr3,
    /// A load of CR3 keeps the old address space.
    Space,
    /// A page is taken for the next.
    Elsewhere,
    /// Pages are writable that are not.
    Rights,
    /// Pages are there that are not.
    Presence,
    /// The supervisor's pages are the user's.
    User,
    /// A store does not arrive.
    Lost,
    /// A store arrives elsewhere, too.
    Stray,
}

/// A vCPU that forgets nothing but what it must: translations, and entries that refer to page tables.
struct Processor {
    ram: Ram,
    cr3: u64,
    /// By page, and whether for writes.
    pages: HashMap<(u64, bool), u64>,
    /// By 2M: entry, and rights above and in it.
    directories: HashMap<u64, (u64, u64)>,
    wrong: Wrong,
    /// Accesses to slots.
    accesses: u64,
}

impl Processor {
    fn new(image: &GuestImage, ram: &Ram, wrong: Wrong) -> Self {
        Self {
            ram: ram.clone(),
            cr3: image.cr3(),
            pages: HashMap::new(),
            directories: HashMap::new(),
            wrong,
            accesses: 0,
        }
    }

    /// Where the page is, or the error code.
    fn walk(&mut self, gva: u64, write: bool) -> Result<u64, u32> {
        let code = 4 | u32::from(write) << 1;
        let is_slot = gva >= SPACE_GVA;
        'again: loop {
            let held = self.directories.get(&(gva >> 21)).copied();
            let (mut table, mut rights) = held.unwrap_or((self.cr3, W | U));
            for level in (1..=if held.is_some() { 1 } else { 4 }).rev() {
                let word = self.ram.word((table & ADDR) + index(gva, level) as u64 * 8);
                let entry = word.load(SeqCst);
                if entry & P == 0 && !(is_slot && self.wrong == Wrong::Presence && entry != 0) {
                    return Err(code);
                }
                rights &= entry;
                let is_leaf = level == 1 || entry & PS != 0;
                if is_leaf {
                    let write = write && !(is_slot && self.wrong == Wrong::Rights);
                    let user = !(is_slot && self.wrong == Wrong::User);
                    if user && rights & U == 0 || write && rights & W == 0 {
                        return Err(code | 1);
                    }
                }
                let used = if is_leaf && write { A | D } else { A };
                if word.compare_exchange(entry, entry | used, SeqCst, SeqCst).is_err() {
                    continue 'again;
                }
                if is_leaf && level == 2 {
                    return Ok(entry & ADDR & !0x1f_ffff | gva & 0x1f_f000);
                }
                if level == 2 {
                    self.directories.insert(gva >> 21, (entry, rights));
                }
                table = entry;
            }
            return Ok(table & ADDR);
        }
    }

    fn translate(&mut self, gva: u64, write: bool) -> Result<u64, PageFault> {
        let page = gva & !0xfff;
        let found = match self.pages.get(&(page, write)) {
            Some(found) => *found,
            None => {
                let found = self.walk(gva, write).map_err(|code| PageFault { gva, code })?;
                self.pages.insert((page, write), found);
                found
            }
        };
        let is_slot = gva >= SPACE_GVA;
        self.accesses += u64::from(is_slot);
        let now = is_slot && self.accesses % 100 == 0;
        let step = if now && self.wrong == Wrong::Elsewhere { PAGE } else { 0 };
        Ok((found + step) | gva & 0xfff)
    }

    fn forget(&mut self) {
        self.pages.clear();
        self.directories.clear();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PageFault {
    gva: u64,
    code: u32,
}

impl Bus for Processor {
    type Stop = PageFault;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, PageFault> {
        let gpa = self.translate(gva, false)?;
        let n = ((PAGE - gva % PAGE) as usize).min(15);
        self.ram.read(gpa, &mut buf[..n]);
        Ok(n)
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), PageFault> {
        let gpa = self.translate(gva, false)?;
        self.ram.read(gpa, buf);
        Ok(())
    }

    fn read_for_write(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), PageFault> {
        let gpa = self.translate(gva, true)?;
        self.ram.read(gpa, buf);
        Ok(())
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), PageFault> {
        let gpa = self.translate(gva, true)?;
        let now = gva >= SPACE_GVA && self.accesses % 100 == 50;
        if !(now && self.wrong == Wrong::Lost) {
            self.ram.write(gpa, bytes);
        }
        if now && self.wrong == Wrong::Stray {
            self.ram.write(gpa ^ 0x20, bytes);
        }
        Ok(())
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, PageFault> {
        assert!(size == 8 && gva % 8 == 0, "the programs lock aligned words only");
        let gpa = self.translate(gva, true)?;
        let result = self.ram.word(gpa).compare_exchange(old as u64, new as u64, SeqCst, SeqCst);
        Ok(result.map(|_| ()).map_err(u128::from))
    }

    fn write_cr(&mut self, n: u8, value: u64) -> Result<(), Stop<PageFault>> {
        assert_eq!((n, value & !ADDR), (3, 0));
        if self.wrong != Wrong::Space || self.cr3 == 0 || self.accesses < 100 {
            self.cr3 = value;
        }
        if self.wrong != Wrong::Cr3 {
            self.forget();
        }
        Ok(())
    }

    fn invlpg(&mut self, gva: u64) -> Result<(), Stop<PageFault>> {
        if self.wrong != Wrong::Invlpg {
            for write in [false, true] {
                self.pages.remove(&(gva & !0xfff, write));
            }
            // All of them, as a processor does (SDM vol. 3, 5.10.4.1).
            self.directories.clear();
        }
        Ok(())
    }
}

/// A guest whose vCPU 0 may be wrong.
struct Guest {
    image: GuestImage,
    spaces: Spaces,
    ram: Ram,
}

impl Guest {
    fn new(memory: u64, vcpus: usize) -> Self {
        let image = GuestImage::new(memory, vcpus).unwrap();
        let spaces = Spaces::new(image.layout()).unwrap();
        let ram = Ram::of(&image);
        let guest = Self { image, spaces, ram };
        guest.reset();
        guest
    }

    /// Before another start.
    fn reset(&self) {
        self.image.reset_control(&mut |gpa, bytes| self.ram.write(gpa, bytes));
        self.spaces.write(&self.image, &mut |gpa, bytes| self.ram.write(gpa, bytes));
    }

    /// Runs a vCPU, and `meanwhile` after each `slice` of instructions.
    fn vcpu(
        &self,
        id: usize,
        seed: u64,
        wrong: Wrong,
        slice: u64,
        meanwhile: &mut dyn FnMut(),
    ) -> Call {
        let wrong = if id == 0 { wrong } else { Wrong::Nothing };
        let mut bus = Processor::new(&self.image, &self.ram, wrong);
        let mut regs = self.image.switch(&self.spaces, id, seed);
        let mut cache = DecodeCache::new();
        loop {
            match run(&mut regs, &mut bus, &mut cache, &mut slice.clone()) {
                Ok(Event::Halt) => return Call::from_regs(&regs),
                Ok(_) => meanwhile(),
                Err(Stop::Bus(PageFault { gva, code })) => {
                    let fault = paging::Fault {
                        gva: Gva(gva),
                        vector: paging::Fault::PF,
                        error_code: code,
                        level: 1,
                        reason: paging::Reason::NotPresent,
                    };
                    assert!(deliver(&fault, &mut regs), "{fault} at {:#x}", regs.rip);
                }
                Err(other) => panic!("{other:?}"),
            }
        }
    }

    /// Runs all vCPUs until each has made so many checks, or one has taken offence.
    fn run(&self, seed: u64, checks: u64, wrong: Wrong) -> Vec<Call> {
        let stop = self.ram.word(self.image.control_gpa(control::STOP));
        std::thread::scope(|scope| {
            let vcpus = 0..self.image.layout().vcpus();
            let vcpu = |id| move || self.vcpu(id, seed, wrong, 1000, &mut || ());
            let threads: Vec<_> = vcpus.clone().map(|id| scope.spawn(vcpu(id))).collect();
            let made = |id| self.ram.word(self.spaces.desk(id) + desk::CHECKS).load(SeqCst);
            while vcpus.clone().any(|id| made(id) < checks)
                && !threads.iter().any(|thread| thread.is_finished())
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(1, SeqCst);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn read(&self) -> impl FnMut(u64, &mut [u8]) {
        |gpa, buf: &mut [u8]| {
            buf.chunks_mut(8).zip((gpa..).step_by(8)).for_each(|(b, at)| self.ram.read(at, b))
        }
    }

    /// What the vCPUs must have left, if none took offence.
    fn model(&self, seed: u64, calls: &[Call]) -> Result<Model<'_>, Call> {
        let mut model = Model::new(&self.image, &self.spaces);
        for (id, call) in calls.iter().enumerate() {
            let Call::Done(turns) = call else { return Err(*call) };
            model.replay(id, seed, *turns);
        }
        Ok(model)
    }
}

#[test]
fn switch_leaves_what_the_model_says() {
    for (memory, vcpus) in [(4, 1), (4, 2), (8, 3), (6, 5)] {
        let guest = Guest::new(memory, vcpus);
        let calls = guest.run(77, 4000, Wrong::Nothing);
        let mut model = guest.model(77, &calls).unwrap_or_else(|call| panic!("{call:x?}"));
        model.check(&mut guest.read()).unwrap_or_else(|wrong| panic!("{vcpus}: {wrong}"));
        model.check_rest(&mut guest.read()).unwrap();
        let counts = model.counts();
        println!("{vcpus} vCPUs: {calls:?}: {counts}");
        assert!(counts.edits > 1000 && counts.splits > 20 && counts.loads > 100, "{counts}");
        assert!(counts.loose * 4 < counts.accesses, "{counts}");

        // Another seed or number of turns is something else.
        assert!(guest.model(78, &calls).unwrap().check(&mut guest.read()).is_err());
        let mut fewer = calls.clone();
        let Call::Done(turns) = &mut fewer[vcpus - 1] else { panic!() };
        *turns -= 1;
        assert!(guest.model(77, &fewer).unwrap().check(&mut guest.read()).is_err());
    }
}

#[test]
fn switch_is_done_again_with_another_seed() {
    let guest = Guest::new(4, 2);
    for seed in 1..4 {
        guest.reset();
        let calls = guest.run(seed, 300, Wrong::Nothing);
        guest.model(seed, &calls).unwrap().check(&mut guest.read()).unwrap();
    }
}

#[test]
fn switch_takes_offence_at_a_processor_that_is_wrong() {
    for wrong in [
        Wrong::Invlpg,
        Wrong::Cr3,
        Wrong::Space,
        Wrong::Elsewhere,
        Wrong::Rights,
        Wrong::Presence,
        Wrong::User,
        Wrong::Lost,
        Wrong::Stray,
    ] {
        for vcpus in [1, 2] {
            let guest = Guest::new(4, vcpus);
            let calls = guest.run(5, 10_000, wrong);
            let said = match guest.model(5, &calls) {
                Err(call) => format!("{call:x?}"),
                Ok(mut model) => model.check(&mut guest.read()).unwrap_err().to_string(),
            };
            println!("{wrong:?} with {vcpus} vCPUs: {said}");
            // What the guest reads back it sees itself.
            let is_seen = matches!(guest.model(5, &calls), Err(Call::Failed { .. }));
            assert_eq!(is_seen, wrong != Wrong::Stray, "{wrong:?}");
        }
    }
}

/// Runs vCPU 1 while a slot of vCPU 0's spaces changes with every other instruction: for 16 versions it is
/// not there, for 16 it leads to `said`, as the records say, and in truth to `shown`. Until vCPU 1 takes
/// offence; if it has no reason to, until it has once been late. What it says.
fn in_a_hurry(guest: &Guest, slot: usize, said: [u64; OWN], shown: [u64; OWN], seed: u64) -> Call {
    let mut version = 0;
    guest.vcpu(1, seed, Wrong::Nothing, 2, &mut || {
        version += 1;
        let is_there = version / 16 % 2;
        for n in 0..OWN {
            let store = |at, value| {
                guest.ram.word(guest.spaces.block(0, n) + at).store(value, SeqCst);
            };
            let record = block::RECORDS + slot as u64 * RECORD;
            store(record + HISTORY + version % KNOWN * 8, said[n] * is_there);
            store(record + BEGUN, version);
            store(record + DONE, version);
            match slot.checked_sub(LARGE_SLOT) {
                None => store(block::TABLE + slot as u64 * 8, shown[n] * is_there),
                Some(i) => {
                    let entry = block::DIRECTORY + (LARGE_INDEX + i as u64) * 8;
                    store(entry, shown[n] * is_there);
                }
            }
        }
        if guest.ram.word(guest.spaces.desk(1) + desk::LOOSE).load(SeqCst) > 0 && said == shown {
            guest.ram.word(guest.image.control_gpa(control::STOP)).store(1, SeqCst);
        }
    })
}

#[test]
fn switch_knows_what_a_slot_can_show_when_it_is_late() {
    let guest = Guest::new(14, 2);
    let Guest { spaces, .. } = &guest;
    // Where no slot leads, but it looks as if one could.
    for gpa in (0..PROBES).map(|n| spaces.view(5) + (PROBE + n) * PAGE) {
        guest.ram.word(gpa).store(TAG | gpa, SeqCst);
    }
    let all = P | W | U;
    for slot in [3, 9, LARGE_SLOT] {
        let right = |n| match slot {
            3 => (spaces.block(0, n) + block::PRIVATE) | all,
            9 => (spaces.shared() + PAGE) | all,
            _ => spaces.view(1) | PS | all,
        };
        let rights: [u64; OWN] = std::array::from_fn(right);
        guest.reset();
        let call = in_a_hurry(&guest, slot, rights, rights, 3);
        assert!(matches!(call, Call::Done(_)), "slot {slot}: {call:x?}");
        let loose = guest.ram.word(spaces.desk(1) + desk::LOOSE).load(SeqCst);
        assert!(loose > 0, "slot {slot}: {loose}");

        // Stores are refused, so that it is a read that meets it.
        let wrongs: &[u64] = match slot {
            3 => &[spaces.shared(), spaces.block(1, 0) + block::PRIVATE],
            9 => &[spaces.block(0, 0) + block::PRIVATE, spaces.view(0) + PROBE * PAGE],
            _ => &[spaces.view(5) | PS, spaces.view(6) | PS],
        };
        for wrong in wrongs {
            let offences = (0..50).map(|seed| {
                guest.reset();
                in_a_hurry(&guest, slot, rights, [wrong | P | U; OWN], seed)
            });
            let mut of_late = offences.filter(|call| match call {
                // One that was late does not know what to expect.
                Call::Failed { expected, .. } => *expected == 0,
                other => panic!("slot {slot}: {other:x?}"),
            });
            assert!(of_late.next().is_some(), "slot {slot}: entry {wrong:#x}");
        }
    }
}

#[test]
fn switch_checks_every_word_of_memory() {
    let guest = Guest::new(4, 2);
    let calls = guest.run(9, 1000, Wrong::Nothing);
    let mut model = guest.model(9, &calls).unwrap();
    model.check(&mut guest.read()).unwrap();
    model.check_rest(&mut guest.read()).unwrap();
    let layout = guest.image.layout();
    let stacks = STACKS_GPA..STACKS_GPA + 2 * PAGE;
    let desks = [0, 1].map(|id| guest.spaces.desk(id));
    for gpa in (0..layout.memory()).step_by(PAGE as usize + 8) {
        let offset = gpa % PAGE;
        let of_desk = desks.contains(&(gpa - offset));
        let is_free = stacks.contains(&gpa)
            || of_desk && (offset >= desk::SEEN || [desk::CHECKS, desk::LOOSE].contains(&offset));
        let word = guest.ram.word(gpa);
        let good = word.fetch_xor(1 << 17, SeqCst);
        let here = model.check(&mut guest.read());
        let wrong = here.and_then(|()| model.check_rest(&mut guest.read()));
        word.store(good, SeqCst);
        match wrong {
            Err(wrong) => assert_eq!((wrong.gpa, wrong.seen), (gpa, good ^ 1 << 17), "{wrong}"),
            Ok(()) => assert!(is_free, "gpa {gpa:#x}"),
        }
    }
}

#[test]
fn switch_needs_room_for_its_spaces() {
    for (memory, vcpus, fits) in [(4, 1, true), (4, 16, true), (4, 64, false), (64, 64, true)] {
        let layout = Layout::new(memory, vcpus).unwrap();
        match Spaces::new(&layout) {
            Ok(spaces) => {
                assert!(fits, "{memory} MiB for {vcpus} vCPUs");
                let end = spaces.view(spaces.views());
                assert!(spaces.views() >= 2 && end <= layout.memory());
            }
            Err(error) => {
                assert!(!fits, "{error}");
                let said = error.to_string();
                assert!(said.contains("4 MiB") && said.contains("64 vCPUs"), "{said}");
            }
        }
    }
    // No page is used twice, and all are data.
    for (memory, vcpus) in [(4, 1), (5, 2), (9, 20), (64, 64), (3000, 3)] {
        let image = GuestImage::new(memory, vcpus).unwrap();
        let spaces = Spaces::new(image.layout()).unwrap();
        let mut written = BTreeSet::new();
        spaces.write(&image, &mut |gpa, bytes| {
            assert!(bytes.len() as u64 == PAGE && gpa % PAGE == 0);
            assert!((image.layout().data_gpa()..image.layout().memory()).contains(&gpa));
            written.insert(gpa);
        });
        let mut used = BTreeSet::new();
        let mut take = |gpa, pages| {
            (0..pages).for_each(|n| assert!(used.insert(gpa + n * PAGE), "{memory} {vcpus}"));
        };
        take(spaces.shared(), SHARED_PAGES);
        (0..spaces.views()).for_each(|n| take(spaces.view(n) + PROBE * PAGE, PROBES));
        for id in 0..vcpus {
            (0..OWN).for_each(|n| take(spaces.block(id, n), block::PAGES));
            take(spaces.desk(id), 1);
        }
        // The rest are the mirror's tables.
        assert!(used.is_subset(&written) && written.len() - used.len() >= 3 + 2);
    }
}
