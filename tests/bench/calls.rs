//! Calls through one cgroup hook, and the programs on it, for `hooks` and `scale`.
//!
//! Each target has its own cgroup and network namespace; they make blocks of calls in turns on one CPU. Times
//! are the caller's: from before the first system call until after the last.

use std::{
    any::Any,
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread::{self, Scope},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aya::{
    Ebpf,
    maps::HashMap,
    programs::{CgroupAttachMode, CgroupSockAddr, Program, loaded_programs},
    sys::{Stats, enable_stats},
};
use lb_common::{
    health::Policy,
    layout::{Endpoint4, Frontend, FrontendKey4, Run as Slots},
};
use lb_core::{
    desired::FrontendAddress,
    model::Protocol,
    plan::{Capacity, diff},
    tables::{Entry, Image, wire_protocol},
};
use lb_kernel::{Kernel, Options, links};
use lb_tests::{Sandbox, agent};
use nix::{
    libc::linger,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, connect, sendto, setsockopt, socket, sockopt,
    },
};

use crate::{
    objects::{PORT, TARGET_PORT, cluster_ip},
    quantile::real,
    result::{Better, Run, Unit},
    turns::{self, Caller, Work},
};

/// The baseline of all targets.
pub(crate) const EMPTY: (&str, &[&str]) = ("empty", &["empty_connect", "empty_sendmsg"]);
pub(crate) const SOCKLB: &str = "socklb";
/// What the kernel takes for any program in the callbacks of a connection.
pub(crate) const EMPTY_SOCK_OPS: (&str, &[&str]) =
    ("empty+sock_ops", &["empty_connect", "empty_sendmsg", "empty_sock_ops"]);
/// The product with `--passive-health=off`.
pub(crate) const HEALTH_OFF: &str = "passive health off";
/// The same once more: its difference is what the method cannot resolve.
pub(crate) const HEALTH_OFF_AGAIN: &str = "passive health off again";
/// The run time of the program as the kernel measures it, including the timer.
pub(crate) const PROGRAM_TIME: &str = "program time, any service";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A new UDP socket connects and is closed.
    Fresh,
    /// A UDP socket reconnects, which has the least cost outside the hook.
    Again,
    /// An unconnected UDP socket sends.
    Send,
    /// A TCP connection, until it is established.
    Tcp,
    /// A TCP connection, from the socket to its close.
    TcpWhole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    /// The endpoint itself.
    Endpoint,
    OneService,
    /// Each time a random service, so caches may miss.
    AnyService,
}

