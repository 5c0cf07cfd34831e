//! The house rules that no compiler knows, checked over every source file of the project.

use crate::command::root;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the project's own Rust lies.
const FOLDERS: &[&str] = &["bench", "crates", "fuzz", "lab", "xtask"];

/// Crates that serve a guest: there a failure is answered, and not a panic.
const SERVING: &[&str] = &["block", "runtime", "storage", "image", "disk", "guest", "xen", "tapdisk"];

/// The few rooms of ARCHITECTURE.md where memory is handled by hand.
const UNSAFE_ROOMS: &[&str] = &[
    "crates/block/src/buf",
    // Hands out the memory that `buf` describes.
    "crates/block/src/pool",
    "crates/runtime/src/ring",
    // Keeps the promise that registering memory asks for.
    "crates/runtime/tests/source",
    // Implements the trait of engines, whose one method asks for a promise; no memory is handled by hand.
    "crates/sim/src/kernel",
    "crates/xen/",
    "crates/guest/src/vhost/",
    "crates/guest/src/fault",
    "crates/guest/src/mapping",
    "crates/guest/src/words",
    // What a guest is to a back end, for tests.
    "crates/vhost-client/src/memory",
];

/// A file that is longer than this is two nouns.
const LOGIC_LINES_MAX: usize = 900;

/// Fails, and lists them all, if any rule is broken.
pub(crate) fn run() -> Result<()> {
    let broken = inspect(&root())?;
    if !broken.is_empty() {
        bail!("{} house rules broken:\n  {}", broken.len(), broken.join("\n  "));
    }
    Ok(())
}

/// The broken rules of a source tree, as `path:line: what`.
fn inspect(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for folder in FOLDERS {
        gather(&root.join(folder), &mut files)?;
    }
    if files.is_empty() {
        bail!("no source files under {}", root.display());
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        sources.push((file, text));
    }
    let test_files: BTreeSet<PathBuf> =
        sources.iter().flat_map(|(file, text)| test_modules(file, text)).collect();
    let mut broken = Vec::new();
    for (file, text) in &sources {
        let is_test = test_files.contains(file) || file.components().any(|part| part.as_os_str() == "tests");
        let name = file.strip_prefix(root)?.to_string_lossy();
        broken.extend(
            rules(&name, text, is_test).into_iter().map(|(line, what)| format!("{name}:{line}: {what}")),
        );
    }
    Ok(broken)
}

