//! Copying a disk into a new image: what is zero is left out, the rest moves in many pieces side by side.

use std::rc::Rc;

use block::{Error, Run, Span};
use runtime::Handle;
use storage::{Storage, Zeroing};

use super::pump::Pump;
use super::{GRAIN_MIN, PIECE, ToolError, Watch, next_piece, zero_runs};

/// How a disk is copied.
#[derive(Clone, Copy, Debug)]
pub struct Convert {
    /// Bytes, a power of two: what the target allocates as one. Zeroes within one are written rather than left out.
    pub unit: u64,
    /// Bytes, a power of two: of so many of the target only one first write is under way at a time.
    pub alone: u64,
    /// Whether the target reads as zero where it was not written.
    pub blank: bool,
}

/// The largest unit of which zeroes are looked for as a whole; in larger ones that would waste too much.
const GRAIN_MAX: u64 = 64 << 10;
/// Pieces need not be larger than this for the sake of first writes.
const ALONE_MAX: u64 = 2 << 20;
/// Runs of zeroes are written at most so many bytes at a time, so that they can be stopped.
const ZEROES: u64 = 256 << 20;

const UNMAP: Zeroing = Zeroing { unmap: true, fast: false };

/// Copies all of `source` to the first bytes of `target`, which has at least as many. Nothing of it is durable before the
/// target is flushed.
///
/// # Errors
/// The target holds some of it.
pub async fn convert(
    handle: &Handle,
    source: &Rc<dyn Storage>,
    target: &Rc<dyn Storage>,
    how: Convert,
    watch: &Rc<dyn Watch>,
) -> Result<(), ToolError> {
    let pump = Pump::new(handle, watch);
    let started = start_all(&pump, source, target, how).await;
    pump.end(started).await
}

async fn start_all(
    pump: &Pump,
    source: &Rc<dyn Storage>,
    target: &Rc<dyn Storage>,
    how: Convert,
) -> Result<(), ToolError> {
    let too_large = || ToolError::Source(Error::new(block::Errno::EFBIG, "copy a disk of 8 EiB or more"));
    let mut rest = Span::new(0, source.size()).ok_or_else(too_large)?;
    while !rest.is_empty() {
        let runs = source.extents(rest).await.map_err(ToolError::Source)?;
        for Run { len, zero, .. } in runs {
            let (run, others) = rest.split_at(rest.at() + len);
            rest = others;
            if zero {
                start_zeroes(pump, target, run, how).await?;
            } else {
                start_copies(pump, source, target, run, how).await?;
            }
        }
    }
    Ok(())
}

async fn start_zeroes(
    pump: &Pump,
    target: &Rc<dyn Storage>,
    run: Span,
    how: Convert,
) -> Result<(), ToolError> {
    if how.blank {
        return pump.skip(run.len());
    }
    let mut rest = run;
    while !rest.is_empty() {
        let (piece, others) = next_piece(rest, ZEROES);
        let target = target.clone();
        pump.start(piece.len(), async move { target.zero(piece, UNMAP).await.map_err(ToolError::Target) })
            .await?;
        rest = others;
    }
    Ok(())
}

async fn start_copies(
    pump: &Pump,
    source: &Rc<dyn Storage>,
    target: &Rc<dyn Storage>,
    run: Span,
    how: Convert,
) -> Result<(), ToolError> {
    let mut rest = run;
    while !rest.is_empty() {
        let (piece, others) = next_piece(rest, PIECE.max(how.unit).max(how.alone.min(ALONE_MAX)));
        let (handle, source, target) = (pump.handle().clone(), source.clone(), target.clone());
        pump.start(piece.len(), async move { copy(&handle, &source, &target, piece, how).await }).await?;
        rest = others;
    }
    Ok(())
}

