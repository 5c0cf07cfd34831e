//! Headers: sound, odd and hostile ones.

use std::collections::BTreeSet;

use image::qcow2::{Compression, FeatureKind, Header, autoclear, compatible, incompatible};
use image::{Format, ImageError};

use crate::tools::{info, now, qemu_img, ram, save, scratch};

/// What `qemu-img create` makes with these options.
fn created(options: &[&str]) -> Vec<u8> {
    let folder = scratch();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    let mut arguments = vec!["create", "-q", "-u", "-f", "qcow2"];
    arguments.extend_from_slice(options);
    arguments.extend_from_slice(&[name, "5G"]);
    qemu_img(&arguments);
    std::fs::read(&path).unwrap()
}

fn read(bytes: &[u8]) -> Result<Header, ImageError> {
    now(Header::read(&ram(bytes)))
}

#[test]
fn what_qemu_img_was_told_is_read() {
    let plain = read(&created(&[])).unwrap();
    assert_eq!((plain.version, plain.cluster_size(), plain.size()), (3, 65536, 5 << 30));
    assert_eq!((plain.refcount_bits(), plain.refcount_max()), (16, 0xffff));
    assert_eq!((plain.l1_entries, plain.l2_entries(), plain.compression), (10, 8192, Compression::Zlib));
    assert_eq!(plain.backing(), None);
    let old = read(&created(&["-o", "compat=0.10,cluster_size=512"])).unwrap();
    assert_eq!((old.version, old.cluster_size(), old.length()), (2, 512, 72));
    let odd = "cluster_size=2M,refcount_bits=1,extended_l2=on,compression_type=zstd,lazy_refcounts=on";
    let odd = read(&created(&["-o", odd, "-b", "below.img", "-F", "vpc"])).unwrap();
    assert_eq!((odd.refcount_bits(), odd.refcount_max(), odd.compression), (1, 1, Compression::Zstd));
    assert!(odd.has_extended_l2() && odd.is_lazy() && !odd.is_dirty() && !odd.is_corrupt());
    let backing = odd.backing().unwrap();
    assert_eq!((backing.name.as_str(), backing.format), ("below.img", Some(Format::Vhd)));
    assert_eq!(
        odd.extensions.feature(FeatureKind::Incompatible, 4),
        Some("extended L2 entries"),
        "QEMU names its features"
    );
}

/// QEMU writes what it knows in another order, so the comparison is of what both say.
#[test]
fn what_is_written_again_is_read_again_by_us_and_by_qemu() {
    for options in [
        &[][..],
        &["-o", "compat=0.10"],
        &["-b", "below.img", "-F", "raw", "-o", "cluster_size=4k,refcount_bits=64"],
        &["-o", "compression_type=zstd"],
    ] {
        let mut bytes = created(options);
        let at = read(&bytes).unwrap().length();
        // An extension that nobody knows, before the others; the cluster's end is free.
        let cluster = read(&bytes).unwrap().cluster_size() as usize;
        bytes.copy_within(at..cluster - 16, at + 16);
        bytes[at..at + 16].copy_from_slice(b"\x12\x34\x56\x78\0\0\0\x05hello\0\0\0");
        if read(&bytes).is_err() {
            // The backing file's name was moved too.
            let name = u64::from_be_bytes(bytes[8..16].try_into().unwrap()) + 16;
            bytes[8..16].copy_from_slice(&name.to_be_bytes());
        }
        let name = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
        if name != 0 && bytes[name as usize..].starts_with(&[0; 9]) {
            bytes[8..16].copy_from_slice(&(name + 16).to_be_bytes());
        }
        let header = read(&bytes).unwrap();
        assert_eq!(header.extensions.unknown, [(0x1234_5678, b"hello".to_vec())]);
        let file = ram(&bytes);
        now(header.write(&file)).unwrap();
        assert_eq!(now(Header::read(&file)).unwrap(), header, "{options:?}");
        let folder = scratch();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        std::fs::write(&one, &bytes).unwrap();
        save(&file, &two);
        assert_eq!(info(&one), info(&two), "{options:?}");
    }
}

#[test]
fn the_fields_alone_leave_what_follows_them() {
    let bytes = created(&["-b", "below.img", "-F", "raw"]);
    let file = ram(&bytes);
    let mut header = now(Header::read(&file)).unwrap();
    header.incompatible |= incompatible::DIRTY;
    now(header.write_fields(&file)).unwrap();
    assert_eq!(now(Header::read(&file)).unwrap(), header);
    header.incompatible &= !incompatible::DIRTY;
    now(header.write_fields(&file)).unwrap();
    let buf = block::Buf::zeroed(bytes.len());
    now(file.read(0, buf.clone())).unwrap();
    assert!(buf.to_vec() == bytes);
}

