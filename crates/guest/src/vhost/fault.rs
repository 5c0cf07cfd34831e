//! Shared memory whose file a peer may cut short: touching what is gone is survived, and known afterwards.
//!
//! The kernel answers an access behind the end of a mapped file with SIGBUS, which ends a process. The file behind a
//! guest's memory is in the hands of the front end, so that one front end could end all that a process serves. A
//! handler for the whole process puts zeroes in the place of the page that is gone and marks the mapping; who uses
//! the mapping looks at the mark.

use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t};

/// Mappings in use at one time, in the whole process. The handler cannot wait for a lock, so the table has fixed
/// places.
const PLACES: usize = 4096;

struct Place {
    taken: AtomicBool,
    /// First byte of the mapping; 0 while the rest is not to be looked at.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes of a page of the file: the least that can be replaced.
    page: AtomicUsize,
    broken: AtomicBool,
}

static TABLE: [Place; PLACES] = [const {
    Place {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    }
}; PLACES];

/// How often memory that is gone was replaced.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// How often memory that is gone was replaced, in the whole process.
pub(crate) fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// What SIGBUS did before us; set before our handler is.
static BEFORE: OnceLock<sigaction> = OnceLock::new();

/// Why a mapping cannot be watched.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{PLACES} regions of guest memory are mapped already, which is as many as can be")]
    Full,
    #[error("no handler for SIGBUS can be installed")]
    Handler,
}

/// A mapping under watch. Given up before the memory is unmapped.
pub(crate) struct Watched {
    place: &'static Place,
}

impl Watched {
    /// Watches a mapping: `len` bytes from `start` on, of a file with pages of `page` bytes.
    pub(crate) fn new(start: usize, len: usize, page: usize) -> Result<Watched, Refusal> {
        install()?;
        let is_free = |place: &&Place| {
            place.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let place = TABLE.iter().find(is_free).ok_or(Refusal::Full)?;
        place.end.store(start + len, Ordering::Relaxed);
        place.page.store(page, Ordering::Relaxed);
        place.broken.store(false, Ordering::Relaxed);
        place.start.store(start, Ordering::Release);
        Ok(Watched { place })
    }

    /// Whether bytes of it were gone when somebody looked for them. What was read there were zeroes that the guest
    /// never wrote.
    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        self.place.broken.load(Ordering::Relaxed)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.place.start.store(0, Ordering::Release);
        self.place.taken.store(false, Ordering::Release);
    }
}

fn install() -> Result<(), Refusal> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    let installed = *INSTALLED.get_or_init(|| {
        // SAFETY: an all-zero sigaction is a valid value of that C structure.
        let mut before: sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: asks for the present action, which is written to a local variable.
        if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut before) } != 0 {
            return false;
        }
        BEFORE.get_or_init(|| before);
        // SAFETY: as above.
        let mut ours: sigaction = unsafe { std::mem::zeroed() };
        ours.sa_sigaction = on_sigbus as *const () as usize;
        // On the alternate stack, as the standard library's own handler: the stack may be what has run out.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does only what a handler may.
        unsafe { libc::sigaction(libc::SIGBUS, &ours, ptr::null_mut()) == 0 }
    });
    if installed { Ok(()) } else { Err(Refusal::Handler) }
}

/// Runs on whatever thread touched memory that is gone, in the middle of that: no lock, no allocation.
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler with SA_SIGINFO; for SIGBUS it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == libc::BUS_ADRERR && replace(address) {
        return;
    }
    pass_on(signal, info, context);
}

/// Puts zeroes where the page around this address was, if it is of ours.
fn replace(address: usize) -> bool {
    for place in &TABLE {
        let start = place.start.load(Ordering::Acquire);
        if start == 0 || address < start || address >= place.end.load(Ordering::Relaxed) {
            continue;
        }
        let page = place.page.load(Ordering::Relaxed);
        let at = address & !(page - 1);
        let (access, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        // SAFETY: the page lies within a mapping of ours, which starts at a page, and which is not unmapped while
        // somebody reads or writes it, which is what is going on. A system call and nothing else.
        let mapped = unsafe { libc::mmap(at as *mut c_void, page, access, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        place.broken.store(true, Ordering::Relaxed);
        COUNT.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    false
}

/// Does what would have been done without us.
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let before = BEFORE.get();
    let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // SAFETY: system calls that a handler may make. The signal is blocked until the handler returns, and ends
        // the process then.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    let has_info = before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
    if has_info {
        // SAFETY: whoever installed it with SA_SIGINFO promised this signature.
        let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
            unsafe { std::mem::transmute(handler) };
        handler(signal, info, context);
    } else {
        // SAFETY: whoever installed it without SA_SIGINFO promised this signature.
        let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
        handler(signal);
    }
}
