//! Settings from flags, environment and file.
//!
//! A flag takes precedence over its environment variable, that over the file of `--config`, that over the
//! default.

use std::{
    fmt::{self, Display},
    fs,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lb_common::limits::MAX_SERVICE_CIDRS;
use lb_core::{
    desired::{ExternalIps, NodePortAddresses, PacketMode, cluster_ips::merged},
    model::{
        Cidr, ServiceKey,
        ingest::{is_domain, is_label},
    },
};
use serde::de::DeserializeOwned;

/// Default of `--pin-path`.
pub const PIN_PATH: &str = "/sys/fs/bpf/socklb";
/// Default of `--state-dir`.
pub const STATE_DIR: &str = "/var/lib/socklb";

/// Default of `--audit-interval`.
pub const AUDIT_INTERVAL: Duration = Duration::from_secs(60);
/// Default of `--self-test-interval`.
pub const SELF_TEST_INTERVAL: Duration = Duration::from_secs(30);
/// Default of `--metrics-bind-address`: kube-proxy's.
pub const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Default of `--healthz-bind-address`: kube-proxy's.
pub const HEALTHZ: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 10256);

/// Valid sizes of a map, in entries.
const ENTRIES: RangeInclusive<u32> = 1..=1 << 24;
/// Maximum size of a settings file, in octets.
const MAX_LEN: u64 = 256 << 10;

/// A flag, variable or file with an unusable value.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// A settings file in YAML. Its keys are the flags' names without dashes, such as `max-services: 1000`. The
/// default sets nothing.
#[derive(Debug, Default)]
pub struct SettingsFile {
    path: PathBuf,
    text: String,
}

impl SettingsFile {
    /// Reads a file and deserializes its values.
    ///
    /// # Errors
    ///
    /// [`UsageError`] that names file, line and key.
    pub fn read<T: DeserializeOwned>(path: &Path) -> Result<(Self, T), UsageError> {
        let wrong =
            |problem: &dyn fmt::Display| UsageError(format!("--config {}: {problem}", path.display()));
        let text = read_bounded(path).map_err(|error| wrong(&error))?;
        let values = parse(&text).map_err(|problem| wrong(&problem))?;
        Ok((Self { path: path.to_owned(), text }, values))
    }

    /// Parses the value of a key with its flag's parser.
    ///
    /// # Errors
    ///
    /// [`UsageError`] that names file, line, key, value and what is expected.
    pub fn value<T>(
        &self,
        key: &str,
        value: Option<String>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, UsageError> {
        let wrong = |value, hint| UsageError(format!("{}: {value:?}: {hint}", self.place(key)));
        value.map(|value| parse(&value).map_err(|hint| wrong(value, hint))).transpose()
    }

    /// Where a key is set, as `--config FILE: line N: KEY`.
    #[must_use]
    pub fn place(&self, key: &str) -> String {
        let is_key = |line: &str| {
            let rest = line.trim_start_matches(['"', '\'']).strip_prefix(key);
            rest.is_some_and(|rest| rest.trim_start_matches(['"', '\'']).trim_start().starts_with(':'))
        };
        let line =
            self.text.lines().position(is_key).map_or_else(String::new, |n| format!("line {}: ", n + 1));
        format!("--config {}: {line}{key}", self.path.display())
    }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_LEN + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_LEN {
        let problem = format!("is larger than {} KiB: name the right settings file", MAX_LEN >> 10);
        return Err(io::Error::other(problem));
    }
    Ok(text)
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_saphyr::from_str(text).map_err(|error| {
        // The library adds an excerpt below the first line; this tool promises one line.
        let message = error.to_string();
        let message = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
        // Replaces the parser's terms for lists and scalars.
        let message = &message
            .replace("expected sequence start", "expected a list")
            .replace("expected string scalar", "expected a single value");
        // The message has a line but no key. A second parse, without lines, finds the key.
        let tree = serde_saphyr::from_str::<serde_json::Value>(text).ok();
        let key = tree.and_then(|tree| serde_path_to_error::deserialize::<_, T>(tree).err());
        match key.map(|error| error.path().to_string()) {
            Some(key) if key != "." && !message.contains(&key) => format!("{key}: {message}"),
            _ => message.to_owned(),
        }
    })
}

/// Parses the number of entries of a map.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn entries(text: &str) -> Result<u32, String> {
    let number = text.replace('_', "").parse().ok().filter(|number| ENTRIES.contains(number));
    number.ok_or_else(|| format!("expected a number from {} to {}", ENTRIES.start(), ENTRIES.end()))
}

