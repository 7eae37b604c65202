// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Walks one guest page a number of times, with one map and one read section held, for counting
//! instructions: run it under callgrind with two counts and divide the difference.
//!
//! ```sh
//! cargo build --release -p mmu-core --example walks
//! for n in 100000 200000; do
//!     valgrind --tool=callgrind --callgrind-out-file=/dev/null target/release/examples/walks $n
//! done
//! ```

use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Hint, SlotConfig};
use mmu_core::paging::{Access, PagingMode, Regs};
use mmu_core::{Config, Mmu};
use std::hint::black_box;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let walks: u64 = std::env::args().nth(1).unwrap_or("100000".to_owned()).parse()?;
    let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
    mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
    for (entry, value) in [(0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, 0x5067)] {
        mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
    }
    let mode = PagingMode::new(&Regs::long_mode(0x1000))?;
    let (map, hint) = (mmu.memory(), Hint::default());
    for _ in 0..walks {
        black_box(mode.walk(&map, &hint, black_box(Gva(0x1234)), Access::read().user())?);
    }
    Ok(())
}
