//! What the machine must have: programs by name, and on Debian the packages that bring them.

use crate::command::{command, output, run};
use crate::server::Kind;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One thing that a part of our work can't do without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Need {
    Apt,
    Dpkg,
    Ext4,
    Fio,
    Loop,
    NbdServer,
    Nbdcopy,
    Nbdfuse,
    Nbdinfo,
    Nbdkit,
    Nbdsh,
    Partitions,
    QemuImg,
    QemuIo,
    QemuNbd,
    QemuStorageDaemon,
    Setpriv,
}

impl Need {
    /// The program that proves it is there, and Debian's package.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Need::Apt => ("apt-get", "apt"),
            Need::Dpkg => ("dpkg", "dpkg"),
            Need::Ext4 => ("mkfs.ext4", "e2fsprogs"),
            Need::Fio => ("fio", "fio"),
            Need::Loop => ("losetup", "mount"),
            Need::NbdServer => ("nbd-server", "nbd-server"),
            Need::Nbdcopy => ("nbdcopy", "libnbd-bin"),
            Need::Nbdfuse => ("nbdfuse", "libnbd-bin"),
            Need::Nbdinfo => ("nbdinfo", "libnbd-bin"),
            Need::Nbdkit => ("nbdkit", "nbdkit"),
            Need::Nbdsh => ("nbdsh", "python3-libnbd"),
            Need::Partitions => ("sfdisk", "fdisk"),
            Need::QemuImg => ("qemu-img", "qemu-utils"),
            Need::QemuIo => ("qemu-io", "qemu-utils"),
            Need::QemuNbd => ("qemu-nbd", "qemu-utils"),
            // Since QEMU 8 or so it comes with qemu-utils; in Debian 12 it does not.
            Need::QemuStorageDaemon => ("qemu-storage-daemon", "qemu-system-common"),
            Need::Setpriv => ("setpriv", "util-linux"),
        }
    }

    fn is_there(self) -> bool {
        find(self.program().0).is_some()
    }
}

/// What a server needs.
pub(crate) fn server(kind: Kind) -> &'static [Need] {
    match kind {
        Kind::Tapdisk => &[],
        Kind::QemuNbd => &[Need::QemuNbd],
        Kind::Nbdkit => &[Need::Nbdkit],
    }
}

/// Where a program lies. The folders of the administrator's programs are not in everyone's PATH.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Installs what is missing, as root on Debian; elsewhere says what it is, and fails.
pub(crate) fn require(needs: &[Need]) -> Result<()> {
    let missing: Vec<Need> = needs.iter().copied().filter(|need| !need.is_there()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|need| need.program().1).collect();
    packages.sort_unstable();
    packages.dedup();
    let may_install = rustix::process::geteuid().is_root() && find("apt-get").is_some();
    ensure!(may_install, "missing: {}\ninstall them, or run this as root on Debian", packages.join(" "));
    let _guard = NoServices::promise()?;
    if install(&packages).is_err() {
        // The lists of packages are empty or old.
        run(apt().args(["-q", "update"]))?;
        install(&packages)?;
    }
    let still: Vec<&str> = missing.iter().filter(|n| !n.is_there()).map(|n| n.program().0).collect();
    ensure!(still.is_empty(), "still missing after installing {packages:?}: {still:?}");
    Ok(())
}

fn apt() -> Command {
    let mut apt = command("apt-get", ["-o", "DPkg::Lock::Timeout=300"]);
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

fn install(packages: &[&str]) -> Result<()> {
    // Never at the price of removing something that the machine's owner has.
    run(apt().args(["-q", "--yes", "--no-install-recommends", "--no-remove", "install"]).args(packages))
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

/// While it lives, a package that is installed starts no service.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn promise() -> Result<NoServices> {
        if Path::new(POLICY).exists() {
            let answer = command(POLICY, ["nbd-server", "start"]).output()?.status.code();
            if answer == Some(101) {
                return Ok(NoServices { ours: false });
            }
            bail!("{POLICY} exists and lets services start; install by hand what is missing");
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").with_context(|| format!("write {POLICY}"))?;
        let promise = NoServices { ours: true };
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        Ok(promise)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("xtask: could not remove {POLICY}: {error}");
        }
    }
}

/// Whether there is a nightly toolchain.
pub(crate) fn has_nightly() -> bool {
    has_nightly_tool(&["--version"])
}

/// Whether this subcommand of cargo works on nightly. Nothing is downloaded to find out.
pub(crate) fn has_nightly_tool(arguments: &[&str]) -> bool {
    let mut tool = command("cargo", ["+nightly"]);
    output(tool.args(arguments).env("RUSTUP_AUTO_INSTALL", "0")).is_ok()
}
