//! Images on block devices, which have one size, many names, and an owner before.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::folder::Folder;

/// A loop device over a file of 8 MiB, `backing` in a folder.
struct Loop(PathBuf);

impl Loop {
    /// `None` for an ordinary user.
    fn new(folder: &Folder) -> Option<Loop> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not tested: only root makes loop devices");
            return None;
        }
        let file = folder.path("backing");
        std::fs::write(&file, vec![0x55; 8 << 20]).unwrap();
        let path = run("losetup", &["--find", "--show", file.to_str().unwrap()]);
        Some(Loop(path.trim().into()))
    }

    fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }

    fn number(&self) -> (u32, u32) {
        let found = std::fs::metadata(&self.0).unwrap();
        assert!(found.file_type().is_block_device());
        (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", self.text()]);
    }
}

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn is_untouched(device: &Path) {
    assert!(std::fs::read(device).unwrap().iter().all(|byte| *byte == 0x55));
}

#[test]
fn no_qcow_image_is_made_where_it_cannot_get_longer() {
    let folder = Folder::new();
    let Some(device) = Loop::new(&folder) else { return };
    folder.tapdisk(&["create", "small.raw", "1M"]);
    let said = ["is a block device", "qcow", "qcow2"];
    folder.refuses(&["create", "-f", "qcow", device.text(), "1M"], 1, &said);
    folder.refuses(&["convert", "-O", "qcow", "small.raw", device.text()], 1, &said);
    is_untouched(&device.0);
    // A name for it is no other thing.
    std::os::unix::fs::symlink(&device.0, folder.path("link")).unwrap();
    folder.refuses(&["create", "-f", "qcow", "link", "1M"], 1, &said);
    is_untouched(&device.0);
    folder.tapdisk(&["convert", "-O", "qcow2", "small.raw", device.text()]);
    folder.same(("small.raw", "raw"), (device.text(), "qcow2"));
}

#[test]
fn a_block_device_is_known_by_any_of_its_names() {
    let folder = Folder::new();
    let Some(device) = Loop::new(&folder) else { return };
    let (major, minor) = device.number();
    let other = folder.path("node").to_str().unwrap().to_owned();
    run("mknod", &[&other, "b", &major.to_string(), &minor.to_string()]);
    let device = device.text();
    let file = folder.path("backing").to_str().unwrap().to_owned();
    for (from, to) in [(device, &*other), (&other, device), (&file, device), (device, &file)] {
        for format in ["raw", "qcow2"] {
            let words = ["convert", "--force", "-f", "raw", "-O", format, from, to];
            folder.refuses(&words, 1, &["is what is to be copied"]);
        }
        is_untouched(Path::new(device));
        folder.refuses(
            &["create", "--force", "-f", "qcow2", "-b", from, "-F", "raw", "--allow-folder", "/", to],
            1,
            &["cannot be below itself"],
        );
        is_untouched(Path::new(device));
    }
}

/// What a process before has noted of a file that is made anew is nobody's any more.
#[test]
fn an_image_that_is_made_anew_is_not_poisoned() {
    let folder = Folder::new();
    let Some(device) = Loop::new(&folder) else { return };
    let (major, minor) = device.number();
    let sequence = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/diskseq")).unwrap();
    let record = folder.path("state").join(format!("poison-device-{major}-{minor}-{}", sequence.trim()));
    let state = ["--state-dir", "state"];
    let poison = || {
        std::fs::create_dir_all(folder.path("state")).unwrap();
        std::fs::write(&record, "errno: EIO 5\nwhat: sync\n").unwrap();
        folder.refuses(
            &[&["snapshot", "-f", "qcow2", "-c", "now", device.text()], &state[..]].concat(),
            1,
            &["a sync failed", "convert -T direct"],
        );
        folder.tapdisk(
            &[&["convert", "-T", "direct", "--force", "-f", "qcow2", device.text(), "saved"], &state[..]]
                .concat(),
        );
    };
    folder.tapdisk(&["create", "-f", "qcow2", device.text(), "1M"]);
    poison();
    // One that fails leaves it as it was.
    folder.refuses(&[&["create", device.text(), "1G"], &state[..]].concat(), 1, &[]);
    assert!(record.exists());
    folder.tapdisk(&[&["create", "-f", "qcow2", device.text(), "1M"], &state[..]].concat());
    assert!(!record.exists());
    folder.tapdisk(&[&["snapshot", "-f", "qcow2", "-c", "now", device.text()], &state[..]].concat());
    folder.tapdisk(&["create", "small.raw", "1M"]);
    poison();
    folder.tapdisk(&[&["convert", "-O", "qcow2", "small.raw", device.text()], &state[..]].concat());
    assert!(!record.exists());
}
