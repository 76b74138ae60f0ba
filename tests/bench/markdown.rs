//! Tables of result files: for the terminal and, between marks, for documents.

use std::fmt::Write as _;

use crate::{
    calls, health, hooks, packets,
    path::{
        behind,
        client::{By, Work},
    },
    quantile::{paired_difference, paired_ratio, real},
    result::{ResultFile, Series, Suite, Unit},
    scale, sync,
};

/// A table with a name that documents refer to.
pub(crate) struct Section {
    pub(crate) name: &'static str,
    pub(crate) text: String,
}

/// A part of the key of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dimension {
    Measure,
    Target,
    Services,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    /// The median, and the p99 if there are many samples.
    Value,
    /// The same with the median's difference from that of the empty program.
    OverEmpty,
    /// socklb relative to the target, block by block: the median ratio and its 95 % interval.
    Ratio,
    /// What `sock_ops` costs: over the product without passive health, or the empty programs without
    /// `sock_ops`, block by block: the median difference and its 95 % interval.
    OverOff,
    /// Over another target, block by block: the median difference and its 95 % interval.
    Over(&'static str),
}

/// What a table shows: these measures, with one dimension as columns and the others as rows.
struct Table {
    name: &'static str,
    columns: Dimension,
    cell: Cell,
    /// Only the largest number of services.
    is_largest: bool,
    measures: Vec<String>,
}

/// The tables of a suite.
fn tables(suite: Suite) -> Vec<Table> {
    use Dimension::{Measure, Services, Target};
    match suite {
        Suite::Hooks => {
            let measures = hooks::KINDS.map(|(measure, ..)| measure);
            let health = hooks::HEALTH_KINDS.map(|(measure, ..)| measure);
            vec![
                Table { cell: Cell::OverEmpty, ..table("cost", Measure, &measures) },
                Table { cell: Cell::OverOff, ..table("health", Target, &health) },
            ]
        }
        Suite::Sync => {
            let mut memory = vec![sync::IDLE, "CPU while many change"];
            memory.extend([sync::MEMORY, "memory after changes: resident without BPF maps"]);
            memory.push("memory after start: peak");
            vec![
                table(
                    "times",
                    Target,
                    &[
                        "process start to maps that exist",
                        sync::COLD_START,
                        "CPU time of a start",
                        sync::UNDER_LOAD,
                        sync::ONE_BY_ONE,
                        sync::READY,
                        sync::UNREADY,
                        sync::MOVED,
                    ],
                ),
                table("agent", Target, &memory),
                Table { measures: sync::octets::measures().collect(), ..table("octets", Target, &[]) },
            ]
        }
        Suite::Path => path(),
        Suite::Scale => {
            let mut measures = scale::KINDS.map(|(measure, ..)| measure).to_vec();
            measures.push(calls::PROGRAM_TIME);
            vec![
                Table { cell: Cell::OverEmpty, ..table("calls", Measure, &measures) },
                table("memory", Measure, &[scale::MAPS]),
                table("agent", Measure, &[sync::ONE_BY_ONE, sync::COLD_START, sync::MEMORY]),
            ]
        }
        Suite::Packets => vec![table("costs", Services, &packets::MEASURES)],
        Suite::Health => {
            vec![Table { measures: health::measures().collect(), ..table("times", Target, &[]) }]
        }
    }
}

fn table(name: &'static str, columns: Dimension, measures: &[&str]) -> Table {
    Table {
        name,
        columns,
        cell: Cell::Value,
        is_largest: false,
        measures: measures.iter().map(|&measure| measure.to_owned()).collect(),
    }
}

