//! Receives a client's requests and hands them to the disk, from its last option to its end.

use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use block::{Buf, Pool};

use super::connection::Connection;
use super::negotiation::{Agreed, Negotiation, Progress};
use super::peer::{End, Peer, Phase};
use super::request::{Asked, Terms, Verdict, judge};
use super::stream::{LargeBuffers, Stream};
use super::wire::PAYLOAD_LEN_MAX;

/// Bytes received at a time during the handshake.
const HANDSHAKE_LEN: usize = 4096;
/// Memory starts at the same place within this many bytes as the disk's bytes that it holds, so that all but the
/// ends of a request that is not aligned can be read and written directly.
const PLACE: u64 = 4096;
/// Memory for the answer to a block status request: one that may tell many extents, and one that tells one.
const STATUS_LEN: usize = 64 << 10;
const STATUS_ONE_LEN: usize = 4096;

/// Agrees with a client on how to go on, and on what; with the bytes that it sent ahead. `None` where it wants to
/// end here.
pub(crate) async fn negotiate(
    peer: &Peer,
    mut negotiation: Negotiation,
) -> Result<Option<(Agreed, Vec<u8>)>, End> {
    let mut out = Vec::new();
    negotiation.greet(&mut out);
    let buf = peer.handle().pool().take(HANDSHAKE_LEN);
    let mut received = Vec::new();
    loop {
        send(peer, &mut out).await?;
        let count = loop {
            if let Some(count) = peer.receive(&buf).await? {
                break count;
            }
        };
        received.resize(count, 0);
        buf.get(0, &mut received);
        let mut input = &received[..];
        loop {
            let progress = negotiation.feed(&mut input, &mut out)?;
            send(peer, &mut out).await?;
            match progress {
                Progress::Starved => break,
                Progress::Answered => {}
                Progress::Abort => return Ok(None),
                Progress::Transmit(agreed) => return Ok(Some((agreed, input.to_vec()))),
            }
        }
    }
}

async fn send(peer: &Peer, out: &mut Vec<u8>) -> Result<(), End> {
    if !out.is_empty() {
        peer.send(&Buf::from_bytes(out)).await.map_err(End::Failed)?;
        out.clear();
    }
    Ok(())
}

/// Serves a client until its end, and returns when none of its requests is out.
pub(crate) async fn transmit(
    connection: &Rc<Connection>,
    agreed: &Agreed,
    received: Vec<u8>,
    large_buffers: LargeBuffers,
) -> End {
    let peer = connection.peer();
    peer.enter(Phase::Transmission);
    let Agreed { style, allocation, size, .. } = *agreed;
    let terms = Terms { style, allocation, size, read_only: connection.disk().limits().read_only };
    let mut stream = Stream::new(peer.clone(), large_buffers, &received);
    drop(received);
    let end = peer
        .until_told(async {
            let mut giving_up = pin!(give_up_when_alone(connection));
            let mut receiving = pin!(receive_requests(connection, terms, &mut stream));
            std::future::poll_fn(|cx| {
                if let Poll::Ready(never) = giving_up.as_mut().poll(cx) {
                    match never {}
                }
                match receiving.as_mut().poll(cx) {
                    Poll::Ready(Ok(never)) => match never {},
                    Poll::Ready(Err(end)) => Poll::Ready(end),
                    Poll::Pending => Poll::Pending,
                }
            })
            .await
        })
        .await;
    peer.is_receiving.set(false);
    let was_busy = !stream.is_empty() || !connection.is_settled();
    peer.enter(Phase::Leaving);
    match end {
        // "Either side MAY initiate a hard disconnect if it detects a violation by the other party".
        End::Request(_) | End::Handshake(_) | End::Failed(_) | End::Dropped(_) => {
            connection.mute();
            peer.cut();
            connection.give_up().await;
        }
        End::Closed | End::Truncated | End::Disconnected => connection.give_up().await,
        // The client is still there: how long its requests are held is up to who ends the disk.
        End::Drained => {}
    }
    connection.settled().await;
    // One that left in order but did not take its last answers has not had them.
    let end = peer.dropped_for().map_or(end, End::Dropped);
    if peer.is_tcp && was_busy && end == End::Drained {
        // Closing a TCP connection on which there is something unread resets it, and what the client has not read
        // yet is lost with it. So it is told the end first, and heard out.
        peer.enter(Phase::Leaving);
        peer.hang_up();
        linger(&mut stream).await;
    }
    end
}

