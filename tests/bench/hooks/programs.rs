//! The measured programs.

use std::{any::Any, fs::File, net::IpAddr, path::Path, sync::Arc};

use anyhow::Context as _;
use aya::{
    Ebpf,
    maps::HashMap,
    programs::{CgroupAttachMode, CgroupSockAddr, Program},
};
use lb_common::layout::{Endpoint4, Frontend, FrontendKey4, Protocol};
use lb_core::{
    desired::FrontendAddress,
    model,
    plan::{Capacity, Plan, diff},
    tables::{Entry, Image},
};
use lb_kernel::{Kernel, Options};
use lb_tests::{Sandbox, agent};

use super::{Target, vip, work::Servers};

/// Attaches programs to a cgroup; dropping the result detaches them.
pub(crate) type Attach = Box<dyn FnOnce(&Sandbox, &Path) -> anyhow::Result<Box<dyn Any>> + Send>;

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);
// SAFETY: `repr(C)` types of lb_common whose padding is checked at compile time.
unsafe impl aya::Pod for Plain<FrontendKey4> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Endpoint4> {}

/// The baseline of all targets.
pub(crate) const EMPTY: &str = "empty";

/// Programs of the bench object by target.
const VARIANTS: [(&str, &[&str]); 4] = [
    ("none", &[]),
    (EMPTY, &["empty_connect", "empty_sendmsg"]),
    ("empty+release", &["empty_connect", "empty_sendmsg", "empty_release"]),
    ("one look-up", &["plain_connect", "plain_sendmsg"]),
];

pub(crate) fn targets(
    object: &[u8],
    servers: &Servers,
    peer_object: Option<&Path>,
    n_services: u32,
) -> Vec<Target> {
    let object: Arc<[u8]> = object.into();
    let endpoint = servers.udp;
    let mut targets: Vec<Target> = VARIANTS
        .into_iter()
        .map(|(name, attached)| {
            let object = Arc::clone(&object);
            let attach: Attach = Box::new(move |_sandbox, cgroup| {
                let mut programs = Ebpf::load(&object)?;
                fill(&mut programs, endpoint, n_services)?;
                let cgroup = File::open(cgroup)?;
                for name in attached {
                    match programs.program_mut(name).context(*name)? {
                        Program::CgroupSock(program) => {
                            program.load()?;
                            let _link = program.attach(&cgroup, CgroupAttachMode::default())?;
                        }
                        program => {
                            let program: &mut CgroupSockAddr = program.try_into()?;
                            program.load()?;
                            let _link = program.attach(&cgroup, CgroupAttachMode::default())?;
                        }
                    }
                }
                Ok(Box::new(programs) as Box<dyn Any>)
            });
            Target { name, attach }
        })
        .collect();
    if let Some(path) = peer_object.map(Path::to_owned) {
        targets.push(Target { name: "peer", attach: Box::new(move |_sandbox, cgroup| peer(&path, cgroup)) });
    }
    let attach: Attach = Box::new(move |sandbox, cgroup| socklb(sandbox, cgroup, endpoint, n_services));
    targets.push(Target { name: "socklb", attach });
    targets
}

/// Addresses of the services. The first is the one that is called.
fn addresses(n_services: u32) -> impl Iterator<Item = [u8; 4]> {
    let first = match vip().ip() {
        IpAddr::V4(ip) => u32::from(ip),
        IpAddr::V6(_) => 0,
    };
    (first..first + n_services).map(u32::to_be_bytes)
}

fn fill(programs: &mut Ebpf, endpoint: std::net::SocketAddr, n_services: u32) -> anyhow::Result<()> {
    let map = programs.map_mut("bench_services").context("bench_services")?;
    let mut services: HashMap<_, Plain<FrontendKey4>, Plain<Endpoint4>> = HashMap::try_from(map)?;
    let IpAddr::V4(ip) = endpoint.ip() else { anyhow::bail!("an IPv4 endpoint is needed") };
    let value = Endpoint4 { address: ip.octets(), port: endpoint.port(), reserved: 0, endpoint_id: 0 };
    for address in addresses(n_services) {
        for protocol in [Protocol::TCP.0, Protocol::UDP.0] {
            let key = FrontendKey4 { address, port: vip().port(), protocol, reserved: 0 };
            services.insert(Plain(key), Plain(value), 0)?;
        }
    }
    Ok(())
}

/// The product, with all features and ten endpoints per service.
fn socklb(
    sandbox: &Sandbox,
    cgroup: &Path,
    endpoint: std::net::SocketAddr,
    n_services: u32,
) -> anyhow::Result<Box<dyn Any>> {
    let options =
        Options { cgroup: cgroup.to_owned(), capacity: Capacity::default(), ..agent::options(sandbox) };
    let mut kernel = Kernel::open(&options, || {})?;
    let mut image = Image::default();
    let mut id = 0;
    for address in addresses(n_services) {
        for protocol in [model::Protocol::Tcp, model::Protocol::Udp] {
            let offset = id * 10;
            let entries: Vec<Entry> =
                (offset..offset + 10).map(|endpoint_id| Entry { endpoint_id, address: endpoint }).collect();
            image.runs4.insert(offset, entries.into());
            let run = lb_common::layout::Run { offset, len: 10 };
            image.frontends.insert(id, Frontend { run, service_id: id, ..Frontend::default() });
            let ip = IpAddr::from(address);
            image.services.insert(FrontendAddress { ip, port: vip().port(), protocol }, id);
            id += 1;
        }
    }
    let plan: Plan = diff(&Image::default(), &image);
    let _done = kernel.apply(&plan)?;
    Ok(Box::new(kernel))
}

/// Another balancer's object: its first program for `connect()` on `AF_INET` sockets, with empty maps. Its
/// columns for hits are misses too.
fn peer(path: &Path, cgroup: &Path) -> anyhow::Result<Box<dyn Any>> {
    let place = path.display();
    let mut programs = Ebpf::load_file(path).with_context(|| place.to_string())?;
    let (name, program) = programs
        .programs_mut()
        .find_map(|(name, program)| {
            let is_connect = name.contains("connect4") || name.contains("connect_v4");
            let program: &mut CgroupSockAddr =
                if is_connect { program.try_into().ok()? } else { return None };
            Some((name.to_owned(), program))
        })
        .with_context(|| format!("{place}: no program for connect4"))?;
    program.load().with_context(|| format!("{place}: {name}"))?;
    let _link = program.attach(File::open(cgroup)?, CgroupAttachMode::default())?;
    Ok(Box::new(programs))
}