async fn copy(
    handle: &Handle,
    source: &Rc<dyn Storage>,
    target: &Rc<dyn Storage>,
    piece: Span,
    how: Convert,
) -> Result<(), ToolError> {
    let buf = handle.pool().take(piece.len() as usize);
    source.read(piece.at(), buf.clone()).await.map_err(ToolError::Source)?;
    for (run, zero) in zero_runs(&buf, piece.at(), how.unit.clamp(GRAIN_MIN, GRAIN_MAX)) {
        let done = match (zero, how.blank) {
            (true, true) => Ok(()),
            (true, false) => target.zero(run, UNMAP).await,
            (false, true | false) => target.write(run.at(), buf.part(piece.at(), run)).await,
        };
        done.map_err(ToolError::Target)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use block::{Buf, Errno, Pool};
    use runtime::{RingFlags, Runtime, Uring};
    use storage::conformance::Random;
    use storage::{Ram, filter};

    use super::*;
    use crate::tool::Unwatched;

    const SIZE: u64 = (5 << 20) + 1234;
    const BLANK: Convert = Convert { unit: 4096, alone: 4096, blank: true };

    fn runtime() -> Runtime {
        let pool = Pool::new(1 << 20);
        let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
        Runtime::new(Box::new(uring), pool)
    }

    /// A disk with runs of data, of written zeroes and of nothing, and what is in it.
    async fn disk(seed: u64) -> (Rc<dyn Storage>, Vec<u8>) {
        let ram = Ram::new(SIZE);
        let mut model = vec![0; SIZE as usize];
        let mut random = Random(seed);
        for step in 0..40_u64 {
            let span = random.span(SIZE, 200_000);
            let byte = if step % 4 == 0 { 0 } else { step as u8 };
            model[span.at() as usize..span.end() as usize].fill(byte);
            ram.write(span.at(), Buf::from_bytes(&vec![byte; span.len() as usize])).await.unwrap();
        }
        (Rc::new(ram), model)
    }

    async fn content(storage: &Rc<dyn Storage>) -> Vec<u8> {
        let buf = Buf::zeroed(storage.size() as usize);
        storage.read(0, buf.clone()).await.unwrap();
        buf.to_vec()
    }

    fn unwatched() -> Rc<dyn Watch> {
        Rc::new(Unwatched)
    }

    #[test]
    fn a_copy_has_all_bytes_also_over_old_ones() {
        let runtime = runtime();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            for (seed, blank) in [(1, true), (2, false), (3, true), (4, false)] {
                let (source, model) = disk(seed).await;
                let target: Rc<dyn Storage> = Rc::new(Ram::new(SIZE + 4096));
                if !blank {
                    target.write(0, Buf::from_bytes(&[0xdd; SIZE as usize])).await.unwrap();
                }
                let how = Convert { unit: 64 << 10, alone: 2 << 20, blank };
                convert(&handle, &source, &target, how, &unwatched()).await.unwrap();
                let found = content(&target).await;
                assert!(found[..SIZE as usize] == model, "seed {seed}");
                assert!(found[SIZE as usize..].iter().all(|byte| *byte == 0));
            }
        });
    }

    #[test]
    fn written_zeroes_take_no_space_in_the_copy() {
        let runtime = runtime();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            let source: Rc<dyn Storage> = Rc::new(Ram::new(4 << 20));
            source.write(0, Buf::zeroed(4 << 20)).await.unwrap();
            source.write(1 << 20, Buf::from_bytes(&[1])).await.unwrap();
            let target: Rc<dyn Storage> = Rc::new(Ram::new(4 << 20));
            convert(&handle, &source, &target, BLANK, &unwatched()).await.unwrap();
            let whole = Span::new(0, 4 << 20).unwrap();
            let runs = target.extents(whole).await.unwrap();
            // Memory is taken in pieces of 64 KiB.
            let allocated: u64 = runs.iter().filter(|run| run.allocated).map(|run| run.len).sum();
            assert_eq!(allocated, 64 << 10);
        });
    }

    #[test]
    fn an_error_of_any_piece_is_the_end_and_says_of_which_side() {
        let runtime = runtime();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            let (source, _) = disk(7).await;
            let target: Rc<dyn Storage> = Rc::new(Ram::new(SIZE));
            for nth in 1..=3 {
                let rule = format!("read:EIO:nth={nth}").parse().unwrap();
                let failing = filter::inject(&handle, source.clone(), vec![rule]);
                match convert(&handle, &failing, &target, BLANK, &unwatched()).await {
                    Err(ToolError::Source(error)) => assert_eq!(error.errno(), Errno::EIO),
                    other => panic!("{other:?}"),
                }
                let rule = format!("write:ENOSPC:nth={nth}").parse().unwrap();
                let failing = filter::inject(&handle, target.clone(), vec![rule]);
                match convert(&handle, &source, &failing, BLANK, &unwatched()).await {
                    Err(ToolError::Target(error)) => assert_eq!(error.errno(), Errno::ENOSPC),
                    other => panic!("{other:?}"),
                }
            }
        });
    }

    #[test]
    fn who_watches_sees_every_byte_and_can_stop_it() {
        struct Patience(Cell<u64>, u64);

        impl Watch for Patience {
            fn advance(&self, bytes: u64) {
                self.0.set(self.0.get() + bytes);
            }

            fn is_stopped(&self) -> bool {
                self.0.get() >= self.1
            }
        }

        let runtime = runtime();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            let (source, _) = disk(8).await;
            let target: Rc<dyn Storage> = Rc::new(Ram::new(SIZE));
            let patient = Rc::new(Patience(Cell::new(0), u64::MAX));
            let watch: Rc<dyn Watch> = patient.clone();
            convert(&handle, &source, &target, BLANK, &watch).await.unwrap();
            assert_eq!(patient.0.get(), SIZE);
            let watch: Rc<dyn Watch> = Rc::new(Patience(Cell::new(0), 1));
            assert_eq!(convert(&handle, &source, &target, BLANK, &watch).await, Err(ToolError::Stopped));
        });
    }
}
