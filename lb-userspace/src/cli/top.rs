//! `socklb top`: calls by service and endpoint, as they happen.
//!
//! Reads the pinned maps again and again, and asks no agent. [`model`] makes rows of what was read, [`view`] knows what a
//! person has chosen, [`draw`] puts both on a terminal.

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
use super::{PinArgs, config, inspect::Output, objects::Objects, run::stop_signals, sample::look, show_more};

/// Flags of `socklb top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Time between two looks, 100ms at least.
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = |text: &str| interval(text, SHORTEST))]
    interval: Duration,
    /// End after this many answers; without, go on until Ctrl-C.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// What to sort by: numbers from the largest.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Only ports whose name or address, or those of an endpoint or its node, hold this text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    filter: String,
    /// Only Services of this namespace.
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Leave endpoints out of tables.
    #[arg(long)]
    no_endpoints: bool,
    /// How to print it: a table, one JSON object on each line, or one YAML document after the other.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pins: PinArgs,
}

/// The least time between two looks: reading the counters of a large cluster takes some of it.
const SHORTEST: Duration = Duration::from_millis(100);
/// How soon a signal is noticed while keys are waited for.
const SIGNALS: Duration = Duration::from_millis(100);

/// Parses a time between two looks.
pub(super) fn interval(text: &str, shortest: Duration) -> Result<Duration, String> {
    let interval = config::duration(text)?;
    if interval < shortest {
        return Err(format!("expected {}ms or more", shortest.as_millis()));
    }
    Ok(interval)
}

/// Looks, and remembers the look before.
struct Watcher<'a> {
    args: &'a TopArgs,
    objects: Objects,
    started: Instant,
    last: Option<Sample>,
}

impl Watcher<'_> {
    /// What there is now, with rates since the last call. Not arranged.
    fn report(&mut self) -> Result<Report, KernelError> {
        let look = look(&self.args.pins.pin_path)?;
        let sample = Sample::new(&look, self.objects.now(), self.started.elapsed());
        // Whole seconds, as clocks on a wall.
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
/// If nothing is pinned or it cannot be read, or standard output takes no more. A table on a terminal goes on trying once it
/// has begun.
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

/// Prints one answer after the other.
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

/// Draws until a person or a signal ends it.
fn interact(
    watcher: &mut Watcher<'_>,
    terminal: &mut DefaultTerminal,
    first: Report,
    stop: &watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let args = watcher.args;
    let mut view = View::new(args.sort, &args.filter, !args.no_endpoints);
    // What was read, whole: a key may ask for what the last one left out.
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
                // An agent that starts anew, or `socklb cleanup`: what comes then is worth waiting for.
                Err(error) => problem = Some(error.to_string()),
            }
        }
    }
    Ok(())
}
