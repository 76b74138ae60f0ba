use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{IssueCollector, namespace};
use crate::model::{Issue, IssueKind, ObjectRef, Pod, annotation};

/// Ingests the metadata of a Pod that is excluded by annotation; `None` for any other Pod.
#[must_use]
pub fn pod(metadata: &ObjectMeta) -> (Option<Pod>, Vec<Issue>) {
    let (namespace, name) =
        (namespace(metadata.namespace.as_deref()), metadata.name.as_deref().unwrap_or_default());
    let mut report = IssueCollector::new(ObjectRef::pod(namespace, name));
    let value = metadata.annotations.iter().flatten().find(|(key, _)| *key == annotation::EXCLUDE);
    let Some((key, value)) = value else { return (None, report.issues) };
    let excludes = annotation::excludes(value);
    if excludes.is_none() {
        report.add(IssueKind::UnknownValue {
            field: format!("metadata.annotations[{key}]"),
            value: value.clone(),
            used: "absent (expected true or false)".to_owned(),
        });
    }
    // An API server gives each Pod a UID, which its cgroup is named after.
    let uid = metadata.uid.as_deref().filter(|uid| !uid.is_empty() && excludes == Some(true));
    let pod = uid.map(|uid| Pod { namespace: namespace.into(), name: name.into(), uid: uid.into() });
    (pod, report.issues)
}
