//! Waits for grace periods, after which no program reads freed entries.

use std::{
    collections::VecDeque,
    fmt, io,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use tracing::{error, info};

/// Delay before a failed wait is retried.
const RETRY: Duration = Duration::from_secs(1);

/// Blocks for one grace period.
type Wait = dyn Fn() -> io::Result<()> + Send + Sync;

/// Retries until a grace period has passed: freed entries must not be reused before.
fn wait_here(wait: &Wait, retry: Duration) {
    let mut has_failed = false;
    while let Err(error) = wait() {
        if !std::mem::replace(&mut has_failed, true) {
            error!(%error, "cannot wait for a grace period, retrying: no freed entry is reused until then");
        }
        thread::sleep(retry);
    }
    if has_failed {
        info!("waiting for grace periods works again");
    }
}

/// Pending grace-period requests, each with the last plan applied before it.
#[derive(Debug, Default)]
pub(super) struct Pending {
    requests: VecDeque<(u64, u64)>,
}

impl Pending {
    /// Bound of the queue: while no grace period passes, each plan adds a request.
    const MAX: usize = 64;

    /// Adds a request that was made after this plan.
    pub(super) fn push(&mut self, request: u64, plan: u64) {
        if self.requests.len() == Self::MAX {
            // The dropped plan settles with the later one.
            let _later = self.requests.pop_back();
        }
        self.requests.push_back((request, plan));
    }

    /// Removes the requests up to `passed` and returns the last plan before them.
    pub(super) fn pop(&mut self, passed: u64) -> Option<u64> {
        let n_passed = self.requests.partition_point(|(request, _)| *request <= passed);
        self.requests.drain(..n_passed).next_back().map(|(_, plan)| plan)
    }

    /// Whether every request has passed.
    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

/// Waits for grace periods on its own thread, so that a sync does not block.
pub struct Grace {
    wait: Arc<Wait>,
    requests: SyncSender<u64>,
    /// The last request made, and the last one known to have passed.
    asked: u64,
    passed: u64,
    answers: Receiver<u64>,
}

impl fmt::Debug for Grace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grace")
            .field("asked", &self.asked)
            .field("passed", &self.passed)
            .finish_non_exhaustive()
    }
}

impl Grace {
    /// Starts the thread, which exits when this value is dropped.
    ///
    /// `wait` blocks for one grace period: [`super::syscall::MapOfMaps::wait_for_grace_period`]. `on_passed`
    /// is called after each one.
    ///
    /// # Errors
    ///
    /// If no thread can be started.
    pub fn start(
        wait: impl Fn() -> io::Result<()> + Send + Sync + 'static,
        on_passed: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let wait: Arc<Wait> = Arc::new(wait);
        let (requests, incoming) = sync_channel::<u64>(1);
        let (done, answers) = sync_channel(64);
        let waits = Arc::clone(&wait);
        thread::Builder::new().name("grace".into()).spawn(move || {
            while let Ok(mut request) = incoming.recv() {
                // One grace period covers all requests received before it begins.
                while let Ok(later) = incoming.try_recv() {
                    request = later;
                }
                wait_here(&*waits, RETRY);
                if done.send(request).is_err() {
                    return;
                }
                on_passed();
            }
        })?;
        Ok(Self { wait, requests, asked: 0, passed: 0, answers })
    }

    /// Requests a grace period that begins now or later. Returns the number of the request, which
    /// [`Self::passed`] returns once the period has passed.
    pub fn ask(&mut self) -> u64 {
        self.asked += 1;
        // The channel holds one request. If it is full, `passed` sends this one later.
        let _sent_or_later = self.requests.try_send(self.asked);
        self.asked
    }

    /// Number of the last [`Self::ask`] followed by a grace period. Does not block.
    pub fn passed(&mut self) -> u64 {
        while let Ok(passed) = self.answers.try_recv() {
            self.passed = passed;
        }
        if self.passed < self.asked {
            let _sent_or_waiting = self.requests.try_send(self.asked);
        }
        self.passed
    }

    /// Blocks until a grace period has passed since the last [`Self::ask`].
    pub fn wait(&mut self) {
        while self.passed() < self.asked {
            if let Ok(passed) = self.answers.recv() {
                self.passed = passed;
            } else {
                // The thread has exited.
                wait_here(&*self.wait, RETRY);
                self.passed = self.asked;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn requests_that_do_not_pass_take_no_more_memory() {
        let mut asked = Pending::default();
        for n in 1..=1000 {
            asked.push(n, 10 * n);
        }
        assert!(asked.requests.len() <= Pending::MAX);
        assert_eq!(asked.pop(0), None);
        assert_eq!(asked.pop(3), Some(30));
        assert_eq!(asked.pop(999), Some(630), "only a plan followed by a request that has passed");
        assert!(!asked.is_empty());
        assert_eq!((asked.pop(1000), asked.is_empty()), (Some(10_000), true));
    }

    /// The captured log of a test.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(text)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_wait_that_fails_for_long_is_logged_once_and_so_is_its_end() {
        for (n_failures, levels) in [(0, &[][..]), (1, &["ERROR", "INFO"]), (50, &["ERROR", "INFO"])] {
            let log = Log::default();
            let writer = log.clone();
            let subscriber =
                tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
            let left = Mutex::new(n_failures);
            let wait = move || {
                let mut left = left.lock().unwrap();
                let fails = *left > 0;
                *left -= i32::from(fails);
                if fails { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
            };
            tracing::subscriber::with_default(subscriber, || wait_here(&wait, Duration::ZERO));
            let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
            assert_eq!(log.lines().count(), levels.len(), "{log}");
            for (line, level) in log.lines().zip(levels) {
                assert!(line.contains(level) && line.contains("grace period"), "{log}");
            }
        }
    }

    #[test]
    fn a_request_passes_with_a_grace_period_that_begins_after_it() {
        // Each grace period ends on a message.
        let (begun, begins) = sync_channel(0);
        let (ending, ends) = sync_channel::<io::Result<()>>(0);
        let ends = Mutex::new(ends);
        let wait = move || {
            begun.send(()).unwrap();
            ends.lock().unwrap().recv().unwrap()
        };
        let (on_passed, all_passed) = sync_channel(8);
        let mut grace = Grace::start(wait, move || on_passed.send(()).unwrap()).unwrap();
        let end = |grace: &mut Grace| {
            ending.send(Ok(())).unwrap();
            all_passed.recv().unwrap();
            grace.passed()
        };
        assert_eq!(grace.passed(), 0, "nothing was asked for");
        assert_eq!(grace.ask(), 1);
        begins.recv().unwrap();
        assert_eq!((grace.ask(), grace.ask()), (2, 3), "the current period began before them");
        assert_eq!(end(&mut grace), 1);
        begins.recv().unwrap();
        // The second request was queued. The third found the channel full and was sent later.
        assert_eq!(end(&mut grace), 2);
        begins.recv().unwrap();
        ending.send(Err(io::ErrorKind::OutOfMemory.into())).unwrap();
        assert_eq!(grace.passed(), 2, "a failed wait is not a grace period");
        begins.recv().unwrap();
        assert_eq!(end(&mut grace), 3);
    }
}
