//! Event channels between domains and a back end, as pairs of eventfds.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use block::Errno;
use rustix::event::{EventfdFlags, eventfd};

use super::{Deed, Shared};
use crate::Domain;
use crate::events::{Channel, Events, Port};

/// A channel that a domain has offered.
pub(super) struct Line {
    /// Rung by the back end.
    pub(super) domains: Arc<OwnedFd>,
    /// Rung by the domain, where a back end has bound it.
    backends: Option<Arc<OwnedFd>>,
}

impl Line {
    pub(super) fn new() -> Line {
        Line { domains: Arc::new(bell(0)), backends: None }
    }

    pub(super) fn is_bound(&self) -> bool {
        self.backends.is_some()
    }

    /// The back end is gone.
    pub(super) fn unbind(&mut self) {
        self.backends = None;
    }

    /// Rings for the back end. Nobody hears it if none is there.
    pub(super) fn ring(&self) {
        if let Some(bell) = &self.backends {
            ring(bell);
        }
    }
}

/// A bell that has been rung so often.
fn bell(rung: u32) -> OwnedFd {
    eventfd(rung, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

pub(super) fn ring(bell: &OwnedFd) {
    match rustix::io::write(bell, &1_u64.to_ne_bytes()) {
        // EAGAIN: it has been rung 2^64 - 2 times, and still rings.
        Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
        Err(errno) => panic!("an eventfd: {errno}"),
    }
}

/// How often it has been rung since this was last asked.
pub(super) fn rung(bell: impl AsFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(bell, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        Err(errno) => panic!("an eventfd: {errno}"),
    }
}

/// Implements [`Events`].
pub(super) struct Exchange {
    world: Arc<Shared>,
}

impl Exchange {
    pub(super) fn new(world: Arc<Shared>) -> Exchange {
        Exchange { world }
    }
}

impl Events for Exchange {
    fn bind(&self, domain: Domain, remote: Port) -> Result<Box<dyn Channel>, Errno> {
        let mut state = self.world.lock();
        state.call(Deed::Bind)?;
        let body = state.domains.get_mut(&domain).ok_or(Errno::ESRCH)?;
        let birth = body.birth;
        let line = body.ports.get_mut(&remote.0).filter(|line| !line.is_bound()).ok_or(Errno::EINVAL)?;
        // "We may have lost notifications on the remote unbound port. Fix that up here by conservatively always setting
        // a notification on the local port" (evtchn_bind_interdomain of Xen).
        let backends = Arc::new(bell(1));
        line.backends = Some(backends.clone());
        let domains = line.domains.clone();
        state.counts.bound += 1;
        state.ends += 1;
        let port = Port(state.ends);
        state.bells.insert(port.0, domains.clone());
        drop(state);
        let world = self.world.clone();
        Ok(Box::new(End { world, port, domain, birth, remote, backends, domains }))
    }
}

/// A back end's end of a channel.
struct End {
    world: Arc<Shared>,
    port: Port,
    domain: Domain,
    birth: u64,
    remote: Port,
    backends: Arc<OwnedFd>,
    domains: Arc<OwnedFd>,
}

impl Channel for End {
    fn port(&self) -> Port {
        self.port
    }

    fn descriptor(&self) -> Result<OwnedFd, Errno> {
        self.backends.try_clone().map_err(|error| Errno::from_std(&error))
    }

    fn take(&self) -> Result<(), Errno> {
        rung(&*self.backends);
        Ok(())
    }

    fn notify(&self) -> Result<(), Errno> {
        // Xen drops silently what is sent to a port that is not connected any more; here nobody listens.
        ring(&self.domains);
        Ok(())
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.world.lock();
        state.bells.remove(&self.port.0);
        let Some(body) = state.body(self.domain, self.birth) else { return };
        let Some(line) = body.ports.get_mut(&self.remote.0) else { return };
        let is_ours = line.backends.as_ref().is_some_and(|bell| Arc::ptr_eq(bell, &self.backends));
        if is_ours {
            line.backends = None;
            state.counts.bound -= 1;
        }
    }
}
