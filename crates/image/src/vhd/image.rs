//! An open image.

use std::rc::Rc;

use block::{Errno, Error, Limits, Result, Span};
use runtime::Handle;
use storage::{Io, Storage, Zeroing};

use super::blocks::Blocks;
use super::header::Header;
use super::{SECTOR, resize};
use crate::metadata::{self, Metadata};
use crate::{Extent, Image, ImageError, Placement, Repair, Settings, Zeroed};

/// An image of any kind.
pub struct Vhd {
    storage: Rc<dyn Storage>,
    size: std::cell::Cell<u64>,
    /// None in a fixed image, whose disk is the first bytes of its file.
    blocks: Option<Blocks>,
    writable: bool,
    lasting: bool,
}

impl Vhd {
    /// Opens an image, of which the header was read before.
    ///
    /// # Errors
    /// An image that makes no sense, and those of reading it.
    pub async fn open(
        handle: &Handle,
        header: Header,
        file: Rc<dyn Storage>,
        settings: Settings,
    ) -> std::result::Result<Vhd, ImageError> {
        if header.is_disabled() {
            return Err(ImageError::Refused(
                "blktap's tools have disabled this image (the footer begins with `v_poison`), so that nobody uses it while \
                 or after they change it. If they are done and it is whole, let them enable it again"
                    .to_owned(),
            ));
        }
        header.notes().iter().for_each(|note| tracing::warn!("an odd VHD: {note}"));
        let Settings { writable, cache, ledger, lasting } = settings;
        let blocks = match &header.sparse {
            None => None,
            Some(sparse) => {
                let settings = metadata::Settings {
                    block: SECTOR as u32,
                    budget: cache,
                    stages: super::blocks::STAGE + 1,
                    lasting,
                };
                let metadata = Metadata::new(handle, file.clone(), Vec::new(), settings, ledger);
                metadata
                    .take_over(async |file| Box::pin(super::check(&file, Repair::No)).await, |_, noted| noted)
                    .await?;
                Some(Blocks::open(metadata, &header, sparse, writable).await?)
            }
        };
        Ok(Vhd { storage: file, size: header.size().into(), blocks, writable, lasting })
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            Ok(())
        } else {
            Err(Error::new(Errno::EROFS, "change an image that is only read"))
        }
    }

    async fn resize_to(&self, bytes: u64) -> Result<()> {
        self.check_writable()?;
        let told = |error: ImageError| {
            let errno = error.errno();
            match error {
                ImageError::Io(error) => error,
                ImageError::Invalid(why) | ImageError::Unsupported(why) | ImageError::Refused(why) => {
                    Error::new(errno, format!("resize the image: {why}"))
                }
            }
        };
        let _permit = match &self.blocks {
            Some(blocks) => Some(blocks.growing.take().await),
            None => None,
        };
        if let Some(blocks) = &self.blocks {
            blocks.metadata.flush().await?;
            if self.lasting && !resize::has_room(&self.storage, bytes).await.map_err(told)? {
                let doing =
                    "make the table of the image larger while it is in use: resize it with `tapdisk resize`";
                return Err(Error::new(Errno::EOPNOTSUPP, doing));
            }
        }
        resize::resize(&self.storage, bytes).await.map_err(told)?;
        let header = Header::read(&self.storage).await.map_err(told)?;
        if let (Some(blocks), Some(sparse)) = (&self.blocks, &header.sparse) {
            let all = Span::new(0, self.storage.size()).expect("a file");
            if !self.lasting {
                // Nobody else is at it, and what was changed is written; tables may have moved.
                blocks.metadata.forget(all);
            }
            blocks.adopt(&header, sparse).await.map_err(told)?;
        }
        self.size.set(header.size());
        Ok(())
    }

    /// Leaves no space at the end that nothing uses.
    async fn trim(&self, blocks: &Blocks) -> Result<()> {
        let next = blocks.give_back();
        let is_tidy = blocks.limit.get() == next && self.storage.size() == next + SECTOR;
        // Space at the end that was there before is somebody's wish.
        if is_tidy || !blocks.has_grown.get() {
            return Ok(());
        }
        // The footer goes with the end; its copy at 0 is there until the new one is. A block device stays as it is.
        let before = self.storage.size();
        self.storage.resize(next + SECTOR).await?;
        if self.storage.size() != before {
            let footer = blocks.footer.borrow().bytes();
            blocks.metadata.write_through(next, &footer).await?;
            blocks.limit.set(next);
        }
        blocks.metadata.sync().await
    }
}

