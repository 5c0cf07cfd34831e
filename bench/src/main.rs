//! tapdisk and its peers side by side in one run: one load generator, one image, servers taking turns.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use crate::cell::{CELLS, Cell, Direction, Figures};
use crate::cpu::Meter;
use crate::image::{Contents, Image};
use crate::load::Span;
use crate::peer::{Backend, PINNED, Peer, Places, Protocol};
use crate::server::{CLIENT_CORE, SERVER_CORE, Server};
use crate::table::{Entrant, Table};

mod cell;
mod client;
mod cpu;
mod device;
mod histogram;
mod ideal;
mod image;
mod limit;
mod load;
mod peer;
mod server;
mod table;

/// Measures tapdisk and other servers of NBD and vhost-user-blk on a unix socket, interleaved, and prints markdown
/// tables.
///
/// Of one protocol only, for a quick look: `--protocols vhost-user --backends null --cells rr4k-32 --servers
/// tapdisk,qemu-storage-daemon`.
#[derive(Parser)]
struct Arguments {
    /// Contestants, by name; those that are not installed are left out. `limit` is fio without a server, `ideal` a
    /// server that does nothing.
    #[arg(long, value_delimiter = ',')]
    servers: Vec<String>,
    /// How the servers are spoken to.
    #[arg(long, value_delimiter = ',', default_value = "nbd,vhost-user")]
    protocols: Vec<Protocol>,
    /// Measure tapdisk with --pin-guest-memory too, as one more server.
    #[arg(long)]
    pin_guest_memory: bool,
    /// What the servers keep their bytes in.
    #[arg(long, value_delimiter = ',', default_value = "null,ram,cached,direct")]
    backends: Vec<Backend>,
    /// Only these cells, by name.
    #[arg(long, value_delimiter = ',')]
    cells: Vec<String>,
    /// How long to measure each cell.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// How often; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A smoke run: 0.2 s a cell, one round. The figures mean little, wrong answers are found.
    #[arg(long)]
    quick: bool,
    /// Also write the tables here.
    #[arg(long)]
    out: Option<PathBuf>,
    /// The tapdisk to measure [default: beside this program]
    #[arg(long)]
    tapdisk: Option<PathBuf>,
    /// Where to put the image, 1 GiB; should be on ext4 [default: target/bench]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Measure this NBD server too: NAME=COMMAND with {image} and {socket} in it.
    #[arg(long, value_parser = |text: &str| Peer::parse(Protocol::Nbd, text))]
    also: Vec<Peer>,
    /// The same for a server of vhost-user-blk, say another build of tapdisk.
    #[arg(long, value_parser = |text: &str| Peer::parse(Protocol::VhostUser, text))]
    also_vhost_user: Vec<Peer>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(clap::Subcommand)]
enum Role {
    /// Be the server that does nothing.
    #[command(hide = true)]
    Ideal { socket: PathBuf },
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    match &arguments.role {
        Some(Role::Ideal { socket }) => ideal::serve(socket).map(|()| ExitCode::SUCCESS),
        None => contest(arguments),
    }
}

/// Whose ratios to all others are told.
const OURS: &str = "tapdisk";

/// The row that servers of a protocol are compared with.
fn ours(protocol: Protocol) -> String {
    format!("{OURS} {}", protocol.name())
}

/// Whoever runs in the contest.
enum Contestant {
    Server(Peer),
    Limit,
}

impl Contestant {
    fn title(&self) -> String {
        match self {
            Contestant::Server(peer) => peer.title(),
            Contestant::Limit => "limit".into(),
        }
    }

    /// What it is to the table: whose figures it is compared with, and whether to lose against it is to lose.
    fn entrant(&self) -> Entrant {
        match self {
            Contestant::Server(peer) => Entrant {
                title: peer.title(),
                ours: vec![ours(peer.protocol)],
                is_rival: !matches!(peer.name.as_str(), OURS | PINNED | "ideal"),
            },
            Contestant::Limit => Entrant {
                title: self.title(),
                ours: vec![ours(Protocol::VhostUser), ours(Protocol::Nbd)],
                is_rival: false,
            },
        }
    }

    fn enters(&self, backend: Backend) -> bool {
        match self {
            Contestant::Server(peer) => peer.template(backend).is_some(),
            Contestant::Limit => backend.has_file(),
        }
    }

