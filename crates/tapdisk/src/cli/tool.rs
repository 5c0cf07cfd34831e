//! The commands for images that nobody serves, and their options: words that users of qemu-img know.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use image::Format;

use crate::size;

#[derive(Subcommand, Debug)]
pub(crate) enum Tool {
    Create(Create),
    Info(Info),
    Check(Check),
    Convert(Convert),
    Resize(Resize),
    Map(Map),
    Commit(Commit),
    Rebase(Rebase),
    Snapshot(Snapshot),
}

/// Make an image
///
/// Until it is whole it is called FILE.part, so that what is called FILE is whole.
#[derive(Args, Debug)]
pub(crate) struct Create {
    /// Its format
    #[arg(short, long, value_parser = formats(), default_value = "raw")]
    pub(crate) format: Format,

    /// Options of the format: KEY=VALUE, several with commas between them or by several -o; `-o help` lists them
    #[arg(short = 'o', long = "options", value_name = "KEY=VALUE", value_parser = Pairs::from_str)]
    pub(crate) options: Vec<Pairs>,

    /// The image below: what FILE does not hold itself it shows of that one. A relative name counts from FILE's folder
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) backing: Option<String>,

    /// The format of the image below
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = formats(), requires = "backing")]
    pub(crate) backing_format: Option<Format>,

    /// Do not look at the image below: it need not exist yet, and SIZE has to be given
    #[arg(short, long = "unsafe", requires = "backing")]
    pub(crate) unchecked: bool,

    /// Replace a file that exists, and a FILE.part that a killed command has left
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) places: Places,

    /// The image to make, or a block device to make it on
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,

    /// Bytes of the disk, as in 10G [default: as the image below]
    #[arg(value_parser = size::parse)]
    pub(crate) size: Option<u64>,
}

/// Say what an image is
#[derive(Args, Debug)]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) source: Source,

    #[command(flatten)]
    pub(crate) output: Output,

    /// Say it of the images below, too
    #[arg(long, visible_alias = "backing-chain")]
    pub(crate) chain: bool,
}

/// Look for what makes no sense in an image, and put it right if asked to
///
/// The exit status is 0 for a clean image, 1 if the check itself failed, 2 for one that could lose data or show wrong bytes,
/// 3 for one that wastes space, and 63 for a format in which there is nothing to check.
#[derive(Args, Debug)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) source: Source,

    #[command(flatten)]
    pub(crate) output: Output,

    /// What to put right: `leaks` gives back space that nothing uses, `all` also what makes no sense
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub(crate) repair: Option<Repair>,
}

/// Copy a disk into a new image, of any format
///
/// What is zero takes no space in the copy. Until it is whole it is called DST.part, so that what is called DST is whole.
#[derive(Args, Debug)]
pub(crate) struct Convert {
    /// Format of SRC [default: as its name or its header says]
    #[arg(short, long, value_parser = formats())]
    pub(crate) format: Option<Format>,

    /// Format of DST
    #[arg(short = 'O', long, value_name = "FORMAT", value_parser = formats(), default_value = "raw")]
    pub(crate) output_format: Format,

    /// Options of DST's format, as for create
    #[arg(short = 'o', long = "options", value_name = "KEY=VALUE", value_parser = Pairs::from_str)]
    pub(crate) options: Vec<Pairs>,

    /// Compress it (qcow2)
    #[arg(short, long)]
    pub(crate) compress: bool,

    /// Show how far it is, on a terminal
    #[arg(short, long)]
    pub(crate) progress: bool,

    /// Replace a file that exists, and a DST.part that a killed command has left
    #[arg(long)]
    pub(crate) force: bool,

    /// How the host's page cache is used for SRC
    #[arg(short = 'T', long, value_enum, value_name = "CACHE", default_value_t = Cache::Buffered)]
    pub(crate) source_cache: Cache,

    /// How the host's page cache is used for DST, which is durable at the end in any case
    #[arg(short = 't', long, value_enum, value_name = "CACHE", default_value_t = Cache::Direct)]
    pub(crate) target_cache: Cache,

    #[command(flatten)]
    pub(crate) places: Places,

    /// The image to copy
    #[arg(value_name = "SRC", value_hint = ValueHint::FilePath)]
    pub(crate) source: PathBuf,

    /// The image to make, or a block device to write
    #[arg(value_name = "DST", value_hint = ValueHint::FilePath)]
    pub(crate) target: PathBuf,
}

/// Give a disk another size
#[derive(Args, Debug)]
pub(crate) struct Resize {
    /// Format of the image [default: as its name or its header says]
    #[arg(short, long, value_parser = formats())]
    pub(crate) format: Option<Format>,

    /// Let the disk become smaller: what is beyond its new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,

    #[command(flatten)]
    pub(crate) places: Places,

    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,

