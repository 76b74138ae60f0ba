//! The API server's address and the credentials.

use std::{
    env, fs,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::{runtime::Handle, sync::Semaphore, task::spawn_blocking, time::timeout};

/// A pod's credentials.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
const CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
/// Set in every pod.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";
/// Timeout of a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Timeout of the credentials. A kubeconfig may name a program that fetches them.
const CREDENTIALS: Duration = Duration::from_secs(60);
/// Maximum size of a kubeconfig, certificate, key or token, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// One client is made at a time: a hanging exec program holds a thread, and every kind makes its own client.
static MAKING: Semaphore = Semaphore::const_new(1);

/// Why there is no client for an API server. These are settings, so the caller reports the error and exits. A
/// server that does not answer is not among them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file of `--kubeconfig` is unusable.
    #[error("--kubeconfig {}: {}: give a file with which `kubectl --kubeconfig` works", path.display(), cause(&**problem))]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The cause, which the message names.
        problem: Box<KubeconfigError>,
    },
    /// The kubeconfig from the environment is unusable.
    #[error(
        "the kubeconfig of $KUBECONFIG or ~/.kube/config: {}: fix it or name another with --kubeconfig",
        cause(&**problem)
    )]
    FoundKubeconfig {
        /// The cause, which the message names.
        problem: Box<KubeconfigError>,
    },
    /// The pod's credentials are unusable.
    #[error("the credentials of this pod: {}: does it have a service account?", cause(&**problem))]
    InCluster {
        /// The cause, which the message names.
        problem: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is neither a kubeconfig nor a pod's credentials.
    #[error(
        "neither a kubeconfig nor a pod's credentials found: name a kubeconfig with --kubeconfig, or use \
         --source file:PATH"
    )]
    Nothing,
    /// `--apiserver` is not an address.
    #[error("--apiserver {given:?}: {URL_HINT}")]
    Apiserver {
        /// As given.
        given: String,
    },
    /// A file is too large for credentials.
    #[error(
        "{}: is a device or larger than {} MiB: no kubeconfig, certificate, key or token is; name the right \
         file",
        path.display(), MAX_FILE >> 20
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Fetching the credentials timed out.
    #[error(
        "the credentials for the API server did not arrive within {} s: does the kubeconfig's exec program \
         hang?",
        CREDENTIALS.as_secs()
    )]
    Late,
    /// The credentials make no client: a certificate or key is unreadable.
    #[error("API server {server}: the credentials are unusable: {}: does kubectl work with them?", cause(&**problem))]
    Client {
        /// The server's URL.
        server: String,
        /// The cause, which the message names.
        problem: Box<kube::Error>,
    },
}

/// Which API server to ask, and as whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// `--kubeconfig`
    pub kubeconfig: Option<PathBuf>,
    /// `--apiserver`: its address, instead of the credentials' own.
    pub apiserver: Option<String>,
}

impl Access {
    /// Whether any setting names an API server. It may still be unusable.
    #[must_use]
    pub fn is_found(&self) -> bool {
        self.kubeconfig.is_some() || self.apiserver.is_some() || kubeconfig_is_found() || is_in_pod()
    }

