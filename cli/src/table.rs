//! Lists: columns for people, JSON for programs.

use std::io::{self, Write as _};

use anyhow::Result;
use serde::Serialize;

use crate::args::Format;

/// Prints rows under headings, each column as wide as its widest word; or the items behind them, as JSON.
pub(crate) fn print<T: Serialize>(
    format: Format,
    headings: &[&str],
    items: &[T],
    row: impl Fn(&T) -> Vec<String>,
) -> Result<()> {
    let mut out = io::stdout().lock();
    if format == Format::Json {
        for item in items {
            writeln!(out, "{}", serde_json::to_string(item)?)?;
        }
        return Ok(());
    }
    let heading = headings.iter().map(|word| (*word).to_owned()).collect();
    let rows: Vec<Vec<String>> = [heading].into_iter().chain(items.iter().map(row)).collect();
    let width = |column: usize| {
        let words = rows.iter().filter_map(|row| row.get(column));
        words.map(|word| word.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    for row in &rows {
        let mut line = String::new();
        for (word, width) in row.iter().zip(&widths) {
            line += &format!("{word:width$}   ");
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}
