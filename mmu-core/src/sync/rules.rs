// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Switches for the twins of the models: a twin turns one rule of `docs/protocols.md` off and must
//! fail. They exist in model builds only; elsewhere the rules are compiled in.

use std::cell::RefCell;

/// The rules that have a switch.
pub const ALL: [&str; 39] = [
    "R01", "R02", "R03", "R04", "R05", "R06", "R07", "R08", "R09", "R10", "R11", "R12", "R13",
    "R14", "R15", "R16", "R17", "R18", "R19", "R20", "R21", "R22", "R23", "R24", "R25", "R26",
    "R27", "R28", "R29", "R30", "R31", "R32", "R33", "R34", "R35", "R36", "R37", "R38", "R39",
];

std::thread_local! {
    // A checker runs all threads of a model on the thread that called it, so this is per model.
    static OFF: RefCell<Option<&'static str>> = const { RefCell::new(None) };
}

/// Runs `model` with `rule` (for instance `"R05"`) switched off.
pub fn without(rule: &'static str, model: impl FnOnce()) {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            OFF.with(|off| *off.borrow_mut() = None);
        }
    }
    let _restore = Restore;
    OFF.with(|off| *off.borrow_mut() = Some(rule));
    model();
}

/// Whether `rule` is in force.
#[must_use]
pub fn in_force(rule: &str) -> bool {
    OFF.with(|off| *off.borrow() != Some(rule))
}

/// Whether a rule of this name is among [`ALL`]; for `rule!`, which does not compile with another.
pub(crate) const fn has_switch(name: &str) -> bool {
    let (mut next, name) = (0, name.as_bytes());
    while next < ALL.len() {
        let known = ALL[next].as_bytes();
        if let ([b'R', a, b], [b'R', c, d]) = (known, name) {
            if *a == *c && *b == *d {
                return true;
            }
        }
        next += 1;
    }
    false
}
