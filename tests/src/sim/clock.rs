//! A machine's clocks: they start anywhere, run at their own rate, and the wall clock jumps.

use super::context::Time;

/// The clocks of one machine, as functions of virtual time.
#[derive(Clone, Debug)]
pub struct NodeClock {
    /// Virtual time at which the monotonic clock showed `origin_ns`.
    since: Time,
    origin_ns: u64,
    /// How much faster than virtual time the clocks run, in millionths; negative for slower.
    drift_ppm: i64,
    wall_offset_ms: i64,
}

/// The wall clock at virtual time 0, in milliseconds since 1970: far enough to jump back from.
const WALL_ORIGIN_MS: i64 = 1_700_000_000_000;

impl NodeClock {
    /// A machine that boots at `now`, its monotonic clock showing `origin_ns`.
    #[must_use]
    pub fn new(now: Time, origin_ns: u64, drift_ppm: i64) -> Self {
        Self { since: now, origin_ns, drift_ppm, wall_offset_ms: 0 }
    }

    /// The machine boots again: its monotonic clock starts over. The wall clock goes on.
    pub fn reboot(&mut self, now: Time, origin_ns: u64) {
        self.since = now;
        self.origin_ns = origin_ns;
    }

    /// From `now` on the clocks run at another rate.
    pub fn drift(&mut self, now: Time, drift_ppm: i64) {
        self.origin_ns = self.monotonic_ns(now);
        self.since = now;
        self.drift_ppm = drift_ppm;
    }

    /// What the monotonic clock shows at `now`.
    #[must_use]
    pub fn monotonic_ns(&self, now: Time) -> u64 {
        let (passed, rate) = (now - self.since, self.rate());
        let own = match passed.checked_mul(rate) {
            Some(millionths) => millionths / 1_000_000,
            None => (u128::from(passed) * u128::from(rate) / 1_000_000) as u64,
        };
        self.origin_ns + own
    }

    /// The first virtual time at which the monotonic clock shows `monotonic_ns` or more.
    #[must_use]
    pub fn time_of(&self, monotonic_ns: u64) -> Time {
        let (own, rate) = (monotonic_ns.saturating_sub(self.origin_ns), self.rate());
        let passed = match own.checked_mul(1_000_000) {
            Some(millionths) => millionths.div_ceil(rate),
            None => (u128::from(own) * 1_000_000).div_ceil(u128::from(rate)).try_into().unwrap_or(Time::MAX),
        };
        self.since.saturating_add(passed)
    }

    /// What it shows more after a million nanoseconds.
    fn rate(&self) -> u64 {
        1_000_000_u64.saturating_add_signed(self.drift_ppm)
    }

    /// What the wall clock shows at `now`, in milliseconds since 1970.
    #[must_use]
    pub fn wall_ms(&self, now: Time) -> u64 {
        (WALL_ORIGIN_MS + (now / 1_000_000) as i64 + self.wall_offset_ms).max(0) as u64
    }

    /// Moves the wall clock.
    pub fn jump_ms(&mut self, by: i64) {
        self.wall_offset_ms += by;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_found_at_the_first_moment_that_the_clock_reaches_it() {
        for drift_ppm in [-100_000, -37, 0, 1, 50_000] {
            let clock = NodeClock::new(1_000, 77, drift_ppm);
            // The last is beyond what fits 64 bits on the way.
            for deadline in [0, 77, 78, 1_000_077, 123_456_789_123, 1 << 60] {
                let time = clock.time_of(deadline);
                assert!(clock.monotonic_ns(time) >= deadline);
                assert!(time == 1_000 || clock.monotonic_ns(time - 1) < deadline);
            }
            assert!(clock.time_of(u64::MAX) >= u64::MAX / 2);
        }
    }

    #[test]
    fn a_change_of_rate_moves_no_clock() {
        let mut clock = NodeClock::new(0, 5, 100_000);
        clock.drift(1_000_000, -100_000);
        assert_eq!(clock.monotonic_ns(1_000_000), 1_100_005);
        assert_eq!(clock.monotonic_ns(2_000_000), 2_000_005);
    }

    #[test]
    fn the_wall_clock_jumps_and_the_monotonic_one_does_not() {
        let mut clock = NodeClock::new(0, 5, 0);
        clock.jump_ms(-3_600_000);
        assert_eq!(clock.monotonic_ns(1_000_000), 1_000_005);
        assert_eq!(clock.wall_ms(1_000_000), 1_699_996_400_001);
    }
}
