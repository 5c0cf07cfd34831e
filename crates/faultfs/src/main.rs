//! The command line of faultfs: mounts and serves a control socket, or sends one command to such a socket.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use faultfs::{Cache, FaultFs, Options, control};

/// A file system in memory that fails on command.
///
/// With MOUNTPOINT it stays in the foreground, writes "mounted" to standard output when it is ready, and unmounts when
/// it is told to quit or dies. With --send it sends one command, writes the answer and exits.
#[derive(Parser)]
struct Arguments {
    /// The directory to mount on
    #[arg(required_unless_present = "send", conflicts_with = "send")]
    mountpoint: Option<PathBuf>,
    /// The Unix socket for commands
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// The command to send, as one argument, such as 'rule write:EIO:nth=3'
    #[arg(long, value_name = "COMMAND")]
    send: Option<String>,
    /// What the kernel may cache
    #[arg(long, value_enum, default_value = "none")]
    cache: CacheArgument,
    /// How many bytes can be allocated [default: no bound]
    #[arg(long, value_name = "BYTES")]
    capacity: Option<u64>,
    /// What offsets and lengths must be multiples of with O_DIRECT
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    sector_bytes: u64,
    /// Complete asynchronous O_DIRECT requests asynchronously; a short write then becomes EIO
    #[arg(long)]
    async_direct_io: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum CacheArgument {
    None,
    Through,
    Back,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faultfs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    if let Some(command) = &arguments.send {
        println!("{}", control::send(&arguments.control, command)?);
    }
    if let Some(mountpoint) = &arguments.mountpoint {
        let options = Options {
            cache: match arguments.cache {
                CacheArgument::None => Cache::None,
                CacheArgument::Through => Cache::Through,
                CacheArgument::Back => Cache::Back,
            },
            capacity: arguments.capacity,
            sector_bytes: arguments.sector_bytes,
            async_direct_io: arguments.async_direct_io,
        };
        let listener = UnixListener::bind(&arguments.control)?;
        let served = FaultFs::mount_with(mountpoint, options).and_then(|fs| stay(fs, listener));
        std::fs::remove_file(&arguments.control)?;
        served?;
    }
    Ok(())
}

/// Serves until told to quit or until someone unmounts.
fn stay(fs: FaultFs, listener: UnixListener) -> io::Result<()> {
    let fs = Arc::new(fs);
    let (quit, told_to_quit) = mpsc::channel();
    control::serve(&fs, listener, quit);
    println!("mounted");
    loop {
        match told_to_quit.recv_timeout(Duration::from_millis(200)) {
            Err(RecvTimeoutError::Timeout) if fs.is_mounted() => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) | Ok(()) => return Ok(()),
        }
    }
}