    fn command(&self, backend: Backend) -> &str {
        match self {
            Contestant::Server(peer) => peer.template(backend).unwrap_or_default(),
            Contestant::Limit => limit::COMMAND,
        }
    }
}

fn contest(arguments: Arguments) -> Result<ExitCode> {
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build, its figures mean nothing; use --release");
    }
    let cores = available_parallelism()?.get();
    ensure!(
        cores > SERVER_CORE,
        "needs two cores, one for the load and one for the server; there is {cores}"
    );
    cpu::pin(CLIENT_CORE)?;

    let program = std::env::current_exe()?;
    let profile = program.parent().context("a program lies in a directory")?;
    let target = profile.parent().context("a profile lies in the target directory")?;
    let image = Image::create(&arguments.dir.unwrap_or_else(|| target.join("bench")))?;
    if image.file_system != "ext4" {
        eprintln!("warning: the image lies on {}; figures are known for ext4", image.file_system);
    }
    let run = RunDirectory::create()?;
    let tapdisk = arguments.tapdisk.unwrap_or_else(|| profile.join("tapdisk"));
    let places = Places {
        tapdisk: &tapdisk,
        image: &image.path,
        socket: run.path.join("socket"),
        config: run.path.join("config"),
    };

    let mut versions = Vec::new();
    let known = peer::known().into_iter().filter(|peer| {
        let is_asked_for = arguments.servers.contains(&peer.name);
        (peer.name != PINNED || arguments.pin_guest_memory || is_asked_for)
            && arguments.protocols.contains(&peer.protocol)
    });
    let also = arguments.also.into_iter().chain(arguments.also_vhost_user);
    let contestants = enrol(&arguments.servers, known.collect(), also.collect(), &places, &mut versions)?;
    let cells: Vec<usize> = (0..CELLS.len())
        .filter(|&cell| {
            arguments.cells.is_empty() || arguments.cells.iter().any(|name| name == CELLS[cell].name)
        })
        .collect();
    ensure!(!cells.is_empty(), "no such cell; there are {:?}", CELLS.map(|cell| cell.name));
    let (seconds, rounds) = if arguments.quick { (0.2, 1) } else { (arguments.seconds, arguments.rounds) };
    let span = Span {
        warm: Duration::from_secs_f64((seconds / 4.0).min(0.3)),
        counted: Duration::try_from_secs_f64(seconds).context("--seconds")?,
    };

    let mut text = machine(&image, &versions, cores, seconds, rounds)?;
    let mut failures = BTreeSet::new();
    let mut served = 0;
    for backend in arguments.backends {
        let entered: Vec<&Contestant> =
            contestants.iter().filter(|contestant| contestant.enters(backend)).collect();
        let mut table = Table::new(entered.iter().map(|contestant| contestant.entrant()));
        if backend.has_file() {
            image.stamp()?;
        }
        for &cell in &cells {
            eprintln!("{} {}", backend.name(), CELLS[cell].name);
            for round in 0..rounds {
                for turn in 0..entered.len() {
                    let row = (turn + round) % entered.len(); // nobody is always first
                    let (contestant, of) = (entered[row], &CELLS[cell]);
                    match measure(contestant, of, backend, span, &image, &places, &run.path) {
                        Ok(figures) => {
                            served += 1;
                            table.add(row, cell, figures);
                        }
                        Err(error) => {
                            let failure =
                                format!("{} {} {}: {error:#}", contestant.title(), backend.name(), of.name);
                            eprintln!("{failure}");
                            failures.insert(failure);
                        }
                    }
                }
            }
        }
        text += &format!("\n## {}\n\n{}\n{}", backend.name(), table.overview(), table.details());
        let lost = table.lost();
        if !lost.is_empty() {
            text += &format!("\nLost:\n{lost}");
        }
        text += "\nCommands:\n";
        for contestant in entered {
            text += &format!("- {}: `{}`\n", contestant.title(), contestant.command(backend));
        }
    }
    for failure in &failures {
        text += &format!("\n**Failed:** {failure}\n");
    }
    println!("{text}");
    if let Some(out) = &arguments.out {
        fs::write(out, &text).with_context(|| format!("write {}", out.display()))?;
    }
    ensure!(served > 0, "nothing was measured");
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The contestants that are asked for and installed.
fn enrol(
    asked: &[String],
    known: Vec<Peer>,
    also: Vec<Peer>,
    places: &Places<'_>,
    versions: &mut Vec<String>,
) -> Result<Vec<Contestant>> {
    if let Some(name) =
        asked.iter().find(|name| *name != "limit" && known.iter().all(|peer| peer.name != **name))
    {
        let names: Vec<&str> = known.iter().map(|peer| peer.name.as_str()).collect();
        bail!("no server is called {name:?}; there are {}, limit", names.join(", "));
    }
    let wanted = |name: &str| asked.is_empty() || asked.iter().any(|asked| asked == name);
    let mut contestants = Vec::new();
    for peer in known.into_iter().filter(|peer| wanted(&peer.name)).chain(also) {
        match peer.version(places) {
            Some(version) => {
                if !versions.contains(&version) {
                    versions.push(version);
                }
                contestants.push(Contestant::Server(peer));
            }
            None => eprintln!("{} is not installed: left out", peer.title()),
        }
    }
    if wanted("limit") {
        match limit::version() {
            Some(version) => {
                versions.push(version);
                contestants.push(Contestant::Limit);
            }
            None => eprintln!("fio is not installed: no limit is shown"),
        }
    }
    versions.retain(|version| !version.is_empty());
    Ok(contestants)
}

