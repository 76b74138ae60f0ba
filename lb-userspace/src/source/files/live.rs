//! Manifests as a [`Source`].

use std::path::Path;

use tokio::sync::mpsc;

use super::{Error, FileSet, Snapshot, watch};
use crate::{
    model::{Changes, Issue, Store},
    source::Source,
};

/// A watched manifest file or folder.
#[derive(Debug)]
pub struct FileSource {
    path: String,
    files: FileSet,
    snapshots: mpsc::Receiver<Snapshot>,
    is_complete: bool,
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
        })
    }
}

impl Source for FileSource {
    async fn changed(&mut self) -> bool {
        let Some(snapshot) = self.snapshots.recv().await else { return false };
        self.files.update(snapshot);
        self.is_complete = true;
        true
    }

    fn is_complete(&self) -> bool {
        self.is_complete
    }

    fn apply(&mut self, store: &mut Store) -> Changes {
        self.files.apply(store)
    }

    fn issues(&self) -> Vec<Issue> {
        self.files.issues()
    }

    fn describe(&self) -> String {
        format!("file:{}", self.path)
    }
}
