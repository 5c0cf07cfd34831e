//! How long to look for completions before going to sleep: a sleep and its wake-up cost more than many requests.

use std::time::Duration;

/// The longest look. A wake-up across cores costs about half of it where that is expensive (virtual machines); a
/// request that takes longer than it gains little from not sleeping.
const MAX: Duration = Duration::from_micros(50);
/// The shortest that is worth beginning with.
const MIN: Duration = Duration::from_micros(4);

/// The longest look while requests are under way side by side, or after so long a time of work that there were many:
/// they share the cost of a sleep, and what they wait for is not its end.
const CROWDED_MAX: Duration = Duration::from_micros(10);
/// Work for longer than this was more than one request.
const CROWDED_WORK: Duration = Duration::from_micros(8);

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

    /// How long to look now; zero for not at all. The thread has worked for so long since it last had nothing to do,
    /// and so many operations of storage are in flight.
    pub(crate) fn length(&self, worked: Duration, in_flight: usize) -> Duration {
        if in_flight > 1 || worked > CROWDED_WORK { self.now.min(CROWDED_MAX) } else { self.now }
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
        let length = |spin: &Spin| spin.length(Duration::from_micros(1), 1);
        assert_eq!(length(&spin), Duration::ZERO, "idle at first");
        for _ in 0..10 {
            spin.slept(Duration::from_micros(30));
        }
        assert!(length(&spin) >= Duration::from_micros(30));
        assert!(spin.length(Duration::from_micros(1), 2) <= CROWDED_MAX, "others are in flight");
        assert!(spin.length(Duration::from_micros(50), 0) <= CROWDED_MAX, "there were many");
        for _ in 0..10 {
            spin.slept(Duration::from_millis(1));
        }
        assert_eq!(length(&spin), Duration::ZERO);
        assert_eq!(Spin::up_to(Duration::from_secs(1)).max, MAX);
    }
}
