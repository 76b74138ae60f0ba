//! Asks a running agent over HTTP: at its socket, else at its TCP addresses.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::SystemTime,
};

use anyhow::Context as _;
use lb_agent::{
    serve::known::{Known, Which},
    telemetry::{
        health::NOT_RUN,
        metrics::{
            CHANGES_WAITING, Definition, SERVES_SNAPSHOT, SOURCE_COMPLETE, SYNC_ERRORS, SYNC_LAST,
            SYNC_LAST_QUEUED,
        },
    },
};
use serde_json::Value;
use tokio::runtime;

use super::report::{Age, SourcePart};
use crate::cli::agent::{self, Agent, AgentAddress, PATIENCE};

/// The body of socklb's `/proxyMode`.
const OWN_NAME: &str = "socklb";

/// One answer, or why there is none.
pub(super) type Answer = Result<(u16, String), String>;

/// All answers.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// The place asked for metrics, and its `/proxyMode`.
    pub(super) name: Option<(AgentAddress, Answer)>,
    /// The place asked for health, its `/livez` and its `/healthz`.
    pub(super) health: Option<(AgentAddress, Answer, Answer)>,
    /// What the agent at the socket knows, without objects, or why it is unknown.
    pub(super) known: Option<Result<Known, String>>,
    /// `/metrics`, if socklb answers.
    pub(super) metrics: String,
    /// `/configz`, likewise.
    pub(super) config: Value,
}

/// The address to connect to: loopback if the listener is bound to the unspecified address.
pub(super) fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

/// Asks the agent of a state directory, else the TCP addresses. The result holds an error for each missing
/// answer.
pub(super) fn ask(
    state_dir: &Path,
    metrics: Option<SocketAddr>,
    healthz: Option<SocketAddr>,
) -> anyhow::Result<Asked> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime to ask the agent")?;
    let mut asked = runtime.block_on(async {
        let socket = AgentAddress::socket(state_dir);
        let at_socket = ask_at(Some(&socket), Some(&socket)).await;
        if at_socket.is_socklb() == Some(true) {
            return at_socket;
        }
        ask_at(metrics.map(AgentAddress::Tcp).as_ref(), healthz.map(AgentAddress::Tcp).as_ref()).await
    });
    let known = Agent::new(state_dir).ask(Which::Issues, None).map_err(|error| error.to_string());
    asked.known = Some(known.and_then(|tagged| tagged.map(|tagged| tagged.known).ok_or_else(String::new)));
    Ok(asked)
}

async fn ask_at(metrics: Option<&AgentAddress>, healthz: Option<&AgentAddress>) -> Asked {
    let mut asked = Asked::default();
    if let Some(place) = metrics {
        let name = get(place, "/proxyMode").await;
        if matches!(&name, Ok((200, name)) if name == OWN_NAME) {
            asked.metrics = get(place, "/metrics").await.map(|(_, text)| text).unwrap_or_default();
            let config = get(place, "/configz").await.map(|(_, text)| text).unwrap_or_default();
            asked.config = serde_json::from_str(&config).unwrap_or_default();
        }
        asked.name = Some((place.clone(), name));
    }
    if let Some(place) = healthz {
        asked.health = Some((place.clone(), get(place, "/livez").await, get(place, "/healthz").await));
    }
    asked
}

/// Gets a page.
async fn get(place: &AgentAddress, page: &str) -> Answer {
    let response = agent::get(place, page, PATIENCE).await.map_err(|error| error.to_string())?;
    Ok((response.status, String::from_utf8_lossy(&response.body).into_owned()))
}

/// The value of a metric without labels in the text of `/metrics`.
fn value(text: &str, metric: &Definition) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(metric.name)?.strip_prefix(' '))?;
    line.split(' ').next()?.parse().ok()
}

impl Asked {
    /// Whether the answer is socklb's; `None` if no place was asked for its name.
    pub(super) fn is_socklb(&self) -> Option<bool> {
        let (_, name) = self.name.as_ref()?;
        Some(matches!(name, Ok((200, name)) if name == OWN_NAME))
    }

    /// The source and the syncs, by the metrics.
    pub(super) fn source(&self, now: SystemTime) -> Option<SourcePart> {
        let of = |metric: &Definition| value(&self.metrics, metric);
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        // 0 means never.
        let age =
            |metric| of(metric).filter(|time| *time > 0.0).map(|time| Age((since_epoch - time).max(0.0)));
        Some(SourcePart {
            source: self.config["socklb"]["source"].as_str().unwrap_or_default().to_owned(),
            is_complete: of(&SOURCE_COMPLETE)? > 0.0,
            serves_snapshot: of(&SERVES_SNAPSHOT)? > 0.0,
            last_event_age_seconds: age(&SYNC_LAST_QUEUED),
            last_sync_age_seconds: age(&SYNC_LAST),
            changes_waiting: of(&CHANGES_WAITING).map(whole)?,
            sync_errors: of(&SYNC_ERRORS).map(whole)?,
        })
    }

