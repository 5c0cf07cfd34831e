//! Messages to a disk's thread from other threads: the main thread's signals, later the control plane.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

struct State<T> {
    queue: VecDeque<T>,
    waker: Option<Waker>,
}

/// The receiving end; for one task.
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
        Mailbox(Arc::new(Mutex::new(State { queue: VecDeque::new(), waker: None })))
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

impl<T> Sender<T> {
    /// Leaves a message and wakes the receiver.
    pub fn send(&self, message: T) {
        let waker = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.queue.push_back(message);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
