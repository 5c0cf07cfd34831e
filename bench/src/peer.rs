//! A peer: a server that can be measured, and the commands that make it serve each back end at its best.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::client;
use crate::device::Device;

/// What a server keeps its bytes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// Nothing: the cost of the protocol alone.
    Null,
    /// Memory of the server's own, fully written.
    Ram,
    /// A file in the page cache.
    Cached,
    /// The same file, past the page cache.
    Direct,
}

impl Backend {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Backend::Null => "null",
            Backend::Ram => "ram",
            Backend::Cached => "cached",
            Backend::Direct => "direct",
        }
    }

    pub(crate) fn has_file(self) -> bool {
        match self {
            Backend::Null | Backend::Ram => false,
            Backend::Cached | Backend::Direct => true,
        }
    }
}

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    Nbd,
    VhostUser,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Protocol::Nbd => "NBD",
            Protocol::VhostUser => "vhost-user",
        }
    }
}

/// A connection to a server, ready for requests.
pub(crate) enum Client {
    Nbd(client::Client),
    VhostUser(Device),
}

impl Client {
    pub(crate) fn size(&self) -> u64 {
        match self {
            Client::Nbd(client) => client.size,
            Client::VhostUser(device) => device.size,
        }
    }
}

/// A command is split at spaces, then `{image}`, `{socket}`, `{directory}` (where the socket lies), `{config}` and
/// `{tapdisk}` are put in.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) protocol: Protocol,
    version: &'static str,
    /// The name of its export.
    export: &'static str,
    /// What to write into the file that `{config}` names.
    config: &'static str,
    null: String,
    ram: String,
    cached: String,
    direct: String,
}

