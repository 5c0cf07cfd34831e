//! How requests and responses of blkif lie in memory, for guests of either word length.
//!
//! The structures of xen/include/public/io/blkif.h have no padding of their own: where a field lies depends on what the
//! guest's compiler aligns 64-bit numbers to. That is 8 bytes everywhere but on 32-bit x86, where it is 4. A request
//! there is 108 bytes and elsewhere 112, so a back end must know what its guest is: the front end says so in `protocol`.
//! All numbers are little-endian.

use ::xen::PAGE;
use ::xen::grants::GrantRef;

/// What a front end's `protocol` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abi {
    /// As the compiler of this program lays structures out.
    Native,
    /// `x86_64-abi`, and the same on ARM.
    X86_64,
    /// `x86_32-abi`.
    X86_32,
}

impl Abi {
    /// What the front end wrote (xen/include/public/io/protocols.h); `None` where that is no ABI known. Where it wrote
    /// nothing, the ABI is the back end's own (blkif.h, "protocol").
    pub(crate) fn parse(protocol: Option<&str>) -> Option<Abi> {
        match protocol {
            None => Some(Abi::Native),
            Some("x86_64-abi" | "arm-abi") => Some(Abi::X86_64),
            Some("x86_32-abi") => Some(Abi::X86_32),
            Some(_) => None,
        }
    }

    /// Where the fields are.
    pub(crate) const fn layout(self) -> &'static Layout {
        match self {
            Abi::Native if cfg!(target_arch = "x86") => &PACKED,
            Abi::Native | Abi::X86_64 => &ALIGNED,
            Abi::X86_32 => &PACKED,
        }
    }
}

/// Bytes of the largest request, and of a copy of any.
pub(crate) const REQUEST_MAX: usize = 112;
/// Segments that fit into a request (BLKIF_MAX_SEGMENTS_PER_REQUEST).
pub(crate) const SEGMENTS_MAX: u16 = 11;
/// Pages of segments that an indirect request can name (BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST).
pub(crate) const INDIRECT_PAGES_MAX: usize = 8;
/// Bytes of a segment (`struct blkif_request_segment`): a grant reference, the first and the last sector, and two bytes
/// of padding, as it is an array's element.
pub(crate) const SEGMENT_LEN: usize = 8;
/// Segments in a page of these.
pub(crate) const SEGMENTS_PER_PAGE: usize = PAGE / SEGMENT_LEN;
/// Bytes of a sector, whatever the disk's blocks are: "always expressed in 512-byte units" (blkif.h).
pub(crate) const SECTOR: u64 = 512;
/// Pages of the largest ring: Linux's front end and back end know none of a higher order (XENBUS_MAX_RING_GRANT_ORDER).
pub(crate) const RING_PAGES_MAX: usize = 16;

/// Where the indices are (`struct blkif_sring`, xen/include/public/io/ring.h: DEFINE_RING_TYPES).
pub(crate) const REQ_PROD: usize = 0;
pub(crate) const REQ_EVENT: usize = 4;
pub(crate) const RSP_PROD: usize = 8;
pub(crate) const RSP_EVENT: usize = 12;
/// Where the entries start: behind the indices and 48 bytes of padding.
pub(crate) const RING: usize = 64;

/// Operations (BLKIF_OP_*).
pub(crate) const READ: u8 = 0;
pub(crate) const WRITE: u8 = 1;
pub(crate) const WRITE_BARRIER: u8 = 2;
pub(crate) const FLUSH_DISKCACHE: u8 = 3;
pub(crate) const DISCARD: u8 = 5;
pub(crate) const INDIRECT: u8 = 6;
/// BLKIF_DISCARD_SECURE, a flag of a discard.
pub(crate) const SECURE: u8 = 1;

/// Where the fields of requests and responses are, in bytes from their start.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Bytes of an entry of a ring, which is a request or a response: of a request, as that is larger.
    pub(crate) entry: usize,
    /// Bytes of a response.
    pub(crate) response: usize,
    /// `id`: a number of the front end's, in each kind of request.
    id: usize,
    /// `sector_number`, in each kind of request.
    sector: usize,
    /// `seg`, in `struct blkif_request`.
    segments: usize,
    /// `nr_sectors`, in `struct blkif_request_discard`.
    discard_sectors: usize,
    /// `indirect_grefs`, in `struct blkif_request_indirect`: behind the 16 bits of `handle`, and 16 of padding.
    indirect: usize,
}

/// 64-bit numbers are aligned to 8 bytes.
const ALIGNED: Layout =
    Layout { entry: 112, response: 16, id: 8, sector: 16, segments: 24, discard_sectors: 24, indirect: 28 };
/// 64-bit numbers are aligned to 4 bytes: i386.
const PACKED: Layout =
    Layout { entry: 108, response: 12, id: 4, sector: 12, segments: 20, discard_sectors: 20, indirect: 24 };

