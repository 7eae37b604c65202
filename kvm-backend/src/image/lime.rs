// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! LiME images: ranges of memory, each behind a header of 32 bytes.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..4 | magic 0x4c694d45 |
//! | 4..8 | version, 1 |
//! | 8..16 | guest-physical address of the first byte |
//! | 16..24 | guest-physical address of the last byte |
//! | 24..32 | reserved |
//!
//! All little-endian. The range's bytes follow, then the next header.

use super::MAX_SEGMENTS;
use super::error::Problem;
use super::mapping::Bytes;
use super::segments::Part;

/// First bytes of a header.
pub(super) const MAGIC: [u8; 4] = 0x4c69_4d45u32.to_le_bytes();

const HEADER: u64 = 32;

/// The parts of memory that the file holds.
pub(super) fn parts<B: Bytes + ?Sized>(file: &B) -> Result<Vec<Part>, Problem> {
    let len = file.len();
    let mut parts = Vec::new();
    let mut at = 0;
    while at < len {
        let segment = parts.len() as u64;
        if file.get(at) != Some(MAGIC) {
            return Err(Problem::NoHeader { format: "LiME", offset: at });
        }
        let Some(header) = file.get::<{ HEADER as usize }>(at) else {
            let what = "a LiME header";
            return Err(Problem::TruncatedHeader { what, offset: at, needed: HEADER, len });
        };
        let [first, base, last, _] = std::array::from_fn(|i| {
            u64::from_le_bytes(std::array::from_fn(|byte| header[8 * i + byte]))
        });
        let version = first >> 32;
        if version != 1 {
            let what = "the version of a LiME header";
            return Err(Problem::Unsupported { what, value: version, supported: "1" });
        }
        // The end, exclusive, must be a number too.
        let end = last.checked_add(1).filter(|end| *end > base);
        let needed = end.ok_or(Problem::BadRange { segment, base })? - base;
        let offset = at + HEADER;
        if offset.checked_add(needed).is_none_or(|end| end > len) {
            return Err(Problem::TruncatedSegment { segment, base, offset, needed, len });
        }
        if parts.len() >= MAX_SEGMENTS {
            return Err(Problem::TooManySegments { limit: MAX_SEGMENTS as u64 });
        }
        parts.push(Part { base, len: needed, offset: Some(offset) });
        at = offset + needed;
    }
    Ok(parts)
}
