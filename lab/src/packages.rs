//! Debian's packages, downloaded through a view of apt's that is ours alone and unpacked into a folder.
//!
//! The machine's own packages are neither used nor changed: what is wanted comes with all that it depends on, down to
//! the C library, and its programs are run by their own dynamic linker.

use crate::command::{self, output_within};
use crate::mirror;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The release whose packages the lab is made of, whatever release the machine has.
const RELEASE: &str = "bookworm";
/// Its newer packages: QEMU 10 and Linux 6.12.
const BACKPORTS: &str = "bookworm-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const DONE: &str = "unpacked";
/// A slow mirror is not a broken one.
const PATIENCE: Duration = Duration::from_secs(540);

/// Where a package comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// The release itself.
    Release,
    /// Newer packages for it.
    Backports,
}

impl Suite {
    /// As Debian calls it.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Release => RELEASE,
            Suite::Backports => BACKPORTS,
        }
    }
}

/// A folder of unpacked packages, kept from run to run.
pub struct Packages {
    folder: PathBuf,
}

impl Packages {
    /// Keeps them in this folder.
    pub fn new(folder: &Path) -> Packages {
        Packages { folder: folder.to_owned() }
    }

    /// These packages and all they depend on, in one tree. What is there already is not fetched again.
    pub fn with_dependencies(&self, name: &str, suite: Suite, wanted: &[&str]) -> Result<Tree> {
        self.tree(name, &format!("{} {}", suite.name(), wanted.join(" ")), |debs| {
            let archives = format!("Dir::Cache::archives={}", debs.display());
            let mut apt = self.apt("apt-get");
            apt.args(["-o", &archives, "-qq", "--yes", "--no-install-recommends", "--download-only"]);
            apt.args(["--target-release", suite.name(), "install"]).args(wanted);
            output_within(PATIENCE, &mut apt).context("download packages")
        })
    }

    /// The newest kernel of a suite, without what Debian would install beside it.
    pub fn kernel(&self, name: &str, suite: Suite) -> Result<Tree> {
        self.tree(name, &format!("kernel of {}", suite.name()), |debs| {
            let newest = format!("linux-image-amd64/{}", suite.name());
            let depends = output_within(PATIENCE, self.apt("apt-cache").args(["depends", &newest]))?;
            let image = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image"));
            let image = format!("linux-image{}/{}", image.context("no kernel in this suite")?, suite.name());
            let mut apt = self.apt("apt-get");
            apt.args(["-qq", "download", &image]).current_dir(debs);
            output_within(PATIENCE, &mut apt).context("download a kernel")
        })
    }

    /// The tree of that name, if it was made for the same wishes; else a new one.
    fn tree(&self, name: &str, wishes: &str, download: impl Fn(&Path) -> Result<String>) -> Result<Tree> {
        let root = self.folder.join(name);
        let done = root.join(DONE);
        if fs::read_to_string(&done).is_ok_and(|made_for| made_for == wishes) {
            return Ok(Tree { root });
        }
        println!("     downloading packages: {wishes}");
        self.update()?;
        let debs = self.folder.join(format!("{name}.debs"));
        let fresh = self.folder.join(format!("{name}.new"));
        for folder in [&debs, &fresh, &root] {
            if folder.exists() {
                fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
            }
        }
        fs::create_dir_all(debs.join("partial"))?;
        fs::create_dir_all(&fresh)?;
        download(&debs)?;
        let mut count = 0;
        for entry in fs::read_dir(&debs)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                command::output(Command::new("dpkg").arg("--extract").arg(&path).arg(&fresh))?;
                count += 1;
            }
        }
        ensure!(count > 0, "apt downloaded nothing for `{wishes}`");
        fs::write(fresh.join(DONE), wishes)?;
        fs::rename(&fresh, &root).context("put a tree of packages in its place")?;
        fs::remove_dir_all(&debs)?;
        Ok(Tree { root })
    }

    /// Fetches the lists of packages, once for all trees that are made from now on.
    fn update(&self) -> Result<()> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing (package debian-archive-keyring): what is downloaded could not be verified"
        );
        let lists = self.folder.join("lists");
        let sources = self.folder.join("sources.list");
        let mirror = mirror::of_this_machine()?;
        let line = |suite: &str| format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n");
        fs::create_dir_all(lists.join("partial")).with_context(|| format!("create {}", lists.display()))?;
        fs::write(&sources, [line(RELEASE), line(BACKPORTS)].concat())?;
        output_within(PATIENCE, self.apt("apt-get").args(["-qq", "update"]))
            .context("fetch lists of packages")?;
        Ok(())
    }

    /// apt with nothing of the machine's but its proxies: its own sources, lists and cache, and no package installed.
    fn apt(&self, program: &str) -> Command {
        let mut apt = Command::new(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Dir::Etc::preferencesparts=/dev/null".into(),
            format!("Dir::State::lists={folder}/lists"),
            "Dir::State::status=/dev/null".into(),
            "Dir::Cache::pkgcache=".into(),
            "Dir::Cache::srcpkgcache=".into(),
            "APT::Architecture=amd64".into(),
            // Without it, apt as root downloads as a user who may not enter our folder.
            "APT::Sandbox::User=root".into(),
            "Acquire::Languages=none".into(),
            // Catalogues of desktop software, which a machine may have asked for.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            "Acquire::Retries=3".into(),
            "Debug::NoLocking=true".into(),
        ] {
            apt.args(["-o", &option]);
        }
        apt
    }
}

/// Unpacked packages.
pub struct Tree {
    root: PathBuf,
}

/// Where Debian puts libraries, and their linker; in a tree, its links would lead out of it.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
const LINKER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

impl Tree {
    /// A file or folder in it.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside)
    }

    /// A program of the tree, run with the tree's own libraries.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.linker();
        command.arg(self.path(program));
        command
    }

    fn linker(&self) -> Command {
        let mut command = Command::new(self.path(LINKER));
        let folders = LIBRARIES.map(|folder| self.path(folder).display().to_string());
        command.args(["--library-path", &folders.join(":")]);
        command
    }

    /// The dynamic linker's file.
    pub(crate) fn linker_file(&self) -> PathBuf {
        self.path(LINKER)
    }

    /// The libraries that a program of the tree is linked with.
    pub(crate) fn libraries_of(&self, program: &str) -> Result<Vec<PathBuf>> {
        let list = command::output(self.linker().arg("--list").arg(self.path(program)))?;
        // `libc.so.6 => /…/libc.so.6 (0x…)`; what has no arrow is the linker and the kernel's own.
        let paths = list.lines().filter_map(|line| line.split_once(" => ")?.1.split(" (").next());
        Ok(paths.map(PathBuf::from).collect())
    }
}
