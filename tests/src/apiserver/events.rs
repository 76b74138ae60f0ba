//! Events: created and patched with the validation of the API (`pkg/apis/core/validation/events.go`).

use std::collections::BTreeMap;

use hyper::Method;
use k8s_openapi::api::events::v1::Event;
use serde_json::Value;

use super::{
    http::merge,
    store::{Name, Refusal},
};

/// The Events written so far.
#[derive(Debug, Default)]
pub(super) struct Events(BTreeMap<Name, Value>);

/// Namespace and name, if the path is of Events.
pub(super) fn target(path: &str) -> Option<(&str, Option<&str>)> {
    let rest = path.strip_prefix("/apis/events.k8s.io/v1/namespaces/")?;
    match rest.split('/').collect::<Vec<_>>()[..] {
        [namespace, "events"] => Some((namespace, None)),
        [namespace, "events", name] => Some((namespace, Some(name))),
        _ => None,
    }
}

impl Events {
    pub(super) fn all(&self) -> Vec<Value> {
        self.0.values().cloned().collect()
    }

    /// Creates or patches an Event. Returns the status code and the Event as stored.
    pub(super) fn write(
        &mut self,
        method: &Method,
        namespace: &str,
        name: Option<&str>,
        object: Value,
    ) -> Result<(u16, Value), Refusal> {
        match (method, name) {
            (&Method::POST, None) => {
                let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                check(namespace, &object)?;
                let key = (namespace.to_owned(), name);
                if self.0.contains_key(&key) {
                    return Err(Refusal::new(
                        409,
                        "AlreadyExists",
                        format!("events {:?} already exists", key.1),
                    ));
                }
                self.0.insert(key, object.clone());
                Ok((201, object))
            }
            (&Method::PATCH, Some(name)) => {
                let key = (namespace.to_owned(), name.to_owned());
                let missing = || Refusal::new(404, "NotFound", format!("events {name:?} not found"));
                let mut event = self.0.get(&key).ok_or_else(missing)?.clone();
                merge(&mut event, &object);
                check(namespace, &event)?;
                self.0.insert(key, event.clone());
                Ok((200, event))
            }
            _ => Err(Refusal::new(405, "MethodNotAllowed", "Events can only be created and patched")),
        }
    }
}

fn check(namespace: &str, object: &Value) -> Result<(), Refusal> {
    let invalid = |what: String| Refusal::new(422, "Invalid", what);
    let event: Event = serde_json::from_value(object.clone()).map_err(|error| invalid(error.to_string()))?;
    let of_object = event.regarding.as_ref().and_then(|regarding| regarding.namespace.as_deref());
    let place = of_object.filter(|namespace| !namespace.is_empty()).unwrap_or("default");
    for (what, is_right) in [
        ("metadata.name", event.metadata.name.is_some_and(|name| (1..=253).contains(&name.len()))),
        ("metadata.namespace", event.metadata.namespace.as_deref() == Some(namespace) && place == namespace),
        ("eventTime", event.event_time.is_some()),
        ("reportingController", event.reporting_controller.is_some_and(|name| !name.is_empty())),
        ("reportingInstance", event.reporting_instance.is_some_and(|name| (1..=128).contains(&name.len()))),
        ("action", event.action.is_some_and(|action| (1..=128).contains(&action.len()))),
        ("reason", event.reason.is_some_and(|reason| (1..=128).contains(&reason.len()))),
        ("type", matches!(event.type_.as_deref(), Some("Normal" | "Warning"))),
        ("note", event.note.is_none_or(|note| note.len() <= 1024)),
        ("series.count", event.series.is_none_or(|series| series.count >= 2)),
    ] {
        if !is_right {
            return Err(invalid(format!("{what}: Invalid value")));
        }
    }
    Ok(())
}
