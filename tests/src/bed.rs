//! Nodes, pods, a router and a client outside: namespaces through which real packets go.
//!
//! ```text
//! Outside ── Edge ── Router ──┬── Node ──┬── Pod
//!                             │          └── Second
//!                             └── Other ──── Far
//! ```
//!
//! # Invariants
//!
//! - The rules are in the namespace of [`Place::Node`]; no other one has any, and there are no hooks.
//! - No namespace has a default route. Answers from the other node go to the client outside without passing
//!   this node, so they fit no connection of the client unless the rules masqueraded it.
//! - Each address exists in both families: `10.1.0.2` and `fd00:10:1:0::2`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use lb_core::{
    desired::{FrontendAddress, PacketMode, Settings},
    model::{Family, Protocol},
    packets::{
        AFFINITY_MAPS, diff,
        nft::{Change, SetFlags, Table, TableId, Transaction},
        table_ids,
    },
    plan::Capacity,
    state::State,
    tables::Image,
};
use lb_kernel::{conntrack::Conntrack, nftables::Nftables};
use lb_netns::{Answers, NetNs, Servers, Socket};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream as AsyncStream,
};

use crate::cluster::{Cluster, Object, object};

/// The port of every server, TCP and UDP.
pub const PORT: u16 = 8080;

/// How long a call waits for an answer that must come. Only a failing test waits that long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long a call waits for an answer that must not come.
pub const SILENCE: Duration = Duration::from_millis(300);

/// A namespace of the bed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A client that is no part of the cluster.
    Outside,
    /// The router of the client.
    Edge,
    /// The router of the nodes.
    Router,
    /// This node, which has the rules.
    Node,
    /// Another node.
    Other,
    /// A pod of this node.
    Pod,
    /// A second pod of this node.
    Second,
    /// A pod of the other node.
    Far,
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Outside,
        Self::Edge,
        Self::Router,
        Self::Node,
        Self::Other,
        Self::Pod,
        Self::Second,
        Self::Far,
    ];

    /// Those with servers.
    const SERVERS: [Self; 5] = [Self::Node, Self::Other, Self::Pod, Self::Second, Self::Far];

    const fn v4(self) -> [u8; 4] {
        match self {
            Self::Outside => [198, 51, 100, 7],
            Self::Edge => [192, 168, 3, 2],
            Self::Router => [192, 168, 1, 1],
            Self::Node => [192, 168, 1, 2],
            Self::Other => [192, 168, 2, 2],
            Self::Pod => [10, 1, 1, 2],
            Self::Second => [10, 1, 2, 2],
            Self::Far => [10, 2, 1, 2],
        }
    }

    /// Its address, towards the router.
    #[must_use]
    pub fn address(self, family: Family) -> IpAddr {
        address(family, self.v4())
    }

    /// Its server.
    #[must_use]
    pub fn server(self, family: Family) -> SocketAddr {
        SocketAddr::new(self.address(family), PORT)
    }

    /// The node that it is on.
    #[must_use]
    pub const fn node_name(self) -> &'static str {
        match self {
            Self::Other | Self::Far => "other",
            _ => "node",
        }
    }
}

/// Both families.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// An IPv4 address, or its counterpart.
#[must_use]
pub fn address(family: Family, [a, b, c, d]: [u8; 4]) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(a, b, c, d).into(),
        Family::V6 => format!("fd00:{a}:{b}:{c}::{d}").parse().expect("an address"),
    }
}

/// An IPv4 network whose mask ends at an octet, or its counterpart.
fn network(family: Family, octets: [u8; 4], prefix: u8) -> (IpAddr, u8) {
    let prefix = match family {
        Family::V4 => prefix,
        Family::V6 => 16 + 2 * prefix,
    };
    (address(family, octets), prefix)
}

/// Networks, by address and length of the prefix.
type Networks = &'static [([u8; 4], u8)];

/// Namespaces, their links and servers, and what keeps the rules.
#[derive(Debug)]
pub struct Bed {
    places: BTreeMap<Place, NetNs>,
    _servers: Vec<Servers>,
    /// What keeps the rules in [`Place::Node`].
    pub node: Node,
}

