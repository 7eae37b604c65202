// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table for people, and the JSON.

use crate::figure::{Better, Figure, Goal, Outcome};
use serde_json::{Map, Value, json};

/// Lines of the table for the outcomes of one row. What was measured side by side stands below the
/// last of the figures that come from it.
pub fn text(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for (n, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Outcome::Skipped { id, reason } => {
                text.push_str(&format!("{id:<14} skipped: {reason}\n"));
            }
            Outcome::Figure(figure) => {
                text.push_str(&figure_text(figure));
                let same = |next: &Outcome| matches!(next, Outcome::Figure(next) if next.columns == figure.columns);
                if !outcomes.get(n + 1).is_some_and(same) {
                    text.push_str(&columns_text(figure));
                }
            }
        }
    }
    text
}

/// The head of the table.
pub fn head() -> String {
    let columns = format!(
        "{:<14} {:<52} {:>10} {:>15}  {:<7} {}\n",
        "id", "figure", "median", "95 % interval", "goal", ""
    );
    let rule = "-".repeat(columns.trim_end().len() + 10);
    format!("{columns}{rule}\n")
}

fn figure_text(figure: &Figure) -> String {
    let Figure { id, what, estimate, unit, .. } = figure;
    let (goal, verdict) = match (figure.goal, figure.met()) {
        (None, _) => (String::new(), "reported"),
        (Some(goal), met) => {
            let goal = match goal {
                Goal::AtMost(goal) => format!("≤ {goal}"),
                Goal::AtLeast(goal) => format!("≥ {goal}"),
            };
            let verdict = match met {
                Some(true) => "met",
                Some(false) => "MISSED",
                None => "undecided",
            };
            (goal, verdict)
        }
    };
    let unit = if *unit == "ratio" { "" } else { unit };
    let value = format!("{} {unit}", number(estimate.value));
    let interval = format!("[{}, {}]", number(estimate.low), number(estimate.high));
    format!("{id:<14} {what:<52} {:>10} {interval:>15}  {goal:<7} {verdict}\n", value.trim())
}

fn columns_text(figure: &Figure) -> String {
    let columns: Vec<_> = figure
        .columns
        .iter()
        .map(|(name, value)| format!("{name}: {} {}", number(*value), figure.column_unit))
        .collect();
    format!("{:<14} {}\n", "", columns.join("   "))
}

/// Three digits that matter.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// The JSON of one outcome.
pub fn value(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Skipped { id, reason } => json!({ "id": id, "skipped": reason }),
        Outcome::Figure(figure) => figure_value(figure),
    }
}

fn figure_value(figure: &Figure) -> Value {
    let goal = figure.goal.map(|goal| match goal {
        Goal::AtMost(goal) | Goal::AtLeast(goal) => goal,
    });
    let better = match figure.better {
        Better::Lower => "lower",
        Better::Higher => "higher",
    };
    let mut details: Map<String, Value> = figure.details.clone();
    details.insert("figure".to_string(), json!(figure.what));
    json!({
        "id": figure.id,
        "value": figure.estimate.value,
        "unit": figure.unit,
        "low": figure.estimate.low,
        "high": figure.estimate.high,
        "goal": goal,
        "better": better,
        "met": figure.met(),
        "details": details,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Samples;

    #[test]
    fn the_json_is_the_contracts() {
        let samples = Samples::from([("a", vec![1.8; 9]), ("b", vec![1.0; 9])]);
        let figure = Figure::cost("W1", "walk", &samples, ["a", "b"]).unwrap();
        let reported = Outcome::Figure(Box::new(figure.clone()));
        let found = value(&reported);
        assert_eq!((&found["goal"], &found["met"]), (&Value::Null, &Value::Null));
        let found = value(&Outcome::Figure(Box::new(figure.goal(Goal::AtMost(2.0)))));
        let expected = json!({"id": "W1", "value": 1.8, "unit": "ratio", "low": 1.8, "high": 1.8,
            "goal": 2.0, "better": "lower", "met": true, "details": {"figure": "walk",
            "pairs": 9, "spread": 0.0, "ratio": ["a", "b"], "medians": {"a": 1.8, "b": 1.0}}});
        assert_eq!(found, expected);
        let skipped = Outcome::Skipped { id: "W5", reason: "no /dev/kvm".into() };
        assert_eq!(value(&skipped), json!({"id": "W5", "skipped": "no /dev/kvm"}));
    }

    #[test]
    fn numbers_have_three_digits() {
        let shown = [0.123, 1.234, 56.78, 1234.5].map(number);
        assert_eq!(shown, ["0.12", "1.23", "56.8", "1234"]);
    }
}