impl Layout {
    /// How many entries a ring in so many pages has: as many as fit, rounded down to a power of two (`__RING_SIZE`).
    pub(crate) const fn ring_size(&self, pages: usize) -> u16 {
        let fit = (pages * PAGE - RING) / self.entry;
        1 << fit.ilog2()
    }

    /// Where an entry of a ring starts.
    pub(crate) const fn entry_at(&self, place: usize) -> usize {
        RING + place * self.entry
    }

    /// The 32-bit words of a response; the last of them is padding, and there only where numbers are aligned.
    pub(crate) fn response(&self, id: u64, operation: u8, status: i16) -> [u32; 4] {
        // `operation`, a byte of padding, and `status`.
        let rest = u32::from(operation) | u32::from(status as u16) << 16;
        [id as u32, (id >> 32) as u32, rest, 0]
    }
}

/// A copy of a request that nobody else can change.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    pub(crate) bytes: [u8; REQUEST_MAX],
    pub(crate) layout: &'static Layout,
}

/// A segment: which sectors of which page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) gref: GrantRef,
    /// First sector of 512 bytes within the page.
    pub(crate) first: u8,
    /// Last one, itself included.
    pub(crate) last: u8,
}

impl Segment {
    /// Reads an element of an array of segments.
    #[inline]
    pub(crate) fn from_bytes(bytes: &[u8; SEGMENT_LEN]) -> Segment {
        let number = u64::from_le_bytes(*bytes);
        Segment { gref: GrantRef(number as u32), first: (number >> 32) as u8, last: (number >> 40) as u8 }
    }
}

impl Raw {
    #[inline]
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    #[inline]
    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    /// `operation`.
    #[inline]
    pub(crate) fn operation(&self) -> u8 {
        self.bytes[0]
    }

    /// The operation that its response carries: of an indirect request that is the one within (Linux's
    /// `blkif_interrupt` disables a disk that answers otherwise).
    #[inline]
    pub(crate) fn answered_operation(&self) -> u8 {
        if self.operation() == INDIRECT { self.indirect_operation() } else { self.operation() }
    }

    /// `id`.
    #[inline]
    pub(crate) fn id(&self) -> u64 {
        self.u64(self.layout.id)
    }

    /// `sector_number`, in units of [`SECTOR`].
    #[inline]
    pub(crate) fn sector(&self) -> u64 {
        self.u64(self.layout.sector)
    }

    /// `nr_segments` of what is not indirect.
    #[inline]
    pub(crate) fn segment_count(&self) -> u16 {
        self.bytes[1].into()
    }

    /// An element of `seg`; there are [`SEGMENTS_MAX`].
    #[inline]
    pub(crate) fn segment(&self, nth: u16) -> Segment {
        let at = self.layout.segments + usize::from(nth) * SEGMENT_LEN;
        let number = self.u64(at);
        Segment::from_bytes(&number.to_le_bytes())
    }

    /// `indirect_op`.
    #[inline]
    pub(crate) fn indirect_operation(&self) -> u8 {
        self.bytes[1]
    }

    /// `nr_segments` of an indirect request.
    #[inline]
    pub(crate) fn indirect_count(&self) -> u16 {
        u16::from_le_bytes([self.bytes[2], self.bytes[3]])
    }

    /// An element of `indirect_grefs`; there are [`INDIRECT_PAGES_MAX`].
    #[inline]
    pub(crate) fn indirect_page(&self, nth: usize) -> GrantRef {
        GrantRef(self.u32(self.layout.indirect + 4 * nth))
    }

    /// `flag` of a discard.
    #[inline]
    pub(crate) fn discard_flag(&self) -> u8 {
        self.bytes[1]
    }

