use std::{collections::BTreeMap, io};

use expect_test::expect;
use lb_kernel::{Features, cgroup::Extent, exclusive::Exclusive, feature::SockFields};

use super::*;

const ALL: u64 = (1 << 39) | (1 << 12) | (1 << 38);

fn able() -> Host {
    Host {
        kernel: "Linux 6.18.5".to_owned(),
        has_btf: true,
        cgroup: Ok(("/sys/fs/cgroup".into(), Extent::Host)),
        pin_path: Ok("/sys/fs/bpf/socklb".into()),
        capabilities: ALL,
        features: Features {
            set_retval: true,
            compare_and_swap: true,
            sock_fields: Some(SockFields::default()),
            mptcp: true,
        },
        programs: Ok(()),
        sockets: Ok(()),
        neighbours: Ok(BTreeMap::new()),
        exclusives: Ok(Vec::new()),
        packets: PacketHost {
            unable: [None, None],
            has_tables: false,
            not_forwarding: vec!["/proc/sys/net/ipv4/ip_forward"],
            forward_drops: Vec::new(),
            unfiltered_bridges: Vec::new(),
            kube_proxy: Vec::new(),
            legacy_tables: Vec::new(),
        },
    }
}

fn named<'a>(findings: &'a [Finding], what: &str) -> &'a Finding {
    findings.iter().find(|finding| finding.what == what).unwrap()
}

