// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use std::collections::BTreeMap;

/// What is checked against: values by first key and end.
type Oracle = BTreeMap<u64, (u64, u64)>;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Where ranges come to lie.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// Without gaps or nearly.
    Dense,
    /// Anywhere, of any length.
    Scattered,
    /// Thousands near 0, and a few far away.
    Skewed,
    /// In ascending order.
    Ascending,
    Descending,
}

const LAYOUTS: [Layout; 5] =
    [Layout::Dense, Layout::Scattered, Layout::Skewed, Layout::Ascending, Layout::Descending];

impl Layout {
    fn range(self, random: &mut Random, nth: u64) -> Range<u64> {
        let (start, len) = match self {
            Self::Dense => (random.below(6_000) * 4, 1 + random.below(4)),
            Self::Scattered => {
                let most = 1 << random.below(30);
                let len = 1 + random.below(most);
                (random.below(1 << 51), len)
            }
            Self::Skewed if random.below(200) == 0 => {
                (random.below(1 << 11) << 40, 1 << (20 + random.below(21)))
            }
            Self::Skewed => (random.below(20_000), 1 + random.below(3)),
            Self::Ascending => (nth * 5 + random.below(3), 1 + random.below(3)),
            Self::Descending => ((1 << 40) - nth * 5 - random.below(3), 1 + random.below(2)),
        };
        start..start + len
    }
}

/// The map holds what the oracle does, and is in order.
fn check(map: &Ranges<u64>, oracle: &Oracle) {
    assert_eq!((map.len(), map.iter().len()), (oracle.len(), oracle.len()));
    let expected = oracle.iter().map(|(start, (end, value))| (*start..*end, value));
    assert!(map.iter().eq(expected));
    let chunks = map.chunks();
    for chunk in chunks {
        let entries = &chunk.body.entries;
        assert!(!entries.is_empty() && entries.len() <= MOST);
        assert_eq!(chunk.start, entries[0].start);
    }
    assert!(chunks.len() <= 2 + map.len() / (MOST / 16));
}

fn check_key(map: &Ranges<u64>, oracle: &Oracle, key: u64) {
    let found = oracle.range(..=key).next_back().filter(|(_, (end, _))| key < *end);
    assert_eq!(map.get(key), found.map(|(start, (_, value))| (value, key - start)));
    let range = found.map(|(start, (end, value))| (*start..*end, value));
    assert_eq!(map.range_of(key), range);
}

fn touching(oracle: &Oracle, range: &Range<u64>) -> Vec<(Range<u64>, u64)> {
    let end = oracle.range(..range.end);
    let touching = end.rev().take_while(|(_, (end, _))| *end > range.start);
    let mut found: Vec<_> = touching.map(|(start, (end, value))| (*start..*end, *value)).collect();
    found.reverse();
    found
}

fn insert(map: &mut Ranges<u64>, oracle: &mut Oracle, range: Range<u64>, value: u64) {
    *map = map.insert(range.clone(), value);
    oracle.insert(range.start, (range.end, value));
}

fn remove(map: &mut Ranges<u64>, oracle: &mut Oracle, start: u64) {
    *map = map.remove(start);
    oracle.remove(&start).unwrap();
}

fn cut(map: &mut Ranges<u64>, oracle: &mut Oracle, range: Range<u64>) {
    *map = map.cut(range.clone(), |value, n| value + n);
    let old = if range.is_empty() { vec![] } else { touching(oracle, &range) };
    for (old, value) in old {
        oracle.remove(&old.start);
        if old.start < range.start {
            oracle.insert(old.start, (range.start, value));
        }
        if old.end > range.end {
            oracle.insert(range.end, (old.end, value + range.end - old.start));
        }
    }
}

