//! Node.js: libuv's sockets, which use dual-stack sockets on request.

use lb_tests::command::text;

use crate::asyncio::make_sixty_calls;

/// Makes twenty calls of each kind at once and prints the server, and the peer as the program sees it. With
/// an IPv4 service, half of the datagrams go through IPv6 sockets, to the IPv4-mapped address.
const CLIENT: &str = r#"
const http = require("http"), dgram = require("dgram");
const [web, dns, port] = [process.argv[2], process.argv[3], Number(process.argv[4])];
const v6 = dns.includes(":");
// A query for the address of "a.": the family is that of the server.
const query = Buffer.from([0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0x61, 0, 0, v6 ? 28 : 1, 0, 1]);

const page = () => new Promise((resolve, reject) => {
    const request = http.get({ host: web, port: 80, agent: false }, response => {
        let text = "";
        response.on("data", data => text += data);
        response.on("end", () => resolve({ kind: "page", server: text.split(" ")[0], peer }));
    });
    let peer;
    request.on("socket", socket => socket.on("connect", () => peer = socket.remoteAddress));
    request.on("error", reject);
});

const ask = connected => mapped => new Promise((resolve, reject) => {
    const to = mapped ? "::ffff:" + dns : dns;
    const socket = dgram.createSocket(v6 || mapped ? "udp6" : "udp4");
    socket.on("error", reject);
    socket.on("message", (answer, from) => {
        const last = answer.subarray(v6 ? -16 : -4);
        const server = v6 ? last.toString("hex").match(/.{4}/g).join(":") : last.join(".");
        const kind = connected ? "connected" : "unconnected";
        resolve({ kind, server, peer: mapped ? from.address.replace("::ffff:", "") : from.address });
        socket.close();
    });
    if (connected) socket.connect(port, to, () => socket.send(query));
    else socket.send(query, port, to);
});

const calls = [...Array(20).keys()].flatMap(n => {
    const mapped = !v6 && n % 2 == 1;
    return [page(), ask(true)(mapped), ask(false)(mapped)];
});
Promise.all(calls).then(results => console.log(JSON.stringify(results)), error => { throw error; });
setTimeout(() => { throw new Error("no answer within a minute"); }, 60000).unref();
"#;

#[test]
fn sixty_calls_at_once() {
    let script = tempfile::Builder::new().suffix(".js").tempfile().unwrap();
    std::fs::write(script.path(), CLIENT).unwrap();
    let path = script.path().to_str().unwrap();
    make_sixty_calls("node", |[web, dns, port]| text("node", &[path, web, dns, port]));
}
