//! `bench compare OLD NEW`: whether the new result is worse.
//!
//! Bootstrap: the medians of blocks are drawn repeatedly, with replacement, from both files; the ratios of
//! the two medians form an interval. A regression is an interval that is entirely beyond the threshold. So
//! chance alone does not fail a build; an uncertain result is reported as such.

use std::fmt::Write as _;

use crate::{
    quantile::{median, quantile},
    result::{Better, ResultFile, Series, Unit},
};

/// The relative change that is tolerated.
pub(crate) const THRESHOLD: f64 = 0.1;
const N_DRAWS: usize = 2000;
/// The share of ratios outside the interval. A file has hundreds of series: 5 % would be wrong about some.
const LEFT_OUT: f64 = 0.01;
/// With fewer blocks an interval has no meaning.
const MIN_BLOCKS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// Worse by more than the threshold, with certainty.
    Regression,
    /// Better by more than the threshold, with certainty.
    Improvement,
    /// Within the threshold, with certainty.
    Same,
    /// The interval includes the threshold.
    Unclear,
}

/// The comparison of a series in the new file with the one in the old file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Judgement {
    /// New median to old median, inverted where higher is better: above 1 is worse.
    pub(crate) worse_by: f64,
    /// The ends of the interval of that ratio.
    pub(crate) interval: [f64; 2],
    pub(crate) verdict: Verdict,
}

/// Compares the medians of blocks of two runs. `None` if there is nothing to compare: no blocks, or an old
/// median of 0.
///
/// `is_exact`: single figures have no noise, as sizes.
pub(crate) fn judge(
    old: &[f64],
    new: &[f64],
    better: Better,
    is_exact: bool,
    threshold: f64,
    seed: u64,
) -> Option<Judgement> {
    let ratio = |old: f64, new: f64| match better {
        Better::Higher => old / new,
        Better::Lower | Better::Neither => new / old,
    };
    let (old_median, new_median) = (median(old), median(new));
    if old.is_empty() || new.is_empty() || old_median <= 0.0 || new_median <= 0.0 {
        return None;
    }
    let worse_by = ratio(old_median, new_median);
    let interval = if is_exact {
        [worse_by; 2]
    } else if old.len() < MIN_BLOCKS || new.len() < MIN_BLOCKS {
        [0.0, f64::INFINITY]
    } else {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut draw = |blocks: &[f64]| {
            let drawn: Vec<f64> = blocks.iter().map(|_| blocks[random.usize(..blocks.len())]).collect();
            median(&drawn)
        };
        let mut ratios: Vec<f64> = (0..N_DRAWS).map(|_| ratio(draw(old), draw(new))).collect();
        ratios.sort_unstable_by(f64::total_cmp);
        let at = |q| quantile(&ratios, q).unwrap_or(worse_by);
        [at(LEFT_OUT / 2.0), at(1.0 - LEFT_OUT / 2.0)]
    };
    let [low, high] = interval;
    let (lower, upper) = (1.0 / (1.0 + threshold), 1.0 + threshold);
    let verdict = match better {
        Better::Neither => Verdict::Same,
        _ if low > upper => Verdict::Regression,
        _ if high < lower => Verdict::Improvement,
        _ if low >= lower && high <= upper => Verdict::Same,
        _ => Verdict::Unclear,
    };
    Some(Judgement { worse_by, interval, verdict })
}

fn judge_series(old: &Series, new: &Series) -> Option<Judgement> {
    let is_exact = matches!(new.unit, Unit::Mebibytes | Unit::Count) && old.blocks.len() == 1;
    judge(&old.blocks, &new.blocks, new.better, is_exact, THRESHOLD, 1)
}

/// A comparison as text, and whether anything is worse.
pub(crate) struct Comparison {
    pub(crate) text: String,
    pub(crate) n_regressions: usize,
}

/// Compares two results of one suite.
///
/// # Errors
///
/// If their suites or settings differ: then they are not comparable.
pub(crate) fn compare(old: &ResultFile, new: &ResultFile) -> anyhow::Result<Comparison> {
    anyhow::ensure!(
        old.suite == new.suite,
        "one is of suite {}, the other of {}: compare results of one suite",
        old.suite.name(),
        new.suite.name()
    );
    anyhow::ensure!(
        old.settings == new.settings && old.is_smoke == new.is_smoke,
        "the settings differ: measure both with the same ones"
    );
    let mut text = String::new();
    let mut line = |words: &str| {
        let _infallible = writeln!(text, "{words}");
    };
    let place = |file: &ResultFile| {
        let machine = &file.machine;
        format!("{}, {} CPUs, Linux {}", machine.cpu, machine.n_cpus, machine.kernel)
    };
    if place(old) != place(new) {
        line(&format!("the machines differ: {} and {}", place(old), place(new)));
    }
    if new.is_smoke {
        line("both are smoke runs: their times have no meaning");
    }
    let mut counts = [0_usize; 4];
    let mut judged = Vec::new();
    for series in &new.series {
        let Some(judgement) = old.find(&series.key).and_then(|old| judge_series(old, series)) else {
            continue;
        };
        counts[judgement.verdict as usize] += 1;
        judged.push((judgement, series));
    }
    judged.sort_by(|(a, _), (b, _)| a.verdict.cmp(&b.verdict).then(b.worse_by.total_cmp(&a.worse_by)));
    for (judgement, series) in judged.iter().filter(|(judgement, _)| judgement.verdict != Verdict::Same) {
        let name = match judgement.verdict {
            Verdict::Regression => "REGRESSION",
            Verdict::Improvement => "improvement",
            Verdict::Same => "same",
            Verdict::Unclear => "unclear",
        };
        let [low, high] = judgement.interval.map(percent);
        line(&format!("{name:<12} {} ({low} to {high}): {}", percent(judgement.worse_by), series.key));
    }
    let n_new = new.series.iter().filter(|series| old.find(&series.key).is_none()).count();
    let n_gone = old.series.iter().filter(|series| new.find(&series.key).is_none()).count();
    let [n_regressions, n_improvements, n_same, n_unclear] = counts;
    line(&format!(
        "{n_regressions} regressions beyond {:.0} %, {n_improvements} improvements, {n_same} the same, {n_unclear} unclear; \
         {n_new} series only in the new file, {n_gone} only in the old one",
        THRESHOLD * 100.0
    ));
    Ok(Comparison { text, n_regressions })
}

