//! Parses a manifest's text into objects.

use std::{fmt, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Service as ApiService},
    discovery::v1::EndpointSlice as ApiSlice,
    networking::v1::ServiceCIDR as ApiServiceCidr,
};
use lb_core::model::{
    Issue, IssueKind, Node, ObjectKind, ObjectRef, Service, ServiceCidr, Slice,
    ingest::{self, is_selected_for_names},
};
use serde::de::DeserializeOwned;
use serde_saphyr::{Options, UserMessageFormatter};

use super::{
    MAX_OBJECTS, defaults,
    tree::{Tree, Value},
};

/// An object of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its name.
    pub object: ObjectRef,
    /// The line where it starts, from 1.
    pub line: u32,
    /// Its meaning for service proxying.
    pub body: Body,
    /// Its issues, each with its place.
    pub issues: Vec<Issue>,
}

/// The meaning of an [`Object`] for service proxying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A Service that may have frontends, or another proxy's Service with cluster IPs.
    Service(Arc<Service>),
    /// An EndpointSlice.
    Slice(Arc<Slice>),
    /// A Node.
    Node(Arc<Node>),
    /// A ServiceCIDR.
    ServiceCidr(Arc<ServiceCidr>),
    /// Irrelevant: another kind, headless, or a slice labelled for another proxy.
    Nothing,
}

/// Why a whole manifest is unusable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseIssue {
    /// The line, from 1, if known.
    pub line: Option<u32>,
    /// The object if known, field and cause.
    pub cause: String,
}

impl fmt::Display for ParseIssue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

/// Parses a manifest.
///
/// `file` is the name in issues. `service_proxy_name` selects objects by label, as a watch on an API server
/// does.
///
/// Memory and time are bounded: aliases expand to at most a hundred thousand values, and nesting to 64
/// levels.
///
/// # Errors
///
/// If the text is not YAML, contains something that is not an object, or an object of a known kind does not
/// decode. Nothing of such a file should be used: its author is in the middle of an edit, or mistaken about
/// its meaning.
pub fn parse(file: &str, text: &str, service_proxy_name: Option<&str>) -> Result<Vec<Object>, ParseIssue> {
    let mut parser = Parser { file, service_proxy_name, objects: Vec::new() };
    let mut reader = text.as_bytes();
    // Document by document: the tree of a large file is many times the file's size.
    for document in serde_saphyr::read_with_options::<_, Tree>(&mut reader, options()) {
        parser.add_document(&document.map_err(|error| broken_text(&error))?)?;
    }
    Ok(parser.objects)
}

/// Limits per document. The crate's defaults suit hand-written files.
fn options() -> Options {
    serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_documents: MAX_OBJECTS,
            // The file's size bounds a document; these only have to admit a long list.
            max_nodes: 16_000_000,
            max_events: 64_000_000,
            max_recorded_anchor_events: MAX_ALIASED,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_ALIASED },
    }
}

fn broken_text(error: &serde_saphyr::Error) -> ParseIssue {
    let line = error.location().and_then(|location| u32::try_from(location.line()).ok());
    // In one line.
    let text = error.render_with_formatter(&UserMessageFormatter);
    ParseIssue { line, cause: text.split_whitespace().collect::<Vec<_>>().join(" ") }
}

/// Maximum number of values that a document's aliases expand to.
const MAX_ALIASED: usize = 100_000;

/// The known kinds, each with its known API version.
const KNOWN: [(&str, &str); 4] = [
    ("Service", "v1"),
    ("EndpointSlice", "discovery.k8s.io/v1"),
    ("Node", "v1"),
    ("ServiceCIDR", "networking.k8s.io/v1"),
];

struct Parser<'a> {
    file: &'a str,
    service_proxy_name: Option<&'a str>,
    objects: Vec<Object>,
}

