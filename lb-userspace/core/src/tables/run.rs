//! A run as the endpoint tables hold it.
//!
//! A run of endpoints with equal shares is a list of entries. One with weights, or with endpoints to fall
//! back to, is extended: [`endpoint_extra`] has its layout.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
};

use lb_common::layout::{Run, endpoint_extra};

/// One entry of an endpoint table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Id of this address and port within its service port; a run is sorted by it.
    pub endpoint_id: u32,
    // A `SocketAddr` has a flow label and scope too: 12 octets for each endpoint of the cluster.
    ip: IpAddr,
    port: u16,
    /// Bits of [`endpoint_extra`].
    pub extra: u16,
}

impl Entry {
    /// An entry of a run that is not extended.
    #[must_use]
    pub const fn new(endpoint_id: u32, address: SocketAddr) -> Self {
        Self { endpoint_id, ip: address.ip(), port: address.port(), extra: 0 }
    }

    /// The same endpoint with other bits of [`endpoint_extra`].
    #[must_use]
    pub const fn with_extra(self, extra: u16) -> Self {
        Self { extra, ..self }
    }

    /// Address and port of the endpoint.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

/// The entries of a run, and what follows them if it is extended. Not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRun {
    /// Number of endpoints that calls choose from.
    len: u32,
    entries: Arc<[Entry]>,
}

impl From<Vec<Entry>> for StoredRun {
    /// A run that is not extended.
    fn from(entries: Vec<Entry>) -> Self {
        Self { len: u32::try_from(entries.len()).unwrap_or(u32::MAX), entries: entries.into() }
    }
}

impl FromIterator<Entry> for StoredRun {
    fn from_iter<T: IntoIterator<Item = Entry>>(entries: T) -> Self {
        entries.into_iter().collect::<Vec<_>>().into()
    }
}

impl StoredRun {
    /// Number of entries of a run with shares or endpoints to fall back to.
    #[must_use]
    pub const fn extended_len(n_endpoints: usize, n_spill: usize) -> usize {
        n_endpoints.saturating_mul(2).saturating_add(1).saturating_add(n_spill)
    }

    /// An extended run. Each endpoint comes with its share; both lists are sorted by endpoint id.
    #[must_use]
    pub fn extended(endpoints: &[(Entry, u8)], spill: &[Entry]) -> Self {
        let Some((first, _)) = endpoints.first() else { return Vec::new().into() };
        let shares: Vec<u8> = endpoints.iter().map(|(_, share)| *share).collect();
        let aliases = aliases(&shares);
        let mut entries = Vec::with_capacity(Self::extended_len(endpoints.len(), spill.len()));
        let with_alias = |((entry, _), alias): (&(Entry, u8), &Alias)| {
            entry.with_extra(endpoint_extra::EXTENDED | alias.probability)
        };
        entries.extend(endpoints.iter().zip(&aliases).map(with_alias));
        entries.extend(
            endpoints
                .iter()
                .zip(&aliases)
                .map(|((_, share), alias)| endpoints[alias.index].0.with_extra((*share).into())),
        );
        let nowhere = SocketAddr::new(super::image::unspecified(first.ip.is_ipv6()), 0);
        entries.push(Entry::new(u32::try_from(spill.len()).unwrap_or(u32::MAX), nowhere));
        entries.extend(spill.iter().map(|entry| entry.with_extra(0)));
        Self { len: u32::try_from(endpoints.len()).unwrap_or(u32::MAX), entries: entries.into() }
    }

    /// Reads a run of a table, entry by entry. `None` if an entry cannot be read.
    pub fn read(run: Run, entry: impl Fn(u32) -> Option<Entry>) -> Option<Self> {
        let read = |range: Range<u32>| {
            let (from, to) = (run.offset.checked_add(range.start)?, run.offset.checked_add(range.end)?);
            (from..to).map(&entry).collect::<Option<Vec<_>>>()
        };
        let mut entries = read(0..run.len)?;
        if entries.iter().any(|entry| entry.extra & endpoint_extra::EXTENDED != 0) {
            let count_at = run.len.checked_mul(2)?;
            entries.extend(read(run.len..count_at.checked_add(1)?)?);
            let n_spill = entries.last()?.endpoint_id;
            entries.extend(read(count_at + 1..(count_at + 1).checked_add(n_spill)?)?);
        }
        Some(Self { len: run.len, entries: entries.into() })
    }

    /// The same run with other entries, as they were read.
    #[must_use]
    pub fn with_entries(&self, entries: Vec<Entry>) -> Self {
        Self { len: self.len, entries: entries.into() }
    }

