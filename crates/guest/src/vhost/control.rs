//! The messages of one front end: a thread that waits for them, and the disk's thread that does what they say.
//!
//! The `vhost` crate reads messages and writes replies, blocking. Each message is a round trip to the disk's thread,
//! so that none of what it changes is shared.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, Mutex, mpsc};

use runtime::{BoxFuture, Sender};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::channel;
use super::device::{Device, MEMORY_REGIONS_MAX, Violation};
use super::memory::RegionSpec;

/// What is offered of the protocol; REPLY_ACK is the library's.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// What a message asks of the disk's thread.
pub(super) enum Job {
    /// Do this with the device.
    Do(Work),
    /// This end of the channel for our own messages was handed over.
    Channel(std::os::fd::OwnedFd),
    /// A message was refused, and the front end was told so.
    Refused(std::io::Error),
    /// No message will follow: why.
    End(End),
}

pub(super) type Work = Box<dyn FnOnce(Rc<Device>) -> BoxFuture<'static, ()> + Send>;

/// Why a front end's connection is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the front end has closed it")]
    Closed,
    #[error("a message was refused: {0}")]
    Refused(Error),
    #[error("the socket failed: {0}")]
    Failed(std::io::Error),
    #[error("handling a message panicked (a bug in tapdisk or in its library)")]
    Panicked,
}

/// Waits for messages until there are no more, on a thread of its own.
///
/// # Errors
/// When there can be no thread.
pub(super) fn start(stream: UnixStream, queues: u16, jobs: Sender<Job>) -> std::io::Result<()> {
    let ender = Ender { jobs: jobs.clone(), end: Some(End::Panicked) };
    let work = move || ender.with(attend(stream, queues, jobs));
    std::thread::Builder::new().name("tapdisk-vhost".into()).spawn(work).map(drop)
}

/// Tells the disk's thread of the end, however that comes.
struct Ender {
    jobs: Sender<Job>,
    end: Option<End>,
}

impl Ender {
    /// An end that is known.
    fn with(mut self, end: End) {
        self.end = Some(end);
    }
}

impl Drop for Ender {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            self.jobs.send(Job::End(end));
        }
    }
}

fn attend(stream: UnixStream, queues: u16, jobs: Sender<Job>) -> End {
    let socket = match stream.try_clone() {
        Ok(socket) => socket,
        Err(error) => return End::Failed(error),
    };
    let messages = Messages { jobs: jobs.clone(), queues, has_reply_ack: false, has_told_features: false };
    let messages = Arc::new(Mutex::new(messages));
    let mut handler = BackendReqHandler::from_stream(stream, messages.clone());
    loop {
        let mut preview = match channel::preview(socket.as_fd()) {
            Ok(preview) => preview,
            Err(errno) => return End::Failed(errno.into()),
        };
        if let Some(fd) = preview.channel.take() {
            jobs.send(Job::Channel(fd));
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::PartialMessage) => return End::Closed,
            // Refused and told so: what becomes of it is the front end's affair.
            Err(Error::ReqHandlerError(error))
                if preview.is_acknowledged()
                    && messages.lock().is_ok_and(|messages| messages.acknowledges()) =>
            {
                jobs.send(Job::Refused(error));
            }
            Err(Error::SocketError(error) | Error::SocketBroken(error)) => return End::Failed(error),
            Err(error) => return End::Refused(error),
        }
    }
}

/// What the library calls for each message.
struct Messages {
    jobs: Sender<Job>,
    queues: u16,
    /// REPLY_ACK is agreed on.
    has_reply_ack: bool,
    /// GET_FEATURES was answered: before that the library takes no notice of REPLY_ACK.
    has_told_features: bool,
}

impl Messages {
    /// Whether the library tells the front end what became of a message that asks for it.
    fn acknowledges(&self) -> bool {
        self.has_reply_ack && self.has_told_features
    }

    /// Does something with the device, on the disk's thread, and waits for it.
    fn ask<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Rc<Device>) -> BoxFuture<'static, std::result::Result<T, Violation>> + Send + 'static,
    {
        let (told, answer) = mpsc::sync_channel(1);
        self.jobs.send(Job::Do(Box::new(move |device| {
            let done = work(device);
            Box::pin(async move {
                // Nobody waits for it only if this thread was ended by a panic.
                if told.send(done.await).is_err() {
                    tracing::debug!("nobody waits for the answer to a message");
                }
            })
        })));
        match answer.recv() {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(violation)) => Err(Error::ReqHandlerError(std::io::Error::other(violation))),
            Err(mpsc::RecvError) => Err(Error::Disconnected), // the disk's thread is at its end
        }
    }

    /// The same for what needs no waiting over there.
    fn tell<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Rc<Device>) -> std::result::Result<T, Violation> + Send + 'static,
    ) -> Result<T> {
        self.ask(move |device| {
            let result = work(&device);
            Box::pin(std::future::ready(result))
        })
    }
}

fn region_of(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

fn not_offered(what: &'static str) -> Error {
    Error::InvalidOperation(what)
}

impl VhostUserBackendReqHandlerMut for Messages {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // "It is recommended that back-ends either ignore this message, or use it to disable all rings."
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.ask(|device| {
            Box::pin(async move {
                device.reset().await;
                Ok(())
            })
        })
    }

    fn get_features(&mut self) -> Result<u64> {
        self.has_told_features = true;
        self.tell(|device| Ok(device.features()))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.tell(move |device| device.set_features(features))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions = regions.iter().map(region_of).zip(files.into_iter().map(Into::into)).collect();
        self.tell(move |device| device.set_memory(regions))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.tell(move |device| device.set_ring_size(index, num))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if !flags.is_empty() {
            return Err(not_offered("logging of writes was asked for, and is not offered"));
        }
        self.tell(move |device| device.set_ring_addresses(index, descriptor, available, used))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.tell(move |device| device.set_ring_base(index, base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.ask(move |device| Box::pin(async move { device.ring_base(index).await }))?;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.tell(move |device| device.set_kick(index.into(), fd.map(Into::into)))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.tell(move |device| device.set_call(index.into(), fd.map(Into::into)))
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.tell(move |device| device.set_err(index.into(), fd.map(Into::into)))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !PROTOCOL_FEATURES.bits();
        if unknown != 0 {
            let offered = PROTOCOL_FEATURES.bits();
            let found = format!("protocol features {unknown:#x} were not offered ({offered:#x} were)");
            return Err(Error::ReqHandlerError(std::io::Error::other(found)));
        }
        self.has_reply_ack = features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.tell(move |device| device.enable(index, enable))
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.tell(move |device| device.config(offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let bytes = bytes.to_vec();
        self.ask(move |device| Box::pin(async move { device.set_config(offset, &bytes).await }))
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(not_offered("a disk has no display"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(not_offered("a disk has no shared objects"))
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, len) = (inflight.num_queues, inflight.queue_size);
        let (fd, size, offset) = self.tell(move |device| device.make_inflight(queues, len))?;
        Ok((VhostUserInflight::new(size, offset, queues, len), fd.into()))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *inflight;
        self.tell(move |device| {
            device.set_inflight(file.into(), mmap_size, mmap_offset, num_queues, queue_size)
        })
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let spec = region_of(region);
        self.tell(move |device| device.add_memory(spec, fd.into()))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let spec = region_of(region);
        self.tell(move |device| device.remove_memory(spec))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(not_offered("a disk has no state to transfer"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(not_offered("a disk has no state to transfer"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(not_offered("a disk has no shared memory of its own"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(not_offered("logging of writes is not offered"))
    }
}
