//! Which files an image may name as the one below it, or as the one with its data.
//!
//! Whoever made an image wrote these names, and may be anybody. So a name counts only if it leads into a folder that the
//! administrator meant: the image's own, or one that was allowed by name. What counts is where a name leads in the end,
//! whatever links it goes through.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::ImageError;

/// What an image may name.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// The folders of the image that the administrator has named, and what is below them.
    own: Vec<PathBuf>,
    /// Folders, with all below them, and files that the administrator has allowed.
    further: Vec<PathBuf>,
}

/// Why a name is not followed, to be read after "the image names ... as ...".
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is no file of this host.
    Elsewhere,
    /// Nothing is there.
    Missing(PathBuf),
    /// It leads to a place that is not allowed.
    Forbidden(PathBuf),
    /// Why where it leads cannot be found out.
    Lost(PathBuf, String),
}

impl Allowed {
    /// For the image at this path, which is there: its folder and all below, and what `further` names. An image that is a
    /// block device has no folder of its own: it shares /dev with all others. Nor is the root of all files one.
    ///
    /// # Errors
    /// A place that is to be allowed does not exist, or the image's cannot be found.
    pub fn new(image: &Path, is_block_device: bool, further: &[PathBuf]) -> Result<Allowed, ImageError> {
        let canonical = |path: &Path, what: &str| {
            let found = path.canonicalize();
            found.map_err(|error| ImageError::Refused(format!("{what} {}: {error}", path.display())))
        };
        let mut own = Vec::new();
        if !is_block_device {
            // Both that of the name and that of the file, where the name is a link.
            for folder in [folder(image), folder(&canonical(image, "cannot find")?)] {
                own.push(canonical(&folder, "cannot find the folder of the image")?);
            }
            own.retain(|folder| folder.parent().is_some());
            own.dedup();
        }
        let further = further.iter().map(|path| canonical(path, "cannot allow")).collect::<Result<_, _>>()?;
        Ok(Allowed { own, further })
    }

    /// Where a name in the image at `image` leads, if it may be followed.
    pub(crate) fn follow(&self, image: &Path, name: &str) -> Result<Place, Refusal> {
        let named = named(image, name).ok_or(Refusal::Elsewhere)?;
        let found = named.canonicalize().map_err(|error| {
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
                return Refusal::Missing(named.clone());
            }
            Refusal::Lost(named.clone(), error.to_string())
        })?;
        if !self.holds(&found) {
            return Err(Refusal::Forbidden(found));
        }
        Ok(Place { named, found })
    }

    /// Whether this file is there and an image may not name it.
    pub fn forbids(&self, path: &Path) -> bool {
        path.canonicalize().is_ok_and(|found| !self.holds(&found))
    }

    /// Whether this path, without links in it, is allowed.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        // An image in a home must not reach the keys that are kept there too.
        let is_open = |below: &Path| {
            !below.components().any(|part| part.as_os_str().as_encoded_bytes().first() == Some(&b'.'))
        };
        self.further.iter().any(|place| path.starts_with(place))
            || self.own.iter().any(|folder| path.strip_prefix(folder).is_ok_and(is_open))
    }

    /// What is allowed, in words.
    pub(crate) fn describe(&self) -> String {
        let places =
            self.own.iter().map(|folder| format!("{} and below (but for what is hidden)", folder.display()));
        let further = self.further.iter().map(|place| place.display().to_string());
        let places: Vec<String> = places.chain(further).collect();
        if places.is_empty() { "nothing".into() } else { places.join(", ") }
    }
}

/// Where a name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// By name, for what it names in turn: as QEMU does, a name counts from the folder of the name before it.
    pub(crate) named: PathBuf,
    /// What is to be opened: without links.
    pub(crate) found: PathBuf,
}

/// The path that the image at `image` means by a name, or `None` for what is no path: `json:{...}`, `nbd://...`, `C:\...`.
pub fn named(image: &Path, name: &str) -> Option<PathBuf> {
    let name = match name.strip_prefix("file:") {
        Some(path) => path,
        // As QEMU decides it: a colon before the first slash.
        None if name.split('/').next().is_some_and(|first| first.contains(':')) => return None,
        None => name,
    };
    (!name.is_empty()).then(|| image.parent().unwrap_or(Path::new("")).join(name))
}

