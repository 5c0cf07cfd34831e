//! Which image of a chain says what a byte is.

use std::any::Any;
use std::rc::Rc;

use block::{Result, Span};

use crate::{Extent, Image};

/// A run of the disk's bytes, and what the image that has the say makes of it.
pub(super) struct Located {
    /// Bytes.
    pub(super) len: u64,
    /// Which image: 0 is the top.
    pub(super) depth: usize,
    pub(super) what: What,
}

/// What an image makes of a run.
pub(super) enum What {
    /// It stores it, from this byte of its storage on. The pin keeps the place.
    Data { at: u64, pin: Option<Rc<dyn Any>> },
    /// It stores it compressed.
    Packed,
    /// It says that it is zero.
    Zero,
    /// It says nothing, and the image below it ends before these bytes: they are zero.
    Beyond,
    /// It says nothing, and there is none below it.
    Nothing,
}

/// What the first bytes of the span are. The span lies within the first of the images.
pub(super) async fn locate(images: &[Rc<dyn Image>], mut span: Span) -> Result<Located> {
    let mut depth = 0;
    while let Some(image) = images.get(depth) {
        let within = span.split_at(image.size()).0;
        if within.is_empty() {
            return Ok(Located { len: span.len(), depth: depth.saturating_sub(1), what: What::Beyond });
        }
        let extent = match image.mapped(within) {
            Some(extent) => extent,
            None => image.map(within).await?,
        };
        let (len, what) = match extent {
            Extent::Data { at, len, pin } => (len, What::Data { at, pin }),
            Extent::Packed { len, .. } => (len, What::Packed),
            Extent::Zero { len } => (len, What::Zero),
            Extent::Below { len } => {
                span = within.split_at(within.at() + len).0;
                depth += 1;
                continue;
            }
        };
        return Ok(Located { len, depth, what });
    }
    Ok(Located { len: span.len(), depth: depth.saturating_sub(1), what: What::Nothing })
}
