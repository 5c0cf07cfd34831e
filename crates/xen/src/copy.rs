//! Copies between our memory and granted pages as the kernel takes them: an array of segments, each with a status.
//!
//! `struct gntdev_grant_copy_segment` of include/uapi/xen/gntdev.h. The kernel's device and the fake hypervisor both
//! work on it, so that what is made of statuses is tested without Xen.

use block::Errno;

use crate::grants::{Direction, GrantRef, Piece, Transfer};
use crate::{Domain, PAGE};

/// Segments of one call. The kernel takes any number and makes hypercalls of a few of them; this bounds for how long it
/// holds our thread.
const SEGMENTS_MAX: usize = 512;
/// How often a piece is tried again whose page the domain's own pager has taken (GNTST_eagain). The kernel has waited for
/// it before it says so.
const TRIES_MAX: usize = 4;

/// `GNTCOPY_source_gref`: the source is a granted page.
pub(crate) const SOURCE_GREF: u16 = 1;
/// `GNTCOPY_dest_gref`: the destination is a granted page.
pub(crate) const DEST_GREF: u16 = 2;

/// What the hypervisor says of a grant (`GNTST_*` of Xen's public grant_table.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) i16);

impl Status {
    pub(crate) const OKAY: Status = Status(0);
    pub(crate) const GENERAL_ERROR: Status = Status(-1);
    pub(crate) const BAD_DOMAIN: Status = Status(-2);
    pub(crate) const BAD_GNTREF: Status = Status(-3);
    const PERMISSION_DENIED: Status = Status(-8);
    const BAD_PAGE: Status = Status(-9);
    pub(crate) const BAD_COPY_ARG: Status = Status(-10);
    const ADDRESS_TOO_BIG: Status = Status(-11);
    const EAGAIN: Status = Status(-12);
    const NO_SPACE: Status = Status(-13);
    /// What we write there before a call, and nobody else: it has been left untouched (XSA-318).
    const UNSAID: Status = Status(i16::MIN);

    /// Success is one number, and all others are errors. None of them is an errno that means something else to the
    /// disk: no space in the hypervisor is not a full disk.
    fn judge(self) -> Result<(), Errno> {
        match self {
            Status::OKAY => Ok(()),
            Status::GENERAL_ERROR => Err(Errno::EIO),
            Status::BAD_DOMAIN => Err(Errno::ENODEV),
            Status::BAD_GNTREF | Status::BAD_COPY_ARG | Status::ADDRESS_TOO_BIG => Err(Errno::EINVAL),
            Status::PERMISSION_DENIED => Err(Errno::EPERM),
            Status::BAD_PAGE => Err(Errno::EFAULT),
            Status::EAGAIN => Err(Errno::EAGAIN),
            Status::NO_SPACE => Err(Errno::ENOMEM),
            _unknown => Err(Errno::EIO),
        }
    }
}

/// One end of a segment: a union of a pointer and of `{ u32 ref; u16 offset; u16 domid }`, both of 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Side(u64);

impl Side {
    fn local(at: *mut u8) -> Side {
        Side(at.expose_provenance() as u64)
    }

    fn foreign(domain: Domain, gref: GrantRef, offset: u16) -> Side {
        let [r0, r1, r2, r3] = gref.0.to_ne_bytes();
        let ([o0, o1], [d0, d1]) = (offset.to_ne_bytes(), domain.0.to_ne_bytes());
        Side(u64::from_ne_bytes([r0, r1, r2, r3, o0, o1, d0, d1]))
    }

    /// Our memory, where this is that.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn pointer(self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }

    /// The granted page and the place in it, where this is that.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn grant(self) -> (Domain, GrantRef, u16) {
        let [r0, r1, r2, r3, o0, o1, d0, d1] = self.0.to_ne_bytes();
        let gref = GrantRef(u32::from_ne_bytes([r0, r1, r2, r3]));
        (Domain(u16::from_ne_bytes([d0, d1])), gref, u16::from_ne_bytes([o0, o1]))
    }
}

/// Bytes that lie together on both sides: within one granted page, and anywhere in our memory, since the kernel splits at
/// the borders of our pages itself.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) source: Side,
    pub(crate) dest: Side,
    pub(crate) len: u16,
    /// `GNTCOPY_*`.
    pub(crate) flags: u16,
    /// Out: `GNTST_*`.
    pub(crate) status: i16,
}

