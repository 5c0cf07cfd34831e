//! Files that were cut off: what is lost stays lost, and is told.

use std::rc::Rc;

use block::{Buf, Errno};
use image::qcow::{Create, check};
use image::{Chain, Repair};
use storage::Storage;
use storage::conformance::Random;

use crate::tools::{bytes_of, disk, fill, made, qemu, ram, read, run, scratch, text};

const SIZE: u64 = 4 << 20;

/// An image whose clusters lie in no order, three of four of its disk, with that disk's bytes.
async fn image(handle: &runtime::Handle, cluster: u32) -> (Vec<u8>, Vec<u8>) {
    let file = made(Create { size: SIZE, cluster_size: Some(cluster), ..Create::default() }).await;
    let disk = disk(handle, &file).await;
    let cluster = u64::from(cluster);
    let mut order: Vec<u64> = (0..SIZE / cluster).filter(|number| number % 4 != 3).collect();
    let mut random = Random(cluster);
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    for number in order {
        fill(&disk, number * cluster, cluster as usize, 1 + (number % 255) as u8).await.unwrap();
    }
    disk.close().await.unwrap();
    let bytes = bytes_of(&disk).await;
    drop(disk);
    (bytes_of(&*file).await, bytes)
}

/// Which clusters can be read, all of which have the disk's bytes.
async fn readable(disk: &Chain, cluster: u64, expected: &[u8], context: &str) -> Vec<bool> {
    let mut all = Vec::new();
    for at in (0..SIZE).step_by(cluster as usize) {
        match read(disk, at, cluster as usize).await {
            Ok(bytes) => {
                assert!(
                    bytes == expected[at as usize..][..cluster as usize],
                    "{context}: byte {at} is wrong"
                );
                all.push(true);
            }
            Err(error) => {
                assert_eq!(error.errno(), Errno::EIO, "{context}, byte {at}: {error}");
                all.push(false);
            }
        }
    }
    all
}

#[test]
fn what_a_cut_has_lost_is_an_error_whatever_is_written_afterwards() {
    for cluster in [512, 4096, 65536] {
        run(async move |handle| {
            let (whole, shown) = image(&handle, cluster).await;
            let cluster = u64::from(cluster);
            let mut random = Random(7);
            for _ in 0..6 {
                // Somewhere behind the L1 table.
                let first = 16384_u64.div_ceil(cluster);
                let clusters = whole.len() as u64 / cluster;
                let len = (first + random.below(clusters - first)) * cluster;
                let context = format!("clusters of {cluster}, {len} bytes of {}", whole.len());
                let file = ram(&whole[..len as usize]).await;
                let first = disk(&handle, &file).await;
                let mut model = shown.clone();
                let left = readable(&first, cluster, &model, &context).await;
                assert!(left.contains(&false), "{context}: nothing is lost");
                for (number, is_there) in left.iter().enumerate() {
                    let at = number * cluster as usize;
                    let is_new = model[at] == 0;
                    let result = fill(&first, at as u64, cluster as usize, 0xee).await;
                    if *is_there && !is_new {
                        result.unwrap();
                        model[at..at + cluster as usize].fill(0xee);
                    } else {
                        let error = result.unwrap_err();
                        assert_eq!(error.errno(), Errno::EIO, "{context}, byte {at}: {error}");
                    }
                }
                assert_eq!(first.resize(64 << 30).await.unwrap_err().errno(), Errno::EIO, "{context}");
                assert!(file.size() <= len, "{context}: the file was made longer");
                assert!(readable(&first, cluster, &model, &context).await == left, "{context}");
                // For whoever comes next, too: after the end of the first one, and after its death.
                first.flush().await.unwrap();
                let killed = ram(&bytes_of(&*file).await).await;
                first.close().await.unwrap();
                drop(first);
                for file in [file, killed] {
                    let second = disk(&handle, &file).await;
                    assert!(readable(&second, cluster, &model, &context).await == left, "{context}");
                    let missing = shown.iter().position(|byte| *byte == 0).unwrap() as u64;
                    assert!(fill(&second, missing, 512, 1).await.is_err(), "{context}");
                    drop(second);
                    repaired(&handle, &file, &context).await;
                }
            }
        });
    }
}

/// Puts the image right, after which all of the disk can be read and written.
async fn repaired(handle: &runtime::Handle, file: &Rc<dyn Storage>, context: &str) {
    let report = check(file, Repair::All).await.unwrap();
    assert!(report.corruptions_fixed > 0 && report.is_clean(), "{context}: {report:?}");
    let disk = disk(handle, file).await;
    disk.write(0, Buf::from_bytes(&vec![9; SIZE as usize])).await.unwrap();
    disk.close().await.unwrap();
    assert!(bytes_of(&disk).await == vec![9; SIZE as usize], "{context}");
    assert!(check(file, Repair::No).await.unwrap().is_clean(), "{context}");
}

#[test]
fn a_compressed_cluster_without_its_end_is_lost() {
    let folder = scratch();
    let path = folder.path().join("image");
    qemu("qemu-img", &["create", "-q", "-f", "qcow", text(&path), "1M"]);
    qemu("qemu-io", &["-f", "qcow", "-c", "write -q -P 4 0 4k", "-c", "write -q -c -P 5 8k 4k", text(&path)]);
    let whole = std::fs::read(&path).unwrap();
    let packed = whole.len() % 4096;
    assert!((2..200).contains(&packed), "{packed} bytes for 4096 of one value");
    for left in [packed, packed - 1, packed / 2, 1, 0] {
        let bytes = whole[..whole.len() - packed + left].to_vec();
        run(async move |handle| {
            let disk = disk(&handle, &ram(&bytes).await).await;
            assert!(read(&disk, 0, 4096).await.unwrap() == [4; 4096]);
            let is_whole = left == packed;
            assert_eq!(fill(&disk, 65536, 4096, 6).await.is_ok(), is_whole, "{left} of {packed} bytes");
            match read(&disk, 8192, 4096).await {
                Ok(bytes) => assert!(is_whole && bytes == [5; 4096], "{left} of {packed} bytes"),
                Err(error) => assert!(!is_whole && error.errno() == Errno::EIO, "{left}: {error}"),
            }
        });
    }
}

#[test]
fn an_image_that_lost_nothing_with_its_end_is_added_to() {
    run(async |handle| {
        let (mut bytes, _) = image(&handle, 4096).await;
        let len = bytes.len();
        bytes.resize(len + 100_000, 7);
        let file = ram(&bytes[..len + 5000]).await;
        let disk = disk(&handle, &file).await;
        fill(&disk, 3 * 4096, 4096, 9).await.unwrap();
        assert!(read(&disk, 3 * 4096, 4096).await.unwrap() == [9; 4096]);
    });
}

#[test]
fn an_l1_table_that_leads_to_more_tables_than_there_can_be_is_not_followed() {
    run(async |handle| {
        let file = made(Create { size: 1 << 40, ..Create::default() }).await;
        let first = disk(&handle, &file).await;
        fill(&first, 0, 4096, 1).await.unwrap();
        first.close().await.unwrap();
        drop(first);
        let mut bytes = bytes_of(&*file).await;
        let entry: [u8; 8] = bytes[48..56].try_into().unwrap();
        for place in bytes[56..48 + (1 << 20)].chunks_exact_mut(8) {
            place.copy_from_slice(&entry);
        }
        let file = ram(&bytes).await;
        let disk = disk(&handle, &file).await;
        let error = fill(&disk, 4096, 4096, 1).await.unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
        assert_eq!(bytes_of(&*file).await.len(), bytes.len());
    });
}
