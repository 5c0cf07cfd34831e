//! A poisoned file's record: what the next process must know of a sync that failed, kept where a crash of this one does
//! not reach it.
//!
//! There is a file for each poisoned image, named after what the image is rather than what it is called, so that an
//! image that is moved stays poisoned and a new one under the old name is not. It is for human beings too.

use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use block::{Errno, Error};
use runtime::Mailbox;
use rustix::fs::{Access, AtFlags, StatxFlags};

/// The directory where records are kept.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
    /// Linux's name for the time since it was started. What it failed to write before that is no longer in memory.
    boot: String,
}

/// The record of one image, there or not.
#[derive(Clone, Debug)]
pub struct Record {
    records: Records,
    /// Where the image is.
    image: PathBuf,
    /// What it is.
    identity: String,
}

impl Records {
    /// Records in this directory, which is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made or written.
    pub fn open(directory: &Path) -> io::Result<Records> {
        let directory = std::path::absolute(directory)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        rustix::fs::access(&directory, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Records { directory, boot: boot.trim_end().into() })
    }

    /// The record of this open file, which was found at `image`.
    ///
    /// # Errors
    /// If the kernel does not tell what the file is.
    pub fn of(&self, file: &File, image: &Path) -> io::Result<Record> {
        let identity = identity(file)?;
        Ok(Record { records: self.clone(), image: std::path::absolute(image)?, identity })
    }
}

impl Record {
    /// Where it is, if it is there.
    pub fn path(&self) -> PathBuf {
        self.beside("poison")
    }

    /// Where something else of this image is kept that a successor must know, named after what the image is.
    pub fn beside(&self, kind: &str) -> PathBuf {
        self.records.directory.join(format!("{kind}-{}", self.identity))
    }

    /// Linux's name for the time since it was started (36 letters, digits and dashes).
    pub fn boot(&self) -> &str {
        &self.records.boot
    }

    /// Where the image is.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The error of the sync that failed, if there is a record of it. One of an earlier boot is removed.
    pub fn restore(&self) -> Option<Error> {
        let path = self.path();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                let doing = format!("a sync failed before, and {} cannot be read: {error}", path.display());
                return Some(Error::new(Errno::EIO, doing).lasting());
            }
        };
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap_or_default()
        };
        if !field("boot").is_empty() && field("boot") != self.records.boot {
            tracing::info!(record = %path.display(), "the record of a failed sync is of an earlier boot: removed");
            self.forget();
            return None;
        }
        let number = field("errno").split(' ').next_back().and_then(|number| number.parse().ok());
        let errno = number.and_then(Errno::new).unwrap_or(Errno::EIO);
        let (when, what) = (field("when"), field("what"));
        Some(
            Error::new(errno, format!("a sync failed at {when}, in a process before this one: {what}"))
                .lasting(),
        )
    }

    /// Writes it, on a thread of its own, and returns when that is done: whoever then hears of the error can be sure
    /// that a successor knows of it too. That it cannot be written is logged, and nothing else can be done about it.
    pub(super) async fn keep(&self, error: &Error) {
        let mut mailbox = Mailbox::default();
        let (sender, record) = (mailbox.sender(), Unwritten::new(self, error));
        let thread = std::thread::Builder::new().name("tapdisk-record".into());
        let written = match thread.spawn(move || sender.send(record.write())) {
            Ok(_detached) => mailbox.receive().await,
            Err(error) => Err(error),
        };
        self.tell(written);
    }

    /// Writes it on this thread: for where nothing can be waited for.
    pub(super) fn keep_at_once(&self, error: &Error) {
        self.tell(Unwritten::new(self, error).write());
    }

    fn tell(&self, written: io::Result<()>) {
        let (image, record) = (self.image.display(), self.path());
        let record = record.display();
        match written {
            Ok(()) => {
                tracing::error!(%image, %record, "a sync failed: poisoned, also for a successor after a crash")
            }
            Err(error) => tracing::error!(
                %image, %record, %error,
                "a sync failed, and this cannot be recorded: IF THIS PROCESS CRASHES ITS SUCCESSOR WILL NOT KNOW"
            ),
        }
    }

    /// Removes it, if it is there: the file is no longer poisoned.
    pub fn forget(&self) {
        let path = self.path();
        match std::fs::remove_file(&path) {
            Ok(()) => tracing::info!(record = %path.display(), "the record of a failed sync is removed"),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                let record = path.display();
                tracing::error!(%record, %error, "the record of a failed sync cannot be removed: remove it by hand");
            }
        }
    }
}

/// A record that is to be written, in any thread.
struct Unwritten {
    path: PathBuf,
    text: String,
}

impl Unwritten {
    fn new(record: &Record, error: &Error) -> Unwritten {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (errno, code) = (error.errno(), error.errno().code());
        let mut text =
            String::from("A sync of this image failed: flushes and writes fail until tapdisk is stopped in ");
        text.push_str(
            "order (Ctrl-C or SIGTERM) and started anew, also after a crash. See docs/errors.md.\n\n",
        );
        let what = error.doing().replace('\n', " ");
        // An error here would be one of memory.
        let (image, boot, identity) = (&record.image, &record.records.boot, &record.identity);
        write!(
            text,
            "image: {image:?}\nerrno: {errno} {code}\nwhat: {what}\nwhen: {}\nboot: {boot}\nidentity: {identity}\n",
            utc(now)
        )
        .expect("a string takes what is written to it");
        Unwritten { path: record.path(), text }
    }

    /// Whole or not at all: under a name of its own first. There is no need for a sync: it need not outlive the boot.
    fn write(&self) -> io::Result<()> {
        let temporary = self.path.with_extension(format!("{}.tmp", std::process::id()));
        match std::fs::remove_file(&temporary) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(self.text.as_bytes())?;
        std::fs::rename(&temporary, &self.path)
    }
}

