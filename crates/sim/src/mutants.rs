//! Known mistakes, made one at a time in a copy of the sources: the simulation must catch each of them, or unit tests
//! where the simulation does not run that code.
//!
//! A mistake is a file in `crates/sim/mutants`: what it breaks, and the text to find in a source and what to put in
//! its place. A text that is not found exactly once is an error of its own: the code has moved on, and the mistake has
//! to follow it.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Seeds that each mistake has to survive to be a survivor.
const SEEDS: &str = "2000";
/// Beyond this a run counts as hanging, which is a catch too.
const PATIENCE: Duration = Duration::from_secs(180);
/// Sources that are copied; nothing else is needed to build the simulation.
const COPIED: [&str; 7] = ["Cargo.toml", "Cargo.lock", "crates", "bench", "lab", "xtask", ".cargo"];

/// One mistake.
#[derive(Debug)]
struct Mutant {
    name: String,
    /// What it breaks.
    breaks: String,
    catcher: Catcher,
    changes: Vec<Change>,
}

/// What has to catch a mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Catcher {
    Simulation,
    /// The simulation of images.
    Images,
    /// Tests of this crate whose name starts so: of its target of that name, or else unit tests.
    Tests {
        package: String,
        target: Option<String>,
        prefix: String,
    },
}

#[derive(Debug)]
struct Change {
    file: PathBuf,
    from: String,
    to: String,
}

/// How a mistake was found out.
struct Catch {
    oracle: String,
    seed: String,
    how: String,
}

/// Makes each mistake whose name contains `filter` and looks whether it is caught; prints a table.
///
/// # Errors
/// If one survives, does not build, or does not fit the sources any more.
pub fn run(filter: &str) -> Result<()> {
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().context("find the workspace")?;
    let mutants = load(&root.join("crates/sim/mutants"), filter)?;
    ensure!(!mutants.is_empty(), "no mutant is called `{filter}`");
    for mutant in &mutants {
        mutant.check(&root)?;
    }
    let workshop = Workshop::open(&root)?;
    let mut catchers: Vec<&Catcher> = Vec::new();
    for Mutant { catcher, .. } in &mutants {
        if !catchers.contains(&catcher) {
            catchers.push(catcher);
        }
    }
    for catcher in catchers {
        if let Some(catch) = workshop.look(catcher).context("the copy without any mistake")? {
            bail!(
                "without any mistake there is a catch at seed {}: {}: {}",
                catch.seed,
                catch.oracle,
                catch.how
            );
        }
    }
    println!("| mistake | what it breaks | caught by | seed | seconds |\n|---|---|---|---|---|");
    let mut survivors = Vec::new();
    for mutant in &mutants {
        let started = Instant::now();
        let caught = workshop.with(mutant)?;
        let seconds = started.elapsed().as_secs();
        let Mutant { name, breaks, .. } = mutant;
        match caught {
            Some(Catch { oracle, seed, how }) => {
                println!("| {name} | {breaks} | {oracle}: {how} | {seed} | {seconds} |");
            }
            None => {
                println!("| {name} | {breaks} | SURVIVED | - | {seconds} |");
                survivors.push(name.as_str());
            }
        }
    }
    ensure!(survivors.is_empty(), "nothing sees: {}", survivors.join(", "));
    println!("\nall {} mistakes are caught", mutants.len());
    Ok(())
}

fn load(directory: &Path, filter: &str) -> Result<Vec<Mutant>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .with_context(|| format!("list {}", directory.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()?;
    paths.sort();
    let mut mutants = Vec::new();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "mutant")) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if name.contains(filter) {
            let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            mutants.push(Mutant::parse(name, &text)?);
        }
    }
    Ok(mutants)
}

