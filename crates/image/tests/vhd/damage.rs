//! Images that are damaged, hostile, marked by others, or of old programs.

use super::*;

#[test]
fn a_differencing_image_names_its_parent_as_blktap_does() {
    run(async |_| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        let changed = std::time::UNIX_EPOCH + Duration::from_secs(946_684_800 + 77);
        let parent = Parent { name: "../vm/base.vhd".to_owned(), unique_id: Some([5; 16]), changed };
        let create = Create {
            size: MIB,
            subformat: Subformat::Differencing,
            parent: Some(parent.clone()),
            ..Create::default()
        };
        vhd::create(&ram, &create).await.unwrap();
        let backing = Header::read(&ram).await.unwrap().backing().unwrap();
        assert_eq!(backing.name, "../vm/base.vhd");
        assert_eq!(backing.others, ["base.vhd"]);
        assert_eq!(backing.unique_id, Some([5; 16]));
        let head = Buf::zeroed(4096);
        ram.read(0, head.clone()).await.unwrap();
        let head = head.to_vec();
        // Of the second header: the parent's identifier and time; the platforms of three locators.
        assert_eq!(head[512 + 40..512 + 56], [5; 16]);
        assert_eq!(head[512 + 56..512 + 60], [0, 0, 0, 77]);
        let platforms: Vec<&[u8]> = (0..3).map(|number| &head[512 + 576 + number * 24..][..4]).collect();
        assert_eq!(platforms, [b"MacX", b"W2ku", b"W2ru"]);
        // A parent that is a raw disk has no identifier.
        let create = Create { parent: Some(Parent { unique_id: None, ..parent }), ..create };
        vhd::create(&ram, &create).await.unwrap();
        let backing = Header::read(&ram).await.unwrap().backing().unwrap();
        assert_eq!((backing.format, backing.unique_id), (Some(image::Format::Raw), None));
    });
}

#[test]
fn either_footer_is_enough_and_the_other_is_put_right() {
    run(async |handle| {
        let (ram, model) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let whole = contents(&ram).await;
        let last = whole.len() - 512;
        for (at, filling) in [(0, 0), (last, 0), (last, 0xc7), (last, 0x11)] {
            let mut bytes = whole.clone();
            bytes[at..at + 512].fill(filling);
            let damaged = stored(&bytes).await;
            let header = Header::read(&damaged).await.unwrap();
            assert_eq!(header.notes().len(), 1, "it is told");
            assert_eq!(header.notes()[0].contains("0xc7"), filling == 0xc7);
            let image = open_image(&handle, damaged.clone(), false).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(image));
            assert!(all_of(&disk).await == model);
            assert!(contents(&damaged).await == bytes, "what is only read is left as it is");
            let report = vhd::check(&damaged, Repair::No).await.unwrap();
            assert!(report.is_safe() && !report.is_clean(), "{report:?}");
            let report = vhd::check(&damaged, Repair::Leaks).await.unwrap();
            assert!(report.is_clean() && report.leaks_fixed == 1, "{report:?}");
            assert!(contents(&damaged).await == whole, "as it was before");
        }
        let mut bytes = whole.clone();
        bytes[..8].fill(0);
        bytes[last..].fill(0);
        let error = Header::read(&stored(&bytes).await).await.unwrap_err();
        assert!(matches!(error, ImageError::Invalid(_)), "{error}");
    });
}

#[test]
fn an_image_that_lost_its_end_gets_a_footer_when_it_is_opened_to_be_written() {
    run(async |handle| {
        let (ram, model) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let whole = contents(&ram).await;
        for cut in [2, 511, 512] {
            let damaged = stored(&whole[..whole.len() - cut]).await;
            let image = open_image(&handle, damaged.clone(), true).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(image));
            assert!(all_of(&disk).await == model, "{cut}");
            disk.close().await.unwrap();
            assert!(contents(&damaged).await == whole, "{cut}");
        }
        // More than the footer is lost.
        let damaged = stored(&whole[..whole.len() - (3 << 20)]).await;
        let error = open_image(&handle, damaged, true).await.err().unwrap();
        assert!(error.to_string().contains("cut off"), "{error}");
    });
}

