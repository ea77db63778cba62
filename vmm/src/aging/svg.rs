// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The picture of a [`HeatMap`]: time to the right, addresses upward, colour for the share of resident pages that were
//! accessed.
//!
//! Addresses at which nothing ever was resident are cut out; a line across the picture says where. Text is sized by the
//! viewer's own fonts, so umbra needs none. Cells of one colour that follow each other in time are one rectangle.

use super::heat_map::{Cell, HeatMap};
use super::humane;
use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use std::time::Duration;

const SIZE: (u32, u32) = (1100, 700);
/// For the legend, right of the chart.
const LEGEND: u32 = 150;
/// Colours from "none accessed" to "all accessed": ten samples of matplotlib's inferno, which was made to stay ordered in
/// grey and for the colour-blind (CC0).
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 0, 4),
    RGBColor(27, 12, 65),
    RGBColor(74, 12, 107),
    RGBColor(120, 28, 109),
    RGBColor(165, 44, 96),
    RGBColor(207, 68, 70),
    RGBColor(237, 105, 37),
    RGBColor(251, 155, 6),
    RGBColor(247, 209, 61),
    RGBColor(252, 255, 164),
];
/// Nothing is resident.
const ABSENT: RGBColor = RGBColor(225, 225, 225);
const CUT: RGBColor = RGBColor(90, 160, 220);

/// The colour of a cell: 0 only for "none", the last only for "all".
fn level(cell: &Cell) -> usize {
    let last = COLOURS.len() as u64 - 1;
    match cell.young * last / cell.present.max(1) {
        0 if cell.young > 0 => 1,
        level => level.min(last) as usize,
    }
}

/// Stretches of time, by row: (row, level, from, to), neighbours of one level joined.
fn stretches(map: &HeatMap) -> Vec<(usize, usize, Duration, Duration)> {
    let rows: Vec<u64> = map.rows().collect();
    let mut open: Vec<Option<(usize, Duration, Duration)>> = vec![None; rows.len()];
    let mut done = Vec::new();
    for column in map.columns() {
        for cell in &column.cells {
            let Ok(row) = rows.binary_search(&cell.bin) else { continue };
            let level = level(cell);
            match &mut open[row] {
                Some((same, _, to)) if *same == level && *to == column.from => *to = column.to,
                other => {
                    if let Some((level, from, to)) = other.replace((level, column.from, column.to)) {
                        done.push((row, level, from, to));
                    }
                }
            }
        }
    }
    let rest = open.into_iter().enumerate();
    done.extend(rest.filter_map(|(row, open)| open.map(|(level, from, to)| (row, level, from, to))));
    done
}

/// The picture, as the text of an SVG file. `every`: the interval between passes that was asked for.
///
/// # Errors
/// No sample was taken.
pub fn draw(map: &HeatMap, every: Duration) -> Result<String> {
    let mut svg = String::new();
    draw_into(&mut svg, map, every)?;
    Ok(svg)
}

fn draw_into(svg: &mut String, map: &HeatMap, every: Duration) -> Result<()> {
    let rows: Vec<u64> = map.rows().collect();
    let (Some(first), Some(last), Some(column)) = (rows.first(), rows.last(), map.columns().last()) else {
        anyhow::bail!("nothing was resident at any aging pass, so there is nothing to draw");
    };
    ensure!(!column.to.is_zero(), "no time has passed, so there is nothing to draw");
    let address = |bin: u64| bin.saturating_mul(map.bin_bytes());
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (chart, legend) = root.split_horizontally(SIZE.0 - LEGEND);
    let title = format!(
        "umbra heat map: {:x}-{:x}, {:.3} s, sampled each {}",
        address(*first),
        address(*last + 1),
        column.to.as_secs_f64(),
        humane(every.as_secs_f64())
    );
    let mut chart = ChartBuilder::on(&chart)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(130)
        .build_cartesian_2d(0.0..column.to.as_secs_f64(), 0.0..rows.len() as f64)
        .context("cannot lay out the chart")?;
    chart.plotting_area().fill(&ABSENT)?;
    let of_row = |row: &f64| {
        let row = row.round() as usize;
        // The last label stands at the end of the last row.
        let bin = rows.get(row).copied().unwrap_or(*last + 1);
        format!("{:x}", address(bin))
    };
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("seconds since the guest started")
        .y_desc("address (what never was resident is cut out)")
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 14))
        .y_labels(16)
        .y_label_formatter(&of_row)
        .draw()?;
    chart.draw_series(stretches(map).into_iter().map(|(row, level, from, to)| {
        let corners = [(from.as_secs_f64(), row as f64), (to.as_secs_f64(), (row + 1) as f64)];
        Rectangle::new(corners, COLOURS[level].filled())
    }))?;
    let end = column.to.as_secs_f64();
    let cuts = rows.windows(2).enumerate().filter(|(_, pair)| pair[1] != pair[0] + 1);
    chart.draw_series(
        cuts.map(|(row, _)| PathElement::new([(0.0, (row + 1) as f64), (end, (row + 1) as f64)], CUT)),
    )?;
    let text = ("sans-serif", 13).into_font();
    let line = |at: i32, words: String| Text::new(words, (0, at), text.clone());
    legend.draw(&line(40, "resident pages".into()))?;
    legend.draw(&line(56, "that were accessed".into()))?;
    let keys = (0..COLOURS.len()).rev().map(|level| {
        let what = match level {
            0 => "none".to_owned(),
            9 => "all".to_owned(),
            1 => "less than 2/9".to_owned(),
            _ => format!("{level}/9 or more"),
        };
        (COLOURS[level], what)
    });
    for (n, (colour, what)) in
        keys.chain([(ABSENT, "nothing resident".into()), (CUT, "cut".into())]).enumerate()
    {
        let at = 80 + 22 * n as i32;
        legend.draw(&Rectangle::new([(0, at), (16, at + 16)], colour.filled()))?;
        legend.draw(&Text::new(what, (24, at + 2), text.clone()))?;
    }
    let at = 80 + 22 * (COLOURS.len() as i32 + 2) + 10;
    legend.draw(&line(at, format!("a row: {} KiB", map.bin_bytes() >> 10)))?;
    root.present().context("cannot finish the drawing")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;

    #[test]
    fn only_all_is_the_hottest_colour_and_only_none_the_coldest() {
        let level = |young| level(&Cell { bin: 0, young, present: 1000 });
        assert_eq!([0, 1, 111, 222, 223, 999, 1000].map(level), [0, 1, 1, 1, 2, 8, 9]);
    }

    #[test]
    fn an_empty_map_is_an_error_in_words() {
        let error = draw(&HeatMap::default(), Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("nothing was resident"), "{error}");
    }
}
