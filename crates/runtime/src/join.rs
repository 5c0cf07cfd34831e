//! Waiting for several futures at once, for all of them: none is dropped because another failed.

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

/// A future on the heap, for the edges between layers.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Runs all of them side by side; their results in their order, when the last is done.
pub async fn join_all<T>(futures: Vec<BoxFuture<'_, T>>) -> Vec<T> {
    enum Part<'a, T> {
        Running(BoxFuture<'a, T>),
        Done(T),
    }
    let mut parts: Vec<Part<'_, T>> = futures.into_iter().map(Part::Running).collect();
    std::future::poll_fn(|cx| {
        let mut running = 0;
        for part in &mut parts {
            if let Part::Running(future) = part {
                match future.as_mut().poll(cx) {
                    Poll::Ready(result) => *part = Part::Done(result),
                    Poll::Pending => running += 1,
                }
            }
        }
        if running == 0 { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    parts
        .into_iter()
        .filter_map(|part| match part {
            Part::Done(result) => Some(result),
            Part::Running(_) => None, // there is none: the loop above ended
        })
        .collect()
}