/// Parses YAML 1.1's words for true and false.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn boolean(text: &str) -> Result<bool, String> {
    match &*text.trim().to_ascii_lowercase() {
        "true" | "yes" | "on" | "y" => Ok(true),
        "false" | "no" | "off" | "n" => Ok(false),
        _ => Err("expected true or false".to_owned()),
    }
}

/// Parses `on` or `off`, or another of YAML 1.1's words for them.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn switch(text: &str) -> Result<bool, String> {
    boolean(text).map_err(|_unknown| "expected on or off".to_owned())
}

/// Parses `FIRST-LAST`.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn node_port_range(text: &str) -> Result<(u16, u16), String> {
    let parsed = text.split_once('-').and_then(|(first, last)| {
        let range: (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (range.0 > 0 && range.0 <= range.1).then_some(range)
    });
    parsed.ok_or_else(|| "expected FIRST-LAST with ports from 1 to 65535, such as 30000-32767".to_owned())
}

/// The value of `--nodeport-addresses`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePortList {
    /// Addresses of the node.
    pub addresses: NodePortAddresses,
    /// Whether the list has `localhost`.
    pub localhost: bool,
}

impl fmt::Display for NodePortList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, networks): (_, &[Cidr]) = match &self.addresses {
            NodePortAddresses::All => (self.localhost.then_some("all"), &[]),
            NodePortAddresses::Primary => (Some("primary"), &[]),
            NodePortAddresses::Within(networks) => (None, networks),
            NodePortAddresses::Listed { primary, networks } => (primary.then_some("primary"), networks),
        };
        let words = self.localhost.then_some("localhost").into_iter().chain(word).map(str::to_owned);
        let networks = networks.iter().map(ToString::to_string);
        f.write_str(&words.chain(networks).collect::<Vec<_>>().join(","))
    }
}

/// Parses a comma-separated list of networks and of the words `all`, `primary` and `localhost`.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn node_port_addresses(text: &str) -> Result<NodePortList, String> {
    if text.trim().is_empty() {
        return Ok(NodePortList::default());
    }
    let (mut all, mut primary, mut localhost, mut networks) = (false, false, false, Vec::new());
    for item in text.split(',').map(str::trim) {
        match item {
            "all" => all = true,
            "primary" => primary = true,
            "localhost" => localhost = true,
            item => networks.push(lb_core::model::address::parse_cidr(item).ok_or_else(|| {
                format!(
                    "{item:?} is not a network: expected ADDRESS/LENGTH, or the words all, primary, localhost"
                )
            })?),
        }
    }
    let addresses = match (all, primary, localhost) {
        (true, ..) => NodePortAddresses::All,
        (false, false, false) => NodePortAddresses::Within(networks),
        (false, true, _) if networks.is_empty() => NodePortAddresses::Primary,
        (false, ..) => NodePortAddresses::Listed { primary, networks },
    };
    Ok(NodePortList { addresses, localhost })
}

/// `--service-cidr`: the networks, or `None` for the word `none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidrs(pub Option<Vec<Cidr>>);

impl Default for ServiceCidrs {
    fn default() -> Self {
        Self(Some(Vec::new()))
    }
}