#[test]
fn a_guest_cannot_make_a_fixed_image_another_one() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: MIB, subformat: Subformat::Fixed, ..Create::default() })
            .await
            .unwrap();
        let trap: Rc<dyn Storage> = Rc::new(Ram::new(0));
        let parent =
            Parent { name: "/etc/shadow".to_owned(), unique_id: None, changed: std::time::UNIX_EPOCH };
        let create = Create {
            size: MIB,
            subformat: Subformat::Differencing,
            parent: Some(parent),
            ..Create::default()
        };
        vhd::create(&trap, &create).await.unwrap();
        let trap = contents(&trap).await;
        let image = open_image(&handle, ram.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        disk.write(0, Buf::from_bytes(&trap)).await.unwrap();
        disk.close().await.unwrap();
        let header = Header::read(&ram).await.unwrap();
        assert_eq!(header.subformat(), Subformat::Fixed);
        assert!(header.backing().is_none());
        // While it grows there is a moment without a footer, in which the guest's would count.
        let error = vhd::resize(&ram, 2 * MIB).await.unwrap_err();
        assert!(error.to_string().contains("begins like a dynamic one"), "{error}");
        assert_eq!(ram.size(), MIB + 512);
        // The same in the last sector of a dynamic image that is cut off there.
        let (dynamic, _) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&dynamic).await;
        let last = bytes.len() - 512;
        bytes[last..].copy_from_slice(&trap[..512]);
        let header = Header::read(&stored(&bytes).await).await.unwrap();
        assert_eq!(header.subformat(), Subformat::Dynamic);
    });
}

/// A dynamic image that lost its footer, as blktap leaves one when its host dies: its last sector is a guest's, with these bytes.
/// That is byte 4 MiB - 512 of the disk.
async fn with_last_sector(handle: &Handle, sector: &[u8]) -> Vec<u8> {
    let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
    vhd::create(&ram, &Create { size: 4 * MIB, ..Create::default() }).await.unwrap();
    let disk = Chain::new(handle, Rc::new(open_image(handle, ram.clone(), true).await.unwrap()));
    for at in [0, 4 * MIB - 512] {
        disk.write(at, Buf::from_bytes(sector)).await.unwrap();
    }
    disk.close().await.unwrap();
    let mut bytes = contents(&ram).await;
    bytes.truncate(bytes.len() - 512);
    assert_eq!(&bytes[bytes.len() - 512..], sector);
    bytes
}

async fn footer_of_another(subformat: Subformat) -> Vec<u8> {
    let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
    vhd::create(&ram, &Create { size: 4 * MIB, subformat, ..Create::default() }).await.unwrap();
    let bytes = contents(&ram).await;
    bytes[bytes.len() - 512..].to_vec()
}

#[test]
fn a_guest_cannot_make_an_image_that_lost_its_footer_a_fixed_one() {
    run(async |handle| {
        let footer = footer_of_another(Subformat::Fixed).await;
        let mut bytes = with_last_sector(&handle, &footer).await;
        let error = Header::read(&stored(&bytes).await).await.unwrap_err();
        assert!(error.to_string().contains("written by a guest"), "{error}");
        // As it says.
        bytes.extend([0; 512]);
        let ram = stored(&bytes).await;
        let disk = Chain::new(&handle, Rc::new(open_image(&handle, ram.clone(), true).await.unwrap()));
        assert_eq!(all_of(&disk).await[4 * 1024 * 1024 - 512..], footer);
        disk.close().await.unwrap();
        judge(&contents(&ram).await);
    });
}

