// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The storms, and the rules that they cannot do without.
#![cfg(shuttle)]

use shuttle_tests::{Change, Storm, Work, mutant, storm};

macro_rules! storms {
    ($($name:ident: [$($work:ident),*], [$($change:ident),*], $events:expr;)*) => {
        $(
            const fn $name() -> Storm {
                Storm {
                    name: concat!("storms::", stringify!($name)),
                    vcpus: &[$(Work::$work),*],
                    changes: &[$(Change::$change),*],
                    events: &$events,
                }
            }
        )*

        mod storms {
            $(#[test]
            fn $name() {
                super::storm(super::$name());
            })*
        }
    };
}

/// Entries repaired, of blocks, and around faults; lost races; tables written natively, settled, and made
/// into data; frames recycled, blocks broken.
const ALL: [&str; 9] = [
    "pf_fast",
    "pf_large",
    "pte_prefetched",
    "pf_restart",
    "mmu_unsync",
    "mmu_synced",
    "mmu_flooded",
    "mmu_recycled",
    "mmu_block_broken",
];

storms! {
    // vCPUs that do everything.
    vcpus_alone: [All, All, All], [], ALL;
    slots_change_under_vcpus: [All, All], [Map], ALL;
    the_host_takes_memory_from_vcpus: [All, All], [Host, Map], ALL;
    frames_run_out: [All, All, All], [Frames], ALL;
    blocks_are_broken_by_a_log: [All, All], [Blocks], ALL;
    logs_are_taken: [All, All], [Log], ALL;
    logs_are_taken_while_frames_run_out: [All, All], [Log, Frames], ALL;
    everything_at_once: [All, All], [Map, Host, Frames, Blocks, Log], ALL;
    // What those do not come to.
    rings_are_collected: [Ring, Edit, Edit], [Rings], ["pf_fast", "ring_pages", "ring_full"];
    pinned_pages_meet_a_log: [Pin, Move], [Copy, Map], [];
    devices_come_and_go: [Devices, Devices], [Devices, Map], ["coalesced", "device_writes", "doorbells"];
    code_is_patched: [Code, Code, All], [Log], ["patches"];
    // Few kinds of operations, many of them: for windows of few steps.
    vcpus_share_a_table: [Share, Share, Share], [], ["mmu_unsync", "mmu_synced"];
    stores_meet_edits_and_a_log: [Store, Move, Move], [Copy], ["pf_fast"];
    stores_meet_a_log_of_blocks: [StoreLarge, Edit], [Blocks], ["pf_large", "mmu_block_broken"];
    walks_meet_recycling: [Look, Look, Look], [Quota], ["mmu_recycled"];
    shadows_are_zapped: [Share, Share, Look], [Shadows], ["mmu_unsync"];
    faults_meet_zaps: [Fault, Fault, Fault], [Shadows], [];
    tables_move: [Tables, Tables], [Tables], [];
}

/// A storm with a rule switched off, which must fail.
macro_rules! twins {
    ($($name:ident: $rule:literal, $storm:ident;)*) => {
        $(#[test]
        fn $name() {
            mutant($rule, $storm());
        })*
    };
}

twins! {
    r01_mutant: "R01", shadows_are_zapped;
    r03_mutant: "R03", vcpus_alone;
    r05_mutant: "R05", frames_run_out;
    r06_mutant: "R06", vcpus_alone;
    r07_mutant: "R07", the_host_takes_memory_from_vcpus;
    r08_mutant: "R08", slots_change_under_vcpus;
    r09_mutant: "R09", slots_change_under_vcpus;
    r11_mutant: "R11", logs_are_taken;
    r12_mutant: "R12", stores_meet_edits_and_a_log;
    r13_mutant: "R13", logs_are_taken;
    r13_rings_mutant: "R13", rings_are_collected;
    r14_mutant: "R14", stores_meet_edits_and_a_log;
    r15_mutant: "R15", vcpus_alone;
    r16_mutant: "R16", vcpus_share_a_table;
    r17_mutant: "R17", faults_meet_zaps;
    r18_mutant: "R18", frames_run_out;
    r19_mutant: "R19", everything_at_once;
    r20_mutant: "R20", vcpus_alone;
    r21_mutant: "R21", stores_meet_a_log_of_blocks;
    r23_mutant: "R23", vcpus_share_a_table;
    r24_mutant: "R24", vcpus_alone;
    r26_mutant: "R26", the_host_takes_memory_from_vcpus;
    r27_mutant: "R27", slots_change_under_vcpus;
    r28_mutant: "R28", walks_meet_recycling;
    r30_mutant: "R30", devices_come_and_go;
    r31_mutant: "R31", tables_move;
    r33_mutant: "R33", vcpus_share_a_table;
    r34_mutant: "R34", vcpus_alone;
    r35_mutant: "R35", vcpus_alone;
    r36_mutant: "R36", vcpus_alone;
    r37_mutant: "R37", devices_come_and_go;
    r38_mutant: "R38", code_is_patched;
    r39_mutant: "R39", code_is_patched;
}