impl fmt::Display for ServiceCidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => f.write_str("none"),
            Some(networks) => {
                f.write_str(&networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// Parses a comma-separated list of networks that cluster IPs come from, or the word `none`.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn service_cidrs(text: &str) -> Result<ServiceCidrs, String> {
    if text.trim() == "none" {
        return Ok(ServiceCidrs(None));
    }
    let parse = |item: &str| {
        let network = lb_core::model::address::parse_service_cidr(item.trim());
        network.map_err(|problem| format!("{item:?} {problem}"))
    };
    let items = text.split(',').filter(|item| !item.trim().is_empty());
    let (networks, n_left_out) = merged(items.map(parse).collect::<Result<Vec<_>, _>>()?);
    if n_left_out > 0 {
        return Err(format!("expected at most {MAX_SERVICE_CIDRS} networks of each family"));
    }
    Ok(ServiceCidrs(Some(networks)))
}

/// Parses `any`, `nodes` or `none`.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn external_ips(text: &str) -> Result<ExternalIps, String> {
    one_of([ExternalIps::Any, ExternalIps::Nodes, ExternalIps::None], text)
}

/// Parses `off`, `external` or `all`.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn packets(text: &str) -> Result<PacketMode, String> {
    one_of([PacketMode::Off, PacketMode::External, PacketMode::All], text)
}

fn one_of<T: Display>(all: [T; 3], text: &str) -> Result<T, String> {
    let [a, b, c] = all.each_ref().map(T::to_string);
    let named = all.into_iter().find(|setting| setting.to_string() == text.trim());
    named.ok_or_else(|| format!("expected {a}, {b} or {c}"))
}

/// Parses `ADDRESS:PORT`; an empty text means no listener.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn bind_address(text: &str) -> Result<Listen, String> {
    match text.trim() {
        "" => Ok(Listen(None)),
        text => text.parse().map(|address| Listen(Some(address))).map_err(|_no_address| {
            "expected ADDRESS:PORT, such as 127.0.0.1:10249 or [::]:10256, or nothing for no listener"
                .to_owned()
        }),
    }
}

/// Address to listen on; `None` for no listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen(pub Option<SocketAddr>);

/// The value of `--names-bind-address`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BindAddresses(pub Vec<SocketAddr>);

/// Parses a comma-separated list of addresses with ports; empty for none.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn bind_addresses(text: &str) -> Result<BindAddresses, String> {
    let addresses =
        list(text).map(|part| part.parse().ok().filter(|address: &SocketAddr| address.port() > 0));
    addresses.collect::<Option<_>>().map(BindAddresses).ok_or_else(|| {
        "expected addresses with ports, separated by commas, such as 127.0.0.153:53, or nothing for none"
            .to_owned()
    })
}

/// The value of `--names-upstream`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsServers(pub Vec<SocketAddr>);

/// Parses a comma-separated list of `ADDRESS` and `ADDRESS:PORT`; the default port is 53.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn dns_servers(text: &str) -> Result<DnsServers, String> {
    let server = |part: &str| {
        let alone = part.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
        alone.or_else(|_has_port| part.parse()).ok().filter(|server| server.port() > 0)
    };
    list(text).map(server).collect::<Option<_>>().map(DnsServers).ok_or_else(|| {
        "expected addresses, separated by commas, such as 192.0.2.53 or [2001:db8::53]:5353".to_owned()
    })
}

/// A domain in lower case, without a final dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain(pub Arc<str>);

/// Parses a domain of the labels that DNS names of Kubernetes have.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn domain(text: &str) -> Result<Domain, String> {
    let name = text.trim().trim_end_matches('.').to_ascii_lowercase();
    if is_domain(&name) {
        Ok(Domain(name.into()))
    } else {
        Err("expected a domain, such as cluster.local".to_owned())
    }
}

/// The value of `--names-forward`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domains(pub Vec<Arc<str>>);

/// Parses a comma-separated list of domains; empty for none.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn domains(text: &str) -> Result<Domains, String> {
    let domains = list(text).map(|part| domain(part).map(|Domain(name)| name));
    domains
        .collect::<Result<_, _>>()
        .map(Domains)
        .map_err(|_one| "expected domains, separated by commas, such as legacy.svc.cluster.local".to_owned())
}

/// Parses `NAMESPACE/NAME`.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn service_key(text: &str) -> Result<ServiceKey, String> {
    let key = text.trim().split_once('/').filter(|(namespace, name)| is_label(namespace) && is_label(name));
    key.map(|(namespace, name)| ServiceKey::new(namespace, name))
        .ok_or_else(|| "expected NAMESPACE/NAME of a Service, such as kube-system/kube-dns".to_owned())
}

