//! Random operations, against plain bytes and with the image opened anew in between.

use block::{Buf, Span};
use image::qcow::{Create, check};
use image::{Chain, Repair};
use storage::conformance::Random;
use storage::{Storage, Zeroing, conformance};

use crate::tools::{bytes_of, disk_over, made, pattern, qemu_reads, read, run, scratch};

/// Sizes of clusters; sizes of disks, which end within a cluster and more than one L2 table; bytes below.
const KINDS: [(u32, u64, usize); 6] = [
    (512, 3_000_320, 2_000_001),
    (512, 70_144, 0),
    (4096, 3_000_320, 0),
    (4096, 300_032, 500_000),
    (1024, 1_000_448, 999_999),
    (65536, 3_000_320, 70_000),
];

fn options(cluster: u32, size: u64, below: usize) -> Create {
    let backing = (below > 0).then(|| "base".to_owned());
    Create { size, backing, cluster_size: Some(cluster) }
}

#[test]
fn a_disk_behaves_like_an_array_of_bytes() {
    for (nth, (cluster, size, below)) in KINDS.into_iter().enumerate() {
        run(async move |handle| {
            let file = made(options(cluster, size, below)).await;
            let below = (below > 0).then(|| pattern(below, 7));
            let disk = disk_over(&handle, &file, below.as_deref()).await;
            conformance::check(&disk, nth as u64, 400).await;
            disk.close().await.unwrap();
            let report = check(&file, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
        });
    }
}

async fn step(disk: &Chain, model: &mut [u8], random: &mut Random) {
    let span = random.span(model.len() as u64, 100_000);
    let range = span.at() as usize..span.end() as usize;
    match random.below(4) {
        0 => {
            let how = Zeroing { unmap: random.below(2) == 0, fast: false };
            disk.zero(span, how).await.unwrap();
            model[range].fill(0);
        }
        1 => assert!(read(disk, span.at(), span.len() as usize).await.unwrap() == model[range]),
        _ => {
            // Zeroes too: they are bytes as any others.
            let bytes =
                if random.below(4) == 0 { vec![0; range.len()] } else { pattern(range.len(), random.draw()) };
            disk.write(span.at(), Buf::from_bytes(&bytes)).await.unwrap();
            model[range].copy_from_slice(&bytes);
        }
    }
}

#[test]
fn what_was_written_is_there_when_the_image_is_opened_anew_and_qemu_reads_the_same() {
    for (nth, (cluster, size, below)) in KINDS.into_iter().enumerate() {
        run(async move |handle| {
            let folder = scratch();
            let file = made(options(cluster, size, below)).await;
            let below = (below > 0).then(|| pattern(below, 8));
            let mut model = vec![0; size as usize];
            if let Some(bytes) = &below {
                let len = bytes.len().min(model.len());
                model[..len].copy_from_slice(&bytes[..len]);
                std::fs::write(folder.path().join("base"), bytes).unwrap();
            }
            let mut random = Random(nth as u64);
            for round in 0..6 {
                let disk = disk_over(&handle, &file, below.as_deref()).await;
                for _ in 0..12 {
                    step(&disk, &mut model, &mut random).await;
                }
                // In order, or left as by a death of the process after a flush.
                if round % 2 == 0 {
                    disk.close().await.unwrap()
                } else {
                    disk.flush().await.unwrap()
                }
                drop(disk);
                let report = check(&file, Repair::No).await.unwrap();
                assert!(report.is_clean(), "{report:?}");
                let disk = disk_over(&handle, &file, below.as_deref()).await;
                assert!(bytes_of(&disk).await == model, "clusters of {cluster}, round {round}");
            }
            let path = folder.path().join("image");
            std::fs::write(&path, bytes_of(&*file).await).unwrap();
            assert!(qemu_reads(&path, "qcow") == model, "clusters of {cluster}");
        });
    }
}

#[test]
fn operations_side_by_side_on_the_same_clusters_leave_one_of_their_results() {
    for (cluster, size, below) in KINDS {
        run(async move |handle| {
            let file = made(options(cluster, size, below)).await;
            let below = (below > 0).then(|| pattern(below, 9));
            let disk = disk_over(&handle, &file, below.as_deref()).await;
            let mut random = Random(u64::from(cluster));
            for _ in 0..10 {
                let before = bytes_of(&disk).await;
                let writes: Vec<(Span, u8)> =
                    (1..=20).map(|byte| (random.span(70_000, 9000), byte)).collect();
                let all = writes.iter().map(|(span, byte)| {
                    let buf = Buf::from_bytes(&vec![*byte; span.len() as usize]);
                    disk.write(span.at(), buf)
                });
                for result in runtime::join_all(all.collect()).await {
                    result.unwrap();
                }
                let after = bytes_of(&disk).await;
                const WRITTEN: usize = 80_000;
                assert!(after.get(WRITTEN..) == before.get(WRITTEN..));
                for (at, byte) in after.iter().enumerate().take(WRITTEN) {
                    let at_byte = |span: &Span| (span.at()..span.end()).contains(&(at as u64));
                    let mut of_writes = writes.iter().filter(|(span, _)| at_byte(span)).peekable();
                    let is_expected = match of_writes.peek() {
                        None => *byte == before[at],
                        Some(_) => of_writes.any(|(_, written)| written == byte),
                    };
                    assert!(is_expected, "byte {at} is {byte}");
                }
            }
            disk.close().await.unwrap();
            let report = check(&file, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
        });
    }
}
