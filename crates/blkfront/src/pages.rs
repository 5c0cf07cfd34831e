//! A guest's pages: which are free, and which are granted.

use xen::fake::Guest;
use xen::grants::{Access, GrantRef};

use crate::Result;

/// A page and the number under which the back end has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) number: usize,
    pub(crate) gref: GrantRef,
}

/// Hands out pages of a guest.
pub(crate) struct Pages {
    guest: Guest,
    free: Vec<usize>,
    /// Pages that stay granted, for data of any direction, where that was agreed.
    kept: Vec<Page>,
    is_persistent: bool,
}

impl Pages {
    /// All pages of the guest. They are handed out from the last on, so that what is granted together does not lie
    /// together.
    pub(crate) fn new(guest: Guest, is_persistent: bool) -> Pages {
        let free = (0..guest.pages()).collect();
        Pages { guest, free, kept: Vec::new(), is_persistent }
    }

    pub(crate) fn set_persistent(&mut self, is_persistent: bool) {
        self.is_persistent = is_persistent;
    }

    /// A page of nobody's.
    pub(crate) fn take(&mut self, access: Access) -> Result<Page> {
        let number = self.free.pop().ok_or("the guest has no more pages")?;
        Ok(Page { number, gref: self.guest.grant(number, access) })
    }

    /// A page for a request, perhaps one that is granted already.
    pub(crate) fn take_for_data(&mut self, access: Access) -> Result<Page> {
        match (self.is_persistent, self.kept.pop()) {
            (true, Some(page)) => Ok(page),
            (true, None) => self.take(Access::Write),
            (false, _) => self.take(access),
        }
    }

    /// Ends the grant of a page, which the back end must not have mapped any more.
    pub(crate) fn give_back(&mut self, page: Page) -> Result<()> {
        if let Err(errno) = self.guest.end(page.gref) {
            return Err(
                format!("the back end still has page {} ({:?}): {errno}", page.number, page.gref).into()
            );
        }
        self.free.push(page.number);
        Ok(())
    }

    /// Takes a page back from a request that is answered.
    pub(crate) fn give_back_data(&mut self, page: Page) -> Result<()> {
        if self.is_persistent {
            self.kept.push(page);
            return Ok(());
        }
        self.give_back(page)
    }

    /// Ends the grants that stayed.
    pub(crate) fn forget_kept(&mut self) -> Result<()> {
        while let Some(page) = self.kept.pop() {
            self.give_back(page)?;
        }
        Ok(())
    }
}
