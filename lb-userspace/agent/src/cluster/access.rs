//! Where the API server is and who asks.

use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};

/// Where a pod finds its credentials.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Set in every pod.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";
/// How long to wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Why there is no way to an API server. The caller tells the user and ends: these are settings. A server that does
/// not answer is none of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file of `--kubeconfig` cannot be used.
    #[error("--kubeconfig {}: cannot be used; give a file with which `kubectl --kubeconfig` works", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<KubeconfigError>,
    },
    /// The kubeconfig that the environment names cannot be used.
    #[error(
        "the kubeconfig of $KUBECONFIG or ~/.kube/config cannot be used; mend it or name another with --kubeconfig"
    )]
    FoundKubeconfig {
        /// The cause.
        #[source]
        source: Box<KubeconfigError>,
    },
    /// The credentials of the pod cannot be used.
    #[error("the credentials of this pod cannot be used; does it have a service account?")]
    InCluster {
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is neither a kubeconfig nor a pod's credentials.
    #[error(
        "no kubeconfig and no pod's credentials are found; name one with --kubeconfig, or use --source file:PATH"
    )]
    Nothing,
    /// `--apiserver` is no address.
    #[error("--apiserver {given:?}: {URL_HINT}")]
    Apiserver {
        /// As given.
        given: String,
    },
    /// The credentials do not make a client: a certificate or key that cannot be read.
    #[error("the credentials for {server} cannot be used; does kubectl work with them?")]
    Client {
        /// The server's URL.
        server: String,
        /// The cause.
        #[source]
        source: Box<kube::Error>,
    },
}

/// Which API server to ask, and as whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// `--kubeconfig`
    pub kubeconfig: Option<PathBuf>,
    /// `--apiserver`: its address, in place of the one that belongs to the credentials.
    pub apiserver: Option<String>,
}

impl Access {
    /// Whether something says where an API server is. It may still be unusable.
    #[must_use]
    pub fn is_found(&self) -> bool {
        self.kubeconfig.is_some() || self.apiserver.is_some() || kubeconfig_is_found() || is_in_pod()
    }

    /// Makes a client. Does not contact the server. Returns its URL as well.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub(super) async fn client(&self) -> Result<(Client, String), Error> {
        let mut config = self.config().await?;
        config.connect_timeout = Some(CONNECT);
        // Whether and when to ask again is decided where it is known what for.
        config.default_retry = false;
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let client = Client::try_from(config)
            .map_err(|source| Error::Client { server: server.clone(), source: source.into() })?;
        Ok((client, server))
    }

    async fn config(&self) -> Result<Config, Error> {
        let apiserver = self.apiserver.as_deref().map(url).transpose()?;
        let mut config = if let Some(path) = &self.kubeconfig {
            let failed =
                |source: KubeconfigError| Error::Kubeconfig { path: path.clone(), source: source.into() };
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?
        } else if kubeconfig_is_found() {
            Config::from_kubeconfig(&KubeConfigOptions::default())
                .await
                .map_err(|source| Error::FoundKubeconfig { source: source.into() })?
        } else if is_in_pod() {
            Config::incluster().map_err(|source| Error::InCluster { source: source.into() })?
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

/// What is behind an error of a connection, in the words of whoever met it first.
///
/// What stands above in the chain says only through which layers it came: "client error (Connect): tcp connect error".
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

/// What `--apiserver` should be.
const URL_HINT: &str = "expected a URL such as https://10.0.0.1:6443";

/// Checks the address of an API server: a URL, or host and port.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn apiserver(given: &str) -> Result<String, String> {
    url(given).map(|_url| given.to_owned()).map_err(|_no_url| URL_HINT.to_owned())
}

/// Reads `--apiserver`: a URL, or host and port.
fn url(given: &str) -> Result<http::Uri, Error> {
    let text = if given.contains("://") { given.to_owned() } else { format!("https://{given}") };
    let parsed: Option<http::Uri> = text.parse().ok();
    // What is too large for a port is no fault to the parser.
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

fn kubeconfig_is_found() -> bool {
    match env::var_os("KUBECONFIG") {
        Some(paths) if !paths.is_empty() => true,
        _ => env::home_dir().is_some_and(|home| home.join(".kube/config").is_file()),
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
        };
        says("No such file").await;
        std::fs::write(&path, "apiVersion: v1\nkind: Config\ncurrent-context: other\n").unwrap();
        says("context").await;
    }
}