// The kernel's own struct: 8 + 8 + 2 + 2 + 2, aligned to 8.
const _: () = assert!(size_of::<Segment>() == 24 && std::mem::offset_of!(Segment, status) == 20);

/// Gives segments to the hypervisor. An error says that the call was not carried through: then no status counts.
pub(crate) type Issue<'a> = dyn FnMut(&mut [Segment]) -> Result<(), Errno> + 'a;

/// Makes calls of transfers. Kept from turn to turn, so that it allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Copier {
    segments: Vec<Segment>,
    /// The transfer that each segment belongs to.
    owners: Vec<usize>,
}

impl Copier {
    /// Does these copies; each has its own result.
    pub(crate) fn copy(&mut self, domain: Domain, transfers: &mut [Transfer], issue: &mut Issue<'_>) {
        self.segments.clear();
        self.owners.clear();
        for (number, transfer) in transfers.iter_mut().enumerate() {
            transfer.result = check(transfer);
            if transfer.result.is_ok() {
                self.cut(domain, transfer, number);
            }
        }
        let segments = self.segments.chunks_mut(SEGMENTS_MAX);
        for (segments, owners) in segments.zip(self.owners.chunks(SEGMENTS_MAX)) {
            if issue_all(segments, issue).is_ok() {
                judge_all(segments, owners, transfers);
                continue;
            }
            // One transfer may have been at fault, and nobody says which: each by itself, in full.
            let mut from = 0;
            while from < owners.len() {
                let owner = owners[from];
                let len = owners[from..].iter().take_while(|other| **other == owner).count();
                let segments = &mut segments[from..from + len];
                match issue_all(segments, issue) {
                    Ok(()) => judge_all(segments, &owners[from..from + len], transfers),
                    Err(errno) => transfers[owner].result = transfers[owner].result.and(Err(errno)),
                }
                from += len;
            }
        }
    }

    /// Adds the segments of a transfer whose two sides are equally long.
    fn cut(&mut self, domain: Domain, transfer: &Transfer, number: usize) {
        let mut locals = transfer.buf.segments().iter().map(|segment| (segment.ptr(), segment.len()));
        let (mut at, mut left) = locals.next().unwrap_or((std::ptr::null_mut(), 0));
        for piece in &transfer.pieces {
            let mut done = 0;
            while done < piece.len {
                while left == 0 {
                    let Some(next) = locals.next() else { return };
                    (at, left) = next;
                }
                let len = usize::from(piece.len - done).min(left);
                let (local, foreign) =
                    (Side::local(at), Side::foreign(domain, piece.gref, piece.offset + done));
                let (source, dest, flags) = match transfer.direction {
                    Direction::FromGuest => (foreign, local, SOURCE_GREF),
                    Direction::ToGuest => (local, foreign, DEST_GREF),
                };
                let status = Status::UNSAID.0;
                self.segments.push(Segment { source, dest, len: len as u16, flags, status });
                self.owners.push(number);
                at = at.wrapping_add(len);
                left -= len;
                done += len as u16;
            }
        }
    }
}

