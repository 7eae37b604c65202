// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The downgrade queue of a vCPU, and its translation into a program for the stub.
//!
//! The engine has changed an entry already; what is queued says only *where*, never a value. A program is a
//! sequence of words (see [`stub`]) that ends at the end of the vCPU's queue page:
//!
//! ```text
//! gadget operands … [cr3 root] ack generation leave rax rip cs rflags rsp ss
//! gadget operands … [cr3 root] ack generation exit  …                          (drain-only)
//! gadget operands … exit                                                       (more to come)
//! ```
//!
//! A kick does not break a program off (a steady stream of kicks would keep it from ever ending) but makes it end in the
//! VMM: its `leave` becomes `exit`. Programs are short, a millisecond or two where every instruction is emulated.
//!
//! Guarantee: a generation is acknowledged only by the program that holds the last of the queue.

use super::KvmError;
use super::layout::{ARENA_VA, PAGE};
use super::stub;

/// A narrowing that a vCPU has to carry out inside the guest before it runs the guest program again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Downgrade {
    /// A leaf entry that is reached by one address only: touch the entry, `invlpg` the address.
    Leaf {
        /// Byte offset of the entry in the table arena.
        entry: u64,
        /// Guest-virtual address that it mapped.
        gva: u64,
    },
    /// Any other entry: touch it, reload CR3.
    Entry {
        /// Byte offset of the entry in the table arena.
        entry: u64,
    },
    /// A whole table frame: it will be used for something else. Touch it so that nothing of its old content
    /// stays in use, reload CR3.
    Frame {
        /// Index of the frame in the table arena.
        frame: u32,
    },
    /// All frames below the given one: touch them, reload CR3.
    Everything {
        /// Frames to touch: the highest one ever used, plus one.
        frames: u32,
    },
    /// Reload CR3: drop the processor's translations, touch nothing.
    Reload,
}

/// How a program ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// In ring 3: the iretq frame's words and the guest's rax.
    Leave { rax: u64, frame: [u64; 5] },
    /// In the VMM.
    Exit,
}

/// Words of a queue page that a program may fill (the first line of the page holds the acknowledged word).
const WORDS: usize = (PAGE as usize - 64) / 8;
/// Words kept for the end: `ack`, generation, and what follows.
const TAIL: usize = 2 + stub::ACK_TAIL_WORDS as usize;
/// Words for downgrades in one program.
const BODY: usize = WORDS - TAIL - 2;

/// Leaf downgrades that certainly fit in one program.
pub(super) const CAPACITY: usize = BODY / (2 * stub::UNROLL + 1) * stub::UNROLL;

/// Frames in one sweep. A program ends with a sweep, so that a kick (which waits for a program's end) waits about as long
/// as for a full page of leaves.
const SWEEP: u32 = 512;

/// A downgrade as it is queued.
#[derive(Clone, Copy, Debug)]
enum Item {
    Leaf { entry: u64, gva: u64 },
    Entry { entry: u64 },
    Frame { frame: u32 },
    Sweep { first: u32, frames: u32 },
    Reload,
}

/// The downgrades a vCPU still has to carry out, in the order they were queued.
#[derive(Debug, Default)]
pub(super) struct Queue {
    items: Vec<Item>,
    /// Items carried out already by earlier programs, counted from the front.
    done: usize,
    /// Items of the program that is (or was last) under way.
    under_way: usize,
    /// Some item since the last acknowledgement asks for a CR3 load.
    reload: bool,
}

