//! Sizes as people write them: `4096`, `512K`, `1G`.

/// Parses a number of bytes with an optional K, M, G, T, P or E (powers of 1024; `KiB` and the like mean the same).
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = &text[digits.len()..];
    let factor: u64 = match unit.strip_suffix("iB").unwrap_or(unit) {
        "" | "B" => 1,
        "K" | "k" => 1 << 10,
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        "T" | "t" => 1 << 40,
        "P" | "p" => 1 << 50,
        "E" | "e" => 1 << 60,
        _ => {
            return Err(format!(
                "`{unit}` is no unit of size: expected K, M, G, T, P or E, as in 512M or 1G"
            ));
        }
    };
    let number: u64 = digits.parse().map_err(|error| format!("`{digits}` is no whole number: {error}"))?;
    let bytes = number.checked_mul(factor).filter(|bytes| i64::try_from(*bytes).is_ok());
    match bytes {
        Some(0) => Err("a size of 0 bytes makes no disk".into()),
        Some(bytes) => Ok(bytes),
        None => Err(format!("{text} is larger than any disk (8 EiB)")),
    }
}

/// Writes a number of bytes as people read it: exactly, in the largest unit that divides it.
pub(crate) fn show(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("512K", 512 << 10),
            ("10MiB", 10 << 20),
            ("1G", 1 << 30),
            ("2t", 2 << 40),
            ("3P", 3 << 50),
            ("7EiB", 7 << 60),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_said() {
        for (text, named) in [
            ("", "no whole number"),
            ("G", "no whole number"),
            ("1X", "`X` is no unit"),
            ("-1G", "no whole number"),
            ("1.5G", "no whole number"),
            ("0", "makes no disk"),
            ("8388608T", "larger than any disk"),
            ("8E", "larger than any disk"),
            ("99999999999999999999", "no whole number"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        assert_eq!(show(1 << 30), "1 GiB");
        assert_eq!(show(1536 << 20), "1536 MiB");
        assert_eq!(show(1000), "1000 bytes");
    }
}