#[test]
fn what_a_guest_wrote_to_the_last_sector_is_no_footer_to_be_cleared() {
    run(async |handle| {
        let footer = footer_of_another(Subformat::Dynamic).await;
        let bytes = with_last_sector(&handle, &footer).await;
        let ram = stored(&bytes).await;
        let report = vhd::check(&ram, Repair::All).await.unwrap();
        assert!(report.is_safe(), "{report:?}");
        for ram in [ram, stored(&bytes).await] {
            for writable in [false, true] {
                let image = open_image(&handle, ram.clone(), writable).await.unwrap();
                let disk = Chain::new(&handle, Rc::new(image));
                assert_eq!(all_of(&disk).await[4 * 1024 * 1024 - 512..], footer, "{writable}");
                disk.close().await.unwrap();
            }
            judge(&contents(&ram).await);
        }
    });
}

#[test]
fn a_guest_cannot_write_the_name_of_the_image_below_behind_the_end_of_a_file_that_was_cut_off() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        let parent =
            Parent { name: "./base.raw".to_owned(), unique_id: None, changed: std::time::UNIX_EPOCH };
        let create = Create {
            size: 4 * MIB,
            subformat: Subformat::Differencing,
            parent: Some(parent),
            ..Create::default()
        };
        vhd::create(&ram, &create).await.unwrap();
        let mut bytes = contents(&ram).await;
        // The locators are the last thing before the footer, a sector each. Of the first one there is a half.
        bytes.truncate(1536 + 512 + 1024 + 256);
        let ram = stored(&bytes).await;
        let image = open_image(&handle, ram.clone(), false).await.unwrap();
        assert_eq!(image.size(), 4 * MIB, "it can be read");
        let error = open_image(&handle, ram.clone(), true).await.err().unwrap();
        assert!(error.to_string().contains("parent locator"), "{error}");
        let error = vhd::resize(&ram, 8 * MIB).await.unwrap_err();
        assert!(error.to_string().contains("parent locator"), "{error}");
        assert_eq!(vhd::check(&ram, Repair::Leaks).await.unwrap().corruptions, 3);
        assert_eq!(contents(&ram).await, bytes);
        assert_eq!(vhd::check(&ram, Repair::All).await.unwrap().corruptions_fixed, 3);
        assert!(vhd::check(&ram, Repair::No).await.unwrap().is_safe());
        let disk = over(&handle, ram.clone(), true).await;
        disk.write(0, Buf::from_bytes(&b"file:///etc/shadow".repeat(200_000))).await.unwrap();
        disk.close().await.unwrap();
        let names = Header::read(&ram).await.unwrap().backing().unwrap();
        assert_eq!((names.name.as_str(), names.others.len()), ("base.raw", 0), "what the header itself says");
    });
}

#[test]
fn where_blktap_looks_for_a_batmap_a_guest_has_no_say() {
    run(async |handle| {
        // Images of its version 1.1 may have none.
        let mut bytes = empty(2 << 20, true).await;
        let table_end = 1536 + 512;
        bytes[table_end..table_end + 512].fill(0);
        let last = bytes.len() - 512;
        for at in [0, last] {
            bytes[at + 32..at + 36].copy_from_slice(&[0, 1, 0, 1]);
            seal(&mut bytes, at);
        }
        // Nor locators.
        bytes[512 + 576..512 + 576 + 8 * 24].fill(0);
        bytes[512 + 36..512 + 40].fill(0);
        let sum = !bytes[512..1536].iter().map(|byte| u32::from(*byte)).sum::<u32>();
        bytes[512 + 36..512 + 40].copy_from_slice(&sum.to_be_bytes());
        bytes.truncate(table_end);
        let ram = stored(&bytes).await;
        let disk = over(&handle, ram.clone(), true).await;
        disk.write(0, Buf::from_bytes(&vec![7; 1 << 20])).await.unwrap();
        disk.close().await.unwrap();
        vhd::resize(&ram, 40 << 30).await.unwrap();
        let bytes = contents(&ram).await;
        assert!(bytes[table_end..table_end + 512].iter().all(|byte| *byte == 0 || *byte == 0xff));
        judge(&bytes);
        assert!(vhd::check(&ram, Repair::No).await.unwrap().is_safe());
    });
}

