//! Kubernetes Events (`events.k8s.io/v1`) on Services and on the own Node.
//!
//! Best effort: sending never blocks, and an Event that the server rejects is lost. A standing notification
//! is repeated ([`lb_core::model::notification`]). kube's recorder (kube-runtime 5.0) is not used: it has a
//! cache of its own, beside the ledger here, and loses it at exit, so that each start would create new
//! Events.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::StatusCode;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use k8s_openapi::jiff::Timestamp;
use kube::{Client, client::Body};
use lb_core::model::{
    ObjectKind, ObjectRef,
    notification::{DueNotification, Notification},
};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};
use tracing::{debug, info, warn};

use super::{Access, access::cause};

/// Capacity of the queue of notifications.
pub(super) const QUEUE: usize = 64;
/// Timeout of a request.
const PATIENCE: Duration = Duration::from_secs(10);
/// Maximum size of a response, in bytes: a list of one Service, of which etcd holds 1.5 MiB.
const MAX_ANSWER: usize = 4 << 20;
/// The API's limit of a note, in bytes.
const LONGEST_NOTE: usize = 1024;
/// The API's limit of the reporter's name, in characters.
const LONGEST_INSTANCE: usize = 128;
/// Maximum part of an object's name in an Event's name, in characters. Both kinds of names have the same
/// limit, and the Event's also has a suffix.
const LONGEST_NAME: usize = 230;

#[derive(Debug, thiserror::Error)]
enum EventError {
    #[error("401 Unauthorized (are the credentials out of date? the token or certificate is not accepted)")]
    Unauthorized,
    #[error(
        "403 Forbidden (grant create and patch on events.k8s.io/events, and list on services: \
         manifests/base/clusterrole.yaml)"
    )]
    Forbidden,
    #[error("{code}")]
    Refused { code: StatusCode },
    /// No answer, or an unreadable one.
    #[error("{0}")]
    Unanswered(String),
}

impl EventError {
    const fn of(code: StatusCode) -> Self {
        match code {
            StatusCode::UNAUTHORIZED => Self::Unauthorized,
            StatusCode::FORBIDDEN => Self::Forbidden,
            code => Self::Refused { code },
        }
    }
}

/// Writes notifications as Events until the channel closes.
pub(super) async fn record(
    access: Access,
    mut client: Client,
    server: Arc<str>,
    mut notices: mpsc::Receiver<DueNotification>,
) {
    let mut problem = None;
    while let Some(telling) = notices.recv().await {
        let told = tell(&client, &telling).await;
        if told.is_err() {
            // As the watches do: the credentials may have been replaced.
            client = access.client().await.map_or(client, |(client, _server)| client);
        }
        let now = told.err().map(|error| error.to_string());
        match &now {
            _ if now == problem => {}
            // Once, until the problem changes.
            Some(error) => {
                warn!("API server {server}: Events are not written: {error}; nothing else is affected");
            }
            None => info!("API server {server}: Events are written again"),
        }
        problem = now;
    }
}

async fn tell(client: &Client, telling: &DueNotification) -> Result<(), EventError> {
    let Notification { object, .. } = &telling.notification;
    let Some(uid) = uid(client, object).await? else {
        debug!(%object, "object is deleted: no Event");
        return Ok(());
    };
    // Events about objects without a namespace are in `default` (`events.k8s.io/v1`).
    let namespace = if object.namespace.is_empty() { "default" } else { &object.namespace };
    let events = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
    let name = name(telling);
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
    let now = now.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
    let new = body(telling, namespace, &name, &uid, &now);
    let again = json!({"series": {"count": telling.n_times.max(2), "lastObservedTime": now}});
    let patch = || send(client, "PATCH", format!("{events}/{name}"), "application/merge-patch+json", &again);
    let create = || send(client, "POST", events.clone(), "application/json", &new);
    // Only the server knows whether the Event exists: it deletes Events after an hour, and keeps those of
    // earlier agents.
    let (first, is_new) =
        if telling.n_times > 1 { (patch().await?.0, false) } else { (create().await?.0, true) };
    let code = match (first, is_new) {
        (StatusCode::NOT_FOUND, false) => create().await?.0,
        (StatusCode::CONFLICT, true) => patch().await?.0,
        (code, _) => code,
    };
    match code {
        code if code.is_success() => Ok(()),
        code => Err(EventError::of(code)),
    }
}

