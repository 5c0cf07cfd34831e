//! The way from an image down to all that it stands on: which files, of which formats, and whether they may be opened.

use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::Error;
use runtime::Handle;
use storage::Storage;
use storage::file::{self, File, OpenError, Record};

use crate::places::{Place, Refusal};
use crate::probe::{self, Look};
use crate::{Allowed, Backing, Format, Header, ImageError};

/// Images one on another, at most. Each takes descriptors and memory; nobody has been seen with more than a few dozens.
const DEPTH_MAX: usize = 200;

/// How an image is opened with all that it stands on.
#[derive(Default)]
pub struct Options {
    /// Its format; without one it is found out ([`probe`]). Those of the images below are what the image above each says.
    pub format: Option<Format>,
    /// How its file is opened. Those of the images below are opened in the same way, but for reading.
    pub file: file::Options,
    /// Bytes of memory for the metadata of all images together; 0 for what suits most.
    pub cache: usize,
    /// Open it alone: where it says nothing, zeroes are read. That is for looking only.
    pub no_backing: bool,
    /// Folders and files that images may name besides those of the image's own folder.
    pub allowed: Vec<PathBuf>,
    /// Whether what was answered must be there after the death of this process: see [`Settings`](crate::Settings).
    pub lasting: bool,
    /// What is put over the storage of its file, below its format.
    pub filter: Option<Filter>,
}

/// Makes a storage of another.
pub type Filter = Box<dyn FnOnce(Rc<dyn Storage>) -> Rc<dyn Storage>>;

/// A file that is open.
pub struct Held {
    /// By which name.
    pub path: PathBuf,
    /// Its bytes.
    pub storage: Rc<dyn Storage>,
    /// Bytes that it had.
    pub size: u64,
    /// Whether it was made just now.
    pub created: bool,
    /// Whether it is a block device.
    pub is_block_device: bool,
    /// Whether O_DIRECT is in force, and with which alignment, in bytes.
    pub direct: Option<u32>,
    /// Why it is not although it was asked for.
    pub not_direct: Option<String>,
    /// Whether writes to it are refused.
    pub read_only: bool,
    /// Where what a successor must know of it is kept.
    pub record: Option<Record>,
    /// The error of a sync of it that failed in a process before this one.
    pub poison: Option<Error>,
    /// What it is.
    identity: Identity,
}

/// An image on the way.
pub struct Layer {
    /// Its file.
    pub file: Held,
    /// What it says of itself.
    pub header: Header,
    /// The file with its data, where that is another one.
    pub data: Option<Held>,
}

/// What a file is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    /// Device and inode.
    File(u64, u64),
    /// The number of a block device.
    Device(u64),
}

/// What an image names.
#[derive(Clone, Copy, Debug)]
enum Role {
    Backing,
    Data,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Backing => "backing file",
            Role::Data => "data file",
        })
    }
}

/// Opens the files of an image and of all that it stands on, from the top down, and reads their headers; changes nothing. It
/// may wait for other processes to let go of them, and holds up its thread meanwhile.
///
/// # Errors
/// The first file that cannot be opened, may not be opened or makes no sense, and who names it.
pub async fn walk(handle: &Handle, path: &Path, options: &mut Options) -> Result<Vec<Layer>, ImageError> {
    let mut top = hold(handle, path, &options.file).await.map_err(|error| refused(&error))?;
    if let Some(filter) = options.filter.take() {
        top.storage = filter(top.storage);
    }
    let format = format_of_top(&top, options).await?;
    let allowed = Allowed::new(path, top.is_block_device, &options.allowed)?;
    let mut walk = Walk { handle, options, allowed, layers: Vec::new() };
    walk.take(top, format).await?;
    while let Some(backing) = walk.next()? {
        let (file, format) = walk.backing(&backing).await?;
        walk.take(file, format).await?;
    }
    Ok(walk.layers)
}

struct Walk<'a> {
    handle: &'a Handle,
    options: &'a Options,
    allowed: Allowed,
    layers: Vec<Layer>,
}