#[test]
fn a_batmap_that_says_it_is_huge_is_done_without() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    make(&path, Create { size: 5 * MIB, ..Create::default() }).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    // 1 TiB, all of which the file has.
    bytes[1536 + 512 + 16..1536 + 512 + 20].copy_from_slice(&(1_u32 << 31).to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len((1 << 40) + (1 << 20)).unwrap();
    run(async move |handle| {
        let storage = file(&handle, &path);
        let header = Header::read(&storage).await.unwrap();
        assert!(header.notes().iter().any(|note| note.contains("done without")), "{:?}", header.notes());
        assert!(vhd::check(&storage, Repair::No).await.unwrap().is_safe());
    });
}

#[test]
fn images_that_make_no_sense_are_refused_in_words_and_never_served() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 3 * MIB, block: 65536, ..Create::default() }).await;
        let whole = contents(&ram).await;
        let values = [
            0u64,
            1,
            2,
            511,
            512,
            513,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_fffe,
            0xffff_ffff,
            1 << 40,
            u64::MAX,
        ];
        let mut refused = 0;
        // Fields of the copy of the footer and of the second header, by place and length.
        let fields =
            [(16, 8), (32, 4), (48, 8), (56, 4), (60, 4), (12, 4), (528, 8), (536, 4), (540, 4), (544, 4)];
        for (at, len) in fields {
            for value in values {
                let mut bytes = whole.clone();
                bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
                seal(&mut bytes, 0);
                bytes[512 + 36..512 + 40].fill(0);
                let sum = !bytes[512..1536].iter().map(|byte| u32::from(*byte)).sum::<u32>();
                bytes[512 + 36..512 + 40].copy_from_slice(&sum.to_be_bytes());
                let damaged = stored(&bytes).await;
                refused += usize::from(try_all(&handle, damaged).await.is_err());
            }
        }
        assert!(refused > 60, "{refused}");
        // Entries of the table.
        for value in [0u32, 1, 3, 4, 5, 8, 0x7fff_ffff, 0xffff_fffe] {
            let mut bytes = whole.clone();
            bytes[1536 + 8..1536 + 12].copy_from_slice(&value.to_be_bytes());
            assert!(try_all(&handle, stored(&bytes).await).await.is_err(), "{value:#x}");
            let report = vhd::check(&stored(&bytes).await, Repair::No).await.unwrap();
            assert!(report.corruptions > 0, "{value:#x}: {report:?}");
            let damaged = stored(&bytes).await;
            let report = vhd::check(&damaged, Repair::All).await.unwrap();
            assert!(report.corruptions_fixed > 0 && report.is_safe(), "{value:#x}: {report:?}");
            try_all(&handle, damaged.clone()).await.unwrap();
            assert!(
                vhd::check(&damaged, Repair::All).await.unwrap().corruptions_fixed == 0,
                "once is enough"
            );
        }
        // Two blocks in one place.
        let mut bytes = whole.clone();
        let used: Vec<usize> = (0..48).filter(|number| bytes[1536 + number * 4] != 0xff).collect();
        bytes.copy_within(1536 + used[0] * 4..1536 + used[0] * 4 + 4, 1536 + used[1] * 4);
        let error = try_all(&handle, stored(&bytes).await).await.unwrap_err();
        assert!(error.contains("lies over"), "{error}");
        // Every byte of the headers, changed: opened or refused, and no panic.
        for at in (0..1536).step_by(3) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x5a;
            drop(try_all(&handle, stored(&bytes).await).await);
            let mut bytes = whole[..at].to_vec();
            bytes.push(0);
            assert!(try_all(&handle, stored(&bytes).await).await.is_err());
        }
    });
}

