//! `tapdisk rebase`: puts an image over another one than before.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, bail};
use image::tool::{self, Watch};
use image::{Format, Header, qcow2};
use runtime::Handle;
use storage::Storage;

use super::disk::{
    Access, Asked, from_image, is_same, refuse_loop, refuse_no_path, refuse_snapshots, say_if_forbidden,
};
use super::progress::Progress;
use crate::cli::tool::Rebase;

pub(super) async fn run(handle: &Handle, arguments: &Rebase) -> anyhow::Result<()> {
    let (path, places) = (&arguments.file, &arguments.places);
    let name = Some(arguments.backing.as_str()).filter(|name| !name.is_empty());
    if let (None, Some(format)) = (name, arguments.backing_format) {
        bail!("there is a format of an image below ({format}), but no such image: name it with --backing");
    }
    if let Some(name) = name {
        refuse_no_path(path, name)?;
    }
    let asked = Asked::new(path, arguments.format, Access::Write, places);
    let file = if arguments.unchecked {
        let opened = storage::file::open(path, &asked.file()?)?;
        let is_block_device = opened.is_block_device;
        asked.refuse_pending(&opened)?;
        let file: Rc<dyn Storage> = Rc::new(storage::File::new(handle, opened));
        refuse_other(path, asked.format_of(&file, is_block_device).await?)?;
        // The image above has to say it: a header that a guest has written says anything.
        if let (Some(name), None) = (name, arguments.backing_format) {
            bail!("which format has {name}? Nothing is looked at with `-u`: say it with -F");
        }
        if let Some(name) = name {
            refuse_itself(path, &from_image(path, name))?;
        }
        change(&file, path, name, arguments.backing_format).await?;
        file
    } else {
        let new = name.map(|name| (name, from_image(path, name)));
        if let Some((name, new)) = &new {
            let asked = Asked::below(new, arguments.backing_format, places);
            let layers = asked.walk(handle).await;
            refuse_loop(
                path,
                &layers.with_context(|| format!("{name} cannot be below {}", path.display()))?,
            )?;
        }
        // Its files are free once the ring has had a turn.
        handle.turn().await;
        let disk = asked.open(handle).await.with_context(|| {
            format!(
                "{} cannot be opened over the image that is below it now (`-u` does not look at it)",
                path.display()
            )
        })?;
        refuse_other(path, disk.top().header.format())?;
        refuse_raw_data(path, name, &disk.top().header)?;
        refuse_snapshots(path, &disk.top().header)?;
        let new = match &new {
            Some((name, new)) => {
                let asked = Asked::below(new, arguments.backing_format, places);
                let new = asked.open(handle).await;
                Some(new.with_context(|| format!("{name} cannot be below {}", path.display()))?)
            }
            None => None,
        };
        let watch: Rc<dyn Watch> = Rc::new(Progress::new(disk.chain.size(), arguments.progress)?);
        let storage: Option<Rc<dyn Storage>> = match &new {
            Some(new) => Some(new.chain.clone()),
            None => None,
        };
        let done = tool::rebase(handle, &disk.chain, storage.as_ref(), &watch).await;
        drop(watch);
        let closed = disk.close().await;
        done.with_context(|| format!("{} is still over the image that it was over", path.display()))?;
        closed?;
        let format = new.as_ref().map(|new| new.top().header.format());
        let file = disk.top().file.storage.clone();
        change(&file, path, name, format).await?;
        file
    };
    drop(file);
    if let Some(name) = name {
        say_if_forbidden(path, &from_image(path, name), places);
    }
    let text = match name {
        Some(name) => format!("{} is over {name} now\n", path.display()),
        None => format!("{} stands alone now\n", path.display()),
    };
    crate::print(text.as_bytes())
}

/// Nothing is looked at, but who would stand on itself could not be opened.
fn refuse_itself(image: &Path, below: &Path) -> anyhow::Result<()> {
    match (std::fs::metadata(image), std::fs::metadata(below)) {
        (Ok(image_is), Ok(below_is)) if is_same(&image_is, &below_is) => {
            bail!("{} cannot be below itself: {} is the same file", image.display(), below.display())
        }
        (Ok(_) | Err(_), Ok(_) | Err(_)) => Ok(()),
    }
}

/// Only qcow2 has the room, and the order of writes, to change the name of what is below.
fn refuse_other(path: &Path, format: Format) -> anyhow::Result<()> {
    match format {
        Format::Qcow2 => Ok(()),
        Format::Raw => bail!("{} is a raw image, which has all its bytes itself", path.display()),
        Format::Qcow | Format::Vhd => bail!(
            "{} is a {format} image: only those of qcow2 can be put over another one. `tapdisk convert -O qcow2` makes it one \
             that stands alone; `tapdisk create -f {format} -b` makes a new one over another",
            path.display()
        ),
    }
}

/// A raw data file alone shows the disk.
fn refuse_raw_data(path: &Path, name: Option<&str>, header: &Header) -> anyhow::Result<()> {
    let is_raw = match header {
        Header::Qcow2(header) => header.is_data_raw(),
        Header::Raw { .. } | Header::Qcow(_) | Header::Vhd(_) => false,
    };
    match name {
        Some(name) if is_raw => bail!(
            "{} has a raw data file, which alone is to show the disk: {name} cannot be below it",
            path.display()
        ),
        Some(_) | None => Ok(()),
    }
}

/// Has the image name another one below it, for good.
async fn change(
    file: &Rc<dyn Storage>,
    path: &Path,
    name: Option<&str>,
    format: Option<Format>,
) -> anyhow::Result<()> {
    let failed = || format!("cannot write into {} what is below it", path.display());
    let mut header = qcow2::Header::read(file).await.with_context(failed)?;
    refuse_raw_data(path, name, &Header::Qcow2(Box::new(header.clone())))?;
    header.set_backing(name, format);
    header.write(file).await.with_context(failed)?;
    file.flush().await.with_context(failed)
}
