//! What a check finds, and what is left after a repair.

use image::qcow::{Create, check};
use image::{Repair, Report};
use storage::Storage;

use crate::tools::{bytes_of, disk, fill, made, ram, read, run};

/// An image with clusters 0, 1 and 600 of its disk: an L2 table at 4096, two clusters, another table, one cluster.
async fn image(handle: &runtime::Handle) -> Vec<u8> {
    let file = made(Create { size: 4 << 20, ..Create::default() }).await;
    let disk = disk(handle, &file).await;
    for cluster in [0, 1, 600] {
        fill(&disk, cluster * 4096, 4096, 1 + cluster as u8).await.unwrap();
    }
    disk.close().await.unwrap();
    let bytes = bytes_of(&*file).await;
    assert_eq!(bytes.len(), 6 * 4096);
    bytes
}

fn set(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

async fn checked(file: &std::rc::Rc<dyn Storage>, repair: Repair) -> Report {
    check(file, repair).await.unwrap()
}

#[test]
fn a_sound_image_is_counted_and_left_alone() {
    run(async |handle| {
        let bytes = image(&handle).await;
        let file = ram(&bytes).await;
        let report = checked(&file, Repair::All).await;
        assert!(report.is_clean() && report.notes.is_empty());
        assert_eq!((report.total_clusters, report.allocated_clusters), (1024, 3));
        assert_eq!((report.fragmented_clusters, report.image_end_offset), (1, 6 * 4096));
        assert!(bytes_of(&*file).await == bytes);
    });
}

#[test]
fn entries_that_make_no_sense_are_found_and_dropped_by_a_repair() {
    let packed = |at: u64, len: u64| 1 << 63 | len << 51 | at;
    // Byte of the word, what is put there, a word of the finding, and whether cluster 0 is still there afterwards.
    let cases = [
        (48, 4096 + 512, "multiple of a cluster", false),
        (48, 1 << 40, "beyond the end", false),
        (48, u64::MAX, "beyond the end", false),
        (48, 8, "multiple of a cluster", false),
        (56, 4096, "overlaps", true),
        (4096 + 8, 9000, "multiple of a cluster", true),
        (4096 + 8, 6 * 4096, "beyond the end", true),
        (4096 + 8, 2 * 4096, "something else", true),
        (4096 + 8, 4096, "something else", true),
        (4096 + 16, 2 * 4096, "something else", true),
        (4096 + 16, packed(2 * 4096 + 100, 50), "something else", true),
        (4096 + 16, packed(6 * 4096, 50), "beyond the end", true),
        (4096 + 16, packed(20, 50), "header", true),
        (4096 + 16, packed(5 * 4096, 0), "no bytes", true),
    ];
    for (at, word, finding, first_stays) in cases {
        run(async move |handle| {
            let mut bytes = image(&handle).await;
            set(&mut bytes, at, word);
            let file = ram(&bytes).await;
            for repair in [Repair::No, Repair::Leaks] {
                let report = checked(&file, repair).await;
                assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0), "{report:?}");
                assert!(report.notes[0].contains(finding), "{report:?}");
                assert!(bytes_of(&*file).await == bytes, "nothing is given back where the map is wrong");
            }
            let report = checked(&file, Repair::All).await;
            assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{report:?}");
            let repaired = bytes_of(&*file).await;
            assert_eq!(checked(&file, Repair::All).await.corruptions_fixed, 0);
            assert!(bytes_of(&*file).await == repaired, "a second repair changes nothing");
            assert!(checked(&file, Repair::No).await.is_clean());
            let disk = disk(&handle, &file).await;
            let first = read(&disk, 0, 4096).await.unwrap();
            assert_eq!(first, [u8::from(first_stays); 4096]);
            // What was dropped can be written again.
            fill(&disk, 4096, 9000, 9).await.unwrap();
            assert_eq!(read(&disk, 4096, 9000).await.unwrap(), [9; 9000]);
            drop(disk);
        });
    }
}

#[test]
fn what_nothing_leads_to_is_a_leak_where_something_is() {
    run(async |handle| {
        let mut bytes = image(&handle).await;
        // Cluster 0 is forgotten; its place has data.
        set(&mut bytes, 4096, 0);
        // Behind the end as well, and some that is empty.
        bytes.resize(9 * 4096, 0);
        bytes[7 * 4096 + 17] = 3;
        let file = ram(&bytes).await;
        let report = checked(&file, Repair::No).await;
        assert_eq!((report.leaks, report.corruptions), (2, 0), "{report:?}");
        assert!(report.is_safe() && !report.is_clean());
        assert!(bytes_of(&*file).await == bytes);
        let report = checked(&file, Repair::Leaks).await;
        assert_eq!((report.leaks, report.leaks_fixed), (0, 2), "{report:?}");
        assert_eq!(file.size(), 6 * 4096, "what is at the end is cut off");
        assert!(checked(&file, Repair::No).await.is_clean());
        assert_eq!(bytes_of(&*file).await[8192..12288], [0; 4096]);
        let disk = disk(&handle, &file).await;
        assert_eq!(read(&disk, 4096, 4096).await.unwrap(), [2; 4096]);
    });
}

#[test]
fn a_table_that_cannot_be_read_is_told_and_nothing_is_repaired() {
    run(async |handle| {
        let mut bytes = image(&handle).await;
        bytes.extend([7; 4096]);
        let file = ram(&bytes).await;
        let rule = "read:EIO:4096..8192".parse().unwrap();
        let faulty = storage::filter::inject(&handle, file.clone(), vec![rule]);
        let report = checked(&faulty, Repair::All).await;
        assert_eq!((report.check_errors, report.leaks_fixed), (1, 0));
        assert!(bytes_of(&*file).await == bytes);
    });
}
