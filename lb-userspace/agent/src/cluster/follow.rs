//! One kind of objects: list, watch, and what to do when either fails.

use std::{borrow::Cow, io::Write as _, mem, sync::Arc, time::Duration};

use flate2::write::GzDecoder;
use http::{
    Request, Response, StatusCode,
    header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, RETRY_AFTER},
};
use http_body_util::BodyExt as _;
use kube::{Client, client::Body};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    Access,
    access::cause,
    backoff::{Backoff, random},
    fold::Fold,
    kinds::{Change, Header, Kind, Lack, News, Trimmed, trim},
};
use crate::source::Contact;

/// Objects on one page of a list, where the server cuts it into pages.
const PAGE: &str = "500";
/// A watch that ends sooner without an event is not worth asking for again at once.
const SHORT_WATCH: Duration = Duration::from_secs(1);
/// The largest part of an answer that is looked at for the cause of a refusal.
const MAX_STATUS: usize = 64 << 10;
/// The longest message of a refusal that is passed on, in characters.
const MAX_MESSAGE: usize = 500;
/// The largest event of a watch: etcd holds objects of 1.5 MiB.
const MAX_EVENT: usize = 32 << 20;
/// The largest list that is read as one text, all its pages counted: six times that of 10,000 services with ten endpoints each.
const MAX_LIST: usize = 256 << 20;
/// The largest list that is read as events. Only what the model has of each object is kept of them.
const MAX_STREAM: usize = 2 << 30;
/// Octets that are decompressed at a time: to a thousand times as many, before these are counted.
const PACKED: usize = 4096;
/// The annotation of the bookmark after the last object of a streaming list.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// Selects no object: names have no capital letters.
const NONE: &str = "metadata.name=NONE";
/// The words by which failures are counted: those of [`Failure::reason`].
pub(super) const REASONS: [&str; 8] =
    ["connection", "silence", "unauthorized", "forbidden", "throttled", "server_error", "expired", "other"];

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// For the head of an answer, and for each further part of a list.
    pub answer: Duration,
    /// For the next event of a watch. A server sends a bookmark about once a minute; without any event for longer
    /// the connection may be half-open, or the server may have gone back: everything is listed.
    pub idle: Duration,
    /// How long a watch lasts at least before the server ends it. It is up to twice as long, by chance, so that the
    /// agents of all nodes do not come back at the same moment.
    pub watch: Duration,
    /// The first pause after a failure.
    pub first_pause: Duration,
    /// After how long a kind is asked for again that the agent can do without, and that the server does not know or refuses.
    /// It is up to twice as long, by chance.
    pub rare: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(30),
            idle: Duration::from_secs(75),
            watch: Duration::from_secs(300),
            first_pause: Duration::from_millis(800),
            rare: Duration::from_secs(300),
        }
    }
}

/// What the watches of all kinds need.
#[derive(Clone)]
pub(super) struct Follower {
    /// The way to the server, to be taken anew when it leads nowhere.
    pub(super) access: Access,
    pub(super) client: Client,
    /// The server's URL, for log lines.
    pub(super) server: Arc<str>,
    pub(super) timing: Timing,
    /// Label selector, for the kinds that have one; empty for all objects.
    pub(super) selector: String,
    /// `--service-proxy-name`
    pub(super) service_proxy_name: Option<Arc<str>>,
    /// Field selector; empty for all objects.
    pub(super) fields: String,
    pub(super) contact: Contact,
    /// Raised when the server answers again: whoever pauses asks at once.
    pub(super) recovered: Arc<Notify>,
    pub(super) news: mpsc::Sender<News>,
}

/// From where to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Position {
    /// List the objects, in a state not older than this version. "0" is any state.
    List { not_older_than: String },
    /// List the objects in their latest state: whatever version the server is at.
    ListLatest,
    /// Find out whether the server has reached this version, then watch. A server that was restored from a backup may not have:
    /// it would be silent until it has.
    Confirm { version: String },
    /// Watch what follows this version.
    Watch { version: String },
}

