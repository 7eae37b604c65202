// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What ring 3 can raise, and how it arrives.

use super::*;

#[test]
fn faults_arrive_and_the_guest_goes_on() {
    // mov [rdi], rax; mov rcx, [rdi]; ud2
    let Some(mut s) = setup(1, &[0x48, 0x89, 0x07, 0x48, 0x8b, 0x0f, 0x0f, 0x0b]) else { return };
    let vcpu = &mut s.vcpus[0];
    let mut regs = Regs { rip: CODE, rflags: 0xc5, ..Regs::default() };
    for (i, r) in regs.gpr.iter_mut().enumerate() {
        *r = 0x1111_1111_1111_1111 * i as u64;
    }
    regs.gpr[RAX] = 0xfeed;
    regs.gpr[RDI] = DATA + 0x10;
    vcpu.set_regs(&regs);
    regs.rflags |= 0x202;

    // User, write, not present.
    let fault = |error| Exit::Exception { vector: 14, error_code: Some(error), cr2: DATA + 0x10 };
    assert_eq!(run(vcpu), fault(6));
    assert_eq!(vcpu.regs(), regs);
    // User, write, present.
    s.p.map(s.root, DATA, s.p.page(1), PAGE_RW & !pte::W);
    assert_eq!(run(vcpu), fault(7));
    assert_eq!(vcpu.regs(), regs);
    let entry = s.p.map(s.root, DATA, s.p.page(1), PAGE_RW);
    assert!(exception(6, None)(&run(vcpu)));
    assert_eq!(s.p.word(1, 2).load(Ordering::SeqCst), 0xfeed);
    regs.rip = CODE + 6;
    regs.gpr[RCX] = 0xfeed;
    assert_eq!(vcpu.regs(), regs);

    // No execute.
    let at = DATA + 0x10;
    s.p.entry(entry).fetch_or(pte::NX, Ordering::SeqCst);
    vcpu.push(Downgrade::Leaf { entry, gva: at }).unwrap();
    vcpu.set_regs(&Regs { rip: at, ..regs });
    assert_eq!(run(vcpu), fault(0x15));
    assert_eq!(vcpu.regs().rip, at);
}

