//! Where clients and front ends come in: a unix socket or a TCP port, and who it is that comes.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use block::Errno;
use runtime::{Fd, Handle};
use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::signal::Signal;

/// How long to wait before accepting again when the host has no descriptor or no memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Bytes that the kernel keeps for a unix socket's reader (it doubles this, for its own needs): answers to 32 reads
/// of 4 KiB fit. More was not faster with reads of 128 KiB either, and this is memory that no budget of ours counts:
/// half a MiB for each client that does not read. (TCP adapts by itself.)
const SOCKET_BUFFER_LEN: usize = 256 << 10;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// A TCP port of every address of this host name, or of this address.
    Tcp {
        /// A name or an address; one of IPv6 without brackets.
        host: String,
        /// The port; 0 lets the kernel choose.
        port: u16,
    },
}

/// Why a text is no address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected unix:PATH or tcp:ADDRESS:PORT, found {0:?}")]
pub struct BadAddress(String);

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Address, BadAddress> {
        let bad = || BadAddress(text.into());
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        match kind {
            "unix" if !rest.is_empty() => Ok(Address::Unix(rest.into())),
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(bad)?;
                let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
                if host.is_empty() {
                    return Err(bad());
                }
                Ok(Address::Tcp { host: host.into(), port: port.parse().map_err(|_not_a_port| bad())? })
            }
            _ => Err(bad()),
        }
    }
}

/// Why there is no listening at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process serves it.
    #[error("{0}: another process is listening on this socket")]
    Live(String),
    /// There is something else at the path.
    #[error("{0}: there is something here that is no socket, and it is left alone")]
    NotASocket(String),
    /// The path does not fit a socket address.
    #[error("{0}: the path of a unix socket has at most 107 bytes")]
    PathTooLong(String),
    /// Not only this host can reach it.
    #[error(
        "{0} can be reached from other hosts, and nothing protects the disk there: not without --allow-remote"
    )]
    Remote(SocketAddr),
    /// The name has no address.
    #[error("{host}: {error}")]
    Unknown {
        /// The name.
        host: String,
        /// What the resolver said.
        error: io::Error,
    },
    /// The kernel refused.
    #[error("{address}: {doing}: {error}")]
    Failed {
        /// Where.
        address: String,
        /// What was being done.
        doing: &'static str,
        /// Why not.
        error: io::Error,
    },
}

/// A socket that clients can connect to, already now. Dropping it removes it.
pub struct Listener {
    socket: OwnedFd,
    at: At,
}

enum At {
    Unix(SocketFile),
    Tcp(SocketAddr),
}

impl Listener {
    /// Listens at an address: one listener, or one for each address that a host name has.
    ///
    /// TCP addresses that other hosts can reach are refused unless `allow_remote`.
    pub fn bind(address: &Address, allow_remote: bool) -> Result<Vec<Listener>, ListenError> {
        match address {
            Address::Unix(path) => Ok(vec![Listener::unix(path)?]),
            Address::Tcp { host, port } => {
                let addresses = (host.as_str(), *port)
                    .to_socket_addrs()
                    .map_err(|error| ListenError::Unknown { host: host.clone(), error })?;
                addresses.map(|address| Listener::tcp(address, allow_remote)).collect()
            }
        }
    }

    /// Listens on a unix socket, which only this user can reach: its mode is 0600.
    ///
    /// A socket that nobody listens on any more is replaced.
    pub fn unix(path: &Path) -> Result<Listener, ListenError> {
        let name = || path.display().to_string();
        let failed = |doing| move |error: rustix::io::Errno| failed(path.display(), doing, error.into());
        let address = SocketAddrUnix::new(path).map_err(|_too_long| ListenError::PathTooLong(name()))?;
        // Others who start at the same path wait here, so that none of them takes a socket for a dead one that is
        // not listening yet. What is not ours to lock is not locked: then starting two at once is up to luck.
        let _lock = lock_directory(path);
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket(name())),
            Ok(_) if is_live(&address).map_err(failed("find out whether it is in use"))? => {
                return Err(ListenError::Live(name()));
            }
            Ok(_) => std::fs::remove_file(path)
                .map_err(|error| self::failed(name(), "remove the stale socket", error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(self::failed(name(), "look at it", error)),
        }
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(failed("create a socket"))?;
        // A new socket file takes its mode from the socket itself, of which the umask can only take away (Linux,
        // unix_bind_bsd). So it is never open to others, not for a moment, and the umask, which all threads share,
        // is left alone.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("set its mode"))?;
        rustix::net::bind(&socket, &address).map_err(failed("bind"))?;
        let file = SocketFile::new(path).map_err(|error| self::failed(name(), "look at it", error))?;
        rustix::net::listen(&socket, BACKLOG).map_err(failed("listen"))?;
        Ok(Listener { socket, at: At::Unix(file) })
    }

    /// Listens on a TCP port.
    pub fn tcp(address: SocketAddr, allow_remote: bool) -> Result<Listener, ListenError> {
        if !allow_remote && !address.ip().to_canonical().is_loopback() {
            return Err(ListenError::Remote(address));
        }
        // SO_REUSEADDR is set by the standard library: a restart need not wait for old connections to be forgotten.
        let socket = TcpListener::bind(address).map_err(|error| failed(address, "listen", error))?;
        let bound = socket.local_addr().map_err(|error| failed(address, "look at it", error))?;
        Ok(Listener { socket: socket.into(), at: At::Tcp(bound) })
    }

    /// The port, where it is one of TCP: that which the kernel chose if it was left to it.
    pub fn port(&self) -> Option<u16> {
        match &self.at {
            At::Unix(_) => None,
            At::Tcp(address) => Some(address.port()),
        }
    }