impl Mutant {
    /// Reads
    ///
    /// ```text
    /// What it breaks, in a sentence.
    /// tests: crate beginning::of::names (or crate/target)
    /// file: crates/…/….rs
    /// <<<<
    /// text to find
    /// ====
    /// text to put there
    /// >>>>
    /// ```
    ///
    /// with more files and texts as needed. Where no tests are named the simulation has to see it; that of images, where
    /// there is `simulation: images` instead of tests.
    fn parse(name: String, text: &str) -> Result<Mutant> {
        let mut lines = text.lines();
        let breaks = lines.next().unwrap_or_default().to_owned();
        let mut changes = Vec::new();
        let mut catcher = Catcher::Simulation;
        let mut file = None;
        while let Some(line) = lines.next() {
            if let Some((package, prefix)) =
                line.strip_prefix("tests: ").and_then(|rest| rest.split_once(' '))
            {
                let (package, target) = package
                    .split_once('/')
                    .map_or((package, None), |(package, target)| (package, Some(target.into())));
                catcher = Catcher::Tests { package: package.into(), target, prefix: prefix.into() };
            } else if line == "simulation: images" {
                catcher = Catcher::Images;
            } else if let Some(path) = line.strip_prefix("file: ") {
                file = Some(PathBuf::from(path));
            } else if line == "<<<<" {
                let until = |mark: &str, lines: &mut std::str::Lines<'_>| -> String {
                    lines.take_while(|line| *line != mark).map(|line| format!("{line}\n")).collect()
                };
                let from = until("====", &mut lines);
                let to = until(">>>>", &mut lines);
                let file = file.clone().with_context(|| format!("{name}: no file is named"))?;
                changes.push(Change { file, from, to });
            } else {
                ensure!(line.is_empty(), "{name}: `{line}` is neither a file nor a change");
            }
        }
        ensure!(!changes.is_empty(), "{name}: it changes nothing");
        Ok(Mutant { name, breaks, catcher, changes })
    }

    /// Whether it fits the sources.
    fn check(&self, root: &Path) -> Result<()> {
        for change in &self.changes {
            change.apply(root).with_context(|| format!("mutant {}", self.name))?;
        }
        Ok(())
    }
}

impl Change {
    /// The source with the change made.
    fn apply(&self, root: &Path) -> Result<String> {
        let path = root.join(&self.file);
        let source = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        match source.matches(&self.from).count() {
            1 => Ok(source.replace(&self.from, &self.to)),
            count => bail!(
                "its text is found {count} times in {}, not once; make it follow the code:\n{}",
                self.file.display(),
                self.from
            ),
        }
    }
}

/// A copy of the workspace in which mistakes are made and undone.
struct Workshop {
    sources: PathBuf,
    target: PathBuf,
}

impl Workshop {
    fn open(root: &Path) -> Result<Workshop> {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let base = target.join("mutants");
        let sources = base.join("workspace");
        if sources.exists() {
            fs::remove_dir_all(&sources).context("remove the last copy")?;
        }
        for name in COPIED {
            copy(&root.join(name), &sources.join(name)).with_context(|| format!("copy {name}"))?;
        }
        Ok(Workshop { sources, target: base.join("target") })
    }

    /// What is said on the way; an error where it does not build.
    fn build(&self, arguments: &[&str]) -> Result<String> {
        // Quick to build rather than quick to run; lints are not the point here.
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(&self.sources)
            .args(arguments)
            .args(["--release", "--offline"])
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_INCREMENTAL", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "64")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("RUSTFLAGS", "--cap-lints=allow")
            .output()
            .context("run cargo")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "it does not build:\n{said}");
        Ok(said)
    }

    /// Whether the sources, as they are, are caught.
    fn look(&self, catcher: &Catcher) -> Result<Option<Catch>> {
        match catcher {
            Catcher::Simulation => {
                self.build(&["build", "--quiet", "--package", "sim"])?;
                self.simulate(&["--runs", SEEDS])
            }
            Catcher::Images => {
                self.build(&["build", "--quiet", "--package", "sim"])?;
                self.simulate(&["--images", "--runs", SEEDS])
            }
            Catcher::Tests { package, target, prefix } => {
                let mut arguments = vec!["test", "--no-run", "--package", package];
                match target {
                    Some(target) => arguments.extend(["--test", target]),
                    None => arguments.push("--lib"),
                }
                let said = self.build(&arguments)?;
                // "Executable unittests src/lib.rs (/…/deps/guest-0123)"
                let path = said.lines().find_map(|line| {
                    let (_, path) = line.trim().strip_prefix("Executable ")?.split_once('(')?;
                    path.strip_suffix(')')
                });
                self.test(package, path.context("cargo does not say where the tests are")?, prefix)
            }
        }
    }

    /// Runs unit tests.
    fn test(&self, package: &str, program: &str, prefix: &str) -> Result<Option<Catch>> {
        let mut command = Command::new(program);
        command.arg(prefix).current_dir(self.sources.join("crates").join(package));
        let Some((success, output)) = run_for(PATIENCE, &mut command)? else {
            return Ok(Some(Catch::by("tests", "they hang")));
        };
        let failed = |line: &str| {
            let name = line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?;
            Some(name.rsplit("::").next().unwrap_or(name).to_owned())
        };
        let failed: Vec<String> = output.lines().filter_map(failed).collect();
        ensure!(!output.contains("running 0 tests"), "there are no tests called `{prefix}`");
        Ok((!success).then(|| Catch::by("tests", &failed.join(", "))))
    }

    /// Makes a mistake, looks whether it is caught, and undoes it.
    fn with(&self, mutant: &Mutant) -> Result<Option<Catch>> {
        let mut undo = Vec::new();
        for change in &mutant.changes {
            let path = self.sources.join(&change.file);
            undo.push((path.clone(), fs::read_to_string(&path).context("read a source")?));
            fs::write(&path, change.apply(&self.sources)?).context("make the mistake")?;
        }
        let caught = self.look(&mutant.catcher).with_context(|| format!("mutant {}", mutant.name));
        for (path, source) in undo.into_iter().rev() {
            fs::write(path, source).context("undo the mistake")?;
        }
        caught
    }

    /// Runs seeds until one fails.
    fn simulate(&self, arguments: &[&str]) -> Result<Option<Catch>> {
        let mut command = Command::new(self.target.join("release/sim"));
        command.args(arguments);
        let Some((success, output)) = run_for(PATIENCE, &mut command)? else {
            return Ok(Some(Catch::by("end", "it hangs")));
        };
        let told = output.lines().rev().find_map(Catch::parse);
        Ok((!success).then(|| told.unwrap_or_else(|| Catch::by("end", "it fails without a word"))))
    }
}

