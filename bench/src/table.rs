//! The table: what all contestants did in all cells of one back end, as markdown.

use std::fmt::Write;

use crate::cell::{CELLS, Figures};

/// A row before anything was measured.
pub(crate) struct Entrant {
    pub(crate) title: String,
    /// The row of ours that it is compared with: the first of these that there is.
    pub(crate) ours: Vec<String>,
    /// Whether its lead is our loss.
    pub(crate) is_rival: bool,
}

pub(crate) struct Table {
    /// One row for each contestant, in the order of appearance.
    rows: Vec<Row>,
}

struct Row {
    name: String,
    /// The number of the row that it is compared with.
    ours: Option<usize>,
    is_rival: bool,
    /// A measurement for each round, for each cell.
    cells: Vec<Vec<Figures>>,
}

impl Table {
    pub(crate) fn new(entrants: impl IntoIterator<Item = Entrant>) -> Table {
        let entrants: Vec<Entrant> = entrants.into_iter().collect();
        let number = |title: &String| entrants.iter().position(|entrant| entrant.title == *title);
        let row = |entrant: &Entrant| Row {
            name: entrant.title.clone(),
            ours: entrant.ours.iter().find_map(number),
            is_rival: entrant.is_rival,
            cells: vec![Vec::new(); CELLS.len()],
        };
        Table { rows: entrants.iter().map(row).collect() }
    }

    /// What the row of ours did that this one is compared with.
    fn ours(&self, row: &Row, cell: usize) -> Option<Figures> {
        Figures::median(&self.rows[row.ours?].cells[cell])
    }

    pub(crate) fn add(&mut self, row: usize, cell: usize, figures: Figures) {
        self.rows[row].cells[cell].push(figures);
    }

    /// One line a contestant, to see it all at once.
    pub(crate) fn overview(&self) -> String {
        let mut text = String::from("| kIOPS / CPU µs / p50 µs |");
        CELLS.iter().for_each(|cell| push(&mut text, format_args!(" {} |", cell.name)));
        text.push_str("\n|---|");
        CELLS.iter().for_each(|_| text.push_str("---|"));
        for row in &self.rows {
            push(&mut text, format_args!("\n| {} |", row.name));
            for rounds in &row.cells {
                match Figures::median(rounds) {
                    Some(figures) => push(
                        &mut text,
                        format_args!(
                            " {} / {} / {} |",
                            digits(figures.iops / 1000.0),
                            digits(figures.cpu_us),
                            digits(figures.p50_us)
                        ),
                    ),
                    None => text.push_str(" – |"),
                }
            }
        }
        text + "\n"
    }

    /// One line for each contestant in each cell, with all that is known.
    pub(crate) fn details(&self) -> String {
        let mut text = String::from(
            "| cell | server | kIOPS | CPU µs | p50 µs | p99 µs | IOPS to ours | CPU to ours | client busy |\n\
             |---|---|---|---|---|---|---|---|---|\n",
        );
        for (cell, of) in CELLS.iter().enumerate() {
            for row in &self.rows {
                let ours = self.ours(row, cell);
                let Some(figures) = Figures::median(&row.cells[cell]) else { continue };
                let ratio = |value: f64, ours: Option<f64>| {
                    ours.map_or("–".into(), |ours| format!("{:.2}", value / ours))
                };
                push(
                    &mut text,
                    format_args!(
                        "| {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
                        of.name,
                        row.name,
                        digits(figures.iops / 1000.0),
                        digits(figures.cpu_us),
                        digits(figures.p50_us),
                        digits(figures.p99_us),
                        ratio(figures.iops, ours.map(|ours| ours.iops)),
                        ratio(figures.cpu_us, ours.map(|ours| ours.cpu_us)),
                        figures.client_busy.map_or("–".into(), |busy| format!("{:.0} %", busy * 100.0)),
                    ),
                );
            }
        }
        text
    }

    /// The cells in which a rival is ahead of us, in words.
    pub(crate) fn lost(&self) -> String {
        let mut text = String::new();
        for (cell, of) in CELLS.iter().enumerate() {
            for row in self.rows.iter().filter(|row| row.is_rival) {
                let Some(own) = self.ours(row, cell) else { continue };
                let Some(rival) = Figures::median(&row.cells[cell]) else { continue };
                if rival.iops > own.iops {
                    let lead = rival.iops / own.iops;
                    push(
                        &mut text,
                        format_args!("- {}: {} has {lead:.2} times our IOPS\n", of.name, row.name),
                    );
                }
                if rival.cpu_us < own.cpu_us {
                    let lead = rival.cpu_us / own.cpu_us;
                    push(&mut text, format_args!("- {}: {} needs {lead:.2} of our CPU\n", of.name, row.name));
                }
            }
        }
        text
    }
}

/// Three digits that matter.
fn digits(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

fn push(text: &mut String, words: std::fmt::Arguments<'_>) {
    text.write_fmt(words).expect("a string takes all");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(iops: f64, cpu_us: f64) -> Figures {
        Figures { iops, cpu_us, p50_us: 12.0, p99_us: 345.0, client_busy: Some(0.5) }
    }

    fn entrant(title: &str, ours: &[&str], is_rival: bool) -> Entrant {
        Entrant { title: title.into(), ours: ours.iter().map(|title| title.to_string()).collect(), is_rival }
    }

    #[test]
    fn a_table_tells_medians_ratios_and_what_was_lost() {
        let mut table = Table::new([
            entrant("ours by sea", &["ours by sea"], false),
            entrant("ours by air", &["ours by air"], false),
            entrant("rival by sea", &["ours by sea"], true),
            entrant("limit", &["ours by air", "ours by sea"], false),
        ]);
        for iops in [100e3, 90e3, 110e3] {
            table.add(0, 0, figures(iops, 2.0));
        }
        table.add(1, 0, figures(400e3, 0.5));
        table.add(2, 0, figures(50e3, 1.0));
        table.add(3, 0, figures(200e3, 1.0));
        assert!(table.overview().contains("| ours by sea | 100 / 2.00 / 12.0 | – |"), "{}", table.overview());
        let details = table.details();
        assert!(
            details.contains("| rr4k-1 | rival by sea | 50.0 | 1.00 | 12.0 | 345 | 0.50 | 0.50 | 50 % |")
        );
        assert!(details.contains("| rr4k-1 | limit | 200 | 1.00 | 12.0 | 345 | 0.50 | 2.00 | 50 % |"));
        assert_eq!(table.lost(), "- rr4k-1: rival by sea needs 0.50 of our CPU\n");
    }

    #[test]
    fn without_us_there_are_no_ratios_and_nothing_is_lost() {
        let mut table = Table::new([entrant("rival", &["ours"], true)]);
        table.add(0, 1, figures(50e3, 1.0));
        assert!(table.details().contains("| – | – |"));
        assert_eq!(table.lost(), "");
    }
}
