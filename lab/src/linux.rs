//! Linux alone in a machine, with disks that others serve by vhost-user.

use crate::kernel::Kernel;
use crate::machine::{Machine, emulator};
use crate::packages::Tree;
use crate::shell::Shell;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

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
        let mut qemu = emulator(self.tools, &self.agent_socket());
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", &self.cpus.to_string()]);
        // The disks' servers work in the guest's memory, so it must be shareable.
        let memory = self.memory_mib;
        qemu.args(["-m", &memory.to_string(), "-machine", "q35,memory-backend=memory"]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={memory}M,share=on")]);
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
        let mut machine = Machine::start(&self.command(), &self.agent_socket(), &self.console)?;
        expect_disks(&mut machine, self.disks.len()).with_context(|| machine.about())?;
        Ok(machine)
    }
}

/// The disks' places on the bus, behind what q35 has of its own.
const FIRST_SLOT: usize = 0x10;

/// The names of disks follow from the order in which the kernel finds them: make sure that it is ours.
fn expect_disks(machine: &mut Machine, count: usize) -> Result<()> {
    for (number, letter) in (b'a'..=b'z').enumerate().take(count) {
        let name = format!("vd{}", char::from(letter));
        let path = machine.sh(&format!("readlink /sys/block/{name}"))?;
        let place = format!("0000:00:{:02x}.0", FIRST_SLOT + number);
        ensure!(path.contains(&place), "{name} is at {path}, and not at {place}");
    }
    Ok(())
}
