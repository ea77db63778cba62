// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The picture of a comparison: two bars a figure, umbra's and the kernel's, as long as their medians.
//!
//! The figures have different units, so each pair has a scale of its own: the longer bar is as long as the chart is wide, and
//! the number is written behind each. Text is sized by the viewer's own fonts, so umbra needs none.

use crate::bench::{Report, Row};
use crate::ksm::svg::COLOURS;
use anyhow::{Context, Result, ensure};
use plotters::prelude::*;

const WIDTH: u32 = 1000;
/// Of a pair of bars, with its name above.
const PAIR: i32 = 64;
const BAR: i32 = 18;
/// Above the first pair: title and legend.
const HEAD: i32 = 70;
const LEFT: i32 = 20;
/// The longest bar; the rest of the width is for numbers.
const LONGEST: f64 = 760.0;
/// Who, in which colour: two that are easily told apart.
const SIDES: [(&str, RGBColor); 2] = [("umbra", COLOURS[0]), ("ksmd", COLOURS[6])];

/// A figure and each side's median, if it was measured.
type Pair<'a> = (&'a str, &'a str, [Option<f64>; 2]);

fn pairs(rows: &[Row]) -> Vec<Pair<'_>> {
    let mut pairs: Vec<Pair<'_>> = Vec::new();
    for row in rows {
        let Some((side, figure)) = row.name.split_once('.') else { continue };
        let Some(at) = SIDES.iter().position(|(name, _)| *name == side) else { continue };
        match pairs.iter_mut().find(|(name, ..)| *name == figure) {
            Some((.., medians)) => medians[at] = Some(row.median),
            None => {
                let mut medians = [None; 2];
                medians[at] = Some(row.median);
                pairs.push((figure, &row.unit, medians));
            }
        }
    }
    pairs
}

/// How long a bar is, in pixels.
fn length(median: f64, medians: &[Option<f64>]) -> i32 {
    let longest = medians.iter().flatten().fold(f64::MIN_POSITIVE, |longest, median| longest.max(*median));
    (median / longest * LONGEST) as i32
}

/// Four significant digits or so, whatever the unit.
fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        large if large >= 1000.0 => format!("{value:.0}"),
        middle if middle >= 1.0 => format!("{value:.2}"),
        small if small >= 1e-3 => format!("{value:.5}"),
        _ => format!("{value:.2e}"),
    }
}

/// The picture, as the text of an SVG file.
///
/// # Errors
/// Nothing was measured.
pub fn draw_ksm(report: &Report) -> Result<String> {
    let pairs = pairs(&report.rows);
    ensure!(!pairs.is_empty(), "nothing was measured that two sides have, so there is nothing to draw");
    let mut svg = String::new();
    draw_into(&mut svg, report, &pairs)?;
    Ok(svg)
}

fn draw_into(svg: &mut String, report: &Report, pairs: &[Pair<'_>]) -> Result<()> {
    let height = HEAD as u32 + PAIR as u32 * pairs.len() as u32 + 10;
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font();
    let title = format!("umbra bench {}: {}, Linux {}", report.bench, report.host.cpu, report.host.kernel);
    root.draw(&Text::new(title, (LEFT, 12), text(18)))?;
    for (at, (name, colour)) in (0..).zip(SIDES) {
        let left = LEFT + 120 * at;
        root.draw(&Rectangle::new([(left, 42), (left + 14, 56)], colour.filled()))?;
        root.draw(&Text::new(name, (left + 20, 42), text(14)))?;
    }
    for (at, (name, unit, medians)) in (0..).zip(pairs) {
        let top = HEAD + PAIR * at;
        root.draw(&Text::new(format!("{name}, {unit}"), (LEFT, top), text(14)))?;
        for (bar, ((_, colour), median)) in (0..).zip(SIDES.iter().zip(medians)) {
            let top = top + 18 + (BAR + 2) * bar;
            let (right, words) = match median {
                Some(median) => (LEFT + length(*median, medians), figure(*median)),
                None => (LEFT, "not measured".to_owned()),
            };
            root.draw(&Rectangle::new([(LEFT, top), (right.max(LEFT + 1), top + BAR)], colour.filled()))?;
            root.draw(&Text::new(words, (right + 6, top + 3), text(13)))?;
        }
    }
    root.present().context("cannot finish the drawing")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use crate::bench::Host;

    fn report(rows: &[(&str, f64)]) -> Report {
        let host = Host {
            engine: Some(crate::engine::EngineKind::Kvm),
            kvm_backend: "x".into(),
            kernel: "6".into(),
            cpu: "<&>".into(),
            cpus: 2,
        };
        let rows = rows.iter().map(|(name, value)| Row::of(name, "s", vec![*value])).collect();
        let (ratios, missing, notes, lines) = Default::default();
        Report { bench: "ksm".into(), host, rows, ratios, missing, notes, lines }
    }

    #[test]
    fn the_longer_bar_of_a_pair_is_as_long_as_can_be() {
        let medians = [Some(2.0), Some(8.0)];
        assert_eq!(length(8.0, &medians), LONGEST as i32);
        assert_eq!(length(2.0, &medians), LONGEST as i32 / 4);
        assert_eq!(length(0.0, &[Some(0.0), None]), 0);
        assert_eq!(
            [0.0, 335_544_320.0, 9.867, 0.0605, 1e-5].map(figure),
            ["0", "335544320", "9.87", "0.06050", "1.00e-5"]
        );
    }

    #[test]
    fn each_figure_has_both_sides() {
        let report =
            report(&[("umbra.a", 1.0), ("umbra.b", 2.0), ("ksmd.b", 4.0), ("other.b", 9.0), ("c", 1.0)]);
        let expected: [Pair<'_>; 2] = [("a", "s", [Some(1.0), None]), ("b", "s", [Some(2.0), Some(4.0)])];
        assert_eq!(pairs(&report.rows), expected);
        let svg = draw_ksm(&report).unwrap();
        // What a host calls itself is text, not tags.
        assert!(svg.contains("&lt;&amp;&gt;") && !svg.contains("<&>"), "{svg}");
        assert_eq!(svg.matches("not measured").count(), 1, "{svg}");
    }

    #[test]
    fn nothing_is_an_error_in_words() {
        assert!(draw_ksm(&report(&[])).unwrap_err().to_string().contains("nothing was measured"));
    }
}