    /// The new size; with a `+` what is added, with a `-` what is taken away (`--shrink FILE -- -1G`)
    #[arg(value_name = "[+|-]SIZE", value_parser = NewSize::from_str)]
    pub(crate) size: NewSize,
}

/// Say where the bytes of a disk are
#[derive(Args, Debug)]
pub(crate) struct Map {
    #[command(flatten)]
    pub(crate) source: Source,

    #[command(flatten)]
    pub(crate) output: Output,

    /// The first byte to tell of
    #[arg(short, long, value_name = "SIZE", value_parser = offset, default_value = "0", hide_default_value = true)]
    pub(crate) start_offset: u64,

    /// How many bytes to tell of [default: up to the end]
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) max_length: Option<u64>,
}

/// Copy what an image holds into the one below it
///
/// The image keeps what it holds, and shows the same as before at any time: this can be stopped and done again. What was
/// copied is durable in the image below when it ends with status 0. An image with snapshots within is refused: they would
/// change.
#[derive(Args, Debug)]
pub(crate) struct Commit {
    /// Format of the image [default: as its name or its header says]
    #[arg(short, long, value_parser = formats())]
    pub(crate) format: Option<Format>,

    /// Show how far it is, on a terminal
    #[arg(short, long)]
    pub(crate) progress: bool,

    #[command(flatten)]
    pub(crate) places: Places,

    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

/// Put an image over another one than before
///
/// First it copies into the image what differs between the old one below and the new, so that the disk stays as it is; then
/// it names the new one. It can be stopped and done again. An image with snapshots within is refused: they would change.
#[derive(Args, Debug)]
pub(crate) struct Rebase {
    /// Format of the image [default: as its name or its header says]
    #[arg(short, long, value_parser = formats())]
    pub(crate) format: Option<Format>,

    /// The new image below; empty for none, which makes the image stand alone. A relative name counts from FILE's folder
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) backing: String,

    /// The format of the new image below [default: as its name or its header says; with `-u` it has to be given]
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = formats())]
    pub(crate) backing_format: Option<Format>,

    /// Only name the new one, which is right where it has the same bytes under another name. Nothing is looked at; what the
    /// disk shows, and what snapshots within the image show, changes with what the new one has
    #[arg(short, long = "unsafe")]
    pub(crate) unchecked: bool,

    /// Show how far it is, on a terminal
    #[arg(short, long)]
    pub(crate) progress: bool,

    #[command(flatten)]
    pub(crate) places: Places,

    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

/// List, make, go back to or delete the snapshots within an image (qcow2)
#[derive(Args, Debug)]
pub(crate) struct Snapshot {
    /// Format of the image [default: as its name or its header says]
    #[arg(short, long, value_parser = formats())]
    pub(crate) format: Option<Format>,

    #[command(flatten)]
    pub(crate) action: SnapshotAction,

    #[command(flatten)]
    pub(crate) output: Output,

    #[command(flatten)]
    pub(crate) places: Places,

    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

#[derive(Args, Debug)]
#[group(multiple = false)]
pub(crate) struct SnapshotAction {
    /// List them, which is what is done if nothing else is asked for
    #[arg(short, long)]
    pub(crate) list: bool,

    /// Keep the disk as it is now under this name
    #[arg(short, long, value_name = "NAME")]
    pub(crate) create: Option<String>,

    /// Make the disk what it was when this snapshot was made; what it is now is lost. By its ID, or else its
    /// name
    #[arg(short, long, value_name = "SNAPSHOT")]
    pub(crate) apply: Option<String>,

    /// Forget this snapshot. By its name, or else its ID, as qemu-img has it
    #[arg(short, long, value_name = "SNAPSHOT")]
    pub(crate) delete: Option<String>,
}

/// What an image may lead to.
#[derive(Args, Debug)]
pub(crate) struct Places {
    /// A folder, or a file, that images may name as their backing or data file, besides what is in the folder of the image
    /// and below. May be given several times
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub(crate) allow_folder: Vec<PathBuf>,

    /// Where `tapdisk serve` keeps what an image lacks whose server has died, if it was told to keep that elsewhere
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath, hide_short_help = true)]
    pub(crate) state_dir: Option<PathBuf>,
}

/// An image that is only looked at.
#[derive(Args, Debug)]
pub(crate) struct Source {
    /// Format of the image [default: as its name or its header says]
    #[arg(short, long, value_parser = formats())]
    pub(crate) format: Option<Format>,

    #[command(flatten)]
    pub(crate) places: Places,

    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

/// For people or for programs.
#[derive(Args, Debug)]
pub(crate) struct Output {
    /// Say it in JSON
    #[arg(long)]
    json: bool,

