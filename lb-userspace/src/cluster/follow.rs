//! One kind of objects: list, watch, and what to do when either fails.

use std::{borrow::Cow, fmt::Write as _, time::Duration};

use http::{
    Request, Response, StatusCode,
    header::{ACCEPT, RETRY_AFTER},
};
use http_body_util::BodyExt as _;
use kube::{Client, client::Body};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    Access,
    backoff::{Backoff, random},
    kinds::{Change, Header, Kind, News, trim},
};

/// Objects on one page of a list, where the server cuts it into pages.
const PAGE: u32 = 500;
/// A watch that ends sooner without an event is not worth asking for again at once.
const SHORT_WATCH: Duration = Duration::from_secs(1);
/// The largest part of an answer that is looked at for the cause of a refusal.
const MAX_STATUS: usize = 64 << 10;
/// The annotation of the bookmark after the last object of a streaming list.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// For the head of an answer, and for each further part of a list.
    pub answer: Duration,
    /// For the next event of a watch. A server sends a bookmark about once a minute; without any event for longer
    /// the connection may be half-open, and the watch goes on over a new one.
    pub idle: Duration,
    /// How long a watch lasts before the server ends it.
    pub watch: Duration,
    /// The first pause after a failure.
    pub first_pause: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(30),
            idle: Duration::from_secs(75),
            watch: Duration::from_secs(290),
            first_pause: Duration::from_millis(800),
        }
    }
}

/// What the watches of all kinds need.
#[derive(Clone)]
pub(super) struct Follower {
    /// The way to the server, to be taken anew when it leads nowhere.
    pub(super) access: Access,
    pub(super) client: Client,
    pub(super) timing: Timing,
    /// Label selector, for the kinds that have one.
    pub(super) selector: String,
    /// Field selector, for the kinds of which only the own node's objects are of interest.
    pub(super) of_node: String,
    pub(super) news: mpsc::Sender<News>,
}

/// From where to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Position {
    /// List the objects, in a state not older than this version. "0" is any state.
    List { not_older_than: String },
    /// List the objects in their latest state: the server knows nothing of the version that we have.
    ListLatest,
    /// Watch what follows this version.
    Watch { version: String },
}

/// Why a request or a watch ended.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The server says no.
    #[error("the server answers {code} {reason}: {message}")]
    Refused { code: u16, reason: String, message: String, is_too_large: bool, retry_after: Option<Duration> },
    /// No connection, or it broke.
    #[error("{0}")]
    Connection(String),
    /// Nothing came for a while.
    #[error("no answer for {} s", .0.as_secs_f32())]
    Silence(Duration),
    /// The answer is not what it should be.
    #[error("the answer cannot be read: {0}")]
    Form(String),
    /// The version that the server is at is older than ours: it was restored from a backup.
    #[error("the server went back to version {found} from {known}")]
    WentBack { known: String, found: String },
    /// A watch was ended before it brought anything.
    #[error("the watch ended at once")]
    Short,
    /// Nobody listens any longer.
    #[error("the agent stops")]
    Stop,
}

impl Failure {
    fn connection(error: &dyn std::error::Error) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                let _never_fails = write!(text, ": {more}");
            }
            cause = error.source();
        }
        Self::Connection(text)
    }

    /// Whether other credentials may help: certificates, too, are refused before the server can say so.
    const fn is_about_access(&self) -> bool {
        matches!(self, Self::Refused { code: 401, .. } | Self::Connection(_))
    }

    /// Whether the server does not have, or not yet, or no longer, what follows the version that was asked for.
    fn is_about_version(&self) -> bool {
        match self {
            Self::Refused { code, is_too_large, .. } => *code == 410 || *is_too_large,
            Self::WentBack { .. } => true,
            _ => false,
        }
    }
}

/// Goes on after a failure. Returns from where, and whether at once.
fn after(failure: &Failure, position: &Position) -> (Position, bool) {
    match position {
        _ if !failure.is_about_version() => (position.clone(), false),
        // A state not older than what was seen will do, and spares etcd; if the server has none, the next step asks
        // for the latest.
        Position::Watch { version } if !matches!(failure, Failure::WentBack { .. }) => {
            (Position::List { not_older_than: version.clone() }, true)
        }
        Position::Watch { .. } | Position::List { .. } => (Position::ListLatest, true),
        // The latest state has no version that could be wrong.
        Position::ListLatest => (Position::ListLatest, false),
    }
}

