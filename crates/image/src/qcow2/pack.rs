//! Filling a new image with compressed clusters: they come in rising order, and the file is written from its start to its
//! end, tables among the data.

use std::collections::VecDeque;
use std::rc::Rc;

use flate2::FlushCompress;
use storage::Storage;

use crate::ImageError;

use super::header::{Compression, Header, REFCOUNT_TABLE_MAX};
use super::{COPIED, bytes, counts};

/// Bit of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bits of the window of a deflate stream: QEMU unpacks with no larger one (its `block/qcow2-threads.c`).
const WINDOW_BITS: u8 = 12;
/// Clusters that did not become smaller are collected up to this many bytes, so that the compressed ones between them still
/// lie close together.
const PLAIN_MAX: usize = 1 << 20;
/// Bytes that are written in one piece.
const PIECE: usize = 1 << 20;

/// What became of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packed {
    /// It is zero: an image that has nothing below it need not hold it.
    Zero,
    /// Compressed, it has these bytes, fewer than before.
    Smaller(Vec<u8>),
    /// It would not become smaller.
    Plain,
}

/// What compresses clusters, one after the other. Each thread has one: its memory is large, and is used again.
pub struct Compressor {
    with: With,
    /// Room for a cluster.
    small: Vec<u8>,
}

enum With {
    Deflate(flate2::Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    /// One for clusters that are compressed so.
    ///
    /// # Errors
    /// The compressor's, of which none is expected.
    pub fn new(how: Compression) -> std::io::Result<Compressor> {
        let with = match how {
            Compression::Zlib => With::Deflate(deflate()),
            Compression::Zstd => With::Zstd(zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)?),
        };
        Ok(Compressor { with, small: Vec::new() })
    }

    /// Compresses a cluster.
    ///
    /// # Errors
    /// As of [`Compressor::new`].
    pub fn pack(&mut self, cluster: &[u8]) -> std::io::Result<Packed> {
        if is_zero(cluster) {
            return Ok(Packed::Zero);
        }
        self.small.clear();
        match &mut self.with {
            With::Deflate(compress) => {
                // Room for bytes that do not become fewer, too: a stream that ends is one after which the next can begin.
                self.small.reserve_exact(cluster.len() + cluster.len() / 4 + 256);
                compress.reset();
                let status = compress.compress_vec(cluster, &mut self.small, FlushCompress::Finish)?;
                if status != flate2::Status::StreamEnd {
                    *compress = deflate();
                    return Ok(Packed::Plain);
                }
            }
            With::Zstd(compress) => {
                self.small.reserve_exact(zstd::zstd_safe::compress_bound(cluster.len()));
                compress.compress_to_buffer(cluster, &mut self.small)?;
            }
        }
        let is_smaller = self.small.len() < cluster.len();
        Ok(if is_smaller { Packed::Smaller(self.small.clone()) } else { Packed::Plain })
    }
}

