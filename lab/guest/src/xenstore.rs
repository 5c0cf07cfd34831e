//! A client of xenstore, as small as the lab needs it: no transactions. xen/include/public/io/xs_wire.h has the protocol.

use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const READ: u32 = 2;
const WATCH: u32 = 4;
const WRITE: u32 = 11;
const REMOVE: u32 = 13;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;
/// XENSTORE_PAYLOAD_MAX.
const LEN_MAX: usize = 4096;

/// The daemon's own door, in the domain where it runs.
const SOCKET: &str = "/run/xenstored/socket";
/// The kernel's door to it, in any other.
const DEVICE: &str = "/dev/xen/xenbus";

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A connection.
pub(crate) struct Store {
    stream: Box<dyn Stream>,
    /// Watches that fired while an answer was waited for.
    fired: usize,
}

impl Store {
    pub(crate) fn open() -> Result<Store> {
        let stream: Box<dyn Stream> = if Path::new(SOCKET).exists() {
            Box::new(UnixStream::connect(SOCKET).with_context(|| format!("connect to {SOCKET}"))?)
        } else {
            let device = File::options().read(true).write(true).open(DEVICE);
            Box::new(device.with_context(|| format!("open {DEVICE}"))?)
        };
        Ok(Store { stream, fired: 0 })
    }

    /// The value at this path, if there is one.
    pub(crate) fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        match self.ask(READ, &[path.as_bytes(), b"\0"]).with_context(|| format!("read {path}"))? {
            Ok(value) => Ok(Some(value)),
            Err(error) if error == "ENOENT" => Ok(None),
            Err(error) => bail!("read {path}: {error}"),
        }
    }

    pub(crate) fn write(&mut self, path: &str, value: &[u8]) -> Result<()> {
        let answer = self.ask(WRITE, &[path.as_bytes(), b"\0", value])?;
        ensure!(answer.is_ok(), "write {path}: {answer:?}");
        Ok(())
    }

    /// Removes a path and all below it, if it is there.
    pub(crate) fn remove(&mut self, path: &str) -> Result<()> {
        let answer = self.ask(REMOVE, &[path.as_bytes(), b"\0"])?;
        let is_gone = answer.as_ref().map_or_else(|error| error == "ENOENT", |_| true);
        ensure!(is_gone, "remove {path}: {answer:?}");
        Ok(())
    }

    /// Asks to be told of changes at this path; the first time is at once.
    pub(crate) fn watch(&mut self, path: &str) -> Result<()> {
        let answer = self.ask(WATCH, &[path.as_bytes(), b"\0lab\0"])?;
        ensure!(answer.is_ok(), "watch {path}: {answer:?}");
        Ok(())
    }

    /// Waits until something that is watched may have changed.
    pub(crate) fn wait(&mut self) -> Result<()> {
        while self.fired == 0 {
            let (kind, _) = self.receive()?;
            ensure!(kind == WATCH_EVENT, "xenstore says {kind} unasked");
            self.fired += 1;
        }
        self.fired -= 1;
        Ok(())
    }

    /// The answer's value, or the error's name.
    fn ask(&mut self, kind: u32, parts: &[&[u8]]) -> Result<Result<Vec<u8>, String>> {
        let body = parts.concat();
        ensure!(body.len() <= LEN_MAX, "{} bytes are too many for xenstore", body.len());
        // Kind, number of the question, transaction, length.
        let head = [kind, 0, 0, u32::try_from(body.len())?];
        let mut message: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
        message.extend(body);
        self.stream.write_all(&message).context("speak to xenstore")?;
        loop {
            let (found, body) = self.receive()?;
            match found {
                WATCH_EVENT => self.fired += 1,
                ERROR => {
                    return Ok(Err(String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned()));
                }
                _ => {
                    ensure!(found == kind, "xenstore answers {kind} with {found}");
                    return Ok(Ok(body));
                }
            }
        }
    }

    fn receive(&mut self) -> Result<(u32, Vec<u8>)> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).context("hear xenstore")?;
        let word = |index: usize| u32::from_le_bytes(std::array::from_fn(|byte| head[index * 4 + byte]));
        let len = usize::try_from(word(3))?;
        ensure!(len <= LEN_MAX, "xenstore sends {len} bytes");
        let mut body = vec![0; len];
        self.stream.read_exact(&mut body).context("hear xenstore")?;
        Ok((word(0), body))
    }
}