    /// Makes a client, without contacting the server. Also returns the server's URL.
    ///
    /// Reads files and runs exec programs on a blocking thread. The output of such a program is unbounded.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub(super) async fn client(&self) -> Result<(Client, String), Error> {
        let access = self.clone();
        let making = async {
            // The semaphore is never closed.
            let place = MAKING.acquire().await.ok();
            let runtime = Handle::current();
            let made = spawn_blocking(move || {
                let made = runtime.block_on(access.make());
                drop(place);
                made
            });
            // No result: the runtime is shutting down.
            made.await.unwrap_or(Err(Error::Late))
        };
        timeout(CREDENTIALS, making).await.unwrap_or(Err(Error::Late))
    }

    async fn make(&self) -> Result<(Client, String), Error> {
        let mut config = self.config().await?;
        config.connect_timeout = Some(CONNECT);
        // The callers decide on retries.
        config.default_retry = false;
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let client = Client::try_from(config)
            .map_err(|source| Error::Client { server: server.clone(), problem: source.into() })?;
        Ok((client, server))
    }

    async fn config(&self) -> Result<Config, Error> {
        let apiserver = self.apiserver.as_deref().map(url).transpose()?;
        let mut config = if let Some(path) = &self.kubeconfig {
            let failed =
                |source: KubeconfigError| Error::Kubeconfig { path: path.clone(), problem: source.into() };
            check(path)?;
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            check_named(&kubeconfig)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?
        } else if kubeconfig_is_found() {
            let failed = |source: KubeconfigError| Error::FoundKubeconfig { problem: source.into() };
            kubeconfigs().iter().try_for_each(|path| check(path))?;
            let kubeconfig = Kubeconfig::read().map_err(failed)?;
            check_named(&kubeconfig)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?
        } else if is_in_pod() {
            check(Path::new(TOKEN))?;
            check(Path::new(CA))?;
            Config::incluster().map_err(|source| Error::InCluster { problem: source.into() })?
        } else if let Some(apiserver) = &apiserver {
            Config::new(apiserver.clone())
        } else {
            return Err(Error::Nothing);
        };
        if let Some(apiserver) = apiserver {
            config.cluster_url = apiserver;
        }
        Ok(config)
    }
}

/// The root cause of a connection's error.
///
/// The errors above it only name the layers: "client error (Connect): tcp connect error".
pub(super) fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut root = error;
    while let Some(cause) = root.source() {
        root = cause;
    }
    if let Some(error) = root.downcast_ref::<std::io::Error>()
        && error.raw_os_error().is_some()
    {
        // Without the number.
        let text = error.to_string();
        return text.split(" (os error").next().unwrap_or_default().to_lowercase();
    }
    if root.is::<tokio::time::error::Elapsed>() {
        return format!("no connection within {} s", CONNECT.as_secs());
    }
    root.to_string()
}

const URL_HINT: &str = "expected a URL such as https://10.0.0.1:6443";

/// Checks the address of an API server: a URL, or host and port.
///
/// # Errors
///
/// A hint of what is expected.
pub fn apiserver(given: &str) -> Result<String, String> {
    url(given).map(|_url| given.to_owned()).map_err(|_no_url| URL_HINT.to_owned())
}

fn url(given: &str) -> Result<http::Uri, Error> {
    let text = if given.contains("://") { given.to_owned() } else { format!("https://{given}") };
    let parsed: Option<http::Uri> = text.parse().ok();
    // The parser accepts port numbers that are too large.
    let is_addressable = |url: &http::Uri| {
        url.authority().is_some_and(|authority| {
            authority.as_str().ends_with(authority.host()) || url.port_u16().is_some()
        })
    };
    parsed
        .filter(is_addressable)
        .filter(|url| {
            matches!(url.scheme_str(), Some("http" | "https"))
                && url.host().is_some_and(|host| !host.is_empty())
        })
        .ok_or_else(|| Error::Apiserver { given: given.to_owned() })
}

/// Refuses files that cannot be credentials, since kube reads them whole. Unreadable files pass: kube reports
/// them.
fn check(path: &Path) -> Result<(), Error> {
    let is_fit = fs::metadata(path).map_or(true, |found| {
        let kind = found.file_type();
        found.len() <= MAX_FILE && !kind.is_char_device() && !kind.is_block_device()
    });
    if is_fit { Ok(()) } else { Err(Error::TooLarge { path: path.to_owned() }) }
}

/// The same for the files that a kubeconfig names.
fn check_named(kubeconfig: &Kubeconfig) -> Result<(), Error> {
    let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
    let users = kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref());
    let certificates = clusters.map(|cluster| &cluster.certificate_authority);
    let credentials = users.flat_map(|user| [&user.client_certificate, &user.client_key, &user.token_file]);
    certificates.chain(credentials).flatten().try_for_each(|path| check(Path::new(path)))
}

fn kubeconfig_is_found() -> bool {
    env::var_os("KUBECONFIG").is_some_and(|paths| !paths.is_empty())
        || kubeconfigs().iter().any(|path| path.is_file())
}

/// Kubeconfigs that kube reads without a flag.
fn kubeconfigs() -> Vec<PathBuf> {
    match env::var_os("KUBECONFIG") {
        Some(paths) if !paths.is_empty() => env::split_paths(&paths).collect(),
        _ => env::home_dir().map(|home| home.join(".kube/config")).into_iter().collect(),
    }
}

