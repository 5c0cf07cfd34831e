//! Compressed clusters: unpacking one, and keeping those that were unpacked last.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use block::Span;
use flate2::{Decompress, FlushDecompress, Status};
use zstd::zstd_safe;

use super::Compression;
use super::entry::Packed;

/// Bytes of unpacked clusters that are kept; one is, however large.
const KEPT_MAX: usize = 4 << 20;

/// Why bytes cannot be unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    /// They are nothing that was compressed so, or a part of it.
    #[error("its {} stream is broken", .0.name())]
    Stream(Compression),
    /// They are less than a cluster.
    #[error("its compressed bytes give {found} bytes, a cluster has {expected}")]
    Short {
        /// Bytes that came out.
        found: usize,
        /// Bytes of a cluster.
        expected: usize,
    },
}

/// Unpacks a cluster of so many bytes. Behind the compressed bytes there may be others, up to the end of a sector.
pub(super) fn unpack(compression: Compression, bytes: &[u8], cluster: usize) -> Result<Vec<u8>, Broken> {
    let mut unpacked = vec![0; cluster];
    let found = match compression {
        Compression::Zlib => inflate(bytes, &mut unpacked),
        Compression::Zstd => decompress(bytes, &mut unpacked),
    };
    match found {
        Some(found) if found == cluster => Ok(unpacked),
        Some(found) => Err(Broken::Short { found, expected: cluster }),
        None => Err(Broken::Stream(compression)),
    }
}

/// How many bytes came out. A stream need not have ended with the cluster: decompression stops there.
fn inflate(bytes: &[u8], into: &mut [u8]) -> Option<usize> {
    // Written with a window of 4 KiB, but a larger one reads it as well.
    let mut stream = Decompress::new(false);
    match stream.decompress(bytes, into, FlushDecompress::Finish) {
        Ok(Status::StreamEnd | Status::BufError | Status::Ok) => usize::try_from(stream.total_out()).ok(),
        Err(_) => None,
    }
}

/// As of `inflate`. The frame is unpacked at once: so whatever window it asks for takes no memory.
fn decompress(bytes: &[u8], into: &mut [u8]) -> Option<usize> {
    let frame = zstd_safe::find_frame_compressed_size(bytes).ok().and_then(|len| bytes.get(..len))?;
    zstd_safe::decompress(into, frame).ok()
}

/// The clusters that were unpacked last: neighbours in one are often read one after the other.
#[derive(Default)]
pub(super) struct Unpacked(RefCell<VecDeque<(Packed, Rc<[u8]>)>>);

impl Unpacked {
    /// The bytes of a cluster, if they are at hand.
    pub(super) fn get(&self, packed: Packed) -> Option<Rc<[u8]>> {
        let mut kept = self.0.borrow_mut();
        let found = kept.iter().position(|(key, _)| *key == packed)?;
        let entry = kept.remove(found)?;
        let bytes = entry.1.clone();
        kept.push_front(entry);
        Some(bytes)
    }

    /// Keeps the bytes of a cluster.
    pub(super) fn put(&self, packed: Packed, bytes: Rc<[u8]>) {
        let mut kept = self.0.borrow_mut();
        kept.retain(|(key, _)| *key != packed);
        let most = (KEPT_MAX / bytes.len().max(1)).clamp(1, 64);
        kept.truncate(most - 1);
        kept.push_front((packed, bytes));
    }

    /// Forgets those of which some bytes were in this part of the file, where something else may be now.
    pub(super) fn forget(&self, part: Span) {
        self.0
            .borrow_mut()
            .retain(|(packed, _)| Span::new(packed.at, packed.len).is_none_or(|span| !span.overlaps(part)));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at * at / 977) as u8).collect()
    }

    #[test]
    fn a_cluster_is_unpacked_whatever_follows_it() {
        let cluster = text(65536);
        for (compression, mut bytes) in [
            (Compression::Zlib, deflated(&cluster)),
            (Compression::Zstd, zstd::encode_all(&cluster[..], 3).unwrap()),
        ] {
            assert!(unpack(compression, &bytes, 65536).unwrap() == cluster);
            bytes.extend_from_slice(&[0xa5; 300]);
            assert!(unpack(compression, &bytes, 65536).unwrap() == cluster);
            // It may be cut off anywhere, or be something else.
            let half = &bytes[..bytes.len() / 2 - 150];
            assert!(unpack(compression, half, 65536).is_err());
            assert!(unpack(compression, &[], 65536).is_err());
            assert!(unpack(compression, &[0xff; 512], 65536).is_err());
        }
    }

    #[test]
    fn less_than_a_cluster_is_an_error_and_more_is_cut_off() {
        let bytes = deflated(&text(1000));
        assert_eq!(
            unpack(Compression::Zlib, &bytes, 65536),
            Err(Broken::Short { found: 1000, expected: 65536 })
        );
        // As QEMU has it: what is behind a cluster's end is not looked at.
        assert_eq!(unpack(Compression::Zlib, &bytes, 512).unwrap(), text(1000)[..512]);
        let bytes = zstd::encode_all(&text(1000)[..], 3).unwrap();
        assert!(unpack(Compression::Zstd, &bytes, 65536).is_err());
        assert!(unpack(Compression::Zstd, &bytes, 512).is_err());
    }

    #[test]
    fn the_clusters_unpacked_last_are_kept() {
        let unpacked = Unpacked::default();
        let packed = |number: u64| Packed { at: number * 1000, len: 1000 };
        for number in 0..100 {
            unpacked.put(packed(number), vec![number as u8; 65536].into());
            assert!(number < 2 || unpacked.get(packed(1)).is_some());
        }
        assert!(unpacked.get(packed(0)).is_none());
        assert_eq!(unpacked.get(packed(99)).unwrap()[0], 99);
        assert_eq!((0..100).filter(|number| unpacked.get(packed(*number)).is_some()).count(), 64);
        unpacked.forget(Span::new(99_999, 1).unwrap());
        assert!(unpacked.get(packed(99)).is_none() && unpacked.get(packed(98)).is_some());
        unpacked.put(packed(5), vec![7; 8 << 20].into());
        assert!(unpacked.get(packed(5)).is_some(), "one is kept, however large");
        assert!(unpacked.get(packed(98)).is_none());
    }
}
