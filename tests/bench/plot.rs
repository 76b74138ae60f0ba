//! Plots of result files, as SVG.

use plotters::{
    prelude::{
        BLACK, ChartBuilder, IntoDrawingArea as _, IntoLogRange as _, LineSeries, PathElement, RGBColor,
        SVGBackend, SeriesLabelPosition, WHITE,
    },
    style::Color as _,
};

use crate::{
    markdown::amount,
    result::{ResultFile, Suite, Unit},
    scale, sync,
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

/// A plot over the number of services.
struct Plot {
    name: &'static str,
    title: &'static str,
    measures: &'static [&'static str],
}

/// The plots: of one measure a line for each target, of several a line for each.
const fn plots(suite: Suite) -> &'static [Plot] {
    match suite {
        Suite::Hooks | Suite::Sync | Suite::Packets | Suite::Health => &[],
        Suite::Path => &[
            Plot {
                name: "connection",
                title: "A new TCP connection with one request: median latency",
                measures: &["new connection: latency"],
            },
            Plot {
                name: "change",
                title: "One endpoint is added: until a call reaches it",
                measures: &["programming: one endpoint"],
            },
        ],
        Suite::Scale => &[Plot {
            name: "memory",
            title: "Memory of maps made for that number, and of the agent",
            measures: &[scale::MAPS, sync::MEMORY],
        }],
    }
}

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// All plots of a result with data, by file name.
///
/// # Errors
///
/// If a plot cannot be drawn, which is a fault of this program rather than of the result.
pub(crate) fn suite(result: &ResultFile) -> anyhow::Result<Vec<(String, String)>> {
    let mut pictures = Vec::new();
    for Plot { name, title, measures } in plots(result.suite) {
        let mut lines: Vec<Line> = Vec::new();
        let mut unit = Unit::Nanoseconds;
        for series in measures.iter().flat_map(|measure| result.of(measure)) {
            let Some(n) = series.key.n_services else { continue };
            unit = series.unit;
            let name = if measures.len() > 1 { &series.key.measure } else { &series.key.target };
            let point = (f64::from(n), series.median());
            match lines.iter_mut().find(|line| line.name == *name) {
                Some(line) => line.points.push(point),
                None => lines.push(Line { name: name.clone(), points: vec![point] }),
            }
        }
        if lines.iter().any(|line| line.points.len() > 1) {
            let path = format!("{}-{name}.svg", result.suite.name());
            pictures.push((path, draw(title, unit, &lines)?));
        }
    }
    Ok(pictures)
}

/// The smallest and the largest value.
fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::MIN_POSITIVE), |(low, high), value| (low.min(value), high.max(value)))
}

fn draw(title: &str, unit: Unit, lines: &[Line]) -> anyhow::Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let points = || lines.iter().flat_map(|line| line.points.iter().copied());
        let (left, right) = ends(points().map(|point| point.0));
        let (low, high) = ends(points().map(|point| point.1));
        // The names of the lines are above them, whatever their range.
        let (x, y) = (left / 1.6..right * 1.8, low / 1.6..high * (high / low * 1.6).powf(0.35));
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 17))
            .margin(14)
            .x_label_area_size(44)
            .y_label_area_size(84)
            .build_cartesian_2d(x.log_scale(), y.log_scale())?;
        chart
            .configure_mesh()
            .x_desc("services")
            .x_label_formatter(&|x| amount(Unit::Count, *x))
            .y_label_formatter(&|y| amount(unit, *y))
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
            chart
                .draw_series(
                    LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)).point_size(3),
                )?
                .label(line.name.as_str())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK.mix(0.2))
            .background_style(WHITE.mix(0.85))
            .label_font((FONT, 13))
            .draw()?;
        area.present()?;
    }
    Ok(text)
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
    fn a_plot_of_several_measures_names_them() {
        let all =
            [1, 1000].map(|n| [scale::MAPS, sync::MEMORY].map(|measure| series(measure, "x", n, &[5.0])));
        let pictures = suite(&file(Suite::Scale, all.concat())).unwrap();
        assert!(
            pictures[0].1.contains(scale::MAPS) && pictures[0].1.contains(sync::MEMORY),
            "{}",
            pictures[0].1
        );
    }

    #[test]
    fn nothing_is_no_picture() {
        for of in Suite::ALL {
            assert!(suite(&file(of, Vec::new())).unwrap().is_empty());
        }
    }
}
