//! Annotations of Services and Pods.

use std::time::Duration;

use lb_common::{health::Policy, layout::frontend_flags};
use serde::{Deserialize, Serialize};

use super::Service;

/// What happens to connected sockets of a service whose endpoint no longer serves.
pub const STALE_CONNECTIONS: &str = "socklb.io/stale-connections";

/// When endpoints of a Service are ejected because connections fail.
pub const HEALTH: &str = "socklb.io/health";

/// How a call chooses among the endpoints of a Service.
pub const BALANCE: &str = "socklb.io/balance";

/// How long the share of a new endpoint of a Service grows.
pub const SLOW_START: &str = "socklb.io/slow-start";

/// The weight of the endpoints of an EndpointSlice.
pub const WEIGHT: &str = "socklb.io/weight";

/// As [`WEIGHT`], which wins, with the same values: the annotation that Cilium reads (cilium/cilium#46061).
pub const CILIUM_WEIGHT: &str = "service.cilium.io/weight";

/// The weight of endpoints whose slice has neither annotation, as in Cilium.
pub const DEFAULT_WEIGHT: u16 = 100;

/// Whether calls to a Service, or of a Pod, pass unchanged.
pub const EXCLUDE: &str = "socklb.io/exclude";

/// The longest drain time: a year. A point in time plus a drain time then cannot overflow.
const MAX_DRAIN: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Value of [`STALE_CONNECTIONS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum StaleConnections {
    /// `keep`: they stay until a peer closes them.
    Keep,
    /// `reset`: they are destroyed at once.
    Reset,
    /// `drain=30s`: they are destroyed this long after the endpoint stopped serving.
    Drain(Duration),
}

/// Value of [`BALANCE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// `random`: by chance, each endpoint with its share.
    #[default]
    Random,
    /// `least-connections`: of four endpoints that chance draws, the one with the fewest open connections of
    /// this node.
    LeastConnections,
}

impl Balance {
    /// Parses the annotation's value; `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "random" => Some(Self::Random),
            "least-connections" => Some(Self::LeastConnections),
            _ => None,
        }
    }

    /// Its bit of [`frontend_flags`].
    #[must_use]
    pub const fn flag(self) -> u32 {
        match self {
            Self::Random => 0,
            Self::LeastConnections => frontend_flags::LEAST_CONNECTIONS,
        }
    }

    /// The inverse of [`Self::flag`], of all flags of a frontend.
    #[must_use]
    pub const fn of_flags(flags: u32) -> Self {
        if flags & frontend_flags::LEAST_CONNECTIONS == 0 { Self::Random } else { Self::LeastConnections }
    }
}

impl StaleConnections {
    /// Parses the annotation's value: `keep`, `reset`, or `drain=` with a whole number and a unit out of
    /// `ms`, `s`, `m` and `h`. `None` for anything else.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use lb_core::model::StaleConnections::{self, Drain};
    /// assert_eq!(StaleConnections::parse("drain=5m"), Some(Drain(Duration::from_secs(300))));
    /// assert_eq!(StaleConnections::parse("drain"), None);
    /// ```
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "keep" => Some(Self::Keep),
            "reset" => Some(Self::Reset),
            text => duration(text.strip_prefix("drain=")?).map(Self::Drain),
        }
    }
}

/// Parses the value of [`HEALTH`]: `off` (`Some(None)`), or one or more of `failures=N`, `base=DURATION` and
/// `max=DURATION`, separated by commas; what is missing has the default ([`Policy::DEFAULT`]). `None` for
/// anything else: failures outside 1 to 255, times that are no whole seconds from 1 s to 1 h, a `max` below
/// the base, or a key that is given twice.
///
/// ```
/// # use lb_common::health::Policy;
/// # use lb_core::model::annotation::health;
/// assert_eq!(health("off"), Some(None));
/// assert_eq!(health("failures=5"), Some(Some(Policy { failures: 5, ..Policy::DEFAULT })));
/// assert_eq!(health("failures=0"), None);
/// ```
#[must_use]
pub fn health(text: &str) -> Option<Option<Policy>> {
    if text.trim() == "off" {
        return Some(None);
    }
    let (mut failures, mut base, mut max) = (None, None, None);
    for part in text.split(',') {
        let (key, value) = part.trim().split_once('=')?;
        let (place, number) = match key {
            "failures" => {
                (&mut failures, value.parse().ok().filter(|n| (1..=Policy::MAX_FAILURES).contains(n))?)
            }
            "base" => (&mut base, seconds(value)?),
            "max" => (&mut max, seconds(value)?),
            _ => return None,
        };
        if place.replace(number).is_some() {
            return None;
        }
    }
    let base = base.unwrap_or(Policy::DEFAULT.base);
    let policy = Policy {
        failures: failures.unwrap_or(Policy::DEFAULT.failures),
        base,
        // A base above the default of the maximum raises it.
        max: max.unwrap_or(Policy::DEFAULT.max.max(base)),
    };
    (policy.base <= policy.max).then_some(Some(policy))
}

/// Whole seconds from 1 s to 1 h.
fn seconds(text: &str) -> Option<u32> {
    let duration = duration(text)?;
    let seconds = u32::try_from(duration.as_secs()).ok().filter(|n| (1..=3600).contains(n))?;
    (duration.subsec_nanos() == 0).then_some(seconds)
}

fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let number: u64 = number.parse().ok()?;
    let duration = match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.checked_mul(60)?),
        "h" => Duration::from_secs(number.checked_mul(60 * 60)?),
        _ => return None,
    };
    (duration <= MAX_DRAIN).then_some(duration)
}

/// Parses the value of [`SLOW_START`]: whole seconds from 1 s to 1 h, in the units of
/// [`StaleConnections::parse`]. `None` for anything else.
#[must_use]
pub fn slow_start(text: &str) -> Option<Duration> {
    seconds(text.trim()).map(|seconds| Duration::from_secs(seconds.into()))
}

/// Parses the value of [`WEIGHT`] and [`CILIUM_WEIGHT`]: 0 (no new calls) to 65535. `None` for anything else.
#[must_use]
pub fn weight(text: &str) -> Option<u16> {
    text.trim().parse().ok()
}

/// Parses the value of [`EXCLUDE`]; `None` if it is neither `true` nor `false`.
#[must_use]
pub fn excludes(text: &str) -> Option<bool> {
    text.trim().parse().ok()
}

impl Service {
    /// Whether its annotation excludes it. An invalid annotation does not.
    #[must_use]
    pub fn is_excluded(&self) -> bool {
        self.annotation(EXCLUDE).and_then(excludes).unwrap_or(false)
    }

    /// When its endpoints are ejected; `None` = never. An invalid annotation counts as absent.
    #[must_use]
    pub fn health(&self) -> Option<Policy> {
        self.annotation(HEALTH).and_then(health).unwrap_or(Some(Policy::DEFAULT))
    }

    /// How its calls choose among its endpoints, for TCP. An invalid annotation counts as absent.
    #[must_use]
    pub fn balance(&self) -> Balance {
        self.annotation(BALANCE).and_then(Balance::parse).unwrap_or_default()
    }

    /// How long the share of a new endpoint grows; `None` = it has its share at once. An invalid annotation
    /// counts as absent.
    #[must_use]
    pub fn slow_start(&self) -> Option<Duration> {
        self.annotation(SLOW_START).and_then(slow_start)
    }

    /// The value of an annotation whose key starts with `socklb.io/`.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.iter().find(|(found, _)| found == key).map(|(_, value)| &**value)
    }

    /// Its annotation for stale connections; `None` if that is absent or invalid. Connections of an excluded
    /// service are always kept.
    #[must_use]
    pub fn stale_connections(&self) -> Option<StaleConnections> {
        if self.is_excluded() {
            return Some(StaleConnections::Keep);
        }
        StaleConnections::parse(self.annotation(STALE_CONNECTIONS)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_the_health_annotation() {
        let policy = |failures, base, max| Some(Some(Policy { failures, base, max }));
        for (text, expected) in [
            ("off", Some(None)),
            (" off ", Some(None)),
            ("failures=5", policy(5, 10, 300)),
            ("failures=255, base=1s ,max=1h", policy(255, 1, 3600)),
            ("base=2m", policy(3, 120, 300)),
            ("base=10m", policy(3, 600, 600)),
            ("max=10s", policy(3, 10, 10)),
            ("max=9s", None),
            ("on", None),
            ("", None),
            ("failures=0", None),
            ("failures=256", None),
            ("failures=-1", None),
            ("failures=1,failures=2", None),
            ("base=0s", None),
            ("base=500ms", None),
            ("base=1500ms", None),
            ("base=61m", None),
            ("base=10", None),
            ("failures", None),
            ("speed=1", None),
            ("failures=1,", None),
        ] {
            assert_eq!(health(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_words_of_the_load_annotations() {
        for (text, expected) in [
            ("random", Some(Balance::Random)),
            (" least-connections ", Some(Balance::LeastConnections)),
            ("Random", None),
            ("least_connections", None),
            ("", None),
        ] {
            assert_eq!(Balance::parse(text), expected, "{text:?}");
        }
        for (text, expected) in [
            ("1s", Some(1)),
            (" 30s ", Some(30)),
            ("2m", Some(120)),
            ("1h", Some(3600)),
            ("2000ms", Some(2)),
            ("0s", None),
            ("1500ms", None),
            ("61m", None),
            ("1m30s", None),
            ("30", None),
            ("-1s", None),
            ("off", None),
            ("", None),
        ] {
            assert_eq!(slow_start(text), expected.map(Duration::from_secs), "{text:?}");
        }
    }

    #[test]
    fn r10_the_words_of_the_annotation() {
        use StaleConnections::{Drain, Keep, Reset};
        for (text, expected) in [
            ("keep", Some(Keep)),
            (" reset ", Some(Reset)),
            ("drain=500ms", Some(Drain(Duration::from_millis(500)))),
            ("drain=30s", Some(Drain(Duration::from_secs(30)))),
            ("drain=0s", Some(Drain(Duration::ZERO))),
            ("drain=2m", Some(Drain(Duration::from_secs(120)))),
            ("drain=1h", Some(Drain(Duration::from_secs(3600)))),
            ("drain=8760h", Some(Drain(MAX_DRAIN))),
            ("drain=8761h", None),
            ("drain=18446744073709551615h", None),
            ("drain=99999999999999999999s", None),
            ("drain=30", None),
            ("drain=s", None),
            ("drain=-1s", None),
            ("drain=1h30m", None),
            ("drain", None),
            ("Keep", None),
            ("", None),
        ] {
            assert_eq!(StaleConnections::parse(text), expected, "{text:?}");
        }
    }
}
