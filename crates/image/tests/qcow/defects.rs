//! The defects of blktap's qcow of 2006, and of its successors, each with a test that would find it here.

use std::rc::Rc;

use block::Errno;
use image::qcow::{Create, check};
use image::{Chain, Repair, Settings};
use runtime::Handle;
use storage::{Storage, filter};

use crate::tools::{bytes_of, disk, disk_over, fill, made, open, pattern, ram, read, run};

async fn failing(handle: &Handle, file: &Rc<dyn Storage>, rule: &str, lasting: bool) -> Chain {
    let file = filter::inject(handle, file.clone(), vec![rule.parse().unwrap()]);
    let settings = Settings { writable: true, lasting, ..Settings::default() };
    Chain::new(handle, Rc::new(open(handle, &file, settings).await.unwrap()))
}

fn plain(size: u64) -> Create {
    Create { size, ..Create::default() }
}

/// The L2 table is at 4096, the clusters follow it in the order in which they were written.
const TABLE: u64 = 4096;

#[test]
fn an_error_of_any_cluster_is_the_requests_error() {
    run(async |handle| {
        let file = made(plain(1 << 20)).await;
        let first = disk(&handle, &file).await;
        // Backwards, so that a request over them is split.
        for cluster in (0..4).rev() {
            fill(&first, cluster * 4096, 4096, 1).await.unwrap();
        }
        first.close().await.unwrap();
        drop(first);
        for cluster in 0..4 {
            let at = TABLE + 4096 + cluster * 4096;
            for kind in ["read", "write"] {
                let disk = failing(&handle, &file, &format!("{kind}:EIO:{at}..{}", at + 4096), false).await;
                let failed = match kind {
                    "read" => read(&disk, 0, 4 * 4096).await.map(drop),
                    _ => fill(&disk, 0, 4 * 4096, 2).await,
                };
                assert_eq!(failed.unwrap_err().errno(), Errno::EIO, "{kind} of the cluster at {at}");
            }
        }
    });
}

#[test]
fn a_map_that_cannot_be_written_is_an_error_of_the_request_that_needs_it() {
    run(async |handle| {
        // Opened so that each answer's map must be in the image: the write itself is told.
        let file = made(plain(1 << 20)).await;
        fill(&disk(&handle, &file).await, 0, 10, 1).await.unwrap();
        let file = made(plain(1 << 20)).await;
        let first = disk(&handle, &file).await;
        fill(&first, 0, 10, 1).await.unwrap();
        first.close().await.unwrap();
        drop(first);
        let rule = format!("write:EIO:{TABLE}..{}", TABLE + 4096);
        let lasting = failing(&handle, &file, &rule, true).await;
        assert_eq!(fill(&lasting, 4096, 10, 2).await.unwrap_err().errno(), Errno::EIO);
        // Otherwise the flush is, and every one that follows as long as it is so.
        let other = failing(&handle, &file, &rule, false).await;
        fill(&other, 4096, 10, 2).await.unwrap();
        for _ in 0..3 {
            assert_eq!(other.flush().await.unwrap_err().errno(), Errno::EIO);
        }
        // The image has the old map.
        let mut expected = vec![0; 1 << 20];
        expected[..10].fill(1);
        assert!(bytes_of(&disk(&handle, &file).await).await == expected);
        assert!(check(&file, Repair::No).await.unwrap().is_safe());
    });
}

#[test]
fn a_map_that_could_be_written_the_second_time_loses_nothing() {
    run(async |handle| {
        let file = made(plain(1 << 20)).await;
        let rule = format!("write:ENOSPC:{TABLE}..{}:nth=2", TABLE + 4096);
        let disk = failing(&handle, &file, &rule, false).await;
        fill(&disk, 0, 10, 1).await.unwrap();
        assert_eq!(disk.flush().await.unwrap_err().errno(), Errno::ENOSPC);
        disk.flush().await.unwrap();
        drop(disk);
        let again = crate::tools::disk(&handle, &file).await;
        assert_eq!(read(&again, 0, 10).await.unwrap(), [1; 10]);
    });
}

