//! The channel from us to the front end (vhost-user, "Back-end message types"): that the configuration has changed.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};

/// VHOST_USER_SET_BACKEND_REQ_FD, a request of the front end.
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, a request of the back end.
const CONFIG_CHANGE: u32 = 2;
/// The version of the protocol, in the flags of each message; no reply is asked for.
const VERSION: u32 = 1;
/// request, flags and size of the payload, 32 bits each in the byte order of the host.
const HEADER_LEN: usize = 12;
/// A message has at most so many descriptors with it, and the channel's has one.
const FDS_MAX: usize = 32;

/// What the next message of a front end is, as far as it can be told before it is taken.
#[derive(Debug, Default)]
pub(super) struct Preview {
    /// The message hands over this end of a channel.
    pub(super) channel: Option<OwnedFd>,
    request: u32,
    /// The front end wants to be told whether it worked (REPLY_ACK).
    wants_reply: bool,
}

impl Preview {
    /// Whether the front end is told if the message is refused. Those that have a reply of their own are not
    /// acknowledged besides, so that there would be nothing.
    pub(super) fn is_acknowledged(&self) -> bool {
        self.wants_reply && ACKNOWLEDGED.contains(&self.request)
    }
}

/// The requests without a reply of their own: SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_VRING_NUM,
/// SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, SET_PROTOCOL_FEATURES,
/// SET_VRING_ENABLE, SET_BACKEND_REQ_FD, SET_CONFIG, SET_INFLIGHT_FD, RESET_DEVICE, ADD_MEM_REG and REM_MEM_REG.
const ACKNOWLEDGED: &[u32] = &[2, 3, 4, 5, 8, 9, 10, 12, 13, 14, 16, 18, 21, 25, 32, 34, 37, 38];

/// Waits for the next message and looks at it without taking it.
///
/// The library that takes it keeps the channel's descriptor to itself and has no message that says the configuration
/// has changed, so a copy of the descriptor is made here. What is no message is left for the library to refuse.
pub(super) fn preview(socket: BorrowedFd<'_>) -> rustix::io::Result<Preview> {
    let mut header = [0; HEADER_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut header)];
        match rustix::net::recvmsg(
            socket,
            &mut parts,
            &mut control,
            RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    // The other descriptors are copies too, and closed again here.
    let mut fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| {
            let RecvAncillaryMessage::ScmRights(fds) = message else { return None };
            Some(fds.collect::<Vec<_>>())
        })
        .flatten()
        .collect();
    if received.bytes < HEADER_LEN {
        return Ok(Preview::default());
    }
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let request = word(0);
    let channel = if request == SET_BACKEND_REQ_FD { fds.pop() } else { None };
    Ok(Preview { channel, request, wants_reply: word(4) & NEED_REPLY != 0 })
}

/// The flag of a message whose sender wants to be told whether it worked.
const NEED_REPLY: u32 = 1 << 3;

/// Tells the front end that the configuration space has changed. False if it could not be told: it does not read, or
/// is gone. It never waits.
pub(super) fn tell_of_change(channel: impl AsFd) -> bool {
    let mut message = [0; HEADER_LEN];
    message[..4].copy_from_slice(&CONFIG_CHANGE.to_ne_bytes());
    message[4..8].copy_from_slice(&VERSION.to_ne_bytes());
    let sent = rustix::net::send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    sent == Ok(HEADER_LEN)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};

    use super::*;

    fn send(socket: &UnixStream, request: u32, flags: u32, fds: &[BorrowedFd<'_>]) {
        let mut bytes = Vec::new();
        for word in [request, flags, 0] {
            bytes.extend_from_slice(&u32::to_ne_bytes(word));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let parts = [std::io::IoSlice::new(&bytes)];
        let sent = rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::empty());
        assert_eq!(sent, Ok(12));
    }

    #[test]
    fn the_channel_is_copied_and_the_message_is_still_there() {
        let (front, back) = UnixStream::pair().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        send(&front, 21, 1 | 8, &[theirs.as_fd()]);
        drop(theirs);
        let preview = preview(back.as_fd()).unwrap();
        assert!(preview.is_acknowledged());
        let mut taken = [0; 12];
        (&back).read_exact(&mut taken).unwrap();
        assert_eq!(taken[..4], 21u32.to_ne_bytes());
        assert!(tell_of_change(preview.channel.expect("a copy of the descriptor")));
        let mut told = Vec::new();
        ours.read_to_end(&mut told).unwrap();
        // The header of vhost-user: request 2, version 1 and no flag, no payload.
        assert_eq!(told, [2u32, 1, 0].map(u32::to_ne_bytes).concat());
    }

    #[test]
    fn other_messages_and_half_messages_are_left_alone() {
        let (mut front, back) = UnixStream::pair().unwrap();
        send(&front, 5, 1, &[back.as_fd(), back.as_fd()]);
        let seen = preview(back.as_fd()).unwrap();
        assert!(seen.channel.is_none() && !seen.is_acknowledged());
        (&back).read_exact(&mut [0; 12]).unwrap();
        front.write_all(&[21]).unwrap();
        assert!(preview(back.as_fd()).unwrap().channel.is_none());
        drop(front);
        (&back).read_exact(&mut [0; 1]).unwrap();
        assert!(preview(back.as_fd()).unwrap().channel.is_none(), "the end of the stream");
    }

    #[test]
    fn what_has_a_reply_of_its_own_is_not_acknowledged() {
        let (front, back) = UnixStream::pair().unwrap();
        // GET_VRING_BASE and GET_INFLIGHT_FD with NEED_REPLY, SET_VRING_NUM with it and without.
        for (request, flags, told) in [(11, 9, false), (31, 9, false), (8, 9, true), (8, 1, false)] {
            send(&front, request, flags, &[]);
            assert_eq!(preview(back.as_fd()).unwrap().is_acknowledged(), told, "{request} {flags}");
            (&back).read_exact(&mut [0; 12]).unwrap();
        }
    }

    #[test]
    fn a_front_end_that_does_not_read_holds_up_nobody() {
        let (_front, back) = UnixStream::pair().unwrap();
        let told = (0..1_000_000).take_while(|_| tell_of_change(&back)).count();
        assert!(told < 1_000_000, "the socket is full at last");
    }
}
