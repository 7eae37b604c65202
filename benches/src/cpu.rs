// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads on processors of their own, and the processor's clock.
//!
//! `unsafe` is needed for the system calls and the instruction.

use crate::figure::Failure;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The processors that this process may run on.
pub fn allowed() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a set of bits; zero is one.
        let mut set: libc::cpu_set_t = unsafe { core::mem::zeroed() };
        // SAFETY: the size is that of the set behind the pointer.
        if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } == 0 {
            // SAFETY: every index is within the set.
            return (0..libc::CPU_SETSIZE as usize)
                .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
                .collect();
        }
    }
    Vec::new()
}

/// Keeps the calling thread on one processor, if the system lets it.
fn pin(cpu: usize) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a set of bits; zero is one.
        let mut set: libc::cpu_set_t = unsafe { core::mem::zeroed() };
        // SAFETY: `cpu` comes from a set of the same size; a thread that cannot be pinned runs
        // anyway.
        unsafe {
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &set);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cpu;
}

/// What one thread does in [`together`].
pub type Work<'a, T> = Box<dyn FnOnce() -> Result<T, Failure> + Send + 'a>;

/// What came of [`together`].
#[derive(Debug)]
pub struct Together<T> {
    /// From the first start to the last end.
    pub elapsed: Duration,
    /// What each thread returned.
    pub values: Vec<T>,
    /// Whether something else took a processor away from a thread meanwhile.
    pub disturbed: bool,
}

/// Runs each piece of work on a thread of its own, thread *n* on the *n*th processor (in turn if
/// there are fewer), all starting together.
///
/// # Errors
///
/// The first failure of a thread.
pub fn together<T: Send>(work: Vec<Work<'_, T>>) -> Result<Together<T>, Failure> {
    let cpus = allowed();
    let (threads, ready) = (work.len(), AtomicUsize::new(0));
    let results: Vec<_> = std::thread::scope(|scope| {
        let ready = &ready;
        let spawned: Vec<_> = work
            .into_iter()
            .enumerate()
            .map(|(n, work)| {
                let cpu = cpus.get(n % cpus.len().max(1)).copied();
                scope.spawn(move || {
                    if let Some(cpu) = cpu {
                        pin(cpu);
                    }
                    ready.fetch_add(1, Ordering::AcqRel);
                    while ready.load(Ordering::Acquire) < threads {
                        std::thread::yield_now();
                    }
                    let before = preemptions();
                    let start = Instant::now();
                    let result = work();
                    (start, Instant::now(), preemptions() != before, result)
                })
            })
            .collect();
        spawned.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    let mut span: Option<(Instant, Instant)> = None;
    let (mut values, mut disturbed) = (Vec::new(), false);
    for result in results {
        let (start, end, preempted, value) =
            result.map_err(|_| Failure::new("a thread panicked"))?;
        disturbed |= preempted;
        let (first, last) = span.unwrap_or((start, end));
        span = Some((first.min(start), last.max(end)));
        values.push(value?);
    }
    let (first, last) = span.ok_or_else(|| Failure::new("no work"))?;
    Ok(Together { elapsed: last - first, values, disturbed })
}

/// How often the calling thread has lost its processor without waiting for anything.
pub fn preemptions() -> i64 {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: numbers; zero is one.
        let mut usage: libc::rusage = unsafe { core::mem::zeroed() };
        // SAFETY: the pointer is to an rusage.
        if unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) } == 0 {
            return usage.ru_nivcsw;
        }
    }
    0
}

/// The time that the calling thread has run. What one thread does by itself is measured with it: the
/// time that other processes take from the thread is not the engine's.
pub fn thread_time() -> Duration {
    #[cfg(target_os = "linux")]
    {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a timespec.
        if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) } == 0 {
            return Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
        }
    }
    since_start()
}

fn since_start() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// The processor's clock; cheap enough to read twice around a walk.
#[inline(always)]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        since_start().as_nanos() as u64
    }
}

/// Nanoseconds of a tick, measured.
pub fn tick_ns() -> f64 {
    let (start, first) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(20));
    let (elapsed, last) = (start.elapsed(), ticks());
    elapsed.as_nanos() as f64 / last.wrapping_sub(first).max(1) as f64
}
