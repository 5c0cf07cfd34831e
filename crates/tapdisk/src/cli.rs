//! The command line: what the help, the man page and the completions are made from.

pub(crate) mod tool;
pub(crate) mod xen;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use disk::OnError;
use guest::listen::Address;
use image::Format;
use storage::filter::Rule;

use self::tool::Tool;
use self::xen::{Detach, XenOptions};
use crate::size;

/// Serve disk images to virtual machines and other clients, and tell them the truth about every error.
#[derive(Parser, Debug)]
#[command(name = "tapdisk", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    Serve(Box<Serve>),
    Detach(Detach),
    #[command(flatten)]
    Tool(Tool),
    /// Print the completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the man page
    Man {
        /// Write one page for each subcommand into this directory instead
        #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
        directory: Option<PathBuf>,
    },
}

/// Serve a disk image until told to stop
///
/// The image is opened for this process alone and served to any number of clients. Ctrl-C or SIGTERM ends that in
/// order: requests are answered, data is flushed, and the exit status is 0 only if that worked. A second signal ends
/// it at once. SIGUSR1 logs counts, held requests and whether a sync has failed. SIGHUP takes in what was added at the
/// end of the image (truncate, lvextend): guests are told if their interface can tell them; NBD clients see it when they
/// connect anew.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Serve {
    /// The image: a file, a block device, `null:SIZE` (nothing behind it) or `ram:SIZE` (memory)
    #[arg(value_hint = ValueHint::FilePath, value_parser = Image::from_str)]
    pub(crate) image: Image,

    /// Format of the image: raw, qcow, qcow2 or vhd (vpc) [default: raw for block devices and for what is called .raw or
    /// .img, else what the header says, or the footer of a fixed VHD]
    ///
    /// A guest may write whatever it likes into its disk, the header of another format too: so what is raw by its name stays
    /// raw, what is called .vhd is a VHD or refused, what begins like qcow2 and ends like a VHD is refused without this option,
    /// and what has no header that is known is served only with `--format raw`.
    #[arg(long, value_name = "FORMAT", value_parser = Format::from_str)]
    pub(crate) format: Option<Format>,

    /// Serve the image alone, without the ones it stands on: where it says nothing itself, zeroes are read. Needs
    /// `--read-only` where there are such
    #[arg(long)]
    pub(crate) no_backing: bool,

    /// A folder, or a file, that images may name as their backing or data file, besides what is in the folder of the image
    /// and below. May be given several times
    ///
    /// Images are made by others, who could name any file of this host. What counts is where a name leads in the end,
    /// through whatever links. An image that is a block device has no folder of its own.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub(crate) allow_folder: Vec<PathBuf>,

    /// Memory for the tables of the image and of those it stands on, together [default: 32M, of a chain 64M]
    #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, value_parser = cache_size)]
    pub(crate) cache_size: usize,

    /// Refuse writes; others may then read the image too
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Make a sparse raw image of this size if there is none; one that exists is kept as it is
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "read_only")]
    pub(crate) create: Option<u64>,

    /// Where to serve it by NBD: `unix:PATH` or `tcp:ADDRESS:PORT`. May be given several times
    ///
    /// Without it, `--vhost-user` and `--xen`: a unix socket named after the image, in $XDG_RUNTIME_DIR, in /run for
    /// root, else in the current directory. Sockets are for this user alone (mode 0600), one that a dead server left is
    /// replaced, one in use is refused.
    #[arg(long, value_name = "ADDRESS", value_parser = Address::from_str)]
    pub(crate) nbd: Vec<Address>,

    /// The name of the export that NBD clients may ask for, besides the empty one
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) export: String,

    /// A unix socket where the front end of a guest finds it as a virtio disk (vhost-user-blk): QEMU, Cloud Hypervisor,
    /// crosvm. May be given several times; each serves one guest at a time
    ///
    /// With it there is no NBD unless `--nbd` is given too. When tapdisk dies or is stopped, the guest waits until it is
    /// started again with the same socket, and then goes on: requests that were under way are done once more.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) vhost_user: Vec<PathBuf>,

    /// How many queues a guest may have on a `--vhost-user` or `--xen` disk [default: 64 and 4]. QEMU asks for one for
    /// each of the guest's processors, Linux on Xen too, but for no more than 4
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) queues: Option<u16>,

    /// Bytes of a logical block as `--vhost-user` and `--xen` guests see it. A disk that was partitioned with one size is of no use
    /// with the other
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = block_size)]
    pub(crate) block_size: u32,

    /// Register the memory of `--vhost-user` guests with the kernel: a little less CPU for each request, but all of that
    /// memory is pinned, so that neither a balloon nor free page reporting gives any of it back to the host
    #[arg(long, hide_short_help = true)]
    pub(crate) pin_guest_memory: bool,

    /// Let `--nbd tcp:` listen on other than loopback addresses. There is no encryption and no password: anyone who
    /// can connect can read and write the disk
    #[arg(long)]
    pub(crate) allow_remote: bool,

    /// How the host's page cache is used
    #[arg(long, value_enum, default_value_t = Cache::Direct)]
    pub(crate) cache: Cache,

    /// What to do when storage fails: tell the guest (`report`), keep the request until the cause is gone (`hold`),
    /// or try again for some time and then tell (`retry:SECONDS`)
    ///
    /// A failed flush is always told, and so is every flush and write after it: Linux forgets data that it could not
    /// write back, so a second flush that succeeds would prove nothing.
    #[arg(long, value_name = "POLICY", default_value = "report", value_parser = on_error)]
    pub(crate) on_error: OnError,

    /// The same for storage that is full (ENOSPC, EDQUOT) [default: as --on-error]
    #[arg(long, value_name = "POLICY", value_parser = on_error)]
    pub(crate) on_enospc: Option<OnError>,

    /// Make operations fail or slow, for drills: OPERATION:ACTION[:FROM..TO][:WHEN]. May be given several times
    ///
    /// OPERATION is read, write, flush, discard, zero, status or any; ACTION an errno such as EIO, or delay=MS;
    /// FROM..TO bytes of the image's file, which are those of the disk where it is raw, with K, M, G, T or s (512-byte
    /// sectors); WHEN nth=N, times=N or every=N. The files of backing images and a data file never fail by it.
    #[arg(long, value_name = "RULE", value_parser = Rule::from_str)]
    pub(crate) fault: Vec<Rule>,

    /// Where to record that a sync has failed, what of an image's map is not in the image yet, and what guests of `--xen`
    /// have under way, for the process that serves the image after a crash of this one
    /// [default: /run/tapdisk for root, else $XDG_RUNTIME_DIR/tapdisk]
    ///
    /// Linux tells of lost data once. An image of which a sync has failed takes no write or flush any more until
    /// tapdisk is told to stop (Ctrl-C, SIGTERM) and started anew; that it died in between changes nothing.
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: Option<PathBuf>,

    /// How much memory the data of all clients' requests may take up together. Each disk of a guest of Xen has a share of
    /// it, and NBD clients have one; none is less than 64M
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = memory)]
    pub(crate) memory: u64,

    /// How io_uring tells of completions; what is fastest depends on kernel and device
    #[arg(long, value_enum, default_value_t = Ring::Auto, hide_short_help = true)]
    pub(crate) ring: Ring,

    /// How the log is written to standard error; RUST_LOG chooses what is logged, as in RUST_LOG=debug
    #[arg(long, value_enum, default_value_t = Log::Text)]
    pub(crate) log: Log,

    #[command(flatten)]
    pub(crate) xen: XenOptions,
}

