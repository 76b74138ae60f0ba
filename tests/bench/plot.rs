//! Plots of result files, as SVG.

use anyhow::anyhow;
use plotters::{
    coord::Shift,
    prelude::{
        BLACK, ChartBuilder, Circle, DrawingArea, IntoDrawingArea as _, IntoLogRange as _, LineSeries,
        PathElement, RGBColor, Rectangle, SVGBackend, SeriesLabelPosition, Text, WHITE,
    },
    style::{Color as _, IntoFont as _},
};

use crate::{
    hooks::Work,
    markdown::amount,
    result::{Key, ResultFile, Series, Suite, Unit},
    scale::{self, calls, calls::Call},
    sync,
};

const SIZE: (u32, u32) = (760, 420);
const FONT: &str = "sans-serif";
/// Distinguishable with colour blindness (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// A plot of lines over the number of services.
struct Lines {
    title: &'static str,
    y: &'static str,
    unit: Unit,
    of: Vec<Line>,
}

/// All plots of a result with data, by file name.
///
/// # Errors
///
/// If a plot cannot be drawn, which is a fault of this program rather than of the result.
pub(crate) fn suite(result: &ResultFile) -> anyhow::Result<Vec<(String, String)>> {
    let mut pictures = Vec::new();
    for (name, lines) in lines_of(result) {
        if lines.of.iter().any(|line| line.points.len() > 1) {
            pictures.push((format!("{}-{name}.svg", result.suite.name()), draw_lines(&lines)?));
        }
    }
    let (name, title, bars) = bars_of(result);
    if !bars.is_empty() {
        pictures.push((format!("{}-{name}.svg", result.suite.name()), draw_bars(title, &bars)?));
    }
    Ok(pictures)
}

fn by_target(result: &ResultFile, measure: &str, quantile: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for series in result.of(measure) {
        let Some(n) = series.key.n_services else { continue };
        let point = (f64::from(n), series.at(quantile));
        match lines.iter_mut().find(|line| line.name == series.key.target) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name: series.key.target.clone(), points: vec![point] }),
        }
    }
    lines
}

/// One line of a measure with its own name.
fn line(result: &ResultFile, measure: &str, quantile: &str, name: &str) -> Option<Line> {
    let mut lines = by_target(result, measure, quantile);
    let found = lines.pop()?;
    lines.is_empty().then(|| Line { name: name.to_owned(), ..found })
}

fn lines_of(result: &ResultFile) -> Vec<(&'static str, Lines)> {
    let ns = Unit::Nanoseconds;
    match result.suite {
        Suite::Hooks | Suite::Sync => Vec::new(),
        Suite::Path => [
            (
                "connection",
                "A new TCP connection with one request",
                "median latency",
                "new connection: latency",
            ),
            ("cpu", "CPU time of a new TCP connection, client and server", "CPU time", "new connection: CPU"),
            (
                "datagram",
                "A UDP request from a fresh socket",
                "median latency",
                "UDP request, fresh socket: latency",
            ),
            (
                "change",
                "One endpoint changes: until it is in force",
                "time of the tool",
                "programming: one endpoint",
            ),
        ]
        .into_iter()
        .map(|(name, title, y, measure)| {
            (name, Lines { title, y, unit: ns, of: by_target(result, measure, "p50") })
        })
        .collect(),
        Suite::Scale => {
            let calls = Call::ALL.iter().map(|call| {
                let floor = result.find(&calls::key(call.name(), 0)).map_or(0.0, Series::median);
                let of = by_target(result, call.name(), "p50").into_iter().next();
                let points = of.map(|line| line.points).unwrap_or_default();
                let points =
                    points.into_iter().map(|(x, y)| (x, y - floor)).filter(|(_, y)| *y > 0.0).collect();
                Line { name: call.name().to_owned(), points }
            });
            let agent = |measure, quantile, name| line(result, measure, quantile, name);
            let memory = [
                agent(scale::MAPS, "p50", "maps made for that number, 10 endpoints each"),
                agent(sync::MEMORY, "p50", "agent without maps, 5 endpoints each"),
            ];
            let latency = [
                agent(sync::ONE_BY_ONE, "p50", "event to map, p50"),
                agent(sync::ONE_BY_ONE, "p99", "event to map, p99"),
                agent(sync::COLD_START, "p50", "cold start"),
            ];
            vec![
                (
                    "calls",
                    Lines {
                        title: "What a call costs",
                        y: "median over the empty program",
                        unit: ns,
                        of: calls.collect(),
                    },
                ),
                (
                    "memory",
                    Lines {
                        title: "Memory",
                        y: "memory",
                        unit: Unit::Mebibytes,
                        of: memory.into_iter().flatten().collect(),
                    },
                ),
                (
                    "agent",
                    Lines {
                        title: "The agent",
                        y: "time",
                        unit: ns,
                        of: latency.into_iter().flatten().collect(),
                    },
                ),
            ]
        }
    }
}

/// Bars with labels: file name, title, names and values in ns.
fn bars_of(result: &ResultFile) -> (&'static str, &'static str, Vec<(String, f64)>) {
    match result.suite {
        Suite::Hooks => {
            let work = Work::FreshHit.title();
            let floor = result.find(&Key::new(work, "empty")).map_or(0.0, Series::median);
            let others =
                result.of(work).filter(|series| !matches!(series.key.target.as_str(), "empty" | "none"));
            let bars = others.map(|series| (series.key.target.clone(), (series.median() - floor).max(0.0)));
            ("cost", "A fresh UDP socket to a service address: median over the empty program", bars.collect())
        }
        Suite::Sync => {
            let mut bars = Vec::new();
            for measure in [sync::UNDER_LOAD, sync::READY, sync::UNREADY] {
                for series in result.of(measure) {
                    for quantile in ["p50", "p99"] {
                        bars.push((format!("{measure}, {quantile}"), series.at(quantile)));
                    }
                }
            }
            ("times", "From the API server's event", bars)
        }
        Suite::Path | Suite::Scale => ("", "", Vec::new()),
    }
}

