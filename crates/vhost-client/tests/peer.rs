//! The driver against a device that is not ours: QEMU's storage daemon serves what it is asked for.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_client::{Driver, Request, Status, Wish, feature};

const SIZE: u64 = 8 << 20;

/// A server with an image of 8 MiB.
struct Daemon {
    child: Child,
    directory: TempDir,
}

impl Daemon {
    fn start(options: &str) -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        let socket = directory.path().join("socket");
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("file,node-name=disk,filename={},discard=unmap", image.display()))
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={}{options}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon is installed");
        Daemon { child, directory }
    }

    /// The first connection, for which it may have to get ready.
    fn connect(&self, wish: &Wish) -> Driver {
        let started = Instant::now();
        loop {
            match Driver::connect(&self.socket(), wish) {
                Ok(driver) => return driver,
                Err(error) => assert!(started.elapsed() < Duration::from_secs(40), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("image")).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("the daemon cannot be ended: {error}");
        }
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at / 512) as u8 ^ seed).collect()
}

#[test]
fn every_request_is_understood_however_it_is_cut_and_wherever_it_lies() {
    let daemon = Daemon::start(",writable=on");
    for (regions, features) in
        [(1, feature::LINUX), (3, feature::LINUX), (2, feature::LINUX & !feature::EVENT_IDX)]
    {
        let wish = Wish { regions, features, ..Wish::default() };
        let mut driver = daemon.connect(&wish);
        let config = driver.config().unwrap();
        assert_eq!((config.capacity(), config.blk_size()), (SIZE / 512, 512));
        assert_eq!(config.num_queues(), 1);

        let bytes = pattern(8192, regions as u8);
        for indirect in [false, true] {
            let shape = |request: Request| if indirect { request.indirect() } else { request };
            let write = shape(Request::write(4096, &bytes).cut_out(&[16, 512, 3584]).skewed(4));
            assert_eq!(driver.ask(&write).unwrap().status, Status::OK);
            assert_eq!(daemon.image()[4096..4096 + 8192], bytes);
            let read = shape(Request::read(4096, 8192).cut_in(&[4096, 1024, 3072]));
            let answer = driver.ask(&read).unwrap();
            assert_eq!((answer.status, answer.bytes == bytes), (Status::OK, true));
            assert_eq!(driver.ask(&shape(Request::flush())).unwrap().status, Status::OK);
            assert_eq!(driver.ask(&shape(Request::id())).unwrap().status, Status::OK);
            let zeroes = shape(Request::zeroes(4096, 512, true));
            assert_eq!(driver.ask(&zeroes).unwrap().status, Status::OK);
            assert_eq!(daemon.image()[4096..4096 + 1024], [&[0; 512], &bytes[512..1024]].concat());
            assert_eq!(driver.ask(&shape(Request::discard(8192, 4096))).unwrap().status, Status::OK);
            let unknown = shape(Request::new(77, 0, &[], 0));
            assert_eq!(driver.ask(&unknown).unwrap().status, Status::UNSUPP);
        }
    }
}

#[test]
fn many_requests_on_several_queues_find_their_answers() {
    let daemon = Daemon::start(",writable=on,num-queues=3");
    let wish = Wish { queues: 3, queue_len: 64, ..Wish::default() };
    let mut driver = daemon.connect(&wish);
    for turn in 0..200_u64 {
        let mut tickets = Vec::new();
        for number in 0..30 {
            let queue = number as usize % 3;
            let at = (number * 7 + turn) % 64 * 4096;
            tickets.push((driver.prepare(queue, &Request::write(at, &pattern(4096, at as u8))).unwrap(), at));
        }
        (0..3).for_each(|queue| driver.publish(queue).unwrap());
        for (ticket, _) in &tickets {
            assert_eq!(driver.wait(*ticket).unwrap().status, Status::OK);
        }
        let (_, at) = tickets[turn as usize % 30];
        assert_eq!(driver.ask(&Request::read(at, 4096)).unwrap().bytes, pattern(4096, at as u8));
    }
    assert_eq!(driver.open().unwrap(), 0);
}

#[test]
fn a_ring_stops_goes_on_and_survives_a_new_connection() {
    let daemon = Daemon::start(",writable=on");
    let mut driver = daemon.connect(&Wish::default());
    for number in 0..100_u64 {
        let bytes = pattern(512, number as u8);
        assert_eq!(driver.ask(&Request::write(number * 512, &bytes)).unwrap().status, Status::OK);
        if number % 10 == 9 {
            let base = driver.stop_ring(0).unwrap();
            assert_eq!(u64::from(base), number + 1);
            driver.start_ring(0, base).unwrap();
        }
    }
    let at_work = driver.stop_ring(0).unwrap();
    assert_eq!(at_work, 100);
    driver.reconnect(&daemon.socket()).unwrap();
    assert_eq!(driver.ask(&Request::read(99 * 512, 512)).unwrap().bytes, pattern(512, 99));
}

#[test]
fn who_hangs_up_is_noticed() {
    let mut daemon = Daemon::start("");
    let mut driver = daemon.connect(&Wish::default());
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    let error = driver.ask(&Request::read(0, 512)).unwrap_err().to_string();
    assert_eq!(error, "the back end has hung up");
}
