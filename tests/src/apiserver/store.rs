//! Objects and the log of their changes.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::defaults;

/// A kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `v1` Service
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice
    Slice,
    /// `v1` Node
    Node,
    /// `v1` Pod
    Pod,
    /// `networking.k8s.io/v1` ServiceCIDR
    ServiceCidr,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Service, Self::Slice, Self::Node, Self::Pod, Self::ServiceCidr];

    /// `apiVersion`, `kind`, and the plural in paths.
    const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Service => ("v1", "Service", "services"),
            Self::Slice => ("discovery.k8s.io/v1", "EndpointSlice", "endpointslices"),
            Self::Node => ("v1", "Node", "nodes"),
            Self::Pod => ("v1", "Pod", "pods"),
            Self::ServiceCidr => ("networking.k8s.io/v1", "ServiceCIDR", "servicecidrs"),
        }
    }

    /// `apiVersion`
    #[must_use]
    pub const fn api_version(self) -> &'static str {
        self.names().0
    }

    /// `kind`
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.names().1
    }

    /// The plural in paths.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        self.names().2
    }

    /// Whether its objects are namespaced.
    #[must_use]
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Self::Node | Self::ServiceCidr)
    }
}

/// A request that fails with a `metav1.Status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The HTTP status code.
    pub(super) code: u16,
    /// The machine-readable reason.
    pub(super) reason: &'static str,
    /// The human-readable message.
    pub(super) message: String,
    /// `details.causes[0].reason`
    pub(super) cause: Option<&'static str>,
    /// Header `Retry-After` and `details.retryAfterSeconds`
    pub(super) retry_after: Option<u32>,
}

impl Refusal {
    pub(super) fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), cause: None, retry_after: None }
    }

    pub(super) fn not_found(kind: Kind, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} {name:?} not found", kind.plural()))
    }

    pub(super) fn expired(version: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {version} ({oldest})"))
    }

    pub(super) fn too_large(version: u64, current: u64) -> Self {
        Self {
            cause: Some("ResourceVersionTooLarge"),
            retry_after: Some(1),
            ..Self::new(504, "Timeout", format!("Too large resource version: {version}, current: {current}"))
        }
    }

    /// The status as the API returns it.
    pub(super) fn status(&self) -> Value {
        let mut details = json!({});
        if let Some(cause) = self.cause {
            details["causes"] = json!([{"reason": cause, "message": self.message}]);
        }
        if let Some(seconds) = self.retry_after {
            details["retryAfterSeconds"] = seconds.into();
        }
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "details": details, "code": self.code,
        })
    }
}

/// Namespace and name; the namespace of a Node is empty.
pub(super) type Name = (String, String);

#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) kind: Kind,
    pub(super) name: Name,
    pub(super) old: Option<Arc<Value>>,
    pub(super) new: Option<Arc<Value>>,
}

/// The objects of one kind at one version.
pub(super) type Objects = BTreeMap<Name, Arc<Value>>;

#[derive(Debug)]
pub(super) struct Store {
    version: u64,
    objects: BTreeMap<Kind, Objects>,
    /// All changes after `oldest`.
    log: VecDeque<Change>,
    oldest: u64,
    n_uids: u64,
}

impl Store {
    pub(super) fn new() -> Self {
        // Neither 0 nor 1: both have a special meaning in some requests.
        Self { version: 100, objects: BTreeMap::new(), log: VecDeque::new(), oldest: 100, n_uids: 0 }
    }

    pub(super) const fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn objects(&self, kind: Kind) -> Objects {
        self.objects.get(&kind).cloned().unwrap_or_default()
    }

    pub(super) fn objects_at(&self, kind: Kind, version: u64) -> Result<Objects, Refusal> {
        if version < self.oldest {
            return Err(Refusal::expired(version, self.oldest));
        }
        let mut objects = self.objects(kind);
        for change in self.log.iter().rev().take_while(|change| change.version > version) {
            if change.kind == kind {
                match &change.old {
                    Some(old) => drop(objects.insert(change.name.clone(), Arc::clone(old))),
                    None => drop(objects.remove(&change.name)),
                }
            }
        }
        Ok(objects)
    }

