// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes that wait to be carried out: the ring of KVM_CAP_COALESCED_MMIO and KVM_CAP_COALESCED_PIO.
//!
//! All initiators of a VM put writes in, of both buses; the VMM takes them out. KVM has a page and a
//! spin lock for this (`kvm_coalesced_mmio_ring`, `ring_lock`).
//!
//! # Protocol
//!
//! A cell has a turn: position `p` may be filled when its cell's turn is `p`, and taken when it is
//! `p + 1`; that it was taken adds a lap to `p`. A writer reserves a position by compare-and-swap, fills
//! the cell, and publishes it by its turn. A writer that is stopped in between holds up nobody but the
//! drain that has come to its cell.
//!
//! R37: *a drain takes every position that was reserved when it began.* It must not end at a cell that
//! is still being filled: behind it may be writes of the vCPU for whose sake the ring is drained, and
//! its next access must not overtake them.

use super::{MAX_ACCESS, Space};
use crate::sync::steps::{Held, What};
use crate::sync::{AtomicU64, Backoff, Mutex, Ordering, lock, rule};
use core::fmt;

/// A write in the ring (`struct kvm_coalesced_mmio`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CoalescedWrite {
    space: Space,
    length: u8,
    address: u64,
    data: [u8; MAX_ACCESS],
}

impl CoalescedWrite {
    /// `None` unless it has 1 to 16 bytes.
    #[inline]
    pub(super) fn new(space: Space, address: u64, data: &[u8]) -> Option<Self> {
        let mut copy = [0; MAX_ACCESS];
        copy.get_mut(..data.len()).filter(|copy| !copy.is_empty())?.copy_from_slice(data);
        Some(Self { space, length: data.len() as u8, address, data: copy })
    }

    /// The bus it was made on.
    #[must_use]
    pub fn space(&self) -> Space {
        self.space
    }

    /// Address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its 1 to 16 bytes.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data[..usize::from(self.length)]
    }

    /// Its length, and its first 8 bytes as a little-endian number.
    pub(super) fn as_integer(&self) -> (u8, u64) {
        let [_, _, low, _] = self.words();
        (self.length, low)
    }

    fn words(&self) -> [u64; 4] {
        let data = u128::from_le_bytes(self.data);
        let what = u64::from(self.length) << 1 | u64::from(self.space == Space::Pio);
        [self.address, what, data as u64, (data >> 64) as u64]
    }

    fn from_words([address, what, low, high]: [u64; 4]) -> Self {
        let space = if what & 1 == 0 { Space::Mmio } else { Space::Pio };
        let data = (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
        Self { space, length: (what >> 1) as u8, address, data }
    }
}

impl fmt::Debug for CoalescedWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x?} to {} {:#x}", self.data(), self.space, self.address)
    }
}

#[derive(Debug)]
struct Cell {
    turn: AtomicU64,
    words: [AtomicU64; 4],
}

/// In a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Line<T>(T);

/// Writes to coalesced ranges, in the order in which they were made, until the VMM carries them out.
///
/// A VMM drains the ring, and carries out what was in it with [`Initiator::write_now`], before each
/// access to a device that has coalesced ranges; before a write that found the ring full
/// ([`Answer::RingFull`]), which it then makes itself in the same way; and whenever it likes. If several
/// threads drain, the order between what they got is theirs to keep.
///
/// [`Initiator::write_now`]: super::Initiator::write_now
/// [`Answer::RingFull`]: super::Answer::RingFull
///
/// ```
/// use mmu_core::mmio::{Answer, Bus, CoalescedRing, Space};
/// use std::sync::Arc;
///
/// let ring = Arc::new(CoalescedRing::default());
/// let (memory, ports) =
///     (Bus::new(Space::Mmio, Arc::clone(&ring)), Bus::new(Space::Pio, Arc::clone(&ring)));
/// memory.register_coalesced(0xa_0000, 0x2_0000)?;
/// ports.register_coalesced(0x3c4, 2)?;
/// assert_eq!(ports.initiator().write(0x3c4, &[2, 1]), Answer::Coalesced);
/// assert_eq!(memory.initiator().write(0xa_0100, b"text"), Answer::Coalesced);
///
/// let writes = ring.drain();
/// let seen: Vec<_> = writes.iter().map(|w| (w.space(), w.address(), w.data())).collect();
/// assert_eq!(seen, [(Space::Pio, 0x3c4, &[2, 1][..]), (Space::Mmio, 0xa_0100, b"text")]);
/// # Ok::<(), mmu_core::mmio::BusError>(())
/// ```
#[derive(Debug)]
pub struct CoalescedRing {
    /// Position `p` is in cell `p % CAPACITY`.
    cells: Box<[Cell]>,
    /// Position of the next write.
    next: Line<AtomicU64>,
    /// Position of the next write to take.
    taken: Mutex<u64>,
}

impl CoalescedRing {
    /// Writes that fit in. KVM's ring holds 169.
    pub const CAPACITY: usize = if cfg!(loom) { 2 } else { 256 };