/// The folder that a path is in.
fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.into(),
        Some(_) | None => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Tree {
        directory: tempfile::TempDir,
        root: PathBuf,
    }

    impl Tree {
        /// Empty files at these paths.
        fn new(files: &[&str]) -> Tree {
            let directory = tempfile::tempdir().unwrap();
            let root = directory.path().canonicalize().unwrap();
            for file in files {
                let path = root.join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "").unwrap();
            }
            Tree { directory, root }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.join(name)
        }

        fn allowed(&self, image: &str, further: &[&str]) -> Allowed {
            let further: Vec<PathBuf> = further.iter().map(|name| self.path(name)).collect();
            Allowed::new(&self.path(image), false, &further).unwrap()
        }
    }

    #[test]
    fn names_lead_from_the_folder_of_the_image_and_no_further_than_it() {
        let tree = Tree::new(&[
            "vm/top.qcow2",
            "vm/base.raw",
            "vm/old/base.raw",
            "other/base.raw",
            "vm/.keys/secret",
        ]);
        let image = tree.path("vm/top.qcow2");
        let allowed = tree.allowed("vm/top.qcow2", &[]);
        let follow = |name: &str| allowed.follow(&image, name);
        let absolute = tree.path("vm/base.raw").to_str().unwrap().to_owned();
        for (name, found) in [
            ("base.raw", "vm/base.raw"),
            ("./base.raw", "vm/base.raw"),
            ("file:base.raw", "vm/base.raw"),
            ("old/../base.raw", "vm/base.raw"),
            ("old/base.raw", "vm/old/base.raw"),
            ("../vm/base.raw", "vm/base.raw"),
            (&absolute, "vm/base.raw"),
        ] {
            assert_eq!(follow(name).unwrap().found, tree.path(found), "{name}");
        }
        for name in
            ["../other/base.raw", "/etc/passwd", "/proc/self/environ", ".keys/secret", "/dev/null", "..", "/"]
        {
            assert!(matches!(follow(name), Err(Refusal::Forbidden(_))), "{name}: {:?}", follow(name));
        }
        for name in ["nowhere.raw", "base.raw/base.raw", "\n"] {
            assert!(matches!(follow(name), Err(Refusal::Missing(_))), "{name}: {:?}", follow(name));
        }
        for name in [
            "json:{\"driver\":\"file\"}",
            "nbd://host/disk",
            "fat:/etc",
            "C:\\disk.vhd",
            "nbd:unix:/a",
            ":",
            "",
        ] {
            assert_eq!(follow(name), Err(Refusal::Elsewhere), "{name}");
        }
        assert!(matches!(follow("a\0b"), Err(Refusal::Lost(_, _))));
        let long = "x/".repeat(4000);
        assert!(matches!(follow(&long), Err(Refusal::Missing(_) | Refusal::Lost(_, _))));
        assert!(tree.directory.path().exists());
    }

    #[test]
    fn links_lead_where_they_lead() {
        let tree = Tree::new(&["vm/top.qcow2", "vm/base.raw", "secrets/shadow", "pool/1.raw"]);
        symlink("base.raw", tree.path("vm/within")).unwrap();
        symlink("../secrets/shadow", tree.path("vm/without")).unwrap();
        symlink("../secrets", tree.path("vm/folder")).unwrap();
        symlink("round", tree.path("vm/round")).unwrap();
        let image = tree.path("vm/top.qcow2");
        let allowed = tree.allowed("vm/top.qcow2", &[]);
        assert_eq!(allowed.follow(&image, "within").unwrap().found, tree.path("vm/base.raw"));
        for name in ["without", "folder/shadow"] {
            let shadow = tree.path("secrets/shadow");
            assert_eq!(allowed.follow(&image, name), Err(Refusal::Forbidden(shadow)), "{name}");
        }
        assert!(matches!(allowed.follow(&image, "round"), Err(Refusal::Lost(_, _))));

        // An image that is a link: names count from where the link is; its folder is the link's and the file's.
        symlink("../vm/top.qcow2", tree.path("pool/link.qcow2")).unwrap();
        let allowed = tree.allowed("pool/link.qcow2", &[]);
        let link = tree.path("pool/link.qcow2");
        assert_eq!(allowed.follow(&link, "1.raw").unwrap().found, tree.path("pool/1.raw"));
        assert_eq!(allowed.follow(&link, "../vm/base.raw").unwrap().found, tree.path("vm/base.raw"));
        assert!(allowed.follow(&link, "../secrets/shadow").is_err());
    }

    #[test]
    fn what_the_administrator_allows_is_allowed() {
        let tree = Tree::new(&[
            "vm/top.qcow2",
            "bases/a/base.raw",
            "bases-of-others/base.raw",
            "vm/.hidden/base.raw",
        ]);
        let image = tree.path("vm/top.qcow2");
        let allowed = tree.allowed("vm/top.qcow2", &["bases", "vm/.hidden"]);
        for (name, expected) in [
            ("../bases/a/base.raw", true),
            (".hidden/base.raw", true),
            ("../bases-of-others/base.raw", false),
        ] {
            assert_eq!(allowed.follow(&image, name).is_ok(), expected, "{name}");
        }
        let allowed = tree.allowed("vm/top.qcow2", &["bases-of-others/base.raw"]);
        assert!(allowed.follow(&image, "../bases-of-others/base.raw").is_ok(), "a single file");
        let error = Allowed::new(&image, false, &[tree.path("nowhere")]).unwrap_err();
        assert!(
            error.to_string().contains("cannot allow") && error.to_string().contains("nowhere"),
            "{error}"
        );
    }

    #[test]
    fn a_block_device_and_the_root_have_no_folder() {
        let tree = Tree::new(&["vm/top.qcow2", "vm/base.raw"]);
        let image = tree.path("vm/top.qcow2");
        let device = Allowed::new(&image, true, &[]).unwrap();
        assert!(matches!(device.follow(&image, "base.raw"), Err(Refusal::Forbidden(_))));
        assert_eq!(device.describe(), "nothing");
        let root = Allowed::new(Path::new("/proc"), false, &[]).unwrap();
        assert!(matches!(root.follow(&image, "base.raw"), Err(Refusal::Forbidden(_))));
    }
}
