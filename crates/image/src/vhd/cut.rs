//! What a file that was cut off has lost of its last block. That may end behind the file, if it was given a place and nothing
//! else, as blktap does, or none of its sectors there was ever written. Else they are lost, and must not become zeroes.

use std::rc::Rc;

use storage::Storage;

use super::SECTOR;
use super::blocks::ALIGN;
use super::header::{Sparse, read};
use crate::ImageError;

/// How far behind the last place a block may begin that was given a place and nothing else, in bytes: blktap aligns the
/// data of blocks to pages.
pub(super) const SLACK: u64 = ALIGN;

/// The bitmap of a block.
pub(super) struct Cut {
    /// As far as the file has it, without the bits of sectors that the file has not.
    pub(super) bitmap: Vec<u8>,
    /// How many of those bits there were.
    pub(super) lost: u64,
}

/// Looks at the block that begins at byte `at`, in a file whose blocks end at `end`.
///
/// # Errors
/// Those of reading.
pub(super) async fn cut(
    file: &Rc<dyn Storage>,
    sparse: &Sparse,
    at: u64,
    end: u64,
) -> Result<Cut, ImageError> {
    let data = at + sparse.bitmap();
    let mut cut = Cut { bitmap: Vec::new(), lost: 0 };
    if data + sparse.block() <= end || at >= file.size() {
        return Ok(cut);
    }
    let there = end.saturating_sub(data) / SECTOR;
    let sectors = sparse.block() / SECTOR;
    cut.bitmap = read(file, at, sectors.div_ceil(8).min(file.size() - at)).await?;
    for sector in there..sectors {
        let (byte, bit) = ((sector / 8) as usize, 0x80u8 >> (sector % 8));
        if let Some(byte) = cut.bitmap.get_mut(byte).filter(|byte| **byte & bit != 0) {
            *byte &= !bit;
            cut.lost += 1;
        }
    }
    Ok(cut)
}

/// Refuses to write an image whose last block, at byte `at`, has lost something: what follows it would be taken for that.
///
/// # Errors
/// It has; those of reading.
pub(super) async fn refuse(
    file: &Rc<dyn Storage>,
    sparse: &Sparse,
    at: u64,
    end: u64,
) -> Result<(), ImageError> {
    if at > end + SLACK {
        return Err(ImageError::Invalid(format!(
            "a block is at {at}, but the file's blocks end at {end}: the file was cut off. A check that repairs all drops \
             what is lost"
        )));
    }
    let Cut { lost, .. } = cut(file, sparse, at, end).await?;
    if lost > 0 {
        return Err(ImageError::Invalid(format!(
            "of the block at {at}, {lost} sectors that were written are not in the file, whose blocks end at {end}: it was \
             cut off. The image can be opened to be read, and a check that repairs all makes these sectors zero"
        )));
    }
    Ok(())
}
