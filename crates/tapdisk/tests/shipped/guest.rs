//! A guest's driver at the binary's vhost-user socket, over storage that fails on command.

use nbd_client::{Request as NbdRequest, Style};
use rustix::process::Signal;
use vhost_client::{Driver, Request, Status, Wish, feature};

use crate::server::{
    Ask, Bytes, CACHES, IMAGE, Server, durable, mount, pattern, rule, stored, syncs, tapdisk, wait_until,
    zeroes,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Requests of a driver whose device is expected to last.
pub(crate) trait AskDevice {
    fn status(&mut self, request: &Request) -> Status;
    fn read(&mut self, at: u64, len: u64) -> Result<Bytes, Status>;
    fn write(&mut self, at: u64, bytes: &[u8]) -> Status;
    fn flush(&mut self) -> Status;
}

impl AskDevice for Driver {
    #[track_caller]
    fn status(&mut self, request: &Request) -> Status {
        self.ask(request).expect("the device lasts").status
    }

    #[track_caller]
    fn read(&mut self, at: u64, len: u64) -> Result<Bytes, Status> {
        let answer = self.ask(&Request::read(at, len as usize)).expect("the device lasts");
        if answer.status == Status::OK { Ok(Bytes(answer.bytes)) } else { Err(answer.status) }
    }

    #[track_caller]
    fn write(&mut self, at: u64, bytes: &[u8]) -> Status {
        self.status(&Request::write(at, bytes))
    }

    #[track_caller]
    fn flush(&mut self) -> Status {
        self.status(&Request::flush())
    }
}

/// With each cache, on a disk whose first megabytes are written.
fn everywhere(test: impl Fn(&faultfs::FaultFs, &mut Driver, &str)) {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::for_guest(&fs, &["--cache", cache]);
        let mut driver = server.guest(&Wish::default());
        for at in (0..4 * MIB).step_by(256 << 10) {
            assert_eq!(driver.write(at, &pattern(at, 256 * KIB, 1)), Status::OK);
        }
        test(&fs, &mut driver, cache);
        drop(driver);
        assert!(server.stop().status.success(), "{cache}");
    }
}

#[test]
fn what_a_guest_does_is_in_the_image() {
    everywhere(|fs, driver, cache| {
        assert_eq!(stored(fs, 0, 4 * MIB), pattern(0, 4 * MIB, 1), "{cache}");
        for (at, len, skew) in [(512, 512, 0), (4096, 4096, 0), (MIB - 512, 66_048, 0), (8192, 8192, 1)] {
            let write = Request::write(at, &pattern(at, len, 2)).skewed(skew).cut_out(&[16, 512]);
            assert_eq!(driver.status(&write), Status::OK, "{cache}");
            assert_eq!(stored(fs, at, len), pattern(at, len, 2), "{cache}");
            let read = Request::read(at, len as usize).skewed(skew).cut_in(&[256, 768]);
            assert_eq!(Bytes(driver.ask(&read).unwrap().bytes), pattern(at, len, 2), "{cache}");
        }
        assert_eq!(driver.status(&Request::zeroes(2 * MIB, 64 * KIB, true)), Status::OK);
        assert_eq!(stored(fs, 2 * MIB, 64 * KIB), zeroes(64 * KIB), "{cache}");
        assert_eq!(driver.status(&Request::discard(3 * MIB, MIB)), Status::OK);
        assert_eq!(stored(fs, 3 * MIB, MIB), zeroes(MIB), "{cache}: a hole");
        assert_eq!(driver.read(3 * MIB, MIB), Ok(zeroes(MIB)), "{cache}");
        assert_eq!(driver.read(2 * MIB - 512, 512), Ok(pattern(2 * MIB - 512, 512, 1)), "{cache}");
        let id = driver.ask(&Request::id()).unwrap().bytes;
        assert!(id.starts_with(b"disk.img") || id.ends_with(b"disk.img"), "{id:?}");
    });
}

#[test]
fn each_flush_of_a_guest_is_a_sync_of_the_storage() {
    everywhere(|fs, driver, cache| {
        for number in 0..5 {
            let before = syncs(fs);
            assert_eq!(driver.write(number * 4096, &pattern(0, 4096, 3)), Status::OK);
            assert_eq!(syncs(fs), before, "{cache}: a write is answered from the cache");
            assert_eq!(driver.flush(), Status::OK);
            assert_eq!(syncs(fs), before + 1, "{cache}: and a flush makes it durable");
            assert_eq!(durable(fs, number * 4096, 4096), pattern(0, 4096, 3), "{cache}");
        }
    });
}

#[test]
fn with_the_write_cache_off_each_change_is_synced_before_its_answer() {
    everywhere(|fs, driver, cache| {
        let before = syncs(fs);
        driver.set_writeback(false).unwrap();
        wait_until("what was written before is made durable", || syncs(fs) > before);
        for number in 0..5 {
            let at = number * 4096;
            for (request, expected) in [
                (Request::write(at, &pattern(at, 4096, 4)), pattern(at, 4096, 4)),
                (Request::zeroes(at, 4096, false), zeroes(4096)),
            ] {
                let before = syncs(fs);
                assert_eq!(driver.status(&request), Status::OK);
                assert_eq!(syncs(fs), before + 1, "{cache}");
                assert_eq!(durable(fs, at, 4096), expected, "{cache}");
            }
        }
    });
}

