//! `socklb top` and `socklb monitor`, during calls of programs.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Lines, Read as _, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use lb_core::model::Protocol::{self, Tcp, Udp};
use lb_tests::{
    client::{Domain, Socket, call},
    installed::{Place, QUIET},
};
use nix::{
    errno::Errno,
    pty::{OpenptyResult, Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    socklb::{is_up, serve, with_town},
    town::{self},
};

/// Runs a test with the pinned maps of an agent that has exited: the commands read those.
fn with_served_town(test: impl FnOnce(&Place) + Send) {
    with_town(|place, town| {
        let cluster = town.cluster(0..2).annotated("socklb.io/balance", "least-connections");
        assert_eq!(serve(place, &cluster, &QUIET).end(Signal::SIGTERM), Some(0));
        test(place);
    });
}

/// Starts a command whose output is read while it runs.
fn spawn(place: &Place, command: &[&str]) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut command_line = Command::new(&place.binary);
    let mut child = command_line.args(place.args(command)).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

fn terminate(mut child: Child) {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

fn connected(protocol: Protocol, service: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::of(service.ip()), protocol);
    socket.connect(service).unwrap();
    socket
}

/// One port in an answer of `top`.
fn port(report: &Value, name: &str) -> Value {
    let services = report["services"].as_array().unwrap();
    services.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name}: {report}")).clone()
}

fn number(row: &Value, field: &str) -> u64 {
    row[field].as_u64().unwrap_or_else(|| panic!("{field}: {row}"))
}

#[test]
fn top_counts_the_calls_and_sockets_of_programs() {
    with_served_town(|place| {
        let top = || place.json(&["top", "-n", "1", "-o", "json"]);
        let before = top();
        let held = [(); 3].map(|()| connected(Tcp, town::web()[0]));
        for _ in 0..2 {
            assert!(is_up(town::web()[0]));
            assert_eq!(call(town::empty(), Tcp), Err(Errno::ECONNREFUSED));
            drop(connected(Udp, town::dns()[0]));
        }
        let after = top();
        let growth = |name: &str, field: &str| {
            number(&port(&after, name), field) - number(&port(&before, name), field)
        };
        assert_eq!(growth("web-v4", "calls"), 5);
        assert_eq!(growth("web-v4", "refused"), 0);
        assert_eq!((growth("empty", "calls"), growth("empty", "refused")), (0, 2));
        assert_eq!((growth("dns-udp-v4", "calls"), growth("dns-tcp-v4", "calls")), (2, 0));
        let web = port(&after, "web-v4");
        let of_endpoints = |field: &str| -> u64 {
            web["endpoints"].as_array().unwrap().iter().map(|endpoint| number(endpoint, field)).sum()
        };
        assert_eq!(of_endpoints("calls"), number(&web, "calls"), "{web}");
        if after["sockets_complete"] == true {
            assert_eq!((growth("web-v4", "sockets"), of_endpoints("sockets")), (3, 3), "{web}");
        }
        assert_eq!((growth("web-v4", "active"), of_endpoints("active")), (3, 3), "{web}");
        assert_eq!(of_endpoints("share"), 2 * 255, "{web}");
        drop(held);
        if after["sockets_complete"] == true {
            assert_eq!(number(&port(&top(), "web-v4"), "sockets"), 0);
        }
        assert_eq!(number(&port(&top(), "web-v4"), "active"), 0);

        let table = place.text(&["top", "-n", "1", "--filter", "web-v4"]);
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].starts_with("SERVICE") && lines[2].starts_with("default/web-v4"), "{table}");
        assert_eq!(lines.len(), 5, "{table}");
        assert!(!table.contains('\u{1b}') && lines.iter().all(|line| line.chars().count() <= 100), "{table}");
    });
}

#[test]
fn top_tells_rates_from_one_look_to_the_next() {
    with_served_town(|place| {
        let (mut child, mut lines) = spawn(place, &["top", "-n", "2", "--interval", "1s", "-o", "json"]);
        let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
        let first = next();
        assert_eq!(
            (&first["seconds"], &port(&first, "web-v4")["calls_per_second"]),
            (&Value::Null, &Value::Null)
        );
        for _ in 0..20 {
            assert!(is_up(town::web()[0]));
        }
        let second = next();
        let (web, seconds) = (port(&second, "web-v4"), second["seconds"].as_f64().unwrap());
        assert_eq!(number(&web, "calls") - number(&port(&first, "web-v4"), "calls"), 20);
        let rate = web["calls_per_second"].as_f64().unwrap();
        assert!((rate - 20.0 / seconds).abs() < 0.2, "{rate} in {seconds} s");
        assert!(child.wait().unwrap().success());
    });
}

/// The visible screen: programs write only differences.
#[derive(Default)]
struct Screen {
    lines: Vec<Vec<char>>,
    row: usize,
    column: usize,
}

impl Screen {
    const ROWS: u16 = 30;
    const COLUMNS: u16 = 100;

