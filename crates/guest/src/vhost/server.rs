//! A server of vhost-user-blk: one front end after the other on each socket.

use std::cell::Cell;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::task::Poll;

use runtime::{Handle, Mailbox};

use super::control::{self, End, Job};
use super::device::{Device, Settings};
use super::growth::Teller;
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
    /// Shared by all connections, since a front end may come as often as it likes.
    complaints: Rc<Complaints>,
    comings: Complaints,
    /// A front end was connected at the end whose guest lives on.
    left_guests: Cell<bool>,
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
            complaints: Rc::default(),
            comings: Complaints::default(),
            left_guests: Cell::new(false),
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
    /// next; without such a region they are answered with their error. True if there is such a guest: it lives on, and
    /// takes whoever comes next for the same disk.
    pub async fn drain(&self) -> bool {
        self.0.closing.happen();
        self.0.tell_if_empty();
        self.0.emptied.wait().await;
        self.0.left_guests.get()
    }
}

impl Shared {
    async fn serve_all(self: &Rc<Self>, mut door: Door) {
        while let Some(socket) = door.next(&self.closing).await {
            let peer = Origin::of(&socket).to_string();
            if let Some(untold) = self.comings.admit(self.handle.now()) {
                tracing::info!(peer, untold, "front end connected");
            }
            // A task of its own: should it panic, the next front end is served all the same.
            let ended = Rc::new(Signal::default());
            let guard = SaysSo(ended.clone());
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
            let what = "no thread for a front end's messages: it is sent away";
            return self.complain(|untold| tracing::error!(peer, %error, untold, what));
        }
        let hang_up = HangUp(stream);
        let (disk, settings) = (self.disk.clone(), self.settings.clone());
        let device = Device::new(&self.handle, disk, settings, self.complaints.clone());
        let over = Rc::new(Signal::default());
        let _over = SaysSo(over.clone());
        let teller = Teller::new(&self.handle, &device, over);
        self.handle.spawn(teller.clone().follow());
        let mut ended = None;
        while ended.is_none() {
            match self.closing.or(jobs.receive()).await {
                Some(Job::Channel(fd)) => teller.set_channel(fd),
                Some(job) => ended = self.work(&device, job).await,
                None => break,
            }
            teller.look();
        }
        // Before we hang up: a front end that sees the end of the connection looks at once how far its rings are
        // answered, and without an in-flight region that is where the next server goes on.
        device.stop().await;
        drop(hang_up);
        while ended.is_none() {
            // A message that came meanwhile: nothing starts any more, but it is answered.
            ended = self.work(&device, jobs.receive().await).await;
        }
        if self.closing.has_happened() && device.has_record() {
            self.left_guests.set(true);
        }
        if let Some(end) = ended {
            self.tell(peer, &end);
        }
    }

    /// Does what a message asks for; why there is to be no other, if so.
    async fn work(&self, device: &Rc<Device>, job: Job) -> Option<End> {
        match job {
            Job::Do(work) => {
                // A panic is to end this connection in order, and nothing else: rings that are left behind would go on
                // beside those of the next front end.
                let (mut work, mut doing) = (Some(work), None);
                let done = poll_fn(|cx| {
                    let poll = AssertUnwindSafe(|| {
                        if let Some(work) = work.take() {
                            doing = Some(work(device.clone()));
                        }
                        doing.as_mut().map_or(Poll::Ready(()), |doing| doing.as_mut().poll(cx))
                    });
                    match catch_unwind(poll) {
                        Ok(poll) => poll.map(Ok),
                        Err(_told) => Poll::Ready(Err(End::Panicked)),
                    }
                });
                done.await.err()
            }
            Job::Channel(_) => None,
            Job::Refused(error) => {
                self.complain(
                    |untold| tracing::warn!(%error, untold, "a message of a front end was refused"),
                );
                None
            }
            Job::End(end) => Some(end),
        }
    }

    /// Says something unless front ends have made us say too much lately.
    fn complain(&self, say: impl FnOnce(u64)) {
        if let Some(untold) = self.complaints.admit(self.handle.now()) {
            say(untold);
        }
    }

    fn tell(&self, peer: &str, end: &End) {
        match end {
            End::Closed => {
                if let Some(untold) = self.comings.admit(self.handle.now()) {
                    tracing::info!(peer, untold, "front end disconnected: {end}");
                }
            }
            End::Refused(_) | End::Failed(_) | End::Panicked => {
                self.complain(|untold| tracing::warn!(peer, untold, "front end disconnected: {end}"));
            }
        }
    }

    fn tell_if_empty(&self) {
        if self.listeners.get() == 0 && self.closing.has_happened() {
            self.emptied.happen();
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

/// Says so when it is dropped, however that comes: a connection is over.
struct SaysSo(Rc<Signal>);

impl Drop for SaysSo {
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
