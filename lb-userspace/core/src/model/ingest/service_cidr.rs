use k8s_openapi::api::networking::v1 as api;

use super::IssueCollector;
use crate::model::{Issue, IssueKind, ObjectRef, ServiceCidr, address};

/// Ingests a ServiceCIDR as kube-proxy does (`pkg/proxy/config/config.go`): its networks count as long as the
/// object exists.
///
/// That includes an object that is being deleted or not `Ready`: an API server allocates no address from it,
/// but Services keep theirs, and the rest is unallocated as before.
#[must_use]
pub fn service_cidr(object: &api::ServiceCIDR) -> (Option<ServiceCidr>, Vec<Issue>) {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let mut report = IssueCollector::new(ObjectRef::service_cidr(name));
    if !report.is_named() {
        return (None, report.issues);
    }
    let listed = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let mut cidrs = Vec::new();
    for (index, text) in listed.iter().enumerate() {
        match address::parse_service_cidr(text) {
            Ok(network) => cidrs.push(network),
            Err(problem) => {
                let field = format!("spec.cidrs[{index}]");
                report.add(IssueKind::InvalidServiceCidr { field, value: text.clone(), problem });
            }
        }
    }
    (Some(ServiceCidr { name: name.into(), cidrs }), report.issues)
}
