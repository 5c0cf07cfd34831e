//! Making a qcow image, as `qemu-img create -f qcow` does.

use std::rc::Rc;

use block::{Buf, Span};
use storage::{Storage, Zeroing};

use super::MAGIC;
use super::entry::Geometry;
use super::header::{LEN, NAME_MAX, SECTOR};
use crate::ImageError;

/// What is to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Create {
    /// Bytes of the disk; rounded up to a multiple of 512.
    pub size: u64,
    /// The name of the image below, as it is to be found from the image's folder on.
    pub backing: Option<String>,
    /// Bytes of a cluster, a power of two from 512 to 65536. Where it is not said, 4096, or 512 over another image: then
    /// a first write brings no bytes from there that it need not.
    pub cluster_size: Option<u32>,
}

/// Makes an empty image of a file, whatever was in it.
///
/// # Errors
/// What is asked for cannot be, or the file failed.
pub async fn create(file: &Rc<dyn Storage>, options: &Create) -> Result<(), ImageError> {
    let refused = |what: String| Err(ImageError::Refused(what));
    let name = options.backing.as_deref().unwrap_or_default().as_bytes();
    if options.backing.is_some() && (name.is_empty() || name.len() > NAME_MAX || name.contains(&0)) {
        return refused(format!("the name of a backing file has 1 to {NAME_MAX} bytes, none of them zero"));
    }
    let cluster = options.cluster_size.unwrap_or(if name.is_empty() { 4096 } else { 512 });
    if !cluster.is_power_of_two() || !(512..=65536).contains(&cluster) {
        return refused(format!("clusters of {cluster} bytes: they have a power of two from 512 to 65536"));
    }
    let cluster_bits = cluster.trailing_zeros();
    // An L2 table fills a cluster; with small ones, eight pages, as QEMU has it.
    let l2_bits = if cluster_bits == 9 { 12 } else { cluster_bits - 3 };
    let l1_at = (LEN + name.len() as u64).next_multiple_of(8);
    let size = options.size.checked_next_multiple_of(SECTOR).filter(|size| *size <= i64::MAX as u64);
    let geometry = size.and_then(|size| Geometry::new(cluster_bits, l2_bits, size, l1_at));
    let (Some(size), Some(geometry)) = (size, geometry) else {
        let bytes = options.size;
        return refused(format!("a disk of {bytes} bytes is too large for qcow in clusters of {cluster}"));
    };
    if size == 0 {
        return refused("a qcow disk has at least one sector of 512 bytes".into());
    }
    let mut head = Vec::with_capacity(l1_at as usize);
    head.extend(MAGIC);
    head.extend(1_u32.to_be_bytes());
    head.extend(if name.is_empty() { 0 } else { LEN }.to_be_bytes());
    head.extend((name.len() as u32).to_be_bytes());
    head.extend([0; 4]); // when the backing file was changed: nobody asks
    head.extend(size.to_be_bytes());
    head.extend([cluster_bits as u8, l2_bits as u8, 0, 0]);
    head.extend([0; 4]); // no encryption
    head.extend(l1_at.to_be_bytes());
    head.extend(name);
    head.resize(l1_at as usize, 0);
    let l1 = Span::new(l1_at, geometry.l1_span().len().next_multiple_of(SECTOR)).expect("of 2 GiB at most");
    file.resize(0).await?;
    file.resize(l1.end()).await?;
    // What was on a block device is still there. In a file this takes space for the table: in a hole a store that is full would
    // fail a flush, long after the write that needed it.
    file.zero(Span::new(0, l1.end()).expect("as above"), Zeroing { unmap: false, fast: false }).await?;
    file.write(0, Buf::from_bytes(&head)).await?;
    Ok(file.flush().await?)
}