impl Image for Vhd {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn storage(&self) -> &Rc<dyn Storage> {
        &self.storage
    }

    fn limits(&self) -> Limits {
        let limits = self.storage.limits();
        Limits { read_only: limits.read_only || !self.writable, ..limits }
    }

    fn mapped(&self, span: Span) -> Option<Extent> {
        match &self.blocks {
            Some(blocks) => blocks.look(span),
            None => Some(Extent::Data { at: span.at(), len: span.len(), pin: None }),
        }
    }

    fn map(&self, span: Span) -> Io<'_, Extent> {
        Box::pin(async move {
            match &self.blocks {
                Some(blocks) => blocks.map(span).await,
                None => Ok(Extent::Data { at: span.at(), len: span.len(), pin: None }),
            }
        })
    }

    fn placed(&self, span: Span) -> Option<Placement> {
        match &self.blocks {
            _ if !self.writable => None,
            Some(blocks) => blocks.shown(span),
            None => Some(Placement::shown(span.at(), span.len(), None)),
        }
    }

    fn place(&self, span: Span) -> Io<'_, Placement> {
        Box::pin(async move {
            self.check_writable()?;
            match &self.blocks {
                Some(blocks) => blocks.place(span).await,
                None => Ok(Placement::shown(span.at(), span.len(), None)),
            }
        })
    }

    fn commit(&self, placement: Placement) -> Io<'_> {
        Box::pin(async move {
            match &self.blocks {
                Some(blocks) => blocks.commit(placement).await,
                None => Ok(()),
            }
        })
    }

    fn committed(&self, placement: &Placement) -> bool {
        // Another request may have published it, whose answer still waits.
        let is_saved = |blocks: &Blocks| placement.keep.is_none() && blocks.metadata.is_saved();
        self.blocks.as_ref().is_none_or(is_saved)
    }

    fn memory(&self) -> usize {
        self.blocks.as_ref().map_or(0, |blocks| blocks.metadata.memory())
    }

    fn give_up(&self, placement: Placement) {
        if let Some(blocks) = &self.blocks {
            blocks.give_up(placement);
        }
    }

    /// The map of a VHD has no word for zeroes that hide what is below: there they are written.
    fn zero(&self, span: Span, _how: Zeroing) -> Io<'_, Zeroed> {
        Box::pin(async move {
            Ok(match self.map(span).await? {
                Extent::Zero { len } => Zeroed::Done { len },
                Extent::Data { len, .. } | Extent::Below { len } | Extent::Packed { len, .. } => {
                    Zeroed::Write { len }
                }
            })
        })
    }

    /// Blocks stay where they are; the file system may have the space behind their data.
    fn discard(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            self.check_writable()?;
            let mut rest = span;
            while !rest.is_empty() {
                let extent = match self.mapped(rest) {
                    Some(extent) => extent,
                    None => self.map(rest).await?,
                };
                rest = rest.split_at(rest.at() + extent.len()).1;
                if let Extent::Data { at, len, .. } = extent {
                    self.storage.discard(Span::new(at, len).expect("within the file")).await?;
                }
            }
            Ok(())
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            match &self.blocks {
                Some(blocks) => blocks.metadata.flush().await,
                None => self.storage.flush().await,
            }
        })
    }

    fn grow(&self) -> Io<'_, u64> {
        let error = Error::new(
            Errno::EOPNOTSUPP,
            "find out the size of a VHD: it is in its footer, and is changed there",
        );
        Box::pin(std::future::ready(Err(error)))
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        Box::pin(self.resize_to(bytes))
    }

    fn close(&self) -> Io<'_> {
        Box::pin(async move {
            self.flush().await?;
            match &self.blocks {
                Some(blocks) if self.writable => self.trim(blocks).await,
                Some(_) | None => Ok(()),
            }
        })
    }
}
