//! The xenstore, a small tree of values that all domains share: a client that speaks its wire protocol.
//!
//! Sources: xen/include/public/io/xs_wire.h and docs/misc/xenstore.txt of Xen.

mod client;
pub(crate) mod wire;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

pub use client::{Client, Error, Event, View, Woken};
pub use wire::Kind;

use crate::Domain;

/// A way to a xenstore.
pub trait Connect: Send + Sync {
    /// Opens a connection of its own: a stream that carries the wire protocol.
    ///
    /// # Errors
    /// If there is no xenstore, or it lets us not in.
    fn connect(&self) -> Result<OwnedFd, ConnectError>;
}

/// Why there is no connection to a xenstore: each place that was tried, with what was found there.
#[derive(Debug, thiserror::Error)]
pub struct ConnectError {
    /// The places, in order.
    pub tried: Vec<(PathBuf, std::io::Error)>,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("no xenstore is to be reached: tried")?;
        for (index, (path, error)) in self.tried.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(formatter, "{comma} {} ({error})", path.display())?;
        }
        Ok(())
    }
}

/// The xenstore of the host: where the environment says (`XENSTORED_PATH`), else the kernel's device, else the daemon's
/// socket, as the C library looks for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

/// Where it is looked for.
const PLACES: [&str; 3] = ["/dev/xen/xenbus", "/run/xenstored/socket", "/var/run/xenstored/socket"];

impl Connect for Host {
    fn connect(&self) -> Result<OwnedFd, ConnectError> {
        match std::env::var_os("XENSTORED_PATH") {
            Some(path) => connect_first(&[PathBuf::from(path)]),
            None => connect_first(&PLACES.map(PathBuf::from)),
        }
    }
}

fn connect_first(places: &[PathBuf]) -> Result<OwnedFd, ConnectError> {
    let mut tried = Vec::new();
    for path in places {
        match open(path) {
            Ok(fd) => return Ok(fd),
            Err(errno) => tried.push((path.clone(), errno.into())),
        }
    }
    Err(ConnectError { tried })
}

/// A socket is connected to, anything else is opened.
fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let kind = FileType::from_raw_mode(rustix::fs::stat(path)?.st_mode);
    if kind != FileType::Socket {
        return rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    }
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// What a domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    None,
    /// Read it.
    Read,
    /// Write it.
    Write,
    /// Both.
    Both,
}

/// What a domain may do with a node, as it is written: `n0`, `r5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Who.
    pub domain: Domain,
    /// What.
    pub access: Access,
}

impl fmt::Display for Permission {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        };
        write!(formatter, "{letter}{}", self.domain)
    }
}

impl FromStr for Permission {
    type Err = ();

    fn from_str(text: &str) -> Result<Permission, ()> {
        let mut letters = text.chars();
        let access = match letters.next() {
            Some('n') => Access::None,
            Some('r') => Access::Read,
            Some('w') => Access::Write,
            Some('b') => Access::Both,
            Some(_) | None => return Err(()),
        };
        match letters.as_str().parse() {
            Ok(number) => Ok(Permission { domain: Domain(number), access }),
            Err(_) => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_first_place_that_answers_is_taken_and_the_others_are_named_where_none_does() {
        let directory = tempfile::tempdir().unwrap();
        let (absent, dead) = (directory.path().join("absent"), directory.path().join("dead"));
        drop(UnixListener::bind(&dead).unwrap()); // leaves a socket that nobody listens at
        let error = connect_first(&[absent.clone(), dead.clone()]).unwrap_err().to_string();
        assert!(error.contains(&format!("{} (No such file", absent.display())), "{error}");
        assert!(error.contains(&format!("{} (Connection refused", dead.display())), "{error}");
        let alive = directory.path().join("alive");
        let listener = UnixListener::bind(&alive).unwrap();
        drop(connect_first(&[absent, dead, alive]).unwrap());
        listener.accept().unwrap();
    }

    #[test]
    fn permissions_are_written_as_the_store_has_them() {
        for text in ["n0", "r5", "w32751", "b7"] {
            assert_eq!(text.parse::<Permission>().unwrap().to_string(), text);
        }
        for wrong in ["", "n", "x0", "r-1", "r65536", "0", "r5x"] {
            assert_eq!(wrong.parse::<Permission>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn a_device_is_opened() {
        drop(connect_first(&["/dev/null".into()]).unwrap());
    }
}
