//! Header extensions: what follows the header's fields, each with its kind and length (specification, "Header extensions").

use crate::{Format, ImageError};

use super::bytes::{be32, be64};

/// The kinds that are known here.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// Bytes of an extension's kind and length.
const HEAD: usize = 8;
/// Bytes of an entry of the feature name table.
const FEATURE: usize = 48;
/// Longest name of a backing file's format (QEMU's `backing_format[16]`, with a zero behind it).
const FORMAT_MAX: usize = 15;
/// How many bitmaps there may be, and bytes of their directory (QEMU's `QCOW2_MAX_BITMAPS` and
/// `QCOW2_MAX_BITMAP_DIRECTORY_SIZE`).
const BITMAPS_MAX: u32 = 65535;
const DIRECTORY_MAX: u64 = 64 << 20;

/// Which field of the header a named feature is a bit of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// Who does not know it must not open the image.
    Incompatible,
    /// Who does not know it need not care.
    Compatible,
    /// Who does not know it clears it before writing.
    Autoclear,
}

impl FeatureKind {
    const fn number(self) -> u8 {
        match self {
            FeatureKind::Incompatible => 0,
            FeatureKind::Compatible => 1,
            FeatureKind::Autoclear => 2,
        }
    }
}

/// A feature's name, for those who do not know the feature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The field that it is in.
    pub kind: FeatureKind,
    /// Its bit there, 0 to 63.
    pub bit: u8,
    /// At most 46 bytes.
    pub name: String,
}

/// Where the directory of the persistent bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many there are, at least one.
    pub count: u32,
    /// Bytes of the directory.
    pub len: u64,
    /// Byte of the file at which it starts, a multiple of the cluster size.
    pub at: u64,
}

/// All extensions of a header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The name of the backing file's format.
    pub backing_format: Option<String>,
    /// The name of the external data file.
    pub data_file: Option<String>,
    /// The persistent bitmaps.
    pub bitmaps: Option<Bitmaps>,
    /// The feature name table.
    pub features: Option<Vec<Feature>>,
    /// Those that nothing is known of, by their kind; they are kept. Bitmaps that are not consistent any more are among them.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// What QEMU calls a format, in an image that names its backing file's.
pub(super) const fn qemu_name(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow => "qcow",
        Format::Qcow2 => "qcow2",
        Format::Vhd => "vpc",
    }
}

/// The names of all features that are known here: the same that QEMU writes, so that others say them too.
pub(super) fn qemu_features() -> Vec<Feature> {
    use FeatureKind::{Autoclear, Compatible, Incompatible};
    let known = [
        (Incompatible, 0, "dirty bit"),
        (Incompatible, 1, "corrupt bit"),
        (Incompatible, 2, "external data file"),
        (Incompatible, 3, "compression type"),
        (Incompatible, 4, "extended L2 entries"),
        (Compatible, 0, "lazy refcounts"),
        (Autoclear, 0, "bitmaps"),
        (Autoclear, 1, "raw external data"),
    ];
    known.map(|(kind, bit, name)| Feature { kind, bit, name: name.to_owned() }).into()
}

fn invalid(text: String) -> ImageError {
    ImageError::Invalid(text)
}

/// A name in an image.
pub(super) fn string(bytes: &[u8], what: &str) -> Result<String, ImageError> {
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        Ok(_) | Err(_) => {
            Err(invalid(format!("the {what} of this qcow2 image is not text: `{}`", bytes.escape_ascii())))
        }
    }
}

impl Extensions {
    /// Takes them out of the header cluster: they lie from byte `from` of it on, and end before byte `to` of it. `bitmaps` is
    /// the size of a cluster where what is said of bitmaps is to be believed; elsewhere it is kept and nothing more.
    ///
    /// # Errors
    /// The first that makes no sense. What came before it is in `self` all the same.
    pub(super) fn parse(
        &mut self,
        cluster: &[u8],
        from: usize,
        to: usize,
        bitmaps: Option<u64>,
    ) -> Result<(), ImageError> {
        let mut at = from;
        while at < to {
            let broken = |len: u32| {
                invalid(format!(
                    "a header extension of {len} bytes at byte {at} reaches beyond byte {to}, where the extensions of \
                     this qcow2 image end"
                ))
            };
            let Some((kind, len)) = be32(cluster, at).zip(be32(cluster, at + 4)) else {
                // Fewer than 8 bytes are left: there is no room for another, nor for an end mark.
                return Err(broken(0));
            };
            let start = at + HEAD;
            let end = start.checked_add(len as usize).filter(|end| *end <= to).ok_or_else(|| broken(len))?;
            let bytes = cluster.get(start..end).ok_or_else(|| broken(len))?;
            if kind == END {
                return Ok(());
            }
            self.take(kind, bytes, bitmaps)?;
            at = end.next_multiple_of(8);
        }
        Ok(())
    }

