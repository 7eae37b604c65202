// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many walks at once.

use super::access::Access;
use super::fault::Fault;
use super::mode::PagingMode;
use super::walk::Walk;
use crate::addr::Gva;
use crate::memory::{Hint, MemoryMap};

impl PagingMode {
    /// Walks for each address, and calls `each` with its position and what
    /// [`walk`](Self::walk) would have returned, in order.
    pub fn walk_batch(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gvas: &[Gva],
        access: Access,
        mut each: impl FnMut(usize, Result<Walk, Fault>),
    ) {
        for (i, gva) in gvas.iter().enumerate() {
            each(i, self.walk(map, hint, *gva, access));
        }
    }
}