fn path() -> Vec<Table> {
    use Dimension::Target;
    let costs = [
        "new connection: latency",
        "new connection: connect()",
        "new connection: CPU",
        "keep-alive request: latency",
    ];
    let summary = [
        costs[0],
        costs[2],
        costs[3],
        "programming: one endpoint",
        "programming: everything",
        "new connection: conntrack entries",
    ];
    let behind = |name, kinds: &[String], whats: &[&str], cell| {
        let of = |kind: &String| whats.iter().map(|what| format!("{kind}: {what}")).collect::<Vec<_>>();
        let measures = kinds.iter().flat_map(of).collect();
        Table { cell, measures, ..table(name, Target, &[]) }
    };
    let titles = |kinds: Vec<(Work, By, String)>, work| -> Vec<String> {
        kinds.into_iter().filter(|(of, ..)| *of == work).map(|(.., title)| title).collect()
    };
    let outside = |work| titles(behind::outside().collect(), work);
    let pod: Vec<String> = behind::pod().map(|(.., title)| title).collect();
    vec![
        Table { is_largest: true, ..table("summary", Target, &summary) },
        Table { cell: Cell::Ratio, ..table("claims", Target, &costs) },
        behind("outside-claims", &outside(Work::Connection), &["connect()", "rate"], Cell::Ratio),
        behind(
            "outside-connections",
            &outside(Work::Connection),
            &["connect()", "latency", "rate"],
            Cell::Value,
        ),
        behind("outside-requests", &outside(Work::KeepAlive), &["latency"], Cell::Value),
        table("outside-programming", Target, &[behind::PROGRAMMING]),
        behind("pod", &pod, &["latency", "connect()", "conntrack entries"], Cell::Value),
        behind("pod-claims", &pod, &["latency", "CPU"], Cell::Over(behind::PACKETS_OFF)),
        table(
            "latency",
            Target,
            &[
                costs[0],
                costs[1],
                costs[3],
                "UDP request, fresh socket: latency",
                "UDP request, one connected socket: latency",
                "UDP request, one unconnected socket: latency",
            ],
        ),
        table("cpu", Target, &[costs[2], "keep-alive request: CPU", "stream: CPU per MiB"]),
        table(
            "programming",
            Target,
            &[
                "programming: everything",
                "programming: one endpoint",
                "programming: one endpoint removed",
                "memory: resident without BPF maps",
            ],
        ),
        table(
            "packets",
            Target,
            &[
                "new connection: conntrack entries",
                "keep-alive request: packets",
                "keep-alive request: packets tracked",
                "keep-alive request: BPF program runs",
            ],
        ),
    ]
}

/// All tables of a result, as one text.
pub(crate) fn suite(result: &ResultFile) -> String {
    let mut text = format!("# {}\n", result.suite.name());
    for section in sections(result) {
        let _infallible = write!(text, "\n## {}\n\n{}", section.name, section.text);
    }
    text
}

/// All tables of a result that have rows.
pub(crate) fn sections(result: &ResultFile) -> Vec<Section> {
    let mut sections = vec![Section { name: "run", text: run(result) }];
    for table in tables(result.suite) {
        sections.push(Section { name: table.name, text: table.text(result) });
    }
    sections.retain(|section| !section.text.is_empty());
    sections
}

impl Dimension {
    fn label(self, series: &Series) -> String {
        match (self, series.key.n_services) {
            (Self::Measure, _) => series.key.measure.clone(),
            (Self::Target, _) => series.key.target.clone(),
            (Self::Services, None) => String::new(),
            (Self::Services, Some(1)) => "1 service".to_owned(),
            (Self::Services, Some(n)) => format!("{} services", thousands(n.into())),
        }
    }
}

impl Table {
    fn text(&self, result: &ResultFile) -> String {
        let mut all: Vec<&Series> = self.measures.iter().flat_map(|measure| result.of(measure)).collect();
        if self.cell == Cell::OverOff {
            all.retain(|series| series.key.target != calls::EMPTY.0);
        }
        if self.is_largest {
            let largest = all.iter().map(|series| series.key.n_services).max().flatten();
            all.retain(|series| series.key.n_services == largest);
        }
        let mut rows = [Dimension::Measure, Dimension::Target, Dimension::Services].to_vec();
        // A dimension with one value says nothing.
        rows.retain(|row| {
            *row != self.columns && all.iter().any(|series| row.label(series) != row.label(all[0]))
        });
        let labels = |series: &Series| rows.iter().map(|row| row.label(series)).collect::<Vec<_>>();
        let columns = distinct(all.iter().map(|series| self.columns.label(series)));
        let lines = distinct(all.iter().map(|series| labels(series)));
        let lines: Vec<Vec<String>> = lines
            .into_iter()
            .map(|mut line| {
                let of = |column: &String| {
                    let mut found = all.iter().filter(|series| self.columns.label(series) == *column);
                    found.find(|series| labels(series) == line)
                };
                let cells: Vec<Option<String>> =
                    columns.iter().map(|column| self.cell.text(result, of(column)?)).collect();
                line.extend(cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".to_owned())));
                line
            })
            .collect();
        let head: Vec<String> = rows.iter().map(|_| String::new()).chain(columns).collect();
        markdown(&head, &lines)
    }
}

/// The different values, in the order of their first appearance.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    values.fold(Vec::new(), |mut found, value| {
        if !found.contains(&value) {
            found.push(value);
        }
        found
    })
}

