//! Rules as kube-proxy's nftables mode writes them (Kubernetes 1.36, `pkg/proxy/nftables/proxier.go`), for
//! IPv4 cluster IPs; compared with the table of a running kube-proxy. Up to 1.34 each endpoint had its own
//! chain, which takes longer to load and to traverse.
//!
//! The table, its base chains, sets and maps are included with all their look-ups, even the empty ones,
//! because each new connection traverses them. Chain names have the length of kube-proxy's.

use std::fmt::Write as _;

use super::town::{POD_NETWORK, PORT, Protocol, SERVICE_NETWORK, ServicePort, TARGET_PORT, Town};

const TABLE: &str = "ip kube-proxy";

pub(crate) fn base() -> String {
    let mut rules = format!("add table {TABLE} {{ comment \"rules for kube-proxy\" ; }}\n");
    let address = "ipv4_addr . inet_proto . inet_service : verdict";
    for (kind, name, of) in [
        ("set", "hairpin-connections", "ipv4_addr . ipv4_addr . inet_proto . inet_service"),
        ("set", "cluster-ips", "ipv4_addr"),
        ("set", "nodeport-ips", "ipv4_addr"),
        ("map", "firewall-ips", address),
        ("map", "no-endpoint-nodeports", "inet_proto . inet_service : verdict"),
        ("map", "no-endpoint-services", address),
        ("map", "service-ips", address),
        ("map", "service-nodeports", "inet_proto . inet_service : verdict"),
    ] {
        let _infallible = writeln!(rules, "add {kind} {TABLE} {name} {{ type {of} ; }}");
    }
    for chain in [
        "cluster-ips-check",
        "filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }",
        "filter-output-pre-dnat { type filter hook output priority -110 ; }",
        "filter-forward { type filter hook forward priority 0 ; }",
        "filter-input { type filter hook input priority 0 ; }",
        "filter-output { type filter hook output priority 0 ; }",
        "firewall-check",
        "masquerading",
        "nat-output { type nat hook output priority -100 ; }",
        "nat-postrouting { type nat hook postrouting priority 100 ; }",
        "nat-prerouting { type nat hook prerouting priority -100 ; }",
        "nodeport-endpoints-check",
        "reject-chain",
        "services",
        "service-endpoints-check",
    ] {
        let _infallible = writeln!(rules, "add chain {TABLE} {chain}");
    }
    let drop_unallocated = format!("cluster-ips-check ip daddr {{ {SERVICE_NETWORK} }} drop");
    let from_outside =
        format!("services ip daddr @cluster-ips ip saddr != {POD_NETWORK} meta mark set meta mark or 0x4000");
    for rule in [
        "cluster-ips-check ip daddr @cluster-ips reject",
        &drop_unallocated,
        "filter-prerouting-pre-dnat ct state new jump firewall-check",
        "filter-forward ct state new jump service-endpoints-check",
        "filter-forward ct state new jump cluster-ips-check",
        "filter-input ct state new jump nodeport-endpoints-check",
        "filter-input ct state new jump service-endpoints-check",
        "filter-output ct state new jump service-endpoints-check",
        "filter-output-pre-dnat ct state new jump firewall-check",
        "filter-output ct state new jump cluster-ips-check",
        "firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips",
        "masquerading meta mark and 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random",
        "masquerading ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random",
        "nat-output jump services",
        "nat-postrouting jump masquerading",
        "nat-prerouting jump services",
        "nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports",
        "reject-chain reject",
        &from_outside,
        "services ip daddr . meta l4proto . th dport vmap @service-ips",
        "services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports",
        "service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services",
    ] {
        let _infallible = writeln!(rules, "add rule {TABLE} {rule}");
    }
    rules
}

/// The distinguishing part of a chain's name: eight characters for a number.
fn hash(number: u32) -> String {
    let mut state = u64::from(number);
    (0..8)
        .map(|_| char::from(b'A' + u8::try_from(super::super::random::below(&mut state, 26)).unwrap_or(0)))
        .collect()
}

fn service_chain(ServicePort { service, protocol }: ServicePort) -> String {
    let name = protocol.name();
    format!("service-{}-shop/service-{service:05}/{name}/http", hash(service))
}

