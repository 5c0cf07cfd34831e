//! The clusters of the file that hold metadata, where no data may ever be written.
//!
//! Reference counts say this as well. But in a broken image they may not, and a write in good faith would then destroy the rest.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use block::Span;

/// Multiplies numbers by a secret odd one (Dietzfelbinger's multiply-shift): each write asks, and an image may be made to have
/// its tables' numbers collide, if it is known how they are hashed.
struct Secret(u64);

impl BuildHasher for Secret {
    type Hasher = Product;

    fn build_hasher(&self) -> Product {
        Product { factor: self.0, product: 0 }
    }
}

struct Product {
    factor: u64,
    product: u64,
}

impl Hasher for Product {
    fn finish(&self) -> u64 {
        // The upper bits are the good ones, and the table looks at the lower ones.
        self.product.rotate_left(32)
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        self.product = (self.product ^ number).wrapping_mul(self.factor);
    }
}

/// A set of clusters, by the bytes of the file that they are.
pub(super) struct Reserved {
    cluster_bits: u32,
    /// 64 clusters each.
    groups: HashMap<u64, u64, Secret>,
}

impl Reserved {
    /// None.
    pub(super) fn new(cluster_bits: u32) -> Reserved {
        let secret = Secret(RandomState::new().build_hasher().finish() | 1);
        Reserved { cluster_bits, groups: HashMap::with_hasher(secret) }
    }

    /// The clusters with these bytes.
    fn clusters(&self, span: Span) -> std::ops::Range<u64> {
        let bits = self.cluster_bits;
        let span = span.align_out(1 << bits);
        span.at() >> bits..span.end() >> bits
    }

    /// Adds the clusters with these bytes; false where one of them was there already.
    pub(super) fn add(&mut self, span: Span) -> bool {
        let mut new = true;
        for cluster in self.clusters(span) {
            let group = self.groups.entry(cluster / 64).or_default();
            new &= *group >> (cluster % 64) & 1 == 0;
            *group |= 1 << (cluster % 64);
        }
        new
    }

    /// Takes the clusters with these bytes out.
    pub(super) fn remove(&mut self, span: Span) {
        for cluster in self.clusters(span) {
            if let Some(group) = self.groups.get_mut(&(cluster / 64)) {
                *group &= !(1 << (cluster % 64));
                if *group == 0 {
                    self.groups.remove(&(cluster / 64));
                }
            }
        }
    }

    /// Whether one of these bytes is in it.
    pub(super) fn overlaps(&self, span: Span) -> bool {
        let clusters = self.clusters(span);
        (clusters.start / 64..clusters.end.div_ceil(64)).any(|number| {
            let bit = |cluster: u64| cluster.clamp(number * 64, number * 64 + 64) - number * 64;
            let upto = |bit: u64| 1_u64.checked_shl(bit as u32).map_or(u64::MAX, |bit| bit - 1);
            let asked = upto(bit(clusters.end)) & !upto(bit(clusters.start));
            self.groups.get(&number).is_some_and(|group| group & asked != 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(at: u64, len: u64) -> Span {
        Span::new(at, len).unwrap()
    }

    #[test]
    fn a_cluster_is_in_it_by_each_of_its_bytes() {
        let mut reserved = Reserved::new(9);
        assert!(reserved.add(span(512 * 60, 512 * 10)));
        assert!(reserved.overlaps(span(512 * 70 - 1, 1)) && reserved.overlaps(span(0, 512 * 60 + 1)));
        assert!(!reserved.overlaps(span(512 * 70, 5000)) && !reserved.overlaps(span(0, 512 * 60)));
        assert!(!reserved.add(span(512 * 65, 1)), "it is there already");
        reserved.remove(span(512 * 60, 512 * 10));
        assert!(!reserved.overlaps(span(0, 1 << 20)) && reserved.groups.is_empty());
    }
}
