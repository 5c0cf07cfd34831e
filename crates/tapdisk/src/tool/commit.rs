//! `tapdisk commit`: copies what an image holds into the one below it.

use std::rc::Rc;

use anyhow::{Context, bail};
use image::Chain;
use image::tool::{self, Watch};
use runtime::Handle;
use storage::Storage;

use super::disk::{Access, Asked, refuse_snapshots};
use super::progress::Progress;
use super::resize;
use crate::cli::tool::Commit;

pub(super) async fn run(handle: &Handle, arguments: &Commit) -> anyhow::Result<()> {
    let (path, places) = (&arguments.file, &arguments.places);
    // Which files: all are let go of again.
    let (below, below_format, is_shorter) = {
        let layers = Asked::new(path, arguments.format, Access::Read, places).walk(handle).await?;
        let (Some(top), Some(below)) = (layers.first(), layers.get(1)) else {
            bail!("{} has no image below it: there is nowhere to copy it to", path.display());
        };
        refuse_snapshots(path, &top.header)?;
        (below.file.path.clone(), below.header.format(), below.header.size() < top.header.size())
    };
    // They are free once the ring has had a turn.
    handle.turn().await;
    let top = Asked::new(path, arguments.format, Access::ReadAlone, places).open(handle).await?;
    let asked = Asked::new(&below, Some(below_format), Access::Write, places);
    if is_shorter {
        let size = top.chain.size();
        let resized = resize::resize(handle, asked, false, |old| Some(old.max(size))).await;
        resized.with_context(|| format!("{} has to be as large as {}", below.display(), path.display()))?;
        handle.turn().await;
    }
    let base = asked.open(handle).await?;
    let mut images = vec![base.chain.top().clone()];
    images.extend_from_slice(base.chain.below());
    let chain = Rc::new(Chain::over(handle, top.chain.top().clone(), images));
    let into: Rc<dyn Storage> = base.chain.clone();
    let watch: Rc<dyn Watch> = Rc::new(Progress::new(chain.size(), arguments.progress)?);
    let done = tool::commit(handle, &chain, 1, &into, &watch).await;
    drop(watch);
    // Also where it was stopped: what was copied so far is right, and the image below is left in order.
    let closed = base.close().await;
    done.with_context(|| {
        format!("{} was not copied into {}, but for a part", path.display(), below.display())
    })?;
    closed?;
    let text = format!("Copied what {} holds into {}\n", path.display(), below.display());
    crate::print(text.as_bytes())
}
