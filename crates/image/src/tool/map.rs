//! What a disk's bytes are made of, run by run, over a whole chain.

use block::{Result, Span};
use storage::Storage;

use super::layers::{What, locate};
use crate::Chain;

/// A run of a disk's bytes with one answer to all questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The disk's byte where it begins.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// The image that says so: 0 is the top.
    pub depth: usize,
    /// Whether some image says anything of it.
    pub is_present: bool,
    /// Whether it is known to read as zero.
    pub is_zero: bool,
    /// Whether there is a place that stores it.
    pub is_data: bool,
    /// Whether it is stored compressed.
    pub is_packed: bool,
    /// Byte of the storage that it begins at, where it has a plain place there.
    pub place: Option<u64>,
}

impl Mapped {
    /// Whether `next`, which begins where it ends, only continues it.
    fn goes_on_with(&self, next: &Mapped) -> bool {
        let place = match (self.place, next.place) {
            (Some(at), Some(next)) => at + self.len == next,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        let facts = |mapped: &Mapped| {
            let Mapped { depth, is_present, is_zero, is_data, is_packed, .. } = *mapped;
            (depth, is_present, is_zero, is_data, is_packed)
        };
        place && facts(self) == facts(next)
    }
}

/// Tells all runs of these bytes of a disk, in order, until `tell` fails. Of the images with these depths (`flat`), which
/// are plain bytes in a file, the file says where its holes are.
///
/// # Errors
/// What of the images could not be read, or what `tell` gave.
pub async fn map<E: From<block::Error>>(
    chain: &Chain,
    span: Span,
    flat: &[usize],
    mut tell: impl FnMut(Mapped) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut images = vec![chain.top().clone()];
    images.extend_from_slice(chain.below());
    let mut run: Option<Mapped> = None;
    let mut rest = span.split_at(chain.size()).0;
    while !rest.is_empty() {
        let found = locate(&images, rest).await?;
        let (part, others) = rest.split_at(rest.at() + found.len);
        let parts = match found.what {
            What::Data { at, pin } if flat.contains(&found.depth) => {
                let parts = holes(&images[found.depth], part, found.depth, at).await;
                drop(pin);
                parts?
            }
            what @ (What::Data { .. } | What::Packed | What::Zero | What::Beyond | What::Nothing) => {
                vec![describe(part, found.depth, &what)]
            }
        };
        // What a file tells of its holes may end early.
        let told: u64 = parts.iter().map(|part| part.len).sum();
        rest = if told < part.len() { rest.split_at(rest.at() + told).1 } else { others };
        for next in parts {
            match &mut run {
                Some(run) if run.goes_on_with(&next) => run.len += next.len,
                Some(_) | None => {
                    if let Some(run) = run.replace(next) {
                        tell(run)?;
                    }
                }
            }
        }
    }
    run.map_or(Ok(()), tell)
}

fn describe(part: Span, depth: usize, what: &What) -> Mapped {
    let mut mapped = Mapped {
        at: part.at(),
        len: part.len(),
        depth,
        is_present: true,
        is_zero: false,
        is_data: false,
        is_packed: false,
        place: None,
    };
    match what {
        What::Data { at, .. } => (mapped.is_data, mapped.place) = (true, Some(*at)),
        What::Packed => (mapped.is_data, mapped.is_packed) = (true, true),
        What::Zero => mapped.is_zero = true,
        What::Beyond | What::Nothing => (mapped.is_present, mapped.is_zero) = (false, true),
    }
    mapped
}

/// The same for bytes that a file stores as they are, from its byte `at` on.
async fn holes(
    image: &std::rc::Rc<dyn crate::Image>,
    part: Span,
    depth: usize,
    at: u64,
) -> Result<Vec<Mapped>> {
    let stored = Span::new(at, part.len()).expect("an image maps to places that its storage has");
    let mut mapped = Vec::new();
    let mut done = 0;
    for run in image.storage().extents(stored).await? {
        mapped.push(Mapped {
            at: part.at() + done,
            len: run.len,
            depth,
            is_present: true,
            is_zero: run.zero,
            is_data: run.allocated,
            is_packed: false,
            place: Some(at + done),
        });
        done += run.len;
    }
    Ok(mapped)
}
