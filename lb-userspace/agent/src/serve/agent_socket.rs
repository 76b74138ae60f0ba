//! The agent's unix socket, where commands on the same host query the agent's state.
//!
//! # Invariants
//!
//! - Only root and the agent's own user are answered, by the mode of the socket and the kernel's credentials
//!   of the peer.
//! - A live agent never loses its socket: a lock on the directory, released at exit, decides who may listen.
//!   A dead agent's socket is replaced.
//! - The agent serves calls with or without the socket. Failures to listen are retried.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hasher as _},
    io,
    os::{
        fd::AsFd as _,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _},
            net,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper::{
    StatusCode, Uri,
    header::{ETAG, HeaderValue},
};
use lb_core::{desired::FrontendAddress, names::RecordType};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::stat::Mode,
    unistd::geteuid,
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    time::{self, Instant},
};
use tracing::{debug, info, warn};

use super::{
    PATIENCE, Published, current,
    http::{self, Accept, Answer, Pages, answer, large_json, text},
    known::{Known, Which},
    pages::{HealthPages, MetricsPages},
};
use crate::names;

/// Name of the socket within `--state-dir`.
pub const FILE_NAME: &str = "agent.sock";
/// Path of the page with objects and issues. Raise the version with any change that an older command would
/// misread.
pub const OBJECTS: &str = "/v1/objects";

/// Path of the page that says how a name is answered.
pub const RESOLUTION: &str = "/v1/resolution";

/// Time between two tries to listen.
const RETRY: Duration = Duration::from_millis(500);
/// How long another agent may hold the lock before that is logged: a killed agent may hold it for a moment.
const SETTLE: Duration = Duration::from_secs(5);
/// How often the agent checks that its socket still exists.
const LOOK: Duration = Duration::from_secs(5);
/// Maximum time that a request waits for a change.
const WAIT: Duration = Duration::from_secs(20);
/// Minimum time between two answers that such a request computes.
const PAUSE: Duration = Duration::from_millis(20);
/// Maximum number of large answers at a time. Each holds a thread and the objects of its time.
const LARGE: usize = 4;

/// A socket in the state directory, removed on drop.
#[derive(Debug)]
struct AgentSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    _lock: Flock<File>,
}

#[derive(Debug, thiserror::Error)]
enum SocketError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: another agent with the same --state-dir answers there: give each agent its own", path.display())]
    Taken { path: PathBuf },
    #[error("{}: not a socket: remove it", path.display())]
    NoSocket { path: PathBuf },
    #[error(
        "--state-dir {}: owned by user {uid} with mode {mode:03o}, so others could place a socket there: \
         `chown root` and `chmod go-w` it",
        path.display()
    )]
    Open { path: PathBuf, uid: u32, mode: u32 },
}

/// Whether a peer or owner is trusted: root or this process's user.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