/// A kind of call, with the name of its measure.
pub(crate) type Call = (&'static str, Kind, To);

/// The services of a target.
#[derive(Clone, Copy)]
pub(crate) struct Services {
    pub(crate) n: u32,
    pub(crate) n_endpoints: u32,
    /// Of each service, one port for each.
    pub(crate) protocols: &'static [Protocol],
}

#[derive(Clone)]
pub(crate) enum Programs<'a> {
    /// These programs of the bench's object.
    Bench(&'a [u8], &'static [&'static str]),
    /// Another balancer's object: its first program for `connect()` on `AF_INET` sockets, with empty maps.
    /// Its hits are misses too.
    Peer(PathBuf),
    /// The product, with all features.
    Socklb(Capacity),
    /// The same with `--passive-health=off`.
    HealthOff(Capacity),
}

#[derive(Clone)]
pub(crate) struct Target<'a> {
    pub(crate) name: &'static str,
    /// The number of services, if that varies: then the run time of the program is measured too.
    pub(crate) n_services: Option<u32>,
    pub(crate) services: Services,
    pub(crate) programs: Programs<'a>,
}

enum Order {
    /// A block of calls; the seed selects the services.
    Calls(Kind, To, usize, u64),
    /// A block of calls while the kernel measures run time; the answer is the mean run time of the program.
    Counted(u64),
}

/// Measures all targets, with this number of blocks of each call. A target other than the product that cannot
/// be attached is noted as not available.
pub(crate) fn measure(
    run: &mut Run,
    targets: Vec<Target<'_>>,
    calls: &[(Call, u32)],
    block: usize,
) -> anyhow::Result<()> {
    thread::scope(|scope| {
        let callers = callers(scope, run, targets, block)?;
        for &((measure, kind, to), n_blocks) in calls {
            let blocks =
                turns::take(&callers, n_blocks, |round| Order::Calls(kind, to, block, round.into()))?;
            for (((name, n_services), _), blocks) in callers.iter().zip(blocks) {
                let mut report = run.of(name, *n_services);
                report.series(measure, Unit::Nanoseconds, Better::Lower, &blocks);
            }
        }
        for ((name, n_services), caller) in callers.iter().filter(|((_, n), _)| n.is_some()) {
            let means = (0..10).map(|seed| caller.carry_out(Order::Counted(seed)));
            let means: Vec<Vec<f64>> = means.collect::<anyhow::Result<_>>()?;
            run.of(name, *n_services).series(PROGRAM_TIME, Unit::Nanoseconds, Better::Lower, &means);
        }
        Ok(())
    })
}

/// Measures targets again and again in new sandboxes: where memory lies differs from one to the next, and
/// alone makes a difference of some 50 ns. Each block of the result is of another sandbox.
pub(crate) fn measure_anew(
    run: &mut Run,
    n_times: usize,
    targets: &[Target<'_>],
    calls: &[(Call, u32)],
    block: usize,
) -> anyhow::Result<()> {
    let mut samples: Vec<Vec<Vec<f64>>> = vec![Vec::new(); targets.len() * calls.len()];
    for n in 0..n_times {
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.rotate_left(n % targets.len());
        thread::scope(|scope| {
            let targets = order.iter().map(|index| targets[*index].clone()).collect();
            let callers = callers(scope, run, targets, block)?;
            anyhow::ensure!(callers.len() == order.len(), "a target is not available");
            for (call, &((_, kind, to), n_blocks)) in calls.iter().enumerate() {
                let blocks =
                    turns::take(&callers, n_blocks, |round| Order::Calls(kind, to, block, round.into()))?;
                for (index, blocks) in order.iter().zip(blocks) {
                    samples[index * calls.len() + call].push(blocks.concat());
                }
            }
            Ok(())
        })?;
    }
    for (target, samples) in targets.iter().zip(samples.chunks(calls.len())) {
        for (((measure, ..), _), blocks) in calls.iter().zip(samples) {
            run.of(target.name, None).series(measure, Unit::Nanoseconds, Better::Lower, blocks);
        }
    }
    Ok(())
}

/// A target's name and number of services, and its thread.
type Callers = Vec<((&'static str, Option<u32>), Caller<Order, Vec<f64>>)>;

fn callers<'scope>(
    scope: &'scope Scope<'scope, '_>,
    run: &mut Run,
    targets: Vec<Target<'scope>>,
    block: usize,
) -> anyhow::Result<Callers> {
    let n_endpoints = targets.iter().map(|target| target.services.n * target.services.n_endpoints).max();
    let n_endpoints = n_endpoints.unwrap_or_default();
    let mut callers = Vec::new();
    for Target { name, n_services, services, programs } in targets {
        let prepared = Caller::start(scope, move |sandbox| {
            Ok(((), work(Worker::new(sandbox, services, n_endpoints, &programs)?, block)))
        });
        match prepared {
            Ok((caller, ())) => callers.push(((name, n_services), caller)),
            Err(error) if name == SOCKLB => return Err(error),
            Err(error) => run.unavailable(name, n_services, format!("{error:#}")),
        }
    }
    Ok(callers)
}

fn work(worker: Worker, block: usize) -> Work<Order, Vec<f64>> {
    Box::new(move |order| match order {
        Order::Calls(kind, to, n_calls, seed) => worker.calls(kind, to, n_calls, seed),
        Order::Counted(seed) => worker.counted(block, seed),
    })
}

/// Programs and maps of a capacity in a sandbox.
pub(crate) fn open(sandbox: &Sandbox, capacity: Capacity, passive_health: bool) -> anyhow::Result<Kernel> {
    Ok(Kernel::open(&Options { capacity, passive_health, ..agent::options(sandbox) }, || {})?)
}

fn loopback(endpoint: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::LOCALHOST) + endpoint).into()
}

impl Services {
    /// Loopback endpoints, which a datagram socket can connect to without a server.
    fn image(self) -> Image {
        let mut image = Image::default();
        let mut id = 0;
        for service in 0..self.n {
            for &protocol in self.protocols {
                let offset = id * self.n_endpoints;
                let entry = |id| Entry::new(id, (loopback(id), TARGET_PORT).into());
                image.runs4.insert(offset, (offset..offset + self.n_endpoints).map(entry).collect());
                let run = Slots { offset, len: self.n_endpoints };
                let health = if protocol == Protocol::Tcp { Policy::DEFAULT.to_word() } else { 0 };
                image.frontends.insert(id, Frontend { run, service_id: id, health, ..Frontend::default() });
                let ip = IpAddr::V4(cluster_ip(service));
                image.services.insert(FrontendAddress { ip, port: PORT, protocol }, id);
                id += 1;
            }
        }
        image
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);
// SAFETY: `repr(C)` types of lb_common whose padding is checked at compile time.
unsafe impl aya::Pod for Plain<FrontendKey4> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Endpoint4> {}

/// Attaches programs to the sandbox's cgroup until the result is dropped.
fn attach(sandbox: &Sandbox, programs: &Programs<'_>, services: Services) -> anyhow::Result<Box<dyn Any>> {
    let cgroup = sandbox.cgroup().path();
    match programs {
        Programs::Socklb(capacity) | Programs::HealthOff(capacity) => {
            let mut kernel = open(sandbox, *capacity, matches!(programs, Programs::Socklb(_)))?;
            let _done = kernel.apply(&diff(&Image::default(), &services.image()))?;
            Ok(Box::new(kernel))
        }
        Programs::Bench(object, names) => {
            let mut loaded = Ebpf::load(object)?;
            let map = loaded.map_mut("bench_services").context("bench_services")?;
            let mut map: HashMap<_, Plain<FrontendKey4>, Plain<Endpoint4>> = HashMap::try_from(map)?;
            let address = Ipv4Addr::LOCALHOST.octets();
            let value = Endpoint4 { address, port: TARGET_PORT, extra: 0, endpoint_id: 0 };
            for key in services.image().services.keys() {
                let (IpAddr::V4(ip), Some(protocol)) = (key.ip, wire_protocol(key.protocol)) else {
                    continue;
                };
                let (address, protocol) = (ip.octets(), protocol.0);
                let key = FrontendKey4 { address, port: key.port, protocol, reserved: 0 };
                map.insert(Plain(key), Plain(value), 0)?;
            }
            for name in *names {
                attach_one(loaded.program_mut(name).context(*name)?, cgroup).context(*name)?;
            }
            Ok(Box::new(loaded))
        }
        Programs::Peer(path) => {
            let place = path.display();
            let mut loaded = Ebpf::load_file(path).with_context(|| place.to_string())?;
            let (name, program) = loaded
                .programs_mut()
                .find(|(name, program)| {
                    let is_connect = name.contains("connect4") || name.contains("connect_v4");
                    is_connect && matches!(program, Program::CgroupSockAddr(_))
                })
                .with_context(|| format!("{place}: no program for connect4"))?;
            let name = name.to_owned();
            attach_one(program, cgroup).with_context(|| format!("{place}: {name}"))?;
            Ok(Box::new(loaded))
        }
    }
}

fn attach_one(program: &mut Program, cgroup: &Path) -> anyhow::Result<()> {
    let cgroup = File::open(cgroup)?;
    let mode = CgroupAttachMode::default();
    match program {
        Program::CgroupSock(program) => {
            program.load()?;
            let _link = program.attach(&cgroup, mode)?;
        }
        Program::SockOps(program) => {
            program.load()?;
            let _link = program.attach(&cgroup, mode)?;
        }
        program => {
            let program: &mut CgroupSockAddr = program.try_into()?;
            program.load()?;
            let _link = program.attach(&cgroup, mode)?;
        }
    }
    Ok(())
}

/// A caller behind its programs.
struct Worker {
    services: Services,
    /// The endpoints of the target with the most, the same for all.
    n_endpoints: u32,
    /// Whether calls to services reach endpoints. If not, a service address has no route: all calls go to
    /// endpoints, as many of them as the others use, so that a baseline includes the kernel's cost of many
    /// addresses.
    is_redirected: bool,
    connected: OwnedFd,
    unconnected: OwnedFd,
    /// The product's program for `connect()`.
    program: Option<u32>,
    /// Accepts after each call: a thread of its own would fall behind, and SYNs to a full queue are lost.
    listener: TcpListener,
    _sink: UdpSocket,
    _attached: Box<dyn Any>,
}

fn udp() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
}

impl Worker {
    fn new(
        sandbox: &Sandbox,
        services: Services,
        n_endpoints: u32,
        programs: &Programs<'_>,
    ) -> anyhow::Result<Self> {
        let attached = attach(sandbox, programs, services)?;
        let links = links::read_all(&sandbox.pin_path(), Some(sandbox.cgroup().path()), true);
        let link = links.into_iter().find(|(hook, _)| *hook == "connect4");
        let program = link.and_then(|(_, link)| Some(link.ok()?.program_id));
        turns::stay_on(0)?;
        let mut worker = Self {
            services,
            n_endpoints,
            is_redirected: true,
            connected: udp()?,
            unconnected: udp()?,
            program,
            listener: TcpListener::bind((Ipv4Addr::UNSPECIFIED, TARGET_PORT))?,
            _sink: UdpSocket::bind((Ipv4Addr::UNSPECIFIED, TARGET_PORT))?,
            _attached: attached,
        };
        let to = worker.destination(To::OneService, &mut fastrand::Rng::with_seed(0));
        worker.is_redirected = connect(worker.connected.as_raw_fd(), &to).is_ok();
        Ok(worker)
    }

    fn destination(&self, to: To, random: &mut fastrand::Rng) -> SockaddrIn {
        let is_service = self.is_redirected && to != To::Endpoint;
        let n = if is_service { self.services.n } else { self.n_endpoints };
        let number = match to {
            To::Endpoint => 0,
            To::OneService => n / 2,
            To::AnyService => random.u32(..n.max(1)),
        };
        let (ip, port) =
            if is_service { (cluster_ip(number), PORT) } else { (loopback(number), TARGET_PORT) };
        SocketAddrV4::new(ip, port).into()
    }

    /// Makes calls and returns the time of each in ns.
    fn calls(&self, kind: Kind, to: To, n_calls: usize, seed: u64) -> anyhow::Result<Vec<f64>> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut times = Vec::with_capacity(n_calls);
        for _ in 0..n_calls {
            let to = self.destination(to, &mut random);
            let began = Instant::now();
            let opened = match kind {
                Kind::Fresh => {
                    let fresh = udp()?;
                    connect(fresh.as_raw_fd(), &to)?;
                    drop(fresh);
                    None
                }
                Kind::Again => {
                    connect(self.connected.as_raw_fd(), &to)?;
                    None
                }
                Kind::Send => {
                    // The sink never reads: its full buffer drops the datagram, after the hook has run.
                    let _sent = sendto(self.unconnected.as_raw_fd(), b"x", &to, MsgFlags::MSG_DONTWAIT);
                    None
                }
                Kind::Tcp | Kind::TcpWhole => {
                    let stream = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                    connect(stream.as_raw_fd(), &to)?;
                    Some(stream)
                }
            };
            let mut time = began.elapsed();
            if let Some(stream) = opened {
                // A reset instead of TIME_WAIT, which would use up the ports.
                setsockopt(&stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
                drop(stream);
                if kind == Kind::TcpWhole {
                    time = began.elapsed();
                }
                drop(self.listener.accept()?);
            }
            times.push(time.as_secs_f64() * 1e9);
        }
        Ok(times)
    }

    /// The mean run time of the program in ns during a block of calls; nothing without runs.
    fn counted(&self, n_calls: usize, seed: u64) -> anyhow::Result<Vec<f64>> {
        let Some(id) = self.program else { return Ok(Vec::new()) };
        let _counted_while_open = enable_stats(Stats::RunTime)?;
        let read = || {
            let found = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id);
            found.map(|program| (program.run_count(), program.run_time())).context("the program is gone")
        };
        let (runs, time): (u64, Duration) = read()?;
        let _times = self.calls(Kind::Again, To::AnyService, n_calls, seed)?;
        let (runs_after, time_after) = read()?;
        let n = runs_after.saturating_sub(runs);
        let mean = time_after.saturating_sub(time).as_secs_f64() * 1e9 / real(n.max(1));
        Ok(if n > 0 { vec![mean] } else { Vec::new() })
    }
}
