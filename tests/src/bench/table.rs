//! Figures by name and runtime: a table for people, JSON for programs.

use std::collections::BTreeMap;

use anyhow::Result;
use husk_tests::{runtime::Runtime, timing::median};
use serde_json::{Map, Value, json};

use crate::RUNTIMES;

/// Samples of one figure.
pub struct Row {
    name: String,
    unit: &'static str,
    samples: BTreeMap<Runtime, Vec<f64>>,
}

impl Row {
    /// A figure without samples.
    pub fn new(name: impl Into<String>, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            unit,
            samples: BTreeMap::new(),
        }
    }

    /// Adds one sample.
    pub fn add(&mut self, runtime: Runtime, value: f64) {
        self.samples.entry(runtime).or_default().push(value);
    }

    fn median(&self, runtime: Runtime) -> Option<f64> {
        median(self.samples.get(&runtime)?)
    }

    fn line(&self) -> String {
        let mut line = format!("{:<30} {:<7}", self.name, self.unit);
        for runtime in RUNTIMES {
            line += &match self.median(runtime) {
                Some(value) => format!(" {value:>11.1}"),
                None => format!(" {:>11}", "–"),
            };
        }
        if let (Some(husk), Some(runc)) = (self.median(Runtime::Husk), self.median(Runtime::Runc))
            && runc > 0.0
        {
            line += &format!(" {:>10.2}", husk / runc);
        }
        line
    }

    fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("name".into(), json!(self.name));
        object.insert("unit".into(), json!(self.unit));
        let mut counts = Map::new();
        for runtime in RUNTIMES {
            object.insert(runtime.name().into(), json!(self.median(runtime)));
            if let Some(samples) = self.samples.get(&runtime) {
                counts.insert(runtime.name().into(), json!(samples.len()));
            }
        }
        object.insert("samples".into(), Value::Object(counts));
        Value::Object(object)
    }
}

/// All figures of a run.
#[derive(Default)]
pub struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// Adds a figure, and shows it: a run takes long, and may not come to its end.
    pub fn push(&mut self, row: Row) {
        eprintln!("{}", row.line());
        self.rows.push(row);
    }

    /// Prints medians side by side, with husk's ratio to runc.
    pub fn print(&self) {
        print!("\n{:<30} {:<7}", "median", "unit");
        for runtime in RUNTIMES {
            print!(" {:>11}", runtime.name());
        }
        println!(" {:>10}", "husk/runc");
        for row in &self.rows {
            println!("{}", row.line());
        }
        println!();
    }

    /// The list that `bench.json` holds.
    ///
    /// # Errors
    /// A figure that JSON has no number for.
    pub fn json(&self) -> Result<String> {
        let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
        Ok(serde_json::to_string_pretty(&rows)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_medians_and_counts() {
        let mut row = Row::new("x", "ms");
        for value in [3.0, 1.0, 2.0] {
            row.add(Runtime::Husk, value);
        }
        let mut table = Table::default();
        table.push(row);
        let list: Value = serde_json::from_str(&table.json().unwrap()).unwrap();
        assert_eq!(list[0]["name"], "x");
        assert_eq!(list[0]["husk"], 2.0);
        assert_eq!(list[0]["runc"], Value::Null);
        assert_eq!(list[0]["samples"]["husk"], 3);
    }
}
