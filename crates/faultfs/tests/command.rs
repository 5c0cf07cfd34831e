//! The `faultfs` command as a shell uses it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use faultfs::{available, control};
use rustix::io::{Errno, pwrite};

struct Mounted {
    process: Child,
    directory: PathBuf,
}

impl Mounted {
    /// Starts the command; nothing where an ordinary user cannot mount.
    fn start(name: &str) -> Option<Mounted> {
        if let Err(why) = available() {
            assert!(!rustix::process::geteuid().is_root(), "root cannot mount a fault file system: {why}");
            eprintln!("not tested, for lack of a fault file system: {why}");
            return None;
        }
        let directory = std::env::temp_dir().join(format!("faultfs-command-{}-{name}", std::process::id()));
        std::fs::create_dir_all(directory.join("mnt")).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_faultfs"))
            .arg(directory.join("mnt"))
            .arg("--control")
            .arg(directory.join("socket"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "mounted\n");
        Some(Mounted { process, directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn send(&self, command: &str) -> Result<String, String> {
        control::send(&self.path("socket"), command).map_err(|error| error.to_string())
    }

    /// Waits until it is no longer mounted and says whether that came to pass.
    fn is_gone(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.is_mounted() && Instant::now() < deadline {
            thread::yield_now();
        }
        !self.is_mounted()
    }

    fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(1) == self.path("mnt").to_str())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        assert!(self.is_gone());
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

fn create(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).unwrap()
}

#[test]
fn the_socket_offers_what_the_library_does() {
    let Some(mut fs) = Mounted::start("socket") else { return };
    let file = create(&fs.path("mnt/disk"));
    assert_eq!(fs.send("rule write:EIO:nth=2").unwrap(), "1");
    assert_eq!(pwrite(&file, &[1; 512], 0), Ok(512));
    assert_eq!(pwrite(&file, &[1; 512], 0), Err(Errno::IO));
    assert_eq!(fs.send("rules").unwrap(), "1 1 write:EIO:nth=2");
    assert_eq!(fs.send("clear 1").unwrap(), "");
    assert!(fs.send("clear 1").unwrap_err().contains("no rule 1"));
    assert!(fs.send("rule write:EWHAT").unwrap_err().contains("EWHAT"));
    assert!(fs.send("wait-hanging 1 0").unwrap_err().contains("only 0 hang"));
    file.sync_all().unwrap();
    assert_eq!(fs.send("capacity 4K").unwrap(), "");
    assert_eq!(pwrite(&file, &[2; 512], 4096), Err(Errno::NOSPC));
    assert_eq!(fs.send("capacity none").unwrap(), "");
    assert_eq!(pwrite(&file, &[2; 512], 4096), Ok(512));
    let saved = fs.path("saved");
    assert_eq!(fs.send(&format!("snapshot disk {}", saved.display())).unwrap(), "4608");
    assert_eq!(std::fs::read(&saved).unwrap(), [vec![1; 512], vec![0; 3584], vec![2; 512]].concat());
    assert_eq!(fs.send("power-cut").unwrap(), "");
    assert_eq!(fs.send(&format!("durable disk {}", saved.display())).unwrap(), "512");
    assert_eq!(std::fs::read(&saved).unwrap(), [1; 512]);
    assert!(fs.send("counters").unwrap().contains("writes=4 written_bytes=1024 fsyncs=1 fdatasyncs=0"));

    let sent = Command::new(env!("CARGO_BIN_EXE_faultfs"))
        .args(["--send", "power-cut", "--seed", "3", "--control"])
        .arg(fs.path("socket"))
        .output()
        .unwrap();
    assert!(!sent.status.success(), "--seed is an option of the command, which is one argument");
    let sent = Command::new(env!("CARGO_BIN_EXE_faultfs"))
        .args(["--send", "power-cut --seed 3", "--control"])
        .arg(fs.path("socket"))
        .output()
        .unwrap();
    assert!(sent.status.success(), "{sent:?}");

    assert_eq!(fs.send("quit").unwrap(), "");
    assert!(fs.process.wait().unwrap().success());
    assert!(!fs.is_mounted());
    assert!(!fs.path("socket").exists());
}

#[test]
fn a_process_that_is_killed_leaves_no_mount() {
    let Some(mut fs) = Mounted::start("killed") else { return };
    let file = create(&fs.path("mnt/disk"));
    assert!(fs.is_mounted());
    fs.process.kill().unwrap();
    fs.process.wait().unwrap();
    assert!(fs.is_gone());
    assert_eq!(pwrite(&file, &[1; 512], 0), Err(Errno::NOTCONN));
}

#[test]
fn a_process_that_waits_for_its_own_mount_can_be_killed() {
    let Some(mut fs) = Mounted::start("own") else { return };
    create(&fs.path("mnt/disk")).set_len(4096).unwrap();
    fs.send("rule write:hang:file=copy").unwrap();
    pwrite(create(&fs.path("mnt/source")), &[1; 512], 0).unwrap();
    thread::scope(|scope| {
        let snapshot = format!("snapshot source {}", fs.path("mnt/copy").display());
        let (socket, sent) = (fs.path("socket"), std::sync::mpsc::channel());
        scope.spawn(move || sent.0.send(control::send(&socket, &snapshot).is_err()).unwrap());
        fs.send("wait-hanging 1 20000").unwrap();
        fs.process.kill().unwrap();
        fs.process.wait().unwrap();
        assert!(sent.1.recv().unwrap());
    });
    assert!(fs.is_gone());
}
