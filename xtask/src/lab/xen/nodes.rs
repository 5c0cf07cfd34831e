//! A disk's two ends in xenstore, as a toolstack writes them: scripts for dom0.

use anyhow::{Result, bail};

/// The number that xenstore knows a disk by: major 202, 16 minors each (xen/docs/man/xen-vbd-interface.7).
pub(crate) fn number(disk: &str) -> Result<u32> {
    match disk.strip_prefix("xvd").map(str::as_bytes) {
        Some([letter @ b'a'..=b'p']) => Ok((202 << 8) | (u32::from(letter - b'a') << 4)),
        _ => bail!("`{disk}` is not between xvda and xvdp"),
    }
}

/// The folders of the back end and of the front end.
pub(crate) fn folders(domain: u32, disk: &str, kind: &str) -> Result<[String; 2]> {
    let device = number(disk)?;
    Ok([
        format!("/local/domain/0/backend/{kind}/{domain}/{device}"),
        format!("/local/domain/{domain}/device/vbd/{device}"),
    ])
}

/// Writes both ends' nodes: all at once, since a back end that meets a front end without a state takes it for dead.
pub(crate) fn write(domain: u32, disk: &str, kind: &str, more: &[(&str, &str)]) -> Result<String> {
    let [back, front] = folders(domain, disk, kind)?;
    let device = number(disk)?;
    let more: String = more.iter().map(|(name, value)| format!(" {back}/{name} '{value}'")).collect();
    Ok(format!(
        "set -e; back={back}; front={front}\n\
         xenstore-write $back ''; xenstore-chmod $back n0 r{domain}\n\
         xenstore-write $front ''; xenstore-chmod $front n{domain} r0\n\
         xenstore-write $back/frontend $front $back/frontend-id {domain} $back/online 1 $back/mode w \\\n\
         $back/device-type disk $back/dev {disk}{more} $back/state 1 \\\n\
         $front/backend $back $front/backend-id 0 $front/virtual-device {device} $front/device-type disk $front/state 1"
    ))
}

/// Has the back end close, as xl has it, and removes the nodes.
pub(crate) fn close(domain: u32, disk: &str, kind: &str) -> Result<String> {
    let [back, front] = folders(domain, disk, kind)?;
    Ok(format!(
        "set -e; xenstore-write {back}/online 0 {back}/state 5\n\
         until test $(xenstore-read {back}/state) = 6; do sleep 0.1; done\n\
         xenstore-rm {front}; xenstore-rm {back}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_the_number_of_its_name() {
        assert_eq!(number("xvda").unwrap(), 51712);
        assert_eq!(number("xvdb").unwrap(), 51728);
        assert!(number("xvdb1").is_err());
        assert!(number("sda").is_err());
    }
}