/// The servers known by name, ours first.
///
/// Each at its best, as measured: QEMU's io_uring needs half the CPU of its threads on the page cache and equals its
/// native AIO on O_DIRECT; its storage daemon does better in an iothread than in its main loop (`qemu-nbd` has only
/// that); nbdkit's default of 16 threads has the most IOPS at depth 32.
pub(crate) fn known() -> Vec<Peer> {
    vec![
        Peer {
            name: "tapdisk".into(),
            protocol: Protocol::Nbd,
            version: "{tapdisk} --version",
            export: "",
            config: "",
            null: "{tapdisk} serve null:1G --nbd unix:{socket}".into(),
            ram: "{tapdisk} serve ram:1G --nbd unix:{socket}".into(),
            cached: "{tapdisk} serve {image} --nbd unix:{socket} --cache buffered".into(),
            direct: "{tapdisk} serve {image} --nbd unix:{socket} --cache direct".into(),
        },
        Peer {
            name: "qemu-nbd".into(),
            protocol: Protocol::Nbd,
            version: "qemu-nbd --version",
            export: "",
            config: "",
            null: r#"qemu-nbd --persistent -k {socket} json:{"driver":"null-co","size":1073741824,"read-zeroes":true}"#.into(),
            ram: String::new(),
            cached: "qemu-nbd --persistent -k {socket} -f raw --cache=writeback --aio=io_uring {image}".into(),
            direct: "qemu-nbd --persistent -k {socket} -f raw --cache=none --aio=io_uring {image}".into(),
        },
        Peer {
            name: "qemu-storage-daemon".into(),
            protocol: Protocol::Nbd,
            version: "qemu-storage-daemon --version",
            export: "disk",
            config: "",
            null: "qemu-storage-daemon --object iothread,id=thread --blockdev null-co,node-name=disk,size=1073741824,read-zeroes=on \
                   --nbd-server addr.type=unix,addr.path={socket} \
                   --export nbd,id=disk,node-name=disk,writable=on,iothread=thread"
                .into(),
            ram: String::new(),
            cached: "qemu-storage-daemon --object iothread,id=thread --blockdev file,node-name=disk,filename={image},aio=io_uring \
                     --nbd-server addr.type=unix,addr.path={socket} \
                     --export nbd,id=disk,node-name=disk,writable=on,iothread=thread"
                .into(),
            direct: "qemu-storage-daemon --object iothread,id=thread \
                     --blockdev file,node-name=disk,filename={image},cache.direct=on,aio=io_uring \
                     --nbd-server addr.type=unix,addr.path={socket} \
                     --export nbd,id=disk,node-name=disk,writable=on,iothread=thread"
                .into(),
        },
        Peer {
            name: "nbdkit".into(),
            protocol: Protocol::Nbd,
            version: "nbdkit --version",
            export: "",
            config: "",
            null: "nbdkit -f -U {socket} null 1G".into(),
            ram: "nbdkit -f -U {socket} memory 1G allocator=malloc".into(),
            cached: "nbdkit -f -U {socket} file {image}".into(),
            direct: String::new(), // its file plugin has no O_DIRECT
        },
        Peer {
            name: "nbd-server".into(),
            protocol: Protocol::Nbd,
            version: "nbd-server -V",
            export: "disk",
            config: NBD_SERVER_CONFIG,
            null: String::new(),
            ram: String::new(),
            cached: "nbd-server -d -C {config}".into(),
            direct: String::new(), // it has no O_DIRECT
        },
        Peer {
            name: "tapdisk".into(),
            protocol: Protocol::VhostUser,
            version: "{tapdisk} --version",
            export: "",
            config: "",
            null: "{tapdisk} serve null:1G --vhost-user {socket}".into(),
            ram: "{tapdisk} serve ram:1G --vhost-user {socket}".into(),
            cached: "{tapdisk} serve {image} --vhost-user {socket} --cache buffered".into(),
            direct: "{tapdisk} serve {image} --vhost-user {socket} --cache direct".into(),
        },
        Peer {
            name: PINNED.into(),
            protocol: Protocol::VhostUser,
            version: "{tapdisk} --version",
            export: "",
            config: "",
            null: String::new(), // where no memory is given to the kernel, pinning it changes nothing
            ram: String::new(),
            cached: "{tapdisk} serve {image} --vhost-user {socket} --pin-guest-memory --cache buffered".into(),
            direct: "{tapdisk} serve {image} --vhost-user {socket} --pin-guest-memory --cache direct".into(),
        },
        Peer {
            name: "qemu-storage-daemon".into(),
            protocol: Protocol::VhostUser,
            version: "qemu-storage-daemon --version",
            export: "",
            config: "",
            null: "qemu-storage-daemon --object iothread,id=thread --blockdev null-co,node-name=disk,size=1073741824,read-zeroes=on \
                   --export vhost-user-blk,id=disk,node-name=disk,writable=on,iothread=thread,addr.type=unix,addr.path={socket}"
                .into(),
            ram: String::new(),
            cached: "qemu-storage-daemon --object iothread,id=thread --blockdev file,node-name=disk,filename={image},aio=io_uring \
                     --export vhost-user-blk,id=disk,node-name=disk,writable=on,iothread=thread,addr.type=unix,addr.path={socket}"
                .into(),
            direct: "qemu-storage-daemon --object iothread,id=thread \
                     --blockdev file,node-name=disk,filename={image},cache.direct=on,aio=io_uring \
                     --export vhost-user-blk,id=disk,node-name=disk,writable=on,iothread=thread,addr.type=unix,addr.path={socket}"
                .into(),
        },
        Peer {
            name: "cloud-hypervisor".into(),
            protocol: Protocol::VhostUser,
            version: "vhost_user_block --version",
            export: "",
            config: "",
            null: String::new(),
            ram: String::new(),
            cached: "vhost_user_block --block-backend path={image},socket={socket},direct=false,poll_queue=false".into(),
            direct: "vhost_user_block --block-backend path={image},socket={socket},direct=true,poll_queue=false".into(),
        },
        Peer {
            name: "spdk".into(),
            protocol: Protocol::VhostUser,
            version: "spdk_tgt --version",
            export: "",
            config: SPDK_CONFIG,
            null: String::new(),
            ram: String::new(),
            cached: String::new(), // its aio bdev opens files with O_DIRECT
            direct: "spdk_tgt -S {directory} -c {config} -m 0x2 --no-huge -s 512".into(),
        },
        Peer {
            name: "ideal".into(),
            protocol: Protocol::Nbd,
            version: "",
            export: "",
            config: "",
            null: "{bench} ideal {socket}".into(),
            ram: String::new(),
            cached: String::new(),
            direct: String::new(),
        },
    ]
}

