// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Plots of what was measured: every sample of every variant, beside each other.

use crate::figure::{Figure, Found, Goal, Outcome};
use crate::measure::Samples;
use crate::report::number;
use crate::stats::median;
use plotters::prelude::*;
use std::path::{Path, PathBuf};

/// Any failure to draw or to write.
pub type Error = Box<dyn std::error::Error>;

/// Writes the plots beside the JSON: `NAME-goals.svg` with every figure that has a goal, and
/// `NAME-ROW.svg` for each row with the samples. Returns the files.
pub fn write(json: &Path, rows: &[(&'static str, Found)]) -> Result<Vec<PathBuf>, Error> {
    let name = json.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut files = Vec::new();
    let goals: Vec<&Figure> = rows
        .iter()
        .flat_map(|(_, found)| &found.outcomes)
        .filter_map(|outcome| match outcome {
            Outcome::Figure(figure) if figure.goal.is_some() => Some(&**figure),
            _ => None,
        })
        .collect();
    if !goals.is_empty() {
        let file = json.with_file_name(format!("{name}-goals.svg"));
        draw_goals(&file, &goals)?;
        files.push(file);
    }
    for (id, found) in rows {
        if !found.plots.is_empty() {
            let file = json.with_file_name(format!("{name}-{id}.svg"));
            draw_samples(&file, &found.plots)?;
            files.push(file);
        }
    }
    Ok(files)
}

/// How far from its goal each figure is: 1 is the goal, to the left of it is better.
fn draw_goals(file: &Path, figures: &[&Figure]) -> Result<(), Error> {
    let badness = |figure: &Figure, value: f64| match figure.goal {
        Some(Goal::AtMost(goal)) => value / goal,
        Some(Goal::AtLeast(goal)) => goal / value,
        None => 1.0,
    };
    let worst = figures.iter().map(|f| badness(f, f.estimate.high).max(badness(f, f.estimate.low)));
    let right = worst.fold(1.2, f64::max) * 1.05;
    let height = 60 + 30 * figures.len() as u32;
    let root = SVGBackend::new(file, (720, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let rows = figures.len() as f64;
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .caption("figure over goal (below 1 is met)", ("sans-serif", 16))
        .x_label_area_size(25)
        .build_cartesian_2d(-0.25 * right..right, 0.0..rows)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_label_formatter(&|x| if *x < 0.0 { String::new() } else { format!("{x:.1}") })
        .draw()?;
    chart.draw_series([PathElement::new(vec![(1.0, 0.0), (1.0, rows)], BLACK)])?;
    for (n, figure) in figures.iter().enumerate() {
        let y = rows - n as f64 - 0.5;
        let color = match figure.met() {
            Some(true) => GREEN.mix(0.8),
            Some(false) => RED.mix(0.8),
            None => BLUE.mix(0.8),
        };
        let ends = [figure.estimate.low, figure.estimate.high].map(|v| (badness(figure, v), y));
        let middle = (badness(figure, figure.estimate.value), y);
        chart.draw_series([PathElement::new(ends.to_vec(), color.stroke_width(3))])?;
        chart.draw_series([Circle::new(middle, 4, color.filled())])?;
        let label = format!("{} {}", figure.id, number(figure.estimate.value));
        let at = (-0.24 * right, y + 0.2);
        chart.draw_series([Text::new(label, at, ("sans-serif", 14))])?;
    }
    root.present()?;
    Ok(())
}

/// Each plot is a strip: one column a variant, one dot a sample, a bar at the median.
fn draw_samples(file: &Path, plots: &[(&'static str, &'static str, Samples)]) -> Result<(), Error> {
    let root = SVGBackend::new(file, (720, 300 * plots.len() as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (title, unit, samples)) in root.split_evenly((plots.len(), 1)).iter().zip(plots) {
        let variants: Vec<_> = samples.iter().collect();
        let all = || variants.iter().flat_map(|(_, of)| of.iter().copied());
        let low = all().fold(f64::MAX, f64::min).max(1e-3);
        let high = all().fold(low, f64::max);
        let title = format!("{title} ({unit})");
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .caption(title, ("sans-serif", 16))
            .x_label_area_size(10)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..variants.len() as f64, (low / 1.5..high * 1.2).log_scale())?;
        chart.configure_mesh().disable_x_mesh().x_labels(0).draw()?;
        for (n, (name, of)) in variants.iter().enumerate() {
            let left = n as f64;
            let place = |i: usize| left + 0.15 + 0.7 * i as f64 / of.len() as f64;
            let dots = of.iter().enumerate();
            chart.draw_series(dots.map(|(i, v)| Circle::new((place(i), *v), 2, BLUE.mix(0.5))))?;
            let middle = median(of);
            let bar = vec![(left + 0.1, middle), (left + 0.9, middle)];
            chart.draw_series([PathElement::new(bar, RED.stroke_width(2))])?;
            let label = format!("{name} {}", number(middle));
            chart.draw_series([Text::new(label, (left + 0.1, low / 1.2), ("sans-serif", 13))])?;
        }
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_lie_beside_the_json() {
        let samples = Samples::from([("a", vec![1.8, 2.0]), ("b", vec![1.0, 1.0])]);
        let figure = Figure::cost("W1", "walk", &samples, ["a", "b"]).unwrap();
        let mut found = Found::default();
        found.figure(figure.goal(Goal::AtMost(2.0)));
        found.plots.push(("W1", "ns", samples));
        let dir = std::env::temp_dir().join(format!("benches-plot-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let files = write(&dir.join("out.json"), &[("W1", found)]).unwrap();
        assert_eq!(files, [dir.join("out-goals.svg"), dir.join("out-W1.svg")]);
        for file in files {
            let svg = std::fs::read_to_string(file).unwrap();
            assert!(svg.contains("<svg") && svg.contains("W1"));
        }
        std::fs::remove_dir_all(dir).unwrap();
    }
}
