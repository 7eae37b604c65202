// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the emulator asks of its surroundings, and what it answers.

use std::fmt;
use std::sync::OnceLock;
use std::time::Instant;

/// The longest instruction the architecture allows, in bytes.
pub const MAX_INSN: usize = 15;

/// The memory and the privileged state of the vCPU on whose behalf an instruction is executed.
///
/// Addresses are guest-virtual. An access that fails must have changed nothing (one that crosses a page
/// boundary checks both pages first), since the instruction will be executed again.
///
/// Guests are written for the memory order of x86: a bus whose memory is shared by several vCPUs makes
/// its loads acquire, its stores release, and aligned accesses of 1, 2, 4 and 8 bytes single-copy atomic.
///
/// The privileged hooks default to #GP(0), which is what a process in ring 3 gets.
pub trait Bus {
    /// Whatever stops an instruction from the bus's side: a guest page fault, a request of the VMM, …
    type Stop;

    /// Reads instruction bytes at `gva` and returns how many were read, at least one.
    ///
    /// It may stop early at the end of a page, even if the next one is mapped: the emulator asks again
    /// at the following address if the instruction needs more, and then gets that page's own fault.
    fn fetch(&mut self, gva: u64, buf: &mut [u8; MAX_INSN]) -> Result<usize, Self::Stop>;

    /// A data load.
    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Self::Stop>;

    /// The load of a read-modify-write instruction: needs write permission, and its fault is a write's.
    fn read_for_write(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Self::Stop> {
        self.read(gva, buf)
    }

    /// A data store.
    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Self::Stop>;

    /// An atomic compare-and-exchange of 1, 2, 4, 8 or 16 bytes; `Ok(Err(seen))` if memory held `seen`
    /// instead of `old`. Needs write permission in both cases. `gva` may be unaligned (but not for 16).
    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Self::Stop>;

    /// A value that changes whenever the instruction bytes at `gva .. gva + 15`, or the right to fetch
    /// them, may have changed. `None` (the default) makes the emulator fetch and compare the bytes for
    /// each instruction.
    #[inline]
    fn code_stamp(&mut self, _gva: u64) -> Option<u64> {
        None
    }

    /// Whether `gva` is canonical (for 4-level paging by default). Other addresses are #GP, or #SS.
    #[inline]
    fn is_canonical(&self, gva: u64) -> bool {
        ((gva << 16) as i64 >> 16) as u64 == gva
    }

    /// The base of FS.
    fn fs_base(&self) -> u64 {
        0
    }

    /// The base of GS.
    fn gs_base(&self) -> u64 {
        0
    }

    /// `mov r64, crN`.
    fn read_cr(&mut self, _n: u8) -> Result<u64, Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `mov crN, r64`.
    fn write_cr(&mut self, _n: u8, _value: u64) -> Result<(), Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `invlpg`; `gva` may be non-canonical.
    fn invlpg(&mut self, _gva: u64) -> Result<(), Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `invpcid` of type `kind` with the two words of its descriptor.
    fn invpcid(&mut self, _kind: u64, _descriptor: [u64; 2]) -> Result<(), Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `hlt`. After `Ok` the instruction is finished, and [`step`](super::step) returns [`Event::Halt`].
    fn halt(&mut self) -> Result<(), Stop<Self::Stop>> {
        Ok(())
    }

    /// `in` of 1, 2 or 4 bytes.
    fn port_in(&mut self, _port: u16, _size: usize) -> Result<u32, Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `out` of 1, 2 or 4 bytes.
    fn port_out(&mut self, _port: u16, _size: usize, _value: u32) -> Result<(), Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `rdmsr`.
    fn rdmsr(&mut self, _index: u32) -> Result<u64, Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `wrmsr`.
    fn wrmsr(&mut self, _index: u32, _value: u64) -> Result<(), Stop<Self::Stop>> {
        Err(Exception::gp(0).into())
    }

    /// `cpuid`: eax, ebx, ecx, edx.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        default_cpuid(leaf, subleaf)
    }

