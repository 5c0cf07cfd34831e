//! The way from an image down to all that it stands on: which files, of which formats, and whether they may be opened.

use std::fmt;
use std::os::fd::AsRawFd;
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
    /// The option by which people say its format, for errors: `--format` where nothing is said.
    pub format_by: Option<&'static str>,
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
    /// What is put over the storage of its file, below its format, once that is known.
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
    /// Where it is without links, if the kernel can tell.
    really: Option<PathBuf>,
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

impl Layer {
    /// Its file, and that with its data where it is another one.
    pub fn files(&self) -> impl Iterator<Item = &Held> {
        std::iter::once(&self.file).chain(&self.data)
    }

    /// The error of a sync of one of its files that failed in a process before this one. A raw image is poisoned by its file
    /// itself.
    pub(crate) fn poison(&self) -> Option<Error> {
        self.files().find_map(|held| held.poison.clone()).filter(|_| self.header.format() != Format::Raw)
    }
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
    // The page cache shows what the disk does not hold, so that not even a header is to be had from there.
    let unreadable = top.record.clone().filter(|_| top.poison.is_some() && top.direct.is_none());
    let unreadable = &|error: ImageError| match &unreadable {
        None => error,
        Some(record) => ImageError::Refused(format!(
            "{error}. Look at the image past the page cache: `tapdisk serve --read-only \
             --cache direct`, or `tapdisk convert -T direct`. If nothing of what guests were told matters any more, remove {}",
            record.path().display()
        )),
    };
    let format = format_of_top(&top, options).await.map_err(unreadable)?;
    if let Some(filter) = options.filter.take() {
        top.storage = filter(top.storage);
    }
    let allowed = Allowed::new(path, top.is_block_device, &options.allowed)?;
    let mut walk = Walk { handle, options, allowed, layers: Vec::new() };
    walk.take(top, format).await.map_err(unreadable)?;
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
        let place = self.follow_data(&name)?;
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
        let place = self.allowed.follow(&self.lowest().file.path, name);
        place.map_err(|refusal| self.explain(name, role, refusal))
    }

    /// Why a name is not followed, and what can be done.
    fn explain(&self, name: &str, role: Role, refusal: Refusal) -> ImageError {
        match refusal {
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
        }
    }

    /// Where the name of a data file leads. As QEMU has it, a relative one counts from where the process is; who is elsewhere
    /// than who made the image finds it beside the image.
    fn follow_data(&self, name: &str) -> Result<Place, ImageError> {
        let follow = |image: &Path| self.allowed.follow(image, name);
        match (follow(Path::new("")), follow(&self.lowest().file.path)) {
            (Ok(here), Ok(beside)) if beside.found != here.found => Err(self.refuse(
                name,
                Role::Data,
                &format!(
                    "which may be {}, as QEMU would have it, or {}: which is it? Give one of them another name, or work in \
                     another folder",
                    here.named.display(),
                    beside.named.display()
                ),
            )),
            (Ok(here), Ok(_) | Err(_)) => Ok(here),
            (Err(_), Ok(beside)) => Ok(beside),
            (Err(refusal @ Refusal::Forbidden(_)), Err(_)) | (Err(_), Err(refusal)) => {
                Err(self.explain(name, Role::Data, refusal))
            }
        }
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
        // Whoever may change the folders on the way could have put a link into it meanwhile.
        let is_allowed = held.really.as_deref().is_none_or(|really| self.allowed.holds(really));
        if held.identity != identity || !is_allowed {
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
                Err(self.refuse(
                    name,
                    Role::Backing,
                    &format!("and says nothing of its format, which {look}. If it is raw, its name has to end in .raw or .img; {how}"),
                ))
            }
            (Look::Of(_) | Look::Foreign(_) | Look::Unclear(_), true) => {
                Err(self.refuse(
                    name,
                    Role::Backing,
                    &format!("and says nothing of its format: its name says raw, but it {look}. Which is it? {how}"),
                ))
            }
            (Look::Unclear(_), false) => {
                Err(self.refuse(
                    name,
                    Role::Backing,
                    &format!("and says nothing of its format, and it {look}. Which is it? {how}"),
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
    let by = options.format_by.unwrap_or("--format");
    let (look, path) = (look(file).await, file.path.display());
    if probe::is_raw_by_name(&file.path, file.is_block_device) {
        match look {
            Ok(Look::Nothing) => {}
            Ok(look) => {
                tracing::warn!(
                    image = %path, looks = look.to_string(),
                    "taken for raw, as its name or kind says, whatever a guest has written to it; --format says otherwise"
                );
            }
            // What it looks like is of no importance.
            Err(error) => tracing::debug!(image = %path, %error, "it cannot be looked at"),
        }
        return Ok(Format::Raw);
    }
    match look? {
        // It may be a disk that was made in this way, and then written by its guest.
        Look::Of(format) if options.file.create.is_some() => Err(ImageError::Refused(format!(
            "{path} is there already and looks like {format}, but `--create` makes raw images: {by} raw or {by} {format} says \
             which it is"
        ))),
        Look::Of(format) => Ok(format),
        Look::Nothing if options.file.create.is_some() => Ok(Format::Raw),
        look @ Look::Unclear(begins) => {
            Err(ImageError::Refused(format!("{path} {look}: {by} vhd or {by} {begins} says which it is")))
        }
        look @ (Look::Nothing | Look::Foreign(_)) => {
            Err(ImageError::Refused(format!("{path} {look}: {by} raw takes its bytes as they are")))
        }
    }
}

async fn look(file: &Held) -> Result<Look, ImageError> {
    probe::look(&file.storage, &file.path, file.is_block_device)
        .await
        .map_err(|error| ImageError::from(error).within(file.path.display()))
}

/// What to do about a name that leads to the wrong place.
fn remedy(role: Role) -> &'static str {
    match role {
        Role::Backing => {
            ". `tapdisk rebase -u` corrects the name; `tapdisk serve --no-backing --read-only` shows what the image has itself"
        }
        Role::Data => "",
    }
}

async fn hold(handle: &Handle, path: &Path, options: &file::Options) -> Result<Held, OpenError> {
    let opened = file::open(path, options)?;
    file::check_short_transfers(handle, &opened).await?;
    let system = |doing| move |source| OpenError::System { path: path.to_owned(), doing, source };
    let found = rustix::fs::fstat(&opened.file).map_err(|errno| system("look at it")(errno.into()))?;
    let really = match std::fs::read_link(format!("/proc/self/fd/{}", opened.file.as_raw_fd())) {
        Ok(really) => Some(really),
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "where it really is cannot be found out: is there no /proc?");
            None
        }
    };
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
        really,
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
mod tests;