    /// Takes the next character or escape sequence from the text. `None` if it is incomplete.
    fn take<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let mut rest = text.chars();
        match rest.next()? {
            '\u{1b}' => {
                let sequence = text.strip_prefix("\u{1b}[")?;
                let end = sequence.find(|c: char| c.is_ascii_alphabetic())?;
                let numbers: Vec<usize> =
                    sequence[..end].split(';').map(|number| number.parse().unwrap_or(1)).collect();
                match &sequence[end..=end] {
                    "H" => (self.row, self.column) = (numbers[0] - 1, numbers.get(1).map_or(0, |n| n - 1)),
                    "J" => self.lines.clear(),
                    _ => {}
                }
                return Some(&sequence[end + 1..]);
            }
            '\r' => self.column = 0,
            '\n' => self.row += 1,
            shown => {
                self.lines.resize_with(self.lines.len().max(self.row + 1), Vec::new);
                let line = &mut self.lines[self.row];
                line.resize(line.len().max(self.column + 1), ' ');
                line[self.column] = shown;
                self.column += 1;
            }
        }
        Some(rest.as_str())
    }

    fn text(&self) -> String {
        self.lines.iter().map(|line| line.iter().collect::<String>() + "\n").collect()
    }
}

/// A program on the test's own terminal, and its output.
struct Terminal {
    child: Child,
    keys: File,
    written: mpsc::Receiver<Vec<u8>>,
    /// All output so far; the first `n_shown` bytes are on the screen.
    text: String,
    n_shown: usize,
    screen: Screen,
}

impl Terminal {
    fn run(command: &mut Command) -> Self {
        let size = Winsize { ws_row: Screen::ROWS, ws_col: Screen::COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
        let end_of_program = || Stdio::from(slave.try_clone().unwrap());
        let child = command
            .env("TERM", "xterm-256color")
            .stdin(end_of_program())
            .stdout(end_of_program())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, written) = mpsc::channel();
        let mut screen = File::from(master.try_clone().unwrap());
        let _ends_with_the_terminal = thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = screen.read(&mut bytes) {
                if sender.send(bytes[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let (text, screen) = (String::new(), Screen::default());
        Self { child, keys: File::from(master), written, text, n_shown: 0, screen }
    }

    /// Waits until the program has written something, or the screen shows it.
    fn until(&mut self, what: &str, is_so: impl Fn(&str, &str) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !is_so(&self.text, &self.screen.text()) {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(bytes) = self.written.recv_timeout(left) else {
                panic!("{what} was never shown: {}\n{:?}", self.screen.text(), self.text)
            };
            self.text += &String::from_utf8_lossy(&bytes);
            while let Some(rest) = self.screen.take(&self.text[self.n_shown..]) {
                self.n_shown = self.text.len() - rest.len();
            }
        }
    }

    fn until_written(&mut self, wanted: &str) {
        self.until(wanted, |written, _| written.contains(wanted));
    }

    fn until_shown(&mut self, wanted: &str) {
        self.until(wanted, |_, shown| shown.contains(wanted));
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}

#[test]
fn top_on_a_terminal_obeys_keys_and_leaves_it_as_it_was() {
    with_served_town(|place| {
        let mut command = Command::new(&place.binary);
        let mut terminal = Terminal::run(command.args(place.args(&["top", "--interval", "100ms"])));
        // The alternate screen, and the table on it.
        terminal.until_written("\u{1b}[?1049h");
        terminal.until_shown("default/web-v4");
        terminal.press("/empty");
        terminal.until_shown("filter: empty_");
        terminal.press("\r ");
        terminal.until_shown("filter: empty (Esc clears it)");
        terminal.until_shown("PAUSED");
        terminal.until("only what the filter leaves", |_, shown| {
            shown.contains("default/empty") && !shown.contains("default/web-v4")
        });
        terminal.press("q");
        terminal.until_written("\u{1b}[?1049l");
        assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
    });
}

/// Reads a stream of JSON while calls are made.
fn monitored(place: &Place, flags: &[&str], calls: impl FnOnce()) -> Vec<Value> {
    let command = [&["monitor", "-o", "json", "--interval", "10ms"], flags].concat();
    let (child, lines) = spawn(place, &command);
    // What exists before the first poll is not new: allow time for one.
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect::<Vec<Value>>()
        });
        thread::sleep(Duration::from_secs(2));
        calls();
        thread::sleep(Duration::from_millis(500));
        terminate(child);
        reader.join().unwrap()
    })
}

/// Long before there is a connection or a summary.
#[test]
fn monitor_says_at_once_what_it_shows() {
    with_served_town(|place| {
        let (child, lines) = spawn(place, &["monitor"]);
        let started = Instant::now();
        let lines: Vec<String> = lines.take(2).map(Result::unwrap).collect();
        assert!(started.elapsed() < Duration::from_secs(8), "before the first summary");
        assert!(lines[0].starts_with("# time  service  address called -> endpoint"), "{lines:?}");
        assert!(
            lines[1].contains("every 100ms (--interval)") && lines[1].contains("socklb top"),
            "{lines:?}"
        );
        terminate(child);
    });
}

