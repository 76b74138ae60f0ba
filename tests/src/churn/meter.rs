//! The agent's use of memory and disk: a periodic line of figures, and whether they are flat.

use std::{
    fmt, fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{Counts, life::Present, truth::Truth};
use crate::process::Memory;

/// Samples of the agent per line.
const LOOKS: u32 = 12;
/// The most that may be written per minute on average, in bytes: decision 0011.
const MAX_WRITTEN: u64 = 2_000_000;
/// Growth of memory that counts as flat: the allocator keeps what a start took, and a sample may miss a
/// start.
const TOLERANCE: f64 = 1.25;

/// The measurements of one interval, a minute by default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Minute {
    /// Its end, since the start of the run.
    pub end: Duration,
    /// Its length.
    pub length: Duration,
    /// The agent's age at its end.
    pub age: Duration,
    /// Agents that exited.
    pub n_ended: u64,
    /// The largest memory of an agent in MiB: resident pages without those of BPF maps.
    pub own: f64,
    /// The same at the end of the interval.
    pub own_at_end: f64,
    /// Mapped pages of BPF maps, in MiB.
    pub maps: f64,
    /// Bytes that agents wrote to disk.
    pub written: u64,
    /// Bytes of the snapshot and of the journal at the end.
    pub files: [u64; 2],
    /// Changes of objects.
    pub n_changes: u64,
    /// Calls.
    pub n_calls: u64,
    /// Calls refused for lack of an endpoint or service. A failed call to a ready endpoint stops the run.
    pub n_refused: u64,
}

/// All measurements.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// One per line.
    pub minutes: Vec<Minute>,
    /// Whether the commands' output was right.
    pub truth: Truth,
}

/// Samples the agent until told to stop. Prints each line when it is complete.
pub(super) fn observe(
    present: &Present,
    counts: &Counts,
    interval: Duration,
    stop: &AtomicBool,
) -> Vec<Minute> {
    let begin = Instant::now();
    let total = || {
        let [changes, steady, others, refused] =
            [&counts.n_changes, &counts.n_steady, &counts.n_others, &counts.n_failures]
                .map(|count| count.load(Ordering::Relaxed));
        [present.written(), present.n_ended(), changes, steady + others, refused]
    };
    let mut before = total();
    let (mut since, mut minute) = (begin, Minute::default());
    let mut minutes = Vec::new();
    eprintln!("{HEADER}");
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(interval / LOOKS);
        // There may be no agent at the moment.
        if let Ok(memory) = Memory::of(present.pid()) {
            minute.own_at_end = memory.resident - memory.maps;
            minute.own = minute.own.max(minute.own_at_end);
            minute.maps = minute.maps.max(memory.maps);
        }
        if since.elapsed() < interval {
            continue;
        }
        let now = total();
        // An agent that has just exited counts in the next line.
        let [written, n_ended, n_changes, n_calls, n_refused] =
            std::array::from_fn(|index| now[index].saturating_sub(before[index]));
        before = std::array::from_fn(|index| now[index].max(before[index]));
        let (end, length, age) = (begin.elapsed(), since.elapsed(), present.age());
        let files = ["snapshot", "journal"].map(|name| size(&present.state_dir.join(name)));
        let complete =
            Minute { end, length, age, n_ended, written, files, n_changes, n_calls, n_refused, ..minute };
        eprintln!("{complete}");
        minutes.push(complete);
        (since, minute) = (Instant::now(), Minute::default());
    }
    minutes
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}

const HEADER: &str = "  min  killed   age s  own MiB  (end)  maps MiB  written kB  snapshot kB  journal kB  changes  \
                      calls  refused";

impl fmt::Display for Minute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            end,
            age,
            n_ended,
            own,
            own_at_end,
            maps,
            written,
            files,
            n_changes,
            n_calls,
            n_refused,
            ..
        } = self;
        let (minute, age) = (end.as_secs_f64() / 60.0, age.as_secs());
        let [snapshot, journal] = files.map(|octets| octets / 1000);
        let written = written / 1000;
        write!(
            f,
            "{minute:5.1}  {n_ended:6}  {age:6}  {own:7.1}  {own_at_end:5.1}  {maps:8.1}  {written:10}  {snapshot:11}  \
             {journal:10}  {n_changes:7}  {n_calls:5}  {n_refused:7}"
        )
    }
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}")?;
        for minute in &self.minutes {
            writeln!(f, "{minute}")?;
        }
        writeln!(f)?;
        if let Some(written) = written_a_minute(&self.minutes) {
            writeln!(f, "written to the disk: {written} bytes per minute on average")?;
        }
        if let Some([before, after]) = growth_of_all(&self.minutes) {
            writeln!(
                f,
                "own memory at most: {before:.1} MiB in the first third, {after:.1} MiB in the last"
            )?;
        }
        if let Some(life) = longest_life(&self.minutes) {
            let [before, after] =
                [life.first(), life.last()].map(|minute| minute.map_or(0.0, |m| m.own_at_end));
            let minutes = life.iter().map(|minute| minute.length).sum::<Duration>().as_secs_f64() / 60.0;
            writeln!(
                f,
                "the agent that lived longest: {before:.1} MiB, after {minutes:.1} min {after:.1} MiB"
            )?;
        }
        writeln!(f, "{}", self.truth)?;
        for flaw in self.flaws() {
            writeln!(f, "OUT OF BOUNDS: {flaw}")?;
        }
        Ok(())
    }
}

