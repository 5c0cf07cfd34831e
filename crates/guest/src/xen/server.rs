//! One disk of one guest, from its nodes in the xenstore to its end.
//!
//! The device lives on the disk's thread, the handshake on one of its own; each thing that it wants of the device is a
//! round trip.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc::{SyncSender, sync_channel};

use ::xen::store::{Client, Error};
use runtime::{Handle, Mailbox, Sender};

use super::control::{self, Control, End, Order, Orderer, Rings, Shape};
use super::device::{Connection, Device, Parting};
use super::stats::{Page, SHARED_MEMORY};
use super::{OnFailedSync, Platform, Settings};
use crate::Disk;
use crate::signal::Signal;

/// Why a disk cannot be served at all.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no xenstore.
    #[error(transparent)]
    Store(#[from] Error),
    /// The system has no thread or descriptor for it.
    #[error("there is no thread for the handshake: {0}")]
    Thread(std::io::Error),
}

/// Serves a disk to one guest, on the thread of that disk.
pub struct Server(Rc<Shared>);

struct Shared {
    disk: Rc<dyn Disk>,
    device: Rc<Device>,
    orders: Orderer,
    /// Set when nothing is to be connected any more.
    closing: Signal,
    /// Set when all of the guest's is let go of after that.
    drained: Signal,
    /// There was a guest to be left for a successor then.
    lives_on: Cell<bool>,
    ended: Signal,
    end: RefCell<Option<End>>,
}

/// What the handshake asks of the disk's thread. The other end of `done` waits.
enum Job {
    Connect {
        connection: Connection,
        done: SyncSender<Result<u64, String>>,
    },
    Disconnect {
        how: Parting,
        done: SyncSender<()>,
    },
    /// There is no more to do; why, unless that was asked for.
    End(Option<End>),
}

impl Server {
    /// Begins to serve a guest: its nodes are found or made from here on, and what its front end asks for is answered.
    ///
    /// # Errors
    /// If there is no xenstore or no thread. What goes wrong later is told by [`Server::ended`].
    pub fn start(
        handle: &Handle,
        disk: Rc<dyn Disk>,
        platform: Platform,
        settings: Settings,
    ) -> Result<Server, StartError> {
        let Platform { grants, events, store } = platform;
        let client = Client::connect(&*store)?;
        let (orderer, orders) = control::orders().map_err(StartError::Thread)?;
        let jobs = Mailbox::default();
        let shape = Shape { size: disk.size(), limits: disk.limits() };
        let rings = Remote(jobs.sender());
        let control = Control::new(store, settings.clone(), rings, orders, shape);
        let ender =
            Ender(jobs.sender(), Some(End::Failed("the handshake panicked (a bug in tapdisk)".into())));
        std::thread::Builder::new()
            .name("tapdisk-xen".into())
            .spawn(move || {
                let mut ender = ender;
                ender.1 = control.run(client);
            })
            .map_err(StartError::Thread)?;
        let page = Page::create(Path::new(SHARED_MEMORY), settings.domain, settings.device);
        let settings = Rc::new(settings);
        let shared = Rc::new(Shared {
            device: Device::new(handle, disk.clone(), grants, events, settings.clone()),
            disk,
            orders: orderer,
            closing: Signal::default(),
            drained: Signal::default(),
            lives_on: Cell::new(false),
            ended: Signal::default(),
            end: RefCell::default(),
        });
        handle.spawn(shared.clone().serve(jobs));
        handle.spawn(shared.clone().tell_size());
        match settings.on_failed_sync {
            OnFailedSync::FailWrites => {}
            OnFailedSync::Disconnect => handle.spawn(shared.clone().tell_failed_sync()),
        }
        match page {
            Ok(page) => handle.spawn(shared.clone().count(handle.clone(), page)),
            Err(error) => tracing::debug!(%error, "xentop does not see what this disk does"),
        }
        Ok(Server(shared))
    }

    /// Waits until the guest has no disk of ours any more, and tells why. Not after [`Server::drain`].
    pub async fn ended(&self) -> End {
        loop {
            self.0.ended.wait().await;
            if let Some(end) = self.0.end.borrow().clone() {
                return end;
            }
            // Drained: nobody has taken the disk from the guest.
            std::future::pending::<()>().await;
        }
    }

