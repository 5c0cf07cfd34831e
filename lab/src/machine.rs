//! A machine: QEMU, emulating all of it, with disks that others serve by vhost-user.

use crate::agent::{Agent, Answer};
use crate::command::{self, until, words};
use crate::console::Console;
use crate::kernel::Kernel;
use crate::packages::Tree;
use anyhow::{Context, Result, bail, ensure};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// Emulation on a busy computer is slow, and that is no failure.
const PATIENCE: Duration = Duration::from_secs(240);

/// A disk as QEMU is given it. The first is /dev/vda, and so on.
pub struct Disk {
    /// Where its server listens.
    pub socket: PathBuf,
    /// How many queues the guest uses.
    pub queues: u16,
}

/// What is started.
pub struct Plan<'a> {
    /// What QEMU is part of.
    pub tools: &'a Tree,
    /// What is booted.
    pub kernel: &'a Kernel,
    /// And its first file system.
    pub initramfs: &'a Path,
    /// CPUs of the guest.
    pub cpus: u16,
    /// Memory of the guest, in MiB.
    pub memory_mib: u32,
    /// Words for the kernel's command line: `lab.root=/dev/vda` starts from that disk.
    pub words: &'a str,
    /// In their order.
    pub disks: Vec<Disk>,
    /// A folder for its sockets, with a short path.
    pub sockets: &'a Path,
    /// Where its console is written to.
    pub console: PathBuf,
}

impl Plan<'_> {
    fn command(&self) -> Command {
        let mut qemu = self.tools.command("usr/bin/qemu-system-x86_64");
        let folder = |inside: &str| self.tools.path(inside).display().to_string();
        qemu.env("QEMU_MODULE_DIR", folder("usr/lib/x86_64-linux-gnu/qemu"));
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            qemu.args(["-L", &folder(firmware)]);
        }
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", &self.cpus.to_string()]);
        // The disks' servers work in the guest's memory, so it must be shareable.
        let memory = self.memory_mib;
        qemu.args(["-m", &memory.to_string(), "-machine", "q35,memory-backend=memory"]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={memory}M,share=on")]);
        let agent = self.agent_socket();
        qemu.args(["-serial", "stdio", "-device", "virtio-serial-pci"]);
        qemu.args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", agent.display())]);
        qemu.args(["-device", "virtserialport,chardev=agent,name=lab"]);
        for (number, disk) in self.disks.iter().enumerate() {
            // Without `reconnect-ms`, a server that dies takes the disk with it.
            let socket = disk.socket.display();
            qemu.args(["-chardev", &format!("socket,id=disk{number},path={socket},reconnect-ms=200")]);
            let slot = FIRST_SLOT + number;
            qemu.args([
                "-device",
                &format!("vhost-user-blk-pci,chardev=disk{number},num-queues={},addr={slot:#x}", disk.queues),
            ]);
        }
        qemu.arg("-kernel").arg(&self.kernel.vmlinux).arg("-initrd").arg(self.initramfs);
        // All of the kernel's words are kept for `dmesg`; those that are no worse than usual don't slow down the console.
        let kernel = "console=ttyS0 quiet loglevel=5 log_buf_len=4M mitigations=off nokaslr panic=-1";
        qemu.args(["-append", &format!("{kernel} {}", self.words)]);
        qemu
    }

    fn agent_socket(&self) -> PathBuf {
        self.sockets.join("agent")
    }

    /// Starts it and waits until it obeys.
    pub fn start(&self) -> Result<Machine> {
        let socket = self.agent_socket();
        if socket.exists() {
            std::fs::remove_file(&socket)?;
        }
        let mut qemu = tied_to_us(&self.command());
        let (reader, writer) = std::io::pipe()?;
        qemu.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let words = words(&qemu);
        let child = command::start(&mut qemu)?;
        // Ours are the last ends for writing.
        drop(qemu);
        let console = Console::listen(reader, &self.console)?;
        let mut machine = Machine { child, console, words, agent: None };
        machine.wait_for_the_agent(&socket).with_context(|| machine.about())?;
        machine.expect_disks(self.disks.len()).with_context(|| machine.about())?;
        Ok(machine)
    }
}

/// The disks' places on the bus, behind what q35 has of its own.
const FIRST_SLOT: usize = 0x10;

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

    /// The names of disks follow from the order in which the kernel finds them: make sure that it is ours.
    fn expect_disks(&mut self, count: usize) -> Result<()> {
        for (number, letter) in (b'a'..=b'z').enumerate().take(count) {
            let name = format!("vd{}", char::from(letter));
            let path = self.sh(&format!("readlink /sys/block/{name}"))?;
            let place = format!("0000:00:{:02x}.0", FIRST_SLOT + number);
            ensure!(path.contains(&place), "{name} is at {path}, and not at {place}");
        }
        Ok(())
    }

    /// Runs a script in its shell, and says how that went.
    pub fn run(&mut self, script: &str) -> Result<Answer> {
        self.agent.as_mut().context("the machine has not started")?.run(script, PATIENCE)
    }

    /// Runs a script that must succeed, and returns what it said.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        let Answer { status, said } = self.run(script)?;
        ensure!(status == 0, "in the guest, status {status}: {script}\n{said}");
        Ok(said)
    }

    /// Starts a script and does not wait for it.
    pub fn background(&mut self, name: &str, script: &str) -> Result<Job> {
        self.sh(&format!(
            "rm -rf /run/{name}; mkdir -p /run/{name}; cd /run/{name}\n\
             cat > script <<'END OF THE SCRIPT'\n{script}\nEND OF THE SCRIPT\n\
             (sh script > said 2>&1; echo $? > status.new; mv status.new status) > /dev/null 2>&1 &"
        ))?;
        Ok(Job { folder: format!("/run/{name}") })
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

/// A script that runs in the machine while others do.
pub struct Job {
    /// Where its words are, in the guest; a script finds itself there.
    folder: String,
}

impl Job {
    /// What it said so far.
    pub fn said(&self, machine: &mut Machine) -> Result<String> {
        machine.sh(&format!("cat {}/said", self.folder))
    }

    /// What it said last.
    pub fn last_line(&self, machine: &mut Machine) -> Result<String> {
        machine.sh(&format!("tail -n 1 {}/said", self.folder))
    }

    /// How it ended, if it has.
    pub fn ended(&self, machine: &mut Machine) -> Result<Option<Answer>> {
        let status = machine.sh(&format!("cat {}/status 2> /dev/null || echo -", self.folder))?;
        if status == "-" {
            return Ok(None);
        }
        let said = self.said(machine)?;
        Ok(Some(Answer { status: status.parse().with_context(|| format!("a status of {status}"))?, said }))
    }

    /// Waits for its end, patiently.
    pub fn wait(&self, machine: &mut Machine) -> Result<Answer> {
        let mut answer = None;
        until(PATIENCE, &format!("{} has ended", self.folder), || {
            answer = self.ended(machine)?;
            if answer.is_none() {
                // To ask costs the guest a process, and its CPU is slow.
                thread::sleep(Duration::from_millis(250));
            }
            Ok(answer.is_some())
        })?;
        answer.context("it has just ended")
    }

    /// Where it runs, in the guest.
    pub fn folder(&self) -> &str {
        &self.folder
    }
}
