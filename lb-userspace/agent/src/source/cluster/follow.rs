//! Lists and watches one kind of objects, and recovers from failures.

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
    kinds::{Change, Header, Kind, KindChange, Trimmed, Unavailable, trim},
};
use crate::source::Contact;

/// Objects per page of a list, if the server pages it.
const PAGE: &str = "500";
/// A watch that ends sooner, without an event, is retried only after a pause.
const SHORT_WATCH: Duration = Duration::from_secs(1);
/// Maximum part of an error response that is read, in bytes.
const MAX_STATUS: usize = 64 << 10;
/// Maximum length of a refusal's message, in characters.
const MAX_MESSAGE: usize = 500;
/// Maximum size of a watch event, in bytes: etcd holds objects of 1.5 MiB.
const MAX_EVENT: usize = 32 << 20;
/// Maximum size of a list that is not streamed, in bytes, over all pages: six times that of 10,000 services
/// with ten endpoints each.
const MAX_LIST: usize = 256 << 20;
/// Maximum size of a streaming list, in bytes. Only the models of its objects stay in memory.
const MAX_STREAM: usize = 2 << 30;
/// Compressed bytes that are decompressed at a time: gzip expands them at most a thousandfold before they are
/// counted.
const PACKED: usize = 4096;
/// The annotation of the bookmark that ends a streaming list.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// Selects no object: names have no capital letters.
const NONE: &str = "metadata.name=NONE";
/// Values of the metric's label for failures: see [`Failure::reason`].
pub(super) const REASONS: [&str; 8] =
    ["connection", "silence", "unauthorized", "forbidden", "throttled", "server_error", "expired", "other"];

/// Timeouts and pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Timeout of the response's head, and of each further part of a list.
    pub answer: Duration,
    /// Timeout of the next event of a watch. A server sends a bookmark about once a minute. A longer silence
    /// may mean a half-open connection, or a server restored to an earlier version: everything is listed
    /// again.
    pub idle: Duration,
    /// Minimum duration of a watch. A random time of up to the same length is added, so that the agents of
    /// all nodes do not return at the same moment.
    pub watch: Duration,
    /// The first pause after a failure.
    pub first_pause: Duration,
    /// Time until an optional kind is requested again that the server does not know or refuses. A random time
    /// of up to the same length is added.
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

/// What all watches share.
#[derive(Clone)]
pub(super) struct Follower {
    /// Where a new client comes from when this one fails.
    pub(super) access: Access,
    pub(super) client: Client,
    /// The server's URL, for log lines.
    pub(super) server: Arc<str>,
    pub(super) timing: Timing,
    /// Label selector for labelled kinds; empty for all objects.
    pub(super) selector: String,
    /// `--service-proxy-name`
    pub(super) service_proxy_name: Option<Arc<str>>,
    /// Field selector; empty for all objects.
    pub(super) fields: String,
    pub(super) contact: Contact,
    /// Notified when the server answers again: tasks in a pause retry at once.
    pub(super) recovered: Arc<Notify>,
    pub(super) changes: mpsc::Sender<KindChange>,
}

/// The next request to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Position {
    /// List the objects, in a state not older than this version. "0" means any state.
    List {
        not_older_than: String,
    },
    /// List the objects in their latest state, whatever the server's version.
    ListLatest,
    /// Check that the server has reached this version, then watch. A server restored from a backup may not
    /// have, and a watch would be silent until then.
    Confirm {
        version: String,
    },
    Watch {
        version: String,
    },
}

/// Why a request or a watch ended.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{code} {reason}: {message}{}", remedy(*.code))]
    Refused { code: u16, reason: String, message: String, is_too_large: bool, retry_after: Option<Duration> },
    #[error("{0}")]
    Connection(String),
    #[error("no answer for {} s", .0.as_secs_f32())]
    Silence(Duration),
    #[error("the answer cannot be read: {0}")]
    Form(String),
    #[error("{what} is larger than {} MiB and was not read: {remedy}", .limit >> 20)]
    TooLarge { what: &'static str, limit: usize, remedy: &'static str },
    /// The server ended a watch early, as it does when it stops.
    #[error("the watch ended early")]
    Early,
    /// The agent stops.
    #[error("the agent stops")]
    Stop,
}

