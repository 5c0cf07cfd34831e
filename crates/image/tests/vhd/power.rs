//! Failing storages, power cuts, and block devices.

use image::metadata::{Change, Ledger};

use super::*;

/// Memory that keeps what was synced apart from what was not, and fails or stays as long as it is when told to.
struct Disk {
    ram: Ram,
    /// What was done since the last sync; a size, or bytes from a place on.
    undone: RefCell<Vec<Step>>,
    /// What is durable.
    durable: RefCell<Vec<u8>>,
    /// So many changes go well before one fails, with this error; after it all go well again.
    fails: Cell<Option<(usize, Errno)>>,
    is_device: bool,
}

#[derive(Clone)]
enum Step {
    Size(u64),
    Bytes(u64, Vec<u8>),
}

impl Disk {
    async fn new(bytes: &[u8], is_device: bool) -> Rc<Disk> {
        let ram = Ram::new(bytes.len() as u64);
        ram.write(0, Buf::from_bytes(bytes)).await.unwrap();
        let durable = RefCell::new(bytes.to_vec());
        Rc::new(Disk { ram, undone: RefCell::default(), durable, fails: Cell::new(None), is_device })
    }

    fn done(&self, step: Step) -> IoResult<()> {
        match self.fails.get() {
            Some((0, errno)) => {
                self.fails.set(None);
                Err(Error::new(errno, "as told"))
            }
            left => {
                self.fails.set(left.map(|(left, errno)| (left - 1, errno)));
                self.undone.borrow_mut().push(step);
                Ok(())
            }
        }
    }

    /// What a power cut leaves: of what was not synced the first steps, or some sectors of each.
    fn after_power_cut(&self, random: &mut Random) -> Vec<u8> {
        let mut bytes = self.durable.borrow().clone();
        let undone = self.undone.borrow();
        let all = random.below(3) == 0;
        let first = random.below(undone.len() as u64 + 1) as usize;
        for (number, step) in undone.iter().enumerate() {
            match step {
                _ if all && number >= first => break,
                Step::Size(size) if all || random.below(2) == 0 => bytes.resize(*size as usize, 0),
                Step::Size(_) => {}
                Step::Bytes(at, written) => {
                    for (number, sector) in written.chunks(512).enumerate() {
                        let at = *at as usize + number * 512;
                        if all || random.below(2) == 0 {
                            if bytes.len() < at + sector.len() {
                                bytes.resize(at + sector.len(), 0);
                            }
                            bytes[at..at + sector.len()].copy_from_slice(sector);
                        }
                    }
                }
            }
        }
        bytes
    }
}

