// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `core`'s atomics with a step before each operation.
#![allow(missing_docs)]

use super::point;
use core::sync::atomic::Ordering;

macro_rules! atomic {
    ($name:ident $(<$t:ident>)?, $value:ty, { $($also:item)* }) => {
        #[derive(Debug)]
        #[repr(transparent)]
        pub struct $name $(<$t>)? (core::sync::atomic::$name $(<$t>)?);

        impl $(<$t>)? $name $(<$t>)? {
            pub const fn new(value: $value) -> Self {
                Self(core::sync::atomic::$name::new(value))
            }

            #[track_caller]
            pub fn load(&self, order: Ordering) -> $value {
                point();
                self.0.load(order)
            }

            #[track_caller]
            pub fn store(&self, value: $value, order: Ordering) {
                point();
                self.0.store(value, order);
            }

            #[track_caller]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                point();
                self.0.swap(value, order)
            }

            #[track_caller]
            pub fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                point();
                self.0.compare_exchange(old, new, success, failure)
            }

            #[track_caller]
            #[allow(dead_code)]
            pub fn compare_exchange_weak(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                point();
                self.0.compare_exchange_weak(old, new, success, failure)
            }

            /// A step for the load and one for each exchange.
            #[track_caller]
            #[allow(dead_code)]
            pub fn fetch_update(
                &self,
                success: Ordering,
                failure: Ordering,
                mut next: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut old = self.load(failure);
                while let Some(new) = next(old) {
                    match self.compare_exchange_weak(old, new, success, failure) {
                        Ok(_) => return Ok(old),
                        Err(now) => old = now,
                    }
                }
                Err(old)
            }

            $($also)*
        }
    };
}

macro_rules! fetch {
    ($value:ty: $($name:ident)*) => {
        $(
            #[track_caller]
            #[allow(dead_code)]
            pub fn $name(&self, operand: $value, order: Ordering) -> $value {
                point();
                self.0.$name(operand, order)
            }
        )*
    };
}

macro_rules! integer {
    ($name:ident, $value:ty) => {
        atomic!($name, $value, {});

        impl $name {
            fetch!($value: fetch_add fetch_sub fetch_and fetch_or fetch_max);
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new(0)
            }
        }
    };
}

integer!(AtomicU32, u32);
integer!(AtomicU64, u64);
atomic!(AtomicBool, bool, {});
atomic!(AtomicPtr<T>, *mut T, {});

impl AtomicBool {
    fetch!(bool: fetch_or);
}

impl Default for AtomicBool {
    fn default() -> Self {
        Self::new(false)
    }
}

#[track_caller]
pub fn fence(order: Ordering) {
    point();
    core::sync::atomic::fence(order);
}
