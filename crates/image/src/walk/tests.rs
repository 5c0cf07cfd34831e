//! Chains of images made by QEMU's programs, and what hostile ones get.

use std::fs::File;
use std::process::Command;

use super::*;
use crate::vhd;

/// A folder with images that qemu-img makes.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn raw(&self, name: &str) {
        File::create(self.path(name)).unwrap().set_len(1 << 20).unwrap();
    }

    /// An image over another, whose name and format it has as given.
    fn over(&self, name: &str, backing: &str, format: Option<&str>) {
        let words = ["-f", "qcow2", "-o", "cluster_size=512", "-u", "-b", backing];
        self.make(&words, Some(format.unwrap_or("raw")), name);
        if format.is_none() {
            // qemu-img insists on one. The type of the header extension with the format becomes one that nobody knows.
            let mut bytes = std::fs::read(self.path(name)).unwrap();
            let at = bytes.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
            bytes[at..at + 4].copy_from_slice(b"none");
            std::fs::write(self.path(name), bytes).unwrap();
        }
    }

    fn make(&self, words: &[&str], backing_format: Option<&str>, name: &str) {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q"]).args(words);
        if let Some(format) = backing_format {
            command.args(["-F", format]);
        }
        // Data files are made where it runs.
        let output = command.arg(self.path(name)).arg("1M").current_dir(self.path("")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The names of files from the top down with their formats, or why not.
    fn walk(&self, name: &str, change: impl FnOnce(&mut Options)) -> Result<Vec<String>, String> {
        // A lock outlives its file for a moment: other tests fork, and rings end late.
        let wait = std::time::Duration::from_secs(1);
        let file = file::Options { read_only: true, wait, ..file::Options::default() };
        let mut options = Options { file, ..Options::default() };
        change(&mut options);
        // One of its own: with it all files are closed again.
        let pool = block::Pool::new(4096);
        let uring = runtime::Uring::open(runtime::RingFlags::Auto, &pool).unwrap();
        let runtime = runtime::Runtime::new(Box::new(uring), pool);
        let (handle, path) = (runtime.handle().clone(), self.path(name));
        let layers = runtime.block_on(async move { walk(&handle, &path, &mut options).await });
        let named = |file: &Held| file.path.file_name().unwrap().to_str().unwrap().to_owned();
        let layers = layers.map_err(|error| error.to_string())?.into_iter().map(|layer| {
            let data = layer.data.iter().map(|data| format!(" with {}", named(data)));
            format!("{} {}{}", named(&layer.file), layer.header.format(), data.collect::<String>())
        });
        Ok(layers.collect())
    }

    #[track_caller]
    fn refused(&self, name: &str, change: impl FnOnce(&mut Options), words: &[&str]) {
        let error = self.walk(name, change).unwrap_err();
        for words in words {
            assert!(error.contains(words), "no {words:?} in {error}");
        }
    }
}

fn plain(_options: &mut Options) {}

#[test]
fn a_chain_is_followed_from_the_top_down() {
    let folder = Folder::new();
    folder.raw("base.raw");
    folder.over("middle.qcow2", "base.raw", Some("raw"));
    // Without a format of the one below, and with a name that is a link.
    std::os::unix::fs::symlink("middle.qcow2", folder.path("link")).unwrap();
    folder.over("top", "link", None);
    let expected = ["top qcow2", "link qcow2", "base.raw raw"];
    assert_eq!(folder.walk("top", plain).unwrap(), expected);
    assert_eq!(folder.walk("top", |options| options.no_backing = true).unwrap(), ["top qcow2"]);
    let writable = |options: &mut Options| options.file.read_only = false;
    assert_eq!(folder.walk("top", writable).unwrap(), expected);
    let alone = |options: &mut Options| (options.file.read_only, options.no_backing) = (false, true);
    folder.refused("top", alone, &["top has the backing file \"link\"", "--read-only"]);
    assert_eq!(folder.walk("base.raw", alone).unwrap(), ["base.raw raw"]);
}

#[test]
fn the_format_is_what_is_asked_for_or_what_name_and_header_say_together() {
    let folder = Folder::new();
    folder.make(&["-f", "qcow2"], None, "disk");
    for name in ["disk.img", "disk.raw", "disk.qcow2"] {
        std::fs::copy(folder.path("disk"), folder.path(name)).unwrap();
    }
    folder.raw("zeroes");
    folder.make(&["-f", "vmdk"], None, "disk.vmdk");
    // A guest may have written the header.
    assert_eq!(folder.walk("disk.img", plain).unwrap(), ["disk.img raw"]);
    assert_eq!(folder.walk("disk.raw", plain).unwrap(), ["disk.raw raw"]);
    assert_eq!(folder.walk("disk", plain).unwrap(), ["disk qcow2"]);
    let asked = |format| move |options: &mut Options| options.format = Some(format);
    assert_eq!(folder.walk("disk.img", asked(Format::Qcow2)).unwrap(), ["disk.img qcow2"]);
    assert_eq!(folder.walk("disk.qcow2", asked(Format::Raw)).unwrap(), ["disk.qcow2 raw"]);
    folder.refused("zeroes", plain, &["zeroes begins like no image", "--format raw"]);
    folder.refused("zeroes", asked(Format::Qcow2), &["zeroes", "no qcow2 image"]);
    folder.refused("disk.vmdk", plain, &["VMDK", "not known here", "--format raw"]);
    // `--create` means raw, unless what is there looks otherwise.
    let create = |options: &mut Options| {
        options.file.read_only = false;
        options.file.create = Some(1 << 20);
    };
    assert_eq!(folder.walk("zeroes", create).unwrap(), ["zeroes raw"]);
    assert_eq!(folder.walk("new", create).unwrap(), ["new raw"]);
    folder.refused("disk", create, &["looks like qcow2", "--format raw or --format qcow2"]);
}

#[test]
fn the_format_of_a_backing_file_is_what_the_image_says_and_is_never_assumed() {
    let folder = Folder::new();
    folder.raw("base.img");
    folder.raw("base");
    folder.make(&["-f", "qcow2"], None, "inner.img");
    for (backing, format, expected) in [
        ("base.img", None, Ok("base.img raw")),
        ("base", Some("raw"), Ok("base raw")),
        ("base", None, Err("its name has to end in .raw or .img")),
        ("inner.img", Some("raw"), Ok("inner.img raw")),
        ("inner.img", Some("qcow2"), Ok("inner.img qcow2")),
        ("inner.img", None, Err("its name says raw, but it begins like an image of the format qcow2")),
        ("base", Some("vmdk"), Err("whose format it calls \"vmdk\"")),
    ] {
        folder.over("top.qcow2", backing, format);
        match expected {
            Ok(expected) => assert_eq!(folder.walk("top.qcow2", plain).unwrap()[1..], [expected]),
            Err(words) => folder.refused("top.qcow2", plain, &["top.qcow2 names the backing file", words]),
        }
    }
}

#[test]
fn a_guest_of_a_fixed_vhd_does_not_decide_what_its_disk_is() {
    let folder = Folder::new();
    folder.raw("victim.raw");
    folder.make(&["-f", "vpc", "-o", "subformat=fixed,force_size=on"], None, "disk");
    folder.make(&["-f", "qcow2", "-o", "data_file=victim.raw,data_file_raw=on"], None, "header");
    folder.over("trap", "victim.raw", Some("raw"));
    let (whole, victim) =
        (std::fs::read(folder.path("disk")).unwrap(), std::fs::read(folder.path("victim.raw")).unwrap());
    let asked = |format| move |options: &mut Options| options.format = Some(format);
    for header in ["header", "trap"] {
        let head = std::fs::read(folder.path(header)).unwrap();
        let mut bytes = whole.clone();
        bytes[..65536].fill(0);
        let len = head.len().min(1 << 19);
        bytes[..len].copy_from_slice(&head[..len]);
        for name in ["disk", "disk.vhd"] {
            std::fs::write(folder.path(name), &bytes).unwrap();
            assert_eq!(folder.walk(name, asked(Format::Vhd)).unwrap(), [format!("{name} vhd")]);
        }
        folder.refused("disk", plain, &["format qcow2", "VHD", "--format vhd or --format qcow2"]);
        assert_eq!(folder.walk("disk.vhd", plain).unwrap(), ["disk.vhd vhd"]);
        // Cut off before its footer.
        std::fs::write(folder.path("disk.vhd"), &bytes[..bytes.len() - 512]).unwrap();
        folder.refused("disk.vhd", plain, &["format qcow2", "VHD", "--format vhd or --format qcow2"]);
        std::fs::write(folder.path("disk.vhd"), &bytes).unwrap();
        // The same below others.
        for (backing, format, expected) in [
            ("disk", None, None),
            ("disk.vhd", None, Some("disk.vhd vhd")),
            ("disk", Some("vpc"), Some("disk vhd")),
        ] {
            folder.over("top.qcow2", backing, format);
            match expected {
                Some(expected) => assert_eq!(folder.walk("top.qcow2", plain).unwrap()[1..], [expected]),
                None => {
                    folder.refused("top.qcow2", plain, &["top.qcow2 names the backing file", "Which is it?"])
                }
            }
        }
    }
    assert!(std::fs::read(folder.path("victim.raw")).unwrap() == victim);
    // One that encrypts its disk keeps it.
    let mut bytes = whole;
    bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    for name in ["disk", "disk.vhd"] {
        std::fs::write(folder.path(name), &bytes).unwrap();
        assert_eq!(folder.walk(name, plain).unwrap(), [format!("{name} vhd")]);
    }
    // What is called so and is none is not taken for raw either.
    folder.raw("none.vhd");
    folder.refused("none.vhd", plain, &["no VHD, or a damaged one"]);
}

#[test]
fn a_hostile_image_opens_nothing_but_its_neighbours() {
    let folder = Folder::new();
    std::os::unix::fs::symlink("/etc/passwd", folder.path("innocent.raw")).unwrap();
    std::fs::create_dir(folder.path("elsewhere")).unwrap();
    for (name, words) in [
        ("/etc/passwd", "which is /etc/passwd: images may name files"),
        ("../../../../../etc/passwd", "which is /etc/passwd: images may name files"),
        ("innocent.raw", "which is /etc/passwd: images may name files"),
        ("/proc/self/environ", "--allow-folder /proc/"),
        ("/dev/zero", "--allow-folder /dev"),
        ("elsewhere", "a directory"),
        ("nbd://localhost/disk", "which is no path"),
        ("json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", "which is no path"),
        ("missing.raw", "missing.raw does not exist"),
    ] {
        folder.over("top.qcow2", name, Some("raw"));
        folder.refused("top.qcow2", plain, &["top.qcow2 names the backing file", words]);
        assert_eq!(
            folder.walk("top.qcow2", |options| options.no_backing = true).unwrap(),
            ["top.qcow2 qcow2"]
        );
    }
    folder.over("top.qcow2", "/etc/passwd", Some("raw"));
    let allow = |options: &mut Options| options.allowed = vec!["/etc".into()];
    assert_eq!(folder.walk("top.qcow2", allow).unwrap(), ["top.qcow2 qcow2", "passwd raw"]);
    // Each image of a chain is held to the same.
    folder.over("over.qcow2", "top.qcow2", Some("qcow2"));
    folder.refused("over.qcow2", plain, &["/top.qcow2 names the backing file \"/etc/passwd\""]);
}

#[test]
fn a_folder_that_becomes_a_link_before_the_file_is_opened_leads_nowhere_else() {
    let folder = Folder::new();
    std::fs::create_dir_all(folder.path("vm/old")).unwrap();
    std::fs::create_dir(folder.path("secrets")).unwrap();
    for name in ["vm/top.raw", "vm/old/base.raw", "secrets/base.raw"] {
        folder.raw(name);
    }
    let pool = block::Pool::new(4096);
    let uring = runtime::Uring::open(runtime::RingFlags::Auto, &pool).unwrap();
    let runtime = runtime::Runtime::new(Box::new(uring), pool);
    let handle = runtime.handle().clone();
    let file = file::Options { read_only: true, ..file::Options::default() };
    let options = Options { file, format: Some(Format::Raw), ..Options::default() };
    let result = runtime.block_on(async move {
        let top = hold(&handle, &folder.path("vm/top.raw"), &options.file).await.unwrap();
        let allowed = Allowed::new(&top.path, false, &[]).unwrap();
        let mut walk = Walk { handle: &handle, options: &options, allowed, layers: Vec::new() };
        walk.take(top, Format::Raw).await.unwrap();
        let place = walk.follow("old/base.raw", Role::Backing).unwrap();
        walk.hold(&place, "old/base.raw", Role::Backing, true).await.unwrap();
        std::fs::rename(folder.path("vm/old"), folder.path("vm/older")).unwrap();
        std::os::unix::fs::symlink(folder.path("secrets"), folder.path("vm/old")).unwrap();
        let held = walk.hold(&place, "old/base.raw", Role::Backing, true).await;
        held.map(|held| held.path).map_err(|error| error.to_string())
    });
    assert!(result.as_ref().is_err_and(|error| error.contains("exchanged meanwhile")), "{result:?}");
}

#[test]
fn data_files_are_held_to_the_same_as_backing_files() {
    let folder = Folder::new();
    let make = |data: &str| {
        let (at, words) =
            (folder.path("data.raw"), format!("data_file={}", folder.path("data.raw").display()));
        folder.make(&["-f", "qcow2", "-o", &words], None, "top.qcow2");
        assert!(at.exists());
        let words = ["amend", "-f", "qcow2", "-o", &format!("data_file={data}")];
        let output = Command::new("qemu-img").args(words).arg(folder.path("top.qcow2")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    make("data.raw");
    assert_eq!(folder.walk("top.qcow2", plain).unwrap(), ["top.qcow2 qcow2 with data.raw"]);
    assert_eq!(
        folder.walk("top.qcow2", |options| options.file.read_only = false).unwrap(),
        ["top.qcow2 qcow2 with data.raw"]
    );
    make("/etc/passwd");
    folder.refused("top.qcow2", plain, &["names the data file \"/etc/passwd\"", "--allow-folder /etc"]);
    make("top.qcow2");
    folder.refused("top.qcow2", plain, &["names the data file \"top.qcow2\"", "in use above it"]);
}

/// A VHD that is made here: QEMU makes none that stands on another.
fn vhd(path: &Path, id: u8, parent: Option<vhd::Parent>) {
    let subformat = if parent.is_some() { vhd::Subformat::Differencing } else { vhd::Subformat::Dynamic };
    let options =
        vhd::Create { size: 1 << 20, subformat, parent, unique_id: Some([id; 16]), ..vhd::Create::default() };
    let file: Rc<dyn Storage> = Rc::new(storage::Ram::new(0));
    let made = std::pin::pin!(async {
        vhd::create(&file, &options).await.unwrap();
        let buf = block::Buf::zeroed(file.size() as usize);
        file.read(0, buf.clone()).await.unwrap();
        buf.to_vec()
    });
    match made.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(bytes) => std::fs::write(path, bytes).unwrap(),
        std::task::Poll::Pending => panic!("memory never waits"),
    }
}

fn parent(name: &str, id: Option<u8>) -> Option<vhd::Parent> {
    let changed = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    Some(vhd::Parent { name: name.to_owned(), unique_id: id.map(|id| [id; 16]), changed })
}

#[test]
fn the_parent_of_a_vhd_is_the_one_with_the_identifier_that_it_names() {
    let folder = Folder::new();
    folder.raw("disk.raw");
    vhd(&folder.path("grand.vhd"), 1, parent("disk.raw", None));
    vhd(&folder.path("parent.vhd"), 2, parent("./grand.vhd", Some(1)));
    vhd(&folder.path("child.vhd"), 3, parent("parent.vhd", Some(2)));
    assert_eq!(
        folder.walk("child.vhd", plain).unwrap(),
        ["child.vhd vhd", "parent.vhd vhd", "grand.vhd vhd", "disk.raw raw"]
    );
    // Another one under the name.
    vhd(&folder.path("grand.vhd"), 9, None);
    let (found, expected) = ("unique identifier is 0909", "expected 0101");
    folder.refused(
        "child.vhd",
        plain,
        &["parent.vhd names the backing file", found, expected, "another image"],
    );
    // It is the first of its names that leads to it.
    vhd(&folder.path("moved.vhd"), 1, None);
    let bytes = std::fs::read(folder.path("parent.vhd")).unwrap();
    let utf16 = |name: &str| name.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let (old, new) = (utf16("grand.vhd"), utf16("moved.vhd"));
    let at = bytes.windows(old.len()).rposition(|bytes| bytes == old).expect("it is written in this way too");
    let mut bytes = bytes;
    bytes[at..at + old.len()].copy_from_slice(&new);
    std::fs::write(folder.path("parent.vhd"), bytes).unwrap();
    assert_eq!(
        folder.walk("child.vhd", plain).unwrap(),
        ["child.vhd vhd", "parent.vhd vhd", "moved.vhd vhd"]
    );
    std::fs::remove_file(folder.path("moved.vhd")).unwrap();
    folder.refused("child.vhd", plain, &["Nor does any of"]);
    vhd(&folder.path("hostile.vhd"), 4, parent("/etc/passwd", None));
    folder.refused("hostile.vhd", plain, &["which is /etc/passwd: images may name files"]);
}

#[test]
fn loops_are_found_and_depth_is_bounded() {
    let folder = Folder::new();
    folder.over("self.qcow2", "self.qcow2", Some("qcow2"));
    folder.refused("self.qcow2", plain, &["names the backing file \"self.qcow2\"", "a loop"]);
    folder.over("a.qcow2", "b.qcow2", Some("qcow2"));
    folder.over("b.qcow2", "c.qcow2", Some("qcow2"));
    // By another name of the first.
    std::fs::hard_link(folder.path("a.qcow2"), folder.path("again.qcow2")).unwrap();
    folder.over("c.qcow2", "again.qcow2", Some("qcow2"));
    folder.refused(
        "a.qcow2",
        plain,
        &["c.qcow2 names the backing file \"again.qcow2\"", "a.qcow2: that is in use"],
    );
    folder.refused("a.qcow2", |options| options.file.read_only = false, &["a loop"]);

    folder.raw("0.raw");
    folder.over("1", "0.raw", Some("raw"));
    let one = std::fs::read(folder.path("1")).unwrap();
    let name = one.windows(5).rposition(|bytes| bytes == b"0.raw").unwrap();
    let format = one.windows(3).position(|bytes| bytes == b"raw").unwrap();
    for number in 2..=DEPTH_MAX {
        // What qemu-img made, with another name and format in it.
        let (mut bytes, below) = (one.clone(), format!("{:05}", number - 1));
        bytes[name..name + 5].copy_from_slice(below.as_bytes());
        bytes[format - 4..format + 5].copy_from_slice(b"\0\0\0\x05qcow2");
        std::fs::write(folder.path(&format!("{number:05}")), bytes).unwrap();
    }
    std::fs::rename(folder.path("1"), folder.path("00001")).unwrap();
    let longest = format!("{:05}", DEPTH_MAX - 1);
    assert_eq!(folder.walk(&longest, plain).unwrap().len(), DEPTH_MAX);
    let longer = format!("{DEPTH_MAX:05}");
    folder.refused(&longer, plain, &["00001 has the backing file \"0.raw\"", "image 201 of a chain: 200"]);
}

#[test]
fn files_that_are_in_use_are_told_with_who_names_them() {
    let folder = Folder::new();
    folder.raw("base.raw");
    folder.over("top.qcow2", "base.raw", Some("raw"));
    let writing = file::open(&folder.path("base.raw"), &file::Options::default()).unwrap();
    folder.refused(
        "top.qcow2",
        plain,
        &["names the backing file \"base.raw\"", "is in use by", "written by nobody"],
    );
    drop(writing);
    let held = file::Options { read_only: true, ..file::Options::default() };
    let reading = file::open(&folder.path("base.raw"), &held).unwrap();
    assert_eq!(folder.walk("top.qcow2", plain).unwrap().len(), 2);
    folder.refused("base.raw", |options| options.file.read_only = false, &["is in use by", "only reads it"]);
    drop(reading);
}
