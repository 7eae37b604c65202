// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unit tests of the log.

use super::*;
use proptest::prelude::*;

fn enabled(pages: u64) -> DirtyLog {
    let log = DirtyLog::new(pages * PAGE_SIZE);
    log.set_enabled(true);
    log
}

fn dirty(log: &DirtyLog) -> Vec<usize> {
    (0..log.pages() as usize + 64).filter(|page| log.is_dirty(*page)).collect()
}

#[test]
fn marks_are_taken_once() {
    let log = enabled(130);
    assert!(log.mark(0) && log.mark(63) && log.mark(64) && log.mark(129));
    assert!(!log.mark(63), "set already");
    assert_eq!(dirty(&log), [0, 63, 64, 129]);
    assert_eq!(
        (log.peek(0), log.clear(0, u64::MAX), log.clear(0, u64::MAX)),
        (1 << 63 | 1, 1 << 63 | 1, 0)
    );
    assert_eq!((log.clear(1, 2), log.clear(1, 3), log.clear(1, 3)), (0, 1, 0));
    assert!(log.mark(0) && dirty(&log) == [0, 129]);
    log.reset();
    assert!(dirty(&log).is_empty());
    assert_eq!(
        (log.clear(2, u64::MAX), log.clear(3, u64::MAX), log.clear(usize::MAX, u64::MAX)),
        (0, 0, 0)
    );
}

#[test]
fn pages_beyond_the_end_have_no_bit() {
    let log = enabled(70);
    assert!(!log.mark(70) && !log.mark(127) && !log.mark(usize::MAX));
    log.mark_unpinned(68..usize::MAX);
    log.mark_unpinned(80..90);
    assert_eq!(dirty(&log), [68, 69]);
    let none = DirtyLog::default();
    none.set_enabled(true);
    none.mark_unpinned(0..1);
    assert!(!none.mark(0) && none.pages() == 0 && dirty(&none).is_empty());
}

#[test]
fn marks_are_ignored_while_disabled() {
    let log = DirtyLog::new(64 * PAGE_SIZE);
    assert!(!log.mark(1));
    log.mark_unpinned(2..5);
    assert_eq!(log.peek(0), 0);
    log.set_enabled(true);
    assert!(log.mark(1));
    log.set_enabled(false);
    assert!(!log.mark(3) && dirty(&log) == [1]);
}

#[test]
fn clones_share_one_log() {
    let log = enabled(1);
    let other = log.clone();
    assert!(log.mark(0) && !other.mark(0));
    assert_eq!((other.clear(0, u64::MAX), log.clear(0, u64::MAX)), (1, 0));
}

proptest! {
    #[test]
    fn ranges_mark_each_page_in_them(
        ranges in prop::collection::vec((0usize..300, 0usize..200), 0..6),
    ) {
        let log = enabled(260);
        let mut oracle = std::collections::BTreeSet::new();
        for (start, len) in ranges {
            log.mark_unpinned(start..start + len);
            oracle.extend(start.min(260)..(start + len).min(260));
        }
        prop_assert_eq!(dirty(&log), oracle.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn runs_are_maximal_and_complete(
        words in prop::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), any::<u64>().prop_map(|x| x & x << 7)],
            0..8,
        ),
    ) {
        let set = |page: u64| words.get((page / 64) as usize).is_some_and(|w| w >> (page % 64) & 1 != 0);
        let mut expected = Vec::new();
        for page in (0..words.len() as u64 * 64).filter(|page| set(*page)) {
            match expected.last_mut() {
                Some(Range { end, .. }) if *end == page => *end += 1,
                _ => expected.push(page..page + 1),
            }
        }
        let mut found = runs(&words);
        prop_assert_eq!(found.by_ref().collect::<Vec<_>>(), expected);
        prop_assert_eq!(found.next(), None);
    }
}

#[test]
fn runs_at_the_edges() {
    let all = |bitmap: &[u64]| runs(bitmap).map(|run| (run.start, run.end)).collect::<Vec<_>>();
    assert_eq!(all(&[]), []);
    assert_eq!(all(&[0, 0]), []);
    assert_eq!(all(&[u64::MAX]), [(0, 64)]);
    assert_eq!(all(&[u64::MAX; 3]), [(0, 192)]);
    assert_eq!(all(&[1 << 63, u64::MAX, 1]), [(63, 129)]);
    assert_eq!(all(&[1 << 63, 0, 1]), [(63, 64), (128, 129)]);
    assert_eq!(all(&[1 << 63 | 1, 5]), [(0, 1), (63, 65), (66, 67)]);
}

#[test]
fn every_mark_is_harvested_once() {
    const PAGES: usize = 100;
    const ROUNDS: u64 = 2_000;
    let log = enabled(PAGES as u64);
    let mut taken = vec![0u64; PAGES];
    let mut harvest = || {
        for word in 0..PAGES.div_ceil(64) {
            let bits = log.clear(word, u64::MAX);
            (0..64).filter(|n| bits >> n & 1 != 0).for_each(|n| taken[word * 64 + n] += 1);
        }
    };
    let marked = std::thread::scope(|s| {
        let markers: Vec<_> = (0..2)
            .map(|_| {
                s.spawn(|| {
                    let mut set = [0u64; PAGES];
                    for _ in 0..ROUNDS {
                        (0..PAGES).for_each(|page| set[page] += u64::from(log.mark(page)));
                    }
                    set
                })
            })
            .collect();
        while !markers.iter().all(|marker| marker.is_finished()) {
            harvest();
        }
        markers.into_iter().map(|marker| marker.join().unwrap()).collect::<Vec<_>>()
    });
    harvest();
    for page in 0..PAGES {
        assert_eq!(taken[page], marked.iter().map(|set| set[page]).sum::<u64>());
    }
}
