//! The command line of tapdisk: what is asked for is put together here and done elsewhere.

mod announce;
mod cli;
mod contents;
mod logging;
mod screen;
mod serve;
mod size;
mod state;
mod tool;
mod xen;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Detach(arguments) => xen::detach(&arguments),
        Command::Tool(tool) => return tool::run(tool),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tapdisk", &mut text);
            print(&text)
        }
        Command::Man { directory: Some(directory) } => man_pages(&directory),
        Command::Man { directory: None } => man_page(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tapdisk: {}", screen::harmless(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn man_page() -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut text)?;
    print(&text)
}

fn man_pages(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    Ok(())
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text)?;
    Ok(out.flush()?)
}