/// Whether a refusal says that streaming lists are not known: the request is invalid.
const fn lacks_streaming(failure: &Failure) -> bool {
    matches!(failure, Failure::Refused { code: 400 | 422, .. })
}

/// Keeps the receiver up to date with all objects of a kind, until it is gone.
pub(super) async fn follow<K: Kind>(mut follower: Follower) {
    let mut backoff = Backoff::new(follower.timing.first_pause);
    let mut position = Position::List { not_older_than: "0".to_owned() };
    let mut has_streaming = true;
    // What is said of a failure is said once, until something works again.
    let mut is_failing = false;
    loop {
        let mut progress = false;
        let result = match &position {
            Position::Watch { version } => follower.watch::<K>(version.clone(), &mut progress).await,
            list => {
                let version = match list {
                    Position::List { not_older_than } => not_older_than.as_str(),
                    _ => "",
                };
                if has_streaming {
                    follower.stream::<K>(version, &mut progress).await
                } else {
                    follower.list::<K>(version).await.map(|version| Ended { version, failure: None })
                }
            }
        };
        let (failure, reached) = match result {
            Ok(Ended { version, failure }) => (failure, Some(version)),
            Err(failure) => (Some(failure), None),
        };
        if let Some(version) = reached {
            position = Position::Watch { version };
        }
        let Some(failure) = failure else {
            if std::mem::take(&mut is_failing) {
                info!(objects = K::PLURAL, "the API server answers again");
            }
            backoff.reset();
            continue;
        };
        if matches!(failure, Failure::Stop) {
            return;
        }
        if progress {
            backoff.reset();
        }
        let is_list = !matches!(position, Position::Watch { .. });
        if is_list && has_streaming && lacks_streaming(&failure) {
            debug!(objects = K::PLURAL, %failure, "no streaming lists: using lists");
            has_streaming = false;
            continue;
        }
        let (next, at_once) = after(&failure, &position);
        position = next;
        // A watch that brought something and broke is resumed at once: the server is there.
        if at_once || (progress && matches!(failure, Failure::Connection(_) | Failure::Silence(_))) {
            debug!(objects = K::PLURAL, %failure, ?position, "going on");
            continue;
        }
        let wanted = match &failure {
            Failure::Refused { retry_after, .. } => *retry_after,
            _ => None,
        };
        let pause = backoff.pause(wanted, random());
        if matches!(failure, Failure::Short) || std::mem::replace(&mut is_failing, true) {
            debug!(objects = K::PLURAL, %failure, ?pause, "trying again");
        } else {
            let remedy = remedy(&failure);
            warn!(objects = K::PLURAL, "the API server: {failure}{remedy}; what is served stays as it is");
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = follower.news.closed() => return,
        }
        if failure.is_about_access() {
            follower.renew().await;
        }
    }
}

/// What the user can do about a failure.
const fn remedy(failure: &Failure) -> &'static str {
    match failure {
        Failure::Refused { code: 401, .. } => " (are the credentials out of date?)",
        Failure::Refused { code: 403, .. } => {
            " (grant list and watch on services, nodes and endpointslices, and on pods for --exclude-pods)"
        }
        _ => "",
    }
}

/// How far a watch came.
#[derive(Debug)]
struct Ended {
    version: String,
    failure: Option<Failure>,
}

