//! Processes with a log, and the resource usage of a process, from `/proc`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

/// A process that writes a log. Killed on drop.
#[derive(Debug)]
pub struct Logged {
    /// The process.
    pub child: Child,
    log: PathBuf,
}

impl Logged {
    /// Starts a process. Its standard output and error go to the log.
    ///
    /// # Errors
    ///
    /// If the log cannot be created, or the program cannot be started.
    pub fn start(command: &mut Command, log: PathBuf) -> anyhow::Result<Self> {
        let output = File::create(&log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("{program}: cannot be started"))?;
        Ok(Self { child, log })
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    ///
    /// If it exits or is not ready in time; with the end of its log.
    pub fn until(
        &mut self,
        name: &str,
        patience: Duration,
        is_ready: impl Fn() -> bool,
    ) -> anyhow::Result<()> {
        let end = Instant::now() + patience;
        while !is_ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{name} exited ({status}); {}", self.last_words());
            }
            ensure!(Instant::now() < end, "{name} is not ready after {patience:?}; {}", self.last_words());
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// What it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines of its log.
    #[must_use]
    pub fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        format!("its log ends with:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"))
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}

/// Memory of a process in MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// All resident memory, including the kernel's maps.
    pub resident: f64,
    /// The process's own memory: heap and stacks.
    pub anonymous: f64,
    /// Pages of BPF maps, which the kernel holds whether an agent runs or not.
    pub maps: f64,
    /// The largest resident memory so far.
    pub peak: f64,
}

impl Memory {
    /// The current memory of a process.
    ///
    /// # Errors
    ///
    /// If the process does not exist.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let status = read(pid, "status")?;
        let status = kilobytes(&status);
        let of = |key: &str| status.get(key).copied().unwrap_or_default();
        let mut maps = 0.0;
        let mut is_map = false;
        for line in read(pid, "smaps")?.lines() {
            // The header of a mapping begins with its addresses, in lower case.
            if !line.starts_with(|first: char| first.is_ascii_uppercase()) {
                is_map = line.contains("bpf-map");
            } else if is_map && let Some(resident) = kilobytes(line).get("Rss") {
                maps += resident;
            }
        }
        Ok(Self { resident: of("VmRSS"), anonymous: of("RssAnon"), maps, peak: of("VmHWM") })
    }
}

/// Bytes that a process has caused to be written to disk. `None` if it does not exist.
#[must_use]
pub fn written(pid: u32) -> Option<u64> {
    let io = read(pid, "io").ok()?;
    io.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.parse().ok()
}

/// How long each thread of a process has waited for a CPU so far, by thread id. Empty if it does not exist.
#[must_use]
pub fn waits(pid: u32) -> BTreeMap<u32, Duration> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| {
            let thread = task.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            Some((thread, Duration::from_nanos(text.split_whitespace().nth(1)?.parse().ok()?)))
        })
        .collect()
}

fn read(pid: u32, file: &str) -> anyhow::Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).context(path)
}

/// Lines such as `VmRSS:   1024 kB`, in MiB.
fn kilobytes(text: &str) -> BTreeMap<&str, f64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(':')?;
            Some((key, value.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0))
        })
        .collect()
}
