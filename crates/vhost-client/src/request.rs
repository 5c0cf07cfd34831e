//! A request of virtio-blk as a driver writes it, and its answer, written against VIRTIO 1.2, section 5.2.6.

/// Names as in the specification, without `VIRTIO_BLK_T_`.
pub mod kind {
    #![allow(missing_docs)]
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const GET_LIFETIME: u32 = 10;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const SECURE_ERASE: u32 = 14;
}

/// Bytes of a request's header.
pub const HEADER_LEN: usize = 16;
/// The unit of offsets and lengths, whatever the disk's block size.
pub const SECTOR: u64 = 512;
/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`
pub const UNMAP: u32 = 1;

/// The status byte. Names as in the specification, without `VIRTIO_BLK_S_`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u8);

#[allow(missing_docs)]
impl Status {
    pub const OK: Status = Status(0);
    pub const IOERR: Status = Status(1);
    pub const UNSUPP: Status = Status(2);
    /// What the byte holds before the device writes it.
    pub const UNWRITTEN: Status = Status(0xee);
}

impl std::fmt::Debug for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("OK"),
            1 => f.write_str("IOERR"),
            2 => f.write_str("UNSUPP"),
            0xee => f.write_str("UNWRITTEN"),
            other => write!(f, "status {other}"),
        }
    }
}

/// What a request was answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it ended.
    pub status: Status,
    /// Bytes that the device says that it has written, the status included.
    pub used: u32,
    /// What is in the memory for the data.
    pub bytes: Vec<u8>,
}

/// What the device reads and what it is to write, and how both are cut into pieces of memory.
#[derive(Clone, Debug)]
pub struct Request {
    /// Header and payload.
    pub(crate) out: Vec<u8>,
    /// Room for data, without the status.
    pub(crate) room: usize,
    /// Bytes of each piece that the device reads; what is left over is the last piece.
    pub(crate) out_cuts: Vec<usize>,
    /// The same for what it writes, data and status.
    pub(crate) in_cuts: Vec<usize>,
    /// Bytes by which each piece misses a multiple of 512 in memory.
    pub(crate) skew: u64,
    pub(crate) is_indirect: bool,
}

impl Request {
    /// A request of any kind.
    pub fn new(kind: u32, sector: u64, payload: &[u8], room: usize) -> Request {
        let mut out = kind.to_le_bytes().to_vec();
        out.extend([0; 4]);
        out.extend(sector.to_le_bytes());
        out.extend(payload);
        Request { out, room, out_cuts: vec![HEADER_LEN], in_cuts: vec![room], skew: 0, is_indirect: false }
    }

    /// Reads so many bytes from byte `at` on.
    pub fn read(at: u64, len: usize) -> Request {
        Request::new(kind::IN, at / SECTOR, &[], len)
    }

    /// Writes these bytes from byte `at` on.
    pub fn write(at: u64, bytes: &[u8]) -> Request {
        Request::new(kind::OUT, at / SECTOR, bytes, 0)
    }

    /// Makes durable what was answered before.
    pub fn flush() -> Request {
        Request::new(kind::FLUSH, 0, &[], 0)
    }

    /// Asks for the name of the disk, 20 bytes.
    pub fn id() -> Request {
        Request::new(kind::GET_ID, 0, &[], 20)
    }

    /// Lets the device forget these bytes.
    pub fn discard(at: u64, len: u64) -> Request {
        Request::segments(kind::DISCARD, &[(at / SECTOR, (len / SECTOR) as u32, 0)])
    }

    /// Makes zeroes of these bytes.
    pub fn zeroes(at: u64, len: u64, unmap: bool) -> Request {
        let flags = if unmap { UNMAP } else { 0 };
        Request::segments(kind::WRITE_ZEROES, &[(at / SECTOR, (len / SECTOR) as u32, flags)])
    }

    /// A discard or a write of zeroes of some runs: first sector, sectors, flags.
    pub fn segments(kind: u32, segments: &[(u64, u32, u32)]) -> Request {
        let mut payload = Vec::new();
        for (sector, count, flags) in segments {
            payload.extend(sector.to_le_bytes());
            payload.extend(count.to_le_bytes());
            payload.extend(flags.to_le_bytes());
        }
        Request::new(kind, 0, &payload, 0)
    }

    /// The pieces that the device reads have these lengths, the rest is the last one.
    pub fn cut_out(self, cuts: &[usize]) -> Request {
        Request { out_cuts: cuts.to_vec(), ..self }
    }

    /// The pieces that the device writes have these lengths, the rest (with the status) is the last one.
    pub fn cut_in(self, cuts: &[usize]) -> Request {
        Request { in_cuts: cuts.to_vec(), ..self }
    }

    /// Each piece misses a multiple of 512 by so many bytes in memory.
    pub fn skewed(self, bytes: u64) -> Request {
        Request { skew: bytes, ..self }
    }

    /// The descriptors are in a table of their own.
    pub fn indirect(self) -> Request {
        Request { is_indirect: true, ..self }
    }
}

/// Lengths of pieces: `cuts`, and what is left of `len`. Pieces without a byte are left out.
pub(crate) fn lengths(cuts: &[usize], len: usize) -> Vec<usize> {
    let mut left = len;
    let mut lengths: Vec<usize> = cuts
        .iter()
        .map(|cut| {
            let here = left.min(*cut);
            left -= here;
            here
        })
        .collect();
    lengths.push(left);
    lengths.retain(|len| *len > 0);
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_add_up() {
        assert_eq!(lengths(&[16], 16), [16]);
        assert_eq!(lengths(&[16], 528), [16, 512]);
        assert_eq!(lengths(&[1, 0, 7], 9), [1, 7, 1]);
        assert_eq!(lengths(&[100], 9), [9]);
    }

    #[test]
    fn a_header_is_as_in_the_specification() {
        let request = Request::write(0x0102_0304 * SECTOR, b"x");
        assert_eq!(request.out, *b"\x01\0\0\0\0\0\0\0\x04\x03\x02\x01\0\0\0\0x");
        let zeroes = Request::zeroes(512, 1024, true);
        assert_eq!(zeroes.out[16..], *b"\x01\0\0\0\0\0\0\0\x02\0\0\0\x01\0\0\0");
    }
}
