//! Disks against arrays of bytes.

use super::*;

/// A sector of the disk, read as the specification says; none if the image has none.
fn sector(bytes: &[u8], sector: usize) -> Option<&[u8]> {
    let number = |at: usize, len: usize| {
        bytes[at..at + len].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let second = number(16, 8);
    let (table, block) = (number(second + 16, 8), number(second + 32, 4));
    let (index, within) = (sector * 512 / block, sector % (block / 512));
    let entry = number(table + index * 4, 4);
    if entry == 0xffff_ffff {
        return None;
    }
    let bitmap = entry * 512;
    let is_set = bytes[bitmap + within / 8] & (0x80 >> (within % 8)) != 0;
    let at = bitmap + (block / 4096).next_multiple_of(512).max(512) + within * 512;
    is_set.then(|| &bytes[at..at + 512])
}

/// Random operations against a model, with the image opened anew between, over each size of blocks.
#[test]
fn a_dynamic_disk_is_an_array_of_bytes() {
    for (seed, block) in [4096, 8192, 65536, 512 << 10, 2 << 20].into_iter().enumerate() {
        let folder = folder();
        let path = folder.path().join("a.vhd");
        let size = 7 * MIB + 1536;
        make(&path, Create { size, block, ..Create::default() }).unwrap();
        let mut model = vec![0; size as usize];
        let mut random = Random(seed as u64);
        for round in 0..6 {
            let at = path.clone();
            (model, random) = run(async move |handle| {
                let disk = disk(&handle, &at, true).await;
                change(&disk, &mut model, &mut random, 80).await;
                match round % 3 {
                    0 => disk.close().await.unwrap(),
                    1 => disk.flush().await.unwrap(),
                    // What was answered and not flushed is the ledger's; a tool that dies has none.
                    _ => disk.close().await.unwrap(),
                }
                drop(disk);
                (model, random)
            });
            let at = path.clone();
            let expected = model.clone();
            run(async move |handle| {
                let disk = disk(&handle, &at, false).await;
                assert!(all_of(&disk).await == expected, "round {round}, blocks of {block}");
            });
            assert!(bytes_by_qemu(&path) == model, "by QEMU, round {round}, blocks of {block}");
        }
        judge(&std::fs::read(&path).unwrap());
        let at = path.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        // What was not closed in order may have kept room for more blocks.
        assert!(report.is_safe(), "{report:?}");
    }
}

#[test]
fn a_differencing_disk_is_an_array_of_bytes_over_another() {
    for (seed, block) in [4096, 65536, 2 << 20].into_iter().enumerate() {
        let folder = folder();
        let (base, top) = (folder.path().join("base.vhd"), folder.path().join("top.vhd"));
        let size = 6 * MIB + 512;
        make(&base, Create { size: 5 * MIB, ..Create::default() }).unwrap();
        let mut random = Random(100 + seed as u64);
        let at = base.clone();
        let (below, mut random) = run(async move |handle| {
            let disk = disk(&handle, &at, true).await;
            let mut model = vec![0; 5 << 20];
            change(&disk, &mut model, &mut random, 40).await;
            disk.close().await.unwrap();
            (model, random)
        });
        let at = base.clone();
        let id = run(async move |handle| Header::read(&file(&handle, &at)).await.unwrap().unique_id());
        let changed = std::fs::metadata(&base).unwrap().modified().unwrap();
        let parent = Parent { name: "base.vhd".to_owned(), unique_id: Some(id), changed };
        let create = Create {
            size,
            block,
            subformat: Subformat::Differencing,
            parent: Some(parent),
            ..Create::default()
        };
        make(&top, create).unwrap();
        let mut model = below.clone();
        model.resize(size as usize, 0);
        for round in 0..5 {
            let (base, top) = (base.clone(), top.clone());
            (model, random) = run(async move |handle| {
                let image = open_image(&handle, file(&handle, &top), true).await.unwrap();
                let lower = open_image(&handle, file(&handle, &base), false).await.unwrap();
                let disk = Chain::over(&handle, Rc::new(image), vec![Rc::new(lower)]);
                assert!(all_of(&disk).await == model, "round {round}, blocks of {block}");
                change(&disk, &mut model, &mut random, 60).await;
                disk.close().await.unwrap();
                (model, random)
            });
        }
        let bytes = std::fs::read(&top).unwrap();
        judge(&bytes);
        for (number, expected) in model.chunks(512).enumerate() {
            let found = sector(&bytes, number).or(below.get(number * 512..(number + 1) * 512));
            assert!(found.unwrap_or(&[0; 512]) == expected, "sector {number} by the specification");
        }
        let at = top.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn a_block_that_was_given_a_place_and_nothing_else_reads_as_nothing() {
    run(async |handle| {
        let (ram, model) = sample(&handle, Create { size: 30 * MIB, ..Create::default() }).await;
        let whole = contents(&ram).await;
        let image = open_image(&handle, ram.clone(), false).await.unwrap();
        let absent = (0..15).find(|block| {
            let span = Span::new(block * 2 * MIB, 512).unwrap();
            image.mapped(span).is_some_and(|extent| matches!(extent, image::Extent::Zero { .. })) && {
                let entry = (1536 + block * 4) as usize;
                whole[entry..entry + 4] == [0xff; 4]
            }
        });
        let absent = absent.expect("not every block is written") as usize;
        for more in [0, 512, 512 + 4096] {
            // As blktap leaves it on a file system where it does not write zeroes beforehand, killed before the data came.
            let mut bytes = whole[..whole.len() - 512].to_vec();
            let place = (bytes.len() / 512) as u32;
            bytes[1536 + absent * 4..1536 + absent * 4 + 4].copy_from_slice(&place.to_be_bytes());
            bytes.resize(bytes.len() + more, 0);
            for writable in [false, true] {
                let left = stored(&bytes).await;
                let image = open_image(&handle, left.clone(), writable).await.unwrap();
                let disk = Chain::new(&handle, Rc::new(image));
                assert!(all_of(&disk).await == model, "{more} {writable}");
                if writable {
                    let at = absent as u64 * 2 * MIB;
                    disk.write(at + 100, Buf::from_bytes(&[9; 1000])).await.unwrap();
                    disk.close().await.unwrap();
                    let mut expected = model.clone();
                    expected[at as usize + 100..][..1000].fill(9);
                    let image = open_image(&handle, left.clone(), false).await.unwrap();
                    assert!(all_of(&Chain::new(&handle, Rc::new(image))).await == expected);
                    judge(&contents(&left).await);
                }
            }
            let report = vhd::check(&stored(&bytes).await, Repair::No).await.unwrap();
            // Where there is not even what blktap makes of a footer, the block may have been cut off.
            assert_eq!(report.is_safe(), more > 0, "{report:?}");
            let left = stored(&bytes).await;
            let repair = if more > 0 { Repair::Leaks } else { Repair::All };
            assert!(vhd::check(&left, repair).await.unwrap().is_safe());
            let report = vhd::check(&left, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
        }
    });
}

#[test]
fn what_the_bitmap_leaves_out_is_zero_whatever_is_there() {
    run(async |handle| {
        // As blktap leaves it on a block device: old bytes under clear bits.
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(
            &ram,
            &Create { size: 2 * MIB, preallocation: Preallocation::Metadata, ..Create::default() },
        )
        .await
        .unwrap();
        let mut bytes = contents(&ram).await;
        let place = bytes[1536..1540].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte)) * 512;
        bytes[place..place + 512].fill(0);
        bytes[place] = 0b0100_0000;
        bytes[place + 512..place + 512 + (2 << 20)].fill(0xee);
        let foreign = stored(&bytes).await;
        let image = open_image(&handle, foreign.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        let mut model = vec![0; 2 << 20];
        model[512..1024].fill(0xee);
        assert!(all_of(&disk).await == model);
        // A part of a sector: the rest of it is not what was there.
        disk.write(2000, Buf::from_bytes(&[1; 100])).await.unwrap();
        model[2000..2100].fill(1);
        assert!(all_of(&disk).await == model);
        let mut random = Random(3);
        change(&disk, &mut model, &mut random, 200).await;
        disk.close().await.unwrap();
        let bytes = contents(&foreign).await;
        for (number, expected) in model.chunks(512).enumerate() {
            assert!(sector(&bytes, number).unwrap_or(&[0; 512]) == expected, "sector {number}");
        }
    });
}

#[test]
fn requests_do_not_reach_the_footer_of_a_fixed_image() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: MIB, subformat: Subformat::Fixed, ..Create::default() })
            .await
            .unwrap();
        let footer = contents(&ram).await[MIB as usize..].to_vec();
        let image = open_image(&handle, ram.clone(), true).await.unwrap();
        assert_eq!(image.size(), MIB);
        let disk = Chain::new(&handle, Rc::new(image));
        storage::conformance::check(&disk, 8, 300).await;
        disk.close().await.unwrap();
        assert!(contents(&ram).await[MIB as usize..] == footer);
    });
}

