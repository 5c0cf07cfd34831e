//! A server in a thread of its own, as a test wants it.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use block::Pool;
use guest::listen::Listener;
use guest::nbd::{Exports, Server, Settings, Stats};
use runtime::{Mailbox, RingFlags, Runtime, Uring};

use crate::disk::{Act, Log, Script, Scripted, Seen};

enum Message {
    Adopt(OwnedFd),
    Stats(mpsc::Sender<Stats>),
    Release,
    Drain,
}

/// How a server is to be.
pub(crate) struct Plan {
    pub(crate) size: usize,
    pub(crate) read_only: bool,
    pub(crate) settings: Settings,
    pub(crate) script: Script,
}

impl Default for Plan {
    /// A disk of 1 MiB that does everything at once.
    fn default() -> Plan {
        Plan {
            size: 1 << 20,
            read_only: false,
            settings: Settings::default(),
            script: Box::new(|_, _| Act::Do),
        }
    }
}

/// A server that is running. Dropping it drains it.
pub(crate) struct Running {
    directory: tempfile::TempDir,
    messages: runtime::Sender<Message>,
    thread: Option<JoinHandle<()>>,
    log: Log,
    port: u16,
}

impl Plan {
    pub(crate) fn scripted(script: impl FnMut(usize, &Seen) -> Act + Send + 'static) -> Plan {
        Plan { script: Box::new(script), ..Plan::default() }
    }

    pub(crate) fn start(self) -> Running {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let log = Log::default();
        let (ready, is_ready) = mpsc::channel();
        let (told, port) = mpsc::channel();
        let disks_log = log.clone();
        let thread = std::thread::spawn(move || {
            let pool = Pool::new(4 << 20);
            let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
            let runtime = Runtime::new(Box::new(uring), pool);
            let handle = runtime.handle().clone();
            let mut mailbox = Mailbox::default();
            ready.send(mailbox.sender()).unwrap();
            runtime.block_on(async move {
                let Plan { size, read_only, settings, script } = self;
                let disk = Rc::new(Scripted::new(handle.clone(), size, read_only, script, disks_log));
                let exports = Exports::one("disk", "a disk for tests", disk.clone()).unwrap();
                let server = Server::new(handle.clone(), exports, settings);
                server.listen(Listener::unix(&path).unwrap());
                let tcp = Listener::tcp(([127, 0, 0, 1], 0).into(), false).unwrap();
                told.send(tcp.port().unwrap()).unwrap();
                server.listen(tcp);
                ready.send(mailbox.sender()).unwrap();
                loop {
                    match mailbox.receive().await {
                        Message::Adopt(socket) => server.adopt(socket),
                        Message::Stats(to) => to.send(server.stats()).unwrap(),
                        Message::Release => disk.release(),
                        Message::Drain => break,
                    }
                }
                // Requests that a failed test has left with the disk.
                let (releasing, h) = (disk.clone(), handle.clone());
                handle.spawn(async move {
                    loop {
                        releasing.release();
                        h.sleep(Duration::from_millis(20)).await;
                    }
                });
                server.drain().await;
                assert_eq!((server.stats().connections, server.stats().unanswered), (0, 0));
                assert_eq!(server.stats().memory, 0, "all memory is given back");
            });
            assert_eq!(runtime.handle().panics(), 0, "a task panicked");
        });
        let messages = is_ready.recv().unwrap();
        is_ready.recv().expect("the server listens");
        Running { directory, messages, thread: Some(thread), log, port: port.recv().unwrap() }
    }
}

impl Running {
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// A connection of which the server's end is one of a pair.
    pub(crate) fn pair(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.messages.send(Message::Adopt(theirs.into()));
        ours
    }

    pub(crate) fn stats(&self) -> Stats {
        let (to, from) = mpsc::channel();
        self.messages.send(Message::Stats(to));
        from.recv().unwrap()
    }

    /// Waits until this is so.
    pub(crate) fn until(&self, what: &str, is_so: impl Fn(Stats) -> bool) {
        for _ in 0..20_000 {
            if is_so(self.stats()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("{what}: {:?}", self.stats());
    }

    /// Lets the disk answer what it holds.
    pub(crate) fn release(&self) {
        self.messages.send(Message::Release);
    }

    /// What has reached the disk.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }

    /// Forgets what has reached the disk.
    pub(crate) fn forget(&self) {
        self.log.lock().unwrap().clear();
    }

    /// A connection by TCP.
    pub(crate) fn tcp(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).unwrap()
    }

    /// Tells the server to drain, and returns at once.
    pub(crate) fn start_to_drain(&self) {
        self.messages.send(Message::Drain);
    }

    /// Drains the server and waits for its end.
    pub(crate) fn drain(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        self.messages.send(Message::Drain);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("the server's thread is fine");
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.finish();
    }
}
