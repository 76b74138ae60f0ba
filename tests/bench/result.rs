//! The result file: one format for all suites.
//!
//! # Invariants
//!
//! - A file holds everything that the tables and plots of a suite show, so that they can be rendered again
//!   without measuring.
//! - Measure, target and size identify a series. Names are stable: `bench compare` finds the series of other
//!   runs by them.

use std::{collections::BTreeMap, fmt, fs, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use lb_tests::process::Memory;
use serde::{Deserialize, Serialize};

use crate::{
    machine::Machine,
    quantile::{QUANTILES, median, median_interval, quantile, rounded},
};

const FORMAT: u32 = 1;
/// More blocks are merged with their neighbours: enough for intervals, and files stay readable.
const MAX_BLOCKS: usize = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Suite {
    /// The cost of a call with each hook.
    Hooks,
    /// From the API server's events to the kernel's maps.
    Sync,
    /// The same work to an endpoint, through socklb, nftables and iptables.
    Path,
    Scale,
    /// What rules for packets cost the agent and the kernel.
    Packets,
    /// What callers notice of an endpoint that dies.
    Health,
}

impl Suite {
    /// All suites, in the order in which they run.
    pub(crate) const ALL: [Self; 6] =
        [Self::Hooks, Self::Sync, Self::Path, Self::Scale, Self::Packets, Self::Health];

    /// The name of the suite and of its files.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Hooks => "hooks",
            Self::Sync => "sync",
            Self::Path => "path",
            Self::Scale => "scale",
            Self::Packets => "packets",
            Self::Health => "health",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    Nanoseconds,
    Mebibytes,
    MebibytesPerSecond,
    /// Pieces of work per second.
    PerSecond,
    Count,
    /// A share of one core, or another ratio.
    Ratio,
}

/// Which direction is better, for [`crate::compare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Lower,
    Higher,
    /// Neither: it describes the measurement.
    Neither,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Key {
    /// The measure, in words.
    pub(crate) measure: String,
    /// The target: a program, a competitor, or a size in words.
    pub(crate) target: String,
    /// The number of services, if it varies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) n_services: Option<u32>,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.measure, self.target)?;
        self.n_services.map_or(Ok(()), |n| write!(f, ", {n} services"))
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    #[serde(flatten)]
    pub(crate) key: Key,
    pub(crate) unit: Unit,
    pub(crate) better: Better,
    pub(crate) n: usize,
    /// By the names in [`QUANTILES`].
    pub(crate) quantiles: BTreeMap<String, f64>,
    /// A 95 % confidence interval of the median, from the medians of blocks: neighbouring samples are
    /// correlated, so an interval from single samples would be too narrow. Absent below 6 blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) median_interval: Option<[f64; 2]>,
    /// The medians of blocks of samples, in order of time. In suites that alternate targets, blocks with the
    /// same index of two targets were measured one after the other.
    pub(crate) blocks: Vec<f64>,
}

impl Series {
    /// A series of blocks of samples in order of time. `None` without samples.
    pub(crate) fn new(key: Key, unit: Unit, better: Better, blocks: &[Vec<f64>]) -> Option<Self> {
        let filled: Vec<&Vec<f64>> = blocks.iter().filter(|block| !block.is_empty()).collect();
        let mut sorted: Vec<f64> = filled.iter().copied().flatten().copied().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let quantiles = QUANTILES
            .iter()
            .map(|(name, q)| Some(((*name).to_owned(), rounded(quantile(&sorted, *q)?))))
            .collect::<Option<_>>()?;
        let medians: Vec<f64> = filled
            .chunks(filled.len().div_ceil(MAX_BLOCKS))
            .map(|chunk| median(&chunk.iter().copied().flatten().copied().collect::<Vec<f64>>()))
            .map(rounded)
            .collect();
        Some(Self {
            key,
            unit,
            better,
            n: sorted.len(),
            quantiles,
            median_interval: median_interval(&medians),
            blocks: medians,
        })
    }

    /// A quantile by its name; 0 for a name that is not in the file.
    pub(crate) fn at(&self, quantile: &str) -> f64 {
        self.quantiles.get(quantile).copied().unwrap_or_default()
    }

    pub(crate) fn median(&self) -> f64 {
        self.at("p50")
    }
}

/// A target that could not be measured here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unavailable {
    pub(crate) target: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) n_services: Option<u32>,
    pub(crate) reason: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ResultFile {
    pub(crate) format: u32,
    pub(crate) suite: Suite,
    /// Small and short: shows that the harness works, not how fast anything is.
    pub(crate) is_smoke: bool,
    /// The measured commit; ends with `-dirty` if files differed from it.
    pub(crate) commit: String,
    /// When the run began, UTC.
    pub(crate) started: String,
    pub(crate) seconds: f64,
    pub(crate) machine: Machine,
    /// Versions of the programs involved.
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) settings: BTreeMap<String, String>,
    pub(crate) unavailable: Vec<Unavailable>,
    pub(crate) series: Vec<Series>,
}

