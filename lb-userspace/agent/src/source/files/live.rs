//! Manifests as a [`Source`].

use std::{collections::BTreeSet, path::Path, time::Instant};

use lb_core::model::{Changes, Issue, Store};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::sleep_until,
};
use tracing::info;

use super::{Body, Error, FileSet, Moment, Reading, Watch, watch};
use crate::{
    self_test,
    snapshot::Snapshot,
    source::{Arrival, Changed, Scheme, Source},
};

/// `--source file:PATH`
pub const SCHEME: Scheme = Scheme {
    name: "file",
    address: Some("PATH"),
    open: |path, setup| {
        Box::pin(async move {
            let last_good = move || last_good(&setup.state_dir);
            let source = FileSource::open(path, setup.service_proxy_name.as_deref(), last_good)?;
            Ok(Box::new(source) as Box<dyn Source>)
        })
    },
};

/// The objects of the snapshot, without the agent's own.
fn last_good(state_dir: &Path) -> Vec<Body> {
    let Ok(Snapshot { services, slices, nodes, service_cidrs, .. }) = Snapshot::read(state_dir) else {
        return Vec::new();
    };
    let (own, _) = self_test::objects(&[]);
    let services = services.into_iter().filter(|service| service.key != own.key).map(Body::Service);
    let slices = slices.into_iter().filter(|slice| slice.service != own.key).map(Body::Slice);
    let service_cidrs = service_cidrs.into_iter().map(Body::ServiceCidr);
    services.chain(slices).chain(nodes.into_iter().map(Body::Node)).chain(service_cidrs).collect()
}

/// Reads what an agent served last. May take time.
type LastGood = Box<dyn FnOnce() -> Vec<Body> + Send>;

/// A watched manifest file or folder.
pub struct FileSource {
    path: String,
    files: FileSet,
    watch: Watch,
    last_good: Option<LastGood>,
    /// The task that reads it.
    expecting: Option<JoinHandle<Vec<Body>>>,
    /// When to reread which files without an event, until requested.
    next_reread: Option<(Instant, BTreeSet<String>)>,
    is_complete: bool,
    /// When the changes to apply arrived. `None` for the first reading, which is a whole list.
    received: Option<Instant>,
    arrivals: Vec<Arrival>,
}

impl FileSource {
    /// Starts watching. `service_proxy_name` is `--service-proxy-name`.
    ///
    /// `last_good` reads what an agent served last. It is called once, on a blocking thread, before the first
    /// reading is applied: an object that no manifest has may be in one that is broken or being written.
    ///
    /// # Errors
    ///
    /// As [`watch()`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn open(
        path: impl AsRef<Path>,
        service_proxy_name: Option<&str>,
        last_good: impl FnOnce() -> Vec<Body> + Send + 'static,
    ) -> Result<Self, Error> {
        Ok(Self {
            path: path.as_ref().display().to_string(),
            files: FileSet::new(service_proxy_name),
            watch: watch(path)?,
            last_good: Some(Box::new(last_good)),
            expecting: None,
            next_reread: None,
            is_complete: false,
            received: None,
            arrivals: Vec::new(),
        })
    }

    /// Waits for a reading, and requests rereads when they are due. `None` when no more will come.
    async fn next_reading(&mut self) -> Option<Reading> {
        loop {
            let due = self.next_reread.as_ref().map(|(due, _)| (*due).into());
            tokio::select! {
                reading = self.watch.readings.recv() => return reading,
                () = sleep_until(due.unwrap_or_else(tokio::time::Instant::now)), if due.is_some() => {
                    if let Some((_, files)) = self.next_reread.take() {
                        self.watch.ask(files);
                    }
                }
            }
        }
    }
}

impl FileSource {
    /// Waits for a reading that changes something.
    async fn received(&mut self) -> bool {
        // Not earlier: the agent may have waited for another one, which kept serving until it exited.
        if let Some(last_good) = self.last_good.take() {
            self.expecting = Some(spawn_blocking(last_good));
        }
        if let Some(expecting) = &mut self.expecting {
            let objects = expecting.await.unwrap_or_default();
            self.expecting = None;
            self.files.expect(objects, Moment::now());
        }
        loop {
            let Some((snapshot, now)) = self.next_reading().await else { return false };
            let is_news = self.files.update(snapshot, now);
            self.next_reread = self.files.next_reread();
            for gone in self.files.take_gone() {
                info!("{gone}");
            }
            if is_news || !self.is_complete {
                self.received = self.is_complete.then(Instant::now);
                self.is_complete = true;
                return true;
            }
        }
    }
}

impl Source for FileSource {
    fn changed(&mut self) -> Changed<'_> {
        Box::pin(self.received())
    }

    fn is_complete(&self) -> bool {
        self.is_complete
    }

    fn apply(&mut self, store: &mut Store) -> Changes {
        let changes = self.files.apply(store);
        // Changes without an effect have no latency.
        if let Some(received) = self.received.take().filter(|_| !changes.is_empty()) {
            self.arrivals.push(Arrival { received, triggered: None });
        }
        changes
    }

    fn issues(&self) -> Vec<Issue> {
        self.files.issues()
    }

    fn describe(&self) -> String {
        format!("file:{}", self.path)
    }

    fn take_arrivals(&mut self) -> Vec<Arrival> {
        std::mem::take(&mut self.arrivals)
    }
}
