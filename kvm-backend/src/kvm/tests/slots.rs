// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory slots, and memory that is not there.

use super::*;

/// One page of a file in memory.
struct Backing {
    at: std::ptr::NonNull<u8>,
    file: std::fs::File,
}

// SAFETY: an address and a file; the memory has no thread affinity.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

impl Backing {
    fn new() -> Backing {
        use std::os::fd::{AsRawFd, FromRawFd};
        // SAFETY: a fresh descriptor, owned by the file; a fresh mapping.
        unsafe {
            let fd = libc::memfd_create(c"test".as_ptr(), 0);
            assert!(fd >= 0);
            let file = std::fs::File::from_raw_fd(fd);
            file.set_len(PAGE).unwrap();
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let at =
                libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert!(at != libc::MAP_FAILED);
            Backing { at: std::ptr::NonNull::new(at.cast()).unwrap(), file }
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the page mapped in `new`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), 4096) };
    }
}

#[test]
fn memory_slots() {
    // mov rax, [rdi]; mov [rdi], rdx; ud2
    let Some(mut s) = setup(1, &[0x48, 0x8b, 0x07, 0x48, 0x89, 0x17, 0x0f, 0x0b]) else { return };
    let at = 0x4000_0000;
    let owner = Arc::new(Backing::new());
    let add = |machine, len, read_only| {
        // SAFETY: the owner unmaps the page when it is dropped; nobody has references to it.
        unsafe { s.machine.add_memory(machine, owner.at, len, read_only, owner.clone()) }
    };
    let limit = s.machine.memory_limit();
    for (machine, len) in [
        (at + 1, PAGE),
        (at, 0),
        (at, 1),
        (limit, PAGE),
        (u64::MAX - 4095, PAGE),
        (0xfffb_f000, PAGE),
        (0x10_1000, PAGE),
    ] {
        let error = add(machine, len, false).unwrap_err();
        println!("{error}");
        assert!(matches!(error, KvmError::BadSlot { .. }));
    }
    let slot = add(at, PAGE, true).unwrap();
    assert!(add(at, PAGE, true).is_err());
    let entry = s.p.map(s.root, DATA, at, PAGE_RW);
    let vcpu = &mut s.vcpus[0];
    let mut regs = Regs { rip: CODE, ..Regs::default() };
    regs.gpr[RDI] = DATA;
    regs.gpr[RDX] = 0x1234;
    regs.gpr[RAX] = 77;
    vcpu.set_regs(&regs);
    // A write to read-only memory goes nowhere.
    assert_eq!(run(vcpu), Exit::Mmio { machine: at, len: 8, write: Some(0x1234) });
    assert_eq!((vcpu.regs().rip, vcpu.regs().gpr[RAX]), (CODE + 6, 0));
    assert!(exception(6, None)(&run(vcpu)));

    // No memory: all ones.
    assert!(Arc::strong_count(&owner) == 2);
    s.machine.remove_memory(slot).unwrap();
    assert!(Arc::strong_count(&owner) == 1);
    assert!(matches!(s.machine.remove_memory(slot), Err(KvmError::NoSlot { .. })));
    vcpu.set_regs(&regs);
    assert_eq!(run(vcpu), Exit::Mmio { machine: at, len: 8, write: None });
    assert_eq!((vcpu.regs().rip, vcpu.regs().gpr[RAX]), (CODE + 3, u64::MAX));
    assert_eq!(run(vcpu), Exit::Mmio { machine: at, len: 8, write: Some(0x1234) });
    assert!(exception(6, None)(&run(vcpu)));

    // Memory again; then its file is cut short.
    let slot = add(at, PAGE, false).unwrap();
    vcpu.push(Downgrade::Leaf { entry, gva: DATA }).unwrap();
    vcpu.set_regs(&regs);
    assert!(exception(6, None)(&run(vcpu)));
    assert_eq!(vcpu.regs().gpr[RAX], 0);
    owner.file.set_len(0).unwrap();
    vcpu.set_regs(&regs);
    let exit = run(vcpu);
    println!("{exit:x?}");
    assert!(matches!(exit, Exit::BadMemory { errno: libc::EFAULT, .. }), "{exit:x?}");
    assert_eq!((vcpu.regs().rip, vcpu.regs().gpr[RAX]), (CODE, 77));
    owner.file.set_len(PAGE).unwrap();
    assert!(exception(6, None)(&run(vcpu)));
    s.machine.remove_memory(slot).unwrap();
}
