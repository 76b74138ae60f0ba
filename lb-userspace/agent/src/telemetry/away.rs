//! What is served during an outage of the source, for `/healthz`.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use jiff::Timestamp;
use serde::Serialize;

use crate::source::Outage;

/// What the tables follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Serves {
    /// The last known objects.
    LastKnown,
    /// Entries of an earlier agent in the kernel.
    Found,
    /// The snapshot.
    Snapshot,
    /// Nothing: neither entries nor a snapshot were found.
    Nothing,
}

/// A source whose lists are incomplete, or that does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    /// What is served meanwhile.
    pub serves: Serves,
    /// The outage, if the source does not answer.
    pub outage: Option<Outage>,
}

/// An [`Away`] as shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    serves: Serves,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<Arc<str>>,
}

impl Away {
    /// As shown at a time.
    #[must_use]
    pub fn show(&self, now: Instant, clock: SystemTime) -> Shown {
        let since = |outage: &Outage| {
            let began = clock.checked_sub(now.saturating_duration_since(outage.since))?;
            Timestamp::try_from(began).ok().map(|began| began.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
        };
        Shown {
            serves: self.serves,
            since: self.outage.as_ref().and_then(since),
            problem: self.outage.as_ref().map(|outage| Arc::clone(&outage.problem)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_outage_is_shown_with_its_begin() {
        let start = Instant::now();
        let clock = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let outage =
            Outage { since: start, problem: "API server https://10.0.0.1: connection refused".into() };
        let away = Away { serves: Serves::LastKnown, outage: Some(outage) };
        assert_eq!(
            serde_json::to_string(&away.show(start + Duration::from_secs(20), clock)).unwrap(),
            r#"{"serves":"last-known","since":"2023-11-14T22:13:00Z","problem":"API server https://10.0.0.1: connection refused"}"#
        );
        let starting = Away { serves: Serves::Found, outage: None };
        assert_eq!(serde_json::to_string(&starting.show(start, clock)).unwrap(), r#"{"serves":"found"}"#);
    }
}