    /// The same, as qemu-img calls it
    #[arg(long = "output", value_enum, value_name = "HOW", default_value_t = Words::Human, hide = true)]
    words: Words,
}

impl Output {
    pub(crate) fn is_json(&self) -> bool {
        self.json || matches!(self.words, Words::Json)
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Words {
    Human,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Repair {
    /// Space that nothing uses
    Leaks,
    /// Also what makes no sense, at the cost of what it says
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cache {
    /// For reads and writes
    #[value(alias = "writeback", alias = "unsafe", alias = "writethrough")]
    Buffered,
    /// Not at all (O_DIRECT)
    #[value(alias = "none", alias = "directsync")]
    Direct,
}

/// Options of a format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pairs(pub(crate) Vec<(String, String)>);

impl FromStr for Pairs {
    type Err = String;

    fn from_str(text: &str) -> Result<Pairs, String> {
        let mut pairs = Vec::new();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some((key, value)) => pairs.push((key.trim().to_owned(), value.to_owned())),
                None if word == "help" || word == "?" => pairs.push(("help".into(), String::new())),
                None => return Err(format!("`{word}` is no option: expected KEY=VALUE, or `help`")),
            }
        }
        Ok(Pairs(pairs))
    }
}

/// What a disk is to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSize {
    /// So many bytes.
    Exactly(u64),
    /// So many bytes more than now.
    More(u64),
    /// So many bytes less than now.
    Less(u64),
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<NewSize, String> {
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(more), _) => size::parse(more).map(NewSize::More),
            (None, Some(less)) => size::parse(less).map(NewSize::Less),
            (None, None) => size::parse(text).map(NewSize::Exactly),
        }
    }
}

fn offset(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { size::parse(text) }
}

fn formats() -> impl TypedValueParser<Value = Format> {
    let names = Format::ALL.map(|format| {
        let name = PossibleValue::new(format.name());
        match format {
            Format::Raw => name.help("The bytes of the image are the bytes of the disk").alias("aio"),
            Format::Qcow => name.help("QEMU's copy-on-write format of 2006"),
            Format::Qcow2 => name.help("QEMU's copy-on-write format of today"),
            Format::Vhd => name.help("Microsoft's Virtual Hard Disk").alias("vpc"),
        }
    });
    PossibleValuesParser::new(names).try_map(|name| name.parse::<Format>())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn tool(words: &[&str]) -> Result<Tool, String> {
        let words = ["tapdisk"].iter().chain(words);
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Tool(tool) => Ok(tool),
            other @ (Command::Serve(_)
            | Command::Detach(_)
            | Command::Completions { .. }
            | Command::Man { .. }) => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_words_of_qemu_img_are_understood() {
        let words =
            ["create", "-f", "qcow2", "-o", "cluster_size=4k,compat=1.1", "-b", "a", "-F", "vpc", "b", "1G"];
        let Ok(Tool::Create(create)) = tool(&words) else { panic!("{:?}", tool(&words)) };
        assert_eq!((create.format, create.size), (Format::Qcow2, Some(1 << 30)));
        assert_eq!((create.backing.as_deref(), create.backing_format), (Some("a"), Some(Format::Vhd)));
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(create.options[0].0, [pair("cluster_size", "4k"), pair("compat", "1.1")]);
        let words = ["convert", "-p", "-c", "-t", "none", "-f", "raw", "-O", "qcow2", "a", "b"];
        let Ok(Tool::Convert(convert)) = tool(&words) else { panic!("{:?}", tool(&words)) };
        assert!(convert.compress && convert.progress && convert.target_cache == Cache::Direct);
        let Ok(Tool::Info(info)) = tool(&["info", "--output=json", "--backing-chain", "a"]) else { panic!() };
        assert!(info.output.is_json() && info.chain);
        let Ok(Tool::Resize(resize)) = tool(&["resize", "a", "+1G"]) else { panic!() };
        assert_eq!(resize.size, NewSize::More(1 << 30));
        let Ok(Tool::Resize(resize)) = tool(&["resize", "--shrink", "a", "--", "-1G"]) else { panic!() };
        assert_eq!(resize.size, NewSize::Less(1 << 30));
        assert!(matches!(tool(&["create", "-f", "vhd", "-o", "help"]), Ok(Tool::Create(_))));
    }

    #[test]
    fn what_is_wrong_is_said_with_what_was_expected() {
        for (words, named) in [
            (vec!["create", "-f", "vmdk", "a", "1G"], "[possible values: raw, qcow, qcow2, vhd]"),
            (vec!["create", "-o", "lazy", "a", "1G"], "expected KEY=VALUE"),
            (vec!["create", "-F", "raw", "a", "1G"], "--backing"),
            (vec!["resize", "a", "+x"], "no unit of size"),
            (vec!["snapshot", "-c", "a", "-d", "b", "f"], "cannot be used with"),
        ] {
            let error = tool(&words).unwrap_err();
            assert!(error.contains(named), "{words:?}: {error}");
        }
    }
}