/// The ends of a logarithmic axis for some values, with space above for labels.
fn ends(values: impl Iterator<Item = f64> + Clone, room: f64) -> (f64, f64) {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(0.0, f64::max);
    (low / 1.6, high * room)
}

fn draw_lines(picture: &Lines) -> anyhow::Result<String> {
    let mut text = String::new();
    {
        let area = canvas(&mut text, picture.title, SIZE.1)?;
        let points = || picture.of.iter().flat_map(|line| line.points.iter().copied());
        let (x0, x1) = ends(points().map(|point| point.0).collect::<Vec<_>>().into_iter(), 1.8);
        let heights: Vec<f64> = points().map(|point| point.1).filter(|y| *y > 0.0).collect();
        // The names of the lines are above them, whatever their range.
        let (low, high) = ends(heights.iter().copied(), 1.0);
        let (y0, y1) = (low, high * (high / low).powf(0.35));
        let mut chart = ChartBuilder::on(&area)
            .margin(14)
            .x_label_area_size(44)
            .y_label_area_size(84)
            .build_cartesian_2d((x0..x1).log_scale(), (y0..y1).log_scale())
            .map_err(undrawn)?;
        chart
            .configure_mesh()
            .x_desc("services")
            .y_desc(picture.y)
            .x_label_formatter(&|x| amount(Unit::Count, *x))
            .y_label_formatter(&|y| amount(picture.unit, *y))
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .draw()
            .map_err(undrawn)?;
        for (line, colour) in picture.of.iter().zip(COLOURS.iter().cycle()) {
            let points: Vec<(f64, f64)> = line.points.iter().copied().filter(|(_, y)| *y > 0.0).collect();
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
                .map_err(undrawn)?
                .label(line.name.as_str())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
            chart
                .draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))
                .map_err(undrawn)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK.mix(0.2))
            .background_style(WHITE.mix(0.85))
            .label_font((FONT, 13))
            .draw()
            .map_err(undrawn)?;
        area.present().map_err(undrawn)?;
    }
    Ok(text)
}

fn draw_bars(title: &str, bars: &[(String, f64)]) -> anyhow::Result<String> {
    const LEFT: i32 = 330;
    const STEP: i32 = 32;
    let mut text = String::new();
    {
        let n = u32::try_from(bars.len()).unwrap_or(u32::MAX);
        let area = canvas(&mut text, title, n.saturating_mul(STEP.unsigned_abs()).saturating_add(60))?;
        let (width, _height) = area.dim_in_pixel();
        let largest = bars.iter().map(|bar| bar.1).fold(f64::MIN_POSITIVE, f64::max);
        let room = f64::from(width) - f64::from(LEFT) - 90.0;
        for ((name, value), index) in bars.iter().zip(0..) {
            let (top, bottom) = (index * STEP + 10, (index + 1) * STEP + 2);
            #[expect(clippy::cast_possible_truncation, reason = "a share of the picture's width")]
            let right = LEFT + (value / largest * room) as i32;
            area.draw(&Rectangle::new([(LEFT, top), (right, bottom)], COLOURS[0].filled()))
                .map_err(undrawn)?;
            let style = (FONT, 13).into_font();
            let middle = i32::midpoint(top, bottom) - 6;
            area.draw(&Text::new(name.clone(), (16, middle), style.clone())).map_err(undrawn)?;
            let label = amount(Unit::Nanoseconds, *value);
            area.draw(&Text::new(label, (right + 6, middle), style)).map_err(undrawn)?;
        }
        area.present().map_err(undrawn)?;
    }
    Ok(text)
}

fn canvas<'a>(
    text: &'a mut String,
    title: &str,
    height: u32,
) -> anyhow::Result<DrawingArea<SVGBackend<'a>, Shift>> {
    let area = SVGBackend::with_string(text, (SIZE.0, height)).into_drawing_area();
    area.fill(&WHITE).map_err(undrawn)?;
    area.titled(title, (FONT, 17)).map_err(undrawn)
}

fn undrawn(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::tests::{file, series};

    #[test]
    fn a_picture_names_its_lines_and_is_the_same_each_time() {
        let all = [1, 1000]
            .iter()
            .flat_map(|n| {
                ["direct", "socklb"].map(|target| series("new connection: latency", target, *n, &[5000.0]))
            })
            .collect();
        let result = file(Suite::Path, all);
        let pictures = suite(&result).unwrap();
        assert_eq!(pictures.len(), 1);
        let (name, text) = &pictures[0];
        assert_eq!(name, "path-connection.svg");
        for part in ["<svg", "socklb", "direct", "A new TCP connection", "services", "</svg>"] {
            assert!(text.contains(part), "{part}");
        }
        assert_eq!(suite(&result).unwrap(), pictures);
    }

    #[test]
    fn nothing_is_no_picture() {
        for of in Suite::ALL {
            assert!(suite(&file(of, Vec::new())).unwrap().is_empty());
        }
    }

    #[test]
    fn bars_of_the_hooks() {
        let mut all = vec![series(Work::FreshHit.title(), "empty", 0, &[100.0])];
        all.push(series(Work::FreshHit.title(), "socklb", 0, &[170.0]));
        for series in &mut all {
            series.key.n_services = None;
        }
        let pictures = suite(&file(Suite::Hooks, all)).unwrap();
        assert!(pictures[0].1.contains("70 ns"), "{}", pictures[0].1);
    }
}
