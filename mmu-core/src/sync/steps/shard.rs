// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hashes with which every key is in the same shard of the concurrent map: what may wait for a shard's
//! lock does, whatever the number of shards.

use std::hash::{BuildHasher, DefaultHasher, Hasher};

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hashing;

/// The bits by which dashmap chooses a shard: below the seven of hashbrown's tags.
const SHARD: u64 = 0x1_ffff << 40;

pub(crate) struct SameShard(DefaultHasher);

impl BuildHasher for Hashing {
    type Hasher = SameShard;

    fn build_hasher(&self) -> SameShard {
        SameShard(DefaultHasher::new())
    }
}

impl Hasher for SameShard {
    fn finish(&self) -> u64 {
        self.0.finish() & !SHARD
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }
}
