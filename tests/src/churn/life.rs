//! The agent's processes: how they start, exit and replace each other.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Command, ExitStatus},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use lb_core::plan::Capacity;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use super::{N_MIXED, PATIENCE, Random};
use crate::{
    Sandbox,
    apiserver::ApiServer,
    process::{self, Logged},
};

/// Map sizes for agents. Everything fits in each of them.
const SIZES: [Capacity; 4] = [
    Capacity { services: 1024, endpoints: 4096 },
    Capacity { services: 2048, endpoints: 4096 },
    Capacity { services: 512, endpoints: 2048 },
    Capacity { services: 1024, endpoints: 8192 },
];

/// Map layouts for agents: none but its own, other layouts of maps outside the image, other layouts of maps
/// of the image.
const LAYOUTS: [&str; 6] = [
    "",
    "sockets:90",
    "affinity:90,socket_storage:90",
    "excluded:91",
    "frontends:90",
    "services4:91,meta:91",
];

/// The binary with fault points, which can kill itself.
const WITH_FAULT_POINTS: usize = 0;

/// How long an agent may take to exit after SIGTERM, or until it kills itself.
const END: Duration = Duration::from_secs(20);

/// How many agents exited, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// `SIGKILL` from outside, at any time.
    pub n_kills: u64,
    /// `SIGKILL` between two changes to the kernel.
    pub n_faults: u64,
    /// `SIGTERM`.
    pub n_ends: u64,
    /// A new agent, of another build, was started first and waited for the old one's exit.
    pub n_upgrades: u64,
    /// Maps of another layout.
    pub n_layouts: u64,
    /// Maps of other sizes.
    pub n_sizes: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    binary: usize,
    capacity: Capacity,
    /// Layout numbers of maps, as `SOCKLB_LAYOUT` takes them.
    layout: &'static str,
    /// The change to the kernel before which it kills itself.
    fault_at: Option<usize>,
}

impl Start {
    /// The first binary, with its own layout and maps in which all services fit.
    pub(super) fn with_room_for(n_services: usize) -> Self {
        let capacity = if n_services > N_MIXED { Capacity::default() } else { SIZES[0] };
        Self { binary: 0, capacity, layout: "", fault_at: None }
    }
}

/// What other threads may read about the agent at any time.
#[derive(Debug)]
pub(super) struct Present {
    pid: AtomicU32,
    started: Mutex<Instant>,
    /// When an agent or the API server was last disturbed.
    disturbed: Mutex<Instant>,
    /// Agents that were killed or stopped.
    n_ended: AtomicU64,
    /// Bytes that they had written to disk.
    written: AtomicU64,
    pub(super) state_dir: PathBuf,
}

impl Present {
    fn new(state_dir: PathBuf) -> Self {
        let now = Instant::now();
        Self {
            pid: AtomicU32::default(),
            started: Mutex::new(now),
            disturbed: Mutex::new(now),
            n_ended: AtomicU64::default(),
            written: AtomicU64::default(),
            state_dir,
        }
    }

