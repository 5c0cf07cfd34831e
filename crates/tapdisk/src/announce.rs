//! What `tapdisk serve` says when it serves: to people, and to programs that wait for its last line.

use std::io::Write;

use disk::Disk;

use crate::size;

/// Where it is served.
pub(crate) struct Places {
    /// To NBD clients.
    pub(crate) uris: Vec<String>,
    /// To the front ends of guests.
    pub(crate) sockets: Vec<String>,
    /// To guests of Xen, and how each of these is ended.
    pub(crate) xen: Vec<(String, String)>,
}

/// Says what is served, how and where, and how to reach it.
pub(crate) fn announce(disk: &Disk, how: &str, places: &Places) {
    let Places { uris, sockets, xen } = places;
    let mut text = format!("Serving {}: {}, {how}", disk.name(), size::show(disk.size()));
    if disk.limits().read_only {
        text.push_str(", read-only");
    }
    for uri in uris {
        text.push_str(&format!("\n    at  {uri}"));
    }
    if let Some(uri) = uris.first() {
        text.push_str(&format!("\n    try nbdinfo '{uri}'\n     or qemu-img info '{uri}'"));
    }
    for socket in sockets {
        text.push_str(&format!("\n    at  {socket} (vhost-user-blk)"));
    }
    if let Some(socket) = sockets.first() {
        // In the words of QEMU, where a comma in a value is written twice.
        let socket = socket.replace(',', ",,");
        text.push_str(&format!(
            "\n    try qemu-system-x86_64 … -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \
             -machine memory-backend=mem \\\n        -chardev socket,id=disk,path={socket},reconnect-ms=500 \
             -device vhost-user-blk-pci,chardev=disk"
        ));
    }
    for (guest, end) in xen {
        text.push_str(&format!("\n    to  {guest}\n    end {end}"));
    }
    if !disk.size().is_multiple_of(512) {
        text.push_str("\nNote: the size is no multiple of 512 bytes: guests see less of it, or refuse it.");
    }
    if let Some(error) = disk.poison() {
        text.push_str(&format!(
            "\nPOISONED: {error}.\n    What was written before may be lost. Flushes and writes fail until tapdisk is \
             stopped in order (Ctrl-C)\n    and started anew; look at the data first."
        ));
    }
    text.push_str("\nCtrl-C ends it.");
    // Nobody may be reading, and that is no reason not to serve.
    if let Err(error) = writeln!(std::io::stdout(), "{text}") {
        tracing::debug!(%error, "standard output is closed");
    }
}
