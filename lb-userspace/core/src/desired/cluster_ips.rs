//! The cluster IPs, which decide about calls to undefined ports and to unallocated addresses.
//!
//! # Purpose
//!
//! Within the service networks, kube-proxy's nftables mode rejects the former and drops the latter
//! (`cluster-ips-check`). [`ClusterIps`] keeps the addresses of Services in these networks; without a network
//! it keeps none.
//!
//! # Invariants
//!
//! - Calls to an address pass unchanged if any of its Services is not served, or if an interface of the node
//!   has it.
//! - The result depends only on the objects, not on their order.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::limits::MAX_SERVICE_CIDRS;

use crate::model::{Cidr, Family, Service, ServiceKey, address::outermost};

/// The cluster IPs of all Services.
#[derive(Debug, Default)]
pub struct ClusterIps {
    networks: Vec<Cidr>,
    /// The addresses of each Service, and whether it is served.
    of_service: BTreeMap<ServiceKey, (Box<[IpAddr]>, bool)>,
    /// By address: how many of its Services are served, and how many are not.
    claims: BTreeMap<IpAddr, Claims>,
    /// Addresses of the node's interfaces.
    local: BTreeSet<IpAddr>,
}

#[derive(Debug, Default)]
struct Claims {
    n_served: u32,
    n_unserved: u32,
}

impl ClusterIps {
    /// The service networks.
    #[must_use]
    pub fn networks(&self) -> &[Cidr] {
        &self.networks
    }

    /// Sets the networks, as returned by [`merged`]. If they differ from the former ones, all Services are
    /// removed and must be set again.
    pub fn set_networks(&mut self, networks: Vec<Cidr>) {
        if self.networks != networks {
            *self = Self { networks, ..Self::default() };
        }
    }

    /// Sets the addresses of the node's interfaces. Returns the addresses that this may affect.
    pub fn set_local(&mut self, interfaces: &[IpAddr]) -> BTreeSet<IpAddr> {
        let local = interfaces.iter().copied().filter(|ip| self.is_in_network(*ip)).collect();
        let former = std::mem::replace(&mut self.local, local);
        former.symmetric_difference(&self.local).copied().collect()
    }

    /// Sets or removes a Service. Returns the addresses that this may affect.
    pub fn set(&mut self, key: &ServiceKey, service: Option<&Service>) -> BTreeSet<IpAddr> {
        let families = [Family::V4, Family::V6].into_iter();
        let ips = families.filter_map(|family| service?.cluster_ip(family));
        let ips: Box<[IpAddr]> = ips.filter(|ip| self.is_in_network(*ip)).collect();
        let is_served = service.is_some_and(Service::is_served);
        let new = (!ips.is_empty()).then_some((ips, is_served));
        if self.of_service.get(key) == new.as_ref() {
            return BTreeSet::new();
        }
        let mut touched = BTreeSet::new();
        if let Some((ips, was_served)) = self.of_service.remove(key) {
            for ip in ips {
                touched.insert(ip);
                let Some(claims) = self.claims.get_mut(&ip) else { continue };
                *claims.number(was_served) -= 1;
                if claims.n_served + claims.n_unserved == 0 {
                    self.claims.remove(&ip);
                }
            }
        }
        if let Some((ips, is_served)) = new {
            for ip in &ips {
                touched.insert(*ip);
                *self.claims.entry(*ip).or_default().number(is_served) += 1;
            }
            self.of_service.insert(key.clone(), (ips, is_served));
        }
        touched
    }

    /// All addresses with a [`Self::flag`].
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.claims.keys().chain(&self.local).copied()
    }

    /// Whether calls to undefined ports of the address are refused; `None` for an unallocated address.
    #[must_use]
    pub fn flag(&self, ip: IpAddr) -> Option<bool> {
        if self.local.contains(&ip) {
            return Some(false);
        }
        self.claims.get(&ip).map(|claims| claims.n_unserved == 0)
    }

    /// A Service that has an address.
    #[must_use]
    pub fn service_of(&self, ip: IpAddr) -> Option<&ServiceKey> {
        self.of_service.iter().find(|(_, (ips, _))| ips.contains(&ip)).map(|(key, _)| key)
    }

    fn is_in_network(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(ip))
    }
}

