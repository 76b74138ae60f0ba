//! A real etcd and kube-apiserver, if the environment names them.
//!
//! # Purpose
//!
//! `KUBEBUILDER_ASSETS` names a directory with the programs `etcd` and `kube-apiserver`, as for
//! controller-runtime's envtest. [`ControlPlane`] runs them. Tests that inject no faults run against them and
//! against [`ApiServer`]. No package of Debian, crates.io, `PyPI` or npm has a kube-apiserver, so without the
//! variable these tests use the test server only.
//!
//! # Invariants
//!
//! - If the variable is set but a program is missing, that is an error, not a skip.
//! - Everything listens on 127.0.0.1 in the network namespace of the thread that starts it, and stops when
//!   the value is dropped.

use std::{
    env, fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    apiserver::{self, ApiServer, Kind},
    cluster::{self, Cluster},
    process::Logged,
};

/// Names the directory of the programs.
pub const ASSETS: &str = "KUBEBUILDER_ASSETS";
/// How long a program may take to start.
const PATIENCE: Duration = Duration::from_secs(60);
/// The tests' token. The server allows it everything.
const TOKEN: &str = "test";

/// What a test needs of an API server, test or real.
pub trait Api {
    /// A kubeconfig for the server.
    fn kubeconfig(&self) -> String;

    /// Creates or replaces an object.
    ///
    /// # Panics
    ///
    /// If the object is refused.
    fn apply(&self, object: cluster::Object);

    /// Creates or replaces a Pod.
    ///
    /// # Panics
    ///
    /// If the Pod is refused.
    fn apply_pod(&self, pod: &Pod);

    /// Deletes an object. A Node has an empty namespace.
    ///
    /// # Panics
    ///
    /// If the object does not exist.
    fn delete(&self, kind: Kind, namespace: &str, name: &str);

    /// All objects, including those that the server created itself.
    ///
    /// # Panics
    ///
    /// If the server does not answer.
    fn cluster(&self) -> Cluster;
}

impl Api for ApiServer {
    fn kubeconfig(&self) -> String {
        self.kubeconfig()
    }

    fn apply(&self, object: cluster::Object) {
        self.apply(object);
    }

    fn apply_pod(&self, pod: &Pod) {
        self.apply_pod(pod);
    }

    fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        self.delete(kind, namespace, name);
    }

    fn cluster(&self) -> Cluster {
        self.cluster()
    }
}

/// The test server and, if the environment names one, a real one.
///
/// # Panics
///
/// If the environment names one that does not start.
#[must_use]
pub fn servers() -> Vec<Box<dyn Api>> {
    let assets = Assets::of_environment().unwrap_or_else(|error| panic!("{error:#}"));
    let real = assets.map(|assets| ControlPlane::start(&assets).unwrap_or_else(|error| panic!("{error:#}")));
    let mut servers: Vec<Box<dyn Api>> = vec![Box::new(ApiServer::start())];
    servers.extend(real.map(|real| Box::new(real) as Box<dyn Api>));
    servers
}

/// The programs of a control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assets {
    etcd: PathBuf,
    apiserver: PathBuf,
}

impl Assets {
    /// The programs in `KUBEBUILDER_ASSETS`; `None` if it is not set.
    ///
    /// # Errors
    ///
    /// As [`Self::in_directory`].
    pub fn of_environment() -> anyhow::Result<Option<Self>> {
        match env::var_os(ASSETS) {
            Some(directory) if !directory.is_empty() => Self::in_directory(Path::new(&directory)).map(Some),
            _ => Ok(None),
        }
    }

    /// The programs in a directory.
    ///
    /// # Errors
    ///
    /// If one of them is missing.
    pub fn in_directory(directory: &Path) -> anyhow::Result<Self> {
        let program = |name: &str| {
            let path = directory.join(name);
            ensure!(
                path.is_file(),
                "{ASSETS}: {} is missing; unset the variable or name a directory with both programs",
                path.display()
            );
            Ok(path)
        };
        Ok(Self { etcd: program("etcd")?, apiserver: program("kube-apiserver")? })
    }
}

/// A real API server with its own etcd.
#[derive(Debug)]
pub struct ControlPlane {
    address: SocketAddr,
    // Dropped before the etcd that it uses.
    apiserver: Logged,
    _etcd: Logged,
    directory: TempDir,
}

