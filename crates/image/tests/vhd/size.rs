//! Disks that become larger, and the largest.

use super::*;

#[test]
fn disks_grow_and_keep_their_bytes() {
    for (subformat, block) in [
        (Subformat::Fixed, 2 << 20),
        (Subformat::Dynamic, 2 << 20),
        (Subformat::Dynamic, 65536),
        (Subformat::Dynamic, 4096),
    ] {
        let folder = folder();
        let path = folder.path().join("a.vhd");
        let at = path.clone();
        run(async move |handle| {
            let storage = file(&handle, &at);
            vhd::create(&storage, &Create { size: 5 * MIB, subformat, block, ..Create::default() })
                .await
                .unwrap();
            let mut model = vec![0; 5 << 20];
            let mut random = Random(block.into());
            for size in [5 * MIB + 512, 5 * MIB + 512, 6 * MIB, 11 * MIB, 40 * MIB] {
                let image = open_image(&handle, storage.clone(), true).await.unwrap();
                let disk = Chain::new(&handle, Rc::new(image));
                change(&disk, &mut model, &mut random, 40).await;
                if size == 6 * MIB {
                    disk.close().await.unwrap();
                    vhd::resize(&storage, size).await.unwrap();
                    model.resize(size as usize, 0);
                    continue;
                }
                disk.resize(size).await.unwrap();
                model.resize(size as usize, 0);
                assert_eq!(disk.size(), size);
                assert!(all_of(&disk).await == model, "{subformat:?} {block} {size}");
                change(&disk, &mut model, &mut random, 40).await;
                disk.close().await.unwrap();
                judge(&contents(&storage).await);
                let report = vhd::check(&storage, Repair::No).await.unwrap();
                assert!(report.is_safe(), "{report:?}");
                let error = vhd::resize(&storage, size - 512).await.unwrap_err();
                assert!(error.to_string().contains("smaller"), "{error}");
            }
            std::fs::write(at.with_extension("model"), &model).unwrap();
        });
        let model = std::fs::read(path.with_extension("model")).unwrap();
        assert!(bytes_by_qemu(&path) == model, "by QEMU, {subformat:?} {block}");
    }
}

#[test]
fn images_of_qemu_grow_too() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    for options in ["subformat=dynamic", "subformat=dynamic,force_size=on", "subformat=fixed"] {
        qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, text(&path), "10M"]);
        qemu("qemu-io", &["-f", "vpc", "-c", "write -P 7 1M 5M", text(&path)]);
        let mut model = bytes_by_qemu(&path);
        for size in [30 * MIB, 300 * MIB] {
            let at = path.clone();
            run(async move |handle| vhd::resize(&file(&handle, &at), size).await.unwrap());
            model.resize(size as usize, 0);
            assert_eq!(size_by_qemu(&path), size);
            assert!(bytes_by_qemu(&path) == model, "{options}");
        }
        let at = path.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        assert!(report.is_safe(), "{report:?}");
    }
}

/// A disk of 1 MiB in one block of 2 MiB, of which the file has all; then the footer says that it has 600 KiB and a half.
async fn cut(handle: &Handle, subformat: Subformat) -> Vec<u8> {
    let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
    let parent = Parent { name: "x".to_owned(), unique_id: None, changed: std::time::UNIX_EPOCH };
    let parent = (subformat == Subformat::Differencing).then_some(parent);
    let create = Create { size: MIB, subformat, parent, ..Create::default() };
    vhd::create(&ram, &create).await.unwrap();
    let disk = Chain::new(handle, Rc::new(open_image(handle, ram.clone(), true).await.unwrap()));
    disk.write(0, Buf::from_bytes(&vec![5; 1 << 20])).await.unwrap();
    disk.close().await.unwrap();
    let mut bytes = contents(&ram).await;
    let last = bytes.len() - 512;
    for at in [0, last] {
        if bytes[at..].starts_with(b"conectix") {
            bytes[at + 48..at + 56].copy_from_slice(&(600 * 1024 + 512_u64).to_be_bytes());
            seal(&mut bytes, at);
        }
    }
    bytes
}

