//! Targets that take turns, so that other load of the machine affects all alike.

use std::{sync::mpsc, thread::Scope};

use anyhow::Context as _;
use lb_tests::Sandbox;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// What a target does with an order.
pub(crate) type Work<O, A> = Box<dyn FnMut(O) -> anyhow::Result<A>>;

/// A target on a thread in a sandbox of its own. The thread ends after this is dropped.
pub(crate) struct Caller<O, A> {
    orders: mpsc::Sender<O>,
    answers: mpsc::Receiver<anyhow::Result<A>>,
}

impl<O: Send, A: Send> Caller<O, A> {
    /// Starts the thread and waits until it is prepared. Returns also what the preparation returned.
    pub(crate) fn start<'scope, R: Send + 'scope>(
        scope: &'scope Scope<'scope, '_>,
        prepare: impl FnOnce(&Sandbox) -> anyhow::Result<(R, Work<O, A>)> + Send + 'scope,
    ) -> anyhow::Result<(Self, R)>
    where
        O: 'scope,
        A: 'scope,
    {
        let (orders, incoming) = mpsc::channel();
        let (outgoing, answers) = mpsc::channel();
        let (prepared, is_prepared) = mpsc::channel();
        let _joined_by_scope = scope.spawn(move || {
            Sandbox::run(move |sandbox| {
                let mut work = match prepare(sandbox) {
                    Ok((result, work)) => {
                        let _waits = prepared.send(Ok(result));
                        work
                    }
                    Err(error) => return drop(prepared.send(Err(error))),
                };
                for order in incoming {
                    if outgoing.send(work(order)).is_err() {
                        return;
                    }
                }
            });
        });
        let result = is_prepared.recv().context("the thread has exited")??;
        Ok((Self { orders, answers }, result))
    }

    pub(crate) fn carry_out(&self, order: O) -> anyhow::Result<A> {
        self.orders.send(order).ok().context("the thread has exited")?;
        self.answers.recv()?
    }
}

/// Gives all targets the order of each round in turn. Returns the answers of each, by round.
///
/// The first round is a warm-up. The order of the targets rotates, because each finds the caches as the one
/// before has left them.
pub(crate) fn take<N, O: Send, A: Send>(
    targets: &[(N, Caller<O, A>)],
    n_rounds: u32,
    order: impl Fn(u32) -> O,
) -> anyhow::Result<Vec<Vec<A>>> {
    let mut answers: Vec<Vec<A>> = targets.iter().map(|_| Vec::new()).collect();
    for round in 0..=n_rounds {
        for turn in 0..targets.len() {
            let target = (turn + round as usize) % targets.len();
            let answer = targets[target].1.carry_out(order(round))?;
            if round > 0 {
                answers[target].push(answer);
            }
        }
    }
    Ok(answers)
}

/// Pins the calling thread, and those that it starts, to one CPU, the same for all: CPUs of one machine
/// differ in other load and in cache contents.
pub(crate) fn stay_on(cpu: usize) -> anyhow::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("cannot stay on CPU {cpu}"))
}
