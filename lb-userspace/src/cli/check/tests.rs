use std::{collections::BTreeMap, io};

use expect_test::expect;

use super::*;
use crate::kernel::Features;

const ALL: u64 = (1 << 39) | (1 << 12) | (1 << 38);

fn able() -> Host {
    Host {
        kernel: "Linux 6.18.5".to_owned(),
        cgroup: Ok("/sys/fs/cgroup".into()),
        pin_path: Ok("/sys/fs/bpf/socklb".into()),
        capabilities: ALL,
        features: Features { set_retval: true, compare_and_swap: true },
        programs: Ok(()),
        sockets: Ok(()),
        neighbours: Ok(BTreeMap::new()),
    }
}

#[test]
fn a_host_that_has_everything() {
    expect![[r"
        ok       kernel           Linux 6.18.5
        ok       cgroup v2        /sys/fs/cgroup
        ok       BPF file system  /sys/fs/bpf/socklb
        ok       capabilities     CAP_BPF CAP_NET_ADMIN CAP_PERFMON
        ok       programs         the kernel's verifier takes those of all hooks
        ok       refusal          bpf_set_retval: connect() and sendto() fail with ECONNREFUSED
        ok       socket records   compare-and-swap: in slots, with socket storage for what finds none
        ok       stale sockets    sockets whose endpoint is gone can be found and ended
        ok       other balancers  no other programs on the same hooks
    "]]
    .assert_eq(&table(&judge(&able(), false)));
}

#[test]
fn an_old_kernel_is_a_note_not_a_fault() {
    let host = Host { features: Features { set_retval: false, compare_and_swap: false }, ..able() };
    let findings = judge(&host, true);
    assert!(findings.iter().all(|finding| finding.status != Status::Missing));
    assert_eq!(findings.iter().filter(|finding| finding.status == Status::Note).count(), 2);
    assert_eq!(findings[1].found, "/sys/fs/cgroup, beside cgroup v1");
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
    let missing: Vec<String> = judge(&host, false)
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

/// `CAP_SYS_ADMIN` stands for those that were split from it, of which `CAP_NET_ADMIN` is none.
#[test]
fn the_old_capability_counts_for_the_new_ones() {
    assert_eq!(capabilities((1 << 21) | (1 << 12)).status, Status::Ok);
    assert_eq!(capabilities(1 << 21).found, "lacks CAP_NET_ADMIN: run as root, or grant them");
}

#[test]
fn another_balancer_is_named_with_its_hooks() {
    let others = BTreeMap::from([("cil_sock4_conne".to_owned(), vec!["connect4", "sendmsg4"])]);
    let findings = judge(&Host { neighbours: Ok(others), ..able() }, false);
    let last = findings.last().unwrap();
    assert_eq!(last.status, Status::Note);
    assert!(last.found.starts_with("cil_sock4_conne (connect4 sendmsg4): "), "{}", last.found);
}