#[test]
fn what_the_file_has_beyond_the_end_of_a_disk_does_not_show_when_it_grows() {
    run(async |handle| {
        for subformat in [Subformat::Fixed, Subformat::Dynamic, Subformat::Differencing] {
            for (is_in_use, size) in [(false, MIB), (false, 3 * MIB), (true, MIB), (true, 3 * MIB)] {
                let ram = stored(&cut(&handle, subformat).await).await;
                if !is_in_use {
                    vhd::resize(&ram, size).await.unwrap();
                }
                let disk =
                    Chain::new(&handle, Rc::new(open_image(&handle, ram.clone(), true).await.unwrap()));
                if is_in_use {
                    assert_eq!(disk.size(), 600 * 1024 + 512);
                    disk.resize(size).await.unwrap();
                }
                let bytes = all_of(&disk).await;
                let (old, new) = bytes.split_at(600 * 1024 + 512);
                assert!(old.iter().all(|byte| *byte == 5), "{subformat:?} {is_in_use} {size}");
                assert!(new.iter().all(|byte| *byte == 0), "{subformat:?} {is_in_use} {size}");
                disk.close().await.unwrap();
                judge(&contents(&ram).await);
            }
        }
    });
}

#[test]
fn a_batmap_says_nothing_of_blocks_that_are_new() {
    run(async |handle| {
        // The table stays, grows within its sector, and moves.
        for size in [11 * MIB, 40 * MIB, 40 << 30] {
            let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
            vhd::create(&ram, &Create { size: 5 * MIB, ..Create::default() }).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(open_image(&handle, ram.clone(), true).await.unwrap()));
            disk.write(0, Buf::from_bytes(&vec![5; 2 << 20])).await.unwrap();
            disk.close().await.unwrap();
            let mut bytes = contents(&ram).await;
            // Full are the first block, and some that the disk has not.
            let map = 1536 + 512 + 512;
            bytes[map] = 0x9f;
            bytes[map + 1..map + 512].fill(0x11);
            let sum = !(0x9f + 511 * 0x11_u32);
            bytes[map - 512 + 24..map - 512 + 28].copy_from_slice(&sum.to_be_bytes());
            let ram = stored(&bytes).await;
            assert!(vhd::check(&ram, Repair::No).await.unwrap().is_clean());
            vhd::resize(&ram, size).await.unwrap();
            let report = vhd::check(&ram, Repair::No).await.unwrap();
            assert!(report.is_safe(), "{report:?}");
            let bytes = contents(&ram).await;
            judge(&bytes);
            let number = |at: usize, len: usize| {
                bytes[at..at + len].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte))
            };
            let head = number(512 + 16, 8) + (number(512 + 28, 4) * 4).next_multiple_of(512);
            assert_eq!(bytes[head..head + 8], *b"tdbatmap");
            assert_eq!(bytes[number(head + 8, 8)], 0x80, "it still says that the first block is full");
        }
    });
}

#[test]
fn a_disk_does_not_grow_over_what_a_longer_one_below_it_has() {
    run(async |handle| {
        let ram = stored(&cut(&handle, Subformat::Differencing).await).await;
        // That one has 1 MiB.
        let disk = over(&handle, ram.clone(), true).await;
        let error = disk.resize(2 * MIB).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        assert!(error.to_string().contains("convert"), "{error}");
        assert_eq!(
            (disk.size(), Header::read(&ram).await.unwrap().size()),
            (600 * 1024 + 512, 600 * 1024 + 512)
        );
        // Where it has as much as the disk, zeroes follow it.
        let ram: Rc<dyn Storage> = stored(&empty(4096, true).await).await;
        let disk = over(&handle, ram, true).await;
        disk.resize(2 * MIB).await.unwrap();
        let bytes = all_of(&disk).await;
        assert!(
            bytes[..1 << 20].iter().all(|byte| *byte == 0x77)
                && bytes[1 << 20..].iter().all(|byte| *byte == 0)
        );
    });
}

