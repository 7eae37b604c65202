// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which guest-physical bytes are in an image, and where in the file.
//!
//! Headers may describe the same guest-physical byte more than once: QEMU writes such segments when
//! it dumps with paging on and a page is mapped twice. Bytes that are in the file go before the
//! zero-filled tail of a segment; among equals the first header wins.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What one header describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// First guest-physical byte.
    pub(super) base: u64,
    /// Bytes; `base + len` does not overflow.
    pub(super) len: u64,
    /// Where the first byte is in the file; `None` for zeros that are not there.
    pub(super) offset: Option<u64>,
}

/// Bytes that are together in guest-physical memory and in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    base: u64,
    end: u64,
    /// Of `base` in the file; [`ZEROS`] for zeros that are not there.
    offset: u64,
}

/// No file is that long.
const ZEROS: u64 = u64::MAX;

/// A run of bytes of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Where in the file; `None` for zeros.
    pub(super) offset: Option<u64>,
    /// Bytes to the end of the segment.
    pub(super) len: u64,
}

/// The image's segments: sorted, disjoint, not empty.
#[derive(Debug)]
pub(super) struct Segments(Box<[Segment]>);

impl Segments {
    /// Lays out the parts; see the module for overlaps.
    pub(super) fn new(parts: &[Part]) -> Self {
        let mut order: Vec<_> = (0..parts.len()).filter(|i| parts[*i].len != 0).collect();
        order.sort_unstable_by_key(|i| parts[*i].base);
        let mut next = order.into_iter().peekable();
        let mut segments: Vec<Segment> = Vec::new();
        // The parts that have begun, the one that wins on top. Those that have ended leave when
        // they get there.
        let mut open: BinaryHeap<(Reverse<(bool, usize)>, u64)> = BinaryHeap::new();
        let mut at = 0;
        loop {
            while let Some(&(Reverse((_, i)), end)) = open.peek() {
                let part: &Part = &parts[i];
                if end <= at {
                    open.pop();
                    continue;
                }
                // Up to where this part ends or another begins that may win.
                let until = next.peek().map_or(end, |i| end.min(parts[*i].base));
                if until > at {
                    let offset = part.offset.map_or(ZEROS, |offset| offset + (at - part.base));
                    push(&mut segments, Segment { base: at, end: until, offset });
                    at = until;
                }
                if at < end {
                    break;
                }
            }
            let Some(i) = next.next() else { break };
            let part = &parts[i];
            at = at.max(part.base);
            open.push((Reverse((part.offset.is_none(), i)), part.base + part.len));
        }
        Self(segments.into())
    }

    /// The bytes from `gpa` on that lie together; `None` if there are none.
    #[inline]
    pub(super) fn run(&self, gpa: u64) -> Option<Run> {
        let segment = match &*self.0 {
            [only] => only,
            many => many.get(many.partition_point(|segment| segment.end <= gpa))?,
        };
        if gpa < segment.base || gpa >= segment.end {
            return None;
        }
        let Segment { base, end, offset } = *segment;
        let offset = (offset != ZEROS).then(|| offset + (gpa - base));
        Some(Run { offset, len: end - gpa })
    }

    /// Whether any of the bytes is in the image.
    #[inline]
    pub(super) fn touches(&self, gpa: u64, len: u64) -> bool {
        let at = self.0.partition_point(|segment| segment.end <= gpa);
        self.0.get(at).is_some_and(|segment| segment.base < gpa.saturating_add(len))
    }

    /// Number of bytes in the image.
    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().map(|segment| segment.end - segment.base).sum()
    }
}

/// Adds a segment at the end, or to the last one.
fn push(segments: &mut Vec<Segment>, new: Segment) {
    match segments.last_mut() {
        Some(last)
            if last.end == new.base
                && match (last.offset, new.offset) {
                    (ZEROS, ZEROS) => true,
                    (ZEROS, _) | (_, ZEROS) => false,
                    (old, offset) => old + (last.end - last.base) == offset,
                } =>
        {
            last.end = new.end;
        }
        _ => segments.push(new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(base: u64, len: u64, offset: Option<u64>) -> Part {
        Part { base, len, offset }
    }

    #[test]
    fn joins_what_lies_together() {
        let parts = [
            part(0x1000, 0x1000, Some(0x100)),
            part(0x2000, 0x1000, Some(0x1100)),
            part(0x3000, 0x800, Some(0x5000)),
            part(0x3800, 0x800, None),
            part(0x4000, 0x800, None),
        ];
        let segments = Segments::new(&parts);
        assert_eq!(segments.0.len(), 3);
        assert_eq!(segments.run(0x1234), Some(Run { offset: Some(0x334), len: 0x1dcc }));
        assert_eq!(segments.run(0x3900), Some(Run { offset: None, len: 0xf00 }));
        assert_eq!((segments.run(0xfff), segments.run(0x4800)), (None, None));
        assert_eq!(segments.bytes(), 0x3800);
        let one = Segments::new(&parts[..1]);
        assert_eq!((one.run(0xfff), one.run(0x2000)), (None, None));
        assert_eq!(one.run(0x1fff), Some(Run { offset: Some(0x10ff), len: 1 }));
    }

    #[test]
    fn overlaps_end_as_documented() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move |n: u64| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x % n
        };
        for _ in 0..2000 {
            let parts: Vec<_> = (0..random(9))
                .map(|_| {
                    let offset = (random(3) > 0).then(|| 1000 + random(100));
                    part(random(60), random(30), offset)
                })
                .collect();
            let segments = Segments::new(&parts);
            for gpa in 0..100 {
                let holds = |p: &&Part| p.base <= gpa && gpa < p.base + p.len;
                let in_file = parts.iter().filter(holds).find(|p| p.offset.is_some());
                let expected = in_file.or_else(|| parts.iter().find(holds));
                let found = segments.run(gpa);
                assert_eq!(
                    found.map(|run| run.offset),
                    expected.map(|p| p.offset.map(|offset| offset + (gpa - p.base))),
                    "{parts:?} {gpa}"
                );
                assert!(found.is_none_or(|run| run.len > 0));
                let len = 1 + random(10);
                let any = (gpa..gpa + len).any(|gpa| segments.run(gpa).is_some());
                assert_eq!(segments.touches(gpa, len), any, "{parts:?} {gpa}");
            }
            let joined = segments.0.windows(2).all(|two| two[0].end <= two[1].base);
            assert!(joined && segments.0.iter().all(|segment| segment.base < segment.end));
        }
    }
}
