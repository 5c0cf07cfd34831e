//! The connection to a back end: messages, and what was agreed on.

use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::config::{CONFIG_LEN, Config};
use crate::watchdog::Watchdog;
use crate::{Memory, Result};

/// Virtio features by number. Names as in the specification.
pub mod feature {
    #![allow(missing_docs)]
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Of vhost-user itself.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;

    /// What Linux takes through QEMU, of what is offered.
    pub const LINUX: u64 = SIZE_MAX
        | SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | INDIRECT
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`
const CONFIG_CHANGE: u32 = 2;

/// A connection.
pub struct Link {
    frontend: Frontend,
    socket: UnixStream,
    watchdog: Watchdog,
    patience: Duration,
    /// What both sides take, of virtio.
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// Where the back end speaks first.
    news: Option<UnixStream>,
}

impl Link {
    /// Connects and agrees on features: those of `wanted` that the back end offers.
    pub fn connect(socket: &Path, queues: u16, wanted: u64, patience: Duration) -> Result<Link> {
        let stream = UnixStream::connect(socket)?;
        let socket = stream.try_clone()?;
        let watchdog = Watchdog::over(stream.try_clone()?);
        watchdog.expect(Some(patience));
        let mut frontend = Frontend::from_stream(stream, queues.into());
        frontend.set_owner()?;
        let features = frontend.get_features()? & wanted;
        if features & feature::PROTOCOL_FEATURES == 0 {
            return Err("the back end has no protocol features".into());
        }
        let protocol = frontend.get_protocol_features()?
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::RESET_DEVICE);
        frontend.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_features(features)?;
        watchdog.expect(None);
        Ok(Link { frontend, socket, watchdog, patience, features, protocol, news: None })
    }

    /// Agrees on other features of virtio: those of `wanted` that the back end offers.
    pub fn agree(&mut self, wanted: u64) -> Result<()> {
        let features = self.talk().get_features()? & wanted;
        self.talk().set_features(features)?;
        self.features = features;
        Ok(())
    }

    /// For messages; the back end is hung up on if it answers one too late.
    pub fn talk(&mut self) -> Talk<'_> {
        self.watchdog.expect(Some(self.patience));
        Talk(self)
    }

    /// Hangs up.
    pub fn close(&self) -> Result<()> {
        Ok(self.socket.shutdown(Shutdown::Both)?)
    }

    /// Whether the other side has hung up is seen here.
    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// What both sides take, of virtio.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// What both sides take, of vhost-user.
    pub fn protocol(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// The device's configuration space.
    pub fn config(&mut self) -> Result<Config> {
        let room = [0; CONFIG_LEN as usize];
        let (_, bytes) = self.talk().get_config(0, CONFIG_LEN, VhostUserConfigFlags::WRITABLE, &room)?;
        Ok(Config(bytes))
    }

    /// Writes into the device's configuration space.
    pub fn set_config(&mut self, at: u32, bytes: &[u8]) -> Result<()> {
        Ok(self.talk().set_config(at, VhostUserConfigFlags::WRITABLE, bytes)?)
    }

    /// Memory in which the back end records what it has taken and not answered.
    pub fn make_inflight(&mut self, queues: u16, queue_len: u16) -> Result<(VhostUserInflight, File)> {
        Ok(self.talk().get_inflight_fd(&VhostUserInflight::new(0, 0, queues, queue_len))?)
    }

    /// Lets the back end say when its configuration has changed.
    pub fn listen(&mut self) -> Result<()> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(self.patience))?;
        self.talk().set_backend_request_fd(&theirs)?;
        self.news = Some(ours);
        Ok(())
    }

    /// Waits until the back end says that its configuration has changed.
    pub fn wait_for_news(&mut self) -> Result<()> {
        let news = self.news.as_mut().ok_or("nobody listens")?;
        let mut header = [0; 12];
        news.read_exact(&mut header)?;
        let words: Vec<u32> =
            header.chunks(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect();
        // Version 1, no reply wanted, no payload.
        if words != [CONFIG_CHANGE, 1, 0] {
            return Err(format!("expected CONFIG_CHANGE_MSG, found {words:x?}").into());
        }
        Ok(())
    }

    /// Tells the back end of a region.
    pub(crate) fn region_info(memory: &Memory, guest: u64, offset: u64) -> vhost::VhostUserMemoryRegionInfo {
        vhost::VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: memory.len(),
            userspace_addr: memory.address(),
            mmap_offset: offset,
            mmap_handle: memory.as_raw_fd(),
        }
    }
}

/// Messages to a back end.
pub struct Talk<'a>(&'a mut Link);

impl Deref for Talk<'_> {
    type Target = Frontend;

    fn deref(&self) -> &Frontend {
        &self.0.frontend
    }
}

impl DerefMut for Talk<'_> {
    fn deref_mut(&mut self) -> &mut Frontend {
        &mut self.0.frontend
    }
}

impl Drop for Talk<'_> {
    fn drop(&mut self) {
        self.0.watchdog.expect(None);
    }
}
