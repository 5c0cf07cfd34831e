//! A host with a hypervisor, a xenstore, a guest, and a back end that comes and goes on a thread of its own.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkfront::{Front, Nodes, Wish};
use block::{OpKind, Pool};
use guest::xen::{DataPath, Features, OnFailedSync, Platform, Server, Settings};
use runtime::{Mailbox, RingFlags, Runtime, Uring};
use tempfile::TempDir;
use xen::Domain;
use xen::fake::store::Store;
use xen::fake::{Guest, World};
use xen::store::{Connect, ConnectError};

use crate::disk::{Act, Log, Script, Scripted, Seen, fresh};

pub(crate) const GUEST: Domain = Domain(5);
/// xvdb
pub(crate) const DEVICE: u32 = 51728;
pub(crate) const KIND: &str = "vbd3";
/// Pages of the guest.
const PAGES: usize = 4096;

/// What is there whether anybody serves a disk or not.
pub(crate) struct Host {
    pub(crate) world: World,
    pub(crate) store: Store,
    pub(crate) guest: Guest,
    pub(crate) nodes: Nodes,
    journals: TempDir,
}

/// How the disk is to be served.
pub(crate) struct Plan {
    /// What the disk holds.
    pub(crate) bytes: Vec<u8>,
    pub(crate) read_only: bool,
    pub(crate) block: u32,
    pub(crate) queues: u16,
    pub(crate) features: Features,
    pub(crate) data: DataPath,
    pub(crate) on_failed_sync: OnFailedSync,
    pub(crate) create_nodes: bool,
    /// Bytes for the data of requests.
    pub(crate) memory: usize,
    pub(crate) script: Script,
}

/// Bytes of the disk, if a plan does not say otherwise.
pub(crate) const SIZE: usize = 4 << 20;

/// What it holds then, made once for all.
static FRESH: OnceLock<Vec<u8>> = OnceLock::new();

impl Default for Plan {
    /// A disk that does everything at once and is offered with all that there is, to one that a toolstack made nodes for.
    fn default() -> Plan {
        Plan {
            bytes: FRESH.get_or_init(|| fresh(0, SIZE)).clone(),
            read_only: false,
            block: 512,
            queues: 4,
            features: Features::default(),
            data: DataPath::Copy,
            on_failed_sync: OnFailedSync::FailWrites,
            create_nodes: false,
            memory: 8 << 20,
            script: Box::new(|_, _| Act::Do),
        }
    }
}

impl Plan {
    pub(crate) fn scripted(script: impl FnMut(usize, &Seen) -> Act + Send + 'static) -> Plan {
        Plan { script: Box::new(script), ..Plan::default() }
    }
}

enum Message {
    Release,
    ReleaseStuck,
    Grow(usize),
    Drain,
    Drop,
    Ended(String),
}

/// How serving ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The server's own words, if it has ended by itself.
    pub(crate) end: Option<String>,
    /// Whether a guest lives on, where it was told to end.
    pub(crate) left: bool,
    /// What the disk holds.
    pub(crate) bytes: Vec<u8>,
}

/// A back end's way to the store, which ends with its process.
struct Way {
    store: Store,
    /// Its connections; none when it is dead.
    open: Mutex<Option<Vec<OwnedFd>>>,
}

impl Connect for Way {
    fn connect(&self) -> Result<OwnedFd, ConnectError> {
        let mut open = self.open.lock().unwrap();
        let Some(connections) = &mut *open else {
            drop(open);
            is_dead();
        };
        let connection = self.store.connect()?;
        connections.push(connection.try_clone().unwrap());
        Ok(connection)
    }
}

/// A thread of a process that is dead does nothing any more.
fn is_dead() -> ! {
    loop {
        std::thread::park();
    }
}

impl Way {
    fn end(&self) {
        for connection in self.open.lock().unwrap().take().into_iter().flatten() {
            UnixStream::from(connection).shutdown(Shutdown::Both).unwrap();
        }
    }
}

/// A disk that is being served. Dropping it ends that as SIGTERM does.
pub(crate) struct Served {
    world: World,
    way: Arc<Way>,
    messages: runtime::Sender<Message>,
    thread: Option<JoinHandle<Outcome>>,
    log: Log,
}

impl Host {
    /// With a guest, for whose disk a toolstack has written the nodes.
    pub(crate) fn new() -> Host {
        let host = Host::without_nodes();
        host.nodes.create(&host.store, "w");
        host
    }

    pub(crate) fn without_nodes() -> Host {
        let (world, store) = (World::new(), Store::new());
        let guest = world.domain(GUEST, PAGES);
        store.introduce(GUEST);
        // As xl leaves it for a guest: the store's own nodes of it.
        store.write(&format!("/local/domain/{GUEST}"), "");
        store.set_permissions(&format!("/local/domain/{GUEST}"), &format!("n0 r{GUEST}"));
        let nodes = Nodes::new(GUEST, DEVICE, KIND);
        Host { world, store, guest, nodes, journals: tempfile::tempdir().unwrap() }
    }

    /// The same host with another guest of the same number, after the one before has died.
    pub(crate) fn again(self) -> Host {
        let guest = self.world.domain(GUEST, PAGES);
        self.store.introduce(GUEST);
        self.nodes.create(&self.store, "w");
        Host { guest, ..self }
    }

