//! Entries of a disk whose bytes are in a data file: there each cluster has the place that it has on the disk, and no other
//! (specification, "External data file").

use std::rc::Rc;

use block::Result;
use storage::Storage;

use super::super::bytes;
use super::super::header::Header;
use super::super::offline::read_table;
use super::entry::{Judge, PLACE, Target};
use super::walk::l2_entries;
use crate::Report;

/// Entries that say another place; how many. `fix`: and lets them say the right one. Without a data file there is none.
///
/// # Errors
/// The storage's.
pub(super) async fn misplaced(
    file: &Rc<dyn Storage>,
    header: &Header,
    report: &mut Report,
    fix: bool,
) -> Result<u64> {
    if !header.has_data_file() {
        return Ok(0);
    }
    let judge = Judge::new(header, file.size());
    let mut wrong = 0;
    let l1 = match read_table(file, header.l1_at, header.l1_entries.into()).await {
        Ok(l1) => l1,
        // Whoever counts what it refers to has said so.
        Err(_unreadable) => return Ok(0),
    };
    for (index, word) in (0..).zip(l1) {
        let Ok(Some(table)) = judge.l1(word) else { continue };
        let all = match bytes::read(file, table, header.cluster_size() as usize).await {
            Ok(all) => all,
            // Whoever counts what it refers to has said so.
            Err(_unreadable) => continue,
        };
        for (place, words) in l2_entries(&all, table, header) {
            let Ok(Target::Cluster { at }) = judge.l2(words) else { continue };
            let cluster = index * header.l2_entries() + (place - table) / header.l2_entry_size();
            let should = cluster.saturating_mul(header.cluster_size());
            if at == should {
                continue;
            }
            wrong += 1;
            report.note(|| {
                format!(
                    "the L2 entry {:#x} at {place} points to byte {at} of the data file, not {should}",
                    words[0]
                )
            });
            // Where no entry can point there is nothing of the disk.
            let word = if should & !PLACE == 0 { words[0] & !PLACE | should } else { 0 };
            if fix {
                bytes::write(file, place, &word.to_be_bytes()).await?;
            }
        }
    }
    if fix && wrong > 0 {
        file.flush().await?;
    }
    Ok(wrong)
}
