//! What QEMU's programs make of our images, and we of theirs.

use super::*;

#[test]
fn qemu_reads_what_we_make() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    for subformat in [Subformat::Fixed, Subformat::Dynamic] {
        for size in [512, 10 * MIB, 10 * MIB + 512, 33_333_333, 5 << 30] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc] {
                if size > 40_000_000 && preallocation == Preallocation::Falloc {
                    continue;
                }
                make(&path, Create { size, subformat, preallocation, ..Create::default() }).unwrap();
                assert_eq!(size_by_qemu(&path), size.next_multiple_of(512), "{subformat:?}");
                if size < 40_000_000 {
                    judge(&std::fs::read(&path).unwrap());
                    assert!(bytes_by_qemu(&path).iter().all(|byte| *byte == 0));
                }
            }
        }
    }
}

#[test]
fn sizes_rounded_by_geometry_are_those_of_qemu() {
    let folder = folder();
    let (ours, theirs) = (folder.path().join("ours.vhd"), folder.path().join("theirs.vhd"));
    for size in [
        1,
        512,
        100_000,
        10 * MIB,
        123_456_789,
        504 * MIB,
        8 << 30,
        31 << 30,
        100 << 30,
        130 << 30,
        2040 << 30,
    ] {
        qemu("qemu-img", &["create", "-q", "-f", "vpc", text(&theirs), &size.to_string()]);
        make(&ours, Create { size, geometry: true, ..Create::default() }).unwrap();
        assert_eq!(size_by_qemu(&ours), size_by_qemu(&theirs), "{size}");
        // Programs that go by cylinders, heads and sectors see the same.
        let (ours, theirs) = (std::fs::read(&ours).unwrap(), std::fs::read(&theirs).unwrap());
        if size_of(&theirs) < 127 << 30 {
            assert_eq!(ours[56..60], theirs[56..60], "{size}");
        }
    }
}

/// The size that a footer at 0 has.
fn size_of(bytes: &[u8]) -> u64 {
    bytes[48..56].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[test]
fn the_size_of_a_disk_is_what_qemu_takes_for_it_whoever_made_it() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    qemu("qemu-img", &["create", "-q", "-f", "vpc", text(&path), "10M"]);
    let made = std::fs::read(&path).unwrap();
    let creators: [&[u8; 4]; 12] = [
        b"vpc ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"vs  ", b"vbox", b"conv",
        b"    ",
    ];
    for creator in creators {
        for geometry in [[1, 45, 4, 17], [255, 255, 16, 255]] {
            let mut bytes = made.clone();
            for at in [0, made.len() - 512] {
                bytes[at + 28..at + 32].copy_from_slice(creator);
                bytes[at + 48..at + 56].copy_from_slice(&(9 * MIB + 300).to_be_bytes());
                bytes[at + 56..at + 60].copy_from_slice(&geometry);
                // A version of blktap's that has no batmap for certain.
                bytes[at + 32..at + 36].copy_from_slice(&[0, 1, 0, 1]);
                seal(&mut bytes, at);
            }
            std::fs::write(&path, &bytes).unwrap();
            let by_qemu = size_by_qemu(&path);
            let at = path.clone();
            let ours = run(async move |handle| Header::read(&file(&handle, &at)).await.unwrap().size());
            assert_eq!(ours, by_qemu, "{} {geometry:?}", String::from_utf8_lossy(creator));
        }
    }
}

#[test]
fn what_qemu_writes_is_read_and_written_on_and_read_by_qemu() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    for options in [
        "subformat=dynamic",
        "subformat=dynamic,force_size=on",
        "subformat=fixed",
        "subformat=fixed,force_size=on",
    ] {
        qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, text(&path), "20M"]);
        let mut model = vec![0; size_by_qemu(&path) as usize];
        for round in 0..4u64 {
            // QEMU writes here and there.
            let mut random = Random(round);
            for _ in 0..5 {
                let (at, byte) = (random.below(19 * MIB) / 512 * 512, 1 + random.below(250) as u8);
                let len = (512 + random.below(200_000) / 512 * 512).min(model.len() as u64 - at);
                qemu("qemu-io", &["-f", "vpc", "-c", &format!("write -P {byte} {at} {len}"), text(&path)]);
                model[at as usize..(at + len) as usize].fill(byte);
            }
            let at = path.clone();
            model = run(async move |handle| {
                let disk = disk(&handle, &at, true).await;
                assert!(all_of(&disk).await == model, "what QEMU wrote");
                change(&disk, &mut model, &mut random, 60).await;
                disk.close().await.unwrap();
                model
            });
            assert!(bytes_by_qemu(&path) == model, "what we wrote, {options}, round {round}");
        }
        let bytes = std::fs::read(&path).unwrap();
        judge(&bytes);
        let at = path.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        assert!(report.is_clean(), "{report:?}");
    }
}
