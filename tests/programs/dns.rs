//! Name resolution through a service, by dig and by the C library. Both drop answers from an address other
//! than the one they called.

use std::{collections::BTreeSet, fs};

use lb_tests::command::text;
use nix::mount::{MsFlags, mount};

use crate::town::{self, with_served_town};

#[test]
fn dig_gets_answers_over_udp_and_tcp() {
    with_served_town("dig", 2, |town, _agent| {
        for (family, kind) in ["A", "AAAA"].into_iter().enumerate() {
            let server = format!("@{}", town::dns()[family].ip());
            for transport in ["+notcp", "+tcp"] {
                let args = ["+short", "+time=10", "+tries=2", transport, &server, "example.test", kind];
                let answers: BTreeSet<String> = (0..30).map(|_| text("dig", &args)).collect();
                let pods = town.pods.iter().map(|pod| pod.ips[family].to_string());
                assert_eq!(answers, pods.collect(), "{args:?}");
            }
        }
    });
}

/// The C library's resolver queries both families at once through one connected socket.
#[test]
fn the_c_library_resolves_names() {
    with_served_town("getent", 1, |town, _agent| {
        // Mounted in the sandbox's own mount namespace only.
        let conf = tempfile::NamedTempFile::new().unwrap();
        let target = fs::canonicalize("/etc/resolv.conf").unwrap();
        mount(Some(conf.path()), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        for (family, database) in ["ahostsv4", "ahostsv6"].into_iter().enumerate() {
            let nameserver = format!("nameserver {}\noptions timeout:10\n", town::dns()[family].ip());
            fs::write(conf.path(), nameserver).unwrap();
            let answer = text("getent", &[database, "example.test"]);
            assert!(answer.starts_with(&format!("{} ", town.pods[0].ips[family])), "{answer}");
        }
    });
}
