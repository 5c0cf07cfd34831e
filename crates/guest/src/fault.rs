//! Shared memory whose file a peer may cut short: touching what is gone is survived, and known afterwards.
//!
//! The kernel answers an access behind the end of a mapped file with SIGBUS, which ends a process. The file behind a
//! guest's memory is in the hands of the front end, so that one front end could end all that a process serves. A
//! handler for the whole process marks the mapping and puts zeroes in the place of all of it; who uses the mapping looks
//! at the mark. (All of it, since a page at a time each would become a mapping of its own, and their number is limited:
//! vm.max_map_count.)

use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use libc::{c_int, c_void, sigaction, siginfo_t};

/// Mappings in use at one time, in the whole process. The handler cannot wait for a lock, so the table has fixed
/// places.
const PLACES: usize = 4096;

struct Place {
    taken: AtomicBool,
    /// Odd while the bounds are being changed, and another number afterwards: a handler on another thread must not see
    /// one bound of the old and one of the new.
    version: AtomicUsize,
    /// First byte of the mapping, and the byte behind it; both 0 where there is none.
    start: AtomicUsize,
    end: AtomicUsize,
    broken: AtomicBool,
}

static TABLE: [Place; PLACES] = [const {
    Place {
        taken: AtomicBool::new(false),
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    }
}; PLACES];

impl Place {
    /// For whoever has taken it.
    fn set_bounds(&self, start: usize, end: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The mapping that is here, as it was at one moment; `None` where it is being changed. Waits for nobody: the mapping
    /// that somebody is using while he asks is not being changed.
    fn bounds(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let (start, end) = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let is_whole = version.is_multiple_of(2) && version == self.version.load(Ordering::Relaxed);
        is_whole.then_some((start, end))
    }
}

/// How many of the mappings are broken.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// How many mappings of the whole process are broken and still in use.
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
    /// Watches a mapping: `len` bytes from `start` on, whole pages of its file.
    pub(crate) fn new(start: usize, len: usize) -> Result<Watched, Refusal> {
        install()?;
        let is_free = |place: &&Place| {
            place.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let place = TABLE.iter().find(is_free).ok_or(Refusal::Full)?;
        place.set_bounds(start, start + len);
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
        self.place.set_bounds(0, 0);
        if self.place.broken.swap(false, Ordering::Relaxed) {
            COUNT.fetch_sub(1, Ordering::Relaxed);
        }
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

/// Puts zeroes in the place of the mapping with this address, if it is of ours.
fn replace(address: usize) -> bool {
    let holds = |(start, end): &(usize, usize)| (*start..*end).contains(&address);
    let find = |place: &'static Place| place.bounds().filter(holds).map(|bounds| (place, bounds));
    let Some((place, (start, end))) = TABLE.iter().find_map(find) else { return false };
    // Before there are zeroes that somebody might believe.
    if !place.broken.swap(true, Ordering::Relaxed) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: exactly a mapping of ours, which is not unmapped while somebody reads or writes it, and that is what is
    // going on: its bounds stay as they are. What the kernel does with it goes on in the pages that it has pinned. A
    // system call and nothing else.
    let mapped = unsafe { libc::mmap(start as *mut c_void, end - start, access, flags, -1, 0) };
    mapped != libc::MAP_FAILED
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
