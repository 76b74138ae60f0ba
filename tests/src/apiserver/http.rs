//! Requests and responses.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, Write as _},
    net::TcpListener,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http_body_util::{
    BodyExt as _, Either, Full,
    channel::{Channel, Sender},
};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, RETRY_AFTER},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{self, Instant};
use tokio_util::io::InspectWriter;

use super::{
    Shared, Signals, discovery, events, lock,
    selector::Selector,
    store::{Change, Kind, Objects, Refusal},
};

/// A complete text, or chunks over time. An aborted channel closes the connection.
type Answer = Either<Full<Bytes>, Channel<Bytes, io::Error>>;

/// Waits forever if the connection is frozen.
async fn wait_while_frozen(shared: &Shared, connection: u64) {
    if shared.signals.borrow().frozen >= connection {
        std::future::pending::<()>().await;
    }
}

/// Serves connections until dropped.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    loop {
        let Ok((stream, _peer)) = listener.accept().await else { continue };
        // Events are small: without this, each waits for the acknowledgement of the previous one.
        let _as_it_is = stream.set_nodelay(true);
        let connection = {
            let mut n_connections = lock(&shared.n_connections);
            *n_connections += 1;
            *n_connections
        };
        let shared = Arc::clone(&shared);
        let counting = Arc::clone(&shared);
        let counted = InspectWriter::new(stream, move |octets: &[u8]| {
            let _before = counting.n_octets.fetch_add(octets.len() as u64, Ordering::Relaxed);
        });
        // Stops with the runtime.
        let _connection = tokio::spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move {
                    wait_while_frozen(&shared, connection).await;
                    let answer = answer(&shared, connection, request).await;
                    wait_while_frozen(&shared, connection).await;
                    Ok::<_, io::Error>(answer.unwrap_or_else(|refusal| refused(&refusal)))
                }
            });
            // A broken connection is the client's problem.
            let _broken = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(counted), service)
                .await;
        });
    }
}