    /// All entries, in the order of the table.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of [`Self::entries`], in the units of the tables.
    #[must_use]
    pub fn n_entries(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    /// The run at an offset, as a frontend has it.
    #[must_use]
    pub const fn at(&self, offset: u32) -> Run {
        Run { offset, len: self.len }
    }

    /// The endpoints that calls choose from.
    #[must_use]
    pub fn endpoints(&self) -> &[Entry] {
        self.entries.get(..self.len as usize).unwrap_or_default()
    }

    /// Whether it has shares or endpoints to fall back to.
    #[must_use]
    pub fn is_extended(&self) -> bool {
        self.entries.len() > self.len as usize
    }

    /// The share of each of [`Self::endpoints`], largest 255; `None` if it is not extended.
    #[must_use]
    pub fn shares(&self) -> Option<impl Iterator<Item = u8>> {
        let aliases = self.entries.get(self.len as usize..2 * self.len as usize)?;
        self.is_extended().then(|| aliases.iter().map(|entry| u8::try_from(entry.extra).unwrap_or(u8::MAX)))
    }

    /// The endpoints that calls fall back to while all others are ejected.
    #[must_use]
    pub fn spill(&self) -> &[Entry] {
        self.entries.get(Self::extended_len(self.len as usize, 0)..).unwrap_or_default()
    }

    /// Every endpoint that a call may reach, with repetitions.
    pub fn reachable(&self) -> impl Iterator<Item = &Entry> {
        self.endpoints().iter().chain(self.spill())
    }
}

/// What Walker's method draws instead of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Alias {
    /// How often, in 1/32768.
    probability: u16,
    /// The index of the other entry.
    index: usize,
}

/// The aliases with which a uniform draw has the given shares (M. D. Vose, "A linear algorithm for generating
/// random numbers with a given distribution", 1991). A share of 0 counts as 1.
fn aliases(shares: &[u8]) -> Vec<Alias> {
    const ONE: u64 = endpoint_extra::ALIAS as u64 + 1;
    let shares = || shares.iter().map(|share| u64::from(*share).max(1));
    let (n, total) = (shares().count() as u64, shares().sum::<u64>());
    let mut left: Vec<u64> = shares().map(|share| share * n).collect();
    let mut aliases: Vec<Alias> = (0..left.len()).map(|index| Alias { probability: 0, index }).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..left.len()).partition(|&i| left[i] < total);
    while let (Some(poor), Some(&rich)) = (small.pop(), large.last()) {
        let missing = total - left[poor];
        let probability = ((missing * ONE + total / 2) / total).min(ONE - 1);
        aliases[poor] =
            Alias { probability: u16::try_from(probability).unwrap_or(endpoint_extra::ALIAS), index: rich };
        left[rich] -= missing;
        if left[rich] < total {
            large.pop();
            small.push(rich);
        }
    }
    aliases
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u8) -> Entry {
        Entry::new(id.into(), ([10, 0, 0, id], 8080).into())
    }

    /// The probability of each endpoint under a uniform draw, in 1/(32768 n).
    fn distribution(run: &StoredRun) -> Vec<u64> {
        let n = run.endpoints().len();
        let mut weights = vec![0; n];
        for (i, entry) in run.endpoints().iter().enumerate() {
            let probability = u64::from(entry.extra & endpoint_extra::ALIAS);
            let alias = run.entries()[n + i].endpoint_id;
            let at = run.endpoints().iter().position(|entry| entry.endpoint_id == alias).unwrap();
            weights[i] += 32768 - probability;
            weights[at] += probability;
        }
        weights
    }

    #[test]
    fn a_uniform_draw_has_the_shares() {
        for shares in [
            &[255][..],
            &[255, 255, 255],
            &[255, 25],
            &[1, 255],
            &[255, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            &[128, 255, 64, 32, 16, 8, 4, 2, 1],
            &[1; 200],
        ] {
            let endpoints: Vec<_> = (0..).zip(shares).map(|(id, share)| (entry(id), *share)).collect();
            let run = StoredRun::extended(&endpoints, &[]);
            let total: u64 = shares.iter().map(|share| u64::from(*share)).sum();
            let n = shares.len() as u64;
            for (found, share) in distribution(&run).into_iter().zip(shares) {
                let expected = u64::from(*share) * 32768 * n / total;
                assert!(
                    found.abs_diff(expected) <= n,
                    "{shares:?}: {found} for {share}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn a_run_is_read_as_it_was_written() {
        let plain: StoredRun = (0..3).map(entry).collect();
        let endpoints: Vec<_> = (0..3).map(|id| (entry(id), 85 * (id + 1))).collect();
        let spill: Vec<_> = (2..7).map(entry).collect();
        let extended = StoredRun::extended(&endpoints, &spill);
        for (run, n_entries) in [(&plain, 3), (&extended, 12), (&StoredRun::extended(&endpoints, &[]), 7)] {
            assert_eq!(run.entries().len(), n_entries);
            let entry = |index: u32| run.entries().get(index.checked_sub(100)? as usize).copied();
            assert_eq!(StoredRun::read(run.at(100), entry).as_ref(), Some(run));
        }
        assert!(plain.shares().is_none() && plain.spill().is_empty());
        assert_eq!(extended.shares().unwrap().collect::<Vec<_>>(), [85, 170, 255]);
        assert_eq!(extended.spill(), spill);
        assert_eq!(
            StoredRun::read(extended.at(100), |index| (index < 107)
                .then(|| extended.entries()[index as usize - 100])),
            None
        );
    }
}
