//! `socklb resolve`.

use std::process::ExitCode;

use clap::Args;
use lb_agent::names::{Outcome, Resolution};
use lb_core::names::RecordType;

use super::{
    PinArgs,
    agent::Agent,
    inspect::{Output, print},
};

/// Flags of `socklb resolve`.
#[derive(Debug, Args)]
pub struct ResolveArgs {
    /// The name, with all of its labels: search lists do not apply.
    name: String,
    /// Type of the record: a, aaaa, cname, ns, ptr, soa, srv, txt or any.
    #[arg(value_name = "TYPE", default_value = "a")]
    record_type: RecordType,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// `socklb resolve`
///
/// # Errors
///
/// If no agent answers, or it answers no names.
pub fn resolve(args: &ResolveArgs) -> anyhow::Result<ExitCode> {
    let resolution = Agent::new(&args.pins.state_dir).resolve(&args.name, args.record_type)?;
    print(args.output, &resolution, || lines(&resolution))?;
    Ok(ExitCode::SUCCESS)
}

fn lines(resolution: &Resolution) -> String {
    let Resolution { name, record_type, outcome, answers, additional, forwarded_to } = resolution;
    let mut lines: Vec<String> = answers.iter().chain(additional).cloned().collect();
    let servers: Vec<String> = forwarded_to.iter().map(ToString::to_string).collect();
    let servers = if servers.is_empty() {
        "no server is known: the answer is SERVFAIL".to_owned()
    } else {
        servers.join(", ")
    };
    match outcome {
        Outcome::Answered if forwarded_to.is_empty() => {}
        Outcome::Answered => lines.push(format!("the rest is forwarded: {servers}")),
        Outcome::NoData => lines.push(format!("{name}. exists and has no {record_type} record (NOERROR)")),
        Outcome::NoSuchName => lines.push(format!("{name}. does not exist (NXDOMAIN)")),
        Outcome::Forwarded => lines.push(format!("{name}. is forwarded: {servers}")),
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_for_each_outcome() {
        let of = |outcome, answers: &[&str], forwarded_to: &[&str]| {
            lines(&Resolution {
                name: "a.b".to_owned(),
                record_type: "A".to_owned(),
                outcome,
                answers: answers.iter().map(|line| (*line).to_owned()).collect(),
                additional: Vec::new(),
                forwarded_to: forwarded_to.iter().map(|server| server.parse().unwrap()).collect(),
            })
        };
        let servers = ["10.1.0.2:53", "10.1.0.3:53"];
        for (shown, expected) in [
            (of(Outcome::Answered, &["a.b. 5 IN A 10.96.0.1"], &[]), "a.b. 5 IN A 10.96.0.1\n"),
            (
                of(Outcome::Answered, &["a.b. 5 IN CNAME c."], &servers),
                "a.b. 5 IN CNAME c.\nthe rest is forwarded: 10.1.0.2:53, 10.1.0.3:53\n",
            ),
            (of(Outcome::NoData, &[], &[]), "a.b. exists and has no A record (NOERROR)\n"),
            (of(Outcome::NoSuchName, &[], &[]), "a.b. does not exist (NXDOMAIN)\n"),
            (of(Outcome::Forwarded, &[], &servers), "a.b. is forwarded: 10.1.0.2:53, 10.1.0.3:53\n"),
            (
                of(Outcome::Forwarded, &[], &[]),
                "a.b. is forwarded: no server is known: the answer is SERVFAIL\n",
            ),
        ] {
            assert_eq!(shown, expected);
        }
    }
}
