//! Event channels: how domains ring for each other.

use std::os::fd::OwnedFd;

use block::Errno;

use crate::Domain;

/// A domain's end of an event channel (`evtchn_port_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port(pub u32);

/// Where ends of event channels come from.
pub trait Events {
    /// Binds an end of ours to the end that a domain has offered us.
    ///
    /// # Errors
    /// If the domain has offered no such end, or somebody else has it.
    fn bind(&self, domain: Domain, remote: Port) -> Result<Box<dyn Channel>, Errno>;
}

/// Our end of an event channel; dropping it unbinds it, and then another process can bind it anew.
pub trait Channel {
    /// The number of our end.
    fn port(&self) -> Port;

    /// A descriptor that becomes readable when the other side has rung. Only to be waited for: reading is for
    /// [`Channel::take`].
    ///
    /// # Errors
    /// If there can be no more descriptors.
    fn descriptor(&self) -> Result<OwnedFd, Errno>;

    /// Takes note that the other side has rung, if it has, and lets it ring again. Does not wait.
    ///
    /// # Errors
    /// If the device fails, or has lost events.
    fn take(&self) -> Result<(), Errno>;

    /// Rings for the other side.
    ///
    /// # Errors
    /// If the channel is gone.
    fn notify(&self) -> Result<(), Errno>;
}