fn deflate() -> flate2::Compress {
    flate2::Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// An image in the making. It does no I/O but at its begin and end: what is to be written is taken from it.
pub struct Packer {
    header: Header,
    cluster: u64,
    /// The largest count that it lets a cluster have.
    count_max: u64,
    /// What goes into the file from `tail_at` on; behind it nothing is taken yet.
    tail: Vec<u8>,
    tail_at: u64,
    /// What goes elsewhere.
    others: Vec<(u64, Vec<u8>)>,
    /// Reference counts from the first cluster of refcount block number `blocks_done` on.
    counts: VecDeque<u64>,
    blocks_done: usize,
    /// Where refcount blocks are, by their number.
    blocks: Vec<u64>,
    /// Whether the refcount table is not where it was.
    is_table_new: bool,
    l1: Vec<u64>,
    /// The L2 table that is being filled: its number and its entries.
    l2: Option<(usize, Vec<u64>)>,
    /// Clusters that are written as they are: their number, and their bytes.
    plain: Vec<(u64, Vec<u8>)>,
    plain_len: usize,
}

impl Packer {
    /// Begins with an image that was just made, has nothing below it and nothing reserved.
    ///
    /// # Errors
    /// The storage's, or it has its data elsewhere.
    pub async fn new(file: &Rc<dyn Storage>) -> Result<Packer, ImageError> {
        let header = Header::read(file).await?;
        if header.has_data_file() || header.backing_file.is_some() {
            return Err(ImageError::Refused(
                "an image with a data file or another image below it cannot be made of compressed clusters"
                    .into(),
            ));
        }
        let cluster = header.cluster_size();
        let table_len = (u64::from(header.refcount_table_clusters) * cluster).min(REFCOUNT_TABLE_MAX);
        let table = bytes::read(file, header.refcount_table_at, table_len as usize).await?;
        let entries = table.chunks_exact(8).map(|entry| bytes::be64(entry, 0).unwrap_or(0));
        let blocks: Vec<u64> = entries.take_while(|at| *at != 0).collect();
        let l1_end = header.l1_at + u64::from(header.l1_entries) * 8;
        let block_end = blocks.iter().map(|at| at + cluster).max().unwrap_or(0);
        let end = l1_end.max(block_end).max(header.refcount_table_at + table_len).next_multiple_of(cluster);
        let count_max = header.refcount_max().min(u64::from(u16::MAX));
        let mut packer = Packer {
            cluster,
            count_max,
            tail: Vec::new(),
            tail_at: end,
            others: Vec::new(),
            counts: std::iter::repeat_n(1, (end >> header.cluster_bits) as usize).collect(),
            blocks_done: 0,
            blocks,
            is_table_new: false,
            l1: vec![0; header.l1_entries as usize],
            l2: None,
            plain: Vec::new(),
            plain_len: 0,
            header,
        };
        packer.make_room();
        Ok(packer)
    }

    /// Takes a place for a larger refcount table, if the one that there is could be too small.
    fn make_room(&mut self) {
        let header = &self.header;
        // What is not full of compressed clusters is at most one for each that the disk has.
        let disk = header.size.div_ceil(self.cluster);
        let clusters =
            (self.counts.len() as u64).saturating_add(disk.saturating_mul(2)) + self.l1.len() as u64;
        let needed =
            (clusters / (header.refcounts_per_block() - 1) + 2).saturating_mul(8).min(REFCOUNT_TABLE_MAX);
        let old = u64::from(header.refcount_table_clusters);
        if needed <= old * self.cluster {
            return;
        }
        let first = (header.refcount_table_at >> header.cluster_bits) as usize;
        for cluster in first..first + old as usize {
            if let Some(count) = self.counts.get_mut(cluster) {
                *count = 0;
            }
        }
        let new = needed.div_ceil(self.cluster);
        self.header.refcount_table_at = self.tail_at;
        self.header.refcount_table_clusters = new as u32;
        self.is_table_new = true;
        self.counts.extend(std::iter::repeat_n(1, new as usize));
        self.tail_at += new * self.cluster;
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.cluster
    }

    /// How its clusters are compressed.
    pub fn compression(&self) -> Compression {
        self.header.compression
    }

    /// Takes the cluster of the disk with this number, larger than those before, and its bytes.
    pub fn put(&mut self, number: u64, packed: Packed, bytes: &[u8]) {
        if packed == Packed::Zero {
            return;
        }
        let table = (number / self.header.l2_entries()) as usize;
        if self.l2.as_ref().is_none_or(|(current, _)| *current != table) {
            self.end_table();
            self.l2 = Some((table, vec![0; self.header.l2_entries() as usize]));
        }
        match packed {
            Packed::Zero => {}
            Packed::Smaller(bytes) => self.put_packed(number, &bytes),
            Packed::Plain => {
                self.plain_len += bytes.len();
                self.plain.push((number, bytes.to_vec()));
                if self.plain_len >= PLAIN_MAX {
                    self.put_plain();
                }
            }
        }
    }

    fn put_packed(&mut self, number: u64, packed: &[u8]) {
        // Where the counts have no room the next cluster begins.
        if self.count_of(self.end() >> self.header.cluster_bits) >= self.count_max {
            self.align();
        }
        let at = self.end();
        let last = at + packed.len() as u64 - 1;
        for cluster in at >> self.header.cluster_bits..=last >> self.header.cluster_bits {
            self.count(cluster);
        }
        self.tail.extend_from_slice(packed);
        // The specification, "Compressed Clusters Descriptor": above the place, the sectors besides the first.
        let shift = 62 - (self.header.cluster_bits - 8);
        self.enter(number, COMPRESSED | ((last >> 9) - (at >> 9)) << shift | at);
    }

    fn put_plain(&mut self) {
        self.plain_len = 0;
        for (number, bytes) in std::mem::take(&mut self.plain) {
            let at = self.take_cluster();
            self.tail.extend_from_slice(&bytes);
            self.pad();
            self.enter(number, COPIED | at);
        }
    }

    /// Notes where a cluster of the disk is; its table is the one at hand.
    fn enter(&mut self, number: u64, entry: u64) {
        let index = (number % self.header.l2_entries()) as usize;
        let (_, entries) = self.l2.as_mut().expect("who takes a cluster has its table at hand");
        entries[index] = entry;
    }

    /// Puts the L2 table that is at hand into the file.
    fn end_table(&mut self) {
        self.put_plain();
        let Some((number, entries)) = self.l2.take() else { return };
        let at = self.take_cluster();
        for entry in entries {
            self.tail.extend_from_slice(&entry.to_be_bytes());
            if self.header.has_extended_l2() {
                // Compressed clusters have no subclusters; of the others all are there.
                let all = if entry & COPIED != 0 { u64::from(u32::MAX) } else { 0 };
                self.tail.extend_from_slice(&all.to_be_bytes());
            }
        }
        *self.l1.get_mut(number).expect("clusters are within the disk") = COPIED | at;
    }

    /// Byte of the file behind all that is taken.
    fn end(&self) -> u64 {
        self.tail_at + self.tail.len() as u64
    }

    /// Takes the next whole cluster of the file; where it begins.
    fn take_cluster(&mut self) -> u64 {
        self.align();
        let at = self.end();
        self.count(at >> self.header.cluster_bits);
        at
    }

    fn pad(&mut self) {
        let missing = self.end().next_multiple_of(self.cluster) - self.end();
        self.tail.resize(self.tail.len() + missing as usize, 0);
    }

    /// Goes on to the next cluster of the file, unless one begins here. Refcount blocks that are full by then go there.
    fn align(&mut self) {
        self.pad();
        let per_block = self.header.refcounts_per_block();
        while (self.blocks_done as u64 + 1) * per_block <= self.end() >> self.header.cluster_bits {
            self.end_block();
        }
    }

    /// How a cluster's number counts in `counts`.
    fn index_of(&self, cluster: u64) -> usize {
        (cluster - self.blocks_done as u64 * self.header.refcounts_per_block()) as usize
    }

    fn count_of(&self, cluster: u64) -> u64 {
        self.counts.get(self.index_of(cluster)).copied().unwrap_or(0)
    }

    /// Counts one use more of a cluster.
    fn count(&mut self, cluster: u64) {
        let index = self.index_of(cluster);
        if index >= self.counts.len() {
            self.counts.resize(index + 1, 0);
        }
        self.counts[index] += 1;
    }

    /// Gives the next refcount block its place and its bytes. A cluster of the file begins here.
    fn end_block(&mut self) {
        let place = self.blocks.get(self.blocks_done).copied();
        let at = place.unwrap_or(self.end());
        if place.is_none() {
            // It may be counted in this very block.
            self.count(at >> self.header.cluster_bits);
            self.blocks.push(at);
        }
        let counted = (self.header.refcounts_per_block() as usize).min(self.counts.len());
        let mut block = vec![0; self.cluster as usize];
        for (index, count) in self.counts.drain(..counted).enumerate() {
            counts::set(&mut block, self.header.refcount_order, index, count);
        }
        self.blocks_done += 1;
        match place {
            Some(at) => self.others.push((at, block)),
            None => self.tail.extend_from_slice(&block),
        }
    }

    /// Bytes to be written and where, if there are enough.
    pub fn output(&mut self) -> Option<(u64, Vec<u8>)> {
        if let Some(other) = self.others.pop() {
            return Some(other);
        }
        if self.tail.len() < PIECE {
            return None;
        }
        // So that the pieces begin and end with pages.
        let len = PIECE - (self.tail_at % 4096) as usize;
        let rest = self.tail.split_off(len);
        let at = self.tail_at;
        self.tail_at += len as u64;
        Some((at, std::mem::replace(&mut self.tail, rest)))
    }

    /// Writes what is left, and makes the image durable. What was taken from it before has to be written by then.
    ///
    /// # Errors
    /// The storage's, or the image is too large for its tables.
    pub async fn finish(mut self, file: &Rc<dyn Storage>) -> Result<(), ImageError> {
        self.end_table();
        self.align();
        let per_block = self.header.refcounts_per_block();
        while self.blocks_done as u64 * per_block < self.end() >> self.header.cluster_bits {
            self.end_block();
        }
        let words = |table: &[u64]| table.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
        let table = words(&self.blocks);
        if table.len() as u64 > u64::from(self.header.refcount_table_clusters) * self.cluster {
            return Err(ImageError::Refused(format!(
                "with clusters of {} bytes this disk needs a larger refcount table than qcow2 can have; larger clusters help",
                self.cluster
            )));
        }
        file.resize(self.end()).await?;
        let tail = (self.tail_at, std::mem::take(&mut self.tail));
        let tables = [(self.header.refcount_table_at, table), (self.header.l1_at, words(&self.l1))];
        for (at, part) in self.others.drain(..).chain([tail]).chain(tables) {
            if !part.is_empty() {
                bytes::write(file, at, &part).await?;
            }
        }
        file.flush().await?;
        if self.is_table_new {
            self.header.write_fields(file).await?;
            file.flush().await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use storage::conformance::Random;

    use super::*;
    use crate::qcow2::packed::unpack;

    #[test]
    fn one_compressor_serves_all_clusters_whatever_came_before() {
        for how in [Compression::Zlib, Compression::Zstd] {
            for cluster in [512, 4096, 65536] {
                let mut compressor = Compressor::new(how).unwrap();
                let mut random = Random(cluster as u64);
                for step in 0..60_u64 {
                    // Of each kind some: noise, words, a mixture, zeroes.
                    let noise = match step % 4 {
                        0 => cluster,
                        1 => 0,
                        2 => random.below(cluster as u64) as usize,
                        _ => 0,
                    };
                    let word = if step % 4 == 3 { 0 } else { step as u8 | 1 };
                    let mut bytes = vec![word; cluster];
                    bytes[..noise].iter_mut().for_each(|byte| *byte = random.below(256) as u8);
                    match compressor.pack(&bytes).unwrap() {
                        Packed::Zero => assert!(bytes.iter().all(|byte| *byte == 0)),
                        Packed::Smaller(small) => {
                            assert!(small.len() < cluster && step % 4 != 0, "step {step}");
                            assert!(unpack(how, &small, cluster).unwrap() == bytes, "step {step}");
                        }
                        Packed::Plain => assert!(step % 4 == 0 || noise > 0, "step {step}"),
                    }
                }
            }
        }
    }
}
