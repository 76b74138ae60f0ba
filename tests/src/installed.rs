//! The program `socklb` as people run it: with flags, files and signals, and a log to read.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    cluster::Cluster,
    command::{run, text},
    feature::Feature,
    sandbox::Sandbox,
};

/// Flags of an agent that opens no ports and tests itself never.
pub const QUIET: [&str; 3] = ["--metrics-bind-address=", "--healthz-bind-address=", "--self-test-interval=0"];

/// The directories of an agent in a sandbox.
#[derive(Debug)]
pub struct Place {
    /// The program: `SOCKLB_BIN`.
    pub binary: String,
    manifests: TempDir,
    state_dir: TempDir,
    /// `--pin-path`
    pub pin_path: String,
    /// `--cgroup`
    pub cgroup: String,
}

impl Place {
    /// Runs a test as [`Sandbox::test_with`], if there is a program to test.
    pub fn test(needs: &[Feature], test: impl FnOnce(&Sandbox, &Self) + Send) {
        let needs = [&[Feature::Variable("SOCKLB_BIN")], needs].concat();
        Sandbox::test_with(&needs, |sandbox| {
            test(sandbox, &Self::new(sandbox, env::var("SOCKLB_BIN").expect("required above")));
        });
    }

    /// Directories for a program in a sandbox.
    #[must_use]
    pub fn new(sandbox: &Sandbox, binary: String) -> Self {
        let path = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
        Self {
            binary,
            manifests: tempfile::tempdir().expect("a directory"),
            state_dir: tempfile::tempdir().expect("a directory"),
            pin_path: path(&sandbox.pin_path()),
            cgroup: path(sandbox.cgroup().path()),
        }
    }

    /// Replaces the manifests atomically, as editors do.
    pub fn write(&self, cluster: &Cluster) {
        let services = cluster.services.values().map(serde_json::to_string);
        let slices = cluster.slices.values().map(serde_json::to_string);
        let nodes = cluster.nodes.values().map(serde_json::to_string);
        let cidrs = cluster.service_cidrs.values().map(serde_json::to_string);
        let objects: Result<Vec<String>, _> = services.chain(slices).chain(nodes).chain(cidrs).collect();
        let new = self.manifests().join(".new");
        fs::write(&new, objects.expect("objects in JSON").join("\n---\n")).expect("a new file");
        fs::rename(new, self.manifests().join("cluster.yaml")).expect("the other name");
    }

    /// Starts an agent with the test's flags, which must set where it listens: a test must not use the host's
    /// ports.
    #[must_use]
    pub fn start(&self, flags: &[&str]) -> Running {
        let places = ["--node-name", "node", "--cgroup", &self.cgroup, "--pin-path", &self.pin_path];
        self.spawn(Command::new(&self.binary), &[&places, flags].concat())
    }

    /// Starts an agent with a command that ends with the binary. The command or the flags set where it
    /// attaches and pins.
    #[must_use]
    pub fn spawn(&self, mut command: Command, flags: &[&str]) -> Running {
        let mut child = command
            .args(["run", "--state-dir"])
            .arg(self.state_dir())
            .args(flags)
            .env("SOCKLB_SOURCE", format!("file:{}", self.manifests().display()))
            // The kernel allocates per-CPU counters one by one: a fifth of this suite's time at the default
            // sizes. Flags have precedence.
            .env("SOCKLB_MAX_SERVICES", "4096")
            .env("SOCKLB_MAX_ENDPOINTS", "16384")
            .stderr(Stdio::piped())
            .spawn()
            .expect("an agent");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (stderr, lines) = (child.stderr.take().expect("a pipe"), Arc::clone(&log));
        let reader = thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Running { child, log, reader: Some(reader) }
    }

    /// The directory of the manifests.
    #[must_use]
    pub fn manifests(&self) -> &Path {
        self.manifests.path()
    }

    /// `--state-dir`
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        self.state_dir.path()
    }

    /// Arguments of a command that reads the pinned state.
    #[must_use]
    pub fn args<'a>(&'a self, command: &[&'a str]) -> Vec<&'a str> {
        let state_dir = self.state_dir().to_str().expect("a path in UTF-8");
        [command, &["--pin-path", &self.pin_path, "--state-dir", state_dir]].concat()
    }

    /// Runs a command that reads the pinned state.
    #[must_use]
    pub fn run(&self, command: &[&str]) -> Output {
        run(&self.binary, &self.args(command))
    }

    /// The same for one that must succeed, which returns what it prints.
    #[expect(clippy::must_use_candidate, reason = "a program may run for its effect alone")]
    pub fn text(&self, command: &[&str]) -> String {
        text(&self.binary, &self.args(command))
    }

    /// The same for one that prints JSON.
    #[must_use]
    pub fn json(&self, command: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.text(command)).expect("JSON")
    }
}

/// An agent that is killed on drop.
#[derive(Debug)]
pub struct Running {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Running {
    /// Stops the agent with a signal and returns its exit status.
    #[must_use]
    pub fn end(mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        self.child.wait().expect("a child").code()
    }

    /// The same, with its log.
    #[must_use]
    pub fn end_with_log(self, signal: Signal) -> (Option<i32>, Vec<String>) {
        self.signal(signal);
        self.wait()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("a child");
    }

    /// Waits until the agent exits by itself. Returns its exit status and log.
    #[must_use]
    pub fn wait(mut self) -> (Option<i32>, Vec<String>) {
        let code = self.child.wait().expect("a child").code();
        let end = self.reader.take().map(thread::JoinHandle::join);
        assert!(end.is_none_or(|end| end.is_ok()), "the reader of the log panicked");
        (code, self.log())
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has exited, without waiting.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let id = Id::Pid(Pid::from_raw(self.child.id().cast_signed()));
        // Keeps it waitable.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(id, flags), Ok(WaitStatus::StillAlive))
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The number of lines of its log that contain this.
    #[must_use]
    pub fn n_said(&self, what: &str) -> usize {
        self.log().iter().filter(|line| line.contains(what)).count()
    }

    /// Whether a line of its log contains this.
    #[must_use]
    pub fn has_said(&self, what: &str) -> bool {
        self.n_said(what) > 0
    }

    /// Whether a line of its log contains all of this.
    #[must_use]
    pub fn has_said_all(&self, parts: &[&str]) -> bool {
        self.log().iter().any(|line| parts.iter().all(|part| line.contains(part)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}

/// Waits until the agent has caught up.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..3000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("never happened: {what}");
}
