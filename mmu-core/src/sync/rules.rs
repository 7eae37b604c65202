// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Switches for the twins of the models: a twin turns one rule of `docs/protocols.md` off and must
//! fail. They exist in model builds only; elsewhere the rules are compiled in.

use std::cell::RefCell;

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
