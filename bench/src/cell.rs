//! A cell of the table: one kind of load, and the figures that it yields.

/// Whether requests ask for bytes or bring them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// The order in which the load visits the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Random,
    Sequential,
}

/// One kind of load: which requests, how long each, how many at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) name: &'static str,
    pub(crate) order: Order,
    pub(crate) direction: Direction,
    pub(crate) len: usize,
    /// Requests in flight, always.
    pub(crate) depth: usize,
}

/// No cell keeps more requests than this in flight.
pub(crate) const DEPTH_MAX: usize = 32;

/// Every contestant runs all of these.
pub(crate) const CELLS: [Cell; 6] = [
    Cell::new("rr4k-1", Order::Random, Direction::Read, 4 << 10, 1),
    Cell::new("rr4k-32", Order::Random, Direction::Read, 4 << 10, 32),
    Cell::new("rw4k-1", Order::Random, Direction::Write, 4 << 10, 1),
    Cell::new("rw4k-32", Order::Random, Direction::Write, 4 << 10, 32),
    Cell::new("sr128k-8", Order::Sequential, Direction::Read, 128 << 10, 8),
    Cell::new("sw128k-8", Order::Sequential, Direction::Write, 128 << 10, 8),
];

impl Cell {
    const fn new(name: &'static str, order: Order, direction: Direction, len: usize, depth: usize) -> Cell {
        assert!(depth >= 1 && depth <= DEPTH_MAX);
        Cell { name, order, direction, len, depth }
    }

    /// Where the requests of this cell go: the same places for every contestant and round.
    pub(crate) fn offsets(&self, size: u64) -> Offsets {
        Offsets { order: self.order, len: self.len as u64, places: size / self.len as u64, turn: 0 }
    }
}

/// The endless list of places that a cell visits.
pub(crate) struct Offsets {
    order: Order,
    len: u64,
    places: u64,
    turn: u64,
}

impl Iterator for Offsets {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.turn += 1;
        let place = match self.order {
            Order::Random => splitmix(self.turn) % self.places,
            Order::Sequential => (self.turn - 1) % self.places,
        };
        Some(place * self.len)
    }
}

/// The nth number of Vigna's SplitMix64.
fn splitmix(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What one contestant did in one cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figures {
    pub(crate) iops: f64,
    /// CPU time of the server for each request that it served.
    pub(crate) cpu_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// How busy the load generator was, from 0 to 1: near 1 it is the generator that is measured.
    /// None where the contestant generates its own load.
    pub(crate) client_busy: Option<f64>,
}

impl Figures {
    /// The median of each figure over the rounds; none if there were no rounds.
    pub(crate) fn median(rounds: &[Figures]) -> Option<Figures> {
        Some(Figures {
            iops: median(rounds.iter().map(|round| round.iops))?,
            cpu_us: median(rounds.iter().map(|round| round.cpu_us))?,
            p50_us: median(rounds.iter().map(|round| round.p50_us))?,
            p99_us: median(rounds.iter().map(|round| round.p99_us))?,
            client_busy: median(rounds.iter().filter_map(|round| round.client_busy)),
        })
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    #[test]
    fn every_offset_is_aligned_and_inside_the_image() {
        for cell in CELLS {
            for at in cell.offsets(SIZE).take(100_000) {
                assert_eq!(at % cell.len as u64, 0, "{}", cell.name);
                assert!(at + cell.len as u64 <= SIZE, "{}", cell.name);
            }
        }
    }

    #[test]
    fn sequential_offsets_follow_each_other_and_wrap() {
        let cell = Cell::new("", Order::Sequential, Direction::Read, 4096, 1);
        assert_eq!(cell.offsets(3 * 4096).take(5).collect::<Vec<_>>(), [0, 4096, 8192, 0, 4096]);
    }

    #[test]
    fn random_offsets_visit_most_of_a_small_image() {
        let cell = Cell::new("", Order::Random, Direction::Read, 4096, 1);
        let mut places: Vec<u64> = cell.offsets(64 * 4096).take(1000).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 64);
    }

    #[test]
    fn a_median_is_the_middle_value_or_the_mean_of_the_two() {
        assert_eq!(median([].into_iter()), None);
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
    }
}
