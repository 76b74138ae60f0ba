//! Connection tracking: flows to endpoints that are gone are found and deleted.

use std::collections::BTreeSet;

use lb_core::{
    model::Protocol::{Sctp, Tcp, Udp},
    packets::{
        conntrack::is_stale,
        nft::{Change, Family, Transaction},
    },
};
use lb_kernel::{conntrack::Conntrack, nftables::Nftables};
use lb_tests::{
    Feature, Sandbox,
    client::{Domain, Socket},
    server::Servers,
};

use crate::nftables::{endpoint_element, endpoints, load, service, service_address};

#[test]
fn a_flow_to_a_gone_endpoint_is_translated_anew_once_its_entry_is_deleted() {
    const NUMBER: u8 = 17;
    Sandbox::test_with(&[Feature::Nftables], |sandbox| {
        for family in [Family::V4, Family::V6] {
            let (address, endpoints) = (service_address(family), endpoints(family));
            sandbox.own([address.ip()].into_iter().chain(endpoints.map(|endpoint| endpoint.ip())));
            let _servers = Servers::udp(endpoints);
            let (id, table) = service(family, NUMBER, &endpoints[..2]);
            let mut nftables = Nftables::open().unwrap();
            nftables.apply(&load(&id, &table)).unwrap();

            let domain = Domain::of(address.ip());
            let sockets: Vec<Socket> = (0..20).map(|_| Socket::new(domain, Udp)).collect();
            let ask_all = || -> Vec<_> {
                sockets
                    .iter()
                    .map(|socket| {
                        socket.connect(address).unwrap();
                        socket.ask().unwrap().server
                    })
                    .collect()
            };
            let before = ask_all();
            assert_eq!(
                before.iter().copied().collect::<BTreeSet<_>>(),
                endpoints[..2].iter().copied().collect()
            );
            let changes = [
                Change::DeleteElements("endpoints".into(), vec![endpoint_element(NUMBER, 0, endpoints[0]).0]),
                Change::AddElements("endpoints".into(), vec![endpoint_element(NUMBER, 0, endpoints[2])]),
            ];
            let changes = changes.into_iter().map(|change| (id.clone(), change)).collect();
            nftables.apply(&Transaction { changes, generation: None }).unwrap();
            // The kernel goes on as it began.
            assert_eq!(ask_all(), before);

            let mut conntrack = Conntrack::open().unwrap();
            let entries = conntrack.entries(family, Udp).unwrap();
            let (stale, current): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| {
                is_stale(entry, |_, to, from| (to == address).then(|| endpoints[1..].contains(&from)))
            });
            let n_stale = before.iter().filter(|server| **server == endpoints[0]).count();
            assert_eq!((stale.len(), current.len()), (n_stale, before.len() - n_stale));
            assert!(stale.iter().all(|entry| entry.reply_source == endpoints[0]));
            // Another protocol's entries are not listed, and TCP's cannot be.
            assert_eq!(conntrack.entries(family, Sctp).unwrap(), []);
            assert!(conntrack.entries(family, Tcp).is_err());

            for entry in &stale {
                let mut other = entry.clone();
                other.id = !entry.id;
                assert!(!conntrack.delete(&other).unwrap(), "it is another flow's");
                assert!(conntrack.delete(entry).unwrap());
                assert!(!conntrack.delete(entry).unwrap(), "it is gone");
            }
            for (server, earlier) in ask_all().into_iter().zip(before) {
                assert!(endpoints[1..].contains(&server), "{server}");
                assert!(earlier == endpoints[0] || server == earlier, "{server} instead of {earlier}");
            }
        }
    });
}
