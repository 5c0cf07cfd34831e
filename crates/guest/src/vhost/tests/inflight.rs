//! The in-flight region as the specification lays it out ("Inflight I/O tracking"), read and written by system calls.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::super::inflight::{Inflight, InflightError, Left, Marks};

/// A region for 3 rings of 8, and its file.
struct Region {
    file: File,
    len: u64,
}

/// Bytes of one ring's part: a header of 16, 8 states of 16, and padding to a multiple of 64.
const PART: u64 = 192;

impl Region {
    fn new() -> Region {
        let (fd, len) = Inflight::make(3, 8).unwrap();
        Region { file: fd.into(), len }
    }

    fn open(&self) -> Inflight {
        Inflight::open(self.file.as_fd(), self.len, 0, 3, 8).unwrap()
    }

    fn marks(&self, ring: u16) -> Marks {
        self.open().marks(ring, 8).unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn number(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    /// One state as it is written: in flight, next, counter.
    fn state(&self, ring: u64, head: u64) -> (u8, u16, u64) {
        let at = PART * ring + 16 + 16 * head;
        (self.get::<1>(at)[0], self.number(at + 6), u64::from_le_bytes(self.get(at + 8)))
    }

    fn put_state(&self, ring: u64, head: u64, in_flight: u8, next: u16, counter: u64) {
        let at = PART * ring + 16 + 16 * head;
        self.put(at, &[in_flight, 0, 0, 0, 0, 0]);
        self.put(at + 6, &next.to_le_bytes());
        self.put(at + 8, &counter.to_le_bytes());
    }

    /// Version, number of descriptors, head of the last batch, used index.
    fn header(&self, ring: u64) -> [u16; 4] {
        [8, 10, 12, 14].map(|at| self.number(PART * ring + at))
    }

    fn put_header(&self, ring: u64, header: [u16; 4]) {
        for (nth, number) in (0..).zip(header) {
            self.put(PART * ring + 8 + 2 * nth, &number.to_le_bytes());
        }
    }
}

#[test]
fn a_new_region_is_laid_out_and_sealed() {
    let region = Region::new();
    // The rings' parts, to the next page, and a page of our own.
    assert_eq!((region.len, region.file.metadata().unwrap().len()), (8192, 8192));
    for ring in 0..3 {
        assert_eq!(region.header(ring), [0, 8, 0, 0], "version 0: nobody has used it");
    }
    assert!(region.file.set_len(4096).is_err() && region.file.set_len(16384).is_err());
    let clean = Left { heads: vec![], is_resumed: false };
    assert_eq!(region.marks(1).recover(77).unwrap(), clean);
    assert_eq!(region.header(1), [1, 8, 0, 77]);
    assert_eq!(region.header(0), [0, 8, 0, 0]);
}

#[test]
fn requests_are_marked_as_the_specification_says() {
    let region = Region::new();
    let mut marks = region.marks(2);
    marks.recover(100).unwrap();
    for head in [5, 2, 7] {
        marks.take(head);
    }
    assert_eq!([5, 2, 7].map(|head| region.state(2, head)), [(1, 0, 0), (1, 0, 1), (1, 0, 2)]);
    marks.stage(2);
    marks.stage(5);
    assert_eq!(region.header(2), [1, 8, 5, 100]);
    assert_eq!((region.state(2, 5), region.state(2, 2)), ((1, 2, 0), (1, 0, 1)));
    marks.published(&[2, 5], 102);
    assert_eq!(region.header(2), [1, 8, 5, 102]);
    assert_eq!([5, 2, 7].map(|head| region.state(2, head).0), [0, 0, 1]);
}

#[test]
fn a_successor_finds_what_is_out_in_its_order() {
    let region = Region::new();
    region.put_header(1, [1, 8, 0, 65535]);
    for (head, counter) in [(3, 90), (0, 91), (6, 12)] {
        region.put_state(1, head, 1, 0, counter);
    }
    region.put_state(1, 4, 0, 0, 1);
    let mut marks = region.marks(1);
    assert_eq!(marks.recover(65535).unwrap(), Left { heads: vec![6, 3, 0], is_resumed: true });
    // The order goes on from there.
    marks.take(1);
    assert_eq!(region.state(1, 1), (1, 0, 92));
}

#[test]
fn the_last_batch_is_ended() {
    let region = Region::new();
    // Heads 4, 6 and 1 were answered, in this order; the used index went from 65534 to 1, and one mark is gone.
    region.put_header(0, [1, 8, 1, 65534]);
    region.put_state(0, 4, 1, 0, 10);
    region.put_state(0, 6, 0, 4, 11);
    region.put_state(0, 1, 1, 6, 12);
    region.put_state(0, 3, 1, 0, 13);
    // Of the batch before that; it has been made available again since.
    region.put_state(0, 0, 1, 5, 14);
    assert_eq!(region.marks(0).recover(1).unwrap(), Left { heads: vec![3, 0], is_resumed: true });
    assert_eq!(region.header(0), [1, 8, 1, 1]);
    assert_eq!([4, 6, 1, 3, 0].map(|head| region.state(0, head).0), [0, 0, 0, 1, 1]);
}

#[test]
fn contents_that_cannot_be_are_refused() {
    let refused = |header: [u16; 4], out: &[u64], used: u16| {
        let region = Region::new();
        region.put_header(0, header);
        for head in out {
            region.put_state(0, *head, 1, 3, 0);
        }
        let marks = region.open().marks(0, 4);
        marks.unwrap().recover(used).unwrap_err()
    };
    assert_eq!(refused([2, 8, 0, 0], &[], 0), InflightError::Version { version: 2, features: 0 });
    assert_eq!(refused([1, 9, 0, 0], &[], 0), InflightError::DescNum { found: 9, expected: 8 });
    assert_eq!(refused([1, 8, 0, 0], &[1, 4], 0), InflightError::Head { head: 4, size: 4 });
    assert_eq!(refused([1, 8, 4, 0], &[], 1), InflightError::Head { head: 4, size: 4 });
    assert_eq!(refused([1, 8, 65535, 0], &[], 1), InflightError::Head { head: 65535, size: 4 });
    let batch = InflightError::Batch { region: 5, ring: 4, len: 8 };
    assert_eq!(refused([1, 8, 0, 5], &[1], 4), batch);
    // A list that goes round in circles ends all the same.
    let region = Region::new();
    region.put_header(0, [1, 8, 2, 0]);
    region.put_state(0, 2, 1, 2, 0);
    region.put_state(0, 5, 1, 0, 0);
    assert_eq!(region.marks(0).recover(8).unwrap().heads, [5]);
    // Counters at their end.
    let region = Region::new();
    region.put_header(0, [1, 8, 0, 0]);
    region.put_state(0, 2, 255, 0, u64::MAX);
    region.put_state(0, 3, 1, 0, u64::MAX);
    assert_eq!(region.marks(0).recover(0).unwrap().heads, [2, 3]);
}

#[test]
fn a_driver_that_began_anew_with_nothing_out_is_served() {
    let region = Region::new();
    region.put_header(0, [1, 8, 3, 5000]);
    assert_eq!(region.marks(0).recover(0).unwrap(), Left { heads: vec![], is_resumed: true });
    assert_eq!(region.header(0)[3], 0);
}

#[test]
fn a_region_must_be_as_large_as_is_said() {
    let region = Region::new();
    let open = |len, offset, queues, queue_len| {
        Inflight::open(region.file.as_fd(), len, offset, queues, queue_len)
            .err()
            .map(|error| error.to_string())
    };
    let starts = |found: Option<String>, with: &str| {
        let found = found.expect("refused");
        assert!(found.starts_with(with), "{found}");
    };
    assert_eq!(open(3 * 192, 0, 3, 8), None, "without a page of ours, as others make it");
    starts(open(3 * 192 - 1, 0, 3, 8), "an in-flight region of 575 bytes for 3 rings of 8: 576 are needed");
    starts(open(8192, 8, 3, 8), "the in-flight region: a region of 8192 bytes from byte 8 of a file of 8192");
    starts(open(u64::MAX, 0, 100, 1024), "the in-flight region: a region of");
    starts(open(8192, u64::MAX - 100, 3, 8), "the in-flight region: a region of");
    starts(open(576, 4, 3, 8), "an in-flight region at byte 4 of its file");
    starts(open(8192, 0, 0, 8), "an in-flight region for 0 rings of 8");
    starts(open(8192, 0, 3, 0), "an in-flight region for 3 rings of 0");
    starts(open(1 << 40, 0, 3, 32769), "an in-flight region for 3 rings of 32769");
    let open = region.open();
    assert!(open.marks(2, 8).is_ok() && open.marks(2, 1).is_ok());
    assert!(open.marks(3, 8).is_err() && open.marks(0, 16).is_err());
}

#[test]
fn the_write_cache_is_kept_behind_the_rings() {
    let region = Region::new();
    assert_eq!(region.open().wce(), None, "nothing is noted");
    region.open().set_wce(false);
    assert_eq!(region.open().wce(), Some(false));
    region.open().set_wce(true);
    assert_eq!(region.open().wce(), Some(true));
    region.put(4096, b"another:");
    assert_eq!(region.open().wce(), None, "of somebody else");
    let short = Inflight::open(region.file.as_fd(), 576, 0, 3, 8).unwrap();
    short.set_wce(false);
    assert_eq!(short.wce(), None, "there is no room for it");
}

#[test]
fn what_is_forgotten_is_not_found() {
    let region = Region::new();
    let mut marks = region.marks(0);
    marks.recover(0).unwrap();
    marks.take(3);
    region.open().forget();
    assert_eq!(region.marks(0).recover(9).unwrap(), Left { heads: vec![], is_resumed: false });
    assert_eq!(region.state(0, 3).0, 0);
}