fn respond(code: u16, text: impl Into<Bytes>) -> Response<Answer> {
    let mut response = Response::new(Either::Left(Full::new(text.into())));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The size in bytes from which a server compresses a list (`defaultGzipThresholdBytes`).
const PACKED: usize = 128 << 10;

fn answer_list(list: &Value, takes_gzip: bool) -> Response<Answer> {
    let text = list.to_string();
    if !takes_gzip || text.len() < PACKED {
        return respond(200, text);
    }
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    // Writes to memory.
    let octets = gzip.write_all(text.as_bytes()).and_then(|()| gzip.finish()).unwrap_or_default();
    let mut response = respond(200, octets);
    response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    response
}

fn refused(refusal: &Refusal) -> Response<Answer> {
    let mut response = respond(refusal.code, refusal.status().to_string());
    if let Some(seconds) = refusal.retry_after {
        response.headers_mut().insert(RETRY_AFTER, seconds.into());
    }
    response
}

#[derive(Debug)]
struct Query(BTreeMap<String, String>);

impl Query {
    fn parse(text: &str) -> Self {
        Self(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    fn get(&self, key: &str) -> &str {
        self.0.get(key).map(String::as_str).unwrap_or_default()
    }

    fn is_true(&self, key: &str) -> bool {
        matches!(self.get(key), "true" | "1")
    }

    fn number(&self, key: &str) -> Result<u64, Refusal> {
        let text = self.get(key);
        if text.is_empty() {
            return Ok(0);
        }
        text.parse()
            .map_err(|_not_a_number| Refusal::new(400, "BadRequest", format!("{key}: bad number: {text:?}")))
    }
}

#[derive(Clone, Copy, Debug)]
struct Target<'a> {
    kind: Kind,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
}

fn target(path: &str) -> Option<Target<'_>> {
    let prefixes = [
        ("v1", "/api/v1/"),
        ("discovery.k8s.io/v1", "/apis/discovery.k8s.io/v1/"),
        ("networking.k8s.io/v1", "/apis/networking.k8s.io/v1/"),
    ];
    let (api_version, rest) =
        prefixes.into_iter().find_map(|(version, prefix)| Some((version, path.strip_prefix(prefix)?)))?;
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    let (namespace, parts) = match &parts[..] {
        ["namespaces", namespace, parts @ ..] if !parts.is_empty() => (Some(*namespace), parts),
        parts => (None, parts),
    };
    let (plural, name) = match parts {
        [plural] => (*plural, None),
        [plural, name] => (*plural, Some(*name)),
        _ => return None,
    };
    let kind =
        Kind::ALL.into_iter().find(|kind| kind.plural() == plural && kind.api_version() == api_version)?;
    (namespace.is_none() || kind.is_namespaced()).then_some(Target { kind, namespace, name })
}

type Result<T, E = Refusal> = std::result::Result<T, E>;

async fn answer(
    shared: &Arc<Shared>,
    connection: u64,
    request: Request<Incoming>,
) -> Result<Response<Answer>> {
    let (head, body) = request.into_parts();
    // Names need no encoding.
    let path = head.uri.path();
    if let Some(document) = discovery::document(path.trim_end_matches('/')) {
        return Ok(respond(200, document.to_string()));
    }
    let body = body.collect().await.map_err(|error| unreadable(&error))?.to_bytes();
    let parse = || serde_json::from_slice(&body).map_err(|error| unreadable(&error));
    if let Some((namespace, name)) = events::target(path) {
        let (code, event) = lock(&shared.events).write(&head.method, namespace, name, parse()?)?;
        return Ok(respond(code, event.to_string()));
    }
    let query = Query::parse(head.uri.query().unwrap_or_default());
    let unknown = lock(&shared.faults).unknown;
    let target = target(path);
    if target.is_some_and(|target| Some(target.kind) == unknown) {
        lock(&shared.requests).unknown += 1;
    }
    let Some(target) = target.filter(|target| Some(target.kind) != unknown) else {
        return Err(Refusal::new(404, "NotFound", "the server could not find the requested resource"));
    };
    {
        let mut faults = lock(&shared.faults);
        let bearer =
            head.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        if faults.token.as_deref().is_some_and(|token| bearer != Some(token)) {
            return Err(Refusal::new(401, "Unauthorized", "Unauthorized"));
        }
        if faults.forbidden == Some(target.kind) {
            let kind = target.kind.plural();
            let message = format!("{kind} is forbidden: User \"test\" cannot list resource \"{kind}\"");
            return Err(Refusal::new(403, "Forbidden", message));
        }
        if faults.internal_errors > 0 {
            faults.internal_errors -= 1;
            return Err(Refusal::new(500, "InternalError", "an internal error, as asked for"));
        }
        if head.method == Method::GET && target.name.is_none() && faults.too_many_requests.0 > 0 {
            faults.too_many_requests.0 -= 1;
            let retry_after = Some(faults.too_many_requests.1);
            let refusal = Refusal::new(429, "TooManyRequests", "too many requests, please try again later.");
            return Err(Refusal { retry_after, ..refusal });
        }
    }
    let (kind, namespace) = (target.kind, target.namespace.unwrap_or_default());
    match (head.method, target.name) {
        (Method::GET, None) if query.is_true("watch") => watch(shared, connection, target, &query),
        (Method::GET, None) => {
            {
                let mut requests = lock(&shared.requests);
                let is_for_none = query.get("fieldSelector") == "metadata.name=NONE";
                let count = if is_for_none { &mut requests.confirmations } else { &mut requests.lists };
                *count += 1;
            }
            let delay = lock(&shared.faults).delay;
            time::sleep(delay).await;
            let takes_gzip = head.headers.get(ACCEPT_ENCODING).is_some_and(|encoding| encoding == "gzip");
            list(shared, target, &query).map(|list| answer_list(&list, takes_gzip))
        }
        (Method::GET, Some(name)) => {
            let object = lock(&shared.store).get(kind, namespace, name)?;
            Ok(respond(200, object.to_string()))
        }
        (Method::POST, None) => {
            let object: Value = parse()?;
            let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let created = shared.change(|store| match store.get(kind, namespace, &name) {
                Ok(_existing) => {
                    let message = format!("{} {name:?} already exists", kind.plural());
                    Err(Refusal::new(409, "AlreadyExists", message))
                }
                Err(_missing) => store.upsert(kind, object),
            })?;
            Ok(respond(201, created.to_string()))
        }
        (Method::PATCH, Some(name)) => {
            let changes = parse()?;
            let patched = shared.change(|store| {
                let mut object = (*store.get(kind, namespace, name)?).clone();
                merge(&mut object, &changes);
                store.upsert(kind, object)
            })?;
            Ok(respond(200, patched.to_string()))
        }
        (Method::DELETE, Some(name)) => {
            let object = shared.change(|store| store.delete(kind, namespace, name))?;
            let details = json!({"name": name, "kind": kind.plural(), "uid": object["metadata"]["uid"]});
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
            Ok(respond(200, status.to_string()))
        }
        _ => Err(Refusal::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )),
    }
}

