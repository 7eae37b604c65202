// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this host's KVM can do.
//!
//! Guarantee: opens `/dev/kvm`, asks, closes; creates no VM.

use std::collections::BTreeMap;
use std::io;

use kvm_bindings as kb;
use kvm_ioctls::Kvm;

use super::KvmError;

/// The device.
const PATH: &str = "/dev/kvm";

/// The capabilities asked for: name, number, whether this backend needs it.
const CAPS: &[(&str, u32, bool)] = &[
    ("user_memory", kb::KVM_CAP_USER_MEMORY, true),
    ("sync_regs", kb::KVM_CAP_SYNC_REGS, true),
    ("immediate_exit", kb::KVM_CAP_IMMEDIATE_EXIT, true),
    ("readonly_mem", kb::KVM_CAP_READONLY_MEM, false),
    ("dirty_ring", kb::KVM_CAP_DIRTY_LOG_RING, false),
    ("dirty_ring_acq_rel", kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL, false),
    ("manual_dirty_log_protect", kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, false),
    ("memory_fault_info", kb::KVM_CAP_MEMORY_FAULT_INFO, false),
    ("user_memory2", kb::KVM_CAP_USER_MEMORY2, false),
    ("nr_memslots", kb::KVM_CAP_NR_MEMSLOTS, false),
    ("max_vcpus", kb::KVM_CAP_MAX_VCPUS, false),
];

/// What this host's KVM can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Probe {
    /// KVM's answer for each capability: 0 is no, else yes or a number.
    pub capabilities: BTreeMap<&'static str, i32>,
}

impl Probe {
    /// The answer for one capability; 0 if it is unknown.
    #[must_use]
    pub fn get(&self, name: &str) -> i32 {
        self.capabilities.get(name).copied().unwrap_or(0)
    }

    /// Whether a [`KvmMachine`](super::KvmMachine) can be made.
    ///
    /// # Errors
    ///
    /// [`KvmError::MissingCapability`] names the first that is missing.
    pub fn check(&self) -> Result<(), KvmError> {
        for &(name, _, needed) in CAPS {
            if needed && self.get(name) == 0 {
                return Err(KvmError::MissingCapability(name));
            }
        }
        // x86 answers with the set of register groups: general, special, events.
        if self.get("sync_regs") & 3 != 3 {
            return Err(KvmError::MissingCapability("sync_regs of general and special registers"));
        }
        Ok(())
    }
}

pub(super) fn open() -> Result<Kvm, KvmError> {
    let kvm =
        Kvm::new().map_err(|error| KvmError::Unavailable { path: PATH, error: error.into() })?;
    let version = kvm.get_api_version();
    if version != 12 {
        let error = io::Error::other(format!("API version {version}, not 12"));
        return Err(KvmError::Unavailable { path: PATH, error });
    }
    Ok(kvm)
}

pub(super) fn ask(kvm: &Kvm) -> Probe {
    let capabilities = CAPS
        .iter()
        .map(|&(name, cap, _)| (name, kvm.check_extension_raw(cap.into()).max(0)))
        .collect();
    Probe { capabilities }
}

/// Asks this host's KVM what it can do.
///
/// # Errors
///
/// [`KvmError::Unavailable`] if it cannot be opened. A missing capability is no error here: see
/// [`Probe::check`].
pub fn probe() -> Result<Probe, KvmError> {
    Ok(ask(&open()?))
}
