// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulator's accessors on several threads: against each other, against software vCPUs that load
//! and store natively, against patches, and against guests and VMMs that change everything meanwhile.

mod common;

use common::{Guest, MIB, PAGE, RWU};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig, SlotId};
use mmu_core::paging::{Access, bits};
use mmu_core::vcpu::{AccessError, SoftExit, SoftVcpu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, yield_now};
use std::time::{Duration, Instant};

const HERE: u64 = 0x1_0000_0000;
const NEXT: u64 = HERE + PAGE;
const HERE_GPA: u64 = 0x2_0000;
const NEXT_GPA: u64 = 0x3_0000;
const USER: Access = Access::read().user();
/// A patch's side of the pages: neighbours in the guest's memory, and rights to fetch.
const CODE: [u8; 3] = [0x0f, 0x01, 0xc1];

fn guest() -> Guest {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    guest.map(Gva(HERE), Gpa(HERE_GPA), RWU);
    guest.map(Gva(NEXT), Gpa(NEXT_GPA), RWU);
    guest
}

fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 16) % below
    }
}

/// Whether this processor exchanges 16 bytes as one.
fn has_16(cpu: &SoftVcpu) -> bool {
    cpu.vcpu().cmpxchg(Gva(HERE), 16, 1, 1, USER).is_ok()
}

/// How a thread reaches memory.
#[derive(Clone, Copy, Debug)]
enum Path {
    Emulated,
    Native,
    View,
}

const PATHS: [Path; 3] = [Path::Emulated, Path::Native, Path::View];

fn cmpxchg(
    cpu: &mut SoftVcpu,
    path: Path,
    gva: Gva,
    size: usize,
    old: u128,
    new: u128,
) -> Result<(), u128> {
    match path {
        Path::Emulated => cpu.vcpu().cmpxchg(gva, size, old, new, USER).unwrap(),
        Path::Native => cpu.session().cmpxchg(gva, size, old, new, true).unwrap(),
        Path::View => cpu.vcpu().view(USER).cmpxchg(gva, size, old, new).unwrap(),
    }
}

fn read(cpu: &mut SoftVcpu, path: Path, gva: Gva, buf: &mut [u8]) {
    match path {
        Path::Emulated => assert_eq!(cpu.vcpu().read_emulated(gva, buf, USER), Ok(vec![])),
        Path::Native => cpu.session().load(gva, buf, true).unwrap(),
        Path::View => cpu.vcpu().view(USER).read(gva, buf).unwrap(),
    }
}

fn write(cpu: &mut SoftVcpu, path: Path, gva: Gva, bytes: &[u8]) {
    match path {
        Path::Emulated => assert_eq!(cpu.vcpu().write_emulated(gva, bytes, USER), Ok(vec![])),
        Path::Native => cpu.session().store(gva, bytes, true).unwrap(),
        Path::View => cpu.vcpu().view(USER).write(gva, bytes).unwrap(),
    }
}

#[derive(Clone, Copy, Debug)]
enum Did {
    Read(u128),
    Write(u128),
    /// Expected, new, and what was there if it was something else.
    Exchange(u128, u128, Result<(), u128>),
}

/// One operation: when it began and ended by a common clock.
#[derive(Clone, Copy, Debug)]
struct Operation {
    began: u64,
    ended: u64,
    did: Did,
}

/// Whether some order of the operations that respects their times explains what each has seen
/// (Wing and Gong). Each is tried as the next that nothing unfinished precedes.
fn is_linearizable(value: u128, left: &mut Vec<Operation>) -> bool {
    let Some(first_end) = left.iter().map(|op| op.ended).min() else { return true };
    for i in 0..left.len() {
        if left[i].began > first_end {
            continue;
        }
        let after = match left[i].did {
            Did::Read(seen) => (seen == value).then_some(value),
            Did::Write(new) => Some(new),
            Did::Exchange(old, new, Ok(())) => (old == value).then_some(new),
            Did::Exchange(old, _, Err(seen)) => (seen == value && old != value).then_some(value),
        };
        if let Some(after) = after {
            let tried = left.swap_remove(i);
            let explained = is_linearizable(after, left);
            left.push(tried);
            let last = left.len() - 1;
            left.swap(i, last);
            if explained {
                return true;
            }
        }
    }
    false
}