/// What a file is, in letters, digits and dashes: for a block device its number and which of those that had it
/// (diskseq(5.15), where the kernel tells), for another file its device, inode and birth time (where the file system
/// tells: without it a new file may be taken for the old one whose inode it got, which is the safe mistake).
fn identity(file: &File) -> io::Result<String> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
    if rustix::fs::FileType::from_raw_mode(found.stx_mode.into()).is_block_device() {
        let (major, minor) = (found.stx_rdev_major, found.stx_rdev_minor);
        // A partition's is that of its disk.
        let place = format!("/sys/dev/block/{major}:{minor}");
        let read = |name: &str| std::fs::read_to_string(format!("{place}/{name}")).ok();
        let sequence = read("diskseq").or_else(|| read("../diskseq")).unwrap_or_else(|| "unknown".into());
        return Ok(format!("device-{major}-{minor}-{}", sequence.trim_end()));
    }
    let (major, minor, inode) = (found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
    let born = match found.stx_mask & StatxFlags::BTIME.bits() {
        0 => "unknown".into(),
        _ => format!("{}-{:09}", found.stx_btime.tv_sec, found.stx_btime.tv_nsec),
    };
    Ok(format!("file-{major}-{minor}-{inode}-{born}"))
}

/// Seconds since 1970 as a date and time, as in RFC 3339.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March, so that the day that some have not comes last; 400 years are 146,097 days.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + next;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn times_are_written_as_date_writes_them() {
        // date -u -d @N +%FT%TZ
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), expected);
        }
    }

    struct Place {
        directory: tempfile::TempDir,
        records: Records,
    }

    impl Place {
        fn new() -> Place {
            let directory = tempfile::tempdir().unwrap();
            let records = Records::open(&directory.path().join("run/tapdisk")).unwrap();
            Place { directory, records }
        }

        fn image(&self, name: &str) -> PathBuf {
            let path = self.directory.path().join(name);
            File::create_new(&path).unwrap();
            path
        }

        fn record(&self, path: &Path) -> Record {
            self.records.of(&File::open(path).unwrap(), path).unwrap()
        }

        fn names(&self) -> Vec<String> {
            let entries = std::fs::read_dir(&self.records.directory).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    fn failed() -> Error {
        Error::new(Errno::EDQUOT, "sync disk.raw")
    }

    #[test]
    fn a_record_is_found_again_by_what_the_file_is_and_not_by_its_name() {
        let place = Place::new();
        let image = place.image("disk.raw");
        assert_eq!(place.record(&image).restore(), None);
        place.record(&image).keep_at_once(&failed());
        let other = place.image("other.raw");
        assert_eq!(place.record(&other).restore(), None);

        let moved = place.directory.path().join("moved.raw");
        std::fs::rename(&image, &moved).unwrap();
        let error = place.record(&moved).restore().unwrap();
        assert_eq!((error.errno(), error.is_lasting()), (Errno::EDQUOT, true));
        assert!(error.doing().contains("sync disk.raw"), "{error}");

        // A new one under the old name, which may even get the old one's inode.
        std::fs::remove_file(&moved).unwrap();
        let new = place.image("disk.raw");
        assert_eq!(place.record(&new).restore(), None);
    }

    #[test]
    fn a_record_says_what_happened_and_is_for_its_owner_alone() {
        let place = Place::new();
        let image = place.image("disk.raw");
        place.record(&image).keep_at_once(&failed());
        place.record(&image).keep_at_once(&failed());
        let names = place.names();
        assert_eq!(names.len(), 1, "nothing temporary is left: {names:?}");
        let path = place.record(&image).path();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&path), mode(&place.records.directory)), (0o600, 0o700));
        let text = std::fs::read_to_string(path).unwrap();
        for words in ["disk.raw\"", "errno: EDQUOT 122", "what: sync disk.raw", "when: 20", "SIGTERM"] {
            assert!(text.contains(words), "no {words} in {text}");
        }
    }

    #[test]
    fn an_order_to_forget_is_for_this_record_alone() {
        let place = Place::new();
        let (one, two) = (place.image("one"), place.image("two"));
        for image in [&one, &two] {
            place.record(image).keep_at_once(&failed());
        }
        place.record(&one).forget();
        place.record(&one).forget();
        assert_eq!(place.record(&one).restore(), None);
        assert!(place.record(&two).restore().is_some());
    }

    #[test]
    fn a_record_of_an_earlier_boot_is_removed() {
        let place = Place::new();
        let image = place.image("disk.raw");
        let record = place.record(&image);
        record.keep_at_once(&failed());
        let text = std::fs::read_to_string(record.path()).unwrap();
        assert!(text.contains(&*place.records.boot));
        std::fs::write(record.path(), text.replace(&*place.records.boot, "another-boot")).unwrap();
        assert_eq!(record.restore(), None);
        assert_eq!(place.names(), Vec::<String>::new());
    }

    #[test]
    fn a_record_that_makes_no_sense_still_poisons() {
        let place = Place::new();
        let image = place.image("disk.raw");
        let record = place.record(&image);
        for text in ["", "errno: 0\n", "errno: EWHAT\nwhat", "\u{fffd}"] {
            std::fs::write(record.path(), text).unwrap();
            assert_eq!(record.restore().map(|error| error.errno()), Some(Errno::EIO), "{text:?}");
        }
        std::fs::write(record.path(), [0xff, 0xfe]).unwrap();
        assert_eq!(record.restore().map(|error| error.errno()), Some(Errno::EIO));
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_an_error() {
        let place = Place::new();
        let file = place.image("file");
        assert!(Records::open(&file.join("run")).is_err());
        assert!(Records::open(&file).is_err());
    }
}
