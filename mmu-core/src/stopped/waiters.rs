// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who waits for a thread that was stopped in the middle of which operation, and for what of it.

use super::cause::Cause::{self, *};
use super::operations::OPERATIONS;
use super::others::OTHERS;
use std::collections::{BTreeMap, BTreeSet};

/// Others that wait, by what of the stopped thread they wait for.
pub type Waited = BTreeMap<Cause, BTreeSet<&'static str>>;

/// Who waits for a thread that was stopped in the middle of this operation.
pub fn listed(operation: &str) -> Waited {
    let own = WAITERS.iter().filter(|(_, operations, _)| operations.contains(&operation));
    own.map(|(cause, _, others)| (*cause, others.iter().copied().collect())).collect()
}

/// Who may wait beside those that are `listed`. Whose list the thread holds, and whether another looks
/// for a table, depends on how far the one was and on what others have done before: there the tries are
/// samples. But faults on other pages and tables wait for no list, unless they are listed.
pub fn allowed(cause: Cause, listed: &BTreeSet<&'static str>) -> BTreeSet<&'static str> {
    const FAR: [&str; 2] = ["a fault far away", "a fault that makes a block"];
    if ![List, Shard].contains(&cause) {
        return listed.clone();
    }
    let near = cause == List && FAR.iter().all(|far| !listed.contains(far));
    let may = OTHERS.iter().filter(|other| other.waits_for.contains(&cause));
    may.map(|other| other.name).filter(|name| !near || !FAR.contains(name)).collect()
}

/// The row of the documents' table.
pub fn row(cause: Cause) -> String {
    let (mut waiters, mut operations) = (BTreeSet::new(), BTreeSet::new());
    for (_, of, others) in WAITERS.iter().filter(|(row, ..)| *row == cause) {
        waiters.extend(allowed(cause, &others.iter().copied().collect()));
        operations.extend(of.iter().copied());
    }
    let among = |names: &BTreeSet<&str>| Vec::from_iter(names.iter().copied()).join("; ");
    let operations = match operations.len() {
        many if many > 12 => format!("{many} of {} operations", OPERATIONS.len()),
        _ => among(&operations),
    };
    format!("| {} | {} | {operations} |", cause.name(), among(&waiters))
}

/// What of the thread, in the middle of these operations, and who waits for it. Nobody else does.
const WAITERS: &[(Cause, &[&str], &[&str])] = &[
    (
        Reads,
        &[
            "a fault that makes every table",
            "a fault that makes an entry",
            "a fault that maps around",
            "a write fault that widens an entry",
            "a write fault that repairs an entry",
            "a fault that makes a block",
            "a fault on a table in a block",
            "a fault short of frames",
            "a walk while frames are short",
            "an emulated write to a guest table",
            "a locked write to a guest table",
            "a device's write to a guest table",
            "a fault that lets a table be written",
            "a guest's own edit",
            "an INVLPG",
            "flushes that settle a table",
            "a fault that links a written table",
            "an access inside the guest",
            "an emulator's accesses",
            "a patch of code",
            "a root load and release",
            "an entry that drains",
            "a harvest",
            "a harvest of dirty bits",
            "a reset of dirty pages",
            "a write-protection by the host",
            "an end of write-protection",
            "ageing",
            "a smaller quota",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
        &[
            "a harvest of dirty bits",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a new alias",
            "an APIC that moves",
            "a write-protection by the host",
            "synchronize",
        ],
    ),
    (
        Reads,
        &[
            "an invalidation",
            "a new slot",
            "the end of a slot",
            "a slot that moves",
            "a log over a block",
            "an end of the log of a block",
            "a new alias",
            "an APIC that moves",
        ],
        &["a harvest of dirty bits", "a write-protection by the host", "synchronize"],
    ),
    (
        Reads,
        &["a change of flags"],
        &["a harvest", "a harvest of dirty bits", "a write-protection by the host", "synchronize"],
    ),
    (
        Frames,
        &["a fault short of frames", "a smaller quota"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault at the same address",
            "a fault in the same tables",
            "a fault in the same block",
            "a guest's own edit",
            "a root load and release",
            "a vCPU that comes and goes",
        ],
    ),
    (
        Frames,
        &["a walk while frames are short"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault at the same address",
            "a fault in the same tables",
            "a guest's own edit",
            "a root load and release",
            "a vCPU that comes and goes",
        ],
    ),
    (
        Inside,
        &["a guest's own edit", "a root load and release"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault in the same block",
            "a vCPU that comes and goes",
            "a harvest",
            "a harvest of dirty bits",
            "a write-protection by the host",
            "an invalidation",
            "a patch of code",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a new alias",
            "an APIC that moves",
            "synchronize",
        ],
    ),
    (
        Inside,
        &["an access inside the guest", "a vCPU that comes and goes"],
        &[
            "a guest's own edit",
            "a vCPU that comes and goes",
            "a harvest",
            "a harvest of dirty bits",
            "a write-protection by the host",
            "an invalidation",
            "a patch of code",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a new alias",
            "an APIC that moves",
            "synchronize",
        ],
    ),
    (
        Inside,
        &["an entry that drains"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault in the same block",
            "a guest's own edit",
            "a vCPU that comes and goes",
            "a harvest",
            "a harvest of dirty bits",
            "a write-protection by the host",
            "an invalidation",
            "a patch of code",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a new alias",
            "an APIC that moves",
            "synchronize",
        ],
    ),
    (
        Away,
        &["a patch of code"],
        &[
            "a fault at the same address",
            "a root load and release",
            "a vCPU that comes and goes",
            "a new slot",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a new alias",
            "an APIC that moves",
        ],
    ),
    (
        Away,
        &["an invalidation"],
        &[
            "a fault at the same address",
            "a guest's own edit",
            "a root load and release",
            "a vCPU that comes and goes",
            "a new slot",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a new alias",
            "an APIC that moves",
        ],
    ),
    (
        List,
        &["a fault that makes every table"],
        &[
            "a fault at the same address",
            "a fault in the same tables",
            "a fault in the same block",
            "a guest's own edit",
            "a root load and release",
            "ageing",
            "a vCPU that comes and goes",
        ],
    ),
    (
        List,
        &["a fault that maps around"],
        &["a guest's own edit", "ageing", "the end of zapped trees", "a vCPU that comes and goes"],
    ),
    (
        List,
        &["a fault that makes a block"],
        &[
            "a fault at the same address",
            "a fault in the same tables",
            "a fault in the same block",
            "a guest's own edit",
            "a root load and release",
            "a vCPU that comes and goes",
        ],
    ),
    (
        List,
        &[
            "a fault on a table in a block",
            "a harvest of dirty bits",
            "a smaller quota",
            "the end of a slot",
            "a slot that moves",
            "a log over a block",
        ],
        &["the end of zapped trees"],
    ),
    (
        List,
        &[
            "an emulated write to a guest table",
            "a locked write to a guest table",
            "a device's write to a guest table",
        ],
        &[
            "a device's write to a guest table",
            "a guest's own edit",
            "ageing",
            "the end of zapped trees",
        ],
    ),
    (
        List,
        &["a fault that lets a table be written"],
        &[
            "a device's write to a guest table",
            "a guest's own edit",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        List,
        &["a guest's own edit"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault in the same block",
            "ageing",
            "a vCPU that comes and goes",
            "a harvest",
            "an invalidation",
            "a patch of code",
        ],
    ),
    (List, &["an INVLPG"], &["ageing", "a harvest", "an invalidation"]),
    (
        List,
        &["flushes that settle a table", "a root load and release"],
        &[
            "a guest's own edit",
            "a flush",
            "a root load and release",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        List,
        &["a fault that links a written table"],
        &[
            "a fault at the same address",
            "a fault in the same tables",
            "a guest's own edit",
            "a flush",
            "a root load and release",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        List,
        &["a patch of code", "an invalidation"],
        &[
            "a fault at the same address",
            "a guest's own edit",
            "a root load and release",
            "ageing",
            "the end of zapped trees",
            "a vCPU that comes and goes",
            "a harvest",
            "an invalidation",
        ],
    ),
    (
        List,
        &["a harvest", "a reset of dirty pages"],
        &[
            "a device's write to a guest table",
            "ageing",
            "the end of zapped trees",
            "a vCPU that comes and goes",
            "a harvest",
            "an invalidation",
        ],
    ),
    (
        List,
        &["a write-protection by the host", "ageing"],
        &[
            "a device's write to a guest table",
            "a guest's own edit",
            "ageing",
            "the end of zapped trees",
            "a vCPU that comes and goes",
            "a harvest",
            "an invalidation",
        ],
    ),
    (
        List,
        &["an end of write-protection"],
        &[
            "a fault at the same address",
            "a fault in the same tables",
            "a device's write to a guest table",
            "a guest's own edit",
            "a root load and release",
            "ageing",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        List,
        &["the end of zapped trees"],
        &[
            "a fault far away",
            "a fault at the same address",
            "a fault in the same tables",
            "a fault in the same block",
            "a guest's own edit",
            "a root load and release",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        List,
        &["an end of the log of a block"],
        &["a fault in the same block", "the end of zapped trees"],
    ),
    (
        Shard,
        &[
            "a fault that makes every table",
            "a fault that maps around",
            "a fault that makes a block",
            "the end of zapped trees",
            "an end of the log of a block",
        ],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault at the same address",
            "a fault in the same tables",
            "a fault in the same block",
            "a guest's own edit",
            "a root load and release",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        Shard,
        &["a fault on a table in a block"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a guest's own edit",
            "a root load and release",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (Shard, &["a fault short of frames", "a smaller quota"], &["the end of zapped trees"]),
    (
        Shard,
        &["a fault that lets a table be written"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault in the same block",
            "a guest's own edit",
            "a root load and release",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        Shard,
        &["a fault that links a written table", "a root load and release"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault in the same block",
            "the end of zapped trees",
        ],
    ),
    (
        Shard,
        &["an end of write-protection"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault in the same tables",
            "a fault in the same block",
            "a guest's own edit",
            "a root load and release",
            "the end of zapped trees",
            "a vCPU that comes and goes",
        ],
    ),
    (
        Shard,
        &["a vCPU that comes and goes"],
        &[
            "a fault far away",
            "a fault that makes a block",
            "a fault in the same block",
            "a guest's own edit",
            "the end of zapped trees",
        ],
    ),
    (
        Map,
        &[
            "a patch of code",
            "an invalidation",
            "a new slot",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a log over a block",
            "an end of the log of a block",
            "a new alias",
            "an APIC that moves",
        ],
        &[
            "an invalidation",
            "a patch of code",
            "a new slot",
            "the end of a slot",
            "a slot that moves",
            "a change of flags",
            "a new alias",
            "an APIC that moves",
        ],
    ),
    (
        Seats,
        &["a smaller quota", "a vCPU that comes and goes"],
        &["a quota", "a vCPU that comes and goes", "a new slot", "the end of a slot"],
    ),
    (Seats, &["a new slot", "the end of a slot"], &["a quota", "a vCPU that comes and goes"]),
    (Vcpus, &["a vCPU that comes and goes"], &["a vCPU that comes and goes"]),
    (
        Sums,
        &["a vCPU that comes and goes", "statistics"],
        &["statistics", "a vCPU that comes and goes"],
    ),
    (
        Pins,
        &["an emulator's accesses"],
        &["a pin of a page", "a harvest", "a harvest of dirty bits"],
    ),
    (Ring, &["a collection of a dirty ring"], &["a collection of a dirty ring"]),
    (Patch, &["a patch of code"], &["a fetch of code", "a patch of code"]),
    (
        Look,
        &["an access to a device", "a coalesced write"],
        &["a device that comes and goes", "the end of a device"],
    ),
    (
        Bus,
        &["a device that comes and goes"],
        &["a device that comes and goes", "the end of a device"],
    ),
    (Device, &["an access to a device"], &["the end of a device"]),
    (Cell, &["a coalesced write"], &["a drain of the coalesced ring"]),
    (Drain, &["a drain of the coalesced ring"], &["a drain of the coalesced ring"]),
    (List, &["a fault that makes an entry"], &["a fault in the same tables"]),
];
