//! `tapdisk serve`: opens the image, puts the disk together, lets clients in, and ends in order.

use std::path::PathBuf;
use std::rc::Rc;

use anyhow::Context;
use block::Pool;
use disk::{Config, Disk, Policy};
use guest::listen::{Address, Listener};
use guest::nbd::{Exports, Server, Settings};
use guest::vhost;
use image::Chain;
use runtime::{Mailbox, RingFlags, Runtime, Sender, Uring};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::{Handle as SignalHandle, Signals};

use crate::announce::{Places, announce};
use crate::cli::{MEMORY_MIN, Ring, Serve};
use crate::contents::Contents;
use crate::xen::Guests;
use crate::{logging, size};

/// Memory for requests that the kernel is told of once (registered buffers).
const ARENA: usize = 16 << 20;
/// How many queues a guest by vhost-user may have, if nobody says.
const QUEUES: u16 = 64;

/// What the main thread tells the disk's.
enum Message {
    Stop,
    LogState,
    Grow,
    /// A guest of Xen has no disk of ours any more; why, if that is not as it should be.
    GuestEnded(Option<String>),
}

/// Serves until told to stop.
pub(crate) fn run(arguments: &Serve) -> anyhow::Result<()> {
    let _log = logging::start(arguments.log)?;
    raise_file_limit();
    // SIGXFSZ kills by default; caught, writes beyond the limit fail with EFBIG and are answered.
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGUSR1, SIGHUP, SIGXFSZ]).context("signals cannot be waited for")?;
    let ended = signals.handle();
    let mailbox = Mailbox::default();
    let messages = mailbox.sender();
    std::thread::scope(|scope| {
        let disk = std::thread::Builder::new()
            .name("tapdisk-disk".into())
            .spawn_scoped(scope, move || {
                let _ended = EndSignals(ended);
                serve(arguments, mailbox)
            })
            .context("no thread for the disk")?;
        pass_on_signals(&mut signals, &messages);
        disk.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the disk's thread panicked (a bug in tapdisk)")))
    })
}

/// Ends the main thread's wait for signals when the disk's thread ends, however it does.
struct EndSignals(SignalHandle);

impl Drop for EndSignals {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn pass_on_signals(signals: &mut Signals, messages: &Sender<Message>) {
    let mut stopping = false;
    for signal in signals.forever() {
        match signal {
            SIGUSR1 => messages.send(Message::LogState),
            SIGHUP => messages.send(Message::Grow),
            SIGINT | SIGTERM if stopping => {
                eprintln!("tapdisk: told to stop a second time: ends at once, without a flush");
                std::process::exit(128 + signal);
            }
            SIGINT | SIGTERM => {
                stopping = true;
                messages.send(Message::Stop);
            }
            _ => {} // SIGXFSZ: the write that caused it is answered with EFBIG
        }
    }
}

/// Each client is a descriptor: as many as the system lets us have.
fn raise_file_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit) {
        tracing::debug!(%errno, "the limit on open files stays as it is");
    }
}

