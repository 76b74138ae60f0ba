//! The API server of the tests as a program, for use with kubectl and socklb.

use std::{env, fs, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result, bail};
use lb_tests::apiserver::ApiServer;

/// `test-apiserver [ADDRESS:PORT] [KUBECONFIG]`: writes a kubeconfig and serves until killed.
fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.len() > 2 || arguments.iter().any(|argument| argument.starts_with('-')) {
        bail!("usage: test-apiserver [ADDRESS:PORT] [KUBECONFIG]");
    }
    let address = arguments.first().map_or("127.0.0.1:8001", String::as_str);
    let address: SocketAddr = address.parse().with_context(|| format!("{address}: expected ADDRESS:PORT"))?;
    let server = ApiServer::start_at(address).with_context(|| format!("cannot listen on {address}"))?;
    if let Some(path) = arguments.get(1) {
        fs::write(Path::new(path), server.kubeconfig()).with_context(|| format!("cannot write {path}"))?;
    }
    eprintln!("listening on {}", server.url());
    loop {
        std::thread::park();
    }
}
