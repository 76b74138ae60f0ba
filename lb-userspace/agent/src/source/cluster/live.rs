//! The API server as a [`Source`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;
use lb_core::model::{
    Changes, Issue, IssueKind, ObjectKind, ObjectRef, Pod, ServiceCidr, ServiceKey, SliceKey, Store, ingest,
    notification::DueNotification,
};
use tokio::{
    sync::{
        Notify,
        mpsc::{self, error::TryRecvError},
    },
    task::JoinSet,
    time::Instant,
};

use super::{
    Access, Error, Timing, events,
    follow::{Follower, REASONS, follow},
    kinds::{
        Change, Kind as _, KindChange, Nodes, Pods, ServiceCidrs, Services, Slices, Trimmed, Unavailable,
    },
};
use crate::source::{Arrival, Changed, Contact, Exclusions, Notifier, Scheme, Source};

/// Capacity of the queue of events. Watches wait when it is full.
const QUEUE: usize = 1024;
/// Maximum number of events applied at once: the loop must sync in between.
const BATCH: usize = 16_384;

/// Which objects to watch.
#[expect(clippy::struct_excessive_bools, reason = "independent settings")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection<'a> {
    /// `--service-proxy-name`
    pub service_proxy_name: Option<&'a str>,
    /// The own node.
    pub node_name: &'a str,
    /// Whether to watch all Nodes: `--node-ports-of-other-nodes`.
    pub other_nodes: bool,
    /// Whether to watch the own node's Pods: `--exclude-pods`.
    pub pods: bool,
    /// Whether to watch ServiceCIDRs, and the cluster IPs of other proxies' Services: not with
    /// `--service-cidr=none`.
    pub service_cidrs: bool,
    /// Whether headless objects are watched too, which have names alone.
    pub names: bool,
}

/// `--source kube`
pub const SCHEME: Scheme = Scheme {
    name: "kube",
    address: None,
    open: |_no_address, setup| {
        Box::pin(async move {
            let selection = Selection {
                service_proxy_name: setup.service_proxy_name.as_deref(),
                node_name: &setup.node_name,
                other_nodes: setup.other_nodes,
                pods: setup.pods,
                service_cidrs: setup.service_cidrs,
                names: setup.names,
            };
            let source = KubeSource::open(&setup.access, selection, Timing::default()).await?;
            Ok(Box::new(source) as Box<dyn Source>)
        })
    },
};

/// Services, EndpointSlices, Nodes and ServiceCIDRs of an API server.
#[derive(Debug)]
pub struct KubeSource {
    server: Arc<str>,
    contact: Contact,
    changes: mpsc::Receiver<KindChange>,
    /// Received, but not applied yet.
    pending: Vec<KindChange>,
    /// Kinds whose first list is pending and may still come.
    awaited: BTreeSet<&'static str>,
    /// The pods to exclude by name, and their UIDs once all are listed.
    pods: BTreeMap<ObjectRef, Arc<str>>,
    excluded: Option<BTreeSet<Arc<str>>>,
    issues: BTreeMap<ObjectRef, Vec<Issue>>,
    /// The issue that ServiceCIDRs may not be read.
    refused: Option<Issue>,
    own_node: ObjectRef,
    arrivals: Vec<Arrival>,
    notifications: mpsc::Sender<DueNotification>,
    /// Earlier changes do not count as latency of this agent.
    started: Timestamp,
    /// The watches, and the writer of Events. Aborted on drop.
    _tasks: JoinSet<()>,
}

