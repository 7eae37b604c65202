// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The storms, and the rules that they cannot do without.
#![cfg(shuttle)]

use shuttle_tests::Change::{Blocks, Frames, Host, Log, Map};
use shuttle_tests::{Storm, mutant, storm};

macro_rules! storms {
    ($($name:ident: $vcpus:literal, [$($change:ident),*];)*) => {
        $(
            const fn $name() -> Storm {
                let name = concat!("storms::", stringify!($name));
                Storm { name, vcpus: $vcpus, changes: &[$($change),*] }
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

storms! {
    vcpus_alone: 3, [];
    slots_change_under_vcpus: 2, [Map];
    the_host_takes_memory_from_vcpus: 2, [Host, Map];
    frames_run_out: 3, [Frames];
    blocks_are_broken_by_a_log: 2, [Blocks];
    logs_are_taken: 2, [Log];
    logs_are_taken_while_frames_run_out: 2, [Log, Frames];
    everything_at_once: 2, [Map, Host, Frames, Blocks, Log];
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
    r03_mutant: "R03", vcpus_alone;
    r05_mutant: "R05", frames_run_out;
    r06_mutant: "R06", vcpus_alone;
    r07_mutant: "R07", the_host_takes_memory_from_vcpus;
    r08_mutant: "R08", slots_change_under_vcpus;
    r09_mutant: "R09", slots_change_under_vcpus;
    r11_mutant: "R11", logs_are_taken;
    r13_mutant: "R13", logs_are_taken;
    r15_mutant: "R15", vcpus_alone;
    r18_mutant: "R18", frames_run_out;
    r19_mutant: "R19", everything_at_once;
    r20_mutant: "R20", vcpus_alone;
    r24_mutant: "R24", vcpus_alone;
    r26_mutant: "R26", the_host_takes_memory_from_vcpus;
    r27_mutant: "R27", slots_change_under_vcpus;
    r34_mutant: "R34", vcpus_alone;
    r35_mutant: "R35", vcpus_alone;
    r36_mutant: "R36", vcpus_alone;
}