impl Cell {
    fn text(self, result: &ResultFile, series: &Series) -> Option<String> {
        let other = |target: &str, n_services| {
            result
                .of(&series.key.measure)
                .find(|other| other.key.target == target && other.key.n_services == n_services)
        };
        let (empty, _) = calls::EMPTY;
        let value = match (self, other(empty, None)) {
            (Self::Ratio, _) => {
                let ours = other(calls::SOCKLB, series.key.n_services)?;
                let (ratio, [low, high]) = paired_ratio(&ours.blocks, &series.blocks)?;
                return Some(format!("{ratio:.3} ({low:.3} to {high:.3})"));
            }
            (Self::Over(target), _) => {
                let base = other(target, series.key.n_services)?;
                if series.key.target == target {
                    return Some(amount(series.unit, series.median()));
                }
                let (difference, interval) = paired_difference(&series.blocks, &base.blocks)?;
                let [difference, low, high] = [difference, interval[0], interval[1]].map(|value| {
                    let sign = if value < 0.0 { "-" } else { "+" };
                    format!("{sign}{}", amount(series.unit, value.abs()))
                });
                return Some(format!("{difference} ({low} to {high})"));
            }
            (Self::OverOff, _) => {
                let is_empty = series.key.target == calls::EMPTY_SOCK_OPS.0;
                let off = other(if is_empty { empty } else { calls::HEALTH_OFF }, None)?;
                if series.key.target == calls::HEALTH_OFF {
                    return Some(amount(series.unit, series.median()));
                }
                let (difference, [low, high]) = paired_difference(&series.blocks, &off.blocks)?;
                return Some(format!("{difference:+.0} ns ({low:+.0} to {high:+.0})"));
            }
            (Self::OverEmpty, Some(floor)) if ![empty, "none"].contains(&series.key.target.as_str()) => {
                format!("{:+.0} ns", series.median() - floor.median())
            }
            _ => amount(series.unit, series.median()),
        };
        let p99 = amount(series.unit, series.at("p99"));
        Some(if series.n > 10 { format!("{value} ({p99})") } else { value })
    }
}