#[test]
fn with_the_write_cache_off_a_write_whose_sync_fails_is_an_error() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::for_guest(&fs, &["--cache", cache]);
        let mut driver = server.guest(&Wish::default());
        driver.set_writeback(false).unwrap();
        assert_eq!(driver.write(0, &pattern(0, 4096, 1)), Status::OK);
        rule(&fs, "fsync:EIO:once,lose");
        assert_eq!(driver.write(0, &[1; 4096]), Status::IOERR, "{cache}: not durable, so not done");
        assert_eq!(driver.write(4096, &[1; 4096]), Status::IOERR, "{cache}: nor is anything after it");
        drop(driver);
        assert_eq!(server.stop().status.code(), Some(1), "{cache}");
    }
}

#[test]
fn each_errno_of_the_storage_is_an_error_to_a_guest_and_only_to_that_request() {
    everywhere(|fs, driver, cache| {
        for errno in
            ["EIO", "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EPERM", "EACCES", "EINVAL", "ENXIO", "ETIMEDOUT"]
        {
            rule(fs, &format!("read+write:{errno}:0..4096"));
            assert_eq!(driver.write(0, &[1; 4096]), Status::IOERR, "{cache}, {errno}");
            assert_eq!(driver.read(0, 4096), Err(Status::IOERR), "{cache}, {errno}");
            assert_eq!(driver.write(4096, &pattern(4096, 4096, 1)), Status::OK, "{cache}, {errno}");
            assert_eq!(driver.read(4096, 4096), Ok(pattern(4096, 4096, 1)), "{cache}, {errno}");
            fs.clear();
            assert_eq!(driver.read(0, 4096), Ok(pattern(0, 4096, 1)), "{cache}: nothing was written");
        }
        for errno in ["EIO", "ENOSPC", "EPERM"] {
            rule(fs, &format!("fallocate:{errno}"));
            assert_eq!(driver.status(&Request::zeroes(0, 4096, true)), Status::IOERR, "{cache}, {errno}");
            assert_eq!(driver.status(&Request::discard(0, 4096)), Status::IOERR, "{cache}, {errno}");
            fs.clear();
        }
    });
}

#[test]
fn what_the_file_system_cannot_do_is_done_otherwise() {
    everywhere(|fs, driver, cache| {
        rule(fs, "fallocate:EOPNOTSUPP");
        for unmap in [false, true] {
            assert_eq!(driver.write(MIB, &pattern(MIB, MIB, 1)), Status::OK);
            assert_eq!(driver.status(&Request::zeroes(MIB, MIB, unmap)), Status::OK, "{cache}");
            assert_eq!(stored(fs, MIB, MIB), zeroes(MIB), "{cache}: zeroes were written");
        }
        assert_eq!(driver.status(&Request::discard(0, MIB)), Status::OK, "{cache}: a discard is a hint");
        assert_eq!(driver.read(0, MIB), Ok(pattern(0, MIB, 1)), "{cache}");
        rule(fs, "write:EIO:2M..");
        assert_eq!(driver.status(&Request::zeroes(2 * MIB, 4096, true)), Status::IOERR, "{cache}");
        fs.clear();
    });
}

#[test]
fn a_full_disk_is_an_error_to_a_guest_and_nothing_is_acknowledged_falsely() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::for_guest(&fs, &["--cache", cache]);
        let mut driver = server.guest(&Wish { queues: 2, ..Wish::default() });
        assert_eq!(driver.write(4 * MIB, &pattern(0, 64 * KIB, 9)), Status::OK);
        fs.set_capacity(Some(320 * KIB));
        let contents: Vec<_> = (0..16).map(|number| pattern(number * 64 * KIB, 64 * KIB, 5)).collect();
        let tickets: Vec<_> = (0..16)
            .map(|number| {
                let write = Request::write(number as u64 * 64 * KIB, &contents[number]);
                driver.send(number % 2, &write).unwrap()
            })
            .collect();
        let told: Vec<_> =
            driver.wait_all(&tickets).unwrap().into_iter().map(|answer| answer.status).collect();
        let written = told.iter().filter(|status| **status == Status::OK).count();
        assert!(written <= 4, "{cache}: there is no room for {written} of them");
        assert!(told.iter().all(|status| [Status::OK, Status::IOERR].contains(status)), "{told:?}");
        assert_eq!(
            driver.write(4 * MIB, &pattern(0, 64 * KIB, 8)),
            Status::OK,
            "what needs no space goes on"
        );
        assert_eq!(driver.flush(), Status::OK);
        drop(driver);
        assert!(server.stop().status.success());
        fs.set_capacity(None);
        let server = Server::for_guest(&fs, &["--cache", cache]);
        let mut driver = server.guest(&Wish::default());
        for (number, status) in told.into_iter().enumerate() {
            let read = driver.read(number as u64 * 64 * KIB, 64 * KIB).unwrap();
            assert!(status == Status::IOERR || read == contents[number], "{cache}: {number}");
        }
        assert_eq!(driver.read(4 * MIB, 64 * KIB), Ok(pattern(0, 64 * KIB, 8)), "{cache}");
        drop(driver);
        assert!(server.stop().status.success());
    }
}