/// A state and the kernel's rules, as an agent has them.
#[derive(Debug)]
pub struct Node {
    /// Objects in, rules out.
    pub state: State,
    /// The kernel's rules.
    pub nftables: Nftables,
    conntrack: Conntrack,
}

impl Node {
    /// Without rules yet, in the calling thread's namespace.
    ///
    /// # Panics
    ///
    /// If the kernel has no nftables.
    #[must_use]
    pub fn new(state: State) -> Self {
        let nftables = Nftables::open().unwrap_or_else(|error| panic!("{error}"));
        let conntrack = Conntrack::open().unwrap_or_else(|error| panic!("{error}"));
        Self { state, nftables, conntrack }
    }

    /// Brings the rules to the state of a cluster, and compares the kernel's with them. Returns the
    /// transaction.
    ///
    /// # Panics
    ///
    /// If the kernel refuses it, or has other rules afterwards.
    pub fn follow(&mut self, cluster: &Cluster) -> Transaction {
        cluster.feed(&mut self.state);
        while self.state.needs_sync() {
            let plan = self.state.sync();
            self.state.settled(plan.number());
        }
        let transaction = self.state.take_packet_changes();
        self.nftables.apply(&transaction).unwrap_or_else(|error| panic!("{error}"));
        while self.state.packets().has_leaving() {
            self.state.settle_packets();
            let transaction = self.state.take_packet_changes();
            self.nftables.apply(&transaction).unwrap_or_else(|error| panic!("{error}"));
        }
        let stale = self.state.take_stale_packet_records();
        if stale.clients {
            self.forget_clients();
        }
        if stale.flows {
            self.forget_flows(&stale.removed);
        }
        self.check();
        transaction
    }