#[test]
fn is_what_a_sorted_map_is() {
    for (round, layout) in LAYOUTS.iter().cycle().take(10).enumerate() {
        let random = &mut Random(0x9e37_79b9_7f4a_7c15 + round as u64);
        let (mut map, mut oracle) = (Ranges::default(), Oracle::new());
        let mut kept = Vec::new();
        // Grows to thousands, then shrinks to none.
        for step in 0..14_000u64 {
            let range = layout.range(random, step);
            let expected = touching(&oracle, &range);
            let found = map.overlapping(range.clone());
            assert!(found.eq(expected.iter().map(|(range, value)| (range.clone(), value))));
            let grows = step < 6_000;
            if expected.is_empty() && (grows || random.below(4) == 0) {
                insert(&mut map, &mut oracle, range.clone(), step);
            } else if random.below(if grows { 20 } else { 1 }) == 0 {
                let other = oracle.range(range.start..).next().or(oracle.iter().next());
                if let Some((&start, _)) = other {
                    remove(&mut map, &mut oracle, start);
                }
            }
            if random.below(500) == 0 {
                let wide = if random.below(16) == 0 { 30 } else { 8 };
                let most = 1 << random.below(wide);
                let len = random.below(most);
                let start = range.start + random.below(range.end - range.start);
                cut(&mut map, &mut oracle, start..start + len);
            }
            for key in [range.start.wrapping_sub(1), range.start, range.end - 1, range.end] {
                check_key(&map, &oracle, key);
            }
            if step % 1_000 == 0 {
                check(&map, &oracle);
                let edges: Vec<_> = oracle.iter().map(|(s, (e, _))| [*s, *e]).collect();
                for key in edges.as_flattened() {
                    (key.saturating_sub(1)..key + 2).for_each(|k| check_key(&map, &oracle, k));
                }
                for key in [0, u64::MAX, 1 << 52, random.below(1 << 52)] {
                    check_key(&map, &oracle, key);
                }
                kept.push((map.clone(), oracle.clone()));
            }
        }
        cut(&mut map, &mut oracle, 0..1 << 53);
        assert!(map.len() == 0 && map.chunks().is_empty() && map.get(0).is_none());
        // Old versions are as they were.
        kept.iter().for_each(|(map, oracle)| check(map, oracle));
        assert!(kept.iter().any(|(map, _)| map.chunks().len() > 20), "{layout:?}");
    }
}

fn numbered(count: u64) -> Ranges<u64> {
    (0..count).fold(Ranges::default(), |map, n| map.insert(n * 10..n * 10 + 5, n))
}

#[test]
fn a_change_shares_all_chunks_but_one_or_two() {
    let shared = |a: &Ranges<u64>, b: &Ranges<u64>| {
        let of = |map: &Ranges<u64>| -> Vec<_> {
            map.chunks().iter().map(|chunk| Arc::as_ptr(&chunk.body)).collect()
        };
        let others = of(b);
        of(a).into_iter().filter(|body| others.contains(body)).count()
    };
    let map = numbered(10_000);
    let chunks = map.chunks().len();
    assert!(chunks <= 10_000 / (MOST / 2));
    let more = map.insert(54_327..54_328, 0);
    assert!(more.chunks().len() <= chunks + 1 && shared(&map, &more) == chunks - 1);
    assert_eq!((more.get(54_327), map.get(54_327)), (Some((&0, 0)), None));
    let less = more.remove(54_327);
    assert!(shared(&more, &less) >= more.chunks().len() - 2);
    assert!(less.iter().eq(map.iter()));
    assert_eq!(shared(&less, &less.clone()), less.chunks().len());
}

#[test]
fn chunks_split_at_round_keys_and_merge_when_small() {
    let sizes = |map: &Ranges<u64>| -> Vec<_> {
        map.chunks().iter().map(|chunk| chunk.body.entries.len()).collect()
    };
    let most = MOST as u64;
    let full = numbered(most);
    assert_eq!(sizes(&full), [MOST]);
    let mut map = full.insert(7..8, 0);
    assert_eq!((sizes(&map), map.chunks()[1].start), (vec![53, 76], 520));
    let more = full.insert(most * 10..most * 10 + 1, 0);
    assert_eq!((sizes(&more), more.chunks()[1].start), (vec![103, 26], 1030));
    for n in (most / 4..most).rev() {
        map = map.remove(n * 10);
    }
    assert_eq!(sizes(&map), [MOST / 4 + 1]);
    let none = (0..most / 4).fold(map.remove(7), |map, n| map.remove(n * 10));
    assert_eq!((none.len(), none.iter().next(), sizes(&none)), (0, None, vec![]));
}

#[test]
fn few_keys_need_a_search() {
    let random = &mut Random(7);
    for (count, share) in [(64, 600), (512, 80), (10_000, 4)] {
        let mut start = 20_000;
        let mut map = Ranges::default();
        for n in 0..count {
            let end = 20_000 + n * share + 1 + random.below(share);
            map = map.insert(start..end, n);
            start = end;
        }
        let searched = (20_000..start).filter(|key| map.guess(*key).is_none()).count() as u64;
        assert!(searched * 20 < start - 20_000, "{searched} of {count} ranges");
    }
}

#[test]
fn a_cut_leaves_what_lies_beside_it() {
    let whole = Ranges::default().insert(100..1 << 40, 1000);
    let cut = whole.cut(200..300, |value, n| value + n);
    assert!(cut.iter().eq([(100..200, &1000), (300..1 << 40, &1200)]));
    assert_eq!((cut.get(250), cut.get(301)), (None, Some((&1200, 1))));
    assert!(whole.cut(0..100, |_, _| 0).iter().eq(whole.iter()));
    assert_eq!(whole.cut(0..1 << 41, |_, _| 0).len(), 0);
}