fn gather(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            gather(&path, files)?;
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// The files that this one includes only for tests: `#[cfg(test)] mod name;`.
fn test_modules(file: &Path, text: &str) -> Vec<PathBuf> {
    let stem = file.file_stem().unwrap_or_default();
    let is_root = ["lib", "main", "mod"].iter().any(|name| stem == *name);
    let parent = file.parent().unwrap_or(Path::new(""));
    let folder = if is_root { parent.to_owned() } else { parent.join(stem) };
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut modules = Vec::new();
    for pair in lines.windows(2) {
        if let [attribute, declaration] = pair
            && is_test_only(attribute)
            && let Some(name) = module_name(declaration)
        {
            modules.extend([folder.join(format!("{name}.rs")), folder.join(name).join("mod.rs")]);
        }
    }
    modules
}

fn module_name(declaration: &str) -> Option<&str> {
    let declaration = declaration.strip_suffix(';')?;
    let words: Vec<&str> = declaration.split(' ').collect();
    match words[..] {
        [.., "mod", name] => Some(name),
        _ => None,
    }
}

fn is_test_only(attribute: &str) -> bool {
    attribute.starts_with("#[cfg(test") || attribute.starts_with("#[cfg(all(test")
}

/// The rules that one file breaks, with the line.
fn rules(name: &str, text: &str, is_test: bool) -> Vec<(usize, String)> {
    let mut broken = Vec::new();
    let mut add = |line: usize, what: &str| broken.push((line, what.to_owned()));
    if !text.starts_with("//! ") {
        add(1, "the first line must say what this file is, after `//! `");
    }
    let code = without_words(text);
    let mut logic = 0;
    let mut in_tests = is_test;
    // rustfmt puts the end of a module's block at its own indentation.
    let mut tests_end: Option<String> = None;
    let mut previous = "";
    for (index, (line, code)) in text.lines().zip(code.lines()).enumerate() {
        let number = index + 1;
        if line.contains('\t') {
            add(number, "a tab");
        }
        // In two pieces each, or this line would break its own rule.
        for word in [concat!("TO", "DO"), concat!("FIX", "ME")] {
            if line.contains(word) {
                add(number, "an unfinished thought: do it, or file it");
            }
        }
        let is_block = code.trim_end().ends_with('{');
        if tests_end.is_none() && is_test_only(previous.trim()) && is_block {
            let indent: String = code.chars().take_while(|letter| *letter == ' ').collect();
            tests_end = Some(format!("{indent}}}"));
            in_tests = true;
        }
        if !in_tests {
            logic += usize::from(!code.trim().is_empty());
            if serves(name) && code.contains(".unwrap()") {
                add(number, "`unwrap` outside of a test: answer the error, or `expect` the invariant");
            }
        }
        // An `unsafe fn` only asks for a promise; using what was promised takes a block.
        let handles_memory = has_word(&code.replace("unsafe fn", ""), "unsafe");
        if handles_memory && !UNSAFE_ROOMS.iter().any(|room| name.starts_with(room)) {
            add(number, "`unsafe` outside of its rooms (ARCHITECTURE.md)");
        }
        if tests_end.as_deref() == Some(code.trim_end()) {
            tests_end = None;
            in_tests = is_test;
        }
        if !code.trim().is_empty() {
            previous = line;
        }
    }
    if logic > LOGIC_LINES_MAX {
        add(1, &format!("{logic} lines of logic: this file is two nouns"));
    }
    broken
}

fn serves(name: &str) -> bool {
    SERVING.iter().any(|serving| name.starts_with(&format!("crates/{serving}/")))
}

fn has_word(code: &str, word: &str) -> bool {
    code.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(|found| found == word)
}

/// What a letter belongs to.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Code,
    LineComment,
    /// Comments nest in Rust.
    BlockComment(u32),
    Text,
    /// A raw string, ended by a quote and so many `#`.
    RawText(usize),
}

/// The source with the words of its comments and strings blanked out, line by line as it was.
fn without_words(text: &str) -> String {
    let letters: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut place = Place::Code;
    let mut at = 0;
    while at < letters.len() {
        let rest = &letters[at..];
        let (next, taken) = step(place, rest);
        for letter in &rest[..taken] {
            let is_kept = *letter == '\n' || (place == Place::Code && next == Place::Code);
            code.push(if is_kept { *letter } else { ' ' });
        }
        place = next;
        at += taken;
    }
    code
}

