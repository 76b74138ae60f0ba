//! Waiting until no program reads what was freed.

use std::{
    io,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use super::syscall;

/// How long to wait where the kernel offers no way to wait for a grace period. Programs of these hooks run for
/// microseconds; a second covers one that was preempted.
const WITHOUT_MEMBARRIER: Duration = Duration::from_secs(1);

/// Blocks for one grace period.
fn wait_here() {
    if syscall::wait_for_grace_period().is_err() {
        thread::sleep(WITHOUT_MEMBARRIER);
    }
}

/// Waits for grace periods on a thread of its own, so that a sync does not.
#[derive(Debug)]
pub struct Grace {
    requests: SyncSender<u64>,
    /// The last request made, and the last one known to have passed.
    asked: u64,
    passed: u64,
    answers: Receiver<u64>,
}

impl Grace {
    /// Starts the thread. It ends when this value is dropped.
    ///
    /// # Errors
    ///
    /// If no thread can be started.
    pub fn start(on_passed: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (requests, incoming) = sync_channel::<u64>(1);
        let (done, answers) = sync_channel(64);
        thread::Builder::new().name("grace".into()).spawn(move || {
            while let Ok(mut request) = incoming.recv() {
                // Requests that came while this thread was woken are covered by the same grace period.
                while let Ok(later) = incoming.try_recv() {
                    request = later;
                }
                wait_here();
                if done.send(request).is_err() {
                    return;
                }
                on_passed();
            }
        })?;
        Ok(Self { requests, asked: 0, passed: 0, answers })
    }

    /// Asks for a grace period that begins now or later. Returns the number that [`Self::passed`] comes to with it.
    pub fn ask(&mut self) -> u64 {
        self.asked += 1;
        // If a request is waiting that the thread has not taken yet, this one does not fit: `passed` sends it again once
        // that one is answered.
        let _sent_or_later = self.requests.try_send(self.asked);
        self.asked
    }

    /// The number of the last [`Self::ask`] since which a grace period has passed. Does not block.
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
                // The thread is gone: wait here instead.
                wait_here();
                self.passed = self.asked;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_passes() {
        let mut grace = Grace::start(|| {}).unwrap();
        assert_eq!(grace.passed(), 0, "nothing was asked for");
        for number in 1..=3 {
            assert_eq!(grace.ask(), number);
        }
        grace.wait();
        assert_eq!(grace.passed(), 3);
    }
}
