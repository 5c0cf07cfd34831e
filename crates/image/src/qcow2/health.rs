//! Whether the image may be written: what makes no sense in its tables is met once, said, marked, and never written over.

use std::cell::{Cell, RefCell};

use block::{Errno, Error, Result};

use super::{Header, incompatible};
use crate::metadata::Metadata;

/// Where the header has the incompatible features.
const INCOMPATIBLE_AT: u64 = 72;

/// The health of one image.
pub(super) struct Health {
    metadata: Metadata,
    writable: bool,
    /// Version 2 has no place for marks.
    has_marks: bool,
    incompatible: Cell<u64>,
    /// What was found first.
    broken: RefCell<Option<Error>>,
}

impl Health {
    /// That of an image that was opened with this header.
    pub(super) fn new(metadata: &Metadata, header: &Header, writable: bool) -> Health {
        Health {
            metadata: metadata.clone(),
            writable,
            has_marks: header.version > 2,
            incompatible: Cell::new(header.incompatible),
            broken: RefCell::new(None),
        }
    }

    /// Whether it was opened for writing and nothing is wrong so far.
    pub(super) fn is_writable(&self) -> bool {
        self.writable && self.broken.borrow().is_none()
    }

    /// Fails unless it may be written.
    pub(super) fn check(&self) -> Result<()> {
        if !self.writable {
            return Err(Error::new(Errno::EROFS, "the image was opened for reading"));
        }
        match &*self.broken.borrow() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Marks the image as corrupt, for good and durably, if it is writable. Gives the error for whoever met this.
    pub(super) async fn corrupt(&self, what: impl Into<String>) -> Error {
        let what = what.into();
        let error = Error::new(Errno::EIO, format!("this qcow2 image is corrupt: {what}"));
        if !self.is_writable() {
            return error;
        }
        *self.broken.borrow_mut() = Some(Error::new(
            Errno::EIO,
            format!("this qcow2 image is not written any more, for it is corrupt: {what}"),
        ));
        tracing::error!(
            "this qcow2 image is corrupt and not written any more: {what}; tapdisk check --repair may help"
        );
        if self.has_marks {
            let marks = self.incompatible.get() | incompatible::CORRUPT;
            self.incompatible.set(marks);
            let written = async {
                self.metadata.write_through(INCOMPATIBLE_AT, &marks.to_be_bytes()).await?;
                self.metadata.sync().await
            };
            if let Err(failed) = written.await {
                return error.during(format!("it cannot even be marked ({failed})"));
            }
        }
        error
    }
}
