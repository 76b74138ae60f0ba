//! IP addresses and networks as Kubernetes writes them.
//!
//! # Purpose
//!
//! Kubernetes parses addresses by the rules of Go before 1.17 (`ParseIPSloppy` and `ParseCIDRSloppy` in
//! `k8s.io/utils/net/parse.go`), because etcd still holds objects written under those rules. Rust's parsers
//! refuse some of them.
//!
//! # Invariants
//!
//! - Results are canonical: an IPv4-mapped IPv6 address becomes the IPv4 address, a network has no host bits.
//!   Two spellings of one address compare equal.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use super::{Cidr, Family};

/// Parses an IP address as Kubernetes does.
///
/// Also accepts IPv4 parts with leading zeros, which are decimal (`010.0.0.1` is `10.0.0.1`). An IPv4-mapped
/// IPv6 address gives the IPv4 address. Refuses zones (`fe80::1%eth0`), ports and surrounding blanks.
///
/// ```
/// use lb_core::model::address::parse_ip;
///
/// assert_eq!(parse_ip("010.096.000.001"), "10.96.0.1".parse().ok());
/// assert_eq!(parse_ip("::ffff:10.96.0.1"), "10.96.0.1".parse().ok());
/// assert_eq!(parse_ip("10.96.0.256"), None);
/// ```
#[must_use]
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return parse_ipv6(text).map(|ip| IpAddr::V6(ip).to_canonical());
    }
    parse_ipv4(text).map(IpAddr::V4)
}

/// Parses a network, `address/length`, as Kubernetes does. Host bits are cleared.
///
/// A network of IPv4-mapped IPv6 addresses gives the IPv4 network; a wider one than `::ffff:0:0/96` is
/// refused.
#[must_use]
pub fn parse_cidr(text: &str) -> Option<Cidr> {
    let (address, length) = text.split_once('/')?;
    let ip = parse_ip(address)?;
    let length = parse_decimal(length, 128)?;
    let prefix_len = match ip {
        // The mapped form has 96 bits before the IPv4 address.
        IpAddr::V4(_) if address.contains(':') => length.checked_sub(96)?,
        IpAddr::V4(_) | IpAddr::V6(_) => length,
    };
    Cidr::new(ip, u8::try_from(prefix_len).ok()?)
}

/// The family of an address.
#[must_use]
pub const fn family(ip: IpAddr) -> Family {
    match ip {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// The name of a family in `ipFamilies` and `addressType`.
#[must_use]
pub const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// The unspecified address of a family, the key address of node ports.
#[must_use]
pub const fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

/// Why an address cannot be a service address, or `None` if it can.
///
/// The API server refuses these ranges for external and load-balancer addresses (`ValidateNonSpecialIP` in
/// `pkg/apis/core/validation/validation.go`), but a manifest may hold them. The unspecified address is the
/// key of node ports.
#[must_use]
pub const fn special_range(ip: IpAddr) -> Option<&'static str> {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if ip.is_unspecified() {
        Some("unspecified")
    } else if ip.is_loopback() {
        Some("loopback")
    } else if ip.is_multicast() {
        Some("multicast")
    } else if link_local {
        Some("link-local")
    } else {
        None
    }
}

/// Parses a service network: one that cluster IPs come from.
///
/// Calls to addresses in it may be refused. So it must be at least `/8` or `/48` long (the API server's limit
/// is far stricter) and must not overlap a special range.
///
/// # Errors
///
/// What is wrong with it, as the rest of a sentence.
pub fn parse_service_cidr(text: &str) -> Result<Cidr, String> {
    let network =
        parse_cidr(text).ok_or("is not a network: expected ADDRESS/LENGTH, such as 10.96.0.0/12")?;
    let shortest = if network.address.is_ipv4() { 8 } else { 48 };
    if network.prefix_len < shortest {
        return Err(format!("is too large for service addresses: expected /{shortest} or longer"));
    }
    // Any other special range that overlaps holds the network's first address: it is at least as large as the
    // largest network.
    let link_local = IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0));
    let holds_link_local = network.contains(link_local).then_some("link-local");
    match special_range(network.address).or(holds_link_local) {
        Some(range) => Err(format!("overlaps the {range} range")),
        None => Ok(network),
    }
}

impl Cidr {
    /// Builds a network and clears the host bits; `None` if the length exceeds the family's.
    #[must_use]
    pub fn new(address: IpAddr, prefix_len: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask4(prefix_len)?)),
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask6(prefix_len)?)),
        };
        Some(Self { address, prefix_len })
    }

    /// The netmask.
    #[must_use]
    pub fn mask(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(_) => Ipv4Addr::from_bits(mask4(self.prefix_len).unwrap_or(u32::MAX)).into(),
            IpAddr::V6(_) => Ipv6Addr::from_bits(mask6(self.prefix_len).unwrap_or(u128::MAX)).into(),
        }
    }

    /// The family of the network.
    #[must_use]
    pub const fn family(&self) -> Family {
        family(self.address)
    }

    /// Whether the network holds an address. It holds none of the other family.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        family(ip) == self.family() && Self::new(ip, self.prefix_len).is_some_and(|network| network == *self)
    }
}

impl Cidr {
    /// Whether the network holds all of another.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        other.prefix_len >= self.prefix_len && self.contains(other.address)
    }
}

/// The networks that lie in no other one, sorted.
#[must_use]
pub fn outermost(networks: impl IntoIterator<Item = Cidr>) -> Vec<Cidr> {
    let all: BTreeSet<Cidr> = networks.into_iter().collect();
    let is_outermost = |inner: &&Cidr| !all.iter().any(|outer| outer != *inner && outer.holds(inner));
    all.iter().filter(is_outermost).copied().collect()
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

/// The error of [`Cidr::from_str`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an IP network such as 10.0.0.0/8 or fd00::/64")]
pub struct NotANetwork(String);

impl FromStr for Cidr {
    type Err = NotANetwork;

    /// Parses a network with [`parse_cidr`].
    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        parse_cidr(text).ok_or_else(|| NotANetwork(text.to_owned()))
    }
}

fn parse_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut parts = text.split('.');
    let mut octets = [0; 4];
    for octet in &mut octets {
        *octet = u8::try_from(parse_decimal(parts.next()?, 255)?).ok()?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

/// Parses digits with any number of leading zeros; refuses signs and blanks.
fn parse_decimal(text: &str, max: u32) -> Option<u32> {
    if text.is_empty() {
        return None;
    }
    text.bytes().try_fold(0, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| u32::from(digit - b'0'))?;
        Some(number * 10 + digit).filter(|number| *number <= max)
    })
}

fn parse_ipv6(text: &str) -> Option<Ipv6Addr> {
    if let Ok(ip) = text.parse() {
        return Some(ip);
    }
    // Only a dotted tail with leading zeros remains: rewrite it as two groups.
    let (head, tail) = text.rsplit_once(':')?;
    let [a, b, c, d] = parse_ipv4(tail)?.octets();
    format!("{head}:{a:02x}{b:02x}:{c:02x}{d:02x}").parse().ok()
}

fn mask4(prefix_len: u8) -> Option<u32> {
    let host_bits = 32_u32.checked_sub(prefix_len.into())?;
    Some(u32::MAX.checked_shl(host_bits).unwrap_or(0))
}

fn mask6(prefix_len: u8) -> Option<u128> {
    let host_bits = 128_u32.checked_sub(prefix_len.into())?;
    Some(u128::MAX.checked_shl(host_bits).unwrap_or(0))
}

#[cfg(test)]
mod tests;