impl Walk<'_> {
    /// Adds an image at the lower end.
    async fn take(&mut self, file: Held, format: Format) -> Result<(), ImageError> {
        let header = Header::read(&file.storage, format).await;
        let header = header.map_err(|error| error.within(file.path.display()))?;
        let data_file = header.data_file().map(|name| name.map(str::to_owned));
        self.layers.push(Layer { file, header, data: None });
        let Some(name) = data_file else { return Ok(()) };
        let Some(name) = name else {
            return Err(ImageError::Unsupported(format!(
                "{} has its data in another file and does not say in which: nothing can be done with it alone",
                self.lowest().file.path.display()
            )));
        };
        let place = self.follow(&name, Role::Data)?;
        let read_only = self.options.file.read_only || self.layers.len() > 1;
        let data = self.hold(&place, &name, Role::Data, read_only).await?;
        if let Some(layer) = self.layers.last_mut() {
            layer.data = Some(data);
        }
        Ok(())
    }

    fn lowest(&self) -> &Layer {
        self.layers.last().expect("the top is there from the beginning")
    }

    /// What the lowest image says of the one below it.
    fn next(&self) -> Result<Option<Backing>, ImageError> {
        let Some(backing) = self.lowest().header.backing() else { return Ok(None) };
        let path = self.lowest().file.path.display();
        if self.options.no_backing {
            if self.options.file.read_only {
                return Ok(None);
            }
            return Err(ImageError::Refused(format!(
                "{path} has the backing file {:?}, and --no-backing shows zeroes in its place: written in this state it \
                 would keep such zeroes for good. Open it with --read-only too",
                backing.name
            )));
        }
        if self.layers.len() >= DEPTH_MAX {
            return Err(ImageError::Refused(format!(
                "{path} has the backing file {:?}, which would be image {} of a chain: {DEPTH_MAX} are opened at most. \
                 Make fewer of them, with `tapdisk commit` or `tapdisk convert`",
                backing.name,
                DEPTH_MAX + 1
            )));
        }
        Ok(Some(backing))
    }

    /// Opens the image below: the first of its names that leads to it.
    async fn backing(&self, backing: &Backing) -> Result<(Held, Format), ImageError> {
        let mut first = None;
        for name in std::iter::once(&backing.name).chain(&backing.others) {
            match self.candidate(name, backing).await {
                Ok(found) => return Ok(found),
                Err(error) => {
                    tracing::debug!(%error, "a name of a backing file leads nowhere");
                    first = first.or(Some(error));
                }
            }
        }
        let error = first.expect("there is a first name");
        Err(match backing.others.len() {
            0 => error,
            others => ImageError::Refused(format!("{error}. Nor does any of {others} other names for it")),
        })
    }

    async fn candidate(&self, name: &str, backing: &Backing) -> Result<(Held, Format), ImageError> {
        let place = self.follow(name, Role::Backing)?;
        let file = self.hold(&place, name, Role::Backing, true).await?;
        let format = self.format_of_backing(&file, name, backing).await?;
        if let Some(expected) = backing.unique_id {
            let header = Header::read(&file.storage, format).await;
            let header = header.map_err(|error| error.within(file.path.display()))?;
            if header.unique_id() != Some(expected) {
                let found = header.unique_id().map_or("none".into(), |id| hex(&id));
                return Err(self.refuse(
                    name,
                    Role::Backing,
                    &format!(
                        "{}, whose unique identifier is {found}: expected {}. It is another image, or was made anew",
                        file.path.display(),
                        hex(&expected)
                    ),
                ));
            }
        }
        Ok((file, format))
    }

    /// Where a name in the lowest image leads.
    fn follow(&self, name: &str, role: Role) -> Result<Place, ImageError> {
        let image = &self.lowest().file.path;
        self.allowed.follow(image, name).map_err(|refusal| match refusal {
            Refusal::Elsewhere => self.refuse(
                name,
                role,
                "which is no path: only files and block devices of this host are opened. If it is a path, it has to \
                 begin with `./` or `/`",
            ),
            Refusal::Missing(path) => {
                self.refuse(name, role, &format!("and {} does not exist{}", path.display(), remedy(role)))
            }
            Refusal::Lost(path, why) => {
                self.refuse(name, role, &format!("and {} cannot be found: {why}", path.display()))
            }
            Refusal::Forbidden(path) => self.refuse(
                name,
                role,
                &format!(
                    "which is {}: images may name files in these places only: {}. If whoever made this image may have it \
                     opened, allow it with --allow-folder {}",
                    path.display(),
                    self.allowed.describe(),
                    path.parent().unwrap_or(&path).display()
                ),
            ),
        })
    }

    /// "IMAGE names the backing file NAME, ..."
    fn refuse(&self, name: &str, role: Role, why: &str) -> ImageError {
        let image = self.lowest().file.path.display();
        ImageError::Refused(format!("{image} names the {role} {name:?}, {why}"))
    }

    /// Opens what a name leads to, unless it is open already.
    async fn hold(&self, place: &Place, name: &str, role: Role, read_only: bool) -> Result<Held, ImageError> {
        let refuse = |why: &str| self.refuse(name, role, why);
        let identity = identity(&place.found).map_err(|error| {
            refuse(&format!("and {} cannot be looked at: {error}", place.found.display()))
        })?;
        let held = self.layers.iter().flat_map(|layer| layer.data.iter().chain([&layer.file]));
        if let Some(same) = held.into_iter().find(|held| held.identity == identity) {
            let why = format!(
                "which is {}: that is in use above it, so the chain would be a loop{}",
                same.path.display(),
                remedy(role)
            );
            return Err(refuse(&why));
        }
        // What an image names is never made.
        let file = file::Options { read_only, create: None, ..self.options.file.clone() };
        let mut held = hold(self.handle, &place.found, &file).await.map_err(|error| match error {
            OpenError::Empty(_) => {
                refuse(&format!("and {} is empty: expected an image", place.found.display()))
            }
            OpenError::Busy { .. } if read_only => refuse(&format!(
                "and {error}; what images stand on may be read by many, and be written by nobody meanwhile"
            )),
            OpenError::System { .. }
            | OpenError::Missing(_)
            | OpenError::Kind { .. }
            | OpenError::Misplaced(_)
            | OpenError::Busy { .. } => refuse(&format!("and {error}")),
        })?;
        if held.identity != identity {
            return Err(refuse(&format!("and {} was exchanged meanwhile", place.found.display())));
        }
        held.path.clone_from(&place.named);
        Ok(held)
    }

    /// What the image above says, else what the file says itself.
    async fn format_of_backing(
        &self,
        file: &Held,
        name: &str,
        backing: &Backing,
    ) -> Result<Format, ImageError> {
        if let Some(format) = self.lowest().header.foreign_backing() {
            let why = format!(
                "whose format it calls {format:?}: expected raw, qcow, qcow2 or vpc (VHD). `qemu-img rebase -u -F FORMAT -b \
                 FILE IMAGE` corrects that"
            );
            return Err(self.refuse(name, Role::Backing, &why));
        }
        if let Some(format) = backing.format {
            return Ok(format);
        }
        let how = "`qemu-img rebase -u -F FORMAT -b FILE IMAGE` writes it down where the image's format has a place for it";
        let look = look(file).await?;
        match (look, probe::is_raw_by_name(&file.path, file.is_block_device)) {
            (Look::Nothing, true) => Ok(Format::Raw),
            (Look::Of(format), false) => Ok(format),
            // A guest may have written that header; or somebody has called another image so.
            (Look::Nothing | Look::Foreign(_), false) => {
                let found = described(look);
                Err(self.refuse(
                    name,
                    Role::Backing,
                    &format!("and says nothing of its format, which {found}. If it is raw, its name has to end in .raw or .img; {how}"),
                ))
            }
            (Look::Of(_) | Look::Foreign(_), true) => {
                let found = described(look);
                Err(self.refuse(
                    name,
                    Role::Backing,
                    &format!("and says nothing of its format: its name says raw, but it {found}. Which is it? {how}"),
                ))
            }
        }
    }
}

