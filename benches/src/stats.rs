// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Medians, their confidence intervals, and a histogram of latencies.

/// A median with the interval that holds the true one with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The median of the samples.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Estimate {
    /// Of samples in any order; `None` without samples.
    ///
    /// The interval lies between two order statistics. Each sample is below the true median with
    /// probability one half, whatever the distribution, so how many are is binomial; the interval
    /// leaves out as many samples at each end as 2.5 % allow. With fewer than six samples even
    /// the whole range holds the median with less than 95 %; it is what is given then.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let skip = left_out(sorted.len());
        let (low, high) = (sorted.get(skip)?, sorted.get(sorted.len() - 1 - skip)?);
        Some(Self { value: middle(&sorted), low: *low, high: *high })
    }
}

/// The median of samples in any order; 0 without samples.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    middle(&sorted)
}

/// Half the distance between the quartiles, as a share of the median: how noisy the samples are.
pub fn spread(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (n, middle) = (sorted.len(), middle(&sorted));
    if n < 4 || middle == 0.0 {
        return 0.0;
    }
    (sorted[n * 3 / 4] - sorted[n / 4]) / 2.0 / middle
}

fn middle(sorted: &[f64]) -> f64 {
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, half) if n % 2 == 1 => sorted[half],
        (_, half) => (sorted[half - 1] + sorted[half]) / 2.0,
    }
}

/// How many of `n` sorted samples to leave out at each end: the most for which throwing no more heads
/// than that in `n` throws of a coin has a probability of at most 2.5 %.
fn left_out(n: usize) -> usize {
    // Larger samples would underflow, and none is near.
    let n = n.min(1000);
    let mut probability = 0.5f64.powi(n as i32);
    let mut sum = 0.0;
    for heads in 0..n {
        sum += probability;
        if sum > 0.025 {
            return heads.saturating_sub(1);
        }
        probability *= (n - heads) as f64 / (heads + 1) as f64;
    }
    0
}

/// log2 of the buckets between two powers of two.
const FINE: u32 = 4;

/// Counts of durations, in buckets that are 6 % wide.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: Box<[u32]>,
    count: u64,
}

impl Histogram {
    /// Nothing counted.
    pub fn new() -> Self {
        Self { buckets: vec![0; 64 << FINE].into(), count: 0 }
    }

    /// Counts one duration.
    #[inline]
    pub fn add(&mut self, ticks: u64) {
        self.buckets[Self::bucket(ticks)] += 1;
        self.count += 1;
    }

    /// The duration that this share of all does not exceed, at the upper end of its bucket; 0 if
    /// nothing was counted.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (self.count as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= wanted {
                return Self::upper(bucket);
            }
        }
        0
    }

    #[inline]
    fn bucket(ticks: u64) -> usize {
        let top = (u64::BITS - 1).saturating_sub(ticks.leading_zeros());
        if top < FINE {
            return ticks as usize;
        }
        let fine = (ticks >> (top - FINE)) as usize & ((1 << FINE) - 1);
        ((top - FINE + 1) << FINE) as usize + fine
    }

    fn upper(bucket: usize) -> u64 {
        let (row, fine) = (bucket >> FINE, (bucket & ((1 << FINE) - 1)) as u64);
        if row == 0 {
            return fine;
        }
        let shift = row as u32 - 1;
        (((1 << FINE) + fine) << shift) + ((1 << shift) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_the_textbooks() {
        // Order statistics of a 95 % interval for the median, counted from 1, as tabulated (for
        // instance Conover, Practical Nonparametric Statistics, table A3).
        for (n, first) in [(6, 1), (9, 2), (10, 2), (15, 4), (20, 6), (30, 10), (50, 18), (100, 40)]
        {
            assert_eq!(left_out(n) + 1, first, "{n} samples");
        }
        for n in [0, 1, 2, 5] {
            assert_eq!(left_out(n), 0, "{n} samples");
        }
        assert!(left_out(5000) < 2500);
    }

    #[test]
    fn estimates_take_samples_in_any_order() {
        let samples: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        let estimate = Estimate::of(&samples).unwrap();
        assert_eq!(estimate, Estimate { value: 10.5, low: 6.0, high: 15.0 });
        assert_eq!(Estimate::of(&[3.0]).unwrap(), Estimate { value: 3.0, low: 3.0, high: 3.0 });
        assert_eq!(Estimate::of(&[]), None);
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[])), (2.0, 0.0));
        assert_eq!(spread(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), 2.0 / 4.5);
        assert_eq!(spread(&[1.0]), 0.0);
    }

    #[test]
    fn the_interval_holds_the_median_in_19_of_20_cases() {
        // A skewed distribution with median ln 2, from a fixed sequence.
        let mut x = 0x2545_f491_4f6c_dd1du64;
        let mut hits = 0;
        for _ in 0..2000 {
            let samples: Vec<f64> = (0..21)
                .map(|_| {
                    x = crate::guest::xorshift(x);
                    -(((x >> 11) + 1) as f64 / (1u64 << 53) as f64).ln()
                })
                .collect();
            let Estimate { low, high, .. } = Estimate::of(&samples).unwrap();
            hits += u32::from((low..=high).contains(&core::f64::consts::LN_2));
        }
        assert!((1890..1990).contains(&hits), "{hits} of 2000");
    }

    #[test]
    fn quantiles_are_within_a_bucket() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(0.5), 0);
        for ticks in 1..=10_000 {
            histogram.add(ticks);
        }
        for (share, exact) in [(0.5, 5000.0), (0.999, 9990.0), (1.0, 10_000.0)] {
            let found = histogram.quantile(share) as f64;
            assert!(found >= exact && found <= exact * 1.07, "{share}: {found}");
        }
        for ticks in [0, 1, 15, 16, 17, 31, 32, 1 << 40, u64::MAX] {
            let bucket = Histogram::bucket(ticks);
            assert!(bucket < 64 << FINE && Histogram::upper(bucket) >= ticks);
            assert!(bucket == 0 || Histogram::upper(bucket - 1) < ticks);
        }
    }
}
