//! Words on a terminal.

/// A text of which no part is an order to the terminal: names come from images, and images from anybody.
pub(crate) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter.is_control() {
            true => shown.extend(letter.escape_default()),
            false => shown.push(letter),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_to_the_terminal_are_shown_and_letters_stay() {
        assert_eq!(harmless("a \"ü\" \\ 'b'"), "a \"ü\" \\ 'b'");
        assert_eq!(harmless("\x1b[2J\n\u{9b}x\x7f"), "\\u{1b}[2J\\n\\u{9b}x\\u{7f}");
    }
}
