//! The cost of a call by the number of services.

use std::{fs::File, os::fd::AsRawFd as _, path::Path, sync::mpsc, thread, time::Instant};

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSockAddr, loaded_programs},
    sys::{Stats, enable_stats},
};
use lb_core::plan::Capacity;
use lb_kernel::links;
use lb_tests::Sandbox;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};

use super::{Options, fill, open};
use crate::{
    hooks::stay_on,
    quantile::real,
    random,
    result::{Better, Key, Run, Unit},
};

const BLOCK: usize = 200;
/// The target with the empty program.
pub(crate) const EMPTY: &str = "empty";
pub(crate) const SOCKLB: &str = "socklb";
/// The run time of the program as the kernel measures it, including the timer.
pub(crate) const PROGRAM_TIME: &str = "program time, any service";

/// The kind of call: the second `connect()` of a datagram socket, which has the least cost outside the hook,
/// or the whole life of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Miss,
    OneService,
    /// Each time to a random service, so caches may miss.
    AnyService,
    /// A new socket, connected to a random service and closed.
    FreshSocket,
}

impl Call {
    pub(crate) const ALL: [Self; 4] = [Self::Miss, Self::OneService, Self::AnyService, Self::FreshSocket];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Miss => "re-connect, no service",
            Self::OneService => "re-connect, one service",
            Self::AnyService => "re-connect, any service",
            Self::FreshSocket => "fresh socket, any service",
        }
    }
}

enum Order {
    /// A block of calls; the seed selects the services.
    Calls(Call, u64),
    /// Blocks while the kernel measures run time; the answer is the mean run time of the program.
    Counted,
}

/// Measures all numbers of services in turns.
pub(super) fn measure(options: &Options, run: &mut Run) -> anyhow::Result<()> {
    let object = std::fs::read(&options.object).with_context(|| options.object.display().to_string())?;
    let object = &object;
    let capacity = Capacity { services: options.max_services, endpoints: options.max_endpoints };
    let n_endpoints = options.endpoints;
    let n_all_endpoints = options.services.iter().copied().max().unwrap_or_default() * n_endpoints;
    thread::scope(|scope| -> anyhow::Result<()> {
        let mut callers = Vec::new();
        // Zero services stand for the empty program.
        for n_services in std::iter::once(0).chain(options.services.iter().copied()) {
            let (orders, incoming) = mpsc::channel::<Order>();
            let (outgoing, answers) = mpsc::channel();
            let _joined_by_scope = scope.spawn(move || {
                Sandbox::run(|sandbox| {
                    let answer =
                        attach(sandbox, object, capacity, (n_services, n_endpoints), n_all_endpoints);
                    let (_attached, mut caller) = match answer {
                        Ok(attached) => attached,
                        Err(error) => return drop(outgoing.send(Err(error))),
                    };
                    if outgoing.send(Ok(Vec::new())).is_err() {
                        return;
                    }
                    for order in incoming {
                        if outgoing.send(caller.carry_out(&order)).is_err() {
                            return;
                        }
                    }
                });
            });
            let _ready = answers.recv().context("a caller has exited")??;
            callers.push((n_services, orders, answers));
        }
        for call in Call::ALL {
            let mut blocks = vec![Vec::new(); callers.len()];
            for round in 0..=options.blocks {
                for ((_, orders, answers), blocks) in callers.iter().zip(&mut blocks) {
                    orders.send(Order::Calls(call, round.into()))?;
                    let times: Vec<f64> = answers.recv()??;
                    // The first round is a warm-up.
                    if round > 0 {
                        blocks.push(times);
                    }
                }
            }
            for ((n_services, ..), blocks) in callers.iter().zip(&blocks) {
                run.series(key(call.name(), *n_services), Unit::Nanoseconds, Better::Lower, blocks);
            }
        }
        for (n_services, orders, answers) in callers.iter().filter(|(n_services, ..)| *n_services > 0) {
            orders.send(Order::Counted)?;
            let means: Vec<Vec<f64>> = answers.recv()??.into_iter().map(|mean| vec![mean]).collect();
            run.series(key(PROGRAM_TIME, *n_services), Unit::Nanoseconds, Better::Lower, &means);
        }
        Ok(())
    })
}

/// The key of a series; 0 services stand for the empty program.
pub(crate) fn key(measure: &str, n_services: u32) -> Key {
    if n_services == 0 { Key::new(measure, EMPTY) } else { Key::new(measure, SOCKLB).at(n_services) }
}