impl Claims {
    fn number(&mut self, is_served: bool) -> &mut u32 {
        if is_served { &mut self.n_served } else { &mut self.n_unserved }
    }
}

/// The networks that lie in no other one, sorted, IPv4 first, at most [`MAX_SERVICE_CIDRS`] of each family;
/// and how many exceed that limit.
#[must_use]
pub fn merged(networks: impl IntoIterator<Item = Cidr>) -> (Vec<Cidr>, usize) {
    let (v4, v6): (Vec<Cidr>, Vec<Cidr>) =
        outermost(networks).into_iter().partition(|network| network.family() == Family::V4);
    let n_left_out = [&v4, &v6].map(|family| family.len().saturating_sub(MAX_SERVICE_CIDRS)).iter().sum();
    let first = |family: Vec<Cidr>| family.into_iter().take(MAX_SERVICE_CIDRS);
    (first(v4).chain(first(v6)).collect(), n_left_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::fixture;
    use serde_json::json;

    fn cidrs(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_merged() {
        let many: Vec<String> = (0..10).map(|n| format!("10.{n}.0.0/16")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (given, expected, n_left_out) in [
            (&[][..], &[][..], 0),
            (&["fd00::/112", "10.96.0.0/12"], &["10.96.0.0/12", "fd00::/112"], 0),
            (&["10.96.0.0/16", "10.96.0.0/12", "10.96.0.0/12", "10.111.1.0/24"], &["10.96.0.0/12"], 0),
            (&["10.0.0.0/8", "11.0.0.0/8"], &["10.0.0.0/8", "11.0.0.0/8"], 0),
            (&many, &many[..8], 2),
        ] {
            assert_eq!(merged(cidrs(given)), (cidrs(expected), n_left_out), "{given:?}");
        }
    }

    #[test]
    fn addresses_are_left_alone_if_anything_says_so() {
        let service = |name: &str, ips: &[&str], is_excluded: bool| {
            let families: Vec<_> =
                ips.iter().map(|ip| if ip.contains(':') { "IPv6" } else { "IPv4" }).collect();
            let annotations = is_excluded.then_some(json!({"socklb.io/exclude": "true"}));
            fixture::service(&json!({
                "metadata": {"name": name, "annotations": annotations},
                "spec": {"clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": families},
            }))
        };
        let (one, other) = (ip("10.96.0.1"), ip("fd00::1"));
        let mut all = ClusterIps::default();
        let web = service("web", &["10.96.0.1", "fd00::1"], false);
        assert!(all.set(&web.key, Some(&web)).is_empty(), "without a network");
        all.set_networks(cidrs(&["10.96.0.0/12", "fd00::/112"]));
        assert_eq!(all.set(&web.key, Some(&web)), [one, other].into());
        assert!(all.set(&web.key, Some(&web)).is_empty(), "as it was");
        let shadow = service("shadow", &["10.96.0.1"], true);
        let elsewhere = service("elsewhere", &["192.0.2.1"], false);
        for (set, touched, flags) in [
            (Ok(&shadow), &[one][..], [Some(false), Some(true)]),
            (Ok(&elsewhere), &[], [Some(false), Some(true)]),
            (Err(&web.key), &[one, other], [Some(false), None]),
            (Err(&shadow.key), &[one], [None, None]),
        ] {
            let changed = match set {
                Ok(service) => all.set(&service.key, Some(service)),
                Err(key) => all.set(key, None),
            };
            assert!(changed.iter().eq(touched), "{changed:?}");
            assert_eq!([all.flag(one), all.flag(other)], flags);
        }
        assert_eq!(all.set_local(&[one, ip("192.0.2.1")]), [one].into());
        assert_eq!(all.flag(one), Some(false));
        assert!(all.iter().eq([one]));
        assert_eq!(all.set_local(&[other]), [one, other].into());
    }
}
