//! Tables of result files: for the terminal and, between marks, for documents.

use std::fmt::Write as _;

use crate::{
    fit,
    hooks::Work,
    quantile::{paired_ratio, real},
    result::{Key, ResultFile, Series, Suite, Unit},
    scale::{self, calls, calls::Call},
    sync::{self, octets},
};

/// A table with a name that documents refer to.
pub(crate) struct Section {
    pub(crate) name: &'static str,
    title: &'static str,
    pub(crate) text: String,
}

/// All tables of a result, as one text.
pub(crate) fn suite(result: &ResultFile) -> String {
    let mut text = format!("# {}\n", result.suite.name());
    for section in sections(result) {
        let _infallible = write!(text, "\n## {}\n\n{}", section.title, section.text);
    }
    text
}

/// All tables of a result that have rows.
pub(crate) fn sections(result: &ResultFile) -> Vec<Section> {
    let mut sections = vec![Section { name: "run", title: "The run", text: run(result) }];
    let mut add = |name, title, text| sections.push(Section { name, title, text });
    match result.suite {
        Suite::Hooks => add("cost", "Median over the empty program (p99)", hooks(result)),
        Suite::Sync => {
            add("times", "Times", sync_times(result));
            add("agent", "Memory and CPU of the agent", sync_agent(result));
            add("octets", "What is read from the API server", sync_octets(result));
        }
        Suite::Path => {
            add("claims", "socklb beside the others", path_claims(result));
            add("latency", "Median latency (p99)", path_latency(result));
            add(
                "cpu",
                "CPU time of a piece of work, client and server",
                by_size(
                    result,
                    &[
                        "new connection: CPU",
                        "keep-alive request: CPU",
                        "UDP request, fresh socket: CPU",
                        "UDP request, one connected socket: CPU",
                        "UDP request, one unconnected socket: CPU",
                        "stream: CPU per MiB",
                    ],
                    false,
                ),
            );
            add(
                "rates",
                "Rates",
                by_size(
                    result,
                    &[
                        "new connection: rate",
                        "keep-alive request: rate",
                        "UDP request, fresh socket: rate",
                        "stream: throughput",
                    ],
                    false,
                ),
            );
            add(
                "programming",
                "From the first call of the tool until the rules are in force",
                by_size(
                    result,
                    &[
                        "programming: everything",
                        "programming: loading the programs",
                        "programming: one endpoint",
                    ],
                    false,
                ),
            );
            add(
                "packets",
                "What is done for packets",
                by_size(
                    result,
                    &[
                        "new connection: conntrack entries",
                        "UDP request, fresh socket: conntrack entries",
                        "keep-alive request: packets",
                        "keep-alive request: packets tracked",
                        "keep-alive request: BPF program runs",
                    ],
                    false,
                ),
            );
        }
        Suite::Scale => {
            add("claims", "Growth", scale_growth(result));
            add("calls", "A call, median over the empty program", scale_calls(result));
            add("memory", "Memory of the maps, made for exactly that number", scale_memory(result));
            add("agent", "The agent", scale_agent(result));
        }
    }
    sections.retain(|section| !section.text.is_empty());
    sections
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

fn shown(series: &Series, quantile: &str) -> String {
    amount(series.unit, series.at(quantile))
}

/// A Markdown table; empty without rows.
fn table(head: &[String], rows: &[Vec<String>]) -> String {
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
            &format!("{}{size}: {}", missing.target, missing.reason.replace('|', "/")),
        ]));
    }
    if result.is_smoke {
        rows.push(words(&["smoke", "the times say nothing"]));
    }
    table(&words(&["", ""]), &rows)
}

/// The targets of a measure in the order of the file.
fn targets(result: &ResultFile) -> Vec<&str> {
    let mut targets: Vec<&str> = Vec::new();
    for series in &result.series {
        if !targets.contains(&series.key.target.as_str()) {
            targets.push(&series.key.target);
        }
    }
    targets
}

