//! Headers: those of `qemu-img` and blktap are understood, and what makes no sense is refused in words.

use image::qcow::{Create, Header, info, is};
use image::{ImageError, Settings};

use crate::tools::{bytes_of, made, open, qemu, ram, run, scratch, text};

fn set(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn what_qemu_img_makes_is_understood() {
    let folder = scratch();
    let (alone, over) = (folder.path().join("alone"), folder.path().join("over"));
    qemu("qemu-img", &["create", "-q", "-f", "qcow", text(&alone), "10M"]);
    qemu(
        "qemu-img",
        &["create", "-q", "-f", "qcow", "-u", "-b", "base.raw", "-F", "raw", text(&over), "77777"],
    );
    run(async move |_| {
        let bytes = std::fs::read(alone).unwrap();
        assert!(is(&bytes));
        let header = Header::read(&ram(&bytes).await).await.unwrap();
        assert_eq!((header.size(), header.cluster_size(), header.l2_entries()), (10 << 20, 4096, 512));
        assert_eq!((header.backing(), header.xen(), header.is_encrypted()), (None, None, false));
        let header = Header::read(&ram(&std::fs::read(over).unwrap()).await).await.unwrap();
        // qemu-img counts in whole sectors.
        assert_eq!((header.size(), header.cluster_size(), header.l2_entries()), (77824, 512, 4096));
        let backing = header.backing().unwrap();
        assert_eq!((backing.name.as_str(), backing.format), ("base.raw", None));
    });
}

#[test]
fn what_makes_no_sense_is_refused_with_what_was_found() {
    run(async |_| {
        let sound = bytes_of(&*made(Create { size: 1 << 20, ..Create::default() }).await).await;
        let big = u64::MAX.to_be_bytes();
        let cases: &[(usize, &[u8], &str)] = &[
            (0, b"QFX", "begins with"),
            (4, &[0, 0, 0, 2], "qcow2"),
            (4, &[0, 0, 0, 0], "version 0"),
            (24, &[0; 8], "a disk of 0 bytes"),
            (24, &511_u64.to_be_bytes(), "a disk of 511 bytes"),
            (24, &big, "larger than 2 GiB"),
            (24, &(1_u64 << 50).to_be_bytes(), "larger than 2 GiB"),
            (24, &(1_u64 << 32).to_be_bytes(), "not within"),
            (32, &[8], "2^8 bytes"),
            (32, &[17], "2^17 bytes"),
            (32, &[255], "2^255 bytes"),
            (33, &[5], "2^5 entries"),
            (33, &[14], "2^14 entries"),
            (36, &[0, 0, 0, 2], "encryption method 2"),
            (40, &[0; 8], "the L1 table"),
            (40, &40_u64.to_be_bytes(), "the L1 table"),
            (40, &49_u64.to_be_bytes(), "multiple of 8"),
            (40, &4096_u64.to_be_bytes(), "the L1 table"),
            (40, &big, "the L1 table"),
            (8, &[0, 0, 0, 0, 0, 0, 0, 47, 0, 0, 0, 4], "the name of the backing file"),
            (8, &[0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0, 4], "the name of the backing file"),
            (8, &[0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 4, 0], "1024 bytes"),
            (8, &[0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 9], "the name of the backing file"),
            (8, &[255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 9], "the name of the backing file"),
        ];
        for (at, value, words) in cases {
            let mut bytes = sound.clone();
            set(&mut bytes, *at, value);
            let error = Header::read(&ram(&bytes).await).await.unwrap_err();
            assert!(matches!(error, ImageError::Invalid(_)), "{error}");
            assert!(error.to_string().contains(words), "{error} without `{words}`");
        }
        for len in 0..56 {
            let error = Header::read(&ram(&sound[..len]).await).await.unwrap_err();
            assert!(matches!(error, ImageError::Invalid(_)), "{error}");
        }
    });
}

#[test]
fn an_encrypted_image_is_refused_by_name_before_anything_is_touched() {
    run(async |handle| {
        let mut bytes = bytes_of(&*made(Create { size: 1 << 20, ..Create::default() }).await).await;
        set(&mut bytes, 36, &[0, 0, 0, 1]);
        let file = ram(&bytes).await;
        let header = Header::read(&file).await.unwrap();
        assert!(header.is_encrypted());
        assert!(info(&header).contains(&("encrypted".to_owned(), true.into())));
        let settings = Settings { writable: true, ..Settings::default() };
        let Err(error) = open(&handle, &file, settings).await else { panic!("it was opened") };
        assert!(error.to_string().contains("AES"), "{error}");
        let error = image::qcow::check(&file, image::Repair::All).await.unwrap_err();
        assert!(error.to_string().contains("AES"), "{error}");
        assert_eq!(bytes_of(&*file).await, bytes);
    });
}

/// An image as blktap made it: 4 KiB clusters, the L1 table behind a page, its header behind QEMU's.
fn of_blktap(flags: u32, clusters_at_a_time: u32) -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    set(&mut bytes, 0, b"QFI\xfb\0\0\0\x01");
    set(&mut bytes, 24, &(4_u64 << 20).to_be_bytes());
    set(&mut bytes, 32, &[12, 9]);
    set(&mut bytes, 40, &4096_u64.to_be_bytes());
    set(&mut bytes, 48, b"XEN\xfb\x12\x34\x56\x78");
    set(&mut bytes, 56, &clusters_at_a_time.to_be_bytes());
    set(&mut bytes, 60, &flags.to_be_bytes());
    bytes
}