    /// `rdtsc`: by default nanoseconds since the first call in this process.
    fn rdtsc(&mut self) -> u64 {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// The answer of [`Bus::cpuid`] unless the bus has its own: what the emulator executes, and no more.
#[must_use]
pub fn default_cpuid(leaf: u32, _subleaf: u32) -> [u32; 4] {
    let word = |s: &[u8; 4]| u32::from_le_bytes(*s);
    match leaf {
        // Vendor "SoftShadowVC" in the order ebx, edx, ecx.
        0 => [1, word(b"Soft"), word(b"owVC"), word(b"Shad")],
        // Family 6. cmpxchg16b, movbe, popcnt; tsc, msr, pae, cx8, cmov, clflush (64-byte lines).
        1 => [0x600, 0x0800, 1 << 13 | 1 << 22 | 1 << 23, 0x0008_8170],
        0x8000_0000 => [0x8000_0008, 0, 0, 0],
        // lahf, lzcnt; NX, long mode.
        0x8000_0001 => [0, 0, 1 | 1 << 5, 1 << 20 | 1 << 29],
        // 52 physical and 48 linear address bits.
        0x8000_0008 => [0x3034, 0, 0, 0],
        _ => [0; 4],
    }
}

/// What an executed instruction was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Finished.
    Retired,
    /// Finished, and it was `pause`: the guest spins, and others may need the processor.
    Pause,
    /// Finished, and it was `hlt`.
    Halt,
    /// Not finished within its share of work; executing on at the same instruction pointer continues it.
    Again,
}

/// Why an instruction was not (entirely) executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop<S> {
    /// The instruction raises this exception in the guest.
    Exception(Exception),
    /// The bus stopped it.
    Bus(S),
}

impl<S> From<Exception> for Stop<S> {
    fn from(e: Exception) -> Self {
        Stop::Exception(e)
    }
}

/// How an exception came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A fault: the guest may correct the cause and execute the instruction again.
    Fault,
    /// A trap: reported behind the instruction (`int3`, `int1`, single step).
    Trap,
    /// `int n`; whether the guest may is for the caller to say.
    Software,
    /// #UD for an instruction that is valid but that this emulator does not execute.
    Unsupported,
}

/// An exception raised in the guest. Page faults are not among them: they are the bus's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// The vector: 0 #DE, 1 #DB, 3 #BP, 6 #UD, 12 #SS, 13 #GP; any for `int n`.
    pub vector: u8,
    /// The error code, for vectors that push one.
    pub error_code: Option<u32>,
    /// Fault or trap.
    pub class: Class,
    /// The instruction pointer to be reported to the guest.
    pub rip: u64,
    /// The instruction; empty if it could not be fetched.
    pub bytes: InsnBytes,
}

impl Exception {
    /// A fault; the emulator adds instruction pointer and bytes.
    #[must_use]
    pub const fn fault(vector: u8, error_code: Option<u32>) -> Self {
        Exception {
            vector,
            error_code,
            class: Class::Fault,
            rip: 0,
            bytes: InsnBytes { bytes: [0; MAX_INSN], len: 0 },
        }
    }

    /// #GP(`error_code`).
    #[must_use]
    pub const fn gp(error_code: u32) -> Self {
        Self::fault(13, Some(error_code))
    }

    /// #UD.
    #[must_use]
    pub const fn ud() -> Self {
        Self::fault(6, None)
    }

    /// #DE.
    pub(super) const fn de() -> Self {
        Self::fault(0, None)
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vector {
            0 => write!(f, "#DE")?,
            1 => write!(f, "#DB")?,
            3 => write!(f, "#BP")?,
            6 => write!(f, "#UD")?,
            12 => write!(f, "#SS")?,
            13 => write!(f, "#GP")?,
            n => write!(f, "exception {n}")?,
        }
        if let Some(code) = self.error_code {
            write!(f, "({code:#x})")?;
        }
        write!(f, " at {:#x}", self.rip)?;
        if self.class == Class::Unsupported {
            write!(f, ", unsupported instruction")?;
        }
        if self.bytes.len > 0 {
            write!(f, " [{}]", self.bytes)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exception({:?}: {self})", self.class)
    }
}

/// The bytes of one instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct InsnBytes {
    pub(super) bytes: [u8; MAX_INSN],
    pub(super) len: u8,
}

impl InsnBytes {
    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len).min(MAX_INSN)]
    }
}

impl fmt::Display for InsnBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, b) in self.as_slice().iter().enumerate() {
            write!(f, "{}{b:02x}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for InsnBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