/// The numbers of services in a file, ascending.
pub(crate) fn sizes(result: &ResultFile) -> Vec<u32> {
    let mut sizes: Vec<u32> = result.series.iter().filter_map(|series| series.key.n_services).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// One row for each measure and target, one column for each number of services.
fn by_size(result: &ResultFile, measures: &[&str], with_p99: bool) -> String {
    let sizes = sizes(result);
    let mut head = words(&["", ""]);
    head.extend(sizes.iter().map(|n| match n {
        1 => "1 service".to_owned(),
        n => format!("{} services", thousands((*n).into())),
    }));
    let mut rows = Vec::new();
    for measure in measures {
        for target in targets(result) {
            let cells: Vec<String> = sizes
                .iter()
                .map(|n| {
                    let Some(series) = result.find(&Key::new(measure, target).at(*n)) else {
                        return "-".to_owned();
                    };
                    if with_p99 && series.n > 1 {
                        format!("{} ({})", shown(series, "p50"), shown(series, "p99"))
                    } else {
                        shown(series, "p50")
                    }
                })
                .collect();
            if cells.iter().any(|cell| cell != "-") {
                rows.push([words(&[measure, target]), cells].concat());
            }
        }
    }
    table(&head, &rows)
}

fn path_latency(result: &ResultFile) -> String {
    by_size(
        result,
        &[
            "new connection: latency",
            "new connection: connect()",
            "keep-alive request: latency",
            "UDP request, fresh socket: latency",
            "UDP request, one connected socket: latency",
            "UDP request, one unconnected socket: latency",
        ],
        true,
    )
}

/// socklb compared with each competitor, block by block.
fn path_claims(result: &ResultFile) -> String {
    let mut rows = Vec::new();
    for measure in [
        "new connection: latency",
        "new connection: connect()",
        "new connection: CPU",
        "keep-alive request: latency",
    ] {
        for n in sizes(result) {
            let of = |target: &str| result.find(&Key::new(measure, target).at(n));
            let Some(ours) = of("socklb") else { continue };
            let mut row = words(&[measure, &thousands(n.into())]);
            for other in ["direct", "nftables", "iptables"] {
                let ratio = of(other).and_then(|other| paired_ratio(&ours.blocks, &other.blocks));
                row.push(ratio.map_or_else(
                    || "-".to_owned(),
                    |(ratio, [low, high])| format!("{ratio:.3} ({low:.3} to {high:.3})"),
                ));
            }
            rows.push(row);
        }
    }
    table(&words(&["socklb to", "services", "direct", "nftables", "iptables"]), &rows)
}

/// The difference of the median from the baseline target's.
fn over(series: &Series, floor: Option<&Series>) -> Option<f64> {
    Some(series.median() - floor?.median())
}

fn hooks(result: &ResultFile) -> String {
    let mut head = words(&["program"]);
    head.extend(Work::ALL.iter().map(|work| work.title().to_owned()));
    let mut rows = Vec::new();
    for target in targets(result) {
        let mut row = words(&[target]);
        for work in Work::ALL {
            let of = |target: &str| result.find(&Key::new(work.title(), target));
            row.push(of(target).map_or_else(
                || "-".to_owned(),
                |series| {
                    let p99 = shown(series, "p99");
                    match over(series, of("empty")) {
                        Some(difference) if target != "empty" && target != "none" => {
                            format!("{difference:+.0} ns ({p99})")
                        }
                        _ => format!("{} ({p99})", shown(series, "p50")),
                    }
                },
            ));
        }
        rows.push(row);
    }
    table(&head, &rows)
}

/// Measures and quantiles with a target, which is in ns.
const SYNC_TARGETS: [(&str, &str, &str, f64); 8] = [
    (sync::UNDER_LOAD, "", "p50", 2e6),
    (sync::UNDER_LOAD, "", "p99", 10e6),
    (sync::ONE_BY_ONE, "", "p99", 20e6),
    (sync::READY, "", "max", 50e6),
    (sync::UNREADY, "", "max", 50e6),
    (sync::MOVED, "", "max", 100e6),
    (sync::COLD_START, "10000 services", "max", 2e9),
    (sync::COLD_START, "44000 services", "max", 10e9),
];

fn sync_times(result: &ResultFile) -> String {
    let rows: Vec<Vec<String>> = result
        .series
        .iter()
        .filter(|series| series.unit == Unit::Nanoseconds)
        .map(|series| {
            let wanted: Vec<String> = SYNC_TARGETS
                .iter()
                .filter(|(measure, size, ..)| {
                    series.key.measure == *measure && series.key.target.starts_with(size)
                })
                .map(|(_, _, quantile, target)| {
                    let verdict = if series.at(quantile) <= *target { "met" } else { "MISSED" };
                    format!("{quantile} {}: {verdict}", amount(Unit::Nanoseconds, *target))
                })
                .collect();
            let mut row = words(&[&series.key.target, &series.key.measure]);
            row.extend(["p50", "p99", "max"].map(|quantile| shown(series, quantile)));
            row.extend([thousands(real(series.n as u64)), wanted.join("; ")]);
            row
        })
        .collect();
    table(&words(&["size", "", "p50", "p99", "max", "n", "target"]), &rows)
}

fn sync_agent(result: &ResultFile) -> String {
    let rows: Vec<Vec<String>> = result
        .series
        .iter()
        .filter(|series| series.unit != Unit::Nanoseconds && !is_octets(series))
        .map(|series| {
            let target = match series.key.measure.as_str() {
                sync::IDLE => Some((Unit::Ratio, 0.005)),
                sync::MEMORY if series.key.target.starts_with("10000 services") => {
                    Some((Unit::Mebibytes, 60.0))
                }
                _ => None,
            };
            let verdict = target.map(|(unit, target)| {
                format!(
                    "{}: {}",
                    amount(unit, target),
                    if series.median() <= target { "met" } else { "MISSED" }
                )
            });
            words(&[
                &series.key.target,
                &series.key.measure,
                &shown(series, "p50"),
                verdict.as_deref().unwrap_or_default(),
            ])
        })
        .collect();
    table(&words(&["size", "", "", "target"]), &rows)
}

fn is_octets(series: &Series) -> bool {
    series.key.measure.starts_with(octets::MEASURE)
}

fn sync_octets(result: &ResultFile) -> String {
    let rows: Vec<Vec<String>> = result
        .series
        .iter()
        .filter(|series| is_octets(series))
        .map(|series| {
            let measure = series.key.measure.trim_start_matches(octets::MEASURE);
            let (reader, what) = measure.split_once(", ").unwrap_or((measure, ""));
            words(&[&series.key.target, what, reader, &shown(series, "p50")])
        })
        .collect();
    table(&words(&["size", "", "read by", ""]), &rows)
}

/// Points of a measure by the number of services, from `from` services on; `floor` is subtracted.
fn points(
    result: &ResultFile,
    measure: &str,
    target: &str,
    quantile: &str,
    floor: f64,
    from: u32,
) -> Vec<(f64, f64)> {
    result
        .of(measure)
        .filter(|series| series.key.target == target)
        .filter_map(|series| Some((series.key.n_services?, series.at(quantile) - floor)))
        .filter(|(n, _)| *n >= from)
        .map(|(n, value)| (f64::from(n), value))
        .collect()
}

/// How each cost grows: the exponent, and the ratio between two sizes.
fn scale_growth(result: &ResultFile) -> String {
    let mut rows = Vec::new();
    let mut add = |title: &str, unit: Unit, points: &[(f64, f64)], ends: (f64, f64)| {
        let at = |n: f64| points.iter().find(|(x, _)| (x - n).abs() < 0.5).map(|(_, y)| *y);
        let (Some(law), Some(from), Some(to)) = (fit::power_law(points), at(ends.0), at(ends.1)) else {
            return;
        };
        rows.push(words(&[
            title,
            &format!(
                "{} at {}, {} at {}",
                amount(unit, from),
                thousands(ends.0),
                amount(unit, to),
                thousands(ends.1)
            ),
            &format!("{:.2}", to / from),
            &format!("{:.3} (R² {:.2})", law.exponent, law.r_squared),
        ]));
    };
    let floor = |call: Call| result.find(&calls::key(call.name(), 0)).map_or(0.0, Series::median);
    let largest = points(result, scale::MAPS, "memory", "p50", 0.0, 0).last().map_or(0.0, |(n, _)| *n);
    let ends = (100.0, largest);
    for call in Call::ALL {
        let over = points(result, call.name(), calls::SOCKLB, "p50", floor(call), 100);
        add(&format!("{}, over the empty program", call.name()), Unit::Nanoseconds, &over, ends);
        let whole = points(result, call.name(), calls::SOCKLB, "p50", 0.0, 100);
        add(&format!("{}, whole", call.name()), Unit::Nanoseconds, &whole, ends);
    }
    let program = points(result, calls::PROGRAM_TIME, calls::SOCKLB, "p50", 0.0, 100);
    add(calls::PROGRAM_TIME, Unit::Nanoseconds, &program, ends);
    add("memory of maps", Unit::Mebibytes, &points(result, scale::MAPS, "memory", "p50", 0.0, 100), ends);
    for (measure, quantile, title, unit) in [
        (sync::MEMORY, "p50", "memory of the agent", Unit::Mebibytes),
        (sync::ONE_BY_ONE, "p50", "event to map, p50", Unit::Nanoseconds),
        (sync::ONE_BY_ONE, "p99", "event to map, p99", Unit::Nanoseconds),
        (sync::COLD_START, "p50", "cold start", Unit::Nanoseconds),
    ] {
        let found = points(result, measure, "agent", quantile, 0.0, 0);
        let ends = (found.first().map_or(0.0, |point| point.0), found.last().map_or(0.0, |point| point.0));
        add(title, unit, &found, ends);
    }
    table(&words(&["", "from, to services", "ratio", "exponent"]), &rows)
}

fn scale_calls(result: &ResultFile) -> String {
    let names: Vec<&str> = Call::ALL.iter().map(|call| call.name()).collect();
    let mut head = words(&["services"]);
    head.extend(names.iter().map(|name| (*name).to_owned()));
    head.push(calls::PROGRAM_TIME.to_owned());
    let mut rows = Vec::new();
    let mut sizes: Vec<u32> = result.of(names[0]).filter_map(|series| series.key.n_services).collect();
    sizes.sort_unstable();
    for n in std::iter::once(0).chain(sizes) {
        let mut row = vec![if n == 0 { "empty program".to_owned() } else { thousands(n.into()) }];
        for name in names.iter().copied().chain([calls::PROGRAM_TIME]) {
            let of = |n| result.find(&calls::key(name, n));
            row.push(of(n).map_or_else(
                || "-".to_owned(),
                |series| match over(series, of(0)) {
                    Some(difference) if n > 0 => format!("{difference:+.0} ns"),
                    _ => shown(series, "p50"),
                },
            ));
        }
        rows.push(row);
    }
    table(&head, &rows)
}

fn scale_memory(result: &ResultFile) -> String {
    let rows: Vec<Vec<String>> = result
        .of(scale::MAPS)
        .filter_map(|series| Some(words(&[&thousands(series.key.n_services?.into()), &shown(series, "p50")])))
        .collect();
    table(&words(&["services", "maps"]), &rows)
}

fn scale_agent(result: &ResultFile) -> String {
    let mut rows = Vec::new();
    for n in sizes(result) {
        let of = |measure: &str| result.find(&Key::new(measure, "agent").at(n));
        let Some(latency) = of(sync::ONE_BY_ONE) else { continue };
        let one = |measure| of(measure).map_or_else(|| "-".to_owned(), |series| shown(series, "p50"));
        rows.push(words(&[
            &thousands(n.into()),
            &shown(latency, "p50"),
            &shown(latency, "p99"),
            &one(sync::COLD_START),
            &one(sync::MEMORY),
        ]));
    }
    table(&words(&["services", "event to map, p50", "p99", "cold start", "memory without maps"]), &rows)
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

    #[test]
    fn path_tables_have_a_row_for_each_target_and_a_column_for_each_size() {
        let mut all = Vec::new();
        for n in [1, 1000] {
            for (target, value) in [("direct", 100.0), ("socklb", 101.0), ("nftables", 200.0)] {
                all.push(series("new connection: latency", target, n, &[value; 10]));
            }
        }
        let sections = sections(&file(Suite::Path, all));
        let of = |name: &str| sections.iter().find(|section| section.name == name).unwrap().text.as_str();
        assert_eq!(
            of("latency").lines().collect::<Vec<_>>(),
            [
                "|  |  | 1 service | 1,000 services |",
                "| --- | --- | --- | --- |",
                "| new connection: latency | direct | 100 ns (100 ns) | 100 ns (100 ns) |",
                "| new connection: latency | socklb | 101 ns (101 ns) | 101 ns (101 ns) |",
                "| new connection: latency | nftables | 200 ns (200 ns) | 200 ns (200 ns) |",
            ]
        );
        assert!(
            of("claims").contains("| new connection: latency | 1,000 | 1.010 (1.010 to 1.010) | 0.505"),
            "{}",
            of("claims")
        );
        assert!(sections.iter().all(|section| section.name != "programming"), "no table without rows");
    }

    #[test]
    fn growth_is_taken_over_the_floor() {
        let mut all = vec![series(Call::AnyService.name(), "empty", 0, &[1000.0; 6])];
        all[0].key.n_services = None;
        for (n, value) in [(100, 1100.0), (1000, 1100.0), (10_000, 1100.0)] {
            all.push(series(Call::AnyService.name(), "socklb", n, &[value; 6]));
            all.push(series(scale::MAPS, "memory", n, &[f64::from(n)]));
        }
        let text = scale_growth(&file(Suite::Scale, all));
        assert!(
            text.contains("over the empty program | 100 ns at 100, 100 ns at 10,000 | 1.00 | 0.000 "),
            "{text}"
        );
        assert!(text.contains("| 100.00 | 1.000 (R² 1.00) |"), "{text}");
    }
}
