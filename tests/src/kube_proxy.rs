//! kube-proxy, if the environment names it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::ensure;
use serde_json::{Value, json};

use crate::apiserver::ApiServer;

/// Names the program kube-proxy.
const KUBE_PROXY: &str = "KUBE_PROXY";
/// Names a directory with Kubernetes programs.
const KUBE_BIN: &str = "KUBE_BIN";

/// The program kube-proxy that the environment names: `KUBE_PROXY`, or in the directories `KUBE_BIN` and
/// `PATH`. `None` if there is none.
///
/// # Errors
///
/// If `KUBE_PROXY` names no file.
pub fn find() -> anyhow::Result<Option<PathBuf>> {
    if let Some(program) = env::var_os(KUBE_PROXY) {
        let program = PathBuf::from(program);
        ensure!(program.is_file(), "{KUBE_PROXY}: {} is no file", program.display());
        return Ok(Some(program));
    }
    let directories = [KUBE_BIN, "PATH"].into_iter().filter_map(env::var_os);
    let mut programs = directories
        .flat_map(|list| env::split_paths(&list).collect::<Vec<_>>())
        .map(|directory| directory.join("kube-proxy"));
    Ok(programs.find(|program| program.is_file()))
}

/// How a kube-proxy runs.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// `--proxy-mode`
    pub mode: &'a str,
    /// `--hostname-override`
    pub node: &'a str,
    /// `--cluster-cidr`, of one or of each family.
    pub pod_networks: &'a str,
}

impl Setup<'_> {
    /// The command that starts it, with its files in a directory of its own. It sets no sysctl, writes
    /// changes at once, and repeats nothing while calls are measured.
    ///
    /// # Errors
    ///
    /// If the files cannot be written.
    pub fn command(self, program: &Path, server: &ApiServer, directory: &Path) -> anyhow::Result<Command> {
        let kubeconfig = directory.join("kubeconfig");
        fs::write(&kubeconfig, server.kubeconfig())?;
        let config = directory.join("config");
        fs::write(&config, self.config(&kubeconfig).to_string())?;
        let mut command = Command::new(program);
        command.arg("--config").arg(config).arg(format!("--hostname-override={}", self.node));
        command.arg(format!("--master={}", server.url()));
        Ok(command)
    }

    fn config(self, kubeconfig: &Path) -> Value {
        let periods = json!({"minSyncPeriod": "1ms", "syncPeriod": "1h"});
        let mut iptables = periods.clone();
        iptables["localhostNodePorts"] = false.into();
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": self.mode,
            "clientConnection": {"kubeconfig": kubeconfig},
            "clusterCIDR": self.pod_networks,
            "detectLocalMode": "ClusterCIDR",
            "conntrack": {
                "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
            },
            "iptables": iptables,
            "nftables": periods,
            "oomScoreAdj": 0,
        })
    }
}
