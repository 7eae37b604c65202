// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Downgrades: carried out inside the guest, acknowledged, and what they cost.

use super::*;

#[test]
fn queued_downgrades_take_effect() {
    let Some(mut s) = setup(1, SUM) else { return };
    let count = 500;
    let entries = fill(&mut s, count, 1, 1);
    assert_eq!(sum(&mut s.vcpus[0], count, 1), count);
    let mut generation = 1;
    // One, some, more than fit at once; with and without CR3 loads.
    for n in [1u64, 2, 47, 48, 49, 97, 200, 240, 241, 245, 500] {
        for whole in [false, true] {
            let value = generation * 10;
            fill(&mut s, n, 501, value);
            generation += 1;
            let vcpu = &mut s.vcpus[0];
            for (i, &entry) in entries[..n as usize].iter().enumerate() {
                let gva = DATA + i as u64 * PAGE;
                let leaf = Downgrade::Leaf { entry, gva };
                vcpu.push(if whole { Downgrade::Entry { entry } } else { leaf }).unwrap();
            }
            assert_eq!(vcpu.queued() as u64, n);
            if generation % 2 == 0 {
                assert_eq!(vcpu.drain_only(generation).unwrap(), Exit::Drained);
                assert_eq!((vcpu.queued(), vcpu.acknowledged()), (0, generation));
            }
            assert_eq!(sum(vcpu, count, generation), count - n + n * value, "{n} {whole}");
            assert_eq!((vcpu.queued(), vcpu.acknowledged()), (0, generation));
            // Back to the first pages.
            fill(&mut s, count, 1, 1);
            s.vcpus[0].push(Downgrade::Everything { frames: 16 }).unwrap();
            assert_eq!(sum(&mut s.vcpus[0], count, generation), count);
        }
    }
    let vcpu = &mut s.vcpus[0];
    let end = 1024 * PAGE;
    for bad in [
        Downgrade::Leaf { entry: end, gva: 0 },
        Downgrade::Entry { entry: 4 },
        Downgrade::Frame { frame: 1024 },
        Downgrade::Everything { frames: 1025 },
    ] {
        assert!(matches!(vcpu.push(bad), Err(KvmError::BadDowngrade { .. })));
    }
    assert_eq!(vcpu.queued(), 0);
}

#[test]
fn a_touched_frame_may_be_used_anew() {
    let Ok(report) = self_test() else {
        return println!("skipped");
    };
    touch_frames(report.frame_touch_works);
    touch_frames(false);
}

fn touch_frames(frame_touch_works: bool) {
    let trap = TrapReport { frame_touch_works, ..self_test().unwrap() };
    let mut s = populate(KvmMachine::build(1, 1024, trap).unwrap(), 1, SUM);
    let count = 500;
    let entries = fill(&mut s, count, 1, 1);
    let frame = (entries[0] / PAGE) as u32;
    assert_eq!(sum(&mut s.vcpus[0], count, 1), count);
    for (turn, by_frame) in [(1, true), (2, true), (3, false)] {
        // Unlink the table, zero it, link it again with other content.
        let parent = s.p.parent(s.root, DATA);
        let link = s.p.entry(parent).swap(0, Ordering::SeqCst);
        let touch = |vcpu: &mut KvmVcpu| {
            vcpu.push(Downgrade::Entry { entry: parent }).unwrap();
            let whole = Downgrade::Everything { frames: frame + 1 };
            vcpu.push(if by_frame { Downgrade::Frame { frame } } else { whole }).unwrap();
            assert_eq!(vcpu.drain_only(turn).unwrap(), Exit::Drained);
        };
        touch(&mut s.vcpus[0]);
        for &entry in &entries {
            s.p.entry(entry).store(0, Ordering::SeqCst);
        }
        s.p.entry(parent).store(link, Ordering::SeqCst);
        fill(&mut s, count, 501 - 500 * (1 - turn % 2), 10 * turn);
        assert_eq!(sum(&mut s.vcpus[0], count, turn), count * 10 * turn, "turn {turn}");
    }
}