#[test]
fn a_host_that_has_everything() {
    expect![[r"
        ok       kernel           Linux 6.18.5
        ok       BTF              the kernel describes its types in /sys/kernel/btf/vmlinux
        ok       cgroup v2        /sys/fs/cgroup: all processes of this host
        ok       BPF file system  /sys/fs/bpf/socklb
        ok       capabilities     CAP_BPF CAP_NET_ADMIN CAP_PERFMON
        ok       programs         the kernel accepts the programs of all hooks
        ok       refusal          bpf_set_retval: connect() and sendto() fail with ECONNREFUSED
        ok       socket records   in slots; sockets without a slot use socket storage
        ok       NFS and SMB      a mount keeps the service address, and gets another endpoint when it reconnects
        ok       stale sockets    stale sockets can be found and destroyed
        ok       attaching        no program excludes others from a hook
        ok       other balancers  no other program on the same hooks
        ok       packets          nftables has what --packets needs
        ok       kube-proxy       no rules of kube-proxy
    "]]
    .assert_eq(&table(&findings(&able(), false)));
}

#[test]
fn an_old_kernel_is_a_note_not_a_fault() {
    let host = Host {
        features: Features { set_retval: false, compare_and_swap: false, sock_fields: None, mptcp: false },
        ..able()
    };
    let findings = findings(&host, true);
    assert!(findings.iter().all(|finding| finding.status != Status::Missing));
    assert_eq!(findings.iter().filter(|finding| finding.status == Status::Note).count(), 3);
    assert_eq!(findings[2].found, "/sys/fs/cgroup, beside cgroup v1: all processes of this host");
}

/// The effect of an old kernel on mounts by service address is decided by the release and the helpers only.
#[test]
fn mounts_by_service_addresses_are_noted() {
    let with = Features { set_retval: true, ..able().features };
    let without = Features { set_retval: false, ..with };
    let blind = Features { sock_fields: None, ..without };
    for (release, features, expected) in [
        ("Linux 6.6.0", with, [false; 3]),
        ("Linux 7.2.13+deb14-cloud-amd64", with, [false; 3]),
        ("Linux 6.5.7", with, [true, false, false]),
        ("Linux 6.1.0-50-cloud-amd64", with, [true, false, false]),
        ("Linux 5.10.0-32-amd64", without, [true, true, false]),
        ("Linux 5.10.0-32-amd64", blind, [true, false, true]),
        ("of another kind", with, [false; 3]),
    ] {
        let Finding { status, found, .. } = kernel_clients(release, Some(features));
        assert_eq!(
            ["older than Linux 6.6", "fails with EPERM", "port 0 of loopback"]
                .map(|words| found.contains(words)),
            expected,
            "{release}: {found}"
        );
        let expected_status = if expected == [false; 3] { Status::Ok } else { Status::Note };
        assert_eq!(status, expected_status, "{release}: {found}");
    }
}

#[test]
fn what_is_covered_is_said() {
    for (extent, expected) in [
        (Extent::Host, "/c: all processes of this host"),
        (Extent::Node, "/c: all processes of this node, which is itself a container"),
        (Extent::Cgroup, "/c: the processes of this cgroup only"),
    ] {
        let host = Host { cgroup: Ok(("/c".into(), extent)), ..able() };
        assert_eq!(findings(&host, false)[2].found, expected);
    }
}

#[test]
fn a_kernel_that_is_too_old_or_has_no_btf_is_named() {
    let findings = findings(&Host { kernel: "Linux 4.19.0".to_owned(), has_btf: false, ..able() }, false);
    assert!(findings[..2].iter().all(|finding| finding.status == Status::Note));
    assert!(findings[0].found.starts_with("Linux 4.19.0: older than Linux 5.10"), "{}", findings[0].found);
    assert!(findings[1].found.contains("CONFIG_DEBUG_INFO_BTF"), "{}", findings[1].found);
}

#[test]
fn what_is_missing_comes_with_a_remedy() {
    let host = Host {
        cgroup: Err(KernelError::NoCgroup),
        pin_path: Err(KernelError::PinPath {
            path: "/run/socklb".into(),
            source: io::Error::new(io::ErrorKind::InvalidInput, "not on a BPF file system"),
        }),
        capabilities: 1 << 12,
        programs: Err(KernelError::NoObject),
        ..able()
    };
    let missing: Vec<String> = findings(&host, false)
        .into_iter()
        .filter(|finding| finding.status == Status::Missing)
        .map(|finding| format!("{}: {}", finding.what, finding.found))
        .collect();
    expect![[r#"
        [
            "cgroup v2: no cgroup v2 hierarchy is mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or name one with --cgroup",
            "BPF file system: --pin-path /run/socklb: not on a BPF file system: it must be a directory on a BPF file system (`mount -t bpf bpf /sys/fs/bpf`)",
            "capabilities: lacks CAP_BPF CAP_PERFMON: run as root, or grant them",
            "programs: this socklb was built without its BPF programs: build it with `cargo xtask build`",
        ]
    "#]]
    .assert_debug_eq(&missing);
}

/// Without the capabilities every probe of the kernel fails.
#[test]
fn what_cannot_be_found_out_is_not_called_missing() {
    let none = Features { set_retval: false, compare_and_swap: false, sock_fields: None, mptcp: false };
    let programs = Err(KernelError::NotPermitted { what: "loading the BPF object".to_owned() });
    let refused = || io::Error::other(io::Error::from_raw_os_error(1));
    let neighbours = Err(refused());
    let host = Host { capabilities: 0, features: none, programs, neighbours, ..able() };
    let findings = findings(&host, false);
    for what in ["refusal", "socket records", "NFS and SMB"] {
        let found = findings.iter().find(|finding| finding.what == what).unwrap();
        assert_eq!((found.status, found.found.as_str()), (Status::Note, NOT_KNOWN), "{what}");
    }
    let beside = named(&findings, "other balancers");
    assert_eq!(beside.found, "cannot be listed: Operation not permitted (os error 1)");
}

/// `CAP_SYS_ADMIN` includes `CAP_BPF` and `CAP_PERFMON`, but not `CAP_NET_ADMIN`.
#[test]
fn the_old_capability_counts_for_the_new_ones() {
    assert_eq!(capabilities((1 << 21) | (1 << 12)).status, Status::Ok);
    assert_eq!(capabilities(1 << 21).found, "lacks CAP_NET_ADMIN: run as root, or grant them");
}

#[test]
fn another_balancer_is_named_with_its_hooks() {
    let others = BTreeMap::from([("cil_sock4_conne".to_owned(), vec!["connect4", "sendmsg4"])]);
    let findings = findings(&Host { neighbours: Ok(others), ..able() }, false);
    let last = named(&findings, "other balancers");
    assert_eq!(last.status, Status::Note);
    assert!(last.found.starts_with("cil_sock4_conne (connect4 sendmsg4): "), "{}", last.found);
}

/// A program that excludes others from a hook has no neighbours there.
#[test]
fn a_program_that_refuses_others_is_named_with_the_remedy() {
    let by = Exclusive { program: "guard (id 7)".to_owned(), cgroup: "/sys/fs/cgroup".into(), flags: "none" };
    let host = Host {
        neighbours: Ok(BTreeMap::from([("guard".to_owned(), vec!["connect4", "connect6", "sendmsg4"])])),
        exclusives: Ok(vec![("connect4", by.clone()), ("connect6", by)]),
        ..able()
    };
    let findings = findings(&host, false);
    let [attaching, beside] = ["attaching", "other balancers"].map(|what| named(&findings, what));
    assert_eq!(attaching.status, Status::Missing);
    expect![[r#"the agent cannot attach connect4 connect6: program guard (id 7) is attached to /sys/fs/cgroup with the flags "none", which excludes other programs: attach it with "multi" (BPF_F_ALLOW_MULTI), detach it (`bpftool cgroup detach`), or serve another cgroup (--cgroup)"#]]
        .assert_eq(&attaching.found);
    assert!(beside.found.starts_with("guard (sendmsg4): "), "{}", beside.found);
}

#[test]
fn what_packets_need_and_what_kube_proxy_has_left_are_notes() {
    let tables = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let lacks = || Some(NftablesError::Lacks(vec!["nft_fib_ipv6"]));
    let host = PacketHost {
        unable: [None, lacks()],
        has_tables: true,
        forward_drops: tables(&["ip filter FORWARD", "inet mine forward"]),
        unfiltered_bridges: tables(&["cni0"]),
        kube_proxy: tables(&["nftables table ip kube-proxy", "interface kube-ipvs0"]),
        legacy_tables: tables(&["filter", "nat"]),
        ..able().packets
    };
    expect![[r"
        note     packets        --packets serves no IPv6: nftables: this kernel lacks nft_fib_ipv6: load these modules, or use a kernel that has them
        note     forwarding     /proc/sys/net/ipv4/ip_forward is 0, so packets from outside do not reach pods: set it to 1, unless this node has no pods
        note     FORWARD drops  ip filter FORWARD, inet mine forward: what is for Services passes only if a rule of theirs accepts it: `ct status dnat accept`, or iptables -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT
        note     bridges        cni0: rules do not see what is bridged, so a pod without hooks gets no answer from a Service's endpoint behind the same bridge: load br_netfilter and set net.bridge.bridge-nf-call-iptables=1 and bridge-nf-call-ip6tables=1
        note     kube-proxy     nftables table ip kube-proxy, interface kube-ipvs0: unless kube-proxy is to run beside socklb, stop it and run `kube-proxy --cleanup` on this node; iptables-legacy has tables (filter, nat): `iptables-legacy-save` shows whether kube-proxy's rules (KUBE-SERVICES) are among them, and whether FORWARD drops
    "]].assert_eq(&table(&packets(&host)));
    let not_permitted = || Some(NftablesError::NotPermitted);
    let host = PacketHost { unable: [not_permitted(), not_permitted()], ..able().packets };
    assert!(packets(&host).iter().all(|finding| finding.found == NOT_KNOWN));
    let host = PacketHost { unable: [Some(NftablesError::Missing), lacks()], ..able().packets };
    expect![[r"
        note     packets     --packets is not possible: nftables: this kernel lacks it: load the module nf_tables, or use a kernel with CONFIG_NF_TABLES
        ok       kube-proxy  no rules of kube-proxy
    "]].assert_eq(&table(&packets(&host)));
}