#[test]
fn a_map_that_cannot_be_read_is_an_error_and_neither_zero_nor_what_is_below() {
    run(async |handle| {
        let below = pattern(1 << 20, 1);
        for backing in [None, Some("base".to_owned())] {
            let below = backing.is_some().then_some(&below[..]);
            let file = made(Create { size: 1 << 20, backing, cluster_size: Some(4096) }).await;
            let first = disk_over(&handle, &file, below).await;
            fill(&first, 0, 10, 1).await.unwrap();
            first.close().await.unwrap();
            drop(first);
            for bytes in ["0..4096".to_owned(), format!("{TABLE}..{}", TABLE + 4096)] {
                let rule = format!("read:EIO:{bytes}:nth=2").parse().unwrap();
                let always = format!("read:EIO:{bytes}").parse().unwrap();
                let rule = if bytes.starts_with('0') { rule } else { always };
                let faulty = filter::inject(&handle, file.clone(), vec![rule]);
                let settings = Settings { writable: true, ..Settings::default() };
                // The header is in the first bytes too: the first read is its.
                let Ok(image) = open(&handle, &faulty, settings).await else { continue };
                let raw = Rc::new(image::Raw::new(ram(below.unwrap_or_default()).await));
                let chain = Chain::over(&handle, Rc::new(image), vec![raw]);
                assert_eq!(read(&chain, 0, 10).await.unwrap_err().errno(), Errno::EIO, "{bytes}");
            }
        }
    });
}

#[test]
fn zeroes_over_a_backing_file_are_written_and_not_dropped() {
    run(async |handle| {
        let below = pattern(1 << 20, 1);
        for (at, len) in [(0, 512), (513, 4096), (100_000, 70_000), ((1 << 20) - 512, 512)] {
            for by_zero in [false, true] {
                let backing = Some("base".to_owned());
                let file = made(Create { size: 1 << 20, backing, cluster_size: None }).await;
                let disk = disk_over(&handle, &file, Some(&below)).await;
                if by_zero {
                    let how = storage::Zeroing { unmap: true, fast: false };
                    disk.zero(block::Span::new(at, len as u64).unwrap(), how).await.unwrap();
                } else {
                    fill(&disk, at, len, 0).await.unwrap();
                }
                let mut expected = below.clone();
                expected[at as usize..at as usize + len].fill(0);
                assert!(bytes_of(&disk).await == expected);
                disk.close().await.unwrap();
                drop(disk);
                assert!(bytes_of(&disk_over(&handle, &file, Some(&below)).await).await == expected);
            }
        }
    });
}

/// blktap took the last entry of the L1 table for the end of the file, and gave places twice.
#[test]
fn new_clusters_go_behind_the_end_of_the_file_in_whatever_order_tables_were_made() {
    run(async |handle| {
        let size = 10 << 20;
        let file = made(plain(size)).await;
        let mut model = vec![0; size as usize];
        // An L2 table is of 2 MiB: from the last one down.
        for turn in (0..5_u64).rev() {
            let disk = disk(&handle, &file).await;
            for at in [turn << 21, (turn << 21) + 500_000] {
                let bytes = pattern(9000, at);
                disk.write(at, block::Buf::from_bytes(&bytes)).await.unwrap();
                model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            }
            // As by a death of the process: what the file was made longer by is not cut off.
            disk.flush().await.unwrap();
            drop(disk);
            assert!(bytes_of(&crate::tools::disk(&handle, &file).await).await == model);
            assert!(check(&file, Repair::No).await.unwrap().is_clean());
        }
    });
}

#[test]
fn an_image_that_was_opened_to_be_read_is_not_changed() {
    run(async |handle| {
        let file = made(plain(1 << 20)).await;
        fill(&disk(&handle, &file).await, 0, 10, 1).await.unwrap();
        let before = bytes_of(&*file).await;
        let image = open(&handle, &file, Settings::default()).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        assert!(disk.limits().read_only);
        let how = storage::Zeroing { unmap: true, fast: false };
        let span = block::Span::new(0, 10).unwrap();
        for result in [
            fill(&disk, 0, 10, 2).await,
            fill(&disk, 500_000, 10, 2).await,
            disk.zero(span, how).await,
            disk.discard(span).await,
            disk.resize(2 << 20).await,
        ] {
            assert_eq!(result.unwrap_err().errno(), Errno::EROFS);
        }
        disk.close().await.unwrap();
        assert!(bytes_of(&*file).await == before);
    });
}

#[test]
fn a_full_file_system_fails_the_request_and_the_next_one_succeeds_when_there_is_room() {
    run(async |handle| {
        for step in ["4096..8192", "8192..12288"] {
            let file = made(plain(1 << 20)).await;
            let disk = failing(&handle, &file, &format!("write:ENOSPC:{step}:times=1"), false).await;
            assert_eq!(fill(&disk, 0, 4096, 1).await.unwrap_err().errno(), Errno::ENOSPC, "{step}");
            assert!(bytes_of(&disk).await == vec![0; 1 << 20]);
            fill(&disk, 0, 4096, 1).await.unwrap();
            disk.close().await.unwrap();
            drop(disk);
            assert_eq!(read(&crate::tools::disk(&handle, &file).await, 0, 4096).await.unwrap(), [1; 4096]);
            let report = check(&file, Repair::No).await.unwrap();
            assert!(report.is_clean() && file.size() == 3 * 4096, "what was given back is used: {report:?}");
        }
    });
}
