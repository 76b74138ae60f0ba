//! Transfer of an image to maps of other sizes.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::layout::Run;

use super::Capacity;
use crate::tables::Image;

/// The image for maps of another size in which calls find the same as in `found`. Ids that fit are kept.
///
/// Indices of `frontends` and offsets of runs are reassigned, since only the maps refer to them. A frontend
/// that does not fit, or whose ids do not, is left out with its key; the next plan sets it again.
#[must_use]
pub fn transfer(found: &Image, capacity: Capacity) -> Image {
    let max_ids = capacity.services.saturating_mul(2);
    let max_endpoint_ids = capacity.endpoints.saturating_mul(2);
    let mut image = Image {
        node_addrs: found.node_addrs.clone(),
        cluster_ips: found.cluster_ips.clone(),
        service_cidrs: found.service_cidrs.clone(),
        ..Image::default()
    };
    let mut placed: BTreeMap<(bool, u32, u32), Run> = BTreeMap::new();
    let (mut ends, mut n_services) = ([0u32; 2], [0u32; 2]);
    let mut indices: BTreeSet<u32> = BTreeSet::new();
    for (&address, id) in &found.services {
        let ipv6 = address.ip.is_ipv6();
        let family = usize::from(ipv6);
        let Some(&frontend) = found.frontends.get(id) else { continue };
        let stored = found.stored(ipv6, frontend.run);
        if stored.is_none() && frontend.run.len > 0 {
            continue;
        }
        let fits = frontend.service_id < max_ids
            && stored.iter().all(|run| run.reachable().all(|entry| entry.endpoint_id < max_endpoint_ids))
            && n_services[family] < capacity.services;
        // Two keys of one entry are damage, which the next plan repairs.
        if !fits || !indices.insert(*id) {
            continue;
        }
        let at = (ipv6, frontend.run.offset, frontend.run.len);
        let run = match (placed.get(&at), stored) {
            (Some(run), _) => *run,
            (None, None) => Run::EMPTY,
            (None, Some(stored)) => {
                let offset = ends[family];
                let Some(end) =
                    offset.checked_add(stored.n_entries()).filter(|end| *end <= capacity.endpoints)
                else {
                    continue;
                };
                ends[family] = end;
                placed.insert(at, stored.at(offset));
                image.runs_mut(ipv6).insert(offset, stored.clone());
                stored.at(offset)
            }
        };
        let new_id = n_services[0] + n_services[1];
        n_services[family] += 1;
        image.frontends.insert(new_id, lb_common::layout::Frontend { run, ..frontend });
        image.services.insert(address, new_id);
    }
    image
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use lb_common::layout::Frontend;

    use super::*;
    use crate::{desired::FrontendAddress, model::Protocol, tables::Entry};

    const LARGE: Capacity = Capacity { services: 100, endpoints: 1000 };

    /// Frontend `i` has index `10 + i`, service id `5 + i` and two endpoints. Between runs there are gaps.
    fn image(n: u8) -> Image {
        let mut image = Image::default();
        for i in 0..n {
            let id = u32::from(i);
            let ip = Ipv4Addr::new(10, 96, 0, i).into();
            let run = Run { offset: 20 * id + 7, len: 2 };
            let entry = |k: u8| Entry::new(2 * id + u32::from(k), SocketAddr::from(([10, 244, i, k], 8080)));
            image.services.insert(FrontendAddress { ip, port: 80, protocol: Protocol::Tcp }, 10 + id);
            image.frontends.insert(10 + id, Frontend { run, service_id: 5 + id, ..Frontend::default() });
            image.runs_mut(false).insert(run.offset, (0..2).map(entry).collect());
        }
        image
    }

    /// What calls can find.
    fn content(image: &Image) -> BTreeMap<FrontendAddress, (u32, Vec<Entry>)> {
        let of = |id: &u32| {
            let frontend = image.frontends[id];
            (frontend.service_id, image.entries(false, frontend.run).unwrap().to_vec())
        };
        image.services.iter().map(|(address, id)| (*address, of(id))).collect()
    }

    #[test]
    fn what_fits_is_the_same_and_in_order() {
        let found = image(8);
        for capacity in [LARGE, Capacity { services: 8, endpoints: 16 }] {
            let there = transfer(&found, capacity);
            assert_eq!(content(&there), content(&found), "{capacity:?}");
            assert!(there.frontends.keys().eq(&(0..8).collect::<Vec<u32>>()));
            assert_eq!(there.runs(false).keys().copied().collect::<Vec<u32>>(), [0, 2, 4, 6, 8, 10, 12, 14]);
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out_with_its_key() {
        let found = image(8);
        for (services, endpoints, n) in
            [(3, 1000, 1), (5, 1000, 5), (100, 8, 4), (100, 3, 1), (100, 2, 1), (1, 1, 0)]
        {
            let there = transfer(&found, Capacity { services, endpoints });
            let (all, some) = (content(&found), content(&there));
            assert_eq!(some.len(), n, "{services} {endpoints}");
            assert!(some.iter().all(|(address, what)| all[address] == *what), "{services} {endpoints}");
        }
    }
}
