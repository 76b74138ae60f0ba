//! The pages of the agent's two listeners, by the paths of kube-proxy.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Instant, SystemTime},
};

use hyper::{
    StatusCode, Uri,
    header::{HeaderValue, X_CONTENT_TYPE_OPTIONS},
};
use lb_kernel::Observations;
use tokio::sync::watch;

use super::{
    Published,
    http::{Answer, Pages, answer, text},
};
use crate::{
    source::Contact,
    telemetry::{
        Metrics,
        health::{self, Vitals},
        scrape::{Calls, render},
    },
};

/// The media type that Prometheus prefers.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A JSON answer that browsers do not reinterpret.
pub(super) fn json(is_ok: bool, body: String) -> Answer {
    let status = if is_ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut answer = answer(status, "application/json", body);
    answer.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

/// `/metrics`, `/proxyMode`, `/healthz`, `/configz`
pub struct MetricsPages {
    metrics: Metrics,
    /// Locked while a scrape reads: one at a time.
    observations: Arc<Mutex<Observations>>,
    published: watch::Receiver<Published>,
    contact: Option<Contact>,
    config: String,
}

impl MetricsPages {
    /// `config` is the JSON text of `/configz`.
    #[must_use]
    pub fn new(
        metrics: Metrics,
        observations: Observations,
        published: watch::Receiver<Published>,
        contact: Option<Contact>,
        config: String,
    ) -> Self {
        Self { metrics, observations: Arc::new(Mutex::new(observations)), published, contact, config }
    }

    async fn metrics(&self) -> Answer {
        let (metrics, observations) = (self.metrics.clone(), Arc::clone(&self.observations));
        let (published, contact) = (self.published.borrow().clone(), self.contact.clone());
        // Takes long for many service ports.
        let rendered = tokio::task::spawn_blocking(move || {
            let observations = observations.lock().unwrap_or_else(PoisonError::into_inner);
            let calls = |id| calls(&observations, id);
            let is_ejected = |id| observations.endpoint_health(id).ejected_until != 0;
            render(&metrics, &published, contact.as_ref(), Instant::now(), calls, is_ejected)
        });
        match rendered.await {
            Ok(Ok(text)) => answer(StatusCode::OK, OPEN_METRICS, text),
            _ => text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written\n"),
        }
    }
}

fn calls(observations: &Observations, service_id: u32) -> Calls {
    let stats = observations.service_stats(service_id);
    Calls {
        redirected: stats.connects,
        refused: stats.refusals,
        datagrams: stats.datagrams,
        times: observations.connect_latency(service_id).into(),
    }
}

impl Pages for MetricsPages {
    async fn get(&self, uri: &Uri) -> Option<Answer> {
        match uri.path() {
            "/metrics" => Some(self.metrics().await),
            "/proxyMode" => Some(text(StatusCode::OK, "socklb")),
            "/healthz" => Some(text(StatusCode::OK, "ok")),
            "/configz" => Some(json(true, self.config.clone())),
            _ => None,
        }
    }
}

/// `/healthz` and `/livez`
#[derive(Clone, Debug)]
pub struct HealthPages {
    /// The loop's heartbeat.
    pub vitals: watch::Receiver<Vitals>,
    /// Counts answers.
    pub metrics: Metrics,
}

impl Pages for HealthPages {
    async fn get(&self, uri: &Uri) -> Option<Answer> {
        let health = self.vitals.borrow().evaluate(Instant::now(), SystemTime::now());
        match uri.path() {
            "/healthz" => {
                self.metrics.answered_healthz(health.is_healthy());
                Some(json(health.is_healthy(), health.healthz()))
            }
            "/livez" => {
                self.metrics.answered_livez(health.is_alive);
                Some(json(health.is_alive, health.livez()))
            }
            _ => None,
        }
    }
}

/// `/healthz` and `/livez` of an agent that waits for another one to exit.
#[derive(Clone, Copy, Debug)]
pub struct WaitingPages;

impl Pages for WaitingPages {
    async fn get(&self, uri: &Uri) -> Option<Answer> {
        let is_ok = match uri.path() {
            "/healthz" => false,
            "/livez" => true,
            _ => return None,
        };
        Some(json(is_ok, health::waiting(SystemTime::now())))
    }
}

/// The pages of an agent once it has started. Until then the answer is that it is starting.
pub struct FromStart<P> {
    pages: Arc<OnceLock<Arc<P>>>,
    since: Instant,
}

impl<P> FromStart<P> {
    /// The agent starts now. Answers come from `pages` once these are set.
    #[must_use]
    pub fn new(pages: Arc<OnceLock<Arc<P>>>) -> Self {
        Self { pages, since: Instant::now() }
    }
}

impl<P: Pages> Pages for FromStart<P> {
    async fn get(&self, uri: &Uri) -> Option<Answer> {
        if let Some(pages) = self.pages.get() {
            return pages.get(uri).await;
        }
        // An agent that is stuck at start should be restarted.
        let is_alive = self.since.elapsed() < health::PATIENCE;
        Some(json(uri.path() == "/livez" && is_alive, health::starting(SystemTime::now())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_agent_that_waits_is_alive_and_not_ready() {
        for (path, status) in [("/healthz", 503), ("/livez", 200)] {
            assert_eq!(WaitingPages.get(&Uri::from_static(path)).await.unwrap().status(), status, "{path}");
        }
        assert!(WaitingPages.get(&Uri::from_static("/metrics")).await.is_none());
    }

    #[tokio::test]
    async fn health_pages_answer_by_the_vitals() {
        let now = Instant::now();
        // A host's clock may be too close to boot for this.
        let Some(long_ago) = now.checked_sub(2 * crate::telemetry::health::PATIENCE) else { return };
        let fresh = Vitals::new(now);
        for (vitals, healthz, livez) in [
            (fresh.clone(), 200, 200),
            (Vitals { is_node_eligible: false, ..fresh.clone() }, 503, 200),
            (Vitals { waiting_since: Some(long_ago), ..fresh }, 503, 503),
        ] {
            let (_sender, receiver) = watch::channel(vitals.clone());
            let pages = HealthPages { vitals: receiver, metrics: Metrics::new() };
            for (path, status) in [("/healthz", healthz), ("/livez", livez)] {
                let answer = pages.get(&Uri::from_static(path)).await.unwrap();
                assert_eq!(answer.status(), status, "{path} {vitals:?}");
                assert_eq!(answer.headers()["content-type"], "application/json");
                assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
            }
            assert!(pages.get(&Uri::from_static("/")).await.is_none());
        }
    }
}
