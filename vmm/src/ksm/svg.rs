// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The picture of a [`SharingReport`]: memory saved over time, and below it what became of the pages, merged or why not.
//!
//! Text is sized by the viewer's own fonts, so umbra needs none.

use super::history::History;
use super::mib;
use super::report::SharingReport;
use anyhow::{Context, Result, ensure};
use plotters::prelude::*;

const SIZE: (u32, u32) = (1000, 620);
/// For the bar and its legend.
const BAR: u32 = 190;
/// Okabe and Ito's colours, which the colour-blind can tell apart; of a [`SharingReport`], by fate.
pub(crate) const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(170, 170, 170),
    RGBColor(0, 0, 0),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
];

/// The picture, as the text of an SVG file.
///
/// # Errors
/// Nothing was sampled.
pub fn draw(report: &SharingReport, history: &History) -> Result<String> {
    let mut svg = String::new();
    draw_into(&mut svg, report, history)?;
    Ok(svg)
}

fn draw_into(svg: &mut String, report: &SharingReport, history: &History) -> Result<()> {
    let samples = history.samples();
    let last = samples.last().map_or(0.0, |sample| sample.at.as_secs_f64());
    ensure!(last > 0.0, "no time has passed, so there is nothing to draw");
    let most = samples.iter().map(|sample| sample.saved).max().unwrap_or(0);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (chart, bar) = root.split_vertically(SIZE.1 - BAR);
    let title =
        format!("umbra page sharing: {:.1} MiB saved at most, {} guests", mib(most), report.guests.len());
    let mut chart = ChartBuilder::on(&chart)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(70)
        // Room above the highest, and a scale where nothing was saved.
        .build_cartesian_2d(0.0..last, 0.0..(mib(most) * 1.05).max(0.1))
        .context("cannot lay out the chart")?;
    chart
        .configure_mesh()
        .x_desc("seconds since umbra started")
        .y_desc("MiB saved")
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 14))
        .draw()?;
    let points = || samples.iter().map(|sample| (sample.at.as_secs_f64(), mib(sample.saved)));
    let first = samples.first().map_or(0.0, |sample| sample.at.as_secs_f64());
    let area = [(first, 0.0)].into_iter().chain(points()).chain([(last, 0.0)]);
    chart.draw_series([Polygon::new(area.collect::<Vec<_>>(), COLOURS[0].mix(0.25).filled())])?;
    chart.draw_series([PathElement::new(points().collect::<Vec<_>>(), COLOURS[0].stroke_width(2))])?;

    let fates = report.fates();
    let text = ("sans-serif", 14).into_font();
    let heading = format!("what became of {} pages, {:.1} s after the start", fates.pages, report.stats.at_s);
    bar.draw(&Text::new(heading, (70, 8), text.clone()))?;
    let (left, width) = (70.0, f64::from(SIZE.0) - 90.0);
    let all = fates.pages.max(1) as f64;
    let mut from = left;
    for (n, ((name, pages), colour)) in fates.parts().into_iter().zip(COLOURS).enumerate() {
        let to = from + width * pages as f64 / all;
        bar.draw(&Rectangle::new([(from as i32, 32), (to as i32, 72)], colour.filled()))?;
        from = to;
        let (column, row) = (n as i32 % 4, n as i32 / 4);
        let (x, y) = (70 + 225 * column, 92 + 30 * row);
        bar.draw(&Rectangle::new([(x, y), (x + 16, y + 16)], colour.filled()))?;
        bar.draw(&Text::new(format!("{name}: {pages}"), (x + 24, y + 1), text.clone()))?;
    }
    root.present().context("cannot finish the drawing")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::super::history::Sample;
    use super::super::report::{Besides, SharingStats};
    use super::*;
    use shadow_mmu::ksm::KsmStats;
    use std::time::Duration;

    #[test]
    fn a_picture_has_the_saving_and_every_fate_and_needs_time_to_have_passed() {
        let none = KsmStats::default();
        let stats = SharingStats::new(1.0, &none, &none, Besides::default());
        let report = SharingReport { report: "ksm", stats, guests: Vec::new() };
        let mut history = History::default();
        assert!(draw(&report, &history).unwrap_err().to_string().contains("no time"));
        for (n, saved) in [(0, 0), (1, 512), (2, 256)] {
            history.add(Sample { at: Duration::from_secs(n), saved });
        }
        let svg = draw(&report, &history).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        assert!(svg.contains("2.0 MiB saved at most"), "{svg}");
        for (name, _) in report.fates().parts() {
            assert!(svg.contains(&format!("{name}: 0")), "{name}");
        }
    }
}