#[test]
fn disks_behave_as_storages_do() {
    run(async |handle| {
        for block in [4096, 65536, 2 << 20] {
            let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
            vhd::create(&ram, &Create { size: 3 * MIB, block, ..Create::default() }).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(open_image(&handle, ram.clone(), true).await.unwrap()));
            storage::conformance::check(&disk, 7, 300).await;
            let below = Ram::new(3 * MIB);
            below.write(0, Buf::from_bytes(&vec![0; 3 << 20])).await.unwrap();
            let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
            let parent = Parent { name: "x".to_owned(), unique_id: None, changed: std::time::UNIX_EPOCH };
            let create = Create {
                size: 3 * MIB,
                block,
                subformat: Subformat::Differencing,
                parent: Some(parent),
                ..Create::default()
            };
            vhd::create(&ram, &create).await.unwrap();
            let top = open_image(&handle, ram, true).await.unwrap();
            let disk = Chain::over(&handle, Rc::new(top), vec![Rc::new(Raw::new(Rc::new(below)))]);
            storage::conformance::check(&disk, 7, 300).await;
        }
    });
}

#[test]
fn writes_side_by_side_lose_nothing() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    for below in [false, true] {
        let at = path.clone();
        run(async move |handle| {
            let storage = file(&handle, &at);
            let bytes = empty(65536, below).await;
            storage.resize(0).await.unwrap();
            storage.resize(bytes.len() as u64).await.unwrap();
            storage.write(0, Buf::from_bytes(&bytes)).await.unwrap();
            let disk = over(&handle, storage.clone(), below).await;
            let fill = if below { 0x77 } else { 0 };
            let mut model: Vec<u8> = vec![fill; 1 << 20];
            let mut random = Random(9);
            for _ in 0..20 {
                // Neighbours that share sectors and blocks, in any order.
                let mut at = random.below(900_000);
                let mut pieces = Vec::new();
                for _ in 0..40 {
                    let len = 1 + random.below(3000);
                    pieces.push((at, vec![random.next() as u8; len as usize]));
                    at += len;
                }
                for (at, bytes) in &pieces {
                    model[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
                }
                for number in (1..pieces.len()).rev() {
                    pieces.swap(number, random.below(number as u64 + 1) as usize);
                }
                let writes = pieces.iter().map(|(at, bytes)| disk.write(*at, Buf::from_bytes(bytes)));
                for result in runtime::join_all(writes.collect()).await {
                    result.unwrap();
                }
            }
            assert!(all_of(&disk).await == model);
            disk.close().await.unwrap();
            drop(disk);
            judge(&contents(&storage).await);
            assert!(all_of(&over(&handle, storage, below).await).await == model);
        });
    }
}