    /// Result of the agent's last self-test; `None` if it runs none, or does not answer.
    pub(super) fn self_test(&self) -> Option<String> {
        let interval = self.config["socklb"]["self-test-interval"].as_str()?;
        let body = self.healthz().filter(|_| interval != "0ms")?;
        // The key is present only if the self-test has not passed.
        Some(match body["selfTest"].as_str() {
            None => "passed".to_owned(),
            Some(NOT_RUN) => NOT_RUN.to_owned(),
            Some(problem) => format!("failed: {problem}"),
        })
    }

    /// The reasons for which the agent is not ready.
    pub(super) fn not_ready(&self) -> Vec<String> {
        self.listed("notReady")
    }

    /// The map sizes that the agent refused.
    pub(super) fn refused_sizes(&self) -> Vec<String> {
        self.listed("sizesRefused")
    }

    /// A list of texts in the body of `/healthz`.
    fn listed(&self, key: &str) -> Vec<String> {
        let body = self.healthz();
        let texts = body.as_ref().and_then(|body| body[key].as_array()).into_iter().flatten();
        texts.filter_map(|text| text.as_str().map(str::to_owned)).collect()
    }

    /// The body of `/healthz`.
    pub(super) fn healthz(&self) -> Option<Value> {
        let (_, _, healthz) = self.health.as_ref()?;
        serde_json::from_str(&healthz.as_ref().ok()?.1).ok()
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count, saturating")]
fn whole(count: f64) -> u64 {
    count as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_whole_name() {
        let text = "# HELP NAME x\nNAME_total 9\nNAME{a=\"b\"} 8\nNAME 3\n# EOF\n"
            .replace("NAME", CHANGES_WAITING.name);
        assert_eq!(value(&text, &CHANGES_WAITING), Some(3.0));
        assert_eq!(value("", &CHANGES_WAITING), None);
        assert_eq!(value(&format!("{} x\n", CHANGES_WAITING.name), &CHANGES_WAITING), None);
    }

    #[test]
    fn a_self_test_is_passed_unless_the_agent_says_otherwise() {
        let asked = |interval: &str, body: &str| Asked {
            health: Some((
                AgentAddress::Tcp(([127, 0, 0, 1], 1).into()),
                Ok((200, String::new())),
                Ok((200, body.to_owned())),
            )),
            config: serde_json::json!({"socklb": {"self-test-interval": interval}}),
            ..Asked::default()
        };
        assert_eq!(asked("30000ms", "{}").self_test().as_deref(), Some("passed"));
        let failed = asked("30000ms", r#"{"selfTest": "TCP over IPv4: connect: refused"}"#).self_test();
        assert_eq!(failed.as_deref(), Some("failed: TCP over IPv4: connect: refused"));
        let body = format!(r#"{{"selfTest": "{NOT_RUN}", "notReady": ["self-test {NOT_RUN}"]}}"#);
        let pending = asked("30000ms", &body);
        assert_eq!(pending.self_test().as_deref(), Some(NOT_RUN));
        assert_eq!(pending.not_ready(), [format!("self-test {NOT_RUN}")]);
        assert_eq!(asked("0ms", "{}").self_test(), None);
        assert_eq!(asked("30000ms", "busy").self_test(), None);
        assert_eq!(Asked::default().self_test(), None);
    }

    #[test]
    fn an_agent_on_all_addresses_is_asked_on_loopback() {
        for (listening, asked) in
            [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:2", "[::1]:2"), ("10.0.0.1:3", "10.0.0.1:3")]
        {
            assert_eq!(reachable(listening.parse().unwrap()).to_string(), asked);
        }
    }

    #[test]
    fn whoever_does_not_answer_is_told() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let state_dir = tempfile::tempdir().unwrap();
        let asked = ask(state_dir.path(), Some(nobody), Some(nobody)).unwrap();
        assert!(asked.known.as_ref().unwrap().as_ref().unwrap_err().contains("no agent answers"));
        assert_eq!(asked.is_socklb(), Some(false));
        assert!(asked.name.unwrap().1.unwrap_err().contains("refused"));
        assert!(ask(state_dir.path(), None, None).unwrap().is_socklb().is_none());
    }
}
