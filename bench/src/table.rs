//! The table: what all contestants did in all cells of one back end, as markdown.

use std::fmt::Write;

use crate::cell::{CELLS, Figures};

/// Whose ratios to all others are told.
const OURS: &str = "tapdisk";

pub(crate) struct Table {
    /// One row for each contestant, in the order of appearance.
    rows: Vec<Row>,
}

struct Row {
    name: String,
    /// A measurement for each round, for each cell.
    cells: Vec<Vec<Figures>>,
}

impl Table {
    pub(crate) fn new(names: impl IntoIterator<Item = String>) -> Table {
        let rows = names.into_iter().map(|name| Row { name, cells: vec![Vec::new(); CELLS.len()] }).collect();
        Table { rows }
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
        let ours = self.rows.iter().find(|row| row.name == OURS);
        for (cell, of) in CELLS.iter().enumerate() {
            let ours = ours.and_then(|row| Figures::median(&row.cells[cell]));
            for row in &self.rows {
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

    /// The cells in which a rival is ahead of us, in words; rivals are the rows that `is_rival` names.
    pub(crate) fn lost(&self, is_rival: impl Fn(&str) -> bool) -> String {
        let mut text = String::new();
        let Some(ours) = self.rows.iter().find(|row| row.name == OURS) else { return text };
        for (cell, of) in CELLS.iter().enumerate() {
            let Some(own) = Figures::median(&ours.cells[cell]) else { continue };
            for row in self.rows.iter().filter(|row| row.name != OURS && is_rival(&row.name)) {
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

    #[test]
    fn a_table_tells_medians_ratios_and_what_was_lost() {
        let mut table = Table::new(["tapdisk".into(), "rival".into(), "limit".into()]);
        for iops in [100e3, 90e3, 110e3] {
            table.add(0, 0, figures(iops, 2.0));
        }
        table.add(1, 0, figures(50e3, 1.0));
        table.add(2, 0, figures(200e3, 1.0));
        assert!(table.overview().contains("| tapdisk | 100 / 2.00 / 12.0 | – |"), "{}", table.overview());
        assert!(
            table.details().contains("| rr4k-1 | rival | 50.0 | 1.00 | 12.0 | 345 | 0.50 | 0.50 | 50 % |")
        );
        assert_eq!(table.lost(|name| name != "limit"), "- rr4k-1: rival needs 0.50 of our CPU\n");
    }

    #[test]
    fn without_us_there_are_no_ratios_and_nothing_is_lost() {
        let mut table = Table::new(["rival".into()]);
        table.add(0, 1, figures(50e3, 1.0));
        assert!(table.details().contains("| – | – |"));
        assert_eq!(table.lost(|_| true), "");
    }
}