/// tapdisk with the guest's memory registered with the kernel: measured only when asked for.
pub(crate) const PINNED: &str = "tapdisk-pinned";

const NBD_SERVER_CONFIG: &str = "[generic]
unixsock = {socket}
[disk]
exportname = {image}
flush = true
fua = true
";

/// The socket has the controller's name.
const SPDK_CONFIG: &str = r#"{"subsystems": [
{"subsystem": "bdev", "config": [
    {"method": "bdev_aio_create", "params": {"name": "disk", "filename": "{image}", "block_size": 512}}]},
{"subsystem": "vhost_blk", "config": [
    {"method": "vhost_create_blk_controller", "params": {"ctrlr": "socket", "dev_name": "disk", "cpumask": "0x2"}}]}
]}"#;

/// Where the parts of a command are.
pub(crate) struct Places<'a> {
    pub(crate) tapdisk: &'a Path,
    pub(crate) image: &'a Path,
    pub(crate) socket: PathBuf,
    pub(crate) config: PathBuf,
}

impl Peer {
    /// A server of the user's own: `NAME=COMMAND`, the same for every back end.
    pub(crate) fn parse(protocol: Protocol, text: &str) -> Result<Peer> {
        let Some((name, command)) = text.split_once('=') else {
            bail!("expected NAME=COMMAND, found {text:?}")
        };
        let [null, ram, cached, direct] = std::array::from_fn(|_| command.to_owned());
        Ok(Peer {
            name: name.into(),
            protocol,
            version: "",
            export: "",
            config: "",
            null,
            ram,
            cached,
            direct,
        })
    }

    /// Its row in a table.
    pub(crate) fn title(&self) -> String {
        format!("{} {}", self.name, self.protocol.name())
    }

    pub(crate) fn connect(&self, socket: &Path) -> Result<Client> {
        match self.protocol {
            Protocol::Nbd => client::Client::connect(socket, self.export).map(Client::Nbd),
            Protocol::VhostUser => Device::connect(socket).map(Client::VhostUser),
        }
    }

    /// Says the command for a back end as it is written here; none if this peer has no such back end.
    pub(crate) fn template(&self, backend: Backend) -> Option<&str> {
        let template = match backend {
            Backend::Null => &self.null,
            Backend::Ram => &self.ram,
            Backend::Cached => &self.cached,
            Backend::Direct => &self.direct,
        };
        (!template.is_empty()).then_some(template)
    }

    /// The command to start; none if this peer has no such back end.
    pub(crate) fn command(&self, backend: Backend, places: &Places<'_>) -> Result<Option<Command>> {
        let Some(template) = self.template(backend) else { return Ok(None) };
        if template.contains("{config}") {
            std::fs::write(&places.config, places.put(self.config)?)?;
        }
        places.command(template).map(Some)
    }

    /// The first line of what it says about its version, or none if it is not installed.
    pub(crate) fn version(&self, places: &Places<'_>) -> Option<String> {
        if self.version.is_empty() {
            return Some(String::new());
        }
        let output = places.command(self.version).ok()?.output().ok()?;
        let line = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().next().map(str::to_owned);
        let line = line(&output.stdout).or_else(|| line(&output.stderr)).unwrap_or_default();
        Some(line.trim_start_matches("This is ").trim_end_matches('.').to_owned())
    }
}

impl Places<'_> {
    fn command(&self, template: &str) -> Result<Command> {
        let mut words = template.split_whitespace();
        let Some(program) = words.next() else { bail!("an empty command") };
        let mut command = Command::new(self.put(program)?);
        for word in words {
            command.arg(self.put(word)?);
        }
        Ok(command)
    }

    fn put(&self, text: &str) -> Result<String> {
        let bench = std::env::current_exe()?;
        let mut text = text.to_owned();
        for (name, path) in [
            ("{bench}", bench.as_path()),
            ("{tapdisk}", self.tapdisk),
            ("{image}", self.image),
            ("{socket}", &self.socket),
            ("{directory}", self.socket.parent().context("a socket lies in a directory")?),
            ("{config}", &self.config),
        ] {
            let Some(path) = path.to_str() else { bail!("{} is not UTF-8", path.display()) };
            text = text.replace(name, path);
        }
        Ok(text)
    }
}
