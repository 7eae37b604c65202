// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compare-and-exchange of bytes that no single word has: across the border of two words, and of 16
//! bytes.
//!
//! The standard library has no such atomics, so this is the processor's own instruction: unsafe,
//! x86-64 alone, and absent from models, whose words are loom's.

use super::AtomicU64;

/// Bytes that a processor locks without locking the bus: a cache line (CPUID leaf 1, EBX 15:8).
#[cfg(all(target_arch = "x86_64", not(loom)))]
const LINE: usize = 64;

/// Exchanges `size` bytes from byte `at` of two adjacent words for `new` if they are `old`, as one
/// step with respect to every processor; the bytes as they were if they are not. `None` if that is
/// impossible: the bytes are not 2, 4, 8, or an aligned 16 that the processor can exchange, they are
/// not all in these words, or they cross a cache line (a *split lock*, SDM vol. 3, 9.1.2.3: the
/// processor would stop every other one, and kernels kill or stall who does it).
#[cfg(all(target_arch = "x86_64", not(loom)))]
pub(crate) fn exchange_across(
    words: &[AtomicU64; 2],
    at: usize,
    size: usize,
    old: u128,
    new: u128,
) -> Option<Result<(), u128>> {
    if at + size > size_of_val(words) {
        return None;
    }
    // SAFETY: within the words, by the check above.
    let place = unsafe { words.as_ptr().cast::<u8>().cast_mut().add(at) };
    if place as usize % LINE + size > LINE {
        return None;
    }
    /// `lock cmpxchg` in a register's width. SDM vol. 3, 9.1.2: a locked access is atomic whatever
    /// its alignment; within a line that holds for every access to the line.
    macro_rules! exchange {
        ($int:ty, $width:literal, $new:literal) => {{
            let expected = old as $int;
            let mut seen = expected;
            // SAFETY: the bytes are valid for reads and writes (they are in `words`, whose cells are
            // mutable), and nobody has a reference to them that is not to atomics. Accesses of
            // different sizes to the same bytes are outside the language's memory model, as guest
            // memory is that processors write: the instruction is opaque to the compiler, and x86
            // orders it (SDM vol. 3, 9.2.2).
            unsafe {
                core::arch::asm!(
                    concat!("lock cmpxchg ", $width, " ptr [{place}], {new", $new, "}"),
                    place = in(reg) place,
                    new = in(reg) new as $int,
                    inout("rax") seen,
                    options(nostack),
                );
            }
            Some(if seen == expected { Ok(()) } else { Err(seen.into()) })
        }};
    }
    match size {
        2 => exchange!(u16, "word", ":x"),
        4 => exchange!(u32, "dword", ":e"),
        8 => exchange!(u64, "qword", ":r"),
        16 if place as usize % 16 == 0 && std::is_x86_feature_detected!("cmpxchg16b") => {
            // Not the intrinsic of `core::arch`: unoptimised, it is a call of a library that is not
            // linked.
            let (mut low, mut high) = (old as u64, (old >> 64) as u64);
            // SAFETY: as above; the processor has the instruction, and the address is aligned. RBX,
            // which the compiler keeps for itself, is as before at the end, and the address is not in
            // it.
            unsafe {
                core::arch::asm!(
                    "xchg {rbx}, rbx",
                    "lock cmpxchg16b xmmword ptr [rdi]",
                    "mov rbx, {rbx}",
                    rbx = inout(reg) new as u64 => _,
                    in("rcx") (new >> 64) as u64,
                    in("rdi") place,
                    inout("rax") low,
                    inout("rdx") high,
                    options(nostack),
                );
            }
            let seen = u128::from(high) << 64 | u128::from(low);
            Some(if seen == old { Ok(()) } else { Err(seen) })
        }
        _ => None,
    }
}

/// Other processors, and models: never.
#[cfg(any(not(target_arch = "x86_64"), loom))]
pub(crate) fn exchange_across(
    _words: &[AtomicU64; 2],
    _at: usize,
    _size: usize,
    _old: u128,
    _new: u128,
) -> Option<Result<(), u128>> {
    None
}

#[cfg(all(test, target_arch = "x86_64", not(loom)))]
mod tests {
    use super::*;
    use crate::sync::Ordering;

    #[repr(align(64))]
    struct Line([AtomicU64; 10]);

    fn line() -> Line {
        Line(core::array::from_fn(|i| AtomicU64::new(0x1111_1111_1111_1111 * i as u64)))
    }

    fn pair(line: &Line, word: usize) -> &[AtomicU64; 2] {
        line.0[word..word + 2].try_into().unwrap()
    }

    fn get(line: &Line, word: usize) -> u64 {
        line.0[word].load(Ordering::Relaxed)
    }

    #[test]
    fn exchanges_what_lies_across_two_words_of_a_line() {
        for (size, mask) in [(2, 0xffff), (4, 0xffff_ffff), (8, u128::from(u64::MAX))] {
            for at in 9 - size..8 {
                let line = line();
                let both = u128::from(get(&line, 2)) << 64 | u128::from(get(&line, 1));
                let seen = both >> (8 * at) & mask;
                let new = 0xfedc_ba98_7654_3210 & mask;
                let exchange = |old| exchange_across(pair(&line, 1), at, size, old, new);
                assert_eq!(exchange(seen ^ 1), Some(Err(seen)), "{size} at {at}");
                assert_eq!((get(&line, 1), get(&line, 2)), (both as u64, (both >> 64) as u64));
                assert_eq!(exchange(seen), Some(Ok(())));
                let expected = both & !(mask << (8 * at)) | new << (8 * at);
                assert_eq!(get(&line, 1), expected as u64, "{size} at {at}");
                assert_eq!(get(&line, 2), (expected >> 64) as u64, "{size} at {at}");
                assert_eq!((get(&line, 0), get(&line, 3)), (0, 0x3333_3333_3333_3333));
            }
        }
    }

    #[test]
    fn exchanges_sixteen_aligned_bytes() {
        if !std::is_x86_feature_detected!("cmpxchg16b") {
            println!("skipped: this processor has no cmpxchg16b");
            return;
        }
        let line = line();
        let old = u128::from(get(&line, 3)) << 64 | u128::from(get(&line, 2));
        let exchange = |word, old| exchange_across(pair(&line, word), 0, 16, old, !old);
        assert_eq!(exchange(2, old + 1), Some(Err(old)));
        assert_eq!(exchange(2, old), Some(Ok(())));
        assert_eq!((get(&line, 2), get(&line, 3)), (!old as u64, !(old >> 64) as u64));
        assert_eq!(exchange(3, old), None, "not aligned");
    }

    #[test]
    fn refuses_what_crosses_a_line_or_the_words() {
        let line = line();
        let exchange = |word, at, size| exchange_across(pair(&line, word), at, size, 0, 1);
        // The words 7 and 8 are in different lines.
        assert_eq!([2, 4, 8].map(|size| exchange(7, 7, size)), [None; 3]);
        assert_eq!([exchange(1, 9, 8), exchange(1, 15, 2), exchange(1, 8, 16)], [None; 3]);
        assert_eq!([0, 1, 3, 5, 6, 7, 9, 32].map(|size| exchange(0, 0, size)), [None; 8]);
    }
}
