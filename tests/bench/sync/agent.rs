//! The agent's process.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use lb_tests::{Sandbox, apiserver::ApiServer, process::Memory};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use super::tables::{LOOK, PATIENCE, Tables};

/// A running agent. Killed on drop.
pub(crate) struct Agent {
    child: Child,
    pub(crate) started: Instant,
    pin_path: PathBuf,
    directory: TempDir,
}

impl Agent {
    /// Starts the agent in a sandbox as on a node.
    pub(crate) fn start(socklb: &Path, sandbox: &Sandbox, server: &ApiServer) -> anyhow::Result<Self> {
        Self::start_with(socklb, sandbox, server, &[])
    }

    pub(crate) fn start_with(
        socklb: &Path,
        sandbox: &Sandbox,
        server: &ApiServer,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let kubeconfig = directory.path().join("kubeconfig");
        fs::write(&kubeconfig, server.kubeconfig())?;
        let log = File::create(directory.path().join("log"))?;
        let started = Instant::now();
        let child = Command::new(socklb)
            .args(["run", "--source", "kube", "--node-name", "node-0000", "--kubeconfig"])
            .arg(&kubeconfig)
            .arg("--cgroup")
            .arg(sandbox.cgroup().path())
            .arg("--pin-path")
            .arg(sandbox.pin_path())
            .arg("--state-dir")
            .arg(directory.path().join("state"))
            .args(flags)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("{}: cannot be started", socklb.display()))?;
        Ok(Self { child, started, pin_path: sandbox.pin_path(), directory })
    }

    /// Waits until the maps exist. Returns the time since the start.
    pub(crate) fn tables(&self) -> anyhow::Result<(Tables, Duration)> {
        loop {
            match Tables::open(&self.pin_path) {
                Ok(tables) => return Ok((tables, self.started.elapsed())),
                Err(error) if self.started.elapsed() > PATIENCE => {
                    return Err(error.context(self.last_words()));
                }
                Err(_not_yet) => thread::sleep(LOOK),
            }
        }
    }

    pub(crate) fn last_words(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("the agent's log ends with:\n{}", lines[lines.len().saturating_sub(5)..].join("\n"))
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.child.id()))
    }

    pub(crate) fn memory(&self) -> anyhow::Result<Memory> {
        Memory::of(self.child.id())
    }

    /// The CPU time of all its threads so far, without threads that have exited.
    pub(crate) fn cpu_time(&self) -> anyhow::Result<Duration> {
        let mut sum = Duration::ZERO;
        for task in fs::read_dir(self.proc("task"))? {
            let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
            let nanoseconds = text.split_whitespace().next().and_then(|number| number.parse().ok());
            sum += Duration::from_nanos(nanoseconds.unwrap_or_default());
        }
        Ok(sum)
    }

    /// The share of one core that it uses during the given time from now.
    pub(crate) fn cpu_share(&self, time: Duration) -> anyhow::Result<f64> {
        let (before, since) = (self.cpu_time()?, Instant::now());
        thread::sleep(time);
        Ok(self.cpu_time()?.saturating_sub(before).as_secs_f64() / since.elapsed().as_secs_f64())
    }

    /// Stops it as a node does.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the agent exited: {status}; {}", self.last_words());
        }
        Ok(())
    }

    /// Stops it and removes its state from the kernel, so that the next start is a cold one.
    pub(crate) fn end_and_clean(self, socklb: &Path) -> anyhow::Result<()> {
        let (pin_path, state_dir) = (self.pin_path.clone(), self.directory.path().join("state"));
        self.end()?;
        let output = Command::new(socklb)
            .args(["cleanup", "--pin-path"])
            .arg(&pin_path)
            .arg("--state-dir")
            .arg(state_dir)
            .output()?;
        if !output.status.success() {
            bail!("socklb cleanup: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}