/// Opens an image, reads and writes it here and there, checks it.
async fn try_all(handle: &Handle, storage: Rc<dyn Storage>) -> Result<(), String> {
    let told = |error: ImageError| error.to_string();
    let header = Header::read(&storage).await.map_err(told)?;
    vhd::info(&header);
    header.backing();
    vhd::check(&storage, Repair::No).await.map_err(told)?;
    let image = open_image(handle, storage.clone(), true).await.map_err(told)?;
    let disk = Chain::new(handle, Rc::new(image));
    for at in [0, disk.size() / 2, disk.size().saturating_sub(4096)] {
        let len = 4096.min(disk.size() - at) as usize;
        if len > 0 {
            let buf = Buf::zeroed(len);
            disk.read(at, buf.clone()).await.map_err(|error| error.to_string())?;
            disk.write(at, buf).await.map_err(|error| error.to_string())?;
        }
    }
    disk.close().await.map_err(|error| error.to_string())
}

#[test]
fn a_disabled_image_is_told_of_and_not_served() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&ram).await;
        let last = bytes.len() - 512;
        for at in [0, last] {
            bytes[at..at + 8].copy_from_slice(b"v_poison");
            seal(&mut bytes, at);
        }
        let disabled = stored(&bytes).await;
        let header = Header::read(&disabled).await.unwrap();
        assert!(header.is_disabled() && vhd::is(&bytes) && vhd::is_fixed(&bytes));
        let error = open_image(&handle, disabled.clone(), false).await.err().unwrap();
        assert!(error.to_string().contains("v_poison"), "{error}");
        assert!(vhd::check(&disabled, Repair::All).await.unwrap().is_clean());
        assert!(contents(&disabled).await == bytes, "its mark is kept");
    });
}

#[test]
fn hidden_and_suspended_images_keep_their_marks() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 30 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&ram).await;
        let last = bytes.len() - 512;
        for at in [0, last] {
            bytes[at + 84..at + 86].fill(1);
            bytes[at + 300] = 0x77; // a reserved byte
            seal(&mut bytes, at);
        }
        let marked = stored(&bytes).await;
        let image = open_image(&handle, marked.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        let before = marked.size();
        disk.write(0, Buf::from_bytes(&vec![1; 30 << 20])).await.unwrap();
        disk.close().await.unwrap();
        assert!(marked.size() > before, "blocks were added");
        let after = contents(&marked).await;
        assert_eq!(after[after.len() - 512..], bytes[..512]);
        assert_eq!(Header::read(&marked).await.unwrap().notes().len(), 2);
    });
}

#[test]
fn images_of_virtual_pc_before_2004_have_a_shorter_footer() {
    run(async |handle| {
        for subformat in [Subformat::Fixed, Subformat::Dynamic] {
            let (ram, model) =
                sample(&handle, Create { size: 3 * MIB, subformat, ..Create::default() }).await;
            let whole = contents(&ram).await;
            let short = stored(&whole[..whole.len() - 1]).await;
            assert!(Header::read(&short).await.unwrap().notes().is_empty());
            let image = open_image(&handle, short.clone(), true).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(image));
            assert!(all_of(&disk).await == model);
            disk.close().await.unwrap();
            let report = vhd::check(&short, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
        }
    });
}

