// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an access costs on a bus of so many devices, and a registration and its removal; beside a
//! `RwLock<BTreeMap>` with `Arc`s that are cloned for the access, which is what VMMs have otherwise.
//!
//! ```sh
//! cargo run --release -p mmu-core --example bus
//! ```

use mmu_core::mmio::{Bus, Device, Initiator, Space};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::{Arc, Barrier, RwLock};
use std::time::{Duration, Instant};

/// Bytes from one device to the next.
const STRIDE: u64 = 0x1000;
const ACCESSES: u64 = 50_000;
const ROUNDS: usize = 41;

struct Nothing;

impl Device for Nothing {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {}
}

type Tree = RwLock<BTreeMap<u64, (u64, Arc<dyn Device>)>>;

fn read_tree(tree: &Tree, address: u64, data: &mut [u8]) -> bool {
    let found = {
        let tree = tree.read().expect("nobody panics");
        let last = tree.range(..=address).next_back();
        last.filter(|(base, (size, _))| address - **base + data.len() as u64 <= *size)
            .map(|(base, (_, device))| (*base, Arc::clone(device)))
    };
    found.inspect(|(base, device)| device.read(*base, address - base, data)).is_some()
}

/// Random devices of `devices`.
struct Addresses {
    state: u64,
    devices: u64,
}

impl Addresses {
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        ((u128::from(self.state) * u128::from(self.devices)) >> 64) as u64 * STRIDE
    }
}

/// Nanoseconds an access, by the slowest of the threads that make them.
fn accesses<F: FnMut(u64) + Send>(devices: u64, threads: Vec<F>) -> f64 {
    let begin = Barrier::new(threads.len());
    let slowest = std::thread::scope(|s| {
        let one = |(seed, mut access): (usize, F)| {
            let begin = &begin;
            s.spawn(move || {
                let mut addresses = Addresses { state: seed as u64 + 1, devices };
                begin.wait();
                let time = Instant::now();
                (0..ACCESSES).for_each(|_| access(addresses.next()));
                time.elapsed()
            })
        };
        let threads: Vec<_> = threads.into_iter().enumerate().map(one).collect();
        threads.into_iter().map(|t| t.join().expect("nobody panics")).max()
    });
    slowest.map_or(0.0, |time| time.as_nanos() as f64 / ACCESSES as f64)
}

fn median(mut one: impl FnMut() -> f64) -> f64 {
    let mut all: Vec<f64> = (0..ROUNDS).map(|_| one()).collect();
    all.sort_by(f64::total_cmp);
    all[ROUNDS / 2]
}

fn main() {
    println!("devices  access: bus  tree  of 2 threads: bus  tree (ns)   add, remove (µs)");
    for devices in [1u64, 16, 256, 4096, 16384] {
        let bus = Bus::new(Space::Mmio, Arc::default());
        let tree = Tree::default();
        let device: Arc<dyn Device> = Arc::new(Nothing);
        for n in 0..devices {
            bus.register(n * STRIDE, 0x100, Arc::clone(&device)).expect("no overlap");
            let mut tree = tree.write().expect("nobody panics");
            tree.insert(n * STRIDE, (0x100, Arc::clone(&device)));
        }
        let on_bus = |_| {
            let mut cpu: Initiator = bus.initiator();
            move |address| assert!(black_box(cpu.read(address, &mut [0; 4])))
        };
        let in_tree = |_| |address| assert!(black_box(read_tree(&tree, address, &mut [0; 4])));
        let figures = [1, 2].map(|threads| {
            let on_bus = median(|| accesses(devices, (0..threads).map(on_bus).collect()));
            let in_tree = median(|| accesses(devices, (0..threads).map(in_tree).collect()));
            (on_bus, in_tree)
        });
        let change = median(|| {
            let (begin, mut changes) = (Instant::now(), 0u32);
            while begin.elapsed() < Duration::from_millis(2) {
                bus.register(STRIDE / 2, 8, Arc::clone(&device)).expect("no overlap");
                drop(bus.remove(STRIDE / 2).expect("it is there"));
                changes += 2;
            }
            begin.elapsed().as_nanos() as f64 / 1000.0 / f64::from(changes)
        });
        let [(one, one_tree), (two, two_tree)] = figures;
        println!("{devices:7} {one:12.1} {one_tree:5.1} {two:18.1} {two_tree:5.1} {change:18.1}");
    }
}
