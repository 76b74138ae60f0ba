//! Rules as kube-proxy's iptables mode writes them (Kubernetes 1.36, `pkg/proxy/iptables/proxier.go`), for
//! IPv4 cluster IPs, as input of `iptables-restore --noflush`; compared with the tables of a running
//! kube-proxy. Omitted are the canary chains that detect a flush, one rule against martian loopback packets,
//! and a counter of dropped packets.
//!
//! The chains of table `filter` are included, although they are empty for services with endpoints: new
//! connections traverse them.

use std::fmt::Write as _;

use super::town::{POD_NETWORK, PORT, ServicePort, TARGET_PORT, Town};

/// The last sixteen characters of kube-proxy's chain names.
fn hash(number: u64) -> String {
    const DIGITS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut state = number;
    (0..16).map(|_| char::from(DIGITS[super::super::random::below(&mut state, 32) as usize])).collect()
}

fn number(ServicePort { service, protocol }: ServicePort, endpoint: u32) -> u64 {
    u64::from(service) | u64::from(endpoint) << 32 | (protocol as u64) << 56
}

fn service_chain(port: ServicePort) -> String {
    format!("KUBE-SVC-{}", hash(number(port, u32::MAX >> 8)))
}

fn endpoint_chain(port: ServicePort, endpoint: u32) -> String {
    format!("KUBE-SEP-{}", hash(number(port, endpoint)))
}

/// The rules before those of services. `is_first` adds the jumps from the built-in chains, which kube-proxy
/// makes once.
fn head(rules: &mut String, is_first: bool) {
    rules.push_str(
        "*filter\n:KUBE-SERVICES - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-FORWARD - [0:0]\n\
         :KUBE-NODEPORTS - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n",
    );
    if is_first {
        for (chain, comment, state, target) in [
            ("INPUT", "kubernetes load balancer firewall", true, "KUBE-PROXY-FIREWALL"),
            ("INPUT", "kubernetes health check service ports", false, "KUBE-NODEPORTS"),
            ("INPUT", "kubernetes externally-visible service portals", true, "KUBE-EXTERNAL-SERVICES"),
            ("FORWARD", "kubernetes load balancer firewall", true, "KUBE-PROXY-FIREWALL"),
            ("FORWARD", "kubernetes forwarding rules", false, "KUBE-FORWARD"),
            ("FORWARD", "kubernetes service portals", true, "KUBE-SERVICES"),
            ("FORWARD", "kubernetes externally-visible service portals", true, "KUBE-EXTERNAL-SERVICES"),
            ("OUTPUT", "kubernetes load balancer firewall", true, "KUBE-PROXY-FIREWALL"),
            ("OUTPUT", "kubernetes service portals", true, "KUBE-SERVICES"),
        ] {
            let state = if state { "-m conntrack --ctstate NEW " } else { "" };
            let _infallible =
                writeln!(rules, "-A {chain} {state}-m comment --comment \"{comment}\" -j {target}");
        }
    }
    rules.push_str(
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate \
         RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
         :KUBE-MARK-MASQ - [0:0]\n",
    );
    if is_first {
        rules.push_str(
            "-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n",
        );
    }
    rules.push_str(
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n",
    );
}

/// The rule of a service port in `KUBE-SERVICES`, which every new connection traverses from the top.
fn portal(rules: &mut String, port: ServicePort) {
    let (name, ip, service) = (port.protocol.name(), Town::service(port.service), port.service);
    let _infallible = writeln!(
        rules,
        "-A KUBE-SERVICES -m comment --comment \"shop/service-{service:05}:http cluster IP\" -m {name} -p {name} -d {ip} \
         --dport {PORT} -j {}",
        service_chain(port)
    );
}

fn tail(rules: &mut String) {
    rules.push_str(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this \
         chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n",
    );
}

/// The chains of a service port and of its endpoints.
fn chains(declarations: &mut String, rules: &mut String, town: Town, port: ServicePort, endpoints: &[u32]) {
    let (name, ip, service) = (port.protocol.name(), Town::service(port.service), port.service);
    let chain = service_chain(port);
    let _infallible = writeln!(declarations, ":{chain} - [0:0]");
    let _infallible = writeln!(
        rules,
        "-A {chain} -m comment --comment \"shop/service-{service:05}:http cluster IP\" -m {name} -p {name} -d {ip} --dport \
         {PORT} ! -s {POD_NETWORK} -j KUBE-MARK-MASQ"
    );
    for (index, &endpoint) in endpoints.iter().enumerate() {
        let (target, ip) = (endpoint_chain(port, endpoint), town.endpoint(service, endpoint));
        let n_left = endpoints.len() - index;
        let chance = match n_left {
            1 => String::new(),
            _ => format!(
                "-m statistic --mode random --probability {:.10} ",
                1.0 / super::super::quantile::real(n_left as u64)
            ),
        };
        let _infallible = writeln!(declarations, ":{target} - [0:0]");
        let _infallible = write!(
            rules,
            "-A {chain} -m comment --comment \"shop/service-{service:05}:http -> {ip}:{TARGET_PORT}\" {chance}-j {target}\n\
             -A {target} -m comment --comment shop/service-{service:05}:http -s {ip} -j KUBE-MARK-MASQ\n\
             -A {target} -m comment --comment shop/service-{service:05}:http -m {name} -p {name} -j DNAT --to-destination \
             {ip}:{TARGET_PORT}\n"
        );
    }
}

