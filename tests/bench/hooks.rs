//! `cargo xtask bench hooks`: the cost of a call with socklb's programs, compared with programs that do less.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use lb_core::{
    model::Protocol::{Tcp, Udp},
    plan::Capacity,
};

use crate::{
    Common,
    calls::{self, Call, EMPTY, HEALTH_OFF, HEALTH_OFF_AGAIN, Kind, Programs, SOCKLB, Services, Target, To},
    result::{ResultFile, Suite},
};

const BLOCK: usize = 200;
const CALLS: usize = 40_000;
/// TCP connects, which are expensive.
const TCP_CALLS: usize = 4_000;
/// Whole TCP connections: enough for a difference of 50 ns to show, which is a thousandth.
const WHOLE_CALLS: usize = 60_000;
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

/// Of a TCP connection from the socket to its close, with the callbacks of both sides.
pub(crate) const WHOLE: [Call; 2] =
    [("tcp whole miss", Kind::TcpWhole, To::Endpoint), ("tcp whole hit", Kind::TcpWhole, To::OneService)];
/// The calls that show what passive health costs.
pub(crate) fn health_kinds() -> impl Iterator<Item = Call> {
    let udp = KINDS.into_iter().filter(|(_, kind, _)| *kind != Kind::Tcp);
    WHOLE.into_iter().chain(udp)
}

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
        (false, Kind::TcpWhole) => WHOLE_CALLS / options.scale as usize,
        (false, _) => CALLS / options.scale as usize,
    };
    let mut run = common.start(Suite::Hooks);
    run.setting("services", n);
    run.setting("endpoints of each service", services.n_endpoints);
    run.setting("calls in a block", block);
    run.setting("calls", n_calls(Kind::Fresh));
    run.setting("TCP connections", n_calls(Kind::Tcp));
    run.setting("whole TCP connections", n_calls(Kind::TcpWhole));
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
        .chain(WHOLE)
        .map(|call| Ok((call, u32::try_from(n_calls(call.1) / block)?)))
        .collect::<anyhow::Result<_>>()?;
    calls::measure(&mut run, targets.collect(), &calls, block)?;
    Ok(run.finish())
}