fn unreadable(error: &impl ToString) -> Refusal {
    Refusal::new(400, "BadRequest", format!("the body cannot be read: {}", error.to_string()))
}

/// RFC 7386, without the directives of a strategic merge.
pub(super) fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = json!({});
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        if value.is_null() {
            if let Some(fields) = object.as_object_mut() {
                fields.remove(key);
            }
        } else {
            merge(&mut object[key], value);
        }
    }
}

/// Refuses a version that is newer than the server's.
fn not_too_large(shared: &Shared, wanted: u64, current: u64) -> Result<()> {
    if wanted > current {
        lock(&shared.requests).too_large += 1;
        return Err(Refusal::too_large(wanted, current));
    }
    Ok(())
}

fn list(shared: &Shared, target: Target<'_>, query: &Query) -> Result<Value> {
    let selector = Selector::parse(query.get("labelSelector"), query.get("fieldSelector"), target.namespace)?;
    let (wanted, limit) = (query.number("resourceVersion")?, query.number("limit")?);
    let store = lock(&shared.store);
    let token = query.get("continue");
    let expired = |refusal| {
        lock(&shared.requests).expired += 1;
        refusal
    };
    let (version, after) = if let Some((version, name)) = token.split_once(' ') {
        let version = version
            .parse()
            .map_err(|_no_number| Refusal::new(400, "BadRequest", "continue: not a token of this server"))?;
        (version, name.split_once('/').map(|(namespace, name)| (namespace.to_owned(), name.to_owned())))
    } else if query.get("resourceVersionMatch") == "Exact" {
        (wanted, None)
    } else {
        not_too_large(shared, wanted, store.version())?;
        (store.version(), None)
    };
    let objects = store.objects_at(target.kind, version).map_err(expired)?;
    drop(store);
    let mut items: Vec<_> = objects
        .into_iter()
        .filter(|(name, object)| after.as_ref().is_none_or(|after| name > after) && selector.matches(object))
        .collect();
    let mut metadata = json!({"resourceVersion": version.to_string()});
    // A list from the cache (resource version 0) is not paged.
    let is_paged = limit > 0 && query.get("resourceVersion") != "0";
    let n_wanted = usize::try_from(limit).unwrap_or(usize::MAX);
    if is_paged && items.len() > n_wanted {
        metadata["remainingItemCount"] = (items.len() - n_wanted).into();
        items.truncate(n_wanted);
        if let Some(((namespace, name), _)) = items.last() {
            metadata["continue"] = format!("{version} {namespace}/{name}").into();
        }
    }
    let items: Vec<&Value> = items.iter().map(|(_, object)| &**object).collect();
    let kind = format!("{}List", target.kind.name());
    Ok(json!({"kind": kind, "apiVersion": target.kind.api_version(), "metadata": metadata, "items": items}))
}