impl ResultFile {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// If it cannot be read or has another format.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let file: Self = serde_json::from_str(&text)
            .with_context(|| format!("{}: not a result of `cargo xtask bench`", path.display()))?;
        if file.format != FORMAT {
            bail!("{}: format {}, this program reads {FORMAT}", path.display(), file.format);
        }
        Ok(file)
    }

    /// Writes the file, with one series per line for readable diffs.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let head = Self { series: Vec::new(), ..self.clone() };
        let head = serde_json::to_string_pretty(&head)?;
        let lines = self.series.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        // Pretty-printed, an empty list at the end is `"series": []` and the closing brace.
        let head = head.strip_suffix("]\n}").context("the list of series is the last field")?;
        let text = format!("{head}\n    {}\n  ]\n}}\n", lines.join(",\n    "));
        fs::write(path, text).with_context(|| format!("{}: cannot be written", path.display()))
    }

    pub(crate) fn find(&self, key: &Key) -> Option<&Series> {
        self.series.iter().find(|series| series.key == *key)
    }

    /// The series of a measure, in the order of the file.
    pub(crate) fn of<'a>(&'a self, measure: &'a str) -> impl Iterator<Item = &'a Series> {
        self.series.iter().filter(move |series| series.key.measure == measure)
    }
}

pub(crate) struct Run {
    started: std::time::Instant,
    file: ResultFile,
}

impl Run {
    /// Starts a run. The build passes `commit` and `rustc`.
    pub(crate) fn start(suite: Suite, is_smoke: bool, commit: &str, rustc: &str) -> Self {
        let machine = Machine::observe();
        let mut versions = BTreeMap::from([("socklb".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]);
        // Unoptimised user-space processes are slower; the BPF programs are the same.
        let build = if cfg!(debug_assertions) { "debug" } else { "release" };
        versions.insert("build".to_owned(), build.to_owned());
        if !rustc.is_empty() {
            versions.insert("rustc".to_owned(), rustc.to_owned());
        }
        let file = ResultFile {
            format: FORMAT,
            suite,
            is_smoke,
            commit: commit.to_owned(),
            started: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            seconds: 0.0,
            machine,
            versions,
            settings: BTreeMap::new(),
            unavailable: Vec::new(),
            series: Vec::new(),
        };
        Self { started: std::time::Instant::now(), file }
    }

    pub(crate) fn setting(&mut self, name: &str, value: impl fmt::Display) {
        self.file.settings.insert(name.to_owned(), value.to_string());
    }

    pub(crate) fn versions(&mut self, versions: BTreeMap<String, String>) {
        self.file.versions.extend(versions);
    }

    pub(crate) fn unavailable(&mut self, target: &str, n_services: Option<u32>, reason: impl fmt::Display) {
        let reason = reason.to_string();
        eprintln!("{target}: not available: {reason}");
        self.file.unavailable.push(Unavailable { target: target.to_owned(), n_services, reason });
    }

    /// Adds the series of a target, of a number of services if that varies.
    pub(crate) fn of(&mut self, target: &str, n_services: Option<u32>) -> Report<'_> {
        Report { run: self, target: target.to_owned(), n_services }
    }

    pub(crate) fn finish(mut self) -> ResultFile {
        self.file.seconds = rounded(self.started.elapsed().as_secs_f64());
        self.file.machine.load_after = crate::machine::load();
        self.file
    }
}

