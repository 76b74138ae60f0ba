//! The settings of connection tracking that kube-proxy makes (`cmd/kube-proxy/app/conntrack.go`).

use std::{fs, io, num::NonZeroUsize, thread};

/// A setting of the network namespace, below `/proc/sys/net/netfilter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name, without `nf_conntrack_`.
    pub name: &'static str,
    /// The bound that its value is to keep.
    pub bound: Bound,
}

/// A bound of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// A lower value is raised.
    AtLeast(u64),
    /// A higher value is lowered.
    AtMost(u64),
}

impl Bound {
    /// The value to write instead of `found`; `None` if that keeps the bound.
    #[must_use]
    pub const fn instead_of(self, found: u64) -> Option<u64> {
        match self {
            Self::AtLeast(least) if found < least => Some(least),
            Self::AtMost(most) if found > most => Some(most),
            Self::AtLeast(_) | Self::AtMost(_) => None,
        }
    }
}

/// The settings of a machine with this many CPUs, with kube-proxy's defaults.
#[must_use]
pub const fn settings(n_cpus: u64) -> [Setting; 3] {
    let per_cpu = n_cpus.saturating_mul(32_768);
    let max = if per_cpu > 131_072 { per_cpu } else { 131_072 };
    [
        Setting { name: "max", bound: Bound::AtLeast(max) },
        // Five days by default, also for connections whose ends are gone.
        Setting { name: "tcp_timeout_established", bound: Bound::AtMost(86_400) },
        // A half-closed connection may still be used for long.
        Setting { name: "tcp_timeout_close_wait", bound: Bound::AtLeast(3_600) },
    ]
}

/// Makes the settings in the caller's network namespace. Returns what was changed, with the value before and
/// the one now, or why it could not be.
pub fn apply() -> Vec<(Setting, io::Result<(u64, u64)>)> {
    let n_cpus = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let changed = settings(u64::try_from(n_cpus).unwrap_or(1)).into_iter().filter_map(|setting| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{}", setting.name);
        let read = fs::read_to_string(&path)
            .and_then(|text| text.trim().parse::<u64>().map_err(|_| io::ErrorKind::InvalidData.into()));
        match read.map(|found| (found, setting.bound.instead_of(found))) {
            Ok((_, None)) => None,
            Ok((found, Some(value))) => {
                Some((setting, fs::write(&path, value.to_string()).map(|()| (found, value))))
            }
            Err(error) => Some((setting, Err(error))),
        }
    });
    changed.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_within_the_bounds_stay() {
        for (bound, found, expected) in [
            (Bound::AtLeast(10), 9, Some(10)),
            (Bound::AtLeast(10), 11, None),
            (Bound::AtMost(10), 11, Some(10)),
            (Bound::AtMost(10), 9, None),
        ] {
            assert_eq!(bound.instead_of(found), expected);
        }
        assert_eq!(settings(2)[0].bound, Bound::AtLeast(131_072));
        assert_eq!(settings(64)[0].bound, Bound::AtLeast(2_097_152));
    }
}
