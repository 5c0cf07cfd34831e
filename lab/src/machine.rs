//! A machine: QEMU, emulating all of it, and in it a program that does as we ask.

use crate::agent::{Agent, Answer};
use crate::command::{self, until, words};
use crate::console::Console;
use crate::packages::Tree;
use crate::shell::{PATIENCE, Shell};
use anyhow::{Context, Result, bail};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// QEMU's command line as every machine's begins: nothing but a serial line, and a port for the agent.
pub(crate) fn emulator(tools: &Tree, agent: &Path) -> Command {
    let mut qemu = tools.command("usr/bin/qemu-system-x86_64");
    let folder = |inside: &str| tools.path(inside).display().to_string();
    qemu.env("QEMU_MODULE_DIR", folder("usr/lib/x86_64-linux-gnu/qemu"));
    for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
        qemu.args(["-L", &folder(firmware)]);
    }
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.args(["-serial", "stdio", "-device", "virtio-serial-pci"]);
    qemu.args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", agent.display())]);
    qemu.args(["-device", "virtserialport,chardev=agent,name=lab"]);
    qemu
}

/// The same command, killed by the kernel once the thread that started it has ended, and in a group of its own, so that
/// Ctrl-C does not reach it before us.
pub fn tied_to_us(command: &Command) -> Command {
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => tied.env(name, value),
            None => tied.env_remove(name),
        };
    }
    tied.process_group(0);
    tied
}

/// A running machine. Dropped, it is gone as if its power had been cut.
pub struct Machine {
    child: Child,
    console: Console,
    words: String,
    /// There from the moment when the machine has started.
    agent: Option<Agent>,
}

impl Machine {
    /// Starts QEMU as `emulator` began to, and waits until what it runs obeys.
    pub(crate) fn start(qemu: &Command, agent: &Path, console: &Path) -> Result<Machine> {
        if agent.exists() {
            std::fs::remove_file(agent)?;
        }
        let mut qemu = tied_to_us(qemu);
        let (reader, writer) = std::io::pipe()?;
        qemu.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let words = words(&qemu);
        let child = command::start(&mut qemu)?;
        // Ours are the last ends for writing.
        drop(qemu);
        let console = Console::listen(reader, console)?;
        let mut machine = Machine { child, console, words, agent: None };
        machine.wait_for_the_agent(agent).with_context(|| machine.about())?;
        Ok(machine)
    }

    fn wait_for_the_agent(&mut self, socket: &Path) -> Result<()> {
        let child = &mut self.child;
        let mut stream = None;
        until(PATIENCE, "QEMU listens", || {
            if let Some(status) = child.try_wait()? {
                bail!("QEMU ended at once: {status}");
            }
            stream = UnixStream::connect(socket).ok();
            Ok(stream.is_some())
        })?;
        self.agent = Some(Agent::greet(stream.context("it was just connected")?, PATIENCE)?);
        Ok(())
    }

    /// What it said on its serial line.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What whoever looks for a failure's cause wants to see.
    pub fn about(&self) -> String {
        format!("QEMU was started as\n{}\n{}", self.words, self.console.tail(40))
    }

    /// Cuts the power.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop).context("wait for QEMU")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("lab: could not end QEMU: {error}");
        }
    }
}

impl Shell for Machine {
    fn run(&mut self, script: &str) -> Result<Answer> {
        self.agent.as_mut().context("the machine has not started")?.run(script, PATIENCE)
    }
}
