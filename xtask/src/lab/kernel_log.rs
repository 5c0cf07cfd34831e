//! The kernel's log from a moment on.

use anyhow::{Context, Result};
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

/// A reader of /dev/kmsg that has skipped what was there before.
pub(crate) struct KernelLog {
    device: File,
    lines: Vec<String>,
}

impl KernelLog {
    pub(crate) fn from_now() -> Result<KernelLog> {
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits())?;
        let device = OpenOptions::new().read(true).custom_flags(nonblock).open("/dev/kmsg");
        let mut log = KernelLog { device: device.context("open the kernel's log")?, lines: Vec::new() };
        log.read()?;
        log.lines.clear();
        Ok(log)
    }

    /// All that was logged since.
    pub(crate) fn lines(&mut self) -> Result<&[String]> {
        self.read()?;
        Ok(&self.lines)
    }

    fn read(&mut self) -> Result<()> {
        let mut record = [0; 8192];
        loop {
            match self.device.read(&mut record) {
                Ok(0) => return Ok(()),
                Ok(len) => self.lines.extend(message(&record[..len])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // EPIPE: records were overwritten before we read them; the next read goes on behind the gap.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("read the kernel's log"),
            }
        }
    }
}

/// One read gives one record: numbers, a semicolon, the message, then indented lines of properties.
fn message(record: &[u8]) -> Option<String> {
    let record = String::from_utf8_lossy(record);
    let (_, message) = record.lines().next()?.split_once(';')?;
    Some(message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_follows_the_semicolon() {
        let record = b"6,339,5140900,-;EXT4-fs: mounted; all well\n SUBSYSTEM=block\n";
        assert_eq!(message(record).as_deref(), Some("EXT4-fs: mounted; all well"));
    }
}
