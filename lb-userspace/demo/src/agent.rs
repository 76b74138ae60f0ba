//! The demo's agent: the real `socklb run`, as a process.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use lb_core::tables::Image;
use lb_kernel::Maps;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::Child,
    time::{sleep, timeout},
};

use super::{client::own_command, manifests, scenery::Scenery};

/// How long the kernel's tables may take to change.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often they are read meanwhile.
const POLL: Duration = Duration::from_micros(500);
/// How long the agent may take to stop.
const STOPPING: Duration = Duration::from_secs(3);
/// Number of the agent's last output lines in an error.
const SHOWN_LINES: usize = 40;

/// The `socklb` in the folder of this program.
pub(super) fn program_beside() -> Result<PathBuf> {
    let own = std::env::current_exe()
        .context("cannot find the folder of this program: name socklb with --socklb")?;
    Ok(own.with_file_name("socklb"))
}

/// The running agent.
#[derive(Debug)]
pub(super) struct Agent {
    process: Child,
    /// Its process id.
    pub pid: i32,
    /// Its command line, as shown.
    pub command_line: Vec<String>,
    /// Everything that it prints.
    log: PathBuf,
}

impl Agent {
    /// Starts the agent on the scenery's manifests.
    pub(super) fn start(program: &Path, scenery: &Scenery) -> Result<Self> {
        let show = |path: &Path| path.display().to_string();
        let source = format!("file:{}", scenery.manifests.display());
        let arguments: Vec<String> = vec![
            "run".to_owned(),
            format!("--source={source}"),
            // The self-test would add a service that is not the demo's.
            "--self-test-interval=0".to_owned(),
            format!("--node-name={}", manifests::NODE_NAME),
            format!("--cgroup={}", show(scenery.cgroup.path())),
            format!("--pin-path={}", show(&scenery.pins)),
            format!("--state-dir={}", show(&scenery.state)),
        ];
        let mut command = own_command("agent");
        command.arg(program).args(&arguments);
        // Settings for an agent on this host must not apply.
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"SOCKLB_"))
        {
            command.env_remove(name);
        }
        let log = scenery.log.clone();
        let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let process = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot share the agent's log")?)
            .stderr(output)
            .spawn()
            .context("cannot start the agent")?;
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok()).context("the agent exited at once")?;
        let command_line = [vec!["socklb".to_owned()], arguments].concat();
        Ok(Self { process, pid, command_line, log })
    }

    /// Waits until the kernel's tables satisfy a condition. Returns how long that took.
    ///
    /// # Errors
    ///
    /// If the agent exits, or the tables do not change in time; with the agent's last lines.
    pub(super) async fn wait_until(
        &mut self,
        pins: &Path,
        what: &str,
        is_wanted: impl Fn(&Image) -> bool,
    ) -> Result<Duration> {
        let began = Instant::now();
        let mut maps = None;
        loop {
            // The pins appear while the agent starts.
            if maps.is_none() {
                maps = Maps::open(pins).ok();
            }
            if let Some(maps) = &maps
                && is_wanted(&maps.image()?)
            {
                return Ok(began.elapsed());
            }
            self.check_alive()?;
            if began.elapsed() > PATIENCE {
                bail!("after {PATIENCE:?} the kernel's maps do not hold {what}; {}", self.last_lines());
            }
            sleep(POLL).await;
        }
    }

    /// Fails if the agent has exited.
    pub(super) fn check_alive(&mut self) -> Result<()> {
        let Some(status) = self.process.try_wait().context("cannot wait for the agent")? else {
            return Ok(());
        };
        bail!("the agent has exited ({status}); {}", self.last_lines())
    }

    /// Its last lines, as the end of an error.
    fn last_lines(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        if lines.is_empty() {
            return "it printed nothing".to_owned();
        }
        let first = lines.len().saturating_sub(SHOWN_LINES);
        format!("its last lines:\n  {}", lines[first..].join("\n  "))
    }

    /// Stops it with SIGTERM, or with SIGKILL if that takes too long.
    pub(super) async fn stop(mut self) -> Result<()> {
        // The id is the child's until this value waits for it.
        let _ended_already = kill(Pid::from_raw(self.pid), Signal::SIGTERM);
        match timeout(STOPPING, self.process.wait()).await {
            Ok(ended) => {
                ended.context("cannot wait for the agent")?;
                Ok(())
            }
            Err(_too_long) => self.process.kill().await.context("cannot kill the agent"),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Waits, so that the agent does not outlive the demo: freeing its maps takes the kernel a moment.
        let (pause, mut waited) = (Duration::from_millis(5), Duration::ZERO);
        while waited < STOPPING && matches!(self.process.try_wait(), Ok(None)) {
            let _ended_already = self.process.start_kill();
            thread::sleep(pause);
            waited += pause;
        }
    }
}