impl Queue {
    /// Adds one downgrade; `frames` is the size of the arena.
    pub(super) fn push(&mut self, item: Downgrade, frames: u32) -> Result<(), KvmError> {
        let end = u64::from(frames) * PAGE;
        let ok = match item {
            Downgrade::Leaf { entry, .. } | Downgrade::Entry { entry } => {
                entry < end && entry % 8 == 0
            }
            Downgrade::Frame { frame } => frame < frames,
            Downgrade::Everything { frames: n } => n <= frames,
            Downgrade::Reload => true,
        };
        if !ok {
            return Err(KvmError::BadDowngrade { item, frames });
        }
        self.reload |= !matches!(item, Downgrade::Leaf { .. });
        match item {
            Downgrade::Leaf { entry, gva } => self.items.push(Item::Leaf { entry, gva }),
            Downgrade::Entry { entry } => self.items.push(Item::Entry { entry }),
            Downgrade::Frame { frame } => self.items.push(Item::Frame { frame }),
            Downgrade::Everything { frames: all } => {
                self.items.extend(
                    (0..all)
                        .step_by(SWEEP as usize)
                        .map(|first| Item::Sweep { first, frames: SWEEP.min(all - first) }),
                );
                if all == 0 {
                    self.items.push(Item::Reload);
                }
            }
            Downgrade::Reload => self.items.push(Item::Reload),
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.items.len() - self.done
    }

    /// The program under way has passed its end: its items are done. True if nothing is left.
    pub(super) fn advance(&mut self) -> bool {
        self.done += self.under_way;
        self.under_way = 0;
        if self.done < self.items.len() {
            return false;
        }
        self.items.clear();
        self.done = 0;
        self.reload = false;
        true
    }

    /// Writes the next program to `out`. It ends as `end` says if it holds the last item, else in the VMM. True in the
    /// first case.
    pub(super) fn compose(&mut self, job: &Job, end: End, out: &mut Vec<u64>) -> bool {
        out.clear();
        let mut rest = &self.items[self.done..];
        while let Some(&item) = rest.first() {
            if BODY - out.len() < 4 {
                break;
            }
            rest = &rest[self.compose_run(item, rest, job, out)..];
            let whole_frame = matches!(item, Item::Frame { .. }) && !job.touch_frames;
            if whole_frame || matches!(item, Item::Sweep { .. }) {
                break;
            }
        }
        self.under_way = self.items.len() - self.done - rest.len();
        let last = rest.is_empty();
        if !last {
            out.push(stub::exit());
            return false;
        }
        if self.reload {
            out.extend([stub::cr3(), job.root]);
        }
        out.extend([stub::ack(), job.generation]);
        match end {
            End::Leave { rax, frame } => {
                out.extend([stub::leave(), rax]);
                out.extend(frame);
            }
            End::Exit => {
                out.push(stub::exit());
                out.extend([0; stub::ACK_TAIL_WORDS as usize - 1]);
            }
        }
        true
    }

    /// Composes the run of like items that `rest` begins with; returns their number.
    fn compose_run(&self, item: Item, rest: &[Item], job: &Job, out: &mut Vec<u64>) -> usize {
        let room = BODY - out.len() - 1;
        // A CR3 load at the end makes each invlpg superfluous.
        let leaves = !self.reload;
        let entry_of = |item: &Item| match *item {
            Item::Leaf { entry, gva } => Some((entry, gva)),
            Item::Entry { entry } => Some((entry, 0)),
            _ => None,
        };
        match item {
            Item::Leaf { .. } | Item::Entry { .. } => {
                let most = stub::UNROLL.min(room / if leaves { 2 } else { 1 });
                let run = rest.iter().take(most).map_while(entry_of);
                let at = out.len();
                out.push(0);
                let mut n = 0;
                for (entry, gva) in run {
                    out.push(ARENA_VA + entry);
                    if leaves {
                        out.push(gva);
                    }
                    n += 1;
                }
                out[at] = if leaves {
                    nth_last(stub::leaf(), stub::leaf_end(), n)
                } else {
                    nth_last(stub::entry(), stub::entry_end(), n)
                };
                n
            }
            Item::Frame { frame } if !job.touch_frames => {
                sweep(stub::sweep_entries(), frame, PAGE / 8 / stub::SWEEP_UNROLL, job, out);
                1
            }
            Item::Frame { .. } => {
                let at = out.len();
                out.push(0);
                let mut n = 0;
                for item in rest.iter().take(stub::UNROLL.min(room)) {
                    let Item::Frame { frame } = *item else { break };
                    out.push(ARENA_VA + u64::from(frame) * PAGE);
                    n += 1;
                }
                out[at] = nth_last(stub::frame(), stub::frame_end(), n);
                n
            }
            Item::Reload => 1,
            Item::Sweep { first, frames } => {
                if job.touch_frames {
                    // Rounded up: the arena is a multiple of a turn.
                    let turns = u64::from(frames).div_ceil(stub::SWEEP_UNROLL);
                    sweep(stub::sweep_frames(), first, turns, job, out);
                } else {
                    let turns = u64::from(frames) * (PAGE / 8 / stub::SWEEP_UNROLL);
                    sweep(stub::sweep_entries(), first, turns, job, out);
                }
                1
            }
        }
    }
}

/// What a program needs to know besides its items.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    /// The CR3 to reload.
    pub(super) root: u64,
    /// What to acknowledge.
    pub(super) generation: u64,
    /// The guest's rcx, which a sweep has to give back.
    pub(super) rcx: u64,
    /// Whether one two-byte write drops a whole frame.
    pub(super) touch_frames: bool,
}

/// Where to enter an unrolled gadget so that its body runs `n` times.
fn nth_last(start: u64, end: u64, n: usize) -> u64 {
    end - (end - start) / stub::UNROLL as u64 * n as u64
}

fn sweep(gadget: u64, frame: u32, turns: u64, job: &Job, out: &mut Vec<u64>) {
    out.extend([gadget, ARENA_VA + u64::from(frame) * PAGE, turns, job.rcx]);
}
