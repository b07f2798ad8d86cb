//! Where errors are told: standard error, and the file that an engine reads.

use std::{
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use chrono::{SecondsFormat, Utc};
use serde_json::json;

use crate::args::LogFormat;

/// Tells an error as crun does. A log that cannot be written to is no reason to say less.
pub(crate) fn error(message: &str, log: Option<&Path>, format: LogFormat) {
    let _ = writeln!(io::stderr(), "{message}");
    if let Some(log) = log {
        let time = Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true);
        let told = File::options().append(true).create(true).open(log);
        let told =
            told.and_then(|mut file| file.write_all(line(message, &time, format).as_bytes()));
        if let Err(error) = told {
            let _ = writeln!(io::stderr(), "writing {}: {error}", log.display());
        }
    }
}

fn line(message: &str, time: &str, format: LogFormat) -> String {
    match format {
        LogFormat::Json => {
            format!(
                "{}\n",
                json!({"msg": message, "level": "error", "time": time})
            )
        }
        LogFormat::Text => format!("{message}\n"),
    }
}

/// A `--log` of crun's: a path, or `file:` and a path.
pub(crate) fn destination(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("file:").unwrap_or(text);
    if ["journald:", "syslog:"]
        .iter()
        .any(|kind| text.starts_with(kind))
    {
        return Err(format!(
            "{text}: husk-oci logs to files only, PATH or file:PATH"
        ));
    }
    match path {
        "" => Err("the path is empty".to_owned()),
        path => Ok(path.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_find_the_message() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        error("a \"b\"\nc", Some(&log), LogFormat::Json);
        let text = std::fs::read_to_string(&log).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&value["msg"], &value["level"]),
            (&json!("a \"b\"\nc"), &json!("error"))
        );
        assert_eq!(line("a", "now", LogFormat::Text), "a\n");
    }

    #[test]
    fn a_log_is_a_file() {
        assert_eq!(destination("/a"), Ok("/a".into()));
        assert_eq!(destination("file:/a"), Ok("/a".into()));
        assert!(destination("syslog:x").unwrap_err().contains("files only"));
        assert!(destination("").is_err() && destination("file:").is_err());
    }
}
