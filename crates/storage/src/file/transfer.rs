//! Moves bytes between memory and a file, all of them: the only place that sees a short count.

use std::any::Any;
use std::rc::Rc;

use block::{Buf, Errno, Error, Result};
use runtime::{Fd, Handle, Io};

/// Short counts in a row without a step forward after which we believe that there will be none.
const STALLS_MAX: u32 = 16;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    pub(super) fn name(self) -> &'static str {
        match self {
            Direction::Read => "read",
            Direction::Write => "write",
        }
    }
}

/// Moves all of `buf` from or to byte `at`, going on after a short count at a multiple of `step` bytes.
///
/// EINTR repeats at once (FAILURES C.4). A count of 0 is EIO: the file ends before the disk does, or takes no more.
pub(super) async fn transfer(
    handle: &Handle,
    fd: &Rc<Fd>,
    direction: Direction,
    at: u64,
    buf: &Buf,
    step: u64,
    keep: Option<Rc<dyn Any>>,
) -> Result<()> {
    let mut done = 0;
    let mut stalls = 0;
    while done < buf.len() {
        let rest = if done == 0 { buf.clone() } else { buf.slice(done, buf.len() - done) };
        let (fd, at) = (fd.clone(), at + done as u64);
        let left = rest.len();
        let io = match direction {
            Direction::Read => Io::Read { fd, at, buf: rest },
            Direction::Write => Io::Write { fd, at, buf: rest },
        };
        match handle.start(io, keep.clone()).await {
            Ok(0) => {
                return Err(Error::new(Errno::EIO, format!("no byte moved at {at}, where the file ends")));
            }
            Ok(moved) if moved > left as u64 => {
                return Err(Error::new(
                    Errno::EIO,
                    format!("{moved} bytes moved of {left} (a bug in the kernel)"),
                ));
            }
            Ok(moved) if moved == left as u64 => return Ok(()),
            Ok(moved) => {
                let forward = moved - moved % step;
                done += forward as usize;
                stalls = if forward == 0 { stalls + 1 } else { 0 };
                if stalls == STALLS_MAX {
                    return Err(Error::new(
                        Errno::EIO,
                        format!("only {moved} bytes moved at {at}, again and again"),
                    ));
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::new(errno, "")),
        }
    }
    Ok(())
}