impl AgentSocket {
    fn open(state_dir: &Path) -> Result<Self, SocketError> {
        let path = state_dir.join(FILE_NAME);
        let error = |source| SocketError::Io { path: path.clone(), source };
        fs::create_dir_all(state_dir).map_err(error)?;
        let directory = fs::metadata(state_dir).map_err(error)?;
        let (uid, mode) = (directory.uid(), directory.mode() & 0o777);
        if !is_trusted(uid) || mode & 0o022 != 0 {
            return Err(SocketError::Open { path: state_dir.to_owned(), uid, mode });
        }
        let lock = File::open(state_dir).map_err(error)?;
        let lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_file, errno)| match errno {
                Errno::EWOULDBLOCK => SocketError::Taken { path: path.clone() },
                errno => error(errno.into()),
            })?;
        match fs::symlink_metadata(&path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(&path).map_err(error)?,
            Ok(_) => return Err(SocketError::NoSocket { path }),
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(error(source)),
        }
        let listener = listen(&path).map_err(error)?;
        let inode = inode(&path).map_err(error)?;
        Ok(Self { listener, path, inode, _lock: lock })
    }

    /// Returns when the path no longer leads to this socket.
    async fn lost(&self) {
        loop {
            time::sleep(LOOK).await;
            if inode(&self.path).ok() != Some(self.inode) {
                return;
            }
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Listens for root only. The mode is set before `bind()`: between the two, others could connect.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    nix::sys::stat::fchmod(socket.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(128)?;
    socket.set_nonblocking(true)?;
    UnixListener::from_std(net::UnixListener::from(socket))
}

/// Removes the socket that a killed agent left. `None` if there is none, or an agent listens there.
#[must_use]
pub fn remove_leftover(state_dir: &Path) -> Option<PathBuf> {
    let _alone = Flock::lock(File::open(state_dir).ok()?, FlockArg::LockExclusiveNonblock).ok()?;
    let path = state_dir.join(FILE_NAME);
    fs::remove_file(&path).ok().map(|()| path)
}

impl Accept for &AgentSocket {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _address) = self.listener.accept().await?;
            match stream.peer_cred() {
                Ok(peer) if is_trusted(peer.uid()) => return Ok(stream),
                Ok(peer) => debug!(uid = peer.uid(), "closed a connection of another user"),
                Err(error) => debug!(%error, "closed a connection of an unknown user"),
            }
        }
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        // Before the lock is released, so it is not another agent's socket.
        if inode(&self.path).ok() == Some(self.inode) {
            let _left_behind = fs::remove_file(&self.path);
        }
    }
}

/// Answers at the socket of a state directory until the future is dropped. Failures to listen are logged once
/// and retried.
pub(super) async fn serve(state_dir: PathBuf, pages: Arc<AgentPages>) {
    // The problem, since when, and whether it is logged.
    let mut problem: Option<(String, Instant, bool)> = None;
    loop {
        match AgentSocket::open(&state_dir) {
            Ok(socket) => {
                info!(socket = %socket.path.display(), "commands can query the agent");
                problem = None;
                tokio::select! {
                    () = http::serve(&socket, Arc::clone(&pages)) => {}
                    () = socket.lost() => debug!("the socket was removed or replaced"),
                }
            }
            Err(error) => {
                let text = error.to_string();
                let (known, since, is_logged) = problem.get_or_insert((String::new(), Instant::now(), false));
                if !*is_logged && (since.elapsed() >= SETTLE || !matches!(error, SocketError::Taken { .. })) {
                    warn!(error = text, "commands cannot query the agent and read the snapshot: retrying");
                    *is_logged = true;
                }
                *known = text;
                time::sleep(RETRY).await;
            }
        }
    }
}

/// Pages at the socket: those of the other listeners, and [`OBJECTS`].
///
/// [`OBJECTS`] takes a query: `for=issues`, `at=ADDRESS:PORT/PROTOCOL`, or nothing for all objects. The
/// answer has an `ETag`; with `after=ETAG` an unchanged answer is 304. With `at=` or `for=`, such a request
/// waits for a change, up to 20 seconds.
pub(super) struct AgentPages {
    pub(super) metrics: Arc<MetricsPages>,
    pub(super) health: HealthPages,
    published: watch::Receiver<Published>,
    names: Option<names::Options>,
    /// Distinguishes this agent from the next. A process id does not: in a container it is always 1.
    started: Duration,
    large: Arc<Semaphore>,
}

impl AgentPages {
    pub(super) fn new(
        metrics: Arc<MetricsPages>,
        health: HealthPages,
        published: watch::Receiver<Published>,
        names: Option<names::Options>,
    ) -> Self {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let large = Arc::new(Semaphore::new(LARGE));
        Self { metrics, health, published, names, started, large }
    }

    async fn objects(&self, query: &Query) -> Answer {
        let which = match query.which() {
            Ok(which) => which,
            Err(hint) => return text(StatusCode::BAD_REQUEST, hint + "\n"),
        };
        match which {
            Which::All => self.all(query.after.as_deref()).await,
            Which::Issues | Which::At(_) => self.some(which, query.after.as_deref()).await,
        }
    }