    /// Records a disturbance of the agent or its server.
    pub(super) fn disturb(&self) {
        *self.disturbed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn disturbed(&self) -> Instant {
        *self.disturbed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    pub(super) fn age(&self) -> Duration {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    pub(super) fn n_ended(&self) -> u64 {
        self.n_ended.load(Ordering::Relaxed)
    }

    /// Bytes that all agents have written to disk so far.
    pub(super) fn written(&self) -> u64 {
        // This order counts none twice. An agent that exits meanwhile counts in the next sum.
        let ended = self.written.load(Ordering::SeqCst);
        ended + process::written(self.pid()).unwrap_or_default()
    }
}

/// A process. Killed on drop.
struct Process {
    logged: Logged,
    present: Arc<Present>,
}

impl Process {
    fn end(mut self, signal: Signal) -> anyhow::Result<()> {
        self.present.disturb();
        kill(Pid::from_raw(self.logged.child.id().cast_signed()), signal)?;
        let status = self.wait(&AtomicBool::new(false))?;
        // Before it installs its handler, the signal itself kills it.
        let has_begun = !self.logged.log().is_empty();
        let is_expected = status.success()
            || signal == Signal::SIGKILL
            || (!has_begun && status.signal() == Some(signal as i32));
        ensure!(is_expected, "the agent exited: {status}; {}", self.logged.last_words());
        Ok(())
    }

    /// Waits until it exits, or kills it when told to stop.
    fn wait(&mut self, stop: &AtomicBool) -> anyhow::Result<ExitStatus> {
        let end = Instant::now() + END;
        let mut written = 0;
        loop {
            if stop.load(Ordering::Relaxed) {
                self.logged.child.kill()?;
            }
            // Readable until the process has been waited for.
            written = process::written(self.logged.child.id()).unwrap_or(written);
            if let Some(status) = self.logged.child.try_wait()? {
                let _before = self.present.written.fetch_add(written, Ordering::SeqCst);
                let _before = self.present.n_ended.fetch_add(1, Ordering::Relaxed);
                return Ok(status);
            }
            ensure!(Instant::now() < end, "the agent does not exit; {}", self.logged.last_words());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The agent of a node: a sequence of processes.
pub(super) struct Life<'a> {
    sandbox: &'a Sandbox,
    binaries: &'a [PathBuf],
    directory: TempDir,
    random: Random,
    start: Start,
    process: Option<Process>,
    n_started: usize,
    present: Arc<Present>,
    pub(super) events: Events,
}

impl<'a> Life<'a> {
    pub(super) fn begin(
        binaries: &'a [PathBuf],
        sandbox: &'a Sandbox,
        server: &ApiServer,
        seed: u64,
        start: Start,
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("kubeconfig"), server.kubeconfig())?;
        let present = Arc::new(Present::new(directory.path().join("state")));
        let random = Random(seed ^ 0x6c69_6665);
        let (events, n_started, process) = (Events::default(), 0, None);
        let mut life =
            Self { sandbox, binaries, directory, random, start, process, n_started, present, events };
        life.process = Some(life.spawn(life.start)?);
        Ok(life)
    }

    fn spawn(&mut self, start: Start) -> anyhow::Result<Process> {
        let binary = &self.binaries[start.binary % self.binaries.len()];
        let directory = self.directory.path();
        let log = directory.join(format!("log-{}", self.n_started));
        self.n_started += 1;
        let mut command = Command::new(binary);
        command
            .args(["run", "--source", "kube", "--node-name", "node", "--kubeconfig"])
            .arg(directory.join("kubeconfig"))
            // Without the self-test's service: the maps are compared with the server's objects.
            .args(["--self-test-interval", "0"])
            .args(["--max-services", &start.capacity.services.to_string()])
            .args(["--max-endpoints", &start.capacity.endpoints.to_string(), "--cgroup"])
            .arg(self.sandbox.cgroup().path())
            .arg("--pin-path")
            .arg(self.sandbox.pin_path())
            .arg("--state-dir")
            .arg(&self.present.state_dir)
            // Through the environment: an older build ignores it, but would reject an unknown flag.
            .env("SOCKLB_NODE_PORTS_OF_OTHER_NODES", "true");
        if !start.layout.is_empty() {
            command.env("SOCKLB_LAYOUT", start.layout);
        }
        if let Some(at) = start.fault_at {
            command.env("SOCKLB_FAULT_AT", at.to_string());
        }
        let logged = Logged::start(&mut command, log)?;
        self.present.pid.store(logged.child.id(), Ordering::Relaxed);
        *self.present.started.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.present.disturb();
        Ok(Process { logged, present: Arc::clone(&self.present) })
    }

    /// What other threads may read about the agent.
    pub(super) fn present(&self) -> Arc<Present> {
        Arc::clone(&self.present)
    }

    /// Kills agents until told to stop. Most live for about `mean`, some are killed during start, and every
    /// tenth lives long enough to show what grows with time.
    pub(super) fn kill_now_and_then(&mut self, mean: Duration, stop: &AtomicBool) -> anyhow::Result<()> {
        loop {
            let spread = mean / 2 + mean * u32::try_from(self.random.below(1000)).unwrap_or_default() / 1000;
            let life = match self.events.n_kills % 10 {
                4 => mean * 12,
                7 => spread / 40,
                _ => spread,
            };
            let end = Instant::now() + life;
            while Instant::now() < end {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                thread::sleep(Duration::from_millis(20));
            }
            self.events.n_kills += 1;
            self.replace(self.start, Signal::SIGKILL)?;
        }
    }

    /// Kills, stops and replaces agents, `n` times or until told to stop. The last agent has the standard
    /// layout.
    pub(super) fn go_on(&mut self, n: u64, stop: &AtomicBool) -> anyhow::Result<()> {
        for _ in 0..n {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            self.event(stop)?;
            // Half of them are killed before the agent has done anything, or during its first plan.
            if self.random.below(2) == 0 {
                thread::sleep(Duration::from_millis(self.random.next() % 250));
            } else {
                self.until_at_work(stop)?;
            }
        }
        if n > 0 {
            self.replace(Start { layout: "", ..self.start }, Signal::SIGTERM)?;
        }
        Ok(())
    }

    fn event(&mut self, stop: &AtomicBool) -> anyhow::Result<()> {
        let signal = if self.random.below(2) == 0 { Signal::SIGKILL } else { Signal::SIGTERM };
        let mut next = self.start;
        match self.random.below(8) {
            0..2 => {
                self.events.n_kills += 1;
                return self.replace(next, Signal::SIGKILL);
            }
            2 => {
                self.events.n_ends += 1;
                return self.replace(next, Signal::SIGTERM);
            }
            3 => {
                next.binary += 1;
                self.events.n_upgrades += 1;
                let new = self.spawn(next)?;
                thread::sleep(Duration::from_millis(self.random.next() % 200));
                if let Some(old) = self.process.replace(new) {
                    old.end(signal)?;
                }
                self.start = next;
                return Ok(());
            }
            4 => {
                self.events.n_sizes += 1;
                next.capacity = SIZES[self.random.below(SIZES.len())];
            }
            5 => {
                self.events.n_layouts += 1;
                next.binary = WITH_FAULT_POINTS;
                next.layout = LAYOUTS[self.random.below(LAYOUTS.len())];
            }
            _ => {
                self.events.n_faults += 1;
                // While it attaches, or later.
                let most = [20, 300][self.random.below(2)];
                let at = 1 + self.random.below(most);
                next.binary = WITH_FAULT_POINTS;
                self.replace(Start { fault_at: Some(at), ..next }, signal)?;
                // Changes continue, so this number is reached.
                if let Some(mut process) = self.process.take() {
                    let status = process.wait(stop)?;
                    ensure!(!status.success(), "an agent that should have killed itself exited: {status}");
                }
                self.process = Some(self.spawn(next)?);
                return Ok(());
            }
        }
        self.replace(next, signal)
    }

    /// Stops the process with a signal, then starts the next.
    fn replace(&mut self, next: Start, signal: Signal) -> anyhow::Result<()> {
        if let Some(process) = self.process.take() {
            process.end(signal)?;
        }
        self.process = Some(self.spawn(next)?);
        self.start = Start { fault_at: None, ..next };
        Ok(())
    }

    fn until_at_work(&self, stop: &AtomicBool) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        let has_begun = |process: &Process| process.logged.log().contains("synced for the first time");
        while !self.process.as_ref().is_none_or(has_begun) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if Instant::now() > end {
                bail!("the agent does not begin; {}", self.last_words());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub(super) fn capacity(&self) -> Capacity {
        self.start.capacity
    }

    /// The last lines of the current process's log.
    pub(super) fn last_words(&self) -> String {
        let words = self.process.as_ref().map(|process| process.logged.last_words());
        words.map_or_else(|| "no agent runs".to_owned(), |words| format!("the agent: {words}"))
    }

    /// Stops the last process and checks its exit.
    pub(super) fn end(mut self) -> anyhow::Result<Events> {
        if let Some(process) = self.process.take() {
            process.end(Signal::SIGTERM)?;
        }
        Ok(self.events)
    }
}
