//! Sockets of other processes, by way of their descriptors.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, RawFd},
};

use nix::sys::socket::{SockaddrStorage, getpeername};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// What the programs of sockets see as their peer, by the inodes of the sockets: for one that went through a service, the
/// service's address. Mapped addresses are IPv4 addresses.
///
/// Missing are sockets without a peer, and those of which no process that `/proc` shows has a descriptor, or only processes
/// that must not be looked into. Reads the names of all descriptors of all processes, about a microsecond each.
///
/// # Errors
///
/// If proc(5) is not mounted.
///
/// # Kernel
///
/// 5.6 (`pidfd_getfd`), with `CAP_SYS_PTRACE`
pub fn peer_names(inodes: &BTreeSet<u32>) -> io::Result<BTreeMap<u32, SocketAddr>> {
    let mut names = BTreeMap::new();
    for process in fs::read_dir("/proc")?.filter_map(Result::ok) {
        if names.len() == inodes.len() {
            break;
        }
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that has ended, or must not be looked into.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.filter_map(Result::ok) {
            let inode = fs::read_link(descriptor.path()).ok().and_then(|link| socket_inode(link.to_str()?));
            let Some(inode) = inode.filter(|inode| inodes.contains(inode) && !names.contains_key(inode))
            else {
                continue;
            };
            let number = descriptor.file_name().to_str().and_then(|name| name.parse().ok());
            names.extend(number.and_then(|number| peer_name(pid, number, inode)).map(|name| (inode, name)));
        }
    }
    Ok(names)
}

/// The inode in the name of a socket's descriptor, `socket:[4711]`.
fn socket_inode(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Asks a socket of a process for its peer. `None` if the descriptor is no longer that of this socket.
fn peer_name(pid: i32, descriptor: RawFd, inode: u32) -> Option<SocketAddr> {
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let socket = pidfd_getfd(&process, descriptor, PidfdGetfdFlags::empty()).ok()?;
    if nix::sys::stat::fstat(&socket).ok()?.st_ino != u64::from(inode) {
        return None;
    }
    let name = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
    let v4 = name.as_sockaddr_in().map(|name| SocketAddr::V4((*name).into()));
    let name = v4.or_else(|| name.as_sockaddr_in6().map(|name| SocketAddr::V6((*name).into())))?;
    Some(SocketAddr::new(name.ip().to_canonical(), name.port()))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn names_of_descriptors() {
        assert_eq!(socket_inode("socket:[4711]"), Some(4711));
        for other in ["pipe:[4711]", "/dev/null", "socket:[]", "socket:[4711", "socket:[99999999999]"] {
            assert_eq!(socket_inode(other), None, "{other}");
        }
    }

    #[test]
    fn a_socket_is_asked_for_its_peer() {
        let (connected, other) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("[::1]:0").unwrap());
        let peer = connected.local_addr().unwrap();
        connected.connect(peer).unwrap();
        let inode =
            |socket: &UdpSocket| u32::try_from(nix::sys::stat::fstat(socket).unwrap().st_ino).unwrap();
        let names = peer_names(&[inode(&connected), inode(&other)].into()).unwrap();
        assert_eq!(names, [(inode(&connected), peer)].into());
    }
}
