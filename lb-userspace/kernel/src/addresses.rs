//! The addresses of this network namespace's interfaces, and a watch on their changes (`rtnetlink(7)`).

use std::{future::poll_fn, io, net::IpAddr, task::Poll};

use netlink_sys::{AsyncSocket as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

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
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .filter(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
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
    }
}
