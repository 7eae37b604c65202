// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest page table that is edited while nothing refers to it, and then used again.

use kvm_backend::guest::layout::{CODE_GPA, CODE_GVA, CODE_PAGES, WINDOW_GVA};
use kvm_backend::guest::paging::{NX, P, PAGE, U, W, index};
use kvm_backend::guest::programs::{MAGIC_SEED, Program, mix};
use kvm_backend::session::Session;
use kvm_backend::vm::{Backend, Vm};
use std::time::Duration;

/// `mov rax, [rdi]; hlt; invlpg [rdi]; mov rax, [rdi]; hlt`
const CODE: [u8; 11] = [0x48, 0x8b, 0x07, 0xf4, 0x0f, 0x01, 0x3f, 0x48, 0x8b, 0x07, 0xf4];
const READ: u64 = CODE_GVA + CODE_PAGES * PAGE - 16;
const INVALIDATE_AND_READ: u64 = READ + 4;

/// Store without INVLPG: the old translation or the new, never a third (SDM vol. 3, 5.10.4). What the
/// table said before it was unlinked had been invalidated.
#[test]
fn a_table_that_is_linked_again_shows_what_is_in_it() {
    let mut backends = vec![Backend::Soft];
    match Backend::best() {
        (Backend::Kvm, _) => backends.push(Backend::Kvm),
        (_, why) => eprintln!("SKIPPED on KVM: {why}"),
    }
    for backend in backends {
        let vm = Vm::new(backend, 1, 4, false).unwrap();
        let (image, layout) = (vm.image(), vm.image().layout());
        assert!(Program::Spin.offset() + 16 < CODE_PAGES * PAGE - 16);
        let code = CODE_GPA + CODE_PAGES * PAGE - 16;
        for (at, bytes) in (code..).step_by(8).zip(CODE.chunks(8)) {
            let mut word = [0xcc; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            vm.write_word(at, u64::from_le_bytes(word));
        }
        let [a, b] = image.window_tables();
        let first = 8 * index(WINDOW_GVA, 1) as u64;
        let link = |table: u64| vm.write_word(image.window_pde_gpa(), table | P | W | U);
        let map = |table: u64, gpa: u64| vm.write_word(table + first, gpa | P | W | U | NX);
        let [x, y, z] = [(0, 0), (1, 0), (1, 1)].map(|(set, n)| layout.window_frame(set, n));
        let magic = |gpa| mix(gpa, MAGIC_SEED);
        Session::with(&vm, Duration::from_secs(5), &mut || (), |session| {
            let mut run = |rip, page| {
                let mut regs = image.entry(Program::Spin, 0);
                (regs.rip, regs.gpr[7]) = (rip, WINDOW_GVA + page * PAGE);
                session.start(0, regs);
                session.wait().map(|halted| halted[0].gpr[0])
            };
            // Table A shows x.
            assert_eq!(run(READ, 0)?, magic(x), "{backend:?}");
            // Table B shows y. From here on nobody may remember x.
            map(b, y);
            link(b);
            assert_eq!(run(INVALIDATE_AND_READ, 0)?, magic(y), "{backend:?}");
            // Table A shows z. A fault on another page makes it be used again.
            map(a, z);
            link(a);
            assert_eq!(run(READ, 5)?, magic(layout.window_frame(0, 5)), "{backend:?}");
            let seen = run(READ, 0)?;
            assert!(seen == magic(y) || seen == magic(z), "{backend:?}: x again");
            assert_eq!(run(INVALIDATE_AND_READ, 0)?, magic(z), "{backend:?}");
            Ok(())
        })
        .unwrap();
        vm.mmu().audit().unwrap();
    }
}