#[test]
fn two_vcpus_share_a_root() {
    let Some(mut s) = setup(2, SUM) else { return };
    let count = 64;
    let entries = fill(&mut s, count, 1, 1);
    fill(&mut s, count, 101, 1000);
    fill(&mut s, count, 1, 1);
    let mut b = s.vcpus.pop().unwrap();
    let mut a = s.vcpus.pop().unwrap();
    let generation = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let (ran, last_sum) = (AtomicU64::new(0), AtomicU64::new(0));
    let kicker = b.kicker();
    thread::scope(|scope| {
        let (generation, stop, entries) = (&generation, &stop, &entries);
        let (ran, last_sum) = (&ran, &last_sum);
        scope.spawn(move || {
            // The generation is read first; what it covers is then in the queue.
            while !stop.load(Ordering::SeqCst) {
                let g = generation.load(Ordering::SeqCst);
                let mut regs = Regs { rip: CODE, ..Regs::default() };
                regs.gpr[RCX] = count;
                regs.gpr[RSI] = DATA;
                b.set_regs(&regs);
                for (i, &entry) in entries.iter().enumerate() {
                    b.push(Downgrade::Leaf { entry, gva: DATA + i as u64 * PAGE }).unwrap();
                }
                // If interrupted, drained or not: queue again, run again.
                let exit = b.run(g).unwrap();
                if exit != Exit::Interrupted {
                    assert!(exception(6, None)(&exit), "{exit:x?}");
                    last_sum.store(b.regs().gpr[RAX], Ordering::SeqCst);
                    ran.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        // Each turn moves all pages; after the other vCPU's acknowledgement the old ones are its no more.
        for turn in 1..=30 {
            let first = if turn % 2 == 1 { 101 } else { 1 };
            let value = if turn % 2 == 1 { 1000 } else { 1 };
            for (n, &entry) in entries.iter().enumerate() {
                s.p.entry(entry).store(s.p.page(first + n as u64) | PAGE_RW, Ordering::SeqCst);
                a.push(Downgrade::Leaf { entry, gva: DATA + n as u64 * PAGE }).unwrap();
            }
            generation.store(turn, Ordering::SeqCst);
            kicker.kick();
            assert_eq!(sum(&mut a, count, turn), value * count);
            let start = Instant::now();
            while s.machine.acknowledged(1) < turn {
                assert!(start.elapsed() < Duration::from_secs(60), "no acknowledgement");
                thread::yield_now();
            }
            // What runs from here on sees the new pages only.
            let before = ran.load(Ordering::SeqCst);
            while ran.load(Ordering::SeqCst) < before + 2 {
                assert!(start.elapsed() < Duration::from_secs(60), "no run");
                thread::yield_now();
            }
            assert_eq!(last_sum.load(Ordering::SeqCst), value * count, "turn {turn}");
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn roots_switch_and_costs() {
    // 1: mov rax, [rsi]; add rsi, 4096; jmp 1b
    let Some(mut s) = setup(1, &[0x48, 0x8b, 0x06, 0x48, 0x81, 0xc6, 0, 0x10, 0, 0, 0xeb, 0xf4])
    else {
        return;
    };
    let count = 400u64;
    let entries = fill(&mut s, count, 1, 1);
    for &e in &entries {
        s.p.entry(e).store(0, Ordering::SeqCst);
    }
    let other = s.p.root(&s.machine);
    s.p.map(other, CODE, s.p.page(0), PAGE_RW & !pte::W);
    let vcpu = &mut s.vcpus[0];
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[RSI] = DATA;
    vcpu.set_regs(&regs);
    let time = |what: &str, n: u64, f: &mut dyn FnMut(u64)| {
        let start = Instant::now();
        (0..n).for_each(f);
        println!("{what}: {:.1} us", start.elapsed().as_secs_f64() * 1e6 / n as f64);
    };
    time("fault, filled", count, &mut |n| {
        assert!(exception(14, Some(4))(&run(vcpu)));
        s.p.map(s.root, DATA + n * PAGE, s.p.page(1 + n), PAGE_RW);
    });
    run(vcpu);
    time("fault, not filled", 1000, &mut |_| {
        assert!(exception(14, Some(4))(&run(vcpu)));
    });
    time("fault, one leaf drained", 1000, &mut |_| {
        vcpu.push(Downgrade::Leaf { entry: entries[0], gva: DATA }).unwrap();
        assert!(exception(14, Some(4))(&run(vcpu)));
    });
    time("fault, 48 leaves drained", 100, &mut |_| {
        for &entry in &entries[..48] {
            vcpu.push(Downgrade::Leaf { entry, gva: DATA }).unwrap();
        }
        assert!(exception(14, Some(4))(&run(vcpu)));
    });
    time("fault, reload", 1000, &mut |_| {
        vcpu.push(Downgrade::Reload).unwrap();
        assert!(exception(14, Some(4))(&run(vcpu)));
    });
    time("fault, frame", 1000, &mut |_| {
        vcpu.push(Downgrade::Frame { frame: 900 }).unwrap();
        assert!(exception(14, Some(4))(&run(vcpu)));
    });
    time("fault, 1024 frames", 10, &mut |_| {
        vcpu.push(Downgrade::Everything { frames: 1024 }).unwrap();
        assert!(exception(14, Some(4))(&run(vcpu)));
    });
    time("drain only, one leaf", 1000, &mut |n| {
        vcpu.push(Downgrade::Leaf { entry: entries[0], gva: DATA }).unwrap();
        assert_eq!(vcpu.drain_only(n).unwrap(), Exit::Drained);
    });
    vcpu.set_regs(&regs);
    run(vcpu);
    time("fault, other root each time", 1000, &mut |n| {
        vcpu.set_root(if n % 2 == 0 { other } else { s.root }).unwrap();
        assert!(exception(14, Some(4))(&run(vcpu)));
    });
}

#[test]
fn accessed_and_dirty_bits_are_set() {
    // mov rax, [rdi]; ud2; mov [rdi], rax; ud2
    let code = [0x48, 0x8b, 0x07, 0x0f, 0x0b, 0x48, 0x89, 0x07, 0x0f, 0x0b];
    let Some(mut s) = setup(1, &code) else { return };
    let none = PAGE_RW & !(pte::A | pte::D);
    let entry = s.p.map(s.root, DATA, s.p.page(1), none);
    let value = s.p.page(1) | none;
    let mut go = |rip, want: u64| {
        let vcpu = &mut s.vcpus[0];
        let mut regs = Regs { rip, ..Regs::default() };
        regs.gpr[RDI] = DATA;
        vcpu.set_regs(&regs);
        assert!(exception(6, None)(&run(vcpu)));
        assert_eq!(s.p.entry(entry).load(Ordering::SeqCst), value | want);
        // Taken back by the host, and queued: set again by the next access.
        s.p.entry(entry).fetch_and(!(pte::A | pte::D), Ordering::SeqCst);
        vcpu.push(Downgrade::Leaf { entry, gva: DATA }).unwrap();
    };
    for _ in 0..3 {
        go(CODE, pte::A);
        go(CODE + 5, pte::A | pte::D);
    }
}

#[test]
fn a_large_arena_is_reached_to_its_end() {
    if probe().is_err() {
        return println!("skipped");
    }
    assert!(matches!(KvmMachine::new(0, 1), Err(KvmError::Range { .. })));
    assert!(matches!(KvmMachine::new(1, u32::MAX), Err(KvmError::Range { .. })));
    let machine = KvmMachine::new(1, 600_000).unwrap();
    let frames = machine.tables().frames();
    assert!(frames >= 600_000 && frames % 512 == 0);
    let mut p = Playground::new(&machine, frames - 5, 0x10_0000, 8).unwrap();
    p.code(0, SUM);
    let root = p.root(&machine);
    p.map(root, CODE, p.page(0), PAGE_RW & !pte::W);
    let entry = p.map(root, CODE + PAGE, p.page(1), PAGE_RW);
    assert_eq!(entry / PAGE, u64::from(frames) - 2);
    p.word(1, 0).store(1, Ordering::SeqCst);
    p.word(2, 0).store(2, Ordering::SeqCst);
    let mut vcpu = machine.vcpu(0).unwrap();
    vcpu.set_root(root).unwrap();
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    (regs.gpr[RCX], regs.gpr[RSI]) = (1, CODE + PAGE);
    for n in 0..6 {
        vcpu.set_regs(&regs);
        assert!(exception(6, None)(&run(&mut vcpu)));
        assert_eq!(vcpu.regs().gpr[RAX], 1 + n % 2);
        p.map(root, CODE + PAGE, p.page(2 - n % 2), PAGE_RW);
        let frame = frames - 2;
        vcpu.push(match n % 3 {
            0 => Downgrade::Frame { frame },
            1 => Downgrade::Entry { entry },
            _ => Downgrade::Leaf { entry, gva: CODE + PAGE },
        })
        .unwrap();
    }
}
