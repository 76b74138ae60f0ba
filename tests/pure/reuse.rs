//! What is freed is not reused while a program may still read it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use lb_core::{
    desired::{Frontend, FrontendAddress, FrontendKind, PortKey},
    model::{Balance, Protocol, ServiceKey, TrafficPolicy},
    plan::{Capacity, Encoder, Plan, StillRead},
};
use proptest::{collection::vec, prelude::*, sample::subsequence};

/// One change: the number of an address, and the service that has it, with its endpoints.
type Step = (u8, Option<(u8, Vec<u8>)>);

fn step() -> impl Strategy<Value = Step> {
    let endpoints = prop_oneof![1 => Just(Vec::new()), 1 => subsequence(vec![1u8, 2, 3], 1..=2)];
    (0u8..3, prop::option::weighted(0.7, (0u8..3, endpoints)))
}

fn frontend(address: FrontendAddress, service: u8, endpoints: &[u8]) -> Frontend {
    let endpoints = endpoints.iter().map(|last| SocketAddr::from(([10, 244, service, *last], 8080)));
    Frontend {
        address,
        kind: FrontendKind::ClusterIP,
        policy: TrafficPolicy::Cluster,
        flags: 0,
        health: 0,
        affinity_seconds: 0,
        created: None,
        port: Arc::new(PortKey {
            service: ServiceKey { namespace: "default".into(), name: format!("service-{service}").into() },
            port_name: "".into(),
            protocol: Protocol::Tcp,
            ipv6: false,
        }),
        endpoints: endpoints.collect(),
        balance: Balance::Random,
        shares: None,
        packets: None,
        spill: Arc::default(),
    }
}

/// The meaning of each id and position.
type Meanings = BTreeSet<(&'static str, u32, String)>;

fn meanings(encoder: &Encoder) -> Meanings {
    let image = encoder.image();
    let services = encoder.service_ids().iter().map(|(port, id)| ("service", *id, format!("{port:?}")));
    let frontends = image.services.iter().map(|(address, id)| ("frontend", *id, address.to_string()));
    // An entry has its endpoint's id, which belongs to one service port; their addresses differ here.
    let entries = image.runs4.iter().flat_map(|(offset, run)| {
        (*offset..).zip(run.entries()).flat_map(|(index, entry)| {
            [
                ("entry", index, format!("{entry:?}")),
                ("endpoint", entry.endpoint_id, entry.address().to_string()),
            ]
        })
    });
    services.chain(frontends).chain(entries).collect()
}

/// What happens after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Nothing,
    Grace,
    /// The agent stops, and another one adopts the maps.
    Restart,
}

const CAPACITY: Capacity = Capacity { services: 4, endpoints: 16 };

struct Model {
    encoder: Encoder,
    desired: BTreeMap<FrontendAddress, Option<Frontend>>,
    unsettled: StillRead,
    /// What a call may have read that began after the last grace period.
    seen: Meanings,
}

impl Model {
    fn sync(&mut self) -> Result<Plan, TestCaseError> {
        let before = meanings(&self.encoder);
        for (address, frontend) in &self.desired {
            let _full = self.encoder.set(*address, frontend.as_ref());
        }
        let plan = self.encoder.take_plan();
        if self.unsettled.must_wait(&plan) {
            (self.unsettled, self.seen) = (StillRead::Nothing, before);
        }
        self.seen.extend(meanings(&self.encoder));
        let mut first = BTreeMap::new();
        for (kind, id, meaning) in &self.seen {
            let first = first.entry((kind, id)).or_insert(meaning);
            prop_assert_eq!(*first, meaning, "{} {}", kind, id);
        }
        if plan.frees() && self.unsettled == StillRead::Nothing {
            self.unsettled = StillRead::Elements;
        }
        Ok(plan)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Between two grace periods each id and each position has one meaning: a call that read the old one
    /// would get the other.
    #[test]
    fn nothing_is_given_out_twice_between_two_grace_periods(
        steps in vec((step(), prop::sample::select(&[After::Nothing, After::Grace, After::Restart][..])), 1..12),
    ) {
        let mut model = Model {
            encoder: Encoder::new(CAPACITY),
            desired: BTreeMap::new(),
            unsettled: StillRead::Anything,
            seen: Meanings::new(),
        };
        for ((address, wanted), after) in steps {
            let ip = IpAddr::from([10, 96, 0, address]);
            let address = FrontendAddress { ip, port: 80, protocol: Protocol::Tcp };
            let wanted = wanted.map(|(service, endpoints)| frontend(address, service, &endpoints));
            model.desired.insert(address, wanted);
            let plan = model.sync()?;
            match after {
                After::Grace => {
                    model.encoder.settled(plan.number());
                    (model.unsettled, model.seen) = (StillRead::Nothing, meanings(&model.encoder));
                }
                After::Restart => {
                    model.encoder = Encoder::adopt(CAPACITY, model.encoder.image());
                    model.unsettled = StillRead::Anything;
                    // After a restart an id belongs to the current service of its address: the maps have no
                    // names.
                    let _plan = model.sync()?;
                }
                // A plan that frees nothing needs no grace period.
                After::Nothing if !model.encoder.holds_back() => model.encoder.settled(plan.number()),
                After::Nothing => {}
            }
        }
    }
}