impl KubeSource {
    /// Starts watching.
    ///
    /// Returns before the server answers: it may be down, and the watches retry until it answers.
    ///
    /// # Errors
    ///
    /// If the settings make no client: see [`Error`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn open(access: &Access, wanted: Selection<'_>, timing: Timing) -> Result<Self, Error> {
        let (client, server) = access.client().await?;
        let server = Arc::<str>::from(server);
        let (sender, changes) = mpsc::channel(QUEUE);
        let (notifications, untold) = mpsc::channel(events::QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(events::record(access.clone(), client.clone(), Arc::clone(&server), untold));
        let needed = [Services::PLURAL, Slices::PLURAL, Nodes::PLURAL].into_iter();
        let of_networks = wanted.service_cidrs.then_some(ServiceCidrs::PLURAL);
        let kinds = needed.clone().chain(wanted.pods.then_some(Pods::PLURAL)).chain(of_networks);
        let contact = Contact::new(kinds, REASONS, Instant::now().into_std());
        let follower = Follower {
            access: access.clone(),
            client,
            server: Arc::clone(&server),
            timing,
            selector: ingest::label_selector(wanted.service_proxy_name, wanted.names),
            service_proxy_name: wanted.service_proxy_name.map(Arc::from),
            fields: String::new(),
            contact: contact.clone(),
            recovered: Arc::new(Notify::new()),
            changes: sender,
        };
        // Other proxies' Services have cluster IPs too. One watch for all, so that a Service whose label
        // changes never disappears in between.
        let selector = if wanted.service_cidrs { String::new() } else { follower.selector.clone() };
        tasks.spawn(follow::<Services>(Follower { selector, ..follower.clone() }));
        if wanted.service_cidrs {
            tasks.spawn(follow::<ServiceCidrs>(follower.clone()));
        }
        tasks.spawn(follow::<Slices>(follower.clone()));
        let of =
            |field: &str| Follower { fields: format!("{field}={}", wanted.node_name), ..follower.clone() };
        if wanted.pods {
            tasks.spawn(follow::<Pods>(of("spec.nodeName")));
        }
        let own_node = of("metadata.name");
        tasks.spawn(follow::<Nodes>(if wanted.other_nodes { follower } else { own_node }));
        Ok(Self {
            server,
            contact,
            changes,
            pending: Vec::new(),
            awaited: needed.chain(of_networks).collect(),
            pods: BTreeMap::new(),
            excluded: None,
            issues: BTreeMap::new(),
            refused: None,
            own_node: ObjectRef::node(wanted.node_name),
            arrivals: Vec::new(),
            notifications,
            started: Timestamp::now(),
            _tasks: tasks,
        })
    }

    fn note(&mut self, object: ObjectRef, issues: Vec<Issue>) {
        if issues.is_empty() {
            self.issues.remove(&object);
        } else {
            self.issues.insert(object, issues);
        }
    }

    fn note_all(&mut self, kind: &ObjectKind, issues: Vec<Issue>) {
        self.issues.retain(|object, _| object.kind != *kind);
        for issue in issues {
            self.issues.entry(issue.object.clone()).or_default().push(issue);
        }
    }

    /// The time of the change behind a slice, if this agent was running then.
    fn triggered(&self, trigger_time: Option<i64>) -> Option<Timestamp> {
        Timestamp::from_nanosecond(trigger_time?.into()).ok().filter(|triggered| *triggered >= self.started)
    }

    fn apply_one(&mut self, change: KindChange, store: &mut Store) -> Changes {
        match change {
            KindChange::Services(Change::All { models, issues }) => {
                self.awaited.remove(Services::PLURAL);
                self.note_all(&ObjectKind::Service, issues);
                store.replace_services(models)
            }
            KindChange::Slices(Change::All { models, issues }) => {
                self.awaited.remove(Slices::PLURAL);
                self.note_all(&ObjectKind::EndpointSlice, issues);
                store.replace_slices(models)
            }
            KindChange::Nodes(Change::All { models, issues }) => {
                self.awaited.remove(Nodes::PLURAL);
                self.note_all(&ObjectKind::Node, issues);
                store.replace_nodes(models)
            }
            KindChange::Pods(change) => {
                self.follow_pods(change);
                Changes::default()
            }
            KindChange::ServiceCidrs(change) => self.follow_service_cidrs(change, store),
            KindChange::NoServiceCidrs(lack) => self.lack_service_cidrs(lack, store),
            KindChange::Services(Change::One { trimmed: Trimmed { object, model, issues }, received }) => {
                let key = ServiceKey { namespace: object.namespace.clone(), name: object.name.clone() };
                let changes = store.set_service(&key, model);
                self.arrived(&changes, Arrival { received: received.into_std(), triggered: None });
                self.note(object, issues);
                changes
            }
            KindChange::Slices(Change::One { trimmed: Trimmed { object, model, issues }, received }) => {
                let key = SliceKey { namespace: object.namespace.clone(), name: object.name.clone() };
                let triggered = self.triggered(model.as_ref().and_then(|slice| slice.trigger_time));
                let changes = store.set_slice(&key, model);
                let triggered = triggered.map(Into::into);
                self.arrived(&changes, Arrival { received: received.into_std(), triggered });
                self.note(object, issues);
                changes
            }
            KindChange::Nodes(Change::One { trimmed: Trimmed { object, model, issues }, received }) => {
                let changes = store.set_node(&object.name, model);
                self.arrived(&changes, Arrival { received: received.into_std(), triggered: None });
                self.note(object, issues);
                changes
            }
        }
    }