    /// Deletes the clients of former endpoints, as the agent does.
    fn forget_clients(&mut self) {
        for id in table_ids() {
            let (found, _generation) = self.nftables.read(&id).unwrap_or_else(|error| panic!("{error}"));
            let table = found.expect("a table");
            for map in AFFINITY_MAPS {
                for key in self.state.packets().stale_clients(id.family, &table.sets[map].elements) {
                    let change = Change::DeleteElements(map.into(), vec![key]);
                    let transaction = Transaction { changes: vec![(id.clone(), change)], generation: None };
                    match self.nftables.apply(&transaction) {
                        Ok(()) => {}
                        // It has expired meanwhile.
                        Err(error) if error.is_missing() => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        }
    }

    /// Deletes the tracked flows of datagrams to former endpoints, as the agent does.
    fn forget_flows(&mut self, removed: &BTreeSet<FrontendAddress>) {
        let conntrack = &mut self.conntrack;
        let datagrams = [Protocol::Udp, Protocol::Sctp];
        for (family, protocol) in FAMILIES.iter().flat_map(|family| datagrams.map(|it| (*family, it))) {
            let flows = conntrack.entries(family, protocol).unwrap_or_else(|error| panic!("{error}"));
            for flow in flows.into_iter().filter(|flow| self.state.is_stale_flow(flow, removed)) {
                let _was_there = conntrack.delete(&flow).unwrap_or_else(|error| panic!("{error}"));
            }
        }
    }

    /// Fails if the kernel has other rules than it ought to. Elements that rules add are left out.
    ///
    /// # Panics
    ///
    /// If it has.
    pub fn check(&mut self) {
        for (id, wanted) in self.state.packets().tables() {
            let found = self.read(&id).unwrap_or_else(|| panic!("{id} is gone"));
            for (name, chain) in &wanted.chains {
                assert_eq!(found.chains.get(name), Some(chain), "{id}, chain {name}");
            }
            for (name, set) in &wanted.sets {
                assert_eq!(found.sets.get(name), Some(set), "{id}, set {name}");
            }
            assert_eq!(found, wanted, "{id}");
        }
    }

    /// The kernel's table without the elements that rules add.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn read(&mut self, id: &TableId) -> Option<Table> {
        let (found, _generation) = self.nftables.read(id).unwrap_or_else(|error| panic!("{error}"));
        found.map(without_clients)
    }

    /// Compares the kernel's rules with what they ought to be, and repairs them. Returns the number of
    /// changes.
    ///
    /// # Panics
    ///
    /// If the kernel refuses the repair, or has other rules afterwards.
    pub fn repair(&mut self) -> usize {
        let mut changes = Vec::new();
        for (id, wanted) in self.state.adopt_packet_tables() {
            let found = self.read(&id);
            changes.extend(diff(found.as_ref(), &wanted).into_iter().map(|change| (id.clone(), change)));
        }
        let n_changes = changes.len();
        let transaction = Transaction { changes, generation: None };
        self.nftables.apply(&transaction).unwrap_or_else(|error| panic!("{error}"));
        self.check();
        n_changes
    }
}

impl Bed {
    /// The bed, without rules, and a state for its node with the mode `all`.
    ///
    /// # Panics
    ///
    /// If the kernel refuses one of the parts.
    #[must_use]
    pub fn new() -> Self {
        Self::with_settings(Self::settings())
    }

    /// With other settings.
    ///
    /// # Panics
    ///
    /// If the kernel refuses one of the parts.
    #[must_use]
    pub fn with_settings(settings: Settings) -> Self {
        let places: BTreeMap<Place, NetNs> =
            Place::ALL.into_iter().map(|place| (place, NetNs::new().expect("a namespace"))).collect();
        for place in places.values() {
            place.run(|| {
                // Until a link's own address is known to be unique, a second or two, routers find no
                // neighbours.
                fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")
                    .expect("no detection of duplicates");
            });
        }
        let link = |name: &str, here: Place, here_v4: [u8; 4], there: Place| {
            let of = |v4| FAMILIES.map(|family| address(family, v4));
            places[&here]
                .join(name, &of(here_v4), &places[&there], "up", &of(there.v4()))
                .unwrap_or_else(|error| panic!("{here:?} to {there:?}: {error}"));
        };
        link("outside", Place::Edge, [198, 51, 100, 1], Place::Outside);
        link("edge", Place::Router, [192, 168, 3, 1], Place::Edge);
        link("node", Place::Router, Place::Router.v4(), Place::Node);
        link("other", Place::Router, [192, 168, 2, 1], Place::Other);
        link("pod", Place::Node, [10, 1, 1, 1], Place::Pod);
        link("second", Place::Node, [10, 1, 2, 1], Place::Second);
        link("far", Place::Other, [10, 2, 1, 1], Place::Far);
        // Wider than the links.
        let to_all: Networks =
            &[([10, 0, 0, 0], 8), ([192, 168, 0, 0], 16), ([198, 51, 0, 0], 16), ([203, 0, 113, 0], 24)];
        let routes: &[(Place, Networks, [u8; 4])] = &[
            (Place::Outside, to_all, [198, 51, 100, 1]),
            (Place::Edge, to_all, [192, 168, 3, 1]),
            (Place::Router, &[([198, 51, 0, 0], 16)], Place::Edge.v4()),
            (
                Place::Router,
                &[([10, 1, 0, 0], 16), ([10, 96, 0, 0], 16), ([203, 0, 113, 0], 24)],
                Place::Node.v4(),
            ),
            (Place::Router, &[([10, 2, 0, 0], 16)], Place::Other.v4()),
            (Place::Node, to_all, Place::Router.v4()),
            (Place::Other, to_all, [192, 168, 2, 1]),
            (Place::Pod, to_all, [10, 1, 1, 1]),
            (Place::Second, to_all, [10, 1, 2, 1]),
            (Place::Far, to_all, [10, 2, 1, 1]),
        ];
        for (place, networks, gateway) in routes {
            for (family, (octets, prefix)) in
                FAMILIES.iter().flat_map(|f| networks.iter().map(move |n| (*f, *n)))
            {
                places[place]
                    .add_route(network(family, octets, prefix), address(family, *gateway))
                    .unwrap_or_else(|error| panic!("{place:?}: {error}"));
            }
        }
        for place in [Place::Edge, Place::Router, Place::Node, Place::Other] {
            places[&place].forward().expect("forwarding");
            places[&place].run(answer_all_errors);
        }
        let servers = Place::SERVERS.map(|place| {
            let at = FAMILIES.map(|family| place.server(family));
            let all = at.iter().flat_map(|at| [(*at, Protocol::Tcp), (*at, Protocol::Udp)]);
            places[&place].run(|| serve(all))
        });
        let node = places[&Place::Node].run(|| Node::new(state(settings)));
        Self { places, _servers: servers.into(), node }
    }

    /// The settings of the bed's node: everything is served as packets.
    #[must_use]
    pub fn settings() -> Settings {
        let networks = FAMILIES.map(|family| {
            let (ip, prefix) = network(family, [10, 96, 0, 0], 16);
            format!("{ip}/{prefix}").parse().expect("a network")
        });
        Settings {
            packets: PacketMode::All,
            service_cidrs: Some(networks.to_vec()),
            ..Settings::of_node(Place::Node.node_name())
        }
    }

    /// The Node objects.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn nodes() -> [Object; 2] {
        [(Place::Node, 1), (Place::Other, 2)].map(|(place, n)| {
            let pods = FAMILIES.map(|family| {
                let (ip, prefix) = network(family, [10, n, 0, 0], 16);
                format!("{ip}/{prefix}")
            });
            let addresses =
                FAMILIES.map(|family| json!({"type": "InternalIP", "address": place.address(family)}));
            object(&json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": place.node_name()},
                "spec": {"podCIDR": pods[0], "podCIDRs": pods},
                "status": {"addresses": addresses},
            }))
            .expect("a Node")
        })
    }

    /// The namespace of a place.
    #[must_use]
    pub fn at(&self, place: Place) -> &NetNs {
        &self.places[&place]
    }

    /// Whether this node has an address.
    #[must_use]
    pub fn is_of_node(ip: IpAddr) -> bool {
        let own = [Place::Node.v4(), [10, 1, 1, 1], [10, 1, 2, 1]];
        FAMILIES.iter().any(|family| own.iter().any(|v4| address(*family, *v4) == ip))
    }

    /// As [`Node::follow`].
    ///
    /// # Panics
    ///
    /// As [`Node::follow`].
    pub fn follow(&mut self, cluster: &Cluster) -> Transaction {
        self.node.follow(cluster)
    }

    /// Calls an address from a place.
    ///
    /// # Panics
    ///
    /// If there is no socket for it, or the answer is none of a server of the bed.
    #[must_use]
    pub fn call(&self, from: Place, to: SocketAddr, protocol: Protocol, patience: Duration) -> Outcome {
        self.at(from).run(|| call(to, protocol, patience))
    }
}