impl Failure {
    /// Whether new credentials may help. A rejected certificate shows as a connection error.
    const fn is_about_access(&self) -> bool {
        matches!(self, Self::Refused { code: 401, .. } | Self::Connection(_))
    }

    /// Whether the server lacks changes after the requested version: forgotten, or not reached yet.
    const fn is_about_version(&self) -> bool {
        matches!(self, Self::Refused { code: 410, .. } | Self::Refused { is_too_large: true, .. })
    }

    /// What it says about an optional kind; `None` if it is about the server as a whole, or about a version.
    fn lack(&self) -> Option<Unavailable> {
        match self {
            _ if self.is_about_version() => None,
            Self::Refused { code: 404, .. } => Some(Unavailable::Unknown),
            Self::Refused { code: 403, .. } => Some(Unavailable::Forbidden(self.to_string())),
            Self::Refused { code: 401 | 429, .. } => None,
            Self::Refused { .. } | Self::Form(_) => Some(Unavailable::Failing),
            _ => None,
        }
    }

    /// Whether the server is unreachable or silent.
    const fn is_absence(&self) -> bool {
        matches!(self, Self::Connection(_) | Self::Silence(_) | Self::Early)
    }

    /// One of [`REASONS`].
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

/// The remedy for a refusal.
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

/// The next request after a failure. `is_watching` if a watch had begun.
///
/// An earlier version may be in the future of a server restored from a backup, and a watch from there brings
/// nothing. So the version is reused only if the server answered all the time and confirms it. After an
/// outage a confirmation proves nothing: the restored server may have made as many other changes meanwhile.
fn after(failure: &Failure, position: &Position, is_watching: bool) -> Position {
    match position {
        Position::List { .. } if failure.is_about_version() => Position::ListLatest,
        Position::List { .. } | Position::ListLatest => position.clone(),
        Position::Watch { version } | Position::Confirm { version } => match failure {
            Failure::Refused { is_too_large: true, .. } => Position::ListLatest,
            // Any state not older than the last seen, which spares etcd.
            Failure::Refused { code: 410, .. } => Position::List { not_older_than: version.clone() },
            // The server is up, and busy: avoid a list.
            Failure::Refused { code: 429, .. } => Position::Confirm { version: version.clone() },
            Failure::Connection(_) | Failure::Early | Failure::Refused { .. } if is_watching => {
                Position::Confirm { version: version.clone() }
            }
            _ => Position::ListLatest,
        },
    }
}

/// The next request after an answer. `was_away` if requests for any kind found the server unreachable or
/// silent since the watch began: then a confirmed version proves nothing either.
fn after_answer(position: &Position, version: String, was_away: bool) -> Position {
    match position {
        Position::Confirm { .. } if was_away => Position::ListLatest,
        _ => Position::Watch { version },
    }
}

/// Whether the server rejects streaming lists as an invalid request.
const fn lacks_streaming(failure: &Failure) -> bool {
    matches!(failure, Failure::Refused { code: 400 | 422, .. })
}

/// Sends all objects of a kind and their changes to the receiver, until that is closed.
pub(super) async fn follow<K: Kind>(mut follower: Follower) {
    let mut backoff = Backoff::new(follower.timing.first_pause);
    let mut position = Position::ListLatest;
    let mut has_streaming = true;
    let mut last_move = None::<Instant>;
    let mut is_lacking = false;
    // When a watch last began or ended in time.
    let mut n_absences = follower.contact.n_absences();
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
                    info!("API server {} serves {} now", follower.server, K::PLURAL);
                }
                let is_asking = matches!(position, Position::Confirm { .. });
                let n_now = follower.contact.n_absences();
                position = after_answer(&position, version, n_now != n_absences);
                let Some(failure) = failure else {
                    n_absences = n_now;
                    // A confirmed version does not show that watches work.
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
            // As client-go does: any state for the first list, which spares etcd.
            position = Position::List { not_older_than: "0".to_owned() };
            continue;
        }
        if let Some(lack) = failure.lack()
            && let Some(change) = K::lacking(lack.clone())
        {
            if follower.send(change).await.is_err() {
                return;
            }
            if lack != Unavailable::Failing {
                follower.record_lack::<K>(&failure, &lack, !std::mem::replace(&mut is_lacking, true));
                position = Position::ListLatest;
                let rare = follower.timing.rare;
                let jitter = rare * u32::from(u8::try_from(random() % 256).unwrap_or_default()) / 256;
                tokio::select! {
                    () = sleep(rare + jitter) => {}
                    // The server may have been upgraded.
                    () = follower.recovered.notified() => {}
                    () = follower.changes.closed() => return,
                }
                continue;
            }
        }
        let next = after(&failure, &position, is_watching);
        follower.tell::<K>(&failure, is_watching);
        debug!(objects = K::PLURAL, %failure, ?position, ?next, "next request");
        // Retry at once after an answer about a version. Not if the request stays the same (the latest state
        // names no version that could be wrong), and not repeatedly. Also retry at once after a watch that
        // brought an event and broke: the server was up.
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
            () = follower.changes.closed() => return,
        }
        if failure.is_about_access() {
            follower.renew().await;
        }
    }
}

