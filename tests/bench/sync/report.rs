//! Collects and prints figures.

use std::time::Duration;

use lb_tests::process::Memory;

use crate::result::{Better, Key, Run, Unit};

/// Durations in nanoseconds, in the order of measurement.
pub(crate) type Times = Vec<f64>;

pub(crate) fn record(times: &mut Times, value: Duration) {
    times.push(value.as_secs_f64() * 1e9);
}

pub(crate) struct Report<'a> {
    run: &'a mut Run,
    part: String,
    n_services: Option<u32>,
}

impl<'a> Report<'a> {
    pub(crate) fn new(run: &'a mut Run) -> Self {
        Self { run, part: String::new(), n_services: None }
    }

    /// Starts another size.
    pub(crate) fn part(&mut self, name: &str, n_services: Option<u32>) {
        eprintln!("{name}");
        name.clone_into(&mut self.part);
        self.n_services = n_services;
    }

    fn key(&self, title: &str) -> Key {
        Key { measure: title.to_owned(), target: self.part.clone(), n_services: self.n_services }
    }

    /// Durations. Consecutive ones form a block.
    pub(crate) fn times(&mut self, title: &str, times: &Times) {
        // If there are few samples, each is its own block.
        let blocks: Vec<Vec<f64>> = times.chunks((times.len() / 50).max(1)).map(<[f64]>::to_vec).collect();
        self.run.series(self.key(title), Unit::Nanoseconds, Better::Lower, &blocks);
    }

    pub(crate) fn time(&mut self, title: &str, time: Duration) {
        self.times(title, &vec![time.as_secs_f64() * 1e9]);
    }

    pub(crate) fn share(&mut self, title: &str, value: f64) {
        self.run.figure(self.key(title), Unit::Ratio, Better::Lower, value);
    }

    pub(crate) fn mebibytes(&mut self, title: &str, value: f64) {
        self.run.figure(self.key(title), Unit::Mebibytes, Better::Lower, value);
    }

    /// Memory. Resident memory includes the mapped pages of BPF maps, which remain when the agent exits.
    pub(crate) fn memory(&mut self, title: &str, memory: &Memory) {
        let Memory { resident, anonymous, maps, peak } = *memory;
        for (what, value) in [
            ("resident", resident),
            ("resident without BPF maps", resident - maps),
            ("heap and stacks", anonymous),
            ("peak", peak),
        ] {
            self.run.figure(self.key(&format!("{title}: {what}")), Unit::Mebibytes, Better::Lower, value);
        }
    }
}
