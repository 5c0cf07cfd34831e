//! A server of vhost-user-blk: one front end after the other on each socket.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use runtime::{Handle, Mailbox};

use super::channel;
use super::control::{self, End, Job};
use super::device::{Device, Settings};
use crate::Disk;
use crate::complaints::Complaints;
use crate::listen::{Door, Listener, Origin};
use crate::signal::Signal;

/// Serves a disk to the front ends of guests, on the thread of that disk. A clone is the same server.
#[derive(Clone)]
pub struct Server(Rc<Shared>);

struct Shared {
    handle: Handle,
    disk: Rc<dyn Disk>,
    settings: Settings,
    /// Set when no front end is to be served any more.
    closing: Signal,
    /// Set when the last listener is gone after that.
    emptied: Signal,
    listeners: Cell<usize>,
    complaints: Complaints,
}

impl Server {
    /// A server of this disk that nobody can reach yet.
    pub fn new(handle: Handle, disk: Rc<dyn Disk>, settings: Settings) -> Server {
        Server(Rc::new(Shared {
            handle,
            disk,
            settings,
            closing: Signal::default(),
            emptied: Signal::default(),
            listeners: Cell::new(0),
            complaints: Complaints::default(),
        }))
    }

    /// Serves front ends here, one at a time, until the server is drained. One that comes while another is served waits
    /// for that one's end: so a guest that is started anew finds its disk, and two guests never share one by mistake.
    pub fn listen(&self, listener: Listener) {
        let shared = self.0.clone();
        shared.listeners.set(shared.listeners.get() + 1);
        self.0.handle.spawn(async move {
            let _end = EndOfListening(&shared);
            match listener.open(&shared.handle) {
                Ok(door) => shared.serve_all(door).await,
                Err(errno) => tracing::error!(%errno, "a listener cannot be used"),
            }
        });
    }

    /// Serves the front end at the other end of this connected socket until it is gone.
    pub async fn serve_one(&self, socket: OwnedFd) {
        let peer = Origin::of(&socket).to_string();
        self.0.serve(socket, &peer).await;
    }

    /// Ends all connections and waits until the kernel is done with what the guests have asked for.
    ///
    /// Requests that are held, or that are tried again later, stay in the guest's inflight region for who serves it
    /// next; without such a region they are answered with their error.
    pub async fn drain(&self) {
        self.0.closing.happen();
        self.0.tell_if_empty();
        self.0.emptied.wait().await;
    }
}

impl Shared {
    async fn serve_all(self: &Rc<Self>, mut door: Door) {
        while let Some(socket) = door.next(&self.closing).await {
            let peer = Origin::of(&socket).to_string();
            tracing::info!(peer, "front end connected");
            // A task of its own: should it panic, the next front end is served all the same.
            let ended = Rc::new(Signal::default());
            let guard = EndOfConnection(ended.clone());
            let shared = self.clone();
            self.handle.spawn(async move {
                let _guard = guard;
                shared.serve(socket, &peer).await;
            });
            ended.wait().await;
        }
    }

    async fn serve(self: &Rc<Self>, socket: OwnedFd, peer: &str) {
        let stream = UnixStream::from(socket);
        let mut jobs = Mailbox::default();
        let started =
            stream.try_clone().and_then(|stream| control::start(stream, self.settings.queues, jobs.sender()));
        if let Err(error) = started {
            return tracing::error!(peer, %error, "no thread for the front end's messages: it is sent away");
        }
        let hang_up = HangUp(stream);
        let device = Device::new(&self.handle, self.disk.clone(), self.settings.clone());
        let over = Rc::new(Signal::default());
        let _over = EndOfConnection(over.clone());
        let channel: Rc<RefCell<Option<OwnedFd>>> = Rc::default();
        self.handle.spawn(tell_of_growth(self.disk.clone(), channel.clone(), over));
        let mut ended = None;
        while ended.is_none() {
            match self.closing.or(jobs.receive()).await {
                Some(Job::Do(work)) => work(device.clone()).await,
                Some(Job::Channel(fd)) => *channel.borrow_mut() = Some(fd),
                Some(Job::End(end)) => ended = Some(end),
                None => break,
            }
        }
        // Before we hang up: a front end that sees the end of the connection looks at once how far its rings are
        // answered, and without an in-flight region that is where the next server goes on.
        device.stop().await;
        drop(hang_up);
        let end = loop {
            match ended.take() {
                Some(end) => break end,
                // A message that came meanwhile: nothing starts any more, but it is answered.
                None => match jobs.receive().await {
                    Job::Do(work) => work(device.clone()).await,
                    Job::Channel(_) => {}
                    Job::End(end) => ended = Some(end),
                },
            }
        };
        self.tell(peer, &end);
    }

    fn tell(&self, peer: &str, end: &End) {
        match end {
            End::Closed => tracing::info!(peer, "front end disconnected: {end}"),
            End::Refused(_) | End::Failed(_) | End::Panicked => {
                match self.complaints.admit(self.handle.now()) {
                    Some(untold) => tracing::warn!(peer, untold, "front end disconnected: {end}"),
                    None => tracing::debug!(peer, "front end disconnected: {end}"),
                }
            }
        }
    }

    fn tell_if_empty(&self) {
        if self.listeners.get() == 0 && self.closing.has_happened() {
            self.emptied.happen();
        }
    }
}

/// Tells the front end whenever the disk's size has changed, until the connection is over.
async fn tell_of_growth(disk: Rc<dyn Disk>, channel: Rc<RefCell<Option<OwnedFd>>>, over: Rc<Signal>) {
    while over.or(disk.resized()).await.is_some() {
        match &*channel.borrow() {
            Some(fd) if channel::tell_of_change(fd) => {}
            Some(_) => tracing::warn!("the front end was not told of the disk's new size: it does not read"),
            None => tracing::info!(
                "the front end cannot be told of the disk's new size: it will see it when it asks"
            ),
        }
    }
}

/// Ends the reading of messages, also where serving ends by a panic: the thread that reads must not wait for ever.
struct HangUp(UnixStream);

impl Drop for HangUp {
    fn drop(&mut self) {
        // It fails only where the socket has ended already.
        if let Err(error) = self.0.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "the front end was gone already");
        }
    }
}

/// Says so when a connection is over, however it ends.
struct EndOfConnection(Rc<Signal>);

impl Drop for EndOfConnection {
    fn drop(&mut self) {
        self.0.happen();
    }
}

/// Counts a listener out when its task ends, however it ends.
struct EndOfListening<'a>(&'a Shared);

impl Drop for EndOfListening<'_> {
    fn drop(&mut self) {
        self.0.listeners.set(self.0.listeners.get() - 1);
        self.0.tell_if_empty();
    }
}