/// Why a request or a watch ended.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The server says no.
    #[error("{code} {reason}: {message}{}", remedy(*.code))]
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
    /// The answer is larger than anything that may be read there.
    #[error("{what} is larger than {} MiB and is not read to its end: {remedy}", .limit >> 20)]
    TooLarge { what: &'static str, limit: usize, remedy: &'static str },
    /// The server ended a watch before its time, as it does when it stops.
    #[error("the watch ended early")]
    Early,
    /// The agent stops.
    #[error("the agent stops")]
    Stop,
}

impl Failure {
    /// Whether other credentials may help: certificates, too, are refused before the server can say so.
    const fn is_about_access(&self) -> bool {
        matches!(self, Self::Refused { code: 401, .. } | Self::Connection(_))
    }

    /// Whether the server does not have, or not yet, or no longer, what follows the version that was asked for.
    const fn is_about_version(&self) -> bool {
        matches!(self, Self::Refused { code: 410, .. } | Self::Refused { is_too_large: true, .. })
    }

    /// What it says of a kind that the agent can do without; `None` if it is about the server as a whole, or about a version.
    fn lack(&self) -> Option<Lack> {
        match self {
            _ if self.is_about_version() => None,
            Self::Refused { code: 404, .. } => Some(Lack::Unknown),
            Self::Refused { code: 403, .. } => Some(Lack::Forbidden(self.to_string())),
            Self::Refused { code: 401 | 429, .. } => None,
            Self::Refused { .. } | Self::Form(_) => Some(Lack::Failing),
            _ => None,
        }
    }

    /// Whether there is nothing to be heard of the server.
    const fn is_absence(&self) -> bool {
        matches!(self, Self::Connection(_) | Self::Silence(_) | Self::Early)
    }

    /// A word of [`REASONS`].
    const fn reason(&self) -> &'static str {
        match self {
            Self::Connection(_) | Self::Early => "connection",
            Self::Silence(_) => "silence",
            Self::Refused { .. } if self.is_about_version() => "expired",
            Self::Refused { code: 401, .. } => "unauthorized",
            Self::Refused { code: 403, .. } => "forbidden",
            Self::Refused { code: 429, .. } => "throttled",
            Self::Refused { code: 500.., .. } => "server_error",
            Self::Refused { .. } | Self::Form(_) | Self::TooLarge { .. } | Self::Stop => "other",
        }
    }
}

/// What the user can do about a refusal.
const fn remedy(code: u16) -> &'static str {
    match code {
        401 => " (are the credentials out of date? the token or certificate is not accepted)",
        403 => {
            " (grant list and watch on services, nodes, endpointslices and servicecidrs, and on pods for --exclude-pods: \
             manifests/base/clusterrole.yaml)"
        }
        _ => "",
    }
}

/// From where to go on after a failure. `is_watching` if a watch had begun.
///
/// A version of before may be in the future of a server that was restored from a backup, and a watch from there brings nothing.
/// So it is used again only if the server was there all the time, and says that it has reached it. After an outage even that
/// proves nothing: the restored server may have made as many changes meanwhile, other ones.
fn after(failure: &Failure, position: &Position, is_watching: bool) -> Position {
    match position {
        Position::List { .. } if failure.is_about_version() => Position::ListLatest,
        Position::List { .. } | Position::ListLatest => position.clone(),
        Position::Watch { version } | Position::Confirm { version } => match failure {
            Failure::Refused { is_too_large: true, .. } => Position::ListLatest,
            // A state not older than what was seen will do, and spares etcd.
            Failure::Refused { code: 410, .. } => Position::List { not_older_than: version.clone() },
            // It is there, and busy enough.
            Failure::Refused { code: 429, .. } => Position::Confirm { version: version.clone() },
            Failure::Connection(_) | Failure::Early | Failure::Refused { .. } if is_watching => {
                Position::Confirm { version: version.clone() }
            }
            _ => Position::ListLatest,
        },
    }
}

/// Whether a refusal says that streaming lists are not known: the request is invalid.
const fn lacks_streaming(failure: &Failure) -> bool {
    matches!(failure, Failure::Refused { code: 400 | 422, .. })
}

