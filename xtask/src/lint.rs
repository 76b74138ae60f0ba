//! x
use anyhow::Result;
use crate::workspace::Workspace;
pub(crate) fn command(_w: &Workspace) -> Result<()> { Ok(()) }
