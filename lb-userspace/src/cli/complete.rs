//! Shell completions and manual pages, generated from the flags.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Command};
use clap_complete::Shell;

use super::show;

/// Flags of `socklb completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Flags of `socklb man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The folder; it is created if missing.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// `socklb completions`
///
/// # Errors
///
/// If standard output cannot be written.
pub fn completions(args: &CompletionsArgs, mut command: Command) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "socklb", &mut script);
    show(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// `socklb man`: `socklb.1`, and a page for each command that `socklb --help` lists.
///
/// # Errors
///
/// If a page cannot be written.
pub fn man(args: &ManArgs, command: Command) -> anyhow::Result<ExitCode> {
    let directory = &args.directory;
    fs::create_dir_all(directory)
        .with_context(|| format!("{}: no folder for manual pages: name another", directory.display()))?;
    for (name, page) in pages(command)? {
        let path = directory.join(name);
        fs::write(&path, page)
            .with_context(|| format!("{}: cannot be written: name another folder", path.display()))?;
        show(&format!("{}\n", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// File names and contents of the pages.
fn pages(mut command: Command) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    // Sets the full names of subcommands.
    command.build();
    let subcommands: Vec<Command> = command
        .get_subcommands()
        .filter(|subcommand| !subcommand.is_hide_set() && subcommand.get_name() != "help")
        .map(|subcommand| {
            // `socklb-run` in title, synopsis and file name, as `git-log` has it.
            let name = format!("socklb-{}", subcommand.get_name());
            let synopsis = format!("socklb {}", subcommand.get_name());
            subcommand.clone().display_name(name).bin_name(synopsis)
        })
        .collect();
    let mut pages = Vec::new();
    for page in std::iter::once(command).chain(subcommands) {
        let name = page.get_display_name().unwrap_or(page.get_name()).to_owned();
        let mut text = Vec::new();
        clap_mangen::Man::new(page.disable_help_subcommand(true)).render(&mut text)?;
        pages.push((format!("{name}.1"), text));
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_command_has_a_page_of_its_own() {
        let pages = pages(Cli::command()).unwrap();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names[0], "socklb.1");
        for name in
            ["socklb-run.1", "socklb-status.1", "socklb-cleanup.1", "socklb-completions.1", "socklb-man.1"]
        {
            assert!(names.contains(&name), "{name} is not among {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("client") || name.contains("calls")), "{names:?}");
        let (_, run) = pages.iter().find(|(name, _)| name == "socklb-run.1").unwrap();
        let run = String::from_utf8_lossy(run);
        assert!(run.contains(".TH socklb-run 1"), "{run}");
        assert!(run.contains("max\\-services"), "{run}");
    }

    #[test]
    fn every_shell_has_a_script_that_knows_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "socklb", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("explain") && script.contains("max-services"), "{shell}");
        }
    }
}