    /// How the name server answers a question: `name=NAME&type=TYPE`.
    async fn resolution(&self, query: &str) -> Answer {
        let Some(options) = &self.names else {
            return text(StatusCode::CONFLICT, "this agent answers no names: --names is off\n");
        };
        let (mut name, mut record_type) = (None, Ok(RecordType::A));
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*key {
                "name" => name = Some(value.into_owned()),
                "type" => record_type = value.parse(),
                _ => {}
            }
        }
        let (Some(name), Ok(record_type)) = (name, record_type) else {
            return text(StatusCode::BAD_REQUEST, "expected name=NAME and type=TYPE\n");
        };
        let Some(published) = current(&mut self.published.clone()).await else { return busy() };
        if published.n_syncs == 0 {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the lists of objects are not complete yet\n");
        }
        let resolution = names::resolve(options, &published.view, &name, record_type);
        // Strings and lists always serialise.
        answer(StatusCode::OK, "application/json", serde_json::to_vec(&resolution).unwrap_or_default())
    }

    /// All objects, serialised while sending.
    async fn all(&self, after: Option<&str>) -> Answer {
        let Some(published) = current(&mut self.published.clone()).await else { return busy() };
        let tag = format!("{}-{}", self.started.as_nanos(), published.n_syncs);
        if after == Some(&tag) {
            return text(StatusCode::NOT_MODIFIED, "");
        }
        let place = time::timeout(PATIENCE, Arc::clone(&self.large).acquire_owned()).await;
        let Ok(Ok(place)) = place else { return busy() };
        let (answer, mut writer) = large_json();
        let _writing = tokio::task::spawn_blocking(move || {
            use io::Write as _;
            let known = known(&published, Which::All);
            let written = serde_json::to_writer(&mut writer, &known).map_err(io::Error::from);
            // The client may have disconnected.
            let _gone = written.and_then(|()| writer.flush());
            drop(place);
        });
        tagged(answer, &tag)
    }

    /// A small answer: at once, or when its tag differs from `after`.
    async fn some(&self, which: Which, after: Option<&str>) -> Answer {
        let mut published = self.published.clone();
        let deadline = Instant::now() + WAIT;
        loop {
            let Some(now) = current(&mut published).await else { return busy() };
            // Strings, numbers and lists always serialise.
            let body = serde_json::to_vec(&known(&now, which)).unwrap_or_default();
            drop(now);
            let mut hasher = DefaultHasher::new();
            hasher.write(&body);
            let tag = format!("{:016x}", hasher.finish());
            if after != Some(&tag) {
                return tagged(answer(StatusCode::OK, "application/json", body), &tag);
            }
            time::sleep(PAUSE).await;
            if !matches!(time::timeout_at(deadline, published.changed()).await, Ok(Ok(()))) {
                return text(StatusCode::NOT_MODIFIED, "");
            }
        }
    }
}

impl Pages for AgentPages {
    async fn get(&self, uri: &Uri) -> Option<Answer> {
        match uri.path() {
            OBJECTS => Some(self.objects(&Query::parse(uri.query().unwrap_or_default())).await),
            RESOLUTION => Some(self.resolution(uri.query().unwrap_or_default()).await),
            "/healthz" | "/livez" => self.health.get(uri).await,
            _ => self.metrics.get(uri).await,
        }
    }
}

/// The requested state.
fn known(published: &Published, which: Which) -> Known {
    let mut known = Known {
        has_synced: published.n_syncs > 0,
        issues: published.issues.to_vec(),
        save_problem: published.save_problem.clone(),
        packets: published.packets.clone(),
        ..Known::of(&published.view, which)
    };
    if let Which::At(address) = which {
        known.keep_issues_at(address);
    }
    known.issues.sort_unstable();
    known.issues.dedup();
    known
}

fn busy() -> Answer {
    text(
        StatusCode::SERVICE_UNAVAILABLE,
        "the agent is busy: a sync takes long, or other commands read all objects\n",
    )
}

fn tagged(mut answer: Answer, tag: &str) -> Answer {
    if let Ok(tag) = HeaderValue::from_str(tag) {
        answer.headers_mut().insert(ETAG, tag);
    }
    answer
}