impl Storage for Disk {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn limits(&self) -> Limits {
        self.ram.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.ram.read(at, buf)
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        match self.done(Step::Bytes(at, buf.to_vec())) {
            Ok(()) => self.ram.write(at, buf),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    fn zero(&self, span: Span, _how: Zeroing) -> Io<'_> {
        self.write(span.at(), Buf::zeroed(span.len() as usize))
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.write(span.at(), Buf::zeroed(span.len() as usize))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            let buf = Buf::zeroed(self.size() as usize);
            self.ram.read(0, buf.clone()).await?;
            *self.durable.borrow_mut() = buf.to_vec();
            self.undone.borrow_mut().clear();
            Ok(())
        })
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.ram.extents(span)
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.ram.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.ram.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        if self.is_device {
            let too_much = bytes > self.size();
            let result = if too_much { Err(Error::new(Errno::ENOSPC, "a device")) } else { Ok(()) };
            return Box::pin(std::future::ready(result));
        }
        match self.done(Step::Size(bytes)) {
            Ok(()) => self.ram.resize(bytes),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}

#[test]
fn a_failed_step_of_a_first_write_leaves_the_old_bytes_or_the_new_ones() {
    run(async |handle| {
        for (block, below) in [(4096, false), (65536, false), (65536, true)] {
            let made = empty(block, below).await;
            for step in 0..10 {
                for errno in [Errno::ENOSPC, Errno::EIO] {
                    let storage = Disk::new(&made, false).await;
                    let disk = over(&handle, storage.clone(), below).await;
                    let fill = if below { 0x77 } else { 0 };
                    let mut model = vec![fill; 1 << 20];
                    disk.write(300_100, Buf::from_bytes(&[1; 700])).await.unwrap();
                    model[300_100..300_800].fill(1);
                    disk.flush().await.unwrap();
                    storage.fails.set(Some((step, errno)));
                    let written = disk.write(600_100, Buf::from_bytes(&[2; 70_000])).await;
                    let failed = storage.fails.replace(None).is_none();
                    // For more blocks than are needed there need not be space.
                    let is_needed = errno != Errno::ENOSPC || written.is_err();
                    assert_eq!(
                        written.is_err(),
                        failed && is_needed,
                        "a failure is told, and nothing else is"
                    );
                    let found = all_of(&disk).await;
                    for (at, byte) in found.iter().enumerate() {
                        let is_new = (600_100..670_100).contains(&at) && *byte == 2;
                        assert!(*byte == model[at] || is_new, "byte {at} after step {step}");
                    }
                    if written.is_err() {
                        // A footer is to be found whatever happens next.
                        let left = stored(&contents(&(storage.clone() as Rc<dyn Storage>)).await).await;
                        assert!(Header::read(&left).await.is_ok());
                        let report = vhd::check(&left, Repair::No).await.unwrap();
                        assert!(report.is_safe(), "{report:?}");
                    }
                    disk.write(600_100, Buf::from_bytes(&[2; 70_000])).await.unwrap();
                    model[600_100..670_100].fill(2);
                    assert!(all_of(&disk).await == model, "once there is space again");
                    disk.close().await.unwrap();
                    let storage: Rc<dyn Storage> = storage;
                    judge(&contents(&storage).await);
                    let report = vhd::check(&storage, Repair::No).await.unwrap();
                    assert!(report.is_safe(), "{report:?}");
                    assert!(all_of(&over(&handle, storage, below).await).await == model);
                }
            }
        }
    });
}

#[test]
fn after_a_power_cut_what_was_flushed_is_there() {
    run(async |handle| {
        for seed in 0..120u64 {
            let (block, below) =
                [(4096, false), (65536, false), (65536, true), (4096, true)][seed as usize % 4];
            let storage = Disk::new(&empty(block, below).await, false).await;
            let mut random = Random(seed);
            let fill = if below { 0x77 } else { 0 };
            let mut model: Vec<u8> = vec![fill; 1 << 20];
            let mut possible: Vec<Vec<u8>> = vec![model.clone()];
            let disk = over(&handle, storage.clone(), below).await;
            for _ in 0..40 {
                let at = random.below(MIB / 512 - 40) * 512;
                let len = 512 * (1 + random.below(40)) as usize;
                let byte = 1 + random.below(250) as u8;
                if random.below(6) == 0 {
                    disk.flush().await.unwrap();
                    possible = vec![model.clone()];
                }
                disk.write(at, Buf::from_bytes(&vec![byte; len])).await.unwrap();
                model[at as usize..at as usize + len].fill(byte);
                possible.push(model.clone());
            }
            if random.below(2) == 0 {
                // In the middle of a round.
                storage.fails.set(Some((random.below(6) as usize, Errno::EIO)));
                let flushed = disk.flush().await;
                if flushed.is_ok() {
                    possible = vec![model.clone()];
                }
                storage.fails.set(None);
            }
            for _ in 0..6 {
                let left = stored(&storage.after_power_cut(&mut random)).await;
                let report = vhd::check(&left, Repair::No).await.unwrap();
                assert!(report.is_safe(), "seed {seed}: {report:?}");
                let found = all_of(&over(&handle, left.clone(), below).await).await;
                for (number, sector) in found.chunks(512).enumerate() {
                    let is_possible = possible.iter().any(|bytes| &bytes[number * 512..][..512] == sector);
                    assert!(is_possible, "seed {seed}: sector {number} is what it never was");
                }
                vhd::check(&left, Repair::Leaks).await.unwrap();
                let report = vhd::check(&left, Repair::Leaks).await.unwrap();
                assert_eq!(report.leaks_fixed, 0, "seed {seed}: repaired once is repaired: {report:?}");
                // What is written next damages nothing.
                let disk = over(&handle, left.clone(), below).await;
                let mut model = all_of(&disk).await;
                change(&disk, &mut model, &mut random, 20).await;
                disk.close().await.unwrap();
                drop(disk);
                assert!(all_of(&over(&handle, left.clone(), below).await).await == model, "seed {seed}");
                judge(&contents(&left).await);
            }
        }
    });
}

#[test]
fn a_resize_that_a_power_cut_ends_leaves_the_old_disk_or_the_new_one() {
    run(async |handle| {
        for seed in 0..60u64 {
            let subformat = if seed % 3 == 0 { Subformat::Fixed } else { Subformat::Dynamic };
            let create = Create { size: MIB, block: 4096, subformat, ..Create::default() };
            let (ram, model) = sample(&handle, create).await;
            let mut random = Random(seed);
            let storage = Disk::new(&contents(&ram).await, false).await;
            let size = MIB + 512 * (1 + random.below(9000));
            storage.fails.set(Some((random.below(60) as usize, Errno::EIO)));
            let result = vhd::resize(&(storage.clone() as Rc<dyn Storage>), size).await;
            let whole = result.is_ok() && storage.undone.borrow().is_empty();
            for _ in 0..4 {
                let left = stored(&storage.after_power_cut(&mut random)).await;
                if subformat == Subformat::Fixed && Header::read(&left).await.is_err() {
                    // There is no copy of its footer; the old one is found.
                    assert_eq!(vhd::check(&left, Repair::Leaks).await.unwrap().leaks_fixed, 1);
                }
                let header = Header::read(&left).await.unwrap();
                let new = header.size() == size;
                assert!(new || header.size() == MIB && !whole, "seed {seed}: {}", header.size());
                let report = vhd::check(&left, Repair::No).await.unwrap();
                assert!(report.is_safe(), "seed {seed}: {report:?}");
                let image = open_image(&handle, left.clone(), true).await.unwrap();
                let found = all_of(&Chain::new(&handle, Rc::new(image))).await;
                assert!(found[..1 << 20] == model, "seed {seed}");
                assert!(
                    found[1 << 20..].iter().all(|byte| *byte == 0),
                    "seed {seed}: what was added is zero"
                );
                vhd::resize(&left, size).await.unwrap();
                assert_eq!(Header::read(&left).await.unwrap().size(), size);
            }
        }
    });
}

#[test]
fn on_a_block_device_blocks_come_between_header_and_footer() {
    run(async |handle| {
        for preallocation in [Preallocation::Off, Preallocation::Metadata] {
            let storage = Disk::new(&vec![0xee; 3 << 20], true).await;
            let device: Rc<dyn Storage> = storage.clone();
            let create = Create { size: 2 * MIB, block: 65536, preallocation, ..Create::default() };
            vhd::create(&device, &create).await.unwrap();
            judge(&contents(&device).await);
            let disk = over(&handle, device.clone(), false).await;
            let mut model = vec![0; 2 << 20];
            assert!(all_of(&disk).await == model);
            change(&disk, &mut model, &mut Random(5), 200).await;
            disk.close().await.unwrap();
            drop(disk);
            judge(&contents(&device).await);
            assert_eq!(device.size(), 3 * MIB);
            let before = contents(&device).await;
            for repair in [Repair::No, Repair::Leaks] {
                let report = vhd::check_device(&device, repair).await.unwrap();
                assert!(report.is_clean() && report.leaks_fixed == 0, "it is as long as it is: {report:?}");
            }
            assert!(contents(&device).await == before);
            assert!(all_of(&over(&handle, device.clone(), false).await).await == model);
        }
        // A device that is too small for the disk: full is ENOSPC, and what was written stays.
        let device: Rc<dyn Storage> = Disk::new(&vec![0xee; 1 << 20], true).await;
        vhd::create(&device, &Create { size: 4 * MIB, block: 65536, ..Create::default() }).await.unwrap();
        let disk = over(&handle, device.clone(), false).await;
        let mut written = 0;
        let error = loop {
            match disk.write(written, Buf::from_bytes(&[4; 65536])).await {
                Ok(()) => written += 65536,
                Err(error) => break error,
            }
        };
        assert_eq!(error.errno(), Errno::ENOSPC);
        assert!(written >= 8 * 65536, "{written}");
        disk.flush().await.unwrap();
        assert!(all_of(&disk).await[..written as usize].iter().all(|byte| *byte == 4));
        judge(&contents(&device).await);
    });
}

/// Notes of a process that has died, kept outside of it.
#[derive(Clone, Default)]
struct Notes(Rc<RefCell<Vec<Change>>>, Rc<Cell<usize>>);

impl Ledger for Notes {
    fn changes(&self) -> std::io::Result<Vec<Change>> {
        Ok(self.0.borrow().clone())
    }