/// Resources that live as long as the calls.
enum Attached {
    Empty { _programs: Ebpf },
    Product { _kernel: Box<lb_kernel::Kernel> },
}

fn attach(
    sandbox: &Sandbox,
    object: &[u8],
    capacity: Capacity,
    (n_services, n_endpoints): (u32, u32),
    n_all_endpoints: u32,
) -> anyhow::Result<(Attached, Caller)> {
    let (attached, program) = if n_services == 0 {
        (Attached::Empty { _programs: empty(object, sandbox.cgroup().path())? }, None)
    } else {
        let mut kernel = open(sandbox, capacity)?;
        fill(&mut kernel, n_services, n_endpoints)?;
        let links = links::read_all(&sandbox.pin_path(), Some(sandbox.cgroup().path()));
        let connect = links.into_iter().find(|(hook, _)| *hook == "connect4");
        let program = connect.and_then(|(_, link)| Some(link.ok()?.program_id));
        (Attached::Product { _kernel: Box::new(kernel) }, program)
    };
    stay_on(0)?;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    Ok((attached, Caller { n_services, n_all_endpoints, socket, program }))
}

fn empty(object: &[u8], cgroup: &Path) -> anyhow::Result<Ebpf> {
    let mut programs = Ebpf::load(object)?;
    let name = "empty_connect";
    let program: &mut CgroupSockAddr = programs.program_mut(name).context(name)?.try_into()?;
    program.load()?;
    let _link = program.attach(File::open(cgroup)?, CgroupAttachMode::default())?;
    Ok(programs)
}

struct Caller {
    n_services: u32,
    /// Endpoints of the largest number of services.
    n_all_endpoints: u32,
    socket: std::os::fd::OwnedFd,
    program: Option<u32>,
}

impl Caller {
    fn carry_out(&mut self, order: &Order) -> anyhow::Result<Vec<f64>> {
        match *order {
            Order::Calls(call, seed) => self.calls(call, seed),
            Order::Counted => self.counted(),
        }
    }

    /// The destination of a call. Without services it is an endpoint, because nothing redirects the call; a
    /// random one if services are random, so that the baseline includes the kernel's cost of many addresses.
    fn destination(&self, call: Call, state: &mut u64) -> SockaddrIn {
        let by_chance = matches!(call, Call::AnyService | Call::FreshSocket);
        let (first, n_places, port) = if self.n_services == 0 || call == Call::Miss {
            ([127, 0, 0, 1], self.n_all_endpoints, 8080)
        } else {
            ([10, 96, 0, 1], self.n_services, 80)
        };
        let number = match (by_chance, call) {
            (true, _) => random::below(state, n_places.max(1)),
            (false, Call::Miss) => 0,
            (false, _) => self.n_services / 2,
        };
        let address = std::net::Ipv4Addr::from(u32::from_be_bytes(first) + number);
        std::net::SocketAddrV4::new(address, port).into()
    }

    fn calls(&self, call: Call, mut seed: u64) -> anyhow::Result<Vec<f64>> {
        let mut times = Vec::with_capacity(BLOCK);
        for _ in 0..BLOCK {
            let to = self.destination(call, &mut seed);
            let began = Instant::now();
            if call == Call::FreshSocket {
                let fresh = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
                connect(fresh.as_raw_fd(), &to)?;
                drop(fresh);
            } else {
                connect(self.socket.as_raw_fd(), &to)?;
            }
            times.push(began.elapsed().as_secs_f64() * 1e9);
        }
        Ok(times)
    }

    /// Mean run times of the program in ns, one per block.
    fn counted(&self) -> anyhow::Result<Vec<f64>> {
        let Some(id) = self.program else { return Ok(Vec::new()) };
        let _counted_while_open = enable_stats(Stats::RunTime)?;
        let read = || {
            let mut found = loaded_programs().filter_map(Result::ok).filter(|program| program.id() == id);
            found.next().map(|program| (program.run_count(), program.run_time()))
        };
        let mut means = Vec::new();
        for seed in 0..10 {
            let (runs, time) = read().context("the program is gone")?;
            let _times = self.calls(Call::AnyService, seed)?;
            let (runs_after, time_after) = read().context("the program is gone")?;
            let n = runs_after.saturating_sub(runs);
            if n > 0 {
                means.push(time_after.saturating_sub(time).as_secs_f64() * 1e9 / real(n));
            }
        }
        Ok(means)
    }
}
