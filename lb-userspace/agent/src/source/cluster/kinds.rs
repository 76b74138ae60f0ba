//! The watched kinds, and the parts of an object that are kept.

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use lb_core::model::{Issue, IssueKind, Node, ObjectRef, Pod, Service, ServiceCidr, Slice, ingest};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use tokio::time::Instant;

/// An object reduced to its model.
#[derive(Debug)]
pub(super) struct Trimmed<M> {
    pub(super) object: ObjectRef,
    /// `None` for an irrelevant or deleted object.
    pub(super) model: Option<M>,
    pub(super) issues: Vec<Issue>,
}

#[derive(Debug)]
pub(super) enum Change<M> {
    /// A complete list.
    All {
        models: Vec<M>,
        issues: Vec<Issue>,
    },
    One {
        trimmed: Trimmed<M>,
        received: Instant,
    },
}

#[derive(Debug)]
pub(super) enum KindChange {
    Services(Change<Service>),
    Slices(Change<Slice>),
    Nodes(Change<Node>),
    Pods(Change<Pod>),
    ServiceCidrs(Change<ServiceCidr>),
    /// ServiceCIDRs are unavailable for now.
    NoServiceCidrs(Unavailable),
}

/// Why a server that answers does not serve a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unavailable {
    /// The server does not know the kind, so there are no objects.
    Unknown,
    /// The server refuses, for this reason. There may be objects.
    Forbidden(String),
    /// Another error, perhaps temporary.
    Failing,
}

pub(super) trait Kind: 'static {
    /// The API's type.
    type Object: DeserializeOwned;
    /// The model's type.
    type Model: Send;

    const PATH: &str;
    /// For log lines.
    const PLURAL: &str;
    /// Whether labels decide which objects are served.
    const IS_LABELLED: bool;
    /// Accepted media types of an object, best first.
    const ACCEPT: &str = "application/json";
    /// Accepted media types of a list.
    const ACCEPT_LIST: &str = Self::ACCEPT;

    fn object(namespace: &str, name: &str) -> ObjectRef;
    /// `service_proxy_name` is `--service-proxy-name`.
    fn ingest(object: &Self::Object, service_proxy_name: Option<&str>) -> (Option<Self::Model>, Vec<Issue>);
    fn change(change: Change<Self::Model>) -> KindChange;

    /// The message that the kind is unavailable; `None` for a kind that the agent requires.
    fn lacking(_lack: Unavailable) -> Option<KindChange> {
        None
    }
}

pub(super) enum Services {}

impl Kind for Services {
    type Object = core::Service;
    type Model = Service;

    const PATH: &str = "/api/v1/services";
    const PLURAL: &str = "services";
    const IS_LABELLED: bool = true;

    fn object(namespace: &str, name: &str) -> ObjectRef {
        ObjectRef::service(namespace, name)
    }

    fn ingest(object: &core::Service, service_proxy_name: Option<&str>) -> (Option<Service>, Vec<Issue>) {
        ingest::any_service(object, service_proxy_name)
    }

    fn change(change: Change<Service>) -> KindChange {
        KindChange::Services(change)
    }
}

pub(super) enum Slices {}

impl Kind for Slices {
    type Object = discovery::EndpointSlice;
    type Model = Slice;

    const PATH: &str = "/apis/discovery.k8s.io/v1/endpointslices";
    const PLURAL: &str = "endpointslices";
    const IS_LABELLED: bool = true;

    fn object(namespace: &str, name: &str) -> ObjectRef {
        ObjectRef::slice(namespace, name)
    }

    fn ingest(object: &discovery::EndpointSlice, _: Option<&str>) -> (Option<Slice>, Vec<Issue>) {
        ingest::slice(object)
    }

    fn change(change: Change<Slice>) -> KindChange {
        KindChange::Slices(change)
    }
}

pub(super) enum Nodes {}

impl Kind for Nodes {
    type Object = core::Node;
    type Model = Node;

    const PATH: &str = "/api/v1/nodes";
    const PLURAL: &str = "nodes";
    const IS_LABELLED: bool = false;