/// One service port with some endpoints of its service.
fn port(rules: &mut String, town: Town, port: ServicePort, endpoints: &[u32]) {
    let (chain, ip, name) = (service_chain(port), Town::service(port.service), port.protocol.name());
    let _infallible = writeln!(rules, "add chain {TABLE} {chain}");
    if port.protocol == Protocol::Tcp {
        let _infallible = writeln!(rules, "add element {TABLE} cluster-ips {{ {ip} }}");
    }
    let _infallible =
        writeln!(rules, "add element {TABLE} service-ips {{ {ip} . {name} . {PORT} : goto {chain} }}");
    choice(rules, town, port, endpoints);
}

fn choice(rules: &mut String, town: Town, port: ServicePort, endpoints: &[u32]) {
    let (chain, name) = (service_chain(port), port.protocol.name());
    let choices: Vec<String> = endpoints
        .iter()
        .enumerate()
        .map(|(index, &endpoint)| {
            format!("{index} : {} . {TARGET_PORT}", town.endpoint(port.service, endpoint))
        })
        .collect();
    let _infallible = writeln!(
        rules,
        "add rule {TABLE} {chain} meta l4proto {name} dnat ip addr . port to numgen random mod {} map {{ {} }}",
        choices.len(),
        choices.join(" , ")
    );
}

/// All services, as one text for each transaction.
///
/// Each rule with `numgen` has an anonymous set, and for each of them the kernel iterates over all sets of
/// the transaction. One transaction with everything takes much longer than smaller ones, which therefore
/// favour nftables.
pub(crate) fn services(town: Town, n_in_transaction: usize) -> Vec<String> {
    let endpoints: Vec<u32> = (0..town.n_endpoints).collect();
    let ports: Vec<ServicePort> = town.ports().collect();
    ports
        .chunks(n_in_transaction.max(1))
        .map(|ports| {
            let mut rules = String::new();
            for &of in ports {
                port(&mut rules, town, of, &endpoints);
            }
            rules
        })
        .collect()
}

/// Replaces one endpoint of a service, or restores it with `is_back`.
pub(crate) fn change(town: Town, service: u32, is_back: bool) -> String {
    let port = ServicePort { service, protocol: Protocol::Tcp };
    let new = if is_back { 0 } else { town.n_endpoints };
    let endpoints: Vec<u32> = std::iter::once(new).chain(1..town.n_endpoints).collect();
    let mut rules = format!("flush chain {TABLE} {}\n", service_chain(port));
    choice(&mut rules, town, port, &endpoints);
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_service_with_two_endpoints() {
        let town = Town { n_services: 2, n_endpoints: 2 };
        let rules = services(town, 1).swap_remove(2);
        let chain = service_chain(ServicePort { service: 1, protocol: Protocol::Tcp });
        let expected = format!(
            "add chain ip kube-proxy {chain}
add element ip kube-proxy cluster-ips {{ 10.96.0.2 }}
add element ip kube-proxy service-ips {{ 10.96.0.2 . tcp . 80 : goto {chain} }}
add rule ip kube-proxy {chain} meta l4proto tcp dnat ip addr . port to numgen random mod 2 map {{ 0 : 10.128.0.3 . 8080 , 1 : 10.128.0.4 . 8080 }}
"
        );
        assert_eq!(rules, expected);
    }

    #[test]
    fn names_fit() {
        // The kernel's limit is 127 characters.
        let town = Town { n_services: 30_000, n_endpoints: 10 };
        let all: std::collections::BTreeSet<_> = town.ports().map(service_chain).collect();
        assert!(all.iter().all(|chain| chain.len() < 128));
        assert_eq!(all.len(), town.ports().count());
    }

    #[test]
    fn transactions_hold_everything_once() {
        let town = Town { n_services: 100, n_endpoints: 3 };
        let whole = services(town, usize::MAX);
        assert_eq!(whole.len(), 1);
        for n in [1, 7, 50] {
            let parts = services(town, n);
            assert_eq!(parts.len(), town.ports().count().div_ceil(n));
            assert_eq!(parts.concat(), whole[0]);
        }
    }

    #[test]
    fn a_change_and_back_leave_the_same_rule() {
        let town = Town { n_services: 4, n_endpoints: 2 };
        let rule = |text: &str| text.lines().last().unwrap().to_owned();
        let (there, back) = (change(town, 1, false), change(town, 1, true));
        let first = services(town, usize::MAX).swap_remove(0);
        assert!(first.contains(&rule(&back)) && !first.contains(&rule(&there)), "{there}{back}");
    }
}
