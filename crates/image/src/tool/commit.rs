//! Bringing what an image holds into one below it.

use std::rc::Rc;

use block::Span;
use runtime::Handle;
use storage::{Storage, Zeroing};

use super::layers::{What, locate};
use super::pump::Pump;
use super::{PIECE, ToolError, Watch, next_piece};
use crate::{Chain, Image};

/// Copies what the first `layers` images of a chain hold into the next one below, and makes that durable. `base` is the chain
/// from that one on down, writable, of the very images that `chain` has there.
///
/// The images above are not changed: whenever this ends, `chain` shows what it showed before.
///
/// # Errors
/// `base` shows some of it. Doing it again completes it.
pub async fn commit(
    handle: &Handle,
    chain: &Rc<Chain>,
    layers: usize,
    base: &Rc<dyn Storage>,
    watch: &Rc<dyn Watch>,
) -> Result<(), ToolError> {
    if base.size() < chain.size() {
        base.resize(chain.size()).await.map_err(ToolError::Target)?;
    }
    let mut images = vec![chain.top().clone()];
    images.extend(chain.below().iter().take(layers.saturating_sub(1)).cloned());
    let pump = Pump::new(handle, watch);
    let started = start_all(&pump, chain, &images, base).await;
    pump.end(started).await?;
    base.flush().await.map_err(ToolError::Target)
}

async fn start_all(
    pump: &Pump,
    chain: &Rc<Chain>,
    images: &[Rc<dyn Image>],
    base: &Rc<dyn Storage>,
) -> Result<(), ToolError> {
    let mut rest = Span::new(0, chain.size()).expect("an image is smaller than 8 EiB");
    while !rest.is_empty() {
        let found = locate(images, rest).await.map_err(ToolError::Source)?;
        let (run, others) = rest.split_at(rest.at() + found.len);
        rest = others;
        match found.what {
            What::Data { .. } | What::Packed => start_copies(pump, chain, base, run).await?,
            // What lies beyond an image in between is zero, whatever the base has there.
            What::Zero | What::Beyond => {
                let base = base.clone();
                let how = Zeroing { unmap: true, fast: false };
                let zeroing = async move { base.zero(run, how).await.map_err(ToolError::Target) };
                pump.start(run.len(), zeroing).await?;
            }
            What::Nothing => pump.skip(run.len())?,
        }
    }
    Ok(())
}

async fn start_copies(
    pump: &Pump,
    chain: &Rc<Chain>,
    base: &Rc<dyn Storage>,
    run: Span,
) -> Result<(), ToolError> {
    let mut rest = run;
    while !rest.is_empty() {
        let (piece, others) = next_piece(rest, PIECE);
        let (handle, chain, base) = (pump.handle().clone(), chain.clone(), base.clone());
        pump.start(piece.len(), async move {
            let buf = handle.pool().take(piece.len() as usize);
            chain.read(piece.at(), buf.clone()).await.map_err(ToolError::Source)?;
            base.write(piece.at(), buf).await.map_err(ToolError::Target)
        })
        .await?;
        rest = others;
    }
    Ok(())
}
