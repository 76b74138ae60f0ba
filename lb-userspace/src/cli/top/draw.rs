//! Drawing the table on a terminal.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Cell, Row, Table},
};

use super::{
    model::{HEADER, Report, Sort, endpoint_cells, port_cells},
    view::{KEYS, View},
};

/// Draws a report with the user's choices. `problem` is the current error.
pub(super) fn draw(frame: &mut Frame<'_>, report: &Report, view: &View, problem: Option<&str>) {
    let [head, note, table, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Line::from(summary(report, view)).bold(), head);
    frame.render_widget(remark(report, view, problem), note);
    draw_table(frame, table, report, view);
    frame.render_widget(Line::from(KEYS).dim(), keys);
}

fn summary(report: &Report, view: &View) -> String {
    let rate = |of: fn(&super::model::PortRow) -> Option<f64>| {
        let rates: Vec<f64> = report.services.iter().filter_map(of).collect();
        if rates.is_empty() { "-".to_owned() } else { format!("{:.1}", rates.iter().sum::<f64>()) }
    };
    format!(
        "{}  {} ports  {} calls/s  {} refused/s{}",
        report.time,
        report.services.len(),
        rate(|row| row.calls_per_second),
        rate(|row| row.refused_per_second),
        if view.is_paused { "  PAUSED" } else { "" }
    )
}

/// The second line: an error, the filter while it is typed, or hints.
fn remark(report: &Report, view: &View, problem: Option<&str>) -> Line<'static> {
    if view.is_typing {
        return Line::from(format!("filter: {}_", view.filter));
    }
    if let Some(problem) = problem {
        return Line::from(problem.to_owned()).red();
    }
    let mut parts = Vec::new();
    if !view.filter.is_empty() {
        parts.push(format!("filter: {} (Esc clears it)", view.filter));
    }
    if !report.sockets_complete {
        parts.push("sockets cannot be listed: CAP_PERFMON or the kernel's BTF is missing".to_owned());
    }
    Line::from(parts.join("; "))
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, report: &Report, view: &View) {
    let sorted_by = match view.sort {
        Sort::Name => 0,
        Sort::Calls => 2,
        Sort::Rate => 3,
        Sort::Refused => 4,
        Sort::Sockets => 5,
    };
    let is_wide = area.width >= WIDE;
    let [columns @ .., _health] = HEADER;
    let header = on_screen(columns, is_wide).enumerate().map(|(column, name)| {
        let style = if column == sorted_by { Modifier::REVERSED } else { Modifier::BOLD };
        aligned(column, Span::styled(name, Style::new().add_modifier(style)))
    });
    let mut lines: Vec<Row<'_>> = Vec::new();
    for row in &report.services {
        let is_refusing = row.refused_per_second.is_some_and(|rate| rate > 0.0);
        let cells = on_screen(narrow(port_cells(row)), is_wide).enumerate().map(|(column, text)| {
            let text = Span::raw(text);
            let is_bad = (is_refusing && column == 4) || (row.ejected > 0 && column == 0);
            aligned(column, if is_bad { text.red() } else { text })
        });
        lines.push(Row::new(cells));
        if view.has_endpoints {
            lines.extend(row.endpoints.iter().map(|endpoint| {
                let cells = on_screen(narrow(endpoint_cells(endpoint)), is_wide).enumerate();
                let row = Row::new(cells.map(|(column, text)| aligned(column, Span::raw(text))));
                if endpoint.health.ejected_seconds.is_some() { row.red() } else { row.dim() }
            }));
        }
    }
    // The last line stays visible, however far the user scrolls.
    let first = view.scrolled.min(lines.len().saturating_sub(1));
    let table = Table::new(lines.drain(first..), on_screen(WIDTHS, is_wide))
        .column_spacing(1)
        .header(Row::new(header));
    frame.render_widget(table, area);
}

/// The columns but HEALTH.
const WIDTHS: [Constraint; HEADER.len() - 1] = [
    Constraint::Fill(3),
    Constraint::Fill(2),
    Constraint::Length(10),
    Constraint::Length(9),
    Constraint::Length(9),
    Constraint::Length(7),
    Constraint::Length(6),
    Constraint::Length(5),
    Constraint::Length(7),
];

