//! Where the bytes of requests and answers are: blkif.h as compilers for 64 and for 32 bits lay it out.

/// Whose layout a front end uses; it says so in `protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// That of the back end's own machine, which these tests run on; no `protocol` is written.
    Native,
    /// 64 bits: words of 8 bytes are aligned to 8.
    X86_64,
    /// 32 bits: words of 8 bytes are aligned to 4.
    X86_32,
}

/// Offsets and sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Of a slot of the ring: the union of request and answer.
    pub(crate) slot: usize,
    pub(crate) id: usize,
    pub(crate) sector: usize,
    /// Of a request's segments, or of a discard's number of sectors.
    pub(crate) segments: usize,
    /// Of an indirect request's pages.
    pub(crate) tables: usize,
    /// Of an answer: `id`, `operation`, one byte of nothing, `status`, and nothing to its end.
    pub(crate) answer: usize,
}

const WIDE: Layout = Layout { slot: 112, id: 8, sector: 16, segments: 24, tables: 28, answer: 16 };
const NARROW: Layout = Layout { slot: 108, id: 4, sector: 12, segments: 20, tables: 24, answer: 12 };

/// Bytes before the first slot.
pub(crate) const HEADER: usize = 64;

impl Abi {
    /// What the front end writes as `protocol`, if anything.
    pub fn protocol(self) -> Option<&'static str> {
        match self {
            Abi::Native => None,
            Abi::X86_64 => Some("x86_64-abi"),
            Abi::X86_32 => Some("x86_32-abi"),
        }
    }

    pub(crate) fn layout(self) -> Layout {
        match self {
            Abi::Native if cfg!(target_pointer_width = "64") => WIDE,
            Abi::X86_64 => WIDE,
            Abi::Native | Abi::X86_32 => NARROW,
        }
    }

    /// Slots of a ring of so many pages: the greatest power of two that fits (`__RING_SIZE` of ring.h).
    pub fn slots(self, pages: usize) -> u32 {
        let fit = (pages * 4096 - HEADER) / self.layout().slot;
        1 << fit.ilog2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_has_as_many_slots_as_linux_says() {
        for abi in [Abi::Native, Abi::X86_64, Abi::X86_32] {
            let slots = [1, 2, 4, 8, 16].map(|pages| abi.slots(pages));
            assert_eq!(slots, [32, 64, 128, 256, 512], "{abi:?}");
        }
    }
}
