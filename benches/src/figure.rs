// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a row yields: figures with their goals, or why it could not run.

use crate::measure::{Effort, Samples};
use crate::stats::{Estimate, median, spread};
use serde_json::{Map, Value, json};

/// A bench that is broken, or whose result was found wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failure(String);

impl Failure {
    /// With a message for people.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    /// What went wrong while doing something.
    pub fn in_step<E: core::fmt::Display>(step: &str) -> impl FnOnce(E) -> Self + '_ {
        move |error| Self(format!("{step}: {error}"))
    }
}

/// Fails unless two values are the same.
pub fn check_eq<T: PartialEq + core::fmt::Debug>(
    what: &str,
    found: T,
    expected: T,
) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    Err(Failure(format!("{what}: {found:?}, expected {expected:?}")))
}

/// Which side of a goal is good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Smaller values.
    Lower,
    /// Larger values.
    Higher,
}

/// One figure of one row.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Its id: the row's, or the row's with a suffix.
    pub id: &'static str,
    /// What it says, for people.
    pub what: &'static str,
    /// Median and interval.
    pub estimate: Estimate,
    /// `ratio`, `ns`, `bytes`.
    pub unit: &'static str,
    /// What is wanted, if something is.
    pub goal: Option<Goal>,
    /// Which way is better.
    pub better: Better,
    /// What was measured side by side: name and median, in `column_unit`.
    pub columns: Vec<(&'static str, f64)>,
    /// Unit of the columns.
    pub column_unit: &'static str,
    /// More for the JSON.
    pub details: Map<String, Value>,
}

impl Figure {
    fn new(
        id: &'static str,
        what: &'static str,
        samples: &[f64],
        unit: &'static str,
    ) -> Result<Self, Failure> {
        let estimate =
            Estimate::of(samples).ok_or_else(|| Failure(format!("{id}: nothing was measured")))?;
        if ![estimate.value, estimate.low, estimate.high].iter().all(|v| v.is_finite()) {
            return Err(Failure(format!("{id}: {estimate:?} is no figure")));
        }
        let details = [("pairs", json!(samples.len())), ("spread", json!(spread(samples)))];
        Ok(Self {
            id,
            what,
            estimate,
            unit,
            goal: None,
            better: Better::Lower,
            columns: Vec::new(),
            column_unit: "ns",
            details: details.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
        })
    }

    /// How many times what `base` costs `subject` costs; smaller is better.
    pub fn cost(
        id: &'static str,
        what: &'static str,
        samples: &Samples,
        [subject, base]: [&'static str; 2],
    ) -> Result<Self, Failure> {
        let figure = Self::new(id, what, &samples.ratios(subject, base)?, "ratio")?;
        figure.detail("ratio", json!([subject, base])).beside(samples)
    }

    /// How many times the throughput of `base` that of `subject` is; larger is better.
    pub fn throughput(
        id: &'static str,
        what: &'static str,
        samples: &Samples,
        [subject, base]: [&'static str; 2],
    ) -> Result<Self, Failure> {
        let figure = Self::new(id, what, &samples.ratios(base, subject)?, "ratio")?;
        let figure = figure.detail("ratio", json!([subject, base])).beside(samples)?;
        Ok(Self { better: Better::Higher, ..figure })
    }

    /// Something by itself; smaller is better.
    pub fn plain(
        id: &'static str,
        what: &'static str,
        samples: &Samples,
        subject: &'static str,
        unit: &'static str,
    ) -> Result<Self, Failure> {
        let mut figure = Self::new(id, what, samples.of(subject)?, unit)?.beside(samples)?;
        figure.column_unit = unit;
        Ok(figure)
    }

    fn beside(mut self, samples: &Samples) -> Result<Self, Failure> {
        self.columns = samples.iter().map(|(name, of)| (name, median(of))).collect();
        let medians: Map<_, _> =
            self.columns.iter().map(|(name, value)| ((*name).to_string(), json!(value))).collect();
        Ok(self.detail("medians", Value::Object(medians)))
    }

    /// With a goal.
    pub fn goal(self, goal: Goal) -> Self {
        let better = match goal {
            Goal::AtMost(_) => Better::Lower,
            Goal::AtLeast(_) => Better::Higher,
        };
        Self { goal: Some(goal), better, ..self }
    }

    /// With one more thing to know.
    pub fn detail(mut self, key: &str, value: Value) -> Self {
        self.details.insert(key.to_string(), value);
        self
    }

    /// Whether the goal is met; `None` without a goal, or if the interval holds it.
    pub fn met(&self) -> Option<bool> {
        let Estimate { low, high, .. } = self.estimate;
        match self.goal? {
            Goal::AtMost(goal) if high <= goal => Some(true),
            Goal::AtMost(goal) if low > goal => Some(false),
            Goal::AtLeast(goal) if low >= goal => Some(true),
            Goal::AtLeast(goal) if high < goal => Some(false),
            _ => None,
        }
    }
}

/// What a row yields for one id.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// A figure.
    Figure(Box<Figure>),
    /// It cannot run here.
    Skipped {
        /// The figure's id.
        id: &'static str,
        /// Why.
        reason: String,
    },
}

impl Outcome {
    /// The id it belongs to.
    pub fn id(&self) -> &'static str {
        match self {
            Self::Figure(figure) => figure.id,
            Self::Skipped { id, .. } => id,
        }
    }
}

/// What a row found: its figures, and the samples they come from.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The figures.
    pub outcomes: Vec<Outcome>,
    /// What was measured, with a title and the unit, for the plots.
    pub plots: Vec<(&'static str, &'static str, Samples)>,
}

impl Found {
    /// One more figure.
    pub fn figure(&mut self, figure: Figure) {
        self.outcomes.push(Outcome::Figure(Box::new(figure)));
    }

    /// What another part of the row has found.
    pub fn append(&mut self, mut other: Self) {
        self.outcomes.append(&mut other.outcomes);
        self.plots.append(&mut other.plots);
    }
}

/// A row of the table: one workload.
pub trait Row {
    /// Its id.
    fn id(&self) -> &'static str;

    /// The ids of its figures.
    fn figures(&self) -> &'static [&'static str];

    /// Measures.
    ///
    /// # Errors
    ///
    /// The bench is broken, or the engine gave a wrong result.
    fn run(&self, effort: &Effort) -> Result<Found, Failure>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_within_the_interval_is_undecided() {
        let samples = Samples::from([("a", vec![1.8, 1.9, 2.0]), ("b", vec![1.0, 1.0, 1.0])]);
        let met = |goal| Figure::cost("X", "", &samples, ["a", "b"]).unwrap().goal(goal).met();
        assert_eq!(met(Goal::AtMost(2.0)), Some(true));
        assert_eq!(met(Goal::AtMost(1.9)), None);
        assert_eq!(met(Goal::AtMost(1.79)), Some(false));
        assert_eq!(met(Goal::AtLeast(1.8)), Some(true));
        assert_eq!(met(Goal::AtLeast(1.85)), None);
        assert_eq!(met(Goal::AtLeast(2.1)), Some(false));
        let figure = Figure::throughput("X", "", &samples, ["b", "a"]).unwrap();
        assert_eq!((figure.met(), figure.better), (None, Better::Higher));
        assert_eq!(figure.estimate.value, 1.9);
        assert!(Figure::cost("X", "", &samples, ["a", "c"]).is_err());
    }
}
