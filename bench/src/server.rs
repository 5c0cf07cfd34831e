//! A server that runs for one measurement: started on its own core, ended with it, never left behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::cpu;
use crate::peer::Client;

/// The load runs here,
pub(crate) const CLIENT_CORE: usize = 0;
/// and what is measured runs here.
pub(crate) const SERVER_CORE: usize = 1;

const START_MAX: Duration = Duration::from_secs(20);
const END_MAX: Duration = Duration::from_secs(20);

pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts a server and waits until it takes a client.
    pub(crate) fn start(
        command: Command,
        socket: &Path,
        connect: impl Fn() -> Result<Client>,
    ) -> Result<(Server, Client)> {
        remove_if_there(socket)?;
        let log = socket.with_extension("log");
        let mut server = Server { child: spawn(command, &log)?, socket: socket.to_owned(), log };
        let start = Instant::now();
        loop {
            let error = match connect() {
                Ok(client) => return Ok((server, client)),
                Err(error) => error,
            };
            if let Some(status) = server.child.try_wait()? {
                bail!("the server ended at once, {status}; it said: {:?}", server.said());
            }
            if start.elapsed() > START_MAX {
                return Err(error)
                    .context(format!("no client was taken in {START_MAX:?}; it said: {:?}", server.said()));
            }
            sleep(Duration::from_millis(5));
        }
    }

    /// What it wrote to its standard output and error.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = end(&mut self.child).and_then(|()| remove_if_there(&self.socket)) {
            eprintln!("could not end process {}: {error:#}", self.child.id());
        }
    }
}

/// Starts a process on the server's core. It dies with us, however we die.
pub(crate) fn spawn(command: Command, log: &Path) -> Result<Child> {
    let log = File::create(log).with_context(|| format!("create {}", log.display()))?;
    let mut guarded = Command::new("setpriv");
    guarded.args(["--pdeathsig", "KILL"]).arg(command.get_program()).args(command.get_args());
    guarded.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    cpu::pin(SERVER_CORE)?; // a child inherits the core
    let child = guarded.spawn().with_context(|| format!("start {guarded:?}"));
    cpu::pin(CLIENT_CORE)?;
    child
}

/// Asks a process that we started to end, and kills it if it does not.
pub(crate) fn end(child: &mut Child) -> Result<()> {
    if child.try_wait()?.is_some() {
        return Ok(());
    }
    kill_process(Pid::from_child(child), Signal::TERM)?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > END_MAX {
            eprintln!("process {} did not end in {END_MAX:?} after SIGTERM: killed", child.id());
            child.kill()?;
            child.wait()?;
            return Ok(());
        }
        sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn remove_if_there(socket: &Path) -> Result<()> {
    match fs::remove_file(socket) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {}", socket.display())),
    }
}
