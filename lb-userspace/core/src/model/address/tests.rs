use proptest::prelude::*;

use super::*;

/// R14: IPv4 text with leading zeros is decimal everywhere (`ParseIPSloppy`); R4: addresses are canonical.
#[test]
fn r14_addresses_are_parsed_sloppily() {
    for (text, expected) in [
        ("10.96.0.1", Some("10.96.0.1")),
        ("010.096.000.001", Some("10.96.0.1")),
        ("0000010.0.0.08", Some("10.0.0.8")),
        ("0.0.0.0", Some("0.0.0.0")),
        ("255.255.255.255", Some("255.255.255.255")),
        ("fd00::1", Some("fd00::1")),
        ("FD00:0:0:0::0001", Some("fd00::1")),
        ("::", Some("::")),
        ("::1", Some("::1")),
        ("::ffff:10.0.0.1", Some("10.0.0.1")),
        ("::ffff:010.000.0.01", Some("10.0.0.1")),
        ("::ffff:a00:1", Some("10.0.0.1")),
        ("64:ff9b::10.0.0.1", Some("64:ff9b::a00:1")),
        ("64:ff9b::10.0.0.01", Some("64:ff9b::a00:1")),
        ("", None),
        ("10.96.0", None),
        ("10.96.0.1.1", None),
        ("10.96..1", None),
        ("10.96.0.256", None),
        ("10.96.0.4294967297", None),
        ("10.96.0.-1", None),
        ("+10.96.0.1", None),
        (" 10.96.0.1", None),
        ("10.96.0.1 ", None),
        ("0x0a.0.0.1", None),
        ("10.0.0.1:80", None),
        ("fe80::1%eth0", None),
        ("[::1]", None),
        (":", None),
        ("::1::", None),
        ("::ffff:10.0.0", None),
        ("localhost", None),
        ("１.2.3.4", None),
    ] {
        let expected = expected.map(|ip| ip.parse().unwrap());
        assert_eq!(parse_ip(text), expected, "{text:?}");
    }
}

/// R14: networks follow the same rules (`ParseCIDRSloppy`).
#[test]
fn r14_networks_are_parsed_sloppily() {
    for (text, expected) in [
        ("10.0.0.0/8", Some("10.0.0.0/8")),
        ("10.1.2.3/8", Some("10.0.0.0/8")),
        ("010.1.2.3/08", Some("10.0.0.0/8")),
        ("0.0.0.0/0", Some("0.0.0.0/0")),
        ("10.1.2.3/32", Some("10.1.2.3/32")),
        ("fd00:1::5/32", Some("fd00:1::/32")),
        ("::/0", Some("::/0")),
        ("::1/128", Some("::1/128")),
        ("::ffff:10.1.2.3/104", Some("10.0.0.0/8")),
        ("::ffff:10.1.2.3/95", None),
        ("10.0.0.0", None),
        ("10.0.0.0/33", None),
        ("10.0.0.0/", None),
        ("10.0.0.0/-1", None),
        ("10.0.0.0/8/8", None),
        ("fd00::/129", None),
        ("/8", None),
    ] {
        assert_eq!(parse_cidr(text).map(|network| network.to_string()).as_deref(), expected, "{text:?}");
    }
}

#[test]
fn a_network_holds_addresses_of_its_own_family_only() {
    for (network, address, expected) in [
        ("10.0.0.0/8", "10.255.0.1", true),
        ("10.0.0.0/8", "11.0.0.0", false),
        ("0.0.0.0/0", "192.0.2.1", true),
        ("0.0.0.0/0", "fd00::1", false),
        ("::/0", "192.0.2.1", false),
        ("fd00::/64", "fd00::ffff", true),
        ("fd00::/64", "fd00:0:0:1::", false),
        ("192.0.2.7/32", "192.0.2.7", true),
        ("192.0.2.7/32", "192.0.2.8", false),
    ] {
        let network: Cidr = network.parse().unwrap();
        assert_eq!(network.contains(address.parse().unwrap()), expected, "{network} {address}");
    }
}

#[test]
fn special_ranges_are_no_service_addresses() {
    for (address, expected) in [
        ("0.0.0.0", Some("unspecified")),
        ("::", Some("unspecified")),
        ("127.9.9.9", Some("loopback")),
        ("::1", Some("loopback")),
        ("224.0.0.1", Some("multicast")),
        ("ff02::1", Some("multicast")),
        ("169.254.169.254", Some("link-local")),
        ("255.255.255.255", Some("link-local")),
        ("fe80::1", Some("link-local")),
        ("10.96.0.1", None),
        ("fd00::1", None),
        ("2001:db8::1", None),
    ] {
        assert_eq!(special_range(address.parse().unwrap()), expected, "{address}");
    }
}

#[test]
fn networks_hold_networks() {
    for (outer, inner, expected) in [
        ("10.0.0.0/8", "10.96.0.0/12", true),
        ("10.0.0.0/8", "10.0.0.0/8", true),
        ("10.96.0.0/12", "10.0.0.0/8", false),
        ("10.0.0.0/8", "11.0.0.0/16", false),
        ("10.0.0.0/8", "fd00::/64", false),
    ] {
        let [outer, inner]: [Cidr; 2] = [outer, inner].map(|text| text.parse().unwrap());
        assert_eq!(outer.holds(&inner), expected, "{outer} {inner}");
    }
}

proptest! {
    /// What Rust's parser accepts has the same meaning for Kubernetes.
    #[test]
    fn standard_spellings_are_a_subset(ip: IpAddr) {
        prop_assert_eq!(parse_ip(&ip.to_string()), Some(ip.to_canonical()));
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in "[0-9a-f:./%]{0,24}") {
        let ip = parse_ip(&text);
        let network = parse_cidr(&text);
        prop_assert!(ip.is_none() || network.is_none());
    }

    #[test]
    fn a_network_holds_its_own_address(ip: IpAddr, prefix_len in 0u8..=128) {
        let ip = ip.to_canonical();
        if let Some(network) = Cidr::new(ip, prefix_len) {
            prop_assert!(network.contains(ip));
            prop_assert_eq!(parse_cidr(&network.to_string()), Some(network));
        }
    }
}