/// Keeps the receiver up to date with all objects of a kind, until it is gone.
pub(super) async fn follow<K: Kind>(mut follower: Follower) {
    let mut backoff = Backoff::new(follower.timing.first_pause);
    let mut position = Position::ListLatest;
    let mut has_streaming = true;
    let mut last_move = None::<Instant>;
    let mut is_lacking = false;
    loop {
        let mut progress = false;
        let result = match &position {
            Position::Watch { version } => follower.watch::<K>(version.clone(), &mut progress).await,
            Position::Confirm { version } => follower.confirm::<K>(version).await.map(Ended::at),
            Position::List { not_older_than } if has_streaming => {
                follower.stream::<K>(not_older_than, &mut progress).await
            }
            Position::ListLatest if has_streaming => follower.stream::<K>("", &mut progress).await,
            Position::List { not_older_than } => follower.list::<K>(not_older_than).await.map(Ended::at),
            Position::ListLatest => follower.list::<K>("").await.map(Ended::at),
        };
        let (failure, is_watching) = match result {
            Ok(Ended { version, failure }) => {
                if std::mem::take(&mut is_lacking) {
                    info!("API server {} has {} now", follower.server, K::PLURAL);
                }
                let is_asking = matches!(position, Position::Confirm { .. });
                position = Position::Watch { version };
                let Some(failure) = failure else {
                    // That a version is reached does not show that watches work.
                    if !is_asking {
                        backoff.reset();
                    }
                    continue;
                };
                (failure, true)
            }
            Err(failure) => (failure, false),
        };
        if matches!(failure, Failure::Stop) {
            return;
        }
        if progress {
            backoff.reset();
        }
        let is_list = matches!(position, Position::List { .. } | Position::ListLatest);
        if is_list && has_streaming && lacks_streaming(&failure) {
            debug!(objects = K::PLURAL, %failure, "no streaming lists: using lists");
            has_streaming = false;
            // As client-go's: any state will do for the first list, and spares etcd.
            position = Position::List { not_older_than: "0".to_owned() };
            continue;
        }
        if let Some(lack) = failure.lack()
            && let Some(news) = K::lacking(lack.clone())
        {
            if follower.send(news).await.is_err() {
                return;
            }
            if lack != Lack::Failing {
                follower.note_lack::<K>(&failure, &lack, !std::mem::replace(&mut is_lacking, true));
                position = Position::ListLatest;
                let rare = follower.timing.rare;
                let jitter = rare * u32::from(u8::try_from(random() % 256).unwrap_or_default()) / 256;
                tokio::select! {
                    () = sleep(rare + jitter) => {}
                    // It may be another version of the server.
                    () = follower.recovered.notified() => {}
                    () = follower.news.closed() => return,
                }
                continue;
            }
        }
        let next = after(&failure, &position, is_watching);
        follower.tell::<K>(&failure, is_watching);
        debug!(objects = K::PLURAL, %failure, ?position, ?next, "going on");
        // What the server says of a version is followed at once, but for the latest, which has none that could be wrong, and not
        // over and over. So is a watch that brought something and broke: the server was there.
        let moves = failure.is_about_version()
            && next != position
            && last_move.is_none_or(|at| at.elapsed() >= SHORT_WATCH);
        if moves {
            last_move = Some(Instant::now());
        }
        let at_once = moves || (progress && failure.is_absence());
        position = next;
        if at_once {
            continue;
        }
        let wanted = match &failure {
            Failure::Refused { retry_after, .. } => *retry_after,
            _ => None,
        };
        tokio::select! {
            () = sleep(backoff.pause(wanted, random())) => {}
            () = follower.recovered.notified(), if failure.is_absence() => {}
            () = follower.news.closed() => return,
        }
        if failure.is_about_access() {
            follower.renew().await;
        }
    }
}

/// How far a watch came.
#[derive(Debug)]
struct Ended {
    version: String,
    failure: Option<Failure>,
}

impl Ended {
    const fn at(version: String) -> Self {
        Self { version, failure: None }
    }
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
            message: self.message.lines().next().unwrap_or_default().chars().take(MAX_MESSAGE).collect(),
            is_too_large: details.causes.iter().any(|cause| cause.reason == "ResourceVersionTooLarge"),
            retry_after: (seconds > 0).then(|| Duration::from_secs(seconds)),
        }
    }
}