    fn is_whole(&self) -> std::io::Result<bool> {
        Ok(true)
    }

    fn note(&self, group: &[Change]) -> std::io::Result<()> {
        self.0.borrow_mut().extend(group);
        Ok(())
    }

    fn begin(&self) {
        self.1.set(self.0.borrow().len());
    }

    fn end(&self) -> bool {
        self.0.borrow_mut().drain(..self.1.get());
        true
    }
}

#[test]
fn what_was_answered_is_there_after_the_death_of_the_process() {
    run(async |handle| {
        for seed in 0..60u64 {
            let (block, below) =
                [(4096, false), (65536, true), (4096, true), (1 << 20, true)][seed as usize % 4];
            let mut image = empty(block, below).await;
            let notes = Notes::default();
            let mut random = Random(seed);
            let fill = if below { 0x77 } else { 0 };
            let mut model: Vec<u8> = vec![fill; 1 << 20];
            for life in 0..5 {
                // What the process before has left, without an end of any kind.
                let storage = stored(&image).await;
                let header = Header::read(&storage).await.unwrap();
                let ledger: Box<dyn Ledger> = Box::new(notes.clone());
                let settings = Settings { writable: true, lasting: true, ledger: Some(ledger), cache: 0 };
                let top = Vhd::open(&handle, header, storage.clone(), settings).await.unwrap();
                let below =
                    if below { vec![Rc::new(Raw::new(stored(&[0x77; 1 << 20]).await)) as _] } else { vec![] };
                let disk = Chain::over(&handle, Rc::new(top), below);
                assert!(all_of(&disk).await == model, "seed {seed}, life {life}");
                change(&disk, &mut model, &mut random, 30).await;
                image = contents(&storage).await;
            }
        }
    });
}

#[test]
fn a_place_that_was_given_back_is_clean_when_it_is_used_again() {
    run(async |handle| {
        for below in [false, true] {
            let storage = stored(&empty(65536, below).await).await;
            let image = Rc::new(open_image(&handle, storage.clone(), true).await.unwrap());
            let fill = if below { 0x77 } else { 0 };
            let mut model: Vec<u8> = vec![fill; 1 << 20];
            let disk = {
                let raw = stored(&[0x77; 1 << 20]).await;
                let lower: Vec<Rc<dyn Image>> = if below { vec![Rc::new(Raw::new(raw))] } else { vec![] };
                Chain::over(&handle, image.clone(), lower)
            };
            // A part of what was to be written came there, then the rest failed.
            let placement = image.place(Span::new(200_000, 30_000).unwrap()).await.unwrap();
            storage.write(placement.at, Buf::from_bytes(&[0xbd; 20_000])).await.unwrap();
            image.give_up(placement);
            let length = storage.size();
            disk.write(500_100, Buf::from_bytes(&[1; 100])).await.unwrap();
            model[500_100..500_200].fill(1);
            assert_eq!(storage.size(), length, "the place is used again");
            assert!(all_of(&disk).await == model);
            // Another one is given back by the end: the file ends before it.
            let placement = image.place(Span::new(800_000, 100).unwrap()).await.unwrap();
            image.give_up(placement);
            disk.close().await.unwrap();
            drop((disk, image));
            judge(&contents(&storage).await);
            let report = vhd::check(&storage, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            // QEMU does not look at bitmaps: what is not written is zero for it too.
            let bytes = contents(&storage).await;
            assert!(!bytes.windows(8).any(|some| some == [0xbd; 8]), "nothing is left of it");
            assert!(all_of(&over(&handle, storage, below).await).await == model);
        }
    });
}

#[test]
fn what_a_killed_process_grew_is_tidied_up_by_the_next() {
    run(async |handle| {
        for (block, writes) in [(65536, 1), (65536, 3), (2 << 20, 1)] {
            let storage = stored(&empty(block, false).await).await;
            let disk = over(&handle, storage.clone(), false).await;
            for at in 0..writes {
                disk.write(at * 65536, Buf::from_bytes(&[3; 4096])).await.unwrap();
            }
            disk.flush().await.unwrap();
            let left = stored(&contents(&storage).await).await;
            assert!(vhd::check(&left, Repair::No).await.unwrap().leaks > 0);
            over(&handle, left.clone(), false).await.close().await.unwrap();
            let report = vhd::check(&left, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            assert_eq!(left.size(), report.image_end_offset);
            judge(&contents(&left).await);
        }
    });
}

#[test]
fn a_fixed_image_that_cannot_grow_stays_as_it_is() {
    run(async |_| {
        for step in 0..4 {
            for errno in [Errno::ENOSPC, Errno::EIO] {
                let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
                let create = Create { size: MIB, subformat: Subformat::Fixed, ..Create::default() };
                vhd::create(&ram, &create).await.unwrap();
                let whole = contents(&ram).await;
                let storage = Disk::new(&whole, false).await;
                storage.fails.set(Some((step, errno)));
                let file: Rc<dyn Storage> = storage.clone();
                let result = vhd::resize(&file, 3 * MIB).await;
                assert!(result.is_err(), "step {step}");
                assert_eq!(Header::read(&file).await.unwrap().size(), MIB, "step {step}");
                if step < 2 {
                    assert!(contents(&file).await == whole, "step {step}");
                }
                vhd::resize(&file, 3 * MIB).await.unwrap();
                judge(&contents(&file).await);
            }
        }
    });
}
