//! `socklb top`: live calls by service and endpoint.
//!
//! Polls the pinned maps; needs no agent. [`model`] builds rows, [`view`] holds the user's choices, [`draw`]
//! draws both on a terminal.

mod draw;
mod model;
mod view;

use std::{
    io::IsTerminal as _,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use clap::Args;
use jiff::Timestamp;
use lb_kernel::KernelError;
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEventKind},
};
use tokio::{runtime, sync::watch, time};

use self::{
    draw::draw,
    model::{Report, Sample, Sort},
    view::{Outcome, View},
};
use super::{PinArgs, config, inspect::Output, objects::Objects, run::stop_signals, sample::read, show_more};

/// Flags of `socklb top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Time between two reports, at least 100ms.
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = |text: &str| interval(text, SHORTEST))]
    interval: Duration,
    /// Exit after this many reports [default: run until Ctrl-C]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Sort order; numbers sort from the largest.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Show only ports for which this text is part of a name or address of the port, its endpoints or their
    /// nodes.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    filter: String,
    /// Only Services of this namespace.
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Omit endpoints from tables.
    #[arg(long)]
    no_endpoints: bool,
    /// Output format: a table, one JSON object per line, or a stream of YAML documents.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// Minimum time between two polls, since reading the counters of a large cluster takes part of it.
const SHORTEST: Duration = Duration::from_millis(100);
/// Maximum delay until a signal is handled while the program waits for keys.
const SIGNALS: Duration = Duration::from_millis(100);

/// Parses the time between two polls.
pub(super) fn interval(text: &str, shortest: Duration) -> Result<Duration, String> {
    let interval = config::duration(text)?;
    if interval < shortest {
        return Err(format!("expected {}ms or more", shortest.as_millis()));
    }
    Ok(interval)
}

/// Reads the maps, and keeps the last sample.
struct Watcher<'a> {
    args: &'a TopArgs,
    objects: Objects,
    started: Instant,
    last: Option<Sample>,
}

impl Watcher<'_> {
    /// The current counters with rates since the last call, neither filtered nor sorted.
    fn report(&mut self) -> Result<Report, KernelError> {
        let reading = read(&self.args.pins.pin_path)?;
        let sample = Sample::new(&reading, self.objects.now(), self.started.elapsed());
        // Whole seconds, as on a clock.
        let time = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
        let time = time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let report = sample.report(self.last.as_ref(), time);
        self.last = Some(sample);
        Ok(report)
    }
}

/// `socklb top`. Changes nothing.
///
/// # Errors
///
/// If nothing is pinned or readable, or standard output cannot be written. On a terminal, errors after the
/// first report are shown and the read is retried.
pub fn top(args: &TopArgs) -> anyhow::Result<ExitCode> {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = {
        let _entered = runtime.enter();
        stop_signals()?
    };
    let objects = Objects::new(&args.pins.state_dir);
    let mut watcher = Watcher { args, objects, started: Instant::now(), last: None };
    let first = watcher.report()?;
    if args.output == Output::Table && args.count.is_none() && std::io::stdout().is_terminal() {
        let mut terminal = ratatui::try_init().context("the terminal cannot be used: try --count 1")?;
        let ended = interact(&mut watcher, &mut terminal, first, &stop);
        ratatui::restore();
        ended?;
    } else {
        if let Some(problem) = watcher.objects.problem() {
            eprintln!("socklb: {problem}");
        }
        runtime.block_on(print(&mut watcher, first, stop))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints reports as a stream.
async fn print(
    watcher: &mut Watcher<'_>,
    first: Report,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let args = watcher.args;
    let (mut report, mut n_printed) = (first, 0);
    let mut ticks = time::interval_at(time::Instant::now() + args.interval, args.interval);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        report.arrange(args.namespace.as_deref(), &args.filter, args.sort);
        let text = match args.output {
            Output::Table => format!("{}\n{}\n", report.time, report.text(!args.no_endpoints)),
            Output::Json => format!("{}\n", serde_json::to_string(&report)?),
            Output::Yaml => format!("---\n{}", serde_saphyr::to_string(&report)?),
        };
        n_printed += 1;
        if !show_more(&text)? || args.count == Some(n_printed) {
            return Ok(());
        }
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
            _ = ticks.tick() => {}
        }
        report = watcher.report()?;
    }
}

/// Draws until the user or a signal stops it.
fn interact(
    watcher: &mut Watcher<'_>,
    terminal: &mut DefaultTerminal,
    first: Report,
    stop: &watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let args = watcher.args;
    let mut view = View::new(args.sort, &args.filter, !args.no_endpoints);
    // The whole report: a key may show rows that the last view hid.
    let (mut report, mut problem) = (first, watcher.objects.problem().map(str::to_owned));
    let mut due = Instant::now() + args.interval;
    while !*stop.borrow() {
        let mut shown = report.clone();
        shown.arrange(args.namespace.as_deref(), &view.filter, view.sort);
        terminal.draw(|frame| draw(frame, &shown, &view, problem.as_deref()))?;
        let wait = due.saturating_duration_since(Instant::now()).min(SIGNALS);
        if event::poll(wait)?
            && let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
            && view.press(key) == Outcome::Quit
        {
            break;
        }
        if Instant::now() < due {
            continue;
        }
        due = Instant::now() + args.interval;
        if !view.is_paused {
            match watcher.report() {
                Ok(new) => {
                    report = new;
                    problem = watcher.objects.problem().map(str::to_owned);
                }
                // Retried: a new agent, or a restart after `socklb cleanup`, may pin the maps again.
                Err(error) => problem = Some(error.to_string()),
            }
        }
    }
    Ok(())
}