/// The disk's thread, from its start to its end.
fn serve(arguments: &Serve, mut mailbox: Mailbox<Message>) -> anyhow::Result<()> {
    let pool = Pool::new(ARENA);
    let uring = Uring::open(ring_flags(arguments.ring), &pool)?;
    let runtime = Runtime::new(Box::new(uring), pool);
    let handle = runtime.handle().clone();
    // Before the image is opened: where there is no Xen, nothing has been touched.
    let guests = Guests::find(&arguments.xen)?;
    let contents = Contents::open(&runtime, arguments)?;
    let mut listeners = Vec::new();
    for address in addresses(arguments)? {
        listeners.extend(Listener::bind(&address, arguments.allow_remote)?);
    }
    let mut front_doors = Vec::new();
    for path in &arguments.vhost_user {
        front_doors.push(Listener::unix(&std::path::absolute(path)?)?);
    }
    let config = Config {
        name: arguments.image.name(),
        read_only: arguments.read_only,
        policy: Policy { on_error: arguments.on_error, on_enospc: arguments.on_enospc },
    };
    let memory = share_of_memory(arguments, guests.count(), !listeners.is_empty())?;
    let settings = Settings { memory, ..Settings::default() };
    let front_settings = vhost::Settings {
        name: arguments.image.name(),
        queues: arguments.queues.unwrap_or(QUEUES),
        block: arguments.block_size,
        id: arguments.image.name(),
        pin_memory: arguments.pin_guest_memory,
    };
    let places = Places {
        uris: listeners.iter().map(|listener| listener.uri(&arguments.export)).collect(),
        sockets: front_doors.iter().map(ToString::to_string).collect(),
        xen: guests.places(&arguments.xen),
    };
    let guests = guests.prepare(arguments, memory)?;
    let others = !listeners.is_empty() || !front_doors.is_empty();
    let export = arguments.export.clone();
    let disk = Disk::new(&handle, contents.chain.clone(), config);
    runtime.block_on(async move {
        let served: Rc<dyn guest::Disk> = Rc::new(disk.clone());
        let exports = Exports::one(&export, disk.name(), served.clone())?;
        let server = Server::new(handle.clone(), exports, settings);
        listeners.into_iter().for_each(|listener| server.listen(listener));
        let front_ends = vhost::Server::new(handle.clone(), served.clone(), front_settings);
        front_doors.into_iter().for_each(|listener| front_ends.listen(listener));
        let messages = mailbox.sender();
        let (guests, started) = guests.start(&handle, &served, move |why| messages.send(Message::GuestEnded(why)));
        // One that was not begun with waits for the next process, as far as can be told from here.
        let mut guests_live_on = started.is_err();
        let failed = match started {
            Ok(()) => {
                announce(&disk, &contents.how, &places);
                until_over(&disk, &contents.chain, &mut mailbox, guests.len(), others).await
            }
            Err(error) => Some(format!("{error:#}")),
        };
        // Guests first: what is held for one stays with it for whoever serves it next.
        guests_live_on |= front_ends.drain().await;
        for guest in guests {
            guests_live_on |= guest.drain().await;
        }
        disk.give_up_held();
        server.drain().await;
        // An image that could not be flushed is left as a crash would leave it.
        let closed = match disk.close().await {
            Ok(()) => contents.close().await,
            Err(error) => Err(error),
        };
        disk.log_state();
        // Whoever told it to stop learns from its end what is lost, and starts it anew knowing that. Guests that live on
        // do not: for them the next one is the same disk.
        if !guests_live_on {
            contents.forget_poison();
            if closed.is_ok() {
                contents.forget_ledger();
            }
        } else if disk.poison().is_some() {
            tracing::warn!(
                disk = disk.name(),
                "stays poisoned, since a guest lives on: shut the guest down, then stop and start tapdisk once more"
            );
        }
        closed.context("data that clients were told is written may be lost")?;
        failed.map_or(Ok(()), |why| Err(anyhow::anyhow!(why)))
    })
}

/// Returns when it is to stop: told so, or when the last of so many guests of Xen has gone and there are no `others`. It
/// gives the reason of the first guest that ended out of order.
async fn until_over(
    disk: &Disk,
    chain: &Chain,
    mailbox: &mut Mailbox<Message>,
    mut guests: usize,
    others: bool,
) -> Option<String> {
    let mut failed = None;
    loop {
        match mailbox.receive().await {
            Message::LogState => {
                disk.log_state();
                let bytes = chain.memory();
                tracing::info!(disk = disk.name(), bytes, "memory for tables of images");
            }
            // A task of its own: storage that hangs must not keep the order to stop from being heard.
            Message::Grow => disk.handle().spawn(grow(disk.clone())),
            Message::Stop => {
                tracing::info!(disk = disk.name(), "told to stop: answers what it has taken, then flushes");
                return failed;
            }
            Message::GuestEnded(why) => {
                guests = guests.saturating_sub(1);
                if let Some(why) = &why {
                    tracing::error!(disk = disk.name(), why, "a guest is not served any more");
                }
                failed = failed.or(why);
                if guests == 0 && !others {
                    tracing::info!(disk = disk.name(), "nobody is left to be served: flushes, then ends");
                    return failed;
                }
            }
        }
    }
}

/// Bytes for the data of NBD clients, and for that of each disk of a guest of Xen.
fn share_of_memory(arguments: &Serve, guests: usize, nbd: bool) -> anyhow::Result<usize> {
    let parts = (guests + usize::from(nbd)).max(1) as u64;
    let share = arguments.memory / parts;
    if share < MEMORY_MIN {
        let (memory, needed) = (size::show(arguments.memory), size::show(MEMORY_MIN * parts));
        anyhow::bail!(
            "--memory {memory} is too little: {needed} are needed, 64M for each disk of Xen and for NBD clients"
        );
    }
    Ok(share as usize)
}

/// Takes in what was added to the image, and logs what came of it.
async fn grow(disk: Disk) {
    let old = disk.size();
    let (name, result) = (disk.name().to_owned(), disk.grow().await);
    match result {
        Ok(new) if new == old => {
            tracing::info!(disk = name, size = old, "told to grow, but nothing was added")
        }
        Ok(new) => tracing::info!(disk = name, old, new, "the disk has grown, in bytes"),
        Err(error) => tracing::error!(disk = name, size = old, %error, "told to grow, but it stays as it is"),
    }
}