/// The UID by which `kubectl describe` finds Events; `None` if the object is deleted.
async fn uid(client: &Client, object: &ObjectRef) -> Result<Option<String>, EventError> {
    if object.kind == ObjectKind::Node {
        // As in kubelet and kube-proxy, which know no other UID of a Node.
        return Ok(Some(object.name.to_string()));
    }
    // A list of one object: the agent may list Services, not get them.
    let path = format!(
        "/api/v1/namespaces/{}/services?fieldSelector=metadata.name%3D{}",
        object.namespace, object.name
    );
    let (code, list) = send(client, "GET", path, "application/json", &Value::Null).await?;
    if !code.is_success() {
        return Err(EventError::of(code));
    }
    Ok(list["items"][0]["metadata"]["uid"].as_str().map(str::to_owned))
}

/// The Event's name. The same for the same notification of the same node, also after a restart.
fn name(telling: &DueNotification) -> String {
    // Another version of the standard library may hash differently: then there is one more Event.
    let mut hasher = DefaultHasher::new();
    (&telling.notification, &telling.node).hash(&mut hasher);
    let object: String = telling.notification.object.name.chars().take(LONGEST_NAME).collect();
    format!("{}.{:016x}", object.trim_end_matches(['.', '-']), hasher.finish())
}

fn body(telling: &DueNotification, namespace: &str, name: &str, uid: &str, now: &str) -> Value {
    let DueNotification { notification, node, .. } = telling;
    let note = telling.text();
    let end = (0..=LONGEST_NOTE.min(note.len())).rev().find(|end| note.is_char_boundary(*end));
    let note = &note[..end.unwrap_or_default()];
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": namespace, "name": name},
        "eventTime": now,
        "reportingController": "socklb",
        "reportingInstance": node.chars().take(LONGEST_INSTANCE).collect::<String>(),
        "type": if notification.is_warning { "Warning" } else { "Normal" },
        "reason": notification.reason,
        "action": notification.action,
        "note": note,
        "regarding": {
            "apiVersion": "v1",
            "kind": notification.object.kind.to_string(),
            "namespace": &*notification.object.namespace,
            "name": &*notification.object.name,
            "uid": uid,
        },
    })
}