/// Whether pieces lie within their pages and are as long as our side.
fn check(transfer: &Transfer) -> Result<(), Errno> {
    let is_within =
        |piece: &Piece| piece.len > 0 && usize::from(piece.offset) + usize::from(piece.len) <= PAGE;
    let len: usize = transfer.pieces.iter().map(|piece| usize::from(piece.len)).sum();
    match transfer.pieces.iter().all(is_within) && len == transfer.buf.len() {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}

/// Issues these, and again those whose pages were away.
fn issue_all(segments: &mut [Segment], issue: &mut Issue<'_>) -> Result<(), Errno> {
    unsay(segments);
    issue(segments)?;
    for _ in 1..TRIES_MAX {
        let is_away = |segment: &Segment| Status(segment.status) == Status::EAGAIN;
        if !segments.iter().any(is_away) {
            break;
        }
        for segment in segments.iter_mut().filter(|segment| is_away(segment)) {
            let again = std::slice::from_mut(segment);
            unsay(again);
            issue(again)?;
        }
    }
    Ok(())
}

fn unsay(segments: &mut [Segment]) {
    segments.iter_mut().for_each(|segment| segment.status = Status::UNSAID.0);
}

/// The first error of its segments is a transfer's result.
fn judge_all(segments: &[Segment], owners: &[usize], transfers: &mut [Transfer]) {
    for (segment, owner) in segments.iter().zip(owners) {
        let result = &mut transfers[*owner].result;
        *result = result.and(Status(segment.status).judge());
    }
}

#[cfg(test)]
mod tests {
    use block::Buf;

    use super::*;

    const GUEST: Domain = Domain(7);

    fn transfer(direction: Direction, buf: Buf, pieces: &[(u32, u16, u16)]) -> Transfer {
        let pieces = pieces.iter().map(|(gref, offset, len)| Piece {
            gref: GrantRef(*gref),
            offset: *offset,
            len: *len,
        });
        Transfer { direction, buf, pieces: pieces.collect(), result: Ok(()) }
    }

    fn copy(transfers: &mut [Transfer], issue: &mut Issue<'_>) -> Vec<Result<(), Errno>> {
        Copier::default().copy(GUEST, transfers, issue);
        transfers.iter().map(|transfer| transfer.result).collect()
    }

    fn succeed(segments: &mut [Segment]) -> Result<(), Errno> {
        segments.iter_mut().for_each(|segment| segment.status = 0);
        Ok(())
    }

    #[test]
    fn pieces_are_cut_where_either_side_has_a_border() {
        let buf = Buf::concat(vec![Buf::zeroed(1000), Buf::zeroed(24), Buf::zeroed(512)]);
        let starts: Vec<*mut u8> = buf.segments().iter().map(|segment| segment.ptr()).collect();
        let mut seen = Vec::new();
        let mut transfers = [transfer(Direction::FromGuest, buf, &[(8, 0, 512), (9, 512, 1024)])];
        copy(&mut transfers, &mut |segments| {
            for segment in &*segments {
                assert_eq!(segment.flags, SOURCE_GREF);
                seen.push((segment.source.grant(), segment.dest.pointer(), segment.len));
            }
            succeed(segments)
        });
        let expected = [
            ((GUEST, GrantRef(8), 0), starts[0], 512),
            ((GUEST, GrantRef(9), 512), starts[0].wrapping_add(512), 488),
            ((GUEST, GrantRef(9), 1000), starts[1], 24),
            ((GUEST, GrantRef(9), 1024), starts[2], 512),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn sides_are_laid_out_as_the_kernels_union() {
        let mut transfers = [transfer(Direction::ToGuest, Buf::zeroed(16), &[(0x0102_0304, 0x0506, 16)])];
        copy(&mut transfers, &mut |segments| {
            assert_eq!(segments[0].flags, DEST_GREF);
            let little = u64::from(0x0102_0304_u32) | 0x0506 << 32 | 7 << 48;
            assert_eq!(
                segments[0].dest.0.to_ne_bytes(),
                little.to_le_bytes(),
                "where bytes are in that order"
            );
            succeed(segments)
        });
    }

    #[test]
    fn success_is_only_what_the_hypervisor_has_said_of_each_piece() {
        let cases = [
            (0, Ok(())),
            (-1, Err(Errno::EIO)),
            (-2, Err(Errno::ENODEV)),
            (-3, Err(Errno::EINVAL)),
            (-7, Err(Errno::EIO)),
            (-8, Err(Errno::EPERM)),
            (-12, Err(Errno::EAGAIN)),
            (-13, Err(Errno::ENOMEM)),
            (1, Err(Errno::EIO)),
            (i16::MAX, Err(Errno::EIO)),
            (i16::MIN, Err(Errno::EIO)),
        ];
        for (status, expected) in cases {
            for spoilt in 0..3 {
                let whole = |gref| {
                    transfer(
                        Direction::FromGuest,
                        Buf::zeroed(1536),
                        &[(gref, 0, 512), (gref + 1, 0, 512), (gref + 2, 0, 512)],
                    )
                };
                let told = copy(&mut [whole(10), whole(20), whole(30)], &mut |segments| {
                    for segment in segments {
                        let is_spoilt = segment.source.grant().1 == GrantRef(20 + spoilt);
                        segment.status = if is_spoilt { status } else { 0 };
                    }
                    Ok(())
                });
                assert_eq!(told, [Ok(()), expected, Ok(())], "status {status} of piece {spoilt}");
            }
        }
    }

    #[test]
    fn statuses_that_are_left_untouched_are_errors_whatever_was_there_before() {
        let mut transfers = [transfer(Direction::FromGuest, Buf::zeroed(512), &[(8, 0, 512)])];
        assert_eq!(copy(&mut transfers, &mut |_| Ok(())), [Err(Errno::EIO)]);
        // A success of the call before is not taken for one of this call.
        let mut copier = Copier::default();
        copier.copy(GUEST, &mut transfers, &mut succeed);
        assert_eq!(transfers[0].result, Ok(()));
        copier.copy(GUEST, &mut transfers, &mut |_| Ok(()));
        assert_eq!(transfers[0].result, Err(Errno::EIO));
    }

    #[test]
    fn a_call_that_fails_is_made_again_for_each_so_that_one_spoils_no_other() {
        let one = |gref| transfer(Direction::ToGuest, Buf::zeroed(1024), &[(gref, 0, 512), (gref, 512, 512)]);
        let told = copy(&mut [one(1), one(2), one(3)], &mut |segments| match segments
            .iter()
            .any(|segment| segment.dest.grant().1 == GrantRef(2))
        {
            true => Err(Errno::EFAULT),
            false => succeed(segments),
        });
        assert_eq!(told, [Ok(()), Err(Errno::EFAULT), Ok(())]);
    }

    #[test]
    fn a_page_that_is_away_is_tried_again_but_not_for_ever() {
        for (times, expected) in
            [(1, Ok(())), (3, Ok(())), (4, Err(Errno::EAGAIN)), (1000, Err(Errno::EAGAIN))]
        {
            let mut calls = Vec::new();
            let mut transfers =
                [transfer(Direction::FromGuest, Buf::zeroed(1024), &[(8, 0, 512), (9, 0, 512)])];
            let told = copy(&mut transfers, &mut |segments| {
                calls.push(segments.len());
                for segment in segments {
                    let is_away = segment.source.grant().1 == GrantRef(9) && calls.len() <= times;
                    segment.status = if is_away { -12 } else { 0 };
                }
                Ok(())
            });
            assert_eq!(told, [expected]);
            assert_eq!(calls.len(), (times + 1).min(4), "away {times} times");
            assert!(calls[1..].iter().all(|len| *len == 1), "only what was away: {calls:?}");
        }
    }

    #[test]
    fn what_reaches_beyond_a_page_or_is_of_another_length_is_not_asked_for() {
        let cases = [
            (512, vec![(8, 3585, 512)]),
            (512, vec![(8, 0, 0), (8, 0, 512)]),
            (512, vec![(8, 0, 511)]),
            (512, vec![(8, 0, 512), (9, 0, 512)]),
            (512, vec![]),
            (4, vec![(8, u16::MAX, 4)]),
        ];
        for (len, pieces) in cases {
            let mut transfers = [
                transfer(Direction::FromGuest, Buf::zeroed(len), &pieces),
                transfer(Direction::FromGuest, Buf::zeroed(4096), &[(8, 0, 4096)]),
            ];
            let mut asked = 0;
            let told = copy(&mut transfers, &mut |segments| {
                asked += segments.len();
                succeed(segments)
            });
            assert_eq!((told, asked), (vec![Err(Errno::EINVAL), Ok(())], 1), "{pieces:?}");
        }
    }

    #[test]
    fn a_transfer_over_several_calls_fails_if_one_of_its_pieces_does() {
        let pieces: Vec<_> = (0..1200).map(|gref| (gref, 0, 512)).collect();
        for spoilt in [0, 511, 512, 1199] {
            let mut calls = Vec::new();
            let mut transfers = [transfer(Direction::FromGuest, Buf::zeroed(1200 * 512), &pieces)];
            let told = copy(&mut transfers, &mut |segments| {
                calls.push(segments.len());
                for segment in segments {
                    let is_spoilt = segment.source.grant().1 == GrantRef(spoilt);
                    segment.status = if is_spoilt { -3 } else { 0 };
                }
                Ok(())
            });
            assert_eq!((told, calls), (vec![Err(Errno::EINVAL)], vec![512, 512, 176]));
        }
    }
}
