//! A server whose disk fails it.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use block::{Limits, Pool};
use runtime::{BoxFuture, RingFlags, Runtime, Uring};

use super::super::{Server, Settings};
use super::disk::{Handed, ModelDisk};
use crate::{Disk, Session};

/// A driver that panics once.
struct Panics(Cell<bool>, Handed);

impl Disk for Panics {
    fn session(&self) -> Box<dyn Session> {
        self.1.session()
    }

    fn size(&self) -> u64 {
        assert!(!self.0.replace(false), "as a bug would");
        self.1.size()
    }

    fn limits(&self) -> Limits {
        self.1.limits()
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        self.1.resized()
    }
}

#[test]
fn a_panic_ends_one_connection_and_the_next_is_served() {
    let pool = Pool::new(1 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
    let runtime = Runtime::new(Box::new(uring), pool);
    let settings =
        Settings { name: "disk".into(), queues: 1, block: 512, id: "disk".into(), pin_memory: false };
    let disk = Panics(Cell::new(true), Handed(ModelDisk::new(1 << 20)));
    let server = Server::new(runtime.handle().clone(), Rc::new(disk), settings);
    let mut heard = Vec::new();
    for _ in 0..2 {
        let (front, back) = UnixStream::pair().unwrap();
        let talk = std::thread::spawn(move || {
            // GET_FEATURES, which has a reply of 8 bytes behind its header of 12.
            (&front).write_all(&[1u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
            front.shutdown(std::net::Shutdown::Write).unwrap();
            let mut heard = Vec::new();
            (&front).read_to_end(&mut heard).unwrap();
            heard.len()
        });
        let server = server.clone();
        runtime.block_on(async move { server.serve_one(back.into()).await });
        heard.push(talk.join().unwrap());
    }
    assert_eq!(heard, [0, 20], "the first is hung up on, the second is answered");
}
