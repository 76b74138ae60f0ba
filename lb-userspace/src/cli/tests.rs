//! Tests of the help texts. `UPDATE_EXPECT=1 cargo test -p lb-userspace cli::` rewrites the snapshots.

use clap::CommandFactory as _;
use expect_test::expect_file;

use super::*;

/// Minimum width of a terminal, in columns.
const COLUMNS: usize = 100;

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn help_is_as_documented_and_fits_a_terminal() {
    // Values of variables depend on the environment of the tests.
    let without_values = |command: clap::Command| command.mut_args(|arg| arg.hide_env_values(true));
    let mut root = Cli::command().term_width(COLUMNS).mut_subcommands(without_values);
    // Gives subcommands the settings of their parent.
    root.build();
    let names: Vec<String> = root
        .get_subcommands()
        .filter(|command| !command.is_hide_set() && command.get_name() != "help")
        .map(|command| command.get_name().to_owned())
        .collect();
    let mut text = format!("$ socklb --help\n{}\n", root.render_long_help());
    for name in names {
        let command = root.find_subcommand_mut(&name).unwrap();
        let help = command.render_long_help();
        text += &["$ socklb ", &name, " --help\n", &help.to_string(), "\n"].concat();
    }
    let text = text.lines().flat_map(|line| [line.trim_end(), "\n"]).collect::<String>();
    for line in text.lines() {
        assert!(line.chars().count() <= COLUMNS, "{line}");
    }
    expect_file!["tests/help.txt"].assert_eq(&text);
}