#[test]
fn privileged_instructions_fault() {
    // Name, code, vector, error code, how far the instruction pointer moves.
    type Case = (&'static str, &'static [u8], u8, Option<u32>, u64);
    let cases: &[Case] = &[
        ("ud2", &[0x0f, 0x0b], 6, None, 0),
        ("hlt", &[0xf4], 13, Some(0), 0),
        ("int3", &[0xcc], 3, None, 1),
        ("int 0x80", &[0xcd, 0x80], 13, Some(0x402), 0),
        ("int 14", &[0xcd, 14], 13, Some(14 << 3 | 2), 0),
        ("sysenter", &[0x0f, 0x34], 13, Some(0), 0),
        ("cli", &[0xfa], 13, Some(0), 0),
        ("sti", &[0xfb], 13, Some(0), 0),
        ("out 0x80, al", &[0xe6, 0x80], 13, Some(0), 0),
        ("in al, dx", &[0xec], 13, Some(0), 0),
        ("mov rax, cr3", &[0x0f, 0x20, 0xd8], 13, Some(0), 0),
        ("mov cr3, rax", &[0x0f, 0x22, 0xd8], 13, Some(0), 0),
        ("mov dr7, rax", &[0x0f, 0x23, 0xf8], 13, Some(0), 0),
        ("invlpg [rax]", &[0x0f, 0x01, 0x38], 13, Some(0), 0),
        ("rdmsr", &[0x0f, 0x32], 13, Some(0), 0),
        ("wrmsr", &[0x0f, 0x30], 13, Some(0), 0),
        ("lgdt [rax]", &[0x0f, 0x01, 0x10], 13, Some(0), 0),
        ("swapgs", &[0x0f, 0x01, 0xf8], 13, Some(0), 0),
        ("iretq to null", &[0x48, 0xcf], 14, None, 0),
        ("div by zero", &[0xf7, 0xf1], 0, None, 0),
    ];
    let Some(mut s) = setup(1, &[]) else { return };
    for &(name, code, vector, error_code, past) in cases {
        s.p.code(0, code);
        let vcpu = &mut s.vcpus[0];
        vcpu.set_regs(&Regs { rip: CODE, ..Regs::default() });
        let exit = run(vcpu);
        println!("{name}: {exit:x?}");
        if name.starts_with("iretq") {
            assert!(matches!(exit, Exit::Exception { vector: 13 | 14, .. }), "{exit:?}");
        } else {
            // A KVM that emulates `int n` without knowing how raises #UD; AMD has no sysenter in 64-bit mode.
            let emulated =
                (name.starts_with("int ") || name == "sysenter") && exception(6, None)(&exit);
            assert!(emulated || exception(vector, error_code)(&exit), "{name}: {exit:x?}");
        }
        assert_eq!(vcpu.regs().rip, CODE + past, "{name}");
    }
    // IOPL and IF stay what they are: pushfq; or qword [rsp], 0x3000; and qword [rsp], ~0x200; popfq; pushfq; pop rax; ud2
    s.p.code(
        0,
        &[
            0x9c, 0x48, 0x81, 0x0c, 0x24, 0, 0x30, 0, 0, 0x48, 0x81, 0x24, 0x24, 0xff, 0xfd, 0xff,
            0xff, 0x9d, 0x9c, 0x58, 0x0f, 0x0b,
        ],
    );
    s.p.map(s.root, DATA, s.p.page(1), PAGE_RW);
    let vcpu = &mut s.vcpus[0];
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[RSP] = DATA + PAGE;
    vcpu.set_regs(&regs);
    assert!(exception(6, None)(&run(vcpu)));
    println!("flags after popf: {:#x}", vcpu.regs().gpr[RAX]);
    assert_eq!(vcpu.regs().rflags & 0x3200, 0x200);
}

#[test]
fn the_stub_is_out_of_reach() {
    // mov rax, [rdi]
    let Some(mut s) = setup(1, &[0x48, 0x8b, 0x07]) else { return };
    let arena = s.machine.tables();
    for at in
        [STUB_VA, STUB_VA + PAGE, STUB_VA + 3 * PAGE, STUB_VA + (1 << 30), STUB_VA + (3 << 37)]
    {
        let vcpu = &mut s.vcpus[0];
        let mut regs = Regs { rip: CODE, ..Regs::default() };
        regs.gpr[RDI] = at;
        vcpu.set_regs(&regs);
        let exit = run(vcpu);
        assert!(
            matches!(exit, Exit::Exception { vector: 14, cr2, .. } if cr2 == at),
            "{at:x} {exit:x?}"
        );
        vcpu.set_regs(&Regs { rip: at, ..Regs::default() });
        let exit = run(vcpu);
        assert!(
            matches!(exit, Exit::Exception { vector: 14, cr2, .. } if cr2 == at),
            "{at:x} {exit:x?}"
        );
    }
    // An instruction pointer that no processor accepts.
    s.vcpus[0].set_regs(&Regs { rip: 1 << 47, ..Regs::default() });
    assert!(exception(13, Some(0))(&run(&mut s.vcpus[0])));
    // A root without the stub, then the good one again.
    let bad = s.p.frame();
    let vcpu = &mut s.vcpus[0];
    vcpu.set_root(arena.machine() + u64::from(bad) * PAGE).unwrap();
    vcpu.set_regs(&Regs { rip: CODE, ..Regs::default() });
    let exit = vcpu.run(0).unwrap();
    let Exit::Failed(failure) = exit else { panic!("{exit:x?}") };
    println!("{failure}");
    assert_eq!(failure.kind, FailureKind::Shutdown);
    vcpu.set_root(s.root).unwrap();
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[RDI] = DATA;
    vcpu.set_regs(&regs);
    assert!(exception(14, Some(4))(&run(vcpu)));
}

