//! What the disk says of itself, and the one thing that a guest may change: its write cache.

use block::OpKind;
use vhost_client::{Driver, Request, Status, Wish, feature};

use crate::disk::Seen;
use crate::serve::{ID, Plan, Served};

fn connect(served: &Served) -> Driver {
    Driver::connect(&served.vhost(), &Wish::default()).unwrap()
}

/// Whether each change that reached the disk was to be durable before its answer.
fn durable(served: &Served) -> Vec<bool> {
    served.seen().iter().filter_map(|seen: &Seen| seen.flags.first().copied()).collect()
}

/// A write, zeroes and a discard, all of which work.
fn change(driver: &mut Driver) {
    for request in
        [Request::write(0, &[1; 512]), Request::zeroes(512, 512, false), Request::discard(1024, 512)]
    {
        assert_eq!(driver.ask(&request).unwrap().status, Status::OK);
    }
}

#[test]
fn the_disk_says_what_it_is() {
    let served = Plan { queues: 3, ..Plan::default() }.serve();
    let mut driver = connect(&served);
    let config = driver.config().unwrap();
    assert_eq!((config.capacity(), config.blk_size(), config.num_queues()), (2048, 512, 3));
    assert_eq!((config.physical_block_exp(), config.alignment_offset(), config.min_io_size()), (0, 0, 8));
    assert_eq!(config.writeback(), 1, "there is a write cache to flush");
    assert_eq!(driver.link.features(), feature::LINUX & !feature::RO);
    let limits =
        [config.size_max(), config.seg_max(), config.max_discard_seg(), config.max_write_zeroes_seg()];
    assert!(limits.iter().all(|limit| *limit > 0), "{limits:?}");
    assert!(config.seg_max() <= 126, "a request fits into 128 descriptors");
}

#[test]
fn the_disk_has_a_name() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    let answer = driver.ask(&Request::id()).unwrap();
    let mut expected = [0; 20];
    expected[..ID.len()].copy_from_slice(ID.as_bytes());
    assert_eq!((answer.status, answer.used, answer.bytes), (Status::OK, 21, expected.to_vec()));
}

#[test]
fn a_read_only_disk_says_so() {
    let served = Plan { read_only: true, ..Plan::default() }.serve();
    let driver = connect(&served);
    assert_eq!(driver.link.features(), feature::LINUX & !feature::DISCARD & !feature::WRITE_ZEROES);
}

#[test]
fn with_the_write_cache_off_each_change_is_durable_before_its_answer() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    change(&mut driver);
    assert_eq!(durable(&served), [false; 3], "a guest that has a cache flushes it");
    driver.set_writeback(false).unwrap();
    assert_eq!(driver.config().unwrap().writeback(), 0);
    change(&mut driver);
    assert_eq!(durable(&served)[3..], [true; 3], "one that has none does not");
    driver.set_writeback(true).unwrap();
    assert_eq!(driver.config().unwrap().writeback(), 1);
    change(&mut driver);
    assert_eq!(durable(&served)[6..], [false; 3]);
}

#[test]
fn a_guest_that_knows_no_flush_gets_what_is_durable() {
    let served = Plan::default().serve();
    let wish = Wish { features: feature::LINUX & !feature::FLUSH & !feature::CONFIG_WCE, ..Wish::default() };
    let mut driver = Driver::connect(&served.vhost(), &wish).unwrap();
    change(&mut driver);
    assert_eq!(durable(&served), [true; 3]);
}

#[test]
fn a_guest_that_cannot_know_of_a_write_cache_gets_what_is_durable() {
    let served = Plan::default().serve();
    let mut driver =
        Driver::connect(&served.vhost(), &Wish { reads_config: false, ..Wish::default() }).unwrap();
    change(&mut driver);
    assert_eq!(durable(&served), [true; 3]);
    // Without a record the next connection knows of nothing either, and monitors read the configuration once.
    let mut driver = connect_again(&served, driver);
    change(&mut driver);
    assert_eq!(durable(&served)[3..], [true; 3]);
}

/// The same guest, whose monitor believes that the server was another one.
fn connect_again(served: &Served, mut driver: Driver) -> Driver {
    driver.config().unwrap();
    driver.reconnect(&served.vhost()).unwrap();
    driver
}

#[test]
fn nothing_but_the_write_cache_can_be_changed() {
    let served = Plan::default().serve();
    for (at, bytes) in [(0, vec![0; 8]), (20, vec![0, 16, 0, 0]), (32, vec![2]), (300, vec![1])] {
        let mut driver = connect(&served);
        let before = driver.config().unwrap();
        driver.link.set_config(at, &bytes).unwrap_err();
        // A front end that does as it should hears of it and goes on.
        assert_eq!(driver.config().unwrap(), before, "{bytes:?} at {at}");
        assert_eq!(driver.ask(&Request::read(0, 512)).unwrap().status, Status::OK);
    }
}

#[test]
fn a_disk_that_grows_tells_its_guest_and_has_the_new_bytes() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    driver.link.listen().unwrap();
    assert_eq!(driver.ask(&Request::read(1 << 20, 512)).unwrap().status, Status::IOERR);
    for size in [2 << 20, 3 << 20] {
        served.grow(size);
        driver.link.wait_for_news().unwrap();
        assert_eq!(driver.config().unwrap().capacity(), size as u64 / 512);
        let last = size as u64 - 512;
        assert_eq!(driver.ask(&Request::write(last, &[7; 512])).unwrap().status, Status::OK);
        assert_eq!(driver.ask(&Request::read(last, 512)).unwrap().bytes, [7; 512]);
        assert_eq!(driver.ask(&Request::read(last, 1024)).unwrap().status, Status::IOERR);
    }
}

#[test]
fn blocks_of_4096_bytes_are_read_and_written_whole() {
    let served = Plan { block: 4096, ..Plan::default() }.serve();
    let mut driver = connect(&served);
    let config = driver.config().unwrap();
    assert_eq!((config.capacity(), config.blk_size()), (2048, 4096));
    assert_eq!(driver.ask(&Request::write(8192, &[3; 4096])).unwrap().status, Status::OK);
    assert_eq!(driver.ask(&Request::read(4096, 8192)).unwrap().bytes[4096..], [3; 4096]);
    for request in [
        Request::read(512, 4096),
        Request::read(0, 512),
        Request::write(4096, &[1; 512]),
        Request::write(512, &[1; 4096]),
    ] {
        let asked = served.seen().len();
        assert_eq!(driver.ask(&request).unwrap().status, Status::IOERR, "{request:?}");
        assert_eq!(served.seen().len(), asked, "the disk is not asked");
    }
    assert_eq!(served.count(OpKind::Write), 1);
}
