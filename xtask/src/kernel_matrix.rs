//! x
use anyhow::Result;
use crate::workspace::Workspace;
#[derive(clap::Args)]
pub(crate) struct Options {}
pub(crate) fn command(_w: &Workspace, _o: &Options) -> Result<()> { Ok(()) }