    fn follow_service_cidrs(&mut self, change: Change<ServiceCidr>, store: &mut Store) -> Changes {
        self.refused = None;
        match change {
            Change::All { models, issues } => {
                self.awaited.remove(ServiceCidrs::PLURAL);
                self.note_all(&ObjectKind::ServiceCidr, issues);
                store.replace_service_cidrs(models)
            }
            Change::One { trimmed: Trimmed { object, model, issues }, received } => {
                let changes = store.set_service_cidr(&object.name, model);
                self.arrived(&changes, Arrival { received: received.into_std(), triggered: None });
                self.note(object, issues);
                changes
            }
        }
    }

    /// The agent serves without ServiceCIDRs. Known ones stay while the server may still have them.
    fn lack_service_cidrs(&mut self, lack: Unavailable, store: &mut Store) -> Changes {
        self.awaited.remove(ServiceCidrs::PLURAL);
        match lack {
            Unavailable::Failing => Changes::default(),
            Unavailable::Forbidden(cause) => {
                let issue = Issue::new(self.own_node.clone(), IssueKind::NoServiceCidrs { cause });
                self.refused = Some(issue);
                Changes::default()
            }
            Unavailable::Unknown => {
                self.refused = None;
                self.note_all(&ObjectKind::ServiceCidr, Vec::new());
                store.replace_service_cidrs::<ServiceCidr>([])
            }
        }
    }

    /// Pods affect exclusions, not the tables.
    fn follow_pods(&mut self, change: Change<Pod>) {
        match change {
            Change::All { models, issues } => {
                self.note_all(&ObjectKind::Pod, issues);
                let named = |pod: Pod| (ObjectRef::pod(&pod.namespace, &pod.name), pod.uid);
                self.pods = models.into_iter().map(named).collect();
                self.excluded = Some(BTreeSet::new());
            }
            Change::One { trimmed: Trimmed { object, model, issues }, .. } => {
                let _before = match model {
                    Some(pod) => self.pods.insert(object.clone(), pod.uid),
                    None => self.pods.remove(&object),
                };
                self.note(object, issues);
            }
        }
        if let Some(excluded) = &mut self.excluded {
            *excluded = self.pods.values().cloned().collect();
        }
    }

    /// An event that changes nothing has no latency.
    fn arrived(&mut self, changes: &Changes, arrival: Arrival) {
        if !changes.is_empty() {
            self.arrivals.push(arrival);
        }
    }
}

impl KubeSource {
    /// Waits for events, and takes together what has arrived together.
    async fn received(&mut self) -> bool {
        if self.pending.is_empty() {
            let Some(change) = self.changes.recv().await else { return false };
            self.pending.push(change);
        }
        // Applies together what has arrived together.
        while self.pending.len() < BATCH {
            match self.changes.try_recv() {
                Ok(change) => self.pending.push(change),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        true
    }
}

impl Source for KubeSource {
    fn changed(&mut self) -> Changed<'_> {
        Box::pin(self.received())
    }

    fn is_complete(&self) -> bool {
        self.awaited.is_empty()
    }

    fn apply(&mut self, store: &mut Store) -> Changes {
        let mut changes = Changes::default();
        for change in std::mem::take(&mut self.pending) {
            changes.merge(self.apply_one(change, store));
        }
        changes
    }

    fn issues(&self) -> Vec<Issue> {
        self.issues.values().flatten().chain(&self.refused).cloned().collect()
    }

    fn exclusions(&self) -> Option<&dyn Exclusions> {
        Some(self)
    }

    fn describe(&self) -> String {
        format!("kube {}", self.server)
    }

    fn contact(&self) -> Option<&Contact> {
        Some(&self.contact)
    }

    fn take_arrivals(&mut self) -> Vec<Arrival> {
        std::mem::take(&mut self.arrivals)
    }

    fn notifier(&self) -> Option<&dyn Notifier> {
        Some(self)
    }
}

impl Notifier for KubeSource {
    fn capacity(&self) -> usize {
        self.notifications.capacity()
    }

    fn notify(&self, notification: DueNotification) {
        // Nothing is lost if the caller checked the capacity first.
        let _lost_if_full = self.notifications.try_send(notification);
    }
}

impl Exclusions for KubeSource {
    fn excluded_pods(&self) -> Option<&BTreeSet<Arc<str>>> {
        self.excluded.as_ref()
    }
}