/// Where the next letters lead, and how many of them.
fn step(place: Place, rest: &[char]) -> (Place, usize) {
    let starts = |words: &str| words.chars().eq(rest.iter().copied().take(words.len()));
    match place {
        Place::Code if starts("//") => (Place::LineComment, 2),
        Place::Code if starts("/*") => (Place::BlockComment(1), 2),
        Place::Code if starts("r\"") => (Place::RawText(0), 2),
        Place::Code if starts("r#") => match rest[1..].iter().take_while(|letter| **letter == '#').count() {
            hashes if rest.get(1 + hashes) == Some(&'"') => (Place::RawText(hashes), hashes + 2),
            _ => (Place::Code, 2),
        },
        Place::Code if starts("\"") => (Place::Text, 1),
        // A character, and not a lifetime: something and a quote, or a backslash.
        Place::Code if starts("'\\") => {
            let len = rest.iter().skip(3).position(|letter| *letter == '\'').map_or(2, |end| end + 4);
            (Place::Code, len)
        }
        Place::Code if starts("'") && rest.get(2) == Some(&'\'') => (Place::Code, 3),
        Place::LineComment if starts("\n") => (Place::Code, 1),
        Place::BlockComment(depth) if starts("/*") => (Place::BlockComment(depth + 1), 2),
        Place::BlockComment(1) if starts("*/") => (Place::Code, 2),
        Place::BlockComment(depth) if starts("*/") => (Place::BlockComment(depth - 1), 2),
        Place::Text if starts("\\") => (Place::Text, 2.min(rest.len())),
        Place::Text if starts("\"") => (Place::Code, 1),
        Place::RawText(hashes) if starts(&format!("\"{}", "#".repeat(hashes))) => (Place::Code, hashes + 1),
        Place::Code | Place::LineComment | Place::BlockComment(_) | Place::Text | Place::RawText(_) => {
            (place, 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_project_is_tidy() {
        assert_eq!(inspect(&root()).unwrap(), Vec::<String>::new());
    }

    fn lines_broken(name: &str, text: &str) -> Vec<usize> {
        rules(name, text, false).into_iter().map(|(line, _)| line).collect()
    }

    #[test]
    fn a_file_says_what_it_is() {
        assert_eq!(lines_broken("crates/disk/src/a.rs", "use std::io;\n"), [1]);
        assert!(lines_broken("crates/disk/src/a.rs", "//! A noun.\n").is_empty());
    }

    #[test]
    fn unwrap_is_for_tests() {
        let text = "//! A noun.\nfn f() { a.unwrap() }\n#[cfg(test)]\nmod tests {\n    fn g() { a.unwrap() }\n}\n\
                    fn h() { b.unwrap() }\n";
        assert_eq!(lines_broken("crates/disk/src/a.rs", text), [2, 7]);
        assert!(lines_broken("crates/sim/src/a.rs", text).is_empty());
        assert!(rules("crates/disk/src/a.rs", text, true).is_empty());
    }

    #[test]
    fn words_in_comments_and_strings_are_not_code() {
        let text = "//! unsafe .unwrap()\n/* unsafe /* nested */ unsafe */ let a = \"unsafe \\\" .unwrap()\";\n\
                    let b = r#\"unsafe \" \"#; let c = '\"'; let d: &'static str = \"unsafe\"; let e = '\\'';\n\
                    #![allow(unsafe_code)]\n";
        assert!(lines_broken("crates/disk/src/a.rs", text).is_empty());
        assert_eq!(lines_broken("crates/disk/src/a.rs", "//! A noun.\nlet c = '\"'; unsafe {}\n"), [2]);
    }

    #[test]
    fn unsafe_has_its_rooms() {
        let text = "//! A noun.\nunsafe { f() }\n";
        assert!(lines_broken("crates/block/src/buf.rs", text).is_empty());
        assert_eq!(lines_broken("crates/block/src/errno.rs", text), [2]);
        let promise = "//! A noun.\nunsafe fn submit() { safely() }\n";
        assert!(lines_broken("crates/sim/src/kernel.rs", promise).is_empty());
    }

    #[test]
    fn a_module_for_tests_is_known_by_its_declaration() {
        let found = test_modules(Path::new("crates/x/src/lib.rs"), "#[cfg(test)]\npub(crate) mod model;\n");
        assert!(found.contains(&PathBuf::from("crates/x/src/model.rs")));
        let found = test_modules(Path::new("crates/x/src/y.rs"), "#[cfg(all(test, loom))]\nmod z;\n");
        assert!(found.contains(&PathBuf::from("crates/x/src/y/z.rs")));
    }

    #[test]
    fn a_long_file_is_two_nouns() {
        let text = format!("//! A noun.\n{}", "let a = 1;\n".repeat(LOGIC_LINES_MAX + 1));
        assert_eq!(lines_broken("crates/disk/src/a.rs", &text), [1]);
    }
}