/// The parts of a comma-separated list, without those that are empty.
fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// Parses a duration such as `500ms`, `2s` or `1m`.
///
/// # Errors
///
/// A sentence about what is expected.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_no_number| duration_hint())?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs).ok_or_else(duration_hint),
        "" if number == 0 => Ok(Duration::ZERO),
        _ => Err(duration_hint()),
    }
}

fn duration_hint() -> String {
    "expected a whole number with a unit: 500ms, 2s or 1m".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_port_ranges() {
        assert_eq!(node_port_range("30000-32767"), Ok((30000, 32767)));
        for wrong in ["", "30000", "2-1", "0-5", "1-65536", "a-b"] {
            assert!(node_port_range(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_without_end_is_not_read_to_its_end() {
        for path in ["/dev/zero", "/nonexistent"] {
            let UsageError(problem) = SettingsFile::read::<serde_json::Value>(Path::new(path)).unwrap_err();
            let is_large = problem.contains("larger than 256 KiB");
            assert!(problem.starts_with(&format!("--config {path}: ")), "{problem}");
            assert_eq!(is_large, path == "/dev/zero", "{problem}");
        }
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named_by_file_line_and_key() {
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
        struct File {
            max_services: Option<String>,
            exclude_pods: Option<String>,
            exclude_cgroup: Vec<PathBuf>,
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socklb.yaml");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            let (file, values) = SettingsFile::read::<File>(&path)?;
            let exclude_pods = file.value("exclude-pods", values.exclude_pods, boolean)?;
            Ok((
                file.value("max-services", values.max_services, entries)?,
                exclude_pods,
                values.exclude_cgroup,
            ))
        };
        for (text, expected) in [
            (
                "exclude-cgroup: []\nmax-services: many\n",
                "line 2: max-services: \"many\": expected a number from 1 to 16777216",
            ),
            (
                "# max-services: 1\n\n'max-services' : -1\n",
                "line 3: max-services: \"-1\": expected a number from 1 to",
            ),
            ("max-services: 16777217\n", "line 1: max-services: \"16777217\": expected"),
            ("{exclude-pods: maybe}\n", "exclude-pods: \"maybe\": expected true or false"),
            ("max-services: 1\nexclude-cgroup: 5\n", "exclude-cgroup: line 2 column 17: expected a list"),
            (
                "max-services: 1\nmax-servces: 1\n",
                "line 2 column 1: unknown field `max-servces`, expected one of",
            ),
            ("max-services: [\n", "line "),
        ] {
            let UsageError(problem) = read(text).unwrap_err();
            let place = format!("--config {}: ", path.display());
            assert!(
                problem.strip_prefix(&place).is_some_and(|rest| rest.starts_with(expected)),
                "{text:?}: {problem}"
            );
            assert_eq!(problem.lines().count(), 1, "{problem}");
        }
        let values = read("max-services: 1_000\nexclude-pods: yes\nexclude-cgroup: [/a]\n").unwrap();
        assert_eq!(values, (Some(1000), Some(true), vec!["/a".into()]));
        assert_eq!(read("max-services:\n").unwrap(), (None, None, Vec::new()));
        let UsageError(problem) = SettingsFile::read::<File>(&directory.path().join("none")).unwrap_err();
        assert!(problem.contains("/none: No such file"), "{problem}");
    }

    #[test]
    fn durations() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for wrong in ["", "5", "5h", "ms", "-1s", "99999999999999999999s", "18446744073709551615m"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn settings_are_one_of_three_words() {
        assert_eq!(external_ips("any"), Ok(ExternalIps::Any));
        assert_eq!(external_ips("nodes "), Ok(ExternalIps::Nodes));
        assert_eq!(external_ips("none"), Ok(ExternalIps::None));
        assert!(external_ips("").is_err() && external_ips("all").is_err());
        assert_eq!(packets("external"), Ok(PacketMode::External));
        assert_eq!(packets("any"), Err("expected off, external or all".to_owned()));
    }

    #[test]
    fn service_cidrs_are_networks_of_a_sensible_size() {
        assert_eq!(service_cidrs(""), Ok(ServiceCidrs::default()));
        let parsed = service_cidrs("fd00:10:96::/112, 10.96.0.0/12,10.96.0.0/16").unwrap();
        assert_eq!(parsed.to_string(), "10.96.0.0/12,fd00:10:96::/112");
        let none = service_cidrs(" none").unwrap();
        assert_eq!((none.to_string(), none), ("none".to_owned(), ServiceCidrs(None)));
        let many = (0..9).map(|n| format!("10.{n}.0.0/16")).collect::<Vec<_>>().join(",");
        for wrong in ["10.96.0.0", "0.0.0.0/0", "10.0.0.0/7", "fd00::/47", "a,b", "none,10.96.0.0/12", &many]
        {
            assert!(service_cidrs(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_empty_address_is_no_listener() {
        assert_eq!(bind_address(""), Ok(Listen(None)));
        assert_eq!(bind_address("[::]:10256"), Ok(Listen(Some(([0u16; 8], 10256).into()))));
        for wrong in ["10256", ":10256", "localhost:10256", "127.0.0.1", "127.0.0.1:65536"] {
            assert!(bind_address(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn settings_of_names() {
        let servers = dns_servers("192.0.2.53, [2001:db8::53]:5353,192.0.2.54:54").unwrap().0;
        let shown: Vec<String> = servers.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["192.0.2.53:53", "[2001:db8::53]:5353", "192.0.2.54:54"]);
        assert_eq!(dns_servers(""), Ok(DnsServers::default()));
        assert_eq!(bind_addresses("127.0.0.153:53").unwrap().0, [([127, 0, 0, 153], 53).into()]);
        assert_eq!(&*domain("Cluster.Local.").unwrap().0, "cluster.local");
        assert_eq!(domains("a.b, c").unwrap().0.len(), 2);
        assert_eq!(service_key("kube-system/kube-dns"), Ok(ServiceKey::new("kube-system", "kube-dns")));
        for wrong in ["localhost", "192.0.2.53:0", "192.0.2.53:", "[::1]"] {
            assert!(dns_servers(wrong).is_err() && bind_addresses(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", ".", "a..b", "-a", "a-", "a_b", &"a".repeat(64), &["a"; 128].join(".")] {
            assert!(domain(wrong).is_err(), "{wrong}");
        }
        for wrong in ["kube-dns", "/kube-dns", "kube-system/", "a/b/c", "A/b"] {
            assert!(service_key(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn node_port_addresses_are_networks_and_words() {
        use NodePortAddresses::{All, Listed, Primary, Within};
        let networks = || vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        for (text, addresses, localhost, shown) in [
            ("", All, false, ""),
            (" all ", All, false, ""),
            ("primary", Primary, false, "primary"),
            ("10.0.0.0/8, fd00::/8", Within(networks()), false, "10.0.0.0/8,fd00::/8"),
            ("localhost", Listed { primary: false, networks: vec![] }, true, "localhost"),
            ("all,localhost", All, true, "localhost,all"),
            ("10.0.0.0/8,all", All, false, ""),
            ("primary,localhost", Primary, true, "localhost,primary"),
            (
                "10.0.0.0/8,primary,fd00::/8",
                Listed { primary: true, networks: networks() },
                false,
                "primary,10.0.0.0/8,fd00::/8",
            ),
            (
                "localhost,10.0.0.0/8,fd00::/8",
                Listed { primary: false, networks: networks() },
                true,
                "localhost,10.0.0.0/8,fd00::/8",
            ),
        ] {
            let list = node_port_addresses(text).unwrap();
            assert_eq!((&list.addresses, list.localhost), (&addresses, localhost), "{text}");
            assert_eq!(list.to_string(), shown, "{text}");
            assert_eq!(node_port_addresses(shown), Ok(list), "the shown text parses");
        }
        for wrong in ["10.0.0.0/33", "primary,", "Primary", "primary 10.0.0.0/8", "loopback"] {
            assert!(node_port_addresses(wrong).is_err(), "{wrong}");
        }
    }
}