const EXAMPLES: &str = "\
Examples:
  A new sparse disk of 1 GiB, on a socket that is named in the output:
      tapdisk serve disk.raw --create 1G
  An image that stands on others, which are elsewhere:
      tapdisk serve web.qcow2 --allow-folder /srv/bases
  A volume, on a socket of a given name; requests that find it full wait for space:
      tapdisk serve /dev/vg/guest --nbd unix:/run/guest.sock --on-enospc hold
  A disk for a QEMU guest, by vhost-user:
      tapdisk serve disk.raw --vhost-user /run/guest.sock
  A second disk for the running guest 3 of Xen, and its end:
      tapdisk serve disk.raw --xen 3:xvdb --create-nodes
      tapdisk detach 3:xvdb
  Sectors 1000 to 1007 cannot be read:
      tapdisk serve disk.raw --fault read:EIO:1000s..1008s
";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    Path(PathBuf),
    Null(u64),
    Ram(u64),
}

impl Image {
    /// What the log and its socket are called after.
    pub(crate) fn name(&self) -> String {
        match self {
            Image::Path(path) => path
                .file_name()
                .map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned()),
            Image::Null(_) => "null".into(),
            Image::Ram(_) => "ram".into(),
        }
    }
}

impl FromStr for Image {
    type Err = String;

