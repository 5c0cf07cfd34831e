//! `guest read`, `guest write`, `guest sectors`: a disk past the page cache. busybox's `dd` goes through the cache, and
//! does not say so, where the kernel refuses its memory.

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;

/// Bytes of the requests of `read` and `write`.
const LEN: usize = 1 << 20;
const SECTOR: usize = 512;
/// What O_DIRECT asks of memory, at most.
const ALIGN: usize = 4096;

/// Memory as O_DIRECT wants it.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
}

impl Memory {
    fn new() -> Memory {
        let bytes = vec![0; LEN + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Memory { bytes, start }
    }

    fn get(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

fn open(device: &str, write: bool) -> Result<File> {
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    let disk = File::options().read(true).write(write).custom_flags(direct).open(device);
    disk.with_context(|| format!("open {device}"))
}

/// `read DEVICE AT LEN`, in bytes: to standard output.
pub(crate) fn read(words: &[String]) -> Result<ExitCode> {
    let [device, at, len] = words else { bail!("expected DEVICE AT LEN, found {words:?}") };
    let (disk, mut at, len) = (open(device, false)?, at.parse::<u64>()?, len.parse::<u64>()?);
    let end = at + len;
    let mut memory = Memory::new();
    while at < end {
        let bytes = memory.get(LEN.min(usize::try_from(end - at)?));
        disk.read_exact_at(bytes, at).with_context(|| format!("read at {at}"))?;
        std::io::stdout().write_all(bytes)?;
        at += bytes.len() as u64;
    }
    Ok(ExitCode::SUCCESS)
}

/// `write DEVICE AT`: what comes from standard input.
pub(crate) fn write(words: &[String]) -> Result<ExitCode> {
    let [device, at] = words else { bail!("expected DEVICE AT, found {words:?}") };
    let (disk, mut at) = (open(device, true)?, at.parse::<u64>()?);
    let mut memory = Memory::new();
    loop {
        let bytes = memory.get(LEN);
        let mut filled = 0;
        while filled < LEN {
            match std::io::stdin().read(&mut bytes[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        disk.write_all_at(&bytes[..filled], at).with_context(|| format!("write at {at}"))?;
        at += filled as u64;
        if filled < LEN {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// `sectors read|write DEVICE FIRST COUNT`: each for itself. Says which fail, and with what.
pub(crate) fn sectors(words: &[String]) -> Result<ExitCode> {
    let [operation, device, first, count] = words else {
        bail!("expected read|write DEVICE FIRST COUNT, found {words:?}");
    };
    let is_write = operation == "write";
    ensure!(is_write || operation == "read", "`{operation}` is neither read nor write");
    let (disk, first, count) = (open(device, is_write)?, first.parse::<u64>()?, count.parse::<u64>()?);
    let mut memory = Memory::new();
    for sector in first..first + count {
        let (bytes, at) = (memory.get(SECTOR), sector * SECTOR as u64);
        let done = if is_write { disk.write_at(bytes, at) } else { disk.read_at(bytes, at) };
        match done {
            Ok(SECTOR) => {}
            Ok(len) => println!("{sector} {len} bytes"),
            Err(error) => println!("{sector} {error}"),
        }
    }
    Ok(ExitCode::SUCCESS)
}