#[test]
fn the_checker_knows_good_from_bad() {
    let op = |began, ended, did| Operation { began, ended, did };
    let check = |ops: &[Operation]| is_linearizable(0, &mut ops.to_vec());
    let (write, exchange) = (Did::Write(1), Did::Exchange(0, 2, Ok(())));
    // Side by side in either order that fits; one after the other in the one order.
    assert!(check(&[op(0, 5, write), op(1, 4, exchange), op(6, 7, Did::Read(1))]));
    assert!(!check(&[op(0, 5, write), op(1, 4, exchange), op(6, 7, Did::Read(2))]));
    assert!(!check(&[op(0, 1, write), op(2, 3, exchange)]));
    assert!(!check(&[op(0, 1, write), op(2, 3, Did::Read(0))]));
    assert!(check(&[op(0, 3, write), op(2, 4, Did::Read(0))]));
    // Two exchanges that both succeed from one value: a lost update.
    assert!(!check(&[op(0, 9, exchange), op(0, 9, Did::Exchange(0, 3, Ok(())))]));
    assert!(!check(&[op(0, 9, Did::Exchange(0, 3, Err(0)))]));
    assert!(check(&[op(0, 9, exchange), op(0, 9, Did::Exchange(0, 3, Err(2)))]));
}

/// Lets threads go on at the same time, without sleeping if they can help it: what is to be raced takes
/// less than a wake-up.
struct Start {
    threads: u64,
    arrived: AtomicU64,
}

impl Start {
    fn wait(&self) {
        let turn = self.arrived.fetch_add(1, Ordering::AcqRel) / self.threads;
        let mut spins = 0u32;
        while self.arrived.load(Ordering::Acquire) < (turn + 1) * self.threads {
            spins += 1;
            match spins % 4096 {
                0 => yield_now(),
                _ => std::hint::spin_loop(),
            }
        }
    }
}