    fn from_str(text: &str) -> Result<Image, String> {
        match text.split_once(':') {
            Some(("null", bytes)) => size::parse(bytes).map(Image::Null),
            Some(("ram", bytes)) => size::parse(bytes).map(Image::Ram),
            Some(_) | None if text.is_empty() => Err("expected the name of an image".into()),
            Some(_) | None => Ok(Image::Path(text.into())),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Cache {
    /// Not at all (O_DIRECT): errors show where they happen; buffered where the file system has no O_DIRECT
    Direct,
    /// For reads and writes; data is durable after a flush, as always
    Buffered,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Ring {
    /// Cooperative where the kernel has it
    Auto,
    /// Only when asked for (Linux 6.1)
    Deferred,
    /// Without interrupting the thread (Linux 5.19)
    Cooperative,
    /// As every kernel does
    Plain,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Log {
    /// A line of text for each event
    Text,
    /// A line of JSON for each event
    Json,
}

fn on_error(text: &str) -> Result<OnError, String> {
    match text.split_once(':') {
        None if text == "report" => Ok(OnError::Report),
        None if text == "hold" => Ok(OnError::Hold),
        Some(("retry", seconds)) => match seconds.parse() {
            Ok(seconds @ 1..=31_536_000) => Ok(OnError::Retry(Duration::from_secs(seconds))),
            Ok(_) | Err(_) => Err(format!("`{seconds}` is no number of seconds from 1 to 31536000 (a year)")),
        },
        Some(_) | None => Err(format!("`{text}` is none of report, hold and retry:SECONDS")),
    }
}

fn block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err(format!("`{text}` is neither 512 nor 4096")),
    }
}

/// The least that lets the largest request (32 MiB) through beside others, in bytes: `guest::budget` uses no less.
pub(crate) const MEMORY_MIN: u64 = 64 << 20;

fn cache_size(text: &str) -> Result<usize, String> {
    if text == "0" {
        return Ok(0);
    }
    let bytes = size::parse(text)?;
    if bytes < 64 << 10 {
        return Err(format!("{text} is too little: tables need at least 64K"));
    }
    usize::try_from(bytes).map_err(|error| format!("{text} is more than there is: {error}"))
}

fn memory(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    if bytes < MEMORY_MIN {
        return Err(format!("{text} is too little: requests of up to 32 MiB need at least 64M"));
    }
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    pub(crate) fn serve(words: &[&str]) -> Result<Serve, String> {
        let words = ["tapdisk", "serve"].iter().chain(words);
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Serve(serve) => Ok(*serve),
            other @ (Command::Detach(_)
            | Command::Tool(_)
            | Command::Completions { .. }
            | Command::Man { .. }) => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn words_become_what_they_mean() {
        let parsed =
            serve(&["null:1G", "--nbd", "unix:/a:b", "--nbd", "tcp:[::1]:10809", "--on-enospc", "hold"]);
        let parsed = parsed.unwrap();
        assert_eq!(parsed.image, Image::Null(1 << 30));
        assert_eq!(parsed.nbd[0], Address::Unix("/a:b".into()));
        assert_eq!(parsed.nbd[1], Address::Tcp { host: "::1".into(), port: 10809 });
        assert_eq!((parsed.on_error, parsed.on_enospc), (OnError::Report, Some(OnError::Hold)));
        let parsed = serve(&["a:b.raw", "--on-error", "retry:30", "--create", "10M"]).unwrap();
        assert_eq!(parsed.image, Image::Path("a:b.raw".into()));
        assert_eq!(parsed.on_error, OnError::Retry(Duration::from_secs(30)));
        assert_eq!(parsed.create, Some(10 << 20));
    }

    #[test]
    fn what_is_wrong_is_said_with_what_was_expected() {
        for (words, named) in [
            (vec!["disk", "--nbd", "/run/a"], "expected unix:PATH or tcp:ADDRESS:PORT"),
            (vec!["disk", "--nbd", "tcp:nowhere"], "expected unix:PATH or tcp:ADDRESS:PORT"),
            (vec!["disk", "--on-error", "retry:0"], "no number of seconds"),
            (vec!["disk", "--on-error", "panic"], "none of report, hold and retry:SECONDS"),
            (vec!["disk", "--memory", "1M"], "at least 64M"),
            (vec!["disk", "--block-size", "1024"], "neither 512 nor 4096"),
            (vec!["disk", "--queues", "0"], "not in 1..=256"),
            (vec!["disk", "--create", "12Q"], "no unit of size"),
            (vec!["ram:lots"], "no unit of size"),
            (vec!["disk", "--fault", "write:EWHAT"], "no action"),
            (vec!["disk", "--format", "qcow9"], "there are raw, qcow, qcow2 and vhd"),
            (vec!["disk", "--cache-size", "1K"], "at least 64K"),
        ] {
            let error = serve(&words).unwrap_err();
            assert!(error.contains(named), "{words:?}: {error}");
        }
    }
}
