// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Walks over hostile tables.
//!
//! For any registers a processor can hold, any tables and any addresses:
//!
//! * nothing panics, and nothing takes long (libFuzzer's time limit);
//! * `walk`, `walk_path` and `translate` say what the independent reference walker of
//!   `mmu-core/tests/paging_oracle` says;
//! * `translate` stores nothing, a faulting walk stores nothing, any other sets accessed in the
//!   entries passed and dirty in the leaf, for a write, and changes nothing else; read-only memory
//!   never changes;
//! * a batch gives what its walks give, and leaves the same memory behind.
#![no_main]

mod input;
#[path = "../../mmu-core/tests/paging_oracle/mod.rs"]
mod paging_oracle;

use input::{Bytes, FRAMES, PIECES};
use libfuzzer_sys::fuzz_target;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{Backing, Hint, MemoryMap, SlotConfig};
use mmu_core::paging::{
    Access, BadRegisters, Fault, Kind, PagingMode, Path, Reason, Regs, Walk, bits, load_pdptrs,
    pdptrs_changed,
};
use mmu_core::sync::Ordering;
use paging_oracle::{Memory, Mode};
use std::sync::{Arc, LazyLock};

struct World {
    memory: Memory,
    map: MemoryMap,
    accesses: Vec<Access>,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let memory = Memory::new(&PIECES.map(|(base, frames)| (base, frames * 4096)));
    let slots = memory.pieces.iter().enumerate().map(|(i, (base, piece))| {
        let slot = SlotConfig::new(i as u32, Gpa(*base), Arc::clone(piece) as Arc<dyn Backing>);
        if i + 1 == PIECES.len() { slot.read_only() } else { slot.log_dirty() }
    });
    let map = MemoryMap::build(slots).expect("three slots apart from each other");
    World { memory, map, accesses: paging_oracle::accesses() }
});

impl World {
    /// Every word, in the order of the pieces.
    fn image(&self) -> Vec<u64> {
        let pieces = self.memory.pieces.iter();
        pieces.flat_map(|(_, m)| m.words().iter().map(|w| w.load(Ordering::Relaxed))).collect()
    }

    fn restore(&self, image: &[u64]) {
        let words = self.memory.pieces.iter().flat_map(|(_, m)| m.words());
        words.zip(image).for_each(|(word, value)| word.store(*value, Ordering::Relaxed));
    }
}

/// Which word of an image has this address.
fn position(gpa: u64) -> usize {
    let mut first = 0;
    for (base, frames) in PIECES {
        if gpa.wrapping_sub(base) < frames * 4096 {
            return (first + (gpa - base) / 8) as usize;
        }
        first += frames * 512;
    }
    panic!("{gpa:#x} is in no piece");
}

fn is_read_only(gpa: u64) -> bool {
    let (base, frames) = PIECES[PIECES.len() - 1];
    gpa.wrapping_sub(base) < frames * 4096
}

/// Without what the walk, and not the reference, may have set or found set.
fn plain(walk: Walk) -> Walk {
    Walk { accessed: false, dirty: false, ..walk }
}

/// Whether the address was translated, and the rights said no.
fn is_refusal(reason: Reason) -> bool {
    use Reason::{Fetch, Pkey, Smap, Smep, User, Write};
    matches!(reason, User | Smep | Smap | Fetch | Write | Pkey)
}

/// One address, one access. `image` is what memory holds, before and after.
fn check(
    world: &World,
    regs: &Regs,
    mode: &PagingMode,
    (gva, access): (u64, Access),
    image: &mut [u64],
) {
    let World { memory, map, .. } = world;
    let hint = Hint::default();
    let context = || format!("{regs:x?} {gva:#x} {access:?}");
    let expected = paging_oracle::walk(memory, regs, gva, access);
    // Where an entry was read; the rest of memory is compared once for all addresses.
    let places: Vec<_> =
        expected.passed.iter().map(|(_, at, _)| (at & !7, position(*at))).collect();
    let is = |image: &[u64]| places.iter().all(|(at, n)| memory.read8(*at) == Some(image[*n]));

    let translated = mode.translate(map, &hint, Gva(gva), Some(access));
    assert_eq!(translated.map(plain), expected.result.map(plain), "translate: {}", context());
    let any = mode.translate(map, &hint, Gva(gva), None);
    let tags = regs.cr3 & (bits::CR3_LAM_U48 | bits::CR3_LAM_U57) | regs.cr4 & bits::CR4_LAM_SUP;
    match (any, translated) {
        // Tags are stripped from data addresses, not from those of fetches and implicit accesses.
        _ if (access.kind == Kind::Execute || access.implicit) && tags != 0 => {}
        (Ok(any), Ok(translated)) => assert_eq!(any, translated, "{}", context()),
        (Err(any), Err(fault)) => {
            assert_eq!((any.reason, any.level), (fault.reason, fault.level), "{}", context());
        }
        (Ok(_), Err(fault)) => assert!(is_refusal(fault.reason), "{}", context()),
        (Err(fault), Ok(_)) => panic!("{fault:?}, but only without an access: {}", context()),
    }
    assert!(is(image), "translate stored: {}", context());

    // A copy without 1 GiB pages: the same but where there would be one.
    let passed = &expected.passed;
    let giant = mode.is_long()
        && passed.last().is_some_and(|(level, _, e)| *level == 3 && e & 0x81 == 0x81);
    let small = mode.without_1g_pages().translate(map, &hint, Gva(gva), Some(access));
    if giant {
        let reason = small.map_err(|fault| (fault.reason, fault.level));
        assert_eq!(reason, Err((Reason::Reserved, 3)), "{}", context());
    } else {
        assert_eq!(small, translated, "{}", context());
    }

    let mut path = Path::new();
    let walked = mode.walk_path(map, &hint, Gva(gva), access, &mut path);
    let after: Vec<_> = places.iter().map(|(at, _)| memory.read8(*at)).collect();
    places.iter().for_each(|(at, n)| memory.write8(*at, image[*n]));
    assert_eq!(mode.walk(map, &hint, Gva(gva), access), walked, "{}", context());
    let same = places.iter().zip(&after).all(|((at, _), word)| memory.read8(*at) == *word);
    assert!(same, "walk and walk_path stored differently: {}", context());
    let in_rom = passed.iter().any(|(_, at, _)| is_read_only(*at));
    if in_rom {
        assert_eq!(walked.map(plain), expected.result.map(plain), "walk: {}", context());
    } else {
        assert_eq!(walked, expected.result, "walk: {}", context());
    }
    let steps = path.steps().iter().map(|s| (s.level, s.entry.0));
    assert!(steps.eq(passed.iter().map(|(l, at, _)| (*l, *at))), "{path:x?} {}", context());

    // Accessed in all entries passed, dirty in the leaf, for a write; nothing else, nowhere else.
    let narrow = paging_oracle::mode(regs) == Mode::ThirtyTwo;
    let writes = access.kind == Kind::Write;
    if walked.is_ok() {
        for (i, (_, at, _)) in passed.iter().enumerate().filter(|(_, p)| !is_read_only(p.1)) {
            let leaf = i + 1 == passed.len();
            let mark = bits::A | if leaf && writes { bits::D } else { 0 };
            image[position(*at)] |= if narrow && at & 4 != 0 { mark << 32 } else { mark };
        }
    }
    assert!(is(image), "accessed and dirty bits: {}", context());
    if let (Ok(walk), false) = (walked, in_rom || !mode.is_paging()) {
        assert!(walk.accessed && (walk.dirty || !writes), "{}", context());
    }
}