/// The last version of a watch, and why it ended.
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

/// The part of a `metav1.Status` that is read.
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
    /// The path of a request, with encoded values. A field selector in `parameters` replaces the kind's.
    fn path<K: Kind>(&self, parameters: &[(&str, &str)]) -> String {
        let is_selected = K::IS_LABELLED && !self.selector.is_empty();
        let selector = is_selected.then_some(("labelSelector", &*self.selector));
        let has_fields = parameters.iter().any(|(name, _)| *name == "fieldSelector");
        let fields = (!has_fields && !self.fields.is_empty()).then_some(("fieldSelector", &*self.fields));
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(parameters).extend_pairs(selector).extend_pairs(fields);
        format!("{}?{}", K::PATH, query.finish())
    }

    /// Makes a client with fresh credentials. An existing client rereads a token file about once a minute,
    /// and certificates and passwords never.
    async fn renew(&mut self) {
        match self.access.client().await {
            Ok((client, _same_server)) => self.client = client,
            // Keep the old ones. A file that is being replaced is readable on the next try.
            Err(error) => debug!(error = &error as &dyn std::error::Error, "the credentials cannot be read"),
        }
    }

    fn answered<K: Kind>(&self) {
        if let Some(lasted) = self.contact.answered(K::PLURAL, Instant::now().into_std()) {
            let lasted = Duration::from_millis(u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX));
            info!("API server {} answers again, after {lasted:?}", self.server);
            self.recovered.notify_waiters();
        }
    }

    /// Records that a server that answers lacks a kind. A refusal is an issue, logged as such.
    fn record_lack<K: Kind>(&self, failure: &Failure, lack: &Unavailable, is_news: bool) {
        self.answered::<K>();
        self.contact.forget(K::PLURAL);
        match lack {
            Unavailable::Unknown if is_news => info!(
                "API server {} has no {}, which Kubernetes 1.33 introduced: the agent works without them",
                self.server,
                K::PLURAL
            ),
            Unavailable::Unknown => {}
            Unavailable::Forbidden(_) | Unavailable::Failing => self.contact.broke(failure.reason()),
        }
    }

    fn trim<K: Kind>(&self, header: &Header, text: &RawValue) -> Trimmed<K::Model> {
        trim::<K>(header, text, self.service_proxy_name.as_deref())
    }

    /// Records a failure, and logs it once per outage.
    fn tell<K: Kind>(&self, failure: &Failure, is_watching: bool) {
        // The next attempt shows whether this is an outage.
        let is_usual = failure.is_about_version()
            || (is_watching
                && !matches!(failure, Failure::Silence(_) | Failure::Form(_) | Failure::TooLarge { .. }));
        if is_usual {
            return self.contact.broke(failure.reason());
        }
        if failure.is_absence() {
            self.contact.absent();
        }
        let now = Instant::now().into_std();
        let since = match failure {
            Failure::Silence(_) => self.contact.last_answer(K::PLURAL).unwrap_or(now),
            _ => now,
        };
        let problem = format!("API server {}: {failure}", self.server);
        if self.contact.failed(K::PLURAL, failure.reason(), &problem, since) {
            warn!(objects = K::PLURAL, "{problem}; serving the last known objects until it answers");
        }
    }

    /// Sends a request for a list, which servers compress, and waits for the response's head.
    async fn get_list(&self, path: &str, accept: &str) -> Result<Response<Body>, Failure> {
        self.get(path, accept, "gzip").await
    }

    /// The same for a watch, without compression, which would delay events.
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
                // The status code is enough.
                Ok(false) | Err(Failure::TooLarge { .. }) => break,
                Err(failure) => return Err(failure),
            }
        }
        // A proxy's response may have another form.
        let status = serde_json::from_slice(&lines.read).unwrap_or_default();
        Err(Status { code, ..status }.into_failure(seconds))
    }

    async fn send(&self, change: KindChange) -> Result<(), Failure> {
        self.changes.send(change).await.map_err(|_closed| Failure::Stop)
    }

    async fn list<K: Kind>(&self, version: &str) -> Result<String, Failure> {
        let (mut models, mut issues) = (Vec::new(), Vec::new());
        let mut next = String::new();
        let mut bound = Bound::LIST;
        loop {
            let mut parameters = vec![("limit", PAGE), ("resourceVersion", version)];
            if !version.is_empty() {
                // Whole, from the server's cache: pages would come from etcd. Pages do not work with version
                // 0 either.
                parameters = vec![("resourceVersion", version), ("resourceVersionMatch", "NotOlderThan")];
            }
            if !next.is_empty() {
                // The token contains the version of the pages.
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
                return Err(Failure::Form("a list without a resource version".to_owned()));
            }
            self.send(K::change(Change::All { models, issues })).await?;
            self.answered::<K>();
            return Ok(version);
        }
    }

    /// Asks whether the server has reached a version, by an empty list from its cache. Refused if not.
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

    /// Requested duration of a watch, in the API's whole seconds.
    fn watch_time(&self) -> Duration {
        let least = self.timing.watch.as_secs().max(1);
        Duration::from_secs(least + random() % least)
    }

    /// Lists all objects as events, then watches. The text of all objects is never in memory at once.
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
                return Err(Failure::Connection("the list broke off".to_owned()));
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
                        self.send(K::change(Change::All { models, issues })).await?;
                        *progress = true;
                        self.answered::<K>();
                        lines.bound = Bound::NONE;
                        return self.events::<K>(lines, version, end, progress).await;
                    }
                }
                other => debug!(objects = K::PLURAL, event = other, "unexpected event in a list"),
            }
        }
    }

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

    /// Sends events to the receiver until the watch ends, which the server should do at `end`.
    ///
    /// # Errors
    ///
    /// Only [`Failure::Stop`]. Any other failure is returned with the last version.
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
                // The server's clock may be a little fast, and it counts whole seconds.
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
            let change = match &*event.kind {
                "ADDED" | "MODIFIED" => Some(self.trim::<K>(&header, event.object)),
                "DELETED" => Some(Trimmed { object: header.object::<K>(), model: None, issues: Vec::new() }),
                _ => None,
            };
            if let Some(trimmed) = change {
                self.send(K::change(Change::One { trimmed, received })).await?;
            }
            version = new;
            *progress = true;
        };
        // A watch that lasted shows that the server is up.
        *progress |= started.elapsed() >= SHORT_WATCH;
        Ok(Ended { version, failure })
    }
}