    /// `nr_sectors` of a discard, in units of [`SECTOR`].
    #[inline]
    pub(crate) fn discard_sectors(&self) -> u64 {
        self.u64(self.layout.discard_sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The structures of blkif.h, as the compiler lays them out where 64-bit numbers are aligned to 8 bytes.
    mod aligned {
        #[repr(C)]
        #[derive(Default)]
        pub(super) struct Segment {
            pub(super) gref: u32,
            pub(super) first: u8,
            pub(super) last: u8,
        }
        #[repr(C)]
        #[derive(Default)]
        pub(super) struct Request {
            pub(super) operation: u8,
            pub(super) nr_segments: u8,
            pub(super) handle: u16,
            pub(super) id: u64,
            pub(super) sector_number: u64,
            pub(super) seg: [Segment; 11],
        }
        #[repr(C)]
        pub(super) struct Discard {
            pub(super) operation: u8,
            pub(super) flag: u8,
            pub(super) handle: u16,
            pub(super) id: u64,
            pub(super) sector_number: u64,
            pub(super) nr_sectors: u64,
        }
        #[repr(C)]
        pub(super) struct Indirect {
            pub(super) operation: u8,
            pub(super) indirect_op: u8,
            pub(super) nr_segments: u16,
            pub(super) id: u64,
            pub(super) sector_number: u64,
            pub(super) handle: u16,
            pub(super) indirect_grefs: [u32; 8],
        }
        #[repr(C)]
        pub(super) struct Response {
            pub(super) id: u64,
            pub(super) operation: u8,
            pub(super) status: i16,
        }
    }

    /// The same where they are aligned to 4 bytes: a number of two halves has that alignment.
    mod packed {
        #[repr(C)]
        pub(super) struct Long(u32, u32);
        #[repr(C)]
        pub(super) struct Request {
            pub(super) operation: u8,
            pub(super) nr_segments: u8,
            pub(super) handle: u16,
            pub(super) id: Long,
            pub(super) sector_number: Long,
            pub(super) seg: [super::aligned::Segment; 11],
        }
        #[repr(C)]
        pub(super) struct Discard {
            pub(super) operation: u8,
            pub(super) flag: u8,
            pub(super) handle: u16,
            pub(super) id: Long,
            pub(super) sector_number: Long,
            pub(super) nr_sectors: Long,
        }
        #[repr(C)]
        pub(super) struct Indirect {
            pub(super) operation: u8,
            pub(super) indirect_op: u8,
            pub(super) nr_segments: u16,
            pub(super) id: Long,
            pub(super) sector_number: Long,
            pub(super) handle: u16,
            pub(super) indirect_grefs: [u32; 8],
        }
        #[repr(C)]
        pub(super) struct Response {
            pub(super) id: Long,
            pub(super) operation: u8,
            pub(super) status: i16,
        }
    }

    macro_rules! check {
        ($abi:expr, $structures:ident) => {
            use std::mem::offset_of;
            let layout = $abi.layout();
            type Request = $structures::Request;
            type Discard = $structures::Discard;
            type Indirect = $structures::Indirect;
            type Response = $structures::Response;
            assert_eq!((layout.entry, layout.response), (size_of::<Request>(), size_of::<Response>()));
            for id in [offset_of!(Request, id), offset_of!(Discard, id), offset_of!(Indirect, id)] {
                assert_eq!(layout.id, id);
            }
            let sectors = [offset_of!(Request, sector_number), offset_of!(Discard, sector_number)];
            for sector in sectors.into_iter().chain([offset_of!(Indirect, sector_number)]) {
                assert_eq!(layout.sector, sector);
            }
            assert_eq!(layout.segments, offset_of!(Request, seg));
            assert_eq!(layout.discard_sectors, offset_of!(Discard, nr_sectors));
            assert_eq!(layout.indirect, offset_of!(Indirect, indirect_grefs));
            assert_eq!((offset_of!(Request, nr_segments), offset_of!(Discard, flag)), (1, 1));
            assert_eq!((offset_of!(Indirect, indirect_op), offset_of!(Indirect, nr_segments)), (1, 2));
            assert_eq!(offset_of!(Response, id), 0);
            assert_eq!((offset_of!(Response, operation), offset_of!(Response, status)), {
                let id = size_of::<u64>();
                (id, id + 2)
            });
        };
    }

    #[test]
    fn fields_are_where_a_compiler_of_64_bits_puts_them() {
        check!(Abi::X86_64, aligned);
    }

    #[test]
    fn fields_are_where_a_compiler_of_32_bits_puts_them() {
        check!(Abi::X86_32, packed);
    }

    #[test]
    fn a_segment_takes_eight_bytes_of_which_two_are_padding() {
        assert_eq!((size_of::<aligned::Segment>(), SEGMENT_LEN), (8, 8));
        let segment = Segment::from_bytes(&[1, 2, 3, 4, 5, 6, 0xee, 0xee]);
        assert_eq!(segment, Segment { gref: GrantRef(0x0403_0201), first: 5, last: 6 });
    }

    #[test]
    fn rings_have_as_many_entries_as_linux_counts() {
        // XEN.md 6, by experiment: 32 entries on one page up to 512 on 16.
        for abi in [Abi::Native, Abi::X86_64, Abi::X86_32] {
            let sizes = [1, 2, 4, 8, 16].map(|pages| abi.layout().ring_size(pages));
            assert_eq!(sizes, [32, 64, 128, 256, 512]);
        }
    }

    #[test]
    fn the_native_layout_is_that_of_this_machine() {
        let native = Abi::Native.layout();
        assert_eq!(native.entry, size_of::<aligned::Request>());
    }

    #[test]
    fn a_response_has_zeroes_where_it_has_padding() {
        let words = Abi::X86_64.layout().response(0x1122_3344_5566_7788, 5, -2);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(bytes, [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 5, 0, 0xfe, 0xff, 0, 0, 0, 0]);
    }

    #[test]
    fn protocols_are_known_by_their_names() {
        assert_eq!(Abi::parse(None), Some(Abi::Native));
        assert_eq!(Abi::parse(Some("x86_64-abi")), Some(Abi::X86_64));
        assert_eq!(Abi::parse(Some("x86_32-abi")), Some(Abi::X86_32));
        for other in ["", "x86_64", "X86_64-ABI", "x86_64-abi ", "ia64-abi"] {
            assert_eq!(Abi::parse(Some(other)), None, "{other:?}");
        }
    }
}