/// Runs a program for so long at most: whether it succeeded, and what it printed.
fn run_for(patience: Duration, command: &mut Command) -> Result<Option<(bool, String)>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let mut pipe = child.stdout.take().context("its output")?;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().context("wait for it")? {
            break Some(status);
        }
        if started.elapsed() > patience {
            child.kill().context("end it")?;
            child.wait().context("wait for its end")?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let Ok(output) = reader.join() else { bail!("reading its output panicked") };
    let output = output.context("read its output")?;
    Ok(status.map(|status| (status.success(), output)))
}

impl Catch {
    /// Reads "seed N: ORACLE: how".
    fn parse(line: &str) -> Option<Catch> {
        let (seed, rest) = line.strip_prefix("seed ")?.split_once(": ")?;
        let (oracle, how) = rest.split_once(": ")?;
        let how: String =
            how.chars().take(150).map(|letter| if letter == '|' { '/' } else { letter }).collect();
        Some(Catch { oracle: oracle.into(), seed: seed.into(), how })
    }

    fn by(oracle: &str, how: &str) -> Catch {
        Catch { oracle: oracle.into(), seed: "-".into(), how: how.into() }
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, to)?;
        return Ok(());
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_name() != "target" {
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_fits_the_sources() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mutants = load(&root.join("crates/sim/mutants"), "").unwrap();
        assert!(mutants.len() > 50);
        for mutant in mutants {
            mutant.check(&root).unwrap();
        }
    }

    #[test]
    fn a_text_that_is_not_there_once_is_an_error() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for (text, named) in [("there is no such line\n", "0 times"), ("\n", "times")] {
            let text = format!("Breaks.\n\nfile: src/lib.rs\n<<<<\n{text}====\nother\n>>>>\n");
            let error = Mutant::parse("one".into(), &text).unwrap().check(root).unwrap_err();
            assert!(format!("{error:#}").contains(named), "{error:#}");
        }
        let text = "Breaks.\ntests: guest xen::\nfile: src/lib.rs\n<<<<\na\n====\n>>>>\n";
        let tests = |target: Option<&str>| Catcher::Tests {
            package: "guest".into(),
            target: target.map(Into::into),
            prefix: "xen::".into(),
        };
        assert_eq!(Mutant::parse("tests".into(), text).unwrap().catcher, tests(None));
        let text = text.replace("guest xen", "guest/nbd xen");
        assert_eq!(Mutant::parse("tests".into(), &text).unwrap().catcher, tests(Some("nbd")));
        assert!(Mutant::parse("none".into(), "Breaks nothing.\n").is_err());
        assert!(Mutant::parse("odd".into(), "Breaks.\nwhat is this\n").is_err());
    }
}
