//! Real clients against the server: libnbd's tools, QEMU's, fio, and one that sees the server die.
//!
//! What is expected comes from outside the server: from the client, or from the image read directly.

mod crash;
mod fio;
mod libnbd;
mod qemu;
mod script;

use crate::command::output;
use crate::install::{self, Need};
use crate::model::Numbers;
use crate::report::Report;
use crate::server::{self, Cache, Kind, Plan, Server};
use crate::work::Work;
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which server, and which of the clients.
#[derive(Args, Clone)]
pub(crate) struct Arguments {
    /// What serves the image.
    #[arg(long, value_enum, default_value = "tapdisk")]
    pub(crate) server: Kind,
    /// The server's program, if not the one built here or found in the PATH.
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
    /// Only the checks whose name contains this.
    #[arg(long, value_name = "WORD")]
    pub(crate) only: Option<String>,
}

impl Arguments {
    /// The clients as `ci` runs them.
    pub(crate) fn of_tapdisk() -> Arguments {
        Arguments { server: Kind::Tapdisk, program: None, only: None }
    }
}

/// Where one check takes place: a cache mode, and a folder for its images.
pub(crate) struct Stage<'a> {
    work: &'a Work,
    arguments: &'a Arguments,
    cache: Cache,
}

type Check = (&'static str, fn(&Stage<'_>) -> Result<()>);

/// All checks but the script's, which brings its own names.
fn checks() -> impl Iterator<Item = Check> {
    [libnbd::CHECKS, qemu::CHECKS, fio::CHECKS, crash::CHECKS].into_iter().flatten().copied()
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    install::require(&[Need::Fio, Need::Nbdcopy, Need::Nbdinfo, Need::Nbdsh, Need::QemuImg, Need::QemuIo])?;
    install::require(install::server(arguments.server))?;
    server::build(arguments.server, arguments.program.as_ref())?;
    let work = Work::open()?;
    work.require_room()?;
    let mut report = Report::default();
    for cache in [Cache::Direct, Cache::Buffered] {
        let stage = Stage { work: &work, arguments, cache };
        let label = if cache == Cache::Direct { "direct" } else { "buffered" };
        let is_wanted = |name: &str| arguments.only.as_ref().is_none_or(|word| name.contains(word.as_str()));
        if is_wanted(script::NAME) {
            script::run(&stage, label, &mut report);
        }
        for (name, check) in checks() {
            if is_wanted(name) {
                report.part(&format!("{label}: {name}"), || check(&stage));
            }
        }
    }
    println!("{}", report.total());
    report.judge("clients")
}

pub(crate) const MIB: u64 = 1 << 20;

impl Stage<'_> {
    /// A new sparse image.
    fn image(&self, len: u64) -> Result<PathBuf> {
        self.work.sparse("disk.raw", len)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.folder().join(name)
    }

    fn plan(&self, image: &Path) -> Plan {
        Plan {
            kind: self.arguments.server,
            program: self.arguments.program.clone(),
            cache: self.cache,
            image: image.to_owned(),
            read_only: false,
            more: Vec::new(),
        }
    }

    fn serve(&self, image: &Path) -> Result<Server> {
        self.plan(image).start(self.work.folder())
    }

    fn is_tapdisk(&self) -> bool {
        self.arguments.server == Kind::Tapdisk
    }

    /// Ends the server, which must not have met a mistake of its own.
    fn end(&self, mut server: Server) -> Result<()> {
        server.must_live()?;
        let said = server.said();
        ensure!(!said.contains("panicked"), "the server panicked:\n{said}");
        server.stop()
    }
}

/// A file that looks like a disk in use: noise, zeroes that were written, and holes.
fn fill(path: &Path, len: u64, seed: u64) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(len)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut numbers = Numbers::new(seed);
    let mut at = 0;
    while at < len {
        let piece = ((numbers.below(16) + 1) * 65536).min(len - at);
        let count = usize::try_from(piece)?;
        match numbers.below(4) {
            0 => std::io::Seek::seek_relative(&mut file, i64::try_from(piece)?)?,
            1 => file.write_all(&vec![0; count])?,
            _ => {
                let words = std::iter::repeat_with(|| numbers.next().to_le_bytes());
                let noise: Vec<u8> = words.take(count.div_ceil(8)).flatten().take(count).collect();
                file.write_all(&noise)?;
            }
        }
        at += piece;
    }
    file.flush().context("fill a file")
}

/// Fails if two files differ.
fn same(one: &Path, other: &Path) -> Result<()> {
    ensure!(fs::metadata(one)?.len() == fs::metadata(other)?.len(), "the files differ in length");
    output(Command::new("cmp").arg(one).arg(other)).map(drop)
}
