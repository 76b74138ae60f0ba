//! placeholder
use std::process::ExitCode;
/// x
#[derive(Debug, clap::Args)]
pub struct Options {}
/// x
#[derive(Debug, clap::Args)]
pub struct ClientArgs {}
/// x
pub fn run(_: Options) -> anyhow::Result<ExitCode> { Ok(ExitCode::SUCCESS) }
/// x
pub fn client(_: ClientArgs) -> anyhow::Result<ExitCode> { Ok(ExitCode::SUCCESS) }