/// One contestant, one cell, once.
fn measure(
    contestant: &Contestant,
    cell: &Cell,
    backend: Backend,
    span: Span,
    image: &Image,
    places: &Places<'_>,
    run: &Path,
) -> Result<Figures> {
    if backend.has_file() {
        image.settle(backend == Backend::Cached)?;
    }
    let peer = match contestant {
        Contestant::Limit => {
            let figures = limit::run(cell, &image.path, backend == Backend::Direct, span, run);
            return match cell.direction {
                Direction::Read => figures,
                Direction::Write => image.stamp().and(figures),
            };
        }
        Contestant::Server(peer) => peer,
    };
    let command = peer.command(backend, places)?.context("no such back end")?;
    let (server, mut client) = Server::start(command, &places.socket, || peer.connect(&places.socket))?;
    let contents = match backend {
        Backend::Null => Contents::Unknown,
        Backend::Ram | Backend::Cached | Backend::Direct => Contents::Stamped,
    };
    if backend == Backend::Ram {
        load::write_all(client, &CELLS[CELLS.len() - 1])?;
        client = peer.connect(&places.socket)?;
    }
    let size = client.size();
    ensure!(size == image::SIZE, "the disk has {size} bytes instead of {}", image::SIZE);
    let meter = Meter::of(server.pid())?;
    load::run(client, cell, contents, span, &meter)
        .with_context(|| format!("the server said {:?}", server.said()))
}

/// What was measured, on what.
fn machine(image: &Image, versions: &[String], cores: usize, seconds: f64, rounds: usize) -> Result<String> {
    let kernel = rustix::system::uname();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let load = fs::read_to_string("/proc/loadavg")?;
    Ok(format!(
        "Linux {} {}, {cores} cores of {}; the image, {} GiB, on {}. Load on core {CLIENT_CORE}, server on core \
         {SERVER_CORE}; {seconds} s a cell, median of {rounds}; load average at the start {}. {}.\n\n\
         kIOPS; CPU time of the server per request; rr, rw: random read, write; sr, sw: sequential; length; depth. Load \
         waits for answers asleep, over NBD and over vhost-user (one queue of 128).\n",
        kernel.release().to_string_lossy(),
        kernel.machine().to_string_lossy(),
        model.map_or("unknown make", |(_, model)| model),
        image::SIZE >> 30,
        image.file_system,
        load.split(' ').next().unwrap_or("unknown"),
        versions.join(", "),
    ))
}

/// Where sockets and logs of this run are; removed with it.
struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    /// Below the temporary directory, for the name of a socket must be short.
    fn create() -> Result<RunDirectory> {
        let path = std::env::temp_dir().join(format!("tapdisk-bench-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(RunDirectory { path })
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("could not remove {}: {error}", self.path.display());
        }
    }
}
