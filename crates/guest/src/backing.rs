//! What may be behind memory that a front end shares: nothing that could keep a page from us for as long as it pleases.
//!
//! A page that is touched for the first time is fetched by the kernel, and the thread that touched it waits. On a file
//! system that is a process (FUSE) or another machine, it waits for that one, which may be the front end itself: the
//! disk's thread would be in its hands.

use std::os::fd::{AsRawFd, BorrowedFd};

use block::Errno;
use rustix::fs::{AtFlags, FileType, StatxFlags};

/// Why a file cannot be behind a guest's memory.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfit {
    #[error(
        "guest memory in a file on {0}, which could keep the disk waiting for a page: a memfd is expected, or a file on \
         tmpfs, hugetlbfs or a file system on a local device"
    )]
    FileSystem(String),
    #[error(
        "guest memory in a file of a mount that is not known here, so that its file system is not: use a memfd"
    )]
    Mount,
    #[error("guest memory in {0:?}: a file or a DAX device is expected")]
    Kind(FileType),
    #[error("what is behind guest memory cannot be found out: {0}")]
    Unknown(Errno),
}

/// Looks at a file without asking its file system anything: fstat(2) and fstatfs(2) would wait for it too.
pub(crate) fn check(fd: BorrowedFd<'_>) -> Result<(), Unfit> {
    // Only memory has seals (memfd_fcntl in the kernel's mm/memfd.c): tmpfs and hugetlbfs, with a name or without.
    if rustix::fs::fcntl_get_seals(fd).is_ok() {
        return Ok(());
    }
    let errno =
        |error: rustix::io::Errno| Unfit::Unknown(Errno::new(error.raw_os_error()).unwrap_or(Errno::EIO));
    // What is known already, and no more: STATX_DONT_SYNC.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = rustix::fs::statx(fd, "", flags, StatxFlags::TYPE).map_err(errno)?;
    let kind = FileType::from_raw_mode(statx.stx_mode.into());
    if kind == FileType::CharacterDevice && is_dax(statx.stx_rdev_major, statx.stx_rdev_minor) {
        return Ok(());
    }
    // A block device may be a process too (nbd, ublk), and nobody has a guest's memory there.
    if kind != FileType::RegularFile {
        return Err(Unfit::Kind(kind));
    }
    let read = |path: String| {
        let failed = |error: std::io::Error| {
            Unfit::Unknown(error.raw_os_error().and_then(Errno::new).unwrap_or(Errno::EIO))
        };
        std::fs::read_to_string(path).map_err(failed)
    };
    let info = read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let mounts = read("/proc/self/mountinfo".into())?;
    judge(file_system(&info, &mounts))
}

/// Whether a character device is persistent memory or the like, as QEMU finds out too.
fn is_dax(major: u32, minor: u32) -> bool {
    let subsystem = rustix::fs::readlink(format!("/sys/dev/char/{major}:{minor}/subsystem"), Vec::new());
    subsystem.is_ok_and(|link| link.as_bytes().ends_with(b"/dax"))
}

/// The type of the file system that a descriptor is on, by its /proc/self/fdinfo and by /proc/self/mountinfo.
fn file_system<'a>(info: &str, mounts: &'a str) -> Option<&'a str> {
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(id))?;
    // Fields that may or may not be there end with a dash; spaces in paths are written in another way.
    let (_, rest) = line.split_once(" - ")?;
    rest.split(' ').next()
}

fn judge(file_system: Option<&str>) -> Result<(), Unfit> {
    match file_system {
        None => Err(Unfit::Mount),
        // Those that the kernel answers from memory or from a device. All others are processes (fuse, virtiofs), other
        // machines (nfs, cifs, 9p, ceph) or are over another one that may be (overlay), and who can mount these need
        // not be an administrator.
        Some("tmpfs" | "hugetlbfs" | "ramfs" | "devtmpfs" | "ext2" | "ext3" | "ext4" | "xfs" | "btrfs") => {
            Ok(())
        }
        Some("bcachefs" | "f2fs" | "zfs") => Ok(()),
        Some(other) => Err(Unfit::FileSystem(other.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn what_others_answer_is_refused() {
        for local in ["tmpfs", "hugetlbfs", "ext4", "xfs", "btrfs"] {
            assert_eq!(judge(Some(local)), Ok(()));
        }
        for other in
            ["fuse", "fuseblk", "fuse.sshfs", "virtiofs", "nfs", "nfs4", "cifs", "smb3", "9p", "overlay"]
        {
            assert_eq!(judge(Some(other)), Err(Unfit::FileSystem(other.into())));
        }
        assert_eq!(judge(None), Err(Unfit::Mount));
    }

    #[test]
    fn a_files_mount_is_found() {
        // From proc_pid_fdinfo(5) and proc_pid_mountinfo(5).
        let info = "pos:\t0\nflags:\t0100002\nmnt_id:\t36\nino:\t1234\n";
        let mounts = "35 24 0:31 / /tmp rw - tmpfs tmpfs rw\n\
                      36 35 98:0 /mnt1 /mnt2\\040a rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                      136 35 0:44 / /mnt/- rw shared:2 master:3 - fuse.sshfs me@there: rw\n";
        assert_eq!(file_system(info, mounts), Some("ext3"));
        assert_eq!(file_system("mnt_id:\t136\n", mounts), Some("fuse.sshfs"));
        assert_eq!(file_system("mnt_id:\t3\n", mounts), None);
        assert_eq!(file_system("pos:\t0\n", mounts), None);
        assert_eq!(file_system("mnt_id:\t35\n", "35 24 cut off"), None);
    }

    #[test]
    fn memory_is_fit_and_what_is_no_file_is_not() {
        for flags in [MemfdFlags::CLOEXEC, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING] {
            assert_eq!(check(memfd_create("fit", flags).unwrap().as_fd()), Ok(()));
        }
        let shared = tempfile::tempfile_in("/dev/shm").unwrap();
        assert_eq!(check(shared.as_fd()), Ok(()));
        // A file on procfs is a regular one.
        let proc = File::open("/proc/self/maps").unwrap();
        assert_eq!(check(proc.as_fd()), Err(Unfit::FileSystem("proc".into())));
        let zero = File::open("/dev/zero").unwrap();
        assert_eq!(check(zero.as_fd()), Err(Unfit::Kind(FileType::CharacterDevice)));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(check(reader.as_fd()), Err(Unfit::Kind(FileType::Fifo)));
        let directory = File::open("/").unwrap();
        assert_eq!(check(directory.as_fd()), Err(Unfit::Kind(FileType::Directory)));
    }

    #[test]
    fn a_file_is_judged_by_where_it_is() {
        // An ordinary file, wherever tests run, and what stat(1) says of that.
        let directory = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(directory.path()).unwrap();
        let asked =
            std::process::Command::new("stat").args(["-f", "-c", "%T"]).arg(directory.path()).output();
        let kind = String::from_utf8(asked.unwrap().stdout).unwrap();
        let is_local = ["ext2/ext3", "xfs", "btrfs", "tmpfs", "f2fs", "zfs"].contains(&kind.trim());
        assert_eq!(check(file.as_fd()).is_ok(), is_local, "{kind}");
    }
}
