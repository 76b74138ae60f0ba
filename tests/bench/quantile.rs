//! Statistics of samples: quantiles and confidence intervals.
//!
//! # Purpose
//!
//! Pure functions on numbers, independent of what was measured.

/// The quantiles that a result file holds, by name.
pub(crate) const QUANTILES: [(&str, f64); 9] = [
    ("min", 0.0),
    ("p01", 0.01),
    ("p10", 0.1),
    ("p25", 0.25),
    ("p50", 0.5),
    ("p75", 0.75),
    ("p90", 0.9),
    ("p99", 0.99),
    ("max", 1.0),
];

/// 95 % of a normal distribution are within this number of standard deviations of the mean.
const Z_95: f64 = 1.96;

/// A count as a float. Above 2^53 the last digits are lost, which no figure here shows.
#[expect(clippy::cast_precision_loss, reason = "see above")]
pub(crate) const fn real(count: u64) -> f64 {
    count as f64
}

/// A float between 0 and the largest index as an index, rounded down.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the caller's range is in the name"
)]
const fn index(number: f64) -> usize {
    number.max(0.0) as usize
}

/// The sample below which the share `q` of all samples lies. `None` without samples.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get(index(real(last as u64) * q + 0.5).min(last)).copied()
}

/// The median of unsorted samples; 0 without any.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let upper = quantile(&sorted, 0.5).unwrap_or_default();
    // For an even number, the mean of the two in the middle: otherwise the medians of few blocks would be
    // biased.
    if sorted.len().is_multiple_of(2) && !sorted.is_empty() {
        return f64::midpoint(sorted[sorted.len() / 2 - 1], sorted[sorted.len() / 2]);
    }
    upper
}

/// A 95 % confidence interval of the median for any distribution, from the order of the samples alone. `None`
/// below 6 samples, which cannot give that confidence.
pub(crate) fn median_interval(samples: &[f64]) -> Option<[f64; 2]> {
    let n = samples.len();
    if n < 6 {
        return None;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let (middle, reach) = (real(n as u64) / 2.0, Z_95 * real(n as u64).sqrt() / 2.0);
    let low = index((middle - reach).floor());
    let high = index((middle + reach).ceil()).min(n - 1);
    Some([sorted[low], sorted[high]])
}

/// The ratio of two series whose blocks were measured alternately, block by block: its median and a 95 %
/// confidence interval. A slowdown of both hardly changes it. `None` with fewer than 6 pairs.
pub(crate) fn paired_ratio(of: &[f64], to: &[f64]) -> Option<(f64, [f64; 2])> {
    let ratios: Vec<f64> = of.iter().zip(to).filter(|(_, to)| **to > 0.0).map(|(of, to)| of / to).collect();
    Some((median(&ratios), median_interval(&ratios)?))
}

/// The difference of two such series, block by block, as [`paired_ratio`].
pub(crate) fn paired_difference(of: &[f64], to: &[f64]) -> Option<(f64, [f64; 2])> {
    let differences: Vec<f64> = of.iter().zip(to).map(|(of, to)| of - to).collect();
    Some((median(&differences), median_interval(&differences)?))
}

/// Four significant digits: more is noise, and enlarges result files.
pub(crate) fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let text = format!("{value:.3e}");
    text.parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: u64) -> Vec<f64> {
        (1..=n).map(real).collect()
    }

    #[test]
    fn quantiles_of_few_and_many() {
        let table: [(u64, f64, Option<f64>); 8] = [
            (0, 0.5, None),
            (1, 0.0, Some(1.0)),
            (1, 1.0, Some(1.0)),
            (5, 0.5, Some(3.0)),
            (101, 0.99, Some(100.0)),
            (101, 0.0, Some(1.0)),
            (101, 1.0, Some(101.0)),
            (1001, 0.1, Some(101.0)),
        ];
        for (n, q, wanted) in table {
            assert_eq!(quantile(&numbers(n), q), wanted, "q {q} of {n}");
        }
    }

    #[test]
    fn medians() {
        let table: [(&[f64], f64); 5] = [
            (&[], 0.0),
            (&[7.0], 7.0),
            (&[9.0, 1.0], 5.0),
            (&[9.0, 1.0, 2.0], 2.0),
            (&[4.0, 1.0, 3.0, 2.0], 2.5),
        ];
        for (samples, wanted) in table {
            assert!((median(samples) - wanted).abs() < 1e-9, "{samples:?}");
        }
    }

    #[test]
    fn the_interval_holds_the_median_and_narrows() {
        assert_eq!(median_interval(&numbers(5)), None);
        assert_eq!(median_interval(&numbers(6)), Some([1.0, 6.0]));
        let mut last = f64::INFINITY;
        for n in [20, 100, 1000, 10_000] {
            let [low, high] = median_interval(&numbers(n)).unwrap();
            let middle = real(n) / 2.0;
            assert!(low < middle && middle < high, "{n}");
            let width = (high - low) / middle;
            assert!(width < last, "{n}");
            last = width;
        }
    }

    #[test]
    fn the_interval_holds_the_median_as_often_as_it_says() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut n_held = 0;
        for _ in 0..1000 {
            // Uniform in 0..1, so the true median is 0.5.
            let samples: Vec<f64> = (0..51).map(|_| random.f64()).collect();
            let [low, high] = median_interval(&samples).unwrap();
            n_held += u32::from(low <= 0.5 && 0.5 <= high);
        }
        assert!((930..=990).contains(&n_held), "{n_held} of 1000");
    }

    #[test]
    fn pairs_are_immune_to_what_slows_both() {
        // The machine becomes ten times slower in the middle; the ratio stays.
        let to: Vec<f64> = (0..40).map(|n| if n < 20 { 100.0 } else { 1000.0 }).collect();
        let of: Vec<f64> = to.iter().map(|value| value * 1.02).collect();
        let (ratio, [low, high]) = paired_ratio(&of, &to).unwrap();
        for value in [ratio, low, high] {
            assert!((value - 1.02).abs() < 1e-9, "{value}");
        }
        assert_eq!(paired_ratio(&of[..5], &to), None);
        assert_eq!(paired_ratio(&of, &[0.0; 40]), None);
    }

    #[test]
    fn four_digits() {
        for (value, wanted) in [(0.0, 0.0), (1.0, 1.0), (123_456.0, 123_500.0), (-0.001_234_56, -0.001_235)] {
            assert!((rounded(value) - wanted).abs() < 1e-9, "{value}");
        }
        assert!(rounded(f64::NAN) == 0.0);
    }
}