fn no_version() -> Failure {
    Failure::Form("an event without a resource version".to_owned())
}

fn error_event(object: &RawValue) -> Failure {
    match serde_json::from_str::<Status>(object.get()) {
        Ok(status) => status.into_failure(None),
        Err(error) => form(&error),
    }
}

/// How much of a response is read.
#[derive(Clone, Copy)]
struct Bound {
    what: &'static str,
    limit: usize,
    n_left: usize,
    remedy: &'static str,
}

impl Bound {
    /// Only each line is bounded. The receiver slows down a watch.
    const NONE: Self = Self::new("", usize::MAX, "");
    const LIST: Self = Self::new(
        "the list",
        MAX_LIST,
        "an API server with streaming lists (Kubernetes 1.34 and later) sends it object by object",
    );
    const STREAM: Self = Self::new("the list", MAX_STREAM, "is that the API server?");
    const EMPTY_LIST: Self = Self::new("an empty list", MAX_STATUS, "is that the API server?");
    const STATUS: Self = Self::new("a refusal", MAX_STATUS, "");
    const EVENT: Self = Self::new("an event", MAX_EVENT, "no object of an API server is that large");

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

struct Lines {
    body: Body,
    bound: Bound,
    /// What decompresses it.
    gzip: Option<GzDecoder<Vec<u8>>>,
    read: Vec<u8>,
    /// Bytes of `read` that were returned, or searched for a line's end.
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
            403 Forbidden: nodes is forbidden: User "x" cannot list resource "nodes" (grant list and watch on services, nodes, endpointslices and servicecidrs, and on pods for --exclude-pods: manifests/base/clusterrole.yaml)
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
            ("forgotten while confirming", refused(410, false), confirm(), false, not_older_than("7")),
            ("gone back", refused(504, true), confirm(), false, latest()),
            ("gone back, while listing", refused(504, true), not_older_than("7"), false, latest()),
            ("forgotten by all", refused(410, false), not_older_than("7"), false, latest()),
            ("page token expired", refused(410, false), latest(), false, latest()),
            ("broken", lost(), at("7"), true, confirm()),
            ("ended by a server that stops", Failure::Early, at("7"), true, confirm()),
            ("an error in a watch", refused(500, false), at("7"), true, confirm()),
            ("silent", silence, at("7"), true, latest()),
            ("unreadable", Failure::Form(String::new()), at("7"), true, latest()),
            ("unreachable", lost(), at("7"), false, latest()),
            ("unreachable after a break", lost(), confirm(), false, latest()),
            ("not ready", refused(503, false), confirm(), false, latest()),
            ("busy", refused(429, false), at("7"), false, confirm()),
            ("unreachable from the start", lost(), latest(), false, latest()),
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
            assert!(n_lines <= 100, "the bound was exceeded");
        };
        assert!(error.contains("the list is larger than") && error.ends_with("stop"), "{error}");
    }

    #[test]
    fn what_a_refusal_says_is_bounded() {
        let status = Status { code: 500, message: "x".repeat(MAX_STATUS), ..Status::default() };
        let failure = status.into_failure(Some(u64::MAX)).to_string();
        assert!(failure.len() < MAX_MESSAGE + 50, "{} octets", failure.len());
    }

    #[test]
    fn a_version_is_confirmed_only_by_a_server_that_was_there_all_the_time() {
        let confirm = Position::Confirm { version: "7".to_owned() };
        for (position, was_away, next) in [
            (&confirm, false, at("7")),
            (&confirm, true, Position::ListLatest),
            // A list, and a watch that ended in time, are of the server as it is now.
            (&Position::ListLatest, true, at("7")),
            (&not_older_than("5"), true, at("7")),
            (&at("5"), true, at("7")),
        ] {
            let found = after_answer(position, "7".to_owned(), was_away);
            assert_eq!(found, next, "{position:?}, away: {was_away}");
        }
    }
}