impl ControlPlane {
    /// Starts both and waits until the API server is ready and has created its own objects.
    ///
    /// # Errors
    ///
    /// If one of them exits or does not become ready; with the end of its log. Needs `kubectl` and `openssl`.
    pub fn start(assets: &Assets) -> anyhow::Result<Self> {
        let place = tempfile::tempdir()?;
        let directory = place.path();
        let etcd_address = free_port()?;
        let url = format!("http://{etcd_address}");
        let arguments = [
            "--name=test".to_owned(),
            format!("--data-dir={}", directory.join("data").display()),
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            // No other member joins.
            "--listen-peer-urls=http://127.0.0.1:0".to_owned(),
        ];
        let mut etcd = start("etcd", &assets.etcd, directory, &arguments)?;
        etcd.until("etcd", PATIENCE, || TcpStream::connect(etcd_address).is_ok())?;
        let (key, tokens) = (directory.join("service-accounts.key"), directory.join("tokens"));
        // Service account tokens are not used, but the server does not start without a key for them.
        let made = Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(&key)
            .output()
            .context("openssl cannot be started: install it")?;
        ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        fs::write(&tokens, format!("{TOKEN},test,test,system:masters\n"))?;
        let address = free_port()?;
        let arguments = [
            format!("--etcd-servers={url}"),
            format!("--cert-dir={}", directory.join("certificates").display()),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", address.port()),
            "--service-cluster-ip-range=10.96.0.0/12".to_owned(),
            "--authorization-mode=AlwaysAllow".to_owned(),
            format!("--token-auth-file={}", tokens.display()),
            // There is no controller to create the accounts.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--service-account-issuer=https://127.0.0.1".to_owned(),
            format!("--service-account-key-file={}", key.display()),
            format!("--service-account-signing-key-file={}", key.display()),
        ];
        let apiserver = start("kube-apiserver", &assets.apiserver, directory, &arguments)?;
        let mut server = Self { address, apiserver, _etcd: etcd, directory: place };
        fs::write(server.config(), server.kubeconfig())?;
        let config = server.config();
        server.apiserver.until("kube-apiserver", PATIENCE, || {
            let asks = [["get", "--raw", "/readyz"], ["get", "service", "kubernetes"]];
            asks.iter().all(|ask| kubectl(&config, ask, None).is_ok())
        })?;
        Ok(server)
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    fn kubectl(&self, arguments: &[&str], input: Option<&Value>) -> String {
        kubectl(&self.config(), arguments, input).unwrap_or_else(|error| panic!("{error:#}"))
    }
}

fn start(name: &str, binary: &Path, directory: &Path, arguments: &[String]) -> anyhow::Result<Logged> {
    let mut command = Command::new(binary);
    Logged::start(command.args(arguments).current_dir(directory), directory.join(format!("{name}.log")))
}

/// Runs kubectl and returns its output.
fn kubectl(config: &Path, arguments: &[&str], input: Option<&Value>) -> anyhow::Result<String> {
    let mut child = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(config)
        .args(arguments)
        .env("HOME", config.parent().unwrap_or(config))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("kubectl cannot be started: install it")?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        stdin.write_all(input.to_string().as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "kubectl {arguments:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Api for ControlPlane {
    fn kubeconfig(&self) -> String {
        // The server has just created its own self-signed certificate.
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: 'https://{}', insecure-skip-tls-verify: true}}}}]\n\
             users: [{{name: test, user: {{token: {TOKEN}}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n",
            self.address
        )
    }

    fn apply(&self, object: cluster::Object) {
        let (kind, value) = apiserver::value(object);
        self.put(kind, &value);
    }

    fn apply_pod(&self, pod: &Pod) {
        let value = serde_json::to_value(pod).expect("objects of the API are JSON");
        self.put(Kind::Pod, &value);
    }

    fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        let namespace = if namespace.is_empty() { "default" } else { namespace };
        let mut arguments = vec!["delete", kind.plural(), name, "-n", namespace, "--wait=true"];
        if kind == Kind::Pod {
            // There is no kubelet to stop it.
            arguments.extend(["--force", "--grace-period=0"]);
        }
        let _answer = self.kubectl(&arguments, None);
    }

    fn cluster(&self) -> Cluster {
        let kinds = [Kind::Service, Kind::Slice, Kind::Node, Kind::ServiceCidr];
        // Servers before 1.33 have no ServiceCIDRs.
        let has_cidrs =
            kubectl(&self.config(), &["get", "--raw", "/apis/networking.k8s.io/v1/servicecidrs"], None);
        let kinds = kinds.into_iter().filter(|kind| *kind != Kind::ServiceCidr || has_cidrs.is_ok());
        let objects = kinds.flat_map(|kind| {
            let text = self.kubectl(&["get", kind.plural(), "--all-namespaces", "-o", "json"], None);
            let mut list: Value = serde_json::from_str(&text).expect("kubectl prints JSON");
            list["items"].as_array_mut().map(std::mem::take).unwrap_or_default()
        });
        Cluster::new().with(objects.map(|object| cluster::object(&object).expect("an object of the API")))
    }
}

impl ControlPlane {
    fn put(&self, kind: Kind, value: &Value) {
        // Replaces the whole object, so that omitted fields are removed; a new one cannot be replaced.
        let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = value["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
        let get = ["get", kind.plural(), &name, "-n", &namespace, "--ignore-not-found", "-o", "name"];
        let action = if self.kubectl(&get, None).is_empty() { "create" } else { "replace" };
        let _answer = self.kubectl(&[action, "-f", "-"], Some(value));
    }
}

/// A port that is free at the moment.
fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn script(directory: &Path, name: &str, text: &str) {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn programs_that_are_missing_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let says = |part: &str| {
            let error = Assets::in_directory(directory.path()).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(ASSETS), "{error}");
        };
        says("/etcd is missing");
        script(directory.path(), "etcd", "exit 0");
        says("/kube-apiserver is missing");
        script(directory.path(), "kube-apiserver", "exit 0");
        let assets = Assets::in_directory(directory.path()).unwrap();
        assert_eq!(assets.etcd, directory.path().join("etcd"));
    }

    #[test]
    fn a_program_that_ends_says_why() {
        let directory = tempfile::tempdir().unwrap();
        script(directory.path(), "etcd", "echo out of luck >&2; exit 3");
        script(directory.path(), "kube-apiserver", "exit 0");
        let assets = Assets::in_directory(directory.path()).unwrap();
        let error = ControlPlane::start(&assets).unwrap_err().to_string();
        assert!(error.contains("etcd exited (exit status: 3)") && error.contains("out of luck"), "{error}");
    }
}