/// Query of a request for [`OBJECTS`]. Unknown keys, as of newer commands, are ignored.
#[derive(Debug, Default)]
struct Query {
    of: Option<String>,
    at: Option<String>,
    after: Option<String>,
}

impl Query {
    fn parse(query: &str) -> Self {
        let mut found = Self::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*key {
                "for" => found.of = Some(value.into_owned()),
                "at" => found.at = Some(value.into_owned()),
                "after" => found.after = Some(value.into_owned()),
                _ => {}
            }
        }
        found
    }

    fn which(&self) -> Result<Which, String> {
        match (self.of.as_deref(), self.at.as_deref()) {
            (None, None) => Ok(Which::All),
            (Some("issues"), None) => Ok(Which::Issues),
            (None, Some(address)) => address.parse::<FrontendAddress>().map(Which::At),
            (of, at) => {
                Err(format!("for={of:?} at={at:?}: expected for=issues, at=ADDRESS:PORT, or neither"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Answers every path with the path.
    struct Echo;

    impl Pages for Echo {
        async fn get(&self, uri: &Uri) -> Option<Answer> {
            Some(text(StatusCode::OK, uri.path().to_owned()))
        }
    }

    async fn ask(path: &Path) -> io::Result<String> {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(b"GET /one HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn root_is_answered_at_a_socket_that_others_cannot_open() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("made/on/demand");
        let socket = AgentSocket::open(&state_dir).unwrap();
        let path = socket.path.clone();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let server = async {
            http::serve(&socket, Arc::new(Echo)).await;
        };
        let answer = tokio::select! {
            () = server => unreachable!("it serves until it is dropped"),
            answer = ask(&path) => answer.unwrap(),
        };
        assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("/one"), "{answer}");
        drop(socket);
        assert!(!path.exists(), "nothing is left behind");
    }

    #[tokio::test]
    async fn a_dead_agents_socket_is_replaced_and_a_live_ones_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        // A killed process leaves a socket that no process listens at.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let first = AgentSocket::open(directory.path()).unwrap();
        let error = AgentSocket::open(directory.path()).unwrap_err();
        assert!(matches!(error, SocketError::Taken { .. }), "{error}");
        assert!(remove_leftover(directory.path()).is_none());
        assert_eq!(inode(&path).unwrap(), first.inode, "the first one's is untouched");

        // The first agent does not remove a path that leads to something else.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "not a socket").unwrap();
        drop(first);
        let error = AgentSocket::open(directory.path()).unwrap_err();
        assert!(matches!(error, SocketError::NoSocket { .. }), "{error}");
        assert_eq!(remove_leftover(directory.path()), Some(path));
        assert!(AgentSocket::open(directory.path()).is_ok());
    }

    #[tokio::test]
    async fn a_directory_that_others_may_write_to_gets_no_socket() {
        let directory = tempfile::tempdir().unwrap();
        for (mode, is_taken) in
            [(0o777, false), (0o1777, false), (0o770, false), (0o755, true), (0o700, true)]
        {
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
            let opened = AgentSocket::open(directory.path());
            assert_eq!(opened.is_ok(), is_taken, "{mode:o}: {opened:?}");
            if let Err(error) = opened {
                assert!(error.to_string().contains("chmod go-w"), "{error}");
            }
        }
    }

    #[test]
    fn queries() {
        let which = |query: &str| Query::parse(query).which();
        let address: FrontendAddress = "[fd00::1]:53/udp".parse().unwrap();
        assert_eq!(which(""), Ok(Which::All));
        assert_eq!(which("after=x&newer=key"), Ok(Which::All));
        assert_eq!(which("for=issues"), Ok(Which::Issues));
        assert_eq!(which("at=%5Bfd00%3A%3A1%5D%3A53%2Fudp&after=x"), Ok(Which::At(address)));
        for wrong in ["for=x", "at=", "at=x", "at=10.0.0.1", "for=issues&at=10.0.0.1:80"] {
            assert!(which(wrong).is_err(), "{wrong}");
        }
    }
}
