//! Larger disks.

use std::rc::Rc;

use block::{Buf, Errno};
use image::Repair;
use image::qcow::{Create, Header, check};
use storage::{Storage, filter};

use crate::tools::{bytes_of, disk, disk_over, fill, made, pattern, qemu_reads, ram, run, scratch};

#[test]
fn a_disk_grows_within_its_table_and_beyond_it() {
    for cluster in [512, 4096, 65536] {
        run(async move |handle| {
            let folder = scratch();
            let mut size = 100_352;
            let file = made(Create { size, cluster_size: Some(cluster), ..Create::default() }).await;
            let mut model = pattern(size as usize, 3);
            let disk = disk(&handle, &file).await;
            disk.write(0, Buf::from_bytes(&model)).await.unwrap();
            for larger in [100_864, 101_000, 3_000_000, 40_000_000] {
                disk.resize(larger).await.unwrap();
                size = larger.next_multiple_of(512);
                assert_eq!(disk.size(), size);
                model.resize(size as usize, 0);
                assert!(bytes_of(&disk).await == model);
                let end = pattern(5000, larger);
                disk.write(size - 5000, Buf::from_bytes(&end)).await.unwrap();
                model[size as usize - 5000..].copy_from_slice(&end);
            }
            disk.close().await.unwrap();
            drop(disk);
            assert_eq!(Header::read(&file).await.unwrap().size(), size);
            let report = check(&file, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            assert!(bytes_of(&crate::tools::disk(&handle, &file).await).await == model);
            let path = folder.path().join("image");
            std::fs::write(&path, bytes_of(&*file).await).unwrap();
            assert!(qemu_reads(&path, "qcow") == model);
        });
    }
}

#[test]
fn what_the_image_had_beyond_the_end_does_not_show() {
    run(async |handle| {
        let file = made(Create { size: 100_352, ..Create::default() }).await;
        let first = disk(&handle, &file).await;
        fill(&first, 90_000, 10_352, 7).await.unwrap();
        first.close().await.unwrap();
        drop(first);
        let mut bytes = bytes_of(&*file).await;
        // The rest of the last cluster, and an entry behind it.
        let len = bytes.len();
        let last_place = len - 4096;
        bytes[last_place + 100_352 % 4096..].fill(0xee);
        bytes[4096 + 30 * 8..][..8].copy_from_slice(&(last_place as u64 - 4096).to_be_bytes());
        let file = ram(&bytes).await;
        let disk = disk(&handle, &file).await;
        disk.resize(200_704).await.unwrap();
        let mut expected = vec![0; 200_704];
        expected[90_000..100_352].fill(7);
        assert!(bytes_of(&disk).await == expected);
        disk.close().await.unwrap();
    });
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    run(async |handle| {
        let file = made(Create { size: 1 << 20, ..Create::default() }).await;
        let alone = disk(&handle, &file).await;
        let smaller = alone.resize(1 << 19).await.unwrap_err();
        assert_eq!(smaller.errno(), Errno::EOPNOTSUPP);
        assert!(smaller.to_string().contains("smaller"), "{smaller}");
        for huge in [u64::MAX, u64::MAX - 1024, 1 << 60] {
            assert_eq!(alone.resize(huge).await.unwrap_err().errno(), Errno::EFBIG);
        }
        alone.resize(1 << 20).await.unwrap();
        assert_eq!(alone.size(), 1 << 20);
        let backing = Some("base".to_owned());
        let file = made(Create { size: 1 << 20, backing, cluster_size: None }).await;
        // Whether it is longer or not.
        for (below, words) in [(1 << 20, "backing file"), (2 << 20, "over an image of 2097152")] {
            let over = disk_over(&handle, &file, Some(&vec![7; below])).await;
            let larger = over.resize(2 << 20).await.unwrap_err();
            assert_eq!(larger.errno(), Errno::EOPNOTSUPP);
            assert!(larger.to_string().contains(words), "{larger}");
        }
    });
}

/// Wherever a write, a sync or a change of the file's size fails, the image has one of the two sizes and all its bytes.
#[test]
fn an_error_anywhere_leaves_one_of_the_two_sizes() {
    run(async |handle| {
        for kind in ["write", "flush", "read", "zero"] {
            for nth in 1..8 {
                let file = made(Create { size: 3 << 20, ..Create::default() }).await;
                let first = disk(&handle, &file).await;
                let mut model = pattern(3 << 20, 3);
                first.write(0, Buf::from_bytes(&model)).await.unwrap();
                first.close().await.unwrap();
                drop(first);
                let rule = format!("{kind}:EIO:nth={nth}").parse().unwrap();
                let faulty: Rc<dyn Storage> = filter::inject(&handle, file.clone(), vec![rule]);
                let settings = image::Settings { writable: true, ..image::Settings::default() };
                if let Ok(image) = crate::tools::open(&handle, &faulty, settings).await {
                    let chain = image::Chain::new(&handle, Rc::new(image));
                    let resized = chain.resize(900 << 20).await;
                    let size = Header::read(&file).await.unwrap().size();
                    if resized.is_ok() {
                        assert_eq!(size, 900 << 20);
                    }
                }
                let report = check(&file, Repair::No).await.unwrap();
                assert!(report.is_safe(), "{kind} {nth}: {report:?}");
                let disk = disk(&handle, &file).await;
                assert!([3 << 20, 900 << 20].contains(&disk.size()));
                let there = crate::tools::read(&disk, 0, 3 << 20).await.unwrap();
                assert!(there == model, "{kind} {nth}");
                model.clear();
            }
        }
    });
}