    pub(super) fn changes_after(&self, kind: Kind, version: u64) -> Option<Vec<Change>> {
        if version < self.oldest {
            return None;
        }
        let first = self.log.partition_point(|change| change.version <= version);
        Some(self.log.range(first..).filter(|change| change.kind == kind).cloned().collect())
    }

    pub(super) const fn oldest(&self) -> u64 {
        self.oldest
    }

    /// The objects that a proxy watches. Pods are excluded: they only decide about callers.
    pub(super) fn all(&self) -> Vec<Arc<Value>> {
        let of_cluster = self.objects.iter().filter(|(kind, _)| **kind != Kind::Pod);
        of_cluster.flat_map(|(_, objects)| objects.values()).cloned().collect()
    }

    /// Kind and name of every object.
    pub(super) fn names(&self) -> Vec<(Kind, Name)> {
        let of_kind = |(kind, objects): (&Kind, &Objects)| {
            objects.keys().map(|name| (*kind, name.clone())).collect::<Vec<_>>()
        };
        self.objects.iter().flat_map(of_kind).collect()
    }

    pub(super) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Result<Arc<Value>, Refusal> {
        let found = self.objects.get(&kind).and_then(|objects| objects.get(&(namespace.into(), name.into())));
        found.cloned().ok_or_else(|| Refusal::not_found(kind, name))
    }

    pub(super) fn compact(&mut self) {
        self.log.clear();
        self.oldest = self.version;
    }

    /// Restores an older state and its version: later changes reuse the numbers.
    pub(super) fn restore(&mut self, version: u64) -> Result<(), Refusal> {
        for kind in Kind::ALL {
            let objects = self.objects_at(kind, version)?;
            let _after = self.objects.insert(kind, objects);
        }
        self.version = version;
        self.compact();
        Ok(())
    }

    /// Continues from another version, which may be smaller. Objects get it too.
    pub(super) fn renumber(&mut self, version: u64) {
        self.version = version;
        self.compact();
        for object in self.objects.values_mut().flat_map(BTreeMap::values_mut) {
            Arc::make_mut(object)["metadata"]["resourceVersion"] = version.to_string().into();
        }
    }

    /// Validates an object, sets the defaults, and stores it.
    pub(super) fn upsert(&mut self, kind: Kind, mut object: Value) -> Result<Arc<Value>, Refusal> {
        let objects = self.objects.entry(kind).or_default();
        let name = defaults::complete(kind, &mut object, objects)?;
        let old = objects.get(&name).cloned();
        let metadata = &mut object["metadata"];
        if let Some(old) = &old {
            for field in ["uid", "creationTimestamp", "generation", "resourceVersion"] {
                metadata[field] = old["metadata"][field].clone();
            }
            let differs = |field: &str| object.get(field) != old.get(field);
            if ["spec", "endpoints", "ports"].into_iter().any(differs) {
                let generation = old["metadata"]["generation"].as_u64().unwrap_or(1);
                object["metadata"]["generation"] = (generation + 1).into();
            }
            if **old == object {
                return Ok(Arc::clone(old));
            }
        } else {
            self.n_uids += 1;
            let nanoseconds =
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
            metadata["uid"] = format!("{nanoseconds:08x}-0000-4000-8000-{:012x}", self.n_uids).into();
            metadata["generation"] = 1.into();
            if metadata["creationTimestamp"].is_null() {
                let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
                metadata["creationTimestamp"] = now.into();
            }
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let object = Arc::new(object);
        objects.insert(name.clone(), Arc::clone(&object));
        self.log.push_back(Change { version: self.version, kind, name, old, new: Some(Arc::clone(&object)) });
        Ok(object)
    }

    pub(super) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> Result<Arc<Value>, Refusal> {
        let old = self.get(kind, namespace, name)?;
        let name = (namespace.to_owned(), name.to_owned());
        self.objects.entry(kind).or_default().remove(&name);
        self.version += 1;
        self.log.push_back(Change {
            version: self.version,
            kind,
            name,
            old: Some(Arc::clone(&old)),
            new: None,
        });
        Ok(old)
    }
}

/// Namespace and name.
pub(super) fn name_of(object: &Value) -> Name {
    let field = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (field("namespace"), field("name"))
}