/// Three significant digits.
fn digits(value: f64) -> String {
    match value.abs() {
        x if x >= 99.95 || x == 0.0 => thousands(value),
        x if x >= 9.995 => format!("{value:.1}"),
        x if x >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn thousands(value: f64) -> String {
    let text = format!("{:.0}", value.abs());
    let mut grouped = String::new();
    for (index, digit) in text.chars().enumerate() {
        if index > 0 && (text.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if value < 0.0 && text != "0" { format!("-{grouped}") } else { grouped }
}

/// A value with its unit. The unit of a time is the one with the fewest digits.
pub(crate) fn amount(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Nanoseconds => {
            let (divisor, name) = match value.abs() {
                x if x >= 9.995e8 => (1e9, "s"),
                x if x >= 999_500.0 => (1e6, "ms"),
                x if x >= 999.5 => (1e3, "µs"),
                _ => (1.0, "ns"),
            };
            // No clock here resolves less than a nanosecond.
            if name == "ns" {
                format!("{value:.0} ns")
            } else {
                format!("{} {name}", digits(value / divisor))
            }
        }
        Unit::Mebibytes => format!("{} MiB", digits(value)),
        Unit::MebibytesPerSecond => format!("{} MiB/s", digits(value)),
        Unit::PerSecond => format!("{}/s", digits(value)),
        Unit::Count => digits(value),
        Unit::Ratio => format!("{:.2} %", value * 100.0),
    }
}

/// A Markdown table; empty without rows.
fn markdown(head: &[String], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule = format!("|{}\n", " --- |".repeat(head.len()));
    let rows: String = rows.iter().map(|row| line(row)).collect();
    line(head) + &rule + &rows
}

fn words(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn run(result: &ResultFile) -> String {
    let machine = &result.machine;
    let load = |load: [f64; 3]| load.map(|value| format!("{value:.2}")).join(" ");
    let pairs = |pairs: &std::collections::BTreeMap<String, String>| {
        pairs.iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>().join("; ")
    };
    let mut rows = vec![
        words(&[
            "machine",
            &format!(
                "{}, {} CPUs{}, {} MiB, {}",
                machine.cpu,
                machine.n_cpus,
                if machine.is_virtual { " of a virtual machine" } else { "" },
                thousands(real(machine.memory_mib)),
                machine.architecture
            ),
        ]),
        words(&["kernel", &format!("Linux {}", machine.kernel)]),
        words(&[
            "load before and after",
            &format!("{}; {}", load(machine.load_before), load(machine.load_after)),
        ]),
        words(&["commit", &result.commit]),
        words(&["begun, took", &format!("{}, {:.0} s", result.started, result.seconds)]),
        words(&["versions", &pairs(&result.versions)]),
        words(&["settings", &pairs(&result.settings)]),
    ];
    for missing in &result.unavailable {
        let size =
            missing.n_services.map_or_else(String::new, |n| format!(" at {} services", thousands(n.into())));
        rows.push(words(&[
            "not available",
            &format!(
                "{}{size}: {}",
                missing.target,
                missing.reason.lines().next().unwrap_or_default().replace('|', "/")
            ),
        ]));
    }
    if result.is_smoke {
        rows.push(words(&["smoke", "the times say nothing"]));
    }
    markdown(&words(&["", ""]), &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::tests::{file, series};

    #[test]
    fn amounts_have_three_digits() {
        let table = [
            (Unit::Nanoseconds, 0.4, "0 ns"),
            (Unit::Nanoseconds, 999.0, "999 ns"),
            (Unit::Nanoseconds, 12_340.0, "12.3 µs"),
            (Unit::Nanoseconds, 999_700.0, "1.00 ms"),
            (Unit::Nanoseconds, 1.5e9, "1.50 s"),
            (Unit::Nanoseconds, 1234.5e9, "1,234 s"),
            (Unit::Mebibytes, 0.5, "0.500 MiB"),
            (Unit::PerSecond, 12_345.6, "12,346/s"),
            (Unit::Count, 0.0, "0"),
            (Unit::Ratio, 0.0034, "0.34 %"),
        ];
        for (unit, value, wanted) in table {
            assert_eq!(amount(unit, value), wanted);
        }
    }

    fn section(result: &ResultFile, name: &str) -> Vec<String> {
        let sections = sections(result);
        let found = sections.iter().find(|section| section.name == name);
        found.map(|section| section.text.lines().map(str::to_owned).collect()).unwrap_or_default()
    }

    #[test]
    fn path_tables_have_a_column_for_each_target() {
        let mut all = Vec::new();
        for n in [1, 1000] {
            for (target, value) in [("direct", 100.0), ("socklb", 101.0), ("nftables", 200.0)] {
                all.push(series("new connection: latency", target, n, &[value; 20]));
            }
        }
        all.pop();
        let result = file(Suite::Path, all);
        assert_eq!(
            section(&result, "latency"),
            [
                "|  | direct | socklb | nftables |",
                "| --- | --- | --- | --- |",
                "| 1 service | 100 ns (100 ns) | 101 ns (101 ns) | 200 ns (200 ns) |",
                "| 1,000 services | 100 ns (100 ns) | 101 ns (101 ns) | - |",
            ]
        );
        assert_eq!(section(&result, "summary")[0], "| direct | socklb |");
        assert_eq!(section(&result, "summary")[2], "| 100 ns (100 ns) | 101 ns (101 ns) |");
        assert_eq!(
            section(&result, "claims")[2],
            "| 1 service | 1.010 (1.010 to 1.010) | 1.000 (1.000 to 1.000) | 0.505 (0.505 to 0.505) |"
        );
        assert!(section(&result, "programming").is_empty(), "no table without rows");
    }

    #[test]
    fn costs_are_taken_over_the_empty_program() {
        let (any, _, _) = scale::KINDS[2];
        let mut all = vec![series(any, "empty", 0, &[1000.0; 6])];
        all[0].key.n_services = None;
        all.extend([100, 1000].map(|n| series(any, "socklb", n, &[1100.0; 6])));
        assert_eq!(
            section(&file(Suite::Scale, all), "calls"),
            [
                "|  |  | re-connect, any service |",
                "| --- | --- | --- |",
                "| empty |  | 1.00 µs |",
                "| socklb | 100 services | +100 ns |",
                "| socklb | 1,000 services | +100 ns |",
            ]
        );
    }
}