/// Short histories of reads, writes and exchanges of one place by threads on all paths: each must be
/// explained by some order of the operations.
#[test]
fn every_history_is_linearizable() {
    const OPERATIONS: usize = 4;
    let guest = guest();
    let clock = AtomicU64::new(0);
    let wide = has_16(&guest.vcpu());
    // The place, its size, and whether plain reads and writes of it are one step as well.
    let places = [
        (HERE + 0x40, 8, true),
        (HERE + 0x84, 4, true),
        (HERE + 0xc3, 1, true),
        (NEXT + 0x3c - 2, 4, false),
        (HERE + 0x100, 16, false),
    ];
    let places = &places[..if wide { 5 } else { 3 }];
    // No more than can run at once.
    let processors = std::thread::available_parallelism().map_or(2, usize::from);
    let threads = processors.clamp(2, PATHS.len());
    let rounds: u64 = if cfg!(debug_assertions) { 400 } else { 1500 };
    let start = Start { threads: threads as u64, arrived: AtomicU64::new(0) };
    let mut overlapping = 0;
    let histories: Vec<Vec<Vec<Operation>>> = scope(|s| {
        let spawned: Vec<_> = (0..threads)
            .map(|thread| {
                let (guest, clock, start) = (&guest, &clock, &start);
                s.spawn(move || {
                    let mut cpu = guest.vcpu();
                    let mut random = random(thread as u64 + 1);
                    let now = || clock.fetch_add(1, Ordering::SeqCst);
                    (0..rounds * places.len() as u64)
                        .map(|round| {
                            let (at, size, plain) = places[round as usize % places.len()];
                            let (gva, path) =
                                (Gva(at), PATHS[(thread + round as usize) % PATHS.len()]);
                            start.wait();
                            if thread == 0 {
                                cpu.vcpu().write(gva, &vec![0; size], USER).unwrap();
                            }
                            start.wait();
                            let mut history = Vec::with_capacity(OPERATIONS);
                            for _ in 0..OPERATIONS {
                                let (old, new) = (random(3).into(), (1 + random(2)).into());
                                let kind = random(if plain { 4 } else { 2 });
                                let began = now();
                                // Where threads share a processor their operations overlap as well.
                                if random(8) == 0 {
                                    yield_now();
                                }
                                let did = match kind {
                                    0 | 1 => Did::Exchange(
                                        old,
                                        new,
                                        cmpxchg(&mut cpu, path, gva, size, old, new),
                                    ),
                                    2 => {
                                        let bytes = new.to_le_bytes();
                                        write(&mut cpu, path, gva, &bytes[..size]);
                                        Did::Write(new)
                                    }
                                    _ => {
                                        let mut seen = [0; 16];
                                        read(&mut cpu, path, gva, &mut seen[..size]);
                                        Did::Read(u128::from_le_bytes(seen))
                                    }
                                };
                                history.push(Operation { began, ended: now(), did });
                            }
                            history
                        })
                        .collect()
                })
            })
            .collect();
        spawned.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for round in 0..rounds as usize * places.len() {
        let mut history: Vec<_> = histories.iter().flat_map(|of| of[round].clone()).collect();
        overlapping += usize::from(history.iter().any(|a| {
            history.iter().filter(|b| a.began < b.ended && b.began < a.ended).count() > 1
        }));
        let (at, size, _) = places[round % places.len()];
        let all = history.clone();
        assert!(is_linearizable(0, &mut history), "{size} bytes at {at:#x}: {all:#?}");
    }
    println!("{overlapping} histories with operations at the same time");
    assert!(overlapping > 0, "no two operations were ever made at the same time");
    guest.audit();
}

/// Counters of every size, next to each other, counted up by exchanges on every path.
#[test]
fn no_exchange_is_lost() {
    const STRETCH: u64 = 500;
    const EACH: u64 = STRETCH * if cfg!(debug_assertions) { 20 } else { 200 };
    let guest = guest();
    let wide = has_16(&guest.vcpu());
    // Two neighbours in one word, one across two words, 16 bytes.
    let places = [(HERE + 0x200, 2), (HERE + 0x202, 2), (HERE + 0x20d, 8), (HERE + 0x220, 16)];
    let places = &places[..if wide { 4 } else { 2 }];
    scope(|s| {
        for path in PATHS {
            let guest = &guest;
            s.spawn(move || {
                let mut cpu = guest.vcpu();
                // Stretches of the same place, so that all are there at the same time.
                for n in 0..EACH * places.len() as u64 {
                    let (at, size) = places[(n / STRETCH) as usize % places.len()];
                    let mut old = 0;
                    let limit = u128::MAX >> (128 - 8 * size);
                    while let Err(seen) =
                        cmpxchg(&mut cpu, path, Gva(at), size, old, (old + 1) & limit)
                    {
                        old = seen;
                    }
                }
            });
        }
    });
    let mut cpu = guest.vcpu();
    for (at, size) in places {
        let mut bytes = [0; 16];
        read(&mut cpu, Path::Emulated, Gva(*at), &mut bytes[..*size]);
        let total = u128::from(EACH) * PATHS.len() as u128;
        let seen = u128::from_le_bytes(bytes);
        assert_eq!(seen, total & (u128::MAX >> (128 - 8 * size)), "{size} bytes at {at:#x}");
    }
    guest.audit();
}

/// Two threads own bytes of the same words, one on each path: neither loses any to the other.
#[test]
fn the_bytes_beside_a_write_stay_what_they_are() {
    const ROUNDS: u64 = if cfg!(debug_assertions) { 20_000 } else { 100_000 };
    let guest = guest();
    scope(|s| {
        for (first, path) in [(0, Path::Native), (1, Path::Emulated)] {
            let guest = &guest;
            s.spawn(move || {
                let mut cpu = guest.vcpu();
                for n in 0..ROUNDS {
                    // Every second 3-byte stretch of a line.
                    let gva = Gva(HERE + 0x300 + (n % 10) * 6 + first * 3);
                    let bytes = [n as u8, (n >> 8) as u8, (n >> 16) as u8];
                    write(&mut cpu, path, gva, &bytes);
                    let mut seen = [0; 3];
                    read(&mut cpu, path, gva, &mut seen);
                    assert_eq!(seen, bytes, "{path:?}");
                }
            });
        }
    });
}

/// Write, then read on another vCPU, in both directions: what was written before the flag is seen after
/// it, across pages and paths.
#[test]
fn what_was_written_before_is_seen_after() {
    const ROUNDS: u64 = if cfg!(debug_assertions) { 2_000 } else { 10_000 };
    let guest = guest();
    let (flag, payload) = (Gva(HERE + 0x400), Gva(NEXT - 20));
    let pass = |mut cpu: SoftVcpu, writes: Path, reads: Path, mine: u64| {
        for round in 0..ROUNDS {
            if round % 2 == mine {
                write(&mut cpu, writes, payload, &[round as u8; 40]);
                write(&mut cpu, writes, flag, &(round + 1).to_le_bytes());
                continue;
            }
            let mut word = [0; 8];
            loop {
                read(&mut cpu, reads, flag, &mut word);
                if u64::from_le_bytes(word) == round + 1 {
                    break;
                }
                yield_now();
            }
            let mut seen = [0; 40];
            read(&mut cpu, reads, payload, &mut seen);
            assert_eq!(seen, [round as u8; 40], "{writes:?} to {reads:?}");
        }
    };
    for (one, other) in
        [(Path::Native, Path::Emulated), (Path::Emulated, Path::Native), (Path::View, Path::Native)]
    {
        guest.mmu.write_phys(Gpa(HERE_GPA + 0x400), &[0; 8]);
        let (guest, pass) = (&guest, &pass);
        scope(|s| {
            s.spawn(move || pass(guest.vcpu(), one, one, 0));
            s.spawn(move || pass(guest.vcpu(), other, other, 1));
        });
    }
}

/// Code is patched back and forth while vCPUs fetch it natively and through the emulator, in every
/// position: a fetch is of the one encoding or the other.
#[test]
fn nobody_fetches_half_a_patch() {
    let vmmcall = [0x0f, 0x01, 0xd9];
    // Every byte differs, so that every mixture shows.
    let (one, other) = ([0x11u8; 8], [0xeeu8; 8]);
    let guest = guest();
    let fetch = Access::execute().user();
    for (at, len) in [(HERE + 0x502, 3), (HERE + 0x506, 8), (HERE + 0x53c, 8), (NEXT - 3, 8)] {
        guest.vcpu().vcpu().write(Gva(at), &one[..len], USER).unwrap();
        let stop = AtomicBool::new(false);
        let fetched = AtomicU64::new(0);
        let seen = [AtomicU64::new(0), AtomicU64::new(0)];
        scope(|s| {
            for path in [Path::Native, Path::Native, Path::Emulated, Path::View] {
                let (guest, stop, fetched, seen) = (&guest, &stop, &fetched, &seen);
                s.spawn(move || {
                    let mut cpu = guest.vcpu();
                    let view = cpu.vcpu().view(fetch);
                    let mut n = 0;
                    let mut code = [0; 8];
                    let code = &mut code[..len];
                    while !stop.load(Ordering::Relaxed) {
                        match path {
                            Path::Native => {
                                // A long stay inside, which a patch has to end.
                                let mut session = cpu.session();
                                for _ in 0..64 {
                                    session.fetch(Gva(at), code, true).unwrap();
                                    assert!(
                                        code == &one[..len] || code == &other[..len],
                                        "{code:x?}"
                                    );
                                }
                            }
                            Path::Emulated => cpu.vcpu().read(Gva(at), code, fetch).unwrap(),
                            Path::View => view.read(Gva(at), code).unwrap(),
                        }
                        let which = [one, other].iter().position(|c| c[..len] == *code);
                        let which = which.unwrap_or_else(|| {
                            panic!("{path:?} fetched half a patch at {at:#x}: {code:x?}")
                        });
                        seen[which].fetch_add(1, Ordering::Relaxed);
                        n += 1;
                    }
                    fetched.fetch_add(n, Ordering::Relaxed);
                });
            }
            for _ in 0..2 {
                let (guest, stop) = (&guest, &stop);
                s.spawn(move || {
                    let mut cpu = guest.vcpu();
                    let mut patched = 0;
                    let end = Instant::now() + Duration::from_millis(400);
                    let mut encodings = (&one[..len], &other[..len]);
                    while Instant::now() < end || patched < 10 {
                        let (old, new) = encodings;
                        let vcpu = cpu.vcpu_mut();
                        if vcpu.patch_code(Gva(at), old, new, fetch).unwrap() {
                            patched += 1;
                        }
                        encodings = (new, old);
                    }
                    stop.store(true, Ordering::Relaxed);
                });
            }
        });
        assert!(fetched.into_inner() > 100);
        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) > 0), "only one encoding was met");
        guest.audit();
    }
    // A guest's own hypercall, patched by two vCPUs at once: one of them does it.
    guest.vcpu().vcpu().write(Gva(HERE + 0x600), &CODE, USER).unwrap();
    let done: Vec<bool> = scope(|s| {
        let patch = || {
            let mut cpu = guest.vcpu();
            cpu.vcpu_mut().patch_code(Gva(HERE + 0x600), &CODE, &vmmcall, fetch).unwrap()
        };
        let threads = [s.spawn(patch), s.spawn(patch)];
        threads.map(|thread| thread.join().unwrap()).into()
    });
    assert_eq!(done.iter().filter(|done| **done).count(), 1);
}