#[test]
fn one_flush_covers_what_guests_and_clients_of_nbd_were_told() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::for_guest(&fs, &["--cache", cache]);
        let mut driver = server.guest(&Wish { queues: 2, ..Wish::default() });
        let mut client = server.client(Style::Structured);
        for turn in 0..4_u64 {
            let (ours, theirs) = (turn * 8192, turn * 8192 + 4096);
            assert_eq!(driver.write(ours, &pattern(ours, 4096, 1)), Status::OK);
            assert_eq!(Ask::write(&mut client, theirs, &pattern(theirs, 4096, 2)), Ok(()));
            assert_eq!(Ask::read(&mut client, ours, 4096), Ok(pattern(ours, 4096, 1)), "{cache}");
            assert_eq!(AskDevice::read(&mut driver, theirs, 4096), Ok(pattern(theirs, 4096, 2)), "{cache}");
            let before = syncs(&fs);
            match turn % 2 {
                0 => assert_eq!(AskDevice::flush(&mut driver), Status::OK),
                _ => assert_eq!(Ask::flush(&mut client), Ok(())),
            }
            assert_eq!(syncs(&fs), before + 1, "{cache}: one sync");
            assert_eq!(durable(&fs, ours, 4096), pattern(ours, 4096, 1), "{cache}");
            assert_eq!(durable(&fs, theirs, 4096), pattern(theirs, 4096, 2), "{cache}");
        }
        // A flush that fails for one has failed for all.
        assert_eq!(driver.write(0, &pattern(0, 4096, 3)), Status::OK);
        rule(&fs, "fsync:EIO:once,lose");
        assert!(Ask::flush(&mut client).is_err());
        assert_eq!(AskDevice::flush(&mut driver), Status::IOERR, "{cache}");
        assert_eq!(driver.write(0, &[1; 4096]), Status::IOERR, "{cache}");
        assert!(client.ask(&NbdRequest::write(0, &[1; 4096])).unwrap().is_err(), "{cache}");
        drop(driver);
        assert_eq!(server.stop().status.code(), Some(1));
    }
}

#[test]
fn a_guest_is_told_when_its_disk_grows() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::for_guest(&fs, &["--cache", cache]);
        let mut driver = server.guest(&Wish::default());
        driver.link.listen().unwrap();
        assert_eq!(driver.config().unwrap().capacity(), 8 * MIB / 512);
        assert_eq!(driver.write(8 * MIB, &[1; 512]), Status::IOERR);
        for size in [9 * MIB, 12 * MIB] {
            let image = std::fs::File::options().write(true).open(fs.path().join(IMAGE)).unwrap();
            image.set_len(size).unwrap();
            server.signal(Signal::HUP);
            driver.link.wait_for_news().unwrap();
            assert_eq!(driver.config().unwrap().capacity(), size / 512, "{cache}");
            let last = size - 4096;
            assert_eq!(driver.write(last, &pattern(last, 4096, 1)), Status::OK, "{cache}");
            assert_eq!(stored(&fs, last, 4096), pattern(last, 4096, 1), "{cache}");
            assert_eq!(driver.write(size, &[1; 512]), Status::IOERR, "{cache}");
        }
        drop(driver);
        assert!(server.stop().status.success());
    }
}

#[test]
fn the_command_line_says_what_a_guest_sees() {
    let Some(fs) = mount() else { return };
    drop(Server::for_guest(&fs, &[]));
    let image = fs.path().join(IMAGE);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("guest.sock");
    let state = directory.path().join("state");
    let mut command = tapdisk(["serve", "--read-only", "--block-size", "4096", "--queues", "2"]);
    command.arg(&image).arg("--vhost-user").arg(&socket).arg("--state-dir").arg(state);
    let server = Server::run(command, directory, Some(&fs));
    server.wait_ready();
    assert!(!server.socket().exists(), "without --nbd there is no NBD");
    let mut driver = Driver::connect(&socket, &Wish { queues: 2, ..Wish::default() }).unwrap();
    let config = driver.config().unwrap();
    assert_eq!((config.capacity(), config.blk_size(), config.num_queues()), (8 * MIB / 512, 4096, 2));
    assert_eq!(driver.link.features() & feature::RO, feature::RO);
    assert_eq!(driver.write(0, &[1; 4096]), Status::IOERR);
    assert_eq!(driver.status(&Request::discard(0, 4096)), Status::UNSUPP);
    assert_eq!(driver.read(0, 512), Err(Status::IOERR), "less than a block");
    assert_eq!(driver.read(4096, 4096), Ok(zeroes(4096)));
    drop(driver);
    let refused = Driver::connect(&socket, &Wish { queues: 3, ..Wish::default() });
    assert!(refused.is_err(), "there are two queues");
    assert!(server.stop().status.success());
}
