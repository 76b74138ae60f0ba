//! Manifests as a [`Source`].

use std::{path::Path, time::Instant};

use tokio::sync::mpsc;

use super::{Error, FileSet, Snapshot, watch};
use crate::{
    model::{Changes, Issue, Store},
    source::{Arrival, Source},
};

/// A watched manifest file or folder.
#[derive(Debug)]
pub struct FileSource {
    path: String,
    files: FileSet,
    snapshots: mpsc::Receiver<Snapshot>,
    is_complete: bool,
    /// When the news came that are to be applied, but for the first, which are everything that there is.
    received: Option<Instant>,
    arrivals: Vec<Arrival>,
}

impl FileSource {
    /// Starts watching. The service proxy name is the one of `--service-proxy-name`.
    ///
    /// # Errors
    ///
    /// As [`watch()`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn open(path: impl AsRef<Path>, service_proxy_name: Option<&str>) -> Result<Self, Error> {
        Ok(Self {
            path: path.as_ref().display().to_string(),
            files: FileSet::new(service_proxy_name),
            snapshots: watch(path)?,
            is_complete: false,
            received: None,
            arrivals: Vec::new(),
        })
    }
}

impl Source for FileSource {
    async fn changed(&mut self) -> bool {
        let Some(snapshot) = self.snapshots.recv().await else { return false };
        self.files.update(snapshot);
        self.received = self.is_complete.then(Instant::now);
        self.is_complete = true;
        true
    }

    fn is_complete(&self) -> bool {
        self.is_complete
    }

    fn apply(&mut self, store: &mut Store) -> Changes {
        let changes = self.files.apply(store);
        // News that change nothing are not waited for by anybody.
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