impl Parser<'_> {
    fn add_document(&mut self, document: &Tree) -> Result<(), ParseIssue> {
        let Some(list) = document.text(&["kind"]).and_then(|kind| kind.strip_suffix("List")) else {
            return self.add(document, None);
        };
        let items = match document.get("items").map(|items| &items.value) {
            Some(Value::List(items)) => items.as_slice(),
            None | Some(Value::Null) => &[],
            Some(_) => return Err(at(document, "items", format!("{list}List: items: is not a list"))),
        };
        // Items of a typed list need not repeat its kind and version.
        let typed = (!list.is_empty()).then(|| (list, document.text(&["apiVersion"]).unwrap_or_default()));
        items.iter().try_for_each(|item| self.add(item, typed))
    }

    /// Adds one object. A typed list around it may give its kind and API version.
    fn add(&mut self, tree: &Tree, typed: Option<(&str, &str)>) -> Result<(), ParseIssue> {
        if self.objects.len() == MAX_OBJECTS {
            return Err(at(tree, "", format!("more than {MAX_OBJECTS} objects in one file")));
        }
        if !matches!(tree.value, Value::Map(_)) {
            return Err(at(tree, "", "not an object: it has no fields".to_owned()));
        }
        let Some(kind) = tree.text(&["kind"]).or(typed.map(|(kind, _)| kind)) else {
            return Err(at(tree, "kind", "kind: is missing".to_owned()));
        };
        let object = object_ref(kind, tree);
        let Some(version) = tree.text(&["apiVersion"]).or(typed.map(|(_, version)| version)) else {
            return Err(at(tree, "apiVersion", format!("{object}: apiVersion: is missing")));
        };
        let issue = match KNOWN.iter().find(|(known, _)| *known == kind) {
            None => IssueKind::UnknownKind,
            Some((_, expected)) if *expected != version => {
                IssueKind::UnknownVersion { version: version.to_owned(), expected: (*expected).to_owned() }
            }
            Some(_) => return self.add_known(tree, object),
        };
        let issues = vec![Issue::new(object.clone(), issue)];
        self.push(tree, object, Body::Nothing, issues);
        Ok(())
    }

    fn add_known(&mut self, tree: &Tree, object: ObjectRef) -> Result<(), ParseIssue> {
        let (body, issues) = match object.kind {
            ObjectKind::Service => {
                let mut service: ApiService = decode(tree, &object)?;
                defaults::fill_service(&mut service);
                let (service, issues) = ingest::any_service(&service, self.service_proxy_name);
                (service.map(|service| Body::Service(service.into())), issues)
            }
            ObjectKind::EndpointSlice => {
                let mut slice: ApiSlice = decode(tree, &object)?;
                defaults::fill_slice(&mut slice);
                if is_selected_for_names(slice.metadata.labels.as_ref(), self.service_proxy_name) {
                    let (slice, issues) = ingest::slice(&slice);
                    (slice.map(|slice| Body::Slice(slice.into())), issues)
                } else {
                    (None, Vec::new())
                }
            }
            ObjectKind::ServiceCidr => {
                let (cidr, issues) = ingest::service_cidr(&decode::<ApiServiceCidr>(tree, &object)?);
                (cidr.map(|cidr| Body::ServiceCidr(cidr.into())), issues)
            }
            _ => {
                let (node, issues) = ingest::node(&decode::<ApiNode>(tree, &object)?);
                (node.map(|node| Body::Node(node.into())), issues)
            }
        };
        self.push(tree, object, body.unwrap_or(Body::Nothing), issues);
        Ok(())
    }

    fn push(&mut self, tree: &Tree, object: ObjectRef, body: Body, mut issues: Vec<Issue>) {
        for issue in &mut issues {
            let line = issue.kind.field().map_or(tree.line, |field| tree.line_of(field));
            issue.source = Some(format!("{}:{line}", self.file));
        }
        self.objects.push(Object { object, line: tree.line, body, issues });
    }
}

/// Decodes an object; an error names the field.
fn decode<T: DeserializeOwned>(tree: &Tree, object: &ObjectRef) -> Result<T, ParseIssue> {
    serde_path_to_error::deserialize(tree.to_json()).map_err(|error| {
        let field = error.path().to_string();
        at(tree, &field, format!("{object}: {field}: {}", error.inner()))
    })
}

fn at(tree: &Tree, field: &str, cause: String) -> ParseIssue {
    ParseIssue { line: Some(tree.line_of(field)), cause }
}

fn object_ref(kind: &str, tree: &Tree) -> ObjectRef {
    let kind = match kind {
        "Service" => ObjectKind::Service,
        "EndpointSlice" => ObjectKind::EndpointSlice,
        "Node" => ObjectKind::Node,
        "ServiceCIDR" => ObjectKind::ServiceCidr,
        other => ObjectKind::Other(other.into()),
    };
    let namespace = match kind {
        ObjectKind::Service | ObjectKind::EndpointSlice => {
            tree.text(&["metadata", "namespace"]).unwrap_or(defaults::NAMESPACE)
        }
        ObjectKind::Node | ObjectKind::ServiceCidr => "",
        // It is unknown whether an unknown kind has namespaces.
        _ => tree.text(&["metadata", "namespace"]).unwrap_or_default(),
    };
    let name = tree.text(&["metadata", "name"]).unwrap_or_default();
    ObjectRef { kind, namespace: namespace.into(), name: name.into() }
}

#[cfg(test)]
mod tests;