impl Default for Bed {
    fn default() -> Self {
        Self::new()
    }
}

/// A table without the elements that its rules have added.
#[must_use]
pub fn without_clients(mut table: Table) -> Table {
    for set in table.sets.values_mut().filter(|set| set.spec.flags.contains(SetFlags::DYNAMIC)) {
        set.elements.clear();
    }
    table
}

/// A state for the bed's node.
#[must_use]
pub fn state(settings: Settings) -> State {
    let own = [Place::Node.v4(), [10, 1, 1, 1], [10, 1, 2, 1]];
    let interfaces = own.iter().flat_map(|v4| FAMILIES.map(|family| address(family, *v4))).collect();
    State::new(settings, interfaces, Capacity::default(), &Image::default())
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A server answered.
    Reached {
        /// Its address.
        server: SocketAddr,
        /// The client's address, as the server saw it.
        client: SocketAddr,
    },
    /// `ECONNREFUSED`
    Refused,
    /// No answer came in time.
    Silence,
    /// Another error.
    Failed(io::ErrorKind),
}

/// Calls an address in the calling thread's namespace.
///
/// # Panics
///
/// As [`Bed::call`].
#[must_use]
pub fn call(to: SocketAddr, protocol: Protocol, patience: Duration) -> Outcome {
    let answer = match protocol {
        Protocol::Tcp => connect(to, patience).map(|(_stream, outcome)| outcome),
        _ => datagram(to, b"?", patience).map(|(outcome, _)| outcome),
    };
    answer.unwrap_or_else(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => Outcome::Refused,
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Outcome::Silence,
        other => Outcome::Failed(other),
    })
}

/// Connects, and reads what the server says first.
///
/// # Errors
///
/// Of the system calls; `TimedOut` or `WouldBlock` without an answer.
pub fn connect(to: SocketAddr, patience: Duration) -> io::Result<(TcpStream, Outcome)> {
    let stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut line = String::new();
    // The server says nothing beyond the line without being asked.
    BufReader::new(&stream).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    Ok((stream, reached(&line)))
}