/// One line of a watch.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// A page of a list.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(default)]
    metadata: PageMetadata,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PageMetadata {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// A `metav1.Status`, as far as it is looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
    reason: String,
    message: String,
    details: Option<Details>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Details {
    retry_after_seconds: u64,
    causes: Vec<Cause>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cause {
    reason: String,
}

impl Status {
    fn into_failure(self, retry_after: Option<u64>) -> Failure {
        let details = self.details.unwrap_or_default();
        let seconds = retry_after.unwrap_or_default().max(details.retry_after_seconds);
        Failure::Refused {
            code: self.code,
            reason: self.reason,
            message: self.message.lines().next().unwrap_or_default().to_owned(),
            is_too_large: details.causes.iter().any(|cause| cause.reason == "ResourceVersionTooLarge"),
            retry_after: (seconds > 0).then(|| Duration::from_secs(seconds)),
        }
    }
}

fn form(error: &serde_json::Error) -> Failure {
    Failure::Form(error.to_string())
}

/// Whether a version is older than another.
///
/// The API long called versions opaque; since Kubernetes 1.35 they are numbers that can be compared. Of what is no
/// number nothing is said.
fn is_older(version: &str, than: &str) -> bool {
    match (version.parse::<u128>(), than.parse::<u128>()) {
        (Ok(version), Ok(than)) => version < than,
        _ => false,
    }
}

impl Follower {
    /// The path of a request. Values are encoded.
    fn path<K: Kind>(&self, parameters: &[(&str, &str)]) -> String {
        let selector = K::IS_LABELLED.then_some(("labelSelector", &*self.selector));
        let of_node = K::IS_OF_NODE.then_some(("fieldSelector", &*self.of_node));
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(parameters).extend_pairs(selector).extend_pairs(of_node);
        format!("{}?{}", K::PATH, query.finish())
    }

    /// Reads the credentials again. The client that there is reads a token's file about once a minute, and
    /// certificates and passwords never.
    async fn renew(&mut self) {
        match self.access.client().await {
            Ok((client, _server)) => self.client = client,
            // The former ones may still do: a file that is being replaced is there again at the next try.
            Err(error) => debug!(error = &error as &dyn std::error::Error, "the credentials cannot be read"),
        }
    }

    /// Sends a request and waits for the head of the answer.
    async fn get(&self, path: &str, accept: &str) -> Result<Response<Body>, Failure> {
        let request = Request::get(path)
            .header(ACCEPT, accept)
            .body(Body::empty())
            .map_err(|error| Failure::Form(error.to_string()))?;
        let limit = self.timing.answer;
        let answer =
            timeout(limit, self.client.send(request)).await.map_err(|_elapsed| Failure::Silence(limit))?;
        let answer = answer.map_err(|error| Failure::connection(&error))?;
        if answer.status() == StatusCode::OK {
            return Ok(answer);
        }
        let code = answer.status().as_u16();
        let seconds =
            answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let mut lines = Lines::new(answer.into_body());
        while lines.read.len() < MAX_STATUS && lines.read_more(limit).await? {}
        // A proxy in between answers in its own words.
        let status = serde_json::from_slice(&lines.read).unwrap_or_default();
        Err(Status { code, ..status }.into_failure(seconds))
    }

    async fn send(&self, news: News) -> Result<(), Failure> {
        self.news.send(news).await.map_err(|_closed| Failure::Stop)
    }

    /// Lists all objects, page by page.
    async fn list<K: Kind>(&self, version: &str) -> Result<String, Failure> {
        let page_size = PAGE.to_string();
        let (mut models, mut issues) = (Vec::new(), Vec::new());
        let mut next = String::new();
        loop {
            let mut parameters = vec![("limit", &*page_size)];
            if next.is_empty() {
                parameters.push(("resourceVersion", version));
                if !version.is_empty() {
                    parameters.push(("resourceVersionMatch", "NotOlderThan"));
                }
            } else {
                // Which version the pages are of is in the token.
                parameters.push(("continue", &next));
            }
            let answer = self.get(&self.path::<K>(&parameters), K::ACCEPT_LIST).await?;
            let mut text = Lines::new(answer.into_body());
            while text.read_more(self.timing.answer).await? {}
            let page: Page<'_> = serde_json::from_slice(&text.read).map_err(|error| form(&error))?;
            for item in page.items.unwrap_or_default() {
                let header: Header = serde_json::from_str(item.get()).map_err(|error| form(&error))?;
                let trimmed = trim::<K>(&header, item);
                models.extend(trimmed.model);
                issues.extend(trimmed.issues);
            }
            if let Some(token) = page.metadata.next.filter(|next| !next.is_empty()) {
                next = token;
                continue;
            }
            let version = page.metadata.resource_version;
            if version.is_empty() {
                return Err(Failure::Form("a list without a version".to_owned()));
            }
            self.send(K::news(Change::All { models, issues })).await?;
            return Ok(version);
        }
    }

    /// Lists all objects as events, and goes on watching: no text of all objects is ever in memory.
    async fn stream<K: Kind>(&self, version: &str, progress: &mut bool) -> Result<Ended, Failure> {
        let seconds = self.timing.watch.as_secs().max(1).to_string();
        let path = self.path::<K>(&[
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("sendInitialEvents", "true"),
            ("resourceVersionMatch", "NotOlderThan"),
            ("resourceVersion", version),
            ("timeoutSeconds", &seconds),
        ]);
        let mut lines = Lines::new(self.get(&path, K::ACCEPT).await?.into_body());
        let (mut models, mut issues) = (Vec::new(), Vec::new());
        loop {
            let Some(line) = lines.next(self.timing.answer).await? else {
                return Err(Failure::Connection("the list ended before its end".to_owned()));
            };
            let event: Event<'_> = serde_json::from_slice(line).map_err(|error| form(&error))?;
            if event.kind == "ERROR" {
                return Err(error_event(event.object));
            }
            let header: Header = serde_json::from_str(event.object.get()).map_err(|error| form(&error))?;
            match &*event.kind {
                "ADDED" | "MODIFIED" => {
                    let trimmed = trim::<K>(&header, event.object);
                    models.extend(trimmed.model);
                    issues.extend(trimmed.issues);
                }
                "BOOKMARK" => {
                    let annotations = header.metadata.annotations.unwrap_or_default();
                    if annotations.contains_key(INITIAL_EVENTS_END) {
                        let version = header.metadata.resource_version.unwrap_or_default();
                        self.send(K::news(Change::All { models, issues })).await?;
                        *progress = true;
                        return self.events::<K>(lines, version, progress).await;
                    }
                }
                other => debug!(objects = K::PLURAL, event = other, "not expected in a list"),
            }
        }
    }

    /// Watches what follows a version.
    async fn watch<K: Kind>(&self, version: String, progress: &mut bool) -> Result<Ended, Failure> {
        let seconds = self.timing.watch.as_secs().max(1).to_string();
        let path = self.path::<K>(&[
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", &version),
            ("timeoutSeconds", &seconds),
        ]);
        let lines = Lines::new(self.get(&path, K::ACCEPT).await?.into_body());
        self.events::<K>(lines, version, progress).await
    }

    /// Passes events on until the watch ends.
    ///
    /// # Errors
    ///
    /// Only [`Failure::Stop`]: how far the watch came counts, however it ended.
    async fn events<K: Kind>(
        &self,
        mut lines: Lines,
        mut version: String,
        progress: &mut bool,
    ) -> Result<Ended, Failure> {
        let started = Instant::now();
        let failure = loop {
            let line = match lines.next(self.timing.idle).await {
                Ok(Some(line)) => line,
                Ok(None) if !*progress && started.elapsed() < SHORT_WATCH => break Some(Failure::Short),
                Ok(None) => break None,
                Err(failure) => break Some(failure),
            };
            let received = Instant::now();
            let parsed: Result<(Event<'_>, Header), _> =
                serde_json::from_slice(line).and_then(|event: Event<'_>| {
                    serde_json::from_str(event.object.get()).map(|header| (event, header))
                });
            let (event, header) = match parsed {
                Ok(parsed) => parsed,
                Err(error) => break Some(form(&error)),
            };
            if event.kind == "ERROR" {
                break Some(error_event(event.object));
            }
            let Some(new) = header.metadata.resource_version.clone().filter(|new| !new.is_empty()) else {
                break Some(Failure::Form("an event without a version".to_owned()));
            };
            // A server that went back keeps silent about changes until it has caught up; its bookmarks tell.
            if is_older(&new, &version) {
                break Some(Failure::WentBack { known: version.clone(), found: new });
            }
            let news = match &*event.kind {
                "ADDED" | "MODIFIED" => Some(trim::<K>(&header, event.object)),
                "DELETED" => {
                    let object = header.object::<K>();
                    Some(super::kinds::Trimmed { object, model: None, issues: Vec::new() })
                }
                _ => None,
            };
            if let Some(trimmed) = news {
                self.send(K::news(Change::One { trimmed, received })).await?;
            }
            version = new;
            *progress = true;
        };
        // A watch that lasted shows that the server is there.
        *progress |= started.elapsed() >= SHORT_WATCH;
        Ok(Ended { version, failure })
    }
}

fn error_event(object: &RawValue) -> Failure {
    match serde_json::from_str::<Status>(object.get()) {
        Ok(status) => status.into_failure(None),
        Err(error) => form(&error),
    }
}

/// The lines of a body.
struct Lines {
    body: Body,
    read: Vec<u8>,
    /// Octets of `read` that were returned, or searched for the end of a line.
    n_returned: usize,
    n_searched: usize,
}

impl Lines {
    const fn new(body: Body) -> Self {
        Self { body, read: Vec::new(), n_returned: 0, n_searched: 0 }
    }

    /// Reads more. `false` at the end.
    async fn read_more(&mut self, limit: Duration) -> Result<bool, Failure> {
        let frame = timeout(limit, self.body.frame()).await.map_err(|_elapsed| Failure::Silence(limit))?;
        match frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.read.extend_from_slice(data);
                }
                Ok(true)
            }
            Some(Err(error)) => Err(Failure::connection(&error)),
            None => Ok(false),
        }
    }

    /// The next line that is not empty. What is cut off before the end of a line is no line.
    async fn next(&mut self, limit: Duration) -> Result<Option<&[u8]>, Failure> {
        loop {
            let found = self.read[self.n_searched..].iter().position(|octet| *octet == b'\n');
            if let Some(length) = found {
                let (start, end) = (self.n_returned, self.n_searched + length);
                (self.n_returned, self.n_searched) = (end + 1, end + 1);
                if start < end {
                    return Ok(Some(&self.read[start..end]));
                }
                continue;
            }
            self.read.drain(..self.n_returned);
            (self.n_returned, self.n_searched) = (0, self.read.len());
            if !self.read_more(limit).await? {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u16, is_too_large: bool) -> Failure {
        let (reason, message) = (String::new(), String::new());
        Failure::Refused { code, reason, message, is_too_large, retry_after: None }
    }

    fn at(version: &str) -> Position {
        Position::Watch { version: version.to_owned() }
    }

    fn not_older_than(version: &str) -> Position {
        Position::List { not_older_than: version.to_owned() }
    }

    #[test]
    fn a_version_that_the_server_lacks_leads_to_a_list() {
        let went_back = Failure::WentBack { known: "7".to_owned(), found: "5".to_owned() };
        for (failure, position, next, at_once) in [
            (refused(410, false), at("7"), not_older_than("7"), true),
            (refused(504, true), at("7"), not_older_than("7"), true),
            (went_back, at("7"), Position::ListLatest, true),
            (refused(504, true), not_older_than("7"), Position::ListLatest, true),
            (refused(410, false), not_older_than("7"), Position::ListLatest, true),
            (refused(410, false), Position::ListLatest, Position::ListLatest, false),
            (refused(504, false), at("7"), at("7"), false),
            (refused(429, false), not_older_than("0"), not_older_than("0"), false),
            (Failure::Connection(String::new()), at("7"), at("7"), false),
        ] {
            assert_eq!(after(&failure, &position), (next, at_once), "{failure:?} {position:?}");
        }
    }

    #[test]
    fn versions_are_compared_as_numbers_or_not_at_all() {
        assert!(is_older("9", "10"));
        assert!(!is_older("10", "10") && !is_older("11", "10"));
        assert!(!is_older("a", "b") && !is_older("", "10"));
    }

    #[tokio::test]
    async fn lines_are_whole() {
        let mut lines = Lines::new(Body::from(b"one\n\ntwo\ncut".to_vec()));
        let second = Duration::from_secs(1);
        assert_eq!(lines.next(second).await.unwrap(), Some(&b"one"[..]));
        assert_eq!(lines.next(second).await.unwrap(), Some(&b"two"[..]));
        assert_eq!(lines.next(second).await.unwrap(), None);
    }
}