/// The format of the image that everything begins with.
async fn format_of_top(file: &Held, options: &Options) -> Result<Format, ImageError> {
    if let Some(format) = options.format {
        return Ok(format);
    }
    if file.created {
        return Ok(Format::Raw);
    }
    let (look, path) = (look(file).await?, file.path.display());
    if probe::is_raw_by_name(&file.path, file.is_block_device) {
        if look != Look::Nothing {
            let looks = described(look);
            tracing::warn!(
                image = %path, looks,
                "taken for raw, as its name or kind says, whatever a guest has written to it; --format says otherwise"
            );
        }
        return Ok(Format::Raw);
    }
    match look {
        // It may be a disk that was made in this way, and then written by its guest.
        Look::Of(format) if options.file.create.is_some() => Err(ImageError::Refused(format!(
            "{path} is there already and looks like {format}, but `--create` makes raw images: --format raw or --format \
             {format} says which it is"
        ))),
        Look::Of(format) => Ok(format),
        Look::Nothing if options.file.create.is_some() => Ok(Format::Raw),
        Look::Nothing | Look::Foreign(_) => Err(ImageError::Refused(format!(
            "{path} {}: --format raw serves its bytes as they are",
            described(look)
        ))),
    }
}

async fn look(file: &Held) -> Result<Look, ImageError> {
    probe::look(&file.storage).await.map_err(|error| ImageError::from(error).within(file.path.display()))
}

