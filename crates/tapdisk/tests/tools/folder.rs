//! A folder of images under test, and the programs that are run in it.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// Formats, as tapdisk and as qemu-img call them, with options for qemu-img that keep the size as it is.
pub(crate) const FORMATS: [(&str, &str, &[&str]); 4] = [
    ("raw", "raw", &[]),
    ("qcow", "qcow", &[]),
    ("qcow2", "qcow2", &[]),
    ("vhd", "vpc", &["-o", "force_size=on"]),
];

/// A folder that is gone in the end.
pub(crate) struct Folder(TempDir);

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Ended {
        Ended {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ended {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// `tapdisk` with these words, in this folder.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tapdisk"));
        command.args(words).current_dir(self.0.path()).stdin(Stdio::null()).env_remove("RUST_LOG");
        command
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, words: &[&str]) -> Ended {
        self.command(words).output().unwrap().into()
    }

    /// Runs it; it succeeds.
    #[track_caller]
    pub(crate) fn tapdisk(&self, words: &[&str]) -> Ended {
        let ended = self.run(words);
        assert_eq!(ended.code, Some(0), "{words:?}: {ended:?}");
        ended
    }

    /// Runs it; it fails with this exit status, and says these words.
    #[track_caller]
    pub(crate) fn refuses(&self, words: &[&str], code: i32, said: &[&str]) {
        let ended = self.run(words);
        assert_eq!(ended.code, Some(code), "{words:?}: {ended:?}");
        for said in said {
            assert!(ended.stderr.contains(said), "no {said:?} of {words:?} in {ended:?}");
        }
    }

    fn peer(&self, program: &str, words: &[&str]) -> Ended {
        let output = Command::new(program).args(words).current_dir(self.0.path()).output();
        output.unwrap_or_else(|error| panic!("{program}: {error}")).into()
    }

    /// Runs qemu-img; it succeeds.
    #[track_caller]
    pub(crate) fn qemu_img(&self, words: &[&str]) -> Ended {
        let ended = self.peer("qemu-img", words);
        assert_eq!(ended.code, Some(0), "qemu-img {words:?}: {ended:?}");
        ended
    }

    /// Has qemu-io do these things to an image.
    #[track_caller]
    pub(crate) fn qemu_io(&self, format: &str, name: &str, things: &[&str]) {
        let mut words = vec!["-f", format];
        things.iter().for_each(|thing| words.extend(["-c", thing]));
        words.push(name);
        let ended = self.peer("qemu-io", &words);
        assert!(ended.code == Some(0) && !ended.stdout.contains("rror"), "qemu-io {words:?}: {ended:?}");
    }

    /// Both disks have the same bytes, and a qcow2 image is sound to QEMU.
    #[track_caller]
    pub(crate) fn same(&self, (one, format): (&str, &str), (other, other_format): (&str, &str)) {
        self.qemu_img(&["compare", "-f", format, "-F", other_format, one, other]);
        for (name, format) in [(one, format), (other, other_format)] {
            if format == "qcow2" {
                self.qemu_img(&["check", "-f", format, name]);
            }
        }
    }

    /// A raw disk with data that compresses, data that does not, written zeroes, and nothing; its size is no multiple of
    /// any cluster.
    pub(crate) fn disk(&self, name: &str) {
        const SIZE: usize = (12 << 20) + 512;
        let mut bytes = vec![0; SIZE];
        let mut state = 7_u64;
        for step in 0..24 {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state >> 33
            };
            let at = next() as usize % SIZE;
            let end = SIZE.min(at + 1 + next() as usize % 300_000);
            match step % 3 {
                0 => bytes[at..end].iter_mut().for_each(|byte| *byte = next() as u8),
                1 => bytes[at..end].fill(step),
                _ => bytes[at..end].fill(0),
            }
        }
        bytes[SIZE - 1] = 0xff;
        bytes[..512].fill(1);
        std::fs::write(self.path(name), &bytes).unwrap();
        self.qemu_img(&["convert", "-f", "raw", "-O", "raw", name, "sparse"]);
        std::fs::rename(self.path("sparse"), self.path(name)).unwrap();
    }
}
