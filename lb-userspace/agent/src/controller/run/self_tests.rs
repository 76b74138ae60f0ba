//! Schedules the self-test and logs its results.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use lb_core::{
    desired::FrontendAddress,
    model::{Family, Protocol, address},
    tables::Image,
};
use tokio::{
    task::{JoinError, JoinHandle},
    time::{Instant, sleep_until},
};
use tracing::{debug, error, info, warn};

use crate::{
    self_test::{self, Caller, Echo, Outcome},
    telemetry::health::SelfTest,
};

/// Time from a failed test to the next, if shorter than the interval: a repair should show soon.
const RETRY: Duration = Duration::from_secs(5);

/// The endpoint of the self-test's service in a family, if the tables hold exactly one, for TCP and UDP.
fn endpoint(found: &Image, family: Family) -> Option<SocketAddr> {
    let service = self_test::service_address(family);
    let leads_to = |protocol| {
        let key = FrontendAddress { ip: service.ip(), port: service.port(), protocol };
        let frontend = found.frontends.get(found.services.get(&key)?)?;
        match found.entries(service.is_ipv6(), frontend.run)? {
            [only] => Some(only.address()),
            _ => None,
        }
    };
    // Checked because others may have written the tables: this agent listens on loopback addresses only.
    leads_to(Protocol::Tcp).filter(|tcp| tcp.ip().is_loopback() && leads_to(Protocol::Udp) == Some(*tcp))
}

pub(super) struct SelfTests {
    interval: Duration,
    cgroup: PathBuf,
    echo: Echo,
    due: Instant,
    task: Option<JoinHandle<Outcome>>,
    /// The last outcome logged.
    told: Option<Outcome>,
    is_found: bool,
}

impl SelfTests {
    /// Starts the endpoints; `None` if the interval is zero. The first test is due at once.
    ///
    /// # Errors
    ///
    /// If the endpoints cannot listen.
    pub(super) async fn start(interval: Duration, cgroup: PathBuf) -> std::io::Result<Option<Self>> {
        if interval.is_zero() {
            return Ok(None);
        }
        let echo = Echo::start().await?;
        Ok(Some(Self {
            interval,
            cgroup,
            echo,
            due: Instant::now(),
            task: None,
            told: None,
            is_found: false,
        }))
    }

    pub(super) fn endpoints(&self) -> &[SocketAddr] {
        self.echo.addresses()
    }

    /// Moves the endpoints to the addresses of an earlier agent's, if its tables lead there. So the self-test
    /// passes while the source is unreachable, without a write.
    pub(super) fn take_over(&mut self, found: &Image) {
        let addresses = self.echo.addresses().iter();
        let wanted: Option<Vec<SocketAddr>> =
            addresses.map(|address| endpoint(found, address::family(address.ip()))).collect();
        self.is_found = wanted.is_some_and(|wanted| match self.echo.move_to(&wanted) {
            Ok(()) => true,
            Err(error) => {
                debug!(%error, "the addresses of the earlier agent's self-test are in use");
                false
            }
        });
    }

    /// Whether the adopted tables lead to the endpoints, so that a test need not wait for a sync.
    pub(super) const fn is_found(&self) -> bool {
        self.is_found
    }

    /// Waits for the next test's result. Cancel safe.
    pub(super) async fn next(&mut self) -> SelfTest {
        if self.task.is_none() {
            sleep_until(self.due).await;
        }
        let (cgroup, has_ipv6) = (self.cgroup.clone(), self.echo.addresses().iter().any(SocketAddr::is_ipv6));
        let task = self
            .task
            .get_or_insert_with(|| tokio::spawn(async move { self_test::run(&cgroup, has_ipv6).await }));
        let outcome = task.await;
        self.task = None;
        self.record_outcome(outcome)
    }

    /// Logs an outcome that differs from the last one, and schedules the next test.
    fn record_outcome(&mut self, outcome: Result<Outcome, JoinError>) -> SelfTest {
        let outcome = outcome.unwrap_or_else(|stopped| Outcome {
            caller: Caller::FreshCgroup,
            problems: vec![stopped.to_string()],
        });
        let has_passed = outcome.problems.is_empty();
        self.due = Instant::now() + if has_passed { self.interval } else { self.interval.min(RETRY) };
        if self.told.as_ref() != Some(&outcome) {
            if let Caller::OwnCgroup(why) = &outcome.caller
                && self.told.as_ref().is_none_or(|told| told.caller != outcome.caller)
            {
                warn!(%why, cgroup = %self.cgroup.display(), "the self-test calls from the agent's own cgroup: it cannot create one below the served cgroup");
            }
            if has_passed {
                info!("self-test passed: calls of a service reach its endpoint");
            }
            for problem in &outcome.problems {
                error!(%problem, "the self-test failed: calls of services do not all work");
            }
            self.told = Some(outcome.clone());
        }
        if has_passed { SelfTest::Passed } else { SelfTest::Failed(outcome.problems.join("; ").into()) }
    }
}