/// Hears a client out; how long is limited by [`super::peer::Patience::leave`].
async fn linger(stream: &mut Stream) {
    if let Err(end) = stream.skip(u64::MAX).await {
        tracing::trace!(%end, "heard out");
    }
}

/// Ends what is held for a client that sends nothing more. Whoever receives from it may not get to see that: it waits
/// for room or memory, which those requests have.
async fn give_up_when_alone(connection: &Connection) -> std::convert::Infallible {
    loop {
        connection.peer().hung_up().await;
        connection.give_up().await;
    }
}

/// Takes requests one after the other, for ever.
async fn receive_requests(
    connection: &Rc<Connection>,
    terms: Terms,
    stream: &mut Stream,
) -> Result<std::convert::Infallible, End> {
    loop {
        while let Some(header) = stream.header(terms.style) {
            let (cookie, at) = (header.cookie, header.at);
            match judge(&header, terms) {
                Verdict::Serve(asked) => serve(connection, stream, cookie, asked).await?,
                Verdict::Nothing => {
                    connection.room().await;
                    connection.done(cookie, at);
                }
                Verdict::Refuse { errno, why, payload } => {
                    stream.skip(payload).await?;
                    connection.room().await;
                    connection.refuse(cookie, at, errno, why);
                }
                Verdict::Disconnect => return Err(End::Disconnected),
                Verdict::Drop(violation) => return Err(End::Request(violation)),
            }
        }
        stream.fill().await?;
    }
}

/// Takes one request: first a place and memory for it, then its payload, then the disk gets it. Whatever ends the
/// connection before that, the disk has not heard of it.
async fn serve(
    connection: &Rc<Connection>,
    stream: &mut Stream,
    cookie: u64,
    asked: Asked,
) -> Result<(), End> {
    connection.room().await;
    let peer = connection.peer();
    match asked {
        Asked::Read { span } | Asked::Write { span, .. } => {
            let place = Place::of(span.at(), span.len() as usize);
            let memory = peer.account.take(place.footprint()).await;
            let buf = place.take(peer.handle().pool());
            if let Asked::Write { .. } = asked {
                stream.payload(&buf).await?;
            }
            connection.submit(cookie, asked, Some(buf), Some(memory));
        }
        Asked::Status { one, .. } => {
            let len = if one { STATUS_ONE_LEN } else { STATUS_LEN };
            let memory = peer.account.take(len).await;
            connection.submit(cookie, asked, None, Some(memory));
        }
        Asked::Flush | Asked::Trim { .. } | Asked::WriteZeroes { .. } | Asked::Cache { .. } => {
            connection.submit(cookie, asked, None, None);
        }
    }
    Ok(())
}

/// Where in a block of memory the bytes of a request go.
struct Place {
    skip: usize,
    len: usize,
}

impl Place {
    fn of(at: u64, len: usize) -> Place {
        let skip = (at % PLACE) as usize;
        // Not where that would take more memory than the longest request that is aligned.
        let fits = Pool::footprint(skip + len) <= PAYLOAD_LEN_MAX as usize;
        Place { skip: if fits { skip } else { 0 }, len }
    }

    /// Bytes of memory that it takes up.
    fn footprint(&self) -> usize {
        Pool::footprint(self.skip + self.len)
    }

    fn take(&self, pool: &Pool) -> Buf {
        let buf = pool.take(self.skip + self.len);
        if self.skip == 0 { buf } else { buf.slice(self.skip, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_as_the_disk_is() {
        let pool = Pool::new(0);
        for (at, len) in [(0, 4096), (512, 512), (4095, 3), (1 << 40 | 4094, 1 << 20), (1, (32 << 20) - 1)] {
            let place = Place::of(at, len);
            let buf = place.take(&pool);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.segments()[0].ptr().addr() as u64 % 4096, at % 4096);
            assert!(place.footprint() >= len);
        }
    }

    #[test]
    fn no_request_takes_more_memory_than_the_longest_one_that_is_aligned() {
        assert_eq!(Place::of(1, 32 << 20).footprint(), 32 << 20);
        assert_eq!(Place::of(4095, (32 << 20) - 1).footprint(), 32 << 20);
        assert_eq!(Place::of(0, 1).footprint(), 4096);
    }
}
