//! What goes wrong in a run: rules about which operations of the simulated kernel fail, and how.

use block::{Errno, Span};

use crate::dice::Dice;
use crate::kernel::Kind;

/// Which operations a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Read,
    Write,
    Sync,
    Allocate,
    Seek,
    Any,
}

impl Class {
    fn covers(self, kind: Kind) -> bool {
        match kind {
            Kind::Read => matches!(self, Class::Read | Class::Any),
            Kind::Write => matches!(self, Class::Write | Class::Any),
            Kind::Sync => self == Class::Sync,
            Kind::Punch | Kind::Zero => matches!(self, Class::Allocate | Class::Any),
            Kind::SeekData | Kind::SeekHole | Kind::SeekEnd => self == Class::Seek,
            Kind::WillNeed | Kind::Other => self == Class::Any,
        }
    }
}

/// The longest delay, in nanoseconds.
pub(crate) const DELAY_MAX: u64 = 10_000_000_000;

/// What happens to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// It fails. A write may have written some of its sectors, a sync has lost the data.
    Fail(Errno),
    /// No more bytes than these move.
    AtMost(u64),
    /// All but these bytes move, one at least.
    Without(u64),
    /// It takes this many nanoseconds longer.
    Delay(u64),
    /// It does not complete before the end.
    Hang,
}

/// What goes wrong with some operations on one file.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) file: usize,
    pub(crate) class: Class,
    /// Only where an operation touches these bytes.
    pub(crate) span: Option<Span>,
    /// So many are spared first.
    pub(crate) skip: u32,
    /// So many are hit then.
    pub(crate) times: u32,
    pub(crate) action: Action,
}

impl Rule {
    /// Whether it hits this operation; counts it then.
    pub(crate) fn hits(&mut self, file: usize, kind: Kind, at: u64, len: u64) -> bool {
        if self.times == 0 || self.file != file || !self.class.covers(kind) {
            return false;
        }
        let touched = |span: Span| Span::new(at, len).is_some_and(|operation| operation.overlaps(span));
        if self.span.is_some_and(|span| len > 0 && !touched(span)) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.times = self.times.saturating_sub(u32::from(self.times != u32::MAX));
        true
    }

    /// A rule about this file of `size` bytes.
    pub(crate) fn draw(dice: &mut Dice, file: usize, size: u64) -> Rule {
        use Class::{Allocate, Any, Read, Seek, Sync, Write};
        let class = dice.pick(&[Read, Read, Write, Write, Write, Sync, Sync, Allocate, Seek, Any]);
        let action = match class {
            Sync | Seek | Allocate => match dice.below(10) {
                0 => Action::Fail(Errno::EINTR),
                1 => Action::Fail(Errno::EAGAIN),
                2 => Action::Fail(Errno::ENOSPC),
                3 => Action::Delay(DELAY_MAX),
                4 => Action::Hang,
                5.. => Action::Fail(errno(dice)),
            },
            Read | Write | Any => match dice.below(12) {
                0 => Action::Fail(Errno::EINTR),
                1 => Action::Fail(Errno::EAGAIN),
                2 => Action::AtMost(dice.pick(&[0, 0, 1, 511, 512, 4096])),
                3 | 4 => Action::AtMost(dice.pick(&[1, 511, 512, 513, 1024, 4096, 8192])),
                5 => Action::Without(dice.pick(&[1, 511, 512, 4095, 4096])),
                6 => Action::Delay(dice.pick(&[DELAY_MAX / 100, DELAY_MAX / 10, DELAY_MAX])),
                7 => Action::Hang,
                8.. => Action::Fail(errno(dice)),
            },
        };
        // From lseek it is no error: nothing but a hole follows.
        let no_error = class == Seek && action == Action::Fail(Errno::ENXIO);
        let action = if no_error { Action::Fail(Errno::EIO) } else { action };
        let transient = matches!(action, Action::Fail(Errno::EINTR | Errno::EAGAIN));
        let span = dice.percent(40).then(|| {
            let at = dice.below(size);
            Span::new(at, 1 + dice.below((size - at).min(32 << 10))).expect("within the file")
        });
        let times = match (action, transient) {
            (Action::Hang, _) => 1,
            (Action::AtMost(1) | Action::Without(_), _) => dice.pick(&[1, 2, 5, 100]), // for ever takes as long, byte by byte
            (Action::Fail(Errno::EAGAIN), _) => dice.pick(&[1, 3, 100, u32::MAX]),
            (_, true) => dice.pick(&[1, 3, 100, 100, 3000]), // interrupted for ever is no end anybody can tell
            (_, false) => dice.pick(&[1, 1, 1, 2, 2, 5, 100, u32::MAX]),
        };
        Rule { file, class, span, skip: dice.pick(&[0, 0, 1, 3, 10, 40]), times, action }
    }
}

/// An errno that storage may give. The last ones are known to few.
fn errno(dice: &mut Dice) -> Errno {
    dice.pick(&[
        Errno::EIO,
        Errno::EIO,
        Errno::EIO,
        Errno::ENOSPC,
        Errno::ENOSPC,
        Errno::EDQUOT,
        Errno::ENOMEM,
        Errno::EBUSY,
        Errno::EILSEQ,
        Errno::EREMOTEIO,
        Errno::ENXIO,
        Errno::ESTALE,
        Errno::ETIMEDOUT,
        Errno::EROFS,
        Errno::EPERM,
        Errno::EFBIG,
        Errno::EINVAL,
        Errno::EOPNOTSUPP,
        Errno::EHWPOISON,
        Errno::new(4095).expect("the largest errno"),
    ])
}
