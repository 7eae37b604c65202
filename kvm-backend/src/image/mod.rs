// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images of guest-physical memory in files, and walks of the page tables in them.
//!
//! | format | what | known by |
//! | --- | --- | --- |
//! | raw | guest-physical address = file offset | having no magic |
//! | ELF | a core with PT_LOADs at their `p_paddr`, as QEMU's `dump-guest-memory` writes it | `\x7fELF` |
//! | LiME | ranges behind headers, version 1 | 0x4c694d45 |
//!
//! The file is mapped and never written to, nor read further than walks go. Segments may begin and
//! end at any byte, and may overlap: bytes that are in the file go before the zero-filled tail of a
//! segment, and among equals the first header wins. A file that is shorter than its headers
//! say is refused.
//!
//! An image is [`Tables`] for [`PagingMode::translate_in`](mmu_core::paging::PagingMode::translate_in);
//! [`Mappings`] lists whole address spaces.
//!
//! `unsafe` is in `mapping` alone.

mod elf;
mod error;
mod lime;
mod mapping;
mod mappings;
mod segments;

pub use error::{ImageError, Problem};
pub use mappings::{Mapped, Mappings};

use mapping::{Bytes, Mapping};
use mmu_core::addr::Gpa;
use mmu_core::paging::Tables;
use segments::{Part, Run, Segments};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Most segments of an image: each costs memory here, and a dump of a machine has a few dozen.
const MAX_SEGMENTS: usize = 1 << 20;

/// How a file holds memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// As the first bytes of the file say: ELF, LiME, otherwise raw.
    #[default]
    Auto,
    /// Guest-physical address = file offset.
    Raw,
    /// An ELF core with the guest-physical addresses of its segments.
    Elf,
    /// LiME, version 1.
    Lime,
}

/// An image of guest-physical memory.
#[derive(Debug)]
pub struct Image {
    mapping: Mapping,
    segments: Segments,
    format: Format,
}

impl Image {
    /// Opens a file for reading.
    ///
    /// # Errors
    ///
    /// [`ImageError`] names the file and what is wrong with it.
    pub fn open(path: &Path, format: Format) -> Result<Self, ImageError> {
        Self::open_file(path, format)
            .map_err(|problem| ImageError { path: path.to_owned(), problem })
    }

    fn open_file(path: &Path, format: Format) -> Result<Self, Problem> {
        // Without O_NONBLOCK the opening of a pipe would wait for its writer.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(Problem::Directory);
        }
        if !metadata.is_file() {
            return Err(Problem::NotRegular);
        }
        if metadata.len() == 0 {
            return Err(Problem::Empty);
        }
        let mapping = Mapping::new(&file, metadata.len())?;
        let format = match format {
            Format::Auto => detect(&mapping),
            chosen => chosen,
        };
        let segments = Segments::new(&parts(&mapping, format)?);
        if segments.bytes() == 0 {
            return Err(Problem::NoSegments);
        }
        Ok(Self { mapping, segments, format })
    }

    /// The format, never [`Format::Auto`].
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Guest-physical bytes in the image.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.segments.bytes()
    }

    /// Copies guest-physical memory out; returns how many bytes come before the first one that is
    /// not in the image.
    pub fn read(&self, gpa: Gpa, to: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Some(at) = gpa.0.checked_add(done as u64) else { break };
            let Some(Run { offset, len }) = self.segments.run(at) else { break };
            let n = usize::try_from(len).map_or(rest.len(), |len| len.min(rest.len()));
            let rest = &mut rest[..n];
            match offset {
                None => rest.fill(0),
                Some(offset) if self.mapping.read(offset, rest) => {}
                Some(_) => break,
            }
            done += n;
        }
        done
    }

    /// Copies the table at `gpa` with entries of `size` bytes, 4 or 8. Entries that are not in the
    /// image read as 0, which is not present. `None`, and nothing copied, if all are 0 for
    /// that reason or because they are in a zero-filled tail; otherwise whether the table
    /// lies in one piece.
    fn read_table(&self, gpa: Gpa, size: u64, entries: &mut [u64]) -> Option<bool> {
        let bytes = size * entries.len() as u64;
        match self.segments.run(gpa.0) {
            Some(Run { offset: Some(offset), len }) if len >= bytes && size == 8 => {
                return self.mapping.read_words(offset, entries).then_some(true);
            }
            Some(Run { offset: None, len }) if len >= bytes => return None,
            None if !self.segments.touches(gpa.0, bytes) => return None,
            _ => {}
        }
        for (i, entry) in entries.iter_mut().enumerate() {
            *entry = self.entry(gpa.wrapping_add(size * i as u64), size).unwrap_or(0);
        }
        Some(self.segments.run(gpa.0).is_some_and(|run| run.len >= bytes))
    }
}

impl Tables for Image {
    #[inline]
    fn entry(&self, gpa: Gpa, size: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        if let Some(Run { offset: Some(offset), len: 8.. }) = self.segments.run(gpa.0) {
            // The usual case, with a copy of known size.
            bytes = self.mapping.get(offset)?;
            let entry = u64::from_le_bytes(bytes);
            return Some(if size == 8 { entry } else { entry & 0xffff_ffff });
        }
        let entry = bytes.get_mut(..size as usize)?;
        (self.read(gpa, entry) == entry.len()).then(|| u64::from_le_bytes(bytes))
    }
}

fn detect<B: Bytes + ?Sized>(file: &B) -> Format {
    match file.get(0) {
        Some(elf::MAGIC) => Format::Elf,
        Some(lime::MAGIC) => Format::Lime,
        _ => Format::Raw,
    }
}

/// The parts of memory that the file holds.
fn parts<B: Bytes + ?Sized>(file: &B, format: Format) -> Result<Vec<Part>, Problem> {
    match format {
        Format::Auto => parts(file, detect(file)),
        Format::Raw => Ok(vec![Part { base: 0, len: file.len(), offset: Some(0) }]),
        Format::Elf => elf::parts(file),
        Format::Lime => lime::parts(file),
    }
}

#[cfg(test)]
mod tests;
