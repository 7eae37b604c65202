// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kicks: none lost, no state lost, at any point of an entry.

use super::*;

/// Until [rdi] is not 0: rcx counts, rax += rdx, r8 counts the carries, xmm1 sums rax; then rbx = xmm1, #UD.
const SPIN: &[u8] = &[
    0x48, 0xff, 0xc1, // 1: inc rcx
    0x48, 0x01, 0xd0, // add rax, rdx
    0x49, 0x83, 0xd0, 0x00, // adc r8, 0
    0x66, 0x48, 0x0f, 0x6e, 0xc0, // movq xmm0, rax
    0x66, 0x0f, 0xd4, 0xc8, // paddq xmm1, xmm0
    0x48, 0x83, 0x3f, 0x00, // cmp qword [rdi], 0
    0x74, 0xe7, // je 1b
    0x66, 0x48, 0x0f, 0x7e, 0xcb, // movq rbx, xmm1
    0x0f, 0x0b, // ud2
];
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

fn spin_regs() -> Regs {
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[RDX] = STEP;
    regs.gpr[RDI] = DATA;
    regs
}

fn check_spin(r: &Regs) {
    let n = r.gpr[RCX];
    let (mut a, mut carries, mut sum) = (0u64, 0u64, 0u64);
    for _ in 0..n {
        let (next, carry) = a.overflowing_add(STEP);
        (a, carries, sum) = (next, carries + u64::from(carry), sum.wrapping_add(next));
    }
    assert_eq!((r.gpr[RAX], r.gpr[8], r.gpr[RBX]), (a, carries, sum), "after {n} turns");
}

#[test]
fn kicks_arrive_and_lose_nothing() {
    const KICKS: u64 = 1000;
    let Some(mut s) = setup(1, SPIN) else { return };
    let entry = s.p.map(s.root, DATA, s.p.page(1), PAGE_RW);
    let vcpu = &mut s.vcpus[0];
    vcpu.set_regs(&spin_regs());
    let seen = AtomicU64::new(0);
    let kicker = vcpu.kicker();
    thread::scope(|scope| {
        let (seen, p) = (&seen, &s.p);
        scope.spawn(move || {
            let mut slowest = Duration::ZERO;
            let mut whole = Duration::ZERO;
            let begun = Instant::now();
            let mut kicks = 0;
            for n in 0..KICKS {
                // On a crowded machine each kick waits for a time slice.
                if begun.elapsed() > Duration::from_secs(10) {
                    break;
                }
                kicks += 1;
                // Most arrive inside the guest, some before it.
                for _ in 0..n % 8 * 300 {
                    std::hint::spin_loop();
                }
                let sent = Instant::now();
                kicker.kick();
                while seen.load(Ordering::Acquire) <= n {
                    assert!(sent.elapsed() < Duration::from_secs(60), "kick {n} lost");
                    thread::yield_now();
                }
                whole += sent.elapsed();
                slowest = slowest.max(sent.elapsed());
            }
            let each = whole / kicks;
            println!("{kicks} kicks; kick to exit: {each:?} on average, {slowest:?} at most");
            p.word(1, 0).store(1, Ordering::SeqCst);
        });
        let mut n = 0;
        loop {
            match vcpu.run(n).unwrap() {
                Exit::Interrupted => {
                    // Every other entry goes through the stub.
                    if n % 2 == 0 {
                        vcpu.push(Downgrade::Leaf { entry, gva: DATA }).unwrap();
                    }
                    n += 1;
                    seen.fetch_add(1, Ordering::Release);
                }
                exit => {
                    assert!(exception(6, None)(&exit), "{exit:?}");
                    break;
                }
            }
        }
        assert_eq!(vcpu.acknowledged(), n);
    });
    check_spin(&vcpu.regs());

    // A kick while outside, twice: one interruption, nothing run. Then one of a vCPU that is gone.
    let kicker = vcpu.kicker();
    kicker.kick();
    kicker.kick();
    let before = vcpu.regs();
    assert_eq!(vcpu.run(0).unwrap(), Exit::Interrupted);
    assert_eq!(vcpu.regs(), before);
    assert!(exception(6, None)(&vcpu.run(0).unwrap()));
    s.vcpus.clear();
    assert!(!kicker.is_alive());
    kicker.kick();
    let mut again = s.machine.vcpu(0).unwrap();
    assert!(s.machine.vcpu(0).is_err() && s.machine.vcpu(1).is_err());
    assert!(matches!(again.run(0), Err(KvmError::BadRoot { root: 0 })));
    again.set_root(s.root).unwrap();
    again.set_regs(&Regs { rip: CODE + 30, ..Regs::default() });
    assert!(exception(6, None)(&again.run(0).unwrap()));
    // xmm1 of the earlier holder is not there any more.
    again.set_regs(&Regs { rip: CODE + 25, ..Regs::default() });
    assert!(exception(6, None)(&again.run(0).unwrap()));
    assert_eq!(again.regs().gpr[RBX], 0);
}

#[test]
fn kicks_during_drains_and_faults() {
    let Some(mut s) = setup(1, SUM) else { return };
    let count = 300;
    let entries = fill(&mut s, count, 1, 1);
    let mut vcpu = s.vcpus.pop().unwrap();
    let kicker = vcpu.kicker();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = &stop;
        scope.spawn(move || {
            let mut seed = 1u64;
            while !stop.load(Ordering::Relaxed) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                if seed >> 63 == 0 {
                    thread::sleep(Duration::from_micros(seed >> 56));
                } else {
                    (0..seed >> 51).for_each(|_| std::hint::spin_loop());
                }
                kicker.kick();
            }
        });
        let mut interrupted = 0;
        for turn in 1..=25u64 {
            let first = if turn % 2 == 0 { 1 } else { 401 };
            fill(&mut s, count, first, turn);
            for (n, &entry) in entries.iter().enumerate() {
                vcpu.push(Downgrade::Leaf { entry, gva: DATA + n as u64 * PAGE }).unwrap();
            }
            if turn % 5 == 0 {
                vcpu.push(Downgrade::Everything { frames: 8 }).unwrap();
            }
            while vcpu.drain_only(turn).unwrap() == Exit::Interrupted {
                interrupted += 1;
            }
            assert_eq!((vcpu.acknowledged(), vcpu.queued()), (turn, 0));
            // Every page faults once more: cleared entries are filled on demand.
            for (n, &entry) in entries.iter().enumerate().step_by(7) {
                s.p.entry(entry).store(0, Ordering::SeqCst);
                vcpu.push(Downgrade::Leaf { entry, gva: DATA + n as u64 * PAGE }).unwrap();
            }
            let mut regs = Regs { rip: CODE, ..Regs::default() };
            regs.gpr[RCX] = count;
            regs.gpr[RSI] = DATA;
            vcpu.set_regs(&regs);
            let mut faults = 0;
            loop {
                match vcpu.run(turn).unwrap() {
                    Exit::Interrupted => interrupted += 1,
                    Exit::Exception { vector: 14, cr2, .. } => {
                        faults += 1;
                        let n = (cr2 - DATA) / PAGE;
                        s.p.map(s.root, cr2, s.p.page(first + n), PAGE_RW);
                    }
                    exit => {
                        assert!(exception(6, None)(&exit), "{exit:x?}");
                        break;
                    }
                }
            }
            assert_eq!(faults, count.div_ceil(7));
            assert_eq!(vcpu.regs().gpr[RAX], count * turn, "turn {turn}");
        }
        stop.store(true, Ordering::Relaxed);
        println!("{interrupted} interruptions");
    });
}
