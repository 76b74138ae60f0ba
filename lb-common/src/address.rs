//! Addresses as octets, in both families.
//!
//! Map layouts do not use `core::net` types, whose representation is not guaranteed. An octet array is
//! readable in `bpftool map dump` (`[10,96,0,1]`).

/// An IPv4 address, most significant octet first.
pub type Octets4 = [u8; 4];
/// An IPv6 address, most significant octet first.
pub type Octets6 = [u8; 16];

/// An address family, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4, and IPv4-mapped IPv6 addresses.
    V4,
    /// IPv6.
    V6,
}

/// The operations that [`crate::resolve`] needs on an address of one family.
pub trait Address: Copy + Eq {
    /// The family of all values of this type.
    const FAMILY: Family;

    /// Whether it is in `127.0.0.0/8` or is `::1`.
    fn is_loopback(&self) -> bool;

    /// Whether it is `0.0.0.0` or `::`, which Linux treats as loopback in `connect()`.
    fn is_unspecified(&self) -> bool;

    /// Whether it is in a network: its masked bits equal the network's address.
    fn is_within(&self, network: &Self, mask: &Self) -> bool;

    /// The 16-octet form of family-independent maps: IPv6 unchanged, IPv4 as `::ffff:a.b.c.d`.
    fn to_mapped(&self) -> Octets6;

    /// The inverse of [`Self::to_mapped`]; the octets of another family give an unspecified result.
    fn from_mapped(octets: &Octets6) -> Self;

    /// The wildcard address of node-port frontends.
    fn unspecified() -> Self;
}

/// An IPv6 address from its words in memory order.
///
/// Writing an IPv4-mapped address as octets costs the BPF programs a call of `memset` and seven stores.
#[inline(always)]
const fn octets(words: [u32; 4]) -> Octets6 {
    // SAFETY: both types are 16 plain octets.
    unsafe { core::mem::transmute(words) }
}

impl Address for Octets4 {
    const FAMILY: Family = Family::V4;

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        self[0] == 127
    }

    #[inline(always)]
    fn is_unspecified(&self) -> bool {
        u32::from_ne_bytes(*self) == 0
    }

    #[inline(always)]
    fn is_within(&self, network: &Self, mask: &Self) -> bool {
        u32::from_ne_bytes(*self) & u32::from_ne_bytes(*mask) == u32::from_ne_bytes(*network)
    }

    #[inline(always)]
    fn to_mapped(&self) -> Octets6 {
        let prefix = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
        octets([0, 0, prefix, u32::from_ne_bytes(*self)])
    }

    #[inline(always)]
    fn from_mapped(o: &Octets6) -> Self {
        [o[12], o[13], o[14], o[15]]
    }

    #[inline(always)]
    fn unspecified() -> Self {
        [0; 4]
    }
}

impl Address for Octets6 {
    const FAMILY: Family = Family::V6;

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        u128::from_be_bytes(*self) == 1
    }

    #[inline(always)]
    fn is_unspecified(&self) -> bool {
        u128::from_ne_bytes(*self) == 0
    }

    #[inline(always)]
    fn is_within(&self, network: &Self, mask: &Self) -> bool {
        u128::from_ne_bytes(*self) & u128::from_ne_bytes(*mask) == u128::from_ne_bytes(*network)
    }

    #[inline(always)]
    fn to_mapped(&self) -> Octets6 {
        *self
    }

    #[inline(always)]
    fn from_mapped(o: &Octets6) -> Self {
        *o
    }

    #[inline(always)]
    fn unspecified() -> Self {
        // Hidden from the compiler, which would call `memset` for zeroes. A function call makes the verifier
        // of older kernels compare every number of the program exactly (see `Mode` in lb-ebpf).
        octets([core::hint::black_box(0); 4])
    }
}

/// The IPv4 address in an IPv4-mapped IPv6 address (`::ffff:a.b.c.d`), else `None`.
///
/// A socket of family `AF_INET6` with an IPv4 peer shows it in this form, in every hook.
#[inline(always)]
#[must_use]
pub fn mapped_ipv4(o: &Octets6) -> Option<Octets4> {
    let high = u64::from_ne_bytes([o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]]);
    let middle = u32::from_ne_bytes([o[8], o[9], o[10], o[11]]);
    if high == 0 && middle == u32::from_ne_bytes([0, 0, 0xff, 0xff]) {
        Some([o[12], o[13], o[14], o[15]])
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_form_is_the_rfc_4291_one() {
        assert_eq!([10, 96, 0, 1].to_mapped(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 96, 0, 1]);
        assert_eq!(mapped_ipv4(&[10, 96, 0, 1].to_mapped()), Some([10, 96, 0, 1]));
    }

    #[test]
    fn other_ipv6_addresses_are_not_mapped() {
        let mut compatible = [10, 96, 0, 1].to_mapped();
        compatible[10] = 0;
        compatible[11] = 0;
        for o in [[0; 16], compatible, [0xff; 16]] {
            assert_eq!(mapped_ipv4(&o), None, "{o:?}");
        }
    }

    #[test]
    fn loopback_and_unspecified() {
        let mut one = [0; 16];
        one[15] = 1;
        assert!(one.is_loopback() && !one.is_unspecified());
        assert!([0; 16].is_unspecified() && ![0u8; 16].is_loopback());
        assert!([127, 8, 9, 10].is_loopback() && ![128, 0, 0, 1].is_loopback());
        assert!([0; 4].is_unspecified() && ![0, 0, 0, 1].is_unspecified());
    }
}
