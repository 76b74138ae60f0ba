//! Python's asyncio: non-blocking connects, connected and unconnected datagrams.

use std::{collections::BTreeSet, net::IpAddr};

use lb_tests::command::text;
use serde_json::Value;

use crate::town::{self, with_served_town};

/// Makes twenty calls of each kind at once and prints the server, and the peer as the program sees it.
const CLIENT: &str = r#"
import asyncio, json, socket, sys

web, dns, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
# A query for the address of "a.": the family is that of the server.
kind = 28 if ":" in dns else 1
query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + b"\x01a\x00" + bytes([0, kind, 0, 1])

def address(answer):
    return socket.inet_ntop(socket.AF_INET6 if kind == 28 else socket.AF_INET, answer[-(16 if kind == 28 else 4):])

async def page():
    reader, writer = await asyncio.open_connection(web, 80)
    peer = writer.get_extra_info("peername")[0]
    writer.write(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return {"kind": "page", "server": line.decode().split()[0], "peer": peer}

class Query(asyncio.DatagramProtocol):
    def __init__(self, to):
        self.to, self.answer = to, asyncio.get_running_loop().create_future()
    def connection_made(self, transport):
        transport.sendto(query, self.to)
    def datagram_received(self, data, addr):
        if not self.answer.done():
            self.answer.set_result((address(data), addr[0]))
    def error_received(self, error):
        if not self.answer.done():
            self.answer.set_exception(error)

async def ask(connected):
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if kind == 28 else socket.AF_INET
    if connected:
        transport, protocol = await loop.create_datagram_endpoint(lambda: Query(None), remote_addr=(dns, port))
    else:
        transport, protocol = await loop.create_datagram_endpoint(lambda: Query((dns, port)), family=family)
    server, peer = await protocol.answer
    transport.close()
    return {"kind": "connected" if connected else "unconnected", "server": server, "peer": peer}

async def main():
    calls = [call for _ in range(20) for call in (page(), ask(True), ask(False))]
    print(json.dumps(await asyncio.wait_for(asyncio.gather(*calls), 60)))

asyncio.run(main())
"#;

/// Runs a client, which makes sixty calls at once, with the services of each family. The servers are the
/// pods, and the program sees the services.
pub(crate) fn make_sixty_calls(program: &'static str, client: impl Fn([&str; 3]) -> String + Sync) {
    with_served_town(program, 2, |town, _agent| {
        for (family, (web, dns)) in town::web().into_iter().zip(town::dns()).enumerate() {
            let (web_ip, dns_ip) = (web.ip().to_string(), dns.ip().to_string());
            let printed = client([&web_ip, &dns_ip, &dns.port().to_string()]);
            let calls: Vec<Value> = serde_json::from_str(&printed).unwrap();
            let pods: BTreeSet<IpAddr> = town.pods.iter().map(|pod| pod.ips[family]).collect();
            for kind in ["page", "connected", "unconnected"] {
                let of_kind = || calls.iter().filter(|call| call["kind"] == kind);
                assert_eq!(of_kind().count(), 20);
                let servers = of_kind().map(|call| call["server"].as_str().unwrap().parse().unwrap());
                assert_eq!(servers.collect::<BTreeSet<IpAddr>>(), pods, "{kind}");
                let called = if kind == "page" { &web_ip } else { &dns_ip };
                assert!(of_kind().all(|call| call["peer"] == **called), "{kind}: {printed}");
            }
        }
    });
}

#[test]
fn sixty_calls_at_once() {
    make_sixty_calls("python3", |[web, dns, port]| text("python3", &["-c", CLIENT, web, dns, port]));
}
