//! Randomness from the seed: the only source of it in a run.
//!
//! xoshiro256++ (Blackman and Vigna), its state filled by splitmix64. Each part of the world draws from a
//! stream of its own, forked by name, so that a change in one part does not reshuffle the others' luck.

/// A seeded generator.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// The generator of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut mix = seed;
        Self { state: std::array::from_fn(|_| splitmix(&mut mix)) }
    }

    /// An independent stream, named by `stream`. The parent advances by one draw.
    pub fn fork(&mut self, stream: u64) -> Self {
        let mut mix = stream;
        Self::new(self.bits() ^ splitmix(&mut mix))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let [s0, s1, s2, s3] = &mut self.state;
        let result = s0.wrapping_add(*s3).rotate_left(23).wrapping_add(*s0);
        let t = *s1 << 17;
        *s2 ^= *s0;
        *s3 ^= *s1;
        *s1 ^= *s2;
        *s0 ^= *s3;
        *s2 ^= t;
        *s3 = s3.rotate_left(45);
        result
    }

    /// A number below `bound`, by multiplication (a bias of bound / 2^64 does not matter here). 0 for a bound of 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        let wide = u128::from(self.bits()) * u128::from(bound);
        (wide >> 64) as u64
    }

    /// An index below `len`, which is not 0.
    pub fn index(&mut self, len: usize) -> usize {
        debug_assert!(len > 0, "something to choose from");
        self.below(len as u64) as usize
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        debug_assert!(low <= high, "the range is not empty");
        low + self.below((high - low).saturating_add(1))
    }

    /// True `ppm` times in a million.
    pub fn chance(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.below(1_000_000) < u64::from(ppm)
    }

    /// A duration around `typical`: usually within a factor of two of it, in one of 64 draws up to 16 times as
    /// long. The tail is what makes completions overtake each other.
    pub fn around(&mut self, typical: u64) -> u64 {
        let draw = self.bits();
        let spread = typical / 2 + ((u128::from(draw >> 8) * u128::from(typical)) >> 56) as u64;
        if draw & 63 == 0 { spread * (1 + ((draw >> 6) & 15)) } else { spread }
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.bits().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_another_seed_others() {
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            std::array::from_fn::<u64, 8, _>(|_| rng.bits())
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn streams_forked_under_different_names_differ() {
        let mut one = Rng::new(1);
        let mut two = one.clone();
        assert_ne!(one.fork(1).bits(), two.fork(2).bits());
    }

    #[test]
    fn draws_stay_in_their_range() {
        let mut rng = Rng::new(3);
        let mut seen = [0_u32; 5];
        for _ in 0..10_000 {
            seen[rng.index(5)] += 1;
            let number = rng.between(10, 12);
            assert!((10..=12).contains(&number));
            let around = rng.around(100);
            assert!((50..=2400).contains(&around), "{around}");
        }
        assert!(seen.iter().all(|count| (1_600..2_400).contains(count)), "{seen:?}");
        assert_eq!((0..10_000).filter(|_| rng.chance(0)).count(), 0);
        assert_eq!((0..10_000).filter(|_| rng.chance(1_000_000)).count(), 10_000);
    }
}