#[test]
fn monitor_shows_new_connections_and_counts_the_others() {
    with_served_town(|place| {
        let _before = connected(Tcp, town::web()[0]);
        let mut held = Vec::new();
        let lines = monitored(place, &[], || {
            let [web, web6] = town::web();
            held.extend([connected(Tcp, web), connected(Tcp, web6), connected(Udp, town::dns()[0])]);
            // Mostly closed before the next poll.
            for _ in 0..20 {
                assert!(is_up(town::web()[0]));
            }
            assert_eq!(call(town::empty(), Tcp), Err(Errno::ECONNREFUSED));
        });
        let shown = |name: &str| -> Vec<&Value> {
            lines.iter().filter(|line| line["event"] == "connection" && line["name"] == name).collect()
        };
        let web = shown("web-v4");
        assert!(!web.is_empty() && web.len() <= 21, "{lines:#?}");
        assert_eq!((&web[0]["service"], &web[0]["protocol"]), (&"10.96.0.80:80".into(), &"TCP".into()));
        assert!(web[0]["endpoint"].as_str().unwrap().ends_with(":8080"), "{}", web[0]);
        assert_eq!((shown("web-v6").len(), shown("dns-udp-v4").len(), shown("dns-tcp-v4").len()), (1, 1, 0));
        let summary = lines.last().unwrap();
        assert_eq!(summary["event"], "summary", "{summary}");
        let n_shown = u64::try_from(lines.len() - 1).unwrap();
        assert_eq!((number(summary, "connects"), number(summary, "refused")), (23, 1), "{summary}");
        assert_eq!(
            (number(summary, "shown"), number(summary, "unseen")),
            (n_shown, 23 - n_shown),
            "{summary}"
        );

        // Only what was requested is shown and counted.
        let lines = monitored(place, &["--service", "default/web-v6", "--protocol", "tcp"], || {
            held.extend(town::web().map(|service| connected(Tcp, service)));
        });
        assert_eq!(lines.len(), 2, "{lines:#?}");
        assert_eq!((&lines[0]["name"], number(&lines[1], "connects")), (&"web-v6".into(), 1), "{lines:#?}");
    });
}

/// Without an agent: the programs eject, the commands read.
#[test]
fn commands_show_why_and_for_how_long_an_endpoint_is_ejected() {
    with_town(|place, town| {
        let mut cluster = town.cluster(0..2);
        let (service, endpoint): (SocketAddr, _) = ("10.96.0.82:80".parse().unwrap(), "10.244.1.2:9");
        cluster.serve("refusing", service, Tcp, &[endpoint.parse().unwrap()]);
        let cluster = cluster.annotated("socklb.io/health", "base=1h");
        let cluster = cluster.annotated("socklb.io/balance", "least-connections");
        assert_eq!(serve(place, &cluster, &QUIET).end(Signal::SIGTERM), Some(0));
        let lines = monitored(place, &[], || {
            for _ in 0..3 {
                assert!(!is_up(service));
            }
            thread::sleep(Duration::from_secs(2));
        });
        let ejections: Vec<&Value> = lines.iter().filter(|line| line["event"] == "ejection").collect();
        let [ejection] = &ejections[..] else { panic!("{lines:#?}") };
        assert_eq!((&ejection["name"], &ejection["endpoint"]), (&"refusing".into(), &endpoint.into()));
        assert_eq!(number(ejection, "failures"), 3, "{ejection}");
        assert!((3590..=3600).contains(&number(ejection, "seconds")), "{ejection}");
        assert_eq!(number(ejection, "active"), 0, "{ejection}");
        let is_reason = |value: &Value| {
            let text = value.as_str().unwrap_or_default();
            let reason = "3 failures in a row, the last one: connection refused";
            text.starts_with("ejected for 3") && text.contains(reason)
        };
        assert!(is_reason(&ejection["reason"]), "{ejection}");

        let port = port(&place.json(&["top", "-n", "1", "-o", "json"]), "refusing");
        assert_eq!(number(&port, "ejected"), 1, "{port}");
        assert!(is_reason(&port["endpoints"][0]["ejected_reason"]), "{port}");
        let explanation = place.json(&["explain", "10.96.0.82:80", "-o", "json"]);
        assert!(is_reason(&explanation["ejected"][0]["reason"]), "{explanation}");
        let again = monitored(place, &["--service", "default/refusing"], || {});
        assert_eq!(again.iter().filter(|line| line["event"] == "ejection").count(), 1, "{again:#?}");
        let other = monitored(place, &["--service", "default/web-v4"], || {});
        assert_eq!(other.len(), 0, "{other:#?}");
    });
}
