//! How long to look for completions before going to sleep: a sleep and its wake-up cost more than many requests.

use std::time::Duration;

/// The longest look. A wake-up across cores costs about half of it where that is expensive (virtual machines); a
/// request that takes longer than it gains little from not sleeping.
const MAX: Duration = Duration::from_micros(50);
/// The shortest that is worth beginning with.
const MIN: Duration = Duration::from_micros(4);

/// A length of time that grows while looking longer would have saved sleeps, and shrinks while it does not.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    now: Duration,
    max: Duration,
}

impl Spin {
    /// Never looks for longer than `max`, nor than what is useful.
    pub(crate) fn up_to(max: Duration) -> Spin {
        Spin { now: Duration::ZERO, max: max.min(MAX) }
    }

    /// How long to look now; zero for not at all.
    pub(crate) fn length(&self) -> Duration {
        self.now
    }

    /// Learns from a sleep: how long there was nothing, the look before it included.
    pub(crate) fn slept(&mut self, idle: Duration) {
        if idle > self.max {
            // Idle for long: looking was a waste, and would be again.
            self.now = if self.now <= MIN { Duration::ZERO } else { self.now / 2 };
        } else if idle > self.now {
            self.now = (self.now * 2).max(MIN).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_waits_are_looked_through_and_long_ones_slept_through() {
        let mut spin = Spin::up_to(Duration::from_micros(40));
        assert_eq!(spin.length(), Duration::ZERO, "idle at first");
        for _ in 0..10 {
            spin.slept(Duration::from_micros(30));
        }
        assert!(spin.length() >= Duration::from_micros(30));
        for _ in 0..10 {
            spin.slept(Duration::from_millis(1));
        }
        assert_eq!(spin.length(), Duration::ZERO);
        assert_eq!(Spin::up_to(Duration::from_secs(1)).max, MAX);
    }
}
