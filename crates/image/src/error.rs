//! Why an image cannot be opened, made, checked or changed, in words for people.

use std::fmt::Display;

use block::{Errno, Error};

/// Each message says what was found and where, what was expected, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The bytes are not those of a sound image of its format.
    #[error("{0}")]
    Invalid(String),
    /// A sound image that asks for something that is not to be had here.
    #[error("{0}")]
    Unsupported(String),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Refused(String),
    /// Its storage failed.
    #[error(transparent)]
    Io(#[from] Error),
}

impl ImageError {
    /// The errno for a guest whose request meets it.
    pub fn errno(&self) -> Errno {
        match self {
            ImageError::Invalid(_) => Errno::EIO,
            ImageError::Unsupported(_) => Errno::EOPNOTSUPP,
            ImageError::Refused(_) => Errno::EINVAL,
            ImageError::Io(error) => error.errno(),
        }
    }

    /// The same, with whose it is in front.
    #[must_use]
    pub fn within(self, whose: impl Display) -> ImageError {
        match self {
            ImageError::Invalid(text) => ImageError::Invalid(format!("{whose}: {text}")),
            ImageError::Unsupported(text) => ImageError::Unsupported(format!("{whose}: {text}")),
            ImageError::Refused(text) => ImageError::Refused(format!("{whose}: {text}")),
            ImageError::Io(error) => ImageError::Io(error.during(format_args!("open {whose}"))),
        }
    }

    /// The same, with what else is to be said of it.
    #[must_use]
    pub(crate) fn with(self, more: impl Display) -> ImageError {
        match self {
            ImageError::Invalid(text) => ImageError::Invalid(format!("{text}{more}")),
            ImageError::Unsupported(text) => ImageError::Unsupported(format!("{text}{more}")),
            ImageError::Refused(text) => ImageError::Refused(format!("{text}{more}")),
            ImageError::Io(error) => ImageError::Io(error),
        }
    }
}
