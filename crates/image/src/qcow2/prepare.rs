//! What is done to an image before it is written for the first time.

use std::rc::Rc;

use storage::Storage;

use crate::{ImageError, Repair};

use super::bitmap::distrust;
use super::check::check;
use super::header::{Header, autoclear};

/// Makes an image ready for writing: repairs it if its counts may be wrong, says of bitmaps that they are not kept up any more,
/// and clears the marks of features that only others know. All of it is durable afterwards, and `header` is what is in the file.
///
/// # Errors
/// The image is marked as corrupt or cannot be repaired, or the storage failed.
pub async fn prepare(file: &Rc<dyn Storage>, header: &mut Header) -> Result<(), ImageError> {
    if header.is_corrupt() {
        return Err(ImageError::Invalid(
            "this qcow2 image is marked as corrupt, so it is not written; tapdisk check --repair all may put it right"
                .to_owned(),
        ));
    }
    if header.is_dirty() {
        let report = check(file, Repair::All).await?;
        if !report.is_safe() {
            return Err(ImageError::Invalid(format!(
                "this qcow2 image was not closed in order, and {} faults in it cannot be repaired; tapdisk check shows them",
                report.corruptions + report.check_errors
            )));
        }
        *header = Header::read(file).await?;
    }
    let mut left = autoclear::KNOWN;
    if header.extensions.bitmaps.is_none() {
        left &= !autoclear::BITMAPS;
    }
    match distrust(file, header, false).await {
        Ok(true) => file.flush().await?,
        Ok(false) => {}
        Err(ImageError::Io(error)) => return Err(error.into()),
        // Bitmaps in which nothing can be marked are given up as a whole.
        Err(ImageError::Invalid(_) | ImageError::Unsupported(_) | ImageError::Refused(_)) => {
            left &= !autoclear::BITMAPS
        }
    }
    if header.autoclear & !left != 0 {
        header.autoclear &= left;
        header.write_fields(file).await?;
        file.flush().await?;
        // What is said of bitmaps is kept from now on, and believed by nobody.
        *header = Header::read(file).await?;
    }
    Ok(())
}