    /// The URI of an export here, as clients take it (doc/uri.md of NetworkBlockDevice/nbd).
    pub fn uri(&self, export: &str) -> String {
        let export = escape(export, b"-._~/");
        match &self.at {
            At::Unix(file) => {
                let path = escape(&file.path.to_string_lossy(), b"-._~/");
                format!("nbd+unix:///{export}?socket={path}")
            }
            At::Tcp(address) if export.is_empty() => format!("nbd://{address}"),
            At::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }

    /// Takes it in, to accept from.
    pub(crate) fn open(self, handle: &Handle) -> Result<Door, Errno> {
        let socket = self.socket.try_clone().map_err(|error| Errno::from_std(&error))?;
        Ok(Door { socket: handle.register(socket), handle: handle.clone(), listener: self, is_short: false })
    }
}

/// A listener that is accepted from.
pub(crate) struct Door {
    listener: Listener,
    socket: Rc<Fd>,
    handle: Handle,
    /// The host had no means for the last one who came.
    is_short: bool,
}

impl Door {
    /// The next one who comes in; `None` when it is closed before.
    pub(crate) async fn next(&mut self, closing: &Signal) -> Option<OwnedFd> {
        loop {
            match closing.or(self.handle.accept(&self.socket)).await? {
                Ok(socket) => {
                    self.is_short = false;
                    return Some(socket);
                }
                // Left before being accepted.
                Err(Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO) => {}
                Err(errno) => {
                    if !std::mem::replace(&mut self.is_short, true) {
                        let listener = &self.listener;
                        tracing::warn!(%listener, %errno, "nobody can be accepted now; trying on");
                    }
                    closing.or(self.handle.sleep(ACCEPT_PAUSE)).await?;
                }
            }
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            At::Unix(file) => write!(f, "{}", file.path.display()),
            At::Tcp(address) => write!(f, "{address}"),
        }
    }
}

fn failed(address: impl fmt::Display, doing: &'static str, error: io::Error) -> ListenError {
    ListenError::Failed { address: address.to_string(), doing, error }
}

fn unix_socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Whether somebody listens on this socket.
fn is_live(address: &SocketAddrUnix) -> rustix::io::Result<bool> {
    let socket = unix_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    match rustix::net::connect(&socket, address) {
        // EAGAIN: more clients wait already than may. Somebody owns it who is slow.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(rustix::io::Errno::CONNREFUSED) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Keeps others like us from starting here meanwhile, if the directory can be locked.
fn lock_directory(path: &Path) -> Option<std::fs::File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = std::fs::File::open(parent).ok()?;
    match rustix::fs::flock(&directory, FlockOperation::LockExclusive) {
        Ok(()) => Some(directory),
        Err(error) => {
            tracing::debug!(%error, "the socket's directory is not locked");
            None
        }
    }
}

/// Percent-encodes what is not a letter, a digit or one of these.
fn escape(text: &str, plain: &[u8]) -> String {
    text.bytes()
        .map(|byte| match byte {
            byte if byte.is_ascii_alphanumeric() || plain.contains(&byte) => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// A socket's file; removed when dropped if it is still the same.
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<SocketFile> {
        let found = std::fs::symlink_metadata(path)?;
        // The working directory may change before the end.
        Ok(SocketFile { path: std::path::absolute(path)?, device: found.dev(), inode: found.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let Ok(found) = std::fs::symlink_metadata(&self.path) else { return };
        if (found.dev(), found.ino()) != (self.device, self.inode) {
            tracing::debug!(path = %self.path.display(), "the socket was replaced by another and is left alone");
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket was not removed");
        }
    }
}

/// Where a client comes from.
pub(crate) enum Origin {
    /// A process on this host.
    Local {
        pid: Option<i32>,
    },
    Tcp(SocketAddr),
    Unknown,
}

impl Origin {
    pub(crate) fn of(socket: &OwnedFd) -> Origin {
        match rustix::net::getpeername(socket) {
            Ok(Some(address)) => Origin::from_address(socket, &address),
            Ok(None) | Err(_) => Origin::Unknown,
        }
    }

    fn from_address(socket: &OwnedFd, address: &SocketAddrAny) -> Origin {
        if let Ok(address) = SocketAddr::try_from(address.clone()) {
            return Origin::Tcp(address);
        }
        let pid = sockopt::socket_peercred(socket).ok().map(|peer| peer.pid.as_raw_nonzero().get());
        Origin::Local { pid }
    }

    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self, Origin::Tcp(_))
    }

    /// Sets the options that suit the kind of socket. Where the kernel refuses one, it works without.
    pub(crate) fn tune(&self, socket: &OwnedFd) {
        let result = match self {
            Origin::Tcp(_) => tune_tcp(socket),
            Origin::Local { .. } | Origin::Unknown => tune_local(socket),
        };
        if let Err(error) = result {
            tracing::debug!(peer = %self, %error, "a socket option is not set");
        }
    }
}

fn tune_tcp(socket: impl AsFd) -> rustix::io::Result<()> {
    // "Both the client and the server SHOULD disable Nagle's algorithm" ("Protocol phases").
    sockopt::set_tcp_nodelay(&socket, true)?;
    // A client whose host is gone would keep its connection for ever: it is found out within two minutes.
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(15))?;
    sockopt::set_tcp_keepcnt(&socket, 4)
}

fn tune_local(socket: impl AsFd) -> rustix::io::Result<()> {
    // Only root may go beyond net.core.wmem_max.
    if sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_LEN).is_ok() {
        return Ok(());
    }
    sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_LEN)
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Local { pid: Some(pid) } => write!(f, "process {pid}"),
            Origin::Local { pid: None } => write!(f, "this host"),
            Origin::Tcp(address) => write!(f, "{address}"),
            Origin::Unknown => write!(f, "unknown"),
        }
    }
}