fn form(error: &serde_json::Error) -> Failure {
    Failure::Form(error.to_string())
}

impl Follower {
    /// The path of a request. Values are encoded. A field selector among the parameters takes the place of the kind's.
    fn path<K: Kind>(&self, parameters: &[(&str, &str)]) -> String {
        let is_selected = K::IS_LABELLED && !self.selector.is_empty();
        let selector = is_selected.then_some(("labelSelector", &*self.selector));
        let has_fields = parameters.iter().any(|(name, _)| *name == "fieldSelector");
        let fields = (!has_fields && !self.fields.is_empty()).then_some(("fieldSelector", &*self.fields));
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(parameters).extend_pairs(selector).extend_pairs(fields);
        format!("{}?{}", K::PATH, query.finish())
    }

    /// Reads the credentials again. The client that there is reads a token's file about once a minute, and
    /// certificates and passwords never.
    async fn renew(&mut self) {
        match self.access.client().await {
            Ok((client, _same_server)) => self.client = client,
            // The former ones may still do: a file that is being replaced is there again at the next try.
            Err(error) => debug!(error = &error as &dyn std::error::Error, "the credentials cannot be read"),
        }
    }

    /// The server has answered what was asked.
    fn answered<K: Kind>(&self) {
        if let Some(lasted) = self.contact.answered(K::PLURAL, Instant::now().into_std()) {
            let lasted = Duration::from_millis(u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX));
            info!("API server {} answers again, after {lasted:?}", self.server);
            self.recovered.notify_waiters();
        }
    }

    /// Notes that a kind is not to be had of a server that answers. What is refused is an issue, which the log gets from there.
    fn note_lack<K: Kind>(&self, failure: &Failure, lack: &Lack, is_news: bool) {
        self.answered::<K>();
        self.contact.forget(K::PLURAL);
        match lack {
            Lack::Unknown if is_news => info!(
                "API server {} has no {}, which come with Kubernetes 1.33: the agent does without them",
                self.server,
                K::PLURAL
            ),
            Lack::Unknown => {}
            Lack::Forbidden(_) | Lack::Failing => self.contact.broke(failure.reason()),
        }
    }

    fn trim<K: Kind>(&self, header: &Header, text: &RawValue) -> Trimmed<K::Model> {
        trim::<K>(header, text, self.service_proxy_name.as_deref())
    }

    /// Notes a failure, and says so once in an outage.
    fn tell<K: Kind>(&self, failure: &Failure, is_watching: bool) {
        // The next attempt shows whether that is an outage.
        let is_usual = failure.is_about_version()
            || (is_watching
                && !matches!(failure, Failure::Silence(_) | Failure::Form(_) | Failure::TooLarge { .. }));
        if is_usual {
            return self.contact.broke(failure.reason());
        }
        let now = Instant::now().into_std();
        let since = match failure {
            Failure::Silence(_) => self.contact.last_answer(K::PLURAL).unwrap_or(now),
            _ => now,
        };
        let problem = format!("API server {}: {failure}", self.server);
        if self.contact.failed(K::PLURAL, failure.reason(), &problem, since) {
            warn!(objects = K::PLURAL, "{problem}; what is served stays as it is until it answers");
        }
    }

    /// Sends a request for a list, which servers compress, and waits for the head of the answer.
    async fn get_list(&self, path: &str, accept: &str) -> Result<Response<Body>, Failure> {
        self.get(path, accept, "gzip").await
    }

    /// The same for a watch. Whoever compressed one would keep events back until there are enough of them.
    async fn get_watch(&self, path: &str, accept: &str) -> Result<Response<Body>, Failure> {
        self.get(path, accept, "identity").await
    }

    async fn get(&self, path: &str, accept: &str, encoding: &str) -> Result<Response<Body>, Failure> {
        let request = Request::get(path)
            .header(ACCEPT, accept)
            .header(ACCEPT_ENCODING, encoding)
            .body(Body::empty())
            .map_err(|error| Failure::Form(error.to_string()))?;
        let limit = self.timing.answer;
        let answer =
            timeout(limit, self.client.send(request)).await.map_err(|_elapsed| Failure::Silence(limit))?;
        let answer = answer.map_err(|error| Failure::Connection(cause(&error)))?;
        if answer.status() == StatusCode::OK {
            return Ok(answer);
        }
        let code = answer.status().as_u16();
        let seconds =
            answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let mut lines = Lines::of(answer, Bound::STATUS);
        loop {
            match lines.read_more(limit).await {
                Ok(true) => {}
                // The code tells enough.
                Ok(false) | Err(Failure::TooLarge { .. }) => break,
                Err(failure) => return Err(failure),
            }
        }
        // A proxy in between answers in its own words.
        let status = serde_json::from_slice(&lines.read).unwrap_or_default();
        Err(Status { code, ..status }.into_failure(seconds))
    }

    async fn send(&self, news: News) -> Result<(), Failure> {
        self.news.send(news).await.map_err(|_closed| Failure::Stop)
    }

    /// Lists all objects, page by page.
    async fn list<K: Kind>(&self, version: &str) -> Result<String, Failure> {
        let (mut models, mut issues) = (Vec::new(), Vec::new());
        let mut next = String::new();
        let mut bound = Bound::LIST;
        loop {
            let mut parameters = vec![("limit", PAGE), ("resourceVersion", version)];
            if !version.is_empty() {
                // Whole, from the server's cache: for pages it would ask etcd. It knows none of version 0 either.
                parameters = vec![("resourceVersion", version), ("resourceVersionMatch", "NotOlderThan")];
            }
            if !next.is_empty() {
                // Which version the pages are of is in the token.
                parameters = vec![("limit", PAGE), ("continue", &next)];
            }
            let answer = self.get_list(&self.path::<K>(&parameters), K::ACCEPT_LIST).await?;
            let mut text = Lines::of(answer, bound);
            while text.read_more(self.timing.answer).await? {}
            bound = text.bound;
            let page: Page<'_> = serde_json::from_slice(&text.read).map_err(|error| form(&error))?;
            for item in page.items.unwrap_or_default() {
                let header: Header = serde_json::from_str(item.get()).map_err(|error| form(&error))?;
                let trimmed = self.trim::<K>(&header, item);
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
            self.answered::<K>();
            return Ok(version);
        }
    }

    /// Asks whether the server has reached a version, by a list of no object from its cache. Refused if not.
    async fn confirm<K: Kind>(&self, version: &str) -> Result<String, Failure> {
        let path = self.path::<K>(&[
            ("fieldSelector", NONE),
            ("resourceVersion", version),
            ("resourceVersionMatch", "NotOlderThan"),
        ]);
        let mut text = Lines::of(self.get_list(&path, K::ACCEPT_LIST).await?, Bound::EMPTY_LIST);
        while text.read_more(self.timing.answer).await? {}
        self.answered::<K>();
        Ok(version.to_owned())
    }

    /// For how long the server is asked to watch: the API has whole seconds.
    fn watch_time(&self) -> Duration {
        let least = self.timing.watch.as_secs().max(1);
        Duration::from_secs(least + random() % least)
    }

    /// Lists all objects as events, and goes on watching: no text of all objects is ever in memory.
    async fn stream<K: Kind>(&self, version: &str, progress: &mut bool) -> Result<Ended, Failure> {
        let time = self.watch_time();
        let (seconds, end) = (time.as_secs().to_string(), Instant::now() + time);
        let path = self.path::<K>(&[
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("sendInitialEvents", "true"),
            ("resourceVersionMatch", "NotOlderThan"),
            ("resourceVersion", version),
            ("timeoutSeconds", &seconds),
        ]);
        let mut lines = Lines::of(self.get_watch(&path, K::ACCEPT).await?, Bound::STREAM);
        let mut fold = Fold::new();
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
                "ADDED" | "MODIFIED" => fold.set(self.trim::<K>(&header, event.object)),
                "DELETED" => fold.delete(&header.object::<K>()),
                "BOOKMARK" => {
                    if header.has_annotation(INITIAL_EVENTS_END) {
                        let Some(version) = header.version() else { return Err(no_version()) };
                        let (models, issues) = fold.end();
                        self.send(K::news(Change::All { models, issues })).await?;
                        *progress = true;
                        self.answered::<K>();
                        lines.bound = Bound::NONE;
                        return self.events::<K>(lines, version, end, progress).await;
                    }
                }
                other => debug!(objects = K::PLURAL, event = other, "not expected in a list"),
            }
        }
    }

    /// Watches what follows a version.
    async fn watch<K: Kind>(&self, version: String, progress: &mut bool) -> Result<Ended, Failure> {
        let time = self.watch_time();
        let (seconds, end) = (time.as_secs().to_string(), Instant::now() + time);
        let path = self.path::<K>(&[
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", &version),
            ("timeoutSeconds", &seconds),
        ]);
        let lines = Lines::of(self.get_watch(&path, K::ACCEPT).await?, Bound::NONE);
        self.answered::<K>();
        self.events::<K>(lines, version, end, progress).await
    }

    /// Passes events on until the watch ends, which the server should do at `end`.
    ///
    /// # Errors
    ///
    /// Only [`Failure::Stop`]: how far the watch came counts, however it ended.
    async fn events<K: Kind>(
        &self,
        mut lines: Lines,
        mut version: String,
        end: Instant,
        progress: &mut bool,
    ) -> Result<Ended, Failure> {
        let started = Instant::now();
        let failure = loop {
            let line = match lines.next(self.timing.idle).await {
                Ok(Some(line)) => line,
                // Its clock may be a little fast, and counts whole seconds.
                Ok(None) if Instant::now() + SHORT_WATCH < end => break Some(Failure::Early),
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
            let Some(new) = header.version() else { break Some(no_version()) };
            self.answered::<K>();
            let news = match &*event.kind {
                "ADDED" | "MODIFIED" => Some(self.trim::<K>(&header, event.object)),
                "DELETED" => Some(Trimmed { object: header.object::<K>(), model: None, issues: Vec::new() }),
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

fn no_version() -> Failure {
    Failure::Form("an event without a version".to_owned())
}

fn error_event(object: &RawValue) -> Failure {
    match serde_json::from_str::<Status>(object.get()) {
        Ok(status) => status.into_failure(None),
        Err(error) => form(&error),
    }
}

/// How much of an answer is read.
#[derive(Clone, Copy)]
struct Bound {
    what: &'static str,
    limit: usize,
    n_left: usize,
    remedy: &'static str,
}

impl Bound {
    /// Only each line is bounded: what a watch brings goes to the receiver, which takes its time.
    const NONE: Self = Self::new("", usize::MAX, "");
    const LIST: Self = Self::new(
        "the list",
        MAX_LIST,
        "an API server that knows streaming lists (Kubernetes 1.34 and later) sends it object by object",
    );
    const STREAM: Self = Self::new("the list", MAX_STREAM, "is that the API server?");
    const EMPTY_LIST: Self = Self::new("a list of no object", MAX_STATUS, "is that the API server?");
    const STATUS: Self = Self::new("a refusal", MAX_STATUS, "");
    const EVENT: Self = Self::new("an event", MAX_EVENT, "no object of an API server is as large");

    const fn new(what: &'static str, limit: usize, remedy: &'static str) -> Self {
        Self { what, limit, n_left: limit, remedy }
    }

    const fn exceeded(&self) -> Failure {
        Failure::TooLarge { what: self.what, limit: self.limit, remedy: self.remedy }
    }

    fn count(&mut self, n_octets: usize) -> Result<(), Failure> {
        if self.limit < usize::MAX {
            self.n_left = self.n_left.checked_sub(n_octets).ok_or_else(|| self.exceeded())?;
        }
        Ok(())
    }
}

/// The lines of a body.
struct Lines {
    body: Body,
    bound: Bound,
    /// What decompresses it.
    gzip: Option<GzDecoder<Vec<u8>>>,
    read: Vec<u8>,
    /// Octets of `read` that were returned, or searched for the end of a line.
    n_returned: usize,
    n_searched: usize,
}

impl Lines {
    fn of(answer: Response<Body>, bound: Bound) -> Self {
        let is_packed = answer.headers().get(CONTENT_ENCODING).is_some_and(|encoding| encoding == "gzip");
        let gzip = is_packed.then(|| GzDecoder::new(Vec::new()));
        Self { body: answer.into_body(), bound, gzip, read: Vec::new(), n_returned: 0, n_searched: 0 }
    }

    /// Reads more. `false` at the end.
    async fn read_more(&mut self, limit: Duration) -> Result<bool, Failure> {
        let frame = timeout(limit, self.body.frame()).await.map_err(|_elapsed| Failure::Silence(limit))?;
        match frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.take(data)?;
                }
                Ok(true)
            }
            Some(Err(error)) => Err(Failure::Connection(cause(&error))),
            None => {
                let Some(gzip) = &mut self.gzip else { return Ok(false) };
                gzip.try_finish().map_err(|error| Failure::Form(error.to_string()))?;
                let rest = mem::take(gzip.get_mut());
                self.bound.count(rest.len())?;
                self.read.extend_from_slice(&rest);
                self.gzip = None;
                Ok(true)
            }
        }
    }

    /// Takes in what was received.
    fn take(&mut self, data: &[u8]) -> Result<(), Failure> {
        let Some(gzip) = &mut self.gzip else {
            self.bound.count(data.len())?;
            self.read.extend_from_slice(data);
            return Ok(());
        };
        for part in data.chunks(PACKED) {
            gzip.write_all(part).map_err(|error| Failure::Form(error.to_string()))?;
            let text = mem::take(gzip.get_mut());
            self.bound.count(text.len())?;
            self.read.extend_from_slice(&text);
        }
        Ok(())
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
            if self.read.len() > MAX_EVENT {
                return Err(Bound::EVENT.exceeded());
            }
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
    fn a_failure_names_what_the_server_said_and_what_to_do() {
        let said = |code, reason: &str, message: &str| {
            let (reason, message) = (reason.to_owned(), message.to_owned());
            Failure::Refused { code, reason, message, is_too_large: false, retry_after: None }
        };
        let failures = [
            said(401, "Unauthorized", "Unauthorized"),
            said(403, "Forbidden", "nodes is forbidden: User \"x\" cannot list resource \"nodes\""),
            said(429, "TooManyRequests", "too many requests"),
            Failure::Connection("connection refused".to_owned()),
            Failure::Silence(Duration::from_secs(10)),
            Failure::Form("expected value at line 1 column 1".to_owned()),
            Failure::Early,
        ];
        let texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
        let texts = texts.join("\n") + "\n";
        expect_test::expect![[r#"
            401 Unauthorized: Unauthorized (are the credentials out of date? the token or certificate is not accepted)
            403 Forbidden: nodes is forbidden: User "x" cannot list resource "nodes" (grant list and watch on services, nodes and endpointslices, and on pods for --exclude-pods: manifests/base/clusterrole.yaml)
            429 TooManyRequests: too many requests
            connection refused
            no answer for 10 s
            the answer cannot be read: expected value at line 1 column 1
            the watch ended early
        "#]].assert_eq(&texts);
    }

    #[test]
    fn what_follows_a_failure() {
        let confirm = || Position::Confirm { version: "7".to_owned() };
        let latest = || Position::ListLatest;
        let (lost, silence) = (|| Failure::Connection(String::new()), Failure::Silence(Duration::ZERO));
        for (what, failure, position, is_watching, next) in [
            ("forgotten", refused(410, false), at("7"), true, not_older_than("7")),
            ("forgotten meanwhile", refused(410, false), confirm(), false, not_older_than("7")),
            ("gone back", refused(504, true), confirm(), false, latest()),
            ("gone back, with others", refused(504, true), not_older_than("7"), false, latest()),
            ("forgotten by all", refused(410, false), not_older_than("7"), false, latest()),
            ("no page any more", refused(410, false), latest(), false, latest()),
            ("broken", lost(), at("7"), true, confirm()),
            ("ended by a server that stops", Failure::Early, at("7"), true, confirm()),
            ("an error in a watch", refused(500, false), at("7"), true, confirm()),
            ("silent", silence, at("7"), true, latest()),
            ("unreadable", Failure::Form(String::new()), at("7"), true, latest()),
            ("away", lost(), at("7"), false, latest()),
            ("away after it broke", lost(), confirm(), false, latest()),
            ("not ready", refused(503, false), confirm(), false, latest()),
            ("busy", refused(429, false), at("7"), false, confirm()),
            ("away from the start", lost(), latest(), false, latest()),
            ("busy from the start", refused(429, false), not_older_than("0"), false, not_older_than("0")),
        ] {
            assert_eq!(after(&failure, &position, is_watching), next, "{what}");
        }
    }

    #[test]
    fn failures_are_counted_by_known_reasons() {
        let codes = (300..600).map(|code| refused(code, false));
        let others = [Failure::Connection(String::new()), Failure::Early, Failure::Form(String::new())];
        for failure in codes.chain(others).chain([Failure::Silence(Duration::ZERO), refused(504, true)]) {
            assert!(REASONS.contains(&failure.reason()), "{failure:?}");
        }
        assert_eq!(refused(504, true).reason(), "expired");
        assert_eq!(refused(504, false).reason(), "server_error");
    }

    fn lines(body: Vec<u8>, bound: Bound) -> Lines {
        Lines::of(Response::new(Body::from(body)), bound)
    }

    fn packed(text: &[u8]) -> Response<Body> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        packer.write_all(text).unwrap();
        let body = Body::from(packer.finish().unwrap());
        Response::builder().header(CONTENT_ENCODING, "gzip").body(body).unwrap()
    }

    #[tokio::test]
    async fn what_is_compressed_is_read_and_bounded_as_what_is_not() {
        let second = Duration::from_secs(1);
        let text = b"a list of objects ".repeat(50_000);
        let mut list = Lines::of(packed(&text), Bound::LIST);
        while list.read_more(second).await.unwrap() {}
        assert!(list.read == text);
        // A megabyte of nothing, packed to a thousandth.
        let mut bomb = Lines::of(packed(&vec![0; 1 << 20]), Bound::new("the list", 100_000, "stop"));
        let error = loop {
            match bomb.read_more(second).await {
                Ok(more) => assert!(more, "it was read"),
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains("larger than") && bomb.read.len() <= 100_000, "{error}");
        let (head, body) = packed(&text).into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let mut cut =
            Lines::of(Response::from_parts(head, Body::from(body[..body.len() / 2].to_vec())), Bound::LIST);
        let error = loop {
            match cut.read_more(second).await {
                Ok(more) => assert!(more, "a part was taken for the whole"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Failure::Form(_)), "{error}");
    }

    #[tokio::test]
    async fn lines_are_whole() {
        let mut lines = lines(b"one\n\ntwo\ncut".to_vec(), Bound::NONE);
        let second = Duration::from_secs(1);
        assert_eq!(lines.next(second).await.unwrap(), Some(&b"one"[..]));
        assert_eq!(lines.next(second).await.unwrap(), Some(&b"two"[..]));
        assert_eq!(lines.next(second).await.unwrap(), None);
        let mut endless = self::lines(vec![b'x'; MAX_EVENT + 1], Bound::NONE);
        let error = endless.next(second).await.unwrap_err().to_string();
        assert!(error.starts_with("an event is larger than 32 MiB"), "{error}");
        // Lines that are small, without end.
        let mut endless = self::lines(b"event\n".repeat(100), Bound::new("the list", 500, "stop"));
        let mut n_lines = 0;
        let error = loop {
            match endless.next(second).await {
                Ok(line) => n_lines += usize::from(line.is_some()),
                Err(error) => break error.to_string(),
            }
            assert!(n_lines <= 100, "the bound was passed over");
        };
        assert!(error.contains("the list is larger than") && error.ends_with("stop"), "{error}");
    }

    #[test]
    fn what_a_refusal_says_is_bounded() {
        let status = Status { code: 500, message: "x".repeat(MAX_STATUS), ..Status::default() };
        let failure = status.into_failure(Some(u64::MAX)).to_string();
        assert!(failure.len() < MAX_MESSAGE + 50, "{} octets", failure.len());
    }
}