pub(crate) fn services(town: Town) -> String {
    let endpoints: Vec<u32> = (0..town.n_endpoints).collect();
    let (mut text, mut rules) = (String::new(), String::new());
    head(&mut text, true);
    // Chains are declared before the first rule that jumps to them; the head ends inside table `nat`.
    for port in town.ports() {
        chains(&mut text, &mut rules, town, port, &endpoints);
    }
    for port in town.ports() {
        portal(&mut rules, port);
    }
    text.push_str(&rules);
    tail(&mut text);
    text
}

/// Replaces one endpoint of a service, or restores it with `is_back`, as kube-proxy's partial sync does:
/// `KUBE-SERVICES` is rewritten with a line for every service, of the other chains only those that change.
pub(crate) fn change(town: Town, service: u32, is_back: bool) -> String {
    let port = ServicePort { service, protocol: super::town::Protocol::Tcp };
    let spare = town.n_endpoints;
    let (old, new) = if is_back { (spare, 0) } else { (0, spare) };
    let endpoints: Vec<u32> = std::iter::once(new).chain(1..town.n_endpoints).collect();
    let (mut text, mut rules) = (String::new(), String::new());
    head(&mut text, false);
    let old = endpoint_chain(port, old);
    let _infallible = writeln!(text, ":{old} - [0:0]");
    chains(&mut text, &mut rules, town, port, &endpoints);
    for port in town.ports() {
        portal(&mut rules, port);
    }
    let _infallible = writeln!(rules, "-X {old}");
    text.push_str(&rules);
    tail(&mut text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::town::Protocol;

    #[test]
    fn one_service_with_two_endpoints() {
        let town = Town { n_services: 1, n_endpoints: 2 };
        let port = ServicePort { service: 0, protocol: Protocol::Udp };
        let (mut declarations, mut rules) = (String::new(), String::new());
        chains(&mut declarations, &mut rules, town, port, &[0, 1]);
        portal(&mut rules, port);
        let (service, first, second) =
            (service_chain(port), endpoint_chain(port, 0), endpoint_chain(port, 1));
        assert_eq!(declarations, format!(":{service} - [0:0]\n:{first} - [0:0]\n:{second} - [0:0]\n"));
        let named = "-m comment --comment \"shop/service-00000:http";
        let plain = "-m comment --comment shop/service-00000:http";
        let expected = format!(
            "-A {service} {named} cluster IP\" -m udp -p udp -d 10.96.0.1 --dport 80 ! -s 10.128.0.0/9 -j KUBE-MARK-MASQ
-A {service} {named} -> 10.128.0.1:8080\" -m statistic --mode random --probability 0.5000000000 -j {first}
-A {first} {plain} -s 10.128.0.1 -j KUBE-MARK-MASQ
-A {first} {plain} -m udp -p udp -j DNAT --to-destination 10.128.0.1:8080
-A {service} {named} -> 10.128.0.2:8080\" -j {second}
-A {second} {plain} -s 10.128.0.2 -j KUBE-MARK-MASQ
-A {second} {plain} -m udp -p udp -j DNAT --to-destination 10.128.0.2:8080
-A KUBE-SERVICES {named} cluster IP\" -m udp -p udp -d 10.96.0.1 --dport 80 -j {service}
"
        );
        assert_eq!(rules, expected);
    }

    #[test]
    fn chains_are_declared_before_rules_and_differ() {
        let town = Town { n_services: 40, n_endpoints: 3 };
        let text = services(town);
        let nat = text.split_once("*nat\n").unwrap().1;
        let mut declared = std::collections::BTreeSet::from(["KUBE-SERVICES", "KUBE-NODEPORTS"]);
        for line in nat.lines() {
            if let Some(chain) = line.strip_prefix(':') {
                declared.insert(chain.split(' ').next().unwrap());
            } else if let Some((_, target)) = line.rsplit_once("-j KUBE-S") {
                assert!(declared.contains(format!("KUBE-S{target}").as_str()), "{line}");
            }
        }
        let n = declared.iter().filter(|chain| chain.starts_with("KUBE-S") && chain.len() == 25).count();
        assert_eq!(n, town.ports().count() * 4);
    }

    #[test]
    fn names_are_as_long_as_kube_proxys() {
        // "KUBE-SVC-" and 16 characters, below the kernel's limit of 28.
        let port = ServicePort { service: 1, protocol: Protocol::Tcp };
        assert_eq!((service_chain(port).len(), endpoint_chain(port, 2).len()), (25, 25));
    }

    #[test]
    fn a_change_rewrites_all_portals_and_few_chains() {
        let town = Town { n_services: 40, n_endpoints: 3 };
        for is_back in [false, true] {
            let text = change(town, 5, is_back);
            assert_eq!(text.lines().filter(|line| line.starts_with("-A KUBE-SERVICES")).count(), 44);
            assert_eq!(text.lines().filter(|line| line.starts_with(":KUBE-SEP")).count(), 4);
            assert_eq!(text.lines().filter(|line| line.starts_with("-X")).count(), 1);
        }
    }
}