    fn object(_none: &str, name: &str) -> ObjectRef {
        ObjectRef::node(name)
    }

    fn ingest(object: &core::Node, _: Option<&str>) -> (Option<Node>, Vec<Issue>) {
        ingest::node(object)
    }

    fn change(change: Change<Node>) -> KindChange {
        KindChange::Nodes(change)
    }
}

/// Excluded Pods of the own node.
pub(super) enum Pods {}

/// The part of a Pod that is read.
#[derive(Debug, Deserialize)]
pub(super) struct PodMetadata {
    metadata: ObjectMeta,
}

impl Kind for Pods {
    type Object = PodMetadata;
    type Model = Pod;

    const PATH: &str = "/api/v1/pods";
    const PLURAL: &str = "pods";
    const IS_LABELLED: bool = false;
    // A Pod's specification and status are many times larger than its metadata, and change more often.
    const ACCEPT: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";
    const ACCEPT_LIST: &str =
        "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";

    fn object(namespace: &str, name: &str) -> ObjectRef {
        ObjectRef::pod(namespace, name)
    }

    fn ingest(object: &PodMetadata, _: Option<&str>) -> (Option<Pod>, Vec<Issue>) {
        ingest::pod(&object.metadata)
    }

    fn change(change: Change<Pod>) -> KindChange {
        KindChange::Pods(change)
    }
}

pub(super) enum ServiceCidrs {}

impl Kind for ServiceCidrs {
    type Object = networking::ServiceCIDR;
    type Model = ServiceCidr;

    const PATH: &str = "/apis/networking.k8s.io/v1/servicecidrs";
    const PLURAL: &str = "servicecidrs";
    const IS_LABELLED: bool = false;

    fn object(_none: &str, name: &str) -> ObjectRef {
        ObjectRef::service_cidr(name)
    }

    fn ingest(object: &networking::ServiceCIDR, _: Option<&str>) -> (Option<ServiceCidr>, Vec<Issue>) {
        ingest::service_cidr(object)
    }

    fn change(change: Change<ServiceCidr>) -> KindChange {
        KindChange::ServiceCidrs(change)
    }

    fn lacking(lack: Unavailable) -> Option<KindChange> {
        Some(KindChange::NoServiceCidrs(lack))
    }
}

/// The metadata of any object.
#[derive(Debug, Deserialize)]
pub(super) struct Header {
    #[serde(default)]
    metadata: Metadata,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: String,
    namespace: Option<String>,
    resource_version: Option<String>,
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

impl Header {
    pub(super) fn has_annotation(&self, key: &str) -> bool {
        self.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(key))
    }

    pub(super) fn version(&self) -> Option<String> {
        self.metadata.resource_version.clone().filter(|version| !version.is_empty())
    }

    pub(super) fn object<K: Kind>(&self) -> ObjectRef {
        K::object(self.metadata.namespace.as_deref().unwrap_or_default(), &self.metadata.name)
    }
}

pub(super) fn trim<K: Kind>(
    header: &Header,
    text: &RawValue,
    service_proxy_name: Option<&str>,
) -> Trimmed<K::Model> {
    let object = header.object::<K>();
    let (model, issues) = match serde_json::from_str::<K::Object>(text.get()) {
        Ok(parsed) => K::ingest(&parsed, service_proxy_name),
        // A malformed object does not affect the others.
        Err(error) => {
            let cause = error.to_string();
            (None, vec![Issue::new(object.clone(), IssueKind::Unreadable { cause })])
        }
    };
    Trimmed { object, model, issues }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    #[test]
    fn an_object_of_another_form_is_an_issue() {
        let text = raw(r#"{"metadata":{"name":"web","namespace":"shop"},"spec":{"ports":"none"}}"#);
        let header: Header = serde_json::from_str(text.get()).unwrap();
        let trimmed = trim::<Services>(&header, &text, None);
        assert!(trimmed.model.is_none());
        let [issue] = &trimmed.issues[..] else { panic!("{:?}", trimmed.issues) };
        assert_eq!(issue.object, ObjectRef::service("shop", "web"));
    }
}