fn ring_flags(ring: Ring) -> RingFlags {
    match ring {
        Ring::Auto => RingFlags::Auto,
        Ring::Deferred => RingFlags::Deferred,
        Ring::Cooperative => RingFlags::Cooperative,
        Ring::Plain => RingFlags::Plain,
    }
}

/// Where to listen: what was asked for, else a socket named after the image where this user's sockets are.
fn addresses(arguments: &Serve) -> anyhow::Result<Vec<Address>> {
    if !(arguments.nbd.is_empty() && arguments.vhost_user.is_empty() && arguments.xen.disks.is_empty()) {
        return arguments.nbd.iter().map(absolute).collect();
    }
    let directory = match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(directory) if directory.is_dir() => directory,
        Some(_) | None if rustix::process::geteuid().is_root() => PathBuf::from("/run"),
        Some(_) | None => PathBuf::from("."),
    };
    let socket = directory.join(format!("tapdisk-{}.sock", arguments.image.name()));
    Ok(vec![absolute(&Address::Unix(socket))?])
}

/// With a path that means the same in any directory: it is told to clients.
fn absolute(address: &Address) -> anyhow::Result<Address> {
    Ok(match address {
        Address::Unix(path) => Address::Unix(std::path::absolute(path)?),
        Address::Tcp { .. } => address.clone(),
    })
}

#[cfg(test)]
mod tests {
    use image::Raw;
    use storage::Ram;

    use super::*;

    /// What ends a disk that has so many guests of Xen, and maybe others, when so many of these end; and what has failed.
    fn end(guests: usize, others: bool, ended: &[Option<&str>]) -> (&'static str, Option<String>) {
        let pool = Pool::new(1 << 16);
        let runtime = Runtime::new(Box::new(Uring::open(RingFlags::Auto, &pool).unwrap()), pool);
        let config = Config { name: "disk".into(), read_only: false, policy: Policy::default() };
        let raw = Rc::new(Raw::new(Rc::new(Ram::new(1 << 20))));
        let chain = Rc::new(Chain::new(runtime.handle(), raw));
        let disk = Disk::new(runtime.handle(), chain.clone(), config);
        let mut mailbox = Mailbox::default();
        let sender = mailbox.sender();
        for why in ended {
            sender.send(Message::GuestEnded(why.map(str::to_owned)));
        }
        [Message::Stop, Message::LogState].into_iter().for_each(|message| sender.send(message));
        runtime.block_on(async move {
            let failed = until_over(&disk, &chain, &mut mailbox, guests, others).await;
            let ended = match mailbox.receive().await {
                Message::LogState => "told to stop",
                Message::Stop => "the last guest",
                Message::GuestEnded(_) | Message::Grow => "a guest that was not the last",
            };
            (ended, failed)
        })
    }

    #[test]
    fn it_ends_with_its_last_guest_unless_others_are_served() {
        assert_eq!(end(2, false, &[None, None]), ("the last guest", None));
        assert_eq!(end(2, false, &[None]), ("told to stop", None));
        assert_eq!(end(0, false, &[]), ("told to stop", None));
        assert_eq!(end(1, true, &[None]), ("told to stop", None));
    }

    #[test]
    fn what_ended_a_guest_out_of_order_is_known_in_the_end() {
        let lost = || Some("the store is lost".to_owned());
        assert_eq!(end(3, false, &[None, Some("the store is lost"), None]), ("the last guest", lost()));
        assert_eq!(end(2, false, &[Some("the store is lost"), Some("too")]), ("the last guest", lost()));
        assert_eq!(end(1, true, &[Some("the store is lost")]), ("told to stop", lost()));
    }

    #[test]
    fn memory_is_shared_and_a_share_too_small_for_anything_is_refused() {
        let share = |words: &[&str], guests, nbd| {
            let serve = crate::cli::tests::serve(&[&["disk"], words].concat()).unwrap();
            share_of_memory(&serve, guests, nbd).map_err(|error| error.to_string())
        };
        assert_eq!(share(&[], 0, true), Ok(256 << 20));
        assert_eq!(share(&[], 0, false), Ok(256 << 20));
        assert_eq!(share(&[], 1, false), Ok(256 << 20));
        assert_eq!(share(&[], 3, true), Ok(64 << 20));
        assert_eq!(share(&["--memory", "1G"], 16, false), Ok(64 << 20));
        let error = share(&["--memory", "64M"], 1, true).unwrap_err();
        assert!(error.contains("128 MiB are needed"), "{error}");
        let error = share(&[], 5, false).unwrap_err();
        assert!(error.contains("--memory 256 MiB is too little: 320 MiB are needed"), "{error}");
    }
}
