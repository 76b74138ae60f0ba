//! The addresses of this network namespace's interfaces, and a watch on their changes (`rtnetlink(7)`).

use std::{collections::BTreeSet, fs, future::poll_fn, io, net::IpAddr, task::Poll};

use netlink_sys::{AsyncSocket as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use nix::{errno::Errno, sys::socket::SockaddrStorage};

/// The interface on which kube-proxy's IPVS mode puts, and leaves, every service address of the cluster. They
/// are not addresses of the node.
pub(super) const IPVS: &str = "kube-ipvs0";

/// `RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR` of `linux/rtnetlink.h`.
const GROUPS: u32 = 0x10 | 0x100;

/// The addresses of the interfaces, sorted. Excluded are those of `kube-ipvs0`, and IPv6 link-local ones,
/// which every interface has and which mean another host on each link.
///
/// Empty if they cannot be read: node ports then answer on the addresses of the Node object.
#[must_use]
pub fn read() -> Vec<IpAddr> {
    let addresses = match nix::ifaddrs::getifaddrs() {
        Ok(addresses) => addresses,
        Err(error) => {
            tracing::debug!(%error, "cannot read the interfaces' addresses");
            return Vec::new();
        }
    };
    let mut found: Vec<IpAddr> = addresses
        .filter(|interface| interface.interface_name != IPVS)
        .filter_map(|interface| interface.address.and_then(address_of))
        .filter(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Indexes of the interfaces that lead out of this host: those that have one of these addresses, and those
/// of default routes. Without loopback.
#[must_use]
pub fn uplinks(addresses: &[IpAddr]) -> BTreeSet<u32> {
    type Read = fn(&str) -> Option<String>;
    const ROUTES: [(&str, Read); 2] =
        [("/proc/net/route", route_device), ("/proc/net/ipv6_route", route_device6)];
    let mut names = BTreeSet::new();
    for (path, device) in ROUTES {
        // A kernel without IPv6 lacks its file.
        let text = fs::read_to_string(path).unwrap_or_default();
        names.extend(text.lines().filter_map(device));
    }
    for interface in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        let is_meant = interface.address.and_then(address_of).is_some_and(|ip| addresses.contains(&ip));
        if is_meant {
            names.insert(interface.interface_name);
        }
    }
    names.remove("lo");
    names.iter().filter_map(|name| nix::net::if_::if_nametoindex(name.as_str()).ok()).collect()
}

/// The device of a default route in a line of `/proc/net/route`: device, destination, and seven fields
/// further on the mask.
fn route_device(line: &str) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let is_default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
    fields.first().filter(|_| is_default).map(|device| (*device).to_owned())
}

/// The same for `/proc/net/ipv6_route`: destination, length of its prefix, and last the device.
fn route_device6(line: &str) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let is_default = fields.first().is_some_and(|address| address.bytes().all(|digit| digit == b'0'));
    fields.last().filter(|_| is_default && fields.get(1) == Some(&"00")).map(|device| (*device).to_owned())
}

fn address_of(address: SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

/// Notifies of address changes.
pub struct AddressWatch(TokioSocket);

impl AddressWatch {
    /// Subscribes to changes in the network namespace of the calling thread, from now on.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the socket.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind(&SocketAddr::new(0, GROUPS))?;
        Ok(Self(socket))
    }

    /// Waits until an address has changed, or may have. Changes in quick succession are one.
    ///
    /// Cancel safe. The messages are not decoded, so none can be lost: [`read`] returns the current
    /// addresses.
    ///
    /// # Errors
    ///
    /// If the socket can no longer be read.
    pub async fn changed(&self) -> io::Result<()> {
        let mut message = Vec::with_capacity(64);
        poll_fn(|context| {
            let mut is_news = false;
            loop {
                message.clear();
                match self.0.poll_recv(context, &mut message) {
                    Poll::Ready(Ok(())) => is_news = true,
                    // The socket's buffer overflowed: something has changed.
                    Poll::Ready(Err(error)) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                        is_news = true;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending if is_news => return Poll::Ready(Ok(())),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_an_interface() {
        assert!(read().contains(&IpAddr::from([127, 0, 0, 1])));
        assert!(uplinks(&[IpAddr::from([127, 0, 0, 1])]).is_subset(&uplinks(&[])), "but it leads nowhere");
    }

    #[test]
    fn devices_of_default_routes() {
        for (line, expected) in [
            ("Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT", None),
            ("eth0	00000000	010200C0	0003	0	0	0	00000000	0	0	0", Some("eth0")),
            ("eth0	000200C0	00000000	0001	0	0	0	00FFFFFF	0	0	0", None),
            ("", None),
        ] {
            assert_eq!(route_device(line).as_deref(), expected, "{line}");
        }
        let zero = "0".repeat(32);
        for (line, expected) in [
            (format!("{zero} 00 {zero} 00 {zero} 00000400 1 0 00000003     eth0"), Some("eth0")),
            (format!("fe80{} 40 {zero} 00 {zero} 00000100 1 0 00000001     eth0", "0".repeat(28)), None),
            (String::new(), None),
        ] {
            assert_eq!(route_device6(&line).as_deref(), expected, "{line}");
        }
    }
}
