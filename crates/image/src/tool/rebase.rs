//! Putting an image over another one than before, without a change of what it shows.

use std::rc::Rc;

use block::Span;
use runtime::Handle;
use storage::{Storage, Zeroing};

use super::layers::{What, locate};
use super::pump::Pump;
use super::{GRAIN_MIN, PIECE, ToolError, Watch, is_zero, next_piece};
use crate::Chain;

/// Copies into the top of `chain`, which is over the old images, what it does not hold itself and what differs in `new`
/// (nothing: zero), and makes that durable. Afterwards its header may name the new one.
///
/// # Errors
/// The top holds some of it, and the disk is as it was.
pub async fn rebase(
    handle: &Handle,
    chain: &Rc<Chain>,
    new: Option<&Rc<dyn Storage>>,
    watch: &Rc<dyn Watch>,
) -> Result<(), ToolError> {
    let pump = Pump::new(handle, watch);
    let started = start_all(&pump, chain, new).await;
    pump.end(started).await?;
    chain.flush().await.map_err(ToolError::Target)
}

async fn start_all(pump: &Pump, chain: &Rc<Chain>, new: Option<&Rc<dyn Storage>>) -> Result<(), ToolError> {
    let top = [chain.top().clone()];
    let mut rest = Span::new(0, chain.size()).expect("an image is smaller than 8 EiB");
    while !rest.is_empty() {
        let found = locate(&top, rest).await.map_err(ToolError::Source)?;
        let (run, others) = rest.split_at(rest.at() + found.len);
        rest = others;
        match found.what {
            What::Data { .. } | What::Packed | What::Zero => pump.skip(run.len())?,
            What::Beyond | What::Nothing => start_compares(pump, chain, new, run).await?,
        }
    }
    Ok(())
}

async fn start_compares(
    pump: &Pump,
    chain: &Rc<Chain>,
    new: Option<&Rc<dyn Storage>>,
    run: Span,
) -> Result<(), ToolError> {
    let mut rest = run;
    while !rest.is_empty() {
        // Most of a thin disk is zero on both sides, which needs no reading.
        let (old, zero) = first_run(chain.as_ref(), rest).await.map_err(ToolError::Source)?;
        let both = match new {
            Some(new) if zero => {
                let (new, new_zero) = first_run(new.as_ref(), old).await.map_err(ToolError::Source)?;
                if new_zero { Some(new) } else { None }
            }
            Some(_) => None,
            None if zero => Some(old),
            None => None,
        };
        if let Some(both) = both {
            pump.skip(both.len())?;
            rest = rest.split_at(both.end()).1;
            continue;
        }
        let (piece, others) = next_piece(rest, PIECE);
        let (handle, chain, new) = (pump.handle().clone(), chain.clone(), new.cloned());
        pump.start(piece.len(), async move { compare(&handle, &chain, new, piece).await }).await?;
        rest = others;
    }
    Ok(())
}

/// The first run of the span, and whether it is zero; all of what is beyond the end is.
async fn first_run(storage: &dyn Storage, span: Span) -> block::Result<(Span, bool)> {
    let (within, beyond) = span.split_at(storage.size());
    if within.is_empty() {
        return Ok((beyond, true));
    }
    let runs = storage.extents(within).await?;
    let (zero, mut len) = (runs.first().is_some_and(|run| run.zero), 0);
    for run in runs.iter().take_while(|run| run.zero == zero) {
        len += run.len;
    }
    Ok((span.split_at(span.at() + len).0, zero))
}

/// Writes to the top what is not the same in both.
async fn compare(
    handle: &Handle,
    chain: &Rc<Chain>,
    new: Option<Rc<dyn Storage>>,
    piece: Span,
) -> Result<(), ToolError> {
    let take = || handle.pool().take(piece.len() as usize);
    let (shown, other) = (take(), take());
    chain.read(piece.at(), shown.clone()).await.map_err(ToolError::Source)?;
    let size = new.as_ref().map_or(0, |new| new.size());
    let (within, beyond) = piece.split_at(size);
    other.part(piece.at(), beyond).fill(0);
    if let Some(new) = new
        && !within.is_empty()
    {
        new.read(within.at(), other.part(piece.at(), within)).await.map_err(ToolError::Source)?;
    }
    let (mut old_bytes, mut new_bytes) = ([0; GRAIN_MIN as usize], [0; GRAIN_MIN as usize]);
    let mut differing: Option<Span> = None;
    let mut rest = piece;
    while !rest.is_empty() {
        let (grain, others) = next_piece(rest, GRAIN_MIN);
        rest = others;
        let len = grain.len() as usize;
        shown.part(piece.at(), grain).get(0, &mut old_bytes[..len]);
        other.part(piece.at(), grain).get(0, &mut new_bytes[..len]);
        let differs = old_bytes[..len] != new_bytes[..len];
        differing = match (differing, differs) {
            (Some(span), true) => {
                Some(Span::new(span.at(), span.len() + grain.len()).expect("it is within the piece"))
            }
            (None, true) => Some(grain),
            (None, false) => None,
            (Some(span), false) => {
                keep(chain, span, &shown, piece).await?;
                None
            }
        };
    }
    match differing {
        Some(span) => keep(chain, span, &shown, piece).await,
        None => Ok(()),
    }
}

/// Has the top itself hold these bytes of the piece.
async fn keep(chain: &Rc<Chain>, span: Span, shown: &block::Buf, piece: Span) -> Result<(), ToolError> {
    let bytes = shown.part(piece.at(), span);
    if is_zero(&bytes) {
        let how = Zeroing { unmap: true, fast: false };
        return chain.zero(span, how).await.map_err(ToolError::Target);
    }
    chain.write(span.at(), bytes).await.map_err(ToolError::Target)
}
