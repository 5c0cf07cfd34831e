//! Memory for requests: page-aligned blocks that are used again, the first of them from one arena that the kernel
//! can be told of once (registered buffers).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use crate::buf::Buf;

/// Every block starts at a multiple of this many bytes, enough for O_DIRECT everywhere Linux runs.
pub const ALIGN: usize = 4096;
/// The number under which the arena is registered with the kernel, where it is.
pub const ARENA: u16 = 0;
/// Free blocks from outside the arena are kept up to this many bytes together.
const KEPT_MAX: usize = 32 << 20;
const CLASSES: usize = usize::BITS as usize;

/// Memory with a layout; given back when dropped.
struct Heap {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl Heap {
    fn new(len: usize, align: usize) -> Heap {
        let layout =
            Layout::from_size_align(len.max(1), align).expect("lengths of buffers are far below isize::MAX");
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        Heap { ptr: NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and dropped once.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

/// `len` bytes of zero, outside of any pool.
pub(crate) fn zeroed(len: usize) -> Buf {
    let heap = Heap::new(len, ALIGN);
    let ptr = heap.ptr;
    // SAFETY: `heap` is the memory and lives in `keep`; it is initialised, and only its address is shared.
    unsafe { Buf::from_raw(ptr, len, None, Rc::new(heap)) }
}

/// Where requests' memory comes from; a clone is the same pool. For one thread.
#[derive(Clone)]
pub struct Pool(Rc<Shared>);

struct Shared {
    arena: Heap,
    state: RefCell<State>,
}

struct State {
    /// Bytes of the arena that have been handed out at some time.
    carved: usize,
    /// Bytes of free blocks that are not of the arena.
    kept: usize,
    /// Free blocks of 2^class bytes.
    free: [Vec<Block>; CLASSES],
}

enum Block {
    Arena(NonNull<u8>),
    Own(Heap),
}

impl Block {
    fn ptr(&self) -> NonNull<u8> {
        match self {
            Block::Arena(ptr) => *ptr,
            Block::Own(heap) => heap.ptr,
        }
    }
}

/// A block in use; returns to its pool when dropped.
struct Used {
    pool: Pool,
    class: usize,
    block: Option<Block>,
}

impl Pool {
    /// A pool with an arena of this many bytes (rounded up to a page).
    pub fn new(arena_len: usize) -> Pool {
        let arena = Heap::new(arena_len.next_multiple_of(ALIGN), ALIGN);
        let state = State { carved: 0, kept: 0, free: [const { Vec::new() }; CLASSES] };
        Pool(Rc::new(Shared { arena, state: RefCell::new(state) }))
    }

    /// The arena, for registering it with the kernel. It lives as long as any clone of the pool and any block.
    pub fn arena(&self) -> Buf {
        let Heap { ptr, layout } = self.0.arena;
        // SAFETY: the arena lives in the pool, which `keep` keeps.
        unsafe { Buf::from_raw(ptr, layout.size(), Some(ARENA), Rc::new(self.clone())) }
    }

    /// How many bytes of memory a buffer of `len` bytes takes up: the next power of two, a page at least.
    pub fn footprint(len: usize) -> usize {
        len.next_power_of_two().max(ALIGN)
    }

    /// A buffer of `len` bytes that starts at a page. Its content is arbitrary: old bytes of some request.
    pub fn take(&self, len: usize) -> Buf {
        let size = Pool::footprint(len);
        let class = size.trailing_zeros() as usize;
        let block = self.block(class, size);
        let ptr = block.ptr();
        let registered = match block {
            Block::Arena(_) => Some(ARENA),
            Block::Own(_) => None,
        };
        let used = Used { pool: self.clone(), class, block: Some(block) };
        // SAFETY: the block is `size >= len` bytes, handed out to nobody else until `used` is dropped.
        let buf = unsafe { Buf::from_raw(ptr, len, registered, Rc::new(used)) };
        if cfg!(debug_assertions) {
            buf.fill(0xa5); // tests look for it in what guests get
        }
        buf
    }

    fn block(&self, class: usize, size: usize) -> Block {
        let state = &mut *self.0.state.borrow_mut();
        if let Some(block) = state.free[class].pop() {
            if let Block::Own(heap) = &block {
                state.kept -= heap.layout.size();
            }
            return block;
        }
        if self.0.arena.layout.size() - state.carved >= size {
            // SAFETY: `carved + size` is at most the arena's size.
            let ptr = unsafe { self.0.arena.ptr.add(state.carved) };
            state.carved += size;
            return Block::Arena(ptr);
        }
        Block::Own(Heap::new(size, ALIGN))
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        let state = &mut *self.pool.0.state.borrow_mut();
        if let Block::Own(heap) = &block {
            if state.kept + heap.layout.size() > KEPT_MAX {
                return;
            }
            state.kept += heap.layout.size();
        }
        state.free[self.class].push(block);
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} bytes of arena)", self.0.arena.layout.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_and_used_again() {
        let pool = Pool::new(64 << 10);
        let first = pool.take(5000);
        assert!(first.slice(0, 4096).is_aligned(ALIGN));
        assert_eq!(first.registered(), Some(ARENA));
        let address = first.segments()[0].ptr();
        drop(first);
        assert_eq!(pool.take(8192).segments()[0].ptr(), address);
    }

    #[test]
    fn a_full_arena_is_no_end() {
        let pool = Pool::new(8 << 10);
        let taken: Vec<Buf> = (0..8).map(|_| pool.take(4096)).collect();
        assert_eq!(taken.iter().filter(|buf| buf.registered().is_some()).count(), 2);
        for (at, buf) in taken.iter().enumerate() {
            buf.fill(at as u8);
        }
        for (at, buf) in taken.iter().enumerate() {
            assert_eq!(buf.to_vec(), vec![at as u8; 4096], "no two share memory");
        }
    }

    #[test]
    fn a_block_outlives_the_handle_of_its_pool() {
        let pool = Pool::new(4096);
        let buf = pool.take(100);
        drop(pool);
        buf.fill(1);
        assert_eq!(buf.to_vec(), [1; 100]);
    }
}