fn watch(
    shared: &Arc<Shared>,
    connection: u64,
    target: Target<'_>,
    query: &Query,
) -> Result<Response<Answer>> {
    let namespace = target.namespace;
    let selector = Selector::parse(query.get("labelSelector"), query.get("fieldSelector"), namespace)?;
    let (text, wanted) = (query.get("resourceVersion"), query.number("resourceVersion")?);
    let (sends_initial, version_match) =
        (query.is_true("sendInitialEvents"), query.get("resourceVersionMatch"));
    let faults = lock(&shared.faults).clone();
    let invalid = |message: &str| Err(Refusal::new(422, "Invalid", message));
    if (sends_initial || !version_match.is_empty()) && !faults.has_streaming_lists {
        return invalid("resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch");
    }
    if sends_initial != (version_match == "NotOlderThan") {
        return invalid(
            "resourceVersionMatch: Forbidden: sendInitialEvents and NotOlderThan require each other",
        );
    }
    let store = lock(&shared.store);
    let is_synthetic = sends_initial || text.is_empty() || text == "0";
    let begin = store.version().saturating_sub(faults.changes_in_lists).max(store.oldest());
    let (initial, changes) = if sends_initial {
        (store.objects_at(target.kind, begin)?, store.changes_after(target.kind, begin).unwrap_or_default())
    } else if is_synthetic {
        (store.objects(target.kind), Vec::new())
    } else {
        (BTreeMap::new(), Vec::new())
    };
    if sends_initial {
        not_too_large(shared, wanted, store.version())?;
    }
    let version = if is_synthetic { store.version() } else { wanted };
    let oldest = store.oldest();
    drop(store);
    {
        let mut requests = lock(&shared.requests);
        if sends_initial {
            requests.lists += 1;
        } else {
            requests.watches += 1;
        }
    }
    let seconds = query.number("timeoutSeconds")?;
    let timeout = Duration::from_secs(if seconds == 0 { 3600 } else { seconds });
    let (sender, chunks) = Channel::new(64);
    let mut watch = Watch {
        shared: Arc::clone(shared),
        connection,
        kind: target.kind,
        selector,
        sender,
        wants_bookmarks: query.is_true("allowWatchBookmarks"),
        started: *shared.signals.borrow(),
    };
    // Stops with the receiver or the runtime.
    let _watching = tokio::spawn(async move {
        time::sleep(faults.delay).await;
        if watch.send_all(&initial, changes).await.is_none() {
            return;
        }
        if sends_initial && watch.bookmark(version, true).await.is_none() {
            return;
        }
        let _ended = time::timeout(timeout, watch.follow(version, oldest, faults.bookmark_interval)).await;
    });
    Ok(respond(200, Bytes::new()).map(|_empty| Either::Right(chunks)))
}

