//! Scenarios on an image in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::{Result, ensure};
use lb_core::{
    desired::{FrontendAddress, Settings},
    plan::Capacity,
    sim::{self, Caller, Config, Simulator},
    state::State,
    tables::Image,
};

use super::{Executor, NODE, Outcome, Scenario};
use crate::cluster::Cluster;

/// An agent whose kernel is an image.
#[derive(Debug)]
pub struct Simulated {
    state: State,
    simulator: Simulator,
    now: u64,
    /// Cookies of the callers' network namespaces.
    cookies: BTreeMap<String, u64>,
    settings: Settings,
    interfaces: Vec<IpAddr>,
}

impl Simulated {
    /// An agent with the settings of a scenario.
    ///
    /// # Errors
    ///
    /// If they cannot be parsed.
    pub fn new(scenario: &Scenario) -> Result<Self> {
        let mut simulator = Simulator::new(Image::default());
        simulator.config = Config {
            node_ports: scenario.settings.node_ports()?,
            localhost_nodeports: scenario.settings.localhost_nodeports,
        };
        let (settings, interfaces) = (scenario.settings.desired()?, scenario.settings.interfaces.clone());
        let state = State::new(settings.clone(), interfaces.clone(), Capacity::default(), &simulator.image);
        Ok(Self { state, simulator, now: 0, cookies: BTreeMap::new(), settings, interfaces })
    }
}

impl Executor for Simulated {
    fn follow(&mut self, cluster: &Cluster) -> Result<()> {
        cluster.feed(&mut self.state);
        // Also completes what waits for a grace period.
        while self.state.needs_sync() {
            let plan = self.state.sync();
            plan.apply(&mut self.simulator.image);
            ensure!(self.simulator.image == *self.state.image(), "the plan does not lead to the image");
            self.state.settled(plan.number());
        }
        let (settings, interfaces) = (self.settings.clone(), self.interfaces.clone());
        let mut restarted = State::new(settings, interfaces, Capacity::default(), &self.simulator.image);
        cluster.feed(&mut restarted);
        let plan = restarted.sync();
        ensure!(plan.is_empty(), "a restarted agent would change something: {plan:?}");
        Ok(())
    }

    fn call(&mut self, caller: &str, to: FrontendAddress, n: usize) -> Result<BTreeSet<Outcome>> {
        let n_known = u64::try_from(self.cookies.len())?;
        let netns = *self.cookies.entry(caller.to_owned()).or_insert(n_known + 1);
        let caller = Caller { netns, on_node: caller == NODE, earlier: None };
        // Numbers across the whole range, more of them than endpoints.
        let step = u32::MAX / u32::try_from(8 * n)?;
        let randoms = (0..=8 * n).map(|i| u32::try_from(i).unwrap_or_default().saturating_mul(step));
        Ok(randoms
            .map(|random| match self.simulator.call(to, caller, random, self.now) {
                sim::Outcome::Untouched => Outcome::Untouched,
                sim::Outcome::Refused => Outcome::Refused,
                sim::Outcome::Unreachable => Outcome::Unreachable,
                sim::Outcome::Endpoint(address, _) => Outcome::Endpoint(address),
            })
            .collect())
    }

    fn wait(&mut self, seconds: u64) {
        self.now += seconds;
    }
}