    /// Takes nothing more, and waits until all that the storage works on is answered and the guest's memory is let go of.
    ///
    /// Requests that are held stay in the journal, and the xenstore as it is, for whoever serves the guest next. True if
    /// there is such a guest, or may be.
    pub async fn drain(&self) -> bool {
        self.0.orders.give(Order::Stop);
        self.0.closing.happen();
        self.0.drained.wait().await;
        self.0.lives_on.get()
    }
}

impl Shared {
    /// Does what the handshake asks for, until that has ended.
    async fn serve(self: Rc<Self>, mut jobs: Mailbox<Job>) {
        let guard = EndOfServing(self.clone());
        loop {
            match self.closing.or(jobs.receive()).await {
                Some(Job::End(end)) => {
                    // After a failure a guest may live on that a predecessor or we have served. In order, nothing is left.
                    let is_over = !matches!(end, Some(End::Failed(_)));
                    self.lives_on.set(!is_over);
                    self.device.disconnect(Parting::Leave).await;
                    if is_over {
                        self.device.forget();
                    }
                    *self.end.borrow_mut() = end;
                    return;
                }
                Some(job) => self.work(job).await,
                None => break,
            }
        }
        // Also one of a predecessor's that was not taken over yet.
        self.lives_on.set(self.device.is_connected() || self.device.has_journal());
        self.device.disconnect(Parting::Leave).await;
        self.drained.happen();
        // The handshake may wait for an answer: it gets one, and nothing starts any more.
        loop {
            match jobs.receive().await {
                Job::Connect { done, .. } => answer(&done, Err("tapdisk ends".into())),
                Job::Disconnect { done, .. } => answer(&done, ()),
                Job::End(_) => break,
            }
        }
        drop(guard);
    }

    async fn work(&self, job: Job) {
        match job {
            Job::Connect { connection, done } => {
                let connected = self.device.connect(connection).await;
                answer(&done, connected.map(|()| self.disk.size()).map_err(|error| error.to_string()));
            }
            Job::Disconnect { how, done } => {
                self.device.disconnect(how).await;
                answer(&done, ());
            }
            Job::End(_) => unreachable!("it was taken before"),
        }
    }

    async fn tell_size(self: Rc<Self>) {
        loop {
            let resized = self.disk.resized();
            // Also what has changed since the start, and between two waits.
            self.orders.give(Order::Resized(self.disk.size()));
            if self.ended.or(resized).await.is_none() {
                return;
            }
        }
    }

    async fn tell_failed_sync(self: Rc<Self>) {
        if self.ended.or(self.device.sync_failed()).await.is_some() {
            self.orders.give(Order::SyncFailed);
        }
    }

    async fn count(self: Rc<Self>, handle: Handle, page: Page) {
        page.follow(&handle, self.device.counts(), &self.ended).await;
    }
}

/// Ends what waits for the end of a server, however it comes.
struct EndOfServing(Rc<Shared>);

impl Drop for EndOfServing {
    fn drop(&mut self) {
        let shared = &self.0;
        if std::thread::panicking() {
            let why = "serving the guest panicked (a bug in tapdisk)";
            *shared.end.borrow_mut() = Some(End::Failed(why.into()));
        }
        shared.drained.happen();
        shared.ended.happen();
    }
}

fn answer<T>(done: &SyncSender<T>, with: T) {
    if done.send(with).is_err() {
        tracing::debug!("the handshake has ended before its answer");
    }
}

/// The device, as the thread of the handshake reaches it.
struct Remote(Sender<Job>);

impl Rings for Remote {
    fn connect(&mut self, connection: Connection) -> Result<u64, String> {
        let (done, answer) = sync_channel(1);
        self.0.send(Job::Connect { connection, done });
        answer.recv().unwrap_or_else(|_| Err("the disk's thread has ended".into()))
    }

    fn disconnect(&mut self, how: Parting) {
        let (done, answer) = sync_channel(1);
        self.0.send(Job::Disconnect { how, done });
        if answer.recv().is_err() {
            tracing::debug!("the disk's thread has ended");
        }
    }
}

/// Tells the disk's thread that the handshake is over, also where it panics.
struct Ender(Sender<Job>, Option<End>);

impl Drop for Ender {
    fn drop(&mut self) {
        self.0.send(Job::End(self.1.take()));
    }
}