/// Width of a terminal that has room for ACTIVE and SHARE.
const WIDE: u16 = 120;

/// The values of the columns that are shown.
fn on_screen<T>(columns: [T; HEADER.len() - 1], is_wide: bool) -> impl Iterator<Item = T> {
    let columns = columns.into_iter().zip(HEADER);
    columns.filter(move |(_, name)| is_wide || !["ACTIVE", "SHARE"].contains(name)).map(|(value, _)| value)
}

/// A terminal has no room for a column that is mostly empty: the health follows the name.
fn narrow([name, cells @ .., health]: [String; HEADER.len()]) -> [String; HEADER.len() - 1] {
    let name = if health.is_empty() { name } else { format!("{name}, {health}") };
    let mut cells = cells.into_iter();
    std::array::from_fn(|column| if column == 0 { name.clone() } else { cells.next().unwrap_or_default() })
}

/// Names are aligned left, numbers right.
fn aligned(column: usize, text: Span<'_>) -> Cell<'_> {
    let alignment = if column < 2 { Alignment::Left } else { Alignment::Right };
    Cell::from(Line::from(text).alignment(alignment))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use lb_core::model::Protocol;
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::cli::{
        listing::HealthPart,
        top::model::{EndpointRow, PortRow},
    };

    fn report() -> Report {
        let row = |name: &str, last: u8, calls, rate, refused: f64| PortRow {
            namespace: "default".into(),
            name: name.into(),
            port_name: "http".into(),
            protocol: Protocol::Tcp,
            address: [10, 96, 0, last].into(),
            port: 80,
            calls,
            calls_per_second: Some(rate),
            refused: 40,
            refused_per_second: Some(refused),
            sockets: Some(u64::from(last)),
            active: (calls > 0).then_some(u64::from(last)),
            ejected: 1,
            endpoints: (0..2)
                .map(|n| EndpointRow {
                    address: [10, 244, n, last].into(),
                    port: 8080,
                    node: format!("node-{n}"),
                    calls: calls / 2,
                    calls_per_second: Some(rate / 2.0),
                    sockets: None,
                    active: Some(u32::from(last) / 2),
                    share: 255 >> n,
                    health: HealthPart {
                        failures: Some(3 * u32::from(n)),
                        ejected_seconds: (n == 1).then_some(7),
                        ejected_reason: (n == 1).then(|| "ejected for 7 s: 3 failures in a row".into()),
                        ejections: n.into(),
                        connect_microseconds: (n == 0).then_some(1250),
                    },
                })
                .collect(),
        };
        let mut idle = row("idle", 90, 0, 0.0, 2.5);
        idle.endpoints.clear();
        idle.ejected = 0;
        Report {
            time: "2026-01-02 03:04:05".into(),
            seconds: Some(1.0),
            sockets_complete: true,
            services: vec![row("web", 80, 1_234_567, 321.0, 0.0), idle],
        }
    }

    #[track_caller]
    fn shows(report: &Report, view: &View, problem: Option<&str>, expected: &Expect) {
        shows_on(100, report, view, problem, expected);
    }

    #[track_caller]
    fn shows_on(width: u16, report: &Report, view: &View, problem: Option<&str>, expected: &Expect) {
        let mut terminal = Terminal::new(TestBackend::new(width, 9)).unwrap();
        terminal.draw(|frame| draw(frame, report, view, problem)).unwrap();
        let text = terminal.backend().to_string();
        let lines = text.lines().flat_map(|line| [line.trim_matches('"').trim_end(), "\n"]);
        expected.assert_eq(&lines.collect::<String>());
    }

    fn view() -> View {
        View::new(Sort::Rate, "", true)
    }

    #[test]
    fn services_with_their_endpoints() {
        shows(
            &report(),
            &view(),
            None,
            &expect![[r"
                2026-01-02 03:04:05  2 ports  321.0 calls/s  2.5 refused/s

                SERVICE                         ADDRESS                    CALLS   CALLS/S   REFUSED SOCKETS CONNECT
                default/web:http, 1 ejected     10.96.0.80:80/tcp        1234567     321.0        40      80
                  node-0                        10.244.0.80:8080          617283     160.5                 -   1.2ms
                  node-1, ejected for 7 s: 3 fa 10.244.1.80:8080          617283     160.5                 -       -
                default/idle:http               10.96.0.90:80/tcp              0       0.0        40      90

                q quit  sort: n name c calls r rate x refused o sockets  / filter  e endpoints  space pause
            "]],
        );
    }

    #[test]
    fn a_wide_terminal_has_room_for_load() {
        shows_on(
            WIDE,
            &report(),
            &view(),
            None,
            &expect![[r"
            2026-01-02 03:04:05  2 ports  321.0 calls/s  2.5 refused/s

            SERVICE                             ADDRESS                       CALLS   CALLS/S   REFUSED SOCKETS ACTIVE SHARE CONNECT
            default/web:http, 1 ejected         10.96.0.80:80/tcp           1234567     321.0        40      80     80
              node-0                            10.244.0.80:8080             617283     160.5                 -     40   255   1.2ms
              node-1, ejected for 7 s: 3 failur 10.244.1.80:8080             617283     160.5                 -     40   127       -
            default/idle:http                   10.96.0.90:80/tcp                 0       0.0        40      90      -

            q quit  sort: n name c calls r rate x refused o sockets  / filter  e endpoints  space pause
        "]],
        );
    }

    #[test]
    fn services_alone_and_paused() {
        let view = View { has_endpoints: false, is_paused: true, ..view() };
        shows(
            &report(),
            &view,
            None,
            &expect![[r"
                2026-01-02 03:04:05  2 ports  321.0 calls/s  2.5 refused/s  PAUSED

                SERVICE                         ADDRESS                    CALLS   CALLS/S   REFUSED SOCKETS CONNECT
                default/web:http, 1 ejected     10.96.0.80:80/tcp        1234567     321.0        40      80
                default/idle:http               10.96.0.90:80/tcp              0       0.0        40      90



                q quit  sort: n name c calls r rate x refused o sockets  / filter  e endpoints  space pause
            "]],
        );
    }

    #[test]
    fn a_filter_that_is_typed_and_one_that_is_kept() {
        let view = View { filter: "web".into(), is_typing: true, ..view() };
        let report = Report { sockets_complete: false, services: Vec::new(), ..report() };
        shows(
            &report,
            &view,
            None,
            &expect![[r"
                2026-01-02 03:04:05  0 ports  - calls/s  - refused/s
                filter: web_
                SERVICE                         ADDRESS                    CALLS   CALLS/S   REFUSED SOCKETS CONNECT





                q quit  sort: n name c calls r rate x refused o sockets  / filter  e endpoints  space pause
            "]],
        );
        let view = View { is_typing: false, ..view };
        shows(
            &report,
            &view,
            None,
            &expect![[r"
                2026-01-02 03:04:05  0 ports  - calls/s  - refused/s
                filter: web (Esc clears it); sockets cannot be listed: CAP_PERFMON or the kernel's BTF is missing
                SERVICE                         ADDRESS                    CALLS   CALLS/S   REFUSED SOCKETS CONNECT





                q quit  sort: n name c calls r rate x refused o sockets  / filter  e endpoints  space pause
            "]],
        );
    }

    #[test]
    fn a_problem_and_a_table_scrolled_beyond_its_end() {
        let view = View { scrolled: 100, ..view() };
        shows(
            &report(),
            &view,
            Some("nothing is pinned"),
            &expect![[r"
                2026-01-02 03:04:05  2 ports  321.0 calls/s  2.5 refused/s
                nothing is pinned
                SERVICE                         ADDRESS                    CALLS   CALLS/S   REFUSED SOCKETS CONNECT
                default/idle:http               10.96.0.90:80/tcp              0       0.0        40      90




                q quit  sort: n name c calls r rate x refused o sockets  / filter  e endpoints  space pause
            "]],
        );
    }

    #[test]
    fn any_size_is_drawn() {
        for (width, height) in [(1, 1), (3, 2), (20, 5), (500, 200)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &report(), &view(), None)).unwrap();
        }
    }
}