#[test]
fn an_image_in_use_grows_as_far_as_its_table_goes() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: 5 * MIB, ..Create::default() }).await.unwrap();
        let header = Header::read(&ram).await.unwrap();
        let settings = Settings { writable: true, lasting: true, ..Settings::default() };
        let image = Vhd::open(&handle, header, ram.clone(), settings).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        disk.write(0, Buf::from_bytes(&[3; 4096])).await.unwrap();
        disk.resize(6 * MIB).await.unwrap();
        assert_eq!(disk.size(), 6 * MIB);
        let error = disk.resize(7 * MIB).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        assert_eq!(disk.size(), 6 * MIB);
        disk.close().await.unwrap();
        judge(&contents(&ram).await);
    });
}

#[test]
fn the_limit_of_2040_gib_is_told() {
    run(async |_| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        let most = 2040 << 30;
        vhd::create(&ram, &Create { size: most, ..Create::default() }).await.unwrap();
        assert_eq!(Header::read(&ram).await.unwrap().size(), most);
        for result in [
            vhd::resize(&ram, most + 1).await,
            vhd::create(&ram, &Create { size: most + 1, ..Create::default() }).await,
        ] {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("2040 GiB"), "{error}");
        }
        assert_eq!(Header::read(&ram).await.unwrap().size(), most, "it is as it was");
    });
}

#[test]
fn a_place_that_is_being_written_stays_its_writers_while_the_disk_grows() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: MIB, block: 1 << 20, ..Create::default() }).await.unwrap();
        // As blktap makes room for a larger disk: the table has more entries than blocks.
        vhd::resize(&ram, 20 * MIB).await.unwrap();
        let mut bytes = contents(&ram).await;
        let last = bytes.len() - 512;
        for at in [0, last] {
            bytes[at + 48..at + 56].copy_from_slice(&(10 * MIB).to_be_bytes());
            seal(&mut bytes, at);
        }
        let ram = stored(&bytes).await;
        let header = Header::read(&ram).await.unwrap();
        let settings = Settings { writable: true, lasting: true, ..Settings::default() };
        let image = Rc::new(Vhd::open(&handle, header, ram.clone(), settings).await.unwrap());
        let disk = Chain::new(&handle, image.clone());
        let placement = image.place(Span::new(5 * MIB, 4096).unwrap()).await.unwrap();
        disk.resize(20 * MIB).await.unwrap();
        disk.write(15 * MIB, Buf::from_bytes(&[2; 4096])).await.unwrap();
        ram.write(placement.at, Buf::from_bytes(&[1; 4096])).await.unwrap();
        image.commit(placement).await.unwrap();
        let mut model = vec![0; 20 << 20];
        model[5 << 20..][..4096].fill(1);
        model[15 << 20..][..4096].fill(2);
        assert!(all_of(&disk).await == model);
        disk.close().await.unwrap();
        judge(&contents(&ram).await);
    });
}

#[test]
fn space_at_the_end_that_was_there_before_stays() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 30 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&ram).await;
        let footer = bytes.split_off(bytes.len() - 512);
        bytes.resize(bytes.len() + (1 << 20), 0);
        bytes.extend(&footer);
        let ram = stored(&bytes).await;
        let image = open_image(&handle, ram.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        let before = all_of(&disk).await;
        disk.close().await.unwrap();
        assert!(contents(&ram).await == bytes, "nobody has written anything");
        let report = vhd::check(&ram, Repair::No).await.unwrap();
        assert!(report.leaks == 1 && report.is_safe(), "{report:?}");
        // New blocks take it first.
        let disk = over(&handle, ram.clone(), false).await;
        disk.write(0, Buf::from_bytes(&vec![7; 30 << 20])).await.unwrap();
        disk.close().await.unwrap();
        let report = vhd::check(&ram, Repair::No).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        judge(&contents(&ram).await);
        assert!(before.len() == 30 << 20);
    });
}