/// To be read after the name of a file.
fn described(look: Look) -> String {
    match look {
        Look::Of(format) => format!("begins like an image of the format {format}"),
        Look::Foreign(name) => format!("begins like an image of the format {name}, which is not known here"),
        Look::Nothing => "begins like no image of a known format (raw, qcow, qcow2, vhd)".into(),
    }
}

/// What to do about a name that leads to the wrong place.
fn remedy(role: Role) -> &'static str {
    match role {
        Role::Backing => {
            ". `tapdisk rebase` corrects the name; --no-backing with --read-only shows what the image has itself"
        }
        Role::Data => "",
    }
}

async fn hold(handle: &Handle, path: &Path, options: &file::Options) -> Result<Held, OpenError> {
    let opened = file::open(path, options)?;
    file::check_short_transfers(handle, &opened).await?;
    let system = |doing| move |source| OpenError::System { path: path.to_owned(), doing, source };
    let found = rustix::fs::fstat(&opened.file).map_err(|errno| system("look at it")(errno.into()))?;
    let records = options.records.as_ref();
    let record = records.map(|records| records.of(&opened.file, path)).transpose();
    Ok(Held {
        path: path.to_owned(),
        size: opened.size,
        created: opened.created,
        is_block_device: opened.is_block_device,
        read_only: opened.read_only,
        direct: opened.direct.then_some(opened.align),
        not_direct: opened.not_direct.clone(),
        record: record.map_err(system("find out its identity"))?,
        poison: opened.poison.clone(),
        identity: Identity::of(&found),
        storage: Rc::new(File::new(handle, opened)),
    })
}

impl Identity {
    fn of(found: &rustix::fs::Stat) -> Identity {
        let kind = rustix::fs::FileType::from_raw_mode(found.st_mode);
        match kind.is_block_device() {
            true => Identity::Device(found.st_rdev),
            false => Identity::File(found.st_dev, found.st_ino),
        }
    }
}

fn identity(path: &Path) -> std::io::Result<Identity> {
    Ok(Identity::of(&rustix::fs::stat(path)?))
}

fn refused(error: &OpenError) -> ImageError {
    ImageError::Refused(error.to_string())
}

fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use super::*;

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
            let output = command.arg(self.path(name)).arg("1M").output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }

        /// The names of files from the top down with their formats, or why not.
        fn walk(&self, name: &str, change: impl FnOnce(&mut Options)) -> Result<Vec<String>, String> {
            let file = file::Options {
                read_only: true,
                wait: std::time::Duration::ZERO,
                ..file::Options::default()
            };
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
                Err(words) => {
                    folder.refused("top.qcow2", plain, &["top.qcow2 names the backing file", words])
                }
            }
        }
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
        folder.refused(
            &longer,
            plain,
            &["00001 has the backing file \"0.raw\"", "image 201 of a chain: 200"],
        );
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
        folder.refused(
            "base.raw",
            |options| options.file.read_only = false,
            &["is in use by", "only reads it"],
        );
        drop(reading);
    }
}