#[test]
fn blktaps_own_header_is_recognised_and_told() {
    run(async |_| {
        let header = Header::read(&ram(&of_blktap(3, 512)).await).await.unwrap();
        let xen = header.xen().unwrap();
        assert_eq!((xen.checksum, xen.clusters_at_a_time), (0x1234_5678, 512));
        assert!(xen.sparse && xen.big_endian);
        let (_, told) = info(&header).pop().unwrap();
        assert_eq!((&told["l1-endianness"], &told["clusters-at-a-time"]), (&"big".into(), &512.into()));
        assert!(!Header::read(&ram(&of_blktap(0, 1)).await).await.unwrap().xen().unwrap().big_endian);
        // Elsewhere blktap itself takes the same bytes for something else.
        let mut bytes = of_blktap(3, 512);
        set(&mut bytes, 40, &4104_u64.to_be_bytes());
        assert_eq!(Header::read(&ram(&bytes).await).await.unwrap().xen(), None);
    });
}

#[test]
fn the_little_endian_table_of_blktaps_first_images_is_read_and_kept() {
    run(async |handle| {
        for flags in [0, 2] {
            let mut bytes = of_blktap(flags, 512);
            // As blktap laid out an extent: the table, and then all its clusters.
            let table = 8192_u64;
            let entry = if flags == 0 { table.to_le_bytes() } else { table.to_be_bytes() };
            set(&mut bytes, 4096 + 8, &entry);
            for cluster in 0..512_u64 {
                bytes.extend((table + 4096 + cluster * 4096).to_be_bytes());
            }
            bytes.resize(bytes.len() + 512 * 4096, 0x5a);
            let file = ram(&bytes).await;
            let disk = crate::tools::disk(&handle, &file).await;
            let mut expected = vec![0; 4 << 20];
            expected[2 << 20..].fill(0x5a);
            assert!(bytes_of(&disk).await == expected);
            // A new table in the first half.
            crate::tools::fill(&disk, 5000, 3000, 7).await.unwrap();
            expected[5000..8000].fill(7);
            disk.close().await.unwrap();
            let again = bytes_of(&*file).await;
            let entry: [u8; 8] = again[4096..4104].try_into().unwrap();
            let place = if flags == 0 { u64::from_le_bytes(entry) } else { u64::from_be_bytes(entry) };
            assert_eq!(place, bytes.len() as u64, "in the same order of bytes as before");
            assert_eq!(again[..4096], bytes[..4096], "the header is as it was");
            assert!(bytes_of(&crate::tools::disk(&handle, &file).await).await == expected);
            assert!(image::qcow::check(&file, image::Repair::No).await.unwrap().is_clean());
        }
    });
}
