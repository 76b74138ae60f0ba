//! Reproducible pseudo-random numbers.

/// The next number of a sequence (splitmix64, which accepts any seed).
pub(crate) const fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number below `end`, which must not be 0.
pub(crate) fn below(state: &mut u64, end: u32) -> u32 {
    // The high half of the product: without the bias and the cost of a remainder.
    let wide = (u128::from(next(state)) * u128::from(end)) >> 64;
    u32::try_from(wide).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_below_and_reaches_everything() {
        let mut state = 7;
        let mut seen = [false; 10];
        for _ in 0..1000 {
            seen[below(&mut state, 10) as usize] = true;
        }
        assert_eq!(seen, [true; 10]);
    }
}
