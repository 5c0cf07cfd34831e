//! Xen in a machine, with a paravirtual dom0 that obeys. No virtualisation of the computer's is needed for that.

use crate::kernel::Kernel;
use crate::machine::{Machine, emulator};
use crate::packages::Tree;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Xen and what it takes to run domains with it.
pub const PACKAGES: &[&str] = &["xen-hypervisor-4.17-amd64", "xen-utils-4.17", "xenstore-utils"];

/// What dom0 needs of its kernel: virtio disks and ports of QEMU's, the doors to Xen, and the kernel's own back end.
pub const DOM0_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "xen_privcmd",
    "xen_evtchn",
    "xen_gntdev",
    "xen_gntalloc",
    "xenfs",
    "xen_blkback",
    "loop",
];

/// What a domain needs of its kernel.
pub const DOMAIN_MODULES: &[&str] = &["xen_blkfront", "crc32c_generic", "ext4"];

/// The hypervisor as QEMU boots it, unpacked beside its package's file.
pub fn hypervisor(tree: &Tree, tools: &Tree) -> Result<PathBuf> {
    let plain = tree.path("xen");
    if !plain.exists() {
        let packed = tree.path("boot/xen-4.17-amd64.gz");
        let mut gunzip = Command::new(tools.path("bin/busybox"));
        let fresh = tree.path("xen.new");
        gunzip.args(["gunzip", "-c"]).arg(&packed).stdout(fs::File::create(&fresh)?);
        let status = gunzip.status().context("unpack the hypervisor")?;
        ensure!(status.success(), "gunzip of {} failed: {status}", packed.display());
        fs::rename(&fresh, &plain).context("put the hypervisor in its place")?;
    }
    Ok(plain)
}

/// What is started.
pub struct Plan<'a> {
    /// What QEMU is part of.
    pub tools: &'a Tree,
    /// An ELF file.
    pub hypervisor: &'a Path,
    /// Of dom0.
    pub kernel: &'a Kernel,
    /// And its first file system.
    pub initramfs: &'a Path,
    /// CPUs of the machine. dom0 has one, and shares them with the domains.
    pub cpus: u16,
    /// Memory of the machine, in MiB.
    pub memory_mib: u32,
    /// Of which dom0 has so much.
    pub dom0_mib: u32,
    /// Words for dom0's command line: `lab.root=/dev/vda` starts from that disk.
    pub words: &'a str,
    /// Raw images of dom0's virtio disks: /dev/vda, and so on.
    pub disks: Vec<PathBuf>,
    /// A folder for its sockets, with a short path.
    pub sockets: &'a Path,
    /// Where its console is written to.
    pub console: PathBuf,
}

impl Plan<'_> {
    fn command(&self) -> Command {
        let mut qemu = emulator(self.tools, &self.agent_socket());
        // SMAP, which `max` has, ends a paravirtual dom0 under emulation; without the random numbers of the CPU
        // kernels wait for others.
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand,+rdseed", "-machine", "pc"]);
        qemu.args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        for disk in &self.disks {
            // Nobody needs the images after the host's own crash.
            let file = escaped(&disk.display().to_string());
            qemu.args(["-drive", &format!("file={file},format=raw,if=virtio,cache=unsafe,discard=unmap")]);
        }
        let memory = self.dom0_mib;
        let xen = format!(
            "dom0_mem={memory}M,max:{memory}M dom0_max_vcpus=1 console=com1 com1=115200,8n1 loglvl=info \
             guest_loglvl=info xpti=off spec-ctrl=no sched=credit"
        );
        qemu.arg("-kernel").arg(self.hypervisor).args(["-append", &xen]);
        let linux = "console=hvc0 quiet loglevel=5 log_buf_len=4M mitigations=off nokaslr panic=-1";
        let (kernel, initramfs) = (self.kernel.vmlinux.display(), self.initramfs.display());
        let modules = [format!("{kernel} {linux} {}", self.words), initramfs.to_string()];
        qemu.args(["-initrd", &modules.map(|module| escaped(&module)).join(",")]);
        qemu
    }

    fn agent_socket(&self) -> PathBuf {
        self.sockets.join("agent")
    }

    /// Starts it and waits until dom0 obeys.
    pub fn start(&self) -> Result<Machine> {
        Machine::start(&self.command(), &self.agent_socket(), &self.console)
    }
}

/// A comma divides QEMU's options, and two are one.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}
