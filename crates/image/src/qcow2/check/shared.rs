//! Clusters that several entries of the disk's own tables lead to: a repair gives each entry one of its own.
//!
//! No program that keeps its promises makes such entries, but a broken one, or a cut that lost a later table, leaves some. While
//! counts say how many they are nothing gets lost by them: whoever writes to one gets a copy. But then the last one is left
//! alone without the mark of that, which the next check takes for a fault; and counts of one bit have no room for two.

use std::collections::HashMap;
use std::rc::Rc;

use block::Result;
use storage::Storage;

use super::super::COPIED;
use super::super::bytes;
use super::super::header::Header;
use super::super::offline::read_table;
use super::entry::{Judge, PLACE, Target};
use super::stored::{Change, Stored};
use super::walk::{Plan, Walk, l2_entries};
use super::{clusters, free_run, rebuild, sweep};
use crate::Report;

/// Entries that get their copies in one go.
const BATCH: u64 = 1 << 16;
/// Copies have no more bytes together than the file has, or these if it has fewer: a small file may say that it is a large disk.
const COPIES_MIN: u64 = 64 << 20;

/// An entry that leads to what another one leads to as well.
struct Double {
    /// Its byte of the file.
    place: u64,
    /// Its first word.
    word: u64,
    /// Whether it is one of L1: then what it leads to is a table.
    is_table: bool,
}

/// Gives entries clusters of their own; how many. All counts are at least what they should be, and all that refers is known.
///
/// # Errors
/// The storage's; then the entries lead to what they led to, or to a copy, and at most space leaks.
pub(super) async fn part(file: &Rc<dyn Storage>, header: &mut Header) -> Result<u64> {
    let room = file.size().max(COPIES_MIN) >> header.cluster_bits;
    let mut parted = 0;
    while parted < room {
        let most = BATCH.min(room - parted);
        // Tables first: those that have two entries of L1 double all that they lead to.
        let mut doubles = tables(file, header, most).await?;
        if doubles.is_empty() && !header.has_data_file() {
            doubles = data(file, header, most).await?;
        }
        if doubles.is_empty() {
            break;
        }
        copy(file, header, &doubles).await?;
        // What now has one entry less is counted so before the next look.
        sweep(file, header, &Plan::default(), Change::Lower).await?;
        parted += doubles.len() as u64;
    }
    Ok(parted)
}

/// Entries of L1 whose table has another entry before.
async fn tables(file: &Rc<dyn Storage>, header: &Header, most: u64) -> Result<Vec<Double>> {
    let mut found = Vec::new();
    let tables = active_tables(file, header).await?;
    for (before, this) in tables.iter().zip(tables.iter().skip(1)) {
        if before.0 == this.0 && (found.len() as u64) < most {
            let place = header.l1_at + this.1 * 8;
            found.push(Double { place, word: this.0 | COPIED, is_table: true });
        }
    }
    Ok(found)
}

/// The L2 tables that the active L1 table leads to, rising, each with the number of its entry.
async fn active_tables(file: &Rc<dyn Storage>, header: &Header) -> Result<Vec<(u64, u64)>> {
    let judge = Judge::new(header, file.size());
    let l1 = read_table(file, header.l1_at, header.l1_entries.into()).await?;
    let tables = l1.into_iter().zip(0..).filter_map(|(word, index)| match judge.l1(word) {
        Ok(Some(at)) => Some((at, index)),
        Ok(None) | Err(_) => None,
    });
    let mut tables: Vec<(u64, u64)> = tables.collect();
    tables.sort_unstable();
    Ok(tables)
}

/// Entries of L2 tables that are not alone in leading to their cluster: all of them but one, or all, if it is a table as well, or
/// has compressed bytes. Where the table with such an entry is a snapshot's as well, it is the table that comes first: what is
/// changed in it would be changed for both.
async fn data(file: &Rc<dyn Storage>, header: &Header, most: u64) -> Result<Vec<Double>> {
    let mut stored = Stored::read(file, header).await?;
    let judge = Judge::new(header, file.size());
    let mut tables = active_tables(file, header).await?;
    tables.dedup_by_key(|(at, _)| *at);
    let mut counter = clusters(header);
    let mut found = Vec::new();
    let mut copied: HashMap<u64, u64> = HashMap::new();
    loop {
        let (mut scratch, plan) = (Report::default(), Plan::default());
        Walk::new(file, header, &mut scratch, &plan).own_references(&mut counter, &stored.table).await?;
        for (table, index) in &tables {
            let all = bytes::read(file, *table, header.cluster_size() as usize).await?;
            for (place, words) in l2_entries(&all, *table, header) {
                let Ok(Target::Cluster { at }) = judge.l2(words) else { continue };
                let number = at >> header.cluster_bits;
                let left = counter.get(number).saturating_sub(copied.get(&number).copied().unwrap_or(0));
                if left > 1 && stored.get(table >> header.cluster_bits).await? > 1 {
                    let place = header.l1_at + index * 8;
                    found.push(Double { place, word: table | COPIED, is_table: true });
                    break;
                }
                if left > 1 {
                    *copied.entry(number).or_default() += 1;
                    found.push(Double { place, word: words[0], is_table: false });
                }
                if found.len() as u64 >= most {
                    return Ok(found);
                }
            }
        }
        if !counter.advance() {
            return Ok(found);
        }
    }
}

/// Copies what entries lead to, counts the copies, and only then lets the entries lead to these.
async fn copy(file: &Rc<dyn Storage>, header: &mut Header, doubles: &[Double]) -> Result<()> {
    let cluster = header.cluster_size();
    let free = free_run(file, header, doubles.len() as u64, &[]).await?;
    let first = free * cluster;
    let len = cluster * doubles.len() as u64;
    bytes::extend(file, bytes::end(first, len)?).await?;
    for (at, double) in (first..).step_by(cluster as usize).zip(doubles) {
        let mut content = bytes::read(file, double.word & PLACE, cluster as usize).await?;
        if double.is_table {
            // What it leads to has two entries now: none of them is alone.
            for entry in content.chunks_exact_mut(header.l2_entry_size() as usize) {
                if let Some(first) = entry.first_mut()
                    && !header.has_data_file()
                {
                    *first &= 0x7f;
                }
            }
        }
        bytes::write(file, at, &content).await?;
    }
    let plan = Plan { spans: vec![(first, len)], ..Plan::default() };
    if sweep(file, header, &plan, Change::No).await?.rebuild {
        rebuild::rebuild(file, header, &plan).await?;
    } else {
        sweep(file, header, &plan, Change::Raise).await?;
    }
    for (at, double) in (first..).step_by(cluster as usize).zip(doubles) {
        let word = double.word & !PLACE | at | COPIED;
        bytes::write(file, double.place, &word.to_be_bytes()).await?;
    }
    file.flush().await
}
