//! The objects that name the contents of the maps: a running agent's, else the snapshot's.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use lb_agent::{
    serve::known::{Known, Which},
    snapshot::{self, Snapshot},
};
use lb_core::{desired::FrontendAddress, model::Issue, state::State};

use super::{
    agent::{Agent, Tagged},
    listing::{state_of, state_of_known},
};

/// Before its first sync an agent may know less than the snapshot.
const NOT_SYNCED: &str = "the agent's first lists are not complete";

/// The objects, updated on each read.
pub(super) struct Objects {
    agent: Agent,
    state_dir: PathBuf,
    /// Tag of the agent's last answer.
    tag: Option<String>,
    /// Time stamp of the last snapshot.
    modified: Option<SystemTime>,
    state: Option<State>,
    problem: Option<String>,
    notice: Option<String>,
}

impl Objects {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self {
            agent: Agent::new(state_dir),
            state_dir: state_dir.to_owned(),
            tag: None,
            modified: None,
            state: None,
            problem: None,
            notice: None,
        }
    }

    /// The current objects. `None` if none can be read: earlier ones may be outdated.
    pub(super) fn now(&mut self) -> Option<&State> {
        let reason = match self.agent.ask(Which::All, self.tag.as_deref()) {
            Ok(None) => return self.state.as_ref(),
            Ok(Some(Tagged { known, tag })) if known.has_synced => {
                (self.state, self.tag, self.modified) = (Some(state_of_known(known)), tag, None);
                (self.problem, self.notice) = (None, None);
                return self.state.as_ref();
            }
            Ok(Some(_)) => NOT_SYNCED.to_owned(),
            Err(error) => error.to_string(),
        };
        self.tag = None;
        let modified = snapshot::modified(&self.state_dir);
        if modified.is_none() || modified != self.modified {
            self.modified = modified;
            (self.state, self.problem) = match Snapshot::read(&self.state_dir) {
                Ok(snapshot) => (Some(state_of(snapshot)), None),
                Err(error) => (None, Some(format!("names are missing: {reason}, and {error}"))),
            };
        }
        self.notice = self.state.is_some().then(|| from_snapshot(&reason, modified));
        self.state.as_ref()
    }

    /// The objects of the last read.
    pub(super) fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// Why the last read found no objects.
    pub(super) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Why the objects of the last read may be outdated or missing.
    pub(super) fn notice(&self) -> Option<&str> {
        self.problem.as_deref().or(self.notice.as_deref())
    }
}

/// Knowledge about one address.
pub(super) struct At {
    /// The objects, if there are any.
    pub(super) state: Option<State>,
    /// Its issues.
    pub(super) issues: Vec<Issue>,
    /// Why the objects may be outdated or missing.
    pub(super) notice: Option<String>,
    /// Tag of the agent's answer; `None` for the snapshot's objects.
    pub(super) tag: Option<String>,
}

impl At {
    /// Asks the agent, else reads the snapshot.
    pub(super) fn now(agent: &Agent, state_dir: &Path, address: FrontendAddress) -> Self {
        match agent.ask(Which::At(address), None) {
            Ok(Some(tagged)) if tagged.known.has_synced => Self::heard(tagged),
            Ok(_) => Self::read(state_dir, address, NOT_SYNCED),
            Err(error) => Self::read(state_dir, address, &error.to_string()),
        }
    }

    /// Asks the agent.
    pub(super) fn heard(Tagged { mut known, tag }: Tagged) -> Self {
        let issues = std::mem::take(&mut known.issues);
        Self { state: Some(state_of_known(known)), issues, notice: None, tag }
    }

    /// Reads the snapshot.
    fn read(state_dir: &Path, address: FrontendAddress, reason: &str) -> Self {
        match Snapshot::read(state_dir).map(state_of) {
            Ok(state) => {
                let all = state.issues().collect();
                let mut known = Known { issues: all, ..Known::of(&state.view(), Which::At(address)) };
                known.keep_issues_at(address);
                let notice = Some(from_snapshot(reason, snapshot::modified(state_dir)));
                Self { state: Some(state), issues: known.issues, notice, tag: None }
            }
            Err(error) => {
                let notice = Some(format!("names are missing: {reason}, and {error}"));
                Self { state: None, issues: Vec::new(), notice, tag: None }
            }
        }
    }
}

fn from_snapshot(reason: &str, modified: Option<SystemTime>) -> String {
    let age = modified.map(|time| SystemTime::now().duration_since(time).unwrap_or(Duration::ZERO));
    let age = age.map_or_else(String::new, |age| format!(", {} s old", age.as_secs()));
    format!("{reason}: names are from the snapshot{age}")
}

#[cfg(test)]
mod tests;
