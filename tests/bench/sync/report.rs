//! Figures beside their targets.

use std::{fs, path::Path, time::Duration};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::agent::Memory;

/// Durations in nanoseconds, to three digits.
pub(crate) fn times() -> Histogram<u64> {
    // Three digits are allowed; nothing else can be wrong with it.
    Histogram::new(3).expect("a histogram of three digits")
}

/// Counts a duration.
pub(crate) fn record(times: &mut Histogram<u64>, value: Duration) {
    let nanoseconds = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
    // It grows as needed, so that only memory could lack.
    times.record(nanoseconds).expect("room for a figure");
}

/// What was measured so far.
pub(crate) struct Report {
    part: String,
    figures: Vec<Value>,
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

fn n_cpus() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}

/// The target in words, and whether it is met.
fn verdict(value: f64, target: f64, unit: &str) -> String {
    format!("target {target} {unit}: {}", if value <= target { "met" } else { "MISSED" })
}

impl Report {
    pub(crate) fn start() -> Self {
        println!("{} CPUs, load {}", n_cpus(), load());
        Self { part: String::new(), figures: Vec::new() }
    }

    /// Begins with another size.
    pub(crate) fn part(&mut self, name: &str) {
        println!("\n{name} (load {})", load());
        name.clone_into(&mut self.part);
    }

    fn add(&mut self, title: &str, mut figure: Value) {
        figure["part"] = self.part.clone().into();
        figure["title"] = title.into();
        self.figures.push(figure);
    }

    /// A distribution, with targets in milliseconds for some quantiles.
    pub(crate) fn times(&mut self, title: &str, times: &Histogram<u64>, targets: &[(f64, f64)]) {
        let at = |quantile: f64| milliseconds(times.value_at_quantile(quantile));
        let targets: Vec<String> = targets
            .iter()
            .map(|&(quantile, target)| {
                let name = if quantile >= 1.0 { "max".to_owned() } else { format!("p{}", quantile * 100.0) };
                format!("{name} {}", verdict(at(quantile), target, "ms"))
            })
            .collect();
        println!(
            "  {title}, ms: min {:.2}, p50 {:.2}, p90 {:.2}, p99 {:.2}, p99.9 {:.2}, max {:.2} (n {}) {}",
            at(0.0),
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            at(1.0),
            times.len(),
            targets.join("; ")
        );
        let figure = json!({
            "unit": "ms", "n": times.len(), "min": at(0.0), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99),
            "p99.9": at(0.999), "max": at(1.0), "targets": targets,
        });
        self.add(title, figure);
    }

    /// A share of one core, or another plain number.
    pub(crate) fn share(&mut self, title: &str, value: f64, target: Option<f64>) {
        let verdict = target.map(|target| verdict(value, target, "of a core"));
        println!("  {title}: {value:.4} {}", verdict.as_deref().unwrap_or_default());
        self.add(title, json!({"value": value, "targets": verdict}));
    }

    /// Memory. The target is for what is resident without the pages of BPF maps, which stay when the agent ends.
    pub(crate) fn memory(&mut self, title: &str, memory: &Memory, target: Option<f64>) {
        let Memory { resident, anonymous, maps, peak } = *memory;
        let own = resident - maps;
        let verdict = target.map(|target| format!("without BPF maps {}", verdict(own, target, "MiB")));
        println!(
            "  {title}, MiB: resident {resident:.1}, of that BPF maps {maps:.1}, without them {own:.1}, heap and \
             stacks {anonymous:.1}; peak {peak:.1} {}",
            verdict.as_deref().unwrap_or_default()
        );
        let figure = json!({
            "unit": "MiB", "resident": resident, "maps": maps, "without_maps": own, "anonymous": anonymous,
            "peak": peak, "targets": verdict,
        });
        self.add(title, figure);
    }

    /// Writes everything.
    pub(crate) fn finish(self, path: Option<&Path>) -> anyhow::Result<()> {
        let Some(path) = path else { return Ok(()) };
        let document = json!({"cpus": n_cpus(), "load": load(), "figures": self.figures});
        let text = serde_json::to_string_pretty(&document)?;
        fs::write(path, text).with_context(|| format!("{}: cannot be written", path.display()))
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits count")]
fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}
