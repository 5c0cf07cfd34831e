//! A vhost-user-blk device that is ready for requests: connected, one queue set up, nothing in flight.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use vhost_client::Memory;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use crate::image::{fill, is_stamped};

/// As many as QEMU gives its guests.
const QUEUE_LEN: u16 = 128;
const SECTOR: u64 = 512;
/// A server that answers nothing for so long has hung.
const SILENCE_MAX: Duration = Duration::from_secs(20);

pub(crate) struct Device {
    /// What is asked for: each request with the number of the slot that it belongs to.
    queue: VirtioBlkQueue<'static, usize>,
    pub(crate) size: u64,
    kicks: Box<dyn QueueNotifier>,
    calls: Arc<EventFd>,
    /// Payload. Only what lies here can be read or written.
    memory: Option<Memory>,
    /// Last, for the queue lies in memory of its own.
    transport: Box<VirtioBlkTransport>,
}

impl Device {
    pub(crate) fn connect(socket: &Path) -> Result<Device> {
        let socket = socket.to_str().context("the path of a socket is UTF-8")?;
        let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        let of_disks = VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::RO;
        let transport = VhostUser::new(socket, features.bits() | of_disks.bits()).context("connect")?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let agreed = transport.get_features();
        ensure!(agreed & VirtioBlkFeatureFlags::RO.bits() == 0, "the device is read-only");
        let config = transport.get_config().context("read the configuration space")?;
        let queue = VirtioBlkQueue::setup_queues(&mut *transport, 1, QUEUE_LEN).context("set up a queue")?;
        let queue = queue.into_iter().next().context("a queue")?;
        let calls = transport.get_completion_fd(0);
        never_block()?;
        Ok(Device {
            queue,
            size: config.capacity.to_native() * SECTOR,
            kicks: transport.get_submission_notifier(0),
            calls,
            memory: None,
            transport,
        })
    }

    /// Lets the server have so many bytes of payload.
    pub(crate) fn share(&mut self, len: usize) -> Result<()> {
        let memory = Memory::new(len.next_multiple_of(4096) as u64)?;
        let (address, len) = (memory.address() as usize, memory.len() as usize);
        self.transport.map_mem_region(address, len, memory.as_raw_fd(), 0).context("share memory")?;
        self.memory = Some(memory);
        Ok(())
    }

    /// Asks for so many bytes, to be put into a slot's part of the payload.
    pub(crate) fn read(&mut self, slot: usize, at: u64, len: usize) -> Result<()> {
        let piece = piece(&mut self.memory, slot, len);
        self.queue.read(at, piece, slot).context("make a request")
    }

    /// Brings so many bytes, as a reader expects them.
    pub(crate) fn write(&mut self, slot: usize, at: u64, len: usize) -> Result<()> {
        let piece = piece(&mut self.memory, slot, len);
        fill(piece, at);
        self.queue.write(at, piece, slot).context("make a request")
    }

    /// Whether a slot's part of the payload was read rightly.
    pub(crate) fn is_right(&mut self, slot: usize, at: u64, len: usize) -> bool {
        is_stamped(piece(&mut self.memory, slot, len), at)
    }

    /// The slot and the result of each request that was answered since.
    pub(crate) fn answers(&mut self) -> impl Iterator<Item = (usize, i32)> {
        self.queue.completions().map(|answer| (answer.context, answer.ret))
    }

    /// Tells the server of new requests, if it asks to be told.
    pub(crate) fn kick(&mut self) -> Result<()> {
        if self.queue.avail_notif_needed() { self.kicks.notify().context("kick") } else { Ok(()) }
    }

    /// Waits until there are answers, unless there are some already.
    pub(crate) fn sleep(&mut self) -> Result<()> {
        self.queue.set_used_notif_enabled(true);
        if !self.queue.completions().has_next() {
            let mut calls = [PollFd::new(&self.calls, PollFlags::IN)];
            let limit = Timespec { tv_sec: SILENCE_MAX.as_secs().try_into()?, tv_nsec: 0 };
            match poll(&mut calls, Some(&limit)) {
                Ok(0) => bail!("the server kept silent, requests in flight"),
                Ok(_) => {
                    self.calls.read().context("read the call eventfd")?;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("wait for a call"),
            }
        }
        // With EVENT_IDX this writes once more the index that has just been passed: nothing is asked for from here on.
        self.queue.set_used_notif_enabled(false);
        Ok(())
    }
}

/// A slot's part of the payload, where each has so many bytes.
fn piece(memory: &mut Option<Memory>, slot: usize, len: usize) -> &mut [u8] {
    let memory = memory.as_mut().expect("shared before the first request");
    &mut memory.slice()[slot * len..][..len]
}

/// Makes the device's eventfds as VMMs make them. The driver's block: a server that reads one without waiting for it
/// first would hang, which no VMM makes it do.
fn never_block() -> Result<()> {
    let ourselves = pidfd_open(getpid(), PidfdFlags::empty()).context("open our own process")?;
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // The descriptor that reads this directory is gone by the time that we look.
        let Ok(kind) = fs::read_link(entry.path()) else { continue };
        if kind.as_os_str() == "anon_inode:[eventfd]" {
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let number = number.context("a descriptor is a number")?;
            // A second descriptor of the same eventfd: the flag belongs to the eventfd, not to the number.
            let eventfd = pidfd_getfd(&ourselves, number, PidfdGetfdFlags::empty());
            let eventfd = eventfd.context("duplicate an eventfd")?;
            fcntl_setfl(eventfd.as_fd(), fcntl_getfl(&eventfd)? | OFlags::NONBLOCK)?;
        }
    }
    Ok(())
}
