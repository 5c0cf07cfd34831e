//! Sees to it that a front end learns how large the disk is, after it has grown.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use runtime::Handle;

use super::channel;
use super::device::Device;
use crate::signal::Signal;

/// How long a front end has to ask for the configuration before it is told again, and how often it is told.
const PAUSE: Duration = Duration::from_secs(1);
const TRIES: u32 = 5;

/// What a front end's connection tells it of.
pub(super) struct Teller {
    handle: Handle,
    device: Rc<Device>,
    /// Where it is told, once it has said so.
    channel: RefCell<Option<OwnedFd>>,
    is_telling: Cell<bool>,
    over: Rc<Signal>,
}

impl Teller {
    /// One that tells until `over` happens.
    pub(super) fn new(handle: &Handle, device: &Rc<Device>, over: Rc<Signal>) -> Rc<Teller> {
        let (handle, device) = (handle.clone(), device.clone());
        Rc::new(Teller { handle, device, channel: RefCell::default(), is_telling: Cell::new(false), over })
    }

    /// The front end has handed over this end of a channel.
    pub(super) fn set_channel(&self, channel: OwnedFd) {
        *self.channel.borrow_mut() = Some(channel);
    }

    /// Tells the front end if it may not know the size. Called after each message: it may have started a ring.
    ///
    /// Monitors ignore what they are told before the device is started, and some fail on it. And one that has connected
    /// anew after a restart of ours does not ask by itself.
    pub(super) fn look(self: &Rc<Self>) {
        if self.device.has_untold_size() && self.channel.borrow().is_some() && !self.is_telling.replace(true)
        {
            self.handle.spawn(self.clone().tell());
        }
    }

    /// Looks whenever the disk has grown.
    pub(super) async fn follow(self: Rc<Self>) {
        while self.over.or(self.device.resized()).await.is_some() {
            if self.channel.borrow().is_none() {
                tracing::info!(
                    "a front end cannot be told of the disk's new size: its guest sees it when it starts anew"
                );
            } else if self.device.has_untold_size() {
                self.say();
            }
            self.look();
        }
    }

    async fn tell(self: Rc<Self>) {
        for _ in 0..TRIES {
            // A front end that is starting its device is to be done with that.
            if self.over.or(self.handle.sleep(PAUSE)).await.is_none() || !self.device.has_untold_size() {
                break;
            }
            self.say();
        }
        self.is_telling.set(false);
    }

    fn say(&self) {
        if let Some(channel) = &*self.channel.borrow()
            && !channel::tell_of_change(channel)
        {
            tracing::warn!("a front end was not told of the disk's new size: it does not read");
        }
    }
}