/// A ratio as a change; worse is positive.
fn percent(ratio: f64) -> String {
    if ratio.is_finite() { format!("{:+.1} %", (ratio - 1.0) * 100.0) } else { "unknown".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::{
        Suite,
        tests::{file, series},
    };

    /// Blocks around a value with relative noise, reproducible by seed.
    fn noisy(value: f64, noise: f64, n: usize, seed: u64) -> Vec<f64> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..n).map(|_| value * (1.0 + noise * (2.0 * random.f64() - 1.0))).collect()
    }

    #[test]
    fn verdicts() {
        use Verdict::{Improvement, Regression, Same, Unclear};
        let table = [
            ("equal", 100.0, 100.0, 0.05, 30, Better::Lower, Same),
            ("a little slower", 100.0, 104.0, 0.05, 30, Better::Lower, Same),
            ("half slower", 100.0, 150.0, 0.05, 30, Better::Lower, Regression),
            ("twelve percent slower, quiet", 100.0, 112.0, 0.01, 50, Better::Lower, Regression),
            ("twelve percent slower, loud", 100.0, 112.0, 0.5, 20, Better::Lower, Unclear),
            ("half the time", 100.0, 50.0, 0.05, 30, Better::Lower, Improvement),
            ("half the rate", 100.0, 50.0, 0.05, 30, Better::Higher, Regression),
            ("twice the rate", 100.0, 200.0, 0.05, 30, Better::Higher, Improvement),
            ("two blocks", 100.0, 150.0, 0.05, 2, Better::Lower, Unclear),
            ("neither is better", 100.0, 150.0, 0.05, 30, Better::Neither, Same),
        ];
        for (name, old, new, noise, n, better, wanted) in table {
            let (old, new) = (noisy(old, noise, n, 1), noisy(new, noise, n, 2));
            let judgement = judge(&old, &new, better, false, THRESHOLD, 1).unwrap();
            assert_eq!(judgement.verdict, wanted, "{name}: {judgement:?}");
            assert_eq!(judge(&old, &new, better, false, THRESHOLD, 1), Some(judgement), "{name}: seeded");
        }
    }

    #[test]
    fn sizes_are_exact() {
        let judge = |new| judge(&[10.0], &[new], Better::Lower, true, THRESHOLD, 1).unwrap().verdict;
        assert_eq!(judge(10.0), Verdict::Same);
        assert_eq!(judge(12.0), Verdict::Regression);
        assert_eq!(judge(8.0), Verdict::Improvement);
    }

    #[test]
    fn nothing_to_compare() {
        for (old, new) in [(&[][..], &[1.0][..]), (&[1.0], &[]), (&[0.0], &[1.0])] {
            assert_eq!(judge(old, new, Better::Lower, false, THRESHOLD, 1), None);
        }
    }

    #[test]
    fn equal_noise_is_hardly_ever_a_regression() {
        let n = (0..200)
            .filter(|seed| {
                let (old, new) = (noisy(100.0, 0.3, 20, *seed), noisy(100.0, 0.3, 20, seed + 1000));
                let judgement = judge(&old, &new, Better::Lower, false, THRESHOLD, 1).unwrap();
                judgement.verdict == Verdict::Regression
            })
            .count();
        assert!(n <= 2, "{n} of 200");
    }

    #[test]
    fn a_file_is_the_same_as_itself_and_a_slower_one_is_not() {
        let blocks = noisy(100.0, 0.02, 30, 1);
        let slower: Vec<f64> = blocks.iter().map(|block| block * 1.3).collect();
        let old = file(
            Suite::Path,
            vec![series("connect", "socklb", 1, &blocks), series("connect", "nft", 1, &blocks)],
        );
        let new = file(
            Suite::Path,
            vec![series("connect", "socklb", 1, &slower), series("connect", "nft", 2, &blocks)],
        );
        let same = compare(&old, &old).unwrap();
        assert_eq!(same.n_regressions, 0, "{}", same.text);
        let worse = compare(&old, &new).unwrap();
        assert_eq!(worse.n_regressions, 1, "{}", worse.text);
        assert!(worse.text.contains("REGRESSION   +30."), "{}", worse.text);
        assert!(
            worse.text.contains("1 series only in the new file, 1 only in the old one"),
            "{}",
            worse.text
        );
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let mut other = file(Suite::Path, Vec::new());
        other.settings.insert("rounds".to_owned(), "7".to_owned());
        let path = file(Suite::Path, Vec::new());
        assert!(compare(&path, &other).is_err());
        assert!(compare(&path, &file(Suite::Sync, Vec::new())).is_err());
    }
}