/// A batch of all addresses, and the same walks one by one.
fn check_batch(world: &World, mode: &PagingMode, gvas: &[Gva], access: Access) {
    let hint = Hint::default();
    let before = world.image();
    let mut batch: Vec<Result<Walk, Fault>> = Vec::new();
    mode.walk_batch(&world.map, &hint, gvas, access, |i, result| {
        assert_eq!(i, batch.len());
        batch.push(result);
    });
    let after = world.image();
    world.restore(&before);
    let hint = Hint::default();
    let singly: Vec<_> =
        gvas.iter().map(|gva| mode.walk(&world.map, &hint, *gva, access)).collect();
    assert_eq!(batch, singly);
    assert!(world.image() == after, "a batch stored what its walks do not");
}

/// Control registers: what a write accepts is a mode, whatever is written.
fn check_registers(world: &World, bytes: &mut Bytes, regs: &Regs) {
    let (which, value) = (bytes.u8() % 5, bytes.u64());
    let new = match which {
        0 => regs.with_cr0(value),
        1 => regs.with_cr3(value).map(|load| load.regs),
        2 => regs.with_cr4(value),
        3 => regs.with_efer(value),
        _ => Ok(Regs { cr0: value, cr4: bytes.u64(), maxphyaddr: bytes.u8(), ..*regs }),
    };
    let Ok(new) = new else { return };
    let _ = (new.reloads_pdptrs(regs), regs.reloads_pdptrs(&new));
    let hint = Hint::default();
    let loaded = load_pdptrs(&world.map, &hint, &new);
    let changed = pdptrs_changed(&world.map, &hint, &new);
    assert!(!loaded.is_ok_and(|l| changed == (l == new.pdptrs)));
    match PagingMode::new(&new) {
        Ok(mode) => {
            for level in 0..=6 {
                let entry = bytes.u64();
                let gva = Gva(entry);
                let rights = mode.entry_rights(entry, level);
                let _ = (mode.decode(entry, level), mode.allowed(rights, level & 1 != 0));
                let _ = (mode.entries(level), mode.index(gva, level), mode.page_size(level));
                let _ = mode.translate(&world.map, &hint, gva, None);
            }
        }
        // Leaving long mode may leave CR3 with bits that only long mode allows.
        Err(error) => assert!(which == 4 || matches!(error, BadRegisters::Cr3 { .. }), "{error}"),
    }
}

fuzz_target!(|data: &[u8]| {
    let world = &*WORLD;
    let bytes = &mut Bytes(data);
    let regs = bytes.regs();
    let wide = paging_oracle::mode(&regs) != Mode::ThirtyTwo;
    let mut image = Vec::with_capacity(FRAMES as usize * 512);
    bytes.tables(wide, &mut image);
    world.restore(&image);
    check_registers(world, bytes, &regs);
    let mode = PagingMode::new(&regs).expect("registers that a processor can hold");
    let addresses = bytes.addresses(&world.accesses);
    let mut now = image.clone();
    for &address in &addresses {
        check(world, &regs, &mode, address, &mut now);
    }
    assert!(world.image() == now, "a walk stored elsewhere");
    world.restore(&image);
    if let Some(&(_, access)) = addresses.first() {
        let gvas: Vec<_> = addresses.iter().map(|(gva, _)| Gva(*gva)).collect();
        check_batch(world, &mode, &gvas, access);
    }
});
