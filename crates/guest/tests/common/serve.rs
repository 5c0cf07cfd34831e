//! A scripted disk that is served over NBD, over vhost-user and to guests of Xen at once, in a thread of its own.

#![allow(dead_code)] // each program of tests uses what it needs

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkfront::{Front, Nodes, Wish};
use block::{OpKind, Pool};
use guest::listen::Listener;
use guest::xen::{DataPath, Features, OnFailedSync, Platform};
use guest::{nbd, vhost};
use runtime::{Mailbox, RingFlags, Runtime, Uring};
use xen::Domain;
use xen::fake::World;
use xen::fake::store::Store;

use crate::disk::{Act, Log, Script, Scripted, Seen};

enum Message {
    Release,
    Grow(usize),
    /// Serve it to a guest of Xen as well.
    Xen(Box<guest::xen::Settings>),
    Drain,
}

/// Guests of Xen have numbers of their own in all tests of a program.
static NEXT_DOMAIN: AtomicU16 = AtomicU16::new(1);
/// xvdb
const DEVICE: u32 = 51728;
const KIND: &str = "vbd3";
/// Pages of such a guest.
const PAGES: usize = 4096;

/// How it is to be.
pub(crate) struct Plan {
    pub(crate) size: usize,
    pub(crate) read_only: bool,
    /// Queues that a guest may have.
    pub(crate) queues: u16,
    /// Bytes of a block, as a guest sees it.
    pub(crate) block: u32,
    pub(crate) script: Script,
}

impl Default for Plan {
    /// A disk of 1 MiB that does everything at once, 4 queues, blocks of 512 bytes.
    fn default() -> Plan {
        Plan { size: 1 << 20, read_only: false, queues: 4, block: 512, script: Box::new(|_, _| Act::Do) }
    }
}

/// What the guest sees as the disk's name, and its bytes in a GET_ID.
pub(crate) const ID: &str = "a disk for tests";

/// A disk that is being served. Dropping it ends that.
pub(crate) struct Served {
    directory: tempfile::TempDir,
    messages: runtime::Sender<Message>,
    thread: Option<JoinHandle<()>>,
    log: Log,
    world: World,
    store: Store,
    read_only: bool,
    queues: u16,
    block: u32,
}

impl Plan {
    pub(crate) fn scripted(script: impl FnMut(usize, &Seen) -> Act + Send + 'static) -> Plan {
        Plan { script: Box::new(script), ..Plan::default() }
    }

    pub(crate) fn serve(self) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let (nbd_path, vhost_path) = (directory.path().join(NBD), directory.path().join(VHOST));
        let log = Log::default();
        let (ready, is_ready) = mpsc::channel();
        let disks_log = log.clone();
        let (world, store) = (World::new(), Store::new());
        let (their_world, their_store) = (world.clone(), store.clone());
        let (read_only, queues, block) = (self.read_only, self.queues, self.block);
        let thread = std::thread::spawn(move || {
            let pool = Pool::new(4 << 20);
            let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
            let runtime = Runtime::new(Box::new(uring), pool);
            let handle = runtime.handle().clone();
            let mut mailbox = Mailbox::default();
            runtime.block_on(async move {
                let Plan { size, read_only, queues, block, script } = self;
                let disk = Rc::new(Scripted::new(handle.clone(), size, read_only, script, disks_log));
                let exports = nbd::Exports::one("disk", ID, disk.clone()).unwrap();
                let clients = nbd::Server::new(handle.clone(), exports, nbd::Settings::default());
                clients.listen(Listener::unix(&nbd_path).unwrap());
                let settings =
                    vhost::Settings { name: "disk".into(), queues, block, id: ID.into(), pin_memory: false };
                let guests = vhost::Server::new(handle.clone(), disk.clone(), settings);
                guests.listen(Listener::unix(&vhost_path).unwrap());
                ready.send(mailbox.sender()).unwrap();
                let mut domains = Vec::new();
                loop {
                    match mailbox.receive().await {
                        Message::Release => disk.release(),
                        Message::Grow(size) => disk.grow(size),
                        Message::Xen(settings) => {
                            let (grants, events) = (their_world.grants(), their_world.events());
                            let platform = Platform { grants, events, store: Arc::new(their_store.clone()) };
                            let server =
                                guest::xen::Server::start(&handle, disk.clone(), platform, *settings);
                            domains.push(server.expect("a xenstore"));
                        }
                        Message::Drain => break,
                    }
                }
                // What storage still works on because a test has left it there, or has failed.
                let (releasing, clock) = (disk.clone(), handle.clone());
                let ending = async move {
                    guests.drain().await;
                    clients.drain().await;
                    for domain in domains {
                        domain.drain().await;
                    }
                };
                handle.spawn(async move {
                    loop {
                        clock.sleep(Duration::from_millis(20)).await;
                        releasing.release();
                    }
                });
                ending.await;
            });
            assert_eq!(runtime.handle().panics(), 0, "a task panicked");
        });
        let messages = is_ready.recv().expect("the servers listen");
        let thread = Some(thread);
        Served { directory, messages, thread, log, world, store, read_only, queues, block }
    }
}

const NBD: &str = "nbd";
const VHOST: &str = "vhost";

impl Served {
    pub(crate) fn nbd(&self) -> PathBuf {
        self.directory.path().join(NBD)
    }

    pub(crate) fn vhost(&self) -> PathBuf {
        self.directory.path().join(VHOST)
    }

    /// A new guest of Xen, whose disk this is.
    pub(crate) fn xen(&self, data: DataPath, wish: &Wish) -> Front {
        let domain = Domain(NEXT_DOMAIN.fetch_add(1, Ordering::Relaxed));
        let guest = self.world.domain(domain, PAGES);
        self.store.introduce(domain);
        let nodes = Nodes::new(domain, DEVICE, KIND);
        nodes.create(&self.store, if self.read_only { "r" } else { "w" });
        self.messages.send(Message::Xen(Box::new(guest::xen::Settings {
            name: "disk".into(),
            domain,
            device: DEVICE,
            kind: KIND.into(),
            create_nodes: false,
            features: Features::default(),
            queues: self.queues,
            block: self.block,
            data,
            on_failed_sync: OnFailedSync::FailWrites,
            memory: 8 << 20,
            journals: self.directory.path().into(),
            image: None,
        })));
        Front::connect(&self.store, &guest, &nodes, wish).unwrap()
    }

    /// Lets the disk do what storage works on or what is held.
    pub(crate) fn release(&self) {
        self.messages.send(Message::Release);
    }

    pub(crate) fn grow(&self, size: usize) {
        self.messages.send(Message::Grow(size));
    }

    /// What has reached the disk.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }

    /// How often this has reached the disk.
    pub(crate) fn count(&self, kind: OpKind) -> usize {
        self.seen().iter().filter(|seen| seen.kind == kind).count()
    }

    /// Waits until the disk has been asked so often.
    #[track_caller]
    pub(crate) fn until_seen(&self, count: usize) {
        let started = Instant::now();
        while self.log.lock().unwrap().len() < count {
            assert!(started.elapsed() < Duration::from_secs(40), "{count} requests reach the disk");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Tells the servers to end, and returns at once.
    pub(crate) fn start_to_drain(&self) {
        self.messages.send(Message::Drain);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.messages.send(Message::Drain);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("the servers' thread is fine");
            }
        }
    }
}
