//! Growth laws.

/// A power law `y = factor * x ^ exponent`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PowerLaw {
    pub(crate) factor: f64,
    pub(crate) exponent: f64,
    /// The share of the variance of `ln y` that the law explains, 0 to 1. Near 0 if `y` hardly grows.
    pub(crate) r_squared: f64,
}

/// Fits a power law by least squares on logarithms. Ignores points that are not above 0; `None` with fewer
/// than two different `x`.
pub(crate) fn power_law(points: &[(f64, f64)]) -> Option<PowerLaw> {
    let logarithms: Vec<(f64, f64)> =
        points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let n = crate::quantile::real(logarithms.len() as u64);
    let mean = |of: fn(&(f64, f64)) -> f64| logarithms.iter().map(of).sum::<f64>() / n;
    let (mean_x, mean_y) = (mean(|point| point.0), mean(|point| point.1));
    let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in &logarithms {
        xx += (x - mean_x) * (x - mean_x);
        xy += (x - mean_x) * (y - mean_y);
        yy += (y - mean_y) * (y - mean_y);
    }
    if logarithms.len() < 2 || xx <= 0.0 {
        return None;
    }
    let exponent = xy / xx;
    let r_squared = if yy > 0.0 { xy * xy / (xx * yy) } else { 1.0 };
    Some(PowerLaw { factor: (mean_y - exponent * mean_x).exp(), exponent, r_squared })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laws_are_found() {
        let xs = [1.0, 10.0, 100.0, 1000.0];
        for (factor, exponent) in [(3.0, 0.0), (2.0, 1.0), (0.5, 2.0), (7.0, -0.5)] {
            let points = xs.map(|x: f64| (x, factor * x.powf(exponent)));
            let law = power_law(&points).unwrap();
            assert!((law.exponent - exponent).abs() < 1e-9, "{law:?}");
            assert!((law.factor - factor).abs() < 1e-9, "{law:?}");
            assert!(law.r_squared > 0.999, "{law:?}");
        }
    }

    #[test]
    fn too_little_gives_none() {
        for points in [&[][..], &[(1.0, 1.0)], &[(1.0, 1.0), (1.0, 2.0)], &[(0.0, 1.0), (2.0, 0.0)]] {
            assert_eq!(power_law(points), None, "{points:?}");
        }
    }
}
