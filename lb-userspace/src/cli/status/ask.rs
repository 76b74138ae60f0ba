//! Asking a running agent over HTTP.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, runtime, time};

use super::report::{Age, SourcePart};
use crate::telemetry::metrics::{
    CHANGES_WAITING, Definition, ISSUES, SERVES_SNAPSHOT, SOURCE_COMPLETE, SYNC_ERRORS, SYNC_LAST,
    SYNC_LAST_QUEUED,
};

/// How long to wait for one answer. The agent itself gives its loop less.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest answer that is read: the metrics of a large cluster.
const MAX_BYTES: usize = 64 << 20;
/// What `/proxyMode` says.
const OWN_NAME: &str = "socklb";

/// One answer, or why there is none.
pub(super) type Answer = Result<(u16, String), String>;

/// What was heard.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// Where metrics were asked for, and `/proxyMode` there.
    pub(super) name: Option<(SocketAddr, Answer)>,
    /// Where the health was asked for, `/livez` and `/healthz` there.
    pub(super) health: Option<(SocketAddr, Answer, Answer)>,
    /// `/metrics`, if it is socklb that answers.
    pub(super) metrics: String,
    /// `/configz`, likewise.
    pub(super) config: Value,
}

/// The address to connect to for what listens at another: one of the host's own for "all addresses".
pub(super) fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

/// Asks whoever listens at the addresses. What is not answered is told in the result.
pub(super) fn ask(metrics: Option<SocketAddr>, healthz: Option<SocketAddr>) -> anyhow::Result<Asked> {
    let runtime =
        runtime::Builder::new_current_thread().enable_all().build().context("no thread to ask from")?;
    runtime.block_on(async {
        let mut asked = Asked::default();
        if let Some(address) = metrics {
            let name = get(address, "/proxyMode").await;
            if matches!(&name, Ok((200, name)) if name == OWN_NAME) {
                asked.metrics = get(address, "/metrics").await.map(|(_, text)| text).unwrap_or_default();
                let config = get(address, "/configz").await.map(|(_, text)| text).unwrap_or_default();
                asked.config = serde_json::from_str(&config).unwrap_or_default();
            }
            asked.name = Some((address, name));
        }
        if let Some(address) = healthz {
            asked.health = Some((address, get(address, "/livez").await, get(address, "/healthz").await));
        }
        Ok(asked)
    })
}

/// One request on a connection of its own.
async fn get(address: SocketAddr, path: &str) -> Answer {
    let exchange = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let connection = tokio::spawn(connection);
        let request = Request::get(path).header(HOST, address.to_string()).body(Empty::<Bytes>::new());
        let request = request.map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
        connection.abort();
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    time::timeout(PATIENCE, exchange).await.unwrap_or_else(|_late| Err("no answer in time".to_owned()))
}

/// The value of a metric without labels in the text of `/metrics`.
fn value(text: &str, metric: &Definition) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(metric.name)?.strip_prefix(' '))?;
    line.split(' ').next()?.parse().ok()
}

impl Asked {
    /// Whether the one who answers says that it is socklb; `None` if nobody was asked for the name.
    pub(super) fn is_socklb(&self) -> Option<bool> {
        let (_, name) = self.name.as_ref()?;
        Some(matches!(name, Ok((200, name)) if name == OWN_NAME))
    }

    /// What the agent says of its source and its work.
    pub(super) fn source(&self, now: SystemTime) -> Option<SourcePart> {
        let of = |metric: &Definition| value(&self.metrics, metric);
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        // 0 stands for never.
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

    /// What came of the agent's last self-test; `None` if it makes none, or nobody says.
    pub(super) fn self_test(&self) -> Option<String> {
        let interval = self.config["socklb"]["self-test-interval"].as_str()?;
        let (_, _, healthz) = self.health.as_ref().filter(|_| interval != "0ms")?;
        let (_, body) = healthz.as_ref().ok()?;
        let body: Value = serde_json::from_str(body).ok()?;
        // It says what is amiss only.
        Some(
            body["selfTest"]
                .as_str()
                .map_or_else(|| "passed".to_owned(), |problem| format!("failed: {problem}")),
        )
    }

    /// How many issues the agent knows of.
    pub(super) fn n_issues(&self) -> Option<u64> {
        value(&self.metrics, &ISSUES).map(whole)
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
        let text = "# HELP socklb_issues x\nsocklb_issues_total 9\nsocklb_issues{a=\"b\"} 8\nsocklb_issues 3\n# EOF\n";
        assert_eq!(value(text, &ISSUES), Some(3.0));
        assert_eq!(value("", &ISSUES), None);
        assert_eq!(value("socklb_issues x\n", &ISSUES), None);
    }

    #[test]
    fn a_self_test_is_passed_unless_the_agent_says_otherwise() {
        let asked = |interval: &str, body: &str| Asked {
            health: Some((([127, 0, 0, 1], 1).into(), Ok((200, String::new())), Ok((200, body.to_owned())))),
            config: serde_json::json!({"socklb": {"self-test-interval": interval}}),
            ..Asked::default()
        };
        assert_eq!(asked("30000ms", "{}").self_test().as_deref(), Some("passed"));
        let failed = asked("30000ms", r#"{"selfTest": "TCP over IPv4: connect: refused"}"#).self_test();
        assert_eq!(failed.as_deref(), Some("failed: TCP over IPv4: connect: refused"));
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
        let asked = ask(Some(nobody), Some(nobody)).unwrap();
        assert_eq!(asked.is_socklb(), Some(false));
        assert!(asked.name.unwrap().1.unwrap_err().contains("refused"));
        assert!(ask(None, None).unwrap().is_socklb().is_none());
    }
}
