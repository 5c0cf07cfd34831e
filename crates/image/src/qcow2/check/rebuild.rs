//! Counts made anew: a refcount table and blocks behind all that is in use, to which the header switches in one sector.

use std::collections::BTreeSet;
use std::rc::Rc;

use block::{Errno, Error, Result};
use storage::Storage;

use super::super::header::{Header, REFCOUNT_TABLE_MAX};
use super::super::{bytes, counts};
use super::stored::Stored;
use super::walk::{Entries, Plan, Walk};
use super::{Counter, clusters};
use crate::Report;

/// Makes all counts anew, by what refers and what is planned to. The old ones are free afterwards.
///
/// # Errors
/// The storage's; then the old ones are still in use. EFBIG where the file is too large to be counted.
pub(super) async fn rebuild(file: &Rc<dyn Storage>, header: &mut Header, plan: &Plan) -> Result<()> {
    let (cluster, per_block) = (header.cluster_size(), header.refcounts_per_block());
    // First, which blocks are needed at all.
    let mut blocks: BTreeSet<u64> = BTreeSet::new();
    let mut counter = clusters(header);
    // The new structure lies behind all that is in use, the old one too, and counts itself.
    let mut first = Stored::read(file, header).await?.end();
    loop {
        count(file, header, plan, &mut counter).await?;
        let mut next = 0;
        first = first.max(counter.last().map_or(0, |last| last + 1));
        while let Some((number, _)) = counter.used_from(next).next() {
            blocks.insert(number / per_block);
            next = (number / per_block + 1) * per_block;
        }
        if !counter.advance() {
            break;
        }
    }
    let mut table_clusters = 1;
    let all = loop {
        let mut all = blocks.clone();
        let mut before = None;
        while before != Some(all.len()) {
            before = Some(all.len());
            let end = first + table_clusters + all.len() as u64;
            all.extend(first / per_block..=(end - 1) / per_block);
        }
        let needed = all.last().map_or(1, |last| ((last + 1) * 8).div_ceil(cluster));
        if needed <= table_clusters {
            break all;
        }
        table_clusters = needed;
    };
    if table_clusters * cluster > REFCOUNT_TABLE_MAX {
        return Err(Error::new(Errno::EFBIG, "count the clusters of an image in a refcount table of 8 MiB"));
    }
    let own = first..first + table_clusters + all.len() as u64;
    bytes::extend(file, bytes::end(own.start * cluster, (own.end - own.start) * cluster)?).await?;

    let mut table = vec![0_u8; (table_clusters * cluster) as usize];
    for (order, number) in all.iter().enumerate() {
        let at = (first + table_clusters + order as u64) * cluster;
        let word = *number as usize * 8;
        if let Some(entry) = table.get_mut(word..word + 8) {
            entry.copy_from_slice(&at.to_be_bytes());
        }
    }
    bytes::write(file, first * cluster, &table).await?;
    // Then the blocks; a window ends with one.
    let mut counter = clusters(header);
    loop {
        count(file, header, plan, &mut counter).await?;
        for number in own.clone() {
            counter.add(number, 1);
        }
        let window = counter.window();
        for (order, number) in
            all.iter().enumerate().filter(|(_, number)| window.contains(&(**number * per_block)))
        {
            let mut block = vec![0; cluster as usize];
            let of_block = number * per_block..(number + 1) * per_block;
            let used = counter.used_from(of_block.start).take_while(|(number, _)| of_block.contains(number));
            for (number, references) in used {
                let references = references.min(header.refcount_max());
                counts::set(&mut block, header.refcount_order, (number % per_block) as usize, references);
            }
            bytes::write(file, (first + table_clusters + order as u64) * cluster, &block).await?;
        }
        if !counter.advance() {
            break;
        }
    }
    file.flush().await?;
    header.refcount_table_at = first * cluster;
    header.refcount_table_clusters = table_clusters as u32;
    header
        .write_fields(file)
        .await
        .map_err(|error| Error::new(error.errno(), format!("switch to new counts: {error}")))?;
    file.flush().await
}

async fn count(file: &Rc<dyn Storage>, header: &Header, plan: &Plan, counter: &mut Counter) -> Result<()> {
    let mut scratch = Report::default();
    let mut walk = Walk::new(file, header, &mut scratch, plan);
    walk.references(counter, Entries::Known, None).await
}