/// Field, value, a word of the error.
const ODD: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfa", "no qcow2 image"),
    (4, &[0, 0, 0, 1], "no qcow2 image"),
    (4, &[0, 0, 0, 4], "version 4"),
    (8, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1], "name is at 1+1"),
    (8, &[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1], "name is at 65536+1"),
    (8, &[0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 4, 0], "1023"),
    (8, &[0xff; 12], "1023"),
    (20, &[0, 0, 0, 8], "2^8"),
    (20, &[0, 0, 0, 22], "2^22"),
    (20, &[0xff; 4], "2^4294967295"),
    (24, &[0xff; 8], "2^63"),
    (24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], "needs"),
    (24, &[0, 0, 0, 1, 0x40, 0, 0, 1], "needs 11"),
    (32, &[0, 0, 0, 1], "AES"),
    (32, &[0, 0, 0, 2], "LUKS"),
    (32, &[0, 0, 0, 3], "unknown method"),
    (36, &[0, 0, 0, 9], "needs 10"),
    (36, &[0xff; 4], "L1 table"),
    (40, &[0, 0, 0, 0, 0, 3, 0, 1], "L1 table"),
    (40, &[0; 8], "L1 table"),
    (40, &[0, 0, 0, 0xff, 0, 0, 0, 0], "cut off"),
    (40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "L1 table"),
    (48, &[0, 0, 0, 0, 0, 0, 2, 0], "refcount table"),
    (48, &[0; 8], "refcount table"),
    (48, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "refcount table"),
    (56, &[0; 4], "refcount table"),
    (56, &[0, 0, 0, 129], "refcount table"),
    (56, &[0xff; 4], "refcount table"),
    (60, &[0, 1, 0, 1], "snapshots"),
    (60, &[0, 0, 0, 1], "snapshot table"),
    (60, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0], "snapshot table"),
    (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "bit 63"),
    (72, &[0, 0, 0, 0, 0, 0, 0, 8], "compression type"),
    (95, &[2], "raw external data"),
    (96, &[0, 0, 0, 7], "2^7"),
    (100, &[0, 0, 0, 96], "96 bytes"),
    (100, &[0, 0, 0, 107], "107 bytes"),
    (100, &[0, 1, 0, 8], "65544 bytes"),
    (100, &[0xff; 4], "4294967295 bytes"),
    (104, &[1], "compression type"),
    (104, &[2], "2 (header byte 104)"),
    (112, &[0x12, 0x34, 0x56, 0x78, 0xff, 0xff, 0xff, 0xff], "reaches beyond"),
    (112, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16], "LUKS"),
    (112, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16], "backing file's format"),
    (112, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff], "not text"),
];

#[test]
fn every_odd_field_is_refused_in_words() {
    let sound = created(&[]);
    for (at, bytes, word) in ODD {
        let mut image = sound.clone();
        image[*at..at + bytes.len()].copy_from_slice(bytes);
        let error = read(&image).expect_err(word).to_string();
        assert!(error.contains(word), "{at}: {bytes:x?}: {error}");
    }
    // Whatever a byte of the header is, it is read or refused.
    for at in 0..1024 {
        for byte in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = sound.clone();
            image[at] = byte;
            match read(&image) {
                Ok(_) | Err(ImageError::Invalid(_) | ImageError::Unsupported(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }
    for len in (0..sound.len()).step_by(7) {
        match read(&sound[..len]) {
            Ok(header) => assert!(len > 3 * 65536, "{header:?} of {len} bytes"),
            Err(ImageError::Invalid(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn an_unknown_feature_is_told_by_the_name_that_the_image_gives() {
    let mut image = created(&[]);
    let table = image.windows(9).position(|bytes| bytes == b"dirty bit").unwrap();
    // Bit 0's name becomes that of bit 17.
    image[table - 1] = 17;
    image[table..table + 9].copy_from_slice(b"warp\"core");
    image[72..80].copy_from_slice(&(1_u64 << 17 | 1 << 18).to_be_bytes());
    let error = read(&image).unwrap_err();
    assert_eq!(error.errno(), block::Errno::EOPNOTSUPP);
    assert!(error.to_string().ends_with("know: `warp\\\"core` (bit 17), bit 18"), "{error}");
}

#[test]
fn the_same_features_are_known_as_qemu_names() {
    let header = read(&created(&[])).unwrap();
    let named = |kind| -> BTreeSet<u8> {
        let features = header.extensions.features.as_ref().unwrap();
        features.iter().filter(|feature| feature.kind == kind).map(|feature| feature.bit).collect()
    };
    let bits = |mask: u64| (0..64).filter(|bit| mask >> bit & 1 == 1).collect::<BTreeSet<u8>>();
    assert_eq!(named(FeatureKind::Incompatible), bits(incompatible::KNOWN));
    assert_eq!(named(FeatureKind::Compatible), bits(compatible::LAZY_REFCOUNTS));
    assert_eq!(named(FeatureKind::Autoclear), bits(autoclear::KNOWN));
}

#[test]
fn bitmaps_are_believed_only_where_their_bit_is_set() {
    let folder = scratch();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1G"]);
    qemu_img(&["bitmap", "--add", name, "first"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let bitmaps = read(&bytes).unwrap().extensions.bitmaps.unwrap();
    assert_eq!((bitmaps.count, bitmaps.at % 65536), (1, 0));
    bytes[95] = 0;
    let header = read(&bytes).unwrap();
    assert_eq!((header.extensions.bitmaps, header.extensions.unknown.len()), (None, 1));
    let file = ram(&bytes);
    now(header.write(&file)).unwrap();
    assert_eq!(now(Header::read(&file)).unwrap(), header);
}
