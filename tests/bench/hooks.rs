//! `cargo xtask bench hooks`: the cost of a call with socklb's programs, compared with programs that do less.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use lb_core::{
    model::Protocol::{Tcp, Udp},
    plan::Capacity,
};
use lb_tests::agent::SMALL;

use crate::{
    Common,
    calls::{
        self, Call, EMPTY, EMPTY_SOCK_OPS, HEALTH_OFF, HEALTH_OFF_AGAIN, Kind, Programs, SOCKLB, Services,
        Target, To,
    },
    result::{ResultFile, Run, Suite},
};

const BLOCK: usize = 200;
const CALLS: usize = 40_000;
/// TCP connects, which are expensive.
const TCP_CALLS: usize = 4_000;
/// Calls of each kind in one sandbox, and number of sandboxes, to show what passive health costs.
const HEALTH_CALLS: usize = 3_000;
const HEALTH_SANDBOXES: usize = 20;
const SERVICES: u32 = 10_000;

/// Calls to the endpoint itself ("miss") and to a service ("hit").
pub(crate) const KINDS: [Call; 8] = [
    ("fresh miss", Kind::Fresh, To::Endpoint),
    ("fresh hit", Kind::Fresh, To::OneService),
    ("again miss", Kind::Again, To::Endpoint),
    ("again hit", Kind::Again, To::OneService),
    ("send miss", Kind::Send, To::Endpoint),
    ("send hit", Kind::Send, To::OneService),
    ("tcp miss", Kind::Tcp, To::Endpoint),
    ("tcp hit", Kind::Tcp, To::OneService),
];

/// Calls that show what passive health costs. A whole connection is that from the socket to its close, with
/// the callbacks of both sides.
pub(crate) const HEALTH_KINDS: [Call; 4] = [
    ("whole TCP connection, no service", Kind::TcpWhole, To::Endpoint),
    ("whole TCP connection, service", Kind::TcpWhole, To::OneService),
    ("UDP connect() and close, service", Kind::Fresh, To::OneService),
    ("UDP sendto(), service", Kind::Send, To::OneService),
];

/// Programs of the bench's object by target.
const VARIANTS: [(&str, &[&str]); 4] = [
    ("none", &[]),
    EMPTY,
    ("empty+release", &["empty_connect", "empty_sendmsg", "empty_release"]),
    ("one look-up", &["plain_connect", "plain_sendmsg"]),
];

/// Options of `hooks`.
#[derive(Args)]
pub(crate) struct Options {
    /// The compiled programs to compare with
    #[arg(long, value_name = "FILE")]
    object: PathBuf,
    /// A compiled object of another balancer, whose `connect4` program is measured with empty maps
    #[arg(long, value_name = "FILE")]
    peer: Option<PathBuf>,
    /// Measures only these targets and the empty program: names separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Divides the number of calls, for a quick run
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=50))]
    scale: u32,
}

pub(crate) fn run(options: &Options, common: &Common) -> anyhow::Result<ResultFile> {
    let (block, n) = if common.smoke { (10, 20) } else { (BLOCK, SERVICES) };
    let services = Services { n, n_endpoints: 10, protocols: &[Tcp, Udp] };
    let n_calls = |kind: Kind| match (common.smoke, kind) {
        (true, _) => 2 * block,
        (false, Kind::Tcp) => TCP_CALLS / options.scale as usize,
        (false, Kind::TcpWhole) => HEALTH_CALLS / options.scale as usize,
        (false, _) => CALLS / options.scale as usize,
    };
    let mut run = common.start(Suite::Hooks);
    run.setting("services", n);
    run.setting("endpoints of each service", services.n_endpoints);
    run.setting("calls in a block", block);
    run.setting("calls", n_calls(Kind::Fresh));
    run.setting("TCP connections", n_calls(Kind::Tcp));
    let object = std::fs::read(&options.object).with_context(|| options.object.display().to_string())?;
    let mut programs: Vec<(&str, Programs<'_>)> =
        VARIANTS.map(|(name, attached)| (name, Programs::Bench(&object, attached))).into();
    programs.extend(options.peer.clone().map(|path| ("peer", Programs::Peer(path))));
    programs.push((SOCKLB, Programs::Socklb(Capacity::default())));
    programs
        .extend([HEALTH_OFF, HEALTH_OFF_AGAIN].map(|name| (name, Programs::HealthOff(Capacity::default()))));
    // Each target occupies CPU cache that the others would use.
    programs.retain(|(name, _)| {
        options.only.is_empty() || *name == EMPTY.0 || options.only.iter().any(|only| only == name)
    });
    let targets =
        programs.into_iter().map(|(name, programs)| Target { name, n_services: None, services, programs });
    let calls: Vec<(Call, u32)> = KINDS
        .into_iter()
        .map(|call| Ok((call, u32::try_from(n_calls(call.1) / block)?)))
        .collect::<anyhow::Result<_>>()?;
    calls::measure(&mut run, targets.collect(), &calls, block)?;
    health(&mut run, &object, n_calls(Kind::TcpWhole), block, common.smoke)?;
    Ok(run.finish())
}

/// What passive health costs, and what the kernel takes for any `sock_ops` program.
fn health(run: &mut Run, object: &[u8], n_calls: usize, block: usize, is_smoke: bool) -> anyhow::Result<()> {
    let n_sandboxes = if is_smoke { 2 } else { HEALTH_SANDBOXES };
    run.setting("sandboxes for passive health", n_sandboxes);
    run.setting("calls of each kind in one of them", n_calls);
    let services = Services { n: 20, n_endpoints: 10, protocols: &[Tcp, Udp] };
    let targets = [
        (EMPTY.0, Programs::Bench(object, EMPTY.1)),
        (EMPTY_SOCK_OPS.0, Programs::Bench(object, EMPTY_SOCK_OPS.1)),
        (HEALTH_OFF, Programs::HealthOff(SMALL)),
        (HEALTH_OFF_AGAIN, Programs::HealthOff(SMALL)),
        (SOCKLB, Programs::Socklb(SMALL)),
    ];
    let targets = targets.map(|(name, programs)| Target { name, n_services: None, services, programs });
    let n_blocks = u32::try_from(n_calls / block)?;
    calls::measure_anew(run, n_sandboxes, &targets, &HEALTH_KINDS.map(|call| (call, n_blocks)), block)
}
