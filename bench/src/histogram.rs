//! A histogram of latencies: cheap to count in, exact to about one and a half percent.

use std::time::Duration;

/// Each power of two is cut into this many steps.
const STEPS: u64 = 64;
const STEPS_LOG2: u32 = STEPS.trailing_zeros();
/// Steps up to 2^36 ns, which is more than a minute; what takes longer counts as that.
const BUCKETS: usize = (36 - STEPS_LOG2 as usize + 1) * STEPS as usize;

pub(crate) struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    pub(crate) fn new() -> Histogram {
        Histogram { counts: vec![0; BUCKETS] }
    }

    pub(crate) fn count(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns).min(BUCKETS - 1)] += 1;
    }

    /// The latency in µs that `part` of all requests (0 to 1) did not exceed; 0 if nothing was counted.
    pub(crate) fn quantile_us(&self, part: f64) -> f64 {
        let total: u64 = self.counts.iter().sum();
        let rank = ((total as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle_ns(bucket) / 1000.0;
            }
        }
        0.0
    }
}

/// Below `STEPS` each nanosecond has its bucket; above, each power of two has `STEPS`.
fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let shift = ns.ilog2() - STEPS_LOG2;
    ((u64::from(shift) + 1) * STEPS + (ns >> shift) - STEPS) as usize
}

fn middle_ns(bucket: usize) -> f64 {
    let (power, step) = (bucket as u64 / STEPS, bucket as u64 % STEPS);
    if power == 0 {
        return step as f64;
    }
    let width = (1u64 << (power - 1)) as f64;
    (STEPS + step) as f64 * width + width / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_within_two_percent() {
        let mut histogram = Histogram::new();
        for us in 1..=1000 {
            histogram.count(Duration::from_micros(us));
        }
        for (part, us) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = histogram.quantile_us(part);
            assert!((found - us).abs() < us * 0.02, "{found} instead of {us}");
        }
    }

    #[test]
    fn buckets_are_in_order_and_leave_no_gap() {
        let mut last = 0;
        for ns in 0..1_000_000 {
            let found = bucket(ns);
            assert!(found == last || found == last + 1, "{ns}");
            last = found;
        }
    }

    #[test]
    fn an_absurd_latency_is_counted_and_does_not_panic() {
        let mut histogram = Histogram::new();
        histogram.count(Duration::MAX);
        assert!(histogram.quantile_us(0.5) > 60e6);
    }

    #[test]
    fn nothing_counted_is_zero() {
        assert_eq!(Histogram::new().quantile_us(0.99), 0.0);
    }
}