#[test]
fn the_batmap_stays_true() {
    run(async |handle| {
        let (ram, mut model) = sample(&handle, Create { size: 30 * MIB, ..Create::default() }).await;
        // blktap marks a full block.
        let mut bytes = contents(&ram).await;
        let block = (0..15usize).find(|block| bytes[1536 + block * 4] != 0xff).unwrap();
        let map = 1536 + 512 + 512;
        bytes[map + block / 8] = 0x80 >> (block % 8);
        let sum = !u32::from(bytes[map + block / 8]);
        bytes[map - 512 + 24..map - 512 + 28].copy_from_slice(&sum.to_be_bytes());
        judge(&bytes);
        let foreign = stored(&bytes).await;
        let image = open_image(&handle, foreign.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        change(&disk, &mut model, &mut Random(8), 100).await;
        disk.discard(Span::new(0, 30 * MIB).unwrap()).await.unwrap();
        disk.close().await.unwrap();
        judge(&contents(&foreign).await);
        assert!(vhd::check(&foreign, Repair::No).await.unwrap().is_clean());
        // One that says too much is a corruption, and is put right.
        let mut bytes = contents(&foreign).await;
        let place =
            bytes[1536 + block * 4..][..4].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte))
                * 512;
        bytes[place + 7] = 0xfe;
        let foreign = stored(&bytes).await;
        assert_eq!(vhd::check(&foreign, Repair::No).await.unwrap().corruptions, 1);
        assert_eq!(vhd::check(&foreign, Repair::All).await.unwrap().corruptions_fixed, 1);
        assert!(vhd::check(&foreign, Repair::No).await.unwrap().is_clean());
        judge(&contents(&foreign).await);
        // So is one whose checksum is wrong.
        let mut bytes = contents(&foreign).await;
        bytes[map - 512 + 24] ^= 1;
        let foreign = stored(&bytes).await;
        assert_eq!(vhd::check(&foreign, Repair::No).await.unwrap().corruptions, 1);
        assert!(vhd::check(&foreign, Repair::All).await.unwrap().is_clean());
        judge(&contents(&foreign).await);
    });
}

#[test]
fn encrypted_images_are_refused_by_name() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&ram).await;
        bytes[1536 + 512 + 29] = 1;
        let error = Header::read(&stored(&bytes).await).await.unwrap_err();
        assert!(error.to_string().contains("encrypted"), "{error}");
    });
}

/// A dynamic image of a disk of 8 MiB, all of it 0x55.
async fn filled(handle: &Handle) -> Vec<u8> {
    let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
    vhd::create(&ram, &Create { size: 8 * MIB, ..Create::default() }).await.unwrap();
    let disk = over(handle, ram.clone(), false).await;
    disk.write(0, Buf::from_bytes(&vec![0x55; 8 << 20])).await.unwrap();
    disk.close().await.unwrap();
    contents(&ram).await
}

#[test]
fn what_was_cut_off_the_last_block_never_becomes_zeroes_unasked() {
    run(async |handle| {
        let whole = filled(&handle).await;
        for cut in [1024, 513, 1 << 20, (2 << 20) - 4096] {
            let bytes = &whole[..whole.len() - cut];
            let ram = stored(bytes).await;
            let error = open_image(&handle, ram.clone(), true).await.err().unwrap();
            assert!(error.to_string().contains("cut off"), "{error}");
            let error = vhd::resize(&ram, 16 * MIB).await.unwrap_err();
            assert!(error.to_string().contains("cut off"), "{error}");
            // Nor where only space was asked for.
            let report = vhd::check(&ram, Repair::Leaks).await.unwrap();
            assert!(report.corruptions == 1 && report.leaks_fixed == 0, "{report:?}");
            assert!(contents(&ram).await == bytes, "{cut}");
            let disk = Chain::new(&handle, Rc::new(open_image(&handle, ram.clone(), false).await.unwrap()));
            let error = disk.read(8 * MIB - 512, Buf::zeroed(512)).await.unwrap_err();
            assert_eq!(error.errno(), Errno::EIO);
            drop(disk);
            // What is lost is lost when somebody says so.
            assert_eq!(vhd::check(&ram, Repair::All).await.unwrap().corruptions_fixed, 1);
            assert!(vhd::check(&ram, Repair::No).await.unwrap().is_safe());
            let found = all_of(&over(&handle, ram.clone(), false).await).await;
            let there = found.iter().position(|byte| *byte == 0).unwrap();
            assert_eq!(there, ((8 << 20) + 512 - cut) / 512 * 512);
            assert!(found[..there].iter().all(|byte| *byte == 0x55));
        }
    });
}