/// Adds the series of one target to a run.
pub(crate) struct Report<'a> {
    run: &'a mut Run,
    target: String,
    n_services: Option<u32>,
}

impl Report<'_> {
    /// Adds samples, if there are any.
    pub(crate) fn series(&mut self, measure: &str, unit: Unit, better: Better, blocks: &[Vec<f64>]) {
        let key =
            Key { measure: measure.to_owned(), target: self.target.clone(), n_services: self.n_services };
        self.run.file.series.extend(Series::new(key, unit, better, blocks));
    }

    /// Adds a single value, of which less is better.
    pub(crate) fn figure(&mut self, measure: &str, unit: Unit, value: f64) {
        self.series(measure, unit, Better::Lower, &[vec![value]]);
    }

    /// Adds durations. Consecutive ones form a block; if there are few, each is its own.
    pub(crate) fn times(&mut self, measure: &str, times: &[Duration]) {
        let times: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e9).collect();
        let blocks: Vec<Vec<f64>> =
            times.chunks((times.len() / MAX_BLOCKS).max(1)).map(<[f64]>::to_vec).collect();
        self.series(measure, Unit::Nanoseconds, Better::Lower, &blocks);
    }

    /// Adds memory. Resident memory includes the mapped pages of BPF maps, which remain when the agent exits.
    pub(crate) fn memory(&mut self, title: &str, memory: &Memory) {
        let Memory { resident, anonymous, maps, peak } = *memory;
        for (what, value) in [
            ("resident", resident),
            ("resident without BPF maps", resident - maps),
            ("heap and stacks", anonymous),
            ("peak", peak),
        ] {
            self.figure(&format!("{title}: {what}"), Unit::Mebibytes, value);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A file with the given series, for tests of readers.
    pub(crate) fn file(suite: Suite, series: Vec<Series>) -> ResultFile {
        let mut file = Run::start(suite, false, "0000000", "").finish();
        (file.seconds, file.started) = (1.5, "2026-01-01T00:00:00Z".to_owned());
        file.series = series;
        file
    }

    pub(crate) fn series(measure: &str, target: &str, n_services: u32, blocks: &[f64]) -> Series {
        let key =
            Key { measure: measure.to_owned(), target: target.to_owned(), n_services: Some(n_services) };
        let blocks: Vec<Vec<f64>> = blocks.iter().map(|value| vec![*value]).collect();
        Series::new(key, Unit::Nanoseconds, Better::Lower, &blocks).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("result.json");
        for n in [0, 1, 3] {
            let all = (0..n).map(|n| series("connect", "socklb", n, &[1.0, 2.0, 3.0])).collect();
            let written = file(Suite::Path, all);
            written.write(&path).unwrap();
            assert_eq!(ResultFile::read(&path).unwrap(), written, "{n} series");
        }
    }

    #[test]
    fn other_files_are_refused_with_their_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("result.json");
        for text in ["", "{}", "[1]", "\0"] {
            fs::write(&path, text).unwrap();
            let error = format!("{:#}", ResultFile::read(&path).unwrap_err());
            assert!(error.contains("result.json"), "{error}");
        }
        let newer = ResultFile { format: FORMAT + 1, ..file(Suite::Path, Vec::new()) };
        newer.write(&path).unwrap();
        assert!(ResultFile::read(&path).unwrap_err().to_string().contains("format 2"));
    }

    #[test]
    fn many_blocks_are_joined_with_their_neighbours() {
        let blocks: Vec<Vec<f64>> = (0..1000_u32).map(|block| vec![f64::from(block)]).collect();
        let key = series("m", "t", 1, &[0.0]).key;
        let series = Series::new(key, Unit::Count, Better::Neither, &blocks).unwrap();
        assert_eq!((series.n, series.blocks.len()), (1000, MAX_BLOCKS));
        assert!((series.blocks[0] - 9.5).abs() < 1e-9, "{}", series.blocks[0]);
        assert!(series.median_interval.is_some());
    }

    #[test]
    fn nothing_is_no_series() {
        let key = series("m", "t", 1, &[0.0]).key;
        for blocks in [&[][..], &[Vec::new()]] {
            assert_eq!(Series::new(key.clone(), Unit::Count, Better::Neither, blocks), None);
        }
    }
}