    fn take(&mut self, kind: u32, bytes: &[u8], bitmaps: Option<u64>) -> Result<(), ImageError> {
        let twice = match (kind, bitmaps) {
            (BACKING_FORMAT, _) => {
                if bytes.len() > FORMAT_MAX {
                    return Err(invalid(format!(
                        "the name of the backing file's format has {} bytes, more than {FORMAT_MAX}",
                        bytes.len()
                    )));
                }
                self.backing_format.replace(string(bytes, "backing file's format")?).is_some()
            }
            (DATA_FILE, _) => self.data_file.replace(string(bytes, "external data file's name")?).is_some(),
            (BITMAPS, Some(cluster_size)) => {
                self.bitmaps.replace(Bitmaps::parse(bytes, cluster_size)?).is_some()
            }
            (FEATURES, _) => {
                self.features.replace(bytes.chunks_exact(FEATURE).filter_map(feature).collect()).is_some()
            }
            (ENCRYPTION, _) => {
                return Err(ImageError::Unsupported(
                    "this qcow2 image has the header of LUKS encryption, which tapdisk does not know; decrypt it with \
                     qemu-img convert"
                        .to_owned(),
                ));
            }
            (unknown, _) => {
                let twice = self.unknown.iter().any(|(kind, _)| *kind == unknown);
                self.unknown.push((unknown, bytes.to_vec()));
                twice
            }
        };
        if twice {
            return Err(invalid(format!("the header extension {kind:#010x} is there twice")));
        }
        Ok(())
    }

    /// The name of a feature, as the image has it.
    pub fn feature(&self, kind: FeatureKind, bit: u8) -> Option<&str> {
        let features = self.features.as_ref()?;
        let found = features.iter().find(|feature| feature.kind == kind && feature.bit == bit)?;
        Some(&found.name)
    }

    /// Forgets bitmaps that are not consistent any more; whether there were some.
    pub(super) fn forget_bitmaps(&mut self) -> bool {
        let before = self.unknown.len();
        self.unknown.retain(|(kind, _)| *kind != BITMAPS);
        self.unknown.len() < before
    }

    /// Their bytes, with the end mark. Those that somebody must know to read the image come first.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        if let Some(name) = &self.backing_format {
            push(&mut all, BACKING_FORMAT, name.as_bytes());
        }
        if let Some(name) = &self.data_file {
            push(&mut all, DATA_FILE, name.as_bytes());
        }
        if let Some(bitmaps) = &self.bitmaps {
            push(&mut all, BITMAPS, &bitmaps.bytes());
        }
        for (kind, bytes) in &self.unknown {
            push(&mut all, *kind, bytes);
        }
        if let Some(features) = &self.features {
            let table: Vec<u8> = features.iter().flat_map(entry).collect();
            push(&mut all, FEATURES, &table);
        }
        push(&mut all, END, &[]);
        all
    }
}

/// Whether an image shows something else, or nothing, without its extension of this kind.
pub(super) const fn is_needed(kind: u32) -> bool {
    matches!(kind, BACKING_FORMAT | DATA_FILE | BITMAPS | ENCRYPTION)
}

fn push(all: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    all.extend_from_slice(&kind.to_be_bytes());
    all.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    all.extend_from_slice(bytes);
    all.resize(all.len().next_multiple_of(8), 0);
}

/// An entry of the feature name table; `None` for one of a kind that nobody has defined.
fn feature(bytes: &[u8]) -> Option<Feature> {
    let kind = match bytes.first()? {
        0 => FeatureKind::Incompatible,
        1 => FeatureKind::Compatible,
        2 => FeatureKind::Autoclear,
        _ => return None,
    };
    let bit = *bytes.get(1).filter(|bit| **bit < 64)?;
    let name = bytes.get(2..)?.split(|byte| *byte == 0).next()?;
    Some(Feature { kind, bit, name: String::from_utf8_lossy(name).into_owned() })
}

fn entry(feature: &Feature) -> [u8; FEATURE] {
    let mut bytes = [0; FEATURE];
    bytes[0] = feature.kind.number();
    bytes[1] = feature.bit;
    for (to, from) in bytes[2..].iter_mut().zip(feature.name.bytes()) {
        *to = from;
    }
    bytes
}

impl Bitmaps {
    const LEN: usize = 24;

    fn parse(bytes: &[u8], cluster_size: u64) -> Result<Bitmaps, ImageError> {
        let fields = || Some((be32(bytes, 0)?, be32(bytes, 4)?, be64(bytes, 8)?, be64(bytes, 16)?));
        let Some((count, reserved, len, at)) = fields().filter(|_| bytes.len() == Bitmaps::LEN) else {
            return Err(invalid(format!(
                "the bitmaps extension has {} bytes; it should have {}",
                bytes.len(),
                Bitmaps::LEN
            )));
        };
        if reserved != 0 {
            return Err(invalid("reserved bits of the bitmaps extension are set".to_owned()));
        }
        if count == 0 || count > BITMAPS_MAX {
            return Err(invalid(format!(
                "the bitmaps extension counts {count} bitmaps; there may be 1 to {BITMAPS_MAX}"
            )));
        }
        if len > DIRECTORY_MAX {
            return Err(invalid(format!(
                "the directory of the bitmaps has {len} bytes; more than {DIRECTORY_MAX} are not read"
            )));
        }
        if at == 0 || !at.is_multiple_of(cluster_size) || block::Span::new(at, len).is_none() {
            return Err(invalid(format!(
                "the directory of the bitmaps is at byte {at}, which is no place for it: clusters have {cluster_size} bytes"
            )));
        }
        Ok(Bitmaps { count, len, at })
    }

    fn bytes(&self) -> [u8; Bitmaps::LEN] {
        let mut bytes = [0; Bitmaps::LEN];
        bytes[..4].copy_from_slice(&self.count.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.len.to_be_bytes());
        bytes[16..].copy_from_slice(&self.at.to_be_bytes());
        bytes
    }
}
