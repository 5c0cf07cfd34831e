//! `tapdisk rebase`: puts an image over another one than before.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, bail};
use image::tool::{self, Watch};
use image::{Format, Header, qcow2};
use runtime::Handle;
use storage::Storage;

use super::disk::{Access, Asked, from_image};
use super::progress::Progress;
use crate::cli::tool::Rebase;

pub(super) async fn run(handle: &Handle, arguments: &Rebase) -> anyhow::Result<()> {
    let (path, places) = (&arguments.file, &arguments.places);
    let name = Some(arguments.backing.as_str()).filter(|name| !name.is_empty());
    if let (None, Some(format)) = (name, arguments.backing_format) {
        bail!("there is a format of an image below ({format}), but no such image: name it with --backing");
    }
    let file = if arguments.unchecked {
        let file =
            storage::file::open(path, &Asked::new(path, arguments.format, Access::Write, places).file()?)?;
        let file: Rc<dyn Storage> = Rc::new(storage::File::new(handle, file));
        change(&file, path, name, arguments.backing_format).await?;
        file
    } else {
        let disk = Asked::new(path, arguments.format, Access::Write, places)
            .open(handle)
            .await
            .with_context(|| {
                format!(
                    "{} cannot be opened over the image that is below it now (`-u` does not look at it)",
                    path.display()
                )
            })?;
        let header = &disk.top().header;
        if !matches!(header, Header::Qcow2(_)) {
            bail!(
                "{} is a {} image: only those of qcow2 can be put over another one",
                path.display(),
                header.format()
            );
        }
        let new = match name {
            Some(name) => {
                let new = from_image(path, name);
                let asked = Asked::new(&new, arguments.backing_format, Access::Read, places);
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
    let text = match name {
        Some(name) => format!("{} is over {name} now\n", path.display()),
        None => format!("{} stands alone now\n", path.display()),
    };
    crate::print(text.as_bytes())
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
    header.set_backing(name, format);
    header.write(file).await.with_context(failed)?;
    file.flush().await.with_context(failed)
}
