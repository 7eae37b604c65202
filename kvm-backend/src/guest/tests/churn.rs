// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `churn` over a window that does not change: what it leaves, and what it takes offence at.

use super::*;
use crate::guest::churn::*;
use std::sync::Mutex;

/// What is at a page of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hole,
    Memory,
    ReadOnly,
}

struct Window {
    kinds: Mutex<Vec<Kind>>,
    words: Vec<AtomicU64>,
}

impl Window {
    /// All places of one kind; the memory at place n is page n of memory 7.
    fn new(kind: Kind) -> Arc<Self> {
        let words = (0..CHURN_PAGES * PAGE / 8).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        for page in 0..CHURN_PAGES {
            fill_page(7, page, &mut |at, value| words[at as usize / 8].store(value, SeqCst));
        }
        Arc::new(Self { kinds: Mutex::new(vec![kind; CHURN_PAGES as usize]), words })
    }

    fn kind(&self, offset: u64) -> Kind {
        self.kinds.lock().unwrap()[(offset / PAGE) as usize]
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        &self.words[(offset / 8) as usize]
    }
}

/// A vCPU whose physical memory has the window, too.
struct Windowed(Vcpu, Arc<Window>);

impl Bus for Windowed {
    type Stop = Fault;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; 15]) -> Result<usize, Fault> {
        self.0.fetch(gva, buf)
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let Some(at) = self.0.translate(gva, false, false)?.checked_sub(CHURN_GPA) else {
            return self.0.read(gva, buf);
        };
        let word = match self.1.kind(at) {
            Kind::Hole => u64::MAX,
            _ => self.1.word(at).load(SeqCst),
        };
        buf.copy_from_slice(&word.to_le_bytes());
        Ok(())
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Fault> {
        let Some(at) = self.0.translate(gva, true, false)?.checked_sub(CHURN_GPA) else {
            return self.0.write(gva, bytes);
        };
        if self.1.kind(at) == Kind::Memory {
            self.1.word(at).store(u64::from_le_bytes(bytes.try_into().unwrap()), SeqCst);
        }
        Ok(())
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

    fn invlpg(&mut self, gva: u64) -> Result<(), Stop<Fault>> {
        self.0.invlpg(gva)
    }
}

struct Setup {
    image: GuestImage,
    ram: Ram,
    window: Arc<Window>,
}

impl Setup {
    /// A window that is all of one kind, and states that say so.
    fn new(vcpus: usize, kind: Kind) -> Self {
        let image = GuestImage::new(4, vcpus).unwrap();
        let ram = Ram::of(&image);
        image.write_stable(&mut |gpa, bytes| ram.write(gpa, bytes));
        let setup = Self { image, ram, window: Window::new(kind) };
        for place in 0..CHURN_PAGES {
            setup.say(place, kind);
        }
        setup
    }

    fn state(&self, place: u64, word: u64) -> &AtomicU64 {
        self.ram.word(STATES_GPA + place * STATE + word * 8)
    }

    fn say(&self, place: u64, kind: Kind) {
        let (identity, rights) = match kind {
            Kind::Hole => (HOLE, 0),
            Kind::Memory => (identity(7, place), WRITABLE),
            Kind::ReadOnly => (identity(7, place), READ_ONLY),
        };
        for (word, value) in [(0, 2), (1, identity), (2, identity), (3, rights)] {
            self.state(place, word).store(value, SeqCst);
        }
    }

    /// The same deviation at each place of the window.
    fn everywhere(self, deviate: impl Fn(&Self, u64)) -> Self {
        (0..CHURN_PAGES).for_each(|place| deviate(&self, place));
        self
    }

    /// Runs vCPU 0 for a while; what it took offence at.
    fn run(&self) -> Option<(u64, u64, u64)> {
        let mut bus = Windowed(Vcpu::new(&self.image, &self.ram), Arc::clone(&self.window));
        let mut regs = self.image.churn(0, 3);
        let mut budget = 100_000;
        match run(&mut regs, &mut bus, &mut DecodeCache::new(), &mut budget).unwrap() {
            Event::Halt => match Call::from_regs(&regs) {
                Call::Failed { gva, expected, seen } => Some((gva, expected, seen)),
                other => panic!("{other:?}"),
            },
            _ => None,
        }
    }

    /// As `run`, for an offence at `offset` in a page of the window, which it gives with the place.
    fn offence(&self, offset: u64) -> (u64, u64, u64) {
        let (gva, expected, seen) = self.run().expect("no offence taken");
        assert_eq!(gva % PAGE, offset, "{gva:#x}");
        let place = (gva - CHURN_GVA) % CHURN_SECOND / PAGE;
        assert!(place < CHURN_PAGES, "{gva:#x}");
        (place, expected, seen)
    }

    fn lane(&self, place: u64, vcpu: u64) -> &AtomicU64 {
        self.window.word(place * PAGE + LANES + vcpu * 8)
    }
}

#[test]
fn words_of_churn_cannot_be_taken_for_each_other() {
    for memory in [1, 2, 77, (1 << 40) - 2] {
        for page in [0, 1, 15, 255] {
            let word = identity(memory, page);
            assert_eq!(identified(word), Some((memory, page)));
            assert_eq!(identified(word ^ 1 << 20), None);
            for at in [IDENTITY, LANES, PAGE - 8] {
                let poison = poison(memory, page * PAGE + at);
                assert_eq!(identified(poison), None);
                assert!(Lane::of(poison).vcpu >= MAX_VCPUS as u64);
                assert_ne!(filler(word, at), poison);
            }
        }
    }
    assert_eq!(identified(HOLE), None);
    let lane = Lane { vcpu: 63, place: 127, number: (1 << 50) - 2 };
    assert_eq!((Lane::of(lane.word()), lane.word() == HOLE), (lane, false));
}

#[test]
fn churn_counts_and_writes_until_told_to_stop() {
    let vcpus = 3;
    let s = Setup::new(vcpus, Kind::Memory);
    for place in 0..CHURN_PAGES {
        let kind = [Kind::Memory, Kind::Hole, Kind::ReadOnly, Kind::Memory][place as usize % 4];
        s.window.kinds.lock().unwrap()[place as usize] = kind;
        s.say(place, kind);
        if place % 4 == 3 {
            // Of these nothing is known.
            s.state(place, 0).store(1, SeqCst);
        }
    }
    let calls: Vec<Call> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..vcpus)
            .map(|id| {
                let s = &s;
                scope.spawn(move || {
                    let mut bus = Windowed(Vcpu::new(&s.image, &s.ram), Arc::clone(&s.window));
                    let mut regs = s.image.churn(id, 99);
                    let mut cache = DecodeCache::new();
                    loop {
                        let event = run(&mut regs, &mut bus, &mut cache, &mut 100_000).unwrap();
                        if event == Event::Halt {
                            return Call::from_regs(&regs);
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        s.ram.word(s.image.control_gpa(control::STOP)).store(1, SeqCst);
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let counts: Vec<u64> = calls
        .iter()
        .map(|call| match call {
            Call::Done(count) if *count > STABLE_PAGES => *count,
            other => panic!("{other:?}"),
        })
        .collect();
    let word: Word<'_> = &|gpa| s.ram.word(gpa).load(SeqCst);
    let ledger = |id| Ledger::of(s.image.layout(), id);
    let last = |id| ledger(id).last(word);

    // What stays: each word is checked.
    let none = vec![Lanes { places: 0, floors: vec![0; vcpus] }; STABLE_PAGES as usize];
    let stays =
        || verify::churn(&s.image, &counts, &none, &last, &mut |gpa, buf| s.ram.read(gpa, buf));
    stays().unwrap();
    for page in [0, DENSE_PAGES - 1, DENSE_PAGES, STABLE_PAGES - 1] {
        let words = [IDENTITY, COUNTS, COUNTS + 16, COUNTS + 24, LANES, LANES + 24, PAGE - 8];
        for offset in words {
            let word = s.ram.word(stable_gpa(s.image.layout(), page) + offset);
            let good = word.fetch_xor(1, SeqCst);
            let wrong = stays().unwrap_err();
            assert_eq!((wrong.memory, wrong.offset), (STABLE, page * PAGE + offset), "{wrong}");
            word.store(good, SeqCst);
        }
    }
    stays().unwrap();

    // The window: lanes are where they can be, and nothing else has changed.
    for place in 0..CHURN_PAGES {
        let floors = (0..vcpus).map(|id| ledger(id).entry(word, place).map_or(0, |e| e.0));
        let lanes = Lanes { places: 1 << place, floors: floors.collect() };
        let check = |lanes: &Lanes| {
            let word: Word<'_> = &|at| s.window.word(at).load(SeqCst);
            check_filler(7, place, word).and(check_lanes(7, place, lanes, word, &last))
        };
        check(&lanes).unwrap();
        let written = (0..vcpus as u64).all(|id| s.lane(place, id).load(SeqCst) != 0);
        let known = lanes.floors.iter().all(|floor| *floor > 0);
        assert_eq!((written, known), (place % 4 % 3 == 0, place % 4 == 0), "place {place}");
        for (id, floor) in lanes.floors.iter().enumerate() {
            assert!(*floor <= last(id));
            let entry = ledger(id).entry(word, place);
            assert!(entry.is_none_or(|(_, of)| of == identity(7, place)));
        }
        let wrong = |offset, value| {
            let word = s.window.word(place * PAGE + offset);
            let good = word.swap(value, SeqCst);
            let wrong = check(&lanes).unwrap_err();
            assert_eq!((wrong.offset, wrong.seen), (place * PAGE + offset, value), "{wrong}");
            word.store(good, SeqCst);
            wrong.what
        };
        let lane = |vcpu, place, number| Lane { vcpu, place, number }.word();
        assert_eq!(wrong(IDENTITY, poison(7, 0)), "identity");
        assert_eq!(wrong(8, 0), "filler");
        assert_eq!(wrong(LANES + 8, lane(0, place, 1)), "lane of another vCPU");
        let elsewhere = lane(1, (place + 1) % CHURN_PAGES, last(1));
        assert_eq!(wrong(LANES + 8, elsewhere), "store through a page that was elsewhere");
        let newer = lane(1, place, last(1) + 1);
        assert_eq!(wrong(LANES + 8, newer), "store that was never made");
        assert_eq!(wrong(LANES + vcpus as u64 * 8, lane(3, place, 1)), "lane of no vCPU");
        if known {
            assert_eq!(wrong(LANES + 8, 0), "lost store");
            assert_eq!(wrong(LANES + 8, lane(1, place, lanes.floors[1] - 1)), "lost store");
        }
    }
}

#[test]
fn churn_takes_offence_at_wrong_identities() {
    let other = identity(8, 0);
    for kind in [Kind::Memory, Kind::Hole, Kind::ReadOnly] {
        assert_eq!(Setup::new(1, kind).run(), None, "{kind:?}");
    }
    let s = Setup::new(1, Kind::Memory)
        .everywhere(|s, place| s.window.word(place * PAGE).store(other, SeqCst));
    let (place, expected, seen) = s.offence(IDENTITY);
    assert_eq!((expected, seen), (identity(7, place), other));
    // What comes may be there already; what goes, still.
    for word in [1, 2] {
        let s = Setup::new(1, Kind::Memory).everywhere(|s, place| {
            s.window.word(place * PAGE).store(other, SeqCst);
            s.state(place, word).store(other, SeqCst);
        });
        assert_eq!(s.run(), None, "word {word} of the state");
    }
    // Memory where there is none, none where there is some.
    let s = Setup::new(1, Kind::Memory).everywhere(|s, place| s.say(place, Kind::Hole));
    let (place, expected, seen) = s.offence(IDENTITY);
    assert_eq!((expected, seen), (HOLE, identity(7, place)));
    let s = Setup::new(1, Kind::Hole).everywhere(|s, place| s.say(place, Kind::Memory));
    let (place, expected, seen) = s.offence(IDENTITY);
    assert_eq!((expected, seen), (identity(7, place), HOLE));
    // Nothing is known: any identity will do, but nothing else.
    let unknown = |s: &Setup, place| s.state(place, 0).store(1, SeqCst);
    let s = Setup::new(1, Kind::Memory).everywhere(|s, place| {
        unknown(s, place);
        s.window.word(place * PAGE).store(other, SeqCst);
    });
    assert_eq!(s.run(), None);
    for bad in [0, poison(7, 0), identity(7, 0) ^ 1 << 33] {
        let s = Setup::new(1, Kind::Memory).everywhere(|s, place| {
            unknown(s, place);
            s.window.word(place * PAGE).store(bad, SeqCst);
        });
        assert_eq!(s.offence(IDENTITY).2, bad);
    }
}

#[test]
fn churn_takes_offence_at_wrong_lanes() {
    // A store that is lost; one that is let through.
    let s = Setup::new(1, Kind::ReadOnly).everywhere(|s, place| s.say(place, Kind::Memory));
    let (place, expected, seen) = s.offence(LANES);
    assert_eq!((Lane::of(expected), seen), (Lane { vcpu: 0, place, number: 1 }, 0));
    let s = Setup::new(1, Kind::Memory).everywhere(|s, place| s.say(place, Kind::ReadOnly));
    let (place, expected, seen) = s.offence(LANES);
    assert_eq!((expected, Lane::of(seen)), (0, Lane { vcpu: 0, place, number: 1 }));
    // A hole that remembers; memory with a hole in it.
    let s = Setup::new(1, Kind::Memory).everywhere(|s, place| {
        s.say(place, Kind::Hole);
        s.window.word(place * PAGE).store(HOLE, SeqCst);
    });
    assert_eq!(s.offence(LANES).1, HOLE);
    let s = Setup::new(1, Kind::Memory).everywhere(|s, place| s.lane(place, 0).store(HOLE, SeqCst));
    assert_eq!(s.offence(LANES).2, HOLE);
    // Lanes that cannot be: another's, one not made yet, poison; known or not.
    let foreign = Lane { vcpu: 1, place: 0, number: 1 }.word();
    let future = Lane { vcpu: 0, place: 0, number: 1 << 40 }.word();
    for (bad, version) in [foreign, future, poison(7, LANES)].into_iter().zip([2, 1, 2]) {
        let s = Setup::new(1, Kind::Memory).everywhere(|s, place| {
            s.lane(place, 0).store(bad, SeqCst);
            s.state(place, 0).store(version, SeqCst);
        });
        assert_eq!(s.offence(LANES).2, bad);
    }
    // An older store than the ledger knows of; of another identity it says nothing.
    for (of, offended) in [(7, true), (8, false)] {
        let s = Setup::new(1, Kind::Memory).everywhere(|s, place| {
            let entry = s.image.layout().tails_gpa() + place * 16;
            s.ram.word(entry).store(5, SeqCst);
            s.ram.word(entry + 8).store(identity(of, place), SeqCst);
        });
        assert_eq!(offended.then(|| s.offence(LANES).1), offended.then_some(5));
        assert_eq!(s.run().is_some(), offended);
    }
}

#[test]
fn churn_takes_offence_at_wrong_counts_and_moves() {
    let s = Setup::new(1, Kind::Memory);
    let count = s.ram.word(stable_gpa(s.image.layout(), DENSE_PAGES + 2) + COUNTS);
    count.fetch_add(1, SeqCst);
    let (expected, seen) =
        (churn::count(DENSE_PAGES + 2, 0, 0), churn::count(DENSE_PAGES + 2, 0, 1));
    assert_eq!(s.run(), Some((SPARSE_GVA + 2 * SPARSE_STRIDE + COUNTS, expected, seen)));

    // Memory 7 moves from place 3 to place 9.
    for (from, to, version, offended) in [
        (Kind::Memory, Kind::Hole, 2, false),
        (Kind::Hole, Kind::Memory, 2, false),
        (Kind::Hole, Kind::Hole, 2, true),
        (Kind::Hole, Kind::Hole, 1, false),
    ] {
        let s = Setup::new(1, Kind::Hole);
        for (place, kind) in [(3, from), (9, to)] {
            s.window.kinds.lock().unwrap()[place] = kind;
            s.say(place as u64, kind);
        }
        s.window.word(9 * PAGE).store(identity(7, 3), SeqCst);
        for word in [1, 2] {
            let said = if to == Kind::Memory { identity(7, 3) } else { HOLE };
            s.state(9, word).store(said, SeqCst);
        }
        for record in 0..control::MOVE_RECORDS {
            let at = s.image.control_gpa(control::MOVES + record * control::MOVE_STRIDE);
            for (word, value) in [version, 3, 9, identity(7, 3)].into_iter().enumerate() {
                s.ram.word(at + word as u64 * 8).store(value, SeqCst);
            }
        }
        let offence = (CHURN_GVA + 9 * PAGE, identity(7, 3), HOLE);
        assert_eq!(s.run(), offended.then_some(offence), "{from:?} {to:?} {version}");
    }
}