fn written_a_minute(minutes: &[Minute]) -> Option<u64> {
    let milliseconds = minutes.iter().map(|minute| minute.length.as_millis()).sum::<u128>();
    let written = minutes.iter().map(|minute| u128::from(minute.written)).sum::<u128>();
    u64::try_from((written * 60_000).checked_div(milliseconds)?).ok()
}

/// The most memory in the first third and in the last.
fn growth_of_all(minutes: &[Minute]) -> Option<[f64; 2]> {
    let third = minutes.len() / 3;
    let most = |minutes: &[Minute]| minutes.iter().map(|minute| minute.own).fold(0.0, f64::max);
    (third > 0).then(|| [most(&minutes[..third]), most(&minutes[minutes.len() - third..])])
}

/// The lines of the agent that is in most of them, without the line of its start.
fn longest_life(minutes: &[Minute]) -> Option<&[Minute]> {
    let lives = minutes.chunk_by(|before, after| after.age > before.age);
    let lives =
        lives.filter_map(|life| if life[0].age < life[0].length { life.get(1..) } else { Some(life) });
    lives.filter(|life| life.len() > 1).max_by_key(|life| life.len())
}

impl Observed {
    /// Faults: memory or writes that are not flat, output of commands that was not right in time.
    #[must_use]
    pub fn flaws(&self) -> Vec<String> {
        let mut flaws = Vec::new();
        if let Some(written) = written_a_minute(&self.minutes).filter(|written| *written > MAX_WRITTEN) {
            flaws.push(format!("{written} bytes written per minute, more than {MAX_WRITTEN}"));
        }
        let mut grows = |what: &str, before: f64, after: f64| {
            if after > before * TOLERANCE {
                flaws.push(format!("memory {what} grows from {before:.1} to {after:.1} MiB"));
            }
        };
        if let Some([before, after]) = growth_of_all(&self.minutes) {
            grows("of all agents", before, after);
        }
        if let Some([first, .., last]) = longest_life(&self.minutes) {
            grows("of one agent", first.own_at_end, last.own_at_end);
        }
        flaws.extend(self.truth.flaws());
        flaws
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// Lines of agents with these ages in minutes and this memory.
    fn lines(values: &[(u32, f64)], written: u64) -> Observed {
        let line = |(n, (age, own)): (usize, &(u32, f64))| Minute {
            end: MINUTE * u32::try_from(n).unwrap_or_default(),
            length: MINUTE,
            age: MINUTE * *age + MINUTE / 2,
            own: *own,
            own_at_end: *own,
            written,
            ..Minute::default()
        };
        Observed { minutes: values.iter().enumerate().map(line).collect(), truth: Truth::default() }
    }

    #[test]
    fn what_grows_is_a_flaw() {
        let flat = [(0, 60.0), (0, 50.0), (1, 55.0), (2, 56.0), (0, 60.0), (0, 61.0)];
        let over_all = [(0, 60.0), (0, 60.0), (0, 70.0), (0, 70.0), (0, 80.0), (0, 80.0)];
        let in_a_life = [(0, 100.0), (1, 50.0), (2, 60.0), (3, 70.0), (0, 100.0), (0, 100.0)];
        for (values, written, expected) in [
            (&flat, 2_000_000, &[][..]),
            (&flat, 2_000_001, &["2000001 bytes written per minute"][..]),
            (&over_all, 0, &["memory of all agents grows from 60.0 to 80.0 MiB"][..]),
            (&in_a_life, 0, &["memory of one agent grows from 50.0 to 70.0 MiB"][..]),
        ] {
            let flaws = lines(values, written).flaws();
            assert!(flaws.len() == expected.len(), "{flaws:?}");
            assert!(flaws.iter().zip(expected).all(|(flaw, part)| flaw.contains(part)), "{flaws:?}");
        }
        assert_eq!(lines(&[], 0).flaws(), Vec::<String>::new());
    }
}