    /// Puts a write in; `false` if the ring is full. Waits for nobody; of several writers at a time
    /// one gets on.
    pub(super) fn push(&self, write: &CoalescedWrite) -> bool {
        let next = &self.next.0;
        // Acquire here and below pairs with the Release of the exchange: cells that another writer knew
        // to be taken are known to be taken here, so that the ring is not thought full.
        let mut position = next.load(Ordering::Acquire);
        loop {
            let cell = self.cell(position);
            // Acquire pairs with the Release in `drain`: what was in the cell has been taken.
            let turn = cell.turn.load(Ordering::Acquire);
            if turn < position {
                return false;
            }
            if turn > position {
                // Another writer has the position.
                position = next.load(Ordering::Acquire);
                continue;
            }
            let (new, acquire) = (position + 1, Ordering::Acquire);
            match next.compare_exchange_weak(position, new, Ordering::Release, acquire) {
                Err(now) => position = now,
                Ok(_) => {
                    let _held = Held::new(What::Cell);
                    for (to, word) in cell.words.iter().zip(write.words()) {
                        to.store(word, Ordering::Relaxed);
                    }
                    // Release pairs with the Acquire in `drain`: the cell is complete.
                    cell.turn.store(new, Ordering::Release);
                    return true;
                }
            }
        }
    }

    /// Takes out every write that was put in before this call, and those that are being put in. Waits
    /// for the latter, which takes a few stores, and for other drainers; never for a device.
    #[must_use]
    pub fn drain(&self) -> Vec<CoalescedWrite> {
        let mut taken = lock(&self.taken);
        // Relaxed: a write that this thread knows of has its position counted.
        let end = self.next.0.load(Ordering::Relaxed);
        let mut writes = Vec::with_capacity((end - *taken) as usize);
        while *taken < end {
            let cell = self.cell(*taken);
            let mut backoff = Backoff::default();
            // Acquire pairs with the Release in `push`.
            while cell.turn.load(Ordering::Acquire) != *taken + 1 {
                // R37: every position up to the end, also if it is still being filled.
                if !rule!(R37) {
                    return writes;
                }
                backoff.wait();
            }
            let words = cell.words.each_ref().map(|word| word.load(Ordering::Relaxed));
            writes.push(CoalescedWrite::from_words(words));
            // Release pairs with the Acquire in `push`: the cell may be filled again.
            cell.turn.store(*taken + Self::CAPACITY as u64, Ordering::Release);
            *taken += 1;
        }
        writes
    }

    fn cell(&self, position: u64) -> &Cell {
        &self.cells[position as usize % Self::CAPACITY]
    }
}

impl Default for CoalescedRing {
    /// An empty ring.
    fn default() -> Self {
        let cell = |turn| Cell {
            turn: AtomicU64::new(turn),
            words: core::array::from_fn(|_| AtomicU64::new(0)),
        };
        Self {
            cells: (0..Self::CAPACITY as u64).map(cell).collect(),
            next: Line(AtomicU64::new(0)),
            taken: Mutex::new(0),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn write(n: u64) -> CoalescedWrite {
        let space = if n % 3 == 0 { Space::Pio } else { Space::Mmio };
        let data: Vec<u8> = (0..=n % 16).map(|i| (n + i) as u8).collect();
        CoalescedWrite::new(space, n * 7, &data).unwrap()
    }

    #[test]
    fn writes_of_every_length_come_back_whole() {
        let ring = CoalescedRing::default();
        for n in 0..64 {
            assert!(ring.push(&write(n)));
        }
        assert!(ring.drain().into_iter().eq((0..64).map(write)));
        assert!(ring.drain().is_empty());
        for wrong in [&[][..], &[0; 17]] {
            assert_eq!(CoalescedWrite::new(Space::Mmio, 0, wrong), None);
        }
        let debug = format!("{:?}", CoalescedWrite::new(Space::Pio, 0x70, &[1, 0xab]).unwrap());
        assert_eq!(debug, "[01, ab] to I/O port 0x70");
    }

    #[test]
    fn the_order_is_kept_around_the_end() {
        let ring = CoalescedRing::default();
        let (mut made, mut seen) = (0, 0);
        for round in 0..100 {
            for _ in 0..round * 5 % CoalescedRing::CAPACITY {
                assert!(ring.push(&write(made)));
                made += 1;
            }
            for got in ring.drain() {
                assert_eq!(got, write(seen));
                seen += 1;
            }
            assert_eq!(seen, made);
        }
    }

    #[test]
    fn a_full_ring_takes_nothing_and_loses_nothing() {
        let ring = CoalescedRing::default();
        let capacity = CoalescedRing::CAPACITY as u64;
        assert!((0..capacity).all(|n| ring.push(&write(n))));
        assert!(!ring.push(&write(capacity)) && !ring.push(&write(capacity)));
        assert!(ring.drain().into_iter().eq((0..capacity).map(write)));
        assert!(ring.push(&write(capacity)));
        assert_eq!(ring.drain(), [write(capacity)]);
    }
}
