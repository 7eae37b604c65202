// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that misbehave, for tests of what a VMM makes of it.

use super::guest_code;

guest_code!(
    /// Reads the address in rdi.
    read_unmapped,
    "smmu_guest_read_unmapped",
    "smmu_guest_read_unmapped_end",
    "
        mov rax, [rdi]
    2:
        xor eax, eax            # it was mapped after all: done
        hlt
        jmp 2b
    "
);

guest_code!(
    /// An undefined instruction.
    ud2,
    "smmu_guest_ud2",
    "smmu_guest_ud2_end",
    "
        ud2
    "
);

guest_code!(
    /// A jump to the first non-canonical address.
    non_canonical,
    "smmu_guest_non_canonical",
    "smmu_guest_non_canonical_end",
    "
        mov eax, 1
        shl rax, 47
        jmp rax
    "
);

guest_code!(
    /// A jump to itself.
    spin,
    "smmu_guest_spin",
    "smmu_guest_spin_end",
    "
    2:
        jmp 2b
    "
);