/// An event as a line of a watch. The object is not copied: an initial list has many.
fn line(event: &str, object: &Value) -> Bytes {
    #[derive(Serialize)]
    struct Event<'a> {
        r#type: &'a str,
        object: &'a Value,
    }
    let mut line = serde_json::to_vec(&Event { r#type: event, object }).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

/// An open watch. Its methods return `None` once it is closed.
struct Watch {
    shared: Arc<Shared>,
    connection: u64,
    kind: Kind,
    selector: Selector,
    sender: Sender<Bytes, io::Error>,
    wants_bookmarks: bool,
    started: Signals,
}

impl Watch {
    async fn send(&mut self, event: &str, object: &Value) -> Option<()> {
        wait_while_frozen(&self.shared, self.connection).await;
        self.send_line(line(event, object)).await
    }

    async fn send_line(&mut self, line: Bytes) -> Option<()> {
        self.sender.send_data(line).await.ok()
    }

    /// Sends objects ordered by name. Each change is sent as soon as its object was sent.
    async fn send_all(&mut self, objects: &Objects, changes: Vec<Change>) -> Option<()> {
        let mut changes = VecDeque::from(changes);
        for (name, object) in objects {
            if self.selector.matches(object) {
                self.send("ADDED", object).await?;
            }
            let is_sent = |change: &Change| change.name <= *name || !objects.contains_key(&change.name);
            while changes.front().is_some_and(is_sent) {
                if let Some(change) = changes.pop_front() {
                    self.send_in_list(&change).await?;
                }
            }
        }
        for change in changes {
            self.send_in_list(&change).await?;
        }
        Some(())
    }

    async fn send_in_list(&mut self, change: &Change) -> Option<()> {
        if let Some(line) = self.line_of(change) {
            lock(&self.shared.requests).changes_in_lists += 1;
            self.send_line(line).await?;
        }
        Some(())
    }

    async fn bookmark(&mut self, version: u64, ends_initial: bool) -> Option<()> {
        let annotations = if ends_initial { json!({"k8s.io/initial-events-end": "true"}) } else { json!({}) };
        let metadata = json!({"resourceVersion": version.to_string(), "annotations": annotations, "creationTimestamp": null});
        let object =
            json!({"kind": self.kind.name(), "apiVersion": self.kind.api_version(), "metadata": metadata});
        self.send("BOOKMARK", &object).await
    }

    async fn gone(&mut self, version: u64, oldest: u64) -> Option<()> {
        lock(&self.shared.requests).expired += 1;
        let status = Refusal::expired(version, oldest).status();
        self.send("ERROR", &status).await?;
        None
    }

    /// Sends changes until the watch closes.
    ///
    /// Waits silently for a version that is not reached yet, as a real server does.
    async fn follow(mut self, mut version: u64, oldest: u64, bookmark_interval: Duration) -> Option<()> {
        let mut versions = self.shared.version.subscribe();
        let mut signals = self.shared.signals.subscribe();
        let mut next_bookmark = Instant::now() + bookmark_interval;
        loop {
            let now = *signals.borrow_and_update();
            if now.cut != self.started.cut {
                // Closes in the middle of a chunk.
                self.send_line(Bytes::from_static(b"{\"type\":\"ADD")).await?;
                self.sender.abort(io::ErrorKind::ConnectionAborted.into());
                return None;
            }
            if now.expire != self.started.expire {
                return self.gone(version, oldest).await;
            }
            let current = *versions.borrow_and_update();
            let Some(changes) = self.shared.changes_after(self.kind, version) else {
                return self.gone(version, oldest).await;
            };
            for change in changes {
                version = change.version;
                self.send_change(&change).await?;
            }
            version = version.max(current);
            tokio::select! {
                _ = versions.changed() => {}
                _ = signals.changed() => {}
                () = time::sleep_until(next_bookmark), if self.wants_bookmarks => {
                    next_bookmark = Instant::now() + bookmark_interval;
                    // Kubernetes 1.36 sends no bookmark for a version that is not reached.
                    if current >= version {
                        self.bookmark(current, false).await?;
                    }
                }
            }
        }
    }

    /// The event of a change; `None` if no selector matches.
    fn line_of(&self, change: &Change) -> Option<Bytes> {
        let is_selected =
            |object: &Option<Arc<Value>>| object.as_ref().is_some_and(|object| self.selector.matches(object));
        match (is_selected(&change.old), is_selected(&change.new)) {
            (false, false) => None,
            (false, true) => Some(line("ADDED", change.new.as_deref()?)),
            (true, true) => Some(line("MODIFIED", change.new.as_deref()?)),
            // Also for an object that exists but is no longer selected: its last selected state.
            (true, false) => {
                let mut object = change.old.as_deref()?.clone();
                object["metadata"]["resourceVersion"] = change.version.to_string().into();
                Some(line("DELETED", &object))
            }
        }
    }

    async fn send_change(&mut self, change: &Change) -> Option<()> {
        let Some(line) = self.line_of(change) else { return Some(()) };
        wait_while_frozen(&self.shared, self.connection).await;
        self.shared.note_written(change);
        self.send_line(line).await
    }
}