#[test]
fn a_block_that_was_cut_off_as_a_whole_is_told_from_one_that_blktap_gave_a_place() {
    run(async |handle| {
        let whole = filled(&handle).await;
        let last = whole.len() - 512 - (2 << 20) - 512;
        for len in [last, last - 512, last - 3584] {
            let ram = stored(&whole[..len]).await;
            assert_eq!(vhd::check(&ram, Repair::No).await.unwrap().corruptions, 1, "{len}");
            assert_eq!(vhd::check(&ram, Repair::Leaks).await.unwrap().corruptions, 1, "{len}");
            assert_eq!(ram.size(), len as u64);
            let report = vhd::check(&ram, Repair::All).await.unwrap();
            assert_eq!(report.corruptions_fixed, 1, "{report:?}");
            assert!(vhd::check(&ram, Repair::No).await.unwrap().is_clean());
            judge(&contents(&ram).await);
        }
        // As blktap leaves it when its host dies: the footer that was there is filled with 0xc7, or as it was.
        for footer in [&[0xc7; 512][..], &whole[whole.len() - 512..]] {
            let bytes = [&whole[..last - 512], footer].concat();
            let ram = stored(&bytes).await;
            let report = vhd::check(&ram, Repair::No).await.unwrap();
            assert!(report.is_safe(), "{report:?}");
            assert!(
                report.notes.iter().any(|note| note.contains("that place and nothing else")),
                "{report:?}"
            );
            let disk = over(&handle, ram.clone(), false).await;
            assert!(all_of(&disk).await[6 << 20..].iter().all(|byte| *byte == 0));
        }
    });
}

#[test]
fn an_entry_far_behind_the_end_makes_no_long_file() {
    run(async |handle| {
        let mut bytes = filled(&handle).await;
        bytes[1536 + 4..1536 + 8].copy_from_slice(&0xf300_0000_u32.to_be_bytes());
        for at in [1536, 1536 + 4] {
            let ram = stored(&bytes).await;
            let report = vhd::check(&ram, Repair::Leaks).await.unwrap();
            assert!(report.corruptions > 0 && report.leaks_fixed == 0, "{at}: {report:?}");
            assert!(contents(&ram).await == bytes, "{at}");
            assert!(vhd::resize(&ram, 16 * MIB).await.is_err());
            assert!(contents(&ram).await == bytes, "{at}");
            // It is put right at the cost of the block.
            let report = vhd::check(&ram, Repair::All).await.unwrap();
            assert!(report.is_clean() || report.is_safe(), "{report:?}");
            assert!(ram.size() <= bytes.len() as u64);
            // Then one without its footer.
            let last = bytes.len() - 512;
            bytes[last..].fill(0);
        }
    });
}

/// Says of a disk of 8 MiB that it has `size` bytes, or again that it has 8 MiB.
fn claim(bytes: &mut [u8], size: u64) {
    let last = bytes.len() - 512;
    for at in [0, last] {
        bytes[at + 48..at + 56].copy_from_slice(&size.to_be_bytes());
        seal(bytes, at);
    }
}

