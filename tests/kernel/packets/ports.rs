//! Source ports of masqueraded packets.

use lb_core::{
    desired::Settings,
    model::Protocol::{Tcp, Udp},
};
use lb_tests::{
    Feature,
    bed::{Bed, FAMILIES, Outcome, PATIENCE},
    require,
};
use serde_json::json;

use super::{Place, To, cluster};

/// The hooks would take an answer to a node port for a call of its Service. All ports but one are node ports
/// here.
#[test]
fn answers_to_masqueraded_datagrams_go_to_no_node_port() {
    if !require(Feature::Nftables) {
        return;
    }
    let mut bed = Bed::with_settings(Settings { node_ports: 1024..=65534, ..Bed::settings() });
    bed.follow(&cluster(&json!({}), &[Place::Pod, Place::Far]));
    for family in FAMILIES {
        let calls = |protocol, n| -> Vec<u16> {
            let call =
                |_| match bed.call(Place::Outside, To::LoadBalancer.address(family), protocol, PATIENCE) {
                    Outcome::Reached { client, .. } => client.port(),
                    other => panic!("{family:?}, {protocol}: {other:?}"),
                };
            (0..n).map(call).collect()
        };
        // One flow for each endpoint: there is one port for all that last.
        assert_eq!(calls(Udp, 1), [65535]);
        assert_ne!(calls(Tcp, 2), [65535; 2]);
    }
}
