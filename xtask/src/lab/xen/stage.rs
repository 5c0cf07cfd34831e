//! All that is the same for each boot: QEMU, Xen, the kernel, dom0's disk, folders for images, sockets and logs.

use crate::command::target;
use crate::lab::ground::MIB;
use crate::lab::xen::Xen;
use crate::sweep;
use crate::work::Work;
use anyhow::{Context, Result};
use lab::initramfs::{PACKAGES, Root};
use lab::kernel::Kernel;
use lab::packages::{Packages, Suite, Tree};
use lab::xen;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What boots are made from.
pub(crate) struct Stage {
    pub(crate) arguments: Xen,
    pub(crate) tools: Tree,
    pub(crate) hypervisor: PathBuf,
    pub(crate) kernel: Kernel,
    pub(crate) initramfs: PathBuf,
    /// dom0's root; each boot has a copy.
    root: PathBuf,
    pub(crate) work: Work,
    sockets: TempDir,
    logs: PathBuf,
}

/// Xen's own programs that dom0 runs.
const PROGRAMS: &[&str] = &[
    "usr/lib/xen-4.17/bin/xl",
    "usr/lib/xen-4.17/bin/xenstored",
    "usr/lib/xen-4.17/bin/xen-init-dom0",
    "usr/lib/xen-4.17/bin/xenconsoled",
    "usr/lib/xen-4.17/bin/xentop",
    "usr/lib/xen-4.17/bin/lsevtchn",
    "usr/bin/xenstore-chmod",
    "usr/bin/xenstore-exists",
    "usr/bin/xenstore-list",
    "usr/bin/xenstore-ls",
    "usr/bin/xenstore-read",
    "usr/bin/xenstore-rm",
    "usr/bin/xenstore-write",
];
/// What dom0 needs beside what every machine of the lab has.
const TOOLS: &[&str] = &["sbin/resize2fs"];
const ROOT_MIB: u64 = 512;

impl Stage {
    pub(crate) fn set(arguments: &Xen) -> Result<Stage> {
        let packages = Packages::new(&target()?.join("lab-packages"));
        let tools = packages.with_dependencies("tools", Suite::Backports, PACKAGES)?;
        let tree = packages.with_dependencies("xen", Suite::Release, xen::PACKAGES)?;
        let linux = packages.kernel(&format!("linux-of-{}", Suite::Release.name()), Suite::Release)?;
        let guest = lab::guest::build().context("build the program of the guest")?;
        let work = Work::open()?;
        work.require_room()?;
        let hypervisor = xen::hypervisor(&tree, &tools)?;
        let kernel = Kernel::open(&linux, &tools)?;
        let bare = Root::make(&work.folder().join("guest"), &tools, &guest)?;
        let initramfs = bare.initramfs("dom0", &kernel, xen::DOM0_MODULES, &tools)?;
        let domain = bare.initramfs("domain", &kernel, xen::DOMAIN_MODULES, &tools)?;

        let dom0 = Root::make(&work.folder().join("dom0"), &tools, &guest)?;
        dom0.add_programs(&tree, PROGRAMS)?;
        dom0.add_programs(&tools, TOOLS)?;
        // `pthread_cancel` loads it at run time: without it xl aborts after it has made a domain.
        let unwinder = "lib/x86_64-linux-gnu/libgcc_s.so.1";
        dom0.put(&tree.path(unwinder), unwinder)?;
        dom0.add_foreign(&arguments.program()?)?;
        dom0.put(&kernel.vmlinux, DOMAIN_KERNEL)?;
        dom0.put(&domain, DOMAIN_INITRAMFS)?;
        dom0.write("etc/xen/xl.conf", b"")?;
        dom0.write("bin/start-xen", START_XEN.as_bytes())?;
        let root = work.fresh("dom0.raw")?;
        dom0.disk(&root, ROOT_MIB * MIB, &tools)?;

        let logs = target()?.join("lab-logs/xen");
        if logs.exists() {
            fs::remove_dir_all(&logs).with_context(|| format!("remove {}", logs.display()))?;
        }
        // A socket's path has 107 bytes at most, and the target folder's may be longer than that.
        let sockets = tempfile::Builder::new().prefix(sweep::SOCKETS).tempdir();
        let sockets = sockets.context("make a folder for sockets")?;
        symlink(sockets.path(), work.folder().join("sockets"))?;
        println!("     logs are kept in {}", logs.display());
        let arguments = arguments.clone();
        Ok(Stage { arguments, tools, hypervisor, kernel, initramfs, root, work, sockets, logs })
    }

    /// A disk to boot dom0 from.
    pub(crate) fn root(&self) -> Result<PathBuf> {
        let copy = self.work.fresh("root.raw")?;
        fs::copy(&self.root, &copy).context("copy dom0's disk")?;
        Ok(copy)
    }

    /// The folder for sockets.
    pub(crate) fn sockets(&self) -> &Path {
        self.sockets.path()
    }

    /// A folder for a boot's logs, which outlives the run.
    pub(crate) fn logs(&self, boot: &str) -> Result<PathBuf> {
        let folder = self.logs.join(boot);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        Ok(folder)
    }
}

/// What domains are made from, in dom0.
pub(crate) const DOMAIN_KERNEL: &str = "domain/vmlinux";
pub(crate) const DOMAIN_INITRAMFS: &str = "domain/initramfs";

/// Starts Xen's daemons, in dom0, in the order in which they need each other.
const START_XEN: &str = r#"#!/bin/sh
set -e
# devtmpfs has none of these.
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
mkdir -p /dev/pts /run/lock /run/xen /run/xenstored /run/logs /images /var/lib/xen /var/lib/xenstored /var/log/xen
ln -sfn /run /var/run
ln -sfn /run/lock /var/lock
mkdir -p /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xen/xenstored.pid
until xenstore-exists / 2> /dev/null; do sleep 0.1; done
xen-init-dom0 > /dev/null
xenconsoled --log=guest --log-dir=/var/log/xen --pid-file=/run/xen/xenconsoled.pid
"#;
