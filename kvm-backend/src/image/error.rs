// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with an image.

use std::io;
use std::path::PathBuf;

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct ImageError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with an image. Segments and ranges are counted from 0, in the order of the file's
/// headers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It cannot be opened or mapped.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A directory.
    #[error("is a directory")]
    Directory,
    /// A pipe, socket or device.
    #[error("is not a regular file")]
    NotRegular,
    /// It has no bytes.
    #[error("is empty")]
    Empty,
    /// The wrong bytes where a format begins.
    #[error("is no {format} image: no {format} header at offset {offset:#x}")]
    NoHeader {
        /// The format.
        format: &'static str,
        /// Where the header should be.
        offset: u64,
    },
    /// A header of a kind that is not supported.
    #[error("{what} is {value}, supported is {supported}")]
    Unsupported {
        /// The header's field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What is supported.
        supported: &'static str,
    },
    /// The file ends before a header does.
    #[error("{what} at offset {offset:#x} needs {needed} bytes, but the file has only {len}")]
    TruncatedHeader {
        /// The header.
        what: &'static str,
        /// Where it begins.
        offset: u64,
        /// Bytes it needs.
        needed: u64,
        /// Bytes in the file.
        len: u64,
    },
    /// The file ends before a segment does.
    #[error(
        "segment {segment} (guest-physical {base:#x}) is {needed} bytes at offset {offset:#x}, but \
         the file has only {len} bytes"
    )]
    TruncatedSegment {
        /// The segment.
        segment: u64,
        /// Its first guest-physical byte.
        base: u64,
        /// Its place in the file.
        offset: u64,
        /// Bytes it has in the file.
        needed: u64,
        /// Bytes in the file.
        len: u64,
    },
    /// More bytes in the file than in memory.
    #[error(
        "segment {segment} (guest-physical {base:#x}): file size {in_file} exceeds memory size \
         {in_memory}"
    )]
    SegmentSizes {
        /// The segment.
        segment: u64,
        /// Its first guest-physical byte.
        base: u64,
        /// Bytes in the file.
        in_file: u64,
        /// Bytes in memory.
        in_memory: u64,
    },
    /// The end is before the start or beyond 2^64 - 1.
    #[error("segment {segment} begins at guest-physical {base:#x} and ends before that")]
    BadRange {
        /// The segment.
        segment: u64,
        /// Its first guest-physical byte.
        base: u64,
    },
    /// There are no segments.
    #[error("has no memory segments")]
    NoSegments,
    /// There are too many segments.
    #[error("has more than {limit} memory segments")]
    TooManySegments {
        /// The most that are accepted.
        limit: u64,
    },
}