/// Sends a request. Returns the status, and the answer if that is JSON.
async fn send(
    client: &Client,
    method: &str,
    path: String,
    content_type: &str,
    body: &Value,
) -> Result<(StatusCode, Value), EventError> {
    fn unanswered(error: &(dyn std::error::Error + 'static)) -> EventError {
        EventError::Unanswered(cause(error))
    }
    let text = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("Accept", "application/json")
        .header("Content-Type", content_type)
        .body(Body::from(text))
        .map_err(|error| unanswered(&error))?;
    let answered = async {
        let answer = client.send(request).await.map_err(|error| unanswered(&error))?;
        let status = answer.status();
        let text = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let text = text.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => EventError::Unanswered(format!(
                "the answer is larger than {} MiB and was not read: is that the API server?",
                MAX_ANSWER >> 20
            )),
            None => unanswered(&*error),
        })?;
        Ok::<_, EventError>((status, serde_json::from_slice(&text.to_bytes()).unwrap_or_default()))
    };
    let silence = |_elapsed| EventError::Unanswered(format!("no answer for {PATIENCE:?}"));
    timeout(PATIENCE, answered).await.map_err(silence)?
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
        thread,
    };

    use lb_core::model::notification::NodeEvent;
    use tokio::task::spawn_blocking;

    use super::*;

    fn telling(object: ObjectRef, note: &str) -> DueNotification {
        let notification = Notification {
            object,
            is_warning: true,
            reason: "TableFull",
            action: "Sync",
            note: note.to_owned(),
        };
        DueNotification { notification, n_times: 1, node: "node-1".into() }
    }

    #[test]
    fn why_an_event_is_not_taken_has_a_remedy() {
        for (error, expected) in [
            (
                EventError::of(StatusCode::UNAUTHORIZED),
                "401 Unauthorized (are the credentials out of date? the token or certificate is not \
                 accepted)",
            ),
            (
                EventError::of(StatusCode::FORBIDDEN),
                "403 Forbidden (grant create and patch on events.k8s.io/events, and list on services: \
                 manifests/base/clusterrole.yaml)",
            ),
            (EventError::of(StatusCode::INTERNAL_SERVER_ERROR), "500 Internal Server Error"),
            (EventError::Unanswered("connection refused".to_owned()), "connection refused"),
        ] {
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn a_name_belongs_to_one_notice_of_one_node() {
        let one = telling(ObjectRef::service("shop", "web"), "full");
        assert_eq!(name(&one), name(&one.clone()));
        assert!(name(&one).starts_with("web.") && name(&one).len() == 20, "{}", name(&one));
        assert_ne!(name(&one), name(&DueNotification { node: "node-2".into(), ..one.clone() }));
        assert_ne!(name(&one), name(&telling(ObjectRef::service("shop", "web"), "fuller")));
        assert_ne!(name(&one), name(&telling(ObjectRef::service("stop", "web"), "full")));
        let long = telling(ObjectRef::node(&"n".repeat(253)), "x");
        assert!(name(&long).len() <= 253);
    }

    /// Anything may answer at the server's address, with any amount of data.
    #[tokio::test]
    async fn an_answer_without_end_is_not_read_to_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let access = Access {
            kubeconfig: None,
            apiserver: Some(format!("http://{}", listener.local_addr().unwrap())),
        };
        let answering = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _request = stream.read(&mut [0; 4096]).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n\"").unwrap();
            // The client closes the connection before all of this is sent.
            let chunk = vec![b'x'; 1 << 20];
            (0..64).take_while(|_| stream.write_all(&chunk).is_ok()).count()
        });
        let (client, _) = access.client().await.unwrap();
        let service = ObjectRef::service("shop", "web");
        let error = uid(&client, &service).await.unwrap_err().to_string();
        assert!(error.contains("larger than 4 MiB"), "{error}");
        let n_sent = spawn_blocking(|| answering.join().unwrap()).await.unwrap();
        assert!(n_sent < 64, "{n_sent} MiB");
    }

    #[test]
    fn an_event_has_what_the_api_asks_for() {
        let long = telling(ObjectRef::service("shop", "web"), &"ä".repeat(2000));
        let event = body(&long, "shop", "web.1", "uid", "2026-01-02T03:04:05.000000Z");
        let parsed: k8s_openapi::api::events::v1::Event = serde_json::from_value(event).unwrap();
        assert_eq!(parsed.type_.as_deref(), Some("Warning"));
        let note = parsed.note.unwrap();
        assert!(note.starts_with("node node-1: ää"), "{note}");
        assert!((LONGEST_NOTE - 1..=LONGEST_NOTE).contains(&note.len()), "{}", note.len());
        assert_eq!(parsed.reporting_instance.as_deref(), Some("node-1"));
        let notification = Notification::of_node("node-1", &NodeEvent::Attached);
        let event = body(
            &DueNotification { notification, ..long },
            "default",
            "x",
            "node-1",
            "2026-01-02T03:04:05.000000Z",
        );
        assert_eq!((&event["type"], &event["regarding"]["kind"]), (&"Normal".into(), &"Node".into()));
    }
}