    /// A node of the back end.
    pub(crate) fn back(&self, key: &str) -> Option<String> {
        self.store.read(&format!("{}/{key}", self.nodes.back))
    }

    /// A node of the front end.
    pub(crate) fn front(&self, key: &str) -> Option<String> {
        self.store.read(&format!("{}/{key}", self.nodes.front))
    }

    pub(crate) fn wait_for_back(&self, key: &str, value: &str) {
        self.store.wait_for(&format!("{}/{key}", self.nodes.back), value);
    }

    /// A front end that is connected.
    pub(crate) fn connect(&self, wish: &Wish) -> Front {
        Front::connect(&self.store, &self.guest, &self.nodes, wish).unwrap()
    }

    /// Records of rings that are there.
    pub(crate) fn journals(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.journals.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// Nothing of the guest is in use, and nothing is left behind.
    #[track_caller]
    pub(crate) fn assert_let_go(&self) {
        let counts = self.world.counts();
        assert_eq!((counts.mapped, counts.bound), (0, 0), "mapped pages and bound event channels");
        assert_eq!(self.journals(), Vec::<PathBuf>::new());
    }

    /// The guest dies, and its toolstack removes what it has of it.
    pub(crate) fn kill_guest(&self) {
        self.world.destroy(GUEST);
        self.store.release(GUEST);
        self.store.remove(&format!("/local/domain/{GUEST}"));
    }

    pub(crate) fn serve(&self, plan: Plan) -> Served {
        let log = Log::default();
        let (ready, is_ready) = mpsc::channel();
        let way = Arc::new(Way { store: self.store.clone(), open: Mutex::new(Some(Vec::new())) });
        let (disks_log, world, store) = (log.clone(), self.world.clone(), way.clone());
        let journals = self.journals.path().to_owned();
        let thread = std::thread::spawn(move || {
            let pool = Pool::new(16 << 20);
            let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
            let runtime = Runtime::new(Box::new(uring), pool);
            let handle = runtime.handle().clone();
            let mut mailbox = Mailbox::default();
            let outcome = runtime.block_on(async move {
                let settings = plan.settings(journals);
                let Plan { bytes, read_only, script, .. } = plan;
                let disk = Rc::new(Scripted::with(handle.clone(), bytes, read_only, script, disks_log));
                let platform = Platform { grants: world.grants(), events: world.events(), store };
                let server = Server::start(&handle, disk.clone(), platform, settings).unwrap();
                let server = Rc::new(server);
                let (waiting, ends) = (server.clone(), mailbox.sender());
                handle
                    .spawn(async move { ends.send(Message::Ended(format!("{:?}", waiting.ended().await))) });
                ready.send(mailbox.sender()).unwrap();
                let (mut end, mut left) = (None, false);
                loop {
                    match mailbox.receive().await {
                        Message::Release => disk.release(),
                        Message::ReleaseStuck => disk.release_stuck(),
                        Message::Grow(size) => disk.grow(size),
                        Message::Drop => break,
                        Message::Ended(words) => {
                            end = Some(words);
                            break;
                        }
                        Message::Drain => {
                            // What storage still works on because a test has left it there, or has failed.
                            let (releasing, clock) = (disk.clone(), handle.clone());
                            handle.spawn(async move {
                                loop {
                                    clock.sleep(Duration::from_millis(20)).await;
                                    releasing.release_stuck();
                                }
                            });
                            left = server.drain().await;
                            break;
                        }
                    }
                }
                Outcome { end, left, bytes: disk.bytes() }
            });
            assert_eq!(runtime.handle().panics(), 0, "a task panicked");
            outcome
        });
        let messages = is_ready.recv().expect("the server starts");
        Served { world: self.world.clone(), way, messages, thread: Some(thread), log }
    }
}

impl Plan {
    fn settings(&self, journals: PathBuf) -> Settings {
        Settings {
            name: "disk".into(),
            domain: GUEST,
            device: DEVICE,
            kind: KIND.into(),
            create_nodes: self.create_nodes,
            features: self.features,
            queues: self.queues,
            block: self.block,
            data: self.data,
            on_failed_sync: self.on_failed_sync,
            memory: self.memory,
            journals,
            image: Some("/images/disk".into()),
        }
    }
}

impl Served {
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

    /// Ends it as SIGTERM does: what storage works on is answered, what is held is left. Waits for that.
    pub(crate) fn drain(mut self) -> Outcome {
        self.end(Message::Drain)
    }

    /// Ends it without a word, as SIGKILL does: nothing of it runs any more, and its kernel cleans up.
    pub(crate) fn kill(mut self) -> Outcome {
        self.way.end();
        let outcome = self.end(Message::Drop);
        self.world.kill_back_ends();
        outcome
    }

    /// Lets the disk do what storage works on, and not what is held.
    pub(crate) fn release_stuck(&self) {
        self.messages.send(Message::ReleaseStuck);
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait_for_end(mut self) -> Outcome {
        self.thread.take().expect("it is there once").join().expect("the server's thread is fine")
    }

    fn end(&mut self, how: Message) -> Outcome {
        self.messages.send(how);
        self.thread.take().expect("it is there once").join().expect("the server's thread is fine")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.messages.send(Message::Drain);
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("the server's thread is fine");
            }
        }
    }
}
