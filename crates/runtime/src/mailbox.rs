//! Messages to a disk's thread from other threads: the main thread's signals, later the control plane.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

struct State<T> {
    queue: VecDeque<T>,
    waker: Option<Waker>,
    /// Nobody receives any more.
    is_closed: bool,
}

/// The receiving end; for one task. When it is dropped, so are the messages in it and those that come later.
pub struct Mailbox<T>(Arc<Mutex<State<T>>>);

/// A sending end, for any thread.
pub struct Sender<T>(Arc<Mutex<State<T>>>);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender(self.0.clone())
    }
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Mailbox(Arc::new(Mutex::new(State { queue: VecDeque::new(), waker: None, is_closed: false })))
    }
}

impl<T> Mailbox<T> {
    /// A sending end.
    pub fn sender(&self) -> Sender<T> {
        Sender(self.0.clone())
    }

    /// The next message, waiting for it.
    pub async fn receive(&mut self) -> T {
        std::future::poll_fn(|cx| {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match state.queue.pop_front() {
                Some(message) => Poll::Ready(message),
                None => {
                    state.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        let left = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.is_closed = true;
            std::mem::take(&mut state.queue)
        };
        // Without the lock: whoever waits for an answer to one of them may send another.
        drop(left);
    }
}

impl<T> Sender<T> {
    /// Leaves a message and wakes the receiver.
    pub fn send(&self, message: T) {
        let waker = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if state.is_closed {
                drop(state);
                return;
            }
            state.queue.push_back(message);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn who_waits_for_an_answer_hears_that_nobody_receives() {
        let mailbox = Mailbox::default();
        let sender = mailbox.sender();
        let (before, answer_before) = mpsc::channel::<()>();
        sender.send(before);
        drop(mailbox);
        assert!(answer_before.recv().is_err());
        let (after, answer_after) = mpsc::channel::<()>();
        sender.send(after);
        assert!(answer_after.recv().is_err());
    }
}
