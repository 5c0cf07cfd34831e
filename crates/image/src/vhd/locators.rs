//! Parent locators: the names under which a differencing image knows the one below it, for several systems.

use super::SECTOR;

/// Bytes of a name that are looked at; paths are no longer.
pub(super) const NAME_MAX: u32 = 16 << 10;

/// For what system a locator is, and how its name is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Platform {
    /// Windows, a path from the image's folder on, or (blktap) any: UTF-16, little-endian.
    WindowsRelative,
    /// Windows, an absolute path, or (blktap) any: UTF-16, little-endian.
    WindowsAbsolute,
    /// Mac OS X, and blktap: a file URL in UTF-8.
    Url,
}

impl Platform {
    pub(super) const fn code(self) -> u32 {
        match self {
            Platform::WindowsRelative => u32::from_be_bytes(*b"W2ru"),
            Platform::WindowsAbsolute => u32::from_be_bytes(*b"W2ku"),
            Platform::Url => u32::from_be_bytes(*b"MacX"),
        }
    }

    pub(super) fn of(code: u32) -> Option<Platform> {
        [Platform::WindowsRelative, Platform::WindowsAbsolute, Platform::Url]
            .into_iter()
            .find(|platform| platform.code() == code)
    }

    /// The bytes that stand for a path.
    pub(super) fn encode(self, path: &str) -> Vec<u8> {
        match self {
            // A relative path is no URL; blktap writes and reads it so.
            Platform::Url => format!("file://{}", dotted(path)).into_bytes(),
            Platform::WindowsRelative | Platform::WindowsAbsolute => {
                let path = dotted(path).replace('/', "\\");
                path.encode_utf16().flat_map(u16::to_le_bytes).collect()
            }
        }
    }

    /// The paths that the bytes may stand for, best first.
    pub(super) fn decode(self, bytes: &[u8]) -> Vec<String> {
        match self {
            Platform::Url => {
                let Ok(url) = std::str::from_utf8(bytes) else { return Vec::new() };
                let Some(path) = url.trim_end_matches('\0').strip_prefix("file://") else {
                    return Vec::new();
                };
                let path =
                    path.strip_prefix("localhost").filter(|path| path.starts_with('/')).unwrap_or(path);
                // Who writes locators on Linux escapes nothing; a Mac does.
                sane([Some(path.to_owned()), unescaped(path)])
            }
            Platform::WindowsRelative | Platform::WindowsAbsolute => {
                let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
                sane([String::from_utf16(&units.collect::<Vec<u16>>()).ok().map(|path| from_windows(&path))])
            }
        }
    }
}

/// A path that says that it is relative, if it is.
fn dotted(path: &str) -> String {
    let is_plain = !path.starts_with('/') && !path.starts_with("./") && !path.starts_with("../");
    if is_plain { format!("./{path}") } else { path.to_owned() }
}

fn from_windows(path: &str) -> String {
    let path = path.trim_end_matches('\0').replace('\\', "/");
    // blktap too takes a drive for the root.
    let is_drive = path.get(1..3) == Some(":/") && path.starts_with(|c: char| c.is_ascii_alphabetic());
    if is_drive { path[2..].to_owned() } else { path }
}

fn unescaped(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let value = digit(rest.next())? * 16 + digit(rest.next())?;
            bytes.push(u8::try_from(value).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// Those that can be paths at all, each once.
fn sane<const N: usize>(paths: [Option<String>; N]) -> Vec<String> {
    let mut sane: Vec<String> = Vec::new();
    for path in paths.into_iter().flatten() {
        if !path.is_empty() && !path.contains('\0') && !sane.contains(&path) {
            sane.push(path);
        }
    }
    sane
}

/// How many bytes of the file a locator has. The field should count sectors, and often counts bytes.
pub(super) fn room(field: u32) -> Option<u64> {
    let field = u64::from(field);
    if field < SECTOR { Some(field * SECTOR) } else { field.is_multiple_of(SECTOR).then_some(field) }
}

/// The name of the file in a path, as the header itself has it: UTF-16, big-endian, the rest zero.
pub(super) fn encode_name(path: &str) -> [u8; 512] {
    let name = path.rsplit('/').next().unwrap_or(path);
    let mut bytes = [0; 512];
    // The last two stay zero.
    for (to, unit) in bytes[..510].chunks_exact_mut(2).zip(name.encode_utf16()) {
        to.copy_from_slice(&unit.to_be_bytes());
    }
    bytes
}

/// The other way round.
pub(super) fn decode_name(bytes: &[u8; 512]) -> Option<String> {
    let units = bytes.chunks_exact(2).map(|unit| u16::from_be_bytes([unit[0], unit[1]]));
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    sane([String::from_utf16(&units).ok().map(|path| from_windows(&path))]).pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utf16(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn locators_are_written_as_blktap_writes_them() {
        assert_eq!(Platform::Url.encode("base.vhd"), b"file://./base.vhd");
        assert_eq!(Platform::Url.encode("/srv/base.vhd"), b"file:///srv/base.vhd");
        assert_eq!(Platform::WindowsRelative.encode("base.vhd"), utf16(".\\base.vhd"));
        assert_eq!(Platform::WindowsAbsolute.encode("../a/base.vhd"), utf16("..\\a\\base.vhd"));
    }

    #[test]
    fn what_was_written_is_read() {
        for path in ["./base.vhd", "/srv/vm/base.vhd", "../x/b c.vhd", "./ä.vhd"] {
            for platform in [Platform::Url, Platform::WindowsAbsolute, Platform::WindowsRelative] {
                assert_eq!(platform.decode(&platform.encode(path)), [path], "{platform:?}");
            }
        }
    }

    #[test]
    fn names_of_other_systems_become_paths() {
        assert_eq!(Platform::WindowsAbsolute.decode(&utf16("C:\\vm\\base.vhd")), ["/vm/base.vhd"]);
        assert_eq!(Platform::WindowsRelative.decode(&utf16("..\\base.vhd\0")), ["../base.vhd"]);
        assert_eq!(Platform::Url.decode(b"file://localhost/a%20b"), ["/a%20b", "/a b"]);
    }

    #[test]
    fn nonsense_is_no_path() {
        assert!(Platform::Url.decode(b"http://x/y").is_empty());
        assert!(Platform::Url.decode(b"\xff\xfe").is_empty());
        assert!(Platform::Url.decode(b"file://").is_empty());
        assert!(Platform::Url.decode(b"file://a\0b").is_empty());
        assert!(Platform::Url.decode(b"file://%zz").contains(&"%zz".to_owned()));
        assert!(Platform::WindowsRelative.decode(&[0, 0xd8]).is_empty(), "half a character");
        assert_eq!(decode_name(&[0; 512]), None);
    }

    #[test]
    fn the_headers_own_name_is_big_endian() {
        let bytes = encode_name("/srv/ab");
        assert_eq!(bytes[..4], [0, b'a', 0, b'b']);
        assert_eq!(bytes[4..], [0; 508]);
        assert_eq!(decode_name(&bytes).as_deref(), Some("ab"));
        assert_eq!(decode_name(&encode_name(&"x".repeat(300))).map(|name| name.len()), Some(255));
    }

    #[test]
    fn room_is_in_sectors_or_in_bytes() {
        assert_eq!(room(1), Some(512));
        assert_eq!(room(512), Some(512));
        assert_eq!(room(511), Some(511 * 512));
        assert_eq!(room(1000), None);
    }
}
