//! Asks a running agent over HTTP: at its unix socket, or at a TCP address.

use std::{
    fmt, io,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1,
    header::{ETAG, HOST},
};
use hyper_util::rt::TokioIo;
use lb_agent::{
    names::Resolution,
    serve::{
        agent_socket::{FILE_NAME, OBJECTS, RESOLUTION},
        known::{Known, Which},
    },
};
use lb_core::{desired::FrontendAddress, names::RecordType};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    runtime, time,
};

/// How long to wait for an answer; the agent's own limit for its loop is shorter.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for a change; the agent's own limit is shorter.
const WAIT: Duration = Duration::from_secs(30);
/// Maximum size of an answer: ten times the objects of a large cluster.
const MAX_BYTES: usize = 1 << 30;

/// Where an agent may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AgentAddress {
    Tcp(SocketAddr),
    Socket(PathBuf),
}

impl AgentAddress {
    /// The socket of a state directory.
    pub(super) fn socket(state_dir: &Path) -> Self {
        Self::Socket(state_dir.join(FILE_NAME))
    }
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) tag: Option<String>,
    pub(super) body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// Nothing listens.
    #[error("no agent answers at {place}")]
    Absent { place: AgentAddress },
    /// The place cannot be reached.
    #[error("{place}: {source}")]
    Io { place: AgentAddress, source: io::Error },
    /// Not permitted, because the caller is not root.
    #[error("{place}: not permitted: the agent answers only root and its own user")]
    NotPermitted { place: AgentAddress },
    /// The socket belongs to another user.
    #[error("{place}: not trusted: it belongs to user {uid}, and not to root or the user of this command")]
    Foreign { place: AgentAddress, uid: u32 },
    /// No answer within the time limit.
    #[error("the agent at {place} did not answer within {} s", wait.as_secs())]
    Late { place: AgentAddress, wait: Duration },
    /// The exchange failed.
    #[error("{place}: {source}")]
    Http { place: AgentAddress, source: hyper::Error },
    /// The answer is truncated or too large.
    #[error("{place}: {source}")]
    Body { place: AgentAddress, source: Box<dyn std::error::Error + Send + Sync> },
    /// The agent does not have the page.
    #[error("the agent at {place} has another version than this command: it has no page {page}")]
    OtherVersion { place: AgentAddress, page: String },
    /// The agent's page has another format.
    #[error("the agent at {place} has another version than this command: {source}")]
    OtherFormat { place: AgentAddress, source: serde_json::Error },
    /// The agent cannot answer now.
    #[error("the agent at {place} answers {status}: {reason}")]
    Refused { place: AgentAddress, status: u16, reason: String },
}

/// Sends one request on its own connection.
///
/// # Errors
///
/// [`AskError`] without an answer. An answer of any status is no error.
pub(super) async fn get(place: &AgentAddress, page: &str, wait: Duration) -> Result<Response, AskError> {
    let exchange = async {
        let io_error = |source: io::Error| {
            let place = place.clone();
            match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    if matches!(place, AgentAddress::Socket(_)) =>
                {
                    AskError::Absent { place }
                }
                io::ErrorKind::PermissionDenied => AskError::NotPermitted { place },
                _ => AskError::Io { place, source },
            }
        };
        match place {
            AgentAddress::Tcp(address) => {
                exchange(place, TcpStream::connect(address).await.map_err(io_error)?, page).await
            }
            AgentAddress::Socket(path) => {
                // Anyone who can write to the directory could have created the socket.
                let uid = std::fs::metadata(path).map_err(io_error)?.uid();
                if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
                    return Err(AskError::Foreign { place: place.clone(), uid });
                }
                exchange(place, UnixStream::connect(path).await.map_err(io_error)?, page).await
            }
        }
    };
    let late = |_elapsed| Err(AskError::Late { place: place.clone(), wait });
    time::timeout(wait, exchange).await.unwrap_or_else(late)
}

async fn exchange(
    place: &AgentAddress,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    page: &str,
) -> Result<Response, AskError> {
    let http = |source| AskError::Http { place: place.clone(), source };
    let host = match place {
        AgentAddress::Tcp(address) => address.to_string(),
        AgentAddress::Socket(_) => "agent".to_owned(),
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let connection = tokio::spawn(connection);
    let request = Request::get(page).header(HOST, host).body(Empty::<Bytes>::new());
    let request = request.map_err(|source| AskError::Body { place: place.clone(), source: source.into() })?;
    let response = sender.send_request(request).await.map_err(http)?;
    let status = response.status().as_u16();
    let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
    let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
    connection.abort();
    let body = body.map_err(|source| AskError::Body { place: place.clone(), source })?.to_bytes();
    Ok(Response { status, tag, body })
}

/// The agent of a state directory, which may be stopped.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    place: AgentAddress,
}

/// The agent's knowledge, and the tag of the answer.
#[derive(Debug)]
pub(super) struct Tagged {
    pub(super) known: Known,
    pub(super) tag: Option<String>,
}

