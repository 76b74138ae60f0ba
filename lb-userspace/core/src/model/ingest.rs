//! Turns Kubernetes objects into values of the model, and issues.
//!
//! # Purpose
//!
//! Applies kube-proxy's rules for reading an object (`pkg/proxy/serviceport.go`,
//! `pkg/proxy/endpointslicecache.go`) and reports what is left out. Expects the API server's defaults to be
//! applied: `lb_agent::source` does so for manifests.
//!
//! # Invariants
//!
//! - No object makes these functions panic or fail: the valid parts of an invalid object are kept.
//! - `None` means that the object is not used. Then it has an issue, unless that is intended (a headless
//!   Service, a slice without a service).
//!
//! # Depends on
//!
//! The types of `k8s_openapi`, used only here and where objects are fetched.

mod node;
mod pod;
mod service;
mod service_cidr;
mod slice;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

pub use self::{
    node::node,
    pod::pod,
    service::{any_service, service},
    service_cidr::service_cidr,
    slice::slice,
};
use super::{Issue, IssueKind, ObjectRef, Protocol, Unselected};

/// Label that assigns a Service or slice to another proxy.
pub const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of Services and slices that no proxy serves.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
/// Label that names the Service a slice belongs to.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Annotation with the time of the change that led to the slice's current state.
pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Label that names the zone of a Node.
pub const ZONE: &str = "topology.kubernetes.io/zone";
/// Taint of a Node that the cluster autoscaler is about to delete.
pub const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
/// Prefix of the annotations that are kept.
pub const ANNOTATION_PREFIX: &str = "socklb.io/";

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Whether a Service or slice with these labels is served (kube-proxy's list options,
/// `cmd/kube-proxy/app/server.go`).
///
/// Without a proxy name, the label `service-proxy-name` must be absent; with one it must have that value. The
/// label `headless` must be absent, whatever its value.
#[must_use]
pub fn is_selected(labels: Option<&Labels>, service_proxy_name: Option<&str>) -> bool {
    unselected(labels, service_proxy_name).is_none()
}

/// The label for which [`is_selected`] is false.
#[must_use]
pub fn unselected(labels: Option<&Labels>, service_proxy_name: Option<&str>) -> Option<Unselected> {
    let label = |key: &str| labels.and_then(|labels| labels.get(key)).map(String::as_str);
    let shown = |key: &str, value: &str| Arc::from(format!("{key}={value}"));
    if let Some(value) = label(HEADLESS) {
        return Some(Unselected::Labelled(shown(HEADLESS, value)));
    }
    match (label(SERVICE_PROXY_NAME), service_proxy_name) {
        (found, wanted) if found == wanted => None,
        (Some(found), _) => Some(Unselected::Labelled(shown(SERVICE_PROXY_NAME, found))),
        (None, wanted) => {
            Some(Unselected::NotLabelled(shown(SERVICE_PROXY_NAME, wanted.unwrap_or_default())))
        }
    }
}

/// Whether a slice with these labels has endpoints for frontends or for names: as [`is_selected`], or
/// headless.
#[must_use]
pub fn is_selected_for_names(labels: Option<&Labels>, service_proxy_name: Option<&str>) -> bool {
    labels.is_some_and(|labels| labels.contains_key(HEADLESS)) || is_selected(labels, service_proxy_name)
}

/// The label selector that selects as [`is_selected`] does, or with `names` also what is headless and has the
/// other label.
#[must_use]
pub fn label_selector(service_proxy_name: Option<&str>, names: bool) -> String {
    let headless = if names { String::new() } else { format!(",!{HEADLESS}") };
    match service_proxy_name {
        None => format!("!{SERVICE_PROXY_NAME}{headless}"),
        Some(name) => format!("{SERVICE_PROXY_NAME}={name}{headless}"),
    }
}

/// Collects the issues of one object.
struct IssueCollector {
    object: ObjectRef,
    issues: Vec<Issue>,
}

impl IssueCollector {
    const fn new(object: ObjectRef) -> Self {
        Self { object, issues: Vec::new() }
    }

    fn add(&mut self, kind: IssueKind) {
        self.issues.push(Issue::new(self.object.clone(), kind));
    }

    /// Whether name and namespace are such as an API server accepts. Keys, labels of metrics and tables for
    /// people hold them.
    fn is_named(&mut self) -> bool {
        let ObjectRef { namespace, name, .. } = &self.object;
        let wrong = if name.is_empty() {
            IssueKind::NoName
        } else if !is_subdomain(name) {
            invalid_name("metadata.name", name, "the object")
        } else if !namespace.is_empty() && !is_label(namespace) {
            invalid_name("metadata.namespace", namespace, "the object")
        } else {
            return true;
        };
        self.add(wrong);
        false
    }

    /// Reads a port number; 0 is invalid.
    fn port(&mut self, field: impl FnOnce() -> String, value: i32) -> Option<u16> {
        let port = u16::try_from(value).ok().filter(|port| *port != 0);
        if port.is_none() {
            self.add(IssueKind::InvalidPort { field: field(), value: value.into() });
        }
        port
    }

    /// Reads a protocol; an absent one is TCP, the API's default.
    fn protocol(&mut self, field: impl FnOnce() -> String, value: Option<&str>) -> Option<Protocol> {
        match value {
            None | Some("TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(value) => {
                self.add(IssueKind::UnknownProtocol { field: field(), value: value.to_owned() });
                None
            }
        }
    }

    /// Reads a value of an enumeration; an unknown one becomes the default.
    fn word<T: Copy>(&mut self, field: &str, value: Option<&str>, words: &[(&str, T)], default: T) -> T {
        let Some(value) = value.filter(|value| !value.is_empty()) else {
            return default;
        };
        if let Some((_, known)) = words.iter().find(|(word, _)| *word == value) {
            return *known;
        }
        let used = words.first().map_or("", |(word, _)| *word).to_owned();
        self.add(IssueKind::UnknownValue { field: field.to_owned(), value: value.to_owned(), used });
        default
    }
}

fn invalid_name(field: &str, value: &str, left_out: &str) -> IssueKind {
    IssueKind::InvalidName { field: field.to_owned(), value: value.to_owned(), left_out: left_out.to_owned() }
}

/// Whether a text is a label of RFC 1123: the names of namespaces and ports
/// (`staging/src/k8s.io/apimachinery/pkg/util/validation/validation.go`).
#[must_use]
pub fn is_label(text: &str) -> bool {
    text.len() <= 63 && is_part_of_a_subdomain(text)
}

/// Whether a text is a domain of such labels, without a final dot: names in DNS.
#[must_use]
pub fn is_domain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

/// Whether a text is a subdomain of RFC 1123, with parts of any length: the names of objects. For names of
/// Services the API is stricter (`staging/src/k8s.io/apimachinery/pkg/util/validation/validation.go`).
fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_part_of_a_subdomain)
}

fn is_part_of_a_subdomain(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = [text.bytes().next(), text.bytes().next_back()];
    ends.iter().all(|end| end.is_some_and(is_plain))
        && text.bytes().all(|byte| is_plain(byte) || byte == b'-')
}

/// Namespace of an object; the API server always sets it.
fn namespace(namespace: Option<&str>) -> &str {
    namespace.filter(|namespace| !namespace.is_empty()).unwrap_or("default")
}

/// Shares equal strings of one object: a slice names the same node and zone many times.
#[derive(Default)]
struct StringPool(BTreeSet<Arc<str>>);

impl StringPool {
    fn share(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let shared: Arc<str> = text.into();
        self.0.insert(shared.clone());
        shared
    }

    /// As [`Self::share`], with the empty text as none.
    fn share_set(&mut self, text: Option<&str>) -> Option<Arc<str>> {
        text.filter(|text| !text.is_empty()).map(|text| self.share(text))
    }
}

#[cfg(test)]
mod tests;