/// Ports of clients, above the node ports.
static NEXT_PORT: AtomicU16 = AtomicU16::new(0);

/// Sends a datagram from a connected socket. Returns also what the server sends back of it.
///
/// # Errors
///
/// Of the system calls; `WouldBlock` without an answer.
pub fn datagram(to: SocketAddr, octets: &[u8], patience: Duration) -> io::Result<(Outcome, Vec<u8>)> {
    // A port that comes again would continue a tracked flow to a Service that has been deleted.
    let port = 33_000 + NEXT_PORT.fetch_add(1, Ordering::Relaxed) % 28_000;
    let socket = UdpSocket::bind(SocketAddr::new(unspecified(to.ip()), port))?;
    socket.connect(to)?;
    ask(&socket, octets, patience)
}

/// Sends a datagram from a connected socket, and waits for the answer.
///
/// # Errors
///
/// As [`datagram`].
pub fn ask(socket: &UdpSocket, octets: &[u8], patience: Duration) -> io::Result<(Outcome, Vec<u8>)> {
    socket.set_read_timeout(Some(patience))?;
    if let Err(error) = socket.send(octets) {
        // The kernel fails the call if a rule drops the node's own datagram, and reports a refusal as it does
        // one from elsewhere.
        let is_dropped = error.kind() == io::ErrorKind::PermissionDenied;
        return Err(socket.take_error()?.unwrap_or(if is_dropped {
            io::ErrorKind::TimedOut.into()
        } else {
            error
        }));
    }
    let mut buffer = vec![0; 1 << 16];
    let n = socket.recv(&mut buffer)?;
    let end = buffer[..n].iter().position(|octet| *octet == b'\n').expect("a line");
    let line = String::from_utf8_lossy(&buffer[..end]);
    Ok((reached(&line), buffer[end + 1..n].to_vec()))
}

/// Removes the limit of ICMP errors in the calling thread's namespace: tests cause more of them in a second
/// than a host answers, and redirects count among them.
///
/// # Panics
///
/// If `/proc/sys` cannot be written.
pub fn answer_all_errors() {
    // The types that are limited: none but echo replies.
    for limited in ["ipv4/icmp_ratemask", "ipv6/icmp/ratemask"] {
        fs::write(format!("/proc/sys/net/{limited}"), "0").expect("no limit of ICMP errors");
    }
}

/// The unspecified address of the same family.
#[must_use]
pub fn unspecified(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) }
}

fn reached(line: &str) -> Outcome {
    let words: Vec<SocketAddr> =
        line.split_whitespace().map(|word| word.parse().expect("an address")).collect();
    let [server, client] = words[..] else { panic!("an answer that names no server: {line:?}") };
    Outcome::Reached { server, client }
}

/// Starts TCP and UDP servers in the calling thread's namespace. Each says its own address and the client's,
/// then echoes.
///
/// # Panics
///
/// If an address cannot be bound.
#[must_use]
pub fn serve(addresses: impl IntoIterator<Item = (SocketAddr, Protocol)>) -> Servers {
    let sockets = addresses.into_iter().map(|(at, protocol)| {
        let socket = match protocol {
            Protocol::Tcp => TcpListener::bind(at).map(Socket::Stream),
            _ => UdpSocket::bind(at).map(Socket::Datagrams),
        };
        socket.unwrap_or_else(|error| panic!("{at}: {error}"))
    });
    Servers::start("bed", sockets, &Witness).expect("servers")
}

#[derive(Clone)]
struct Witness;

impl Answers for Witness {
    async fn serve(self, mut stream: AsyncStream) -> io::Result<()> {
        let line = format!("{} {}\n", stream.local_addr()?, stream.peer_addr()?);
        stream.write_all(line.as_bytes()).await?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok(()),
                n => stream.write_all(&buffer[..n]).await?,
            }
        }
    }

    fn answer(&self, own: SocketAddr, client: SocketAddr, datagram: &[u8]) -> Vec<u8> {
        [format!("{own} {client}\n").as_bytes(), datagram].concat()
    }
}