impl Agent {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { place: AgentAddress::socket(state_dir) }
    }

    /// All of the agent's knowledge. `None` if its tag is still `after`.
    ///
    /// # Errors
    ///
    /// See [`AskError`].
    pub(super) fn ask(&self, which: Which, after: Option<&str>) -> Result<Option<Tagged>, AskError> {
        self.request(&page(which, after), PATIENCE)
    }

    /// Waits until the knowledge of one address differs from the tag `after`. `None` if it does not change in
    /// time.
    ///
    /// # Errors
    ///
    /// See [`AskError`].
    pub(super) fn wait(
        &self,
        address: FrontendAddress,
        after: Option<&str>,
    ) -> Result<Option<Tagged>, AskError> {
        self.request(&page(Which::At(address), after), WAIT)
    }

    /// How the agent's name server answers a question.
    ///
    /// # Errors
    ///
    /// See [`AskError`].
    pub(super) fn resolve(&self, name: &str, record_type: RecordType) -> Result<Resolution, AskError> {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("name", name).append_pair("type", &record_type.to_string());
        let page = format!("{RESOLUTION}?{}", query.finish());
        let found = self.body(&page, PATIENCE)?.map(|(resolution, _tag)| resolution);
        let no_body = || AskError::OtherVersion { place: self.place.clone(), page: RESOLUTION.to_owned() };
        found.ok_or_else(no_body)
    }

    fn request(&self, page: &str, wait: Duration) -> Result<Option<Tagged>, AskError> {
        Ok(self.body(page, wait)?.map(|(known, tag)| Tagged { known, tag }))
    }

    /// The value of a page, and its tag; `None` if the page has not changed.
    fn body<T: DeserializeOwned>(
        &self,
        page: &str,
        wait: Duration,
    ) -> Result<Option<(T, Option<String>)>, AskError> {
        let place = || self.place.clone();
        let response = blocking(&self.place, page, wait)?;
        let reason = || String::from_utf8_lossy(&response.body).trim_end().to_owned();
        match StatusCode::from_u16(response.status) {
            Ok(StatusCode::OK) => {
                let value = serde_json::from_slice(&response.body)
                    .map_err(|source| AskError::OtherFormat { place: place(), source })?;
                Ok(Some((value, response.tag)))
            }
            Ok(StatusCode::NOT_MODIFIED) => Ok(None),
            Ok(StatusCode::NOT_FOUND) => {
                let page = page.split('?').next().unwrap_or_default().to_owned();
                Err(AskError::OtherVersion { place: place(), page })
            }
            _ => Err(AskError::Refused { place: place(), status: response.status, reason: reason() }),
        }
    }
}

/// Runs a request on its own thread: the caller may be within a runtime.
fn blocking(place: &AgentAddress, page: &str, wait: Duration) -> Result<Response, AskError> {
    let request = || {
        let io_error = |source| AskError::Io { place: place.clone(), source };
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(io_error)?;
        runtime.block_on(get(place, page, wait))
    };
    let failed =
        |_panic| Err(AskError::Io { place: place.clone(), source: io::Error::other("the request failed") });
    thread::scope(|scope| scope.spawn(request).join()).unwrap_or_else(failed)
}

fn page(which: Which, after: Option<&str>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    match which {
        Which::All => {}
        Which::Issues => drop(query.append_pair("for", "issues")),
        Which::At(address) => drop(query.append_pair("at", &address.to_string())),
    }
    if let Some(after) = after {
        query.append_pair("after", after);
    }
    format!("{OBJECTS}?{}", query.finish())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        os::unix::net::UnixListener,
    };

    use super::*;

    /// How a command handles an answer.
    fn hear(answer: &'static str) -> Result<Option<Tagged>, AskError> {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join(FILE_NAME)).unwrap();
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(&stream);
            let mut line = String::new();
            while reader.read_line(&mut line).unwrap() > 2 {
                line.clear();
            }
            (&stream).write_all(answer.as_bytes()).unwrap();
        });
        let address = "10.0.0.1:80".parse().unwrap();
        let heard = Agent::new(directory.path()).ask(Which::At(address), Some("tag"));
        server.join().unwrap();
        heard
    }

    #[test]
    fn an_agent_of_another_version_is_told_from_one_that_cannot_answer() {
        for (answer, expected) in [
            (
                "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
                "has another version than this command: it has no page",
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
                "has another version than this command: missing field",
            ),
            ("HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nlate", "answers 503: late"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", "agent.sock: "),
            ("", "agent.sock: "),
        ] {
            let error = hear(answer).unwrap_err().to_string();
            assert!(error.contains(expected), "{answer:?}: {error}");
        }
        assert!(hear("HTTP/1.1 304 Not Modified\r\n\r\n").unwrap().is_none());
    }

    #[test]
    fn no_agent_is_told_from_one_that_is_silent() {
        let directory = tempfile::tempdir().unwrap();
        let agent = Agent::new(directory.path());
        let ask = || agent.ask(Which::Issues, None).unwrap_err();
        assert!(matches!(ask(), AskError::Absent { .. }), "no socket");
        let listener = UnixListener::bind(directory.path().join(FILE_NAME)).unwrap();
        let wait = Duration::from_millis(100);
        let silent = agent.request(&page(Which::All, None), wait).unwrap_err();
        assert!(matches!(silent, AskError::Late { .. }), "{silent}");
        drop(listener);
        assert!(matches!(ask(), AskError::Absent { .. }), "the agent has exited");
    }

    #[test]
    fn pages() {
        let address = "[fd00::1]:53/udp".parse().unwrap();
        assert_eq!(page(Which::All, None), "/v1/objects?");
        assert_eq!(page(Which::Issues, Some("a-b")), "/v1/objects?for=issues&after=a-b");
        assert_eq!(page(Which::At(address), None), "/v1/objects?at=%5Bfd00%3A%3A1%5D%3A53%2Fudp");
    }
}