#[test]
fn segments_and_modes() {
    // mov rax, fs:[0]; mov rcx, gs:[8]; ud2
    let code = [
        0x64, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0, 0x65, 0x48, 0x8b, 0x0c, 0x25, 8, 0, 0, 0, 0x0f,
        0x0b,
    ];
    let Some(mut s) = setup(1, &code) else { return };
    s.p.map(s.root, DATA, s.p.page(1), PAGE_RW);
    s.p.word(1, 0).store(5, Ordering::SeqCst);
    s.p.word(1, 1).store(6, Ordering::SeqCst);
    let vcpu = &mut s.vcpus[0];
    vcpu.set_segment_bases(DATA, DATA).unwrap();
    assert!(matches!(vcpu.set_segment_bases(0, 1 << 63), Err(KvmError::BadBase { .. })));
    assert!(exception(6, None)(&run(vcpu)));
    assert_eq!((vcpu.regs().gpr[RAX], vcpu.regs().gpr[RCX]), (5, 6));
    assert_eq!(vcpu.segment_bases(), (DATA, DATA));

    // In 32-bit code the bytes 48 ff c0 are dec eax; inc eax; and a far jump leads back.
    s.p.code(0, &[0x48, 0x48, 0xff, 0xc8, 0x0f, 0x0b]);
    vcpu.set_compatibility_mode(true);
    vcpu.set_regs(&Regs { rip: CODE, ..Regs::default() });
    assert!(exception(6, None)(&run(vcpu)));
    assert_eq!((vcpu.regs().gpr[RAX], vcpu.compatibility_mode()), (0xffff_fffd, true));
    // push 0x33; push CODE + 32; retf
    let mut jump = [0x90; 40];
    jump[..8].copy_from_slice(&[0x6a, 0x33, 0x68, 0x20, 0, 0x40, 0, 0xcb]);
    jump[32..37].copy_from_slice(&[0x48, 0xff, 0xc8, 0x0f, 0x0b]);
    s.p.code(0, &jump);
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[RSP] = DATA + 0x800;
    vcpu.set_regs(&regs);
    assert!(exception(6, None)(&run(vcpu)));
    assert_eq!((vcpu.regs().gpr[RAX], vcpu.compatibility_mode()), (u64::MAX, false));
}

#[test]
fn single_steps_arrive() {
    let Some(mut s) = setup(1, &[0x90, 0x90, 0x0f, 0x0b]) else { return };
    let vcpu = &mut s.vcpus[0];
    for n in 1..=2 {
        let mut regs = vcpu.regs();
        regs.rflags |= 0x100;
        vcpu.set_regs(&regs);
        assert!(exception(1, None)(&run(vcpu)));
        assert_eq!(vcpu.regs().rip, CODE + n);
    }
    assert!(exception(6, None)(&run(vcpu)));
}

#[test]
fn syscalls_arrive() {
    let Some(mut s) = setup(1, &[0x0f, 0x05, 0x0f, 0x0b]) else { return };
    let vcpu = &mut s.vcpus[0];
    let mut regs = Regs { rip: CODE, rflags: 0x2d7, ..Regs::default() };
    regs.gpr[RSP] = DATA + 0x800;
    regs.gpr[RAX] = 60;
    for through_stub in [false, true] {
        vcpu.set_regs(&regs);
        if through_stub {
            vcpu.push(Downgrade::Reload).unwrap();
        }
        assert_eq!(run(vcpu), Exit::Syscall);
        let mut after = Regs { rip: CODE + 2, ..regs };
        (after.gpr[RCX], after.gpr[11]) = (CODE + 2, 0x2d7 | 0x202);
        after.rflags = vcpu.regs().rflags;
        assert_eq!(vcpu.regs(), after);
        assert!(exception(6, None)(&run(vcpu)));
        assert_eq!(vcpu.regs(), after);
    }
}