/// Everything changes under the accesses: the guest's table flips the second page between memory, a
/// device and nothing, the VMM makes and deletes the slot behind it, and zaps. Each access is of one
/// of these worlds, whole.
#[test]
fn accesses_meet_tables_and_slots_that_change() {
    const SLOT: u64 = 16 * MIB;
    const DEVICE: u64 = 0xd000_0000;
    const THREADS: u64 = 2;
    let guest = guest();
    // A pair of pages for each thread.
    let next = |thread: u64| NEXT + thread * 4 * PAGE;
    let home = |thread: u64| HERE_GPA + thread * PAGE;
    for thread in 0..THREADS {
        guest.map(Gva(next(thread) - PAGE), Gpa(home(thread)), RWU);
    }
    let entries: Vec<_> =
        (0..THREADS).map(|thread| guest.entry(guest.root, Gva(next(thread)), 1)).collect();
    let time = if cfg!(debug_assertions) { 1500 } else { 4000 };
    let end = Instant::now() + Duration::from_millis(time);
    let running = || Instant::now() < end;
    let worlds = [NEXT_GPA | RWU, SLOT | RWU, DEVICE | RWU, NEXT_GPA | bits::P | bits::US, 0];
    let met = [const { AtomicU64::new(0) }; 4];
    scope(|s| {
        s.spawn(|| {
            let mut random = random(7);
            while running() {
                for entry in &entries {
                    guest.write(*entry, worlds[random(worlds.len() as u64) as usize]);
                }
            }
        });
        s.spawn(|| {
            while running() {
                let memory = Arc::new(AllocatedMemory::new(PAGE));
                guest.mmu.create_slot(SlotConfig::new(5, Gpa(SLOT), memory)).unwrap();
                yield_now();
                guest.mmu.delete_slot(SlotId(5)).unwrap();
                guest.mmu.zap_all();
            }
        });
        for thread in 0..THREADS {
            let (guest, met) = (&guest, &met);
            s.spawn(move || {
                let mut cpu = guest.vcpu();
                let mut random = random(thread + 11);
                const LEN: usize = 12;
                const MINE: usize = 5;
                let next = next(thread);
                let (at, home) = (next - MINE as u64, home(thread) + PAGE - MINE as u64);
                let mut last = [0; MINE];
                let mut n = 0u64;
                while running() {
                    n += 1;
                    let bytes = &n.to_le_bytes().repeat(2)[..LEN];
                    let mut buf = [0xaa; LEN];
                    let mut there = [0; MINE];
                    // The part that is always in memory is written with the whole or not at all.
                    let mut expect = |written: bool, what: &str| {
                        if written {
                            last.copy_from_slice(&bytes[..MINE]);
                        }
                        assert_eq!(guest.mmu.memory().read(Gpa(home), &mut there), MINE);
                        assert_eq!(there, last, "{what}, written: {written}");
                    };
                    let fault_is_in_the_second = |error: &AccessError| match error {
                        AccessError::Fault(fault) => assert_eq!(fault.gva, Gva(next)),
                        AccessError::Mmio { gpa, len } => {
                            assert!(matches!(gpa.0, SLOT | DEVICE), "{gpa}");
                            assert_eq!(*len, LEN - MINE);
                        }
                        other => panic!("{other}"),
                    };
                    match random(6) {
                        0 => {
                            let result = cpu.vcpu().write(Gva(at), bytes, USER);
                            result.as_ref().err().iter().for_each(|e| fault_is_in_the_second(e));
                            met[usize::from(result.is_err())].fetch_add(1, Ordering::Relaxed);
                            expect(result.is_ok(), "write");
                        }
                        1 => {
                            let result = cpu.vcpu().write_emulated(Gva(at), bytes, USER);
                            if let Ok(left) = &result {
                                let left: usize = left.iter().map(|f| f.bytes.len()).sum();
                                assert!(left == 0 || left == LEN - MINE);
                                met[2].fetch_add(u64::from(left > 0), Ordering::Relaxed);
                            }
                            result.as_ref().err().iter().for_each(|e| fault_is_in_the_second(e));
                            expect(result.is_ok(), "write_emulated");
                        }
                        2 => {
                            let result = cpu.session().store(Gva(at), bytes, true);
                            let known = matches!(
                                result,
                                Ok(()) | Err(SoftExit::Fault(_) | SoftExit::Mmio(_))
                            );
                            assert!(known, "{result:?}");
                            expect(result.is_ok(), "store");
                        }
                        3 => {
                            let result = cpu.vcpu().read(Gva(at), &mut buf, USER);
                            result.as_ref().err().iter().for_each(|e| fault_is_in_the_second(e));
                            match result {
                                Ok(()) => assert_eq!(buf[..MINE], last),
                                Err(_) => assert!(buf.iter().all(|byte| *byte == 0xaa)),
                            }
                        }
                        4 => {
                            let write = Access::write().user();
                            if let Ok(pinned) = cpu.vcpu().pin(Gva(at), bytes.len(), write) {
                                pinned.write(0, bytes).unwrap();
                                pinned.read(0, &mut buf).unwrap();
                                met[3].fetch_add(1, Ordering::Relaxed);
                                expect(true, "pin");
                            }
                        }
                        _ => {
                            let _ = cpu.vcpu().cmpxchg(Gva(next), 8, 0, 0, USER);
                            let _ = cpu.session().fetch(Gva(at), &mut buf, true);
                        }
                    }
                }
            });
        }
    });
    let met = met.map(AtomicU64::into_inner);
    assert!(met.iter().all(|n| *n > 0), "whole, refused, left to devices, pinned: {met:?}");
    guest.audit();
}