fn is_in_pod() -> bool {
    env::var_os(SERVICE_HOST).is_some_and(|host| !host.is_empty()) && Path::new(TOKEN).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_api_servers() {
        for (given, expected) in [
            ("https://10.0.0.1:6443", "https://10.0.0.1:6443/"),
            ("10.0.0.1:6443", "https://10.0.0.1:6443/"),
            ("http://[fd00::1]:8001", "http://[fd00::1]:8001/"),
            ("api.example.com", "https://api.example.com/"),
        ] {
            assert_eq!(url(given).unwrap().to_string(), expected, "{given}");
        }
        for wrong in ["", "ftp://10.0.0.1", "https://", "10.0.0.1:99999", "a b"] {
            assert!(matches!(url(wrong), Err(Error::Apiserver { .. })), "{wrong}");
            assert_eq!(apiserver(wrong), Err(URL_HINT.to_owned()));
        }
    }

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_used_is_named_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        let access = Access { kubeconfig: Some(path.clone()), apiserver: None };
        let says = async |cause: &str| {
            let Err(error) = access.client().await else { panic!("usable") };
            let message = format!("{:#}", anyhow::Error::from(error));
            assert!(message.starts_with(&format!("--kubeconfig {}: ", path.display())), "{message}");
            assert!(message.contains(cause) && message.contains("kubectl"), "{message}");
            assert_eq!(message.matches(path.to_str().unwrap()).count(), 1, "{message}");
        };
        says("no such file").await;
        std::fs::write(&path, "apiVersion: v1\nkind: Config\ncurrent-context: other\n").unwrap();
        says("context").await;
    }

    /// A kubeconfig with one user.
    fn kubeconfig(user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: a\nclusters: [{{name: a, cluster: {{server: 'http://127.0.0.1:1'}}}}]\n\
             users: [{{name: a, user: {user}}}]\ncontexts: [{{name: a, context: {{cluster: a, user: a}}}}]\n"
        )
    }

    #[tokio::test]
    async fn files_that_cannot_be_credentials_are_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let [path, large] = ["config", "large"].map(|name| directory.path().join(name));
        fs::File::create(&large).unwrap().set_len(MAX_FILE + 1).unwrap();
        let refuses = async |given: &Path, named: &str| {
            let access = Access { kubeconfig: Some(given.to_owned()), apiserver: None };
            let Err(error) = access.client().await else { panic!("{named} was read") };
            let message = error.to_string();
            assert!(matches!(error, Error::TooLarge { .. }) && message.starts_with(named), "{message}");
        };
        let name = large.to_str().unwrap();
        refuses(&large, name).await;
        refuses(Path::new("/dev/zero"), "/dev/zero").await;
        for field in ["tokenFile", "client-certificate", "client-key"] {
            fs::write(&path, kubeconfig(&format!("{{{field}: {name}}}"))).unwrap();
            refuses(&path, name).await;
        }
    }

    /// Other tasks run while a program fetches credentials, however many kinds wait for them.
    #[tokio::test]
    async fn a_program_that_takes_its_time_holds_up_no_other_task() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        let credentials = r#"{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "t"}}"#;
        let script = format!("sleep 0.5; echo '{credentials}'").replace('\'', "''");
        let exec = format!(
            "{{exec: {{apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: sh, \
             args: ['-c', '{script}']}}}}"
        );
        fs::write(&path, kubeconfig(&exec)).unwrap();
        let access = Access { kubeconfig: Some(path), apiserver: None };
        let (mut n_ticks, mut interval) = (0, tokio::time::interval(Duration::from_millis(10)));
        let made = async { tokio::join!(access.client(), access.client()) };
        tokio::pin!(made);
        let (first, second) = loop {
            tokio::select! {
                made = &mut made => break made,
                _ = interval.tick() => n_ticks += 1,
            }
        };
        assert!(first.is_ok() && second.is_ok(), "{:?} {:?}", first.err(), second.err());
        assert!(n_ticks >= 50, "{n_ticks} ticks in a second");
    }
}
