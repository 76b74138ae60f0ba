//! Pauses between retries.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

/// The first and the longest pause, as in client-go's reflector.
const FIRST: Duration = Duration::from_millis(800);
const LONGEST: Duration = Duration::from_secs(30);
/// Maximum pause that a server may request. API servers request seconds; a proxy in between may request days,
/// in which the agent would follow no change.
const LONGEST_WANTED: Duration = Duration::from_secs(5 * 60);

/// Pauses that double, each with a random addition of up to its own length, so that the agents of all nodes
/// do not return at the same moment.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    first: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) const fn new(first: Duration) -> Self {
        Self { first, next: first }
    }

    /// The next pause, at least `wanted` up to five minutes. `random` is uniform.
    pub(super) fn pause(&mut self, wanted: Option<Duration>, random: u64) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST);
        let base = pause.max(wanted.unwrap_or_default().min(LONGEST_WANTED));
        // In units of 1/256 of the pause.
        let jitter = pause * u32::from(u8::try_from(random % 256).unwrap_or_default()) / 256;
        (base + jitter).min(LONGEST.max(base))
    }

    pub(super) const fn reset(&mut self) {
        self.next = self.first;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(FIRST)
    }
}

/// A random number, not for secrets. The standard library seeds its hash maps randomly.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..8).map(|_| backoff.pause(None, 0).as_millis()).collect();
        assert_eq!(pauses, [800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        backoff.reset();
        assert_eq!(backoff.pause(None, 128).as_millis(), 1200);
    }

    #[test]
    fn the_server_may_ask_for_more() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.pause(Some(Duration::from_secs(5)), 0).as_secs(), 5);
        assert_eq!(backoff.pause(Some(Duration::from_secs(90)), 255).as_secs(), 90);
        assert_eq!(backoff.pause(Some(Duration::from_secs(u64::MAX)), 255).as_secs(), 300);
    }
}
