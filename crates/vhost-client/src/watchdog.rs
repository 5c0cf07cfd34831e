//! Who hangs up on a back end that answers a message too late: the `vhost` crate waits for ever.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Watches one socket, on a thread of its own.
pub(crate) struct Watchdog {
    /// When the answer is due that is waited for; none while nothing is.
    due: Option<Sender<Option<Instant>>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub(crate) fn over(socket: UnixStream) -> Watchdog {
        let (due, dues) = channel();
        let thread = std::thread::spawn(move || watch(&dues, &socket));
        Watchdog { due: Some(due), thread: Some(thread) }
    }

    /// From now on an answer is waited for, or it is not.
    pub(crate) fn expect(&self, patience: Option<Duration>) {
        if let Some(due) = &self.due {
            due.send(patience.map(|patience| Instant::now() + patience)).expect("it listens to the end");
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.due = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the watchdog has panicked");
        }
    }
}

fn watch(dues: &Receiver<Option<Instant>>, socket: &UnixStream) {
    let mut due = None;
    loop {
        let news = match due {
            None => dues.recv().map_err(RecvTimeoutError::from),
            Some(due) => dues.recv_timeout(Instant::saturating_duration_since(&due, Instant::now())),
        };
        match news {
            Ok(next) => due = next,
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("the back end leaves a message unanswered for too long");
                if let Err(error) = socket.shutdown(Shutdown::Both) {
                    eprintln!("and cannot be hung up on: {error}");
                }
                due = None;
            }
        }
    }
}
