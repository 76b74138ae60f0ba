//! Processes that follow an API server: the agent, and kube-proxy.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::symlink,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
pub(crate) use lb_tests::kube_proxy::find as kube_proxy;
use lb_tests::{Sandbox, apiserver::ApiServer, kube_proxy::Setup, process::Memory};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::objects::{NODE, POD_NETWORK};

/// The legacy version of iptables as one program, which obeys the name that it is called by.
const LEGACY_IPTABLES: &str = "/usr/sbin/xtables-legacy-multi";

/// A running process with its files. Killed on drop.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) started: Instant,
    directory: TempDir,
}

impl Daemon {
    /// Starts a process in the namespaces and cgroup of the calling thread. The directory is its own; its
    /// `kubeconfig` is that of the server.
    fn start(
        server: &ApiServer,
        command: impl FnOnce(&Path) -> anyhow::Result<Command>,
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("kubeconfig"), server.kubeconfig())?;
        let mut command = command(directory.path())?;
        let log = File::create(directory.path().join("log"))?;
        let started = Instant::now();
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let child = child
            .with_context(|| format!("{}: cannot be started", command.get_program().to_string_lossy()))?;
        Ok(Self { child, started, directory })
    }

    /// Starts the agent in a sandbox as on a node.
    pub(crate) fn socklb(
        socklb: &Path,
        sandbox: &Sandbox,
        server: &ApiServer,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        Self::start(server, |directory| {
            let mut command = Command::new(socklb);
            command.args(["run", "--source", "kube", "--node-name", NODE, "--kubeconfig"]);
            command.arg(directory.join("kubeconfig")).arg("--cgroup").arg(sandbox.cgroup().path());
            command.arg("--pin-path").arg(sandbox.pin_path());
            command.arg("--state-dir").arg(directory.join("state")).args(flags);
            Ok(command)
        })
    }

    /// Starts kube-proxy in the network namespace of the calling thread ([`Setup::command`]).
    ///
    /// In mode `iptables` it calls the legacy version if the kernel has its tables: the other one takes many
    /// times as long.
    pub(crate) fn kube_proxy(program: &Path, mode: &str, server: &ApiServer) -> anyhow::Result<Self> {
        Self::start(server, |directory| {
            if Command::new(LEGACY_IPTABLES)
                .args(["iptables", "-t", "nat", "-S"])
                .output()
                .is_ok_and(|output| output.status.success())
            {
                for name in ["iptables", "ip6tables"] {
                    for kind in ["", "-save", "-restore"] {
                        symlink(LEGACY_IPTABLES, directory.join(format!("{name}{kind}")))?;
                    }
                }
            }
            let path = env::var_os("PATH").unwrap_or_default();
            let paths = std::iter::once(directory.to_owned()).chain(env::split_paths(&path));
            let setup = Setup { mode, node: NODE, pod_networks: POD_NETWORK };
            let mut command = setup.command(program, server, directory)?;
            command.env("PATH", env::join_paths(paths)?);
            Ok(command)
        })
    }

    /// The end of the process's output, for an error.
    pub(crate) fn last_words(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("its log ends with:\n{}", lines[lines.len().saturating_sub(5)..].join("\n"))
    }

    pub(crate) fn memory(&self) -> anyhow::Result<Memory> {
        Memory::of(self.child.id())
    }

    /// The CPU time of all its threads so far, without threads that have exited.
    pub(crate) fn cpu_time(&self) -> anyhow::Result<Duration> {
        let mut sum = Duration::ZERO;
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            sum += crate::machine::thread_time(&task?.path());
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
    pub(crate) fn end(&mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "exited with {status}; {}", self.last_words());
        Ok(())
    }

    /// Stops the agent and removes its state from the kernel, so that the next start is a cold one.
    pub(crate) fn end_and_clean(mut self, socklb: &Path, sandbox: &Sandbox) -> anyhow::Result<()> {
        self.end()?;
        let mut command = Command::new(socklb);
        command.args(["cleanup", "--pin-path"]).arg(sandbox.pin_path());
        let output = command.arg("--state-dir").arg(self.directory.path().join("state")).output()?;
        ensure!(output.status.success(), "socklb cleanup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}