#[test]
fn blocks_behind_the_end_of_the_disk_are_left_alone() {
    run(async |handle| {
        // Of Virtual PC and QEMU there are images whose disk is smaller, by its geometry, than by the size that others go by.
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: 8 * MIB, ..Create::default() }).await.unwrap();
        let disk = over(&handle, ram.clone(), false).await;
        disk.write(0, Buf::from_bytes(&[1; 4096])).await.unwrap();
        disk.write(6 * MIB, Buf::from_bytes(&vec![6; 2 << 20])).await.unwrap();
        disk.close().await.unwrap();
        drop(disk);
        let mut bytes = contents(&ram).await;
        claim(&mut bytes, 4 * MIB);
        let ram = stored(&bytes).await;
        for repair in [Repair::No, Repair::Leaks, Repair::All] {
            let report = vhd::check(&ram, repair).await.unwrap();
            assert!(report.is_clean() && report.leaks_fixed + report.corruptions_fixed == 0, "{report:?}");
            assert_eq!((report.allocated_clusters, report.total_clusters), (1, 2));
        }
        assert!(contents(&ram).await == bytes);
        // Neither a new block nor the end comes over them.
        let disk = over(&handle, ram.clone(), false).await;
        disk.write(2 * MIB, Buf::from_bytes(&vec![2; 2 << 20])).await.unwrap();
        disk.close().await.unwrap();
        drop(disk);
        let mut bytes = contents(&ram).await;
        judge(&bytes);
        claim(&mut bytes, 8 * MIB);
        let found = all_of(&over(&handle, stored(&bytes).await, false).await).await;
        assert!(found[2 << 20..4 << 20].iter().all(|byte| *byte == 2));
        assert!(found[6 << 20..].iter().all(|byte| *byte == 6));
        // A disk that becomes so large does not show them.
        for size in [8 * MIB, 40 << 30] {
            claim(&mut bytes, 4 * MIB);
            let ram = stored(&bytes).await;
            vhd::resize(&ram, size).await.unwrap();
            judge(&contents(&ram).await);
            assert!(vhd::check(&ram, Repair::No).await.unwrap().is_safe());
            let disk = over(&handle, ram, false).await;
            let buf = Buf::zeroed(8 << 20);
            disk.read(0, buf.clone()).await.unwrap();
            assert!(buf.to_vec()[..4 << 20] == found[..4 << 20], "{size}");
            assert!(buf.to_vec()[4 << 20..].iter().all(|byte| *byte == 0), "{size}");
        }
        // One that lies over a block of the disk is a fault.
        claim(&mut bytes, 4 * MIB);
        bytes.copy_within(1536..1540, 1536 + 12);
        let ram = stored(&bytes).await;
        let error = open_image(&handle, ram.clone(), true).await.err().unwrap();
        assert!(error.to_string().contains("lies over"), "{error}");
        assert!(open_image(&handle, ram.clone(), false).await.is_ok(), "it can be read");
        assert_eq!(vhd::check(&ram, Repair::No).await.unwrap().corruptions, 1);
    });
}

#[test]
fn the_footer_of_a_fixed_image_is_put_back() {
    run(async |_| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: MIB, subformat: Subformat::Fixed, ..Create::default() })
            .await
            .unwrap();
        ram.write(0, Buf::from_bytes(&vec![9; 1 << 20])).await.unwrap();
        let whole = contents(&ram).await;
        let last = whole.len() - 512;
        // It was to grow when something ended that.
        let ram = stored(&[&whole[..], &[0; 1 << 20]].concat()).await;
        let error = vhd::check(&ram, Repair::No).await.unwrap_err();
        assert!(error.to_string().contains("`tapdisk check -f vhd --repair all`"), "{error}");
        assert_eq!(Header::read(&ram).await.unwrap_err().to_string(), error.to_string());
        assert_eq!(vhd::check(&ram, Repair::All).await.unwrap().leaks_fixed, 1);
        assert!(contents(&ram).await == whole);
        // blktap had it open.
        let killed = [&whole[..last], &[0xc7; 512]].concat();
        let ram = stored(&killed).await;
        for repair in [Repair::No, Repair::Leaks] {
            let error = vhd::check(&ram, repair).await.unwrap_err().to_string();
            assert!(
                error.contains("0xc7") && error.contains("`tapdisk check -f vhd --repair all`"),
                "{error}"
            );
        }
        assert!(contents(&ram).await == killed);
        assert_eq!(vhd::check(&ram, Repair::All).await.unwrap().corruptions_fixed, 1);
        assert!(vhd::check(&ram, Repair::No).await.unwrap().is_clean());
        let found = contents(&ram).await;
        assert!(found[..last] == whole[..last]);
        judge(&found);
    });
}

#[test]
fn a_dynamic_image_without_both_footers_does_not_become_a_fixed_one() {
    run(async |handle| {
        let mut bytes = filled(&handle).await;
        let last = bytes.len() - 512;
        bytes[last..].fill(0xc7);
        bytes[..512].fill(0);
        let ram = stored(&bytes).await;
        assert!(vhd::check(&ram, Repair::All).await.is_err());
        assert!(contents(&ram).await == bytes);
    });
}
